"""The transport plan of given similarities: its kernel and its launcher."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.launching import cdiv, launched, on_its_device, power
from fastfpl.kernels.transport_launch import LANGUAGE, stored, two_parts, warps, wide_of
from fastfpl.kernels.transport_many import entries
from fastfpl.kernels.transport_pair import plan_of_pair
from fastfpl.kernels.transport_tile import _solve_any, _solve_two, _whole

__all__ = ["transport_plan_fwd"]


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


@on_its_device
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
    wide = wide_of(sim)
    plan = sim.new_empty(sim.shape, dtype=stored(sim.dtype))
    iterations = sim.new_empty((problems,), dtype=torch.int64)
    residual = sim.new_empty((problems,), dtype=wide)
    if not problems:
        return plan.to(sim.dtype), iterations, residual
    one = power(patches) * power(prompts)
    # One warp up to 64 numbers a lane, 32 of more than two prompts: its sums are shuffles, nothing
    # waits at a barrier, and a multiprocessor holds as many programs as it may. Small problems
    # share a warp, 8 numbers a lane: where few passes are left to wait for, a second problem costs
    # less than a second warp. The interpreter pays by the program.
    most = 1 << 16 if sim.device.type == "cpu" else 256
    blocks = {
        "BLOCK_G": min(power(problems), max(1, most // one)),
        "BLOCK_P": power(patches),
        "BLOCK_N": power(prompts),
    } | (tile or {})
    # of float64 a number is two registers, and its exponential takes as many again
    size = math.prod(blocks.values()) * (4 if wide == torch.float64 else 1)
    launched(
        _transport_plan_fwd_kernel,
        cdiv(problems, blocks["BLOCK_G"]),
        sim,
        plan,
        iterations,
        residual,
        problems,
        *sim.stride(),
        *two_parts(1 / eps),
        *two_parts(mass),
        tol,
        max_iter,
        P=patches,
        N=prompts,
        BALANCED=balanced,
        ACC=LANGUAGE[wide],
        **blocks,
        **warps(1 if size <= (2048 if prompts <= 2 else 1024) else 4 if size <= 8192 else 8),
    )
    return plan.to(sim.dtype), iterations, residual
