"""Files that are whole or not there, that follow no link and take no other file's place.

Every error of a disk becomes a sentence here: `on_disk`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from fastfpl import system
from fastfpl.errors import FastfplError, InputError

__all__ = [
    "Growing",
    "announce",
    "digest_of",
    "growing_elsewhere",
    "on_disk",
    "own_folder",
    "read_file",
    "sweep_parts",
    "temporary_folder",
    "watched",
    "write_all",
    "write_json",
    "write_new",
    "write_text",
    "write_whole",
]

_JOURNAL = "fastfpl-journal-1"
_PRIVATE = re.compile(r"-\d+-[0-9a-f]{8}$")
_TEMPORARY = b"fastfpl-temporary-1"
_CURES = {
    errno.ENOSPC: "free some room there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: "it is mounted read-only",
    errno.EACCES: "give yourself the right to write there",
    errno.EPERM: "give yourself the right to write there",
    errno.EIO: "look after the device, which fails",
    errno.ELOOP: "put no symbolic link there",
}


@contextlib.contextmanager
def on_disk(
    op: str, what: str, path: Path, cure: str, *, rule: str = "be writable and have room"
) -> Iterator[None]:
    """Turn an error of the disk into a sentence: what, where, and the cure.

    Parameters
    ----------
    op, what : str
        ``op: what must be writable and have room; got ...``.
    path : Path
        What was written or read, or the folder it lies in.
    cure : str
        What helps beside the cure of the error itself.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FastfplError):
            raise
        cures = "; ".join(c for c in (_CURES.get(error.errno or 0), cure) if c)
        raise InputError(
            f"{op}: {what} must {rule}; got {type(error).__name__}: {error.strerror or error} at "
            f"{path}; {cures}"
        ) from error


# who is told of files that are about to be made below a folder
_told: dict[Path, Callable[[Path], None]] = {}


@contextlib.contextmanager
def watched(folder: Path, tell: Callable[[Path], None]) -> Iterator[None]:
    """Tell of every file and folder that is about to be made below a folder in this process."""
    _told[folder] = tell
    try:
        yield
    finally:
        del _told[folder]


def announce(path: Path) -> None:
    """Say that a file or folder is about to be made, or that one is about to go."""
    for folder, tell in _told.items():
        if folder in path.parents:
            tell(path)


