"""Data sets of the `datasets` library: a folder or parquet files here, or a name on the hub."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastfpl.data.base import Dataset
from fastfpl.data.layouts import part_of
from fastfpl.data.names import tidy
from fastfpl.data.own_arrays import as_rgb, hold
from fastfpl.data.own_manifest import check_columns
from fastfpl.errors import Damaged, InputError, Missing, shown

__all__ = ["from_hf"]

_OP = "fastfpl.data.from_hf"


def from_hf(source: Any, *, columns: Mapping[str, str] | None = None) -> Dataset:
    """Read a data set by the `datasets` library; code that comes with one is never run.

    Parameters
    ----------
    source : str, path, datasets.Dataset or datasets.DatasetDict
        What ``datasets.save_to_disk`` wrote, a folder or file that ``datasets.load_dataset`` reads,
        a name on the hub, or what is loaded already. Splits train, validation and test are used as
        `from_folder` does.
    columns : mapping, optional
        What the set calls ``path`` (the image), ``label``, ``domain`` and ``client``; image and
        label are found by their features, the one of images and the one of class labels.

    Returns
    -------
    Dataset
        Its fingerprint is the library's own; images are decoded when they are asked for.

    Raises
    ------
    Missing
        If the library or the set is not there.
    InputError
        If a column cannot be told.
    Damaged
        If the set makes no data set, as for `from_folder`.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise Missing(
            f"{_OP}: the datasets library must be there; got {tidy(error)}: pip install fastfpl[hf]"
        ) from error
    named = {k: v for k, v in check_columns(_OP, columns or {}).items() if k in (columns or {})}
    whole, name = _loaded(library, source)
    parts = dict(whole) if isinstance(whole, library.DatasetDict) else {"": whole}
    for part in parts:
        if part and part_of(part) is None:
            raise InputError(
                f"{_OP}: splits of {name} must be called train, validation or test; got "
                f"{shown(part)}: hand over a DatasetDict of these"
            )
    if len(parts) == 1:  # one list, whatever it is called: a test split is drawn
        parts = {"": next(iter(parts.values()))}
    features = next(iter(parts.values())).features
    image = named.get("path") or _only(library, features, "Image", "path", name)
    label = named.get("label") or _only(library, features, "ClassLabel", "label", name)
    domain, client = named.get("domain"), named.get("client")
    for column in (image, label, domain, client):
        if column is not None and column not in features:
            raise InputError(
                f"{_OP}: columns must be of {name}: {', '.join(features)}; got {shown(column)}"
            )
    if not isinstance(features[image], library.Image):
        raise InputError(
            f"{_OP}: the column of images of {name} must hold images; got {shown(image)} of "
            f"{type(features[image]).__name__}"
        )
    rows, values = _lists(parts, (label, domain, client))
    classes = getattr(features[label], "names", None)
    labels, classnames = _labels(values[label], classes, name)

    def read(number: int) -> npt.NDArray[np.uint8]:
        part, at = rows[number]
        try:
            found = parts[part][at][image]
        except Exception as error:  # what decoders raise on broken bytes is of any kind
            raise Damaged(
                f"{_OP}: image {at} of {part or name} must decode; got {type(error).__name__}: "
                f"{tidy(error)}"
            ) from error
        return as_rgb(_OP, found, number)

    return hold(
        _OP,
        name,
        read,
        labels,
        classnames,
        split=None if "" in parts else [part for part, _ in rows],
        domains=None if domain is None else [str(v) for v in values[domain]],
        clients=None if client is None else ["" if v is None else str(v) for v in values[client]],
        fingerprint=" ".join(f"{part}={parts[part]._fingerprint}" for part in sorted(parts)),
    )


def _loaded(library: Any, source: Any) -> tuple[Any, str]:
    if isinstance(source, library.Dataset | library.DatasetDict):
        return source, "hf"
    place = os.fspath(source)
    name = tidy(os.path.basename(place.rstrip("/\\"))) or "hf"
    try:
        if os.path.isdir(place) and any(
            os.path.exists(os.path.join(place, file))
            for file in ("dataset_dict.json", "dataset_info.json", "state.json")
        ):
            return library.load_from_disk(place), name
        if place.endswith(".parquet") and os.path.isfile(place):
            return library.load_dataset("parquet", data_files=place), name
        return library.load_dataset(place), name
    except Exception as error:  # of any kind: no network, no such name, broken files
        raise Missing(
            f"{_OP}: {place} must be a data set that the datasets library reads; got "
            f"{type(error).__name__}: {tidy(error)}"
        ) from error


def _only(library: Any, features: Mapping[str, Any], kind: str, key: str, name: str) -> str:
    """Return the one column of a feature."""
    found = [column for column, f in features.items() if isinstance(f, getattr(library, kind))]
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"{_OP}: {name} must have one column of the feature {kind}; got "
        f"{', '.join(found) or 'none'} of {', '.join(features)}: name it by columns "
        f"(--columns {key}=...)"
    )


def _lists(
    parts: Mapping[str, Any], columns: tuple[str | None, ...]
) -> tuple[list[tuple[str, int]], dict[str, list[Any]]]:
    """Give the images of all splits numbers, and read what is said of them without decoding one."""
    rows = [(part, at) for part in parts for at in range(len(parts[part]))]
    wanted = [column for column in columns if column is not None]
    values: dict[str, list[Any]] = {column: [] for column in wanted}
    for part in parts.values():
        for column in wanted:
            values[column] += list(part[column])
    return rows, values


def _labels(
    values: list[Any], names: list[str] | None, name: str
) -> tuple[list[str], list[str] | None]:
    """Return labels as `hold` wants them, and the class names that occur."""
    if names is None:
        if all(isinstance(value, str) and value.strip() for value in values):
            return [value.strip() for value in values], None
        bad = next(v for v in values if not isinstance(v, str) or not v.strip())
        raise Damaged(
            f"{_OP}: labels of {name} must have names; got {shown(bad)}: cast the column to "
            "ClassLabel"
        )
    for value in values:
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise Damaged(
                f"{_OP}: labels of {name} must lie in [0, {len(names)}); got {shown(value)}"
            )
    return [f"{value:09d}" for value in values], names
