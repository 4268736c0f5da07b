"""Launches: what Triton finds out of a call, kept for the calls that are like it.

Triton asks of every argument of every launch anew what the compiled code depends on. A text pass
makes a hundred launches that are like earlier ones, and that takes longer than its kernels run.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

__all__ = ["cdiv", "launched", "power"]

_INTERPRETED = triton.knobs.runtime.interpret
# launches of other numbers, places or options; beyond, all are found anew
_MOST = 4096
# finer than the alignment that any version of Triton compiles for
_ALIGNED = 127

_known: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def launched(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch so many programs of a kernel on the current device, that of the first argument.

    What was compiled is launched again where the call is like an earlier one: of the same kernel,
    device, dtypes, numbers and constants, with tensors that are aligned alike. That is finer than
    what Triton tells apart, whichever its version.
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
        compiled, rest = found
        compiled[programs, 1, 1](*arguments, *rest)
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if hasattr(compiled, "packed_metadata"):
        if len(_known) >= _MOST:
            _known.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _known[key] = compiled, rest


def cdiv(number: int, size: int) -> int:
    """Divide, and round up; Triton's own does it for what is compiled too, and takes 2 us."""
    return -(-number // size)


def power(number: int) -> int:
    """Give the smallest power of two that is no smaller."""
    return 1 << (max(number, 1) - 1).bit_length()
