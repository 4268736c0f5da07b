"""The gate at pFedMoAP's sizes: every face against the literal attention and its fused forms.

Gradients are those of a training step: of the experts and of all eight tensors of the gate. The
time is that of the forward and the backward pass alone; what they give is judged before.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastfpl
from bench.clock import DEVICE, checked
from fastfpl.ops.faces import Face
from fastfpl.ops.gate import FACES, Gate, gate_experts
from fastfpl.reference import gate as reference

Run = Callable[[Tensor, Tensor, Gate], Tensor]


@dataclass(frozen=True)
class Size:
    """Clients, images, classes, experts, width and heads."""

    U: int
    B: int
    C: int
    E: int
    D: int = 128
    H: int = 8

    def flops(self, backward: bool) -> float:
        """Products with weights, and scores and values; backward twice as many of each."""
        weights = (self.C * self.E + self.B) * 2 * self.D**2
        between = 2 * self.B * self.C * self.E * self.D
        return self.U * 2.0 * (weights + between) * (3 if backward else 1)

    def moved(self, backward: bool) -> float:
        """Bytes of what goes in and comes out in float32; backward the same once more."""
        rows, gate = self.C * self.E * self.D, 4 * self.D * (self.D + 1)
        return self.U * 4.0 * (rows + gate + self.B * (self.D + self.C)) * (2 if backward else 1)


SIZES = [Size(1, b, c, e) for b in (16, 32, 128) for c in (10, 100, 1000) for e in (2, 10, 30)]
SIZES += [Size(1, 32, 100, 10, D=512)]


@functools.cache
def problem(size: Size) -> tuple[Tensor, Tensor, Gate]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    image = F.normalize(normal(size.U, size.B, size.D), dim=-1)
    # experts of one class resemble each other
    centre = normal(size.U, size.C, 1, size.D)
    experts = centre + 0.5 * normal(size.U, size.C, size.E, size.D)
    gates = [Gate.init(size.D, size.H, 10.0, draw) for _ in range(size.U)]
    tensors = {
        n: torch.stack([g.tensors()[n] for g in gates]).to(DEVICE) for n in Gate.tensor_names()
    }
    image, experts = image.to(DEVICE), F.normalize(experts, dim=-1).to(DEVICE)
    if size.U == 1:  # no leading dimension, which the literal form walks through
        image, experts = image[0], experts[0]
        tensors = {n: t[0] for n, t in tensors.items()}
    return image, experts, Gate(**tensors, heads=size.H, scale=10.0)


class Step:
    """A pass over one problem; a call gives the logits, and computes the gradients if asked."""

    def __init__(self, run: Run, size: Size, dtype: torch.dtype, backward: bool) -> None:
        self._run, self._backward = run, backward
        image, experts, gate = problem(size)
        leaves = [experts, *gate.tensors().values()]
        self._image = image.to(dtype)
        self._leaves = [x.to(dtype).clone().requires_grad_(backward) for x in leaves]
        named = dict(zip(Gate.tensor_names(), self._leaves[1:], strict=True))
        self._gate = replace(gate, **named)
        weight = torch.linspace(-1, 2, size.U * size.B * size.C, dtype=dtype, device=DEVICE)
        self._weight = weight.view(*image.shape[:-1], size.C)
        self.gradients: tuple[Tensor, ...] = ()

    def __call__(self) -> Tensor:
        logits = self._run(self._image, self._leaves[0], self._gate)
        if self._backward:
            self.gradients = torch.autograd.grad(logits, self._leaves, self._weight)
        return logits.detach()


@functools.cache
def exact(size: Size, backward: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The truth; where the literal form takes gigabytes, by the torch face, proven in the tests."""
    literal = size.U * size.B * size.C * size.E < 1 << 20
    step = Step(
        reference.gate_experts if literal else faced("torch"), size, torch.float64, backward
    )
    logits = step()
    gc.collect()
    return logits, step.gradients


