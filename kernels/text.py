"""The rows of the text tower between its matrix products, both directions; weights are frozen.

A program owns some whole rows (LayerNorm, unit length) or some rows of a block of columns (the
activation). Statistics are of float32, of float64 for float64.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.launching import cdiv, launched, on_its_device, power
from fastfpl.kernels.rounding import quotient, root

__all__ = [
    "WIDEST",
    "activation_bwd",
    "activation_fwd",
    "norm_bwd",
    "norm_fwd",
    "unit_bwd",
    "unit_fwd",
]

#: Most numbers of a row: of float64 they are 32 for each thread of the most that a program has.
WIDEST = 8192

# bytes of rows that a program may hold: more of float64 leave no registers
_REGISTERS = 1 << 16
# from so many rows on a program takes two of them, or four: enough programs are left
_MANY = (1024, 4096)


@triton.jit
def _place(count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows of this program, cells and which are inside; sizes past 2**31 cells are fine."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_W)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    return row, column, row[:, None] * WIDTH + column[None, :], inside


@triton.jit
def _norm_fwd_kernel(
    h,
    base,
    mean,
    rstd,
    x,
    weight,
    bias,
    shift,
    count,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    row, column, cell, inside = _place(count, WIDTH, ROWS, BLOCK_W)
    value = tl.load(x + cell, mask=inside, other=0.0).to(ACC)
    middle = tl.sum(value, 1) * (1.0 / WIDTH)  # a card's quotient is rounded twice
    off = tl.where(inside, value - middle[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(off * off, 1) * (1.0 / WIDTH) + EPS)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACC)
    b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(ACC)
    out = off * scale[:, None] * w[None, :] + b[None, :]
    tl.store(h + cell, out.to(h.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle, mask=row < count)
    tl.store(rstd + row, scale, mask=row < count)
    if shift is not None:
        s = tl.load(shift + column, mask=column < WIDTH, other=0.0).to(ACC)
        tl.store(base + cell, (value + s[None, :]).to(base.dtype.element_ty), mask=inside)


@triton.jit
def _norm_bwd_kernel(
    d_x,
    d_h,
    x,
    weight,
    mean,
    rstd,
    count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    row, column, cell, inside = _place(count, WIDTH, ROWS, BLOCK_W)
    middle = tl.load(mean + row, mask=row < count, other=0.0)
    scale = tl.load(rstd + row, mask=row < count, other=0.0)
    value = tl.load(x + cell, mask=inside, other=0.0).to(ACC)
    unit = tl.where(inside, (value - middle[:, None]) * scale[:, None], 0.0)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACC)
    d_unit = tl.load(d_h + cell, mask=inside, other=0.0).to(ACC) * w[None, :]
    along = tl.sum(d_unit * unit, 1) * (1.0 / WIDTH)
    level = tl.sum(d_unit, 1) * (1.0 / WIDTH)
    step = (d_unit - level[:, None] - unit * along[:, None]) * scale[:, None]
    total = tl.load(d_x + cell, mask=inside, other=0.0).to(ACC) + step
    tl.store(d_x + cell, total.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _spot(count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Like `_place` for a block of columns: blocks of one row follow each other."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    pid = tl.program_id(0)
    row = (pid // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (pid % BLOCKS) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    return column, row[:, None] * WIDTH + column[None, :], inside


@triton.jit
def _activation_fwd_kernel(
    a,
    u,
    bias,
    count,
    QUICK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    column, cell, inside = _spot(count, WIDTH, ROWS, BLOCK_W)
    b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(ACC)
    x = tl.load(u + cell, mask=inside, other=0.0).to(ACC) + b[None, :]
    if QUICK:
        out = x / (1.0 + tl.exp(-1.702 * x))
    else:
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(a + cell, out.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _activation_bwd_kernel(
    d_a,
    u,
    bias,
    count,
    QUICK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    column, cell, inside = _spot(count, WIDTH, ROWS, BLOCK_W)
    b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(ACC)
    x = tl.load(u + cell, mask=inside, other=0.0).to(ACC) + b[None, :]
    if QUICK:
        # the gate and what is left of 1, the smaller of both without a difference
        e = tl.exp(-1.702 * tl.abs(x))
        large = 1.0 / (1.0 + e)
        small = e * large
        gate = tl.where(x > 0, large, small)
        slope = gate * (1.0 + 1.702 * x * tl.where(x > 0, small, large))
    else:
        # 1 / sqrt(2 pi) and 1 / sqrt(2)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    out = tl.load(d_a + cell, mask=inside, other=0.0).to(ACC) * slope
    tl.store(d_a + cell, out.to(d_a.dtype.element_ty), mask=inside)


@triton.jit
def _unit_fwd_kernel(
    f,
    norm,
    y,
    count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    row, _, cell, inside = _place(count, WIDTH, ROWS, BLOCK_W)
    value = tl.load(y + cell, mask=inside, other=0.0).to(ACC)
    length = root(tl.sum(value * value, 1))
    length = tl.where(row < count, length, 1.0)
    unit = value * quotient(1.0, length)[:, None]
    tl.store(f + cell, unit.to(f.dtype.element_ty), mask=inside)
    tl.store(norm + row, length, mask=row < count)


@triton.jit
def _unit_bwd_kernel(
    d_y,
    d_f,
    f,
    norm,
    count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    row, _, cell, inside = _place(count, WIDTH, ROWS, BLOCK_W)
    length = tl.load(norm + row, mask=row < count, other=1.0)
    unit = tl.load(f + cell, mask=inside, other=0.0).to(ACC)
    step = tl.load(d_f + cell, mask=inside, other=0.0).to(ACC)
    along = tl.sum(step * unit, 1)
    out = (step - unit * along[:, None]) * quotient(1.0, length)[:, None]
    tl.store(d_y + cell, out.to(d_y.dtype.element_ty), mask=inside)


@on_its_device
def norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """LayerNorm of x (M, W): normalised rows, x + shift (or None), mean and 1 / deviation (M,)."""
    h = torch.empty_like(x)
    base = None if shift is None else torch.empty_like(x)
    mean = x.new_empty(x.shape[0], dtype=_wide(x))
    rstd = torch.empty_like(mean)
    programs, settings = _rows(x)
    if programs:
        launched(
            _norm_fwd_kernel,
            programs,
            h,
            base,
            mean,
            rstd,
            x,
            weight,
            bias,
            shift,
            EPS=eps,
            **settings,
        )
    return h, base, mean, rstd


@on_its_device
def norm_bwd(
    d_h: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, d_x: Tensor
) -> None:
    """Add the gradient of LayerNorm with respect to its input to ``d_x`` (M, W)."""
    programs, settings = _rows(x)
    if programs:
        launched(_norm_bwd_kernel, programs, d_x, d_h, x, weight, mean, rstd, **settings)


@on_its_device
def activation_fwd(u: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Activate u + bias, u (M, F): "quick_gelu" or "gelu"."""
    a = torch.empty_like(u)
    programs, settings = _blocks(u)
    if programs:
        launched(
            _activation_fwd_kernel, programs, a, u, bias, QUICK=kind == "quick_gelu", **settings
        )
    return a


