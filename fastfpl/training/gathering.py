"""Clients that can share a pass: their states stacked along a leading client dimension."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastfpl.methods import State

__all__ = ["Gathered", "Share", "gather", "row", "shapes", "stack", "unstack"]


def stack(states: Sequence[State]) -> State:
    """Stack states of equal names and shapes along a new leading client dimension."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(state: State, count: int) -> list[State]:
    """Split a stacked state into one state a client; no two share storage."""
    return [{name: tensor[u].clone() for name, tensor in state.items()} for u in range(count)]


def row(state: State, u: int) -> State:
    """Return what is one client's of a stacked state."""
    return {name: tensor[u] for name, tensor in state.items()}


# images if they count, and the shapes of what is downloaded and kept
_Kind = tuple[int | None, Hashable, Hashable]


@dataclass(frozen=True)
class Share:
    """What one pass may take.

    Attributes
    ----------
    clients : int or None
        Clients of a cohort at most; None for as many as there are.
    text : int or None
        Bytes of activations of the text pass (`fastfpl.ops.memory`), None for no limit.
    """

    clients: int | None = None
    text: int | None = None

    def both(self, other: Share) -> Share:
        """Return the lesser of two shares."""
        return Share(_lesser(self.clients, other.clients), _lesser(self.text, other.text))


def _lesser(one: int | None, other: int | None) -> int | None:
    return min((n for n in (one, other) if n is not None), default=None)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Clients that can share passes.

    Attributes
    ----------
    members : list of int
        Client numbers, U of them.
    down, own : State
        Stacked downloads and kept states.
    share : Share
        What their passes may take.
    """

    members: list[int]
    down: State
    own: State
    share: Share


def gather(
    clients: Sequence[int],
    states: Callable[[int], tuple[State, State]],
    share: Callable[[int, State, State], Share],
    sizes: Mapping[int, int] | None = None,
) -> Iterator[Gathered]:
    """Put clients with tensors of the same names and shapes into cohorts, as they come.

    No more states are held at a time than those of one unfinished cohort of each kind.

    Parameters
    ----------
    clients : sequence of int
    states : callable
        ``states(client)`` returns what the client downloads and what it has kept.
    share : callable
        ``share(client, down, own)`` is asked once for every kind of states, with the first client
        of the kind.
    sizes : mapping from client to int, optional
        With it the clients of a cohort also have equally many training images.
    """
    shares: dict[_Kind, Share] = {}
    waiting: dict[_Kind, list[tuple[int, State, State]]] = {}

    def joined(kind: _Kind) -> Gathered:
        members, downs, owns = zip(*waiting.pop(kind), strict=True)
        return Gathered(list(members), stack(downs), stack(owns), shares[kind])

    order = sorted(clients, key=lambda c: (0 if sizes is None else sizes[c], c))
    for client in order:
        down, own = states(client)
        kind = (None if sizes is None else sizes[client], shapes(down), shapes(own))
        if kind not in shares:
            if sizes is not None:
                # who has more images comes after all that have fewer
                for other in [k for k in waiting if k[0] != kind[0]]:
                    yield joined(other)
            shares[kind] = share(client, down, own)
        part = waiting.setdefault(kind, [])
        part.append((client, down, own))
        if len(part) == shares[kind].clients:
            yield joined(kind)
    for kind in list(waiting):
        yield joined(kind)


def shapes(state: State) -> Hashable:
    """Return names and shapes of the tensors of a state."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(state.items()))
