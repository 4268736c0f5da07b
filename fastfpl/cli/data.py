"""`fastfpl data`: the data sets and their files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import Place
from fastfpl.cli.names import Name
from fastfpl.errors import InputError, shown
from fastfpl.terminal import console, plain, say, table
from fastfpl.tracking import progress


@click.group()
def data() -> None:
    """List the data sets, and see whether their files are there."""


_ROOT = click.option(
    "--root",
    type=Place(),
    required=True,
    help="folder that holds the set's folder",
)


@data.command("list")
def list_sets() -> None:
    """List the data sets, the folder that each wants, and their published sizes."""
    from fastfpl.data import DATASETS, dataset_names
    from fastfpl.data.catalogue import FACTS

    sets = table("name", "folder", "classes", "train", "test", "domains")
    for name in DATASETS:
        if name not in FACTS:
            sets.add_row(name, "needs no files")
            continue
        facts = FACTS[name]
        sizes = (str(n) for n in (facts.classes, facts.train, facts.test, len(facts.domains)))
        sets.add_row(name, facts.folders[0], *sizes)
    for name in dataset_names():
        if name not in DATASETS:
            sets.add_row(name, "of an installed package")
    console().print(sets)


@data.command()
@click.argument("name", type=Name("dataset"))
@click.option("--root", type=Place(), help="folder that holds the set's folder")
@click.option("--layout", type=Name("layout"), help="of folder:, as --layout of a run")
@click.option("--columns", metavar="path=NAME,...", help="of manifest: and hf:, as of a run")
@click.option("--given", is_flag=True, help="folders of class folders are clients, not domains")
@click.option("--decode", is_flag=True, help="also decode every image, which takes a while")
def check(
    name: str,
    root: Path | None,
    layout: str | None,
    columns: str | None,
    given: bool,
    decode: bool,
) -> None:
    """Say what of NAME's files is there, and where to get the rest; exit code 2 if any lacks.

    Of your own images, as folder:PATH, manifest:FILE or hf:PATH: count them by class, domain and
    client, and find those that are trained on and tested on.
    """
    from fastfpl.config import column_names
    from fastfpl.data import scheme_of

    how = {"layout": layout, "columns": columns and column_names(columns), "given": given or None}
    if scheme_of(name) is not None:
        _check_own(name, decode, {**how, "root": root})
        return
    for option, value in how.items():
        if value is not None:
            raise InputError(f"fastfpl data check: {option} must be left out with {shown(name)}")
    _check_known(name, root, decode)


def _check_own(name: str, decode: bool, how: dict[str, Any]) -> None:
    from fastfpl.data.check import check_own

    with progress() as (observer, _):
        found = check_own(name, decode=decode, observer=observer, **how)
    dataset = found.dataset
    say(f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images")
    for what, counts in found.counts.items():
        sheet = table(what, "train", "test")
        for key, (train, test) in counts.items():
            sheet.add_row(plain(key), str(train), str(test))
        console().print(sheet)
    for note in dataset.notes:
        say(f"  {note}")
    for problem in found.problems:
        say(f"  {problem}")
    if found.problems:
        number = len(found.problems)
        click.echo(f"{number} problem{'s' * (number > 1)}")
        sys.exit(2)
    click.echo("no problem found" if decode else "no problem found; --decode looks into the images")


def _check_known(name: str, root: Path | None, decode: bool) -> None:
    from fastfpl.data.check import check_files

    if root is None:
        raise InputError(
            "fastfpl data check: root (--root) must name the folder that holds the set's folder; "
            "got none; of your own images write folder:PATH"
        )
    with progress() as (observer, _):
        found = check_files(name, root, decode=decode, observer=observer)
    say(f"{name} in {found.folder or root}")
    for need, there in found.parts:
        say(f"  {'there  ' if there else 'MISSING'}  {need.path}")
        if not there:
            say(f"           get it from {need.source}")
    for what, count, published in found.counts:
        say(f"  {count} of {published} {what}")
    for problem in found.problems:
        say(f"  {problem}")
    if not found.complete:
        click.echo(f"{name} is not complete")
        sys.exit(2)
    click.echo(f"{name} is complete")


@data.command()
@click.argument("name", type=Name("dataset"))
@_ROOT
def split(name: str, root: Path) -> None:
    """Draw the split that stands in for NAME's published one, and write it as its file."""
    from fastfpl.data.clip_sets import write_split

    say(f"{write_split(name, root)}")


@data.command()
@click.argument("name", type=Name("dataset"))
@_ROOT
def download(name: str, root: Path) -> None:
    """Download NAME, if it needs no account, into --root."""
    from fastfpl.data.cifar import download as fetch

    say(f"{fetch(name, root)}")
