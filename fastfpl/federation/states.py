"""States of clients on disk: one safetensors file a client, read when its cohort runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastfpl.errors import Damaged, InputError

__all__ = ["CLIENTS", "StateFiles", "StoredState"]

#: Folder of the clients' states beside a run's checkpoint.
CLIENTS = "clients"


class StoredState(Mapping[str, Tensor]):
    """Named tensors of one client; each is read from disk when it is asked for.

    Parameters
    ----------
    path : Path
    names : tuple of str
    device : torch.device
    """

    def __init__(self, path: Path, names: tuple[str, ...], device: torch.device) -> None:
        self._path = path
        self._names = names
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            # a copy: the file's pages are the system's to drop
            tensor: Tensor = file.get_tensor(name).to(self._device, copy=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class _Entry:
    version: int
    names: tuple[str, ...]
    digest: str


class StateFiles(Mapping[int, StoredState]):
    """States by client, in files; in memory is only what says where they are.

    A new state is a new file: the former one stays until `sweep`, so that a checkpoint which names
    it stays whole however a process ends.

    Parameters
    ----------
    folder : Path, optional
        Where the files lie; it is made with the first one. Without it they lie in a temporary
        folder that lives as long as this object, and former files go at once.
    device : torch.device
        Where tensors are read to.

    Attributes
    ----------
    folder : Path or None
    """

    def __init__(self, folder: Path | None = None, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self._device = torch.device(device)
        self._entries: dict[int, _Entry] = {}
        self._former: list[Path] = []
        self._unsettled: list[Path] = []
        self._temporary: Path | None = None

    def __getitem__(self, client: int) -> StoredState:
        entry = self._entries[client]
        return StoredState(self._path(client, entry.version), entry.names, self._device)

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
        version = 0 if old is None else old.version + 1
        content = save({name: t.detach().cpu().contiguous() for name, t in state.items()})
        path = self._path(client, version)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise InputError(
                "fastfpl.run: the folder of the clients' states must be writable and have room; "
                f"got {type(error).__name__}: {error}; free some or name another out"
            ) from error
        self._entries[client] = _Entry(version, tuple(state), _digest(content))
        if old is not None:
            self._former.append(self._path(client, old.version))
        if self.folder is None:
            self.sweep()
        else:
            self._unsettled.append(path)

    # -- for checkpoints -----------------------------------------------------------------------

    def settle(self) -> dict[str, Any]:
        """Flush new files to the disk and say what must be written down to find them again."""
        for path in self._unsettled:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._unsettled.clear()
        return {
            str(client): {"version": e.version, "names": list(e.names), "blake2b": e.digest}
            for client, e in self._entries.items()
        }

    def restore(self, written: Mapping[str, Any]) -> None:
        """Take up the files that `settle` told of, after looking at every byte.

        Raises
        ------
        Damaged
            If a file is missing, truncated or changed.
        """
        self._entries = {
            int(client): _Entry(int(e["version"]), tuple(e["names"]), str(e["blake2b"]))
            for client, e in written.items()
        }
        for client, entry in self._entries.items():
            path = self._path(client, entry.version)
            try:
                content = path.read_bytes()
            except OSError as error:
                raise _damaged(path, f"{type(error).__name__}: {error.strerror}") from None
            if _digest(content) != entry.digest:
                raise _damaged(path, "its checksum is not the one that was written")
            try:
                with safe_open(path, framework="pt") as file:
                    names = set(file.keys())
            except SafetensorError as error:
                raise _damaged(path, str(error)) from None
            if names != set(entry.names):
                raise _damaged(path, f"the tensors {', '.join(sorted(names))}")
        named = {self._path(client, e.version) for client, e in self._entries.items()}
        for path in self._where().glob("*.safetensors"):
            if path not in named:  # what a killed process wrote after its last checkpoint
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the files of former states."""
        for path in self._former:
            path.unlink(missing_ok=True)
        self._former.clear()

    def _where(self) -> Path:
        if self.folder is not None:
            return self.folder
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="fastfpl-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return self._temporary

    def _path(self, client: int, version: int) -> Path:
        return self._where() / f"{client:05d}-{version:05d}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.run: {path} must be the state of a client that was written; got {reason}; "
        "nothing was changed, start again with another out"
    )
