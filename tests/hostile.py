"""A card's arithmetic for interpreted kernels: numpy's is better than any card's.

    with card_arithmetic():
        ...  # kernels launched here compute as a card may; card=90: as one of that generation

``pytest -p tests.hostile`` does so for a whole session.

What is imitated, in float32 (float64 is as exact on a card as here); errors are about as large as
NVIDIA's manuals of PTX and CUDA allow, and the same for the same number:

- exp and exp2 are ex2.approx: exp multiplies by a rounded log2(e) first; subnormal results are 0;
- log and log2 take subnormal numbers for 0; sqrt and rsqrt are approximate;
- x / y is div.full: x times a reciprocal within an ulp;
- products on the matrix units: operands in tf32 or 16 bits, tf32 cut off and not rounded; a few
  terms at a time are shifted to the largest one's exponent, cut off, and so is their sum. NVIDIA
  does not say so; Fasi et al. (PeerJ CS 7:e330, 2021) and Khattak and Mikaitis (arXiv:2512.07004)
  measured it, and MMA-Sim (arXiv:2511.10909, github.com/microsoft/MMA-Sim) has how many terms and
  bits each generation takes, equal bit by bit to what cards gave for a million random products.
  ``sm_80``, 86 and 89 cut more often than ``sm_90`` and 120, and are what is imitated by default;
- tf32x3 is three such products, of numbers rounded to tf32 and of what that left, which is cut off:
  what Triton 3.8 makes of it (one cvt.rna a number in the PTX, and the sum added in the end);
- a product of float32 asked for as "ieee" is exact there, and here;
- what becomes bfloat16 is rounded, where Triton's interpreter (3.6 to 3.9) cuts it off.

Sums in another order, and what programs do at the same time, are not imitated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

__all__ = [
    "are_bfloat16",
    "bfloat16_rounds",
    "card_arithmetic",
    "cut_to_tf32",
    "product",
    "pytest_configure",
    "round_to_tf32",
]

_LOG2_E = np.float32(1.4426950408889634)
_TINY = np.finfo(np.float32).tiny
_TF32 = np.uint32(0xFFFFE000)
#: The last 29 bits of float64, which float32 has not.
_BEYOND_FLOAT = np.uint64((1 << 29) - 1)


class _Units(NamedTuple):
    """How matrix units add up."""

    tf32: int  # terms of tf32 at a time, beside the sum so far
    sixteen: int  # of 16 bits
    bits: int  # of each term, behind the first bit of the largest


_AMPERE, _HOPPER = _Units(4, 8, 24), _Units(8, 16, 25)
#: Compute capability -> its units (MMA-Sim, src/mmasim/mmasim/nv_ptx/sim.py, commit 414f04e).
_UNITS = {80: _AMPERE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER, 120: _HOPPER}


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Drop the 13 last bits of float32, as mma does of operands that it takes for tf32."""
    return (np.ascontiguousarray(x).view(np.uint32) & _TF32).view(np.float32)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to the nearest tf32, ties away from zero: cvt.rna.tf32.f32."""
    return ((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & _TF32).view(np.float32)


def _off(exact: np.ndarray, ulps: float) -> np.ndarray:
    """Round float64 to float32 with an error of up to ``ulps`` / 2**23 of the number."""
    exact = np.ascontiguousarray(exact, np.float64)
    scrambled = (exact.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    error = scrambled.astype(np.float64) / 2.0**23 - 1
    return (exact * (1 + error * (ulps * 2.0**-23))).astype(np.float32)


def _towards_zero(exact: np.ndarray) -> np.ndarray:
    return (exact.view(np.uint64) & ~_BEYOND_FLOAT).view(np.float64).astype(np.float32)


def _exponent(x: np.ndarray) -> np.ndarray:
    """Return the exponent of the first bit of float64; far below all others for 0."""
    found = np.frexp(x)[1] - 1
    found[x == 0] = -200
    return found


def _summed(x: np.ndarray, y: np.ndarray, total: np.ndarray, terms: int, bits: int) -> np.ndarray:
    """Add x @ y to a sum on the matrix units, some terms at a time, which are exact products."""
    x, y = (np.ascontiguousarray(of, np.float64) for of in (x, y))
    x_exponent, y_exponent = _exponent(x), _exponent(y)
    for k in range(0, x.shape[-1], terms):
        some = range(k, min(k + terms, x.shape[-1]))
        places = [(np.s_[..., at, None], np.s_[..., at, None, :]) for at in some]
        total = total.astype(np.float64)
        largest = _exponent(total)
        for column, row in places:
            np.maximum(largest, x_exponent[column] + y_exponent[row], out=largest)
        grid = np.ldexp(1.0, bits - largest)
        found = np.trunc(total * grid)
        for column, row in places:
            found += np.trunc(x[column] * y[row] * grid)
        total = _towards_zero(found / grid)
    return total


def are_bfloat16(x: np.ndarray) -> bool:
    """Say whether float32 numbers are bfloat16's, which kernels widen for the interpreter alone."""
    return not (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF)).any()


