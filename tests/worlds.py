"""Worlds of `fastfpl.testing`, and what only the library's own tests need beside them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from open_clip.model import CLIP

from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.data import Dataset, load_dataset
from fastfpl.data.digits import _Drawings
from fastfpl.federation import Result, preparation
from fastfpl.reference.gate import Gate
from fastfpl.testing.worlds import (
    NAMES,
    SIZES,
    WORDS,
    Clip,
    Feed,
    World,
    batch_of,
    batches_of,
    drawn,
    random_tower,
)

__all__ = [
    "GATE",
    "NAMES",
    "SIZES",
    "TINY_RUN",
    "WORDS",
    "Clip",
    "Feed",
    "World",
    "batch_of",
    "batches_of",
    "drawn",
    "few_digits",
    "figures",
    "on_few_digits",
    "random_gate",
    "random_tower",
    "small_clip",
]


def random_gate(width: int, heads: int, scale: float, seed: int) -> Gate:
    return Gate.init(width, heads, scale, torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_clip() -> FrozenCLIP:
    """Build a live open_clip model that is small and random, the same in every process."""
    vision = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 24, "width": 32, "heads": 4, "layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_clip(CLIP(32, vision, text))


@functools.cache
def few_digits() -> Dataset:
    """Load the digits, but of the test images six a class: a real tower encodes them all."""
    digits = load_dataset("digits")
    labels = digits.test.labels
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:6] for c in range(10)]))
    pixels = np.asarray(digits.test.images(kept))
    return replace(digits, test=_Drawings(pixels, labels[kept]))


@contextmanager
def on_few_digits() -> Iterator[None]:
    """Let runs on the digits play on `few_digits`."""
    plain = preparation.load_dataset

    def load(name: str, *place: Any, **how: Any) -> Dataset:
        return few_digits() if name == "digits" else plain(name, *place, **how)

    with mock.patch.object(preparation, "load_dataset", load):
        yield


#: A run of `fastfpl.run` that takes a fraction of a second: 2, 2, 2 and 4 classes a client.
TINY_RUN = {
    "dataset": "digits",
    "clients": 4,
    "shots": 5,
    "rounds": 2,
    "local_epochs": 2,
    "batch_size": 8,
    "n_ctx": 4,
    "lr": 0.05,
}
GATE = {"experts": 3, "heads": 2, "gate_width": 16}


def figures(result: Result) -> list[dict[str, Any]]:
    """Return what a run says but for the times."""
    timed = ("seconds", "images_per_second")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in result.rounds]
    return [*rows, dict(result.final)]
