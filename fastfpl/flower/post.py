"""How a server's letters reach clients and their answers come back, whatever carries them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fastfpl.errors import FastfplError
from fastfpl.flower.letters import Letter

__all__ = ["Exchange", "Outcome", "Post", "Taken", "exchange"]

Taken = TypeVar("Taken")


class Post(Protocol):
    """What carries letters: Flower's grid, or anything that does the same."""

    def nodes(self) -> Mapping[int, str]:
        """Return who can be reached now: node to registered name, empty without one."""

    def send(
        self, letters: Mapping[int, Letter], kind: str, round_: int, ttl: float
    ) -> Mapping[str, int]:
        """Send a letter to each node; return which number a letter got, and to whom it went.

        After ``ttl`` seconds a letter is worth nothing and is not delivered any more.
        """

    def fetch(self, numbers: Sequence[str]) -> Sequence[tuple[str, Letter | str]]:
        """Return the answers that are there, by their letters' numbers; a failure is its reason."""

    def now(self) -> float:
        """Return the time in seconds."""

    def wait(self) -> None:
        """Wait a moment."""


@dataclass
class Outcome(Generic[Taken]):
    """What came of an exchange, by node.

    Attributes
    ----------
    good : dict
        What was made of answers that were taken.
    refused, failed : dict
        Why an answer was not taken, or why there is none.
    absent : list
        Who did not answer in time.
    """

    good: dict[int, Taken] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)


class Exchange(Protocol):
    """What sends letters once and gathers answers: `exchange`, or another of its kind."""

    def __call__(
        self,
        post: Post,
        letters: Mapping[int, Letter],
        kind: str,
        round_: int,
        take: Callable[[int, Letter], Taken],
        *,
        need: int,
        grace: float,
        timeout: float,
    ) -> Outcome[Taken]:
        """Send letters and gather answers, see `exchange`."""
        ...


def exchange(
    post: Post,
    letters: Mapping[int, Letter],
    kind: str,
    round_: int,
    take: Callable[[int, Letter], Taken],
    *,
    need: int,
    grace: float,
    timeout: float,
) -> Outcome[Taken]:
    """Send letters and gather answers until all are there, or the rules end it.

    Parameters
    ----------
    post : Post
    letters : mapping from node to Letter
    kind : str
    round_ : int
    take : callable
        ``take(node, answer)`` checks an answer and makes something of it, or refuses it.
    need : int
        Good answers that are a quorum.
    grace : float
        Seconds for the others from the moment at which the quorum is there.
    timeout : float
        Seconds after which nobody is waited for; then letters are worth nothing any more.
    """
    found: Outcome[Taken] = Outcome()
    if not letters:
        return found
    begin = post.now()
    open_ = dict(post.send(letters, kind, round_, timeout))
    seen: set[int] = set()
    since = begin if need <= 0 else None
    while open_:
        for number, answer in post.fetch(list(open_)):
            node = open_.get(number)
            if node is None or node in seen:  # answered twice
                continue
            seen.add(node)
            if isinstance(answer, str):
                found.failed[node] = answer
                continue
            if answer.head.get("kind") == "refusal":
                found.failed[node] = str(answer.head.get("why"))[:2000]
                continue
            try:
                found.good[node] = take(node, answer)
            except FastfplError as error:
                found.refused[node] = str(error)
        open_ = {number: node for number, node in open_.items() if node not in seen}
        now = post.now()
        if since is None and len(found.good) >= need:
            since = now
        late = since is not None and now - since >= grace
        if not open_ or late or now - begin >= timeout:
            break
        post.wait()
    found.absent = sorted(open_.values())
    return found
