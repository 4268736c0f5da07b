"""What ops make of torch's other derivatives, of lazily negated views and of empty contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastfpl.errors import NotSupported
from fastfpl.ops import Gate, all_faces, encode_embedded, encode_text, gate_experts
from fastfpl.ops import prefix_attention as attend
from fastfpl.ops.faces import face, recorded_faces
from fastfpl.prompts import ClassPrompts
from tests.test_gate import problem
from tests.test_text import WordsClip, random_tower

BY_HAND = ("triton", "cpu")


class Case(NamedTuple):
    """An op as a function of one tensor, and of all that it might be given besides."""

    run: Callable[..., Tensor]
    given: tuple[Tensor, ...]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def layout_of(slots: int):
    classes = ClassPrompts(WordsClip(TOWER), ("cat", "owl"))  # type: ignore[arg-type]
    return classes.layout(slots)


def gated(image: Tensor, experts: Tensor, *tensors: Tensor) -> Tensor:
    named = dict(zip(Gate.tensor_names(), tensors, strict=True))
    return gate_experts(image, experts, replace(GATE, **named))


def attended(qkv: Tensor, bias: Tensor, sos: Tensor) -> Tensor:
    return attend(qkv, heads=2, shared=4, starts=(0, 3, 8), bias=bias, sos=sos)


TOWER = random_tower(depth=1)
IMAGE, EXPERTS, GATE = problem((), 3, 4, 2, 12, 3)
CASES = {
    "gate_experts": Case(gated, (IMAGE, EXPERTS, *GATE.tensors().values())),
    "prefix_attention": Case(attended, (drawn(1, 12, 96), drawn(96), drawn(2, 32))),
    "encode_text": Case(lambda ctx: encode_text(TOWER, layout_of(2), ctx), (drawn(1, 2, 24),)),
    "encode_embedded": Case(
        lambda prompts: encode_embedded(TOWER, prompts, torch.tensor([7, 3, 12])),
        (drawn(3, 40, 24),),
    ),
}
ROWS = [(op, one.name) for op in CASES for one in all_faces()[op]]


def negated(x: Tensor) -> Tensor:
    """The same numbers, contiguous, with their sign in a bit beside the memory."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    assert view.is_contiguous()
    return view


@pytest.mark.parametrize(("op", "name"), ROWS)
def test_a_lazily_negated_view_is_read_with_its_sign(op: str, name: str) -> None:
    run, given = CASES[op]
    found = []
    for turn in (lambda x: x, negated):
        leaves = [x.clone().requires_grad_() for x in given]
        with face(name):
            result = run(*(turn(x) for x in leaves))
        weight = turn(drawn(*result.shape))
        gradients = torch.autograd.grad(result, leaves[0], weight)
        found.append((result.detach(), *gradients))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("op", "name"), ROWS)
def test_other_derivatives_are_right_or_refused(op: str, name: str) -> None:
    run, given = CASES[op]
    first, rest = given[0], given[1:]
    step = drawn(*first.shape)

    def forward_mode() -> Tensor:
        with forward_ad.dual_level():
            result = run(forward_ad.make_dual(first, step), *rest)
            return forward_ad.unpack_dual(result).tangent

    ways = {
        "forward": forward_mode,
        "jvp": lambda: torch.func.jvp(lambda x: run(x, *rest), (first,), (step,))[1],
        "grad": lambda: torch.func.grad(lambda x: run(x, *rest).square().sum())(first),
        "vmap": lambda: torch.func.vmap(lambda x: run(x, *rest))(torch.stack((first, 2 * first))),
    }
    plain = name not in BY_HAND
    if not plain:
        for way in ("forward", "jvp"):
            with (
                face(name),
                pytest.raises(NotSupported, match=f"{name}: forward-mode.*look into"),
            ):
                ways[way]()
    with face(name):
        leaf = first.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(leaf, *rest).square().sum(), leaf)
        move = 1e-6
        slope = (run(first + move * step, *rest) - run(first - move * step, *rest)) / (2 * move)
        close = {"rtol": 1e-6, "atol": 1e-7}
        for way in ("forward", "jvp") if plain else ():
            torch.testing.assert_close(ways[way](), slope, **close)
        torch.testing.assert_close(ways["grad"](), gradient, rtol=1e-9, atol=1e-10)
        both = torch.stack((run(first, *rest), run(2 * first, *rest)))
        torch.testing.assert_close(ways["vmap"](), both, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("op", CASES)
def test_without_a_choice_plain_torch_answers_them(op: str) -> None:
    run, given = CASES[op]
    with recorded_faces() as seen, forward_ad.dual_level():
        # of any tensor that an op is given, not only of the first
        for at, moved in enumerate(given):
            dual = forward_ad.make_dual(moved, torch.ones_like(moved))
            result = run(*given[:at], dual, *given[at + 1 :])
            tangent = forward_ad.unpack_dual(result).tangent
            assert tangent is not None
    assert seen == {op: {"torch"}}


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("name", [one.name for one in all_faces()["encode_text"]])
def test_no_context_at_all_has_an_empty_gradient(name: str, class_specific: bool) -> None:
    shape = (2, 2, 0, 24) if class_specific else (2, 0, 24)
    ctx = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with face("reference"):
        want = encode_text(TOWER, layout_of(0), ctx, class_specific=class_specific)
    with face(name):
        features = encode_text(TOWER, layout_of(0), ctx, class_specific=class_specific)
    torch.testing.assert_close(features, want, rtol=1e-10, atol=1e-11)
    (gradient,) = torch.autograd.grad(features.sum(), ctx)
    assert gradient.shape == shape


@pytest.mark.parametrize("name", [one.name for one in all_faces()["encode_embedded"]])
def test_embedded_prompts_take_the_towers_dtype(name: str) -> None:
    tower, prompts = random_tower(depth=1, dtype=torch.bfloat16), drawn(3, 40, 24).float()
    leaf = prompts.requires_grad_()
    with face(name):
        states = encode_embedded(tower, leaf, torch.tensor([7, 3, 12]))
        same = encode_embedded(tower, prompts.bfloat16(), torch.tensor([7, 3, 12]))
    assert states.dtype == torch.bfloat16
    assert torch.equal(states, same)
    (gradient,) = torch.autograd.grad(states.float().sum(), leaf)
    assert gradient.dtype == torch.float32
