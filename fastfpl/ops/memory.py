"""How much memory a pass may take: a number of bytes that ops look up, set for a block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction

from fastfpl.errors import InputError, KindError, shown

__all__ = ["current_limit", "memory_limit", "parse_bytes"]

_UNITS = {"": 1, "B": 1} | {
    prefix + infix + "B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_limit: ContextVar[int | None] = ContextVar("fastfpl_memory_limit", default=None)


def parse_bytes(op: str, value: int | str, name: str = "max_memory") -> int:
    """Read a positive number of bytes such as ``1500000000``, ``"2GiB"`` or ``"1.5 GB"``.

    Parameters
    ----------
    op : str
        Who asks, for the sentence of a refusal.
    value : int or str
        Units are B, KB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024).
    name : str
        Of the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise KindError(
            f"{op}: {name} must be bytes or a text such as '2GiB'; got {type(value).__name__}"
        )
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    text = value.lower() if isinstance(value, str) else shown(value)
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in units:
        raise InputError(f"{op}: {name} must be bytes or a text such as '2GiB'; got {shown(value)}")
    count = int(Fraction(match[1]) * units[match[2]])
    if count < 1:
        raise InputError(f"{op}: {name} must be positive; got {shown(value)}")
    return count


def current_limit() -> int | None:
    """Return the bytes that the activations of one pass may take, None for no limit."""
    return _limit.get()


@contextmanager
def memory_limit(limit: int | None) -> Iterator[None]:
    """Bound the activations of every pass inside the block; None lifts the bound."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)
