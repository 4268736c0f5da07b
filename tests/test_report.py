from __future__ import annotations

import csv
import errno
import functools
import html.parser
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from fastfpl.cli import main
from fastfpl.config import Settings
from fastfpl.data import partition
from fastfpl.errors import Damaged, FastfplError, InputError, Missing
from fastfpl.federation import Comparison, Result, Sweep
from fastfpl.federation.result import deal, summarise
from fastfpl.report import (
    accuracy_plot,
    clients_plot,
    csv_table,
    html_page,
    load_comparisons,
    markdown_table,
    sweep_table,
    text_table,
    write_report,
    write_sweep,
)
from fastfpl.report.agreement import warnings
from fastfpl.report.facts import augmentation, rows
from fastfpl.report.plots import _DARK, LIGHT, _colours, _round_ticks, curve, spread, swarm
from fastfpl.report.runs import group_names
from fastfpl.report.words import duration, percent, public, rate, size
from tests.warm import warm_python

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


# -- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (percent, 0.6132, "61.3"),
        (percent, 1.0, "100.0"),
        (size, 0, "0 B"),
        (size, 999, "999 B"),
        (size, 1000, "1.0 kB"),
        (size, 32768, "33 kB"),
        (size, 999_600, "1.0 MB"),
        (size, 5_700_000_000, "5.7 GB"),
        (size, 5e15, "5000.0 TB"),
        (duration, 0.1234, "0.12 s"),
        (duration, 4.21, "4.2 s"),
        (duration, 59.6, "60 s"),
        (duration, 1500, "25 min"),
        (duration, 9000, "2.5 h"),
        (rate, 3.21, "3.2"),
        (rate, 12345.6, "12,346"),
    ],
)
def test_numbers_read_well(write: Any, number: float, text: str) -> None:
    assert write(number) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (True, "True"),
        ({"heads": 8, "words": "a photo of a"}, "heads=8, words=a photo of a"),
        ({}, "\u2013"),
        ("ViT-B-16", "ViT-B-16"),
        ("hf-hub:someone/model", "hf-hub:someone/model"),
        ("/home/someone/weights.pt", "…/weights.pt"),
        ("~/weights.pt", "…/weights.pt"),
        ("C:\\Users\\someone\\weights.pt", "…/weights.pt"),
        ({"file": "/home/someone/a.pt"}, "file=…/a.pt"),
    ],
)
def test_settings_show_no_folder_of_the_machine(value: Any, text: str) -> None:
    assert public(value) == text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"augment": "none"}, "one deterministic view each, encoded once (augment=none)"),
        (
            {"augment": "views:4", "crop": 0.5, "flip": 0.0},
            "4 fixed random crops of at least 50 % of the area each, encoded once "
            "(augment=views:4)",
        ),
        (
            {"augment": "fresh", "crop": 0.08, "flip": 0.5},
            "new random crops of at least 8 % of the area, mirrored with probability 0.5 in every "
            "step (augment=fresh)",
        ),
    ],
)
def test_augmentation_is_said_in_words(settings: dict[str, Any], text: str) -> None:
    assert augmentation(settings) == text


# -- tables ----------------------------------------------------------------------------------


def test_one_seed_gives_the_figures_computed_by_hand() -> None:
    still, moving = rows(pair())
    # clients .5 and .7 in the last round; rounds .3, .5, .6
    assert moving.accuracy == pytest.approx(0.6)
    assert moving.std_over_clients == pytest.approx(0.1)
    assert moving.std_over_seeds is None
    assert moving.last5 == pytest.approx((0.3 + 0.5 + 0.6) / 3)
    assert moving.best == pytest.approx(0.6)
    assert moving.seconds == pytest.approx(2 + 3 + 4)
    assert (moving.bytes_up, moving.bytes_down) == (4096, 40960)
    assert (moving.total_up, moving.total_down) == (3 * 2 * 4096, 3 * 2 * 40960)
    assert moving.top
    assert not still.top
    assert still.images_per_second is None
    assert still.bytes_up is None
    text = markdown_table(pair())
    assert "± seeds" not in text
    assert (
        "| zeroshot | 20.0 ± 10.0 | 20.0 | 20.0 | \u2013 | 2.0 s | 612 MB | \u2013 | \u2013 |"
        in text
    )
    assert (
        "| **promptfl** | **60.0 ± 10.0** | 46.7 | 60.0 | 1,000 | 9.0 s | 612 MB | 4.1 kB | 41 kB |"
        in text
    )


