"""What a comparison's runs are, and what each one's accuracy is an accuracy of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastfpl.errors import InputError
from fastfpl.federation import Comparison, Result
from fastfpl.report.words import public

__all__ = [
    "TASK",
    "clients_of",
    "each",
    "evaluations",
    "group_names",
    "named_clients",
    "quirks_of",
    "runs",
    "setting",
    "task",
    "trains",
]

#: Settings that say what is learnt from and what is asked: between two values nothing is ranked.
TASK = (
    *("dataset", "scenario", "target", "on_corrupt", "statistics", "clip", "pretrained"),
    *("partition", "partition_seed", "beta", "classes_per_client", "repeat_rate", "split_test"),
    *("clients", "unseen", "evaluate_clients", "shots", "augment", "crop", "flip"),
)


def each(comparisons: Comparison | Sequence[Comparison]) -> list[Comparison]:
    """List one comparison, or several; refuse none."""
    found = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    if not found:
        raise InputError("fastfpl.report: comparisons must be one or more; got none")
    return found


def runs(comparison: Comparison) -> list[Result]:
    """List all results, method by method; refuse a comparison without any."""
    flat = [result for results in comparison.results.values() for result in results]
    if not flat or not all(comparison.results.values()):
        raise InputError(
            "fastfpl.report: comparison must hold a result of every method; "
            f"got {len(flat)} of {len(comparison.results)} methods"
        )
    return flat


def trains(results: Sequence[Result]) -> bool:
    """Whether a client trained in any round."""
    return any(row["selected"] for result in results for row in result.rounds)


def evaluations(result: Result) -> list[dict[str, Any]]:
    """List the rounds with an evaluation."""
    return [row for row in result.rounds if row["accuracy"] is not None]


def clients_of(result: Result) -> list[float | None]:
    """Accuracy of every client in the last round; None of one without test images."""
    found = evaluations(result)[-1]["clients"]
    return [None if a is None else float(a) for a in found]


def named_clients(results: Sequence[Result]) -> list[str]:
    """List the clients' names, if the data set of these runs names them; else nothing."""
    names = [result.data.get("clients") for result in results]
    return list(names[0] or []) if all(one == names[0] for one in names) else []


def quirks_of(result: Result) -> list[str]:
    """List the quirks of released code that a run had."""
    return [str(name) for name in result.settings.get("as_released", [])]


def setting(result: Result, key: str) -> str:
    """Write a run's setting for people."""
    value = result.settings.get(key)
    return "all" if key == "shots" and value is None else public(value)


def task(result: Result) -> tuple[str, ...]:
    """Say what a run's accuracy is an accuracy of: equal for runs that may stand in one table."""
    data = result.data
    return (
        *(repr(result.settings.get(key)) for key in TASK),
        *(repr(data[key]) for key in ("name", "classes", "weights")),
    )


def group_names(comparisons: Sequence[Comparison]) -> list[str]:
    """Name each of several comparisons by the settings in which their tasks differ."""
    firsts = [runs(comparison)[0] for comparison in comparisons]
    if len(firsts) < 2:
        return [""] * len(firsts)
    keys = [k for k in TASK if len({repr(r.settings.get(k)) for r in firsts}) > 1]
    names = [", ".join(f"{key}={setting(r, key)}" for key in keys) for r in firsts]
    if len(set(names)) < len(names):  # other lists of classes, other weights of one name
        names = [f"task {n}" + f": {name}" * bool(name) for n, name in enumerate(names, 1)]
    return names