def product(
    x: np.ndarray, y: np.ndarray, total: np.ndarray, precision: str, card: int
) -> np.ndarray:
    """Return x @ y + total as a card computes it when it is asked for a precision."""
    units = _UNITS[card]
    if total.dtype != np.float32 or (x.dtype == np.float32 and precision == "IEEE"):
        return np.matmul(x, y, dtype=total.dtype) + total
    if x.dtype != np.float32:
        return _summed(x, y, total, units.sixteen, units.bits)
    if precision == "TF32" and are_bfloat16(x) and are_bfloat16(y):
        return _summed(x, y, total, units.sixteen, units.bits)
    if precision == "TF32":
        return _summed(cut_to_tf32(x), cut_to_tf32(y), total, units.tf32, units.bits)
    assert precision == "TF32x3", f"a product of float32 in {precision}: not imitated"
    x_first, y_first = round_to_tf32(x), round_to_tf32(y)
    x_rest, y_rest = cut_to_tf32(x - x_first), cut_to_tf32(y - y_first)
    found = np.zeros_like(total)
    for a, b in ((x_rest, y_first), (x_first, y_rest), (x_first, y_first)):
        found = _summed(a, b, found, units.tf32, units.bits)
    return found + total


def _exp2(x: np.ndarray) -> np.ndarray:
    found = _off(np.exp2(x.astype(np.float64)), 2**0.5)
    return np.where(np.abs(found) < _TINY, np.float32(0), found)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < _TINY, np.float32(0), x).astype(np.float64)


def _divided(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    exact = x / y
    inverse = 1 / y.astype(np.float64)
    power_of_two = np.abs(np.frexp(inverse)[0]) == 0.5
    inverse = np.where(power_of_two | ~np.isfinite(inverse), inverse, _off(inverse, 1))
    found = (x * inverse.astype(np.float32)).astype(np.float32)
    # operands are scaled first: nothing is lost to infinities or to 0 on the way
    return np.where(np.isfinite(found) & (found != 0) & np.isfinite(exact), found, exact)


#: Name of a builder's method -> what it computes of float32.
_ONE = {
    "create_exp": lambda x: _exp2(x * _LOG2_E),
    "create_exp2": _exp2,
    "create_log": lambda x: _off(np.log(_flushed(x)), 1),
    "create_log2": lambda x: _off(np.log2(_flushed(x)), 1),
    "create_sqrt": lambda x: _off(np.sqrt(x.astype(np.float64)), 1),
    "create_rsqrt": lambda x: _off(1 / np.sqrt(x.astype(np.float64)), 1),
}


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 of float32, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    near = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    nan = bits | np.uint32(0x400000)
    return (np.where(np.isnan(x), nan, near) >> np.uint32(16)).astype(np.uint16)


@contextlib.contextmanager
def bfloat16_rounds() -> Iterator[None]:
    """Let kernels that are interpreted inside the block round to bfloat16, not cut off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_bfloat16(x.data), tl.bfloat16)
        return plain(self, x, to)

    with mock.patch.object(InterpreterBuilder, "cast_impl", cast):
        yield


@contextlib.contextmanager
def card_arithmetic(card: int = 80) -> Iterator[None]:
    """Let kernels that are interpreted inside the block compute as a card may.

    ``card`` is a compute capability; on the matrix units alone does anything depend on it.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def of_one(
        plain: Callable[..., Any], approximate: Callable[..., np.ndarray]
    ) -> Callable[..., Any]:
        def create(self: Any, x: Any) -> Any:
            if x.data.dtype != np.float32:
                return plain(self, x)
            with np.errstate(all="ignore"):
                return TensorHandle(approximate(x.data), x.dtype.scalar)

        return create

    exact_divide = InterpreterBuilder.create_fdiv

    def divide(self: Any, x: Any, y: Any) -> Any:
        if x.data.dtype != np.float32 or y.data.dtype != np.float32:
            return exact_divide(self, x, y)
        with np.errstate(all="ignore"):
            return TensorHandle(_divided(x.data, y.data), x.dtype.scalar)

    def dot(self: Any, x: Any, y: Any, total: Any, precision: Any, _: Any) -> Any:
        with np.errstate(all="ignore"):
            found = product(x.data, y.data, total.data, precision.name, card)
        return TensorHandle(found, total.dtype.scalar)

    with contextlib.ExitStack() as stack:
        stack.enter_context(bfloat16_rounds())
        for name, approximate in _ONE.items():
            one = of_one(getattr(InterpreterBuilder, name), approximate)
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, one))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_fdiv", divide))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", dot))
        yield


def pytest_configure(config: Any) -> None:
    """Compute so for a whole session, which ``-p tests.hostile`` asks for."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    block = card_arithmetic()
    block.__enter__()
    config.add_cleanup(lambda: block.__exit__(None, None, None))
