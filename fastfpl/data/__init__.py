"""Data sets, their transforms, and how they are dealt to clients.

Importing this package loads neither torch nor any data set.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastfpl.data.base import Dataset, Images, Split, Statistics
from fastfpl.data.catalogue import open_root
from fastfpl.data.partitions import KINDS, Shard, base_novel, deal_depends_on_seed, partition
from fastfpl.data.subsets import ClassSubset, DomainSubset, Joined, restrict, split_domain
from fastfpl.errors import InputError, near

if TYPE_CHECKING:
    from fastfpl.data.transforms import Preprocess

__all__ = [
    "DATASETS",
    "KINDS",
    "ClassSubset",
    "Dataset",
    "DomainSubset",
    "Images",
    "Joined",
    "Preprocess",
    "Shard",
    "Split",
    "Statistics",
    "base_novel",
    "deal_depends_on_seed",
    "load_dataset",
    "partition",
    "restrict",
    "split_domain",
]

_LOG = logging.getLogger("fastfpl")
# name -> module, function, and whether the function takes the folder that holds the files
_HOME = {
    "caltech101": ("fastfpl.data.clip_sets", "caltech101", True),
    "cifar10": ("fastfpl.data.cifar", "cifar10", True),
    "cifar100": ("fastfpl.data.cifar", "cifar100", True),
    "digits": ("fastfpl.data.digits", "digits", False),
    "domainnet10": ("fastfpl.data.domain_sets", "domainnet10", True),
    "domainnet345": ("fastfpl.data.domain_sets", "domainnet345", True),
    "dtd": ("fastfpl.data.clip_sets", "dtd", True),
    "eurosat": ("fastfpl.data.clip_sets", "eurosat", True),
    "fgvc_aircraft": ("fastfpl.data.clip_sets", "fgvc_aircraft", True),
    "flowers102": ("fastfpl.data.clip_sets", "flowers102", True),
    "food101": ("fastfpl.data.clip_sets", "food101", True),
    "glyphs": ("fastfpl.data.glyphs", "glyphs", False),
    "imagenet": ("fastfpl.data.clip_sets", "imagenet", True),
    "office_caltech10": ("fastfpl.data.domain_sets", "office_caltech10", True),
    "oxford_pets": ("fastfpl.data.clip_sets", "oxford_pets", True),
    "stanford_cars": ("fastfpl.data.clip_sets", "stanford_cars", True),
    "sun397": ("fastfpl.data.clip_sets", "sun397", True),
    "ucf101": ("fastfpl.data.clip_sets", "ucf101", True),
}

#: Every name that `load_dataset` takes.
DATASETS = tuple(sorted(_HOME))


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    on_corrupt: Literal["refuse", "skip"] = "refuse",
) -> Dataset:
    """Load a data set by its name.

    Parameters
    ----------
    name : str
        One of `DATASETS`.
    root : path, optional
        Folder that holds the folder of a data set that lives in files; must be left out for one
        that needs none.
    on_corrupt : "refuse" or "skip"
        What becomes of image files that do not decode. ``"refuse"``: an error when the first one is
        read. ``"skip"``: every image is decoded once, now; those that fail are left out of the
        lists, counted in `Dataset.skipped` and named in the log.

    Raises
    ------
    InputError
        If the name is unknown, ``root`` is given or left out against the set's need, or there are
        no image files to skip.
    Missing
        If an optional package or a file is not there; the message names the cure.
    Damaged
        If a file does not hold what it must.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise InputError(
            f'fastfpl.data.load_dataset: on_corrupt must be "refuse" or "skip"; got {on_corrupt!r}'
        )
    dataset = read_dataset(name, root)
    if on_corrupt == "skip":
        dataset = importlib.import_module("fastfpl.data.listing").without_corrupt(dataset)
    for note in dataset.notes:
        _LOG.warning("fastfpl.data.%s: %s", name, note)
    return dataset


def read_dataset(name: str, root: str | Path | None) -> Dataset:
    """Load a data set and leave it to the caller to tell its notes; see `load_dataset`."""
    if name not in _HOME:
        raise InputError(
            f"fastfpl.data.load_dataset: name must be a data set; got {name!r}" + near(name, _HOME)
        )
    module, function, in_files = _HOME[name]
    if in_files and root is None:
        raise InputError(
            f"fastfpl.data.load_dataset: root must be the folder that holds {name!r}; got None"
        )
    if not in_files and root is not None:
        raise InputError(
            f"fastfpl.data.load_dataset: root must be left out for {name!r}, which needs no files; "
            f"got {str(root)!r}"
        )
    load: Callable[..., Dataset] = getattr(importlib.import_module(module), function)
    return load() if root is None else load(open_root("fastfpl.data.load_dataset", root))


def __getattr__(name: str) -> Any:
    if name == "Preprocess":
        return importlib.import_module("fastfpl.data.transforms").Preprocess
    raise AttributeError(f"module 'fastfpl.data' has no attribute {name!r}")
