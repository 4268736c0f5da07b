"""Prompts that somebody else laid out, forward and backward: what a foreign training step pays.

The tower, the names and the context of bench_text; prompts as CoOp makes them, (C, 77, W).
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.bench_text import LAYERS, WIDTH, contexts, layout, tower
from bench.clock import DEVICE, checked
from fastfpl.ops.embedded import encode_embedded

FACES = {"literal": 3, "torch, cut alone": 5, "torch": 7}


@functools.cache
def prompts() -> Tensor:
    places = layout()
    rows = tower().to(DEVICE, torch.float32).token_embedding[places.tokens.to(DEVICE)].clone()
    rows[:, 1 : 1 + places.slots.shape[1]] = contexts(1)[0]
    return rows


@functools.cache
def weight() -> Tensor:
    drawn = torch.randn(len(layout().eot), WIDTH, generator=torch.Generator().manual_seed(2))
    return drawn.to(DEVICE)


def step(face: str, shared: int, wide: bool = False) -> Tensor:
    """States and the gradient of the prompts' first rows, scaled so that one limit judges both."""
    weights = tower().to(DEVICE, torch.float64 if wide else torch.float32)
    leaf = prompts().to(weights.dtype, copy=True).requires_grad_()
    with fastfpl.face(face):
        states = encode_embedded(weights, leaf, layout().eot, shared=shared)
    (gradient,) = torch.autograd.grad((states * weight().to(states.dtype)).sum(), leaf)
    context = gradient[:, : layout().shared].sum(0)
    return torch.cat([(x / x.norm()).flatten() for x in (states.detach(), context)])


@functools.cache
def exact() -> Tensor:
    return step("reference", 1, wide=True)


@pytest.mark.parametrize("face", FACES)
def bench_embedded(benchmark, face):
    name = "reference" if face == "literal" else "torch"
    shared = 1 if face == "torch, cut alone" else layout().shared
    lead, ends = shared, layout().eot + 1
    tokens = 77 * len(ends) if face == "literal" else int(lead + (ends - lead).sum())
    row = {"op": "encode_embedded", "C": len(ends), "direction": "fwd+bwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE, "face": face}
    # per token and layer 12 W² multiply-adds; the backward pass has the input gradients only
    flops = 4.0 * tokens * LAYERS * 12 * WIDTH**2
    gemm = (tokens, WIDTH, 4 * WIDTH)
    checked(
        benchmark,
        lambda: step(name, shared),
        exact(),
        1e-4,
        rounds=FACES[face],
        flops=flops,
        gemm=gemm,
        **row,
    )
    benchmark.extra_info["tokens"] = tokens
