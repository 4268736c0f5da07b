"""Logits of the transport piece by piece: a GEMM, the plans, and a weighted sum, for any solver."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfpl.ops import native
from fastfpl.ops.functional import once
from fastfpl.ops.precision import as_given
from fastfpl.ops.transport_checks import (
    INSTEAD,
    Refuse,
    check_similarities,
    entropy_of,
    refuse_product,
    wide_of,
)
from fastfpl.ops.transport_gradient import pull_back
from fastfpl.reference import transport as reference

__all__ = [
    "CPU",
    "TORCH",
    "Corner",
    "Engine",
    "Problem",
    "Scored",
    "are_kept",
    "multiplied",
    "pieced",
    "pieces",
    "weigh_torch",
]

#: Logits, iterations, residual, entropy.
Scored = tuple[Tensor, Tensor, Tensor, Tensor | None]
#: Clients, images and classes of a piece.
Corner = tuple[slice, slice, slice]

# similarities of one piece of the logits: 16 MiB, enough for full-speed GEMMs and for all threads
_AT_ONCE = 1 << 22
# plans that are kept for the backward pass: 256 MiB; above that each piece solves its own again
_KEPT = 1 << 26


class Problem(NamedTuple):
    """What the problems of all pieces share, in the order of the ops' arguments."""

    eps: float
    mass: float
    balanced: bool
    max_iter: int
    tol: float


class Engine(NamedTuple):
    """How a face solves a piece of similarities (u, b, P, c, N), and how it weighs the plans.

    ``score(sim, problem, refuse)`` may overwrite ``sim``; it returns plans in its layout, their
    logits (u, b, c), iterations and residuals. ``weigh(plan, by)`` multiplies with by (u, b, c).
    """

    score: Callable[[Tensor, Problem, Refuse], tuple[Tensor, Tensor, Tensor, Tensor]]
    weigh: Callable[[Tensor, Tensor], Tensor]


