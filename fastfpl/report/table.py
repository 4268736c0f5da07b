"""The comparison as a table: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastfpl.federation import Comparison
from fastfpl.report.agreement import warnings
from fastfpl.report.deciding import decision
from fastfpl.report.facts import (
    Row,
    augmentations,
    captions,
    client_means,
    details,
    rows,
    subject,
)
from fastfpl.report.matrix import Matrix, across
from fastfpl.report.published import published
from fastfpl.report.runs import each, group_names, named_clients, runs
from fastfpl.report.words import NONE, duration, listed, percent, rate, size, unformulated
from fastfpl.terminal import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

__all__ = [
    "INCOMPLETE",
    "REFUSAL",
    "UNEQUAL",
    "Sheet",
    "cells",
    "csv_table",
    "decision_table",
    "detail_table",
    "escaped",
    "headings",
    "markdown_line",
    "markdown_table",
    "matrix_markdown",
    "matrix_table",
    "published_table",
    "text_table",
]

REFUSAL = "these runs differ in what decides accuracy; do not compare their accuracies"
INCOMPLETE = "this comparison is not finished; nothing is ranked"
UNEQUAL = "times, rates and memory were not measured under the same conditions"


def headings(comparison: Comparison) -> list[str]:
    """Column titles of the table; spread over seeds only where a method has several."""
    several = any(len(results) > 1 for results in comparison.results.values())
    return [
        "method",
        "accuracy %",
        *(["± seeds"] if several else []),
        "last 5",
        "best on test",
        "images/s",
        "time",
        "memory",
        "up",
        "down",
    ]


def cells(comparison: Comparison) -> list[tuple[Row, list[str]]]:
    """Give each method's row and the texts of its cells, one a column of `headings`."""
    several = "± seeds" in headings(comparison)
    out = []
    for row in rows(comparison):
        spread = NONE if row.std_over_seeds is None else percent(row.std_over_seeds)
        texts = [
            row.method,
            f"{percent(row.accuracy)} ± {percent(row.std_over_clients)}",
            *([spread] if several else []),
            percent(row.last5),
            percent(row.best),
            NONE if row.images_per_second is None else rate(row.images_per_second),
            duration(row.seconds),
            size(row.memory),
            NONE if row.bytes_up is None else size(row.bytes_up),
            NONE if row.bytes_down is None else size(row.bytes_down),
        ]
        out.append((row, texts))
    return out


@dataclass(frozen=True)
class Sheet:
    """A table for a terminal of any width, from which no letter is ever cut.

    Where it is too wide its columns go on below, each part beginning with the first column; where
    not even two columns fit, a line becomes a list of its figures.

    Attributes
    ----------
    titles : sequence of str
        Of the columns; a line break may stand in one.
    lines : sequence of sequence of str
        The first text of each is a name.
    title : str
    notes : sequence of str
        Lines beneath.
    cautions : sequence of (str, bool)
        More lines beneath, and whether they are severe.
    bold : frozenset of int
        Lines that stand out.
    words : int
        So many columns, from the left, are words; figures follow.
    """

    titles: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    cautions: Sequence[tuple[str, bool]] = ()
    bold: frozenset[int] = field(default_factory=frozenset)
    words: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.measure import Measurement
        from rich.text import Text

        def fits(columns: Sequence[int], fold: bool) -> bool:
            wanted = Measurement.get(
                console, options.update(max_width=1 << 30), self._table(columns, fold)
            )
            return wanted.maximum <= options.max_width

        every = range(len(self.titles))
        for fold in (False, True):
            if fits(every, fold):
                whole = self._table(every, fold)
                whole.title, whole.caption = (
                    _text(self.title) if self.title else None,
                    self._below(),
                )
                yield whole
                return
        if self.title:
            yield Text(plain(self.title), style="bold")
        if all(fits((0, column), True) for column in every[1:]):
            rest = list(every[1:])
            while rest:
                taken = 1
                while taken < len(rest) and fits((0, *rest[: taken + 1]), True):
                    taken += 1
                yield self._table((0, *rest[:taken]), True)
                yield ""
                rest = rest[taken:]
        else:
            yield from self._turned()
        yield self._below(apart=True)

    def _table(self, columns: Sequence[int], fold: bool) -> Table:
        table = _bare()
        for column in columns:
            word = column < self.words
            table.add_column(
                _text(self.titles[column]),
                justify="left" if word else "right",
                no_wrap=True,
                overflow="fold",
                vertical="bottom",
            )
        for number, line in enumerate(self.lines):
            name = line[0].replace("-", "-\n") if fold and len(line[0]) > 12 else line[0]
            texts = [line[column] if column else name for column in columns]
            table.add_row(*map(_text, texts), style="bold" if number in self.bold else None)
        return table

    def _turned(self) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        for number, line in enumerate(self.lines):
            style = "bold" if number in self.bold else ""
            yield Text(plain(line[0]), style=style, overflow="fold")
            grid = Table.grid(padding=(0, 1))
            for _ in range(2):
                grid.add_column(overflow="fold")
            for title, text in zip(self.titles[1:], line[1:], strict=True):
                grid.add_row(_text("  " + title.replace("\n", " ")), _text(text), style=style)
            yield grid
            yield ""

    def _below(self, apart: bool = False) -> Any:
        from rich.text import Text

        below = Text("\n".join(map(plain, self.notes)), style="dim" if apart else "")
        for text, severe in self.cautions:
            style = "not dim bold red" if severe else "not dim yellow"
            below.append("\n" * bool(below) + plain(text), style=style)
        return below


