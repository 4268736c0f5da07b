"""`fastfpl predict`: classify images by what a run has trained."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastfpl.cli.flags import Count, Place
from fastfpl.errors import InputError
from fastfpl.terminal import console, say, table

if TYPE_CHECKING:
    from fastfpl.trained import Client, Model, Prediction

__all__ = ["DEVICE", "METHOD", "RUN", "choose", "predict"]

RUN = click.argument("folder", metavar="RUN", type=Place())
DEVICE = click.option(
    "--device", metavar="auto|cpu|cuda", default="auto", show_default=True, help="of the CLIP"
)
METHOD = click.option(
    "--method",
    metavar="FILE.py:CLASS",
    help="of a run whose method came from outside the library",
)


@click.command()
@RUN
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=Place())
@click.option(
    "--client",
    metavar="N|NAME",
    help="a number, a name of the data set or a domain, or one that came later",
)
@click.option("--top", type=Count(), default=5, show_default=True, help="classes that are shown")
@click.option(
    "--csv", "table_file", type=Place(), metavar="FILE", help="write the same classes to a CSV file"
)
@METHOD
@DEVICE
def predict(
    folder: Path,
    images: tuple[Path, ...],
    client: str | None,
    top: int,
    table_file: Path | None,
    method: str | None,
    device: str,
) -> None:
    """Classify IMAGEs, files or folders of files, by what the run in RUN has trained.

    RUN is the --out of a run. The answers are those of --client; methods with one model for
    everybody need none. The CSV has a line an image and class: image, rank, class, probability.
    """
    from fastfpl.files import write_whole
    from fastfpl.trained import load

    if top < 1:
        raise InputError(f"fastfpl predict: top must be at least 1; got {top}")
    said = choose(load(folder, method=method, device=device), client).predict(list(images))
    if table_file is not None:
        content = _csv(said, top)

        def write(part: Path) -> None:
            part.write_bytes(content)

        write_whole(table_file, write)
    shown = table("image", *(f"{rank}." for rank in range(1, len(said.top(top)[0]) + 1)))
    for image, best in zip(said.images, said.top(top), strict=True):
        shown.add_row(image, *(f"{name} {100 * share:.1f} %" for name, share in best))
    console().print(shown)
    if table_file is not None:
        say(str(table_file))


def choose(model: Model, client: str | None) -> Client:
    """Return the client that is named, or the model that serves everybody."""
    if client is not None:
        return model.client(client)
    if model.method.personal:
        names = "".join(f", or {name}" for name in model.joined)
        last = model.clients + model.newcomers - 1
        own = f" ({', '.join(model.names[:20])}{', ...' * (last > 19)})" if model.names else ""
        raise InputError(
            f"fastfpl: client must be named for {model.method.name}, whose clients answer with "
            f"parameters of their own; got none; one from 0 to {last}{own}{names}"
        )
    return model.global_model()


def _csv(said: Prediction, top: int) -> bytes:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("image", "rank", "class", "probability"))
    for image, best in zip(said.images, said.top(top), strict=True):
        for rank, (name, share) in enumerate(best, start=1):
            lines.writerow((image, rank, name, f"{share:.6g}"))
    # a file's name need not be text
    return text.getvalue().encode("utf-8", "surrogateescape")
