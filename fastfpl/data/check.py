"""Whether the files of a data set are there and whole, and how many there are of what."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastfpl.data import Dataset, read_dataset
from fastfpl.data.catalogue import FACTS, Facts, Need, find_folder, open_root
from fastfpl.data.listing import Listing, MissingImages
from fastfpl.errors import FastfplError, InputError, Missing, near

__all__ = ["Check", "OwnCheck", "check_files", "check_own"]


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


@dataclass(frozen=True)
class OwnCheck:
    """What `check_own` found.

    Attributes
    ----------
    dataset : Dataset
    counts : dict from "class", "domain" or "client" to name to (int, int)
        Training and test images; domains and clients only where there are several, and of clients
        the test images that all are asked about count for each.
    problems : tuple of str
        A sentence each: images that do not decode, test images that are trained on too.
    """

    dataset: Dataset
    counts: dict[str, dict[str, tuple[int, int]]]
    problems: tuple[str, ...]


def check_own(
    name: str,
    *,
    decode: bool = False,
    observer: Callable[[str, int, int], None] | None = None,
    **own: Any,
) -> OwnCheck:
    """Count the images of a person's own data set, and look for what would spoil its figures.

    Parameters
    ----------
    name : str
        ``folder:PATH``, ``manifest:FILE`` or ``hf:PATH_OR_NAME``.
    decode : bool
        Also decode every image of files; the ones that fail are problems.
    observer : callable, optional
        ``observer(what, done, total)`` is told while images are decoded.
    **own
        As for `fastfpl.data.load_dataset`.

    Raises
    ------
    FastfplError
        If the data make no data set.
    """
    root = own.pop("root", None)
    dataset = read_dataset(name, root, **{k: v for k, v in own.items() if v is not None})
    train, test = dataset.train, dataset.test
    counts = {"class": _counted(dataset.classnames, train.labels, test.labels)}
    if len(dataset.domains) > 1:
        counts["domain"] = _counted(dataset.domains, train.domains, test.domains)
    if dataset.clients:
        assert train.clients is not None
        assert test.clients is not None
        counts["client"] = {
            client: (own_train, own_test + int((test.clients == -1).sum()))
            for client, (own_train, own_test) in _counted(
                dataset.clients, train.clients, test.clients
            ).items()
        }
    problems: list[str] = []
    if isinstance(train, Listing) and isinstance(test, Listing):
        if decode:
            for split in (train, test):
                problems += split.corrupt(observer, "decoding images").values()
        problems += _twice(train, test)
    return OwnCheck(dataset, counts, tuple(problems))


def _counted(
    names: Sequence[str], train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]
) -> dict[str, tuple[int, int]]:
    sides = [np.bincount(side[side >= 0], minlength=len(names)).tolist() for side in (train, test)]
    return {name: (sides[0][at], sides[1][at]) for at, name in enumerate(names)}


def _twice(train: Listing, test: Listing) -> list[str]:
    """Find test images whose very bytes are those of a training image."""
    of_size: dict[int, list[int]] = {}
    for index in range(len(train)):
        of_size.setdefault(train.size(index), []).append(index)
    known: dict[int, dict[bytes, int]] = {}
    found = []
    for index in range(len(test)):
        size = test.size(index)
        # equal bytes are equally many: only such files are read
        if size not in of_size:
            continue
        if size not in known:
            known[size] = {_digest(train, other): other for other in of_size[size]}
        same = known[size].get(_digest(test, index))
        if same is not None:
            found.append(f"{test.path(index)} is tested on, and trained on as {train.path(same)}")
    return found


def _digest(split: Listing, index: int) -> bytes:
    try:
        return hashlib.blake2b(split.content(index), digest_size=16).digest()
    except (OSError, ValueError) as error:
        raise Missing(
            f"fastfpl.data.check_own: {split.path(index)} must stay readable while it is in use; "
            f"got {error}"
        ) from error


def _images(facts: Facts, train: int, test: int) -> list[tuple[str, int, int]]:
    return [("train images", train, facts.train), ("test images", test, facts.test)]
