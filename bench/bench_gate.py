"""The gate forward and backward at pFedMoAP's size: re-associated against the literal attention."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.clock import checked
from fastfpl.ops.gate import Gate, gate_experts
from fastfpl.reference import gate as reference

SIZES = {"B": 32, "C": 100, "E": 10, "D": 128, "H": 8}


@functools.cache
def problem() -> tuple[Tensor, Tensor, Gate]:
    B, C, E, D, H = SIZES.values()
    draw = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(B, D, generator=draw), dim=-1)
    # experts of one class resemble each other
    centre = torch.randn(C, 1, D, generator=draw)
    experts = centre + 0.5 * torch.randn(C, E, D, generator=draw)
    experts = torch.nn.functional.normalize(experts, dim=-1)
    return image, experts, Gate.init(D, H, 10.0, draw)


def step(run, dtype: torch.dtype) -> Tensor:
    image, experts, gate = problem()
    names = Gate.tensor_names()
    leaves = [experts.to(dtype), *(t.to(dtype) for t in gate.tensors().values())]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    mine = replace(gate, **dict(zip(names, leaves[1:], strict=True)))
    logits = run(image.to(dtype), leaves[0], mine)
    weight = torch.linspace(-1, 2, logits.numel(), dtype=dtype).reshape(logits.shape)
    gradients = torch.autograd.grad((logits * weight).sum(), leaves)
    return torch.cat([(x / x.norm()).flatten() for x in (logits.detach(), *gradients)])


@functools.cache
def compiled():
    def flat(image: Tensor, experts: Tensor, *tensors: Tensor) -> Tensor:
        named = dict(zip(Gate.tensor_names(), tensors, strict=True))
        return reference.gate_experts(image, experts, Gate(**named, heads=SIZES["H"], scale=10.0))

    quick = torch.compile(flat)
    return lambda image, experts, gate: quick(image, experts, *gate.tensors().values())


def fused(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    with fastfpl.face("torch"):
        return gate_experts(image, experts, gate)


FACES = {
    "literal": lambda: reference.gate_experts,
    "literal+compile": compiled,
    "torch": lambda: fused,
}


@pytest.mark.parametrize("face", FACES)
def bench_forward_backward(benchmark, face):
    run = FACES[face]()
    row = {"op": "gate_experts", **SIZES, "direction": "fwd+bwd", "dtype": "float32"}
    row |= {"threads": torch.get_num_threads(), "face": face}
    exact = step(reference.gate_experts, torch.float64)
    checked(benchmark, lambda: step(run, torch.float32), exact, 1e-4, **row)
