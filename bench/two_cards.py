"""Whether a second card encodes images as the first does: features byte for byte.

``python -m bench.two_cards --first cuda:0 --second cuda:1`` encodes the same images on both, each
into an empty cache, and compares what lies there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

import fastfpl
from fastfpl.data.glyphs import pretrain
from fastfpl.errors import FastfplError


def draw(folder: Path, count: int) -> None:
    """Write images of glyphs as a data set of two classes, half of it for tests."""
    split = pretrain()
    for i, pixels in enumerate(split.images(np.arange(count))):
        path = folder / ("train", "test")[i % 2] / ("even", "odd")[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(path)


def files(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*.safetensors"))}


@click.command()
@click.option("--first", default="cuda:0", show_default=True)
@click.option("--second", default="cuda:1", show_default=True)
@click.option("--images", type=click.IntRange(8), default=2048, show_default=True)
def main(first: str, second: str, images: int) -> None:
    """Encode the same images on two devices and compare the files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "images", images)
        found = []
        try:
            for place, device in (("a", first), ("b", second)):
                fastfpl.encode(
                    [f"folder:{folder / 'images'}"], layout="split/class", device=device,
                    cache=folder / place, methods=("promptfl", "fedotp"),
                )  # fmt: skip
                found.append(files(folder / place))
        except FastfplError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
    one, other = found
    if not one or one.keys() != other.keys():
        sys.exit(f"files differ: {sorted(one)} on {first}, {sorted(other)} on {second}")
    if different := [n for n in one if one[n] != other[n]]:
        sys.exit(f"features of {first} and {second} differ in {', '.join(different)}")
    click.echo(f"{images} rows in {len(one)} files of {first} and {second} are the same")


if __name__ == "__main__":
    main()
