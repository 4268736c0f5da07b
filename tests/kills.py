"""A process that is killed before a change of a file: run in a child, as Linux shows files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

__all__ = ["killed_at"]


def killed_at(folder: str, at: int, play: Callable[[Callable[[], int]], None]) -> int:
    """Fork, and die before the at-th change of a file below a folder; return the child's status.

    ``play(count)`` is called in the child; ``count()`` is how many changes there were so far. With
    ``at=0`` nobody dies.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = [0]

    def before(function, place=0):  # type: ignore[no-untyped-def]
        def counted(*values, **named):  # type: ignore[no-untyped-def]
            path = values[place]
            if isinstance(path, int) and place == 0:
                path = os.readlink(f"/proc/self/fd/{path}")
            opening = function is os_open and not values[1] & os.O_CREAT
            if str(path).startswith(folder) and not opening:
                count[0] += 1
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*values, **named)

        return counted

    os_open = os.open
    for name in ("open", "write", "ftruncate", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, before(getattr(os, name)))
    os.replace = before(os.replace, 1)
    Path.write_bytes = before(Path.write_bytes)  # type: ignore[method-assign]
    try:
        play(lambda: count[0])
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)
