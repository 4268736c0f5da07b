"""The kinds of errors and the shape of their sentences.

A message has one sentence: ``fastfpl.<op>: <argument> must <rule>; got <value>``. Everything that a
user can cause derives from `FastfplError`; the command line turns it into exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "Damaged",
    "Differs",
    "FastfplError",
    "InputError",
    "KindError",
    "Missing",
    "NotBuilt",
    "NotConverged",
    "NotSupported",
    "near",
]


class FastfplError(Exception):
    """Anything that a user's input, files or machine can cause."""


class InputError(FastfplError, ValueError):
    """A value, shape or combination that is refused."""


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


class NotBuilt(FastfplError, ImportError):
    """A compiled part is absent; the message names the command that builds it."""


class NotConverged(FastfplError, RuntimeError):
    """An iteration ended above its tolerance; the message gives residual and iterations."""


class NotSupported(FastfplError, NotImplementedError):
    """No face of an op takes these inputs; the message gives one reason a face."""


def near(name: str, known: Iterable[str]) -> str:
    """Say which known names resemble ``name``, or list them all."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=4, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(options[:40]) + (", ..." if len(options) > 40 else "")
    return f"; known: {shown}"