def _score_cpu(
    sim: Tensor, problem: Problem, refuse: Refuse
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = sim.new_empty(*sim.shape[:2], sim.shape[3])
    iterations, residual = torch.empty_like(logits, dtype=torch.int64), torch.empty_like(logits)
    first_bad = native.load("transport_plan").transport_plan(
        *(sim, sim, iterations, residual, *problem, torch.get_num_threads()),
        logits=logits,
        classes=sim.shape[3],
    )
    if first_bad >= 0:
        refuse(sim, problem.eps, first_bad)
    return sim, logits, iterations, residual


def _weigh_cpu(plan: Tensor, by: Tensor) -> Tensor:
    out = torch.empty_like(plan)
    native.load("weigh_plan").weigh_plan(
        plan, by.resolve_neg().contiguous(), out, torch.get_num_threads()
    )
    return out


def _score_torch(
    sim: Tensor, problem: Problem, refuse: Refuse
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_similarities(sim, problem.eps, refuse)
    plan, iterations, residual = reference.transport_plan(
        sim.transpose(2, 3).contiguous(), *problem
    )
    plan = plan.transpose(2, 3)
    return plan, sim.mul_(plan).sum((2, 4)), iterations, residual


def are_kept(entries: int) -> bool:
    """Say whether so many entries of plans are kept for the backward pass."""
    return entries <= _KEPT


def weigh_torch(plan: Tensor, by: Tensor) -> Tensor:
    """Multiply plans (u, b, P, c, N) with by (u, b, c), in the dtype of the plans."""
    out = torch.empty_like(plan, memory_format=torch.contiguous_format)
    return torch.mul(plan, by.to(plan.dtype)[:, :, None, :, None], out=out)


CPU, TORCH = Engine(_score_cpu, _weigh_cpu), Engine(_score_torch, weigh_torch)


def pieced(
    engine: Engine,
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    plan_gradient: bool,
    measure: bool,
) -> Scored:
    """Form similarities, plans and logits piece by piece."""
    lead = patches.shape[:-3]
    clients = math.prod(lead)
    x = patches.reshape(clients, *patches.shape[-3:])
    t = prompts.reshape(clients, *prompts.shape[-3:])
    plans = clients * math.prod((*x.shape[1:3], *t.shape[1:3]))
    wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
    work = _Work(engine, Problem(eps, mass, balanced, max_iter, tol), tuple(lead), plan_gradient)
    logits, iterations, residual, entropy = _Logits.apply(
        x, t, work, wanted and are_kept(plans), measure
    )
    shape = (*lead, x.shape[1], t.shape[1])
    ended = (iterations.reshape(shape), residual.reshape(shape))
    return logits.reshape(shape), *ended, None if entropy is None else entropy.reshape(shape)


class _Work(NamedTuple):
    """What forward and backward do with a piece."""

    engine: Engine
    problem: Problem
    lead: tuple[int, ...]
    plan_gradient: bool

    def score(
        self, x: Tensor, t: Tensor, corner: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return d logit / d sim, the plan, and logits, iterations and residual."""
        sim = _similarities(x, t)
        refuse = functools.partial(refuse_product, self.lead, corner)
        given = sim.clone() if self.plan_gradient else sim
        plan, logits, iterations, residual = self.engine.score(given, self.problem, refuse)
        if not self.plan_gradient:
            return plan, plan, logits, iterations, residual
        bound = None if self.problem.balanced else 1 / x.shape[2]
        pulled, *_ = pull_back(plan.transpose(2, 3), sim.transpose(2, 3), bound, self.problem.tol)
        slope = plan + pulled.transpose(2, 3) / self.problem.eps
        return slope, plan, logits, iterations, residual


def pieces(x: Tensor, t: Tensor) -> Iterator[Corner]:
    """Cut clients, images and classes so that no piece has more than `_AT_ONCE` numbers.

    Images are cut first: whole rows of classes keep the GEMMs wide.
    """
    clients, images, n_patches, width = x.shape
    classes, n_prompts = t.shape[1:3]
    c = max(1, min(classes, _AT_ONCE // (n_prompts * max(n_patches, width))))
    image = n_patches * max(c * n_prompts, width)
    b = max(1, min(images, _AT_ONCE // image))
    u = max(1, _AT_ONCE // (image * b)) if (b, c) == (images, classes) else 1
    for i in range(0, clients, u):
        for j in range(0, images, b):
            for k in range(0, classes, c):
                yield slice(i, i + u), slice(j, j + b), slice(k, k + c)


def _similarities(x: Tensor, t: Tensor) -> Tensor:
    """Multiply (u, b, P, D) and (u, c, N, D), one GEMM a client -> (u, b, P, c, N), as it comes."""
    flat = x.flatten(1, 2) @ t.flatten(1, 2).mT
    return flat.view(*x.shape[:3], *t.shape[1:3])


class _Logits(torch.autograd.Function):
    """Sums of plan * sim; d logit / d sim is formed with them, and kept or formed again."""

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, prompts: Tensor, work: _Work, keep: bool, measure: bool
    ) -> Scored:
        shape = (patches.shape[0], patches.shape[1], prompts.shape[1])
        wide = wide_of(patches, prompts)
        logits = patches.new_empty(shape, dtype=torch.promote_types(patches.dtype, prompts.dtype))
        iterations = patches.new_empty(shape, dtype=torch.int64)
        residual = patches.new_empty(shape, dtype=wide)
        entropy = patches.new_empty(shape, dtype=wide) if measure else None
        slopes = []
        for u, b, c in pieces(patches, prompts):
            x, t = patches[u, b].to(wide), prompts[u, c].to(wide)
            slope, plan, logits[u, b, c], iterations[u, b, c], residual[u, b, c] = work.score(
                x, t, (u.start, b.start, c.start)
            )
            if entropy is not None:
                entropy[u, b, c] = entropy_of(plan, work.problem.mass, (2, 4))
            if keep:
                slopes.append(slope)
        ctx.save_for_backward(patches, prompts, *slopes)
        ctx.work = work
        ended = (iterations, residual) if entropy is None else (iterations, residual, entropy)
        ctx.mark_non_differentiable(*ended)
        return logits, iterations, residual, entropy

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        patches, prompts, *slopes = ctx.saved_tensors
        wide = wide_of(patches, prompts)

        def weights() -> Iterator[tuple[Corner, Tensor]]:
            for i, (u, b, c) in enumerate(pieces(patches, prompts)):
                if slopes:
                    slope = slopes[i]
                else:
                    x, t = patches[u, b].to(wide), prompts[u, c].to(wide)
                    slope, *_ = ctx.work.score(x, t, (u.start, b.start, c.start))
                yield (u, b, c), ctx.work.engine.weigh(slope, d_logits[u, b, c].to(wide))

        gradients = multiplied(patches, prompts, weights(), *ctx.needs_input_grad[:2])
        given = (d_logits, patches, prompts)
        return *once("transport_logits", INSTEAD, gradients, *given), None, None, None


def multiplied(
    patches: Tensor,
    prompts: Tensor,
    weights: Iterator[tuple[Corner, Tensor]],
    of_patches: bool,
    of_prompts: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of patches and prompts where wanted, from d loss / d sim (u, b, P, c, N) by piece.

    One batched product a piece and gradient, in float32 or wider.
    """
    wide = wide_of(patches, prompts)
    d_patches = _zeros(patches, prompts, wide) if of_patches else None
    d_prompts = _zeros(prompts, patches, wide) if of_prompts else None
    with torch.no_grad(), as_given(patches.device):
        for (u, b, c), weight in weights:
            flat = weight.flatten(3, 4).flatten(1, 2)
            if d_patches is not None:
                _multiply(flat, prompts[u, c].to(wide), d_patches[u, b], first=not c.start)
            if d_prompts is not None:
                _multiply(flat.mT, patches[u, b].to(wide), d_prompts[u, c], first=not b.start)
    return (
        None if d_patches is None else d_patches.to(patches.dtype),
        None if d_prompts is None else d_prompts.to(prompts.dtype),
    )


def _zeros(like: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Make room for a gradient; where there are pieces each of its parts is written before read."""
    make = torch.empty if like.numel() and others.numel() else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def _multiply(weight: Tensor, features: Tensor, out: Tensor, *, first: bool) -> None:
    """Write (u, rows, k) @ (u, x, y, D), flattened to (u, k, D), into ``out``, or add it."""
    flat = features.flatten(1, 2)
    place = out.view(len(out), out.shape[1] * out.shape[2], out.shape[3])
    if first:
        torch.bmm(weight, flat, out=place)
    else:
        place.baddbmm_(weight, flat)
