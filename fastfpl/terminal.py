"""What a person at a terminal, a pipe or a file is told: no control sequence, no loss, no crash."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console", "plain", "say", "sayable", "table"]

# controls of C0 and C1, line separators, marks that turn the order of letters, lone surrogates
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# what a stream without Unicode is told in place of our own signs
_SPELLED = {
    "\u2013": "-",
    "\u2014": "-",
    "±": "+/-",
    "…": "...",
    "\u00d7": "x",
    "≥": ">=",
    "≤": "<=",
    "·": "-",
}
_SPELLED |= {"━": "-", "─": "-", "│": "|", "→": "->"}
# nobody looks at the width of a pipe or a file
_UNBOUNDED = 100_000


def plain(text: str) -> str:
    r"""Make one line that no terminal acts on: line breaks and tabs are spaces, controls ``\x1b``.

    Every text that others wrote (names of methods, data sets, classes and folders, notes of split
    files) goes through here on its way to a terminal, a table, a plot or a page.
    """
    return _CONTROL.sub(_spell, text)


def _spell(found: re.Match[str]) -> str:
    mark = found.group()
    return " " if mark in "\t\n\r" else mark.encode("unicode_escape").decode("ascii")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Spell what a stream's encoding cannot say; ``?`` where there is no spelling."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    marks = error.object[error.start : error.end]
    return "".join(_SPELLED.get(mark, "?") for mark in marks), error.end


codecs.register_error("fastfpl.spell", _replace)


@contextmanager
def sayable() -> Iterator[None]:
    """Let standard output and error replace what their encoding cannot say, for a while."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "fastfpl.spell":
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="fastfpl.spell")
    try:
        yield
    finally:
        for stream, errors in changed:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def say(text: str, *, err: bool = False) -> None:
    """Write a line without controls to standard output or error; it is never wrapped."""
    stream = sys.stderr if err else sys.stdout
    stream.write(plain(text) + "\n")
    stream.flush()


def console(stderr: bool = False) -> Console:
    """Make a console as wide as the terminal; a pipe or a file is as wide as what it is told.

    ``COLUMNS`` bounds either.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            lines = (plain(line) for line in text.split("\n"))
            return super().render_str("\n".join(lines), **options)

    made = Plain(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = _UNBOUNDED
    return made


def table(*titles: str) -> Table:
    """Make a table without lines whose words are folded, never cut, where it is narrow."""
    from rich.table import Table

    made = Table(box=None)
    for title in titles:
        made.add_column(title, overflow="fold")
    return made
