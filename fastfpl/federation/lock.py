"""One run at a time in a folder, held by a lock that dies with its process and names its files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Set
from pathlib import Path

from fastfpl import system
from fastfpl.errors import Busy, InputError
from fastfpl.files import on_disk, watched

__all__ = ["LOCK", "Held", "alone_in"]

LOCK = ".lock"
_FORMAT = "fastfpl-run-1"
# what a run may name as its own; whatever else stands in a lock is no name of ours
_OURS = re.compile(
    r"checkpoint-\d{5}(-\d+)?\.safetensors"
    r"|\.[\w.-]+\.\d+-[0-9a-f]{8}\.part"
    r"|\.uploads-[0-9a-f]{8}"
    r"|clients|downloads|tuned|joined"
    r"|joined/\.[\w.-]+\.\d+-[0-9a-f]{8}\.part"
    # of many clients each thousand has a folder of its own
    r"|clients/\d{3,}"
    r"|clients/(\d{3,}/)?\d{5,}-\d{5,}\.safetensors"
    r"|(clients|downloads|tuned)/index-\d{5,}\.json"
    r"|(downloads|tuned)/\d{5}\.safetensors"
)


class Held:
    """A folder that one run holds, and the files that it has made there and not yet written down.

    A file's name is in the lock before the file is there, until a checkpoint names it: whoever
    comes after a kill removes what the lock names and no checkpoint does, and nothing else.

    Parameters
    ----------
    folder : Path
    lock : int
        Descriptor of the open and locked file.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock
        self._names = _names(lock)
        self._begin()

    def claim(self, path: Path) -> None:
        """Write a name down as one of ours."""
        name = path.relative_to(self.folder).as_posix()
        if _OURS.fullmatch(name) is not None and name not in self._names:
            self._names[name] = None
            line = json.dumps(name) + "\n"
            with on_disk("fastfpl.run", "out", self.folder, "or name another out"):
                os.lseek(self._lock, 0, os.SEEK_END)
                os.write(self._lock, line.encode())

    def sweep(self, named: Set[Path], below: str = "") -> None:
        """Remove what the lock names and ``named`` does not, then forget the names.

        Parameters
        ----------
        named : set of Path
            What a checkpoint names.
        below : str
            Only a folder of this name and what lies in it; what else the lock names stays named.
        """
        folders = []
        mine = [n for n in self._names if not below or n.split("/")[0] == below]
        for name in mine:
            path = self.folder / name
            with contextlib.suppress(OSError):
                # nothing below a link is ours
                above = [p for p in path.parents if self.folder in p.parents]
                if path in named or any(p.is_symlink() for p in above):
                    continue
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    path.unlink()
                elif stat.S_ISDIR(mode) and name.startswith(".uploads-"):
                    shutil.rmtree(path)
                elif stat.S_ISDIR(mode):
                    folders.append(path)
        for path in sorted(folders, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):  # somebody else's files are in it
                path.rmdir()
        for name in mine:
            del self._names[name]
        self._begin()

    def settle(self) -> None:
        """Forget the names: a checkpoint has them."""
        self._names.clear()
        self._begin()

    def release(self, made: list[Path]) -> None:
        """Let go; the lock's file stays if it still names files."""
        mine = False
        with contextlib.suppress(OSError):
            left = any(os.path.lexists(self.folder / name) for name in self._names)
            mine = not left and _in_place(self._lock, self.folder)
            # removed while it is held: who opened it before finds that it is no longer there
            if mine and not system.WINDOWS:
                (self.folder / LOCK).unlink()
        os.close(self._lock)
        with contextlib.suppress(OSError):
            # there nobody can remove what another one has opened
            if mine and system.WINDOWS:
                (self.folder / LOCK).unlink()
            for path in made:
                path.rmdir()

    def _begin(self) -> None:
        """Write the first line, and the names that are left."""
        lines = [f"{_FORMAT} {os.getpid()} {platform.node()}", *map(json.dumps, self._names)]
        with contextlib.suppress(OSError):  # claims are refused where nothing can be written
            content = "".join(f"{line}\n" for line in lines).encode()
            os.lseek(self._lock, 0, os.SEEK_SET)
            os.write(self._lock, content)
            os.ftruncate(self._lock, len(content))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[Held]:
    """Hold a folder, made if it is not there, against every other run.

    The lock is the operating system's (`fastfpl.system.lock`), not the file's being there: a
    process that is killed leaves ``.lock`` behind but holds nothing. The file names its process,
    its machine and the files that no checkpoint names yet (`Held`); it is removed at the end, and
    with it the folders that were made and stayed empty.

    Raises
    ------
    InputError
        If another run holds the folder, it cannot be written to, or ``.lock`` is a link or
        something else than a run's.

    Notes
    -----
    On a network file system the lock holds against other machines where its server has locks. A
    file system without locks gets a warning and none.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    held = Held(folder, _take(folder))
    try:
        with watched(folder, held.claim):
            yield held
    finally:
        held.release(made)


def _take(folder: Path) -> int:
    """Open and lock the folder's file; return its descriptor. No foreign file is touched."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = system.open_plain(folder / LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _foreign(folder) from None
            raise InputError(
                f"fastfpl.run: out must be a folder that can be written to; got {folder}: "
                f"{error.strerror}"
            ) from None
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                raise _foreign(folder)
            try:
                free = system.lock(lock)
            except OSError as error:
                warnings.warn(
                    f"fastfpl.run: {folder} cannot be locked ({error.strerror}); start no other "
                    "run there",
                    stacklevel=2,
                )
                free = True
            if not free:
                raise _taken(folder, lock)
            if _in_place(lock, folder):
                # one that is empty was made by a process that did not get any further
                first = os.read(lock, len(_FORMAT))
                if first not in (b"", _FORMAT.encode()):
                    raise _foreign(folder)
                return lock
        except BaseException:
            os.close(lock)
            raise
        # its last holder removed it after it was opened here
        os.close(lock)


def _names(lock: int) -> dict[str, None]:
    """Read which files the last holder made and did not write down, in their order."""
    size = os.fstat(lock).st_size
    os.lseek(lock, 0, os.SEEK_SET)
    found: dict[str, None] = {}
    for line in os.read(lock, size).split(b"\n")[1:]:
        with contextlib.suppress(ValueError, RecursionError):  # the last one may be half written
            name = json.loads(line)
            if isinstance(name, str) and _OURS.fullmatch(name):
                found[name] = None
    return found


def _taken(folder: Path, lock: int) -> Busy:
    # empty if the other process has only just taken it; the first byte may be its holder's alone
    os.lseek(lock, 1, os.SEEK_SET)
    first = os.read(lock, 400).split(b"\n")[0].decode("utf-8", "replace")
    number, _, machine = first.removeprefix(_FORMAT[1:]).strip().partition(" ")
    holder = f"process {number}" if number.isdigit() else "another process"
    if machine not in ("", platform.node()):
        holder += f" on {machine}"
    return Busy(
        f"fastfpl.run: out must be used by one run at a time; got {folder}, where {holder} "
        "is running; wait for it or name another folder"
    )


def _foreign(folder: Path) -> InputError:
    return InputError(
        f"fastfpl.run: out must have no {LOCK} but a run's; got a link or another program's at "
        f"{folder / LOCK}; remove it or name another out"
    )


def _in_place(lock: int, folder: Path) -> bool:
    """Whether the folder's file is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(lock), (folder / LOCK).lstat())
    except FileNotFoundError:
        return False
