"""The plots of a report: what they show, their bytes, and that matplotlib stays as it was."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastfpl.federation import Comparison
from fastfpl.report import accuracy_plot, clients_plot
from fastfpl.report.plots import _DARK, LIGHT, _colours, _round_ticks, curve, spread, swarm
from tests.results import pair, result
from tests.warm import warm_python

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
from results import pair
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


def test_long_names_leave_room_for_the_plot() -> None:
    name = "m" * 200
    comparison = Comparison({name: [result(name, [[0.5, 0.6]] * 2, name="d" * 200)]})
    assert accuracy_plot(comparison)
    assert clients_plot(comparison)


@pytest.mark.parametrize("backend", ["module://not_there.backend_inline", "nonsense"])
def test_plots_are_drawn_in_any_environment(backend: str, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 20\n")
    (tmp_path / "file").write_text("")
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
before = dict(os.environ)
from results import pair
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
