"""A run's state after a round: one JSON file that names the files of tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from fastfpl import __version__
from fastfpl.config import Settings
from fastfpl.data import scheme_of
from fastfpl.errors import Damaged, InputError, cut, shown
from fastfpl.federation.result_schema import Row
from fastfpl.federation.segments import read_segments, segment_files
from fastfpl.federation.shared import DOWNLOADS, TUNED, SharedStates
from fastfpl.federation.states import CLIENTS, StateFiles, state_path
from fastfpl.files import announce, on_disk, read_file, write_json, write_whole
from fastfpl.methods import State, method_source

__all__ = [
    "CHECKPOINT",
    "METHOD_SOURCE",
    "Checkpoint",
    "check_checkpoint",
    "check_source",
    "files_of",
    "load_checkpoint",
    "origin_of",
    "read_checkpoint",
    "save_checkpoint",
    "settings_facts",
]

CHECKPOINT = "checkpoint.json"
#: Under this name facts say where a method from outside came from.
METHOD_SOURCE = "method_source"
_FORMAT = "fastfpl-checkpoint-4"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round depends on, and all that the last evaluation saw.

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
    handed : State
        What is handed from client to client, empty unless quirks of released code ask for it.
    downloads : SharedStates
        What each client had downloaded for the training that it is evaluated with, in `DOWNLOADS`;
        empty for methods that evaluate what the client would download now.
    tuned : SharedStates
        What clients kept of the fine-tuning before the last round's evaluation, in `TUNED`.
    settings : mapping
        All settings, options included.
    task : mapping
        ``classes``, ``domains``, ``client_domains`` and ``clients``, as `fastfpl.methods.Task` has
        them; ``pixels``, mean and deviation that they are normalised by; ``newcomers``, how many
        clients were adapted after the last round, and their domains (`None` of images of several);
        ``names``, what the data set calls the clients, if it does.
    library : str
        The version that wrote it.
    """

    facts: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    faces: Mapping[str, list[str]]
    server: State
    clients: StateFiles
    handed: State = field(default_factory=dict)
    downloads: SharedStates = field(default_factory=SharedStates)
    tuned: SharedStates = field(default_factory=SharedStates)
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    library: str = __version__

    @property
    def files(self) -> set[Path]:
        """The files of clients that it names."""
        return self.clients.files | self.downloads.files | self.tuned.files


# -- what the JSON must be -----------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_Number = Annotated[str, Field(pattern=r"^\d{1,9}$")]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Count = Annotated[int, Field(ge=0, lt=2**40)]


class _Client(_Strict):
    version: _Count
    names: list[str]
    blake2b: _Hash


class _Tensor(_Strict):
    dtype: Annotated[str, Field(pattern=r"^(float|bfloat|int|uint)\d{1,2}$|^bool$")]
    shape: Annotated[list[_Count], Field(max_length=16)]
    pieces: list[_Count]


class _Part(_Strict):
    volume: _Count
    tensors: dict[str, _Tensor]


class _Volumes(_Strict):
    volumes: dict[_Number, _Hash]
    clients: dict[_Number, _Part]


_CLIENTS = TypeAdapter(dict[_Number, _Client])
_PARTS = TypeAdapter(dict[_Number, _Part])
_Three = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Pixels(_Strict):
    mean: _Three
    std: _Three


class _Task(_Strict):
    classes: list[str]
    domains: list[str]
    client_domains: list[_Count] | None
    clients: Annotated[int, Field(ge=1, lt=2**40)]
    pixels: _Pixels | None = None
    newcomers: _Count = 0
    newcomer_domains: list[_Count | None] | None = None
    names: list[str] = []


class _Segment(_Strict):
    number: _Count
    blake2b: _Hash


class _Segments(_Strict):
    clients: list[_Segment] = []
    downloads: list[_Segment] = []
    tuned: list[_Segment] = []


