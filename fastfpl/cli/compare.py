"""`fastfpl compare`: several methods under the same settings, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import Count, Grouped, Place, gather, run_options
from fastfpl.cli.names import Name
from fastfpl.cli.screen import print_sweep, print_tables
from fastfpl.config import load_preset
from fastfpl.errors import InputError, cut, shown
from fastfpl.plain_yaml import parse_yaml
from fastfpl.terminal import say
from fastfpl.tracking import progress


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
@click.option(
    "--plan",
    type=Place(),
    metavar="FILE",
    help="write one command a run, for other machines",
)
@click.option(
    "--jobs", type=Count(), metavar="N", help="runs that are played at a time, by processes"
)
@click.option(
    "--devices",
    metavar="DEVICE,...",
    help="of --plan or --jobs, as cuda:0,cuda:1",
)
@run_options
def compare(
    methods: tuple[str, ...],
    seeds: str,
    sweep: str | None,
    plan: Path | None,
    jobs: int | None,
    devices: str | None,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    track: Sequence[str],
    **flags: Any,
) -> None:
    """Run several METHODs under the same settings; print a table, write plots and one HTML page.

    --dataset a,b,c plays all of it on each data set, which are the columns of one table with their
    mean. The scenario leave-one-domain-out without --target leaves out every domain in turn.
    """
    from fastfpl.data import short_name
    from fastfpl.federation import compare as play
    from fastfpl.federation import sweep as play_each
    from fastfpl.federation.ranks import elsewhere
    from fastfpl.methods import method_name
    from fastfpl.report import write_report
    from fastfpl.tracking import make_trackers

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
    several = "+".join(map(short_name, several_datasets(whole.get("dataset", "glyphs"))))
    folder = out or Path("runs") / f"compare-{several[:120]}"
    trackers = make_trackers(track)
    chosen = _swept(sweep, whole)
    if chosen is not None and chosen[0] == "dataset":
        values.pop("dataset", None)
    if plan is not None or jobs is not None or devices is not None:
        if trackers:
            raise InputError(
                "fastfpl compare: track must be left out with plan, jobs or devices, whose runs "
                f"are processes of their own; got {', '.join(track)}"
            )
        grid = _Grid(plan, jobs, devices, preset, cache, folder)
        return _parted(grid, methods, chosen, numbers, resume, values)
    with progress() as (observer, on_round):
        shared = {
            "seeds": numbers,
            "preset": preset,
            "out": folder,
            "resume": resume,
            "cache": cache,
            "observer": observer,
            "on_round": on_round,
            "callbacks": trackers,
            **values,
        }
        if chosen is None:
            comparison = play(methods, **shared)
        else:
            swept = play_each(methods, *chosen, **shared)
    if elsewhere():
        return  # the first of several ranks writes
    if chosen is not None:
        print_sweep(swept, folder)
        return
    # files first; a disk that does not take them must not cost the table either
    written: list[Path] = []
    try:
        written = write_report(comparison, folder)
    finally:
        print_tables(comparison)
    for path in written:
        say(str(path))


@dataclass(frozen=True)
class _Grid:
    """How runs are played apart from each other, and where."""

    plan: Path | None
    jobs: int | None
    devices: str | None
    preset: str | None
    cache: Path | None
    out: Path


def _parted(
    grid: _Grid,
    methods: Sequence[str],
    chosen: tuple[str, list[Any]] | None,
    seeds: Sequence[int],
    resume: bool,
    values: dict[str, Any],
) -> None:
    """Write down the runs of a comparison as commands, or play them by processes of their own."""
    from fastfpl.cli.grid import devices_of, play_here, write_plan
    from fastfpl.cli.report import put_together
    from fastfpl.federation.comparison import listed, say_what_belongs, say_what_sweeps
    from fastfpl.federation.ranks import ranks_asked
    from fastfpl.federation.result import RESULT

    op = "fastfpl compare"
    devices = devices_of(grid.devices)
    if grid.plan is not None and grid.jobs is not None:
        raise InputError(f"{op}: jobs must be left out with plan, which plays nothing")
    if devices and values.get("device") is not None:
        raise InputError(f"{op}: device must be left out with devices; got {values['device']!r}")
    if grid.jobs is not None and grid.jobs < 1:
        raise InputError(f"{op}: jobs must be at least 1; got {grid.jobs}")
    if ranks_asked() > 1:
        raise InputError(f"{op}: ranks must be one with plan, jobs or devices; got {ranks_asked()}")
    parted = listed(
        methods,
        swept=chosen,
        seeds=seeds,
        preset=grid.preset,
        out=grid.out,
        resume=resume or grid.plan is not None,
        **values,
    )
    jobs = [job for mine in parted.values() for job in mine]
    if grid.plan is not None:
        write_plan(grid.plan, jobs, grid.preset, grid.cache, devices)
    for mine in parted.values():
        say_what_belongs(methods, mine)
    if chosen is not None:
        say_what_sweeps(grid.out, chosen[0], methods, parted)
    if grid.plan is not None:
        say(
            f"{grid.plan}: {len(jobs)} run{'s' * (len(jobs) != 1)}; then: fastfpl report {grid.out}"
        )
        return
    failed = play_here(jobs, grid.preset, grid.cache, grid.jobs, devices)
    if any((job.folder / RESULT).is_file() for job in jobs if job.folder is not None):
        put_together((grid.out,), grid.out)
    for name, why in failed.items():
        say(f"{name}: {why or 'played elsewhere'}", err=True)
    lost = [name for name, why in failed.items() if why is not None]
    if lost:
        raise InputError(
            f"{op}: every run must end; got {len(lost)} of {len(jobs)} that failed: "
            f"{cut(', '.join(lost), 300)}; go on with the same command and --resume"
        )


def _swept(text: str | None, values: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """Say which setting takes which values, if any."""
    datasets = several_datasets(values.get("dataset", "glyphs"))
    if len(datasets) > 1:
        if text is not None:
            raise InputError(
                "fastfpl compare: sweep must be left out with several data sets, which are one; "
                f"got {shown(text)}"
            )
        each = values.get("scenario") == "leave-one-domain-out" and values.get("target") is None
        if each:
            raise InputError(
                "fastfpl compare: dataset must be one with leave-one-domain-out, which leaves out "
                f"each of its domains in turn; got {shown(','.join(datasets))}; name a --target"
            )
        return "dataset", datasets
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


def several_datasets(text: str) -> list[str]:
    """Take data sets apart at commas; one of a path goes on until the next name or scheme."""
    from fastfpl.data import dataset_names, scheme_of

    found: list[str] = []
    for part in text.split(","):
        inside = found and scheme_of(found[-1]) is not None
        if inside and scheme_of(part) is None and part not in dataset_names():
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found
