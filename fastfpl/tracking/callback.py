"""What is told of a run while it goes on, and the figures of a round by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ENCODING", "Callback", "RunInfo", "Told", "metrics_of"]

_LOG = logging.getLogger("fastfpl")
#: What the name of a step begins with in which images are counted.
ENCODING = "encoding"
#: So many clients have a figure each; of more, smallest, largest and spread are told.
EACH = 50


@dataclass(frozen=True)
class RunInfo:
    """What a callback knows of a run.

    Attributes
    ----------
    name : str
        Method, data set and seed.
    settings : mapping
        All settings with their values, options included.
    folder : Path or None
        Of the run.
    done : int
        Rounds that were played before, of a run that is resumed.
    clients : tuple of str
        What the data set calls the clients; empty if they are but numbers.
    """

    name: str
    settings: Mapping[str, Any]
    folder: Path | None = None
    done: int = 0
    clients: tuple[str, ...] = ()


class Callback:
    """Is told of a run while it goes on; every engine tells the same.

    Subclasses say what they do; what they do not say does nothing. What one raises ends the run,
    whose rounds are kept as ever.
    """

    def on_step(self, what: str, done: int, total: int) -> None:
        """Be told how far a long step is: images that are encoded, clients that train."""

    def on_run_begin(self, run: RunInfo) -> None:
        """Be told of a run before its next round; images may still have to be encoded."""

    def on_round_end(self, run: RunInfo, row: Mapping[str, Any]) -> None:
        """Be told of a round: its row of `Result.rounds`; its checkpoint is written."""

    def on_run_end(self, run: RunInfo, final: Mapping[str, Any] | None) -> None:
        """Be told that the run has ended with `Result.final`; None if it was stopped."""


class Told:
    """Tells several callbacks of one run.

    Parameters
    ----------
    callbacks : sequence of Callback
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = list(callbacks)
        self._begun: list[Callback] = []
        self._run: RunInfo | None = None

    def step(self, what: str, done: int, total: int) -> None:
        """Tell of a long step."""
        for one in self._all:
            one.on_step(what, done, total)

    def begin(self, run: RunInfo) -> None:
        """Tell of the beginning."""
        self._run = run
        for one in self._all:
            self._begun.append(one)
            one.on_run_begin(run)

    def round(self, row: Mapping[str, Any]) -> None:
        """Tell of a round that ended."""
        assert self._run is not None
        for one in self._all:
            one.on_round_end(self._run, row)

    def end(self, final: Mapping[str, Any]) -> None:
        """Tell of the end those who were told of the beginning."""
        assert self._run is not None
        begun, self._begun = self._begun, []
        for one in begun:
            one.on_run_end(self._run, final)

    def stop(self) -> None:
        """Tell those who were told of the beginning that there is no end.

        What they raise must not hide why the run was stopped.
        """
        begun, self._begun = self._begun, []
        for one in begun:
            assert self._run is not None
            try:
                one.on_run_end(self._run, None)
            except Exception as error:
                _LOG.warning("fastfpl.tracking: %s: %s", type(one).__name__, error)


def metrics_of(run: RunInfo, row: Mapping[str, Any]) -> dict[str, float]:
    """Name the figures of a round, as trackers plot them; what was not measured is left out.

    Parameters
    ----------
    run : RunInfo
    row : mapping
        Of `Result.rounds`.

    Returns
    -------
    dict
        ``accuracy``, ``loss`` and so on; ``exams/NAME/accuracy``, ``exams/NAME/macro_f1`` and
        ``domains/NAME``; ``clients/NAME`` of each where there are no more than `EACH`, and
        ``clients_min``, ``clients_max``, ``clients_std``. Accuracies lie in [0, 1].
    """
    plain = ("accuracy", "loss", "seconds", "images_per_second", "bytes_up", "bytes_down")
    found = {name: row.get(name) for name in (*plain, "epsilon")}
    if row["selected"]:
        found |= {"trained": len(row["selected"]), "lost": len(row["lost"])}
    else:  # nobody trained
        found |= dict.fromkeys(plain[3:])
    for name, exam in row["exams"].items():
        found |= {f"exams/{name}/{key}": exam[key] for key in ("accuracy", "macro_f1")}
    headline = next(iter(row["exams"].values()), None)
    if headline is not None and len(headline["domains"]) > 1:
        found |= {f"domains/{name}": share for name, share in headline["domains"].items()}
    asked = [share for share in row["clients"] if share is not None]
    if asked:
        mean = math.fsum(asked) / len(asked)
        spread = math.fsum((share - mean) ** 2 for share in asked) / len(asked)
        found |= {"clients_min": min(asked), "clients_max": max(asked)}
        found["clients_std"] = math.sqrt(spread)
    if len(asked) <= EACH:
        names = run.clients or tuple(map(str, range(len(row["clients"]))))
        found |= {f"clients/{n}": share for n, share in zip(names, row["clients"], strict=False)}
    return {name: float(value) for name, value in found.items() if value is not None}
