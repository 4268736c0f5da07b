"""What launches read beside their arguments: tables that caches hold, and let go of again.

A captured graph knows what it reads by address alone. Whoever captures keeps what was read inside
the block as long as the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["keep", "kept"]

T = TypeVar("T")

_kept: ContextVar[list[Any] | None] = ContextVar("fastfpl_kept", default=None)


def keep(cached: T) -> T:
    """Return something out of a cache, and leave it to the `kept` block around, if there is one."""
    held = _kept.get()
    if held is not None:
        held.append(cached)
    return cached


@contextmanager
def kept() -> Iterator[list[Any]]:
    """Collect what is taken out of caches inside the block."""
    held: list[Any] = []
    token = _kept.set(held)
    try:
        yield held
    finally:
        _kept.reset(token)
