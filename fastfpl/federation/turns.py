"""How the clients of a round train: together from one server, or one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastfpl.federation.cohort import Share, Trained, gather, stack, train, unstack
from fastfpl.federation.feeds import Feed, Observer
from fastfpl.methods import State
from fastfpl.ops.memory import memory_limit
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
    down : State
        What they had downloaded, stacked.
    outcome : Trained
    """

    members: list[int]
    down: State
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
        method, server = federation.method, federation.server
        images = {c: federation.shards[c].train for c in selected}

        def states(client: int) -> tuple[State, State]:
            own = dict(federation.clients.get(client, {}))
            return method.download(server, client, round_), own

        def share(client: int, down: State, own: State) -> Share:
            return federation.training_share(feed, round_, client, down, own)

        done = 0
        for part in gather(selected, states, share, federation.alike(selected)):
            tell = _observer(federation, round_, done, len(part.members), len(selected))
            with memory_limit(part.share.text):
                outcome = train(
                    method,
                    part.members,
                    part.down,
                    part.own,
                    feed,
                    images,
                    federation.settings,
                    round_,
                    tell,
                    graphs=federation.graphs,
                )
            done += len(part.members)
            yield Turn(part.members, part.down, outcome)


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
            own = dict(federation.clients.get(client, {}))
            if isinstance(method, Relayed):
                own = method.inherit(own, down, visits.left(self.state))
            share = federation.training_share(feed, round_, client, down, own)
            with memory_limit(share.text):
                outcome = train(
                    method,
                    [client],
                    stack([down]),
                    stack([own]),
                    feed,
                    images,
                    federation.settings,
                    round_,
                    _observer(federation, round_, number, 1, len(selected)),
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
            yield Turn([client], stack([down]), outcome)


def _observer(
    federation: Federation, round_: int, before: int, members: int, clients: int
) -> Observer:
    """Report the steps of one of a round's turns, after those of so many clients."""

    def tell(what: str, done: int, total: int) -> None:
        federation.observer(
            f"round {round_ + 1} of {federation.settings.rounds}, {what}",
            before * total + done * members,
            clients * total,
        )

    return tell
