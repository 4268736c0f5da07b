"""`fastfpl flower`: the same methods between real processes, over Flower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import SEED, Grouped, Place, run_options, settings_of
from fastfpl.cli.names import Name
from fastfpl.cli.screen import print_tables
from fastfpl.errors import InputError, shown
from fastfpl.plain_yaml import parse_yaml
from fastfpl.terminal import console, say, table
from fastfpl.tracking import progress

__all__ = ["flower"]

_RULE = click.option(
    "-r",
    "--rule",
    "rules",
    multiple=True,
    metavar="KEY=VALUE",
    help="a rule of the server; may be repeated; see: fastfpl flower rules",
)


@click.group()
def flower() -> None:
    """Play runs between real processes, over Flower (pip install "fastfpl[flower]").

    docs/flower.md says how a federation of several machines is set up.
    """


@flower.command(cls=Grouped)
@click.argument("method", type=Name("method"))
@SEED
@_RULE
@click.option(
    "--own",
    "owned",
    multiple=True,
    metavar="NAME=PATH",
    help="a client and the folder of its own images, or manifest:FILE; once a client",
)
@click.option("--port", type=click.IntRange(1, 65000), help="of the SuperLink; nodes take the next")
@click.option("--secure", is_flag=True, help="TLS, and a registered key for every client")
@click.option(
    "--keys", type=Place(), metavar="FOLDER", help="made by: fastfpl flower keys; with TLS"
)
@run_options
def up(
    method: str,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    track: Sequence[str],
    rules: Sequence[str],
    owned: Sequence[str],
    port: int | None,
    secure: bool,
    keys: Path | None,
    **flags: Any,
) -> None:
    """Start a SuperLink and a SuperNode a client on loopback, play METHOD, take them down.

    Takes the settings of `fastfpl run` and ends with the same result.json. Every client is a
    process of its own with its own shard, feature cache and state, in --out/flower.
    """
    from fastfpl.federation import Comparison
    from fastfpl.flower.lab import up as play

    own = _own(owned)
    if own:
        for name, value in (("dataset", "own"), ("partition", "given"), ("clients", len(own))):
            if flags[name] not in (None, value):
                raise InputError(
                    f"fastfpl flower: {name} must be {value} or left out with {len(own)} --own; "
                    f"got {shown(flags[name])}"
                )
            flags[name] = value
    settings = settings_of(method, preset, config, options, flags)
    folder = out or Path("runs") / f"{method}-{settings.dataset}-seed{settings.seed}-flower"
    chosen = _rules(rules)
    with progress() as (observer, _):
        result = play(
            settings,
            chosen,
            folder,
            resume=resume,
            port=port,
            secure=secure,
            keys=keys,
            cache=cache,
            track=_tracked(track),
            own=own,
            observer=observer,
        )
    print_tables(Comparison({method: [result]}))
    say(str(folder / "result.json"))


@flower.command(cls=Grouped)
@click.argument("folder", type=Place())
@click.argument("method", type=Name("method"))
@SEED
@_RULE
@run_options
def init(
    folder: Path,
    method: str,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    track: Sequence[str],
    rules: Sequence[str],
    **flags: Any,
) -> None:
    """Write an app FOLDER of METHOD that `flwr run` accepts, or say what the run would refuse.

    --out is the folder of the results at the server. Which client a SuperNode is, and where its
    images and its state lie, is told to the node itself, see docs/flower.md.
    """
    from fastfpl.flower.folder import write_app
    from fastfpl.flower.preparation import rehearsed

    for name, given in (("resume", resume), ("cache", cache)):
        if given:
            raise InputError(
                f"fastfpl flower: {name} must be left out of init; it is for each run or node, see "
                "docs/flower.md"
            )
    settings = settings_of(method, preset, config, options, flags)
    where = out or Path("runs") / f"{method}-{settings.dataset}-seed{settings.seed}-flower"
    target = str(where.absolute())
    chosen, tracked = _rules(rules), _tracked(track)
    rehearsed(settings, chosen)
    write_app(folder, method, settings.model_dump(), chosen.model_dump(), target, tracked)
    say(f"{folder}: run it by: flwr run {folder} SUPERLINK --run-config 'resume=false'")


@flower.command()
@click.argument("folder", type=Place())
@click.option("--clients", type=click.IntRange(1, 100_000), required=True, help="how many")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="NAME|ADDRESS",
    help="by which clients reach the server; may be repeated",
)
@click.option("--days", type=click.IntRange(1, 3650), default=365, help="of validity  [365]")
def keys(folder: Path, clients: int, hosts: Sequence[str], days: int) -> None:
    """Make certificates for TLS and a pair of keys for every client in a new FOLDER.

    A client gets its own private key and ca.crt; everything else stays with the server, ca.key
    locked away.
    """
    from fastfpl.flower.apps import flower_version
    from fastfpl.flower.keys import write_keys

    flower_version()  # whose packages make keys
    write_keys(folder, hosts, clients, days)
    say(f"{folder}: ca.crt, server.crt, server.key, ca.key, client-0 to client-{clients - 1}")


@flower.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def node(arguments: Sequence[str]) -> None:
    """Run a client's SuperNode; ARGUMENTS are those of flower-supernode.

    On Linux every message is answered by a fork of one process that has imported torch, open_clip
    and fastfpl, elsewhere by a process that imports them. Flower's looks for the network are off.
    """
    from fastfpl.flower.node import run_node
    from fastfpl.system import FORKS

    if not FORKS:
        say("forks are for Linux: every message starts a process that imports torch anew")
    raise SystemExit(run_node(arguments))


@flower.command()
@click.argument("folder", type=Place())
def status(folder: Path) -> None:
    """Say what goes on in the FOLDER of a run, of --out."""
    from fastfpl.flower.status import read_status

    found = read_status(folder)
    counts = found["counts"]
    say(
        f"{found['method']}: {found['phase']}; {found['rounds_done']} of {found['rounds']} rounds "
        f"ended; joined: {', '.join(map(str, found['joined'])) or 'nobody'}"
    )
    say(
        f"answers refused {counts['refused']}, failed {counts['failed']}, missing "
        f"{counts['absent']}"
    )
    if found["why"]:
        say(found["why"])
    for note in found["noted"][-10:]:
        who = "a client" if note["client"] is None else f"client {note['client']}"
        say(f"round {note['round'] + 1}, {note['what']}, {who}: {note['why']}")


@flower.command()
def rules() -> None:
    """List the rules of a server, with their defaults."""
    from fastfpl.flower.rules import Rules

    shown_ = table("rule", "default", "what it says")
    for name, field in Rules.model_fields.items():
        shown_.add_row(name, str(field.default), field.description or "")
    console().print(shown_)


def _own(texts: Sequence[str]) -> dict[str, str]:
    """Read names of clients and where their images lie."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not name or not place:
            raise InputError(f"fastfpl flower: own must read NAME=PATH; got {shown(text)}")
        if name in found:
            raise InputError(f"fastfpl flower: own must name a client once; got {name!r} twice")
        found[name] = place
    return found


def _tracked(names: Sequence[str]) -> str:
    """Check the names of trackers, whose libraries the server needs, and join them."""
    from fastfpl.tracking import make_trackers

    return ",".join(one.name for one in make_trackers(names))


def _rules(texts: Sequence[str]) -> Any:
    from fastfpl.flower.rules import make_rules

    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"fastfpl flower: rule must read KEY=VALUE; got {shown(text)}")
        values[key] = parse_yaml(value, f"fastfpl flower: rule {key}")
    return make_rules(values)
