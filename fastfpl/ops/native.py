"""The compiled module fastfpl._C: loaded when first used, with the reason when it is absent."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

from fastfpl import __path__ as _HOMES
from fastfpl.errors import NotBuilt

__all__ = ["BUILD", "load", "missing"]

#: What builds the module, in a checkout.
BUILD = "FASTFPL_REQUIRE_NATIVE=1 pip install -e . --force-reinstall --no-deps"


@functools.cache
def _find() -> ModuleType | str:
    """Import the module, or say why it cannot be."""
    try:
        return importlib.import_module("fastfpl._C")
    except ImportError as error:
        notes = [Path(folder) / "_C.missing.txt" for folder in _HOMES]
        if isinstance(error, ModuleNotFoundError) and error.name == "fastfpl._C":
            for note in notes:
                if note.exists():
                    why = note.read_text(encoding="utf-8").strip()
                    return f"fastfpl._C could not be compiled ({why})"
            return "fastfpl._C is not compiled"
        return f"fastfpl._C does not load ({error})"


def missing(entry: str | None = None) -> list[str]:
    """Say why the module, or one entry point of it, is absent; an empty list when it is there."""
    found = _find()
    if isinstance(found, str):
        return [f"{found}; build it with {BUILD}"]
    if entry is not None and not hasattr(found, entry):
        return [f"fastfpl._C is older than its sources: it lacks {entry}; rebuild it with {BUILD}"]
    return []


def load(entry: str | None = None) -> ModuleType:
    """Return the module, or raise `NotBuilt` with the command that builds it.

    Parameters
    ----------
    entry : str, optional
        An entry point that the module must have, e.g. ``"transport_plan"``.
    """
    found = _find()
    reasons = missing(entry)
    if reasons or isinstance(found, str):
        raise NotBuilt("fastfpl: " + "; ".join(reasons))
    return found
