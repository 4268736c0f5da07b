"""The kinds of errors and the shape of their sentences.

A message has one sentence: ``fastfpl.<op>: <argument> must <rule>; got <value>``. Everything that a
user can cause derives from `FastfplError`; the command line turns it into exit code 2.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "Busy",
    "Damaged",
    "Differs",
    "Disconnected",
    "FastfplError",
    "InputError",
    "KindError",
    "Missing",
    "NotBuilt",
    "NotConverged",
    "NotSupported",
    "cut",
    "near",
    "shown",
]


class FastfplError(Exception):
    """Anything that a user's input, files or machine can cause."""


class InputError(FastfplError, ValueError):
    """A value, shape or combination that is refused."""


class Busy(InputError):
    """A folder in which another run is going on."""


class KindError(FastfplError, TypeError):
    """A dtype or a kind of object that is refused."""


class Missing(FastfplError, FileNotFoundError):
    """A file, weight or optional package that is not there; the message names the cure."""

    def __str__(self) -> str:
        return str(self.args[0])


class Damaged(FastfplError, RuntimeError):
    """A file that is truncated, changed or not ours."""


class Differs(FastfplError, ArithmeticError):
    """A fast pass and the original gave different numbers; the message names the module."""


class Disconnected(FastfplError, ConnectionError):
    """Another process of a run that is gone, or that was never met."""


class NotBuilt(FastfplError, ImportError):
    """A compiled part is absent; the message names the command that builds it."""


class NotConverged(FastfplError, RuntimeError):
    """An iteration ended above its tolerance; the message gives residual and iterations."""


class NotSupported(FastfplError, NotImplementedError):
    """No face of an op takes these inputs; the message gives one reason a face."""


# what people call what has another name here
_ALSO = {
    **{"gpu": "cuda", "nvidia": "cuda", "learningrate": "lr"},
    **{"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"},
}


def near(name: str, known: Iterable[str]) -> str:
    """Say which known names resemble ``name``, or list them all.

    Case and punctuation count for little: ``vit-b16`` is ``ViT-B-16``.
    """
    options = sorted(known)
    asked = _plain(name[:100])
    plain = {option: _plain(option) for option in options}
    also = [option for option in options if _ALSO.get(asked) == option]
    same = [option for option in options if asked and plain[option] == asked]
    alike = {
        option: max(
            difflib.SequenceMatcher(None, asked, text).ratio(),
            # a shorter form is meant by more than its share of the letters
            0.7 if len(asked) > 2 and text.startswith(asked) else 0.0,
        )
        for option, text in plain.items()
    }
    close = sorted((o for o in options if alike[o] >= 0.6), key=lambda o: (-alike[o], len(o), o))
    if found := also or same or close[:4]:
        return "; did you mean " + " or ".join(repr(c) for c in found) + "?"
    shown = ", ".join(options[:40]) + (", ..." if len(options) > 40 else "")
    return f"; known: {shown}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def cut(text: str, most: int = 100) -> str:
    """Shorten a text in its middle."""
    if len(text) <= most:
        return text
    half = most // 2 - 2
    return f"{text[:half]} ... {text[-half:]}"


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Write a number out unless Python would refuse to."""
        return repr(x) if x.bit_length() < 400 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Write a value as Python does, but never more than a line of it."""
    return cut(_SHORT.repr(value), 300)
