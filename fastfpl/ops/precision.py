"""Ops compute in the dtypes that they are given, whatever autocast makes of torch's products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["as_given"]


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside a ``with`` block, where it is on for a device."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
