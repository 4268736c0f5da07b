"""What the server takes of clients: every answer is held to this before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fastfpl.data.names import flaw
from fastfpl.errors import shown
from fastfpl.flower.identity import task_digest
from fastfpl.flower.letters import SCHEMA, Letter, Refused, unpack
from fastfpl.flower.rules import Rules
from fastfpl.methods import State

__all__ = ["Card", "Update", "check_card", "check_marks", "check_update"]

_MOST_CLIENTS = 1_000_000


@dataclass(frozen=True)
class Card:
    """What a client says of itself when it joins.

    Attributes
    ----------
    client, clients : int
        Its number, and of how many.
    identity : dict
        Digests, see `fastfpl.flower.identity`.
    classes, domains : list of str
    client_domains : list of int or None
    images : int
        Training images.
    exams : list of dict
        ``name``, ``about``, ``domains``, and ``images`` of the client.
    data : dict
        Facts of its data set.
    held : bool
        Whether it has kept what it had downloaded when it last trained.
    name : str or None
        What people call it, where clients have images of their own.
    """

    client: int
    clients: int
    identity: dict[str, str]
    classes: list[str]
    domains: list[str]
    client_domains: list[int] | None
    images: int
    exams: list[dict[str, Any]]
    data: dict[str, Any]
    held: bool = False
    name: str | None = None

    @cached_property
    def task(self) -> str:
        """Digest of what a method is told of its data."""
        return task_digest(self.classes, self.domains, self.client_domains, self.clients)


@dataclass(frozen=True)
class Update:
    """What a client sends after training.

    Attributes
    ----------
    upload : State
    images : int
        Its weight.
    loss : float
    seen : int
        Images that it trained on.
    nbytes : int
        Bytes of the arrays as they travelled.
    """

    upload: State
    images: int
    loss: float
    seen: int
    nbytes: int


def check_card(letter: Letter) -> Card:
    """Read what a client says when it joins, or refuse it."""
    head = _headed(letter, "card")
    if letter.arrays:
        raise Refused("fastfpl.flower: a card must hold no arrays; got some")
    clients = _number(head, "clients", 1, _MOST_CLIENTS)
    client = _number(head, "client", 0, clients - 1)
    domains = head.get("client_domains")
    if domains is not None and not (_numbers(domains) and len(domains) == clients):
        raise Refused(
            f"fastfpl.flower: client_domains must be {clients} numbers or none; got "
            f"{shown(domains)}"
        )
    exams = head.get("exams")
    good = isinstance(exams, list) and 0 < len(exams) < 100
    if not good or not all(_exam(one) for one in exams or ()):
        raise Refused(
            f"fastfpl.flower: exams must have name, about, domains, images; got {shown(exams)}"
        )
    assert isinstance(exams, list)
    name = head.get("name")
    if name is not None and (not _named(name) or flaw(name)):
        raise Refused(f"fastfpl.flower: name must be text that can be seen; got {shown(name)}")
    data, identity = head.get("data"), head.get("identity")
    if not isinstance(data, dict) or not isinstance(identity, dict) or not _described(data):
        raise Refused(
            "fastfpl.flower: a card must hold an identity, and of its data name, skipped, notes, "
            f"activation, deal and fingerprints; got {shown(data)}"
        )
    return Card(
        client,
        clients,
        {str(key): str(value)[:200] for key, value in identity.items()},
        _texts(head, "classes"),
        _texts(head, "domains"),
        domains,
        _number(head, "images", 1, 2**40),
        exams,
        data,
        head.get("held") is True,
        name,
    )


def check_update(
    letter: Letter,
    *,
    federation: str,
    client: int,
    round_: int,
    asked: str,
    images: int,
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    rules: Rules,
    device: torch.device | str = "cpu",
) -> Update:
    """Take what a client sends after training, or refuse it with the reason."""
    who = f"client {client}"
    head = _headed(letter, "update")
    _belongs(head, federation, client, round_)
    if head.get("asked") != asked:
        raise Refused(
            f"fastfpl.flower: an update must answer the download {asked} of its round; got "
            f"{shown(head.get('asked'))} from {who}"
        )
    if letter.nbytes > rules.most_bytes:
        raise Refused(
            f"fastfpl.flower: an update must have at most most_bytes={rules.most_bytes} bytes; got "
            f"{letter.nbytes} from {who}"
        )
    if set(letter.arrays) != set(wanted):
        raise Refused(
            f"fastfpl.flower: an update must hold the arrays {', '.join(sorted(wanted)) or 'none'};"
            f" got {shown(', '.join(sorted(map(str, letter.arrays))) or 'none')} from {who}"
        )
    for name, (shape, dtype) in wanted.items():
        one = letter.arrays[name]
        if tuple(one.shape) != shape:
            raise Refused(
                f"fastfpl.flower: {name!r} must have shape {shape}; got {shown(one.shape)} from "
                f"{who}"
            )
        travels = str(dtype).removeprefix("torch.")
        if rules.wire != "exact" and dtype.is_floating_point and dtype.itemsize > 2:
            travels = rules.wire
        if one.dtype != travels:
            raise Refused(
                f"fastfpl.flower: {name!r} must travel as {travels}; got {shown(one.dtype)} from "
                f"{who}"
            )
    like = {name: dtype for name, (_, dtype) in wanted.items()}
    upload = unpack(letter.arrays, like, device)
    for name, tensor in upload.items():
        if not bool(tensor.isfinite().all()):
            raise Refused(f"fastfpl.flower: {name!r} must be finite; got NaN or inf from {who}")
        norm = torch.linalg.vector_norm(tensor.double()).item()
        if norm > rules.most_norm:
            raise Refused(
                f"fastfpl.flower: the norm of {name!r} must be at most most_norm="
                f"{rules.most_norm:g}; got {norm:g} from {who}"
            )
    weight = _number(head, "images", 0, 2**40)
    if weight != images:
        raise Refused(
            f"fastfpl.flower: the weight of {who} must be the {images} images that it joined "
            f"with; got {weight}"
        )
    return Update(
        upload,
        weight,
        _real(head, "loss"),
        _number(head, "seen", 0, 2**50),
        letter.nbytes,
    )


def check_marks(
    letter: Letter, *, federation: str, client: int, round_: int, exams: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Take a client's marks, one an exam, or refuse them with the reason."""
    head = _headed(letter, "marks")
    _belongs(head, federation, client, round_)
    marks = head.get("marks")
    names = [exam["name"] for exam in exams]
    if letter.arrays or not isinstance(marks, list) or len(marks) != len(names):
        raise Refused(
            f"fastfpl.flower: marks must answer the exams {', '.join(names)}; got {shown(marks)} "
            f"from client {client}"
        )
    found = []
    for one, exam in zip(marks, exams, strict=True):
        good = (
            isinstance(one, dict)
            and one.get("name") == exam["name"]
            and one.get("images") == exam["images"]
            and all(_share(one.get(key)) for key in ("accuracy", "macro_f1"))
            and isinstance(one.get("domains"), dict)
            and all(d in exam["domains"] and _share(share) for d, share in one["domains"].items())
        )
        if not good:
            raise Refused(
                f"fastfpl.flower: a mark must have shares of 1 in accuracy, macro_f1 and domains, "
                f"for the {exam['images']} images of {exam['name']!r}; got {shown(one)} from "
                f"client {client}"
            )
        found.append({key: one[key] for key in ("accuracy", "macro_f1", "domains")})
    return found