def test_three_seeds_give_the_figures_computed_by_hand() -> None:
    _, moving = rows(pair((0, 1, 2)))
    # last rounds .6, .7, .8: deviation .1 with n - 1
    assert moving.accuracy == pytest.approx(0.7)
    assert moving.std_over_seeds == pytest.approx(0.1)
    assert moving.std_over_clients == pytest.approx(0.1)
    text = markdown_table(pair((0, 1, 2)))
    assert "| **promptfl** | **70.0 ± 10.0** | 10.0 |" in text
    assert "standard deviation over seeds (n-1)" in text


def test_bytes_are_those_of_a_client_that_takes_part() -> None:
    one = result("promptfl", [[0.5] * 10] * 4, selected=2, participation=0.2)
    (row,) = rows(Comparison({"promptfl": [one]}))
    assert row.bytes_up == 4096
    assert row.total_up == 4 * 2 * 4096
    assert not row.top  # of one there is no best


def test_the_caption_says_what_is_averaged() -> None:
    text = " ".join(terminal(pair((0, 1))).split())
    assert "unweighted mean over the clients, each on its own test images" in text
    assert "all 3 classes, last round" in text
    assert "not a headline" in text
    assert "training images: one deterministic view each" in text


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_eighty_columns_hold_every_figure(seeds: tuple[int, ...]) -> None:
    rounds: list[list[float] | None] = [[0.123, 0.987]] * 3
    name = "fedapt-unsupervised"
    text = terminal(Comparison({name: [result(name, rounds, seed=s) for s in seeds]}))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for figure in ("55.5 ± 43.2", "55.5", "1,000", "612 MB", "4.1 kB", "41 kB"):
        assert figure in text
    assert "unsupervised" in text


def test_csv_holds_unrounded_figures() -> None:
    still, moving = csv.DictReader(io.StringIO(csv_table(pair((0, 1, 2)))))
    assert still["images_per_second"] == ""
    assert float(moving["std_over_seeds"]) == pytest.approx(0.1, abs=1e-12)
    assert float(moving["bytes_down"]) == 40960


def test_names_are_text_and_never_markup() -> None:
    odd = "[bold]a|b*<i>"
    c = Comparison({odd: [result(odd, [[0.5, 0.6]], name=EVIL)]})
    shown = terminal(c, 120)
    assert odd in shown
    assert EVIL in shown
    text = markdown_table(c)
    assert "\\[bold\\]a\\|b\\*&lt;i&gt;" in text
    assert "<script" not in text
    # a dollar sign must not start a formula
    money = "$x^{$"
    assert accuracy_plot(Comparison({money: [result(money, [[0.5], [0.6]])]}))


