"""`fastfpl run`: one method, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import SEED, Grouped, run_options, settings_of
from fastfpl.cli.names import Name
from fastfpl.cli.screen import print_tables
from fastfpl.terminal import say
from fastfpl.tracking import progress


@click.command(cls=Grouped)
@click.argument("method", type=Name("method"))
@SEED
@run_options
def run(
    method: str,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    track: Sequence[str],
    **flags: Any,
) -> None:
    """Run METHOD once and write result.json and checkpoints into --out.

    --memory=8GiB (or --max-memory) plans the whole run so that it takes no more: on a GPU of
    PyTorch's allocations, on a CPU of the process. Clients take first steps for trial, one, two,
    four together, as long as twice as many would fit; text passes are cut into parts of contexts
    and classes, images are encoded fewer at a time. A run that does not fit is refused before its
    first round. result.json says under memory what was chosen; figures stay equal to rounding.

    --cuda-graphs=auto replays training steps and the text passes of evaluations on a GPU from
    their third time on, unless an op has to wait for the device; result.json says in
    environment.cuda_graphs what happened. With --memory evaluations run as they are.
    """
    from fastfpl.data import short_name
    from fastfpl.federation import Comparison
    from fastfpl.federation import run as play
    from fastfpl.tracking import make_trackers

    settings = settings_of(method, preset, config, options, flags)
    method, trackers = settings.method, make_trackers(track)
    folder = out or Path("runs") / f"{method}-{short_name(settings.dataset)}-seed{settings.seed}"
    with progress() as (observer, on_round):
        result = play(
            settings,
            preset=preset,
            out=folder,
            resume=resume,
            cache=cache,
            observer=observer,
            on_round=on_round,
            callbacks=trackers,
        )
    print_tables(Comparison({method: [result]}))
    if result.memory is not None:
        click.echo(_chosen(result.memory, result.peak_memory_bytes))
    say(str(folder / "result.json"))


def _chosen(memory: Mapping[str, Any], peak: int) -> str:
    """Say in a line what a run was allowed, what it chose, and what it took."""
    passes = "; ".join(
        f"{one['what']}: {one['images']} images at once"
        if "images" in one
        else f"{one['what']}: {one['clients']} client{'s' * (one['clients'] != 1)} at most, texts "
        f"in {one['text_bytes'] >> 20} MiB"
        for one in memory["passes"]
    )
    return (
        f"memory: {memory['limit_bytes'] >> 20} MiB allowed, {memory['taken_bytes'] >> 20} taken "
        f"before the first round, {peak >> 20} at the most; {passes}"
    )
