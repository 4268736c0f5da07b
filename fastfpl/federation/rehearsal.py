"""Cohorts of a run on trial, before any round is played."""

from __future__ import annotations

from torch import Tensor

from fastfpl.federation.exams import Examiner
from fastfpl.federation.server import Round
from fastfpl.methods import State
from fastfpl.ops.memory import memory_limit
from fastfpl.training.gathering import row, stack

__all__ = ["rehearse"]


def rehearse(examiner: Examiner, now: Round) -> None:
    """Let the budget see the cohorts of the first two rounds and the last before any is played.

    A run that does not fit is refused now. What clients send and keep has the shapes of one trial.
    """
    trainer = examiner.trainer
    method, feed, images = trainer.method, trainer.feed, trainer.images
    server, own = now.server, dict[str, Tensor]()
    # who comes later trains alone, and uploads to nobody
    counts = {c: len(mine) for c, mine in images.items() if c < examiner.clients}
    one = max(counts, key=lambda c: counts[c])
    last = trainer.settings.rounds - 1
    for round_ in sorted({0, 1, last}) if feed is not None else (0,):
        down = method.download(server, one, round_)
        if feed is not None:
            share = trainer.share(one, down, own, round_)
            with memory_limit(share.text):
                outcome = trainer.trial(
                    [one], stack([down]), stack([own]), {one: images[one]}, round_
                )
            examiner.forget()
            own = row(outcome.own, 0)
            upload = row(outcome.upload, 0)
            uploads: dict[int, State] = dict.fromkeys(counts, upload) if upload else {}
            server = method.merge(server, uploads, counts if uploads else {}, round_)
            if method.evaluates_download == "merged":
                down = method.download(server, one, round_ + 1)
        examiner.share(one, down, own if method.personal else {})
