"""The rounds of a run as JSON lines in its folder, while it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfpl.files import on_disk, write_new, write_whole

__all__ = ["METRICS", "Lines"]

#: A line a round, each a row of ``result.json``.
METRICS = "metrics.jsonl"


class Lines:
    """Appends a line a round, flushed, so that whoever follows the file sees it at once.

    Parameters
    ----------
    folder : Path
        Of the run.
    rounds : sequence of mapping
        Rows of the rounds that a checkpoint has: the file gets these and no other, so that a run
        which was killed between its checkpoint and the line neither lacks a round nor doubles one.
    """

    def __init__(self, folder: Path, rounds: Sequence[Mapping[str, Any]]) -> None:
        self.path = folder / METRICS
        wanted = b"".join(map(_line, rounds))
        with on_disk("fastfpl.run", "out", folder, "or name another out"):
            own = self.path.is_file() and not self.path.is_symlink()
            there = self.path.read_bytes() if own else None
        if there != wanted and (rounds or there is not None):

            def write(part: Path) -> None:
                part.write_bytes(wanted)

            write_whole(self.path, write)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write the line of a round whose checkpoint is there."""
        with on_disk("fastfpl.run", "out", self.path.parent, "or name another out"):
            if not os.path.lexists(self.path):
                write_new(self.path, _line(row))
                return
            with self.path.open("ab") as file:
                file.write(_line(row))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"
