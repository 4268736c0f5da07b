"""Training one cohort: the local epochs of many clients in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.config import Settings
from fastfpl.errors import NotConverged
from fastfpl.features import moved
from fastfpl.methods import Batch, Method, State
from fastfpl.methods.contract import asked, check_states, furthest, started
from fastfpl.seeds import generator
from fastfpl.training.feeds import Feed, Observer
from fastfpl.training.graphs import StepGraphs
from fastfpl.training.private import ImagePrivacy
from fastfpl.training.steps import Cohort

__all__ = ["Trained", "learning_rate", "train"]

Indices = npt.NDArray[np.int64]


def learning_rate(settings: Settings, round_: int, epoch: int, epochs: int) -> float:
    """Factor on the learning rates that follow the schedule in one of a round's local epochs."""
    if settings.schedule == "constant":
        return 1.0
    share = epoch / epochs if settings.schedule == "cosine" else round_ / settings.rounds
    return 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class _Epoch:
    """One local epoch of a cohort: which images each client sees in each step."""

    positions: Indices  # (steps, U, B), in the client's own list; 0 where nothing stands
    mask: npt.NDArray[np.bool_]  # (steps, U, B)
    draws: Indices | None  # (steps, U, B)


def _steps(count: int, batch: int) -> int:
    """Count the steps of an epoch over so many images; the incomplete last batch is dropped.

    A client with fewer images than a batch takes them all in one step.
    """
    return max(1, count // batch)


def _plan_epoch(
    members: Sequence[int],
    counts: Sequence[int],
    settings: Settings,
    stream: tuple[str | int, ...],
    epoch: int,
    random: bool,
) -> _Epoch:
    """Shuffle each client's images and cut them into batches. ``stream`` names the draws."""
    batch = settings.batch_size
    steps = max(_steps(n, batch) for n in counts)
    # one contiguous line a client, so that its images are written in order
    positions = np.zeros((len(members), steps * batch), dtype=np.int64)
    mask = np.zeros(positions.shape, dtype=np.bool_)
    draws = np.zeros(positions.shape, dtype=np.int64)
    for u, (client, count) in enumerate(zip(members, counts, strict=True)):
        draw = generator(settings.seed, *stream, client, epoch)
        order = torch.randperm(count, generator=draw).numpy()
        used = min(count, _steps(count, batch) * batch)
        positions[u] = order[0]
        positions[u, :used] = order[:used]
        mask[u, :used] = True
        if random:
            draws[u, :used] = torch.randint(2**31, (used,), generator=draw).numpy()

    def by_step(lines: npt.NDArray[Any]) -> npt.NDArray[Any]:
        ordered: npt.NDArray[Any] = lines.reshape(len(members), steps, batch).swapaxes(0, 1)
        return ordered

    return _Epoch(by_step(positions), by_step(mask), by_step(draws) if random else None)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a cohort's local training gave.

    Attributes
    ----------
    upload, own : State
        Stacked.
    losses : Tensor, shape (U,)
        Mean training loss of the last epoch.
    images : int
        Images that were trained on.
    momentum : State
        Stacked buffers of SGD after the last step.
    """

    upload: State
    own: State
    losses: Tensor
    images: int
    momentum: State


def train(
    method: Method,
    members: Sequence[int],
    down: State,
    own: State,
    feed: Feed,
    images: Mapping[int, Indices],
    settings: Settings,
    round_: int,
    observer: Observer,
    *,
    epochs: int | None = None,
    stream: str = "order",
    factors: Sequence[float] | None = None,
    momentum: State | None = None,
    graphs: StepGraphs | None = None,
    private: ImagePrivacy | None = None,
    trial: bool = False,
) -> Trained:
    """Train one cohort for a round's local epochs.

    Nothing waits for the device within an epoch; its losses are read when it has ended.

    Parameters
    ----------
    method : Method
    members : sequence of int
        Client numbers, U of them.
    down, own : State
        Stacked downloads and kept states.
    feed : Feed
    images : mapping from client to ndarray
        Positions in the feed's split.
    settings : Settings
    round_ : int
    observer : Observer
    epochs : int, optional
        In place of the settings' local epochs.
    stream : str
        Name of the draws that order the images.
    factors : sequence of float, optional
        Multiplies the scheduled learning rates epoch by epoch, in place of the settings' schedule.
    momentum : State, optional
        Stacked buffers that SGD begins with; fresh ones if left out.
    graphs : StepGraphs, optional
        What replays steps that come back.
    private : ImagePrivacy, optional
        What cuts the gradients of single images and adds noise; no step is replayed then.
    trial : bool
        Take two steps of one epoch only, to see what they need.

    Raises
    ------
    NotConverged
        After the epoch in which a client's loss was not finite, or a problem inside it did not
        converge.
    """
    epochs = settings.local_epochs if epochs is None else epochs
    epochs = 1 if trial else epochs
    # who has most steps comes first, so that the clients of a step are always the first few
    steps = [_steps(len(images[c]), settings.batch_size) for c in members]
    order = sorted(range(len(members)), key=lambda u: -steps[u])
    back = sorted(range(len(members)), key=lambda i: order[i])
    members, steps = [members[u] for u in order], [steps[u] for u in order]
    down, own = _rows(down, order), _rows(own, order)
    counts = [len(images[c]) for c in members]
    with torch.no_grad():
        trained, fixed = started(method, down, own, len(members), training=True)
        fixed = dict(fixed)
        if method.surveys(fixed):
            whole = _everything(feed, members, images, counts[0])
            fixed |= method.survey(method.text(trained, fixed), trained, fixed, whole)
    cohort = Cohort(
        method,
        {name: tensor.clone() for name, tensor in trained.items()},
        fixed,
        settings.momentum,
        settings.weight_decay,
        None if momentum is None else _rows(momentum, order),
        private,
    )
    play: Callable[[int, Batch], None] = cohort.step
    if graphs is not None:
        cohort, play = graphs.take(cohort)
    if factors is None:
        factors = [learning_rate(settings, round_, epoch, epochs) for epoch in range(epochs)]
    seen = 0
    mean = torch.zeros(len(members), dtype=torch.float32)
    for epoch in range(epochs):
        plan = _plan_epoch(members, counts, settings, (stream, round_), epoch, feed.random)
        scaled = {n: factors[epoch] if method.scheduled(n) else 1.0 for n in cohort.trained}
        cohort.begin(scaled)
        tell = partial(_tell, observer, epoch * steps[0], epochs * steps[0])
        batches = _batches(feed, members, images, plan, steps)
        _play(play, islice(batches, 2) if trial else batches, tell)
        seen += int(plan.mask.sum())
        mean = cohort.losses(steps)
        where = f"in round {round_}, epoch {epoch}"
        _refuse_losses(mean, members, where, settings.lr)
        _refuse_values({"trained": cohort.trained}, members, where, settings.lr)
        _refuse_residuals(cohort, members, where)
    with asked(method, "finish", trained=cohort.trained, fixed=cohort.fixed, own=own):
        left = method.finish(cohort.trained, cohort.fixed, own)
    upload, kept = check_states(method, "finish", left, len(members))
    _refuse_values({"sent": upload, "kept": kept}, members, f"in round {round_}", settings.lr)
    sides = [upload, kept, cohort.sgd.buffers]
    if graphs is not None:
        # the tensors of a replayed cohort are those of the next one too
        sides = [{name: tensor.clone() for name, tensor in state.items()} for state in sides]
    upload, kept, buffers = (_rows(state, back) for state in sides)
    return Trained(upload, kept, mean[back], seen, buffers)


def _play(
    step: Callable[[int, Batch], None],
    batches: Iterable[tuple[int, Batch]],
    tell: Callable[[int], None],
) -> None:
    """Take the steps of an epoch; nothing in here waits for the device."""
    for done, (live, batch) in enumerate(batches, start=1):
        step(live, batch)
        tell(done)


def _tell(observer: Observer, before: int, total: int, done: int) -> None:
    observer("training", before + done, total)


def _rows(state: State, order: list[int]) -> State:
    """Put the rows of a stacked state into another order."""
    if order == sorted(order):
        return dict(state)
    return {name: tensor[order] for name, tensor in state.items()}


def _refuse_losses(mean: Tensor, members: Sequence[int], where: str, lr: float) -> None:
    wrong = (~mean.isfinite()).nonzero()
    if len(wrong):
        u = int(wrong[0])
        raise NotConverged(
            f"fastfpl.run: the loss must stay finite; got {mean[u].item()} for client "
            f"{members[u]} {where}; lower lr={lr}"
        )


def _refuse_values(
    states: Mapping[str, State], members: Sequence[int], where: str, lr: float
) -> None:
    wrong = furthest(states, len(members))
    if wrong is not None:
        what, name, u, value = wrong
        raise NotConverged(
            f"fastfpl.run: what is {what} must stay finite, its squares too; got {value:g} in "
            f"{name!r} of client {members[u]} {where}; lower lr={lr}"
        )


def _refuse_residuals(cohort: Cohort, members: Sequence[int], where: str) -> None:
    wanted = cohort.method.tolerance
    found = [] if wanted is None else cohort.beyond(wanted.tol)
    if wanted is not None and found:
        u, residual, image, number = found[0]
        name = cohort.method.task.classes.names[number]
        raise NotConverged(
            f"fastfpl.run: {wanted.rule}; got a residual of {residual:.1e} for training image "
            f"{image} and class {name!r} of client {members[u]} {where}; {wanted.cure}"
        )


def _batches(
    feed: Feed,
    members: Sequence[int],
    images: Mapping[int, Indices],
    plan: _Epoch,
    steps: Sequence[int],
) -> Iterator[tuple[int, Batch]]:
    """Yield each step's number of clients and its batch; what is small moves at once."""
    mine = zip(members, plan.positions.swapaxes(0, 1), strict=True)
    indices = np.stack([images[c][at] for c, at in mine], axis=1)
    labels, domains = feed.labels(indices), feed.domains(indices)
    positions = moved(torch.from_numpy(np.ascontiguousarray(plan.positions)), labels.device)
    mask = moved(torch.from_numpy(np.ascontiguousarray(plan.mask)), labels.device)
    asked = []
    for step, here in enumerate(indices):
        live = sum(step < count for count in steps)
        asked.append((here[:live], None if plan.draws is None else plan.draws[step, :live]))
    feed.expect(asked)
    for step, (here, draws) in enumerate(asked):
        live = len(here)
        strong = feed.strong(here, draws) if feed.paired and draws is not None else None
        yield (
            live,
            Batch(
                image=feed.batch(here, draws),
                labels=labels[step, :live],
                domains=domains[step, :live],
                positions=positions[step, :live],
                mask=mask[step, :live],
                strong=strong,
            ),
        )


def _everything(
    feed: Feed, members: Sequence[int], images: Mapping[int, Indices], count: int
) -> Batch:
    """Gather the whole training sets of clients, which have equally many images."""
    indices = np.stack([images[c] for c in members])
    labels = feed.labels(indices)
    positions = torch.arange(count, device=labels.device).expand(len(members), count)
    return Batch(
        image=feed.batch(indices),
        labels=labels,
        domains=feed.domains(indices),
        positions=positions,
        mask=torch.ones_like(positions, dtype=torch.bool),
    )
