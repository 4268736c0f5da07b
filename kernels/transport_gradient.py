"""Gradients of the logits with respect to patches and prompts; no gradient flows through a plan."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.device import on_its_device
from fastfpl.kernels.transport_launch import (
    depth_of,
    kinds_of,
    power,
    stored,
    two_parts,
    warps,
    wide_of,
)
from fastfpl.kernels.transport_many import entries
from fastfpl.kernels.transport_tile import _similarities, _whole

__all__ = ["transport_logits_bwd"]

# Programs that keep the largest card busy: up to there, images are summed in more parts.
_BUSY = 256


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


@on_its_device
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
    kinds = kinds_of(patches, prompts)
    # 16-bit features are exact in tf32 and weights in two parts nearly: two products, not three;
    # one of rounded weights has no bias, but where terms cancel errs more than twice as eager does
    sixteen = max(patches.element_size(), prompts.element_size()) == 2
    kinds["PRECISION_OUT"] = "halves" if sixteen else kinds["PRECISION"]
    # Similarities are formed again for each block of the output's D, which costs little beside
    # reading the features; 128 numbers of D, 64 patches or 32 columns fit in 8 warps of any card.
    block_p, block_n = max(16, power(n_patches)), power(n_prompts)
    block_out = max(16, power(width))
    if not on_cpu:
        block_p, block_out = min(block_p, 64), min(block_out, 128)
    block_c = max(1, (256 if on_cpu else 32) // block_n)
    depth = depth_of(patches, prompts, block_p, width)
    if not on_cpu and block_n == 1 and not sixteen:
        depth = 16  # classes by themselves leave no registers for a whole line
    blocks = {
        "BLOCK_P": block_p,
        "BLOCK_C": min(block_c, max(power(classes), -(-16 // block_n))),
        "BLOCK_N": block_n,
        "BLOCK_D": depth,
        "BLOCK_OUT": block_out,
    } | (tile or {})
    outs = triton.cdiv(width, blocks["BLOCK_OUT"])
    sizes = {"P": n_patches, "N": n_prompts, "D": width, "BALANCED": balanced}
    strides = (*patches.stride(), *prompts.stride())
    if of_patches:
        d_patches = patches.new_empty(patches.shape, dtype=stored(patches.dtype))
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
                *two_parts(1 / eps),
                **sizes,
                **kinds,
                **blocks,
                **warps(8),
                num_stages=2,
            )
        d_patches = d_patches.to(patches.dtype)
    if of_prompts:
        programs = clients * triton.cdiv(classes, blocks["BLOCK_C"]) * outs
        if parts is None:
            parts = min(images, triton.cdiv(_BUSY, max(programs, 1)))
        per_part = triton.cdiv(images, max(parts, 1))
        parts = triton.cdiv(images, max(per_part, 1))
        dtype = stored(prompts.dtype) if parts == 1 else wide_of(patches, prompts)
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
                *two_parts(1 / eps),
                **sizes,
                **kinds,
                **blocks,
                **warps(8),
                num_stages=2,
            )
        d_prompts = (sums[0] if parts == 1 else sums.sum(0)).to(prompts.dtype)
    return d_patches, d_prompts
