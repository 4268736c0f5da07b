"""What every transport kernel does to its tile: similarities, and the problems in it solved.

The names are private as the kernels call them: figures of compiled kernels are of that text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastfpl.kernels.transport_many import solve_many
from fastfpl.kernels.transport_pair import solve_pair

__all__ = ["INTERPRETED"]

# The interpreter takes the bits of bfloat16 operands of a product for integers, and cuts a number
# off when it stores one (Triton 3.9).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _whole(high, low, ACC: tl.constexpr):
    return tl.full((), high, ACC) + tl.full((), low, ACC)


@triton.jit
def _range(sim, valid, scale, AXIS: tl.constexpr):
    """Least and largest similarity along an axis, and how many give no finite number."""
    bad = tl.where(tl.abs(sim * (4 * scale)) < float("inf"), 0, 1)
    low = tl.min(tl.where(valid, sim, float("inf")), AXIS)
    high = tl.max(tl.where(valid, sim, -float("inf")), AXIS)
    return low, high, tl.max(tl.where(valid, bad, 0), AXIS)


@triton.jit
def _solve_two(
    s1,
    s2,
    valid,
    there,
    scale,
    mass,
    tol,
    max_iter,
    P: tl.constexpr,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Solve tiles of one or two columns; what is not finite has NaN for its column factors v."""
    low, high, bad = _range(s1, valid, scale, AXIS)
    if N == 2:
        low2, high2, bad2 = _range(s2, valid, scale, AXIS)
        low = tl.minimum(low, low2)
        high = tl.maximum(high, high2)
        bad = tl.maximum(bad, bad2)
    good = bad == 0
    # differences of near numbers are exact
    centre = tl.where(good, low * 0.5 + high * 0.5, 0.0)
    usable = tl.expand_dims(good, AXIS)
    z1 = tl.where(usable, (s1 - tl.expand_dims(centre, AXIS)) * scale, 0.0)
    z2 = z1
    if N == 2:
        z2 = tl.where(usable, (s2 - tl.expand_dims(centre, AXIS)) * scale, 0.0)
    g1, g1_low, g2, g2_low, v1, v2, miss, passes = solve_pair(
        z1, z2, valid, good & there, mass, tol, max_iter, P, N, BALANCED, AXIS
    )
    nan = float("nan")
    v1 = tl.where(good, v1, nan)
    v2 = tl.where(good, v2, nan)
    miss = tl.where(good, miss, nan)
    return z1, z2, centre, g1, g1_low, g2, g2_low, v1, v2, miss, passes


@triton.jit
def _solve_any(
    sim,
    valid,
    inside,
    there,
    scale,
    mass,
    tol,
    max_iter,
    P: tl.constexpr,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    P_AXIS: tl.constexpr,
    N_AXIS: tl.constexpr,
):
    """As `_solve_two`, for a tile whose prompts lie along an axis, padded where not ``inside``."""
    ON: tl.constexpr = N_AXIS - 1
    low, high, bad = _range(sim, valid & inside, scale, P_AXIS)
    good = tl.max(bad, ON) == 0
    centre = tl.where(good, tl.min(low, ON) * 0.5 + tl.max(high, ON) * 0.5, 0.0)
    usable = tl.expand_dims(tl.expand_dims(good, ON), P_AXIS)
    middle = tl.expand_dims(tl.expand_dims(centre, ON), P_AXIS)
    z = tl.where(usable, (sim - middle) * scale, 0.0)
    g, g_low, v, miss, passes = solve_many(
        z, valid, inside, good & there, mass, tol, max_iter, P, N, BALANCED, P_AXIS, N_AXIS
    )
    nan = float("nan")
    v = tl.where(tl.expand_dims(good, ON), v, nan)
    return z, centre, g, g_low, v, tl.where(good, miss, nan), passes


@triton.jit
def _similarities(
    x_rows,
    t_rows,
    x_there,
    t_there,
    x_stride_d,
    t_stride_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply rows of patches with rows of prompts on the matrix units."""
    sim = tl.zeros((x_rows.shape[0], t_rows.shape[0]), ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_rows[:, None] + d[None, :].to(tl.int64) * x_stride_d,
            mask=x_there[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(DOT)
        t = tl.load(
            t_rows[None, :] + d[:, None].to(tl.int64) * t_stride_d,
            mask=t_there[None, :] & (d < D)[:, None],
            other=0.0,
        ).to(DOT)
        if INTERPRETED:
            x, t = x.to(ACC), t.to(ACC)
        sim = tl.dot(x, t, acc=sim, input_precision=PRECISION, out_dtype=ACC)
    return sim
