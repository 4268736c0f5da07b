"""Quotients and roots of numbers that are few, rounded: a card's own are off by an ulp or two."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quotient", "root"]


@triton.jit
def quotient(x, y):
    if y.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)
