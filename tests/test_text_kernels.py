"""LayerNorm, activation and unit length of the text tower in Triton, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfpl.reference.text import activate, block_norm, unit_length
from tests.aot import assert_fits, every_pair
from tests.truth import assert_as_good_as_eager, assert_fences_hold, fenced

pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
from fastfpl.kernels import text

pytestmark = pytest.mark.usefixtures("_bfloat16_rounds")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: rows and columns: one, odd, a power of two, more rows than a program has
SHAPES = [(1, 1), (7, 24), (3, 512), (5, 1025), (0, 16)]
EPS = 1e-5


def normal(seed: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return fenced(drawn.to(device=device, dtype=dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def judge(name: str, mine: Tensor, eager: Tensor, exact: Tensor) -> None:
    if mine.dtype == torch.float64:  # eager is the truth
        torch.testing.assert_close(mine, exact.detach(), rtol=1e-11, atol=1e-12)
    else:
        assert_as_good_as_eager(mine, eager.detach(), exact.detach(), name=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape, dtype, device):
    width = shape[1]
    x, d_h, d_x = (normal(seed, *shape, dtype=dtype, device=device) for seed in range(3))
    x = fenced(x + 3)  # a mean that must be taken off first
    weight = normal(4, width, dtype=wide(dtype), device=device)
    bias = normal(5, width, dtype=wide(dtype), device=device)
    shift = normal(6, width, dtype=dtype, device=device)

    def pass_in(to: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.to(to, copy=True).requires_grad_()
        w, b = weight.to(wide(to)), bias.to(wide(to))
        h = block_norm(leaf, w, b, EPS)
        (gradient,) = torch.autograd.grad(h, leaf, d_h.to(to))
        return h, x.to(to) + shift.to(to), d_x.to(to) + gradient

    eager, exact = pass_in(dtype), pass_in(torch.float64)
    h, base, mean, rstd = text.norm_fwd(x, weight, bias, EPS, shift)
    into = fenced(d_x)
    text.norm_bwd(d_h, x, weight, mean, rstd, into)
    for name, mine, plain, truth in zip(
        ("h", "base", "d_x"), (h, base, into), eager, exact, strict=True
    ):
        judge(name, mine, plain, truth)
    for tensor in (x, d_h, into, weight, bias, shift):
        assert_fences_hold(tensor)
    assert mean.dtype == rstd.dtype == wide(dtype)
    again, none, *_ = text.norm_fwd(x, weight, bias, EPS, None)
    assert none is None
    assert torch.equal(again, h)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation(shape, dtype, kind, device):
    u, d_a = (2 * normal(seed, *shape, dtype=dtype, device=device) for seed in range(2))
    bias = normal(2, shape[1], dtype=dtype, device=device)

    def pass_in(to: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = u.to(to, copy=True).requires_grad_()
        a = activate(leaf + bias.to(to), kind)
        return a, *torch.autograd.grad(a, leaf, d_a.to(to))

    eager, exact = pass_in(dtype), pass_in(torch.float64)
    u, into = fenced(u), fenced(d_a)
    a = text.activation_fwd(u, bias, kind)
    d_u = text.activation_bwd(into, u, bias, kind)
    assert d_u.data_ptr() == into.data_ptr()
    for name, mine, plain, truth in zip(("a", "d_u"), (a, d_u), eager, exact, strict=True):
        judge(name, mine, plain, truth)
    for tensor in (u, into, bias):
        assert_fences_hold(tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 1)], ids=str)
def test_unit_length(shape, dtype, device):
    y, d_f = (normal(seed, *shape, dtype=dtype, device=device) for seed in range(2))

    def pass_in(to: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = y.to(to, copy=True).requires_grad_()
        f = unit_length(leaf)
        return f, *torch.autograd.grad(f, leaf, d_f.to(to))

    f, norm = text.unit_fwd(y)
    d_y = text.unit_bwd(d_f, f, norm)
    eager, exact = pass_in(dtype), pass_in(torch.float64)
    for name, mine, plain, truth in zip(("f", "d_y"), (f, d_y), eager, exact, strict=True):
        judge(name, mine, plain, truth)
    for tensor in (y, d_f):
        assert_fences_hold(tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("many", [(1, 99), (1, 1)], ids=["two", "four"])
def test_several_rows_a_program(many, device, monkeypatch):
    monkeypatch.setattr(text, "_MANY", many)
    x = normal(0, 7, 20, dtype=torch.float64, device=device)
    weight, bias = (normal(s, 20, dtype=torch.float64, device=device) for s in (1, 2))
    h, _, mean, rstd = text.norm_fwd(x, weight, bias, EPS, None)
    torch.testing.assert_close(h, block_norm(x, weight, bias, EPS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, x.mean(-1))
    d_x = torch.zeros_like(x)
    text.norm_bwd(x, x, weight, mean, rstd, d_x)
    leaf = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(block_norm(leaf, weight, bias, EPS), leaf, x)
    torch.testing.assert_close(d_x, truth, rtol=1e-11, atol=1e-12)


def _launch(dtype: torch.dtype, width: int, count: int, shift: bool = True) -> None:
    x = torch.empty(count, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=wide(dtype), device="meta")
    _, _, mean, rstd = text.norm_fwd(x, weight, weight, EPS, x[0] if shift else None)
    text.norm_bwd(x, x, weight, mean, rstd, x)
    f, norm = text.unit_fwd(x)
    text.unit_bwd(f, f, norm)
    u = torch.empty(count, 4 * width, dtype=dtype, device="meta")
    for kind in ("quick_gelu", "gelu"):
        text.activation_bwd(text.activation_fwd(u, u[0], kind), u, u[0], kind)


def launches() -> None:
    """Launch the papers' towers: few rows and many, the widths of ViT-B, L and g."""
    half = torch.float16
    _launch(half, 512, 366)
    _launch(half, 512, 1 << 18)
    _launch(torch.bfloat16, 768, 1 << 18)
    _launch(half, 1280, 1 << 18)
    _launch(torch.float32, 1280, 1 << 18)


#: What the face is asked for beyond: a width that is no power of two, the largest tower's, and the
#: most; rows of every number that share a program.
LIMITS = {
    "width": (640, 1280, text.WIDEST),
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "count": (77, 2048, 1 << 18),
    "shift": (True, False),
}


def limits_launches() -> None:
    """Launch any two of the face's limits together."""
    for row in every_pair(**LIMITS):
        _launch(row["dtype"], row["width"], row["count"], row["shift"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_fit_at_the_limits_of_the_face():
    assert_fits(limits_launches)


@pytest.mark.slow
def test_the_kernels_fit_every_card():
    assert_fits(launches)
