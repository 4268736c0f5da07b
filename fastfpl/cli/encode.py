"""`fastfpl encode`: image features alone, ahead of many runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastfpl.cli.flags import Grouped, Place, encode_options
from fastfpl.cli.names import Name
from fastfpl.terminal import say
from fastfpl.tracking import progress


@click.command(cls=Grouped)
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", type=Name("dataset"))
@click.option(
    "--for",
    "methods",
    multiple=True,
    type=Name("method"),
    metavar="METHOD",
    help="a method of the runs to come, which decides the kind of features; may be repeated  "
    "[promptfl]",
)
@click.option("--cache", type=Place(), metavar="FOLDER", help="folder of image features")
@encode_options
def encode(
    datasets: tuple[str, ...], methods: Sequence[str], cache: Path | None, **flags: Any
) -> None:
    """Encode every image of DATASETs into the feature store, ahead of many runs.

    Give the flags that the runs will have of CLIP, images and scenario; partition, shots and seeds
    do not matter. A run that needs the same features meanwhile waits for them, on this machine or
    another one with the same --cache. What is killed goes on where it stopped.
    """
    from fastfpl.federation import encode as play

    values = {name: value for name, value in flags.items() if value is not None}
    with progress() as (observer, _):
        found = play(
            datasets, methods=methods or ("promptfl",), cache=cache, observer=observer, **values
        )
    for one in found:
        images = f"{one.test:,} test images" + f" and {one.train:,} for training" * bool(one.train)
        say(f"{one.dataset}: {images}, {' and '.join(one.kinds)} features in {one.folder}")
