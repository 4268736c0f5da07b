"""Results made by hand, and their report as a terminal and a browser see it."""

from __future__ import annotations

import functools
import html.parser
import io
from pathlib import Path
from typing import Any

from rich.console import Console

from fastfpl.config import Settings
from fastfpl.federation import Comparison, Result
from fastfpl.federation.result import summarise
from fastfpl.report import accuracy_plot, text_table

EVIL = '<script>alert("x")</script>'


def marks(accuracies: list[float]) -> dict[str, Any]:
    """What one exam says in a row of a result."""
    mean = sum(accuracies) / len(accuracies)
    return {"accuracy": mean, "macro_f1": mean, "clients": accuracies, "domains": {"drawn": mean}}


def result(
    method: str,
    accuracies: list[list[float] | None],
    *,
    seed: int = 0,
    selected: int | None = None,
    trains: bool = True,
    classes: tuple[str, ...] = ("a", "b", "c"),
    name: str = "glyphs",
    environment: dict[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Make a result by hand: one list of clients' accuracies a round, None without evaluation."""
    clients = len(next(a for a in accuracies if a is not None))
    joined = list(range(clients if selected is None else selected)) if trains else []
    lines = [
        {
            "round": number,
            "accuracy": None if a is None else sum(a) / len(a),
            "clients": [] if a is None else a,
            "exams": {} if a is None else {"own": marks(a)},
            "selected": joined,
            "lost": [],
            "loss": 1.5 if trains else None,
            "seconds": 2.0 + number,
            "images_per_second": 1000.0 if trains else 0.0,
            "bytes_up": 4096 * len(joined),
            "bytes_down": 40960 * len(joined),
        }
        for number, a in enumerate(accuracies)
    ]
    chosen = Settings(
        method=method, seed=seed, **{"clients": clients, "rounds": len(accuracies), **settings}
    )
    return Result(
        method=method,
        settings=chosen.model_dump(),
        environment={"fastfpl": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 2}
        | (environment or {}),
        faces={"encode_text": ["reference"]},
        rounds=lines,
        final=summarise(lines),
        peak_memory_bytes=612_000_000 + seed,
        data={
            "name": name,
            "classes": list(classes),
            "train_images": [48] * clients,
            "test_images": [20] * clients,
            "weights": "0f3a9c2e",
            "exams": {"own": "its own test images"},
            "transductive": False,
            "skipped": 0,
            "notes": [],
        },
    )


def pair(seeds: tuple[int, ...] = (0,), **settings: Any) -> Comparison:
    """Zero-shot with one round and a method with three."""
    still: list[list[float] | None] = [[0.1, 0.3]]
    moving: list[list[list[float] | None]] = [
        [[0.2, 0.4], [0.4, 0.6], [0.5 + 0.1 * s, 0.7 + 0.1 * s]] for s in seeds
    ]
    return Comparison(
        {
            "zeroshot": [
                result("zeroshot", still, seed=s, trains=False, **{"rounds": 3, **settings})
                for s in seeds
            ],
            "promptfl": [
                result("promptfl", a, seed=s, **settings)
                for s, a in zip(seeds, moving, strict=True)
            ],
        }
    )


def save(comparison: Comparison, folder: Path) -> None:
    for results in comparison.results.values():
        for one in results:
            run = folder / f"{one.method}-seed{one.settings['seed']}"
            run.mkdir(parents=True)
            one.save(run)


def terminal(comparison: Comparison, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(text_table(comparison))
    return out.getvalue()


class Page(html.parser.HTMLParser):
    """What a page loads, how its tags nest, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.headers: list[str | None] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "data", "action") and v]
        if given.get("href"):
            self.links.append(str(given["href"]))
        if tag == "img":
            self.alts.append(given.get("alt") or "")
        if tag == "th":
            self.headers.append(given.get("scope"))
        if tag not in ("meta", "img", "source", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@functools.cache
def drawn_once(kind: str) -> bytes:
    return accuracy_plot(pair(), kind)
