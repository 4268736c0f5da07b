"""In what the runs of a comparison disagree, and what that forbids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastfpl.config import Settings
from fastfpl.federation import Comparison, Result
from fastfpl.released import QUIRKS
from fastfpl.report.runs import quirks_of, runs, setting
from fastfpl.report.words import public

__all__ = ["Difference", "differences", "warnings"]

#: What two runs may disagree in without being different experiments.
_OWN = ("method", "seed", "options")
#: Settings that decide time and memory, not accuracy.
_COST = ("cohort", "device", "threads")


@dataclass(frozen=True)
class Difference:
    """Something in which runs disagree.

    Attributes
    ----------
    about : str
        What differs.
    values : dict from str to list of str
        The runs that have each value.
    decides_accuracy : bool
        False if only time and memory can depend on it.
    """

    about: str
    values: dict[str, list[str]]
    decides_accuracy: bool

    @property
    def sentence(self) -> str:
        """Say who has what."""
        return f"{self.about}: " + "; ".join(
            f"{value} ({', '.join(who)})" for value, who in self.values.items()
        )


def differences(comparison: Comparison) -> list[Difference]:
    """List the settings that differ between runs, but method, seed and the method's options."""
    flat = runs(comparison)
    keys = dict.fromkeys(key for r in flat for key in r.settings)
    ordered = [k for k in Settings.model_fields if k in keys]
    ordered += [k for k in keys if k not in Settings.model_fields]
    # where a data set lies does not matter, its content does; quirks are compared one by one
    skipped = (*_OWN, "root", "target_root", "as_released")
    return list(
        _compare(
            comparison,
            [(k, k, k not in _COST) for k in ordered if k not in skipped],
            lambda result, key: setting(result, key),
        )
    )


def warnings(comparison: Comparison) -> list[Difference]:
    """List everything that forbids to read the runs' figures side by side."""
    found = differences(comparison)
    # augmentation first: it is the easiest to overlook
    found.sort(key=lambda d: (d.about != "augment", not d.decides_accuracy))
    found += _compare(
        comparison,
        [("name", "data set", True), ("weights", "weights of CLIP", True)],
        lambda result, key: result.data.get(key),
    )
    found += _classes_differ(comparison)
    found += _seeds_differ(comparison)
    found += _quirks_differ(comparison)
    names = dict.fromkeys(key for r in runs(comparison) for key in r.environment)
    found += _compare(
        comparison,
        [(name, name.replace("_", " "), False) for name in names],
        lambda result, key: result.environment.get(key),
    )
    return _once(found)


def _once(found: list[Difference]) -> list[Difference]:
    """Drop what a setting has said already: dataset, device and threads come back as facts."""
    kept: dict[tuple[str, frozenset[tuple[str, ...]]], Difference] = {}
    for one in found:
        who = frozenset(tuple(names) for names in one.values.values())
        kept.setdefault((one.about.replace(" ", ""), who), one)
    return list(kept.values())


def _compare(
    comparison: Comparison, keys: Sequence[tuple[str, str, bool]], value: Any
) -> Iterator[Difference]:
    for key, about, decides in keys:
        by: dict[str, list[Result]] = {}
        for result in runs(comparison):
            by.setdefault(public(value(result, key)), []).append(result)
        if len(by) > 1:
            yield Difference(about, {v: _names(comparison, who) for v, who in by.items()}, decides)


def _names(comparison: Comparison, results: Sequence[Result]) -> list[str]:
    """Name runs: a method whose runs are all there by its name, else with the seed."""
    names = []
    for method, all_of in comparison.results.items():
        mine = [r for r in results if any(r is one for one in all_of)]
        if len(mine) == len(all_of):
            names.append(method)
        else:
            names += [f"{method} seed {r.settings['seed']}" for r in mine]
    return names


def _classes_differ(comparison: Comparison) -> Iterator[Difference]:
    by: dict[tuple[str, ...], list[Result]] = {}
    for result in runs(comparison):
        by.setdefault(tuple(result.data["classes"]), []).append(result)
    if len(by) > 1:
        values: dict[str, list[str]] = {}
        for number, (classes, who) in enumerate(by.items(), 1):
            values[f"list {number} of {len(classes)}"] = _names(comparison, who)
        yield Difference("class names", values, True)


def _quirks_differ(comparison: Comparison) -> Iterator[Difference]:
    """Find quirks of released code that only some of the runs have that could have them."""
    for name, quirk in QUIRKS.items():
        able = [r for r in runs(comparison) if r.method in quirk.methods]
        on = [r for r in able if name in quirks_of(r)]
        off = [r for r in able if name not in quirks_of(r)]
        if on and off:
            values = {"on": _names(comparison, on), "off": _names(comparison, off)}
            yield Difference(f"as released, {name}", values, True)


def _seeds_differ(comparison: Comparison) -> Iterator[Difference]:
    by: dict[str, list[str]] = {}
    for method, results in comparison.results.items():
        seeds = ", ".join(str(s) for s in sorted(r.settings["seed"] for r in results))
        by.setdefault(seeds, []).append(method)
    if len(by) > 1:
        yield Difference("seeds", by, True)
