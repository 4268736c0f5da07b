"""A file of image features: its key, its rows, and every byte of its header."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl import __version__
from fastfpl.errors import Damaged, InputError, KindError, near

__all__ = [
    "DTYPES",
    "KINDS",
    "FeatureKey",
    "Features",
    "digest_of",
    "facts_of",
    "header_of",
    "intact",
    "nbytes_of",
    "offset_of",
    "open_features",
]

_FORMAT = "fastfpl-features-1"
_NAME = "features"
KINDS = ("patches", "pooled", "raw")
# torch's dtype, safetensors' name of it, and numpy's type of the same width
DTYPES: dict[str, tuple[torch.dtype, str, type[np.generic]]] = {
    "bfloat16": (torch.bfloat16, "BF16", np.int16),
    "float16": (torch.float16, "F16", np.float16),
    "float32": (torch.float32, "F32", np.float32),
    "float64": (torch.float64, "F64", np.float64),
}
_MOST_HEADER = 1 << 20
_PIECE = 1 << 26
# files whose checksum this process has seen to be right: path -> identity of the file
_verified: dict[Path, tuple[int, int, int, int]] = {}
_verified_lock = threading.Lock()


@dataclass(frozen=True)
class FeatureKey:
    """Everything that image features depend on.

    Parameters
    ----------
    weights : str
        Digest of the image tower's weights and of what else its output depends on.
    data : str
        `Split.fingerprint`.
    split : str
        Name of the split, e.g. ``"train"``.
    view : str
        Names the pixels that the tower saw: the preprocessing and, if any, the augmented view.
    kind : str
        ``"pooled"``, ``"patches"`` or ``"raw"``, pooled features before they are normalised.
    dtype : str
        Of the stored numbers: ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
    """

    weights: str
    data: str
    split: str
    view: str
    kind: str
    dtype: str

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("dtype", tuple(DTYPES))):
            value = getattr(self, name)
            if value not in known:
                raise InputError(
                    f"fastfpl.features.FeatureKey: {name} must be one of {', '.join(known)}; got "
                    f"{value!r}" + near(str(value), known)
                )

    @property
    def filename(self) -> str:
        """Name of the file that holds the features of this key."""
        text = json.dumps(asdict(self), sort_keys=True)
        return (
            f"{self.kind}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
        )


class Features:
    """Rows of features that stay on disk until they are asked for.

    ``features[indices]`` gathers rows and returns a new tensor on the CPU; ``indices`` is an
    integer, a slice, or integers as a sequence, an array or a tensor.

    Attributes
    ----------
    shape : tuple of int
        (n, ...), n rows.
    dtype : torch.dtype
    """

    def __init__(self, rows: npt.NDArray[Any], dtype: torch.dtype) -> None:
        # gathered by torch, whose memory is counted by whoever plans a run
        self._rows = torch.from_numpy(rows).view(dtype)
        self._of: npt.NDArray[np.int64] | None = None
        self.shape: tuple[int, ...] = tuple(rows.shape)
        self.dtype = dtype

    def part(self, rows: npt.NDArray[np.int64]) -> Features:
        """Return some of the rows (m,), which stay on disk too."""
        made = copy.copy(self)
        made._of = rows if self._of is None else self._of[rows]
        made.shape = (len(rows), *self.shape[1:])
        return made

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(
        self, indices: int | slice | Sequence[int] | npt.NDArray[Any] | Tensor
    ) -> Tensor:
        if isinstance(indices, int | np.integer | slice):
            where = np.arange(len(self))[indices]
        else:
            where = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
            if where.size == 0:
                where = where.astype(np.int64)
            if not np.issubdtype(where.dtype, np.integer):
                raise KindError(
                    f"fastfpl.features.Features: indices must be integers; got {where.dtype}"
                )
        if self._of is not None:
            where = self._of[where]
        # index gives new memory, for a single row too
        gathered = self._rows[torch.from_numpy(np.atleast_1d(where).astype(np.int64))]
        return gathered if np.ndim(where) else gathered[0]

    def read(self, at: npt.NDArray[np.int64], out: Tensor) -> Tensor:
        """Gather rows ``at`` (m,), none of them negative, into ``out`` (m, ...); return it."""
        where = at if self._of is None else self._of[at]
        return torch.index_select(self._rows, 0, torch.from_numpy(where), out=out)


def intact(path: Path, key: FeatureKey, n: int) -> bool:
    """Whether the file of a key is there and whole."""
    try:
        return open_features(path, key, n) is not None
    except Damaged:
        return False


def facts_of(key: FeatureKey, shape: tuple[int, ...]) -> dict[str, str]:
    """Say what a header holds of its features."""
    return {
        "dtype": key.dtype,
        "format": _FORMAT,
        "key": json.dumps(asdict(key), sort_keys=True),
        "shape": json.dumps(shape),
        "version": __version__,
    }


def digest_of(key: FeatureKey, shape: tuple[int, ...]) -> hashlib.blake2b:
    """Begin the checksum of a file, which covers what its header says."""
    facts = json.dumps(facts_of(key, shape), sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=16)


def nbytes_of(key: FeatureKey, shape: tuple[int, ...]) -> int:
    """Count the bytes of features of a shape."""
    return math.prod(shape) * DTYPES[key.dtype][0].itemsize


def offset_of(key: FeatureKey, shape: tuple[int, ...]) -> int:
    """Say where the first row stands in the file."""
    return len(header_of(key, shape, digest_of(key, shape).hexdigest()))


def header_of(key: FeatureKey, shape: tuple[int, ...], checksum: str) -> bytes:
    """Write the header of a file, its length first."""
    name, size = DTYPES[key.dtype][1], nbytes_of(key, shape)
    text = json.dumps(
        {
            "__metadata__": {**facts_of(key, shape), "checksum": checksum},
            _NAME: {"dtype": name, "shape": list(shape), "data_offsets": [0, size]},
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def open_features(path: Path, key: FeatureKey, n: int) -> Features | None:
    """Map a file, or return None if there is none; `Damaged` says what is wrong with it."""

    def damaged(rest: str) -> Damaged:
        return Damaged(f"fastfpl.features: {path} must be a whole feature file of its key; {rest}")

    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(f"got {type(error).__name__}: {error}") from error
    with file:
        status = os.fstat(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_MOST_HEADER, status.st_size - 8):
            raise damaged(f"got a header of {length} bytes in a file of {status.st_size}")
        text = file.read(length)
        try:
            content = json.loads(text)
            entry, facts = content[_NAME], content["__metadata__"]
            shape = tuple(int(size) for size in entry["shape"])
            checksum, key_text = str(facts["checksum"]), str(facts["key"])
            version = str(facts["version"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged(
                f"got a header that does not read ({type(error).__name__}: {error})"
            ) from error
        if key_text != json.dumps(asdict(key), sort_keys=True):
            raise damaged(f"got the key {key_text}")
        if version != __version__:
            raise damaged(f"got one of fastfpl {version}, this is {__version__}")
        if shape[:1] != (n,):
            raise damaged(f"got shape {shape} for {n} images")
        # whatever else the header says must be what this library would write
        if header_of(key, shape, checksum) != length.to_bytes(8, "little") + text:
            raise damaged("got a changed header")
        dtype, _, width = DTYPES[key.dtype]
        size = nbytes_of(key, shape)
        if size <= 0 or status.st_size != 8 + length + size:
            raise damaged(f"got {status.st_size} bytes instead of {8 + length + size}")
        raw = np.asarray(np.memmap(file, np.uint8, "c", offset=8 + length))
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with _verified_lock:
        known = _verified.get(path) == identity
    if not known:
        digest = digest_of(key, shape)
        for start in range(0, size, _PIECE):
            digest.update(raw[start : start + _PIECE].data)
        if digest.hexdigest() != checksum:
            raise damaged(f"got the checksum {digest.hexdigest()} instead of {checksum}")
        with _verified_lock:
            _verified[path] = identity
    return Features(raw.view(width).reshape(shape), dtype)
