"""What travels: a head of plain facts and named arrays as bytes; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastfpl.errors import InputError, cut, shown
from fastfpl.methods import State

__all__ = ["SCHEMA", "WIRES", "Letter", "Packed", "Refused", "digest", "pack", "unpack"]

#: Of letters; both sides must have the same one.
SCHEMA = 1
#: How floats travel: as they are, or in 16 bits.
WIRES = ("exact", "float16", "bfloat16")

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_MOST_DIMENSIONS = 8


class Refused(InputError):
    """A letter that is not taken; the sentence says why."""


@dataclass(frozen=True)
class Packed:
    """A tensor on its way.

    Attributes
    ----------
    dtype : str
        As torch names it.
    shape : tuple of int
    data : bytes
        Row by row, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Letter:
    """What one side sends to the other.

    Attributes
    ----------
    head : dict
        Plain facts, as JSON has them.
    arrays : dict from name to Packed
    """

    head: dict[str, Any]
    arrays: dict[str, Packed] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(len(one.data) for one in self.arrays.values())

    @property
    def text(self) -> str:
        """The head as JSON."""
        return json.dumps(self.head, sort_keys=True)

    @classmethod
    def read(cls, text: str, arrays: Mapping[str, Packed]) -> Letter:
        """Put a letter together from what came; refuse a head that is no JSON of facts."""
        try:
            head = json.loads(text)
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict):
            raise Refused(f"fastfpl.flower: a letter's head must be JSON of facts; got {cut(text)}")
        return cls(head, dict(arrays))


def pack(state: Mapping[str, torch.Tensor], wire: str = "exact") -> dict[str, Packed]:
    """Make bytes of named tensors; floats in 16 bits if the wire says so."""
    packed = {}
    for name, tensor in state.items():
        sent = tensor.detach().cpu()
        if wire != "exact" and sent.is_floating_point() and sent.element_size() > 2:
            narrow = sent.to(_DTYPES[wire])
            if not bool(narrow.isfinite().all()):
                raise InputError(
                    f"fastfpl.flower: wire must hold what is sent; got {wire} for {name!r} with "
                    f"{sent.abs().max().item():g}; use wire=bfloat16 or exact"
                )
            sent = narrow
        flat = sent.contiguous().reshape(-1).view(torch.uint8)
        dtype = str(sent.dtype).removeprefix("torch.")
        packed[name] = Packed(dtype, tuple(sent.shape), flat.numpy().tobytes())
    return packed


def unpack(
    arrays: Mapping[str, Packed],
    like: Mapping[str, torch.dtype] | None = None,
    device: torch.device | str = "cpu",
) -> State:
    """Make tensors of bytes.

    Parameters
    ----------
    arrays : mapping from name to Packed
    like : mapping from name to dtype, optional
        What 16-bit floats become again.
    device : torch.device

    Raises
    ------
    Refused
        If dtype, shape and length do not go together.
    """
    state: State = {}
    for name, one in arrays.items():
        dtype = _DTYPES.get(one.dtype)
        if dtype is None:
            raise Refused(
                f"fastfpl.flower: the dtype of {shown(name)} must be one of {', '.join(_DTYPES)}; "
                f"got {shown(one.dtype)}"
            )
        good = len(one.shape) <= _MOST_DIMENSIONS and all(0 <= n < 2**40 for n in one.shape)
        wanted = math.prod(one.shape) * dtype.itemsize if good else -1
        if wanted != len(one.data):
            raise Refused(
                f"fastfpl.flower: {shown(name)} must have the bytes of its shape; got "
                f"{len(one.data)} bytes for {one.dtype} of shape {shown(one.shape)}"
            )
        if one.data:
            flat = torch.frombuffer(bytearray(one.data), dtype=dtype)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensor = flat.reshape(one.shape)
        if like is not None and name in like and tensor.is_floating_point():
            tensor = tensor.to(like[name])
        state[name] = tensor.to(device)
    return state


def digest(arrays: Mapping[str, Packed]) -> str:
    """Digest named arrays, whatever their order."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        one = arrays[name]
        total.update(repr((name, one.dtype, one.shape, len(one.data))).encode())
        total.update(one.data)
    return total.hexdigest()
