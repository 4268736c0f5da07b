"""What a client wants to know: which method is best for it, and better than training alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastfpl.federation import Comparison, Result
from fastfpl.report.agreement import warnings
from fastfpl.report.runs import clients_of, named_clients, runs, trains
from fastfpl.report.words import NONE, count, listed, percent, unformulated
from fastfpl.terminal import plain

__all__ = ["LOCAL", "Decision", "Line", "clients_csv", "decision"]

#: The method that trains at every client alone, which the others must beat.
LOCAL = "local"
#: More clients than this stand in ``clients.csv`` alone.
SHOWN = 40


@dataclass(frozen=True)
class Line:
    """One client.

    Attributes
    ----------
    seed : int or None
        Of the run it is a client of; None where the same client is in the runs of every seed.
    number : int
    name : str
        What the data set calls it, or its number.
    train, test : int
        Its images.
    accuracy : dict from method to float or None
        In [0, 1], mean over its seeds; None without test images or runs.
    best : tuple of str
        Methods with the largest accuracy; empty where nothing may be ranked.
    """

    seed: int | None
    number: int
    name: str
    train: int
    test: int
    accuracy: dict[str, float | None]
    best: tuple[str, ...]

    def gain(self, method: str) -> float | None:
        """Return by how much a method is better than training alone, if that is there."""
        mine, alone = self.accuracy.get(method), self.accuracy.get(LOCAL)
        return None if mine is None or alone is None else mine - alone

    @property
    def label(self) -> str:
        """Its name, and its seed where that is needed to know it."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Decision:
    """All clients of a comparison, and what follows for them.

    Attributes
    ----------
    methods : tuple of str
    lines : list of Line
    answers : list of str
        Sentences, one a method that trains with others, where ``local`` is there.
    cautions : list of str
        Sentences that belong to them.
    """

    methods: tuple[str, ...]
    lines: list[Line]
    answers: list[str]
    cautions: list[str]

    @property
    def titles(self) -> list[str]:
        """Of the columns."""
        return ["client", "training images", "test images", *self.methods]

    @property
    def shown(self) -> list[Line]:
        """Clients that a table has."""
        return self.lines[:SHOWN]

    def cells(self, line: Line) -> list[tuple[str, bool]]:
        """Texts of a client's methods, and whether each is the best."""
        found = []
        for method in self.methods:
            share, gain = line.accuracy[method], line.gain(method)
            text = NONE if share is None else percent(share)
            if gain is not None and method != LOCAL and line.best:
                text += f" ({100 * gain:+.1f})"
            found.append((text, method in line.best))
        return found

    @property
    def notes(self) -> list[str]:
        """Say what the table's figures are."""
        lines = ["by client: accuracy in % on its own test images, last round"]
        if any(line.best for line in self.lines):
            lines[0] += "; the best of each client is marked"
        if LOCAL in self.methods and any(line.best for line in self.lines):
            lines[0] += "; in brackets what it gains over training alone (local), in points"
        if len(self.lines) > SHOWN:
            lines.append(f"{len(self.lines) - SHOWN} more clients stand in clients.csv")
        return lines


def decision(comparison: Comparison) -> Decision | None:
    """Lay out what each client has of each method; None for one method, which decides nothing.

    Nothing is ranked where `fastfpl.report.agreement.warnings` forbids it or runs are missing.
    """
    if len(comparison.results) < 2:
        return None
    refused = comparison.missing or any(w.decides_accuracy for w in warnings(comparison))
    lines = _lines(comparison, not refused)
    found = Decision(tuple(comparison.results), lines, [], [])
    if refused:
        return found
    if LOCAL in comparison.results:
        others = [m for m, rs in comparison.results.items() if m != LOCAL and trains(rs)]
        found.answers.extend(filter(None, (_answer(lines, method) for method in others)))
    else:
        found.answers.append(
            "what a client gains by not training alone is not known: local is not among the methods"
        )
    found.cautions.extend(_cautions(comparison, lines))
    return found


