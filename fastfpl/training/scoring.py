"""Scoring a cohort: what its test images say of every client's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.errors import FastfplError, NotConverged
from fastfpl.methods import Method, State
from fastfpl.methods.contract import check_logits, check_text, started
from fastfpl.ops.memory import current_limit
from fastfpl.training.feeds import Feed
from fastfpl.training.graphs import TextGraphs

__all__ = ["Scores", "at_once", "score"]

Indices = npt.NDArray[np.int64]

# bytes of features, logits and what is between of the images that are scored at once: enough for
# full-speed products
_SCORED = 1 << 26
# bytes of answers that stay on the device before they are brought over
_WAITING = 1 << 20


@dataclass(frozen=True, eq=False)
class Scores:
    """What one client's test images say.

    Attributes
    ----------
    answers, labels, domains : ndarray, shape (n,), int64
        Predicted class, true class and visual domain of each image.
    """

    answers: Indices
    labels: Indices
    domains: Indices

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return int((self.answers == self.labels).sum())

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers in [0, 1]; None without an image."""
        return self.correct / self.images if self.images else None

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 over the classes that occur among the labels, in [0, 1]; None of no image."""
        if not self.images:
            return None
        classes = max(int(self.labels.max()), int(self.answers.max())) + 1
        right = np.bincount(self.labels[self.answers == self.labels], minlength=classes)
        asked = np.bincount(self.labels, minlength=classes)
        said = np.bincount(self.answers, minlength=classes)
        present = asked > 0
        return float((2 * right[present] / (asked + said)[present]).mean())


@torch.no_grad()
def score(
    method: Method,
    members: Sequence[int],
    down: State,
    own: State,
    feed: Feed,
    images: Mapping[int, Indices],
    *,
    texts: TextGraphs | None = None,
    trial: bool = False,
) -> dict[int, Scores]:
    """Evaluate a cohort, each client on its own test images over all C classes; some may have none.

    Text features are encoded once, by ``texts`` if given, which replay a pass that comes back; a
    down and own of one row serve all members (a global model). Nothing here waits for the device
    before all members have answered, or 131072 images. So many images are scored at once as 64 MiB
    hold of their features and of what stands between these and the logits, or the limit around
    (`fastfpl.ops.memory`) if it is lower. A ``trial`` scores no more than these of every client, to
    see what it needs, and captures nothing.
    """
    asked = [client for client in members if len(images[client])]
    there = set(asked)
    result = {client: _unasked(feed) for client in members if client not in there}
    if not asked:
        return result
    rows = len(next(iter({**down, **own}.values())))
    trained, fixed = started(method, down, own, rows, training=False)
    if texts is None or trial:
        text = method.text(trained, fixed)
    else:
        text = texts.text(method, trained, fixed)
    check_text(method, text, rows)
    count = at_once(method, fixed, feed.batch(images[asked[0]][None, :1]))
    answers = _Answers(method)
    first: dict[bytes, int] = {}
    same: list[tuple[int, int]] = []  # members, and those whose answers are theirs too
    try:
        for u, client in enumerate(members):
            if client not in there:
                continue
            at = u if text.shape[0] > 1 else 0
            if text.shape[0] == 1:
                # one model and one list of images: one answer
                other = first.setdefault(images[client].tobytes(), u)
                same.append((u, other))
                if other != u:
                    continue
            else:
                same.append((u, u))
            mine = {k: v[at : at + 1] for k, v in trained.items()}
            constants = {k: v[at : at + 1] for k, v in fixed.items()}
            where = images[client][:count] if trial else images[client]
            for start in range(0, len(where), count):
                part = where[start : start + count][None]
                logits = method.logits(text[at : at + 1], mine, constants, feed.batch(part))
                check_logits(method, logits, (1, part.shape[1], len(method.task.classes)))
                # no class has the number -1
                finite = logits.isfinite().all(dim=-1)
                answers.add(u, client, torch.where(finite, logits.argmax(dim=-1), -1)[0])
    except FastfplError:
        answers.bring()  # what is wrong with an earlier client is said first
        raise
    answers.bring()
    made: dict[int, Scores] = {}
    for u, other in same:
        if other == u:
            said = answers.of(u)
            where = images[members[u]][: len(said)]
            made[u] = Scores(said, feed.split.labels[where], feed.split.domains[where])
        result[members[u]] = made[other]
    return result


class _Answers:
    """Answers of a cohort, which stay on the device until they are brought over together."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._there: list[tuple[int, int, Tensor]] = []
        self._bytes = 0
        self._here: dict[int, list[Indices]] = {}

    def add(self, u: int, client: int, answers: Tensor) -> None:
        """Take answers (n,) of a member, -1 where logits were not finite, and look at none."""
        self._there.append((u, client, answers))
        self._bytes += answers.nbytes
        if self._bytes >= _WAITING:
            self.bring()

    def bring(self) -> None:
        """Wait for the device, and refuse the first client with logits that are not finite."""
        there, self._there, self._bytes = self._there, [], 0
        if not there:
            return
        whole = torch.cat([answers for *_, answers in there]).cpu().numpy()
        ends = np.cumsum([len(answers) for *_, answers in there])
        for (u, client, _), mine in zip(there, np.split(whole, ends[:-1]), strict=True):
            if (mine < 0).any():
                raise NotConverged(
                    f"fastfpl.run: logits must be finite; got one that is not for client {client} "
                    f"in an evaluation of {self._method.name}; lower lr={self._method.task.lr}"
                )
            self._here.setdefault(u, []).append(mine)

    def of(self, u: int) -> Indices:
        """Return all answers of a member, which were brought over."""
        return np.concatenate(self._here[u])


def _unasked(feed: Feed) -> Scores:
    """Return the scores of a client without a test image."""
    none: Indices = np.zeros(0, dtype=np.int64)
    return Scores(none, feed.split.labels[none], feed.split.domains[none])


def at_once(method: Method, fixed: State, image: Tensor) -> int:
    """Say how many images are scored at once, given the features of one: (1, 1, ...)."""
    numbers = method.scoring_numbers(fixed, image.shape[2:])
    wide = torch.promote_types(image.dtype, method.task.dtype).itemsize
    budget = min(_SCORED, current_limit() or _SCORED)
    count = budget // (image.nbytes + numbers * wide)
    together = method.scored_together
    return max(together, count // together * together)
