"""What every client's model is asked, and how it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastfpl.methods import Method, State
from fastfpl.ops.memory import current_limit, memory_limit
from fastfpl.training.feeds import Feed
from fastfpl.training.gathering import Share, gather, row, stack
from fastfpl.training.graphs import TextGraphs
from fastfpl.training.scoring import Scores, score
from fastfpl.training.trainer import Trainer

__all__ = ["Exam", "Examiner", "joined", "mark", "marks"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Exam:
    """A question of the scenario, ready to be asked.

    Attributes
    ----------
    name, about : str
    method : Method
        Over the classes of the question.
    feed : Feed
    images : list of ndarray
        Positions in the feed's split for each client.
    domains : tuple of str
        Visual domains of the split.
    """

    name: str
    about: str
    method: Method
    feed: Feed
    images: Sequence[Indices]
    domains: tuple[str, ...]


@dataclass
class Examiner:
    """Puts exams to the models of clients.

    Attributes
    ----------
    trainer : Trainer
        What clients trained with: its method is asked, and fine-tuned by it before where the
        method wants that.
    exams : list of Exam
        The first is the headline.
    clients : int
        Number of clients N.
    members : sequence of int or None
        Those of them that are asked here; None for all.
    """

    trainer: Trainer
    exams: list[Exam]
    clients: int
    members: Sequence[int] | None = None

    @property
    def asked(self) -> Sequence[int]:
        """Clients that are asked here."""
        return range(self.clients) if self.members is None else self.members

    def ask(
        self,
        round_: int,
        states: Callable[[int], tuple[State, State]],
        keep: Callable[[int, State], None] | None = None,
        clients: Sequence[int] | None = None,
    ) -> list[list[Scores]]:
        """Put every exam to every client's model after a round; one list of scores an exam.

        Parameters
        ----------
        round_ : int
            The round that was played last.
        states : callable
            ``states(client)`` returns what the client answers with, its download and its own.
        keep : callable, optional
            ``keep(client, own)`` is told what a client would keep of the fine-tuning before.
        clients : sequence of int, optional
            Those that are asked now, all who are asked here if left out.
        """
        trainer, method = self.trainer, self.trainer.method
        everyone = list(self.asked if clients is None else clients)
        if not everyone:
            return [[] for _ in self.exams]
        if not method.personal:
            # one global model serves every client
            one, _ = states(0)
            share = self.share(0, one, {})
            with memory_limit(share.text):
                down = stack([one])
                return [_answers(exam, everyone, down, {}, trainer.texts) for exam in self.exams]

        def share_of(client: int, down: State, own: State) -> Share:
            share = self.share(client, down, own)
            if method.tune_epochs:
                tuning = trainer.share(client, down, own, round_, self.forget)
                share = share.both(tuning)
            return share

        found: list[dict[int, Scores]] = [{} for _ in self.exams]
        alike = trainer.alike(everyone) if method.tune_epochs else None
        for part in gather(everyone, states, share_of, alike):
            members, own = part.members, part.own
            with memory_limit(part.share.text):
                if method.tune_epochs:
                    own = trainer.tuned(members, part.down, own, round_)
                    if keep is not None:
                        for u, client in enumerate(members):
                            keep(client, row(own, u))
                for scores, exam in zip(found, self.exams, strict=True):
                    answers = _answers(exam, members, part.down, own, trainer.texts)
                    scores |= dict(zip(members, answers, strict=True))
            trainer.observer(
                f"round {round_ + 1} of {trainer.settings.rounds}, evaluating",
                len(found[0]),
                len(everyone),
            )
        return [[scores[c] for c in everyone] for scores in found]

    def share(self, client: int, down: State, own: State) -> Share:
        """Say what the evaluation of clients with states like these may take."""
        budget, settings, method = self.trainer.budget, self.trainer.settings, self.trainer.method
        if budget is None:
            return Share(settings.cohort, current_limit())

        def ask(members: list[int], downs: State, owns: State) -> None:
            for exam in self.exams:
                longest = max((exam.images[c] for c in self.asked), key=len)
                images = dict.fromkeys(members, longest)
                score(exam.method, members, downs, owns, exam.feed, images, trial=True)

        # one global model serves all
        most = settings.cohort if method.personal else 1
        kind, apart = (down, own), method.apart
        return budget.share("evaluation", kind, apart, ask, client, None, most, self.forget)

    def forget(self) -> None:
        """Forget the text features of training and of every exam."""
        self.trainer.forget()
        for exam in self.exams:
            exam.method.task.text_features.clear()


def _answers(
    exam: Exam, members: Sequence[int], down: State, own: State, texts: TextGraphs | None
) -> list[Scores]:
    images = {c: exam.images[c] for c in members}
    scores = score(exam.method, members, down, own, exam.feed, images, texts=texts)
    return [scores[c] for c in members]


def mark(scores: Scores, domains: tuple[str, ...]) -> dict[str, Any]:
    """Say how one client did in one exam, in all and in the domains of its images."""
    by_domain = {}
    for d, name in enumerate(domains):
        right = scores.answers[scores.domains == d] == scores.labels[scores.domains == d]
        if len(right):
            by_domain[name] = float(right.mean())
    return {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "domains": by_domain}


def joined(each: Sequence[Mapping[str, Any] | None], domains: tuple[str, ...]) -> dict[str, Any]:
    """Join clients' marks of one exam: unweighted means over clients, in all and by domain.

    The figure of a domain is a mean over the clients that have test images of it. A client without
    a mark, which did not answer, is in no mean and None in ``clients``.
    """
    there = [one for one in each if one is not None]
    by_domain = {}
    for name in domains:
        shares = [one["domains"][name] for one in there if name in one["domains"]]
        if shares:
            by_domain[name] = math.fsum(shares) / len(shares)
    return {
        "accuracy": _mean([one["accuracy"] for one in there]),
        "macro_f1": _mean([one["macro_f1"] for one in there]),
        "clients": [None if one is None else one["accuracy"] for one in each],
        "domains": by_domain,
    }


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there)


def marks(scores: Sequence[Scores], domains: tuple[str, ...]) -> dict[str, Any]:
    """Say how one exam went where every client was asked, as `joined` does."""
    return joined([mark(s, domains) for s in scores], domains)
