"""Under autocast every face of an op has eager's dtype rules, and a run none of it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfpl
from fastfpl.errors import NotSupported
from fastfpl.ops import (
    Gate,
    all_faces,
    encode_embedded,
    encode_text,
    gate_experts,
    prefix_attention,
)
from fastfpl.ops.faces import face
from fastfpl.ops.memory import memory_limit
from fastfpl.prompts import ClassPrompts, encode_prompts
from tests.test_gate import problem
from tests.test_text import WordsClip, random_tower
from tests.truth import assert_as_good_as_eager
from tests.worlds import GATE, TINY_RUN, figures

HALVES = [torch.bfloat16, torch.float16]
Step = Callable[[torch.dtype], tuple[Tensor, Tensor]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def weighed(result: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and a gradient that is asked for where autocast still is on."""
    weight = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view(result.shape)
    (gradient,) = torch.autograd.grad(result, leaf, weight.to(result.dtype))
    return result.detach(), gradient


def of_text(
    dtype: torch.dtype,
    encode: Any = encode_text,
    bias: bool = False,
    contexts: int = 6,
    depth: int = 2,
) -> Any:
    tower = random_tower(depth=depth, bias=bias, dtype=dtype)
    classes = ClassPrompts(WordsClip(tower), ("cat", "sea horse"))  # type: ignore[arg-type]
    leaf = drawn(contexts, 2, 24).float().to(dtype).requires_grad_()
    where = (classes,) if encode is encode_prompts else (tower, classes.layout(2))
    return weighed(encode(*where, leaf), leaf)


def of_text_in_parts(dtype: torch.dtype) -> Any:
    with memory_limit(1 << 19):
        return of_text(dtype)


def of_embedded(dtype: torch.dtype) -> Any:
    tower, ends = random_tower(depth=2, dtype=dtype), torch.tensor([7, 3, 12])
    leaf = drawn(3, 40, 24).float().to(dtype).requires_grad_()
    return weighed(encode_embedded(tower, leaf, ends), leaf)


def of_attention(dtype: torch.dtype) -> Any:
    leaf = drawn(2, 12, 96).float().to(dtype).requires_grad_()
    bias, sos = (x.float().to(dtype) for x in (drawn(96), drawn(2, 32)))
    given = {"heads": 2, "shared": 4, "starts": (0, 3, 8), "bias": bias, "sos": sos}
    return weighed(prefix_attention(leaf, **given), leaf)


def of_gate(dtype: torch.dtype) -> Any:
    image, experts, gate = problem((), 3, 4, 2, 12, 3, dtype=torch.float32)
    tensors = {n: t.to(dtype) for n, t in gate.tensors().items()}
    leaf = image.to(dtype).requires_grad_()
    return weighed(gate_experts(leaf, experts.to(dtype), replace(gate, **tensors)), leaf)


OPS: dict[str, tuple[str, Step]] = {
    "encode_text": ("encode_text", of_text),
    "encode_text in parts": ("encode_text", of_text_in_parts),
    "encode_text, small": ("encode_text", lambda dtype: of_text(dtype, contexts=1, depth=1)),
    "encode_text with bias": ("encode_text", lambda dtype: of_text(dtype, bias=True)),
    "encode_prompts": ("encode_text", lambda dtype: of_text(dtype, encode_prompts)),
    "encode_embedded": ("encode_embedded", of_embedded),
    "prefix_attention": ("prefix_attention", of_attention),
    "gate_experts": ("gate_experts", of_gate),
}
ROWS = [
    (op, one.name)
    for op, (faces, _) in OPS.items()
    for one in all_faces()[faces]
    # the literal pass keeps to no memory limit; the interpreter takes seconds for a text
    if (op, one.name) != ("encode_text in parts", "reference")
    and (one.name != "triton" or faces != "encode_text" or op == "encode_text, small")
]


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize(("op", "name"), ROWS)
def test_autocast_gives_what_eager_gives(op: str, name: str, half: torch.dtype) -> None:
    _, step = OPS[op]
    exact = step(torch.float64)
    literal = "torch" if op == "encode_text in parts" else "reference"
    with torch.autocast("cpu", half):
        with face(literal):
            eager = step(torch.float32)
        if name == "cpu" and op != "gate_experts" and half == torch.float16:
            with face(name), pytest.raises(NotSupported, match="float16"):
                step(torch.float32)
            return
        with face(name):
            found = step(torch.float32)
            # as autocast leaves float64 alone
            untouched = exact if op == "encode_text, small" else step(torch.float64)
    for what, mine, theirs, true, wide in zip(
        ("result", "gradient"), found, eager, exact, untouched, strict=True
    ):
        assert mine.dtype == theirs.dtype, what
        torch.testing.assert_close(wide, true, rtol=1e-9, atol=1e-10, msg=what)
        if name == "triton" and half == torch.bfloat16 and op != "gate_experts":
            # the interpreter truncates to bfloat16 instead of rounding
            scale = float(true.abs().max())
            torch.testing.assert_close(mine.double(), true, rtol=0, atol=0.1 * scale, msg=what)
        else:
            assert_as_good_as_eager(mine, theirs, true, name=what)


