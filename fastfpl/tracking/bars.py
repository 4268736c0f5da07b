"""Progress of a run on a terminal, in a file or in a notebook."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fastfpl.terminal import console, plain, say
from fastfpl.tracking.callback import ENCODING, Callback, RunInfo

__all__ = ["Progress", "progress"]

# seconds over which a rate is taken, and after which a long step says a line
_PERIOD = 600.0
_EVERY = 60.0


class Progress(Callback):
    """Shows the current step of a run and a line a round, on a terminal or in a notebook.

    ``fastfpl.run(..., callbacks=[Progress()])``.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._told: tuple[Callable[[str, int, int], None], Callable[..., None]] | None = None

    def on_step(self, what: str, done: int, total: int) -> None:
        """Move the bar."""
        self._shown()[0](what, done, total)

    def on_round_end(self, run: RunInfo, row: Mapping[str, Any]) -> None:
        """Say how the round went."""
        self._shown()[1](run.name, row)

    def on_run_end(self, run: RunInfo, final: Mapping[str, Any] | None) -> None:
        """Take the bar away."""
        self._told = None
        self._stack.close()

    def _shown(self) -> tuple[Callable[[str, int, int], None], Callable[..., None]]:
        if self._told is None:
            self._told = self._stack.enter_context(progress())
        return self._told


@contextmanager
def progress() -> Iterator[tuple[Callable[[str, int, int], None], Callable[..., None]]]:
    """Show the current step with its rate and time left; in a file, a line a round.

    A step that lasts says every minute how far it is there. All of it goes to stderr; in a
    notebook, where stderr looks like an error, to the cell's output, as a bar where ipywidgets is
    installed.

    Yields
    ------
    observer : callable
        ``observer(what, done, total)``, as `fastfpl.run` takes it.
    on_round : callable
        ``on_round(label, row)``, likewise.
    """
    shown = console(stderr=True)
    notebook = shown.is_jupyter
    bars_there = importlib.util.find_spec("ipywidgets") is not None if notebook else False
    if not (bars_there if notebook else shown.is_terminal):
        lines = _Lines(err=not notebook)
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

    def __init__(self, err: bool) -> None:
        self._err, self._what, self._last = err, "", 0.0

    def observer(self, what: str, done: int, total: int) -> None:
        """Say once a minute how far a long step is."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._last = what, now
        elif now - self._last >= _EVERY:
            self._last = now
            say(f"{what}  {done} of {total}", err=self._err)

    def on_round(self, label: str, row: Mapping[str, Any]) -> None:
        """Say that a round ended."""
        say(_round_line(label, row), err=self._err)
