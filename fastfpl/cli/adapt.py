"""`fastfpl adapt`: a client that was not there in training joins a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from fastfpl.cli.flags import Count, Place
from fastfpl.cli.names import Name
from fastfpl.cli.predict import DEVICE, METHOD, RUN
from fastfpl.terminal import say
from fastfpl.tracking import progress


@click.command()
@RUN
@click.option("--dataset", required=True, type=Name("dataset"), help="the client's images")
@click.option("--root", type=Place(), metavar="FOLDER", help="of a data set that lives in files")
@click.option("--layout", type=Name("layout"), help="of folder:, as --layout of a run")
@click.option("--columns", metavar="path=NAME,...", help="of manifest: and hf:, as of a run")
@click.option(
    "--on-corrupt",
    type=click.Choice(["refuse", "skip"]),
    help="images that do not decode  [as in the run]",
)
@click.option("--client-name", metavar="NAME", help="to be asked for by  [the data set's]")
@click.option(
    "--shots", type=Count(everything=True), help="training images a class, or all  [as in the run]"
)
@click.option(
    "--participations",
    type=Count(),
    help="rounds that it takes part in  [as many as the method needs]",
)
@click.option("--cache", type=Place(), metavar="FOLDER", help="folder of image features")
@METHOD
@DEVICE
def adapt(
    folder: Path,
    dataset: str,
    root: Path | None,
    layout: str | None,
    columns: str | None,
    on_corrupt: Literal["refuse", "skip"] | None,
    client_name: str | None,
    shots: int | str | None,
    participations: int | None,
    cache: Path | None,
    method: str | None,
    device: str,
) -> None:
    """Let a client that was not there in training join the run in RUN.

    It starts from the server's state and trains by the method's own rule, as if the run went on for
    it alone; the run itself is not touched. predict and export know it by its name.
    """
    from fastfpl.config import column_names
    from fastfpl.trained import adapt as join

    more: dict[str, Any] = {}
    if shots is not None:
        more["shots"] = None if shots == "all" else shots
    with progress() as (observer, _):
        one = join(
            folder,
            dataset,
            name=client_name,
            root=root,
            layout=layout,
            columns=None if columns is None else column_names(columns),
            on_corrupt=on_corrupt,
            participations=participations,
            cache=cache,
            method=method,
            device=device,
            observer=observer,
            **more,
        )
    say(
        f"{one.name}: {one.images} training images; accuracy on its {one.test_images} test images "
        f"{100 * one.before:.1f} % before, {100 * one.after:.1f} % after"
    )