def test_text_and_attention_follow_autocast_and_the_gate_does_not() -> None:
    for half in HALVES:
        with torch.autocast("cpu", half):
            assert of_text(torch.float32)[0].dtype == half
            assert of_attention(torch.float32)[0].dtype == half
            assert of_gate(torch.float32)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        tower = random_tower(depth=1, dtype=torch.float32)
        layout = ClassPrompts(WordsClip(tower), ("cat",)).layout(2)  # type: ignore[arg-type]
        for one in ("cpu", "torch", "reference"):
            with face(one):
                empty = encode_text(tower, layout, torch.zeros(0, 2, 24))
            assert (empty.dtype, empty.shape) == (torch.bfloat16, (0, 1, 10))


@pytest.mark.parametrize("name", [f.name for f in all_faces()["gate_experts"]])
def test_a_gate_may_be_wider_than_images_under_autocast(name: str) -> None:
    image, experts, gate = problem((), 3, 4, 2, 12, 3, dtype=torch.float32)
    low = image.bfloat16()
    leaves = [low.requires_grad_(), *(t.requires_grad_() for t in gate.tensors().values())]
    same = replace(gate, **dict(zip(Gate.tensor_names(), leaves[1:], strict=True)))
    with face(name):
        want = gate_experts(low.float(), experts, same)
        with torch.autocast("cpu", torch.bfloat16):
            found = gate_experts(low, experts, same)
    assert torch.equal(found, want)
    for mine, true in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(want.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(mine, true)


def test_weights_that_change_are_rounded_anew() -> None:
    tower = random_tower(depth=1, dtype=torch.float32)
    layout = ClassPrompts(WordsClip(tower), ("cat", "owl")).layout(2)  # type: ignore[arg-type]
    ctx = drawn(2, 24).float()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            pair = []
            for one in ("cpu", "torch"):
                with face(one):
                    pair.append(encode_text(tower, layout, ctx).float())
        torch.testing.assert_close(*pair, rtol=0, atol=0.03)
        found.append(pair[0])
        with torch.no_grad():
            tower.blocks[0].fc_w.neg_()
    assert (found[0] - found[1]).abs().max() > 0.1


@contextmanager
def float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("method", ["fedotp", "pfedmoap", "fedapt", "fedtpg"])
@pytest.mark.usefixtures("few_digits")
def test_nothing_round_a_run_changes_its_figures(method: str, tmp_path: Path) -> None:
    short = {"clients": 3, "rounds": 1, "local_epochs": 1, "shots": 2}
    if method == "pfedmoap":
        short |= {"options": GATE}
    found = []
    for where, block in {
        "plain": memory_limit(None),
        "float64": float64_by_default(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }.items():
        # a store of its own: features are encoded in the block as well
        with block:
            result = fastfpl.run(method, cache=tmp_path / where, **TINY_RUN | short)
            assert torch.is_autocast_enabled("cpu") == (where == "autocast")
        found.append(figures(result))
    assert found[1] == found[0]
    assert found[2] == found[0]


#: Makers of tensors whose dtype is torch's default where none is named; with numbers, ``OF_WHAT``.
MAKERS = {"empty", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros", "normal"}
OF_WHAT = {"arange", "as_tensor", "full", "scalar_tensor", "tensor"}


def left_to_the_default(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "torch" or {"dtype", "out"} & {
            k.arg for k in node.keywords
        }:
            continue
        floats = any(
            (isinstance(x, ast.Constant) and isinstance(x.value, float))
            or (isinstance(x, ast.BinOp) and isinstance(x.op, ast.Div))
            or (isinstance(x, ast.Name) and x.id.isupper())
            for x in ast.walk(node)
        )
        if node.func.attr in MAKERS or (node.func.attr in OF_WHAT and floats):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_the_default_dtype_decides_nothing() -> None:
    assert left_to_the_default("torch.zeros(3)\ntorch.tensor([0.5])\ntorch.tensor(MEAN)")
    assert not left_to_the_default("torch.zeros(3, dtype=d)\ntorch.tensor([1])\nx.new_zeros(3)")
    root = Path(__file__).resolve().parent.parent
    found = {
        str(path.relative_to(root)): lines
        for folder in ("fastfpl", "kernels")
        for path in sorted((root / folder).rglob("*.py"))
        if (lines := left_to_the_default(path.read_text(encoding="utf-8")))
    }
    assert not found
