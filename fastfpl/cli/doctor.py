"""`fastfpl doctor`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastfpl.cli.names import Name
from fastfpl.errors import FastfplError, InputError, Missing
from fastfpl.terminal import console, say, table

if TYPE_CHECKING:
    import torch
    from rich.table import Table as RichTable


@click.command()
@click.option(
    "--clip",
    type=Name("clip"),
    help="also say which faces take this model's text tower, and why not",
)
def doctor(clip: str | None) -> None:
    """Say what runs on this machine, why the rest does not, and what cannot be checked on it."""
    import torch
    from rich.table import Table

    from fastfpl.data import dataset_names
    from fastfpl.federation.result import environment
    from fastfpl.methods import method_names
    from fastfpl.ops import all_faces
    from fastfpl.report.machine import machine_facts, unchecked

    shown = console()
    facts = Table(box=None, show_header=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for key, value in environment(device).items():
        facts.add_row(key.replace("_", " "), str(value))
    for key, value in machine_facts().items():
        facts.add_row(key, value)
    facts.add_row("methods", " ".join(method_names()))
    facts.add_row("data sets", " ".join(dataset_names()))
    facts.add_row("feature store", _store())
    shown.print(facts)
    more = list(_added())
    if more:
        packages = table("added", "by", "answers here")
        for row in more:
            packages.add_row(*row)
        shown.print(packages)
    faces = table("op", "face", "answers here")
    for op, candidates in sorted(all_faces().items()):
        for face in candidates:
            reasons = face.missing()
            faces.add_row(op, face.name, "; ".join(reasons) or "yes")
    shown.print(faces)
    if clip is not None:
        shown.print(_takers(clip, device))
    shadow = _shadow()
    if shadow is not None:
        say(shadow)
    blind = list(unchecked())
    click.echo("cannot be checked here:" if blind else "everything can be checked here")
    for what in blind:
        say(f"  {what}")


def _added() -> Iterator[tuple[str, str, str]]:
    """Say what installed packages add, and whether it can be imported."""
    from fastfpl.data import GROUP as DATASETS
    from fastfpl.installed import added, load_added
    from fastfpl.methods import find_method
    from fastfpl.methods.own import GROUP as METHODS

    for what, group in (("method", METHODS), ("data set", DATASETS)):
        for name, point in added(group).items():
            answer = "yes"
            try:
                if group == METHODS:
                    find_method(name)
                else:
                    load_added("fastfpl.data", point)
            except FastfplError as error:
                answer = str(error)
            yield f"{what} {name}", point.value, answer


def _takers(clip: str, device: torch.device) -> RichTable:
    """Build the table of the faces that take a model's text tower on a device."""
    from fastfpl.clip.survey import on, survey
    from fastfpl.ops.text import reasons_against

    found = survey(clip)
    if found.text is None:
        raise InputError(f"fastfpl doctor: clip must be a model that is taken; got {found.refusal}")
    faces = table(f"text pass of {found.name}", "takes it")
    for name, reasons in reasons_against(on(found.text, device)).items():
        faces.add_row(name, "; ".join(reasons) or "yes")
    return faces


def _shadow() -> str | None:
    """Say whether Python started here would import another folder as ``fastfpl``."""
    here = Path("fastfpl").absolute()
    if not here.is_dir() or (here / "__init__.py").exists():
        return None
    return (
        f"Python that is started in {here.parent} imports the folder {here.name}, which is no "
        "package, in place of the library (AttributeError: module 'fastfpl' has no attribute ...): "
        "rename that folder, as by git clone ADDRESS fastfpl-source, or start Python elsewhere"
    )


def _store() -> str:
    """Say where image features lie by default, below ~ where that is so."""
    from fastfpl.features import default_directory

    try:
        folder = default_directory()
    except Missing as error:
        return str(error)
    home = os.environ.get("HOME")
    if home and folder.is_relative_to(home):
        return f"~/{folder.relative_to(home)}"
    return str(folder)
