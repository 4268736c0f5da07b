"""Deep prompts: every face against the literal pass; values, gradients, sizes, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError, NotSupported
from fastfpl.ops.embedded import encode_embedded
from fastfpl.ops.faces import face, recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.text import FACES, encode_text
from fastfpl.prompts import ClassPrompts, encode_prompts
from fastfpl.reference.text import Block, TextTower
from tests.test_embedded import ENDS, prompts_of
from tests.test_text import NAMES, WordsClip, living, random_tower, relative
from tests.truth import assert_as_good_as_eager, fenced

#: The interpreter takes seconds for a tower: the Triton face has a test of its own.
FAST = [f.name for f in FACES["encode_text"] if f.name not in ("reference", "triton")]


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def words(tower: TextTower, names: Sequence[str] = NAMES, position: Any = "end") -> ClassPrompts:
    return ClassPrompts(WordsClip(tower), names, position)  # type: ignore[arg-type]  # its text side


def found_by(
    name: str, tower: TextTower, layout: Any, ctx: Tensor, deep: Tensor, own: bool = False
) -> list[Tensor]:
    """Features, and the gradients of context and deep prompts."""
    leaves = [ctx.detach().clone().requires_grad_(), deep.detach().clone().requires_grad_()]
    with face(name):
        features = encode_text(tower, layout, leaves[0], class_specific=own, deep=leaves[1])
    weight = draw(*features.shape, seed=3).to(features.dtype)
    grads = torch.autograd.grad((features * weight).sum(), leaves, allow_unused=True)
    return [features.detach(), *(g if g is not None else torch.zeros(1) for g in grads)]


def calm(tower: TextTower) -> TextTower:
    """Soften the attention: single prompts would amplify rounding, by luck ten times or not at all.

    With it no prompt decides the largest error alone.
    """
    blocks = tuple(replace(block, qkv_w=block.qkv_w / 3) for block in tower.blocks)
    return replace(tower, blocks=blocks)


def agree(got: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-13)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert mine.shape == theirs.shape
        assert relative(mine, theirs) < 1e-12


def literally(tower: TextTower, layout: Any, ctx: Tensor, deep: Tensor) -> Tensor:
    """One context, class by class, in another way than the reference: rows of a list."""
    from torch.nn import functional as F

    from fastfpl.reference.text import activate, block_norm, unit_length

    features = []
    for ids, slots, end in zip(layout.tokens, layout.slots, layout.eot, strict=True):
        rows = list(tower.token_embedding[ids[: end + 1]])
        for t, slot in enumerate(slots.tolist()):
            rows[slot] = ctx[t]
        x = torch.stack(rows) + tower.positional[: end + 1]
        for i, block in enumerate(tower.blocks):
            if 0 < i <= len(deep):
                rows = list(x)
                for t, slot in enumerate(slots.tolist()):
                    rows[slot] = deep[i - 1, t]
                x = torch.stack(rows)
            h = block_norm(x, block.ln_1_w, block.ln_1_b, tower.eps)
            q, k, v = (
                part.unflatten(-1, (tower.heads, -1)).transpose(0, 1)
                for part in F.linear(h, block.qkv_w, block.qkv_b).chunk(3, -1)
            )
            scores = q @ k.mT / q.shape[-1] ** 0.5
            scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + F.linear(mixed, block.out_w, block.out_b)
            h = block_norm(x, block.ln_2_w, block.ln_2_b, tower.eps)
            h = activate(F.linear(h, block.fc_w, block.fc_b), tower.activation)
            x = x + F.linear(h, block.proj_w, block.proj_b)
        x = block_norm(x, tower.ln_w, tower.ln_b, tower.eps)
        features.append(unit_length(x[-1] @ tower.projection))
    return torch.stack(features)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_the_reference_replaces_what_the_paper_says(position: Any) -> None:
    tower = random_tower(depth=4)
    layout = words(tower, position=position).layout(3)
    ctx, deep = draw(3, 24), draw(2, 3, 24, seed=2)
    with face("reference"):
        got = encode_text(tower, layout, ctx, deep=deep)
    torch.testing.assert_close(got, literally(tower, layout, ctx, deep), rtol=0, atol=1e-12)
    with face("reference"):
        assert (got - encode_text(tower, layout, ctx)).abs().max() > 1e-3, "deep prompts count"
        assert (got - encode_text(tower, layout, ctx, deep=deep[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize(
    ("slots", "lead", "layers"), [(1, (), 3), (4, (3,), 2), (5, (2, 1), 1), (3, (1,), 3)], ids=str
)
def test_faces_equal_the_literal_pass(
    position: Any, own: bool, slots: int, lead: tuple[int, ...], layers: int, name: str
) -> None:
    tower = random_tower(depth=4, bias=slots == 3, activation="gelu" if own else "quick_gelu")
    layout = words(tower, position=position).layout(slots)
    front = (*lead, len(NAMES)) if own else lead
    ctx, deep = draw(*front, slots, 24), draw(*front, layers, slots, 24, seed=2)
    want = found_by("reference", tower, layout, ctx, deep, own)
    assert bool((want[2].flatten(end_dim=-2) != 0).any(-1).all()), "every deep prompt counts"
    agree(found_by(name, tower, layout, ctx, deep, own), want)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle"])
def test_the_kernels_equal_the_literal_pass(position: Any, own: bool) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = random_tower(depth=3).to(device, torch.float64)
    layout = words(tower, NAMES[:3], position).layout(4)
    front = (2, 3) if own else (2,)
    ctx, deep = draw(*front, 4, 24).to(device), draw(*front, 2, 4, 24, seed=2).to(device)
    want = found_by("reference", tower, layout, ctx, deep, own)
    agree(found_by("triton", tower, layout, ctx, deep, own), want)


@pytest.mark.parametrize("change", [{"causal": False}, {"pooling": "last"}])
def test_towers_that_are_run_whole(change: dict[str, Any]) -> None:
    tower = replace(random_tower(length=24, depth=3), **change)
    layout = words(tower).layout(3)
    for own in (False, True):
        front = (2, len(NAMES)) if own else (2,)
        ctx, deep = draw(*front, 3, 24), draw(*front, 2, 3, 24, seed=2)
        want = found_by("reference", tower, layout, ctx, deep, own)
        agree(found_by("torch", tower, layout, ctx, deep, own), want)


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_leading_dimensions_broadcast(name: str) -> None:
    """One set for all experts, one for each, one for each class: the gradient is summed."""
    tower = random_tower()
    layout = words(tower).layout(4)
    count = len(NAMES)
    for front, deep_front, own in (
        ((3,), (), False),
        ((2, 3), (3,), False),
        ((2, 3), (2, 1), False),
        ((count,), (), True),
        ((2, count), (2, 1), True),
        ((2, count), (count,), True),
    ):
        ctx, deep = draw(*front, 4, 24), draw(*deep_front, 2, 4, 24, seed=2)
        got = found_by(name, tower, layout, ctx, deep, own)
        whole = deep.expand(*front, 2, 4, 24)
        want = found_by(name, tower, layout, ctx, whole, own)
        assert got[2].shape == deep.shape
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=1e-13)
        torch.testing.assert_close(got[2], want[2].sum_to_size(deep.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_zero_sizes(name: str) -> None:
    tower = random_tower()
    classes = words(tower)
    ctx = draw(2, 4, 24)
    with face(name):
        plain = encode_text(tower, classes.layout(4), ctx)
        none = encode_text(tower, classes.layout(4), ctx, deep=torch.zeros(0, 4, 24).double())
        assert torch.equal(none, plain), "no layer of deep prompts"
        nobody = encode_text(tower, classes.layout(4), ctx[:0], deep=draw(2, 4, 24))
        assert nobody.shape == (0, len(NAMES), tower.dim)
        ctx, deep = draw(2, 0, 24).requires_grad_(), draw(2, 0, 24).requires_grad_()
        bare = encode_text(tower, classes.layout(0), ctx, deep=deep)
        grads = torch.autograd.grad(bare.sum(), (ctx, deep))
    assert [g.shape for g in grads] == [ctx.shape, deep.shape]
    with face(name):
        want = encode_text(tower, classes.layout(0), ctx.detach())
    torch.testing.assert_close(bare.detach(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", FAST)
def test_views_and_fences(name: str) -> None:
    """Strided, expanded, negated, and between walls of NaN: the same numbers."""
    tower = random_tower()
    layout = words(tower).layout(4)
    ctx, deep = draw(2, 4, 24), draw(2, 2, 4, 24, seed=2)
    wide = torch.full((2, 3, 8, 48), float("nan"), dtype=torch.float64)
    wide[:, 1:, ::2, 1::2] = deep
    negated = torch.complex(torch.zeros_like(deep), -deep).conj().imag
    assert negated.is_neg()
    want = found_by(name, tower, layout, ctx, deep)
    for view in (wide[:, 1:, ::2, 1::2], fenced(deep), negated, deep.mT.contiguous().mT):
        with face(name):
            got = encode_text(tower, layout, ctx, deep=view)
        torch.testing.assert_close(got, want[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("who", ["both", "ctx", "deep"])
def test_gradcheck(name: str, who: str) -> None:
    tower = random_tower(width=8, heads=2, depth=3, dim=4)
    layout = words(tower, NAMES[:3], "middle").layout(3)
    ctx, deep = draw(2, 3, 8), draw(2, 2, 3, 8, seed=2)
    given = {"both": (ctx, deep), "ctx": (ctx,), "deep": (deep,)}[who]
    for tensor in given:
        tensor.requires_grad_()

    def encode(*moved: Tensor) -> Tensor:
        a, b = moved if len(moved) == 2 else (moved[0], deep) if who == "ctx" else (ctx, moved[0])
        return encode_text(tower, layout, a, deep=b)

    with face(name):
        assert torch.autograd.gradcheck(encode, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAST)
def test_low_precision_errs_at_most_twice_as_much_as_the_literal_pass(
    dtype: torch.dtype, name: str
) -> None:
    if name == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ face has no float16")
    wide = calm(random_tower(width=64, heads=2, dim=32))
    layout = words(wide).layout(6)
    ctx, deep = (draw(*s, seed=7).to(dtype) for s in ((24, 6, 64), (24, 2, 6, 64)))
    exact = found_by("reference", wide, layout, ctx.double(), deep.double())
    narrow = wide.to("cpu", dtype)
    eager = found_by("reference", narrow, layout, ctx, deep)
    for mine, theirs, truth in zip(
        found_by(name, narrow, layout, ctx, deep), eager, exact, strict=True
    ):
        assert_as_good_as_eager(mine, theirs, truth, name=name)


def as_autocast_has_it(tower: TextTower) -> TextTower:
    """The tower with its matrices rounded as autocast rounds them.

    All faces have these. Judged by the unrounded ones, a rounding that they share counts as an
    error whose sign is the same in every context, and the bias of each is mostly that.
    """

    def rounded(block: Block) -> Block:
        parts = {f.name: getattr(block, f.name) for f in fields(block)}
        return replace(block, **{n: t.bfloat16().double() for n, t in parts.items() if t.ndim == 2})

    blocks = tuple(rounded(block) for block in tower.blocks)
    return replace(tower, blocks=blocks, projection=tower.projection.bfloat16().double())


@pytest.mark.parametrize("name", FAST)
def test_autocast_is_as_good_as_the_literal_pass(name: str) -> None:
    wide = calm(random_tower(width=64, heads=2, dim=32))
    layout = words(wide).layout(6)
    ctx, deep = (draw(*s, seed=7).float() for s in ((24, 6, 64), (24, 2, 6, 64)))
    exact = found_by("reference", as_autocast_has_it(wide), layout, ctx.double(), deep.double())
    narrow = wide.to("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        eager = found_by("reference", narrow, layout, ctx, deep)
        got = found_by(name, narrow, layout, ctx, deep)
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs.to(mine.dtype), truth, name=name)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "class-specific"])
def test_a_limit_changes_nothing(name: str, own: bool) -> None:
    """Parts of contexts and of classes, some kept and some made again."""
    tower = random_tower(width=64, heads=2, depth=3, dim=8)
    names = [f"{'x' * (i % 8)}{i}" for i in range(40)]
    layout = words(tower, names, "middle").layout(4)
    front = (2, len(names)) if own else (2,)
    ctx, deep = draw(*front, 4, 64), draw(*front, 2, 4, 64, seed=2)
    want = found_by(name, tower, layout, ctx, deep, own)
    for limit in (1 << 22, 1 << 21, 5 << 18):
        with memory_limit(limit):
            agree(found_by(name, tower, layout, ctx, deep, own), want)


@pytest.mark.parametrize("name", FAST)
def test_a_limit_bounds_what_lives(name: str) -> None:
    tower = random_tower(width=64, heads=2, depth=3, dim=8)
    names = [f"{'x' * (i % 8)}{i}" for i in range(40)]
    layout, ctx, deep = words(tower, names).layout(4), draw(2, 4, 64), draw(2, 2, 4, 64, seed=2)

    def encode(tower: TextTower, layout: Any, ctx: Tensor, limit: int | None) -> tuple[Any, ...]:
        return living(tower, layout, ctx, limit, deep=deep)

    with face(name):
        encode(tower, layout, ctx, None)  # constants of the tower and of the classes
        features, gradient, whole = encode(tower, layout, ctx, None)
        for limit in (whole, whole // 2, whole // 10):
            encode(tower, layout, ctx, limit)  # constants of the smaller parts
            less, d_less, most = encode(tower, layout, ctx, limit)
            assert most <= limit, (limit, most)
            torch.testing.assert_close(less, features, rtol=0, atol=1e-13)
            assert relative(d_less, gradient) < 1e-12


def test_prompts_that_are_replaced_are_not_seen_behind_their_layer() -> None:
    """A law: with the first layer's output thrown away, only keys and values of it are left."""
    tower = random_tower(depth=2)
    silent = replace(
        tower, blocks=(replace(tower.blocks[0], qkv_w=0 * tower.blocks[0].qkv_w), tower.blocks[1])
    )
    layout = words(tower).layout(4)
    deep = draw(1, 4, 24)
    one, other = (encode_text(silent, layout, draw(4, 24, seed=s), deep=deep) for s in (5, 6))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    one, other = (encode_text(silent, layout, draw(4, 24, seed=s)) for s in (5, 6))
    assert (one - other).abs().max() > 1e-3, "the test must be able to fail"


