"""Robust merging: what stands in the place of a plain mean where some clients may be hostile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.federation.merging import Expected, clipped, expected, only_mean, unmoved
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload

__all__ = ["Robust", "Uploads", "krum", "robust_of"]

# numbers of every client that are looked at together in float64
_SLAB = 1 << 16


class Uploads(Protocol):
    """What arrived, by client; an upload can be put in the place of another."""

    def __iter__(self) -> Iterator[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, client: int, /) -> Upload: ...
    def put(self, client: int, state: State, /) -> None:
        """Put an upload in the place of a client's."""


@dataclass(frozen=True)
class Robust:
    """How uploads are merged in the place of a mean that weighs clients by their images.

    The method's own merge then takes the mean: of what Krum selects, or of copies of what a
    coordinate-wise rule makes of all. Clients count alike but with ``rule="mean"``.

    Attributes
    ----------
    rule : "mean", "median", "trimmed" or "krum"
        Median and trimmed mean are those of every coordinate by itself (Yin et al. 2018,
        definitions 1 and 2); an even number of uploads has the mean of the middle two as median.
        Krum is (multi-)Krum (Blanchard et al. 2017, section 4 and 6), see `krum`.
    trim : float
        Share of the uploads that is cut off at either end, rounded down.
    malicious, kept : int
        Hostile clients that Krum is to bear, and uploads of which it takes the mean.
    clip : float or None
        Norm to which, before all this, is cut what a client moved what it had downloaded.
    """

    rule: str = "mean"
    trim: float = 0.2
    malicious: int = 0
    kept: int = 1
    clip: float | None = None

    @property
    def least(self) -> int:
        """Uploads below which the rule bears nobody: a round with fewer is not merged."""
        if self.rule == "median":
            return 3
        if self.rule == "trimmed":
            return math.ceil(1 / self.trim - 1e-9)
        if self.rule == "krum":
            return max(2 * self.malicious + 3, self.kept + self.malicious)
        return 1

    def check(self, method: Method, server: State, down: State, called: int) -> None:
        """Refuse a method for which this has no meaning, and rounds that call too few.

        Parameters
        ----------
        method : Method
        server, down : State
            What the server holds before the first round, and a client's download of it.
        called : int
            Clients of a round.

        Raises
        ------
        InputError
        """
        wanted = expected(method, down) if method.trains else Expected({}, ())
        if self.rule != "mean":
            why = only_mean(method, server, wanted)
            if why is not None:
                raise InputError(
                    f"fastfpl.run: merge must be mean for {method.name}; got {self.rule}, and {why}"
                )
            if called < self.least:
                raise InputError(
                    f"fastfpl.run: a round must call at least {self.least} clients with "
                    f"{self.words}; got {called}"
                )
        if self.clip is not None:
            why = unmoved(down, wanted)
            if why is not None:
                raise InputError(
                    f"fastfpl.run: clip_update must be left out for {method.name}; got "
                    f"{self.clip}, and {why}"
                )

    @property
    def words(self) -> str:
        """The rule with its numbers."""
        if self.rule == "trimmed":
            return f"merge=trimmed and trim={self.trim:g}"
        if self.rule == "krum":
            return (
                f"merge=krum, krum_malicious={self.malicious} and krum_kept={self.kept}, which "
                "needs 2 M + 3 and K + M"
            )
        return f"merge={self.rule}"

    @torch.no_grad()
    def merged(
        self, uploads: Uploads, down: Callable[[int], State], images: Mapping[int, int]
    ) -> tuple[Mapping[int, Upload], Mapping[int, int], dict[str, Any]]:
        """Return what the method's own merge is to be given: (uploads, weights, facts of the row).

        Parameters
        ----------
        uploads : Uploads
            Finite. Those that move too far are put back cut.
        down : callable
            ``down(client)`` is what a client had downloaded.
        images : mapping from client to int
            The weights of a plain mean.

        Returns
        -------
        uploads : mapping from client to Upload
            None at all where fewer than `least` arrived.
        weights : mapping from client to int
        facts : dict
            ``used``: the clients whose uploads count. ``norms``: with ``clip``, how far each had
            moved before it was cut.
        """
        order = sorted(uploads)
        facts: dict[str, Any] = {"used": order}
        if self.clip is not None:
            facts["norms"] = {}
            for client in order:
                kept, norm = clipped(down(client), uploads[client], self.clip)
                facts["norms"][str(client)] = norm
                if norm > self.clip:
                    uploads.put(client, kept)
        everything = {client: uploads[client] for client in order}
        if self.rule == "mean":
            return everything, {client: images[client] for client in order}, facts
        if len(order) < self.least:
            return {}, {}, {**facts, "used": []}
        if self.rule == "krum":
            found = krum(everything, self.malicious, self.kept)
            chosen = {client: everything[client] for client in found}
            return chosen, dict.fromkeys(found, 1), {**facts, "used": found}
        agreed = self._middle(everything)
        return dict.fromkeys(order, agreed), dict.fromkeys(order, 1), facts

    def _middle(self, uploads: Mapping[int, Upload]) -> State:
        """Take the median or the trimmed mean of every coordinate."""
        count = len(uploads)
        cut = (count - 1) // 2 if self.rule == "median" else int(self.trim * count + 1e-9)
        first = next(iter(uploads.values()))
        agreed: State = {}
        for name in first:
            like, parts = first[name], []
            for slab in _slabs(uploads, name):
                ordered = slab.sort(dim=0).values
                parts.append(ordered[cut : count - cut].mean(dim=0))
            agreed[name] = torch.cat(parts).reshape(like.shape).to(like.dtype)
        return agreed


def krum(uploads: Mapping[int, Upload], malicious: int, kept: int) -> list[int]:
    """Select the uploads that lie closest to others: clients, ascending.

    The score of an upload is the sum of its squared Euclidean distances, over all that is sent, to
    the n - malicious - 2 others that are nearest to it; the ``kept`` smallest are selected, of
    equal ones the smaller client.

    Source: Blanchard et al. 2017 (NIPS), section 4; several kept: Multi-Krum, section 6.

    Parameters
    ----------
    uploads : mapping from client to Upload
        n of them, at least 2 malicious + 3.
    malicious, kept : int

    Returns
    -------
    list of int
    """
    uploads = {client: uploads[client] for client in sorted(uploads)}
    order = list(uploads)
    squares = torch.zeros(len(order), len(order), dtype=torch.float64)
    for name in uploads[order[0]]:
        for slab in _slabs(uploads, name):
            # differences themselves: products would lose small moves of large prompts
            mode = "donot_use_mm_for_euclid_dist"
            squares += torch.cdist(slab, slab, compute_mode=mode).square().cpu()
    near = squares.sort(dim=1).values[:, 1 : len(order) - malicious - 1]  # itself is first
    best = near.sum(dim=1).argsort(stable=True)[:kept]
    return sorted(order[place] for place in best.tolist())


def _slabs(uploads: Mapping[int, Upload], name: str) -> Iterator[Tensor]:
    """Yield a tensor of all clients, some of its numbers after others: (n, ≤ _SLAB), float64."""
    whole = torch.stack([state[name].reshape(-1) for state in uploads.values()])
    for slab in whole.split(_SLAB, dim=1):
        yield slab.double()


def robust_of(settings: Settings) -> Robust | None:
    """Return the robust merging that settings ask for, or None."""
    if settings.merge == "mean" and settings.clip_update is None:
        return None
    return Robust(
        settings.merge,
        0.2 if settings.trim is None else settings.trim,
        settings.krum_malicious or 0,
        1 if settings.krum_kept is None else settings.krum_kept,
        settings.clip_update,
    )
