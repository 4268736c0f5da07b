"""`fastfpl methods`: the algorithms, their options, sources and needs."""

from __future__ import annotations

import click

from fastfpl.cli.names import Name
from fastfpl.errors import FastfplError
from fastfpl.terminal import console, say, table


@click.command()
@click.argument("name", required=False, type=Name("method"))
def methods(name: str | None) -> None:
    """List the methods, or show one: options with defaults, source, needs, what travels."""
    from fastfpl.methods import method_name, method_names
    from fastfpl.methods.facts import method_facts

    if name is None:
        found = table("method", "what it is", "answers with", "options")
        for known in method_names():
            try:
                one = method_facts(known)
            except FastfplError as error:  # of an installed package
                found.add_row(known, str(error), "", "")
                continue
            whose = "a client's own" if one.personal else "one global model"
            found.add_row(known, one.summary, whose, " ".join(o.name for o in one.options))
        console().print(found)
        return
    one = method_facts(method_name(name))
    for line in (f"{one.name}: {one.summary}", "", *one.about.splitlines(), ""):
        say(line)
    for title, text in (
        ("source", one.source),
        ("answers with", "parameters of each client" if one.personal else "one global model"),
        ("sees", f"{one.images} of the frozen CLIP"),
        ("sends", one.sends),
        ("receives", one.receives),
        *(("needs", need) for need in one.needs),
    ):
        say(f"{title + ':':14}{text}")
    if not one.options:
        click.echo("options:      none")
        return
    found = table("option", "value", "default", "meaning")
    for option in one.options:
        found.add_row(option.name, option.kind, option.default, option.about)
    click.echo()
    console().print(found)
