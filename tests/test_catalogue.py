"""The catalogue of data sets: its facts are sound, and the page of data sets holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.errors import FastfplError

ROOT = Path(__file__).resolve().parent.parent


def rows_of_the_page() -> list[str]:
    rows = []
    for name, facts in sorted(FACTS.items()):
        folders = " or ".join(f"`{f}/`" if f != "." else "the root" for f in facts.folders)
        paths = [need.path for need in facts.needs]
        for domain in facts.domains if len(facts.domains) > 1 else ():
            paths = [path.replace(domain, "DOMAIN") for path in paths]
        needs = ", ".join(f"`{path}`" for path in dict.fromkeys(paths))
        if facts.stand_in and facts.split:
            needs += "; without the split " + ", ".join(f"`{n.path}`" for n in facts.stand_in)
        sources = ", ".join(
            dict.fromkeys(need.source.split()[0].rstrip(",") for need in facts.needs)
        )
        sizes = f"{facts.classes} | {facts.train} | {facts.test}"
        rows.append(
            f"| `{name}` | {facts.title} | {folders} | {needs} | {sizes} | {sources} "
            f"| {facts.protocol} |"
        )
    return rows


def test_the_page_holds_the_catalogue() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if line.startswith("| `")]
    assert shown == rows_of_the_page(), "\n" + "\n".join(rows_of_the_page())


def test_facts_are_sound() -> None:
    for name, facts in FACTS.items():
        assert facts.name == name
        assert min(facts.classes, facts.train, facts.test) > 0
        assert facts.train >= facts.classes
        assert bool(facts.drawn) == any(need.spare for need in facts.needs)
        assert not facts.split or facts.split in {need.path for need in facts.needs}
        for need in (*facts.needs, *facts.stand_in):
            assert need.source.startswith("https://")
        with pytest.raises(FastfplError):
            load_dataset(name)
