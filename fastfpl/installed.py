"""What other installed packages add to the library by entry points; nothing of them is imported."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fastfpl.errors import InputError, shown

__all__ = ["added", "load_added"]


def added(group: str) -> dict[str, metadata.EntryPoint]:
    """List the entry points of a group by name; of two of one name, the first in the path's order.

    Parameters
    ----------
    group : str
        ``fastfpl.methods`` or ``fastfpl.datasets``.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=group):
        found.setdefault(point.name, point)
    return found


def load_added(op: str, point: metadata.EntryPoint) -> Any:
    """Import what an entry point names.

    Raises
    ------
    InputError
        If that fails, whatever the package raises; the sentence names it.
    """
    try:
        return point.load()
    except Exception as error:
        dist = getattr(point, "dist", None)
        package = f" of {dist.name}" if dist is not None else ""
        raise InputError(
            f"{op}: {point.name!r}{package} must be importable from {point.value}; got "
            f"{type(error).__name__}: {shown(str(error))}: mend or uninstall that package"
        ) from error
