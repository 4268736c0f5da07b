"""What a report says: numbers, tables, and where runs do not agree."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from fastfpl.errors import InputError
from fastfpl.federation import Comparison, Result
from fastfpl.report import accuracy_plot, csv_table, html_page, markdown_table, write_report
from fastfpl.report.agreement import warnings
from fastfpl.report.facts import augmentation, rows
from fastfpl.report.words import duration, percent, public, rate, size
from tests.results import EVIL, Page, pair, result, terminal

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
