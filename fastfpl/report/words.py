"""Figures and settings as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fastfpl.data import scheme_of
from fastfpl.terminal import plain

__all__ = [
    "NONE",
    "count",
    "duration",
    "listed",
    "percent",
    "public",
    "rate",
    "size",
    "unformulated",
]

#: Stands where there is no figure or value: an en dash.
NONE = "\u2013"


def percent(share: float) -> str:
    """Write a share of 1 in percent, without the sign: 0.6132 -> ``61.3``."""
    return f"{100 * share:.1f}"


def size(number: float) -> str:
    """Write bytes in decimal units: 32768 -> ``33 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        # 999.5 would be written as 1000
        if number < 999.5:
            small = unit != "B" and number < 9.95
            return f"{number:.1f} {unit}" if small else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """Write a time: 4.21 -> ``4.2 s``, 1500 -> ``25 min``."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 999.5:
        return f"{seconds:.0f} s"
    if seconds < 7170:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def rate(number: float) -> str:
    """Write a number a second: 12345.6 -> ``12,346``."""
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"


def count(number: int, thing: str) -> str:
    """Count things: (1, "seed") -> ``1 seed``, (3, "seed") -> ``3 seeds``."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def listed(values: Sequence[Any], word: str = "and") -> str:
    """Join values: ``a, b and c``."""
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {word} {texts[-1]}"


_ABSOLUTE = re.compile(r"^(file:|~|/|\\\\|[A-Za-z]:[\\/])")


def public(value: Any) -> str:
    """Write a setting for people; of a path, only its last name, never where it lies."""
    if value is None:
        return NONE
    if isinstance(value, dict):
        return ", ".join(f"{k}={public(v)}" for k, v in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(public(v) for v in value) or NONE
    text = str(value)
    # of one's own images the place may be a path too
    scheme = scheme_of(text)
    before, place = ("", text) if scheme is None else (f"{scheme}:", text[len(scheme) + 1 :])
    if _ABSOLUTE.match(place):
        last = PureWindowsPath(PurePosixPath(place).name).name
        return f"{before}…/{last}"
    return text


def unformulated(text: str) -> str:
    """Write a text so that no spreadsheet takes it for a formula."""
    text = plain(text)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
