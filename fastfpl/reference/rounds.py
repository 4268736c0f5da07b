"""Rounds of the algorithms, literally: one client after another, one batch after another.

Nothing is shared, stacked or kept: every prompt is encoded at full length where it is needed, and
every client of a round has a ``torch.optim.SGD`` of its own. The order of the data is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfpl.reference.gate import Gate, gate_experts
from fastfpl.reference.text import PromptLayout, TextTower, encode_text

__all__ = [
    "Batches",
    "Client",
    "Outcome",
    "Pick",
    "Setup",
    "accuracy_of",
    "average",
    "encode_tokens",
    "local",
    "logits_of",
    "loss_of",
    "nearest",
    "pfedmoap",
    "promptfl",
    "zeroshot",
]

#: ``batches[epoch][step]`` are positions in one client's training images.
Batches = Sequence[Sequence[Tensor]]

#: ``pick(round, client, pool)`` names the experts of a client that is in the pool itself.
Pick = Callable[[int, int, Mapping[int, Tensor]], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Client:
    """One client's unit-length image features and labels.

    Attributes
    ----------
    train, test : Tensor, shape (n, D)
    train_labels, test_labels : Tensor, shape (n,), int64
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True, eq=False)
class Setup:
    """What all clients share.

    Attributes
    ----------
    tower : TextTower
    layout : PromptLayout
    logit_scale : float
        tau, the multiplier of cosine similarities.
    lr, momentum, weight_decay : float
        Of SGD.
    factors : sequence of sequences of float
        ``factors[round][epoch]`` multiplies the learning rate of contexts; a gate's is constant.
    """

    tower: TextTower
    layout: PromptLayout
    logit_scale: float
    lr: float
    momentum: float
    weight_decay: float
    factors: Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The state after a round.

    Attributes
    ----------
    ctx : Tensor, shape (T, W)
        The global context.
    kept : mapping from client to Tensor
        Contexts that clients keep; a client that never took part is absent.
    gates : mapping from client to Gate
        Gates that clients keep.
    losses : mapping from client to float
        Of the clients that trained: mean over the steps of the last epoch.
    accuracy : list of float
        Of each client.
    """

    ctx: Tensor
    kept: Mapping[int, Tensor]
    gates: Mapping[int, Gate]
    losses: Mapping[int, float]
    accuracy: list[float]


def _encode(setup: Setup, ctx: Tensor) -> Tensor:
    return encode_text(setup.tower, setup.layout, ctx, False)


def logits_of(
    setup: Setup,
    ctx: Tensor,
    image: Tensor,
    experts: Sequence[Tensor] = (),
    gate: Gate | None = None,
    local_weight: float = 1.0,
) -> Tensor:
    """Score images (B, D) against the prompts of one client -> (B, C).

    tau <I, T_L>, and with experts, the text features (C, D) of other clients,
    lambda tau <I, T_L> + tau gate(pool(I), {pool(T_L), pool(T_1), ...}), where pool takes every
    r-th feature.
    """
    text = _encode(setup, ctx)
    logits = setup.logit_scale * image @ text.T
    if not experts:
        return logits
    assert gate is not None
    r = text.shape[-1] // gate.b_q.shape[-1]
    pooled = torch.stack([t[:, ::r] for t in (text, *experts)], dim=1)
    mixed = gate_experts(image[:, ::r], pooled, gate)
    return local_weight * logits + setup.logit_scale * mixed


def loss_of(
    logits: Tensor, labels: Tensor, ctx: Tensor, anchor: Tensor | None = None, mu: float = 0.0
) -> Tensor:
    """Cross entropy, and with an anchor (mu / 2) times the squared distance of the context."""
    loss = F.cross_entropy(logits, labels)
    if anchor is not None:
        loss = loss + mu / 2 * ((ctx - anchor) ** 2).sum()
    return loss


def _train(
    setup: Setup,
    round_: int,
    client: Client,
    batches: Batches,
    start: Tensor,
    *,
    mu: float = 0.0,
    experts: Sequence[Tensor] = (),
    gate: Gate | None = None,
    gate_lr: float = 0.0,
    local_weight: float = 1.0,
) -> tuple[Tensor, Gate | None, float]:
    """Train one client for a round: its context, its gate, and the last epoch's mean loss."""
    ctx = start.clone().requires_grad_()
    groups = [{"params": [ctx], "lr": setup.lr}]
    if gate is not None:
        own = {name: t.clone().requires_grad_() for name, t in gate.tensors().items()}
        gate = replace(gate, **own)  # type: ignore[arg-type]  # tensors by name
        groups.append({"params": list(own.values()), "lr": gate_lr})
    sgd = torch.optim.SGD(
        groups, lr=setup.lr, momentum=setup.momentum, weight_decay=setup.weight_decay
    )
    mean = 0.0
    for epoch, steps in enumerate(batches):
        sgd.param_groups[0]["lr"] = setup.lr * setup.factors[round_][epoch]
        losses = []
        for step in steps:
            image, labels = client.train[step], client.train_labels[step]
            logits = logits_of(setup, ctx, image, experts, gate, local_weight)
            loss = loss_of(logits, labels, ctx, start, mu)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
    if gate is not None:
        done = {name: t.detach() for name, t in gate.tensors().items()}
        gate = replace(gate, **done)  # type: ignore[arg-type]  # tensors by name
    return ctx.detach(), gate, mean


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers of logits (n, C)."""
    right = int((logits.argmax(dim=-1) == labels).sum())
    return right / len(labels)


def average(contexts: Mapping[int, Tensor], clients: Sequence[Client]) -> Tensor:
    """FedAvg: contexts weighted by training images."""
    images = {i: len(clients[i].train_labels) for i in contexts}
    total = sum(images.values())
    parts = [images[i] / total * contexts[i] for i in contexts]
    return torch.stack(parts).sum(dim=0)


def encode_tokens(tower: TextTower, tokens: Tensor, eot: Tensor) -> Tensor:
    """Encode whole rows of tokens (C, L) with their EOT at (C,) -> (C, D)."""
    layout = PromptLayout(tokens, tokens[:, :0], eot, tower.begin, tower.begin)
    return encode_text(tower, layout, tower.token_embedding[:0], False)


@torch.no_grad()
def zeroshot(
    tower: TextTower,
    tokens: Tensor,
    eot: Tensor,
    logit_scale: float,
    clients: Sequence[Client],
) -> list[float]:
    """Evaluate clients with hand-written prompts: whole rows of tokens (C, L), EOT at (C,)."""
    text = encode_tokens(tower, tokens, eot)
    return [accuracy_of(logit_scale * c.test @ text.T, c.test_labels) for c in clients]


def promptfl(
    setup: Setup,
    clients: Sequence[Client],
    ctx: Tensor,
    rounds: Sequence[Mapping[int, Batches]],
    mu: float = 0.0,
) -> list[Outcome]:
    """Play PromptFL, with ``mu`` FedProx; the clients of ``rounds[t]`` train in round t.

    Source: McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1, over the context alone; Li et al.
    2020 (arXiv 1812.06127), equation 2.
    """
    played = []
    for t, plan in enumerate(rounds):
        sent, losses = {}, {}
        for i, batches in plan.items():
            sent[i], _, losses[i] = _train(setup, t, clients[i], batches, ctx, mu=mu)
        ctx = average(sent, clients)
        with torch.no_grad():
            accuracy = [accuracy_of(logits_of(setup, ctx, c.test), c.test_labels) for c in clients]
        played.append(Outcome(ctx, {}, {}, losses, accuracy))
    return played


def local(
    setup: Setup, clients: Sequence[Client], ctx: Tensor, rounds: Sequence[Mapping[int, Batches]]
) -> list[Outcome]:
    """Play CoOp on every client alone; each goes on from where it stopped."""
    kept: dict[int, Tensor] = {}
    played = []
    for t, plan in enumerate(rounds):
        losses = {}
        for i, batches in plan.items():
            start = kept.get(i, ctx)
            kept[i], _, losses[i] = _train(setup, t, clients[i], batches, start)
        accuracy = []
        for i, c in enumerate(clients):
            own = kept.get(i, ctx)
            with torch.no_grad():
                accuracy.append(accuracy_of(logits_of(setup, own, c.test), c.test_labels))
        played.append(Outcome(ctx, dict(kept), {}, losses, accuracy))
    return played


def nearest(count: int) -> Pick:
    """Pick the ``count`` other prompts of the pool that are nearest in L2, ties by number."""

    def pick(round_: int, client: int, pool: Mapping[int, Tensor]) -> list[int]:
        def away(other: int) -> float:
            return float(((pool[other].double() - pool[client].double()) ** 2).sum().sqrt())

        others = [other for other in pool if other != client]
        return sorted(others, key=lambda other: (away(other), other))[:count]

    return pick


def pfedmoap(
    setup: Setup,
    clients: Sequence[Client],
    ctx: Tensor,
    rounds: Sequence[Mapping[int, Batches]],
    *,
    gate: Gate,
    gate_lr: float,
    local_weight: float,
    pick: Pick,
) -> list[Outcome]:
    """Play pFedMoAP.

    A client that is not in the pool of the previous round trains plain CoOp; one that is receives
    experts from it and trains context and gate together. A client is evaluated with context, gate
    and experts as it last trained, whether in this round or before; one that never took part with
    the global context.

    Source: Luo et al. 2025 (pFedMoAP, ICLR), Algorithm 1 and equations 6 to 10.
    """
    pool: dict[int, Tensor] = {}
    gates: dict[int, Gate] = {}
    trained_with: dict[int, list[Tensor]] = {}
    played = []

    def encoded(of: Mapping[int, Tensor], chosen: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return [_encode(setup, of[j]) for j in chosen]

    for t, plan in enumerate(rounds):
        before = dict(pool)
        sent, losses = {}, {}
        for i, batches in plan.items():
            experts = encoded(before, pick(t, i, before)) if i in before else []
            own = gates.get(i, gate) if experts else None
            sent[i], after, losses[i] = _train(
                setup,
                t,
                clients[i],
                batches,
                ctx,
                experts=experts,
                gate=own,
                gate_lr=gate_lr,
                local_weight=local_weight,
            )
            trained_with[i] = experts
            if after is not None:
                gates[i] = after
        ctx = average(sent, clients)
        pool |= sent
        accuracy = []
        for i, c in enumerate(clients):
            mine, experts = pool.get(i, ctx), trained_with.get(i, [])
            with torch.no_grad():
                logits = logits_of(setup, mine, c.test, experts, gates.get(i), local_weight)
            accuracy.append(accuracy_of(logits, c.test_labels))
        played.append(Outcome(ctx, dict(pool), dict(gates), losses, accuracy))
    return played
