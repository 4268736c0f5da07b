"""Training and scoring many clients in one pass: tensors with a leading client dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.config import Settings
from fastfpl.errors import InputError, NotConverged
from fastfpl.federation.feeds import Feed, Observer, moved
from fastfpl.federation.graphs import StepGraphs
from fastfpl.federation.steps import Cohort
from fastfpl.methods import Batch, Method, State
from fastfpl.methods.contract import asked, check_logits, check_states, check_text, furthest
from fastfpl.ops.memory import current_limit
from fastfpl.seeds import generator

__all__ = [
    "Gathered",
    "Scores",
    "Share",
    "Trained",
    "gather",
    "learning_rate",
    "score",
    "shapes",
    "stack",
    "train",
    "unstack",
]

Indices = npt.NDArray[np.int64]

# bytes of features, logits and what is between of the images that are scored at once: enough for
# full-speed products
_SCORED = 1 << 26


def stack(states: Sequence[State]) -> State:
    """Stack states of equal names and shapes along a new leading client dimension."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(state: State, count: int) -> list[State]:
    """Split a stacked state into one state a client; no two share storage."""
    return [{name: tensor[u].clone() for name, tensor in state.items()} for u in range(count)]


# images if they count, and the shapes of what is downloaded and kept
_Kind = tuple[int | None, Hashable, Hashable]


@dataclass(frozen=True)
class Share:
    """What one pass may take.

    Attributes
    ----------
    clients : int or None
        Clients of a cohort at most; None for as many as there are.
    text : int or None
        Bytes of activations of the text pass (`fastfpl.ops.memory`), None for no limit.
    """

    clients: int | None = None
    text: int | None = None

    def both(self, other: Share) -> Share:
        """Return the lesser of two shares."""
        return Share(_lesser(self.clients, other.clients), _lesser(self.text, other.text))


def _lesser(one: int | None, other: int | None) -> int | None:
    return min((n for n in (one, other) if n is not None), default=None)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Clients that can share passes.

    Attributes
    ----------
    members : list of int
        Client numbers, U of them.
    down, own : State
        Stacked downloads and kept states.
    share : Share
        What their passes may take.
    """

    members: list[int]
    down: State
    own: State
    share: Share


def gather(
    clients: Sequence[int],
    states: Callable[[int], tuple[State, State]],
    share: Callable[[int, State, State], Share],
    sizes: Mapping[int, int] | None = None,
) -> Iterator[Gathered]:
    """Put clients with tensors of the same names and shapes into cohorts, as they come.

    No more states are held at a time than those of one unfinished cohort of each kind.

    Parameters
    ----------
    clients : sequence of int
    states : callable
        ``states(client)`` returns what the client downloads and what it has kept.
    share : callable
        ``share(client, down, own)`` is asked once for every kind of states, with the first client
        of the kind.
    sizes : mapping from client to int, optional
        With it the clients of a cohort also have equally many training images.
    """
    shares: dict[_Kind, Share] = {}
    waiting: dict[_Kind, list[tuple[int, State, State]]] = {}

    def joined(kind: _Kind) -> Gathered:
        members, downs, owns = zip(*waiting.pop(kind), strict=True)
        return Gathered(list(members), stack(downs), stack(owns), shares[kind])

    order = sorted(clients, key=lambda c: (0 if sizes is None else sizes[c], c))
    for client in order:
        down, own = states(client)
        kind = (None if sizes is None else sizes[client], shapes(down), shapes(own))
        if kind not in shares:
            if sizes is not None:
                # who has more images comes after all that have fewer
                for other in [k for k in waiting if k[0] != kind[0]]:
                    yield joined(other)
            shares[kind] = share(client, down, own)
        part = waiting.setdefault(kind, [])
        part.append((client, down, own))
        if len(part) == shares[kind].clients:
            yield joined(kind)
    for kind in list(waiting):
        yield joined(kind)


def shapes(state: State) -> Hashable:
    """Return names and shapes of the tensors of a state."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(state.items()))


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
        trained, fixed = _started(method, down, own, len(members), training=True)
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


def _started(
    method: Method, down: State, own: State, clients: int, *, training: bool
) -> tuple[State, State]:
    """Let a cohort start, and refuse what has no row for each client."""
    with asked(method, "start", download=down, own=own):
        pair = method.start(down, own, training=training)
    trained, fixed = check_states(method, "start", pair, clients)
    if training and not trained:
        raise InputError(
            f"fastfpl.methods: {method.name}'s start must return what is trained; got nothing"
        )
    return trained, fixed


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
    def accuracy(self) -> float:
        """Share of right answers in [0, 1]."""
        return self.correct / self.images

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur among the labels, in [0, 1]."""
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
    trial: bool = False,
) -> dict[int, Scores]:
    """Evaluate a cohort, each client on its own test images over all C classes.

    Text features are encoded once; a down and own of one row serve all members (a global model).
    So many images are scored at once as 64 MiB hold of their features and of what stands between
    these and the logits, or the limit around (`fastfpl.ops.memory`) if it is lower. A ``trial``
    scores no more than these of every client, to see what it needs.
    """
    rows = len(next(iter({**down, **own}.values())))
    trained, fixed = _started(method, down, own, rows, training=False)
    text = method.text(trained, fixed)
    check_text(method, text, rows)
    count = _at_once(method, fixed, feed.batch(images[members[0]][None, :1]))
    result = {}
    shared: dict[bytes, Scores] = {}
    for u, client in enumerate(members):
        at = u if text.shape[0] > 1 else 0
        # one model and one list of images: one answer
        key = images[client].tobytes() if text.shape[0] == 1 else None
        if key is not None and key in shared:
            result[client] = shared[key]
            continue
        mine = {k: v[at : at + 1] for k, v in trained.items()}
        constants = {k: v[at : at + 1] for k, v in fixed.items()}
        answers = []
        where = images[client][:count] if trial else images[client]
        for start in range(0, len(where), count):
            part = where[start : start + count][None]
            logits = method.logits(text[at : at + 1], mine, constants, feed.batch(part))
            check_logits(method, logits, (1, part.shape[1], len(method.task.classes)))
            # no class has the number -1
            finite = logits.isfinite().all(dim=-1)
            answers.append(torch.where(finite, logits.argmax(dim=-1), -1)[0].cpu().numpy())
            if (answers[-1] < 0).any():
                raise NotConverged(
                    f"fastfpl.run: logits must be finite; got one that is not for client {client} "
                    f"in an evaluation of {method.name}; lower lr={method.task.lr}"
                )
        result[client] = Scores(
            np.concatenate(answers), feed.split.labels[where], feed.split.domains[where]
        )
        if key is not None:
            shared[key] = result[client]
    return result


def _at_once(method: Method, fixed: State, image: Tensor) -> int:
    """Say how many images are scored at once, given the features of one: (1, 1, ...)."""
    numbers = method.scoring_numbers(fixed, image.shape[2:])
    wide = torch.promote_types(image.dtype, method.task.dtype).itemsize
    budget = min(_SCORED, current_limit() or _SCORED)
    count = budget // (image.nbytes + numbers * wide)
    together = method.scored_together
    return max(together, count // together * together)
