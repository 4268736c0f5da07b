"""Transport of any number of prompts: the published scaling, with a stop for each problem."""

from __future__ import annotations

import triton
import triton.language as tl

from fastfpl.kernels.rounding import quotient
from fastfpl.kernels.transport_pair import plus

__all__ = ["entries", "solve_many"]


@triton.jit
def entries(
    z, g, g_low, inside, BALANCED: tl.constexpr, P_AXIS: tl.constexpr, N_AXIS: tl.constexpr
):
    """P times the plan that potentials g give to z (.., P, .., N, ..), before columns are exact."""
    t = (z + tl.expand_dims(g, P_AXIS)) + tl.expand_dims(g_low, P_AXIS)
    t = tl.where(inside, t, -float("inf"))  # columns of padding
    high = tl.max(t, N_AXIS)
    if not BALANCED:
        high = tl.maximum(high, 0.0)
    e = tl.exp(t - tl.expand_dims(high, N_AXIS))
    total = tl.sum(e, N_AXIS)
    return e / tl.expand_dims(tl.maximum(total, 1.0), N_AXIS)


@triton.jit
def solve_many(
    z,
    valid,
    inside,
    running,
    mass,
    tol,
    max_iter,
    P: tl.constexpr,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    P_AXIS: tl.constexpr,
    N_AXIS: tl.constexpr,
):
    """Iterate log v += log(column that is wanted / column that is there), rows capped in between.

    Each step minimises a convex function of log v over v for the rows' scalings of the last v, and
    those over the scalings: it never rises, and every limit is the optimum.
    """
    ON: tl.constexpr = N_AXIS - 1  # prompts, once the patches are summed
    target = mass * P / N
    if BALANCED:
        target = mass * 0 + P / N
    # every column holds its mass in one entry at most: from below, the first step is exact
    g = tl.log(mass / N) - tl.max(tl.where(valid, z, -float("inf")), P_AXIS)
    g_low = tl.zeros_like(g)
    miss = tl.max(g_low, ON)
    passes = running.to(tl.int32) * 0
    column = g_low
    some = tl.max(inside.to(tl.int32), P_AXIS) > 0
    while tl.max(running.to(tl.int32), 0) > 0:
        t = tl.where(valid, entries(z, g, g_low, inside, BALANCED, P_AXIS, N_AXIS), 0.0)
        going = tl.expand_dims(running, ON)
        # a column that underflows is at least 1e-37, and rises by that much a step
        column = tl.where(going, tl.maximum(tl.sum(t, P_AXIS), 1e-37), column)
        gap = tl.where(some, tl.log(target / column), 0.0)
        miss = tl.where(running, tl.max(tl.abs(gap), ON), miss)
        passes += running.to(tl.int32)
        running = running & (miss > tol) & (passes < max_iter)
        new, new_low = plus(g, g_low, gap)
        g = tl.where(tl.expand_dims(running, ON), new, g)
        g_low = tl.where(tl.expand_dims(running, ON), new_low, g_low)
    return g, g_low, quotient(mass, N * column), miss, passes
