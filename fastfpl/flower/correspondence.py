"""What the server of a networked run asks of clients, and how it waits for a quorum of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastfpl.errors import InputError, cut
from fastfpl.flower.checks import Card, check_card
from fastfpl.flower.letters import SCHEMA, Letter
from fastfpl.flower.post import Exchange, Outcome, Post, exchange
from fastfpl.flower.roster import Roster
from fastfpl.flower.rules import Rules
from fastfpl.flower.status import Status

__all__ = ["Correspondence"]

_LATER = 60.0  # seconds after which a node that failed to join is asked again

Taken = TypeVar("Taken")


@dataclass
class Correspondence:
    """Letters to clients, and their answers.

    Attributes
    ----------
    post : Post
    rules : Rules
    roster : Roster
    status : Status
    identity : dict from str to str
        Digests of the server, which those of a client that joins must equal.
    memory : dict from client to int
        Bytes of the largest process that has answered for a client.
    faces : dict from op to set of str
        Faces that have answered at any client.
    """

    post: Post
    rules: Rules
    roster: Roster
    status: Status
    identity: dict[str, str]
    memory: dict[int, int] = field(default_factory=dict)
    faces: dict[str, set[str]] = field(default_factory=dict)

    def gather(self, clients: int, task: str | None) -> Card:
        """Wait until all clients have joined, or patience ends and a quorum has.

        Parameters
        ----------
        clients : int
            How many there are, as long as none has said so.
        task : str or None
            Digest of classes, domains and clients of the checkpoint that the run goes on from.

        Returns
        -------
        Card
            One with the classes, domains, clients and exams of the run.
        """
        roster, patience = self.roster, self.rules.patience
        begin = self.post.now()
        self.status.tell("waiting for clients")
        while True:
            self.greet(self.rules.timeout)
            head = roster.most(task)
            wanted = clients if head is None else head.clients
            there = 0 if head is None else roster.agreeing(head)
            need = self.rules.enough(wanted)
            waited = self.post.now() - begin >= patience
            complete = len(roster.nodes) >= wanted
            if head is not None and there >= need and (waited or complete):
                break
            if waited:
                why = roster.reasons(task)
                raise InputError(
                    f"fastfpl.flower: {need} of {wanted} clients must join within "
                    f"patience={patience:g} s; got {there}"
                    + (f"; turned away: {cut(why, 1200)}" if why else "; start their SuperNodes")
                )
            self.post.wait()
        for client, why in roster.begin(head).items():
            self.status.note("refused", client, why)
        if there < wanted:
            self.status.log(f"begins with {there} of {wanted} clients; the others may join later")
        return head

    def greet(self, timeout: float) -> None:
        """Let nodes that are new join, and forget those that have gone."""
        roster, status = self.roster, self.status
        nodes = self.post.nodes()
        for client in roster.leave(nodes):
            status.log(f"client {client} has left")
        new = roster.strangers(nodes, self.post.now())
        if not new:
            return
        letter = Letter({"schema": SCHEMA, "kind": "join", "federation": status.federation})
        outcome = exchange(
            self.post,
            dict.fromkeys(new, letter),
            "join",
            status.rounds_done,
            lambda node, answer: (check_card(answer), answer.head),
            need=len(new),
            grace=0.0,
            timeout=timeout,
        )
        for node in sorted(outcome.good, key=lambda n: outcome.good[n][0].client):
            card, head = outcome.good[node]
            why = roster.admit(card, node, nodes[node], self.identity)
            if why is not None:
                status.note("refused", card.client, why)
                continue
            self._hear(card.client, head)
            status.log(f"client {card.client} has joined with {card.images} images")
        for node, why in outcome.refused.items():
            roster.turned[node] = why
            status.note("refused", None, why)
        for node, why in outcome.failed.items():  # it may be better the next time
            roster.later[node] = self.post.now() + _LATER, why
            status.note("failed", None, why)
        status.tell()

    def reach(
        self,
        kind: str,
        round_: int,
        clients: Sequence[int],
        letter: Callable[[int], Letter],
        take: Callable[[int, Letter, Letter], Taken],
        told: dict[str, Any],
        how: Exchange = exchange,
    ) -> dict[int, Taken]:
        """Send to clients until a quorum has answered well: what was taken, by client.

        Who did not answer, or badly, is sent the same again until patience ends; clients answer
        what they answered before from disk.

        Parameters
        ----------
        kind : str
        round_ : int
        clients : sequence of int
        letter : callable
            ``letter(client)`` is what is sent.
        take : callable
            ``take(client, letter, answer)`` checks an answer and makes something of it, or
            refuses it.
        told : dict
            What a row says of answers that were ``refused``, ``failed`` or ``absent``.
        how : callable
            What sends letters and gathers answers, once, as `fastfpl.flower.post.exchange` does.
        """
        status, need = self.status, self.rules.enough(len(clients))
        begin, pause = self.post.now(), 1.0
        found: dict[int, Taken] = {}
        while True:
            # one that joined twice meanwhile has two nodes, of which the last one counts
            nodes = self.roster.nodes
            places = {nodes[c]: c for c in clients if c in nodes and c not in found}
            letters = {node: letter(client) for node, client in places.items()}
            outcome: Outcome[Taken] = how(
                self.post,
                letters,
                kind,
                round_,
                partial(self._taken, take, places, letters),
                need=need - len(found),
                grace=self.rules.grace,
                timeout=self.rules.timeout,
            )
            found |= {places[node]: one for node, one in outcome.good.items()}
            for what in ("refused", "failed"):
                for node, why in getattr(outcome, what).items():
                    told[what].append({"client": places[node], "why": why[:2000]})
                    status.note(what, places[node], why)
            if outcome.refused or outcome.failed:
                status.tell()
            if len(found) >= need:
                break
            if self.post.now() - begin >= self.rules.patience:
                last = [entry["why"] for what in ("refused", "failed") for entry in told[what]]
                raise InputError(
                    f"fastfpl.flower: {need} of {len(clients)} clients must answer in round "
                    f"{round_ + 1} within patience={self.rules.patience:g} s; got {len(found)}"
                    + (f", the last: {cut(last[-1], 800)}" if last else "")
                    + "; the rounds that ended are kept, go on by resume"
                )
            self._pause(pause)
            pause = min(2 * pause, 60.0)
            self.greet(self.rules.grace)
        said = {entry["client"] for what in ("refused", "failed") for entry in told[what]}
        absent = [c for c in clients if c not in found and c not in said]
        told["absent"] += [{"client": c, "asked": kind} for c in absent]
        status.counts["absent"] += len(absent)
        return found

    def _taken(
        self,
        take: Callable[[int, Letter, Letter], Taken],
        places: Mapping[int, int],
        letters: Mapping[int, Letter],
        node: int,
        answer: Letter,
    ) -> Taken:
        """Take the answer of a node as that of its client."""
        taken = take(places[node], letters[node], answer)
        self._hear(places[node], answer.head)
        return taken

    def _hear(self, client: int, head: Mapping[str, Any]) -> None:
        """Note what a client says of its process, if it is what it should be."""
        memory, faces = head.get("memory"), head.get("faces")
        if isinstance(memory, int) and 0 < memory < 2**50:
            self.memory[client] = max(memory, self.memory.get(client, 0))
        if isinstance(faces, dict) and len(faces) < 100:
            for op, names in faces.items():
                if isinstance(names, list) and len(names) < 20 and len(op) < 100:
                    good = {n for n in names if isinstance(n, str) and 0 < len(n) < 100}
                    self.faces.setdefault(op, set()).update(good)

    def _pause(self, seconds: float) -> None:
        """Wait so long, and no longer than patience."""
        end = self.post.now() + min(seconds, self.rules.patience)
        while self.post.now() < end:
            self.post.wait()
