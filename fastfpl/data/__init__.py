"""Data sets, their transforms, and how they are dealt to clients.

Importing this package loads neither torch nor any data set.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastfpl.data.base import Dataset, Images, Split, Statistics
from fastfpl.data.catalogue import open_root
from fastfpl.data.partitions import KINDS, Shard, base_novel, deal_depends_on_seed, partition
from fastfpl.data.subsets import ClassSubset, DomainSubset, Joined, restrict, split_domain
from fastfpl.errors import InputError, near, shown
from fastfpl.installed import added, load_added

if TYPE_CHECKING:
    from fastfpl.data.own_arrays import from_arrays, from_torch
    from fastfpl.data.own_folder import from_folder
    from fastfpl.data.own_hub import from_hf
    from fastfpl.data.own_manifest import from_manifest
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
    "dataset_names",
    "deal_depends_on_seed",
    "from_arrays",
    "from_folder",
    "from_hf",
    "from_manifest",
    "from_torch",
    "load_dataset",
    "partition",
    "restrict",
    "scheme_of",
    "short_name",
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

#: Every name of a data set that the library knows by itself.
DATASETS = tuple(sorted(_HOME))
# what a name of one's own data begins with -> module, function, and the options it takes
_OWN: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "folder": ("fastfpl.data.own_folder", "from_folder", ("layout", "digest", "given")),
    "manifest": ("fastfpl.data.own_manifest", "from_manifest", ("columns", "digest", "root")),
    "hf": ("fastfpl.data.own_hub", "from_hf", ("columns",)),
}
#: The entry points by which an installed package adds data sets.
GROUP = "fastfpl.datasets"
# functions that make a data set of what a person has
_MAKERS = {
    "from_arrays": "fastfpl.data.own_arrays",
    "from_folder": "fastfpl.data.own_folder",
    "from_hf": "fastfpl.data.own_hub",
    "from_manifest": "fastfpl.data.own_manifest",
    "from_torch": "fastfpl.data.own_arrays",
}


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    on_corrupt: Literal["refuse", "skip"] = "refuse",
    layout: str | None = None,
    columns: Mapping[str, str] | None = None,
    digest: Literal["time", "content"] | None = None,
    given: bool = False,
) -> Dataset:
    """Load a data set by its name, or a person's own by where it lies.

    Parameters
    ----------
    name : str
        One of `dataset_names`, or ``folder:PATH``, ``manifest:FILE`` or ``hf:PATH_OR_NAME``.
    root : path, optional
        Folder that holds the folder of a data set that lives in files, or that the paths of a
        manifest are relative to; must be left out for a set that needs none.
    on_corrupt : "refuse" or "skip"
        What becomes of image files that do not decode. ``"refuse"``: an error when the first one is
        read. ``"skip"``: every image is decoded once, now; those that fail are left out of the
        lists, counted in `Dataset.skipped` and named in the log.
    layout, digest, given
        Of ``folder:``; see `from_folder`. ``digest`` is of ``manifest:`` too.
    columns : mapping, optional
        Of ``manifest:`` and ``hf:``; see `from_manifest` and `from_hf`.

    Raises
    ------
    InputError
        If the name is unknown, ``root`` or an option is given or left out against the set's need,
        or there are no image files to skip.
    Missing
        If an optional package or a file is not there; the message names the cure.
    Damaged
        If a file does not hold what it must.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise InputError(
            f'fastfpl.data.load_dataset: on_corrupt must be "refuse" or "skip"; got {on_corrupt!r}'
        )
    own = {"layout": layout, "columns": columns, "digest": digest, "given": given or None}
    dataset = read_dataset(name, root, **{k: v for k, v in own.items() if v is not None})
    if on_corrupt == "skip":
        dataset = importlib.import_module("fastfpl.data.listing").without_corrupt(dataset)
    for note in dataset.notes:
        _LOG.warning("fastfpl.data.%s: %s", dataset.name if scheme_of(name) else name, note)
    return dataset


def scheme_of(name: str) -> str | None:
    """Return what a name of one's own data begins with, ``folder`` of ``folder:PATH``; or None."""
    scheme, colon, _ = name.partition(":")
    return scheme if colon and scheme in _OWN else None


def short_name(name: str) -> str:
    """Return a data set's name for a file's: of one's own data no more than its last part."""
    scheme, colon, place = name.partition(":")
    if not colon:
        return name
    last = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    plain = re.sub(r"[^\w.+-]+", "-", last)[:100]
    return f"{scheme}-{plain or 'images'}"


def dataset_names() -> tuple[str, ...]:
    """List every name that `load_dataset` takes: the library's and those of installed packages."""
    return tuple(sorted({*_HOME, *added(GROUP)}))


def read_dataset(name: str, root: str | Path | None, **own: Any) -> Dataset:
    """Load a data set and leave it to the caller to tell its notes; see `load_dataset`."""
    op = "fastfpl.data.load_dataset"
    scheme = scheme_of(name)
    takes = () if scheme is None else _OWN[scheme][2]
    for option in own:
        if option not in takes and option != "given":
            homes = " and ".join(f"{s}:" for s in _OWN if option in _OWN[s][2])
            raise InputError(
                f"{op}: {option} must be left out but for {homes}; got {own[option]!r} with "
                f"{shown(name)}"
            )
    if scheme is not None:
        module, function, _ = _OWN[scheme]
        place = name.partition(":")[2]
        if not place:
            raise InputError(f"{op}: name must say where the data lies; got {name!r} and nothing")
        if root is not None and "root" not in takes:
            raise InputError(
                f"{op}: root must be left out for {scheme}:, which says where it lies; got "
                f"{str(root)!r}"
            )
        chosen = {k: v for k, v in own.items() if k in takes}
        if root is not None:
            chosen["root"] = root
        made: Dataset = getattr(importlib.import_module(module), function)(place, **chosen)
        return made
    if name not in _HOME:
        return _added(op, name, root)
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


def _added(op: str, name: str, root: str | Path | None) -> Dataset:
    """Load a data set of an installed package: an entry point that is called with the root."""
    found = added(GROUP)
    if name not in found:
        place = Path(name)
        if os.path.exists(place) and ("/" in name or os.sep in name or place.suffix):
            kind = "folder" if place.is_dir() or place.suffix == ".zip" else "manifest"
            raise InputError(
                f"{op}: name must be a data set; got {name!r}, a path: write {kind}:{name}"
            )
        scheme, colon, _ = name.partition(":")
        if colon:
            schemes = [f"{one}:" for one in _OWN]
            raise InputError(
                f"{op}: images of your own must begin with {', '.join(schemes)}; got "
                f"{shown(name)}{near(f'{scheme}:', schemes)}"
            )
        ways = "images of your own are folder:PATH, manifest:FILE or hf:PATH_OR_NAME"
        hint = f"; or write folder:{name}" if place.is_dir() else f"; {ways}"
        raise InputError(
            f"{op}: name must be a data set; got {shown(name)}{near(name, dataset_names())}{hint}"
        )
    made = load_added(op, found[name])
    dataset = made(None if root is None else open_root(op, root)) if callable(made) else made
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"{op}: {name} of {found[name].value} must give a fastfpl.data.Dataset; got "
            f"{type(dataset).__name__}"
        )
    return dataset


def __getattr__(name: str) -> Any:
    if name == "Preprocess":
        return importlib.import_module("fastfpl.data.transforms").Preprocess
    if name in _MAKERS:
        return getattr(importlib.import_module(_MAKERS[name]), name)
    raise AttributeError(f"module 'fastfpl.data' has no attribute {name!r}")
