"""`fastfpl report`: tables, plots and page of finished runs anew."""

from __future__ import annotations

from pathlib import Path

import click

from fastfpl.cli.flags import Place
from fastfpl.cli.screen import console, print_tables


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", type=Place())
@click.option(
    "--out",
    type=Place(),
    help="folder of the report; by itself FOLDER, and runs/report for several",
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Print the table and write plots and page of finished runs anew.

    A FOLDER is the --out of a run or of a comparison.
    """
    from fastfpl.report import load_comparison, write_report

    comparison = load_comparison(*folders)
    print_tables(comparison)
    folder = out or (folders[0] if len(folders) == 1 else Path("runs") / "report")
    for path in write_report(comparison, folder):
        console().print(str(path))