def test_the_compiled_face_answers_and_derivatives_forward_take_the_other() -> None:
    tower = random_tower()
    layout = words(tower).layout(4)
    ctx, deep = draw(4, 24), draw(2, 4, 24, seed=2)
    with recorded_faces() as seen:
        encode_text(tower, layout, ctx, deep=deep)
    assert seen == {"encode_text": {"cpu"}}
    _, got = torch.func.jvp(
        lambda d: encode_text(tower, layout, ctx, deep=d), (deep,), (torch.ones_like(deep),)
    )
    off = 1e-6
    with torch.no_grad():
        more, less = (encode_text(tower, layout, ctx, deep=deep + s * off) for s in (1, -1))
    torch.testing.assert_close(got, (more - less) / (2 * off), rtol=0, atol=1e-7)


def test_bad_input_gets_a_sentence() -> None:
    tower = random_tower(depth=3)
    classes = words(tower)
    ctx, deep = draw(2, 4, 24), draw(2, 4, 24)
    spoilt = deep.clone()
    spoilt[1, 2, 5] = float("inf")
    op = r"fastfpl\.encode_prompts: "
    for wrong, kind, text in (
        (deep[:, :3], InputError, r"deep must have shape \(\.\.\., K, T, W\); got \(2, 3, 24\)"),
        (deep[..., :7], InputError, r"deep must have shape .* got \(2, 4, 7\) with T=4, W=24"),
        (deep[0], InputError, r"deep must have shape"),
        (draw(3, 4, 24), InputError, "before at most 2 layers, all but the first .*; got 3"),
        (draw(5, 2, 4, 24), InputError, r"dimensions \(2,\) of ctx; got \(5,\) before K, T, W"),
        (draw(1, 2, 2, 4, 24), InputError, r"deep must broadcast to .* got \(1, 2\) before"),
        (deep.long(), KindError, "deep must be a floating point tensor; got torch.int64"),
        ([1.0], KindError, "deep must be a floating point tensor; got list"),
        (deep.to("meta"), KindError, "deep must be on the tower's device cpu; got meta"),
        (spoilt, InputError, r"deep must be finite; got inf at \(0, 1, 2, 5\)"),
    ):
        with pytest.raises(kind, match=op + ".*" + text):
            encode_prompts(classes, ctx, deep=wrong)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match=r"fastfpl\.ops\.encode_text: deep must have shape"):
        encode_text(tower, classes.layout(4), ctx, deep=deep[..., :7])
    own = draw(len(NAMES), 4, 24)
    with pytest.raises(InputError, match=r"\(5,\) of ctx; got \(4,\) before K, T, W"):
        encode_prompts(classes, own, class_specific=True, deep=draw(4, 2, 4, 24))


