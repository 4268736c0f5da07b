"""Clients that come after the others: the federation goes on for each alone, on a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastfpl.federation.exams import Exam
from fastfpl.federation.models import answers_with
from fastfpl.federation.server import Round
from fastfpl.methods import Method, State
from fastfpl.ops.memory import memory_limit
from fastfpl.training.cohort import learning_rate
from fastfpl.training.gathering import row, stack
from fastfpl.training.scoring import Scores, score
from fastfpl.training.trainer import Trainer

__all__ = ["Newcomer", "Newcomers", "join", "stranger"]


@dataclass(frozen=True, eq=False)
class Newcomer:
    """What a client that came later answers with.

    Attributes
    ----------
    method : Method
        With room for it.
    down, own : State
        As `answers_with` has them.
    loss : float or None
        Of its last epoch; None if it has only been fine-tuned, or has not trained.
    """

    method: Method
    down: State
    own: State
    loss: float | None = None

    def answers(self, exam: Exam, number: int, place: int) -> Scores:
        """Ask it about the images of one place of an exam."""
        images = {number: exam.images[place]}
        down, own = stack([self.down]), stack([self.own])
        return score(self.method, [number], down, own, exam.feed, images)[number]


def stranger(method: Method, now: Round, name: str, domain: int | None) -> Newcomer:
    """Return a client that comes and has not trained: it answers with what it downloads."""
    admitted, server = method.admit(now.server, name, domain)
    place = admitted.task.clients
    return Newcomer(admitted, *answers_with(admitted, server, {}, {}, place, now.number))


def join(
    trainer: Trainer,
    now: Round,
    number: int,
    name: str,
    domain: int | None,
    participations: int | None = None,
) -> Newcomer:
    """Let a client join a federation whose rounds are over, by the method's own rule.

    The federation goes on for rounds in which this client alone is called, on a copy of the server:
    it downloads, trains for the settings' local epochs, keeps what the method keeps, and its upload
    alone is merged, so that it answers as any client would after its last round. The schedule of
    learning rates begins anew. A method that fine-tunes before an evaluation does that instead.

    Parameters
    ----------
    trainer : Trainer
        With the images of ``number``.
    now : Round
        After the last round; not changed.
    number : int
        Of the newcomer, among all that train here: names its images, and the draws of their order.
    name : str
        What else is drawn for it depends on this and on the seed.
    domain : int or None
        See `Method.admit`.
    participations : int, optional
        Rounds; `Method.joins` if left out.
    """
    method, server = trainer.method.admit(now.server, name, domain)
    # its steps have other tensors than those that were captured
    mine = replace(trainer, method=method, graphs=None)
    place, alone = method.task.clients, replace(now, server=server)
    mine.forget()
    if not method.trains:
        return stranger(trainer.method, now, name, domain)
    if method.tune_epochs:
        down, own = answers_with(method, server, {}, {}, place, now.number)
        with memory_limit(mine.share(number, down, own, now.number).text):
            tuned = mine.tuned([number], stack([down]), stack([own]), now.number - 1)
        return Newcomer(method, down, row(tuned, 0))
    rounds = method.joins if participations is None else participations
    own, loss = {}, None
    settings = trainer.settings.model_copy(update={"rounds": rounds})
    epochs = settings.local_epochs
    downloads: dict[int, State] = {}
    for k in range(rounds):
        down = alone.download(method, place)
        with memory_limit(mine.share(number, down, own, alone.number).text):
            outcome = mine.train(
                [number],
                stack([down]),
                stack([own]),
                alone.number,
                trainer.observer,
                factors=[learning_rate(settings, k, epoch, epochs) for epoch in range(epochs)],
            )
        own, loss = row(outcome.own, 0), outcome.losses[0].item()
        if method.evaluates_download == "trained":
            downloads[place] = down
        upload = row(outcome.upload, 0)
        uploads = {place: upload} if upload else {}
        counts = {c: len(trainer.images[number]) for c in uploads}
        alone = alone.after(method, uploads, counts, {})
    down, own = answers_with(method, alone.server, {place: own}, downloads, place, alone.number)
    mine.forget()
    return Newcomer(method, down, own, loss)


@dataclass(frozen=True, eq=False)
class Newcomers:
    """The clients of a run that never train with the others, and what they are asked.

    Attributes
    ----------
    adapted : Exam
        Asked after each has joined: the headline.
    before : Exam
        The same images, asked before.
    domains : tuple of int or None
        Visual domain of each client's images, None where they come from several.
    """

    adapted: Exam
    before: Exam
    domains: tuple[int | None, ...]

    @property
    def exams(self) -> list[Exam]:
        """Both, the headline first."""
        return [self.adapted, self.before]

    def ask(
        self,
        trainer: Trainer,
        now: Round,
        keep: Callable[[int, State], None] | None,
        places: Sequence[int] | None = None,
    ) -> list[list[Scores]]:
        """Let each client join, and put both exams to it; one list of scores an exam.

        ``keep(number, state)`` is told what each answers with, names begin with ``down.`` or
        ``own.``. ``places`` are those that join here, all if left out.
        """
        first = trainer.method.task.clients
        found: Sequence[list[Scores]] = ([], [])
        for place in range(len(self.domains)) if places is None else places:
            number, domain = first + place, self.domains[place]
            one = join(trainer, now, number, str(number), domain)
            other = stranger(trainer.method, now, str(number), domain)
            found[0].append(one.answers(self.adapted, number, place))
            found[1].append(other.answers(self.before, number, place))
            if keep is not None:
                down = {f"down.{n}": t for n, t in one.down.items()}
                keep(number, {**down, **{f"own.{n}": t for n, t in one.own.items()}})
        return list(found)
