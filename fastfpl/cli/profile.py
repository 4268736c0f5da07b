"""`fastfpl profile`: where the time of a method goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import SEED, Count, Grouped, profile_options, settings_of, shared
from fastfpl.cli.names import Name
from fastfpl.terminal import console, say, table
from fastfpl.tracking import progress


@click.command(cls=Grouped)
@click.argument("method", type=Name("method"))
@click.option(
    "--steps", type=Count(), default=3, show_default=True, help="training steps of a client"
)
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="N",
    default=15,
    show_default=True,
    help="operators that are shown",
)
@SEED
@shared
@profile_options
def profile(
    method: str,
    steps: int,
    top: int,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    cache: Path | None,
    **flags: Any,
) -> None:
    """Profile a few training steps and an evaluation of METHOD; write trace.json into --out.

    Takes the settings of a run. Two rounds are played in which every client trains on its first
    --steps batches; the second one is profiled, so that what happens once is over. Images that have
    no features yet are encoded before.

    Printed are the phases of the round (training with its text passes, losses, gradients and
    updates; evaluation) with everything in them; the operators with the most time of their own, by
    the device's time where there is a GPU; and the peak of the memory: allocations of a GPU, else
    the resident set of the process.

    Open trace.json at ui.perfetto.dev or in chrome://tracing.
    """
    from fastfpl.data import short_name
    from fastfpl.federation.profiling import profile as measure

    settings = settings_of(method, preset, config, options, flags)
    folder = out or Path("runs") / f"profile-{settings.method}-{short_name(settings.dataset)}"
    with progress() as (observer, on_round):
        seen = measure(
            settings, folder, steps=steps, cache=cache, observer=observer, on_round=on_round
        )
    shown = console()
    device = ("GPU ms", "share") if seen.cuda else ()
    for title, spans in (("phase", seen.phases), ("operator", seen.operators)):
        columns = table(title, "calls", "CPU ms", "share", *device)
        for column in columns.columns[1:]:
            column.justify = "right"
        # operators share the time of all; a phase stands in another one
        totals = [seen.seconds, seen.seconds]
        if title == "operator":
            totals = [sum(s.seconds for s in spans), sum(s.device_seconds for s in spans)]
        for span in spans[:top]:
            times = [span.seconds, *([span.device_seconds] if seen.cuda else [])]
            cells = [
                cell
                for t, total in zip(times, totals, strict=False)
                for cell in (f"{1e3 * t:.2f}", f"{100 * t / total:.1f} %" if total else "")
            ]
            columns.add_row(span.name, str(span.calls), *cells)
        shown.print(columns)
    faces = ", ".join(f"{op} by {' and '.join(names)}" for op, names in sorted(seen.faces.items()))
    click.echo(f"round {seen.seconds:.3f} s under the profiler; {faces}")
    click.echo(f"peak memory {seen.peak_memory_bytes / 2**20:.0f} MiB")
    say(str(seen.trace))
