"""Pixels for an image tower: read, decoded and cut by threads while the tower is at work."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.data.base import Images, Split
from fastfpl.errors import InputError

__all__ = ["Loader", "Resident", "Workers", "choose_workers"]

Indices = npt.NDArray[np.int64]
#: Indices of images and a seed for each, or None where nothing is drawn.
Job = tuple[Indices, Indices | None]

# images of one task of a thread, at least and at most
_FEWEST, _MOST = 8, 64
# images that are prepared beyond those that are waited for: one chunk of the feature store
_AHEAD = 256
# threads at most, where it is not said how many: two were better than one on a CPU of two cores, by
# bench/image_side.py; eight leave Python's lock to the thread that launches kernels (not measured)
_BESIDE_CPU, _BESIDE_CUDA = 2, 8


def choose_workers(device: str, asked: int | None = None) -> int:
    """Say how many threads prepare images for a kind of device, unless it is asked for.

    Beside a CUDA device one for each core that this process may use, eight at most; on a CPU, where
    the tower takes all cores, two, and none where the tower has one thread.
    """
    if asked is not None:
        return asked
    if device == "cuda":
        return min(_cores(), _BESIDE_CUDA)
    return _BESIDE_CPU if min(_cores(), torch.get_num_threads()) > 1 else 0


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Workers:
    """Threads that are started when they are first needed, and kept.

    Parameters
    ----------
    count : int
        0 starts none.

    Notes
    -----
    Threads, not processes: decoders and torch let go of Python's lock while they work, images need
    no copy from one process to another, an error arrives as it was raised, and nothing has to be
    importable by another process. Torch computes with one thread in each of them.
    """

    def __init__(self, count: int) -> None:
        if count < 0:
            raise InputError(f"fastfpl.data.Workers: count must not be negative; got {count}")
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        """Let a thread do something."""
        if self._pool is None:
            self._pool = self._start()
        return self._pool.submit(work, *arguments)

    def _start(self) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(self.count, thread_name_prefix="fastfpl-images")
        before = torch.get_num_threads()
        ready = threading.Barrier(self.count + 1)

        def alone() -> None:
            # a thread takes over the process's number at its first look, then has its own
            torch.get_num_threads()
            torch.set_num_threads(1)
            ready.wait()

        try:
            for _ in range(self.count):
                pool.submit(alone)
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        finally:
            # what threads that start later take over
            torch.set_num_threads(before)
        return pool


class Resident:
    """Decoded images of a split that stay in memory, as many as fit.

    Parameters
    ----------
    split : Split
    max_bytes : int
        Of pixels. What comes when they are full is decoded every time.

    Attributes
    ----------
    nbytes : int
        Of the pixels that are kept.
    """

    def __init__(self, split: Split, max_bytes: int) -> None:
        self.nbytes = 0
        self._split = split
        self._max_bytes = max_bytes
        self._kept: dict[int, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def images(self, indices: Indices) -> Images:
        """Return RGB images; see `Split.images`."""
        asked: list[int] = indices.tolist()
        found = {index: self._kept[index] for index in asked if index in self._kept}
        missing = [index for index in dict.fromkeys(asked) if index not in found]
        if missing:
            for index, image in zip(missing, self._split.images(missing), strict=True):
                found[index] = image
                self._keep(index, image)
        return [found[index] for index in asked]

    def _keep(self, index: int, image: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            if index not in self._kept and self.nbytes + image.nbytes <= self._max_bytes:
                # a row of a larger array would keep all of it
                self._kept[index] = image if image.base is None else image.copy()
                self.nbytes += image.nbytes


@dataclass(frozen=True, eq=False)
class _Coming:
    """A job that threads are at work on."""

    job: Job
    pixels: Tensor
    tasks: list[Future[None]]

    def is_for(self, job: Job) -> bool:
        return all(
            mine is asked
            or (mine is not None and asked is not None and np.array_equal(mine, asked))
            for mine, asked in zip(self.job, job, strict=True)
        )


class Loader:
    """Pixels of images in batches, prepared ahead where the batches are known before.

    Parameters
    ----------
    read : callable
        ``read(indices)`` returns images, e.g. `Split.images`.
    cut : callable
        ``cut(images, seeds)`` returns uint8 pixels (b, 3, size, size), image by image.
    size : int
    workers : Workers
        With none, everything is done when it is asked for.
    pinned : bool
        Whether pixels come in pinned memory, from where they reach a CUDA device unawaited.

    Notes
    -----
    Equal pixels, bit for bit, for any number of workers: each image is cut by itself.
    One thread asks. At most the batch that is asked for and 256 images (or one batch) more are in
    memory, and the originals of those that threads are at work on.
    """

    def __init__(
        self,
        read: Callable[[Indices], Images],
        cut: Callable[[Images, Indices | None], Tensor],
        size: int,
        workers: Workers,
        *,
        pinned: bool = False,
    ) -> None:
        self._read = read
        self._cut = cut
        self._size = size
        self._workers = workers
        self._pinned = pinned
        self._later: Iterator[Job] = iter(())
        self._coming: deque[_Coming] = deque()

    def expect(self, jobs: Iterable[Job]) -> None:
        """Be told what will be asked for next, in order; nothing else is prepared from now on.

        What is asked for otherwise is right too, but comes later.
        """
        self._drop()
        if self._workers.count:
            self._later = iter(jobs)
            self._prepare()

    def pixels(self, indices: Indices, seeds: Indices | None = None) -> Tensor:
        """Return pixels (b, 3, size, size), uint8, of images, each drawn by its seed.

        Raises
        ------
        FastfplError
            What reading or cutting raised, of the first image that is refused.
        """
        job = (indices, seeds)
        if self._coming and not self._coming[0].is_for(job):
            self._drop()
        now = self._coming.popleft() if self._coming else self._begin(job)
        try:
            # before the wait, so that there is always something to do
            self._prepare()
            for task in now.tasks:
                task.result()
        except BaseException:
            for task in now.tasks:
                task.cancel()
            self._drop()
            raise
        return now.pixels

    def _prepare(self) -> None:
        while sum(len(coming.job[0]) for coming in self._coming) < _AHEAD:
            job = next(self._later, None)
            if job is None:
                return
            self._coming.append(self._begin(job))

    def _begin(self, job: Job) -> _Coming:
        indices, seeds = job
        shape = (len(indices), 3, self._size, self._size)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        share = -(-len(indices) // max(1, self._workers.count))
        step = min(max(share, _FEWEST), _MOST)
        tasks = []
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            mine = (pixels[part], indices[part], None if seeds is None else seeds[part])
            if self._workers.count:
                tasks.append(self._workers.submit(self._fill, *mine))
            else:
                self._fill(*mine)
        return _Coming(job, pixels, tasks)

    def _fill(self, pixels: Tensor, indices: Indices, seeds: Indices | None) -> None:
        pixels.copy_(self._cut(self._read(indices), seeds))

    def _drop(self) -> None:
        """Let go of everything that is prepared."""
        self._later = iter(())
        for coming in self._coming:
            for task in coming.tasks:
                task.cancel()
        self._coming.clear()
