"""What operating systems do differently, and nowhere else: locks, renames, memory, processes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from filelock import lock_descriptor

__all__ = [
    "FORKS",
    "WINDOWS",
    "end_tree",
    "flush",
    "forget_peak",
    "is_ours",
    "lock",
    "open_plain",
    "peak_resident",
    "rename",
    "resident",
]

#: Whether files that are open can neither be renamed nor removed, and locks keep readers out.
WINDOWS = os.name == "nt"
#: Whether a process may be forked that has imported what knows threads and frameworks.
FORKS = sys.platform.startswith("linux")
# seconds that a rename waits for whoever has one of the two files open
_PATIENCE = 5.0


def open_plain(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a file to bytes; a link is an OSError (ELOOP), and a pipe is not waited for.

    Returns
    -------
    int
        Its descriptor, as of `os.open`.
    """
    unlinked = getattr(os, "O_NOFOLLOW", 0)
    if not unlinked and os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    flags |= unlinked | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, mode)


def lock(number: int) -> bool:
    """Lock an open file against every other process, if that is possible at once.

    The lock is the operating system's: it ends when the file is closed, however its process ends.
    On Windows nobody else can read the first byte of a file that is locked.

    Parameters
    ----------
    number : int
        Descriptor, open to write.

    Returns
    -------
    bool
        False if another one holds it.

    Raises
    ------
    OSError
        If the file system or the system has no locks.
    """
    return lock_descriptor(number, blocking=False)


def flush(path: Path) -> None:
    """Let a file's content reach the disk."""
    with path.open("r+b") as file:  # Windows flushes only what is open to write
        os.fsync(file.fileno())


def rename(part: Path, path: Path) -> None:
    """Give a file its name, in the place of one that may be there.

    Windows refuses it while anybody has one of the two open, a virus scanner too: it is asked
    again for a few seconds.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.replace(part, path)
        except PermissionError:
            if not WINDOWS or time.monotonic() > end:
                raise
            time.sleep(0.05)


def is_ours(status: os.stat_result) -> bool:
    """Whether a file is this user's; Windows does not say, and has temporary folders a user."""
    user = getattr(os, "geteuid", None)
    return user is None or status.st_uid == user()


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    """Let `peak_resident` count from now on, where the system can: Linux."""
    # some containers forbid it; the figure is then that of the process so far
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> int:
    """Return the largest bytes of memory that this process had since it began or `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():  # the one that can be forgotten
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    said = psutil.Process().memory_info()
    if hasattr(said, "peak_wset"):  # Windows
        return int(said.peak_wset)
    try:
        import resource
    except ImportError:
        return int(said.rss)  # no system is known that says none of the three
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others kibibytes
    return peak if psutil.MACOS else peak * 1024


def end_tree(process: subprocess.Popen[bytes], *, kill: bool) -> None:
    """Ask a process and all that it started to end, or kill them; nothing if they are gone.

    Parameters
    ----------
    process : Popen
        Begun with ``start_new_session=True``.
    kill : bool
    """
    if hasattr(os, "killpg"):
        # what it started has its group, and may outlive it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for one in (*first.children(recursive=True), first):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill() if kill else one.terminate()
