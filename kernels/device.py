"""Launches go to the current device: launchers first make it the one where their tensors are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["on_its_device"]

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(
    launcher: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Let a launcher run where its first argument is; a tensor on the CPU changes nothing."""

    @functools.wraps(launcher)
    def guarded(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return launcher(first, *args, **kwargs)

    return guarded
