"""Launches go to the current device: launchers first make it the one where their tensors are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["on_its_device"]

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Let a launcher run where its first tensor is; one on the CPU changes nothing."""

    @functools.wraps(launcher)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    return guarded