def _bare() -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _text(text: str) -> Any:
    """Make a text of a terminal's table: never markup, and no control but our line breaks."""
    from rich.text import Text

    return Text("\n".join(plain(line) for line in text.split("\n")), overflow="fold")


def text_table(comparison: Comparison) -> Sheet:
    """Lay the comparison out for a terminal.

    Parameters
    ----------
    comparison : Comparison
        One or more methods with one or more seeds each.

    Returns
    -------
    Sheet
        For `rich`. The line with the largest accuracy is bold, unless the runs may not be compared.

    Raises
    ------
    InputError
        If the comparison holds no result.
    """
    # titles of several words stack, so that ten columns fit into 80 characters
    short = {"± seeds": "±\nseed", "images/s": "img/s"}
    table = cells(comparison)
    return Sheet(
        [short.get(name, name.replace(" ", "\n")) for name in headings(comparison)],
        [_one_line(texts) for _, texts in table],
        title=subject(comparison),
        notes=[*captions(comparison), _training(comparison)],
        cautions=_cautions(comparison),
        bold=frozenset(n for n, (row, _) in enumerate(table) if row.top),
    )


def detail_table(comparison: Comparison) -> Sheet | None:
    """Lay out the figures beside the headline for a terminal, if there are any."""
    found = details(comparison)
    if found is None:
        return None
    titles, lines, notes = found
    names = [plain(name).replace(" ", "\n") for name in titles]
    return Sheet(names, [_one_line(line) for line in lines], notes=notes)


def decision_table(comparison: Comparison) -> Sheet | None:
    """Lay out what each client has of each method for a terminal, if there are several methods.

    The best of each client has an asterisk.
    """
    found = decision(comparison)
    if found is None:
        return None
    titles = [name.replace(" ", "\n") for name in found.titles]
    lines = [
        [one.label, str(one.train), str(one.test)]
        + [text + "*" * best for text, best in found.cells(one)]
        for one in found.shown
    ]
    notes = [*found.notes, *found.answers]
    cautions = [(text, False) for text in found.cautions]
    return Sheet(titles, [_one_line(line) for line in lines], notes=notes, cautions=cautions)


def published_table(comparison: Comparison) -> Sheet | None:
    """Lay papers' figures beside the measured ones for a terminal, if there are any."""
    found = published(comparison)
    if found is None:
        return None
    return Sheet(
        found.titles,
        [_one_line(line) for line in found.lines],
        notes=found.notes,
        cautions=[(text, False) for text in found.cautions],
        words=2,
    )


def _one_line(texts: Sequence[str]) -> list[str]:
    return [plain(text) for text in texts]


def markdown_table(comparisons: Comparison | Sequence[Comparison]) -> str:
    """Write a comparison as a GitHub table with its captions beneath; several below headings.

    Parameters
    ----------
    comparisons : Comparison or sequence of Comparison

    Returns
    -------
    str
        Ends with a line break.

    Raises
    ------
    InputError
        If the comparison holds no result.
    """
    all_of = each(comparisons)
    if len(all_of) == 1:
        return _markdown(all_of[0])
    named = zip(group_names(all_of), all_of, strict=True)
    parts = [f"## {escaped(name)}\n\n{_markdown(one)}" for name, one in named]
    beside = across(all_of)
    return "\n".join(([] if beside is None else [matrix_markdown(beside)]) + parts)


def matrix_markdown(matrix: Matrix) -> str:
    """Write methods over tasks as a GitHub table."""
    text = [f"> **Caution.** missing: {escaped(m)}.\n" for m in matrix.missing]
    text += [markdown_line([escaped(title) for title in matrix.titles])]
    text += [markdown_line([":--"] + ["--:"] * (len(matrix.titles) - 1))]
    for line, best in zip(matrix.lines, matrix.best, strict=True):
        cells = [f"**{escaped(t)}**" if at in best else escaped(t) for at, t in enumerate(line)]
        text.append(markdown_line(cells))
    notes = [f"<sub>{escaped(note)}.</sub><br>" for note in matrix.notes]
    return "\n".join([*text, "", *notes]).removesuffix("<br>") + "\n"


