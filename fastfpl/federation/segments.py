"""What a checkpoint says of each client, written so that a round costs what has changed in it.

The checkpoint's own JSON says it of the clients that changed lately. When these are many they move
into a file of their own, a segment, with those of older segments that are not much longer: each
entry is written a few times in a run, and there are few segments. Of what is said of a client
twice the newer counts: the JSON's, then that of the later segment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfpl.errors import Damaged
from fastfpl.files import announce, digest_of, own_folder, read_file, write_new
from fastfpl.system import flush

__all__ = ["Segments", "read_segments", "segment_files"]

# clients of which the checkpoint itself speaks
_YOUNG = 1000


@dataclass(frozen=True)
class _Segment:
    number: int
    digest: str
    clients: frozenset[int]


class Segments:
    """Which clients have changed since they were last written down, and where the others are."""

    def __init__(self) -> None:
        self._young: set[int] = set()
        self._old: list[_Segment] = []
        self._gone: list[int] = []
        self._next = 0

    def touch(self, client: int) -> None:
        """Note that something else is to be said of a client."""
        self._young.add(client)

    def clear(self) -> None:
        """Note that nothing is to be said of anybody."""
        self._young.clear()
        self._gone += [segment.number for segment in self._old]
        self._old.clear()

    def settle(
        self, folder: Path | None, written: Callable[[int], Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Write a segment if it is time to; return what the checkpoint says itself, and the rest.

        Parameters
        ----------
        folder : Path or None
            Of the states; None of states that no checkpoint names.
        written : callable
            ``written(client)`` is what is to be said, JSON.
        """
        if folder is not None and len(self._young) > _YOUNG:
            clients = set(self._young)
            while self._old and len(self._old[-1].clients) <= 2 * len(clients):
                segment = self._old.pop()
                clients |= segment.clients
                self._gone.append(segment.number)
            folder.mkdir(parents=True, exist_ok=True)
            own_folder(folder)
            while _path(folder, self._next).exists():  # somebody else's
                self._next += 1
            path = _path(folder, self._next)
            content = json.dumps({str(c): written(c) for c in sorted(clients)}).encode()
            write_new(path, content)
            flush(path)
            self._old.append(_Segment(self._next, digest_of(content), frozenset(clients)))
            self._next += 1
            self._young.clear()
        if folder is not None:
            for number in self._gone:
                announce(_path(folder, number))
        young = {str(client): written(client) for client in sorted(self._young)}
        return young, [{"number": s.number, "blake2b": s.digest} for s in self._old]

    def sweep(self, folder: Path | None) -> None:
        """Remove the segments that no checkpoint names any more."""
        if folder is not None:
            for number in self._gone:
                _path(folder, number).unlink(missing_ok=True)
        self._gone.clear()

    def restore(
        self,
        young: Iterable[str],
        named: Sequence[Mapping[str, Any]],
        said: Sequence[Iterable[str]],
    ) -> None:
        """Take up whom a checkpoint speaks of itself, and of whom each of its segments does."""
        self._young = {int(client) for client in young}
        self._old = [
            _Segment(segment["number"], segment["blake2b"], frozenset(map(int, clients)))
            for segment, clients in zip(named, said, strict=True)
        ]
        self._next = max((s.number for s in self._old), default=-1) + 1


def read_segments(folder: Path, named: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read what each of the segments says of clients; the later ones are the newer.

    Raises
    ------
    Damaged
        If one is missing, truncated or changed.
    """
    return [_read(folder, segment) for segment in named]


def segment_files(folder: Path, named: Sequence[Mapping[str, Any]]) -> set[Path]:
    """Return the files of segments."""
    return {_path(folder, segment["number"]) for segment in named}


def _read(folder: Path, segment: Mapping[str, Any]) -> dict[str, Any]:
    path = _path(folder, segment["number"])
    try:
        content = read_file(path)
    except OSError as error:
        raise _damaged(path, f"{type(error).__name__}: {error.strerror}") from None
    if digest_of(content) != segment["blake2b"]:
        raise _damaged(path, "its checksum is not the one that was written")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(path, type(found).__name__)
    return found


def _path(folder: Path, number: int) -> Path:
    return folder / f"index-{number:05d}.json"


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.run: {path} must say where the states of clients are; got {reason}; nothing was "
        "changed, start again with another out"
    )
