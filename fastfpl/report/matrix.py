"""Methods down, tasks across: values of a setting, or data sets with their mean, as papers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastfpl.federation import Comparison
from fastfpl.report.agreement import warnings
from fastfpl.report.facts import left_out, released
from fastfpl.report.runs import TASK, each, runs, setting, trains
from fastfpl.report.words import NONE, count, listed, percent, public

__all__ = ["AVERAGED", "Matrix", "across", "matrix_of"]

#: Settings over whose values a mean is taken: what a table of a paper ends with.
AVERAGED = ("dataset", "target")
# what a data set decides by itself, and may differ with it
_WITH_DATASET = ("dataset", "clients", "target")


@dataclass(frozen=True)
class Matrix:
    """A table of accuracies over several tasks.

    Attributes
    ----------
    titles : list of str
        Of the columns.
    lines : list of list of str
        Each begins with a method.
    best : list of frozenset of int
        For each line the columns in which it is the best.
    notes : list of str
    missing : list of str
        Runs that are not there, each in words.
    """

    titles: list[str]
    lines: list[list[str]]
    best: list[frozenset[int]]
    notes: list[str]
    missing: list[str]


def matrix_of(key: str, comparisons: Mapping[Any, Comparison]) -> Matrix:
    """Lay out accuracies: a line a method, a column a value of a setting.

    Accuracies in per cent, with the standard deviation over seeds where there are several. Data
    sets and target domains end with their unweighted mean, of methods that have all of them.

    Parameters
    ----------
    key : str
        The setting.
    comparisons : mapping from value to Comparison
        One without results is of a value no run of which is finished.
    """
    there = {value: one for value, one in comparisons.items() if one.results}
    rows = {v: {row["method"]: row for row in one.rows()} for v, one in there.items()}
    methods = list(dict.fromkeys(name for found in rows.values() for name in found))
    averaged = key in AVERAGED and len(comparisons) > 1
    titles = ["method", *(_named(key, value) for value in comparisons), *["mean"] * averaged]
    lines, means = [], {}
    for method in methods:
        mine = [rows.get(value, {}).get(method) for value in comparisons]
        texts = [NONE if row is None else _figure(row) for row in mine]
        if averaged:
            whole = [row["accuracy"] for row in mine if row is not None]
            # the mean of another set of columns is another figure
            if len(whole) == len(mine):
                means[method] = math.fsum(whole) / len(whole)
            texts.append(percent(means[method]) if method in means else NONE)
        lines.append([method, *texts])
    missing = [
        f"{_named(key, value)}: {text}"
        for value, one in comparisons.items()
        for text in one.missing
    ]
    ranked = [bool(one.results) and _comparable(one) for one in comparisons.values()]
    columns = [
        {m: row["accuracy"] for m, row in rows.get(value, {}).items()} if good else {}
        for value, good in zip(comparisons, ranked, strict=True)
    ]
    if averaged:
        columns.append(means if all(ranked) else {})
    best = [
        frozenset(
            at
            for at, figures in enumerate(columns, 1)
            if len(figures) > 1 and figures.get(method) == max(figures.values())
        )
        for method in methods
    ]
    return Matrix(titles, lines, best, _notes(key, there, averaged, any(best)), missing)


def across(comparisons: Comparison | Sequence[Comparison]) -> Matrix | None:
    """Lay comparisons of several tasks side by side if they differ in their data sets alone.

    None for one, and where anything differs that a data set does not decide.
    """
    all_of = each(comparisons)
    if len(all_of) < 2:
        return None
    firsts = [runs(one)[0] for one in all_of]
    differing = {k for k in TASK if len({repr(r.settings.get(k)) for r in firsts}) > 1}
    names = [str(r.settings["dataset"]) for r in firsts]
    if "dataset" not in differing or differing - set(_WITH_DATASET):
        return None
    if len(set(names)) < len(names) or len({r.data["weights"] for r in firsts}) > 1:
        return None
    return matrix_of("dataset", dict(zip(names, all_of, strict=True)))


def _named(key: str, value: Any) -> str:
    return public(value) if key == "dataset" else f"{key}={public(value)}"


def _figure(row: Mapping[str, Any]) -> str:
    spread = row["std_over_seeds"]
    return percent(row["accuracy"]) + ("" if spread is None else f" ± {percent(spread)}")


def _comparable(comparison: Comparison) -> bool:
    return not comparison.missing and not any(w.decides_accuracy for w in warnings(comparison))


def _notes(key: str, there: Mapping[Any, Comparison], averaged: bool, marked: bool) -> list[str]:
    seeds = {r.settings["seed"] for one in there.values() for r in runs(one)}
    about = "accuracy in %, last round, unweighted mean over clients"
    if len(seeds) > 1:
        about += f", mean and standard deviation (n-1) over {count(len(seeds), 'seed')}"
    if averaged:
        what = "data sets" if key == "dataset" else "target domains"
        about += f"; mean: over {what}, of methods that have all of them"
    if marked:
        about += "; the best of each column is marked"
    notes = [about]
    if key == "dataset":
        notes += [_task(value, one) for value, one in there.items()]
    notes += [line for one in there.values() for line in released(one)]
    return list(dict.fromkeys(notes))


def _task(value: Any, comparison: Comparison) -> str:
    """Say what a data set's column is over, where data sets differ."""
    flat = runs(comparison)
    classes = listed(sorted({len(r.data["classes"]) for r in flat}), "or")
    clients = listed(sorted({len(r.data["test_images"]) for r in flat}), "or")
    few = left_out(comparison)
    shots = next((setting(r, "shots") for r in flat if trains([r])), None)
    parts = [f"{classes} classes", f"{clients} clients"]
    if few:
        parts += few
    elif shots is not None:
        parts.append(f"shots {shots}" if shots != "all" else "all training images")
    return f"{public(value)}: {', '.join(parts)}"
