"""States of clients on disk: one safetensors file a client, read when its cohort runs."""

from __future__ import annotations

import os
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastfpl.errors import Damaged
from fastfpl.federation.segments import Segments
from fastfpl.files import (
    announce,
    digest_of,
    on_disk,
    own_folder,
    read_file,
    temporary_folder,
    write_new,
)
from fastfpl.system import flush

__all__ = ["CLIENTS", "Intact", "StateFiles", "StoredState", "scratch", "state_path"]

#: Folder of the clients' states beside a run's checkpoint.
CLIENTS = "clients"


# clients whose states lie in one folder
_TOGETHER = 1000
_SEEN: dict[tuple[str, ...], tuple[str, ...]] = {}
_READABLE = "be readable and as it was written"


def scratch(owner: object, beside: Path | None) -> Path:
    """Make a folder that goes when ``owner`` does: below a run's folder, or a temporary one."""
    if beside is None:
        folder = temporary_folder()
    else:
        folder = beside / f".uploads-{secrets.token_hex(4)}"
        with on_disk("fastfpl.run", "out", folder, "or name another out"):
            own_folder(folder)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


class StoredState(Mapping[str, Tensor]):
    """Named tensors of one client; each is read from disk when it is asked for.

    Parameters
    ----------
    path : Path
    names : tuple of str
    device : torch.device
    file : Intact
        What is known of the file since it was written.
    """

    def __init__(
        self, path: Path, names: tuple[str, ...], device: torch.device, file: Intact
    ) -> None:
        self._path = path
        self._names = names
        self._device = device
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        cure = "go on by resume from the last checkpoint"
        try:
            with (
                on_disk("fastfpl.run", "a client's state", self._path, cure, rule=_READABLE),
                safe_open(self._path, framework="pt") as file,
            ):
                if not self._file.is_as_written():
                    raise _damaged(self._path, "a file that was changed since")
                # a copy: the file's pages are the system's to drop
                tensor: Tensor = file.get_tensor(name).to(self._device, copy=True)
        except SafetensorError as error:
            raise _damaged(self._path, str(error)) from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Intact:
    """A file as it was when all its bytes had been seen; they are read again if it was touched.

    Parameters
    ----------
    path : Path
        Written or read a moment ago.
    digest : str
        Of its content, by `digest_of`.
    seen : bool
        False of a file that another process has written: its bytes are read at the first look.
    """

    def __init__(self, path: Path, digest: str, *, seen: bool = True) -> None:
        self.digest = digest
        self._path = path
        self._identity = _identity(path) if seen else None

    def is_as_written(self) -> bool:
        """Look at the file's place, size and times, and at its bytes if one of these moved."""
        now = _identity(self._path)
        if now == self._identity:
            return True
        if digest_of(read_file(self._path)) != self.digest:
            return False
        self._identity = now
        return True


def _identity(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True)
class _Entry:
    version: int
    names: tuple[str, ...]
    file: Intact


