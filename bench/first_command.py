"""Where the time of the README's first command goes: ``python -m bench.first_command``.

Plays it in this process, with folders of its own and an empty feature cache, and tells seconds and
shares: reading the library and the weights, drawing images, the image tower, training, evaluation,
checkpoints, the page. Writes the table of ``docs/running.md`` between its markers, or prints it
(``--print``).
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import click

BEGAN = time.perf_counter()
ROOT = Path(__file__).parent.parent
#: In the order of the table; the first also has what is nobody's.
PARTS = {
    "else": "the rest: settings, prompts, progress",
    "library": "reading the library: torch, open_clip",
    "weights": "the embedded weights",
    "images": "drawing and cutting images",
    "tower": "the image tower",
    "cache": "writing and reading features",
    "training": "training",
    "evaluation": "evaluation",
    "checkpoints": "checkpoints",
    "page": "the page, its plots, and the table",
}


class Clock:
    """Seconds by what is being done; what is inside something else is the inner one's."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._now, self._doing, self._since = now, ["else"], now()

    def _turn(self) -> None:
        now = self._now()
        self.seconds[self._doing[-1]] += now - self._since
        self._since = now

    @contextmanager
    def _during(self, part: str) -> Any:
        self._turn()
        self._doing.append(part)
        try:
            yield
        finally:
            self._turn()
            self._doing.pop()

    def during(self, part: str) -> AbstractContextManager[None]:
        """Count what goes on inside to a part."""
        found: AbstractContextManager[None] = self._during(part)
        return found

    def end(self) -> None:
        """Count what went on until now."""
        self._turn()

    def counted(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls count to a part."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return call(*args, **kwargs)

        return counting


def words() -> list[str]:
    """Read the first command in the README, without ``fastfpl`` and without its folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- first command -->\n```bash\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    line = next(x for x in found[1].splitlines() if x.startswith("fastfpl "))
    given = shlex.split(line)[1:]
    at = given.index("--out")
    return given[:at] + given[at + 2 :]


def watch(clock: Clock) -> None:
    """Let the rooms that take time be counted, wherever they are called from."""
    from fastfpl import report
    from fastfpl.cli import screen
    from fastfpl.clip import image, loading
    from fastfpl.data import loader
    from fastfpl.features import store
    from fastfpl.federation import checkpoint, rounds

    functions = {
        loading.load_clip: "weights",
        checkpoint.save_checkpoint: "checkpoints",
        report.write_report: "page",
        screen.print_tables: "page",
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("fastfpl")]:
        for name, value in list(vars(module).items()):
            part = functions.get(value) if callable(value) and _hashable(value) else None
            if part is not None:
                setattr(module, name, clock.counted(part, value))
    methods = [
        (store.FeatureStore, "get", "cache"),
        (loader.Loader, "pixels", "images"),
        *((kind, "both", "tower") for kind in _kinds(image.ImageTower)),
        *((kind, "pooled", "tower") for kind in _kinds(image.ImageTower)),
        *((kind, "tokens", "tower") for kind in _kinds(image.ImageTower)),
        (rounds.Federation, "_train", "training"),
        (rounds.Federation, "_evaluate", "evaluation"),
    ]
    for kind, name, part in methods:
        if name in vars(kind):
            setattr(kind, name, clock.counted(part, vars(kind)[name]))


def _kinds(kind: type) -> list[type]:
    return [kind, *(inner for one in kind.__subclasses__() for inner in _kinds(one))]


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def table(seconds: dict[str, float]) -> str:
    """Write the table in Markdown, the longest first, the rest last."""
    whole = sum(seconds.values())
    named = sorted((p for p in PARTS if p != "else"), key=lambda part: -seconds[part])
    lines = ["| what | seconds | share |", "|:--|--:|--:|"]
    for part in (*named, "else"):
        lines.append(
            f"| {PARTS[part]} | {seconds[part]:.1f} | {100 * seconds[part] / whole:.0f} % |"
        )
    return "\n".join([*lines, f"| **all** | {whole:.1f} | |"])


@click.command()
@click.option("--print", "only", is_flag=True, help="print the table, write nothing")
def main(only: bool) -> None:
    """Play the first command and tell where its time went."""
    clock = Clock()
    clock.seconds["library"] = time.perf_counter() - BEGAN
    with clock.during("library"):
        for name in ("open_clip", "fastfpl.cli.compare", "fastfpl.federation.rounds"):
            importlib.import_module(name)
    watch(clock)
    from fastfpl.cli import main as fastfpl_main

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        given = [*words(), "--out", str(here / "first"), "--cache", str(here / "features")]
        fastfpl_main(given)
    clock.end()
    found = table(clock.seconds)
    if only:
        click.echo(found)
        return
    from bench.kept import between

    between(ROOT / "docs" / "running.md", "first command", found)


if __name__ == "__main__":
    main()
