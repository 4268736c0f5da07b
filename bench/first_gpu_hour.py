"""Play the first hour on a card: ``python -m bench.first_gpu_hour --out DIR``.

Plays the steps of `bench.first_steps` in their order and stops at the first that is red. Called
again with the same folder it goes on: what was green for the same sources, torch, Triton and card
is not played again. Every step has a log in ``DIR/logs``; ``summary.json`` and ``summary.md`` are
written anew after each, times and tables lie beside them under the card's name.

``--rehearse`` plays the same list without a card: tests and benches are collected as a card would
select them, small cases run in the interpreter, the command line is read up to where the card is
missed. It finds wrong paths, options and names; of kernels it proves nothing.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from bench.first_steps import STEPS, Step
from fastfpl.errors import FastfplError, InputError
from fastfpl.files import on_disk, write_json, write_text

__all__ = ["Hour", "Place", "main"]

ROOT = Path(__file__).resolve().parent.parent
#: What the sources of a step are: everything that a result may depend on.
ROOMS = ("fastfpl", "kernels", "csrc", "tests", "bench")
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
#: What a rehearsal imports once.
SHARED = ("torch", "pytest", "hypothesis.strategies", "open_clip", "fastfpl.testing")
_PROBE = """
import json, torch
cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
                  "cards": [torch.cuda.get_device_name(i) for i in cards]}))
"""
#: argv, environment, log and seconds; the exit status, or None if it took longer.
Run = Callable[[Sequence[str], Mapping[str, str], Path, float], "int | None"]


@dataclass(frozen=True)
class Place:
    """What a green step was green for."""

    card: str
    cards: int
    torch: str
    triton: str
    python: str
    commit: str
    sources: str

    @property
    def slug(self) -> str:
        """The card in names of files."""
        return re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")

    @property
    def key(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "cards"}


def place(rehearse: bool) -> Place:
    """Ask torch for the cards, in a process of its own: this one leaves them alone."""
    triton = _version("triton") or _version("pytorch-triton") or "none"
    rest = {"triton": triton, "python": sys.version.split()[0]}
    rest |= {"commit": _commit(), "sources": _sources()}
    if rehearse:
        return Place("rehearsed, no card", 2, _version("torch") or "none", **rest)
    asked = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(f"first_gpu_hour: torch must start; got {said}")
    found = json.loads(asked.stdout.splitlines()[-1])
    cards = found["cards"]
    if not cards:
        raise InputError(
            f"first_gpu_hour: torch must see a CUDA device; got none by torch {found['torch']}, "
            f"built for {'CUDA ' + found['cuda'] if found['cuda'] else 'the CPU'}; "
            "--rehearse plays the list without a card"
        )
    return Place(cards[0], len(cards), found["torch"], **rest)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _sources() -> str:
    """Digest the sources as they lie there: changes that nobody has committed count."""
    digest = hashlib.sha256()
    suffixes = {".py", ".cpp", ".h", ".toml", ".yaml"}
    files = [p for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in suffixes]
    for path in sorted([*files, *ROOT.glob("*.py"), *ROOT.glob("*.toml")]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def spawned(argv: Sequence[str], env: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run a step in a process group of its own, which ends with it."""
    with log.open("wb") as file:
        running = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=os.environ | env, start_new_session=True,
        )  # fmt: skip
        try:
            return running.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(running.pid)
            running.wait()


