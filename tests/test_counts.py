"""Launches, bytes and work of every hot path stand where they were committed, or below."""

import json
from pathlib import Path

import pytest
import torch

from fastfpl.ops import launch
from tests.counts import CASES, FIGURES, Counts, _Operators, figures, multiplied, table

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here"),
    *(
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
        for what in ("divide by zero", "invalid value", "overflow")
    ),
]
KNOWN = json.loads(FIGURES.read_text())


def test_every_case_has_its_figures_and_the_page_shows_them():
    assert list(KNOWN) == list(CASES)
    assert table() in (Path(__file__).parent.parent / "docs" / "performance.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_figure_grows(name):
    """One that falls is good news: ``python -m tests.counts --write``, and the page's table."""
    found = figures(name)
    assert found.keys() == KNOWN[name].keys()
    assert {k: v for k, v in found.items() if v > KNOWN[name][k]} == {}


def test_what_is_counted():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    counts = Counts()
    with _Operators(counts):
        c = a @ b
        d = c.t()[:2].add_(1)
        torch.empty(7)
        d.unsqueeze(0)
    assert (counts.products, counts.torch, counts.operations) == (1, 1, 2 * 3 * 4 * 5)
    assert counts.bytes == 4 * (12 + 20 + 15) + 4 * 6
    assert multiplied(lambda: torch.bmm(a[None], b[None])) == 2 * 3 * 4 * 5