class _Head(_Strict):
    format: Literal["fastfpl-checkpoint-4"]
    library: str
    rounds_done: _Count
    tensors: Annotated[str, Field(pattern=r"^checkpoint-\d{5}(-\d+)?\.safetensors$")]
    blake2b: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    segments: _Segments
    clients: dict[_Number, _Client]
    downloads: _Volumes
    tuned: _Volumes
    settings: dict[str, Any]
    task: _Task
    facts: dict[str, Any]
    faces: dict[str, list[str]]
    rounds: list[Row]


def settings_facts(settings: Settings, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide figures, and with them whether a run can be resumed."""
    loose = {*("rounds", "cohort", "threads", "device", "root"), *("max_memory", "cuda_graphs")}
    loose |= {"workers", "resident", "resident_features"}
    if settings.schedule == "cosine-rounds":
        loose.remove("rounds")
    kept = {k: v for k, v in settings.model_dump().items() if k not in loose}
    # of one's own images the content counts, which is compared, and not where they lie
    for key in ("dataset", "target"):
        kept[key] = scheme_of(kept[key] or "") or kept[key]
    source = method_source(settings.method)
    return {
        **kept,
        "options": dict(options),
        **({} if source is None else {METHOD_SOURCE: source}),
    }


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: first the tensors under new names, then the JSON that names them.

    Of the clients' states only those of clients that trained are new. The JSON's rename is the
    moment at which the checkpoint counts; a process that dies before it leaves the previous one
    valid. Of what is there, nothing but the previous checkpoint's files is removed.

    Raises
    ------
    InputError
        If the disk is full, read-only or fails: the previous checkpoint is as it was.
    """
    places: dict[str, StateFiles | SharedStates] = {
        CLIENTS: checkpoint.clients,
        DOWNLOADS: checkpoint.downloads,
        TUNED: checkpoint.tuned,
    }
    for name, states in places.items():
        if states.folder != folder / name and (states or name == CLIENTS):
            raise InputError(
                f"fastfpl.run: the {name} of a checkpoint must lie in {folder / name}; got "
                f"{states.folder}"
            )
    tensors = {f"server.{name}": tensor for name, tensor in checkpoint.server.items()}
    tensors |= {f"trainer.{name}": tensor for name, tensor in checkpoint.handed.items()}
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    done = len(checkpoint.rounds)
    path = folder / f"checkpoint-{done:05d}.safetensors"
    again = 0
    while os.path.lexists(path):  # somebody else's
        again += 1
        path = folder / f"checkpoint-{done:05d}-{again}.safetensors"
    former = _named(folder)
    if former is not None:
        announce(former)
    announce(path)

    def write(part: Path) -> None:
        # save_file has a temporary name of its own, which a killed process leaves behind
        part.write_bytes(save(flat))

    write_whole(path, write)
    head = {
        "format": _FORMAT,
        "library": __version__,
        "rounds_done": done,
        "tensors": path.name,
        "blake2b": hashlib.blake2b(path.read_bytes()).hexdigest(),
        "clients": checkpoint.clients.settle(),
        "downloads": checkpoint.downloads.settle(),
        "tuned": checkpoint.tuned.settle(),
        # what is said of clients that have not changed lately
        "segments": {name: states.named for name, states in places.items()},
        "settings": dict(checkpoint.settings),
        "task": dict(checkpoint.task),
        "facts": dict(checkpoint.facts),
        "faces": dict(checkpoint.faces),
        "rounds": checkpoint.rounds,
    }
    write_json(folder / CHECKPOINT, {**head, "checksum": _checksum(head)}, indent=None)
    with on_disk("fastfpl.run", "out", folder, "or name another out"):
        if former is not None:
            former.unlink(missing_ok=True)
        for states in places.values():
            states.sweep()


def check_checkpoint(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what a folder's checkpoint says, or None if there is none; its tensors stay unread.

    ``facts`` are those of the run, or as many of them as are known already.

    Raises
    ------
    Damaged
        If the file is truncated, changed or not a checkpoint of this library.
    InputError
        If it belongs to a run with other settings, weights or data, or to another version of this
        library.
    """
    if not os.path.lexists(folder / CHECKPOINT):
        return None
    head = _read_head(folder)
    if head["library"] != __version__:
        raise InputError(
            f"fastfpl.run: a run must be resumed by the version that began it; got {folder} of "
            f"fastfpl {head['library']}, this is {__version__}; use that one or another out"
        )
    then = head["facts"]
    check_source("fastfpl.run", folder, head, facts.get(METHOD_SOURCE))
    # a run on Flower leaves its clients' states with the clients
    engines = [side.get("engine", "process") for side in (then, facts)]
    if engines[0] != engines[1]:
        raise InputError(
            f"fastfpl.run: a run must be resumed by the engine that began it; got {folder} of "
            f"{engines[0]}, this is {engines[1]}; use that one or another out"
        )
    different = {
        key: (then.get(key), value) for key, value in facts.items() if then.get(key) != value
    }
    if different:
        shown = ", ".join(f"{k}: {was!r} then, {now!r} now" for k, (was, now) in different.items())
        raise InputError(
            f"fastfpl.run: a resumed run must have the settings of {folder}; got {shown}; "
            "use the same settings or another out"
        )
    return head


def check_source(
    op: str, folder: Path, head: Mapping[str, Any], source: Mapping[str, str] | None
) -> None:
    """Refuse a method from outside that is not the one which a checkpoint was made with.

    ``source`` is what `fastfpl.methods.method_source` says of the method of the checkpoint's name.
    """
    then, method = head["facts"].get(METHOD_SOURCE), head["facts"].get("method")
    if then == source or then is None:
        return
    raise InputError(
        f"{op}: {cut(str(method))} must be the one that {folder} was made with, "
        f"{origin_of(then)}; got {origin_of(source)}: put its source back, or use another out"
    )


def origin_of(source: Any) -> str:
    """Write where a method came from for a sentence; a file may hold anything in its place."""
    if source is None:
        return "the library's"
    if not isinstance(source, dict):
        return shown(source)
    name, module, digest = (str(source.get(key)) for key in ("class", "module", "blake2b"))
    return f"{cut(name)} of {cut(module)}, source {digest[:12]}"


def load_checkpoint(
    folder: Path, facts: Mapping[str, Any], device: torch.device | str = "cpu"
) -> Checkpoint | None:
    """Read the checkpoint of a folder onto a device to go on from it, or None if there is none.

    Raises as `check_checkpoint` does, and for tensors that are damaged.
    """
    head = check_checkpoint(folder, facts)
    return None if head is None else _restored(folder, head, device)


def read_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read the checkpoint of a folder onto a device, whatever run it belongs to.

    Raises
    ------
    Damaged
        If there is none, or a file is truncated, changed or not a checkpoint of this library.
    """
    return _restored(folder, _read_head(folder), device)


def files_of(folder: Path) -> set[Path] | None:
    """Return the files that the checkpoint of a folder names; None if it cannot be read."""
    if not os.path.lexists(folder / CHECKPOINT):
        return set()
    try:
        head = _read_head(folder)
        said, _ = _said(folder, head, CLIENTS)
    except Damaged:
        return None
    volumes = [(part, v) for part in (DOWNLOADS, TUNED) for v in head[part]["volumes"]]
    return {
        folder / head["tensors"],
        *(
            state_path(folder / CLIENTS, int(client), entry["version"])
            for client, entry in said.items()
        ),
        *(
            f
            for name, named in head["segments"].items()
            for f in segment_files(folder / name, named)
        ),
        *(folder / part / f"{int(volume):05d}.safetensors" for part, volume in volumes),
    }


def _read_head(folder: Path) -> dict[str, Any]:
    """Read the JSON and hold it to its schema."""
    path = folder / CHECKPOINT
    try:
        head = json.loads(read_file(path).decode("utf-8"))
        checksum = head.pop("checksum", None) if isinstance(head, dict) else None
        right = checksum == _checksum(head)
    except OSError as error:
        raise _damaged(path, f"{type(error).__name__}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON: {error}") from None
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        got = head.get("format") if isinstance(head, dict) else type(head).__name__
        other = head.get("library") if isinstance(head, dict) else None
        whose = f" of fastfpl {shown(other)}, which reads it," if other else ""
        raise _damaged(path, f"format {shown(got)}{whose} where {_FORMAT!r} is read here")
    if not right:
        raise _damaged(path, "its checksum is not the one that was written")
    try:
        seen = _Head.model_validate(head)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{where}: {first['msg']}") from None
    numbers = [row.round for row in seen.rounds]
    if numbers != list(range(seen.rounds_done)) or not numbers:
        raise _damaged(path, f"rounds that are not those from 0 to {seen.rounds_done - 1}")
    most = seen.task.clients + seen.task.newcomers
    of_clients = (seen.clients, seen.downloads.clients, seen.tuned.clients)
    if any(int(client) >= most for part in of_clients for client in part):
        raise _damaged(path, f"a client that is not one of {most}")
    return head


def _restored(folder: Path, head: dict[str, Any], device: torch.device | str) -> Checkpoint:
    """Read the tensors that a JSON names, after looking at every byte."""
    path = folder / head["tensors"]
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise _damaged(folder / CHECKPOINT, f"names {path.name}, which is not there") from None
    except OSError as error:
        raise _damaged(path, f"{type(error).__name__}: {error.strerror}") from None
    if hashlib.blake2b(content).hexdigest() != head["blake2b"]:
        raise _damaged(path, "its checksum is not the one that was written")
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, str(error)) from None
    sides: dict[str, State] = {"server": {}, "trainer": {}}
    for key, tensor in tensors.items():
        side, _, name = key.partition(".")
        if side not in sides or not name:
            raise _damaged(path, f"the tensor {key!r}")
        sides[side][name] = tensor.to(device)
    clients = StateFiles(folder / CLIENTS, device)
    said, older = _said(folder, head, CLIENTS)
    clients.restore(said)
    clients.segments.restore(head["clients"], head["segments"].get(CLIENTS, []), older)
    shared = {name: SharedStates(folder / name, device) for name in (DOWNLOADS, TUNED)}
    for name, states in shared.items():
        said, older = _said(folder, head, name)
        states.restore({"volumes": head[name]["volumes"], "clients": said})
        states.segments.restore(head[name]["clients"], head["segments"].get(name, []), older)
    return Checkpoint(
        head["facts"],
        head["rounds"],
        head["faces"],
        sides["server"],
        clients,
        sides["trainer"],
        shared[DOWNLOADS],
        shared[TUNED],
        head["settings"],
        head["task"],
        head["library"],
    )


def _said(
    folder: Path, head: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Say where the states of all clients are, and what of that each segment says."""
    younger = head[name] if name == CLIENTS else head[name]["clients"]
    older = read_segments(folder / name, head["segments"].get(name, []))
    said: dict[str, Any] = {}
    most = head["task"]["clients"] + head["task"].get("newcomers", 0)
    for segment in older:
        try:
            (_CLIENTS if name == CLIENTS else _PARTS).validate_python(segment)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(folder / name, f"a segment: {first['msg']}") from None
        if any(int(client) >= most for client in segment):
            raise _damaged(folder / name, f"a client that is not one of {most}")
        said |= segment
    return {**said, **younger}, older


def _named(folder: Path) -> Path | None:
    """Return the tensors that the present checkpoint names, if it can be read."""
    try:
        path: Path = folder / _read_head(folder)["tensors"]
    except Damaged:
        return None
    return path


def _checksum(head: Mapping[str, Any]) -> str:
    """Hash the JSON's content, whatever its white space."""
    text = json.dumps(head, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(
        f"fastfpl.run: {path} must be a whole checkpoint; got {reason}; "
        "nothing was changed, start again with another out"
    )
