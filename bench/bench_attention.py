"""Attention behind a shared prefix, forward and backward: faces against one padded attention."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.bench_text import SLOTS, WIDTH, layout
from bench.clock import DEVICE, checked, elsewhere
from fastfpl.ops.attention import FACES, prefix_attention
from fastfpl.ops.tower import rows_of

HEADS = 8
FAST = [f.name for f in FACES["prefix_attention"]]


@functools.cache
def problem(classes: int, groups: int) -> tuple[Tensor, dict]:
    rows = rows_of(layout(classes), False)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(groups, rows.count, 3 * WIDTH, generator=draw)
    sos = torch.randn(2, WIDTH, generator=draw).to(DEVICE)
    rest = {"heads": HEADS, "shared": SLOTS, "starts": rows.starts}
    return qkv.to(DEVICE), rest | {"sos": sos}


def step(face: str, dtype: torch.dtype, classes: int, groups: int) -> Tensor:
    qkv, rest = problem(classes, groups)
    leaf = qkv.to(dtype).requires_grad_()
    with fastfpl.face(face):
        mixed = prefix_attention(leaf, **rest | {"sos": rest["sos"].to(dtype)})
    weight = torch.linspace(-1, 2, mixed.numel(), dtype=dtype, device=DEVICE)
    (gradient,) = torch.autograd.grad(mixed, leaf, weight.view_as(mixed))
    # a norm of a million numbers in float32 would err more than the attention
    return torch.cat([(x / x.double().norm()).flatten() for x in (mixed.detach(), gradient)])


@functools.cache
def exact(classes: int, groups: int) -> Tensor:
    return step("reference", torch.float64, classes, groups)


@pytest.mark.parametrize("face", FAST)
@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize("classes", [100, 1000])
def bench_forward_backward(benchmark, classes, groups, face):
    (found,) = (f for f in FACES["prefix_attention"] if f.name == face)
    if reasons := found.missing() or elsewhere(face):
        pytest.skip("; ".join(reasons))
    qkv, rest = problem(classes, groups)
    starts = torch.tensor(rest["starts"])
    lengths = starts.diff().double()
    pairs = SLOTS * (SLOTS + 3) / 2 + float((lengths * (SLOTS + 1 + (lengths + 1) / 2)).sum())
    row = {"op": "prefix_attention", "C": classes, "G": groups, "direction": "fwd+bwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE, "face": face}
    checked(
        benchmark,
        lambda: step(face, torch.float32, classes, groups),
        exact(classes, groups),
        1e-4,
        rounds=3 if face == "reference" else None,
        flops=groups * pairs * WIDTH * 2 * (2 + 5),  # two products forward, five backward
        moved=4.0 * qkv.numel() * (1 + 1 / 3 + 1 + 1 / 3 + 1),
        **row,
    )
