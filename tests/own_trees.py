"""Folders of images as a person has them: emoji-like drawings of several vendors."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastfpl.data import load_dataset

__all__ = [
    "TWO",
    "VENDORS",
    "WORDS",
    "draw",
    "rows_of",
    "save",
    "table",
    "tree",
    "vendors",
    "written",
]

VENDORS = ("apple", "google", "samsung", "twitter")
#: a folder a class, two images each
TWO = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
#: folder -> a class of the glyphs that is drawn in it
WORDS = {"red_heart": "heart", "crescent_moon": "crescent moon", "house_building": "house"}


@cache
def _glyphs() -> Any:
    return load_dataset("glyphs")


def draw(word: str, style: int, number: int) -> np.ndarray:
    """Draw a thing in one of six styles, each number another drawing."""
    glyphs = _glyphs()
    split = glyphs.train
    label = glyphs.classnames.index(word)
    mine = np.flatnonzero((split.labels == label) & (split.domains == style))
    return np.asarray(split.images(mine[number : number + 1])[0])


def save(path: Path, number: int = 0, size: tuple[int, int] = (9, 7)) -> Path:
    """Write a small image that differs from those of other numbers, whatever the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")
    return path


def tree(folder: Path, *paths: str) -> Path:
    """Write small images at paths, all of them different."""
    for number, path in enumerate(paths):
        save(folder / path, number)
    return folder


def vendors(folder: Path, each: int = 6, words: Mapping[str, str] = WORDS) -> Path:
    """Write ``vendor/class/N.png``, drawn in a style a vendor."""
    for style, vendor in enumerate(VENDORS):
        for name, word in words.items():
            (folder / vendor / name).mkdir(parents=True)
            for number in range(each):
                image = Image.fromarray(draw(word, style, number))
                image.save(folder / vendor / name / f"{number}.png")
    return folder


def table(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write a manifest whose first row names the columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(clients: bool = True) -> list[dict[str, str]]:
    """Twelve training images of two clients, a test image of one of them, two of nobody."""
    rows = []
    for client in ("ann", "bob"):
        for label in ("cat", "dog"):
            for number in range(3):
                path = f"{client}/{label}{number}.png"
                rows.append({"path": path, "label": label, "client": client, "split": "train"})
    rows.append({"path": "ann/late.png", "label": "cat", "client": "ann", "split": "test"})
    for number in range(2):
        path = f"all/{number}.png"
        rows.append({"path": path, "label": "dog", "client": "", "split": "test"})
    return [{k: v for k, v in row.items() if clients or k != "client"} for row in rows]


def written(folder: Path, rows: list[dict[str, str]], name: str = "list.csv") -> Path:
    tree(folder, *(row["path"] for row in rows))
    return table(folder / name, rows)
