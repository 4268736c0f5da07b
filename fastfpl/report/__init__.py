"""Reports of a comparison: tables, plots and one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastfpl.errors import InputError
from fastfpl.federation import Comparison, Sweep
from fastfpl.federation.comparison import value_folders
from fastfpl.files import write_all
from fastfpl.report.deciding import clients_csv, decision
from fastfpl.report.load import load_comparisons, load_sweep
from fastfpl.report.page import html_page
from fastfpl.report.plots import accuracy_plot, clients_plot, stacked
from fastfpl.report.runs import each, group_names
from fastfpl.report.sweep import sweep_markdown, sweep_matrix, sweep_plot, sweep_table
from fastfpl.report.table import (
    csv_table,
    decision_table,
    detail_table,
    markdown_table,
    published_table,
    text_table,
)

__all__ = [
    "accuracy_plot",
    "clients_plot",
    "csv_table",
    "decision",
    "decision_table",
    "detail_table",
    "html_page",
    "load_comparisons",
    "load_sweep",
    "markdown_table",
    "published_table",
    "sweep_table",
    "text_table",
    "write_report",
    "write_sweep",
]


def write_report(comparisons: Comparison | Sequence[Comparison], folder: str | Path) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``clients.csv``, two plots and ``index.html``.

    The plots are ``accuracy.png`` and ``clients.png``.

    Parameters
    ----------
    comparisons : Comparison or sequence of Comparison
        Several, as `load_comparisons` gives for runs of different tasks, stand below headings.
    folder : path
        Made if it is not there; ``METHOD-seedN`` folders in it are linked from the page.

    Returns
    -------
    list of Path
        The files, the page last.

    Raises
    ------
    InputError
        If a comparison holds no result, the folder is a file, or the disk does not take the
        files. Then those that were there are as before: a report is not half new and half old.
    """
    files = _report(comparisons, Path(folder))
    _write("write_report", Path(folder), files)
    return list(files)


def write_sweep(sweep: Sweep, folder: str | Path) -> list[Path]:
    """Write ``sweep.md``, ``sweep.png`` and ``index.html``, and below them a report a value.

    Parameters
    ----------
    sweep : Sweep
    folder : path
        The ``out`` of `fastfpl.sweep`; reports go to the folders of values in it.

    Returns
    -------
    list of Path
        The three files and the pages of the values.

    Raises
    ------
    InputError
        As for `write_report`.
    """
    folder = Path(folder)
    there = {value: one for value, one in sweep.comparisons.items() if one.results}
    if not there:
        raise InputError(
            "fastfpl.write_sweep: sweep must hold a finished run; got "
            + "; ".join(sweep_matrix(sweep).missing)
        )
    places = value_folders(sweep.key, list(sweep.comparisons))
    page = html_page(list(there.values()), matrix=sweep_matrix(sweep))
    files = {
        folder / "sweep.md": sweep_markdown(sweep).encode(),
        folder / "sweep.png": sweep_plot(sweep),
        folder / "index.html": page.encode(),
    }
    own = list(files)
    pages = []
    for value, one in there.items():
        files |= (more := _report(one, folder / places[value]))
        pages.append(list(more)[-1])
    _write("write_sweep", folder, files)
    return [*own, *pages]


def _report(comparisons: Comparison | Sequence[Comparison], folder: Path) -> dict[Path, bytes]:
    """Draw and write down everything that a report's files hold."""
    all_of = each(comparisons)
    named = list(zip(all_of, group_names(all_of), strict=True))
    contents = {
        "table.md": markdown_table(all_of).encode(),
        "table.csv": csv_table(all_of).encode(),
        "clients.csv": clients_csv([(name, one) for one, name in named]).encode(),
        "accuracy.png": stacked([accuracy_plot(one, about=name) for one, name in named]),
        "clients.png": stacked([clients_plot(one, about=name) for one, name in named]),
        "index.html": html_page(all_of, folder).encode(),
    }
    return {folder / name: content for name, content in contents.items()}


def _write(function: str, folder: Path, files: dict[Path, bytes]) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"fastfpl.{function}: folder must be a folder; got the file {folder}")
    try:
        write_all(files)
    except OSError as error:
        raise InputError(
            f"fastfpl.{function}: folder must take the files of the report; got "
            f"{error.strerror or error} in {folder}; what was there is as before, make room or "
            "name another folder"
        ) from None
