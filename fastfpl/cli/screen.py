"""What the terminal shows: progress while a run lasts, tables when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastfpl.terminal import console, plain, say

if TYPE_CHECKING:
    from fastfpl.federation import Comparison

__all__ = ["print_tables", "progress"]

# seconds over which a rate is taken, and after which a long step says a line
_PERIOD = 600.0
_EVERY = 60.0


def print_tables(comparison: Comparison) -> None:
    """Print the table of a comparison, and those of details and published figures it has."""
    from fastfpl.report import detail_table, published_table, text_table

    console().print(text_table(comparison))
    for more in (detail_table(comparison), published_table(comparison)):
        if more is not None:
            console().print(more)


@contextmanager
def progress() -> Iterator[tuple[Callable[[str, int, int], None], Callable[..., None]]]:
    """Show the current step with its rate and time left; in a file, a line a round.

    A step that lasts says every minute how far it is there. All of it goes to stderr.
    """
    shown = console(stderr=True)
    if not shown.is_terminal:
        lines = _Lines()
        yield lines.observer, lines.on_round
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from fastfpl.training.feeds import ENCODING

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            unit = " images" if ENCODING in task.description else ""
            return Text("" if speed is None else f"{speed:.1f}{unit}/s")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    # a chunk of images may take a minute on a CPU, and a rate needs several
    with Progress(*columns, console=shown, transient=True, speed_estimate_period=_PERIOD) as bars:
        current: dict[str, Any] = {}

        def observer(what: str, done: int, total: int) -> None:
            if current.get("what") != what:
                if current:
                    bars.remove_task(current["task"])
                current.update(what=what, task=bars.add_task(plain(what), total=total))
            # the first report is where the rate begins: what was there before does not count
            bars.update(current["task"], completed=done, total=total)

        def on_round(label: str, row: Mapping[str, Any]) -> None:
            if row["accuracy"] is not None:
                bars.console.print(_round_line(label, row))

        yield observer, on_round


def _round_line(label: str, row: Mapping[str, Any]) -> str:
    """Say how a round went: its accuracy, or its loss where nobody was asked."""
    if row["accuracy"] is not None:
        figure = f"accuracy {100 * row['accuracy']:.1f} %"
    else:
        figure = f"loss {row['loss']:.4f}"
    return f"{plain(label)}  round {row['round'] + 1}  {figure}  {row['seconds']:.1f} s"


class _Lines:
    """Progress where lines stay: in a file, a pipe, the log of a batch job."""

    def __init__(self) -> None:
        self._what, self._last = "", 0.0

    def observer(self, what: str, done: int, total: int) -> None:
        """Say once a minute how far a long step is."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._last = what, now
        elif now - self._last >= _EVERY:
            self._last = now
            say(f"{what}  {done} of {total}", err=True)

    def on_round(self, label: str, row: Mapping[str, Any]) -> None:
        """Say that a round ended."""
        say(_round_line(label, row), err=True)
