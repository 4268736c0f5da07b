"""Images a second with and without threads and resident images: ``python -m bench.image_side``.

Draws JPEG files of 500 x 375 pixels into a temporary folder. Every line is measured in turn with
the others, in one process; the median of the repeats is printed with the ratio to the first line.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.data import Split, load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.data.listing import Item, Listing
from fastfpl.data.loader import Workers
from fastfpl.features import FeatureStore
from fastfpl.training.feeds import Eye, silent, training_feed


def photographs(folder: Path, count: int) -> Listing:
    """Smooth noise with grain, which compresses like a photograph: 58 kB a file."""
    draw = np.random.default_rng(0)
    items, sizes = [], []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int64)
        grain = draw.integers(-12, 13, (375, 500, 3))
        path = folder / f"{number}.jpg"
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        items.append(Item(path.name, 0))
        sizes.append(path.stat().st_size)
    return Listing(FACTS["caltech101"], folder, items, sizes)


def compared(lines: dict[str, Callable[[], float]], repeats: int) -> None:
    """Print images a second of each line."""
    found: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(repeats):
        for name, line in lines.items():
            found[name].append(line())
    first = statistics.median(next(iter(found.values())))
    for name, rates in found.items():
        rate = statistics.median(rates)
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        click.echo(f"  {name:44} {rate:8.1f} images/s ({spread})  {rate / first:.2f}")


def eye_of(clip: str, folder: Path, workers: Workers, resident: int, chunk: int = 256) -> Eye:
    model = MODELS.setdefault(
        clip, load_clip(clip, None if clip == "tiny" else "random", device="cpu")
    )
    store = FeatureStore(folder, chunk=chunk)
    return Eye(model, "pooled", store, silent, model.mean, model.std, workers, resident)


MODELS: dict[str, object] = {}


def encoding(clip: str, split: Split, count: int, workers: Workers) -> Callable[[], float]:
    """Encode the first images into a new store, in four chunks."""

    def line() -> float:
        with tempfile.TemporaryDirectory() as folder:
            eye = eye_of(clip, Path(folder), workers, 0, count // 4)
            begin = time.perf_counter()
            training_feed(eye, split, np.arange(count), make_settings({"method": "local"}))
            return count / (time.perf_counter() - begin)

    return line


def training(
    clip: str, split: Split, count: int, workers: Workers, resident: int
) -> Callable[[], float]:
    """Give one epoch of fresh crops in batches of 32, after one epoch that nobody times."""
    settings = make_settings({"method": "local", "augment": "fresh"})
    feed = training_feed(eye_of(clip, Path(), workers, resident), split, np.arange(count), settings)
    batches = [np.arange(at, min(count, at + 32)) for at in range(0, count, 32)]

    def epoch() -> float:
        begin = time.perf_counter()
        feed.expect([(at, at) for at in batches])
        for at in batches:
            feed.batch(at, at)
        return count / (time.perf_counter() - begin)

    epoch()
    return epoch


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--only", default="", help="part of a heading")
@torch.no_grad()
def main(threads: int, repeats: int, only: str) -> None:
    """Print the figures of docs/running.md."""
    torch.set_num_threads(threads)
    crew = {n: Workers(n) for n in (0, 1, 2)}
    glyphs = load_dataset("glyphs").train
    with tempfile.TemporaryDirectory() as folder:
        photos = photographs(Path(folder), 384)

        def encoded(clip: str, split: Split, count: int) -> dict[str, Callable[[], float]]:
            return {
                f"{n or 'no'} thread{'s' * (n != 1)}": encoding(clip, split, count, w)
                for n, w in crew.items()
            }

        def fresh(clip: str, split: Split, count: int) -> dict[str, Callable[[], float]]:
            return {
                f"{n or 'no'} thread{'s' * (n != 1)}, {kept} MiB resident": training(
                    clip, split, count, w, kept << 20
                )
                for kept in (0, 1024)
                for n, w in crew.items()
            }

        parts = {
            "encoding, JPEG files, ViT-B-32": lambda: encoded("ViT-B-32", photos, 48),
            "encoding, JPEG files, tiny": lambda: encoded("tiny", photos, 384),
            "encoding, glyphs, tiny": lambda: encoded("tiny", glyphs, 1024),
            "fresh crops, JPEG files, tiny": lambda: fresh("tiny", photos, 384),
            "fresh crops, glyphs, tiny": lambda: fresh("tiny", glyphs, 512),
        }
        for name, part in parts.items():
            if only in name:
                click.echo(f"{name} ({threads} threads of torch)")
                compared(part(), repeats)


if __name__ == "__main__":
    main()
