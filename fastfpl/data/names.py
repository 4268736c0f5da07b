"""What names of classes, domains and files may hold, and which of them are one to a tokenizer."""

from __future__ import annotations

import html
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastfpl.data.catalogue import Facts
from fastfpl.errors import Damaged

__all__ = ["alike", "both", "flaw", "named", "readable", "shown", "spelling", "tidy"]

# characters that a terminal, a table or a page could obey instead of showing them
_REFUSED = {
    "Cc": "a control character",
    "Cf": "an invisible character",
    "Cs": "half of a character",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
# joiners, which Persian and Hindi are written with, and emoji
_JOINERS = "\u200c\u200d"
_STRAIGHT = str.maketrans(
    {
        **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    }
)
_LONGEST = 200

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _LONGEST
_short.maxlong = 40
_short.maxlevel = 3


def readable(name: str) -> str:
    """Return a class name as a person would write it: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def flaw(name: str) -> str:
    """Name the first character that no name may hold; empty if there is none."""
    if name.isprintable():
        return ""
    for character in name:
        kind = _REFUSED.get(unicodedata.category(character))
        if kind and character not in _JOINERS:
            return f"{kind}, U+{ord(character):04X}"
    return ""


def shown(value: object) -> str:
    """Return a value for a sentence: its repr, cut where it is long or deep, nothing to obey."""
    return tidy(_short.repr(value))


def tidy(text: object) -> str:
    """Return text for a sentence: one line, cut where it is long, what cannot be seen escaped."""
    line = " ".join(str(text).split())
    if len(line) > 2 * _LONGEST:
        line = f"{line[:_LONGEST]}...{line[-_LONGEST:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def spelling(name: str) -> str:
    """Return what CLIP's tokenizers make of a name before they split it.

    Entities are resolved, accents composed, quotation marks straight, letters small.
    """
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(name)))
    return readable(text.translate(_STRAIGHT).lower())


def both(one: str, other: str) -> str:
    """Return two names for a sentence, by code points where they look the same."""
    same = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    return f"{one!a} and {other!a}" if same else f"{shown(one)} and {shown(other)}"


def alike(names: Iterable[str]) -> tuple[int, int] | None:
    """Return the places of the first two names of one spelling."""
    first: dict[str, int] = {}
    for place, name in enumerate(names):
        if first.setdefault(spelling(name), place) != place:
            return first[spelling(name)], place
    return None


def named(facts: Facts, names: Mapping[int, str], where: Path) -> tuple[str, ...]:
    """Order class names by label, or refuse labels with gaps or out of range, and equal names."""
    high = max(names, default=-1)
    if not names or min(names) < 0 or high >= facts.classes:
        got = f"label {shown(min(names) if min(names) < 0 else high)}" if names else "no class"
        raise Damaged(
            f"{facts.op}: labels of {where} must lie in [0, {facts.classes}); got {got}: "
            "get the file again"
        )
    gaps = sorted(set(range(high)) - set(names))
    if gaps:
        raise Damaged(
            f"{facts.op}: {where} must name every class from 0 to {high}; got none for label "
            f"{gaps[0]}"
        )
    ordered = tuple(readable(names[label]) for label in range(high + 1))
    for label, name in enumerate(ordered):
        if flaw(name):
            raise Damaged(
                f"{facts.op}: class names of {where} must be text that can be seen; got "
                f"{shown(name)} with {flaw(name)} for label {label}: write it without"
            )
        if not spelling(name):
            raise Damaged(
                f"{facts.op}: class names of {where} must not be empty; got label {label}"
            )
    two = alike(ordered)
    if two is not None:
        one, other = (ordered[label] for label in two)
        labels = f"labels {two[0]} and {two[1]}"
        if one == other:
            raise Damaged(
                f"{facts.op}: class names of {where} must be unique; got {shown(one)} for "
                f"{labels}: tell the two apart"
            )
        raise Damaged(
            f"{facts.op}: class names of {where} must differ to CLIP, which sees no capitals, "
            f"entities, forms of accents or curls of quotation marks; got {both(one, other)} "
            f"for {labels}: tell the two apart by a word"
        )
    return ordered
