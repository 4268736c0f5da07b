"""Sinkhorn's scaling of rows and columns, in the log domain, with one stop a problem."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sinkhorn"]


def sinkhorn(
    M: Tensor, a: Tensor, b: Tensor, reg: float, partial: bool, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate u = a / (K v), v = b / (Kᵀ u) on K = exp(-M / reg); ``partial``: u = min(·, 1).

    The plan is diag(u) K diag(v). Scaled without ``partial`` so that rows and columns have the
    total of b. A problem stops when no entry of v changes by more than a factor exp(±tol), on its
    own. Returns plan, iterations and the last change of log v; see `fastfpl.ops.sinkhorn`.
    """
    if not partial:
        a = a * (b.sum(-1, keepdim=True) / a.sum(-1, keepdim=True))
    log_a, log_b = a.log().unsqueeze(-1), b.log().unsqueeze(-2)
    log_k = (M.mean((-2, -1), keepdim=True) - M) / reg
    log_v = torch.zeros_like(log_b)
    log_u = torch.zeros_like(log_a)
    iterations = torch.zeros(M.shape[:-2], dtype=torch.int64, device=M.device)
    residual = M.new_full(M.shape[:-2], math.inf)
    for _ in range(max_iter):
        running = residual > tol
        if not running.any():
            break
        new_u = log_a - (log_k + log_v).logsumexp(-1, keepdim=True)
        new_u = new_u.clamp(max=0) if partial else new_u
        new_v = log_b - (log_k + new_u).logsumexp(-2, keepdim=True)
        # a column without weight has log v = -inf from the first step on
        change = torch.where(log_b.isneginf(), 0, (new_v - log_v).abs()).amax((-2, -1))
        log_u = torch.where(running[..., None, None], new_u, log_u)
        log_v = torch.where(running[..., None, None], new_v, log_v)
        residual = torch.where(running, change, residual)
        iterations += running
    return (log_u + log_k + log_v).exp(), iterations, residual
