"""Logits of the transport from features: similarities are formed and solved in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.launching import cdiv, launched, on_its_device, power
from fastfpl.kernels.transport_launch import depth_of, kinds_of, two_parts, warps, wide_of
from fastfpl.kernels.transport_many import entries
from fastfpl.kernels.transport_pair import plan_of_pair
from fastfpl.kernels.transport_tile import _similarities, _solve_any, _solve_two, _whole

__all__ = ["transport_logits_fwd"]


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
    plan_ptr,
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
    if KEEP:  # a row of an image's plans is a patch, (P, C, N), as the gradient's products take it
        rows = plan_ptr + (image * P + p.to(tl.int64)) * (classes * N)
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
            entry = rows[:, None] + (c * N)[None, :]
            mask = inside_p & there[None, :]
            tl.store(entry, t1, mask=mask)
            if N == 2:
                tl.store(entry + 1, t2, mask=mask)
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
            entry = rows[:, None, None] + (n + (c * N)[None, :])[None, :, :]
            tl.store(entry, t, mask=inside & valid & there[None, None, :])
    if MEASURE:
        most = tl.log(miss * 0 + P * N)
        entropy = tl.where(most == 0, 1.0, entropy / most)
        tl.store(entropy_ptr + at, entropy, mask=there)
    # the columns of the plan hold its mass to rounding
    found = centre * mass + found / scale
    tl.store(logits_ptr + at, found.to(logits_ptr.dtype.element_ty), mask=there)
    tl.store(iterations_ptr + at, passes.to(tl.int64), mask=there)
    tl.store(residual_ptr + at, miss.to(residual_ptr.dtype.element_ty), mask=there)


@on_its_device
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
    sums and the entropy over its largest value, log(P N), or 1 where that is 0; and if ``keep`` the
    plans (U, B, P, C, N), as wide. A problem with a similarity that is not finite is NaN in all but
    its iterations.
    """
    clients, images, n_patches, width = patches.shape
    classes, n_prompts = prompts.shape[1:3]
    wide = wide_of(patches, prompts)
    on_cpu = patches.device.type == "cpu"
    shape = (clients, images, classes)
    logits = patches.new_empty(shape, dtype=wide)
    iterations = patches.new_empty(shape, dtype=torch.int64)
    residual = patches.new_empty(shape, dtype=wide)
    kept = (clients, images, n_patches, classes, n_prompts)
    plans = patches.new_empty(kept, dtype=wide) if keep else None
    entropy = patches.new_empty(shape, dtype=wide) if measure else None
    if not logits.numel():
        return logits, iterations, residual, entropy, plans
    block_p, block_n = max(16, power(n_patches)), power(n_prompts)
    # Sixteen columns feed the matrix units, and leave a thread 8 to 32 numbers of the tile and the
    # two dozen scalars of two to four problems. 320 problems are at least 40 programs, 32000 are
    # 4000, two or three at a time on a multiprocessor. Patches are read again for each block of
    # classes, from the cache: the blocks of an image are neighbours. The interpreter pays by the
    # program.
    columns = 16 if block_p <= 256 else 8
    blocks = {
        "BLOCK_P": block_p,
        "BLOCK_C": min(power(classes), 64 if on_cpu else max(1, columns // block_n)),
        "BLOCK_N": block_n,
        "BLOCK_D": depth_of(patches, prompts, block_p, width),
    } | (tile or {})
    numbers = blocks["BLOCK_P"] * blocks["BLOCK_C"] * blocks["BLOCK_N"]
    size = numbers * wide.itemsize // 4  # registers
    # 64 KiB of patches fit every card, with what is fetched ahead or without
    step = blocks["BLOCK_P"] * blocks["BLOCK_D"] * max(patches.itemsize, prompts.itemsize)
    launched(
        _transport_logits_fwd_kernel,
        clients * images * cdiv(classes, blocks["BLOCK_C"]),
        patches,
        prompts,
        logits,
        iterations,
        residual,
        entropy,
        plans,
        images,
        classes,
        *patches.stride(),
        *prompts.stride(),
        *two_parts(1 / eps),
        *two_parts(mass),
        tol,
        max_iter,
        P=n_patches,
        N=n_prompts,
        D=width,
        BALANCED=balanced,
        MEASURE=measure,
        KEEP=keep,
        **kinds_of(patches, prompts),
        **blocks,
        **warps(4 if size <= 4096 else 8 if size <= 8192 else 16),
        num_stages=2 if 2 * step <= 1 << 16 else 1,
    )
    return logits, iterations, residual, entropy, plans
