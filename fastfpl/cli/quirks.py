"""`fastfpl quirks`: what released codes do that can be switched on."""

from __future__ import annotations

import click

from fastfpl.cli.names import Name
from fastfpl.terminal import console, table


@click.command()
@click.argument("method", required=False, type=Name("method"))
def quirks(method: str | None) -> None:
    """List the quirks of released codes that --as-released reproduces, or METHOD's alone."""
    from fastfpl.methods import find_method
    from fastfpl.released import QUIRKS

    if method is not None:
        find_method(method)
    found = table("quirk", "what the released code does", "methods")
    for quirk in QUIRKS.values():
        if method is None or method in quirk.methods:
            found.add_row(quirk.name, quirk.about, ", ".join(quirk.methods))
    if not found.row_count:
        click.echo(f"{method}'s released code has no quirk that is reproduced here")
        return
    console().print(found)