def _lines(comparison: Comparison, ranked: bool) -> list[Line]:
    flat = runs(comparison)
    names = named_clients(flat)
    seeds = sorted({r.settings["seed"] for r in flat})
    together = len(seeds) < 2 or bool(names) or _same_clients(flat)
    lines = []
    for seed in [None] if together else seeds:
        mine = {
            method: [r for r in results if seed is None or r.settings["seed"] == seed]
            for method, results in comparison.results.items()
        }
        there = [r for results in mine.values() for r in results]
        for number in range(max(len(clients_of(r)) for r in there)):
            accuracy = {method: _mean(results, number) for method, results in mine.items()}
            known = [a for a in accuracy.values() if a is not None]
            best = max(known, default=None) if ranked and len(known) > 1 else None
            lines.append(
                Line(
                    seed,
                    number,
                    plain(names[number]) if names else str(number),
                    max(_images(r, "train_images", number) for r in there),
                    max(_images(r, "test_images", number) for r in there),
                    accuracy,
                    tuple(m for m, a in accuracy.items() if a is not None and a == best),
                )
            )
    return lines


def _same_clients(flat: Sequence[Result]) -> bool:
    """Whether every run gives a client of one number the same images."""
    deals = [r.data.get("deal") for r in flat]
    return None not in deals and all(deal == deals[0] for deal in deals)


def _mean(results: Sequence[Result], number: int) -> float | None:
    shares = [of[number] for of in map(clients_of, results) if number < len(of)]
    there = [share for share in shares if share is not None]
    return math.fsum(there) / len(there) if there else None


def _images(result: Result, key: str, number: int) -> int:
    found = result.data[key]
    return int(found[number]) if number < len(found) else 0


def _answer(lines: Sequence[Line], method: str) -> str | None:
    """Say for how many clients a method is better than training alone, and by how much."""
    gains = [(gain, line) for line in lines if (gain := line.gain(method)) is not None]
    if not gains:
        return None
    better, worse = (sum(s * gain > 0 for gain, _ in gains) for s in (1, -1))
    equal = len(gains) - better - worse
    mean = math.fsum(gain for gain, _ in gains) / len(gains)
    (least, one), (most, other) = (choose(gains, key=lambda pair: pair[0]) for choose in (min, max))
    parts = [f"better than training alone for {better} of {count(len(gains), 'client')}"]
    if worse:
        parts.append(f"worse for {worse}")
    if equal:
        parts.append(f"equal for {equal}")
    return (
        f"{method}: {', '.join(parts)}; {100 * mean:+.1f} points in the mean, from "
        f"{100 * least:+.1f} (client {one.label}) to {100 * most:+.1f} (client {other.label})"
    )


def _cautions(comparison: Comparison, lines: Sequence[Line]) -> list[str]:
    found = []
    seeds = {r.settings["seed"] for r in runs(comparison)}
    if len(seeds) == 1:
        found.append(
            "one seed: another draw of prompts, images and their order may turn small differences "
            "around; repeat with --seeds 0,1,2 before anything is decided"
        )
    asked = [line for line in lines if line.test]
    if asked:
        few = min(asked, key=lambda line: line.test)
        if few.test < 100:
            found.append(
                f"few test images: one of client {few.label}'s {few.test} is "
                f"{100 / few.test:.1f} points"
            )
    without = [line.label for line in lines if not line.test]
    if without:
        names = listed(without[:5]) if len(without) <= 5 else f"{len(without)} clients"
        found.append(f"nothing can be said of {names}, without test images of their own")
    return found


def clients_csv(named: Sequence[tuple[str, Comparison]]) -> str:
    """Write a line a client and method: figures unrounded, accuracies in [0, 1], empty where none.

    Parameters
    ----------
    named : sequence of (str, Comparison)
        Several are told apart by a first column ``task``.
    """
    several = len(named) > 1
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ("client", "name", "seed", "method", "training_images", "test_images", "accuracy")
    writer.writerow([*["task"] * several, *columns, "gain_over_local", "best"])
    for task, comparison in named:
        found = decision(comparison)
        lines = _lines(comparison, False) if found is None else found.lines
        seeds = " ".join(map(str, sorted({r.settings["seed"] for r in runs(comparison)})))
        for line in lines:
            for method in comparison.results:
                share, gain = line.accuracy[method], line.gain(method)
                writer.writerow(
                    [
                        *[unformulated(task)] * several,
                        line.number,
                        unformulated(line.name),
                        seeds if line.seed is None else line.seed,
                        unformulated(method),
                        line.train,
                        line.test,
                        share,
                        gain if found is not None and line.best else None,
                        (method in line.best) if line.best else None,
                    ]
                )
    return out.getvalue()