def faced(name: str) -> Run:
    def run(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
        with fastfpl.face(name):
            return gate_experts(image, experts, gate)

    return run


def with_sdpa(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    """The literal attention through torch's fused one: outputs (..., C, B, D)."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (gate.heads, -1)).transpose(-3, -2)

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x @ w.mT.unsqueeze(-3) + b[..., None, None, :]

    q = split(linear(image.unsqueeze(-3), gate.w_q, gate.b_q))
    k = split(linear(experts, gate.w_k, gate.b_k))
    v = split(linear(experts, gate.w_v, gate.b_v))
    q = q.expand(*k.shape[:-2], *q.shape[-2:])
    mixed = F.scaled_dot_product_attention(q, k, v, scale=gate.scale)
    out = linear(mixed.transpose(-3, -2).flatten(-2), gate.w_o, gate.b_o)
    return torch.einsum("...bd,...cbd->...bc", image, out)


@functools.cache
def compiled(face: str) -> Run:
    fast = next(f.run for f in FACES["gate_experts"] if f.name == face)

    def flat(image: Tensor, experts: Tensor, heads: int, scale: float, *tensors: Tensor) -> Tensor:
        named = dict(zip(Gate.tensor_names(), tensors, strict=True))
        return fast(image, experts, Gate(**named, heads=heads, scale=scale))

    quick = torch.compile(flat, dynamic=False)
    return lambda x, t, g: quick(x, t, g.heads, g.scale, *g.tensors().values())


def one_by_one(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    """A cohort without its leading dimension."""
    return torch.stack(
        [
            gate_experts(x, t, replace(gate, **{n: y[u] for n, y in gate.tensors().items()}))
            for u, (x, t) in enumerate(zip(image, experts, strict=True))
        ]
    )


WAYS: dict[str, Callable[[], Run]] = {
    "literal": lambda: reference.gate_experts,
    "literal+compile": lambda: compiled("reference"),
    "sdpa": lambda: with_sdpa,
    "torch": lambda: faced("torch"),
    "torch+compile": lambda: compiled("torch"),
    **{f.name: functools.partial(faced, f.name) for f in FACES["gate_experts"][:-2]},
}


def refusals(way: str, size: Size) -> list[str]:
    """Why a way cannot run here; the interpreter is a proof and no implementation."""
    found: list[Face] = [f for f in FACES["gate_experts"] if f.name == way]
    if way == "triton" and DEVICE == "cpu":
        return ["torch sees no CUDA device"]
    return [why for f in found for why in f.missing() or f.against(*problem(size))]


def measure(benchmark, way: str, run: Run, size: Size, backward: bool) -> None:
    logits, gradients = exact(size, backward)
    step = Step(run, size, torch.float32, backward)
    step()
    for name, mine, true in zip(
        ("experts", *Gate.tensor_names()), step.gradients, gradients, strict=backward
    ):
        if name != "b_k":  # zero: what comes out is rounding
            error = float((mine.double() - true).norm() / true.norm())
            assert error < 1e-4, f"not timed: relative error {error:.2e} of {name}"
    row = {"op": "gate_experts", **vars(size), "direction": "fwd+bwd" if backward else "fwd"}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE, "face": way}
    checked(
        benchmark,
        step,
        logits,
        1e-4,
        flops=size.flops(backward),
        moved=size.moved(backward),
        gemm=(size.C * size.E, size.D, 2 * size.D),
        **row,
    )
    benchmark.extra_info |= {"torch": torch.__version__}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"B{s.B}-C{s.C}-E{s.E}-D{s.D}")
def bench_gate(benchmark, size, direction, way):
    if reasons := refusals(way, size):
        pytest.skip("; ".join(reasons))
    measure(benchmark, way, WAYS[way](), size, direction == "fwd+bwd")


@pytest.mark.parametrize("way", ["literal", "best one by one", "best"])
def bench_cohort(benchmark, way):
    """Sixteen clients, each with its own gate and experts."""
    runs = {"literal": reference.gate_experts, "best": gate_experts, "best one by one": one_by_one}
    measure(benchmark, way, runs[way], Size(16, 32, 100, 10), backward=True)
