"""Clients that came after a run: one file of tensors each and a manifest that says whose it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from fastfpl import __version__
from fastfpl.errors import Damaged, InputError, Missing, near, shown
from fastfpl.files import on_disk, own_folder, read_file, write_json, write_whole
from fastfpl.methods import State

__all__ = ["JOINED", "Joined", "check_name", "joined_names", "read_joined", "write_joined"]

#: Folder of the clients that came later, beside a run's checkpoint.
JOINED = "joined"
_FORMAT = "fastfpl-joined-1"
_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True, eq=False)
class Joined:
    """What a client that came later answers with.

    Attributes
    ----------
    name : str
    down, own : State
        As `fastfpl.federation.models.answers_with` has them.
    weights : str
        Digest of the CLIP.
    draws : str
        What was drawn for it is drawn for this name and the run's seed.
    domain : int or None
        Visual domain, as `Method.admit` takes it.
    about : mapping
        ``dataset``, ``images``, ``shots``, ``round`` of the run, ``participations``, ``accuracy``
        before and after, for people.
    """

    name: str
    down: State
    own: State
    weights: str
    draws: str
    domain: int | None
    about: Mapping[str, Any] = field(default_factory=dict)


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["fastfpl-joined-1"]
    library: str
    name: str
    weights: str
    draws: str
    domain: Annotated[int, Field(ge=0, lt=2**40)] | None
    blake2b: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    about: dict[str, Any]


def check_name(op: str, name: str) -> str:
    """Refuse a name that is no file's, or that is a client's number."""
    if not _NAME.fullmatch(name) or name.isdecimal() or name in ("global",):
        raise InputError(
            f"{op}: the name of a client must be letters, digits, '-', '_' and '.', 100 at most, "
            f"and neither a number nor 'global'; got {shown(name)}"
        )
    return name


def joined_names(folder: Path) -> list[str]:
    """Return the names of the clients that came later."""
    found = (path.stem for path in (folder / JOINED).glob("*.json"))
    return sorted(name for name in found if _NAME.fullmatch(name))


def write_joined(folder: Path, one: Joined) -> None:
    """Write a client's tensors, then the manifest that makes it count.

    Raises
    ------
    InputError
        If there is one of that name, or the disk is full, read-only or fails.
    """
    place = folder / JOINED
    manifest = place / f"{one.name}.json"
    with on_disk("fastfpl.adapt", "the run's folder", place, "or copy the run to another folder"):
        own_folder(place)
    if os.path.lexists(manifest):
        raise InputError(
            f"fastfpl.adapt: the name of a client must be new; got {one.name!r}, which is there: "
            f"choose another one, or remove {manifest}"
        )
    tensors = {f"down.{n}": t for n, t in one.down.items()}
    tensors |= {f"own.{n}": t for n, t in one.own.items()}
    content = save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})

    def write(part: Path) -> None:
        part.write_bytes(content)

    write_whole(place / f"{one.name}.safetensors", write)
    write_json(
        manifest,
        {
            "format": _FORMAT,
            "library": __version__,
            "name": one.name,
            "weights": one.weights,
            "draws": one.draws,
            "domain": one.domain,
            "blake2b": hashlib.blake2b(content).hexdigest(),
            "about": dict(one.about),
        },
    )


def read_joined(folder: Path, name: str, device: torch.device | str = "cpu") -> Joined:
    """Read a client that came later, after looking at every byte.

    Raises
    ------
    InputError
        If there is none of that name.
    Damaged
        If a file is truncated, changed or of another version.
    """
    names = joined_names(folder)
    if name not in names:
        there = near(name, names) if names else "; nobody has joined it (fastfpl adapt)"
        raise InputError(f"fastfpl.load: client must be one of the run; got {shown(name)}{there}")
    path = folder / JOINED / f"{name}.json"
    try:
        said = _Manifest.model_validate(json.loads(read_file(path).decode("utf-8")))
        if said.name != name:
            raise ValueError(f"the name {shown(said.name)}")
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    path = path.with_suffix(".safetensors")
    try:
        content = read_file(path)
        if hashlib.blake2b(content).hexdigest() != said.blake2b:
            raise ValueError("its checksum is not the one that was written")
        tensors = load(content)
    except FileNotFoundError:
        raise Missing(f"fastfpl.load: {path} must be there; got nothing: adapt it again") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    sides: dict[str, State] = {"down": {}, "own": {}}
    for key, tensor in tensors.items():
        side, _, rest = key.partition(".")
        if side not in sides or not rest:
            raise _damaged(path, f"the tensor {key!r}")
        sides[side][rest] = tensor.to(device)
    return Joined(
        name, sides["down"], sides["own"], said.weights, said.draws, said.domain, said.about
    )


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.load: {path} must be of a client that joined; got {reason}: remove it and adapt "
        "again"
    )