@on_its_device
def activation_bwd(d_a: Tensor, u: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Give the gradient with respect to ``u``, written over ``d_a`` (M, F)."""
    programs, settings = _blocks(u)
    if programs:
        launched(
            _activation_bwd_kernel, programs, d_a, u, bias, QUICK=kind == "quick_gelu", **settings
        )
    return d_a


@on_its_device
def unit_fwd(y: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the rows of y (M, D) by their lengths; give both."""
    f = torch.empty_like(y)
    norm = y.new_empty(y.shape[0], dtype=_wide(y))
    programs, settings = _rows(y)
    if programs:
        launched(_unit_fwd_kernel, programs, f, norm, y, **settings)
    return f, norm


@on_its_device
def unit_bwd(d_f: Tensor, f: Tensor, norm: Tensor) -> Tensor:
    """Give the gradient with respect to what `unit_fwd` was given."""
    d_y = torch.empty_like(f)
    programs, settings = _rows(f)
    if programs:
        launched(_unit_bwd_kernel, programs, d_y, d_f, f, norm, **settings)
    return d_y


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor) -> tuple[int, dict[str, Any]]:
    return _rows_of(*x.shape, x.dtype)


@functools.lru_cache(maxsize=1024)
def _rows_of(count: int, width: int, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Programs of whole rows: one row until there are enough programs for the card, then more.

    16 numbers a thread are two or four loads of 16 bytes, and a row's sum stays inside few warps.
    """
    block = power(width)
    most = _REGISTERS // (block * torch.promote_types(dtype, torch.float32).itemsize)
    rows = 4 if count >= _MANY[1] else 2 if count >= _MANY[0] else 1
    rows = min(rows, max(1, most))
    warps = min(8, max(1, rows * block // 512))
    return cdiv(count, rows), {
        "count": count,
        "WIDTH": width,
        "ROWS": rows,
        "BLOCK_W": block,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": warps,
        # of itself the assembler keeps to fewer on some cards, and spills
        "maxnreg": min(255, 2048 // warps),
    }


def _blocks(u: Tensor) -> tuple[int, dict[str, Any]]:
    return _blocks_of(*u.shape, u.dtype)


@functools.lru_cache(maxsize=1024)
def _blocks_of(count: int, width: int, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Programs of 2048 numbers: 16 a thread, two or four loads of 16 bytes."""
    block = min(1024, power(width))
    rows = 2048 // block
    return cdiv(count, rows) * cdiv(width, block), {
        "count": count,
        "WIDTH": width,
        "ROWS": rows,
        "BLOCK_W": block,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": 4,
    }
