"""The fused-algebra gate against the literal multi-head attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfpl.errors import InputError, KindError
from fastfpl.ops.faces import face
from fastfpl.ops.gate import Gate, gate_experts


def problem(
    lead: tuple[int, ...], B: int, C: int, E: int, D: int, heads: int, seed: int = 0
) -> tuple[Tensor, Tensor, Gate]:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(*lead, B, D, generator=draw, dtype=torch.float64)
    experts = torch.randn(*lead, C, E, D, generator=draw, dtype=torch.float64)
    one = Gate.init(D, heads, 2.0, draw, dtype=torch.float64)
    tensors = {
        name: t + 0.1 * torch.randn(*lead, *t.shape, generator=draw, dtype=torch.float64)
        for name, t in one.tensors().items()
    }
    return image, experts, Gate(**tensors, heads=heads, scale=2.0)


def both(image: Tensor, experts: Tensor, gate: Gate) -> dict[str, list[Tensor]]:
    found = {}
    for name in ("torch", "cpu", "triton", "reference"):
        leaves = [image.clone(), experts.clone(), *(t.clone() for t in gate.tensors().values())]
        for leaf in leaves:
            leaf.requires_grad_()
        mine = replace(gate, **dict(zip(Gate.tensor_names(), leaves[2:], strict=True)))
        with face(name):
            logits = gate_experts(leaves[0], leaves[1], mine)
        weight = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
        found[name] = [logits.detach(), *torch.autograd.grad((logits * weight).sum(), leaves)]
    return found


@pytest.mark.parametrize(
    ("lead", "B", "C", "E", "D", "heads"),
    [
        ((), 1, 1, 1, 1, 1),
        ((), 5, 7, 3, 12, 4),
        ((3,), 2, 5, 10, 16, 8),
        ((2, 2), 3, 2, 65, 8, 1),
        ((1,), 33, 11, 4, 6, 2),
    ],
    ids=str,
)
def test_forward_and_every_gradient(
    lead: tuple[int, ...], B: int, C: int, E: int, D: int, heads: int
) -> None:
    found = both(*problem(lead, B, C, E, D, heads))
    for mine, true in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_inputs_exercise_the_softmax() -> None:
    image, experts, gate = problem((), 16, 6, 5, 16, 4)
    q = torch.nn.functional.linear(image, gate.w_q, gate.b_q).unflatten(-1, (4, -1))
    k = torch.nn.functional.linear(experts, gate.w_k, gate.b_k).unflatten(-1, (4, -1))
    weights = (gate.scale * torch.einsum("bhk,cehk->cbhe", q, k)).softmax(-1)
    largest = weights.max(dim=-1).values.mean()
    assert 0.35 < largest < 0.97


def test_reference_equals_torch_multi_head_attention() -> None:
    image, experts, gate = problem((), 4, 3, 5, 12, 3)
    # torch fixes the scale at 1/sqrt(d_k); the factor goes into the queries
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    factor = gate.scale * (12 / 3) ** 0.5
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat((gate.w_q * factor, gate.w_k, gate.w_v)))
        layer.in_proj_bias.copy_(torch.cat((gate.b_q * factor, gate.b_k, gate.b_v)))
        layer.out_proj.weight.copy_(gate.w_o)
        layer.out_proj.bias.copy_(gate.b_o)
        out, _ = layer(image.expand(3, -1, -1), experts, experts)
    want = torch.einsum("bd,cbd->bc", image, out)
    with face("reference"):
        torch.testing.assert_close(gate_experts(image, experts, gate), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_gradcheck(name: str) -> None:
    image, experts, gate = problem((2,), 2, 2, 3, 4, 2)
    leaves = [image, experts, *gate.tensors().values()]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(image: Tensor, experts: Tensor, *tensors: Tensor) -> Tensor:
        named = dict(zip(Gate.tensor_names(), tensors, strict=True))
        with face(name):
            return gate_experts(image, experts, replace(gate, **named))

    assert torch.autograd.gradcheck(run, leaves)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 4),
    C=st.integers(0, 5),
    E=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_laws(B: int, C: int, E: int, heads: int, seed: int) -> None:
    image, experts, gate = problem((2,), B, C, E, 6, heads, seed)
    logits = gate_experts(image, experts, gate)
    assert logits.shape == (2, B, C)
    close = {"rtol": 0, "atol": 1e-12}
    turned = gate_experts(image, experts.flip(-2), gate)
    torch.testing.assert_close(turned, logits, **close)
    torch.testing.assert_close(
        gate_experts(image, experts.flip(-3), gate), logits.flip(-1), **close
    )
    twice = torch.cat((experts, experts), dim=-2)
    torch.testing.assert_close(gate_experts(image, twice, gate), logits, **close)
    one = replace(gate, **{name: t[1] for name, t in gate.tensors().items()})
    torch.testing.assert_close(gate_experts(image[1], experts[1], one), logits[1], **close)


def test_views_read_only_their_own_elements() -> None:
    image, experts, gate = problem((), 5, 4, 3, 8, 2)
    wide = torch.full((5, 16), float("nan"), dtype=torch.float64)
    wide[:, ::2] = image
    deep = torch.full((4, 3, 16), float("nan"), dtype=torch.float64)
    deep[..., ::2] = experts
    want = gate_experts(image, experts, gate)
    torch.testing.assert_close(gate_experts(wide[:, ::2], deep[..., ::2], gate), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errs_at_most_twice_as_much_as_eager(dtype: torch.dtype) -> None:
    image, experts, gate = problem((2,), 8, 9, 10, 32, 4)
    low = replace(gate, **{n: t.to(dtype) for n, t in gate.tensors().items()})
    image, experts = image.to(dtype), experts.to(dtype)
    exact = replace(low, **{n: t.double() for n, t in low.tensors().items()})
    with face("reference"):
        true = gate_experts(image.double(), experts.double(), exact)
        eager = gate_experts(image, experts, low).double()
    mine = gate_experts(image, experts, low).double()
    floor = torch.finfo(dtype).eps * true.abs().max() / 2
    assert (mine - true).abs().max() <= 2 * (eager - true).abs().max() + floor
    rms = [(x - true).square().mean().sqrt() for x in (mine, eager)]
    assert rms[0] <= 2 * rms[1] + floor / 2


def test_init_is_that_of_linear_layers() -> None:
    gate = Gate.init(64, 8, 10.0, torch.Generator().manual_seed(0))
    for name, tensor in gate.tensors().items():
        assert tensor.shape == ((64, 64) if name.startswith("w_") else (64,))
        assert tensor.abs().max() <= 1 / 8
        assert tensor.abs().max() > 0.1
        assert tensor.dtype == torch.float32
    again = Gate.init(64, 8, 10.0, torch.Generator().manual_seed(0))
    assert torch.equal(gate.w_q, again.w_q)
    assert not torch.equal(gate.w_q, gate.w_k)


def test_bad_input_gets_a_sentence() -> None:
    image, experts, gate = problem((2,), 3, 4, 5, 6, 2)
    for arguments, kind, text in (
        ((image[..., :5], experts, gate), InputError, r"experts must have shape .* with B=3, D=5"),
        ((image[0], experts, gate), InputError, r"w_q must have leading dimensions \(\) or none"),
        ((image, experts[..., :0, :], gate), InputError, "at least one expert; got E=0"),
        ((image, experts, replace(gate, heads=4)), InputError, "heads must divide D; got 4"),
        ((image, experts.float(), gate), KindError, "experts must be torch.float64 as image is"),
        ((image.float(), experts.float(), gate), KindError, "w_q must be torch.float32 as image"),
        (
            (image, experts[:1].expand(3, -1, -1, -1), gate),
            InputError,
            r"experts must have the leading dimensions \(2,\) of image; got \(3,\)",
        ),
        (
            (image, experts, replace(gate, b_o=gate.b_o[..., :3])),
            InputError,
            r"b_o must have shape \(\.\.\., D\); got \(2, 3\) with D=6",
        ),
    ):
        with pytest.raises(kind, match=text):
            gate_experts(*arguments)
