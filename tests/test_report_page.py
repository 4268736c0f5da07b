"""The page of a report: it loads nothing, says what it must, and counts as the files do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastfpl.data import partition
from fastfpl.federation import Comparison
from fastfpl.federation.result import deal
from fastfpl.report import html_page, markdown_table
from tests.results import EVIL, Page, pair, result, save, terminal


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
