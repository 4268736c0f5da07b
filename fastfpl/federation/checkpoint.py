"""A run's state after a round: one JSON file that names the files of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fastfpl.errors import Damaged, InputError
from fastfpl.federation.states import CLIENTS, StateFiles
from fastfpl.files import write_json, write_whole
from fastfpl.methods import State

__all__ = ["CHECKPOINT", "Checkpoint", "check_checkpoint", "load_checkpoint", "save_checkpoint"]

CHECKPOINT = "checkpoint.json"
_FORMAT = "fastfpl-checkpoint-2"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round depends on.

    Attributes
    ----------
    facts : mapping
        Settings, weights and data that the run belongs to.
    rounds : list of dict
        Rows of ``result.json`` so far.
    faces : mapping from op to names
        Faces that answered so far.
    server : State
    clients : StateFiles
        What clients keep, in the folder `CLIENTS` beside the JSON; clients that never took part are
        absent.
    trainer : State
        What is handed from client to client, empty unless quirks of released code ask for it.
    """

    facts: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    faces: Mapping[str, list[str]]
    server: State
    clients: StateFiles
    trainer: State = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: first the tensors under new names, then the JSON that names them.

    Of the clients' states only those of clients that trained are new. The JSON's rename is the
    moment at which the checkpoint counts; a process that dies before it leaves the previous one
    valid.
    """
    if checkpoint.clients.folder != folder / CLIENTS:
        raise InputError(
            f"fastfpl.run: the clients of a checkpoint must lie in {folder / CLIENTS}; got "
            f"{checkpoint.clients.folder}"
        )
    tensors = {f"server.{name}": tensor for name, tensor in checkpoint.server.items()}
    tensors |= {f"trainer.{name}": tensor for name, tensor in checkpoint.trainer.items()}
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    done = len(checkpoint.rounds)
    path = folder / f"checkpoint-{done:05d}.safetensors"

    def write(part: Path) -> None:
        # save_file has a temporary name of its own, which a killed process leaves behind
        part.write_bytes(save(flat))

    write_whole(path, write)
    head = {
        "format": _FORMAT,
        "rounds_done": done,
        "tensors": path.name,
        "blake2b": _digest(path),
        "clients": checkpoint.clients.settle(),
        "facts": dict(checkpoint.facts),
        "faces": dict(checkpoint.faces),
        "rounds": checkpoint.rounds,
    }
    write_json(folder / CHECKPOINT, {**head, "checksum": _checksum(head)})
    _sweep(folder, path)
    checkpoint.clients.sweep()


def check_checkpoint(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what a folder's checkpoint says, or None if there is none; its tensors stay unread.

    ``facts`` are those of the run, or as many of them as are known already; see `load_checkpoint`.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"not JSON: {error}") from None
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        got = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise _damaged(path, f"format {got!r} where {_FORMAT!r} is read")
    if head.pop("checksum", None) != _checksum(head):
        raise _damaged(path, "its checksum is not the one that was written")
    different = {
        key: (head["facts"].get(key), value)
        for key, value in facts.items()
        if head["facts"].get(key) != value
    }
    if different:
        shown = ", ".join(f"{k}: {was!r} then, {now!r} now" for k, (was, now) in different.items())
        raise InputError(
            f"fastfpl.run: a resumed run must have the settings of {folder}; got {shown}; "
            "use the same settings or another out"
        )
    return head


def load_checkpoint(
    folder: Path, facts: Mapping[str, Any], device: torch.device | str = "cpu"
) -> Checkpoint | None:
    """Read the checkpoint of a folder onto a device, or None if there is none.

    What a killed process left beside a whole checkpoint is removed.

    Raises
    ------
    Damaged
        If a file is truncated, changed or not a checkpoint of this library.
    InputError
        If it belongs to a run with other settings, weights or data.
    """
    head = check_checkpoint(folder, facts)
    if head is None:
        return None
    path = folder / CHECKPOINT
    name = str(head["tensors"])
    tensors_path = folder / Path(name).name
    if not tensors_path.exists():
        raise _damaged(path, f"names {name}, which is not there")
    if _digest(tensors_path) != head["blake2b"]:
        raise _damaged(tensors_path, "its checksum is not the one that was written")
    try:
        tensors = load_file(tensors_path)
    except SafetensorError as error:
        raise _damaged(tensors_path, str(error)) from None
    clients = StateFiles(folder / CLIENTS, device)
    clients.restore(head["clients"])
    sides: dict[str, State] = {"server": {}, "trainer": {}}
    for key, tensor in tensors.items():
        side, _, name = key.partition(".")
        sides[side][name] = tensor.to(device)
    _sweep(folder, tensors_path)
    return Checkpoint(
        head["facts"], head["rounds"], head["faces"], sides["server"], clients, sides["trainer"]
    )


def _sweep(folder: Path, kept: Path) -> None:
    """Remove earlier tensors and what a killed process had half written."""
    for old in (*folder.glob("checkpoint-*.safetensors"), *folder.glob(".*.part")):
        if old != kept:
            old.unlink(missing_ok=True)


def _checksum(head: Mapping[str, Any]) -> str:
    """Hash the JSON's content, whatever its white space."""
    text = json.dumps(head, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    total = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.run: {path} must be a whole checkpoint; got {reason}; "
        "nothing was changed, start again with another out"
    )