@pytest.mark.parametrize("empty", [{}, {"promptfl": []}])
def test_nothing_is_refused(empty: dict[str, list[Result]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fastfpl\.report: comparison must hold a result"):
        write_report(Comparison(empty), tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- agreement -------------------------------------------------------------------------------


def two(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    rounds: list[list[float] | None] = [[0.2, 0.4], [0.4, 0.6]]
    return Comparison(
        {m: [result(m, rounds, **s)] for m, s in (("local", first), ("promptfl", second))}
    )


@functools.cache
def drawn_once(kind: str) -> bytes:
    return accuracy_plot(pair(), kind)


@pytest.fixture
def plots_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one plot for all: they take their time, and see no text but names."""
    for home in ("fastfpl.report", "fastfpl.report.page"):
        for name in ("accuracy_plot", "clients_plot"):
            monkeypatch.setattr(
                f"{home}.{name}", lambda comparison, kind="png", **_: drawn_once(kind)
            )


def test_equal_runs_give_no_warning() -> None:
    assert warnings(pair((0, 1))) == []
    assert "Caution" not in html_page(pair((0, 1)))


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ({}, {"augment": "fresh"}, "augment: none (local); fresh (promptfl)"),
        ({}, {"lr": 0.01}, "lr: 0.002 (local); 0.01 (promptfl)"),
        ({}, {"shots": None}, "shots: 16 (local); all (promptfl)"),
        ({}, {"seed": 1}, "seeds: 0 (local); 1 (promptfl)"),
        ({}, {"name": "digits"}, "data set: glyphs (local); digits (promptfl)"),
        ({}, {"classes": ("a",)}, "class names: list 1 of 3 (local); list 2 of 1 (promptfl)"),
    ],
)
@pytest.mark.usefixtures("plots_are_known")
def test_what_decides_accuracy_is_warned_about(
    first: dict[str, Any], second: dict[str, Any], sentence: str
) -> None:
    c = two(first, second)
    assert [(w.sentence, w.decides_accuracy) for w in warnings(c)] == [(sentence, True)]
    assert not any(row.top for row in rows(c))
    page = Page(html_page(c)).text
    assert "do not compare their accuracies" in page
    assert sentence in page
    assert "Highest accuracy" not in page
    assert "do not compare" in " ".join(terminal(c).split())
    assert "**Caution.**" in markdown_table(c)


def test_what_decides_time_only_is_noted() -> None:
    c = two({}, {"threads": 4, "environment": {"threads": 4, "torch": "2.14.0"}})
    found = warnings(c)
    assert [(w.about, w.decides_accuracy) for w in found] == [("threads", False), ("torch", False)]
    assert any(row.top for row in rows(c))
    page = html_page(c)
    assert "not measured under the same conditions" in page
    assert "do not compare" not in page


def test_runs_of_one_method_that_disagree_are_named_with_their_seed() -> None:
    rounds: list[list[float] | None] = [[0.2], [0.4]]
    c = Comparison(
        {"local": [result("local", rounds), result("local", rounds, seed=1, lr=0.1)]},
    )
    assert warnings(c)[0].sentence == "lr: 0.002 (local seed 0); 0.1 (local seed 1)"


def test_a_folder_of_data_is_neither_shown_nor_compared() -> None:
    c = two({"root": "/home/someone/data"}, {"root": "/mnt/other"})
    assert warnings(c) == []
    assert "someone" not in html_page(c)


# -- plots -----------------------------------------------------------------------------------

CASES = {
    "one round beside three": pair(),
    "three seeds": pair((0, 1, 2)),
    "one client": Comparison({"local": [result("local", [[0.5], [0.6]])]}),
    "one round only": Comparison({"local": [result("local", [[0.5, 0.6]])]}),
    "all equal": Comparison({"local": [result("local", [[1.0] * 30] * 2)]}),
    "all zero": Comparison({"local": [result("local", [[0.0] * 3] * 2)]}),
    "rare evaluation": Comparison({"local": [result("local", [None, [0.3], None, [0.4]])]}),
    "many rounds": Comparison({"local": [result("local", [[0.4, 0.5]] * 120)]}),
    "nine methods": Comparison(
        {f"m{i}": [result(f"m{i}", [[0.5], [0.5 + i / 1e4]])] for i in range(9)}
    ),
    "nothing trains": Comparison({"zeroshot": [result("zeroshot", [[0.5, 0.6]], trains=False)]}),
}


@pytest.mark.parametrize("draw", [accuracy_plot, clients_plot])
@pytest.mark.parametrize("case", CASES)
def test_plots_are_drawn(case: str, draw: Any) -> None:
    content = draw(CASES[case])
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1280
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 20
    assert len(content) < 150_000


def test_many_clients_stay_small_and_many_lines_too() -> None:
    values = [[(i * 37 % 61) / 60 for i in range(100)]] * 5
    c = Comparison(
        {f"m{i}": [result(f"m{i}", values, seed=s) for s in range(3)] for i in range(9)}  # type: ignore[arg-type]
    )
    assert len(clients_plot(c)) < 150_000
    assert len(clients_plot(c, "svg")) < 500_000


def test_the_same_comparison_gives_the_same_bytes() -> None:
    for draw in (accuracy_plot, clients_plot):
        for kind in ("png", "svg"):
            assert draw(pair(), kind) == draw(pair(), kind)
    assert accuracy_plot(pair(), "svg") != accuracy_plot(pair(), "svg", dark=True)


def test_rounds_without_evaluation_are_skipped_and_counted_from_one() -> None:
    assert curve([result("a", [None, [0.3], None, [0.4, 0.6]])]) == [
        (2, 0.3, 0.3, 0.3),
        (4, 0.5, 0.5, 0.5),
    ]
    two_seeds = [result("a", [[0.3], [0.4]], seed=s) for s in (0, 1)]
    two_seeds[1].rounds[1]["accuracy"] = 0.8
    assert curve(two_seeds)[1] == (2, pytest.approx(0.6), 0.4, 0.8)


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(1, [1]), (3, [1, 2, 3]), (25, [1, 5, 10, 15, 20, 25]), (120, [1, 20, 40, 60, 80, 100, 120])],
)
def test_round_ticks_begin_with_one(last: int, ticks: list[int]) -> None:
    assert _round_ticks(last) == ticks


def test_labels_move_apart_as_little_as_possible() -> None:
    assert spread([10.0, 50.0], 4.0, 0.0, 100.0) == [10.0, 50.0]
    assert spread([51.0, 50.0], 4.0, 0.0, 100.0) == [52.5, 48.5]
    close = spread([99.0, 99.5, 100.0, 98.0], 4.0, 0.0, 100.0)
    assert max(close) <= 100.0
    assert sorted(close) == pytest.approx([88.0, 92.0, 96.0, 100.0])
    crowd = spread([50.0] * 60, 4.0, 0.0, 100.0)
    assert (min(crowd), max(crowd)) == pytest.approx((0.0, 100.0))


def test_dots_of_equal_clients_do_not_hide_each_other() -> None:
    places = [1.0] * 9 + [1.03, 2.0]
    offsets = swarm(places, 0.1, 10.0)
    for i in range(len(places)):
        for j in range(i):
            assert math.dist((places[i], offsets[i]), (places[j], offsets[j])) > 0.0999
    crowded = swarm([1.0] * 300, 0.1, 0.3)
    assert len(set(crowded)) == 300
    assert max(abs(o) for o in crowded) == pytest.approx(0.3)


@pytest.mark.parametrize("look", [LIGHT, _DARK])
def test_lines_stand_out_from_the_paper(look: Any) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(look.ink, look.paper) > 7
    assert contrast(look.faint, look.paper) > 4.5  # WCAG for text
    assert all(contrast(line, look.paper) > 2.2 for line in look.lines)
    nine = Comparison({f"m{i}": [result(f"m{i}", [[0.5], [0.5]])] for i in range(9)})
    assert len(set(_colours(nine, look).values())) == 9


def test_plotting_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    code = """
import matplotlib, sys
matplotlib.rcParams["font.size"] = 31
matplotlib.rcParams["text.usetex"] = True

def chosen():
    # to ask for the backend would choose one, and import pyplot
    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}

before = chosen()
sys.path.insert(0, sys.argv[1])
from test_report import pair
from fastfpl.report import accuracy_plot
accuracy_plot(pair())
assert chosen() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    here = Path(__file__).resolve().parent
    subprocess.run(
        [*warm_python(), "-c", code, str(here)], check=True, cwd=here.parent, timeout=120
    )


def test_importing_the_report_starts_no_plotting() -> None:
    code = (
        "import sys, fastfpl.report; "
        "assert not {'matplotlib', 'jinja2', 'rich.table'} & set(sys.modules)"
    )
    here = Path(__file__).resolve().parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here.parent, timeout=120)


# -- page ------------------------------------------------------------------------------------


def save(comparison: Comparison, folder: Path) -> None:
    for results in comparison.results.values():
        for one in results:
            run = folder / f"{one.method}-seed{one.settings['seed']}"
            run.mkdir(parents=True)
            one.save(run)


def test_the_page_loads_nothing_and_shows_no_path(tmp_path: Path) -> None:
    c = pair((0, 1), root=str(tmp_path / "data"), pretrained="/home/someone/weights.pt")
    save(c, tmp_path)
    text = html_page(c, tmp_path)
    page = Page(text)
    assert page.loads
    assert all(one.startswith("data:image/svg+xml;base64,") for one in page.loads)
    assert page.links == [
        f"{m}-seed{s}/result.json" for m in ("zeroshot", "promptfl") for s in (0, 1)
    ]
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    bare = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not re.search(r"https?:|url\(|@import|file:", bare)
    assert str(tmp_path) not in bare
    assert "/home" not in bare
    assert "weights.pt" in bare


def test_the_page_says_what_it_must() -> None:
    page = Page(html_page(pair((0, 1, 2)))).text
    for part in (
        "2 methods on glyphs",
        "glyphs, pathological partition, 2 clients, 3 rounds, 3 seeds",
        "promptfl, 70.0 % (± 10.0 over 3 seeds)",
        "one deterministic view each, encoded once (augment=none)",
        "encode_text",
        "2.13.0",
        "local_epochs",
        "0f3a9c2e",
        "Seed 2, 2 clients",
        "up, whole run",
    ):
        assert part in page
    assert "nan" not in re.findall(r"\w+", page.lower())


def test_the_page_is_accessible() -> None:
    page = Page(html_page(pair()))
    assert all(len(alt) > 40 for alt in page.alts)
    assert len(page.alts) == 2
    assert "promptfl from 30.0 % after 1 round to 60.0 % after 3" in page.alts[0]
    assert set(page.headers) == {"row", "col"}


def test_hostile_names_are_escaped() -> None:
    evil = 'x"><img src=y>'
    rounds: list[list[float] | None] = [[0.5, 0.6]] * 2
    one = result(evil, rounds, classes=(EVIL, "{{ 7 * 7 }}"), name=EVIL)
    page = Page(html_page(Comparison({evil: [one]})))
    assert "script" not in page.tags
    assert all(load.startswith("data:") for load in page.loads)
    assert EVIL in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert len(page.alts) == 2


# -- files -----------------------------------------------------------------------------------


def test_a_report_is_written_and_written_again(tmp_path: Path) -> None:
    c = pair((0, 1))
    save(c, tmp_path)
    files = write_report(c, tmp_path)
    tables = ["table.md", "table.csv", "clients.csv"]
    names = [*tables, "accuracy.png", "clients.png", "index.html"]
    assert files == [tmp_path / name for name in names]
    first = {path: path.read_bytes() for path in files}
    assert all(first.values())
    (again,) = load_comparisons(tmp_path)
    assert {m: list(r) for m, r in again.results.items()} == dict(c.results)
    write_report(again, tmp_path)
    assert {path: path.read_bytes() for path in files} == first
    assert not list(tmp_path.glob(".*"))


def test_results_are_json_without_nan(tmp_path: Path) -> None:
    one = result("local", [None, [0.3, 0.4]])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    one.save(tmp_path)
    json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert Result.load(tmp_path) == one


def test_methods_and_seeds_load_in_order(tmp_path: Path) -> None:
    rounds: list[list[float] | None] = [[0.5]] * 2
    made = {m: [result(m, rounds, seed=s) for s in (10, 9)] for m in ("promptfl", "a-seed3")}
    made["zeroshot"] = [result("zeroshot", [[0.5]], trains=False)]
    save(Comparison(made), tmp_path)
    (tmp_path / "fedotp-seed0").mkdir()  # not finished
    (tmp_path / "notes").mkdir()
    (loaded,) = load_comparisons(tmp_path)
    assert list(loaded.results) == ["zeroshot", "a-seed3", "promptfl"]
    assert [r.settings["seed"] for r in loaded.results["promptfl"]] == [9, 10]


def test_a_folder_without_results_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"fastfpl\.load_comparisons: folder must exist"):
        load_comparisons(tmp_path / "none")
    (tmp_path / "local-seed0").mkdir()
    with pytest.raises(Missing, match=r"folder must hold finished runs as METHOD-seedN"):
        load_comparisons(tmp_path)


def test_a_result_in_the_wrong_folder_is_damaged(tmp_path: Path) -> None:
    save(Comparison({"local": [result("local", [[0.5]])]}), tmp_path)
    (tmp_path / "local-seed0").rename(tmp_path / "promptfl-seed0")
    with pytest.raises(Damaged, match="must be the result of the run its folder is named after"):
        load_comparisons(tmp_path)
    file = tmp_path / "promptfl-seed0" / "result.json"
    content = json.loads(file.read_text())
    content["settings"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"must be a result; got settings: "):
        load_comparisons(tmp_path)
    file.write_text("{")
    with pytest.raises(Damaged):
        load_comparisons(tmp_path)


def test_runs_are_loaded_from_their_own_folders(tmp_path: Path) -> None:
    made = pair((0, 1))
    for number, one in enumerate(r for results in made.results.values() for r in results):
        one.save(tmp_path / f"run {number}")
    folders = sorted(tmp_path.iterdir(), reverse=True)
    # the order of the folders does not matter, nor that one is named twice
    (loaded,) = load_comparisons(*folders, str(folders[0]), folders[0] / ".." / folders[1].name)
    assert {m: list(r) for m, r in loaded.results.items()} == dict(made.results)
    with pytest.raises(InputError, match=r"folders must be one or more; got none"):
        load_comparisons()
    with pytest.raises(Missing, match=r"folder must hold finished runs .* got none in"):
        load_comparisons(*folders, tmp_path)


def test_runs_of_one_method_and_seed_are_refused(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        result("local", [[0.5]], lr=lr).save(tmp_path / f"lr {lr}")
    with pytest.raises(
        InputError,
        match=r"runs must differ in method or seed; got local-seed0 in .*lr 0\.1 and in .*lr 0\.2$",
    ):
        load_comparisons(tmp_path / "lr 0.1", tmp_path / "lr 0.2")


def test_runs_that_named_their_folder_themselves_are_loaded(tmp_path: Path) -> None:
    for seed in (0, 1):
        one = result("local", [[0.5]], seed=seed, dataset="digits", name="digits")
        one.save(tmp_path / f"local-digits-seed{seed}")
    assert [r.settings["seed"] for r in load_comparisons(tmp_path)[0].results["local"]] == [0, 1]
    (tmp_path / "local-digits-seed1").rename(tmp_path / "local-glyphs-seed1")
    with pytest.raises(Damaged, match="must be the result of the run its folder is named after"):
        load_comparisons(tmp_path)


def test_a_report_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"write_report: folder must be a folder; got the file"):
        write_report(pair(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("plots_are_known")
def test_a_report_is_new_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_report(pair(), tmp_path)
    before = {path: path.read_bytes() for path in files}
    calls = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            InputError,
            match=r"fastfpl\.write_report: folder must take .*; got No space left .* is as before",
        ):
            write_report(pair((0, 1)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    # the last name cannot be had: none is taken
    files[-1].unlink()
    files[-1].mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        write_report(pair((0, 1)), tmp_path)
    assert {p: p.read_bytes() for p in files[:-1]} == {p: before[p] for p in files[:-1]}
    assert sorted(tmp_path.iterdir()) == sorted(files)
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=r"write_report: folder must take"):
        write_report(pair(), tmp_path / "a" / "b")


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "o").mkdir()
    for name in ("table.md", f".table.md.{os.getpid()}.part"):
        (tmp_path / "o" / name).symlink_to(tmp_path / "mine")
    write_report(pair(), tmp_path / "o")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "o" / "table.md").is_symlink()


# -- what is there and what is not ----------------------------------------------------------


def test_what_is_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(pair(), tmp_path)
    plan = {"methods": ["zeroshot", "promptfl", "fedotp"], "seeds": [0, 1], "rounds": 3}
    (tmp_path / "comparison.json").write_text(json.dumps(plan))
    for name, content in (
        ("promptfl-seed1", '{"rounds_done": 2}'),
        ("fedpgp-seed7", '{"rounds_done": 1}'),
        ("local-seed0", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text(content)
    (one,) = load_comparisons(tmp_path)
    assert one.missing == (
        "zeroshot seed 1: not begun",
        "promptfl seed 1: not finished, 2 of 3 rounds",
        "fedotp seed 0: not begun",
        "fedotp seed 1: not begun",
        "fedpgp seed 7: not finished, 1 round",
        "local seed 0: not finished, and checkpoint.json does not say how far it came",
    )
    assert not any(row.top for row in rows(one))
    main(["report", str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"missing: {text}" for text in one.missing]
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8")).text
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for text in (shown.out, page, table):
        words = " ".join(text.split())
        assert "this comparison is not finished; nothing is ranked" in words
        assert all(part in words for part in one.missing)
    assert "Highest accuracy" not in page
    (tmp_path / "comparison.json").write_text('{"methods": 3}')
    with pytest.raises(Damaged, match=r"methods of .* must be what fastfpl compare wrote"):
        load_comparisons(tmp_path)


@pytest.mark.usefixtures("plots_are_known")
def test_runs_of_different_tasks_are_never_ranked_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies: list[list[float] | None] = [[0.2, 0.4], [0.4, 0.6]]
    better: list[list[float] | None] = [[0.9, 0.9], [0.9, 0.9]]
    made = {
        "a": result("local", accuracies),
        "b": result("promptfl", better),
        "c": result("local", better, dataset="digits", name="digits"),
        "d": result("promptfl", accuracies, dataset="digits", name="digits"),
        "e": result("local", accuracies, shots=4),
    }
    for name, one in made.items():
        one.save(tmp_path / name)
    groups = load_comparisons(*(tmp_path / name for name in made))
    assert [list(one.results) for one in groups] == [
        ["local", "promptfl"],
        ["local", "promptfl"],
        ["local"],
    ]
    names = ["dataset=glyphs, shots=16", "dataset=digits, shots=16", "dataset=glyphs, shots=4"]
    assert group_names(groups) == names
    assert all(warnings(one) == [] for one in groups)
    main(["report", *(str(tmp_path / name) for name in made), "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    assert [line[3:] for line in out.splitlines() if line.startswith("== ")] == names
    page = Page((tmp_path / "o" / "index.html").read_text(encoding="utf-8"))
    assert page.text.count("Highest accuracy in the last round") == 2
    assert "promptfl, 90.0 %" in page.text
    assert "local, 90.0 %" in page.text
    assert len(page.ids) == len(set(page.ids))
    assert len(page.alts) == 6
    table = (tmp_path / "o" / "table.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", table, re.MULTILINE) == names
    lines = list(csv.DictReader(io.StringIO((tmp_path / "o" / "table.csv").read_text())))
    assert [line["task"] for line in lines] == [names[i] for i in (0, 0, 1, 1, 2)]
    with Image.open(tmp_path / "o" / "accuracy.png") as image:
        assert image.size[0] == 1280
        assert image.size[1] == 3 * 736
    # other classes under the same settings, and a CLIP of other weights
    other = result("fedotp", accuracies, classes=("x", "y"))
    other.save(tmp_path / "f")
    assert group_names(load_comparisons(tmp_path / "a", tmp_path / "f")) == ["task 1", "task 2"]


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("pathological", {}, "every seed deals the same images to the same clients: a spread"),
        ("pathological", {"deal_seed": None}, "every seed deals the images anew: client 0 of one"),
        ("domain", {"shots": 2}, "every seed gives a client the same test images and deals"),
        ("domain", {}, "every seed deals the same images to the same clients: a spread"),
        ("iid", {}, "every seed deals the images anew: client 0 of one"),
    ],
)
@pytest.mark.usefixtures("plots_are_known")
def test_the_page_says_what_seeds_deal(kind: str, options: dict[str, Any], sentence: str) -> None:
    labels, domains = [i % 4 for i in range(96)], [i // 48 for i in range(96)]
    made = pair((0, 1), partition=kind)
    for one in (r for results in made.results.values() for r in results):
        seed = one.settings["seed"]
        sides = (labels, labels, domains, domains)
        one.data["deal"] = deal(partition(kind, *sides, classes=4, clients=2, seed=seed, **options))
    for text in (terminal(made, 400), Page(html_page(made)).text, markdown_table(made)):
        assert sentence in " ".join(text.split())
    # one seed has no spread; what did not record its deal claims nothing
    assert "every seed" not in terminal(Comparison({"a": [made.results["promptfl"][0]]}), 400)
    assert "Every seed" not in html_page(pair((0, 1)))


def test_clients_and_rounds_are_counted_as_in_the_files() -> None:
    page = html_page(pair())
    assert re.findall(r'<tr><th scope="row">(\d+)</th><td>48</td>', page) == ["0", "1"]
    assert "Clients and rounds are numbered from 0" in Page(page).text


# -- names of others -------------------------------------------------------------------------

ODD = "=a|b\x1b[2J$x^{$<i>\u202e[b]\udcff\n`~"


def test_no_name_acts_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # settings refuse half a letter; a result that was made elsewhere may name one
    made = result("local", [[0.5, 0.6]] * 2, classes=(ODD, "b"), name=ODD, environment={ODD: ODD})
    made = replace(made, method=ODD, settings={**made.settings, "method": ODD, "clip": ODD})
    made.data["notes"] = [ODD]
    for row in made.rounds:
        row["exams"] = {ODD: {**row["exams"]["own"], "domains": {ODD: 0.5, ODD + "2": 0.5}}}
    made.data["exams"] = {ODD: ODD}
    made = replace(made, final=summarise(made.rounds), faces={ODD: [ODD]})
    comparison = Comparison({ODD: [made]}, (ODD,))
    plan = {"name": ODD, "about": ODD, "changed": {ODD: [ODD, ODD]}}
    published = {"source": ODD, "cautions": [ODD], "where": [], "figures": {ODD: ODD}}
    plan["published"] = [published]
    both = [comparison, Comparison({ODD: [replace(made, preset=plan)]})]
    files = write_report(both, tmp_path)
    text = {p.name: p.read_text(encoding="utf-8") for p in files if p.suffix != ".png"}
    for content in (*text.values(), terminal(comparison)):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", content)
    assert "\\x1b[2J$x" in Page(text["index.html"]).text
    assert "<i>" not in text["index.html"] + text["table.md"]
    cells = list(csv.reader(io.StringIO(text["table.csv"])))[1]
    assert cells[1].startswith("'=a|b")
    # no cell of a Markdown table ends early, and no line
    for line in text["table.md"].splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3 + 7, 3 + 3, 3 + 2, 3 + 8)
    assert not re.search(r"(?<!\\)[$`~]", text["table.md"].replace("`", "", 0))
    out = tmp_path / "[/b]x"
    pair().results["promptfl"][0].save(out)
    main(["report", str(out)])
    assert str(out / "index.html") in capsys.readouterr().out


def test_long_names_leave_room_for_the_plot() -> None:
    name = "m" * 200
    comparison = Comparison({name: [result(name, [[0.5, 0.6]] * 2, name="d" * 200)]})
    assert accuracy_plot(comparison)
    assert clients_plot(comparison)


@pytest.mark.usefixtures("plots_are_known")
def test_values_of_a_sweep_are_text(tmp_path: Path) -> None:
    values = ["$x^{$", "a|b", "<i>", "../../up", "a/b", "%2F"]
    swept = Sweep("ctx_init", {value: pair(ctx_init=value) for value in values})
    files = write_sweep(swept, tmp_path / "o")
    assert list(tmp_path.iterdir()) == [tmp_path / "o"]
    assert len({path.parent for path in files}) == 1 + len(values)
    assert (tmp_path / "o" / "ctx_init=..%2F..%2Fup" / "index.html") in files
    table = (tmp_path / "o" / "sweep.md").read_text(encoding="utf-8")
    assert "ctx\\_init=\\$x^{\\$ | ctx\\_init=a\\|b | ctx\\_init=&lt;i&gt;" in table
    shown = io.StringIO()
    Console(file=shown, width=200).print(sweep_table(swept))
    assert "a|b" in shown.getvalue()


# -- damaged results -------------------------------------------------------------------------

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**70, 1e300, -0.5, 1.5, "", "x", "\x1b[31m", [], {}, [None], {"": 1}),
    *([0.5], ["a"], {"a": 0.5}, [[]], "9" * 300, [1e308] * 2),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damaged(text: str, draw: random.Random) -> str:
    """Change a result in one or two places, as JSON or as text."""
    if draw.random() < 0.2:
        at, end = sorted(draw.randrange(len(text)) for _ in range(2))
        return draw.choice(
            (
                text[:at],
                text[:at] + text[end:],
                text[:at] + draw.choice('{}[]",:9e\\\x00') + text[at + 1 :],
                text.replace("0.5", draw.choice(("NaN", "1e999", "-Infinity", "9" * 5000, "05"))),
            )
        )
    content = json.loads(text)
    for _ in range(draw.choice((1, 1, 2))):
        container, key = draw.choice(list(places(content)))
        kind = draw.random()
        if kind < 0.25:
            del container[key]
        elif kind < 0.9 or isinstance(container, list):
            container[key] = draw.choice(JUNK)
        else:
            container[key + "2"] = container.pop(key)
    return json.dumps(content)


@pytest.mark.usefixtures("plots_are_known")
def test_a_damaged_result_is_a_report_or_a_sentence(tmp_path: Path) -> None:
    for one in pair().results.values():
        one[0].save(tmp_path / one[0].method)
    path = tmp_path / "promptfl" / "result.json"
    text = path.read_text()
    draw = random.Random(0)
    taken = refused = longest = 0
    for _ in range(300):
        path.write_text(damaged(text, draw))
        try:
            groups = load_comparisons(tmp_path / "promptfl", tmp_path / "zeroshot")
        except FastfplError as error:
            refused += 1
            longest = max(longest, len(str(error)))
            continue
        taken += 1
        html_page(groups)
        csv_table(groups)
        markdown_table(groups)
        for group in groups:
            terminal(group)
        if taken % 20 == 0:
            write_report(groups, tmp_path / "o")
    assert taken > 40
    assert refused > 150
    assert longest < 700


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"seed": 0', '"seed": "0"', "settings.seed: input should be a valid integer; got '0'"),
        ('"seed": 0', '"seed": ' + "9" * 5000, "what is not JSON: Exceeds the limit"),
        ('"seed": 0', '"seed": ' + "9" * 40, "a whole number of more than 64 bits"),
        ('"loss": 1.5', '"loss": 1e999', "the number inf"),
        ('"loss": 1.5', '"loss": NaN', "the number nan"),
        ('"options": {}', '"options": {"a": ' + "[" * 60 + "]" * 60 + "}", "more than 32 levels"),
        ('"options": {}', '"options": ' + "[" * 200_000, "nested too deeply"),
        ('"round": 1', '"round": 2', "rounds must be numbered from 0"),
        ('"rounds": 3', '"rounds": 4', "rounds must be 4 where a run is finished; not 3"),
        ('"own": "its', '"mine": "its', "round 0 must answer the exams of data"),
        ('"method": "promptfl"', '"method": "local"', "settings must name the method"),
        ('"accuracy": 0.6', '"accuracy": 60.0', "accuracy: input should be less than or equal to"),
        ('"weights"', '"weight"', "data.weights: field required"),
        ('"data": {', '"more": 1, "data": {', "more: extra inputs are not permitted; got 1"),
    ],
)
def test_what_is_wrong_with_a_result_is_said(
    old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    pair().results["promptfl"][0].save(tmp_path)
    path = tmp_path / "result.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(Damaged, match=r"fastfpl\.Result: .*result\.json must be a result") as told:
        load_comparisons(tmp_path)
    assert sentence in str(told.value)


@pytest.mark.parametrize("backend", ["module://not_there.backend_inline", "nonsense"])
def test_plots_are_drawn_in_any_environment(backend: str, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 20\n")
    (tmp_path / "file").write_text("")
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
before = dict(os.environ)
from test_report import pair
from fastfpl.report import accuracy_plot, clients_plot
sys.stdout.buffer.write(accuracy_plot(pair()))
assert clients_plot(pair(), "svg")
assert "matplotlib.pyplot" not in sys.modules
before.pop("MPLCONFIGDIR", None)  # matplotlib itself names another one
assert {k: os.environ.get(k) for k in before} == before
"""
    here = Path(__file__).resolve().parent
    mine = {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    if backend == "nonsense":
        mine["MPLCONFIGDIR"] = str(tmp_path / "file" / "x")
    drawn = subprocess.run(
        [*warm_python(), "-c", code, str(here)],
        check=True,
        cwd=here.parent,
        timeout=120,
        capture_output=True,
        env={**os.environ, **mine, "OMP_NUM_THREADS": "1"},
    )
    assert drawn.stdout == accuracy_plot(pair())
