"""`fastfpl compare`: several methods under the same settings, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import Grouped, gather, run_options
from fastfpl.cli.names import Name
from fastfpl.cli.screen import print_tables, progress
from fastfpl.config import load_preset
from fastfpl.errors import InputError, cut, shown
from fastfpl.plain_yaml import parse_yaml
from fastfpl.terminal import console, say


@click.command(cls=Grouped)
@click.argument("methods", nargs=-1, required=True, metavar="METHOD...", type=Name("method"))
@click.option(
    "--seeds", metavar="N,N,...", default="0", show_default=True, help="seeds, separated by commas"
)
@click.option(
    "--sweep",
    metavar="SETTING=V1,V2,...",
    help="compare at each value of one setting, e.g. shots=1,2,4,8,16",
)
@run_options
def compare(
    methods: tuple[str, ...],
    seeds: str,
    sweep: str | None,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    **flags: Any,
) -> None:
    """Run several METHODs under the same settings; print a table, write plots and one HTML page.

    The scenario leave-one-domain-out without --target leaves out every domain in turn.
    """
    from fastfpl.data import short_name
    from fastfpl.federation import compare as play
    from fastfpl.federation import sweep as play_each
    from fastfpl.federation.ranks import elsewhere
    from fastfpl.methods import method_name
    from fastfpl.report import sweep_table, write_report, write_sweep

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(
            f"fastfpl compare: seeds must be whole numbers separated by commas; got {shown(seeds)}"
        ) from None
    methods = tuple(method_name(method, "fastfpl compare") for method in methods)
    values = gather(methods, config, options, flags)
    if "seed" in values:
        raise InputError("fastfpl compare: seed must be left out; seeds are given by --seeds")
    whole = {**(load_preset(preset).settings if preset else {}), **values}
    folder = out or Path("runs") / f"compare-{short_name(whole.get('dataset', 'glyphs'))}"
    chosen = _swept(sweep, whole)
    with progress() as (observer, on_round):
        shared = {
            "seeds": numbers,
            "preset": preset,
            "out": folder,
            "resume": resume,
            "cache": cache,
            "observer": observer,
            "on_round": on_round,
            **values,
        }
        if chosen is None:
            comparison = play(methods, **shared)
        else:
            swept = play_each(methods, *chosen, **shared)
    if elsewhere():
        return  # the first of several ranks writes
    # files first; a disk that does not take them must not cost the table either
    written: list[Path] = []
    try:
        written = write_sweep(swept, folder) if chosen else write_report(comparison, folder)
    finally:
        if chosen is None:
            print_tables(comparison)
        else:
            console().print(sweep_table(swept))
    for path in written:
        say(str(path))


def _swept(text: str | None, values: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """Say which setting takes which values, if any."""
    if text is not None:
        key, equals, rest = text.partition("=")
        if not equals or not key or not rest:
            raise InputError(f"fastfpl compare: sweep must read SETTING=V1,V2; got {shown(text)}")
        rule = f"fastfpl compare: sweep of {cut(key)}"
        return key.replace("-", "_"), [parse_yaml(part, rule) for part in rest.split(",")]
    if values.get("scenario") == "leave-one-domain-out" and values.get("target") is None:
        from fastfpl.data import load_dataset

        root, own = values.get("root"), ("layout", "digest")
        how = {name: values[name] for name in own if values.get(name) is not None}
        dataset = load_dataset(values.get("dataset", "glyphs"), root and Path(root), **how)
        return "target", list(dataset.domains)
    return None