# -- small -----------------------------------------------------------------------------------------


def _headed(letter: Letter, kind: str) -> dict[str, Any]:
    head = letter.head
    if head.get("schema") != SCHEMA:
        raise Refused(
            f"fastfpl.flower: an answer must have schema {SCHEMA}; got {shown(head.get('schema'))}"
        )
    if head.get("kind") != kind:
        raise Refused(
            f"fastfpl.flower: an answer must be of kind {kind}; got {shown(head.get('kind'))}"
        )
    return head


def _belongs(head: Mapping[str, Any], federation: str, client: int, round_: int) -> None:
    for key, wanted in (("federation", federation), ("client", client), ("round", round_)):
        got = head.get(key)
        if got != wanted or isinstance(got, bool):
            raise Refused(
                f"fastfpl.flower: an answer must be of {key} {wanted}; got {shown(got)} from "
                f"client {client}"
            )


def _number(head: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = head.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(
            f"fastfpl.flower: {key} must be a whole number from {least} to {most}; got "
            f"{shown(value)}"
        )
    return value


def _real(head: Mapping[str, Any], key: str) -> float:
    value = head.get(key)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value):  # type: ignore[arg-type]
        raise Refused(f"fastfpl.flower: {key} must be a finite number; got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _share(value: object) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and 0 <= value <= 1  # type: ignore[operator]


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in value
    )


def _texts(head: Mapping[str, Any], key: str) -> list[str]:
    value = head.get(key)
    good = isinstance(value, list) and 0 < len(value) <= 100_000
    if not good or not all(isinstance(v, str) and 0 < len(v) <= 10_000 for v in value or ()):
        raise Refused(f"fastfpl.flower: {key} must be a list of names; got {shown(value)}")
    assert isinstance(value, list)
    return value


def _described(data: dict[str, Any]) -> bool:
    """Whether facts of a data set are what a result may hold."""
    keys = ("deal", "notes", "test_images", "clients", "training", "pixels")
    deal, notes, tests, clients, training, pixels = (data.get(key) for key in keys)
    return (
        all(_named(data.get(key)) for key in ("name", "activation", "train_images"))
        and isinstance(data.get("skipped"), int)
        and 0 <= data["skipped"] < 2**40
        and isinstance(notes, list)
        and len(notes) <= 100
        and all(isinstance(note, str) and len(note) <= 10_000 for note in notes)
        and isinstance(deal, dict)
        and set(deal) == {"train", "test"}
        and all(map(_named, deal.values()))
        and isinstance(tests, list)
        and all(map(_named, tests))
        and isinstance(clients, list)
        and all(map(_named, clients))
        and isinstance(training, dict)
        and set(training) == {"used", "there"}
        and _numbers(list(training.values()))
        and isinstance(pixels, dict)
        and set(pixels) == {"mean", "std"}
        and all(isinstance(p, list) and len(p) == 3 for p in pixels.values())
        and all(isinstance(p, float) and math.isfinite(p) for q in pixels.values() for p in q)
    )


def _named(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


def _exam(one: object) -> bool:
    return (
        isinstance(one, dict)
        and _named(one.get("name"))
        and isinstance(one.get("about"), str)
        and len(one["about"]) <= 1000
        and isinstance(one.get("domains"), list)
        and all(map(_named, one["domains"]))
        and isinstance(one.get("images"), int)
        and 0 < one["images"] < 2**40
    )
