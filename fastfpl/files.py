"""Files that are whole or not there: written to a temporary name and renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

__all__ = ["Growing", "sweep_parts", "write_all", "write_json", "write_text", "write_whole"]

_JOURNAL = "fastfpl-journal-1"
_PRIVATE = re.compile(r"-\d+-[0-9a-f]{8}\.part$")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write(temporary)`` make a file beside ``path``, flush it to disk and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all lie whole under temporary names before one is renamed.

    Whatever the disk refuses leaves the files that were there as they were.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path] = path.with_name(f".{path.name}.{os.getpid()}.part")
            parts[path].unlink(missing_ok=True)  # never written through a link
            with parts[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in parts:
            # a rename onto a folder fails, and would leave the files before it new
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            # a disk that is read-only again says so here too
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_whole(path, write)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


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
    note : Any
        What `begin` was told by a process that is gone, None if nothing can be gone on with.

    Notes
    -----
    For POSIX. Elsewhere, and on a file system without ``flock``, every file is private. Chunks
    are not forced to the disk one by one: what the machine itself loses is found by the checksums.
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
        if file is None:
            private = f".{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.part"
            self._part = path.with_name(private)
            self._file: BinaryIO = self._part.open("x+b")
            return
        self._file = file
        try:
            self._journal = _journal_of(self._part).open("a+b")
            self._read(self._journal)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Growing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = self._journal is not None and self._chunks > 0 and not self._named
        if not self._named and not kept:
            self._part.unlink(missing_ok=True)
        if self._journal is not None and not kept:
            _journal_of(self._part).unlink(missing_ok=True)
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
        self._journal.truncate(sum(len(line) + 1 for line in whole))
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
        os.replace(self._part, self._path)
        self._named = True


def _sum(chunk: memoryview | bytes) -> bytes:
    return hashlib.blake2b(chunk, digest_size=16).hexdigest().encode()


def _journal_of(part: Path) -> Path:
    return part.with_suffix(".journal")


def _hold(part: Path) -> BinaryIO | None:
    """Open and lock a file, made if it is not there; None if it cannot be locked at once."""
    if os.name != "posix":
        return None
    import fcntl

    while True:
        try:
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except PermissionError:  # another user's
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its last holder may have renamed or removed it after it was opened here
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            return None
        file.close()


def sweep_parts(directory: Path, *, private: float, resumable: float) -> None:
    """Remove what processes that are gone have left behind.

    Parameters
    ----------
    directory : Path
    private, resumable : float
        Seconds since the last write after which a file is removed that nobody will go on with, or
        that somebody could; one that is held stays.
    """
    now = time.time()
    for path in (*directory.glob(".*.part"), *directory.glob(".*.journal")):
        alone = _PRIVATE.search(path.name) is not None
        with contextlib.suppress(OSError):  # another process was faster, or another user's
            if path.stat().st_mtime >= now - (private if alone else resumable):
                continue
            if alone or path.suffix == ".journal":
                path.unlink()
                continue
            file = _hold(path)
            if file is not None:
                with file:
                    path.unlink()
