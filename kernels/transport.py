"""Entropic transport of image patches onto prompts: whole problems in registers, one launch.

Every problem is shifted by the middle of its similarities and divided by eps, so that P times its
plan is exp(z + log v) where a row stays below its cap, and that row divided by its sum elsewhere.
log v is kept as a pair of numbers: at eps = .005 it is up to 400, where the last bit of a float32
is 3e-5, and in rows near their cap z and log v cancel.

Loops end by themselves: a problem that is not finite never starts and gives NaN, and no problem
takes more than max_iter passes.
"""

from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.transport_many import entries, solve_many
from fastfpl.kernels.transport_pair import plan_of_pair, solve_pair

__all__ = [
    "MOST_PATCHES",
    "MOST_PATCHES_DOUBLE",
    "MOST_PROMPTS",
    "transport_logits_bwd",
    "transport_logits_fwd",
    "transport_plan_fwd",
]

#: Most patches of an image and prompts of a class: what one program holds in registers.
MOST_PATCHES, MOST_PROMPTS = 1024, 16
#: Of float64 in `transport_logits_fwd`: of more, one step of the product needs 128 KiB.
MOST_PATCHES_DOUBLE = 512

# The interpreter takes the bits of bfloat16 operands of a product for integers, and cuts a number
# off when it stores one (Triton 3.9).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Programs that keep the largest card busy: up to there, images are summed in more parts.
_BUSY = 256


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


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _transport_plan_fwd_kernel(
    sim_ptr,
    plan_ptr,
    iterations_ptr,
    residual_ptr,
    problems,
    stride_b,
    stride_p,
    stride_n,
    scale,
    scale_low,
    mass,
    mass_low,
    tol,
    max_iter,
    P: tl.constexpr,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    scale = _whole(scale, scale_low, ACC)
    mass = _whole(mass, mass_low, ACC)
    tol = _whole(tol, 0.0, ACC)
    b = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    p = tl.arange(0, BLOCK_P)
    there = b < problems
    at = b[:, None] * stride_b + p[None, :].to(tl.int64) * stride_p
    out = (b[:, None] * P + p[None, :]) * N
    inside_p = (p < P)[None, :]
    reads = there[:, None] & inside_p
    if N <= 2:
        s1 = tl.load(sim_ptr + at, mask=reads, other=0.0).to(ACC)
        s2 = s1
        if N == 2:
            s2 = tl.load(sim_ptr + at + stride_n, mask=reads, other=0.0).to(ACC)
        z1, z2, _, g1, g1_low, g2, g2_low, v1, v2, miss, passes = _solve_two(
            s1, s2, inside_p, there, scale, mass, tol, max_iter, P, N, BALANCED, 1
        )
        t1, t2 = plan_of_pair(z1, z2, g1, g1_low, g2, g2_low, v1, v2, N, BALANCED, 1)
        tl.store(plan_ptr + out, t1.to(plan_ptr.dtype.element_ty), mask=reads)
        if N == 2:
            tl.store(plan_ptr + out + 1, t2.to(plan_ptr.dtype.element_ty), mask=reads)
    else:
        n = tl.arange(0, BLOCK_N)[None, None, :]
        mask = reads[:, :, None] & (n < N)
        sim = tl.load(sim_ptr + at[:, :, None] + n * stride_n, mask=mask, other=0.0).to(ACC)
        z, _, g, g_low, v, miss, passes = _solve_any(
            sim,
            inside_p[:, :, None],
            n < N,
            there,
            scale,
            mass,
            tol,
            max_iter,
            P,
            N,
            BALANCED,
            1,
            2,
        )
        t = entries(z, g, g_low, n < N, BALANCED, 1, 2) * v[:, None, :]
        tl.store(plan_ptr + out[:, :, None] + n, t.to(plan_ptr.dtype.element_ty), mask=mask)
    tl.store(iterations_ptr + b, passes.to(tl.int64), mask=there)
    tl.store(residual_ptr + b, miss.to(residual_ptr.dtype.element_ty), mask=there)


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


@triton.jit
def _entropy(share):
    """-x log x of parts of a plan's mass, and 0 of nothing."""
    return -share * tl.log(tl.where(share > 0, share, 1.0))


@triton.jit
def _transport_logits_fwd_kernel(
    x_ptr,
    t_ptr,
    logits_ptr,
    iterations_ptr,
    residual_ptr,
    entropy_ptr,
    state_ptr,
    images,
    classes,
    x_stride_u,
    x_stride_b,
    x_stride_p,
    x_stride_d,
    t_stride_u,
    t_stride_c,
    t_stride_n,
    t_stride_d,
    scale,
    scale_low,
    mass,
    mass_low,
    tol,
    max_iter,
    P: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BALANCED: tl.constexpr,
    MEASURE: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    scale = _whole(scale, scale_low, ACC)
    mass = _whole(mass, mass_low, ACC)
    tol = _whole(tol, 0.0, ACC)
    # neighbours share an image: its patches come from the cache
    blocks = tl.cdiv(classes, BLOCK_C)
    image = tl.program_id(0).to(tl.int64) // blocks
    c = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    u = image // images
    p = tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_N * BLOCK_C)  # prompts outside, classes inside
    of_c = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_C + column % BLOCK_C
    of_n = (column // BLOCK_C).to(tl.int64)
    sim = _similarities(
        x_ptr + u * x_stride_u + (image % images) * x_stride_b + p.to(tl.int64) * x_stride_p,
        t_ptr + u * t_stride_u + of_c * t_stride_c + of_n * t_stride_n,
        p < P,
        (of_c < classes) & (of_n < N),
        x_stride_d,
        t_stride_d,
        D,
        BLOCK_D,
        ACC,
        DOT,
        PRECISION,
    )
    there = c < classes
    at = image * classes + c
    inside_p = (p < P)[:, None]
    FIELDS: tl.constexpr = 3 * N + 1
    if N <= 2:
        if N == 2:
            pair = tl.permute(tl.reshape(sim, (BLOCK_P, 2, BLOCK_C)), (0, 2, 1))
            s1, s2 = tl.split(pair)
        else:
            s1 = sim
            s2 = sim
        z1, z2, centre, g1, g1_low, g2, g2_low, v1, v2, miss, passes = _solve_two(
            s1, s2, inside_p, there, scale, mass, tol, max_iter, P, N, BALANCED, 0
        )
        t1, t2 = plan_of_pair(z1, z2, g1, g1_low, g2, g2_low, v1, v2, N, BALANCED, 0)
        value = t1 * z1
        if N == 2:
            value += t2 * z2
        found = tl.sum(tl.where(inside_p, value, 0.0), 0)
        if MEASURE:
            parts = _entropy(t1 / mass)
            if N == 2:
                parts += _entropy(t2 / mass)
            parts = tl.where(inside_p, parts, 0.0)
            entropy = tl.sum(parts, 0)
        if KEEP:
            kept = state_ptr + at * FIELDS
            tl.store(kept, centre, mask=there)
            tl.store(kept + 1, g1, mask=there)
            tl.store(kept + (N + 1), g1_low, mask=there)
            tl.store(kept + (2 * N + 1), v1, mask=there)
            if N == 2:
                tl.store(kept + 2, g2, mask=there)
                tl.store(kept + 4, g2_low, mask=there)
                tl.store(kept + 6, v2, mask=there)
    else:
        sim = tl.reshape(sim, (BLOCK_P, BLOCK_N, BLOCK_C))
        n = tl.arange(0, BLOCK_N)[:, None]
        inside = (n < N)[None, :, :]
        valid = inside_p[:, :, None]
        z, centre, g, g_low, v, miss, passes = _solve_any(
            sim, valid, inside, there, scale, mass, tol, max_iter, P, N, BALANCED, 0, 1
        )
        t = entries(z, g, g_low, inside, BALANCED, 0, 1) * v[None, :, :]
        t = tl.where(inside & valid, t, 0.0)
        found = tl.sum(tl.sum(t * z, 0), 0)
        if MEASURE:
            entropy = tl.sum(tl.sum(_entropy(t / mass), 0), 0)
        if KEEP:
            kept = state_ptr + at * FIELDS
            tl.store(kept, centre, mask=there)
            fields = kept[None, :] + 1 + n
            tl.store(fields, g, mask=there[None, :] & (n < N))
            tl.store(fields + N, g_low, mask=there[None, :] & (n < N))
            tl.store(fields + 2 * N, v, mask=there[None, :] & (n < N))
    if MEASURE:
        most = tl.log(miss * 0 + P * N)
        entropy = tl.where(most == 0, 1.0, entropy / most)
        tl.store(entropy_ptr + at, entropy, mask=there)
    # the columns of the plan hold its mass to rounding
    found = centre * mass + found / scale
    tl.store(logits_ptr + at, found.to(logits_ptr.dtype.element_ty), mask=there)
    tl.store(iterations_ptr + at, passes.to(tl.int64), mask=there)
    tl.store(residual_ptr + at, miss.to(residual_ptr.dtype.element_ty), mask=there)


@triton.jit
def _weights(
    sim,
    kept,
    d_logits,
    there,
    scale,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of similarities: the plan, rebuilt row by row from what is kept, times d logits."""
    n = tl.arange(0, BLOCK_N)[:, None]
    inside = n < N
    mask = there[None, :] & inside
    fields = kept[None, :] + 1 + n
    centre = tl.load(kept, mask=there, other=0.0)
    g = tl.load(fields, mask=mask, other=0.0)
    g_low = tl.load(fields + N, mask=mask, other=0.0)
    v = tl.load(fields + 2 * N, mask=mask, other=0.0) * d_logits[None, :]
    z = (tl.reshape(sim, (BLOCK_P, BLOCK_N, BLOCK_C)) - centre[None, None, :]) * scale
    t = entries(z, g, g_low, inside[None, :, :], BALANCED, 0, 1) * v[None, :, :]
    return tl.reshape(t, (BLOCK_P, BLOCK_N * BLOCK_C))


@triton.jit
def _weighted_sum(weight, features, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Total + weight @ features. The matrix units cut float32 off at 10 bits: biased by 3.5e-4.

    "halves" is for features that have no more: the weights' first bits, and then what they leave.
    """
    if PRECISION == "halves":
        first = (weight.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(weight - first, features, acc=total, input_precision="tf32", out_dtype=ACC)
        return tl.dot(first, features, acc=total, input_precision="tf32", out_dtype=ACC)
    else:
        return tl.dot(weight, features, acc=total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _transport_logits_bwd_patches_kernel(
    d_logits_ptr,
    x_ptr,
    t_ptr,
    state_ptr,
    d_x_ptr,
    images,
    classes,
    x_stride_u,
    x_stride_b,
    x_stride_p,
    x_stride_d,
    t_stride_u,
    t_stride_c,
    t_stride_n,
    t_stride_d,
    scale,
    scale_low,
    P: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BALANCED: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    scale = _whole(scale, scale_low, ACC)
    program = tl.program_id(0).to(tl.int64)
    OUTS: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    ROWS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    image = program // (OUTS * ROWS)
    p = (program // OUTS) % ROWS * BLOCK_P + tl.arange(0, BLOCK_P)
    d = program % OUTS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    u = image // images
    x_rows = x_ptr + u * x_stride_u + (image % images) * x_stride_b + p * x_stride_p
    column = tl.arange(0, BLOCK_N * BLOCK_C)  # prompts outside, classes inside
    of_n = (column // BLOCK_C).to(tl.int64)
    d_x = tl.zeros((BLOCK_P, BLOCK_OUT), ACC)
    first = program * 0
    while first < classes:
        c = first + tl.arange(0, BLOCK_C)
        of_c = first + column % BLOCK_C
        t_there = (of_c < classes) & (of_n < N)
        t_rows = t_ptr + u * t_stride_u + of_c * t_stride_c + of_n * t_stride_n
        sim = _similarities(
            x_rows, t_rows, p < P, t_there, x_stride_d, t_stride_d, D, BLOCK_D, ACC, DOT, PRECISION
        )
        at = image * classes + c
        by = tl.load(d_logits_ptr + at, mask=c < classes, other=0.0).to(ACC)
        kept = state_ptr + at * (3 * N + 1)
        weight = _weights(sim, kept, by, c < classes, scale, N, BALANCED, BLOCK_P, BLOCK_N, BLOCK_C)
        t = tl.load(
            t_rows[:, None] + d[None, :] * t_stride_d,
            mask=t_there[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(ACC)
        d_x = _weighted_sum(weight, t, d_x, PRECISION_OUT, ACC)
        first += BLOCK_C
    out = d_x_ptr + (image * P + p[:, None]) * D + d[None, :]
    tl.store(out, d_x.to(d_x_ptr.dtype.element_ty), mask=(p < P)[:, None] & (d < D)[None, :])


@triton.jit
def _transport_logits_bwd_prompts_kernel(
    d_logits_ptr,
    x_ptr,
    t_ptr,
    state_ptr,
    d_t_ptr,
    clients,
    images,
    classes,
    images_per_part,
    x_stride_u,
    x_stride_b,
    x_stride_p,
    x_stride_d,
    t_stride_u,
    t_stride_c,
    t_stride_n,
    t_stride_d,
    scale,
    scale_low,
    P: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BALANCED: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    scale = _whole(scale, scale_low, ACC)
    program = tl.program_id(0).to(tl.int64)
    OUTS: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    blocks = tl.cdiv(classes, BLOCK_C)
    d = program % OUTS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = program // OUTS % blocks * BLOCK_C
    u = program // (OUTS * blocks) % clients
    part = program // (OUTS * blocks) // clients
    c = first + tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_N * BLOCK_C)  # prompts outside, classes inside
    of_c = first + column % BLOCK_C
    of_n = (column // BLOCK_C).to(tl.int64)
    t_there = (of_c < classes) & (of_n < N)
    t_rows = t_ptr + u * t_stride_u + of_c * t_stride_c + of_n * t_stride_n
    d_t = tl.zeros((BLOCK_N * BLOCK_C, BLOCK_OUT), ACC)
    b = part * images_per_part
    end = tl.minimum(b + images_per_part, images)
    while b < end:
        at = (u * images + b) * classes + c
        by = tl.load(d_logits_ptr + at, mask=c < classes, other=0.0).to(ACC)
        for row in range(0, P, BLOCK_P):
            p = row + tl.arange(0, BLOCK_P).to(tl.int64)
            x_rows = x_ptr + u * x_stride_u + b * x_stride_b + p * x_stride_p
            sim = _similarities(
                x_rows,
                t_rows,
                p < P,
                t_there,
                x_stride_d,
                t_stride_d,
                D,
                BLOCK_D,
                ACC,
                DOT,
                PRECISION,
            )
            kept = state_ptr + at * (3 * N + 1)
            weight = _weights(
                sim, kept, by, c < classes, scale, N, BALANCED, BLOCK_P, BLOCK_N, BLOCK_C
            )
            x = tl.load(
                x_rows[:, None] + d[None, :] * x_stride_d,
                mask=(p < P)[:, None] & (d < D)[None, :],
                other=0.0,
            ).to(ACC)
            # rows of padding have a weight, and patches of zeros
            d_t = _weighted_sum(tl.trans(weight), x, d_t, PRECISION_OUT, ACC)
        b += 1
    out = (((part * clients + u) * classes + of_c) * N + of_n)[:, None] * D + d[None, :]
    mask = t_there[:, None] & (d < D)[None, :]
    tl.store(d_t_ptr + out, d_t.to(d_t_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------------

_LANGUAGE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _power(n: int) -> int:
    return int(triton.next_power_of_2(max(n, 1)))


def _two_parts(x: float) -> tuple[float, float]:
    """Split a number so that float32 arguments carry it whole; a kernel in float64 needs both."""
    high = ctypes.c_float(x).value
    return high, x - high


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def _stored(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def _warps(count: int) -> dict[str, int]:
    """Let threads have all registers; left alone, ptxas spills a few to reach a round number."""
    return {"num_warps": count, "maxnreg": min(255, 2048 // count)}


def transport_plan_fwd(
    sim: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    *,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve (problems, P, N), any strides -> plan, contiguous, iterations and residual (problems,).

    A problem with a similarity that is not finite has a plan and a residual of NaN. ``tile``
    replaces block sizes; BLOCK_G is the problems of a program.
    """
    problems, patches, prompts = sim.shape
    wide = _wide(sim)
    plan = sim.new_empty(sim.shape, dtype=_stored(sim.dtype))
    iterations = sim.new_empty((problems,), dtype=torch.int64)
    residual = sim.new_empty((problems,), dtype=wide)
    if not problems:
        return plan.to(sim.dtype), iterations, residual
    one = _power(patches) * _power(prompts)
    # One warp up to 64 numbers a lane: its sums are shuffles, nothing waits at a barrier, and a
    # multiprocessor holds as many programs as it may. Small problems share a warp, 8 numbers a
    # lane: where few passes are left to wait for, a second problem costs less than a second warp.
    # The interpreter pays by the program.
    most = 1 << 16 if sim.device.type == "cpu" else 256
    blocks = {
        "BLOCK_G": min(_power(problems), max(1, most // one)),
        "BLOCK_P": _power(patches),
        "BLOCK_N": _power(prompts),
    } | (tile or {})
    size = math.prod(blocks.values())
    with torch.cuda.device_of(sim):
        _transport_plan_fwd_kernel[(triton.cdiv(problems, blocks["BLOCK_G"]),)](
            sim,
            plan,
            iterations,
            residual,
            problems,
            *sim.stride(),
            *_two_parts(1 / eps),
            *_two_parts(mass),
            tol,
            max_iter,
            P=patches,
            N=prompts,
            BALANCED=balanced,
            ACC=_LANGUAGE[wide],
            **blocks,
            **_warps(1 if size <= 2048 else 4 if size <= 8192 else 8),
        )
    return plan.to(sim.dtype), iterations, residual


def _kinds(patches: Tensor, prompts: Tensor) -> dict[str, object]:
    """Say in which dtypes and precisions the products are formed.

    The exponential of sim / eps magnifies errors: tf32 is never enough for products of float32.
    """
    wide = _wide(patches, prompts)
    features = torch.promote_types(patches.dtype, prompts.dtype)
    return {
        "ACC": _LANGUAGE[wide],
        "DOT": _LANGUAGE[features],
        "PRECISION": "ieee" if wide == torch.float64 else "tf32x3",
    }


def _depth(patches: Tensor, prompts: Tensor, rows: int, width: int) -> int:
    """Say how many of D numbers a step of the product takes.

    A line of the cache from each row; less of many rows, whose addresses would take the registers.
    """
    if patches.device.type == "cpu":
        return max(16, _power(width))
    line = 128 // max(patches.element_size(), prompts.element_size())
    return max(16, min(line, (1 << 13) // rows))


def transport_logits_fwd(
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    *,
    measure: bool,
    keep: bool,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Score (U, B, P, D) against (U, C, N, D), any strides.

    Returns logits, iterations, residual and if ``measure`` entropy (U, B, C), logits as wide as the
    sums and the entropy over its largest value, log(P N), or 1 where that is 0; and if ``keep``
    what `transport_logits_bwd` needs to know of each plan, (U, B, C, 3 N + 1): the similarity that
    z is relative to, then of every column both parts of log v and the factor that makes the column
    exact. A problem with a similarity that is not finite is NaN in all but its iterations.
    """
    clients, images, n_patches, width = patches.shape
    classes, n_prompts = prompts.shape[1:3]
    wide = _wide(patches, prompts)
    on_cpu = patches.device.type == "cpu"
    shape = (clients, images, classes)
    logits = patches.new_empty(shape, dtype=wide)
    iterations = patches.new_empty(shape, dtype=torch.int64)
    residual = patches.new_empty(shape, dtype=wide)
    state = patches.new_empty((*shape, 3 * n_prompts + 1), dtype=wide) if keep else None
    entropy = patches.new_empty(shape, dtype=wide) if measure else None
    if not logits.numel():
        return logits, iterations, residual, entropy, state
    block_p, block_n = max(16, _power(n_patches)), _power(n_prompts)
    # Sixteen columns feed the matrix units, and leave a thread 8 to 32 numbers of the tile and the
    # two dozen scalars of two to four problems. 320 problems are at least 40 programs, 32000 are
    # 4000, two or three at a time on a multiprocessor. Patches are read again for each block of
    # classes, from the cache: the blocks of an image are neighbours. The interpreter pays by the
    # program.
    columns = 16 if block_p <= 256 else 8
    blocks = {
        "BLOCK_P": block_p,
        "BLOCK_C": min(_power(classes), 64 if on_cpu else max(1, columns // block_n)),
        "BLOCK_N": block_n,
        "BLOCK_D": _depth(patches, prompts, block_p, width),
    } | (tile or {})
    size = blocks["BLOCK_P"] * blocks["BLOCK_C"] * blocks["BLOCK_N"]
    # 64 KiB of patches fit every card, with what is fetched ahead or without
    step = blocks["BLOCK_P"] * blocks["BLOCK_D"] * max(patches.itemsize, prompts.itemsize)
    with torch.cuda.device_of(patches):
        _transport_logits_fwd_kernel[(clients * images * triton.cdiv(classes, blocks["BLOCK_C"]),)](
            patches,
            prompts,
            logits,
            iterations,
            residual,
            entropy,
            state,
            images,
            classes,
            *patches.stride(),
            *prompts.stride(),
            *_two_parts(1 / eps),
            *_two_parts(mass),
            tol,
            max_iter,
            P=n_patches,
            N=n_prompts,
            D=width,
            BALANCED=balanced,
            MEASURE=measure,
            KEEP=keep,
            **_kinds(patches, prompts),
            **blocks,
            **_warps(4 if size <= 4096 else 8 if size <= 8192 else 16),
            num_stages=2 if 2 * step <= 1 << 16 else 1,
        )
    return logits, iterations, residual, entropy, state


def transport_logits_bwd(
    d_logits: Tensor,
    patches: Tensor,
    prompts: Tensor,
    state: Tensor,
    eps: float,
    balanced: bool,
    *,
    of_patches: bool,
    of_prompts: bool,
    parts: int | None = None,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return d_patches and d_prompts where wanted, from d_logits (U, B, C), contiguous.

    Plans are rebuilt from similarities that are computed again, a tile at a time. The gradient of
    the prompts sums the images in ``parts`` that are added up in order.
    """
    clients, images, n_patches, width = patches.shape
    classes, n_prompts = prompts.shape[1:3]
    d_patches = d_prompts = None
    on_cpu = patches.device.type == "cpu"
    kinds = _kinds(patches, prompts)
    # 16-bit features are exact in tf32 and weights in two parts nearly: two products, not three;
    # one of rounded weights has no bias, but where terms cancel errs more than twice as eager does
    sixteen = max(patches.element_size(), prompts.element_size()) == 2
    kinds["PRECISION_OUT"] = "halves" if sixteen else kinds["PRECISION"]
    # Similarities are formed again for each block of the output's D, which costs little beside
    # reading the features; 128 numbers of D, 64 patches or 32 columns fit in 8 warps of any card.
    block_p, block_n = max(16, _power(n_patches)), _power(n_prompts)
    block_out = max(16, _power(width))
    if not on_cpu:
        block_p, block_out = min(block_p, 64), min(block_out, 128)
    block_c = max(1, (256 if on_cpu else 32) // block_n)
    depth = _depth(patches, prompts, block_p, width)
    if not on_cpu and block_n == 1 and not sixteen:
        depth = 16  # classes by themselves leave no registers for a whole line
    blocks = {
        "BLOCK_P": block_p,
        "BLOCK_C": min(block_c, max(_power(classes), -(-16 // block_n))),
        "BLOCK_N": block_n,
        "BLOCK_D": depth,
        "BLOCK_OUT": block_out,
    } | (tile or {})
    outs = triton.cdiv(width, blocks["BLOCK_OUT"])
    sizes = {"P": n_patches, "N": n_prompts, "D": width, "BALANCED": balanced}
    strides = (*patches.stride(), *prompts.stride())
    with torch.cuda.device_of(patches):
        if of_patches:
            d_patches = patches.new_empty(patches.shape, dtype=_stored(patches.dtype))
            rows = triton.cdiv(n_patches, blocks["BLOCK_P"])
            if d_patches.numel() and not classes:
                d_patches.zero_()
            elif d_patches.numel():
                _transport_logits_bwd_patches_kernel[(clients * images * rows * outs,)](
                    d_logits,
                    patches,
                    prompts,
                    state,
                    d_patches,
                    images,
                    classes,
                    *strides,
                    *_two_parts(1 / eps),
                    **sizes,
                    **kinds,
                    **blocks,
                    **_warps(8),
                    num_stages=2,
                )
            d_patches = d_patches.to(patches.dtype)
        if of_prompts:
            programs = clients * triton.cdiv(classes, blocks["BLOCK_C"]) * outs
            if parts is None:
                parts = min(images, triton.cdiv(_BUSY, max(programs, 1)))
            per_part = triton.cdiv(images, max(parts, 1))
            parts = triton.cdiv(images, max(per_part, 1))
            dtype = _stored(prompts.dtype) if parts == 1 else _wide(patches, prompts)
            sums = prompts.new_empty((parts, *prompts.shape), dtype=dtype)
            if sums.numel():
                _transport_logits_bwd_prompts_kernel[(parts * programs,)](
                    d_logits,
                    patches,
                    prompts,
                    state,
                    sums,
                    clients,
                    images,
                    classes,
                    per_part,
                    *strides,
                    *_two_parts(1 / eps),
                    **sizes,
                    **kinds,
                    **blocks,
                    **_warps(8),
                    num_stages=2,
                )
            d_prompts = (sums[0] if parts == 1 else sums.sum(0)).to(prompts.dtype)
    return d_patches, d_prompts