class StateFiles(Mapping[int, StoredState]):
    """States by client, in files; in memory is only what says where they are.

    A new state is a new file: the former one stays until `sweep`, so that a checkpoint which names
    it stays whole however a process ends. No file takes the place of another one, and none is
    removed that was not made here or named by a checkpoint. Every byte is verified by `restore`,
    and again when a file that was touched since is read.

    Parameters
    ----------
    folder : Path, optional
        Where the files lie; it is made with the first one. Without it they lie in a temporary
        folder that lives as long as this object, and former files go at once.
    device : torch.device
        Where tensors are read to.
    beside : Path, optional
        A run's folder, below which the temporary folder is made.

    Attributes
    ----------
    folder : Path or None
    segments : Segments
        How a checkpoint says where the states are.
    named : list of dict
        The segments that `settle` has told of.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        beside: Path | None = None,
    ) -> None:
        self.folder = folder
        self._beside = beside
        self._device = torch.device(device)
        self._entries: dict[int, _Entry] = {}
        self._former: list[Path] = []
        self._unsettled: list[Path] = []
        self._handed: list[Path] = []
        self.segments = Segments()
        self._reserved: dict[int, int] = {}
        self._temporary: Path | None = None
        self._places: dict[int, int] = {}
        self.named: list[dict[str, Any]] = []

    def __getitem__(self, client: int) -> StoredState:
        entry = self._entries[client]
        path = self._path(client, entry.version)
        return StoredState(path, entry.names, self._device, entry.file)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that hold the states."""
        return sum(
            self._path(c, entry.version).stat().st_size for c, entry in self._entries.items()
        )

    def put(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Write the state of a client; an empty one makes no file and leaves what was there."""
        if not state:
            return
        old = self._entries.get(client)
        content = save({name: t.detach().cpu().contiguous() for name, t in state.items()})
        where = self._where()
        what = "the folder of the clients' states"
        with on_disk("fastfpl.run", what, where, self._cure):
            if self.folder is not None:
                where.parent.mkdir(parents=True, exist_ok=True)
                own_folder(where)
            version = self._reserved.pop(client, None)
            if version is None:
                version = self._free(client)
            path = self._path(client, version)
            own_folder(path.parent)
            write_new(path, content)
            written = Intact(path, digest_of(content))
        self._entries[client] = _Entry(version, _names(state), written)
        self.segments.touch(client)
        if old is not None:
            self._former.append(self._path(client, old.version))
        if self.folder is None:
            self.sweep()
        else:
            self._unsettled.append(path)

    def _free(self, client: int) -> int:
        """Return the version of a client's next state, whose name nobody has."""
        old = self._entries.get(client)
        version = 0 if old is None else old.version + 1
        while os.path.lexists(self._path(client, version)):  # somebody else's
            version += 1
        return version

    # -- between processes that share the folder -------------------------------------------------

    @property
    def place(self) -> Path:
        """Where the files lie."""
        return self._where()

    def reserve(self, clients: Iterable[int]) -> dict[str, int]:
        """Announce the names of clients' next states, which other processes may write; JSON."""
        found = {str(client): self._free(client) for client in clients}
        announce(self._where())
        for client, version in found.items():
            announce(self._path(int(client), version))
        return found

    def promise(self, reserved: Mapping[str, int]) -> None:
        """Give the next state of each client the name that `reserve` has announced."""
        self._reserved = {int(client): version for client, version in reserved.items()}

    def told(self, clients: Iterable[int]) -> dict[str, Any]:
        """Say of clients' states where they are, for `adopt`; those written here are flushed."""
        with on_disk("fastfpl.run", "the clients' states", self._where(), self._cure):
            for path in self._unsettled:
                flush(path)
        self._handed, self._unsettled = self._unsettled, []
        self._reserved.clear()
        there = {c: self._entries[c] for c in clients if c in self._entries}
        return {str(client): _written(entry) for client, entry in there.items()}

    def adopt(self, written: Mapping[str, Any]) -> None:
        """Take up states that another process has written; their bytes are verified when read."""
        for client, e in written.items():
            number, version = int(client), int(e["version"])
            old = self._entries.get(number)
            if old is not None and old.version == version:
                continue
            path = self._path(number, version)
            file = Intact(path, str(e["blake2b"]), seen=False)
            self._entries[number] = _Entry(version, _names(e["names"]), file)
            self.segments.touch(number)
            if old is not None:
                self._former.append(self._path(number, old.version))

    def leave(self) -> None:
        """Leave files, former ones too, to the process that writes checkpoints."""
        self._former.clear()
        self._handed.clear()

    def discard(self) -> None:
        """Remove what was written here since `leave`: nobody goes on with it."""
        for path in (*self._unsettled, *self._handed):
            path.unlink(missing_ok=True)
        self._unsettled.clear()
        self._handed.clear()

    # -- for checkpoints -----------------------------------------------------------------------

    def settle(self) -> dict[str, Any]:
        """Flush new files to the disk and say what must be written down to find them again.

        Of many clients it is what has changed lately; ``named`` then names the files with the rest.
        """
        what = "the folder of the clients' states"
        with on_disk("fastfpl.run", what, self._where(), self._cure):
            for path in self._unsettled:
                if path not in self._former:
                    flush(path)
        self._unsettled.clear()
        for path in self._former:
            announce(path)
        young, self.named = self.segments.settle(
            self.folder, lambda client: _written(self._entries[client])
        )
        return young

    @property
    def files(self) -> set[Path]:
        """The files that hold the states."""
        return {self._path(client, entry.version) for client, entry in self._entries.items()}

    def restore(self, written: Mapping[str, Any]) -> None:
        """Take up the files that `settle` told of, after looking at every byte.

        Raises
        ------
        Damaged
            If a file is missing, truncated or changed.
        """
        self._entries = {}
        for client, e in written.items():
            version, names = int(e["version"]), _names(e["names"])
            path = self._path(int(client), version)
            try:
                own_folder(path.parent)
                content = read_file(path)
                file = Intact(path, str(e["blake2b"]))
            except OSError as error:
                raise _damaged(path, f"{type(error).__name__}: {error.strerror}") from None
            if digest_of(content) != file.digest:
                raise _damaged(path, "its checksum is not the one that was written")
            try:
                with safe_open(path, framework="pt") as tensors:
                    found = set(tensors.keys())
            except SafetensorError as error:
                raise _damaged(path, str(error)) from None
            if found != set(names):
                raise _damaged(path, f"the tensors {', '.join(sorted(found))}")
            self._entries[int(client)] = _Entry(version, names, file)
            self.segments.touch(int(client))

    def sweep(self) -> None:
        """Remove the files of former states."""
        self.segments.sweep(self.folder)
        for path in self._former:
            path.unlink(missing_ok=True)
        self._former.clear()

    @property
    def _cure(self) -> str:
        if self.folder is None and self._beside is None:
            return "or set TMPDIR to another folder"
        return "or name another out"

    def _where(self) -> Path:
        if self.folder is not None:
            return self.folder
        if self._temporary is None:
            self._temporary = scratch(self, self._beside)
        return self._temporary

    def _path(self, client: int, version: int) -> Path:
        if self.folder is None:
            # few of many clients: a folder for each costs more than its file
            client = self._places.setdefault(client, len(self._places))
        return state_path(self._where(), client, version)


def state_path(folder: Path, client: int, version: int) -> Path:
    """Name the file of a client's state; no folder holds more than a thousand clients' files."""
    place = folder if client < _TOGETHER else folder / f"{client // _TOGETHER:03d}"
    return place / f"{client:05d}-{version:05d}.safetensors"


def _names(state: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a state, one tuple for all clients that have the same."""
    names = tuple(state)
    return _SEEN.setdefault(names, names)


def _written(entry: _Entry) -> dict[str, Any]:
    return {
        "version": entry.version,
        "names": list(entry.names),
        "blake2b": entry.file.digest,
    }


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.run: {path} must be the state of a client that was written; got {reason}; "
        "nothing was changed, start again with another out"
    )