def write_new(path: Path, content: bytes) -> None:
    """Write a file of a name that is not taken.

    Raises
    ------
    FileExistsError
        If there is anything of that name, a link included.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    announce(path)
    number = system.open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(number, rest) :]
        finally:
            os.close(number)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def digest_of(content: bytes) -> str:
    """Return the checksum that is kept of a file's content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_file(path: Path) -> bytes:
    """Read a regular file; a link, a folder or a pipe is an OSError."""
    number = system.open_plain(path, os.O_RDONLY)
    with os.fdopen(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def own_folder(path: Path) -> None:
    """Make a folder below one that is there; a link to a folder is an OSError."""
    with contextlib.suppress(FileExistsError):
        if not os.path.lexists(path):
            announce(path)
        path.mkdir()
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder of its own", str(path))


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write(temporary)`` make a file beside ``path``, flush it to disk and rename it.

    Raises
    ------
    InputError
        If the disk is full, read-only, or fails; ``path`` is then as it was.
    """
    cure = "or write to another folder"
    with on_disk("fastfpl", "a file's folder", path, cure):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part_of(path)
        write_new(part, b"")
        try:
            write(part)
            system.flush(part)
            system.rename(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    """Draw a name beside ``path`` that nobody else has."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


# -- temporary folders -------------------------------------------------------------------------

# of this process: its number, its folder, and the lock that says so
_mine: tuple[int, Path, int] | None = None


def temporary_folder() -> Path:
    """Make a folder for files that no run keeps, below one folder of this process.

    That one goes with the process; those of processes that were killed are removed now.

    Raises
    ------
    InputError
        If the system's folder for temporary files cannot be written to.
    """
    global _mine
    where = Path(os.environ.get("TMPDIR") or "the system's folder for temporary files")
    with on_disk(
        "fastfpl", "the folder for temporary files", where, "or set TMPDIR to another folder"
    ):
        if _mine is None or _mine[0] != os.getpid():
            where = Path(tempfile.gettempdir())
            _sweep_temporary(where)
            folder = Path(tempfile.mkdtemp(prefix="fastfpl-"))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            number = system.open_plain(folder / ".lock", flags, 0o600)
            if _lock(number):
                os.write(number, _TEMPORARY + b"\n")
            _mine = os.getpid(), folder, number
            atexit.register(_leave, os.getpid(), folder, number)
        return Path(tempfile.mkdtemp(dir=_mine[1]))


def _leave(process: int, folder: Path, number: int) -> None:
    # a forked child leaves its parent's alone
    if os.getpid() == process:
        os.close(number)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep_temporary(where: Path) -> None:
    """Remove the folders of processes that are gone, known by their lock and its line."""
    for folder in where.glob("fastfpl-*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or not system.is_ours(status):
                continue
            number = system.open_plain(folder / ".lock", os.O_RDWR)
            try:
                regular = stat.S_ISREG(os.fstat(number).st_mode)
                ours = regular and _lock(number) and os.read(number, 99).startswith(_TEMPORARY)
            finally:
                os.close(number)
            if ours:
                shutil.rmtree(folder, ignore_errors=True)


def _lock(number: int) -> bool:
    """Lock an open file, if that is possible at once."""
    try:
        return system.lock(number)
    except OSError:
        return False


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all lie whole under temporary names before one is renamed.

    Whatever the disk refuses leaves the files that were there as they were.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _part_of(path)
            write_new(part, content)
            parts[path] = part
            system.flush(part)
        for path in parts:
            # a rename onto a folder fails, and would leave the files before it new
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for path, part in parts.items():
            system.rename(part, path)
    finally:
        for part in parts.values():
            # a disk that is read-only again says so here too
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8", newline="\n")

    write_whole(path, write)


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write JSON; NaN and infinity are refused.

    Indented JSON of many numbers takes many times as long as that of one line.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


class Growing:
    """A file that grows chunk by chunk under a temporary name; a kill does not lose its chunks.

    Whoever opens it first holds it by a lock of the operating system, which dies with the process:
    chunks go into ``.NAME.part``, the checksum of each into ``.NAME.journal``, and the next holder
    goes on after the last chunk that is whole. Whoever comes while it is held does not wait: the
    chunks go into a file of a private name, which nobody goes on with.

    Parameters
    ----------
    path : Path
        The name that the file gets in the end.
    facts : mapping
        What the chunks depend on, JSON: chunks that were written under other facts do not count.

    Attributes
    ----------
    shared : bool
        Whether another process may go on with it; not, if it is private.
    locks : bool
        Whether locks work there: then what is private is so because another process holds the
        part, or may not share it.
    note : Any
        What `begin` was told by a process that is gone, None if nothing can be gone on with.

    Notes
    -----
    On a file system without locks every file is private. Chunks are not forced to the disk one by
    one: what the machine itself loses is found by the checksums.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._facts = {"format": _JOURNAL, "facts": dict(facts)}
        self._part = path.with_name(f".{path.stem}.part")
        self._journal: BinaryIO | None = None
        self._first = b""  # line of the journal
        self._sums: list[bytes] = []
        self._chunks = 0
        self._named = False
        self.note: Any = None
        file = _hold(self._part)
        journal = None if file is None else _opened(_journal_of(self._part))
        if file is None or journal is None:
            if file is not None:
                file.close()
            private = f".{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.part"
            self._part = path.with_name(private)
            self._file: BinaryIO = self._part.open("x+b")
            self.shared, self.locks = False, _lock(self._file.fileno())
            return
        self.shared = self.locks = True
        self._file, self._journal = file, journal
        self._read(journal)
        journal.seek(0, os.SEEK_END)

    def __enter__(self) -> Growing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = self._journal is not None and self._chunks > 0 and not self._named
        # removed while they are held, where the system removes what is open
        if system.WINDOWS:
            self._close()
        if not self._named and not kept:
            self._part.unlink(missing_ok=True)
        if self._journal is not None and not kept:
            _journal_of(self._part).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        for file in (self._journal, self._file):
            if file is not None:
                # of a full disk was told when it was written to
                with contextlib.suppress(OSError):
                    file.close()

    def _read(self, journal: BinaryIO) -> None:
        """Read the note and the checksums of chunks, if they belong to these facts."""
        journal.seek(0)
        first, *sums = journal.read().split(b"\n")
        try:
            head = json.loads(first)
            note = head.pop("note")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return
        if head == self._facts:
            self.note, self._first, self._sums = note, first, sums
            self._chunks = len(sums) - 1  # as it says

    def forget(self) -> None:
        """Go on with nothing that is there."""
        self.note, self._sums, self._chunks = None, [], 0

    def resume(self, offset: int, sizes: Iterable[int]) -> Iterator[bytes]:
        """Yield the chunks that are whole, of these sizes from ``offset`` on; the rest is cut off.

        To be exhausted, before anything is written.
        """
        if self._journal is None or self.note is None:
            return
        there = os.fstat(self._file.fileno()).st_size
        at, whole = offset, [self._first]
        for size, line in zip(sizes, self._sums, strict=False):
            if at + size > there:
                break
            self._file.seek(at)
            data = self._file.read(size)
            if _sum(data) != line:
                break
            yield data
            at += size
            whole.append(line)
        self._chunks = len(whole) - 1
        # its last line may lack its end
        self._journal.seek(0)
        self._journal.write(b"".join(line + b"\n" for line in whole))
        self._journal.truncate()
        self._file.truncate(at)
        self._file.seek(at)

    def begin(self, offset: int, note: Any) -> None:
        """Begin with no chunk at all; the first one will stand at ``offset``, which is not 0."""
        self.note, self._chunks = note, 0
        self._file.truncate(0)
        self._file.seek(offset)
        if self._journal is not None:
            head = json.dumps({**self._facts, "note": note}, sort_keys=True)
            self._journal.truncate(0)
            self._journal.seek(0)
            self._journal.write(head.encode() + b"\n")
            self._journal.flush()

    def append(self, chunk: memoryview | bytes) -> None:
        """Write a chunk, then its checksum."""
        self._file.write(chunk)
        self._file.flush()
        if self._journal is not None:
            self._journal.write(_sum(chunk) + b"\n")
            self._journal.flush()
            self._chunks += 1

    def finish(self, head: bytes) -> None:
        """Write what stands before the first chunk, and give the file its name."""
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        if system.WINDOWS:
            self._close()
        try:
            system.rename(self._part, self._path)
        except OSError:
            # whoever took it since it was closed has given it the same name
            if not system.WINDOWS or not self._path.exists():
                raise
        self._named = True


def growing_elsewhere(path: Path) -> int | None:
    """Count the chunks of a file that another process lets grow; None if nobody holds it.

    Parameters
    ----------
    path : Path
        The name that the file gets in the end.
    """
    part = path.with_name(f".{path.stem}.part")
    try:
        if not stat.S_ISREG(part.lstat().st_mode):
            return None
        with part.open("r+b") as file:
            if _lock(file.fileno()):
                return None
        return max(0, _journal_of(part).read_bytes().count(b"\n") - 1)
    except OSError:
        return None


def _sum(chunk: memoryview | bytes) -> bytes:
    return hashlib.blake2b(chunk, digest_size=16).hexdigest().encode()


def _journal_of(part: Path) -> Path:
    return part.with_suffix(".journal")


def _hold(part: Path) -> BinaryIO | None:
    """Open and lock a file, made if it is not there; None if it cannot be locked at once."""
    while True:
        try:
            file = _opened(part)
        except PermissionError:  # another user's
            return None
        if file is None:
            return None
        if not _lock(file.fileno()):
            file.close()
            return None
        # its last holder may have renamed or removed it after it was opened here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file
        file.close()


def _opened(path: Path) -> BinaryIO | None:
    """Open a file to read and write, made if it is not there; None for a link, pipe or folder."""
    try:
        number = system.open_plain(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            return None
        raise
    file = os.fdopen(number, "r+b")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        return None
    return file


def sweep_parts(
    directory: Path, mine: re.Pattern[str], *, private: float, resumable: float
) -> None:
    """Remove what processes that are gone have left behind.

    Parameters
    ----------
    directory : Path
    mine : pattern
        Of the stems of files that may be removed, without the dot in front; every other file is
        left alone, and so is every link.
    private, resumable : float
        Seconds since the last write after which a file is removed that nobody will go on with, or
        that somebody could; one that is held stays.
    """
    now = time.time()
    for path in (*directory.glob(".*.part"), *directory.glob(".*.journal")):
        stem = path.stem.removeprefix(".")
        alone = _PRIVATE.search(stem) is not None
        if mine.fullmatch(_PRIVATE.sub("", stem)) is None:
            continue
        with contextlib.suppress(OSError):  # another process was faster, or another user's
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_mtime >= now - (private if alone else resumable):
                continue
            if alone or path.suffix == ".journal":
                path.unlink()
                continue
            file = _hold(path)
            if file is not None:
                with file:
                    if not system.WINDOWS:
                        path.unlink()
                if system.WINDOWS:
                    path.unlink()
