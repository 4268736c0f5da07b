"""`fastfpl report`: tables, plots and page of finished runs anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fastfpl.cli.flags import Place
from fastfpl.cli.screen import print_sweep, print_tables
from fastfpl.terminal import say


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", type=Place())
@click.option(
    "--out",
    type=Place(),
    help="folder of the report; by itself FOLDER, and runs/report for several",
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Print the table and write plots and page of finished runs anew.

    A FOLDER is the --out of a run, of a comparison or of a sweep. Runs on different tasks (data
    set, scenario, CLIP, partition, shots, views) get tables of their own; runs that are not
    finished are named.
    """
    put_together(folders, out)


def put_together(folders: Sequence[Path], out: Path | None) -> None:
    """Write and print the report of finished runs, and say which are missing."""
    from fastfpl.report import load_comparisons, load_sweep, write_report
    from fastfpl.report.runs import group_names

    swept = load_sweep(folders[0]) if len(folders) == 1 else None
    if swept is not None:
        print_sweep(swept, out or folders[0])
        return
    comparisons = load_comparisons(*folders)
    folder = out or (folders[0] if len(folders) == 1 else Path("runs") / "report")
    written: list[Path] = []
    try:
        written = write_report(comparisons, folder)
    finally:
        for name, comparison in zip(group_names(comparisons), comparisons, strict=True):
            if name:
                say(f"== {name}")
            print_tables(comparison)
    for path in written:
        say(str(path))
    for text in (text for comparison in comparisons for text in comparison.missing):
        say(f"missing: {text}", err=True)
