"""Gradients through an optimal plan: what a change of its problem does to it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pull_back"]


def pull_back(
    plan: Tensor, by: Tensor, bound: Tensor | float | None, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Project a gradient of a plan on what the plan can do: plan * (by - alpha - beta).

    Parameters
    ----------
    plan, by : Tensor, shape (..., P, N)
        An optimal plan, and the gradient of something in it.
    bound : Tensor of shape (..., P), float or None
        What the rows hold at most; None where they are all held to their sums.
    tol : float
        Rows within a factor 1 - 2 tol of their bound are held too.

    Returns
    -------
    projected, alpha, beta : Tensor of shapes (..., P, N), (..., P, 1), (..., 1, N)
        Sums of the first vanish in every held row and every column. Alpha, 0 where a row is not
        held, and beta are the gradients of the sums of rows and columns. Among columns that no row
        below its bound joins to others they are known up to a constant, which goes from one to the
        other.
    """
    rows = plan.sum(-1, keepdim=True)
    if bound is None:
        held = torch.ones_like(rows, dtype=torch.bool)
    else:
        least = 1 - 2 * tol - 8 * torch.finfo(plan.dtype).eps
        limit = bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound
        held = rows >= least * limit
    share = plan / rows.clamp_min(torch.finfo(plan.dtype).tiny)
    of_held, free = plan * held, plan * ~held
    loose = free.sum(-2).double()  # (..., N)
    total = loose.sum(-1)
    one = torch.where(total > 0, total, 1)
    level = (free * by).sum((-2, -1)).double() / one
    # every held row is centred by itself; free rows share one constant, the level
    middle = (share * by).sum(-1, keepdim=True)
    centred = by - torch.where(held, middle, level.to(plan.dtype)[..., None, None])
    # held rows join their columns in pairs, and all free rows together do
    part = loose / one.unsqueeze(-1)
    lift = (free * centred).sum(-2).double().unsqueeze(-1) * part.unsqueeze(-2)
    lift = lift + ((of_held * centred).mT @ share).double()
    edge = (of_held.mT @ share).double() + loose.unsqueeze(-1) * part.unsqueeze(-2)
    beta = _heights(edge, lift - lift.mT).unsqueeze(-2)  # (..., 1, N)
    shift = level - (part * beta.squeeze(-2)).sum(-1)
    beta = (beta + torch.where(total > 0, shift, 0)[..., None, None]).to(plan.dtype)
    alpha = torch.where(held, (share * (by - beta)).sum(-1, keepdim=True), 0)
    return plan * (by - alpha - beta), alpha, beta


def _heights(edge: Tensor, lift: Tensor) -> Tensor:
    """Minimise the sum of edge_ij (height_i - height_j - lift_ij / edge_ij)² over N heights.

    Nodes are taken out one after another; what they joined is joined through them. No two edges are
    subtracted, so that those hundreds of orders of magnitude below the others count as well. Of
    nodes that nothing joins, the first has the height 0.

    Parameters
    ----------
    edge, lift : Tensor, shape (..., N, N)
        Symmetric and at least 0, its diagonal ignored; antisymmetric, and 0 where there is no edge.
    """
    taken = []
    for n in range(edge.shape[-1] - 1, 0, -1):
        out, up = edge[..., n, :n], lift[..., n, :n]
        degree = out.sum(-1, keepdim=True)
        degree = torch.where(degree > 0, degree, 1)
        part = out / degree
        taken.append((part, up.sum(-1, keepdim=True) / degree))
        edge = edge[..., :n, :n] + out.unsqueeze(-1) * part.unsqueeze(-2)
        through = part.unsqueeze(-1) * up.unsqueeze(-2)
        lift = lift[..., :n, :n] + (through - through.mT)
    heights = torch.zeros_like(edge[..., 0])
    for part, up in reversed(taken):
        heights = torch.cat((heights, (part * heights).sum(-1, keepdim=True) + up), -1)
    return heights
