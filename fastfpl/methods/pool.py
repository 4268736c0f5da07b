"""What a server holds of single clients: their last uploads, a row for each that has uploaded.

``pool`` is (M, ...), ``pool_owner`` (M,) says whose rows they are, in the order of first uploads;
other tensors may have a row a client beside. A federation of which few clients have taken part
holds few rows, however many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastfpl.methods.base import State, Upload

__all__ = ["GROWS", "blocks", "empty", "refreshed", "row_of", "rows_of"]

#: Names of the tensors whose first dimension grows.
GROWS = frozenset({"pool", "pool_owner", "pool_round"})
# bytes of prompts that are looked at at once, in float64: what a cache near a core holds
_BLOCK = 1 << 20


def empty(ctx: Tensor) -> State:
    """Return a pool of prompts to which nobody has uploaded."""
    return {
        "pool": ctx.new_zeros(0, *ctx.shape),
        "pool_owner": torch.zeros(0, dtype=torch.int64),
    }


def row_of(server: State, client: int) -> int | None:
    """Return the row of a client; None of one that has not uploaded."""
    found = (server["pool_owner"] == client).nonzero()[:, 0].tolist()
    return found[0] if found else None


def rows_of(server: State, clients: Tensor) -> Tensor:
    """Return the rows of clients that have uploaded: (n,) -> (n,), int64."""
    owner, order = server["pool_owner"].sort()
    return order[torch.searchsorted(owner, clients.to(owner.device))]


def blocks(pool: Tensor, rows: Tensor | None = None) -> Iterator[Tensor]:
    """Yield prompts a few rows at a time, in float64: (m, ...) each.

    Copies of a pool of a thousand would tear holes into the heap.
    """
    width = max(1, pool[:1].numel())
    count = max(1, _BLOCK // (8 * width))
    parts = pool.split(count) if rows is None else (pool[p] for p in rows.split(count))
    for part in parts:
        yield part.double()


def refreshed(server: State, uploads: Mapping[int, Upload], marks: Mapping[str, int]) -> State:
    """Return the tensors of the pool with new uploads, in place of their clients' former ones.

    Parameters
    ----------
    server : State
        Not changed.
    uploads : mapping from client to Upload
        With ``ctx``.
    marks : mapping from name to int
        What else is noted of each that uploads, as ``pool_round``.
    """
    clients = sorted(uploads)
    where = {client: row for row, client in enumerate(server["pool_owner"].tolist())}
    fresh = [client for client in clients if client not in where]
    where |= {client: len(where) + n for n, client in enumerate(fresh)}
    found = {}
    for name in ("pool", "pool_owner", *marks):
        old = server[name]
        found[name] = torch.cat((old, old.new_zeros(len(fresh), *old.shape[1:])))
    for client in clients:
        row = where[client]
        found["pool"][row] = uploads[client]["ctx"]
        found["pool_owner"][row] = client
        for name, mark in marks.items():
            found[name][row] = mark
    return found
