"""A budget of memory for a whole run: how many clients and classes share a pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfpl import system
from fastfpl.errors import InputError
from fastfpl.features import TextFeatures
from fastfpl.methods import State
from fastfpl.ops.memory import memory_limit
from fastfpl.training.gathering import Share, shapes, stack

__all__ = ["Budget", "Living", "uncapped"]

# the rest is for what no trial shows: work space of matrix products, fragments
_PLANNED = 0.85
_ENOUGH = 64


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and live at once.

    Attributes
    ----------
    now, most : int
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the memory of its results that was not there before."""
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if size and key not in self._seen and key not in before:
                self._seen.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    """List the tensors of an operation's arguments or results; torch's own walk takes ten times."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for leaf in tree for tensor in _tensors(leaf)]


# CUDA devices of which PyTorch was told to give no more than a limit
_capped: set[torch.device] = set()


@contextmanager
def uncapped() -> Iterator[None]:
    """At the end, let PyTorch give the whole of every device again that a budget has capped."""
    try:
        yield
    finally:
        while _capped:
            torch.cuda.set_per_process_memory_fraction(1.0, _capped.pop())


class Budget:
    """Bytes that a run may take on its device, and who shares a pass so that it takes no more.

    Of every kind of cohort one client, two, four and so on take first steps for trial, with the
    largest batch that a client of the run has, as long as twice as much would fit; so many share a
    pass as fit if each needs its part of the last trial. The text pass gets half of the room, less
    where a client would not fit otherwise: it is cut into parts of contexts and classes. A trial
    changes nothing.

    Captured graphs keep what a step needs in a pool of their own, for good: it stands beside the
    steps of other shapes, which run as they are before they are captured, and beside all other
    passes.

    Parameters
    ----------
    limit : int
        Bytes. On a CPU of the process' resident memory; on a CUDA device of PyTorch's allocations.
    device : torch.device

    Attributes
    ----------
    limit : int
    taken : int
        Bytes that were taken before the first pass: weights, data, libraries.
    reserved : int
        Bytes that are kept for caches of text features.
    decoded : int
        Bytes that are kept for decoded images.
    pooled : int
        Bytes that are kept for the pool of captured graphs.
    passes : list of dict
        What was chosen for every kind of cohort: ``what`` it is for, ``clients`` at most,
        ``text_bytes`` for activations of the text pass, and ``tried_bytes`` that
        ``tried_clients`` needed; for the encoding of images ``images``, ``tried_images`` and
        ``tried_bytes``.

    Raises
    ------
    InputError
        If nothing is left, or if one client does not fit.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.taken = self.reserved = self.decoded = self.pooled = 0
        self._beside = 0  # most bytes of a pass that no graph is of
        self.passes: list[dict[str, Any]] = []
        self._device = device
        self._shares: dict[Hashable, Share] = {}
        self.settle()
        if device.type == "cuda":
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
            _capped.add(device)

    def settle(self) -> None:
        """Count anew what is taken before a pass."""
        self.taken = _taken(self._device)
        if self.taken >= self.limit:
            raise InputError(
                f"fastfpl.run: max_memory must be more than the {_readable(self.taken)} that are "
                f"taken before the first pass; got {_readable(self.limit)}; raise it or take a "
                "smaller CLIP"
            )

    @property
    def room(self) -> int:
        """Bytes that a pass is planned with."""
        whole = int(_PLANNED * (self.limit - self.taken))
        return whole - self.reserved - self.decoded - self.pooled

    def text_features(self) -> TextFeatures:
        """Make a cache of text features, and keep bytes for it."""
        cache = TextFeatures(min(TextFeatures.MOST, self.room // 8))
        self.reserved += cache.max_bytes
        return cache

    def decoded_images(self, wanted: int) -> int:
        """Say how many of the bytes that are wanted decoded images may take, and keep them."""
        if self._device.type == "cuda":  # images stay on the host
            return wanted
        self.decoded = min(wanted, self.room // 8)
        return self.decoded

    def device_features(self, wanted: int | None) -> int:
        """Say how many of the bytes that are wanted features may take on a CUDA device.

        They are brought there before the first pass, and so are among what is taken then.
        """
        most = self.room // 4
        return most if wanted is None else min(wanted, most)

    def share(
        self,
        what: str,
        kind: tuple[State, State],
        apart: Callable[[State, int], State],
        trial: Callable[[list[int], State, State], object],
        client: int,
        images: int | None,
        most: int | None,
        after: Callable[[], None],
        replayed: bool = False,
    ) -> Share:
        """Choose the share of one kind of cohort; measured at its first sight.

        Parameters
        ----------
        what : str
            What the pass is for.
        kind : tuple of State
            What the client downloads and keeps.
        apart : callable
            `Method.apart`.
        trial : callable
            ``trial(members, down, own)`` makes the pass; the states are stacked.
        client : int
            Number of the client.
        images : int or None
            What it trains on for trial: more may need more.
        most : int or None
            Clients that share a pass at most; None for 64, as more make no device busier.
        after : callable
            Called after the trials, to forget what they left in caches.
        replayed : bool
            Whether its steps are captured: then they have their memory twice, in the pool of the
            graphs and where steps of other shapes run.
        """
        key = (what, images, replayed, *(shapes(state) for state in kind))
        if key not in self._shares:
            # who gathers a cohort, or puts it into order, holds its states a second time
            twice = sum(tensor.nbytes for state in kind for tensor in state.values())

            def run(count: int) -> None:
                down = stack([apart(kind[0], number) for number in range(count)])
                trial([client] * count, down, stack([kind[1]] * count))

            try:
                self._shares[key] = self._choose(what, run, twice, most, replayed)
            finally:
                after()
        return self._shares[key]

    def _choose(
        self,
        what: str,
        run: Callable[[int], None],
        beside: int,
        most: int | None,
        replayed: bool,
    ) -> Share:
        # a pool that was counted grows to what this pass needs: it is no other one beside it
        whole = self.room + self.pooled if replayed else self.room
        room = min(whole // 2, whole - self._beside) if replayed else whole
        text = room // 2
        first, known = room + 1, ""
        while first > room:
            try:
                if text < 1:
                    raise InputError("a pass of no text takes no less")
                first = beside + self._needs(run, 1, text)
            except InputError as error:  # not one class fits into so little
                raise InputError(
                    f"fastfpl.run: max_memory must hold the {what} of one client; got "
                    f"{_readable(self.limit)}, of which {_readable(self.taken)} are taken and "
                    f"{_readable(room)} may be planned{known}; raise it, or lower batch_size"
                ) from error
            known = f", but one needs {_readable(first)}"
            text //= 2
        text *= 2
        count, tried, needed = self._doubled(
            lambda n: n * beside + self._needs(run, n, text), first, most or _ENOUGH, room
        )
        all_of_it = -(-count * needed // tried)
        if replayed:
            self.pooled = max(self.pooled, all_of_it)
        else:
            self._beside = max(self._beside, all_of_it)
        self.passes.append(
            {
                "what": what,
                "clients": count,
                "text_bytes": text,
                "tried_clients": tried,
                "tried_bytes": needed,
            }
        )
        return Share(count, text)

    def _doubled(
        self, needs: Callable[[int], int], first: int, top: int, room: int
    ) -> tuple[int, int, int]:
        """Double what shares a pass while it fits; return how many do, were tried and needed.

        Twice as many need at most twice as much, so that no trial needs more than there is.
        """
        tried, needed = 1, max(first, 1)
        while 2 * tried <= top and 2 * needed <= room:
            tried *= 2
            needed = max(needs(tried), 1)
        return min(tried * room // needed, top), tried, needed

    def images(self, encode: Callable[[Tensor], object], size: int, most: int) -> int:
        """Choose how many images the image tower encodes at once, ``most`` at the most.

        ``encode`` takes pixels (n, 3, size, size), uint8.
        """

        def run(count: int) -> None:
            encode(torch.zeros(count, 3, size, size, dtype=torch.uint8))

        first = self._needs(run, 1, self.room)
        if first > self.room:
            raise InputError(
                f"fastfpl.run: max_memory must hold the encoding of one image; got "
                f"{_readable(self.limit)}, of which {_readable(self.taken)} are taken, but one "
                f"needs {_readable(first)}; raise it or take a smaller CLIP"
            )
        room = self.room
        count, tried, needed = self._doubled(lambda n: self._needs(run, n, room), first, most, room)
        self.passes.append(
            {"what": "encoding", "images": count, "tried_images": tried, "tried_bytes": needed}
        )
        return count

    def _needs(self, run: Callable[[int], None], count: int, text: int) -> int:
        """Measure the bytes that a trial has at a time beside what was there before."""
        with memory_limit(text):
            if self._device.type != "cuda":
                with Living() as seen:
                    run(count)
                return int(seen.most)
            torch.cuda.synchronize(self._device)
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            try:
                run(count)
            except torch.OutOfMemoryError:
                return self.limit
            finally:
                torch.cuda.empty_cache()
            return int(torch.cuda.max_memory_allocated(self._device)) - before

    def to_json(self) -> dict[str, Any]:
        """Say what was chosen, for ``result.json``."""
        return {
            "limit_bytes": self.limit,
            "taken_bytes": self.taken,
            "text_cache_bytes": self.reserved,
            "image_cache_bytes": self.decoded,
            "graph_pool_bytes": self.pooled,
            "passes": self.passes,
        }


def _taken(device: torch.device) -> int:
    """Bytes that the process has now: allocations on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return system.resident()


def _readable(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} bytes"
