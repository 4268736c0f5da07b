"""Another system's rules on this one: modules that it lacks, and files that it keeps while open."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LACKS = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
LACKED = (
    *("fork", "geteuid", "getuid", "killpg", "mkfifo", "sched_getaffinity"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY"),
)


def without_posix() -> None:
    """Hide what POSIX alone has; before anything else is imported.

    The two libraries that ask each system in its own way keep this one's.
    """
    import filelock
    import psutil

    assert psutil.LINUX
    assert filelock.has_fcntl
    for name in LACKS:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in LACKED:
        delattr(os, name)


def windows_files() -> None:
    """Refuse to rename, replace or remove what this process has open or mapped."""
    from fastfpl import system

    system.WINDOWS = True

    def kept(path: object) -> bool:
        """Whether it is open here, or mapped."""
        try:
            want = os.path.realpath(os.fspath(path))  # type: ignore[call-overload]
            status = os.lstat(want)
        except OSError:
            return False
        for number in os.listdir("/proc/self/fd"):
            try:
                if os.path.samestat(os.stat(f"/proc/self/fd/{number}"), status):
                    return True
            except OSError:
                continue
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        return any(line.endswith(want) for line in maps.splitlines())

    def refusing(function, every):  # type: ignore[no-untyped-def]
        def asked(*paths, **named):  # type: ignore[no-untyped-def]
            for path in paths[: 2 if every else 1]:
                if kept(path):
                    raise PermissionError(13, "it is open", str(path))
            return function(*paths, **named)

        return asked

    os.replace, os.rename = refusing(os.replace, True), refusing(os.rename, True)
    os.unlink, os.remove = refusing(os.unlink, False), refusing(os.remove, False)
