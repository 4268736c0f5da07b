"""What is going on in a networked run, as a file in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastfpl.config import Settings
from fastfpl.errors import Damaged
from fastfpl.files import read_file, write_json
from fastfpl.flower.roster import Roster

__all__ = ["STATUS", "Status", "read_status"]

#: What is going on in a networked run's folder.
STATUS = "flower.json"
_FORMAT = "fastfpl-flower-1"
_NOTED = 200  # refusals that the status shows


def read_status(out: Path) -> dict[str, Any]:
    """Read what is going on in a folder.

    Raises
    ------
    Damaged
        If it holds no networked run.
    """
    try:
        status = json.loads(read_file(out / STATUS).decode("utf-8"))
        good = status["format"] == _FORMAT and isinstance(status["federation"], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise Damaged(
            f"fastfpl.flower: {out / STATUS} must be what a run on Flower wrote; got none; name "
            "the folder that --out named"
        )
    return dict(status)


@dataclass
class Status:
    """What is said of a run: in its file, and in sentences.

    Attributes
    ----------
    folder : Path
        The run's.
    settings : Settings
    federation : str
        Name of the federation, which a resumed run keeps.
    roster : Roster
    log : callable
        Told of everything in sentences.
    phase : str
    rounds_done : int
    counts : dict from str to int
        How many answers were ``refused``, ``failed`` or ``absent``.
    noted : list of dict
        The last of those that were refused or failed: ``round``, ``what``, ``client``, ``why``.
    summed : dict or None
        Of which ``clients`` a sum under masks was asked for last, and in which ``round``.
    """

    folder: Path
    settings: Settings
    federation: str
    roster: Roster
    log: Callable[[str], None]
    phase: str = "begins"
    rounds_done: int = 0
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("refused", "failed", "absent"), 0)
    )
    noted: list[dict[str, Any]] = field(default_factory=list)
    summed: dict[str, Any] | None = None

    def summed_in(self, round_: int) -> set[int] | None:
        """Return of whom a sum under masks was asked for in a round; None if of nobody."""
        if self.summed is None or self.summed["round"] != round_:
            return None
        return {*self.summed["clients"]}

    def sums(self, round_: int, clients: Set[int]) -> None:
        """Write down of whom a sum under masks is asked for, before it is."""
        self.summed = {"round": round_, "clients": sorted(clients)}
        self.tell()

    def note(self, what: str, client: int | None, why: str) -> None:
        """Note that something was refused or failed; the file has it with the next `tell`."""
        self.counts[what] += 1
        who = "a client" if client is None else f"client {client}"
        self.log(f"{what}: {who}: {why}")
        self.noted.append(
            {"round": self.rounds_done, "what": what, "client": client, "why": why[:2000]}
        )
        del self.noted[:-_NOTED]

    def tell(self, phase: str | None = None, why: str | None = None) -> None:
        """Write down what is going on."""
        self.phase = phase or self.phase
        write_json(
            self.folder / STATUS,
            {
                "format": _FORMAT,
                "federation": self.federation,
                "method": self.settings.method,
                "phase": self.phase,
                "why": why,
                "rounds_done": self.rounds_done,
                "rounds": self.settings.rounds,
                "joined": sorted(self.roster.nodes),
                "clients": self.roster.known,
                "counts": self.counts,
                "noted": self.noted,
                "summed": self.summed,
            },
        )
