"""FedOTP, literally: one client, one batch, one image, one class after another.

Every prompt is encoded at full length where it is needed, every transport problem is solved by the
published scaling of plain numbers until it no longer moves, and every client of a round has a
``torch.optim.SGD`` of its own. In float64: the numbers of a problem span eps=.005 easily.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfpl.errors import NotConverged
from fastfpl.reference.rounds import Batches, Client, Outcome, Setup
from fastfpl.reference.text import encode_text

__all__ = ["Transport", "fedotp", "logits_of", "plan_of"]

_LONGEST = 100_000


@dataclass(frozen=True)
class Transport:
    """What a transport problem is solved with.

    Attributes
    ----------
    eps : float
        Temperature.
    mass : float
        gamma, the total of a plan.
    balanced : bool
        Sinkhorn: rows hold exactly mass/P instead of at most 1/P.
    tol : float
        The iteration ends when no entry of v changes by more than this share.
    """

    eps: float
    mass: float
    balanced: bool = False
    tol: float = 1e-12


def plan_of(sim: Tensor, transport: Transport) -> Tensor:
    """Scale K = exp(-(1 - sim) / eps) of one problem (P, N) into its plan diag(u) K diag(v).

    u = min(1 / (Kp v), 1) with Kp = diag(1/a) K, a = 1/P, and v = 1 / (Kq u) with
    Kq = diag(1/b) Kᵀ, b = mass/N, from v = 1 on; v is updated last.
    """
    patches, prompts = sim.shape
    # hundreds of steps with a few numbers: numpy's take a fraction of torch's time
    kernel = np.exp(-(1 - sim.detach().cpu().numpy()) / transport.eps)
    b = transport.mass / prompts
    v = np.ones_like(kernel[0])
    for _ in range(_LONGEST):
        if transport.balanced:
            u = (transport.mass / patches) / (kernel @ v)
        else:
            u = np.minimum((1 / patches) / (kernel @ v), 1)
        before, v = v, b / (kernel.T @ u)
        if (abs(v - before) <= transport.tol * v).all():
            return torch.from_numpy(u[:, None] * kernel * v).to(sim.device)
    raise NotConverged(
        f"fastfpl.reference.fedotp: a problem must settle within {_LONGEST} iterations; got one "
        f"with similarities from {sim.min():g} to {sim.max():g}"
    )


def logits_of(setup: Setup, ctx: Tensor, image: Tensor, transport: Transport) -> Tensor:
    """Score images (B, P, D) against the contexts (N, T, W) of one client -> (B, C).

    logit = tau sum_mn T_mn <I_m, G_n>, where T is a constant.
    """
    text = torch.stack([encode_text(setup.tower, setup.layout, one, False) for one in ctx])
    rows = []
    for patches in image:
        row = []
        for prompts in text.unbind(1):  # the N prompts of one class
            sim = patches @ prompts.T
            with torch.no_grad():
                plan = plan_of(sim, transport)
            row.append((plan * sim).sum())
        rows.append(torch.stack(row))
    return setup.logit_scale * torch.stack(rows)


def _train(
    setup: Setup,
    round_: int,
    client: Client,
    batches: Batches,
    start: Tensor,
    transport: Transport,
) -> tuple[Tensor, float]:
    """Train all contexts (N, T, W) of one client for a round; and the last epoch's mean loss."""
    ctx = start.clone().requires_grad_()
    sgd = torch.optim.SGD(
        [ctx], lr=setup.lr, momentum=setup.momentum, weight_decay=setup.weight_decay
    )
    mean = 0.0
    for epoch, steps in enumerate(batches):
        sgd.param_groups[0]["lr"] = setup.lr * setup.factors[round_][epoch]
        losses = []
        for step in steps:
            logits = logits_of(setup, ctx, client.train[step], transport)
            loss = F.cross_entropy(logits, client.train_labels[step])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
    return ctx.detach(), mean


def fedotp(
    setup: Setup,
    clients: Sequence[Client],
    ctx: Tensor,
    rounds: Sequence[Mapping[int, Batches]],
    *,
    shared: int,
    transport: Transport,
) -> list[Outcome]:
    """Play FedOTP; the clients of ``rounds[t]`` train in round t, in round 0 all of them.

    The first ``shared`` contexts of ``ctx`` (N, T, W) are averaged by training images; the others
    stay with their client. Images of clients are unit-length patches (n, P, D). Everybody is
    evaluated after the merge, with the new global contexts and the own local ones. An outcome's
    ``ctx`` are the global contexts, ``kept`` the local ones.

    Source: Li et al. 2024 (FedOTP), arXiv 2403.00041.
    """
    common = ctx[:shared]
    local: dict[int, Tensor] = {}
    played = []
    for t, plan in enumerate(rounds):
        assert t or len(plan) == len(clients), "all clients train in round 0"
        sent: dict[int, Tensor] = {}
        losses: dict[int, float] = {}
        for i, batches in plan.items():
            start = torch.cat((common, local.get(i, ctx[shared:])))
            after, losses[i] = _train(setup, t, clients[i], batches, start, transport)
            sent[i], local[i] = after[:shared], after[shared:]
        total = sum(len(clients[i].train_labels) for i in sent)
        common = torch.stack(
            [len(clients[i].train_labels) / total * part for i, part in sent.items()]
        ).sum(dim=0)
        accuracy = []
        for i, client in enumerate(clients):
            with torch.no_grad():
                logits = logits_of(setup, torch.cat((common, local[i])), client.test, transport)
            right = int((logits.argmax(dim=-1) == client.test_labels).sum())
            accuracy.append(right / len(client.test_labels))
        played.append(Outcome(common, dict(local), {}, losses, accuracy))
    return played
