"""Rounds with quirks of released code, literally: one model and one trainer that visit clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastfpl.reference.gate import Gate
from fastfpl.reference.rounds import (
    Batches,
    Client,
    Outcome,
    Pick,
    Setup,
    accuracy_of,
    average,
    logits_of,
    loss_of,
)
from fastfpl.reference.text import encode_text

__all__ = ["Model", "pfedmoap", "promptfl", "stopped_together"]


class Model:
    """The one model that every client is loaded into, with the one optimiser that trains it.

    Parameters
    ----------
    setup : Setup
        Its ``factors`` are not looked at.
    ctx : Tensor, shape (T, W)
    gate : Gate, optional
    gate_lr : float
    epochs : int
        Of a visit; the half period of the cosine.
    shared, cosine, warmup : bool
        Whether the optimiser is never reset; whether its rate follows a cosine from one visit to
        the next; whether its first epoch has the rate 1e-5, before the cosine begins.
    """

    def __init__(
        self,
        setup: Setup,
        ctx: Tensor,
        gate: Gate | None = None,
        gate_lr: float = 0.0,
        *,
        epochs: int,
        shared: bool,
        cosine: bool = False,
        warmup: bool = False,
    ) -> None:
        self._setup = setup
        self._gate_lr = gate_lr
        self._epochs, self._shared, self._cosine, self._warmup = epochs, shared, cosine, warmup
        self._first = True
        self._ctx = ctx.clone().requires_grad_()
        self.gate = gate
        if gate is not None:
            own = {name: t.clone().requires_grad_() for name, t in gate.tensors().items()}
            self.gate = replace(gate, **own)  # type: ignore[arg-type]  # tensors by name
        self._reset()

    def _reset(self) -> None:
        s = self._setup
        self.sgd = torch.optim.SGD(
            [self._ctx], lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
        self._scheduler = CosineAnnealingLR(self.sgd, self._epochs)
        if self.gate is not None:
            tensors = list(self.gate.tensors().values())
            self._gate_sgd = torch.optim.SGD(
                tensors, lr=self._gate_lr, momentum=s.momentum, weight_decay=s.weight_decay
            )

    def load_gate(self, gate: Gate) -> None:
        """Overwrite the gate."""
        assert self.gate is not None
        with torch.no_grad():
            for name, tensor in self.gate.tensors().items():
                tensor.copy_(gate.tensors()[name])

    def saved_gate(self) -> Gate:
        """Copy the gate."""
        assert self.gate is not None
        done = {name: t.detach().clone() for name, t in self.gate.tensors().items()}
        return replace(self.gate, **done)  # type: ignore[arg-type]  # tensors by name

    def visit(
        self,
        client: Client,
        batches: Batches,
        start: Tensor,
        *,
        mu: float = 0.0,
        experts: Sequence[Tensor] = (),
        local_weight: float = 1.0,
    ) -> tuple[Tensor, float, list[float]]:
        """Train a client from ``start``: its context, the last epoch's loss, each epoch's rate.

        ``mu`` weighs a proximal term that is computed from a copy of the context: it is part of
        the loss that is returned, and has no gradient.
        """
        if not self._shared:
            self._reset()
        with torch.no_grad():
            self._ctx.copy_(start)
        mean, rates = 0.0, []
        for steps in batches:
            usual = self.sgd.param_groups[0]["lr"]
            warm = self._warmup and self._first
            if warm:
                self.sgd.param_groups[0]["lr"] = 1e-5
            rates.append(self.sgd.param_groups[0]["lr"])
            losses = []
            for step in steps:
                image, labels = client.train[step], client.train_labels[step]
                gate = self.gate if experts else None
                logits = logits_of(self._setup, self._ctx, image, experts, gate, local_weight)
                loss = loss_of(logits, labels, self._ctx.detach().clone(), start, mu)
                self.sgd.zero_grad()
                if self.gate is not None:
                    self._gate_sgd.zero_grad()
                loss.backward()
                self.sgd.step()
                if self.gate is not None:
                    self._gate_sgd.step()
                losses.append(loss.item())
            mean = sum(losses) / len(losses)
            if warm:
                self.sgd.param_groups[0]["lr"] = usual
            elif self._cosine:
                self._scheduler.step()
            self._first = False
        return self._ctx.detach().clone(), mean, rates


def promptfl(
    setup: Setup,
    clients: Sequence[Client],
    ctx: Tensor,
    rounds: Sequence[Mapping[int, Batches]],
    model: Model,
    mu: float = 0.0,
) -> list[Outcome]:
    """Play PromptFL; the clients of ``rounds[t]`` are visited in the order of the mapping."""
    played = []
    for plan in rounds:
        sent, losses = {}, {}
        for i, batches in plan.items():
            sent[i], losses[i], _ = model.visit(clients[i], batches, ctx, mu=mu)
        ctx = average(sent, clients)
        with torch.no_grad():
            accuracy = [accuracy_of(logits_of(setup, ctx, c.test), c.test_labels) for c in clients]
        played.append(Outcome(ctx, {}, {}, losses, accuracy))
    return played


def pfedmoap(
    setup: Setup,
    clients: Sequence[Client],
    ctx: Tensor,
    rounds: Sequence[Mapping[int, Batches]],
    model: Model,
    *,
    local_weight: float,
    pick: Pick,
    pool_in_round: bool,
    inherit: bool,
) -> list[Outcome]:
    """Play pFedMoAP; the clients of ``rounds[t]`` are visited in the order of the mapping.

    ``pool_in_round``: a client's prompt replaces its old one in the pool as soon as it has trained.
    ``inherit``: a client that has no gate of its own is given none; it trains on with what the
    model holds.
    """
    pool: dict[int, Tensor] = {}
    gates: dict[int, Gate] = {}
    common = model.saved_gate()
    played = []
    trained_with: dict[int, list[Tensor]] = {}

    def encoded(of: Mapping[int, Tensor], chosen: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return [encode_text(setup.tower, setup.layout, of[j], False) for j in chosen]

    for t, plan in enumerate(rounds):
        before = dict(pool)
        sent, losses = {}, {}
        for i, batches in plan.items():
            seen = pool if pool_in_round else before
            experts = encoded(seen, pick(t, i, seen)) if i in seen else []
            if experts and (i in gates or not inherit):
                model.load_gate(gates.get(i, common))
            sent[i], losses[i], _ = model.visit(
                clients[i], batches, ctx, experts=experts, local_weight=local_weight
            )
            if experts:
                gates[i] = model.saved_gate()
            trained_with[i] = experts
            if pool_in_round:
                pool[i] = sent[i]
        ctx = average(sent, clients)
        pool |= sent
        accuracy = []
        for i, c in enumerate(clients):
            mine, experts = (pool[i], trained_with[i]) if i in pool else (ctx, [])
            with torch.no_grad():
                logits = logits_of(setup, mine, c.test, experts, gates.get(i), local_weight)
            accuracy.append(accuracy_of(logits, c.test_labels))
        played.append(Outcome(ctx, dict(pool), dict(gates), losses, accuracy))
    return played


def stopped_together(
    sim: Tensor, eps: float, mass: float, max_iter: int, thresh: float
) -> tuple[Tensor, int]:
    """Scale the kernels of a batch (B, C, P, N) until the mean change of v is small: plans, steps.

    u = min(1 / (P K v), 1), v = (mass / N) / (K^T u), from v = 1, in plain numbers.
    """
    n_patches, n_prompts = sim.shape[-2:]
    kernel = torch.exp(-(1 - sim) / eps)
    v = torch.ones_like(sim[..., :1, :])
    done = 0
    for _ in range(max_iter):
        u = (1 / (n_patches * (kernel * v).sum(-1, keepdim=True))).clamp(max=1)
        before, v = v, mass / n_prompts / (kernel * u).sum(-2, keepdim=True)
        done += 1
        if (v - before).abs().mean() < thresh:
            break
    return u * kernel * v, done
