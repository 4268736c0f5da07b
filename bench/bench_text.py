"""The text pass forward and backward: packed against the literal tower and its cut forms.

Random weights of the ViT-B text tower (12 layers of width 512), the class names of CIFAR-100.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.clock import checked
from fastfpl.ops.text import encode_text, packed_tokens
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import text as reference
from fastfpl.reference.text import Block, PromptLayout, TextTower

NAMES = """apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy,
bridge, bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl,
hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man,
maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree, pear,
pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket,
rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar,
sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train, trout, tulip,
turtle, wardrobe, whale, willow tree, wolf, woman, worm"""
SLOTS, WIDTH, LAYERS = 16, 512, 12


@functools.cache
def tower() -> TextTower:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=draw)

    # the scales with which CLIP's towers are initialised
    narrow, wide = WIDTH**-0.5, (2 * WIDTH) ** -0.5
    out = narrow * (2 * LAYERS) ** -0.5
    one, zero = torch.ones(WIDTH), torch.zeros(WIDTH)
    blocks = tuple(
        Block(
            ln_1_w=one,
            ln_1_b=zero,
            qkv_w=normal(3 * WIDTH, WIDTH, std=narrow),
            qkv_b=normal(3 * WIDTH, std=0.01),
            out_w=normal(WIDTH, WIDTH, std=out),
            out_b=normal(WIDTH, std=0.01),
            ln_2_w=one,
            ln_2_b=zero,
            fc_w=normal(4 * WIDTH, WIDTH, std=wide),
            fc_b=normal(4 * WIDTH, std=0.01),
            proj_w=normal(WIDTH, 4 * WIDTH, std=out),
            proj_b=normal(WIDTH, std=0.01),
        )
        for _ in range(LAYERS)
    )
    return TextTower(
        token_embedding=normal(49408, WIDTH, std=0.02),
        positional=normal(77, WIDTH, std=0.01),
        blocks=blocks,
        ln_w=one,
        ln_b=zero,
        projection=normal(WIDTH, 512, std=narrow),
        projection_b=None,
        heads=8,
        activation="quick_gelu",
        eps=1e-5,
        sos=49406,
        eot=49407,
    )


@functools.cache
def layout() -> PromptLayout:
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    clip = SimpleNamespace(
        text=tower(), tokenize=lambda texts: [tokenizer.encode(t) for t in texts]
    )
    names = [" ".join(name.split()) for name in NAMES.split(",")]
    return ClassPrompts(clip, names).layout(SLOTS)


def contexts(count: int) -> Tensor:
    return 0.02 * torch.randn(count, SLOTS, WIDTH, generator=torch.Generator().manual_seed(1))


@functools.cache
def weight() -> Tensor:
    return torch.randn(len(layout().eot), 512, generator=torch.Generator().manual_seed(2))


def step(encode, ctx: Tensor) -> Tensor:
    """Features and the gradient of the context, scaled so that one limit judges both."""
    leaf = ctx.clone().requires_grad_()
    features = encode(leaf)
    (gradient,) = torch.autograd.grad((features * weight().to(features.dtype)).sum(), leaf)
    features = features.detach()
    return torch.cat([(x / x.norm()).flatten() for x in (features, gradient)])


@functools.cache
def gemm_rate(rows: int) -> float:
    """GFLOP/s of the tower's largest product over ``rows`` tokens, best of many."""
    a, b = torch.randn(rows, WIDTH), torch.randn(4 * WIDTH, WIDTH)
    best, until = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < until:
        begin = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2e-9 * rows * WIDTH * 4 * WIDTH / best


def literal(ctx: Tensor) -> Tensor:
    return reference.encode_text(tower(), layout(), ctx, False)


@functools.cache
def cut() -> tuple[TextTower, PromptLayout]:
    """Drop what follows the longest prompt's EOT: what a careful user of the loop does."""
    length = int(layout().eot.max()) + 1
    shorter = replace(tower(), positional=tower().positional[:length])
    return shorter, replace(layout(), tokens=layout().tokens[:, :length])


def trimmed(ctx: Tensor) -> Tensor:
    return reference.encode_text(*cut(), ctx, False)


@functools.cache
def compiled():
    shorter, places = cut()
    return torch.compile(lambda ctx: reference.encode_text(shorter, places, ctx, False))


def packed(ctx: Tensor) -> Tensor:
    with fastfpl.face("torch"):
        return encode_text(tower(), layout(), ctx)


FACES = {"literal": 3, "cut": 5, "cut+compile": 5, "torch": 9}


@pytest.mark.parametrize("face", FACES)
def bench_forward_backward(benchmark, face):
    ctx = contexts(1)
    run = {"literal": literal, "cut": trimmed, "torch": packed}.get(face) or compiled()
    exact = _exact()
    classes = len(layout().eot)
    tokens = {"literal": 77 * classes, "torch": packed_tokens(layout())}.get(
        face, cut()[1].tokens.numel()
    )
    # per token and layer 12 W² multiply-adds; the backward pass has the input gradients only
    gflop = 2 * 2e-9 * tokens * LAYERS * 12 * WIDTH**2
    row = {"op": "encode_text", "C": classes, "T": SLOTS, "G": 1, "direction": "fwd+bwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "face": face}
    checked(benchmark, lambda: step(run, ctx), exact, 1e-4, rounds=FACES[face], **row)
    rate = gemm_rate(packed_tokens(layout()))
    benchmark.extra_info |= {
        "tokens": tokens,
        "gflop": gflop,
        "gemm_gflops": rate,
        "share_of_gemm": gflop / rate / benchmark.stats.stats.median,
    }


@functools.cache
def _exact() -> Tensor:
    wide = tower().to("cpu", torch.float64)
    return step(lambda ctx: reference.encode_text(wide, layout(), ctx, False), contexts(1).double())


@pytest.mark.parametrize("face", ["nine literal", "torch"])
def bench_experts_of_a_round(benchmark, face):
    """Nine literal encodes, as each of ten clients does them, or all ten prompts at once.

    The released round is ten times the first row; it is not run in full because it takes minutes.
    """
    pool = contexts(10)
    classes = len(layout().eot)
    count = 10 if face == "torch" else 9

    @torch.no_grad()
    def run() -> Tensor:
        if face == "torch":
            return packed(pool)
        return torch.stack([literal(one) for one in pool[:9]])

    row = {"op": "encode_text", "C": classes, "T": SLOTS, "direction": "experts, fwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "face": face}
    wide = tower().to("cpu", torch.float64)
    with torch.no_grad(), fastfpl.face("torch"):
        # the packed pass in float64 is proven against the literal one in tests/test_text.py
        exact = encode_text(wide, layout(), pool[:count].double())
    checked(benchmark, run, exact, 1e-4, rounds=5 if face == "torch" else 1, **row)
    each = packed_tokens(layout()) if face == "torch" else 77 * classes
    benchmark.extra_info["tokens"] = count * each
