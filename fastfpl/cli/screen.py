"""What the terminal shows when a run has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastfpl.terminal import console

if TYPE_CHECKING:
    from fastfpl.federation import Comparison

__all__ = ["print_tables"]


def print_tables(comparison: Comparison) -> None:
    """Print the table of a comparison, and those of details and published figures it has."""
    from fastfpl.report import detail_table, published_table, text_table

    console().print(text_table(comparison))
    for more in (detail_table(comparison), published_table(comparison)):
        if more is not None:
            console().print(more)
