"""Who trains when, and whose upload never arrives: drawn from the seed and the round alone."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.seeds import generator

__all__ = ["Call", "Sampling", "asked_clients"]


@dataclass(frozen=True)
class Call:
    """Who is called in one round.

    Attributes
    ----------
    selected : sequence of int
        Clients that train, ascending.
    drawn : sequence of int
        The same, in the order in which they were drawn.
    lost : set of int
        Those of them whose uploads never arrive.
    """

    selected: Sequence[int]
    drawn: Sequence[int]
    lost: Set[int]

    def of(self, clients: Set[int]) -> Call:
        """Return what of the call is for some of the clients."""
        return Call(
            [c for c in self.selected if c in clients],
            [c for c in self.drawn if c in clients],
            self.lost & clients,
        )


def asked_clients(settings: Settings, clients: int) -> Sequence[int]:
    """Draw once who of so many clients is asked in a run, ascending; all unless settings say so.

    Raises
    ------
    InputError
        If more are wanted than there are.
    """
    wanted = settings.evaluate_clients
    if wanted is None:
        return range(clients)
    count = wanted if isinstance(wanted, int) else max(int(wanted * clients + 1e-9), 1)
    if count > clients:
        raise InputError(
            f"fastfpl.run: evaluate_clients must be at most the {clients} clients; got {wanted}"
        )
    draw = generator(settings.seed, "evaluate")
    found: list[int] = torch.randperm(clients, generator=draw)[:count].tolist()
    return sorted(found)


@dataclass
class Sampling:
    """How clients are drawn.

    Attributes
    ----------
    settings : Settings
    clients : int
        Number of clients N.
    client_domains : tuple of int or None
        Domain of each client, if each has one.
    all_first : bool
        Whether everybody trains in round 0.
    """

    settings: Settings
    clients: int
    client_domains: tuple[int, ...] | None = None
    all_first: bool = False

    def call(self, round_: int) -> Call:
        """Say who trains in a round, and whose uploads are lost."""
        selected = self.sample(round_)
        return Call(selected, self.drawn(round_), self.lost(round_, selected))

    def sample(self, round_: int) -> list[int]:
        """Say which clients train in a round, ascending.

        max(int(participation · N), 1) of them, or one of each domain; all in round 0 if the method
        wants it.
        """
        return sorted(self.drawn(round_))

    @property
    def fewest(self) -> int:
        """How many clients train in the round that calls fewest."""
        rounds = range(min(self.settings.rounds, 2))  # the first may call all
        return min(len(self.sample(round_)) for round_ in rounds)

    def drawn(self, round_: int) -> list[int]:
        """Draw the clients that train in a round, in the order in which they were drawn."""
        if round_ == 0 and self.all_first:
            return list(range(self.clients))
        draw = generator(self.settings.seed, "sample", round_)
        order = torch.randperm(self.clients, generator=draw)
        if self.settings.sampling == "domain":
            assert self.client_domains is not None
            first: dict[int, int] = {}
            for client in order.tolist():
                first.setdefault(self.client_domains[client], client)
            return list(first.values())
        # the small addend keeps 0.29 · 100 = 28.999999999999996 from losing a client
        count = max(int(self.settings.participation * self.clients + 1e-9), 1)
        chosen: list[int] = order[:count].tolist()
        return chosen

    def lost(self, round_: int, selected: Sequence[int]) -> set[int]:
        """Draw whose uploads never arrive."""
        if not self.settings.dropout:
            return set()
        draw = generator(self.settings.seed, "dropout", round_)
        luck = torch.rand(self.clients, generator=draw, dtype=torch.float32)
        return {c for c in selected if luck[c].item() < self.settings.dropout}
