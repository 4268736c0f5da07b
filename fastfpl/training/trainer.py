"""A method on one device: trains cohorts, and says how many clients share a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.methods import Method, State
from fastfpl.ops.memory import current_limit
from fastfpl.training.budget import Budget
from fastfpl.training.cohort import Trained, train
from fastfpl.training.feeds import Feed, Observer, silent
from fastfpl.training.gathering import Share
from fastfpl.training.graphs import StepGraphs, TextGraphs
from fastfpl.training.private import ImagePrivacy

__all__ = ["Trainer"]

Indices = npt.NDArray[np.int64]


@dataclass
class Trainer:
    """What clients train with on one device.

    Attributes
    ----------
    settings : Settings
    method : Method
    feed : Feed or None
        Training images; None of a method that trains nothing.
    images : mapping from client to ndarray
        Positions in the feed's split, of each client that may train here.
    observer : callable
        Told of long steps.
    graphs : StepGraphs or None
        What replays training steps, if anything does.
    texts : TextGraphs or None
        What replays the text passes of evaluations, if anything does.
    budget : Budget or None
        What decides how many clients share a pass, if ``max_memory`` does.
    private : ImagePrivacy or None
        What makes steps differentially private, if settings ask for it.
    """

    settings: Settings
    method: Method
    feed: Feed | None
    images: Mapping[int, Indices]
    observer: Observer = silent
    graphs: StepGraphs | None = None
    texts: TextGraphs | None = None
    budget: Budget | None = None
    private: ImagePrivacy | None = None

    def train(
        self,
        members: Sequence[int],
        down: State,
        own: State,
        round_: int,
        observer: Observer,
        *,
        factors: Sequence[float] | None = None,
        momentum: State | None = None,
    ) -> Trained:
        """Train one cohort for a round's local epochs; see `fastfpl.training.cohort.train`."""
        assert self.feed is not None
        return train(
            self.method,
            members,
            down,
            own,
            self.feed,
            self.images,
            self.settings,
            round_,
            observer,
            factors=factors,
            momentum=momentum,
            graphs=self.graphs,
            private=self.private,
        )

    def tuned(self, members: Sequence[int], down: State, own: State, round_: int) -> State:
        """Fine-tune clients for one evaluation alone; return what they would keep, stacked."""
        assert self.feed is not None
        return train(
            self.method,
            members,
            down,
            own,
            self.feed,
            self.images,
            self.settings,
            round_,
            lambda what, done, total: self.observer("fine-tuning", done, total),
            epochs=self.method.tune_epochs,
            stream="tune",
            graphs=self.graphs,
            private=self.private,
        ).own

    def trial(
        self,
        members: Sequence[int],
        down: State,
        own: State,
        images: Mapping[int, Indices],
        round_: int,
    ) -> Trained:
        """Take a cohort's first steps on these images, to see what they need."""
        assert self.feed is not None
        return train(
            *(self.method, members, down, own, self.feed, images, self.settings, round_, silent),
            private=self.private,
            trial=True,
        )

    def alike(self, clients: Sequence[int]) -> dict[int, int] | None:
        """Say how many training images each client has, if that must be equal in a cohort."""
        # a survey sees whole training sets, which must be equally long to be stacked
        if type(self.method).surveys is Method.surveys:
            return None
        return {c: len(self.images[c]) for c in clients}

    def share(
        self,
        client: int,
        down: State,
        own: State,
        round_: int,
        after: Callable[[], None] | None = None,
    ) -> Share:
        """Say what the training of clients with states like these may take in a round.

        ``after`` is called after trials in place of `forget`.
        """
        if self.budget is None:
            return Share(self.settings.cohort, current_limit())
        mine = self.images[client]
        if self.alike([client]) is None:  # nobody looks at a whole training set
            # two of the largest batches of any client, of this one's images
            longest = max(len(images) for images in self.images.values())
            mine = np.resize(mine, min(2 * self.settings.batch_size, longest))

        def fit(members: list[int], downs: State, owns: State) -> None:
            self.trial(members, downs, owns, {client: mine}, round_)

        share = partial(
            self.budget.share,
            *("training", (down, own), self.method.apart, fit, client, len(mine)),
            *(self.settings.cohort, after or self.forget),
        )
        if self.graphs is None or self.graphs.reasons:
            return share()
        try:
            return share(replayed=True)
        except InputError:
            # without graphs a step is not in memory twice
            found = share()
            self.graphs.give_up("max_memory leaves no room for the memory of captured steps")
            return found

    def forget(self) -> None:
        """Forget text features: what is encoded together decides the last bit."""
        self.method.task.text_features.clear()
