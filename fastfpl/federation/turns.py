"""How the clients of a round train: together from one server, or one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fastfpl.federation.sampling import Call
from fastfpl.federation.server import Round
from fastfpl.methods import State
from fastfpl.ops.memory import memory_limit
from fastfpl.released import Relayed, Visits
from fastfpl.training.cohort import Trained
from fastfpl.training.feeds import Observer
from fastfpl.training.gathering import Share, gather, stack, unstack
from fastfpl.training.trainer import Trainer

__all__ = ["InTurn", "Kept", "Together", "Turn"]

#: What clients keep, by client.
Kept = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Turn:
    """What one cohort's turn in a round was.

    Attributes
    ----------
    members : list of int
        Client numbers.
    down : State
        What they had downloaded, stacked.
    outcome : Trained
    handed : State
        What the next client inherits.
    """

    members: list[int]
    down: State
    outcome: Trained
    handed: State


class Together:
    """Every client starts from what the server held before the round; cohorts share passes.

    Nothing passes from one client to another but through the server.
    """

    def turns(self, trainer: Trainer, now: Round, call: Call, kept: Kept) -> Iterator[Turn]:
        """Train the selected clients, cohort by cohort."""

        def states(client: int) -> tuple[State, State]:
            return now.download(trainer.method, client), dict(kept.get(client, {}))

        def share(client: int, down: State, own: State) -> Share:
            return trainer.share(client, down, own, now.number)

        done, clients = 0, len(call.selected)
        for part in gather(call.selected, states, share, trainer.alike(call.selected)):
            tell = _observer(trainer, now.number, done, len(part.members), clients)
            with memory_limit(part.share.text):
                outcome = trainer.train(part.members, part.down, part.own, now.number, tell)
            done += len(part.members)
            yield Turn(part.members, part.down, outcome, now.handed)


class InTurn:
    """Clients train one after another in the order they were drawn; the next one inherits.

    Only quirks of released code ask for it, see `fastfpl.released`: ``visits`` says what passes
    from client to client.
    """

    def __init__(self, visits: Visits) -> None:
        self._visits = visits

    def turns(self, trainer: Trainer, now: Round, call: Call, kept: Kept) -> Iterator[Turn]:
        """Train the drawn clients, one by one."""
        method, server, visits, round_ = trainer.method, now.server, self._visits, now.number
        epochs, handed = trainer.settings.local_epochs, now.handed
        for number, client in enumerate(call.drawn):
            down = method.download(server, client, round_)
            own = dict(kept.get(client, {}))
            if isinstance(method, Relayed):
                own = method.inherit(own, down, visits.left(handed))
            share = trainer.share(client, down, own, round_)
            with memory_limit(share.text):
                outcome = trainer.train(
                    [client],
                    stack([down]),
                    stack([own]),
                    round_,
                    _observer(trainer, round_, number, 1, len(call.selected)),
                    factors=visits.factors(handed, epochs),
                    momentum=visits.momentum(handed),
                )
            left: State = {}
            if isinstance(method, Relayed):
                left = method.leave(unstack(outcome.own, 1)[0])
                if client not in call.lost:
                    upload = unstack(outcome.upload, 1)[0]
                    server = method.relay(server, client, upload, round_)
            handed = visits.after(handed, epochs, outcome.momentum, left)
            yield Turn([client], stack([down]), outcome, handed)


def _observer(trainer: Trainer, round_: int, before: int, members: int, clients: int) -> Observer:
    """Report the steps of one of a round's turns, after those of so many clients."""

    def tell(what: str, done: int, total: int) -> None:
        trainer.observer(
            f"round {round_ + 1} of {trainer.settings.rounds}, {what}",
            before * total + done * members,
            clients * total,
        )

    return tell
