"""Whether the files of a data set are there, whole, and as many as published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastfpl.data import read_dataset
from fastfpl.data.catalogue import FACTS, Facts, Need, find_folder, open_root
from fastfpl.data.listing import Listing, MissingImages
from fastfpl.errors import FastfplError, InputError, Missing, near

__all__ = ["Check", "check_files"]


@dataclass(frozen=True)
class Check:
    """What `check_files` found.

    Attributes
    ----------
    name : str
    folder : Path or None
        The set's folder, if it is there.
    parts : tuple of (Need, bool)
        Every file and folder that the published split needs, and whether it is there.
    counts : tuple of (str, int, int)
        What is counted, how many there are, how many are published.
    problems : tuple of str
        A sentence each, also for counts that differ.
    """

    name: str
    folder: Path | None
    parts: tuple[tuple[Need, bool], ...]
    counts: tuple[tuple[str, int, int], ...]
    problems: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether figures on this copy are figures on the published set."""
        return all(there for _, there in self.parts) and not self.problems


def check_files(
    name: str,
    root: str | Path,
    *,
    decode: bool = False,
    observer: Callable[[str, int, int], None] | None = None,
) -> Check:
    """Look for everything that a data set needs, and count its images.

    Parameters
    ----------
    name : str
        A set that lives in files.
    root : path
        Folder that holds the set's folder.
    decode : bool
        Also decode every image; the ones that fail are problems. Takes minutes for large sets.
    observer : callable, optional
        ``observer(what, done, total)`` is told while images are decoded.

    Raises
    ------
    InputError
        If the name is not one of a set in files, or the root begins with an unknown ``~user``.
    """
    if name not in FACTS:
        raise InputError(
            f"fastfpl.data.check_files: name must be a data set that lives in files; got {name!r}"
            + near(name, FACTS)
        )
    facts, root = FACTS[name], open_root("fastfpl.data.check_files", root)
    try:
        folder = find_folder(facts, root)
    except Missing as error:
        return Check(name, None, tuple((need, False) for need in facts.needs), (), (str(error),))
    parts = tuple((need, os.path.exists(folder / need.path)) for need in facts.needs)
    counts: list[tuple[str, int, int]] = []
    problems: list[str] = []
    try:
        dataset = read_dataset(name, root)
    except MissingImages as error:
        counts += _images(facts, error.found["train"], error.found["test"])
        problems.append(str(error))
    except FastfplError as error:
        problems.append(str(error))
    else:
        counts.append(("classes", len(dataset.classnames), facts.classes))
        counts += _images(facts, len(dataset.train), len(dataset.test))
        problems += dataset.notes
        for split in (dataset.train, dataset.test) if decode else ():
            if isinstance(split, Listing):
                problems += split.corrupt(observer, "decoding images").values()
    return Check(name, folder, parts, tuple(counts), tuple(problems))


def _images(facts: Facts, train: int, test: int) -> list[tuple[str, int, int]]:
    return [("train images", train, facts.train), ("test images", test, facts.test)]
