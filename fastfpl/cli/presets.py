"""`fastfpl presets`: the papers' settings."""

from __future__ import annotations

import click
import yaml

from fastfpl.cli.names import Name
from fastfpl.config import load_preset, preset_names
from fastfpl.terminal import console, table


@click.command()
@click.argument("name", required=False, type=Name("preset"))
def presets(name: str | None) -> None:
    """List the papers' settings, or show one as YAML."""
    if name is not None:
        chosen = load_preset(name)
        click.echo(f"# {chosen.about}")
        click.echo(yaml.safe_dump(chosen.settings, sort_keys=False), nl=False)
        for figures in chosen.published:
            where = "".join(f", {key}={value}" for key, value in figures.where.items())
            click.echo(f"# published: {figures.source}{where}; for {', '.join(figures.figures)}")
        return
    found = table("preset", "settings of")
    for preset in preset_names():
        found.add_row(preset, load_preset(preset).about)
    console().print(found)
