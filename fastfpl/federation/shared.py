"""States of many clients in few files: what several of them hold is written once."""

from __future__ import annotations

import hashlib
import os
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
from fastfpl.federation.states import Intact, scratch
from fastfpl.files import announce, digest_of, on_disk, own_folder, read_file, write_new
from fastfpl.methods import State
from fastfpl.system import flush

__all__ = ["DOWNLOADS", "TUNED", "SharedStates"]

#: Folder of what clients had downloaded for the training that they are evaluated with.
DOWNLOADS = "downloads"
#: Folder of what clients kept of the fine-tuning before the last evaluation.
TUNED = "tuned"

# bytes of the pieces that wait for their file: enough to share, little beside a budget
_VOLUME = 1 << 24


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    volume: int
    tensors: dict[str, _Tensor]


class SharedStates(Mapping[int, State]):
    """States by client, many in a file (a volume); equal pieces of a volume are there once.

    A tensor of three dimensions or more, a list of contexts, is cut along its first one; all others
    are pieces as they are. A volume is never changed; it stays until no client has its state in it
    and `sweep` is called.

    Parameters
    ----------
    folder : Path, optional
        Where volumes lie; it is made with the first one. Without it they lie in a temporary folder
        that lives as long as this object.
    device : torch.device
        Where tensors are read to.
    """

    def __init__(self, folder: Path | None = None, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self._device = torch.device(device)
        self._entries: dict[int, _Entry] = {}
        self._files: dict[int, Intact] = {}
        self._waiting: dict[int, dict[str, _Tensor]] = {}
        self._pieces: dict[bytes, tuple[int, Tensor]] = {}
        self._bytes = 0
        self._unsettled: list[int] = []
        self._next = 0
        self.segments = Segments()
        self.named: list[dict[str, Any]] = []
        self._temporary: Path | None = None

    def __getitem__(self, client: int) -> State:
        if client in self._waiting:
            self._write()
        entry = self._entries[client]
        path = self._path(entry.volume)
        cure = "go on by resume from the last checkpoint"
        try:
            with (
                on_disk("fastfpl.run", "states of clients", path, cure, rule="be readable"),
                safe_open(path, framework="pt") as file,
            ):
                if not self._files[entry.volume].is_as_written():
                    raise _damaged(path, "a file that was changed since")
                return {n: self._joined(file, t) for n, t in entry.tensors.items()}
        except SafetensorError as error:
            raise _damaged(path, str(error)) from None

    def _joined(self, file: Any, tensor: _Tensor) -> Tensor:
        parts = [file.get_tensor(str(piece)) for piece in tensor.pieces]
        if not parts:
            return torch.empty(
                tensor.shape, dtype=getattr(torch, tensor.dtype), device=self._device
            )
        joined = torch.stack(parts) if len(tensor.shape) >= _CUT else parts[0]
        return joined.to(self._device, copy=True)

    def __iter__(self) -> Iterator[int]:
        return iter({**self._entries, **self._waiting})

    def __len__(self) -> int:
        return len({**self._entries, **self._waiting})

    def put(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Take up the state of a client, in place of its former one."""
        self._waiting[client] = {name: self._cut(tensor) for name, tensor in state.items()}
        if self._bytes >= _VOLUME:
            self._write()

    def _cut(self, tensor: Tensor) -> _Tensor:
        parts = list(tensor.detach()) if tensor.ndim >= _CUT else [tensor.detach()]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return _Tensor(dtype, tuple(tensor.shape), tuple(self._piece(part) for part in parts))

    def _piece(self, part: Tensor) -> int:
        """Return the number of a piece of the volume that waits, new unless it is there."""
        host = part.cpu().contiguous()
        kind = f"{host.dtype} {tuple(host.shape)}".encode()
        total = hashlib.blake2b(kind, digest_size=16)
        total.update(host.reshape(-1).view(torch.uint8).numpy().data)
        key = total.digest()
        if key not in self._pieces:
            # a copy: a row of a stack would keep the whole of it
            self._pieces[key] = len(self._pieces), host.clone()
            self._bytes += host.nbytes
        return self._pieces[key][0]

    def clear(self) -> None:
        """Forget all states; `sweep` removes their files."""
        self._entries.clear()
        self.segments.clear()
        self._forget()

    def _forget(self) -> None:
        self._waiting.clear()
        self._pieces.clear()
        self._bytes = 0

    def _write(self) -> None:
        """Write what waits into a new volume."""
        if not self._waiting:
            return
        content = save({str(number): piece for number, piece in self._pieces.values()})
        where = self._where()
        with on_disk("fastfpl.run", "the folder of states", where, self._cure):
            if self.folder is not None:
                where.parent.mkdir(parents=True, exist_ok=True)
                own_folder(where)
            while os.path.lexists(self._path(self._next)):  # somebody else's
                self._next += 1
            write_new(self._path(self._next), content)
            self._files[self._next] = Intact(self._path(self._next), digest_of(content))
        volume = self._next
        self._next += 1
        for client, tensors in self._waiting.items():
            self._entries[client] = _Entry(volume, tensors)
            self.segments.touch(client)
        self._forget()
        if self.folder is None:
            self.sweep()
        else:
            self._unsettled.append(volume)

    # -- between processes that share the folder -------------------------------------------------

    def told(self, clients: Iterable[int]) -> dict[str, Any]:
        """Write what waits and say of clients' states where they are, for `adopt`."""
        self._write()
        entries = {c: self._entries[c] for c in clients if c in self._entries}
        used = {entry.volume for entry in entries.values()}
        return {
            "volumes": {str(volume): self._files[volume].digest for volume in sorted(used)},
            "clients": {str(client): _written(entry) for client, entry in entries.items()},
        }

    def adopt(self, written: Mapping[str, Any]) -> None:
        """Take up states that another process has written; their bytes are verified when read."""
        for volume, digest in written["volumes"].items():
            self._files[int(volume)] = Intact(self._path(int(volume)), digest, seen=False)
        self._entries |= {int(client): _read(e) for client, e in written["clients"].items()}
        used = self._used()
        self._files = {volume: file for volume, file in self._files.items() if volume in used}

    # -- for checkpoints -----------------------------------------------------------------------

    def settle(self) -> dict[str, Any]:
        """Flush new files to the disk and say what must be written down to find them again."""
        self._write()
        used = self._used()
        with on_disk("fastfpl.run", "the folder of states", self._where(), self._cure):
            for volume in self._unsettled:
                if volume in used:
                    flush(self._path(volume))
        self._unsettled.clear()
        for volume in set(self._files) - used:
            announce(self._path(volume))
        young, self.named = self.segments.settle(self.folder, lambda c: _written(self._entries[c]))
        return {
            "volumes": {str(volume): self._files[volume].digest for volume in sorted(used)},
            "clients": young,
        }

    @property
    def files(self) -> set[Path]:
        """The files that hold the states."""
        return {self._path(volume) for volume in self._used()}

    def restore(self, written: Mapping[str, Any]) -> None:
        """Take up the files that `settle` told of, after looking at every byte.

        Raises
        ------
        Damaged
            If a file is missing, truncated or changed.
        """
        self._files = {}
        self._entries = {int(client): _read(e) for client, e in written["clients"].items()}
        for client in self._entries:
            self.segments.touch(client)
        self._next = max(map(int, written["volumes"]), default=-1) + 1
        for volume, digest in written["volumes"].items():
            path = self._path(int(volume))
            try:
                own_folder(path.parent)
                content = read_file(path)
                self._files[int(volume)] = Intact(path, digest)
            except OSError as error:
                raise _damaged(path, f"{type(error).__name__}: {error.strerror}") from None
            if digest_of(content) != digest:
                raise _damaged(path, "its checksum is not the one that was written")
        for client, entry in self._entries.items():
            if entry.volume not in self._files:
                raise _damaged(self._path(entry.volume), f"no checksum, with client {client} in it")
            for name, tensor in self[client].items():
                wanted = entry.tensors[name]
                if (tuple(tensor.shape), str(tensor.dtype)) != (
                    wanted.shape,
                    f"torch.{wanted.dtype}",
                ):
                    raise _damaged(
                        self._path(entry.volume), f"{name!r} of shape {tuple(tensor.shape)}"
                    )

    def sweep(self) -> None:
        """Remove the volumes in which no client has its state."""
        self.segments.sweep(self.folder)
        used = self._used()
        for volume in set(self._files) - used:
            self._path(volume).unlink(missing_ok=True)
            del self._files[volume]

    @property
    def _cure(self) -> str:
        return "or name another out" if self.folder else "or set TMPDIR to another folder"

    def _used(self) -> set[int]:
        return {entry.volume for entry in self._entries.values()}

    def _where(self) -> Path:
        if self.folder is not None:
            return self.folder
        if self._temporary is None:
            self._temporary = scratch(self, None)
        return self._temporary

    def _path(self, volume: int) -> Path:
        return self._where() / f"{volume:05d}.safetensors"


# dimensions from which on a tensor is a list of pieces
_CUT = 3


def _written(entry: _Entry) -> dict[str, Any]:
    tensors = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "pieces": list(t.pieces)}
        for name, t in entry.tensors.items()
    }
    return {"volume": entry.volume, "tensors": tensors}


def _read(written: Mapping[str, Any]) -> _Entry:
    tensors = {
        name: _Tensor(t["dtype"], tuple(t["shape"]), tuple(t["pieces"]))
        for name, t in written["tensors"].items()
    }
    return _Entry(written["volume"], tensors)


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.run: {path} must be the states of clients that were written; got {reason}; "
        "nothing was changed, start again with another out"
    )
