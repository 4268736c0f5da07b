"""What a client keeps on its own disk: its state, and the answer to the last round."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fastfpl.errors import Damaged, InputError
from fastfpl.files import on_disk, own_folder, read_file, write_json, write_whole
from fastfpl.flower.letters import Letter, pack, unpack
from fastfpl.methods import State

__all__ = ["Memory"]

_FORMAT = "fastfpl-site-1"
_HEAD = "head.json"
_PARTS = ("before", "own", "down", "answer", "tuned")
_OURS = re.compile(rf"({'|'.join(_PARTS)})-\d{{5}}-[0-9a-f]{{8}}\.safetensors")


class Memory:
    """One client's part of one federation, in a folder that only its user may read.

    A round's files have names of their own; the rename of ``head.json`` is the moment at which
    they count. A process that dies before it leaves the former round whole.

    Parameters
    ----------
    folder : Path
        Of the client's site; made if it is not there.
    federation : str
        Which federation; 32 hexadecimal digits.
    client : int

    Attributes
    ----------
    round : int or None
        Which the client trained in last.
    """

    def __init__(self, folder: Path, federation: str, client: int) -> None:
        if re.fullmatch(r"[0-9a-f]{32}", federation) is None:
            raise InputError(
                f"fastfpl.flower: a federation must be 32 hexadecimal digits; got {federation!r}"
            )
        self.folder = folder / federation / f"client-{client:05d}"
        with on_disk("fastfpl.flower", "the client's folder", self.folder, "or name another"):
            folder.mkdir(parents=True, exist_ok=True)
            for part in (self.folder.parent, self.folder):
                own_folder(part)
                part.chmod(0o700)
        self._head: dict[str, Any] = {"format": _FORMAT, "round": None, "files": {}}
        path = self.folder / _HEAD
        if path.exists():
            try:
                head = json.loads(read_file(path).decode("utf-8"))
                good = head["format"] == _FORMAT and set(head["files"]) <= set(_PARTS)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise self._damaged(path, f"{type(error).__name__}: {error}") from None
            if not good:
                raise self._damaged(path, f"format {head['format']!r}")
            self._head = head

    @property
    def round(self) -> int | None:
        """Which the client trained in last."""
        found: int | None = self._head["round"]
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What the run was when the client trained last."""
        return dict(self._head.get("facts", {}))

    def answer(self, round_: int, asked: str) -> Letter | None:
        """Return the answer that was given to the same question in the same round."""
        if self.round != round_ or self._head["asked"] != asked:
            return None
        return Letter(self._head["answer"], pack(self._read("answer")))

    def state(self, round_: int) -> State:
        """Return what the client keeps before a round; of its last one, what it kept before it."""
        return self._read("before" if self.round == round_ else "own")

    @property
    def own(self) -> State:
        """What the client keeps now."""
        return self._read("own")

    @property
    def down(self) -> State:
        """What it had downloaded when it last trained; empty if it never did."""
        return self._read("down")

    @property
    def holds(self) -> bool:
        """Whether it has kept what it had downloaded when it last trained."""
        return "down" in self._head["files"]

    def keep(
        self,
        round_: int,
        asked: str,
        facts: Mapping[str, Any],
        before: State,
        own: State,
        down: State,
        answer: Letter,
    ) -> None:
        """Write down a round: what was kept before and after it, and what was answered."""
        states = {"before": before, "own": own, "down": down, "answer": unpack(answer.arrays)}
        files = {part: self._write(part, round_, state) for part, state in states.items() if state}
        head = {"round": round_, "asked": asked, "facts": dict(facts), "answer": answer.head}
        self._settle({**head, "format": _FORMAT, "files": files})

    def keep_tuned(self, round_: int, tuned: State) -> None:
        """Write down what the fine-tuning before an evaluation left."""
        files = {**self._head["files"], "tuned": self._write("tuned", round_, tuned)}
        self._settle({**self._head, "files": files})

    def _settle(self, head: dict[str, Any]) -> None:
        write_json(self.folder / _HEAD, head)
        self._head = head
        named = {entry["name"] for entry in head["files"].values()}
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _write(self, part: str, round_: int, state: State) -> dict[str, str]:
        content = save({name: t.detach().cpu().contiguous() for name, t in state.items()})
        # never the name of a file that the head names: a round may be trained again
        path = self.folder / f"{part}-{round_:05d}-{secrets.token_hex(4)}.safetensors"

        def write(beside: Path) -> None:
            beside.write_bytes(content)

        write_whole(path, write)
        return {"name": path.name, "blake2b": _digest(content)}

    def _read(self, part: str) -> State:
        entry = self._head["files"].get(part)
        if entry is None:
            return {}
        path = self.folder / str(entry["name"])
        if _OURS.fullmatch(path.name) is None or path.parent != self.folder:
            raise self._damaged(self.folder / _HEAD, f"the file {entry['name']!r}")
        try:
            content = read_file(path)
        except OSError as error:
            raise self._damaged(path, f"{type(error).__name__}: {error.strerror}") from None
        if _digest(content) != entry["blake2b"]:
            raise self._damaged(path, "its checksum is not the one that was written")
        try:
            state: dict[str, torch.Tensor] = load(content)
        except SafetensorError as error:
            raise self._damaged(path, str(error)) from None
        return state

    def _damaged(self, path: Path, reason: str) -> Damaged:
        return Damaged(
            f"fastfpl.flower: {path} must be what a client wrote; got {reason}; nothing was "
            "changed, remove the client's folder to let it begin anew"
        )


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