def matrix_table(matrix: Matrix) -> Sheet:
    """Lay methods over tasks out for a terminal; the best of each column has an asterisk."""
    return Sheet(
        [plain(name).replace("=", "=\n") for name in matrix.titles],
        [
            [plain(text) + "*" * (at in best) for at, text in enumerate(line)]
            for line, best in zip(matrix.lines, matrix.best, strict=True)
        ],
        notes=matrix.notes,
        cautions=[(f"missing: {text}", True) for text in matrix.missing],
    )


def _markdown(comparison: Comparison) -> str:
    names = headings(comparison)
    lines = [f"**{escaped(subject(comparison))}**", ""]
    for text, severe in _cautions(comparison):
        lines += [f"> {'**Caution.** ' if severe else ''}{escaped(text)}.", ""]
    lines += [markdown_line(names), markdown_line([":--"] + ["--:"] * (len(names) - 1))]
    for row, texts in cells(comparison):
        shown = [escaped(text) for text in texts]
        if row.top:
            shown[:2] = [f"**{text}**" for text in shown[:2]]
        lines.append(markdown_line(shown))
    notes = [*captions(comparison), _training(comparison)]
    found = details(comparison)
    if found is not None:
        titles, figures, more = found
        lines += ["", markdown_line([escaped(title) for title in titles])]
        lines += [markdown_line([":--"] + ["--:"] * (len(titles) - 1))]
        lines += [markdown_line([escaped(text) for text in line]) for line in figures]
        notes += more
    decided = decision(comparison)
    if decided is not None:
        lines += ["", *(f"**{escaped(text)}.**\n" for text in decided.answers)]
        lines += [f"> **Caution.** {escaped(text)}.\n" for text in decided.cautions]
        lines += [markdown_line([escaped(title) for title in decided.titles])]
        lines += [markdown_line([":--"] + ["--:"] * (len(decided.titles) - 1))]
        for one in decided.shown:
            texts = [f"**{escaped(t)}**" if b else escaped(t) for t, b in decided.cells(one)]
            lines.append(markdown_line([escaped(one.label), str(one.train), str(one.test), *texts]))
        notes += decided.notes
    beside = published(comparison)
    if beside is not None:
        lines += ["", *(f"> **Caution.** {escaped(text)}.\n" for text in beside.cautions)]
        lines += [markdown_line(beside.titles), markdown_line([":--", ":--", "--:", "--:", "--:"])]
        lines += [markdown_line([escaped(text) for text in line]) for line in beside.lines]
        notes += beside.notes
    lines += ["", *(f"<sub>{escaped(text)}.</sub><br>" for text in notes)]
    return "\n".join(lines).removesuffix("<br>") + "\n"


def markdown_line(texts: Sequence[str]) -> str:
    """Write a line of a GitHub table."""
    return "| " + " | ".join(texts) + " |"


def escaped(text: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line and inside one cell."""
    text = plain(text)
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\\", "\\\\")):
        text = text.replace(mark, safe)
    for mark in "|*_`[]~$":
        text = text.replace(mark, "\\" + mark)
    return text


def _training(comparison: Comparison) -> str:
    return f"training images: {listed(augmentations(comparison))}"


def _cautions(comparison: Comparison) -> list[tuple[str, bool]]:
    """Say what runs differ in, and whether it decides accuracy."""
    found = warnings(comparison)
    out = []
    for severe, text in ((True, REFUSAL), (False, UNEQUAL)):
        mine = [w.sentence for w in found if w.decides_accuracy is severe]
        if mine:
            out.append((f"{text}: {' · '.join(mine)}", severe))
    if comparison.missing:
        out.insert(0, (f"{INCOMPLETE}: {' · '.join(comparison.missing)}", True))
    return out


def csv_table(comparisons: Comparison | Sequence[Comparison]) -> str:
    """Write the figures unrounded: accuracies in [0, 1], bytes, seconds; empty where none.

    Several comparisons stand below each other, told apart by a first column ``task``. A text that
    a spreadsheet would take for a formula begins with an apostrophe. Clients that the data set
    names have a column each, where there is one comparison.
    """
    columns = (
        "method",
        "seeds",
        "accuracy",
        "std_over_clients",
        "std_over_seeds",
        "last5",
        "best",
        "images_per_second",
        "seconds",
        "memory",
        "bytes_up",
        "bytes_down",
        "total_up",
        "total_down",
    )
    all_of = each(comparisons)
    several = len(all_of) > 1
    # clients of several tasks share no columns
    clients = [] if several else named_clients(runs(all_of[0]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    named = [unformulated(f"accuracy of {client}") for client in clients]
    writer.writerow([*(["task"] * several), *columns, *named])
    for name, comparison in zip(group_names(all_of), all_of, strict=True):
        for row in rows(comparison):
            values = [*([name] * several), *(getattr(row, column) for column in columns)]
            values += client_means(comparison.results[row.method]) if clients else []
            writer.writerow([unformulated(v) if isinstance(v, str) else v for v in values])
    return out.getvalue()
