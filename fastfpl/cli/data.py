"""`fastfpl data`: the data sets and their files."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fastfpl.cli.flags import Place
from fastfpl.cli.names import Name
from fastfpl.cli.screen import progress
from fastfpl.terminal import console, say, table


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
    from fastfpl.data import DATASETS
    from fastfpl.data.catalogue import FACTS

    sets = table("name", "folder", "classes", "train", "test", "domains")
    for name in DATASETS:
        if name not in FACTS:
            sets.add_row(name, "needs no files")
            continue
        facts = FACTS[name]
        sizes = (str(n) for n in (facts.classes, facts.train, facts.test, len(facts.domains)))
        sets.add_row(name, facts.folders[0], *sizes)
    console().print(sets)


@data.command()
@click.argument("name", type=Name("dataset"))
@_ROOT
@click.option("--decode", is_flag=True, help="also decode every image, which takes a while")
def check(name: str, root: Path, decode: bool) -> None:
    """Say what of NAME's files is there, and where to get the rest; exit code 2 if any lacks."""
    from fastfpl.data.check import check_files

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
