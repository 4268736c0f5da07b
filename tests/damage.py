"""What takes the place of a value where JSON is damaged at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**70, 1e300, -0.5, 1.5, "", "x", "\x1b[31m", [], {}, [None], {"": 1}),
    *([0.5], ["a"], {"a": 0.5}, [[]], "9" * 300, [1e308] * 2),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])
