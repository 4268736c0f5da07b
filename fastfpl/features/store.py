"""Image features on disk, computed once: what is there is opened, the rest is encoded."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.errors import Damaged, InputError, KindError, Missing, cut
from fastfpl.features.file import (
    DTYPES,
    KINDS,
    FeatureKey,
    Features,
    digest_of,
    facts_of,
    header_of,
    intact,
    nbytes_of,
    offset_of,
    open_features,
)
from fastfpl.files import Growing, growing_elsewhere, on_disk, sweep_parts

__all__ = ["STALLED", "Build", "FeatureStore", "Whole", "default_directory"]

#: ``build(indices)`` encodes images: one Tensor of rows, or one of each key that is asked for.
Build = Callable[[npt.NDArray[np.int64]], Tensor | Sequence[Tensor]]

_LOG = logging.getLogger("fastfpl")
# stems of the files of keys
_MINE = re.compile(f"(?:{'|'.join(KINDS)})-[0-9a-f]{{32}}")
# seconds after which half a file goes that nobody can go on with, or that nobody went on with
_PRIVATE_FOR, _RESUMABLE_FOR = 24 * 3600.0, 7 * 24 * 3600.0
#: Seconds without a chunk after which nobody waits any longer for whoever encodes.
STALLED = 1800.0
_POLL = 0.5  # seconds between two looks at what another process encodes
_LOOKS = 3  # at a part that nobody seems to hold and that cannot be had


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
    have been written without the interruption. Any number of processes may share a directory, on
    one machine or several; one that misses a key while another one is encoding it says so and
    waits. If that one dies, it goes on in its place, after the last whole chunk; if it does not end
    a chunk for `STALLED` seconds, or nothing can be locked there, everybody encodes for himself and
    the later file replaces the equal earlier one. What nobody goes on with is removed after a week.

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
        build: Build,
        progress: Callable[[int, int], None] | None = None,
        *,
        ahead: Callable[[Iterable[npt.NDArray[np.int64]]], None] | None = None,
        whole: Whole | None = None,
        also: Sequence[FeatureKey] = (),
    ) -> Features:
        """Open the features of a key, computing them first if they are not there.

        Parameters
        ----------
        key : FeatureKey
        n : int
            Number of rows, i.e. of images.
        build : callable
            ``build(indices)`` with indices (m,), int64, returns finite features, floating Tensor of
            shape (m, ...), which are converted to the key's dtype. With ``also`` one Tensor a key,
            that of ``key`` first.
        progress : callable, optional
            Called as ``progress(done, n)`` after each chunk that is computed, and before the first
            one if some are there already.
        ahead : callable, optional
            Told, before the first chunk is built, of the indices of all of them in their order.
        whole : Whole, optional
            A larger file that has these rows: it serves where it is there, or another process is
            encoding it, and the key itself is not.
        also : sequence of FeatureKey
            What else is known of the same images once they are encoded. Where ``key`` has to be
            computed, files of these are written beside it but for those that are there, or that
            another process writes.

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
            found = open_features(path, key, n)
        except Damaged as error:
            _LOG.warning("%s; it is computed again", error)
            found = None
        job = _Job(build, progress or _unseen, ahead or _unseen, tuple(also))
        if found is None and whole is not None:
            found = self._from(whole, job)
        if found is None:
            self._write(path, key, n, job)
            found = open_features(path, key, n)
        if found is None:
            raise Damaged(
                f"fastfpl.features.FeatureStore: {path} must stay while it is in use; "
                "got no file after it was written"
            )
        return found

    def _from(self, whole: Whole, job: _Job) -> Features | None:
        """Return rows of a larger file, if it is there or about to be."""
        path = self.directory / whole.key.filename
        if not path.exists() and growing_elsewhere(path) is not None:
            self._wait(path, whole.n, job)
        try:
            found = open_features(path, whole.key, whole.n)
        except Damaged:  # whoever needs all of it will say so
            return None
        return None if found is None else found.part(whole.rows)

    def _write(self, path: Path, key: FeatureKey, n: int, job: _Job) -> None:
        with _disk(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            sweep_parts(self.directory, _MINE, private=_PRIVATE_FOR, resumable=_RESUMABLE_FOR)
        looks = _LOOKS
        while True:
            with _disk(self.directory):
                growing = Growing(path, {**facts_of(key, (n,)), "chunk": self.chunk})
            with growing:
                # another process may have ended since this one looked
                if intact(path, key, n):
                    growing.forget()
                    return
                if growing.shared or not growing.locks or not looks:
                    with contextlib.ExitStack() as held:
                        files = [_File(growing, key, 0), *self._beside(job.also, n, held)]
                        self._fill(files, n, job)
                    return
            seen, gone = self._wait(path, n, job)
            if seen and not gone:
                looks = 0
            elif not seen:
                looks -= 1

    def _beside(
        self, also: Sequence[FeatureKey], n: int, held: contextlib.ExitStack
    ) -> Iterator[_File]:
        """Open those files of other keys that are not there and that nobody else writes."""
        for column, key in enumerate(also, 1):
            path = self.directory / key.filename
            if path.exists():
                continue
            with _disk(self.directory):
                growing = held.enter_context(
                    Growing(path, {**facts_of(key, (n,)), "chunk": self.chunk})
                )
            if not path.exists() and (growing.shared or not growing.locks):
                yield _File(growing, key, column)

    def _wait(self, path: Path, n: int, job: _Job) -> tuple[bool, bool]:
        """Wait for whoever encodes a file: whether somebody did, and has ended or died since."""
        held, seen, since = False, -1, time.monotonic()
        while (chunks := growing_elsewhere(path)) is not None:
            if not held:
                held = True
                _LOG.warning(
                    "fastfpl.features: another process is encoding these %d images into %s; "
                    "waiting for it",
                    *(n, self.directory),
                )
            if chunks != seen:
                seen, since = chunks, time.monotonic()
                job.progress(min(n, chunks * self.chunk), n)
            elif time.monotonic() - since > STALLED:
                _LOG.warning(
                    "fastfpl.features: the other process has encoded nothing for %g s; encoding "
                    "for myself",
                    STALLED,
                )
                return True, False
            time.sleep(_POLL)
        return held, True

    def _fill(self, files: Sequence[_File], n: int, job: _Job) -> None:
        with _disk(self.directory):
            for file in files:
                file.resume(n, self.chunk)
        done = min(file.done for file in files)
        if done:
            _LOG.info("fastfpl.features: %d of %d images are there already", done, n)
            job.progress(done, n)
        chunks = [
            np.arange(at, min(n, at + self.chunk), dtype=np.int64)
            for at in range(done, n, self.chunk)
        ]
        job.ahead(chunks)
        for at, leaving in _built(chunks, job.build, files):
            if any(not file.takes(rows, at) for file, rows in zip(files, leaving, strict=True)):
                # what is there was built by something else
                for file in files:
                    file.growing.forget()
                return self._fill(files, n, job)
            for file, rows in zip(files, leaving, strict=True):
                file.append(rows, at, n, self.directory)
            job.progress(int(at[-1]) + 1, n)
        # the checksum is known only now; the header keeps its length
        with _disk(self.directory):
            for file in files:
                file.growing.finish(header_of(file.key, file.shape, file.digest.hexdigest()))


class _File:
    """A file of one key that grows.

    Attributes
    ----------
    growing : Growing
    key : FeatureKey
    column : int
        Which of the tensors that are built its rows are.
    shape : tuple of int
        (n, ...), once a chunk is there.
    done : int
        Rows.
    """

    def __init__(self, growing: Growing, key: FeatureKey, column: int) -> None:
        self.growing, self.key, self.column = growing, key, column
        self.shape: tuple[int, ...] = ()
        self.digest = hashlib.blake2b(digest_size=16)
        self.done = self._resumed = 0

    def resume(self, n: int, chunk: int) -> None:
        """Take what a process that is gone has left, chunk by chunk."""
        self.done = 0
        if _is_row(self.growing.note):
            self.shape = (n, *self.growing.note)
            self.digest, row = digest_of(self.key, self.shape), nbytes_of(self.key, self.shape[1:])
            sizes = (min(chunk, n - start) * row for start in range(0, n, chunk))
            for kept in self.growing.resume(offset_of(self.key, self.shape), sizes):
                self.digest.update(kept)
                self.done += len(kept) // row
        self._resumed = self.done

    def takes(self, leaving: _Leaving, at: npt.NDArray[np.int64]) -> bool:
        """Whether rows go on with those that another process has left."""
        first = self.done > 0 and at[0] <= self.done == self._resumed
        return not first or tuple(leaving.rows.shape[1:]) == self.shape[1:]

    def append(self, leaving: _Leaving, at: npt.NDArray[np.int64], n: int, directory: Path) -> None:
        """Write rows, but those that are there."""
        if at[0] < self.done:
            return
        if not self.done:
            row_shape = tuple(leaving.rows.shape[1:])
            self.shape = (n, *row_shape)
            self.digest = digest_of(self.key, self.shape)
            with _disk(directory):
                self.growing.begin(offset_of(self.key, self.shape), list(row_shape))
        data = _raw(leaving, (len(at), *self.shape[1:]), self.key)
        self.digest.update(data)
        with _disk(directory):
            self.growing.append(data)
        self.done += len(at)


@dataclass(frozen=True, eq=False)
class Whole:
    """A larger file of features that has all rows of a key.

    Attributes
    ----------
    key : FeatureKey
    n : int
        Its rows.
    rows : ndarray, shape (m,), int64
        Where those of the key stand in it.
    """

    key: FeatureKey
    n: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Job:
    """Who builds features, and who is told of it."""

    build: Build
    progress: Callable[[int, int], None]
    ahead: Callable[[Iterable[npt.NDArray[np.int64]]], None]
    also: tuple[FeatureKey, ...]


def _unseen(*_: Any) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class _Leaving:
    """Features on the host, or on their way to it until the event."""

    rows: Tensor
    finite: Tensor
    event: torch.cuda.Event | None


def _built(
    chunks: Iterable[npt.NDArray[np.int64]], build: Build, files: Sequence[_File]
) -> Iterator[tuple[npt.NDArray[np.int64], list[_Leaving]]]:
    """Build chunk after chunk; a CUDA device gets the next one before the last one is written."""
    waiting: tuple[npt.NDArray[np.int64], list[_Leaving]] | None = None
    for at in chunks:
        try:
            made = build(at)
            columns = (made,) if isinstance(made, Tensor) else made
            leaving = [_leave(columns[file.column], file.key) for file in files]
        except BaseException:
            if waiting is not None:
                yield waiting
            raise
        if waiting is not None:
            yield waiting
        waiting = (at, leaving)
        if all(rows.event is None for rows in leaving):
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
    kept = rows.detach().to(DTYPES[key.dtype][0]).contiguous()
    finite = torch.isfinite(kept).all()
    if not kept.is_cuda:
        return _Leaving(kept.cpu(), finite.cpu(), None)
    hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (kept, finite)]
    for host, tensor in zip(hosts, (kept, finite), strict=True):
        host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(kept.device))  # not that of the current device
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
