"""Text files of a data set: lines and JSON, or a sentence that says what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastfpl.data.catalogue import Facts
from fastfpl.data.folders import kind_of
from fastfpl.data.names import shown, tidy
from fastfpl.errors import Damaged

__all__ = ["bad_line", "lines", "read_json", "slashed", "whole"]

# nobody counts further, and longer ones are slow or refused to become integers
_WHOLE = re.compile(r"[0-9]{1,9}")


def lines(facts: Facts, path: Path) -> list[str]:
    """Return the lines of a text file without their ends, and without empty ones."""
    return [line.strip() for line in _text(facts, path).splitlines() if line.strip()]


def read_json(facts: Facts, path: Path, source: str) -> Any:
    """Read a JSON file, in which no key of an object may stand twice."""
    text = _text(facts, path)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{facts.op}: {path} must be JSON; got {tidy(error)}: get it again from {source}"
        ) from error


def bad_line(facts: Facts, path: Path, number: int, rule: str, line: str) -> Damaged:
    """Make the error of a line, counted from 1, that breaks the rule of its file."""
    return Damaged(f"{facts.op}: line {number} of {path} must hold {rule}; got {shown(line)}")


def slashed(path: str) -> str:
    """Return a path of a list with ``/`` between folders, also where Windows wrote it."""
    return path.replace("\\", "/")


def whole(text: str) -> int | None:
    """Return the whole number that a text is, or None if it is none of at most nine digits."""
    return int(text) if _WHOLE.fullmatch(text) else None


def _text(facts: Facts, path: Path) -> str:
    kind = kind_of(path)
    try:
        if kind != "a file":
            raise ValueError(kind)
        # Windows marks what it writes as UTF-8 by a first character of its own
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise Damaged(f"{facts.op}: {path} must be text in UTF-8; got {tidy(error)}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} twice")
    return found
