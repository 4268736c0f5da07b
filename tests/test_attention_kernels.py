"""The kernels of the attention behind a shared prefix: tiles, parts, cards, and real devices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastfpl.reference.attention import prefix_attention
from tests.aot import assert_fits, every_pair, taken
from tests.truth import assert_as_good_as_eager

pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
from fastfpl.kernels.attention import prefix_attention_bwd, prefix_attention_fwd

pytestmark = pytest.mark.usefixtures("_bfloat16_rounds")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: groups, shared, segment lengths, heads, numbers a head
SIZES = {
    "one": (1, 0, (1,), 1, 32),
    "no prefix": (2, 0, (3, 1, 7), 2, 16),
    "papers": (2, 16, (3, 4, 3, 5, 18, 3, 3), 2, 64),
    "two tiles of prefix": (1, 40, (2, 1, 9), 1, 80),
    "over a tile": (1, 4, (40, 33, 76, 1, 2), 1, 32),
    "wide head": (1, 5, (3, 2), 1, 128),
    "odd head": (3, 3, (2, 6, 1), 3, 20),
    "only prefix before ones": (1, 17, (1, 1, 1, 1), 1, 8),
}


def case(name: str, dtype: torch.dtype, device: str, sos: bool = True, bias: bool = True) -> dict:
    groups, shared, lengths, heads, size = SIZES[name]
    draw = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return drawn.to(device=device, dtype=dtype)

    width = heads * size
    return {
        "qkv": normal(groups, shared + sum(lengths), 3 * width),
        "bias": 0.3 * normal(3 * width) if bias else None,
        "shared": shared,
        "starts": (0, *itertools.accumulate(lengths)),
        "heads": heads,
        "sos": normal(2, width) if sos else None,
    }


def kernels(given: dict, last_only: bool, **tiling: int | None) -> tuple[Tensor, Tensor]:
    if given["qkv"].is_cpu:
        tiling = {"step": 64} | tiling  # the interpreter takes its time for every step
    forward = {k: v for k, v in tiling.items() if k != "programs"}
    mixed = prefix_attention_fwd(**given, last_only=last_only, **forward)
    return mixed, prefix_attention_bwd(weight(mixed), **given, last_only=last_only, **tiling)


def weight(mixed: Tensor) -> Tensor:
    steps = torch.linspace(-1, 2, mixed.numel(), dtype=torch.float64, device=mixed.device)
    return steps.reshape(mixed.shape).to(mixed.dtype)


def literal(given: dict, last_only: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    moved = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in given.items()}
    qkv = moved.pop("qkv").requires_grad_()
    mixed = prefix_attention(qkv, last_only=last_only, **moved)
    as_given = weight(mixed.detach().to(given["qkv"].dtype)).to(dtype)
    (gradient,) = torch.autograd.grad(mixed, qkv, as_given)
    return mixed.detach(), gradient


# the interpreter computes this, and float32, in test_attention.py
@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_reference(size, last_only, device):
    given = case(size, torch.float64, device)
    truth = literal(given, last_only, torch.float64)
    for mine, exact in zip(kernels(given, last_only), truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype", "device"),
    [
        *itertools.product(["papers", "odd head"], DTYPES[2:], ["cpu"]),
        *(
            pytest.param(size, dtype, "cuda", marks=pytest.mark.gpu)
            for size in SIZES
            for dtype in DTYPES[1:]
        ),
    ],
    ids=str,
)
def test_as_good_as_eager(size, dtype, device, last_only):
    check_as_good_as_eager(size, dtype, device, last_only)


def check_as_good_as_eager(
    size: str, dtype: torch.dtype, device: str, last_only: bool, **tiling: int | None
) -> None:
    given = case(size, dtype, device)
    truth = literal(given, last_only, torch.float64)
    eager = literal(given, last_only, dtype)
    for name, mine, plain, exact in zip(
        ("mixed", "d_qkv"), kernels(given, last_only, **tiling), eager, truth, strict=True
    ):
        assert_as_good_as_eager(mine, plain, exact, name=name)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("sos", "bias"), [(False, True), (True, False), (False, False)])
def test_without_sos_or_bias(sos, bias, last_only, device):
    given = case("papers", torch.float64, device, sos, bias)
    truth = literal(given, last_only, torch.float64)
    for mine, exact in zip(kernels(given, last_only), truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(
    "tiling", [{"block": 16}, {"block": 128, "step": 16}, {"programs": 1}], ids=str
)
def test_tiles_and_parts_change_nothing(tiling, last_only, device):
    for size in ("over a tile", "two tiles of prefix", "only prefix before ones"):
        given = case(size, torch.float64, device)
        truth = literal(given, last_only, torch.float64)
        for mine, exact in zip(kernels(given, last_only, **tiling), truth, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float16, "cpu"),
        *(pytest.param(d, "cuda", marks=pytest.mark.gpu) for d in DTYPES),
    ],
    ids=str,
)
def test_same_bits_in_every_run(dtype, device):
    given = case("over a tile", dtype, device)
    first, *others = [kernels(given, False) for _ in range(3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _launch(
    dtype: torch.dtype,
    head: int,
    *,
    width: int = 512,
    shared: int = 16,
    longest: int = 18,
    classes: int = 100,
    groups: int = 1,
    last_only: bool = False,
    sos: bool = True,
    bias: bool = True,
) -> None:
    lengths = [min(longest, 3 + c % 5) for c in range(classes - 1)] + [longest]
    given = {
        "qkv": torch.empty(groups, shared + sum(lengths), 3 * width, dtype=dtype, device="meta"),
        "bias": torch.empty(3 * width, dtype=dtype, device="meta") if bias else None,
        "shared": shared,
        "starts": (0, *itertools.accumulate(lengths)),
        "heads": width // head,
        "sos": torch.empty(2, width, dtype=dtype, device="meta") if sos else None,
    }
    kernels(given, last_only)


def launches() -> None:
    """Launch what the tower of ViT-B needs for 100 classes, and for 1000 of many contexts."""
    for dtype in (torch.float16, torch.float32):
        for last_only in (False, True):
            _launch(dtype, 64, last_only=last_only)
    _launch(torch.bfloat16, 64, width=768, classes=1000, groups=1000, shared=4)


def odd_launches() -> None:
    """Launch other sizes of heads, prefixes and segments."""
    half = torch.float16
    _launch(half, 64, width=1280, shared=0, longest=76, classes=37)
    _launch(half, 64, shared=75, longest=2)
    _launch(half, 32)
    _launch(half, 80, width=640)


#: What the face is asked for beyond the papers' sizes: heads of two towers, of a width that is no
#: power of two, and up to the most, which the dtype decides; no prefix, a short one and one that
#: leaves a segment one row; with and without the constant token and the bias. float16 takes the
#: tiles of bfloat16, and is in the other two tables.
LIMITS = {
    "head": (48, 64, 80, 128),
    "kind": ("bfloat16", "tf32", "float32", "float64"),
    "shared": (0, 4, 75),
    "last_only": (False, True),
    "constants": (False, True),
    "groups": (1, 10),
}


def limits_launches() -> None:
    """Launch any two of the face's limits together, forward and back."""

    def dtype_of(row: dict) -> torch.dtype:
        return getattr(torch, row["kind"].replace("tf32", "float32"))

    def admitted(row: dict) -> bool:
        qkv = torch.empty(1, 1, 3 * 8 * row["head"], dtype=dtype_of(row), device="meta")
        return taken("prefix_attention", qkv, 8)

    before = torch.get_float32_matmul_precision()
    for row in every_pair(admitted, **LIMITS):
        dtype, head = dtype_of(row), row["head"]
        torch.set_float32_matmul_precision("high" if row["kind"] == "tf32" else "highest")
        try:
            _launch(
                dtype,
                head,
                width=8 * head,
                shared=row["shared"],
                longest=76 - row["shared"],
                groups=row["groups"],
                last_only=row["last_only"],
                sos=row["constants"],
                bias=row["constants"],
            )
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_fit_at_the_limits_of_the_face():
    assert_fits(limits_launches)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_fit_every_card():
    assert_fits(launches)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_fit_at_odd_sizes():
    assert_fits(odd_launches)