def forked(argv: Sequence[str], env: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run ``python argv[1:]`` in a fork of this process, which has imported what all steps do."""
    if "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a rehearsal is the same where there is a card
        # Triton's own library is what it was imported as; only what is interpreted runs here
        os.environ["TRITON_INTERPRET"] = "1"
        for name in SHARED:
            importlib.import_module(name)
        del os.environ["TRITON_INTERPRET"]
        gc.freeze()  # pytest collects garbage thrice, and would walk through all of torch
    child = os.fork()
    if child == 0:
        _play(argv, env, log)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        if child:
            _end(child)
            os.waitpid(child, 0)


def _play(argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
    """Do in a fork what the interpreter does with these arguments, and end it."""
    import runpy
    import traceback

    code = 1
    try:
        os.setsid()
        os.chdir(ROOT)
        os.environ.update(env)
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.path.insert(0, str(ROOT))
        how, what, *rest = argv[1:]
        sys.argv = [what, *rest]
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201  as the interpreter does
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(group: int) -> None:
    """End what is left of a step: a bench may have started compilers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


class Hour:
    """The list on one machine, and what came of it.

    Parameters
    ----------
    steps : sequence of Step
    out : Path
        Folder of logs and results.
    where : Place
    run : callable
        Plays one command.
    rehearse : bool
    seconds : float
        For all steps of this call together.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        where: Place,
        run: Run,
        *,
        rehearse: bool = False,
        seconds: float = float("inf"),
    ) -> None:
        self.steps, self.out, self.where = steps, out, where
        self._run, self._rehearse = run, rehearse
        self._until = time.monotonic() + seconds
        with on_disk("first_gpu_hour", "--out", out, "or give another folder"):
            (out / "logs").mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = self._earlier()

    def _earlier(self) -> dict[str, dict[str, Any]]:
        path = self.out / "summary.json"
        if not path.exists():
            return {}
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["steps"]
            return {row["name"]: dict(row) for row in rows}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"first_gpu_hour: {path} must be what an earlier hour wrote; got something else; "
                "remove it, or give another folder"
            ) from None

    def play(self, again: Sequence[str] = ()) -> bool:
        """Play what is not green yet, up to the first red; say whether all that can be is green."""
        for number, step in enumerate(self.steps, 1):
            if step.name not in again and self._green(step):
                click.echo(f"{step.name}: green before")
                continue
            if reason := self._impossible(step):
                self._note(step, status="not played", why=reason)
                click.echo(f"{step.name}: not played, {reason}")
                continue
            if time.monotonic() >= self._until:
                click.echo(f"{step.name}: the time is up; the same command goes on here")
                return False
            click.echo(f"{step.name}: {step.what} ...")
            if not self._one(step, number):
                return False
        return True

    def _green(self, step: Step) -> bool:
        row = self.rows.get(step.name, {})
        made = self._made(step)
        there = made is None or made.exists()
        return row.get("status") == "green" and row.get("for") == self.where.key and there

    def _impossible(self, step: Step) -> str:
        if step.cards > self.where.cards:
            return f"it needs {step.cards} cards; this machine has {self.where.cards}"
        if step.before and not self._rehearse and _tool(step.before[0]) is None:
            return f"{step.before[0]} is neither in PATH nor in {' or '.join(TOOLS)}"
        return ""

    def _made(self, step: Step) -> Path | None:
        argv = step.rehearsal if self._rehearse else step.argv
        wanted = any("{made}" in x for x in argv)
        return self.out / step.makes.replace("{card}", self.where.slug) if wanted else None

    def _argv(self, step: Step, part: Path | None) -> list[str]:
        """Fill in a step's command; only its own names are replaced."""
        given = step.rehearsal if self._rehearse else step.argv
        filled = {"{out}": str(self.out), "{card}": self.where.slug, "{made}": str(part)}
        named = [re.sub(r"\{(out|card|made)\}", lambda m: filled[m[0]], x) for x in given]
        python = [sys.executable, *named] if named else []
        if self._rehearse or not step.before:
            return python
        return [str(_tool(step.before[0])), *step.before[1:], *python]

    def _one(self, step: Step, number: int) -> bool:
        log = self.out / "logs" / f"{number:02}-{step.name}.log"
        growing = log.with_name(log.name + ".part")
        made = self._made(step)
        part = made and made.with_name(f".{made.name}.part")
        if part:
            part.unlink(missing_ok=True)
        left = self._until - time.monotonic()
        limit = min(60 * step.minutes, left)
        env = step.rehearsal_env if self._rehearse else step.env
        begun, begin = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
        argv = self._argv(step, part)
        common: dict[str, Any] = {"begun": begun, "argv": argv, "log": f"logs/{log.name}"}
        try:
            code = self._run(argv, env, growing, limit)
        except KeyboardInterrupt:
            os.replace(growing, log)
            self._note(step, status="unfinished", why="interrupted", **common)
            raise
        os.replace(growing, log)
        common |= {"seconds": round(time.monotonic() - begin, 2), "exit": code}
        text = log.read_text(encoding="utf-8", errors="replace")
        if code is None and limit == left:
            self._note(step, status="unfinished", why="the time of this call was up", **common)
            click.echo(f"{step.name}: the time is up; the same command goes on here")
            return False
        why = self._fault(step, code, text, part)
        if why:
            self._note(step, status="red", why=why, **common)
            lines = "\n".join(text.splitlines()[-30:])
            click.echo(f"{lines}\n\n{step.name} is red: {why}\nlog: {log}\nlook at: {step.look}")
            return False
        if made and part:
            os.replace(part, made)
        self._note(step, status="green", made=made and made.name, **common)
        click.echo(f"{step.name}: green, {common['seconds']} s")
        return True

    def _fault(self, step: Step, code: int | None, text: str, part: Path | None) -> str:
        proves = step.rehearses if self._rehearse else step.proves
        right = step.rehearsal_exit if self._rehearse else 0
        if code is None:
            return f"it took longer than {step.minutes:g} minutes"
        if code != right:
            return f"it ended with {code}, not with {right}"
        if proves and not re.search(proves, text):
            return f"its log does not hold {proves!r}: nothing was proven"
        if part and not (part.exists() and part.stat().st_size):
            return f"it wrote no {part.name}"
        return ""

    def _note(self, step: Step, **facts: Any) -> None:
        self.rows[step.name] = {"name": step.name, "what": step.what, "for": self.where.key} | facts
        rows = [self.rows[s.name] for s in self.steps if s.name in self.rows]
        shown = {"place": asdict(self.where), "rehearsed": self._rehearse, "steps": rows}
        write_json(self.out / "summary.json", shown)
        write_text(self.out / "summary.md", self._page(rows))

    def _page(self, rows: Sequence[Mapping[str, Any]]) -> str:
        w = self.where
        lines = [
            f"# {'A rehearsal of the' if self._rehearse else 'The'} first hour: {w.card}",
            "",
            f"torch {w.torch}, Triton {w.triton}, Python {w.python}, commit {w.commit[:7]}, "
            f"sources {w.sources}",
            "",
            "| step | result | s | exit | log | why |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            result = row["status"] if row["for"] == w.key else f"{row['status']}, of another state"
            log = f"[log]({row['log']})" if row.get("log") else ""
            cells = (row["name"], result, row.get("seconds", ""), row.get("exit", ""), log)
            why = str(row.get("why", "")).replace("|", "\\|")
            lines.append("| " + " | ".join(str(c) for c in (*cells, why)) + " |")
        missing = [s.name for s in self.steps if s.name not in self.rows]
        if missing:
            lines += ["", f"Not come to yet: {', '.join(missing)}."]
        return "\n".join(lines) + "\n"


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOLS))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder of results")
@click.option("--again", multiple=True, metavar="STEP", help="play a step again though it is green")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=120,
    show_default=True,
    help="for all steps together; the same command goes on later",
)
@click.option("--rehearse", is_flag=True, help="without a card, into OUT/rehearsal")
def main(out: Path, again: tuple[str, ...], minutes: float, rehearse: bool) -> None:
    """Play the first hour on a card, up to the first red."""
    names = [step.name for step in STEPS]
    try:
        for name in again:
            if name not in names:
                raise InputError(
                    f"first_gpu_hour: --again must name a step; got {name!r}; steps are "
                    + ", ".join(names)
                )
        where = place(rehearse)
        folder = (out / "rehearsal" if rehearse else out).resolve()
        run = forked if rehearse else spawned
        hour = Hour(STEPS, folder, where, run, rehearse=rehearse, seconds=60 * minutes)
        done = hour.play(again)
    except FastfplError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"{'all that can be played is green' if done else 'not done'}: {folder}/summary.md")
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
