"""Faces: the implementations of one op, in order of preference, with reasons when one refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
)
from torch.autograd import forward_ad

from fastfpl.errors import InputError, NotSupported, near

__all__ = [
    "NAMES",
    "Face",
    "choose",
    "face",
    "face_or_any",
    "forced",
    "in_transform",
    "note_face",
    "recorded_faces",
    "transformed",
]

#: Every name a face may have, best first.
NAMES = ("cuda", "triton", "cpu", "torch", "reference")
#: Those whose gradient is written by hand: backward, once.
BY_HAND = ("cuda", "triton", "cpu")


def _never(*_: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Face:
    """One implementation of an op.

    Attributes
    ----------
    name : str
        One of `NAMES`: ``cuda`` and ``triton`` are kernels, ``cpu`` is C++, ``torch`` fast algebra
        in plain PyTorch, ``reference`` the literal truth.
    run : callable
        Takes the op's arguments.
    missing : callable
        ``missing()`` returns sentences why this machine cannot run the face at all.
    against : callable
        ``against(*arguments)`` returns sentences why the face does not take these arguments.
    waits : bool
        True if it reads a number of a tensor, which waits for a device: a step with it cannot be
        replayed as a CUDA graph.
    """

    name: str
    run: Callable[..., Any]
    missing: Callable[[], list[str]] = _never
    against: Callable[..., list[str]] = _never
    waits: bool = False


_forced: ContextVar[dict[str | None, str] | None] = ContextVar("fastfpl_face", default=None)
_recorder: ContextVar[dict[str, set[str]] | None] = ContextVar("fastfpl_faces_used", default=None)


@contextmanager
def face(name: str, *ops: str) -> Iterator[None]:
    """Force one face inside a ``with`` block, for every op or only for the named ones.

    Parameters
    ----------
    name : str
        ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``.
    *ops : str
        Names of ops, e.g. ``"transport_plan"``; none means every op.

    Notes
    -----
    The choice is a context variable: threads and nested blocks do not disturb each other. An op
    that lacks the face raises `NotSupported`; nothing falls back.
    """
    if name not in NAMES:
        raise InputError(f"fastfpl.face: name must be a face; got {name!r}" + near(name, NAMES))
    choice: dict[str | None, str] = dict(_forced.get() or {})
    for op in ops or (None,):
        choice[op] = name
    if not ops:
        choice = {None: name}
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def recorded_faces() -> Iterator[dict[str, set[str]]]:
    """Collect which face answered for each op inside the block."""
    seen: dict[str, set[str]] = {}
    token = _recorder.set(seen)
    try:
        yield seen
    finally:
        _recorder.reset(token)


def face_or_any(name: str, op: str) -> AbstractContextManager[None]:
    """Force a face of an op in a ``with`` block, or none if the name is empty."""
    return face(name, op) if name else nullcontext()


def note_face(op: str, name: str) -> None:
    """Tell the `recorded_faces` block around, if there is one, that a face answered for an op."""
    seen = _recorder.get()
    if seen is not None:
        seen.setdefault(op, set()).add(name)


def forced(op: str) -> str | None:
    """Return the face that a ``with face(...)`` block asks for, if any."""
    choice = _forced.get() or {}
    return choice.get(op, choice.get(None))


def in_transform() -> bool:
    """Say whether a transform of torch.func is going on."""
    return bool(torch._C._are_functorch_transforms_active())


def transformed(*arguments: Any) -> str:
    """Say which derivative of the arguments no gradient by hand can give; "" for none.

    Looks at tensors, and at those in the fields of a dataclass such as a gate.
    """
    if torch.compiler.is_compiling() or not (in_transform() or forward_ad._current_level >= 0):
        return ""
    levels = [level.key() for level in get_interpreter_stack() or ()]
    if TransformType.Jvp in levels:
        return "forward-mode differentiation"
    if forward_ad._current_level < 0 and TransformType.Grad not in levels:
        return ""
    outside = 0
    for value in arguments:
        inside = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else [value]
        for tensor in inside:
            if not isinstance(tensor, torch.Tensor):
                continue
            if levels:
                while is_functorch_wrapped_tensor(tensor):
                    tensor = get_unwrapped(tensor)
                outside |= tensor.requires_grad
            elif forward_ad.unpack_dual(tensor).tangent is not None:
                return "forward-mode differentiation"
    # torch.func.grad inside another, or inside a backward pass
    if levels.count(TransformType.Grad) + outside > 1:
        return "a derivative of a gradient"
    return ""


def choose(op: str, faces: tuple[Face, ...], *arguments: Any) -> Face:
    """Return the first face that takes the arguments, or raise `NotSupported` with all reasons."""
    wanted = forced(op)
    reasons: list[str] = []
    seen_by = transformed(*arguments)
    for candidate in faces:
        if wanted is not None and candidate.name != wanted:
            reasons.append(f"  {candidate.name}: face {wanted!r} was asked for")
            continue
        against = candidate.missing() or candidate.against(*arguments)
        if seen_by and candidate.name in BY_HAND:
            against = [f"{seen_by} cannot look into it: it has a gradient by hand, backward, once"]
        if not against:
            note_face(op, candidate.name)
            return candidate
        reasons += [f"  {candidate.name}: {reason}" for reason in against]
    what = ", ".join(_describe(a) for a in arguments)
    raise NotSupported(f"fastfpl.ops.{op}: no face takes {what}\n" + "\n".join(reasons))


def _describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = getattr(value, "device", "")
        return f"{tuple(value.shape)} {value.dtype} on {device}"
    plain = value is None or isinstance(value, int | float | str)
    return repr(value) if plain else type(value).__name__
