"""Launches: made where their tensors are, and by what Triton found out of calls like them.

Triton launches on the current device, and asks of every argument of every launch anew what the
compiled code depends on. A text pass makes a hundred launches that are like earlier ones: that can
take longer than its kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

__all__ = ["cdiv", "launched", "on_its_device", "power"]

P = ParamSpec("P")
R = TypeVar("R")

_INTERPRETED = triton.knobs.runtime.interpret
# launches of other numbers, places or options; beyond, all are found anew
_MOST = 4096
# low bits of an address: Triton compiles for multiples of 16
_ALIGNED = 127

_known: dict[tuple[object, ...], tuple[Any, tuple[object, ...], object]] = {}


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Let a launcher run where its first tensor is; one on the CPU changes nothing."""

    @functools.wraps(launcher)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    return guarded


def launched(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch so many programs of a kernel on the current device, that of the first argument.

    What was compiled is launched again where the call is like an earlier one: of the same kernel,
    device, dtypes, numbers and constants, with tensors that are aligned alike. That is finer than
    what Triton tells apart. What Triton is told from outside between such calls (``TRITON_DEBUG``,
    hooks of compilation) it does not hear; hooks of launches it does.
    """
    if _INTERPRETED:
        kernel[(programs,)](*arguments, **constants)
        return
    key = (
        id(kernel),
        arguments[0].get_device(),
        *[
            (x.dtype, x.data_ptr() & _ALIGNED) if isinstance(x, Tensor) else (x.__class__, x)
            for x in arguments
        ],
        *constants.items(),
    )
    found = _known.get(key)
    if found is not None:
        compiled, rest, _ = found
        compiled[programs, 1, 1](*arguments, *rest)
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if hasattr(compiled, "packed_metadata"):
        if len(_known) >= _MOST:
            _known.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _known[key] = compiled, rest, kernel  # whose number nobody else has then


def cdiv(number: int, size: int) -> int:
    """Divide, and round up; Triton's own does it for what is compiled too, and takes 2 us."""
    return -(-number // size)


def power(number: int) -> int:
    """Give the smallest power of two that is no smaller."""
    return 1 << (max(number, 1) - 1).bit_length()
