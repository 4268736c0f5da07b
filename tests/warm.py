"""Processes of tests that begin with torch and open_clip imported (`fastfpl.warm`).

    subprocess.run([*warm_python(), "-c", code], ...)  # or -m module

The library itself is imported by each anew. Not for tests of what imports do.
"""

from __future__ import annotations

import functools
import weakref
from pathlib import Path

from fastfpl.warm import Warm

__all__ = ["warm_python"]

#: Imported once; nothing here computes, so that there are no threads to lose in a fork.
MODULES = ("torch", "open_clip", "torchvision", "sklearn.datasets", "click", "pydantic")


@functools.cache
def warm_python() -> tuple[str, ...]:
    """Return what to write in place of ``sys.executable``."""
    warm = Warm(MODULES, Path(__file__).resolve().parent.parent)
    weakref.finalize(warm_python, warm.close)
    return warm.command
