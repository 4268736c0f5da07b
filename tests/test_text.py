"""The packed text pass against the literal one: values, gradients, sizes, laws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfpl.clip import load_clip
from fastfpl.errors import InputError, KindError, NotSupported
from fastfpl.ops.faces import face, recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.text import FACES, encode_text, packed_tokens
from fastfpl.prompts import ClassPrompts, encode_prompts
from fastfpl.reference.text import Block, TextTower, embed_prompts
from fastfpl.training.budget import Living
from tests.truth import assert_as_good_as_eager
from tests.worlds import small_clip

#: The interpreter takes seconds for a tower: the Triton face has a test of its own.
FAST = [f.name for f in FACES["encode_text"] if f.name not in ("reference", "triton")]
NAMES = ("cat", "sea horse", "very old oak tree", "a", "traffic light")


class WordsClip:
    """A CLIP's text side whose tokens are letters."""

    def __init__(self, tower: TextTower) -> None:
        self.text = tower

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) % 40 for letter in text if letter != " "] for text in texts]


def random_tower(
    *,
    width: int = 24,
    heads: int = 3,
    depth: int = 3,
    dim: int = 10,
    length: int = 40,
    activation: Any = "quick_gelu",
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> TextTower:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * shape[-1] ** -0.5

    def block() -> Block:
        return Block(
            ln_1_w=1 + normal(width),
            ln_1_b=normal(width),
            qkv_w=3 * normal(3 * width, width),
            qkv_b=normal(3 * width),
            out_w=normal(width, width),
            out_b=normal(width),
            ln_2_w=1 + normal(width),
            ln_2_b=normal(width),
            fc_w=normal(4 * width, width),
            fc_b=normal(4 * width),
            proj_w=normal(width, 4 * width),
            proj_b=normal(width),
        )

    tower = TextTower(
        token_embedding=normal(42, width),
        positional=normal(length, width),
        blocks=tuple(block() for _ in range(depth)),
        ln_w=1 + normal(width),
        ln_b=normal(width),
        projection=normal(width, dim),
        projection_b=normal(dim) if bias else None,
        heads=heads,
        activation=activation,
        eps=1e-5,
        sos=40,
        eot=41,
    )
    return tower.to("cpu", dtype)


def both(
    tower: TextTower,
    classes: ClassPrompts,
    ctx: Tensor,
    class_specific: bool = False,
    faces: Sequence[str] = FAST,
) -> dict[str, tuple[Tensor, Tensor]]:
    layout = classes.layout(ctx.shape[-2])
    weight = torch.randn(
        (len(classes), tower.dim), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    found = {}
    for name in (*faces, "reference"):
        if name == "cpu" and tower.dtype == torch.float16:
            continue
        leaf = ctx.clone().requires_grad_()
        with face(name):
            features = encode_text(tower, layout, leaf, class_specific=class_specific)
        (gradient,) = torch.autograd.grad((features * weight.to(features.dtype)).sum(), leaf)
        found[name] = (features.detach(), gradient)
    return found


def agree(found: dict[str, tuple[Tensor, Tensor]], off: float, gradient: float) -> None:
    """Compare every face with the literal pass: features absolutely, gradients relatively."""
    features, exact = found["reference"]
    for name in found.keys() - {"reference"}:
        torch.testing.assert_close(found[name][0], features, rtol=0, atol=off)
        assert relative(found[name][1], exact) < gradient, name


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize(
    ("slots", "lead"), [(1, ()), (4, (3,)), (5, (2, 1, 2)), (3, (1, 1))], ids=str
)
def test_packed_equals_full_length(
    position: Any, class_specific: bool, slots: int, lead: tuple[int, ...]
) -> None:
    tower = random_tower()
    classes = ClassPrompts(WordsClip(tower), NAMES, position)
    inner = (len(NAMES), slots) if class_specific else (slots,)
    ctx = torch.randn(*lead, *inner, tower.width, dtype=torch.float64)
    found = both(tower, classes, ctx, class_specific)
    assert found["reference"][0].shape == (*lead, len(NAMES), tower.dim)
    assert found["reference"][0].std() > 0.01
    agree(found, 1e-13, 1e-12)


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle"])
def test_the_kernels_equal_full_length(position: Any, class_specific: bool) -> None:
    tower = random_tower(
        bias=position == "end", activation="gelu" if class_specific else "quick_gelu"
    )
    classes = ClassPrompts(WordsClip(tower), NAMES[:3], position)
    inner = (3, 4) if class_specific else (4,)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ctx = torch.randn(2, *inner, tower.width, dtype=torch.float64)
    found = both(
        tower.to(device, torch.float64), classes, ctx.to(device), class_specific, ["triton"]
    )
    assert set(found) == {"triton", "reference"}
    agree(found, 1e-13, 1e-12)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_tower_variants(activation: str, bias: bool, depth: int) -> None:
    tower = random_tower(activation=activation, bias=bias, depth=depth)
    classes = ClassPrompts(WordsClip(tower), NAMES)
    found = both(tower, classes, torch.randn(2, 4, tower.width, dtype=torch.float64))
    agree(found, 1e-13, 1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    slots=st.integers(1, 20),
    position=st.sampled_from(["end", "middle", "front"]),
    seed=st.integers(0, 99),
)
def test_ragged_names_pack_exactly(
    lengths: list[int], slots: int, position: Any, seed: int
) -> None:
    tower = random_tower(width=8, heads=2, depth=2, dim=4, seed=seed)
    names = [chr(97 + i % 26) * n + "é" * (i // 26) for i, n in enumerate(lengths)]
    names = [name if name not in names[:i] else f"{name} {i}" for i, name in enumerate(names)]
    classes = ClassPrompts(WordsClip(tower), names, position)
    ctx = torch.randn(2, slots, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = both(tower, classes, ctx)
    agree(found, 1e-12, 1e-11)


def test_zero_sizes() -> None:
    tower = random_tower()
    classes = ClassPrompts(WordsClip(tower), NAMES)
    for name in (*FAST, "reference"):
        with face(name):
            no_context = encode_text(tower, classes.layout(3), torch.zeros(0, 3, 24).double())
            no_slots = encode_text(tower, classes.layout(0), torch.zeros(2, 0, 24).double())
        assert no_context.shape == (0, len(NAMES), tower.dim)
        assert no_slots.shape == (2, len(NAMES), tower.dim)
        torch.testing.assert_close(no_slots[0], no_slots[1], rtol=0, atol=1e-13)


def test_views_and_expanded_contexts() -> None:
    tower = random_tower()
    classes = ClassPrompts(WordsClip(tower), NAMES)
    wide = torch.full((2, 9, 48), float("nan"), dtype=torch.float64)
    wide[:, 1::2, ::2] = torch.randn(2, 4, 24, dtype=torch.float64)
    view = wide[:, 1::2, ::2]
    expanded = view[:1].expand(3, -1, -1)
    layout = classes.layout(4)
    assert torch.equal(
        encode_text(tower, layout, view), encode_text(tower, layout, view.contiguous())
    )
    assert torch.equal(
        encode_text(tower, layout, expanded), encode_text(tower, layout, expanded.contiguous())
    )


def test_many_contexts_without_gradient_equal_one_by_one() -> None:
    tower = random_tower(width=8, heads=2, depth=1, dim=4)
    classes = ClassPrompts(WordsClip(tower), [f"{'x' * (i % 8)}{i}" for i in range(150)])
    layout = classes.layout(4)
    ctx = torch.randn(41, 4, 8, dtype=torch.float64)
    # more rows than one pass takes, with an uneven last chunk
    assert packed_tokens(layout) * len(ctx) > 2 * (1 << 14)
    with torch.no_grad():
        together = encode_text(tower, layout, ctx)
        apart = torch.stack([encode_text(tower, layout, one) for one in ctx])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-13)
    with_graph = encode_text(tower, layout, ctx.requires_grad_())
    torch.testing.assert_close(together, with_graph.detach(), rtol=0, atol=1e-13)


def test_permuting_classes_permutes_features() -> None:
    tower = random_tower()
    ctx = torch.randn(4, tower.width, dtype=torch.float64)
    clip = WordsClip(tower)
    straight = encode_prompts(ClassPrompts(clip, NAMES), ctx)
    turned = encode_prompts(ClassPrompts(clip, NAMES[::-1]), ctx)
    torch.testing.assert_close(straight.flip(0), turned, rtol=0, atol=1e-13)


def test_features_have_unit_length_and_gradcheck_passes() -> None:
    tower = random_tower(width=8, heads=2, depth=2, dim=4)
    classes = ClassPrompts(WordsClip(tower), NAMES[:3], "middle")
    ctx = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    norms = encode_prompts(classes, ctx).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    for name in FAST:
        with face(name):
            assert torch.autograd.gradcheck(lambda c: encode_prompts(classes, c), (ctx,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_the_literal_pass(dtype: torch.dtype) -> None:
    exact_tower = random_tower(width=64, heads=2, dim=32)
    tower = exact_tower.to("cpu", dtype)
    classes = ClassPrompts(WordsClip(exact_tower), NAMES)
    # so many that neither way is lucky: single prompts amplify rounding ten times or not at all
    ctx = torch.randn(24, 6, 64, dtype=torch.float64).to(dtype).double()
    exact = both(exact_tower, classes, ctx)["reference"]
    found = both(tower, classes, ctx.to(dtype))
    assert len(found) == len(FAST) + (dtype != torch.float16)
    for name in found:
        for mine, eager, true in zip(found[name], found["reference"], exact, strict=True):
            assert_as_good_as_eager(mine, eager.to(mine.dtype), true, name=name)


def whole_text_tower(name: str) -> Any:
    """The model's own text tower beside an image tower that costs nothing to draw."""
    import open_clip
    from open_clip.model import CLIP

    config = open_clip.get_model_config(name)
    image = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}
    torch.manual_seed(0)
    model = CLIP(config["embed_dim"], image, config["text_cfg"], quick_gelu=True)
    return load_clip(model, tokenizer=open_clip.get_tokenizer(name))


@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_open_clip_towers_agree_to_1e_5(name: str) -> None:
    clip = whole_text_tower(name)
    classes = ClassPrompts(clip, ["cat", "Siamese sea horse", "1999 Audi S4 quattro sedan"])
    ctx = 0.02 * torch.randn(16, clip.text_width, generator=torch.Generator().manual_seed(0))
    found = both(clip.text, classes, ctx)
    agree(found, 1e-5, 1e-5)


def test_tiny_agrees_to_1e_5_and_every_expert_row_equals_its_own_call() -> None:
    clip = load_clip("tiny")
    classes = ClassPrompts(clip, NAMES)
    ctx = 0.02 * torch.randn(3, 2, 16, clip.text_width)
    found = both(clip.text, classes, ctx)
    agree(found, 1e-5, 1e-5)
    torch.testing.assert_close(
        encode_prompts(classes, ctx[2, 1]), found["reference"][0][2, 1], rtol=0, atol=1e-5
    )


def test_words_as_context_equal_the_sentence_itself() -> None:
    clip = load_clip("tiny")
    names = ["star", "question mark"]
    classes = ClassPrompts(clip, names)
    got = encode_prompts(classes, classes.words("a photo of a"))
    whole = ClassPrompts(clip, [f"a photo of a {name}" for name in names])
    want = encode_prompts(whole, torch.zeros(0, clip.text_width))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_faces_are_recorded_and_forced() -> None:
    tower = random_tower()
    classes = ClassPrompts(WordsClip(tower), NAMES)
    ctx = torch.zeros(4, tower.width, dtype=torch.float64)
    with recorded_faces() as seen:
        encode_prompts(classes, ctx)
        with face("reference", "encode_text"):
            encode_prompts(classes, ctx)
    assert seen == {"encode_text": {"cpu", "reference"}}
    with pytest.raises(NotSupported, match="torch: face 'cuda' was asked for"), face("cuda"):
        encode_prompts(classes, ctx)


def test_bad_input_gets_a_sentence() -> None:
    tower = random_tower()
    clip = WordsClip(tower)
    classes = ClassPrompts(clip, NAMES)
    good = torch.zeros(4, tower.width, dtype=torch.float64)
    spoilt = good.clone()
    spoilt[2, 5] = float("nan")
    for wrong, kind, text in (
        (good[:, :7], InputError, r"ctx must have shape \(\.\.\., T, W\); got \(4, 7\) with W=24"),
        (good[0], InputError, r"ctx must have shape"),
        (good.long(), KindError, r"ctx must be a floating point tensor; got torch.int64"),
        ([1.0], KindError, r"ctx must be a floating point tensor; got list"),
        (spoilt, InputError, r"ctx must be finite; got nan at \(2, 5\)"),
        (
            torch.zeros(60, tower.width).double(),
            InputError,
            r"must fit into 40 tokens; got 14 tokens of the name 'very old oak tree' \+ 60 context",
        ),
    ):
        with pytest.raises(kind, match=text):
            encode_prompts(classes, wrong)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match=r"\(\.\.\., C, T, W\)"):
        encode_prompts(classes, good.expand(4, -1, -1), class_specific=True)
    for names, text in (
        ([], "at least one class; got none"),
        (["cat", "dog", "cat"], "unique; got 'cat' more than once"),
        (["sea_horse", "sea horse"], "unique; got 'sea horse' more than once"),
        (["cat", " "], "must not be empty; got ' ' at 1"),
    ):
        with pytest.raises(InputError, match=text):
            ClassPrompts(clip, names)
    with pytest.raises(KindError, match="got the string 'cat'"):
        ClassPrompts(clip, "cat")
    with pytest.raises(InputError, match="did you mean 'middle'"):
        ClassPrompts(clip, NAMES, "midle")  # type: ignore[arg-type]  # wrong on purpose
    short = random_tower(length=6)
    with pytest.raises(InputError, match="must fit into 6 tokens; got 14 tokens of the name"):
        ClassPrompts(WordsClip(short), NAMES)


def test_ending_and_position_decide_the_tokens() -> None:
    tower = random_tower()
    clip = WordsClip(tower)
    layouts = {p: ClassPrompts(clip, ["cat"], p).layout(5) for p in ("end", "middle", "front")}
    cat, dot = [ord(c) % 40 for c in "cat"], ord(".") % 40
    rows = {p: layouts[p].tokens[0, :11].tolist() for p in layouts}
    assert rows["end"] == [40, 0, 0, 0, 0, 0, *cat, dot, 41]
    assert rows["middle"] == [40, 0, 0, *cat, 0, 0, 0, dot, 41]
    assert rows["front"] == [40, *cat, 0, 0, 0, 0, 0, dot, 41]
    assert {p: layouts[p].slots[0].tolist() for p in layouts} == {
        "end": [1, 2, 3, 4, 5],
        "middle": [1, 2, 6, 7, 8],
        "front": [4, 5, 6, 7, 8],
    }
    assert {layout.eot.item() for layout in layouts.values()} == {10}
    bare = ClassPrompts(clip, ["cat"], ending="").layout(5)
    assert bare.tokens[0, :10].tolist() == [40, 0, 0, 0, 0, 0, *cat, 41]


def coop_prompts(
    tower: TextTower, names: list[str], ctx: Tensor, position: str
) -> tuple[Tensor, Tensor]:
    """CoOp's prompt learner, literally: embeddings (C, L, W) and the places of the EOT (C,)."""
    from open_clip import SimpleTokenizer

    n_ctx, half = len(ctx), len(ctx) // 2
    tokenizer = SimpleTokenizer(context_length=tower.context_length)
    name_lens = [len(tokenizer.encode(name)) for name in names]
    tokenized = tokenizer([" ".join(["X"] * n_ctx) + " " + name + "." for name in names])
    embedding = tower.token_embedding[tokenized]
    prefix, suffix = embedding[:, :1], embedding[:, 1 + n_ctx :]
    rows = []
    for c, name_len in enumerate(name_lens):
        class_c, suffix_c = suffix[c, :name_len], suffix[c, name_len:]
        parts = {
            "end": (ctx, suffix[c]),
            "middle": (ctx[:half], class_c, ctx[half:], suffix_c),
            "front": (class_c, ctx, suffix_c),
        }
        rows.append(torch.cat((prefix[c], *parts[position])))
    return torch.stack(rows), tokenized.argmax(dim=-1)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_prompts_are_those_of_coop(position: Any) -> None:
    clip = small_clip()
    # punctuation at a name's end runs into the full stop: "?." is one token
    names = ["pink-yellow dahlia?", "St.", "what!?", "the artists'", "colt's foot", "747-400"]
    assert len(clip.tokenize(names[0])[0]) == len(clip.tokenize(names[0] + ".")[0])
    classes = ClassPrompts(clip, names, position)
    ctx = torch.randn(5, clip.text_width, generator=torch.Generator().manual_seed(0))
    prompts, eot = coop_prompts(clip.text, names, ctx, position)
    layout = classes.layout(5)
    assert torch.equal(layout.eot, eot)
    assert torch.equal(embed_prompts(clip.text, layout, ctx), prompts + clip.text.positional)
    found = both(clip.text, classes, ctx)
    agree(found, 1e-5, 1e-5)


def test_an_ending_inside_the_name_s_last_token_is_counted_once() -> None:
    clip = small_clip()  # 24 tokens
    count = len(clip.tokenize("pink-yellow dahlia?")[0])
    classes = ClassPrompts(clip, ["pink-yellow dahlia?", "iris"])
    assert classes.eot_spare == 24 - 2 - count
    assert classes.layout(classes.eot_spare).eot[0] == 23
    with pytest.raises(
        InputError,
        match=rf"must fit into 24 tokens; got {count} tokens of the name 'pink-yellow dahlia\?' \+ "
        rf"{23 - count} context vectors \+ 0 of the ending \+ SOS and EOT; use at most "
        rf"{22 - count} vectors",
    ):
        classes.layout(classes.eot_spare + 1)
    with pytest.raises(InputError, match=r"1 of the ending .*use at most 20 vectors"):
        ClassPrompts(clip, ["iris"]).layout(21)


def living(
    tower: TextTower, layout: Any, ctx: Tensor, limit: int | None, deep: Tensor | None = None
) -> tuple[Any, ...]:
    """Features, gradient, and the most bytes beside them that one step had at a time."""
    leaf = ctx.clone().requires_grad_()
    with memory_limit(limit), Living() as seen:
        features = encode_text(tower, layout, leaf, deep=deep)
        weight = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
        (gradient,) = torch.autograd.grad(features, leaf, weight)
    results = 3 * features.nbytes + 3 * gradient.nbytes  # with their own gradients and copies
    return features.detach(), gradient, seen.most - results


@pytest.mark.parametrize("name", FAST)
def test_a_limit_bounds_what_lives_and_changes_nothing(name: str) -> None:
    tower = random_tower(width=64, heads=2, depth=3, dim=8)
    names = [f"{'x' * (i % 8)}{i}" for i in range(40)]
    layout = ClassPrompts(WordsClip(tower), names).layout(4)
    ctx = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with face(name):
        living(tower, layout, ctx, None)  # constants of the tower and of the classes
        features, gradient, whole = living(tower, layout, ctx, None)
        seen = []
        for limit in (whole, whole // 2, whole // 10):
            living(tower, layout, ctx, limit)  # constants of the smaller parts
            less, d_less, most = living(tower, layout, ctx, limit)
            assert most <= limit, (limit, most)
            torch.testing.assert_close(less, features, rtol=0, atol=1e-13)
            assert relative(d_less, gradient) < 1e-12
            seen.append(most)
        assert seen[0] > 2 * seen[-1]
        with torch.no_grad(), memory_limit(whole // 10):
            torch.testing.assert_close(encode_text(tower, layout, ctx), features, rtol=0, atol=1e-6)


def test_a_limit_below_one_class_is_refused() -> None:
    tower = random_tower()
    layout = ClassPrompts(WordsClip(tower), NAMES).layout(4)
    ctx = torch.zeros(4, tower.width, dtype=torch.float64, requires_grad=True)
    with (
        memory_limit(1000),
        pytest.raises(InputError, match=r"max_memory must be at least \d+ bytes for one class"),
    ):
        encode_text(tower, layout, ctx)
    with (
        memory_limit(10**9),
        face("reference"),
        pytest.raises(NotSupported, match="the literal pass keeps to no memory limit"),
    ):
        encode_text(tower, layout, ctx)


def test_rows_wider_than_the_kernels_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("fastfpl.kernels.text", reason="needs Triton")
    tower = random_tower()
    widest = max(tower.projection.shape)
    triton = next(face for face in FACES["encode_text"] if face.name == "triton")
    assert not any("rows of" in reason for reason in triton.against(tower))
    monkeypatch.setattr(kernels, "WIDEST", widest - 1)
    sentence = f"rows of {widest} numbers, at most {widest - 1}"
    assert sentence in triton.against(tower)


def test_weights_that_change_in_place_are_seen() -> None:
    tower = random_tower()
    layout = ClassPrompts(WordsClip(tower), NAMES).layout(4)
    ctx = torch.randn(4, tower.width, dtype=torch.float64)
    before = encode_text(tower, layout, ctx)
    for tensor in (tower.token_embedding, tower.blocks[0].qkv_w, tower.positional):
        tensor.mul_(1.5)
        after = encode_text(tower, layout, ctx)
        with face("reference"):
            torch.testing.assert_close(after, encode_text(tower, layout, ctx), rtol=0, atol=1e-12)
        assert not torch.allclose(after, before)
        before = after


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_the_gradient_of_a_plain_sum(name: str) -> None:
    """An expanded scalar comes back from it, which is not contiguous."""
    tower = random_tower()
    classes = ClassPrompts(WordsClip(tower), NAMES)  # type: ignore[arg-type]  # its text side
    grads = []
    for weight in (torch.ones(()), torch.ones(len(NAMES), tower.dim, dtype=torch.float64)):
        leaf = torch.full((4, 24), 0.5, dtype=torch.float64, requires_grad=True)
        with face(name):
            features = encode_text(tower, classes.layout(4), leaf)
        (features.sum() if weight.dim() == 0 else (features * weight).sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
