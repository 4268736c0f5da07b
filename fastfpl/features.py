"""Features that are computed once: image features on disk, text features in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl import __version__
from fastfpl.errors import Damaged, InputError, KindError, Missing, cut, near
from fastfpl.files import Growing, on_disk, sweep_parts

__all__ = ["FeatureKey", "FeatureStore", "Features", "TextFeatures", "default_directory"]

_LOG = logging.getLogger("fastfpl")
_FORMAT = "fastfpl-features-1"
_NAME = "features"
_KINDS = ("patches", "pooled", "raw")
# torch's dtype, safetensors' name of it, and numpy's type of the same width
_DTYPES: dict[str, tuple[torch.dtype, str, type[np.generic]]] = {
    "bfloat16": (torch.bfloat16, "BF16", np.int16),
    "float16": (torch.float16, "F16", np.float16),
    "float32": (torch.float32, "F32", np.float32),
    "float64": (torch.float64, "F64", np.float64),
}
# stems of the files of keys
_MINE = re.compile(f"(?:{'|'.join(_KINDS)})-[0-9a-f]{{32}}")
_MOST_HEADER = 1 << 20
_PIECE = 1 << 26
# seconds after which half a file goes that nobody can go on with, or that nobody went on with
_PRIVATE_FOR, _RESUMABLE_FOR = 24 * 3600.0, 7 * 24 * 3600.0

# files whose checksum this process has seen to be right: path -> identity of the file
_verified: dict[Path, tuple[int, int, int, int]] = {}
_verified_lock = threading.Lock()


def default_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/fastfpl/features``, by default below ``~/.cache``.

    Raises
    ------
    Missing
        If nobody knows the user's home: HOME is not set and the user has no entry of its own.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "fastfpl" / "features"
    except RuntimeError:
        raise Missing(
            f"fastfpl.features: the folder of image features must have a place; got {base} without "
            "a home: name it by cache (--cache), or set HOME or XDG_CACHE_HOME"
        ) from None


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
        for name, known in (("kind", _KINDS), ("dtype", tuple(_DTYPES))):
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
        self.shape: tuple[int, ...] = tuple(rows.shape)
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

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
        # index gives new memory, for a single row too
        gathered = self._rows[torch.from_numpy(np.atleast_1d(where).astype(np.int64))]
        return gathered if np.ndim(where) else gathered[0]


class FeatureStore:
    """Image features on disk, one safetensors file per key, computed when first needed.

    Parameters
    ----------
    directory : Path, optional
        Created when needed; `default_directory` if left out.
    chunk : int
        Rows that are encoded in one call.

    Notes
    -----
    A file appears under its name only when it is whole. What a process has encoded before it died
    is not lost: the next one that asks for the key with the same ``chunk`` verifies the chunks that
    are there and goes on after the last whole one; the file is, byte for byte, the one that would
    have been written without the interruption. Any number of processes may share a directory; one
    that misses a key while another one is encoding it does not wait but encodes it too, and the
    later file replaces the equal earlier one. What nobody goes on with is removed after a week.

    The checksum of a file is verified when a process opens it for the first time. A file that is
    damaged, or of another version of this library, is computed again, with a warning of the logger
    ``"fastfpl"``.
    """

    def __init__(self, directory: Path | None = None, *, chunk: int = 256) -> None:
        if chunk < 1:
            raise InputError(f"fastfpl.features.FeatureStore: chunk must be positive; got {chunk}")
        self.directory = default_directory() if directory is None else Path(directory)
        self.chunk = chunk

    def check(self) -> None:
        """Refuse a directory that is none, or that cannot be made; it is not made yet.

        One that is there may be read only: what it holds serves, and what lacks cannot be kept.
        """
        try:
            there = next(p for p in (self.directory, *self.directory.parents) if p.exists())
            reason = None if there.is_dir() else f"{there} is a file"
            if there != self.directory and not os.access(there, os.W_OK | os.X_OK):
                reason = f"{there} cannot be written to"
        except (OSError, ValueError) as error:  # too long a name; NUL
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
        if reason is not None:
            raise InputError(
                "fastfpl.features.FeatureStore: directory (--cache) must be a folder, or one that "
                f"can be made; got {cut(str(self.directory))!r}: {reason}"
            )

    def get(
        self,
        key: FeatureKey,
        n: int,
        build: Callable[[npt.NDArray[np.int64]], Tensor],
        progress: Callable[[int, int], None] | None = None,
        *,
        ahead: Callable[[Iterable[npt.NDArray[np.int64]]], None] | None = None,
    ) -> Features:
        """Open the features of a key, computing them first if they are not there.

        Parameters
        ----------
        key : FeatureKey
        n : int
            Number of rows, i.e. of images.
        build : callable
            ``build(indices)`` with indices (m,), int64, returns finite features, floating Tensor of
            shape (m, ...), which are converted to the key's dtype.
        progress : callable, optional
            Called as ``progress(done, n)`` after each chunk that is computed, and before the first
            one if some are there already.
        ahead : callable, optional
            Told, before the first chunk is built, of the indices of all of them in their order.

        Returns
        -------
        features : Features
            Mapped from disk, not loaded.

        Raises
        ------
        InputError
            If ``n`` or what ``build`` returned is refused, or the directory cannot be written.
        KindError
            If ``build`` returned anything but floating point numbers.
        """
        if n < 1:
            raise InputError(f"fastfpl.features.FeatureStore: n must be positive; got {n}")
        path = self.directory / key.filename
        try:
            found = _open(path, key, n)
        except Damaged as error:
            _LOG.warning("%s; it is computed again", error)
            found = None
        if found is None:
            self._write(path, key, n, _Job(build, progress or _unseen, ahead or _unseen))
            found = _open(path, key, n)
        if found is None:
            raise Damaged(
                f"fastfpl.features.FeatureStore: {path} must stay while it is in use; "
                "got no file after it was written"
            )
        return found

    def _write(self, path: Path, key: FeatureKey, n: int, job: _Job) -> None:
        with _disk(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            sweep_parts(self.directory, _MINE, private=_PRIVATE_FOR, resumable=_RESUMABLE_FOR)
            growing = Growing(path, {**_facts(key, (n,)), "chunk": self.chunk})
        with growing:
            # another process may have ended since this one looked
            if _intact(path, key, n):
                growing.forget()
            else:
                self._fill(growing, key, n, job)

    def _fill(self, growing: Growing, key: FeatureKey, n: int, job: _Job) -> None:
        counts = [min(self.chunk, n - start) for start in range(0, n, self.chunk)]
        shape: tuple[int, ...] = ()
        digest = hashlib.blake2b(digest_size=16)
        done = 0
        if _is_row(growing.note):
            shape = (n, *growing.note)
            digest, row = _digest(key, shape), _nbytes(key, shape[1:])
            with _disk(self.directory):
                for kept in growing.resume(_offset(key, shape), (c * row for c in counts)):
                    digest.update(kept)
                    done += len(kept) // row
        resumed = done
        if resumed:
            _LOG.info("fastfpl.features: %d of %d images are there already", done, n)
            job.progress(done, n)
        chunks = [
            np.arange(at, min(n, at + self.chunk), dtype=np.int64)
            for at in range(done, n, self.chunk)
        ]
        job.ahead(chunks)
        for count, leaving in _built(chunks, job.build, key):
            row_shape = tuple(leaving.rows.shape[1:])
            if done == 0:
                shape = (n, *row_shape)
                digest = _digest(key, shape)
                with _disk(self.directory):
                    growing.begin(_offset(key, shape), list(row_shape))
            elif done == resumed and row_shape != shape[1:]:
                # what is there was built by something else
                growing.forget()
                return self._fill(growing, key, n, job)
            data = _raw(leaving, (count, *shape[1:]), key)
            digest.update(data)
            with _disk(self.directory):
                growing.append(data)
            done += count
            job.progress(done, n)
        # the checksum is known only now; the header keeps its length
        with _disk(self.directory):
            growing.finish(_header(key, shape, digest.hexdigest()))


@dataclass(frozen=True)
class _Job:
    """Who builds features, and who is told of it."""

    build: Callable[[npt.NDArray[np.int64]], Tensor]
    progress: Callable[[int, int], None]
    ahead: Callable[[Iterable[npt.NDArray[np.int64]]], None]


def _unseen(*_: Any) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class _Leaving:
    """Features on the host, or on their way to it until the event."""

    rows: Tensor
    finite: Tensor
    event: torch.cuda.Event | None


def _built(
    chunks: Iterable[npt.NDArray[np.int64]],
    build: Callable[[npt.NDArray[np.int64]], Tensor],
    key: FeatureKey,
) -> Iterator[tuple[int, _Leaving]]:
    """Build chunk after chunk; a CUDA device gets the next one before the last one is written."""
    waiting: tuple[int, _Leaving] | None = None
    for at in chunks:
        try:
            leaving = _leave(build(at), key)
        except BaseException:
            if waiting is not None:
                yield waiting
            raise
        if waiting is not None:
            yield waiting
        waiting = (len(at), leaving)
        if leaving.event is None:
            yield waiting
            waiting = None
    if waiting is not None:
        yield waiting


def _leave(rows: Tensor, key: FeatureKey) -> _Leaving:
    """Convert what was built and send it to the host, without waiting for a CUDA device."""
    if not rows.is_floating_point():
        raise KindError(
            f"fastfpl.features.FeatureStore: build must return floating point; got {rows.dtype}"
        )
    kept = rows.detach().to(_DTYPES[key.dtype][0]).contiguous()
    finite = torch.isfinite(kept).all()
    if not kept.is_cuda:
        return _Leaving(kept.cpu(), finite.cpu(), None)
    hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (kept, finite)]
    for host, tensor in zip(hosts, (kept, finite), strict=True):
        host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Leaving(hosts[0], hosts[1], event)


def _disk(directory: Path) -> AbstractContextManager[None]:
    op = "fastfpl.features.FeatureStore"
    return on_disk(op, "directory", directory, "or name another folder (--cache)")


def _raw(leaving: _Leaving, shape: tuple[int, ...], key: FeatureKey) -> memoryview:
    """Wait for features, check them and return their bytes."""
    rows = leaving.rows
    if tuple(rows.shape) != shape or rows.numel() == 0:
        raise InputError(
            f"fastfpl.features.FeatureStore: build must return shape {shape}, none of it 0; got "
            f"{tuple(rows.shape)}"
        )
    if leaving.event is not None:
        leaving.event.synchronize()
    if not bool(leaving.finite):
        raise InputError(
            f"fastfpl.features.FeatureStore: build must return features that are finite in "
            f"{key.dtype}; got a value that is not"
        )
    return rows.view(-1).view(torch.uint8).numpy().data


def _is_row(note: Any) -> bool:
    """Whether what a journal notes is the shape of a row."""
    return isinstance(note, list) and all(type(size) is int and size > 0 for size in note)


def _intact(path: Path, key: FeatureKey, n: int) -> bool:
    try:
        return _open(path, key, n) is not None
    except Damaged:
        return False


def _facts(key: FeatureKey, shape: tuple[int, ...]) -> dict[str, str]:
    return {
        "dtype": key.dtype,
        "format": _FORMAT,
        "key": json.dumps(asdict(key), sort_keys=True),
        "shape": json.dumps(shape),
        "version": __version__,
    }


def _digest(key: FeatureKey, shape: tuple[int, ...]) -> hashlib.blake2b:
    facts = json.dumps(_facts(key, shape), sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=16)


def _nbytes(key: FeatureKey, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _DTYPES[key.dtype][0].itemsize


def _offset(key: FeatureKey, shape: tuple[int, ...]) -> int:
    """Say where the first row stands in the file."""
    return len(_header(key, shape, _digest(key, shape).hexdigest()))


def _header(key: FeatureKey, shape: tuple[int, ...], checksum: str) -> bytes:
    name, size = _DTYPES[key.dtype][1], _nbytes(key, shape)
    text = json.dumps(
        {
            "__metadata__": {**_facts(key, shape), "checksum": checksum},
            _NAME: {"dtype": name, "shape": list(shape), "data_offsets": [0, size]},
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _open(path: Path, key: FeatureKey, n: int) -> Features | None:
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
        if _header(key, shape, checksum) != length.to_bytes(8, "little") + text:
            raise damaged("got a changed header")
        dtype, _, width = _DTYPES[key.dtype]
        size = _nbytes(key, shape)
        if size <= 0 or status.st_size != 8 + length + size:
            raise damaged(f"got {status.st_size} bytes instead of {8 + length + size}")
        raw = np.asarray(np.memmap(file, np.uint8, "c", offset=8 + length))
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with _verified_lock:
        known = _verified.get(path) == identity
    if not known:
        digest = _digest(key, shape)
        for start in range(0, size, _PIECE):
            digest.update(raw[start : start + _PIECE].data)
        if digest.hexdigest() != checksum:
            raise damaged(f"got the checksum {digest.hexdigest()} instead of {checksum}")
        with _verified_lock:
            _verified[path] = identity
    return Features(raw.view(width).reshape(shape), dtype)


TextKey = tuple[Hashable, Hashable]


class TextFeatures:
    """Text features in memory under explicit keys ``(owner, version)``.

    The cache never looks whether a context has changed: whoever changes one must count its version
    up. Nothing on a tensor tells of a change reliably, since fused optimisers and writes through
    ``.data`` leave its version counter alone.

    Parameters
    ----------
    max_bytes : int
        Features kept at most; the least recently used go first. A single result above it is
        returned but not kept.
    verify : bool
        Compare a hash of the context at every look-up and raise `Damaged` if a key was used for a
        changed tensor. For debugging: it needs every context every time.

    Notes
    -----
    The features are constants: they are encoded without a graph and returned as new tensors, so
    what a caller does to them does not reach the cache. Not for several threads at once.
    """

    #: Bytes that are kept at most unless the cache is told otherwise.
    MOST = 1 << 28

    def __init__(self, max_bytes: int = MOST, *, verify: bool = False) -> None:
        if max_bytes < 0:
            raise InputError(
                f"fastfpl.features.TextFeatures: max_bytes must not be negative; got {max_bytes}"
            )
        self._max_bytes = max_bytes
        self._verify = verify
        self._kept: OrderedDict[TextKey, tuple[Tensor, str]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    @property
    def max_bytes(self) -> int:
        """Bytes that are kept at most."""
        return self._max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all kept features."""
        return self._bytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._bytes = 0

    def get_or_encode(
        self,
        keys: Sequence[TextKey],
        ctx_of: Callable[[TextKey], Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the features of all keys, encoding the missing ones in one call.

        Parameters
        ----------
        keys : sequence of (owner, version)
            One or more; a key may repeat.
        ctx_of : callable
            ``ctx_of(key)`` returns the context, e.g. of shape (T, W); all of one shape.
        encode : callable
            ``encode(ctx)`` maps (m, T, W) to features (m, C, D), row by row; called at most once.

        Returns
        -------
        features : Tensor, shape (len(keys), C, D)
            A new tensor without a graph.

        Raises
        ------
        InputError, KindError
            If keys, contexts or what ``encode`` returned are refused.
        Damaged
            With ``verify``, if a key was used before for another context.
        """
        if not keys:
            raise InputError(
                "fastfpl.features.TextFeatures: keys must name at least one context; got none"
            )
        for key in keys:
            if not isinstance(key, tuple) or len(key) != 2:
                raise KindError(
                    f"fastfpl.features.TextFeatures: key must be (owner, version); got {key!r}"
                )
        here: dict[TextKey, Tensor] = {}
        contexts: dict[TextKey, Tensor] = {}
        marks: dict[TextKey, str] = {}
        for key in dict.fromkeys(keys):
            entry = self._kept.get(key)
            if entry is None or self._verify:
                contexts[key] = ctx_of(key)
            if self._verify:
                marks[key] = _mark(contexts[key])
                if entry is not None and entry[1] != marks[key]:
                    raise Damaged(
                        "fastfpl.features.TextFeatures: key must get a new version when its "
                        f"context changes; got {key!r} for a changed context"
                    )
            if entry is not None:
                self._kept.move_to_end(key)
                here[key] = entry[0]
        missing = [key for key in contexts if key not in here]
        if missing:
            encoded = self._encode(missing, contexts, encode)
            for key, row in zip(missing, encoded, strict=True):
                here[key] = row
            for key in missing:
                self._keep(key, here[key], marks.get(key, ""))
        with torch.no_grad():
            return torch.stack([here[key] for key in keys])

    def _encode(
        self,
        missing: list[TextKey],
        contexts: dict[TextKey, Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> Tensor:
        shapes = {tuple(contexts[key].shape) for key in missing}
        if len(shapes) > 1:
            raise InputError(
                "fastfpl.features.TextFeatures: contexts must have one shape; got "
                + " and ".join(str(shape) for shape in sorted(shapes))
            )
        with torch.no_grad():
            encoded = encode(torch.stack([contexts[key] for key in missing]))
        if encoded.ndim == 0 or encoded.shape[0] != len(missing):
            raise InputError(
                f"fastfpl.features.TextFeatures: encode must return {len(missing)} rows; got shape "
                f"{tuple(encoded.shape)}"
            )
        return encoded

    def _keep(self, key: TextKey, row: Tensor, mark: str) -> None:
        size = row.numel() * row.element_size()
        if size > self._max_bytes:
            return
        # a copy: a row of the batch would keep the whole batch alive and follow its changes
        self._kept[key] = (row.detach().clone(), mark)
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (old, _) = self._kept.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()


def _mark(ctx: Tensor) -> str:
    kept = ctx.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{kept.dtype} {tuple(kept.shape)}".encode(), digest_size=16)
    digest.update(kept.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
