"""Who has joined a networked run, as what, and why others may not."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastfpl.flower.checks import Card
from fastfpl.flower.identity import differing, digest_of

__all__ = ["Roster"]


@dataclass
class Roster:
    """The clients of a run.

    Attributes
    ----------
    own : bool
        Whether every client has images of its own.
    known : dict from client to dict
        What is said of every client that was ever there: ``images``, ``exams``, and of its own
        images what must stay.
    nodes : dict from client to int
        Which node a client is, of those that are there.
    cards : dict from client to Card
        Of those that have joined, also where they have left.
    holding : set of int
        Clients that have kept what they answer exams with.
    turned : dict from node to str
        Why a node may not join.
    later : dict from node to (float, str)
        When a node that failed to join may be asked again, and what failed.
    head : Card or None
        One with the classes, domains, clients and exams that the run was begun with.
    """

    own: bool
    known: dict[int, dict[str, Any]] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    cards: dict[int, Card] = field(default_factory=dict)
    holding: set[int] = field(default_factory=set)
    turned: dict[int, str] = field(default_factory=dict)
    later: dict[int, tuple[float, str]] = field(default_factory=dict)
    head: Card | None = None

    @property
    def names(self) -> list[str]:
        """What the clients are called; nothing if they are but numbers."""
        assert self.head is not None
        if not self.own:
            return list(self.head.data["clients"] or ())
        known = [self.known.get(c, {}) for c in range(self.head.clients)]
        return [one.get("name", f"client-{c}") for c, one in enumerate(known)]

    # -- who comes and goes ------------------------------------------------------------------

    def leave(self, nodes: Container[int]) -> list[int]:
        """Forget the nodes that have gone: whose they were."""
        gone = [client for client, node in self.nodes.items() if node not in nodes]
        for client in gone:
            del self.nodes[client]
        return gone

    def strangers(self, nodes: Iterable[int], now: float) -> list[int]:
        """Return the nodes that are to be asked to join."""
        known = {*self.turned, *self.nodes.values()}
        known |= {node for node, (until, _) in self.later.items() if now < until}
        return [node for node in nodes if node not in known]

    def admit(self, card: Card, node: int, name: str, identity: Mapping[str, str]) -> str | None:
        """Let a client join, or say why it may not.

        Parameters
        ----------
        card : Card
        node : int
        name : str
            By which the node is registered.
        identity : mapping
            Digests of the server, which the client's must equal.
        """
        why = self._against(card, node, name, identity)
        if why is not None:
            self.turned[node] = why
            return why
        self.nodes[card.client] = node
        self.cards[card.client] = card
        if card.held:
            self.holding.add(card.client)
        self.known[card.client] = {
            "images": card.images,
            "exams": [exam["images"] for exam in card.exams],
            **(_own_facts(card) if self.own else {}),
        }
        return None

    # -- what the run is begun with ----------------------------------------------------------

    def most(self, task: str | None) -> Card | None:
        """Return a card with the classes, domains, clients and exams that most have.

        Of a run that is resumed, with those of its checkpoint, whose digest is ``task``.
        """
        cards = [card for client, card in sorted(self.cards.items()) if client in self.nodes]
        if task is not None:
            cards = [card for card in cards if card.task == task]
        return max(cards, key=lambda card: sum(_like(c, card) for c in cards), default=None)

    def agreeing(self, head: Card) -> int:
        """Count those that are there with the classes, domains, clients and exams of a card."""
        return sum(_like(self.cards[client], head) for client in self.nodes)

    def reasons(self, task: str | None) -> str:
        """Say why no more clients have joined, as far as that is known."""
        why = [*self.turned.values(), *(failed for _, failed in self.later.values())]
        here = [self.cards[client] for client in self.nodes]
        if here and self.most(task) is None:
            why.append(
                "fastfpl.flower: classes, domains and clients must be those of the "
                f"checkpoint, {task}; got {here[0].task}"
            )
        return "; ".join(dict.fromkeys(why))

    def begin(self, head: Card) -> dict[int, str]:
        """Begin a run with the classes, domains, clients and exams of a card.

        Who differs is turned away: why, by client.
        """
        self.head = head
        away: dict[int, str] = {}
        for client, card in sorted(self.cards.items()):
            why = self._other(card)
            if why is not None and client in self.nodes:
                self.turned[self.nodes.pop(client)] = away[client] = why
                self.known.pop(client, None)
        self.cards = {c: card for c, card in self.cards.items() if c in self.nodes}
        return away

    # -- who may not join --------------------------------------------------------------------

    def _against(self, card: Card, node: int, name: str, identity: Mapping[str, str]) -> str | None:
        """Say why a client may not join."""
        who = f"from client {card.client}"
        found = differing(identity, card.identity)
        if found is not None:
            return f"fastfpl.flower: {found} {who}"
        other = self._other(card)
        if other is not None:
            return other
        if name.startswith("client-") and name != f"client-{card.client}":
            return (
                f"fastfpl.flower: the node registered as {name} must join as that client; got "
                f"client {card.client}"
            )
        taken = self.nodes.get(card.client)
        if taken is not None and taken != node:
            return (
                f"fastfpl.flower: a client must be one node; got client {card.client} from node "
                f"{node}, which node {taken} is already"
            )
        before = self.known.get(card.client)
        if before is not None and before["images"] != card.images:
            return (
                f"fastfpl.flower: client {card.client} must keep its {before['images']} training "
                f"images; got {card.images}"
            )
        return self._against_own(card, before) if self.own else None

    def _against_own(self, card: Card, before: Mapping[str, Any] | None) -> str | None:
        """Say what is wrong with the name or the images of a client that has its own."""
        mine = _own_facts(card)
        if before is not None and any(before.get(key) != mine[key] for key in mine):
            was = {key: before.get(key) for key in mine}
            return (
                f"fastfpl.flower: client {card.client} must keep its name and images, "
                f"{digest_of(was)}; got {digest_of(mine)}"
            )
        for other, said in self.known.items():
            if other != card.client and said.get("name") == mine["name"]:
                return (
                    f"fastfpl.flower: clients must have names of their own; got {mine['name']!r} "
                    f"from client {card.client}, which client {other} has"
                )
        return None

    def _other(self, card: Card) -> str | None:
        """Say in what a client's data differ from those that the run was begun with."""
        head, who = self.head, f"from client {card.client}"
        if head is None:
            return None
        if card.classes != head.classes:
            return (
                "fastfpl.flower: the list of classes must be the server's, "
                f"{digest_of(head.classes)}; got {digest_of(card.classes)} {who}"
            )
        if card.task != head.task:
            return (
                f"fastfpl.flower: domains and clients must be the server's, {head.task}; got "
                f"{card.task} {who}"
            )
        if _exams(card) != _exams(head):
            return (
                f"fastfpl.flower: exams must be the server's, {digest_of(_exams(head))}; got "
                f"{digest_of(_exams(card))} {who}"
            )
        return None


def _own_facts(card: Card) -> dict[str, Any]:
    """Return what of a client's own images must stay, and what a result says of them."""
    return {
        "name": card.name or f"client-{card.client}",
        "train": card.data["train_images"],
        "test": list(card.data["test_images"]),
        "skipped": card.data["skipped"],
        "there": card.data["training"]["there"],
        "notes": list(card.data["notes"]),
    }


def _like(one: Card, other: Card) -> bool:
    """Whether two clients know the same classes, domains, clients and exams."""
    return one.task == other.task and _exams(one) == _exams(other)


def _exams(card: Card) -> list[Any]:
    return [[exam["name"], exam["domains"]] for exam in card.exams]
