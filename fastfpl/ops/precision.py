"""What torch's autocast means to an op.

Ops that are matrix products to their users (texts, attention) answer in the dtype that autocast
asks for, as eager does. Those whose numbers an exponential magnifies (gate, transport) switch it
off and compute in the widest dtype that they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["as_given", "autocast_dtype", "autocast_to", "widest", "without_autocast"]


def autocast_dtype(device: torch.device, given: torch.dtype) -> torch.dtype:
    """Return the dtype that eager multiplies numbers of dtype ``given`` in, which autocast chooses.

    float64 is left alone, as autocast leaves it.
    """
    kind = device.type
    if given == torch.float64 or not torch.amp.is_autocast_available(kind):
        return given
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given


def widest(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Give tensors their widest dtype under autocast, as eager's additions do; else as they are."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


@contextmanager
def autocast_to(device: torch.device, dtype: torch.dtype, given: torch.dtype) -> Iterator[None]:
    """Let autocast choose a dtype inside a ``with`` block; where it is the one given, none."""
    if dtype == given:
        with as_given(device):
            yield
        return
    with torch.autocast(device.type, dtype=dtype):
        yield


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside a ``with`` block, where it is on for a device."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off for every device inside a ``with`` block."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(as_given(torch.device(kind)))
        yield
