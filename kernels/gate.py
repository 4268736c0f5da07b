"""The gate over prompt experts between the products with its weights: scores, softmax, values.

Tiles are images x classes; the experts of a class come one after another through an online softmax,
so that any number of them fits and none is padded. Queries and z = W_oᵀ x stand side by side in qz
(U, B, 2, H, d), keys and values in kv (U, C, E, 2, H, d), all contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.launching import cdiv, launched, on_its_device, power
from fastfpl.kernels.precision import allows_tf32

__all__ = ["WIDEST", "gate_bwd", "gate_fwd"]

#: Most numbers d of a head.
WIDEST = 128

# The interpreter takes the bits of bfloat16 operands of a product for integers (Triton 3.9).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Programs that keep the largest card busy: below that, work is cut finer.
_BUSY = 256


@triton.jit
def _dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _load(base, o, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows ``o`` of D numbers each, ``stride`` apart."""
    d = tl.arange(0, BLOCK_D)
    mask = (o < count)[:, None] & (d < D)[None, :]
    return tl.load(base + o[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, x, o, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows as `_load` loads them."""
    d = tl.arange(0, BLOCK_D)
    mask = (o < count)[:, None] & (d < D)[None, :]
    tl.store(base + o[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _gate_fwd_kernel(
    qz,
    kv,
    out,
    high,
    inverse,
    mean,
    B,
    C,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_c, tiles_b = tl.cdiv(C, BLOCK_C), tl.cdiv(B, BLOCK_B)
    i_c = program % tiles_c
    i_b = program // tiles_c % tiles_b
    part = program // (tiles_c * tiles_b) % (H // HEADS)
    u = program // (tiles_c * tiles_b * (H // HEADS))
    clients = tl.num_programs(0).to(tl.int64) // (tiles_c * tiles_b * (H // HEADS))
    b, c = i_b * BLOCK_B + tl.arange(0, BLOCK_B), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (b < B)[:, None] & (c < C)[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    # further from every product than any other, on the side where the scores are low
    start: tl.constexpr = float("-inf") if SCALE > 0 else float("inf") if SCALE < 0 else 0.0
    for i in range(HEADS):
        h = part * HEADS + i
        p_q = qz + u * B * (2 * H * D) + h * D
        q = _load(p_q, b, B, 2 * H * D, D, BLOCK_D)
        z = _load(p_q + H * D, b, B, 2 * H * D, D, BLOCK_D)
        most = tl.full((BLOCK_B, BLOCK_C), start, ACC)
        weight = tl.zeros((BLOCK_B, BLOCK_C), ACC)
        value = tl.zeros((BLOCK_B, BLOCK_C), ACC)
        for e in range(E):
            p_k = kv + (u * C * E + e) * (2 * H * D) + h * D
            k = _load(p_k, c, C, E * 2 * H * D, D, BLOCK_D)
            v = _load(p_k + H * D, c, C, E * 2 * H * D, D, BLOCK_D)
            s = _dot(q, tl.trans(k), ACC, PRECISION)
            a = _dot(z, tl.trans(v), ACC, PRECISION)
            # scaled last: fused into one rounding, s * SCALE - most is not 0 for the highest score
            above = (s - most) * SCALE
            # of the two exponentials of an online softmax one is always exp(0)
            smaller = tl.exp(-tl.abs(above))
            rises = above > 0
            keep, add = tl.where(rises, smaller, 1.0), tl.where(rises, 1.0, smaller)
            most = tl.where(rises, s, most)
            weight = weight * keep + add
            value = value * keep + add * a
        weight = 1 / weight
        value *= weight
        total += value
        if mean is not None:
            at = ((u * H + h) * B + b)[:, None] * C + c[None, :]
            tl.store(high + at, most, mask=inside)
            tl.store(inverse + at, weight, mask=inside)
            tl.store(mean + at, value, mask=inside)
    at = ((part * clients + u) * B + b)[:, None] * C + c[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weights(
    q, z, k, v, high, mean, by, SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute again, of one expert of each class, d_score and d_value (B, C).

    An expert that has all the weight gets d_score = 0 exactly: its products are those of the
    forward pass bit for bit, so that its exponential is 1 and its value the mean.
    """
    s = _dot(q, tl.trans(k), ACC, PRECISION)
    a = _dot(z, tl.trans(v), ACC, PRECISION)
    d_value = by * tl.exp((s - high) * SCALE)
    return SCALE * d_value * (a - mean), d_value


@triton.jit
def _gate_bwd_kv_kernel(
    d_logits,
    qz,
    kv,
    high,
    inverse,
    mean,
    d_kv,
    B,
    C,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_c = tl.cdiv(C, BLOCK_C)
    i_c = program % tiles_c
    e = program // tiles_c % E
    h = program // (tiles_c * E) % H
    u = program // (tiles_c * E * H)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    place = (u * C * E + e) * (2 * H * D) + h * D
    k = _load(kv + place, c, C, E * 2 * H * D, D, BLOCK_D)
    v = _load(kv + place + H * D, c, C, E * 2 * H * D, D, BLOCK_D)
    d_k = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    d_v = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    p_q = qz + u * B * (2 * H * D) + h * D
    first = program * 0
    while first < B:
        b = first + tl.arange(0, BLOCK_B)
        q = _load(p_q, b, B, 2 * H * D, D, BLOCK_D)
        z = _load(p_q + H * D, b, B, 2 * H * D, D, BLOCK_D)
        inside = (b < B)[:, None] & (c < C)[None, :]
        by = tl.load(d_logits + (u * B + b)[:, None] * C + c[None, :], mask=inside, other=0.0)
        at = ((u * H + h) * B + b)[:, None] * C + c[None, :]
        d_score, d_value = _weights(
            q,
            z,
            k,
            v,
            tl.load(high + at, mask=inside, other=0.0),
            tl.load(mean + at, mask=inside, other=0.0),
            by.to(ACC) * tl.load(inverse + at, mask=inside, other=0.0),
            SCALE,
            ACC,
            PRECISION,
        )
        d_k += _dot(tl.trans(d_score).to(q.dtype), q, ACC, PRECISION)
        d_v += _dot(tl.trans(d_value).to(z.dtype), z, ACC, PRECISION)
        first += BLOCK_B
    _store(d_kv + place, d_k, c, C, E * 2 * H * D, D, BLOCK_D)
    _store(d_kv + place + H * D, d_v, c, C, E * 2 * H * D, D, BLOCK_D)


@triton.jit
def _gate_bwd_qz_kernel(
    d_logits,
    qz,
    kv,
    high,
    inverse,
    mean,
    d_qz,
    B,
    C,
    parts,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles_b = tl.cdiv(B, BLOCK_B)
    part = program % parts
    i_b = program // parts % tiles_b
    h = program // (parts * tiles_b) % H
    u = program // (parts * tiles_b * H)
    clients = tl.num_programs(0).to(tl.int64) // (parts * tiles_b * H)
    b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    p_q = qz + u * B * (2 * H * D) + h * D
    q = _load(p_q, b, B, 2 * H * D, D, BLOCK_D)
    z = _load(p_q + H * D, b, B, 2 * H * D, D, BLOCK_D)
    d_q = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    d_z = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    tiles = tl.cdiv(C, BLOCK_C)
    i_c, end = tiles * part // parts, tiles * (part + 1) // parts
    while i_c < end:
        c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (b < B)[:, None] & (c < C)[None, :]
        at = ((u * H + h) * B + b)[:, None] * C + c[None, :]
        by = tl.load(d_logits + (u * B + b)[:, None] * C + c[None, :], mask=inside, other=0.0)
        by = by.to(ACC) * tl.load(inverse + at, mask=inside, other=0.0)
        b_high = tl.load(high + at, mask=inside, other=0.0)
        b_mean = tl.load(mean + at, mask=inside, other=0.0)
        experts = E
        if E == 1:
            # stays a loop, as of several: without it registers keep all factors, and spill
            experts = tl.minimum(i_c + 1, E)
        for e in range(experts):
            p_k = kv + (u * C * E + e) * (2 * H * D) + h * D
            k = _load(p_k, c, C, E * 2 * H * D, D, BLOCK_D)
            v = _load(p_k + H * D, c, C, E * 2 * H * D, D, BLOCK_D)
            d_score, d_value = _weights(q, z, k, v, b_high, b_mean, by, SCALE, ACC, PRECISION)
            d_q += _dot(d_score.to(k.dtype), k, ACC, PRECISION)
            d_z += _dot(d_value.to(v.dtype), v, ACC, PRECISION)
        i_c += 1
    p_out = d_qz + (part * clients + u) * B * (2 * H * D) + h * D
    _store(p_out, d_q, b, B, 2 * H * D, D, BLOCK_D)
    _store(p_out + H * D, d_z, b, B, 2 * H * D, D, BLOCK_D)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _constants(qz: Tensor, kv: Tensor, blocks: tuple[int, int] | None) -> dict[str, object]:
    """Choose the blocks by the sizes, and what else all kernels are compiled for.

    float32 is multiplied as cuBLAS multiplies it in the products round the kernels: exactly, or on
    the matrix units in TF32 where torch allows that.
    """
    images, heads, width = qz.shape[1], *qz.shape[3:]
    classes, experts = kv.shape[1:3]
    tf32 = qz.dtype == torch.float32 and allows_tf32()
    # 16 is the least a product on the matrix units takes
    padded = max(16, power(width))
    units, wide = tf32 or qz.itemsize == 2, padded > 32
    if blocks is None:
        # the largest that spill no register on any card
        most_b = 32 if units or not wide else 16
        most_c = 32 if qz.itemsize == 2 and not wide else 16
        blocks = (
            min(most_b, max(16, power(images))),
            min(most_c, max(16, power(classes))),
        )
    return {
        "E": experts,
        "H": heads,
        "D": width,
        "ACC": tl.float64 if qz.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_B": blocks[0],
        "BLOCK_C": blocks[1],
        "BLOCK_D": padded,
        # wide heads in exact float32, and narrow ones in TF32, spill with 4
        "num_warps": 8 if qz.itemsize > 2 and wide != tf32 else 4,
        "num_stages": 1 if qz.dtype == torch.float64 else 2,
        # of itself the assembler keeps exact float32 to fewer on some cards, and spills
        "maxnreg": 255 if qz.dtype == torch.float32 and not tf32 else None,
    }


@on_its_device
def gate_fwd(
    qz: Tensor, kv: Tensor, scale: float, wanted: bool, blocks: tuple[int, int] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mix the experts of every class for every image.

    Parameters
    ----------
    qz, kv : Tensor, shapes (U, B, 2, H, d) and (U, C, E, 2, H, d), contiguous, of one dtype
    scale : float
        Multiplies the scores.
    wanted : bool
        Whether a backward pass will follow.
    blocks : (int, int), optional
        Images and classes of one program, powers of two, at least 16 each.

    Returns
    -------
    logits : Tensor, shape (U, B, C), float32 or wider
    stats : (Tensor, Tensor, Tensor), shape (U, H, B, C), or ()
        Of a softmax the q . k of its largest score, one over its sum, and its mean of the values.
    """
    (clients, images), heads, classes = qz.shape[:2], qz.shape[3], kv.shape[1]
    constants = _constants(qz, kv, blocks)
    tiles = cdiv(images, constants["BLOCK_B"]) * cdiv(classes, constants["BLOCK_C"])
    # heads apart until the card is busy; their logits are then added in the order of the heads
    parts = next(
        (n for n in range(1, heads + 1) if heads % n == 0 and clients * tiles * n >= _BUSY), heads
    )
    wide = _accumulator(qz.dtype)
    out = qz.new_empty((parts, clients, images, classes), dtype=wide)
    stats = ()
    if wanted:
        stats = tuple(qz.new_empty((clients, heads, images, classes), dtype=wide) for _ in range(3))
    if out.numel():
        launched(
            _gate_fwd_kernel,
            clients * tiles * parts,
            qz,
            kv,
            out,
            *(stats or (None, None, None)),
            images,
            classes,
            SCALE=scale,
            HEADS=heads // parts,
            **constants,
        )
    return out[0] if parts == 1 else out.sum(dim=0), stats


@on_its_device
def gate_bwd(
    d_logits: Tensor,
    qz: Tensor,
    kv: Tensor,
    stats: tuple[Tensor, ...],
    scale: float,
    of_images: bool,
    of_experts: bool,
    blocks: tuple[int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of qz and kv, None for one that nobody wants.

    ``d_logits`` (U, B, C) and what `gate_fwd` was given and returned; see there.
    """
    (clients, images), heads, classes, experts = qz.shape[:2], qz.shape[3], *kv.shape[1:3]
    constants = _constants(qz, kv, blocks)
    tiles_b = cdiv(images, constants["BLOCK_B"])
    tiles_c = cdiv(classes, constants["BLOCK_C"])
    constants["SCALE"] = scale
    given = (d_logits.contiguous(), qz, kv, *stats)
    d_qz = d_kv = None
    if of_images:
        programs = clients * heads * tiles_b
        # classes apart until the card is busy; their parts are then added in the order of classes
        parts = max(1, min(tiles_c, cdiv(_BUSY, max(1, programs))))
        wide = qz.dtype if parts == 1 else _accumulator(qz.dtype)
        by_part = qz.new_empty((parts, *qz.shape), dtype=wide)
        if programs:
            asked = (by_part, images, classes, parts)
            # the widest heads of float64 spill with 8 warps
            spread = {"num_warps": 16} if qz.itemsize == 8 and constants["BLOCK_D"] > 64 else {}
            launched(_gate_bwd_qz_kernel, programs * parts, *given, *asked, **constants | spread)
        d_qz = by_part[0] if parts == 1 else by_part.sum(dim=0).to(qz.dtype)
    if of_experts:
        d_kv = torch.empty_like(kv)
        programs = clients * heads * experts * tiles_c
        if programs:
            launched(_gate_bwd_kv_kernel, programs, *given, d_kv, images, classes, **constants)
    return d_qz, d_kv
