"""pFedMoAP as released: experts from one list, a pool that changes in the round, lent gates."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfpl.methods import PFedMoAP, State
from fastfpl.methods.pool import refreshed
from fastfpl.released.visits import Relayed
from fastfpl.seeds import generator

__all__ = ["InheritedGate", "PoolInRound", "SharedRandomExperts"]


class SharedRandomExperts(PFedMoAP):
    """Everybody walks one shuffled list of clients and takes the first others with a prompt.

    The list is drawn once from the seed.
    """

    def _preference(self, server: State, client: int, candidates: Tensor, round_: int) -> Tensor:
        """Order the candidates as the list has them."""
        draw = generator(self.task.seed, "experts", "list")
        place = torch.randperm(self.task.clients, generator=draw).argsort()
        return place[candidates.cpu()].argsort()


class PoolInRound(Relayed, PFedMoAP):
    """A client that has trained is in the pool at once: later ones of the round receive it."""

    def relay(self, server: State, client: int, upload: State, round_: int) -> State:
        """Put the prompt into the pool."""
        server = super().relay(server, client, upload, round_)
        return {**server, **refreshed(server, {client: upload}, {"pool_round": round_})}


class InheritedGate(Relayed, PFedMoAP):
    """A client's first gate is the one that was trained last, whosever it is."""

    def inherit(self, own: State, down: State, left: State) -> State:
        """Start without a gate of one's own from the one that was left, if it is to train."""
        own = super().inherit(own, down, left)
        gated = "experts" in down and "gate.w_q" not in own
        return {**own, **_gate(left)} if gated else own

    def leave(self, own: State) -> State:
        """Leave the gate."""
        return {**super().leave(own), **_gate(own)}


def _gate(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("gate.")}
