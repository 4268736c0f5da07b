"""Letters between a server and clients in one process: its own clock, and planted faults."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastfpl.flower.letters import Letter

__all__ = ["FakeSite", "Mailbox"]

#: What becomes of a letter: None as usual; "drop"; "error"; a number of seconds to be late by; or a
#: function that changes the answer.
Fault = Any


class Mailbox:
    """A `Post` whose clients are objects with ``answer``.

    Parameters
    ----------
    sites : mapping from client to site
    fault : callable, optional
        ``fault(client, letter)`` says what becomes of a letter.
    """

    def __init__(
        self,
        sites: Mapping[int, Any],
        fault: Callable[[int, Letter], Fault] | None = None,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.sites = dict(sites)
        self.fault = fault or (lambda client, letter: None)
        self.names = dict(names or {})
        self.time = 0.0
        self.sent: list[tuple[int, Letter]] = []
        self.answered: list[tuple[int, Letter]] = []
        self._box: dict[str, tuple[float, Letter | str]] = {}
        self._number = 0

    def nodes(self) -> Mapping[int, str]:
        return {self.node(c): self.names.get(c, "") for c in self.sites}

    @staticmethod
    def node(client: int) -> int:
        return 1000 + client

    def send(
        self, letters: Mapping[int, Letter], kind: str, round_: int, ttl: float
    ) -> Mapping[str, int]:
        numbers = {}
        for node, letter in letters.items():
            client = node - 1000
            self._number += 1
            number = str(self._number)
            numbers[number] = node
            self.sent.append((client, letter))
            fault = self.fault(client, letter)
            if fault == "drop" or client not in self.sites:
                continue
            if fault == "error":
                self._box[number] = self.time, "the process died"
                continue
            answer = self.sites[client].answer(copy.deepcopy(letter))
            late = fault if isinstance(fault, float) else 0.0
            if callable(fault):
                answer = fault(answer)
            if late < ttl:
                self.answered.append((client, answer))
                self._box[number] = self.time + late, answer
        return numbers

    def fetch(self, numbers: Sequence[str]) -> Sequence[tuple[str, Letter | str]]:
        there = [n for n in numbers if n in self._box and self._box[n][0] <= self.time]
        answers = [(n, self._box.pop(n)[1]) for n in there]
        return answers + answers  # everybody answers twice

    def now(self) -> float:
        return self.time

    def wait(self) -> None:
        self.time += 1.0


class FakeSite:
    """A client that moves what it gets by a step of its own: no images, no training."""

    def __init__(self, real_card: Letter, client: int, images: int, step: float) -> None:
        head = copy.deepcopy(real_card.head)
        self.head = {**head, "client": client, "images": images}
        self.client, self.images, self.step = client, images, step

    def answer(self, letter: Letter) -> Letter:
        from fastfpl.flower.letters import digest, pack, unpack

        head = letter.head
        if head["kind"] == "join":
            return Letter(dict(self.head))
        same = {key: head[key] for key in ("schema", "federation", "client", "round")}
        if head["kind"] == "ask":
            marks = [
                {
                    "name": exam["name"],
                    "images": exam["images"],
                    "accuracy": 0.5,
                    "macro_f1": 0.5,
                    "domains": {},
                }
                for exam in self.head["exams"]
            ]
            return Letter({**same, "kind": "marks", "marks": marks})
        moved = {name: t + self.step for name, t in unpack(letter.arrays).items()}
        return Letter(
            {
                **same,
                "kind": "update",
                "asked": digest(letter.arrays),
                "images": self.images,
                "loss": 1.0,
                "seen": self.images,
            },
            pack(moved),
        )
