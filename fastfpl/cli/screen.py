"""What the terminal shows when a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastfpl.terminal import console, say

if TYPE_CHECKING:
    from fastfpl.federation import Comparison, Sweep

__all__ = ["print_sweep", "print_tables"]


def print_sweep(sweep: Sweep, folder: Path) -> None:
    """Write the report of a sweep, print its table, name the files and what is missing."""
    from fastfpl.report import sweep_table, write_sweep

    # files first; a disk that does not take them must not cost the table either
    written: list[Path] = []
    try:
        written = write_sweep(sweep, folder)
    finally:
        console().print(sweep_table(sweep))
    for path in written:
        say(str(path))


def print_tables(comparison: Comparison) -> None:
    """Print the tables of a comparison: methods, details, clients, published figures."""
    from fastfpl.report import decision_table, detail_table, published_table, text_table

    console().print(text_table(comparison))
    for more in (detail_table(comparison), decision_table(comparison), published_table(comparison)):
        if more is not None:
            console().print(more)
