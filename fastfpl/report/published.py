"""What papers report, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastfpl.federation import Comparison
from fastfpl.report.runs import quirks_of, runs
from fastfpl.report.words import NONE, count, listed, percent, public

__all__ = ["Beside", "published"]


@dataclass(frozen=True)
class Beside:
    """Figures of papers beside the measured ones.

    Attributes
    ----------
    titles : list of str
        Of the columns.
    lines : list of list of str
        One a figure: method, which figure, published, measured, number of the source.
    notes : list of str
        What the columns mean, and the sources.
    cautions : list of str
        Why figures of a source must not be trusted.
    """

    titles: list[str]
    lines: list[list[str]]
    notes: list[str]
    cautions: list[str]


def published(comparison: Comparison) -> Beside | None:
    """Set what papers report beside what was measured; None if no run has a preset with figures.

    The spread of a measured figure is that over seeds, where there are several.
    """
    table = {row["method"]: row for row in comparison.rows()}
    sources: dict[str, int] = {}
    lines: list[list[str]] = []
    cautions: dict[str, list[str]] = {}
    matched: dict[str, set[str]] = {}
    for method, results in comparison.results.items():
        found = [one for r in results if r.preset is not None for one in r.preset["published"]]
        for one in _distinct(found):
            number = sources.setdefault(one["source"], len(sources) + 1)
            matched.setdefault(method, set()).update(one["where"])
            for name, text in one["figures"].items():
                lines.append([method, name, text, _measured(table[method], name), f"[{number}]"])
            for text in one["cautions"]:
                cautions.setdefault(text, []).append(method)
    if not lines:
        return None
    ours = list(dict.fromkeys(r.preset["name"] for r in runs(comparison) if r.preset is not None))
    changed = _changed(comparison, matched)
    seeds = {r.settings["seed"] for r in runs(comparison)}
    quirks = any(quirks_of(r) for r in runs(comparison))
    fresh = "" if quirks else ", fresh optimiser for every client and round"
    notes = [
        f"measured: on this machine, in %, by the protocol of the preset {listed(ours, 'or')} "
        f"(last round{fresh}), not by the paper's code, {count(len(seeds), 'seed')}"
        + (f"; with {', '.join(changed)}" if changed else ""),
        "published: in %, as printed; accuracy is the headline",
        *(f"[{number}]: {source}" for source, number in sources.items()),
    ]
    # quirks of released code lead towards the paper's figures, not away from them
    if any(not text.startswith("as_released=") for text in changed):
        notes.insert(1, "settings differ from the preset's: the two columns are not comparable")
    return Beside(
        ["method", "figure", "published", "measured", "source"],
        lines,
        notes,
        [
            f"published figures of {listed(list(dict.fromkeys(who)))}: {text}"
            for text, who in cautions.items()
        ],
    )


def _distinct(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what another seed has said already."""
    return [one for number, one in enumerate(found) if one not in found[:number]]


def _measured(row: dict[str, Any], name: str) -> str:
    if name == "accuracy":
        spread = row["std_over_seeds"]
        return percent(row["accuracy"]) + ("" if spread is None else f" ± {percent(spread)}")
    value = row["exams"].get(name, row["domains"].get(name))
    return NONE if value is None else percent(value)


def _changed(comparison: Comparison, matched: dict[str, set[str]]) -> list[str]:
    """Name the settings that runs have in place of their preset's: ``rounds=1 in place of 10``.

    What a source's own settings ask for, and the run has, is no change.
    """
    texts: dict[str, None] = {}
    for result in runs(comparison):
        if result.preset is None or result.method not in matched:
            continue
        for key, (theirs, mine) in result.preset["changed"].items():
            if key.removeprefix(f"{result.method}.") in matched[result.method]:
                continue
            shown = ["all" if key == "shots" and v is None else public(v) for v in (mine, theirs)]
            texts[f"{key}={shown[0]} in place of {shown[1]}"] = None
    return list(texts)
