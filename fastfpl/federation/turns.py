"""How the clients of a round train: together from one server, or one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastfpl.federation.cohort import Trained, stack, train, unstack
from fastfpl.federation.feeds import Feed, Observer
from fastfpl.methods import State
from fastfpl.released import Relayed, Visits

if TYPE_CHECKING:
    from fastfpl.federation.rounds import Federation

__all__ = ["InTurn", "Together", "Turn"]


@dataclass(frozen=True, eq=False)
class Turn:
    """What one cohort's turn in a round was.

    Attributes
    ----------
    members : list of int
        Client numbers.
    downs : dict from client to State
        What each had downloaded.
    outcome : Trained
    """

    members: list[int]
    downs: dict[int, State]
    outcome: Trained


class Together:
    """Every client starts from what the server held before the round; cohorts share passes.

    Attributes
    ----------
    state : State
        Empty: nothing passes from one client to another but through the server.
    """

    def __init__(self) -> None:
        self.state: State = {}

    def turns(
        self,
        federation: Federation,
        feed: Feed,
        round_: int,
        selected: Sequence[int],
        lost: Set[int],
    ) -> Iterator[Turn]:
        """Train the selected clients, cohort by cohort."""
        method, images = federation.method, {c: federation.shards[c].train for c in selected}
        downs = {c: method.download(federation.server, c, round_) for c in selected}
        owns = {c: federation.clients.get(c, {}) for c in selected}
        cohorts = federation.cohorts(selected, downs, owns)
        for number, members in enumerate(cohorts):
            outcome = train(
                method,
                members,
                stack([downs[c] for c in members]),
                stack([owns[c] for c in members]),
                feed,
                images,
                federation.settings,
                round_,
                _observer(federation, round_, number, len(cohorts)),
                graphs=federation.graphs,
            )
            yield Turn(members, {c: downs[c] for c in members}, outcome)


class InTurn:
    """Clients train one after another in the order they were drawn; the next one inherits.

    Only quirks of released code ask for it, see `fastfpl.released`: ``visits`` says what passes
    from client to client.

    Attributes
    ----------
    state : State
        What the next client inherits; part of a checkpoint.
    """

    def __init__(self, visits: Visits) -> None:
        self.state: State = {}
        self._visits = visits

    def turns(
        self,
        federation: Federation,
        feed: Feed,
        round_: int,
        selected: Sequence[int],
        lost: Set[int],
    ) -> Iterator[Turn]:
        """Train the drawn clients, one by one."""
        method, server, visits = federation.method, federation.server, self._visits
        images = {c: federation.shards[c].train for c in selected}
        for number, client in enumerate(federation.drawn(round_)):
            down = method.download(server, client, round_)
            own = federation.clients.get(client, {})
            if isinstance(method, Relayed):
                own = method.inherit(own, down, visits.left(self.state))
            outcome = train(
                method,
                [client],
                stack([down]),
                stack([own]),
                feed,
                images,
                federation.settings,
                round_,
                _observer(federation, round_, number, len(selected)),
                factors=visits.factors(self.state, federation.settings.local_epochs),
                momentum=visits.momentum(self.state),
                graphs=federation.graphs,
            )
            left: State = {}
            if isinstance(method, Relayed):
                left = method.leave(unstack(outcome.own, 1)[0])
                if client not in lost:
                    upload = unstack(outcome.upload, 1)[0]
                    server = method.relay(server, client, upload, round_)
            self.state = visits.after(
                self.state, federation.settings.local_epochs, outcome.momentum, left
            )
            yield Turn([client], {client: down}, outcome)


def _observer(federation: Federation, round_: int, number: int, count: int) -> Observer:
    """Report the steps of one of a round's turns."""

    def tell(what: str, done: int, total: int) -> None:
        federation.observer(
            f"round {round_ + 1} of {federation.settings.rounds}, {what}",
            number * total + done,
            count * total,
        )

    return tell
