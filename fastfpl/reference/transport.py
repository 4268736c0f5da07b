"""FedOTP's transport as published: the scaling iteration, in the log domain, one stop a problem."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

__all__ = ["optimal_plan", "similarities", "transport_logits", "transport_plan"]


# where a plan is taken for optimal, in logarithms of its columns, and steps at most
_STILL, _MOST = 1e-7, 20_000


def transport_plan(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate u = min(1 / (P K v), 1), v = (mass / N) / (Kᵀ u) on K = exp((sim - 1) / eps).

    The plan is diag(u) K diag(v). ``balanced`` is Sinkhorn: u = mass / (P K v). A problem stops
    when no entry of v changes by more than a factor exp(±tol), on its own: it is then frozen while
    others go on. Returns plan, iterations and the last change of log v; see
    `fastfpl.ops.transport_plan`.
    """
    n_patches, n_prompts = sim.shape[-2:]
    # K / s has the fixed point (u, s v) and the same plan. With log s = (mean(sim) - 1) / eps the
    # logarithms stay small, and log v starts at log s, so that every step is the published one.
    mean = sim.mean((-2, -1), keepdim=True)
    log_k = (sim - mean) / eps
    log_v = ((mean - 1) / eps).expand(*sim.shape[:-2], 1, n_prompts)
    log_u = sim.new_zeros(*sim.shape[:-1], 1)
    iterations = torch.zeros(sim.shape[:-2], dtype=torch.int64, device=sim.device)
    residual = sim.new_full(sim.shape[:-2], math.inf)
    for _ in range(max_iter):
        running = residual > tol
        if not running.any():
            break
        new_u = -math.log(n_patches) - (log_k + log_v).logsumexp(-1, keepdim=True)
        new_u = new_u + math.log(mass) if balanced else new_u.clamp(max=0)
        new_v = math.log(mass / n_prompts) - (log_k + new_u).logsumexp(-2, keepdim=True)
        change = (new_v - log_v).abs().amax((-2, -1))
        log_u = torch.where(running[..., None, None], new_u, log_u)
        log_v = torch.where(running[..., None, None], new_v, log_v)
        residual = torch.where(running, change, residual)
        iterations += running
    return (log_u + log_k + log_v).exp(), iterations, residual


def optimal_plan(sim: Tensor, eps: float, mass: float, balanced: bool) -> Tensor:
    """Iterate as `transport_plan` does until nothing changes: plans (..., P, N) in float64.

    One loop over all problems that `torch.export` can follow: no number is read. None stops on its
    own, since past its fixed point a problem stays there.
    """
    n_patches, n_prompts = sim.shape[-2:]
    wide = sim.double()
    mean = wide.mean((-2, -1), keepdim=True)
    log_k = (wide - mean) / eps
    begin = ((mean - 1) / eps).expand(*sim.shape[:-2], 1, n_prompts).clone()

    def going(step: Tensor, log_u: Tensor, log_v: Tensor, change: Tensor) -> Tensor:
        return (step < _MOST) & (change > _STILL)

    def again(
        step: Tensor, log_u: Tensor, log_v: Tensor, change: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        new_u = -math.log(n_patches) - (log_k + log_v).logsumexp(-1, keepdim=True)
        new_u = new_u + math.log(mass) if balanced else new_u.clamp(max=0)
        new_v = math.log(mass / n_prompts) - (log_k + new_u).logsumexp(-2, keepdim=True)
        # a loop's tensors keep their layout
        return step + 1, new_u.contiguous(), new_v.contiguous(), (new_v - log_v).abs().amax()

    first = (
        torch.zeros((), dtype=torch.int64, device=sim.device),
        log_k.new_zeros(log_k.shape[:-1]).unsqueeze(-1),
        begin.contiguous(),
        torch.full((), math.inf, dtype=torch.float64, device=sim.device),
    )
    _, log_u, log_v, _ = while_loop(going, again, first)
    plan: Tensor = (log_u + log_k + log_v).exp()
    return plan


def similarities(patches: Tensor, prompts: Tensor) -> Tensor:
    """Multiply patches with prompts: (..., B, P, D), (..., C, N, D) -> (..., B, C, P, N)."""
    return torch.einsum("...bpd,...cnd->...bcpn", patches, prompts)


def transport_logits(
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    plan_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum plan * sim over the patches and prompts of every pair of image and class.

    The plan is a constant, so that a gradient flows through sim alone; with ``plan_gradient`` it
    also flows through every iteration. Returns logits (..., B, C), plans, iterations and residuals;
    see `fastfpl.ops.transport_logits`.
    """
    sim = similarities(patches, prompts)
    given = sim if plan_gradient else sim.detach()
    plan, iterations, residual = transport_plan(given, eps, mass, balanced, max_iter, tol)
    return (plan * sim).sum((-2, -1)), plan.detach(), iterations, residual
