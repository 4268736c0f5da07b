"""Kernels under a card's arithmetic, by the same judge; and that arithmetic itself."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch

import fastfpl
from fastfpl.ops import launch, transport_logits
from tests import test_attention_kernels, test_gate, test_text_kernels, test_transport_kernels
from tests.hostile import card_arithmetic, cut_to_tf32, product, round_to_tf32
from tests.test_transport_logits import features
from tests.truth import assert_as_good_as_eager

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
tl = triton.language
pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here"),
    # where a GPU computes an infinity in silence, numpy says so
    *(
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
        for what in ("divide by zero", "invalid value", "overflow", "All-NaN slice")
    ),
]


@pytest.fixture
def _card():
    with card_arithmetic():
        yield


# --- the arithmetic -------------------------------------------------------------------------------


@triton.jit
def _functions_kernel(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.exp(a))
    tl.store(out + SIZE + at, tl.exp2(a))
    tl.store(out + 2 * SIZE + at, tl.log(b))
    tl.store(out + 3 * SIZE + at, tl.log2(b))
    tl.store(out + 4 * SIZE + at, tl.sqrt(b))
    tl.store(out + 5 * SIZE + at, tl.rsqrt(b))
    tl.store(out + 6 * SIZE + at, a / b)


@triton.jit
def _product_kernel(x, y, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    found = tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION)
    tl.store(out + at, found)


def functions(x, y):
    out = torch.empty(7, len(x), dtype=x.dtype)
    _functions_kernel[(1,)](x, y, out, SIZE=len(x))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_are_as_good_as_documented(dtype):
    draw = torch.Generator().manual_seed(0)
    x = 20 * torch.randn(512, generator=draw).to(dtype)
    y = torch.rand(512, generator=draw).to(dtype) + 0.01
    plain = functions(x, y)
    with card_arithmetic():
        card = functions(x, y)
    assert torch.equal(functions(x, y), plain), "nothing is left behind"
    if dtype == torch.float64:
        assert torch.equal(card, plain)
        return
    a, b = x.double(), y.double()
    exact = [a.exp(), a.exp2(), b.log(), b.log2(), b.sqrt(), b.rsqrt(), a / b]
    for row, true in enumerate(exact):
        # exp's argument is rounded before, 20 log2(e) of 3 sigma to 2**-18
        near = {0: 2.0**-16.5, 6: 2.5 * 2.0**-23}.get(row, 2.1 * 2.0**-22)
        error = ((card[row].double() - true) / true).abs().max()
        assert 2.0**-24 < error <= near
        assert not torch.equal(card[row], plain[row])
    assert torch.equal(card[6][y == 0.5], plain[6][y == 0.5])


@pytest.mark.usefixtures("_card")
def test_what_is_subnormal_is_nothing():
    small = torch.full((16,), 1e-39)
    found = functions(torch.full((16,), -90.0), small)
    assert (found[0] == 0).all()
    assert torch.isneginf(found[2]).all()
    assert torch.isneginf(found[3]).all()
    assert (found[6] < -1e38).all()


@pytest.mark.parametrize(
    ("precision", "dtype", "least", "most"),
    [
        ("tf32", torch.float32, 5e-4, 1e-3),  # a mean of half of 2**-10, twice
        ("tf32x3", torch.float32, 1e-9, 2e-6),
        ("ieee", torch.float32, 0.0, 1e-7),
        ("tf32", torch.float16, 1e-9, 1e-6),  # exact products, sums that are cut off
        ("ieee", torch.float64, 0.0, 1e-15),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_card")
def test_products_come_out_short(precision, dtype, least, most):
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(64, 64, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    out = torch.empty(64, 64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _product_kernel[(1,)](x, y, out, PRECISION=precision, SIZE=64)
    exact = x.double() @ y.double()
    bias = float(((out.double() - exact) * exact).sum() / exact.square().sum())
    assert least <= abs(bias) <= most
    assert bias <= 1e-7


def test_units_cut_off_what_was_measured():
    one, x = np.float32([[1]]), np.full((1, 8), 1 + 2**-10, np.float32)  # tf32, no bfloat16

    def beyond_one(terms: list[float], card: int, dtype: type = np.float32) -> float:
        """Add to 1; return what is seen of it, in units of its last bit."""
        y = np.zeros((len(terms), 1), np.float32)
        y[:, 0] = terms
        found = product(x[:, : len(terms)].astype(dtype), y.astype(dtype), one, "TF32", card)
        return float((found - one).item() * 2.0**23)

    # of each term 24 bits behind the sum's first are kept, or 25; of a sum 23
    half, quarter, none = 2.0**-24, 2.0**-25, 0.0
    assert [beyond_one(4 * [half], card) for card in (80, 86, 89, 90, 120)] == 5 * [2]
    assert [beyond_one(4 * [quarter], card) for card in (80, 89, 90, 120)] == [0, 0, 1, 1]
    assert beyond_one(4 * [quarter / 2], 90) == 0
    # four terms of tf32 at a time, or eight; of 16 bits twice as many
    apart = [half, none, none, none, half, none, none, none]
    assert [beyond_one(apart, card) for card in (80, 90)] == [0, 1]
    assert [beyond_one(apart, card, np.float16) for card in (80, 90)] == [1, 1]
    # towards zero, whatever the sign
    assert [beyond_one([-half], card) for card in (80, 90)] == [-0.5, -0.5]
    assert [beyond_one([-quarter], card) for card in (80, 90)] == [0, -0.5]


def test_tf32_has_ten_bits():
    x = np.float32([1 + 2**-10, 1 + 2**-11, 1 + 2**-11 + 2**-12, -1 - 2**-11, 0])
    assert cut_to_tf32(x).tolist() == [1 + 2**-10, 1, 1, -1, 0]
    assert round_to_tf32(x).tolist() == [1 + 2**-10, 1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 0]


# --- the judge ------------------------------------------------------------------------------------


# in float32 a bias below rounding is what one shared factor brings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_judge_sees_a_bias_below_rounding(dtype):
    exact = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eager = exact.to(dtype)
    unbiased = eager.double() + 0.2 * torch.finfo(dtype).eps * exact * exact.sign().roll(1)
    assert_as_good_as_eager(unbiased.to(dtype), eager, exact)
    short = (exact * (1 - torch.finfo(dtype).eps / 8)).to(dtype)
    with pytest.raises(AssertionError, match=r"bias -.* for 16384 numbers"):
        assert_as_good_as_eager(short, eager, exact)


# --- transport ------------------------------------------------------------------------------------

#: Blocks as they are on a GPU, where the interpreter would take one.
TILE = {"BLOCK_D": 32, "BLOCK_C": 8}
KINDS = [torch.float32, torch.float16, torch.bfloat16]


def plain_gradients(pair, by, balanced, face="reference", **options):
    leaves = [x.clone().requires_grad_() for x in pair]
    with fastfpl.face(face):
        logits = transport_logits(*leaves, eps=0.05, mass=0.8, balanced=balanced, **options)
    return torch.autograd.grad(logits, leaves, by.to(logits.dtype))


@pytest.mark.parametrize("balanced", [False, True], ids=["capped", "balanced"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("kind", ["one sign", "cancelling"])
@pytest.mark.usefixtures("_card")
def test_gradients_are_not_short(kind, dtype, balanced, monkeypatch):
    from fastfpl.kernels import transport as kernels

    # either nothing averages a bias away, or what is left of the sums is small beside their terms
    pair = features(3, 49, 6, 2, 32, (1,), dtype=dtype, spread=3.0 if kind == "one sign" else 0.5)
    by = torch.ones(1, 3, 6) if kind == "one sign" else torch.linspace(-1, 1, 6).expand(1, 3, 6)
    if kind == "cancelling":
        pair[1] = pair[1][:, :1].expand_as(pair[1]) + 0.05 * pair[1]
    by = by.to(dtype).float().contiguous()
    monkeypatch.setattr(
        kernels, "transport_logits_fwd", functools.partial(kernels.transport_logits_fwd, tile=TILE)
    )
    found = plain_gradients(pair, by, balanced, "triton")
    eager = plain_gradients(pair, by, balanced)
    tight = {"tol": 1e-12, "max_iter": 10**5}
    exact = plain_gradients([x.double() for x in pair], by, balanced, **tight)
    for name, mine, theirs, true in zip(
        ("d_patches", "d_prompts"), found, eager, exact, strict=True
    ):
        assert_as_good_as_eager(mine, theirs, true, name=name)


@pytest.mark.parametrize("balanced", [False, True], ids=["capped", "balanced"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.usefixtures("_card")
def test_transport(dtype, balanced):
    options = {"dtype": dtype, "balanced": balanced, "device": "cpu"}
    for shape in ((2, 49, 2), (4, 17, 1), (1, 1), (33, 2), (3, 9, 3)):
        test_transport_kernels.test_plan_as_good_as_eager(shape, **options)
    test_transport_kernels.test_logits_as_good_as_eager(**options)
    if dtype != torch.float32:
        for eps in (0.005, 1.0):
            test_transport_kernels.test_sixteen_bits_never_give_nan(eps=eps, **options)


@pytest.mark.usefixtures("_card")
def test_transport_at_its_edges():
    for mass in (0.01, 0.99, 1.0):
        test_transport_kernels.test_small_eps_is_exact(0.005, mass, 5, "cpu")
    test_transport_kernels.test_a_tolerance_below_rounding_spoils_nothing("cpu")
    for prompts in (2, 3):
        test_transport_kernels.test_plans_of_what_is_not_finite_are_nan(3e38, prompts, "cpu")
    test_transport_kernels.test_logits_of_what_is_not_finite_are_nan(float("nan"), 2, "cpu")


# --- the other kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ("papers", torch.float32),
        ("many experts", torch.float32),
        ("papers", torch.float16),
        ("many images", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_card")
def test_gate_experts(size, dtype):
    test_gate.test_errs_at_most_twice_as_much_as_eager("triton", "cpu", size, dtype)


# every size that the face takes in float32, whose products are made on the matrix units in parts
@pytest.mark.parametrize(
    ("size", "dtype", "card"),
    [
        *(
            (size, torch.float32, 80)
            for size, (_, _, _, _, head) in test_attention_kernels.SIZES.items()
            if head <= 64
        ),
        *((size, torch.float32, 90) for size in ("one", "over a tile", "only prefix before ones")),
        ("papers", torch.float16, 80),
        ("papers", torch.bfloat16, 80),
    ],
    ids=str,
)
@pytest.mark.parametrize("last_only", [False, True])
def test_prefix_attention(size, dtype, card, last_only):
    with card_arithmetic(card):
        # in the tiles of a card, not the interpreter's: they decide how long sums on the units are
        test_attention_kernels.check_as_good_as_eager(size, dtype, "cpu", last_only, step=None)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(7, 24), (3, 512), (5, 1025)], ids=str)
@pytest.mark.usefixtures("_card")
def test_text(shape, dtype):
    test_text_kernels.test_norm(shape, dtype, "cpu")
    test_text_kernels.test_unit_length(shape, dtype, "cpu")
    for kind in ("quick_gelu", "gelu"):
        test_text_kernels.test_activation(shape, dtype, kind, "cpu")


# --- all of them ----------------------------------------------------------------------------------


def kernels() -> set[str]:
    """Return the names of all that fastfpl.kernels launches, read in its source."""
    found = set()
    room = importlib.import_module("fastfpl.kernels")
    for module in pkgutil.iter_modules(room.__path__, "fastfpl.kernels."):
        tree = ast.parse(inspect.getsource(importlib.import_module(module.name)))
        calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call)]
        found |= {x.args[0].id for x in calls if getattr(x.func, "id", None) == "launched"}
        if module.name != "fastfpl.kernels.launching":
            assert not any(isinstance(x.func, ast.Subscript) for x in calls), "kernel[grid](...)"
    return found


@contextlib.contextmanager
def launched():
    """Collect the names of the kernels that are launched in the block."""
    from triton.runtime.interpreter import InterpretedFunction

    names: set[str] = set()
    plain = InterpretedFunction.run

    def run(self, *args, **kwargs):
        names.add(self.__name__)
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        yield names


@pytest.mark.usefixtures("_card")
def test_every_kernel_is_played():
    with launched() as names:
        test_transport_kernels.test_plan_as_good_as_eager((3, 9, 3), torch.float32, False, "cpu")
        test_transport_kernels.test_logits_as_good_as_eager(torch.float16, True, "cpu")
        test_gate_experts("papers", torch.float16)
        test_prefix_attention("over a tile", torch.float16, 80, last_only=False)
        test_text((7, 24), torch.float32)
    assert len(names) > 10
    assert kernels() - names == set(), "no test here plays these under a card's arithmetic"
    assert names - kernels() == set(), "launched otherwise than by launched(kernel, ...)"