# prompts that somebody else laid out


def both(
    tower: TextTower, prompts: Tensor, shared: int, deep: Tensor, first: int, ends: list[int] = ENDS
) -> list[list[Tensor]]:
    results = []
    for name in ("torch", "reference"):
        leaves = [prompts.clone().requires_grad_(), deep.clone().requires_grad_()]
        with face(name):
            states = encode_embedded(
                tower, leaves[0], torch.tensor(ends), shared=shared, deep=leaves[1], first=first
            )
        weight = draw(*states.shape, seed=2).to(states.dtype)
        (states * weight).sum().backward()
        results.append([states.detach(), *(leaf.grad for leaf in leaves)])  # type: ignore[misc]
    return results


@pytest.mark.parametrize("lead", [(), (3,), (2, 1)])
@pytest.mark.parametrize("shared", [0, 1, 2, 3])
@pytest.mark.parametrize(("first", "slots"), [(1, 2), (0, 3), (2, 5), (1, 0)])
def test_embedded_prompts(lead: tuple[int, ...], shared: int, first: int, slots: int) -> None:
    """Deep prompts inside of the shared rows, behind them, over an EOT, and half and half."""
    tower = random_tower(depth=4)
    prompts = prompts_of(lead, shared=shared)
    for front in {lead, ()}:
        deep = draw(*front, 2, slots, 24, seed=3)
        got, want = both(tower, prompts, shared, deep, first)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_embedded_gradcheck_chunks_and_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = random_tower(width=6, heads=2, depth=3, dim=3, length=6)
    eot = torch.tensor([3, 4, 2])
    prompts = prompts_of((4,), ends=[3, 4, 2], width=6, length=6).requires_grad_()
    deep = draw(4, 2, 2, 6).requires_grad_()

    def encode(x: Tensor, d: Tensor) -> Tensor:
        return encode_embedded(tower, x, eot, shared=0, deep=d)

    assert torch.autograd.gradcheck(encode, (prompts[:1].detach().requires_grad_(), deep[:1]))
    whole = encode(prompts, deep).detach()
    assert torch.equal(encode(prompts, fenced(deep)).detach(), whole)
    monkeypatch.setattr("fastfpl.ops.embedded._ROWS_PER_PASS", 1)
    with torch.no_grad():
        torch.testing.assert_close(encode(prompts, deep), whole)


def test_embedded_refusals() -> None:
    tower, prompts, eot = random_tower(), prompts_of(), torch.tensor(ENDS)
    with pytest.raises(InputError, match="at most 2 layers, all but the first of this tower; got"):
        encode_embedded(tower, prompts, eot, deep=draw(3, 2, 24))
    with pytest.raises(InputError, match=r"deep must have shape \(\.\.\., K, T, W\)"):
        encode_embedded(tower, prompts, eot, deep=draw(2, 24))
    with pytest.raises(InputError, match="first must be from 0 to 38, so that 2 deep prompts fit"):
        encode_embedded(tower, prompts, eot, deep=draw(1, 2, 24), first=39)
    with pytest.raises(InputError, match=r"of prompts; got \(3,\) before K, T, W"):
        encode_embedded(tower, prompts, eot, deep=draw(3, 1, 2, 24))
    with memory_limit(1 << 30), pytest.raises(NotSupported, match="torch: it keeps to no memory"):
        encode_embedded(tower, prompts, eot, deep=draw(1, 2, 24))
