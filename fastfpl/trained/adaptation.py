"""A client that was not there in training joins a run that is over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fastfpl.data import Dataset, Images, Shard, Split, load_dataset, partition
from fastfpl.data.loader import Workers, choose_workers
from fastfpl.data.names import readable
from fastfpl.errors import InputError, shown
from fastfpl.features import FeatureStore
from fastfpl.federation.exams import Exam
from fastfpl.federation.experiment import threads
from fastfpl.federation.lock import alone_in
from fastfpl.federation.newcomers import join, stranger
from fastfpl.federation.preparation import name_dataset
from fastfpl.federation.server import Round
from fastfpl.methods import Method
from fastfpl.ops.precision import without_autocast
from fastfpl.released import visits_of
from fastfpl.trained.joined import JOINED, Joined, check_name, joined_names, write_joined
from fastfpl.trained.models import Model, load
from fastfpl.training.feeds import Observer, evaluation_feed, silent, training_feed
from fastfpl.training.preparation import make_room
from fastfpl.training.trainer import Trainer

__all__ = ["Adapted", "adapt"]

OP = "fastfpl.adapt"
#: That a number of images a class was not named; None is all of them.
AS_THE_RUN = -1


@dataclass(frozen=True)
class Adapted:
    """A client that has joined.

    Attributes
    ----------
    name : str
        For `Model.client`.
    images, test_images : int
        That it trained on, and that it was asked about.
    before, after : float
        Its accuracy on these in [0, 1], with what it downloaded and with what it has become.
    loss : float or None
        Mean over the last epoch; None if it was only fine-tuned.
    """

    name: str
    images: int
    test_images: int
    before: float
    after: float
    loss: float | None


def adapt(
    folder: str | Path,
    dataset: str | Path | Dataset,
    *,
    name: str | None = None,
    root: str | Path | None = None,
    layout: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_corrupt: Literal["refuse", "skip"] | None = None,
    shots: int | None = AS_THE_RUN,
    participations: int | None = None,
    model: Any = None,
    method: str | type[Method] | None = None,
    device: torch.device | str = "cpu",
    cache: str | Path | None = None,
    observer: Observer = silent,
) -> Adapted:
    """Let a client that was not there in training join a run, and keep it beside the others.

    It starts from what the server holds after the last round. The federation goes on for it alone,
    on a copy of the server, as `fastfpl.federation.newcomers.join` says; the run's own files are
    not touched, and the run can go on as if nobody had come.

    Parameters
    ----------
    folder : path
        The ``out`` of `fastfpl.run`.
    dataset : str, Path or Dataset
        Its images, as `fastfpl.run` takes them: the training images are trained on, the test images
        show what it brought. The classes are those of the run, in any order.
    name : str, optional
        What it is asked for by; the data set's name if left out, numbered if that is taken.
        Whatever is drawn for it (FedAPT's key) depends on this and the run's seed.
    root, layout, columns, on_corrupt
        How a data set that lives in files is read, as `fastfpl.data.load_dataset` has it; what
        becomes of images that do not decode is as in the run if left out.
    shots : int or None
        Training images a class, None for all; as in the run if left out.
    participations : int, optional
        Rounds that it takes part in; as many as the method needs for all that a client has (two for
        pFedMoAP, whose gate trains from the second on, one elsewhere) if left out.
    model, method
        See `fastfpl.load`.
    device : torch.device or str
    cache : path, optional
        Folder of the feature store.
    observer : callable
        ``observer(what, done, total)`` is told of every long step.

    Returns
    -------
    Adapted

    Raises
    ------
    InputError
        If the classes are not the run's, the name is taken or no file's, the method trains nothing,
        another process is at work in the folder, or it cannot be written to; or the data set is of
        another kind, or has no use for what says how it is read.
    """
    trained = load(folder, model=model, method=method, device=device)
    settings = trained.settings
    if not trained.method.trains:
        raise InputError(
            f"{OP}: the run must be of a method that trains; got {settings.method}, with which "
            "every client answers alike"
        )
    if visits_of(settings.as_released, settings.schedule, settings.lr) is not None:
        raise InputError(
            f"{OP}: the run must be one in which clients train side by side; got as_released "
            f"{', '.join(settings.as_released)}, where each inherits from the one before"
        )
    for what, number in (("shots", shots), ("participations", participations)):
        if number is not None and number < 1 and number != AS_THE_RUN:
            raise InputError(f"{OP}: {what} must be at least 1; got {number}")
    if name is not None:
        check_name(OP, name)
    how: dict[str, Any] = {"root": root, "layout": layout, "columns": columns}
    how["on_corrupt"] = on_corrupt
    given = {what: value for what, value in how.items() if value is not None}
    called, live = name_dataset(OP, dataset)
    if live is None:
        live = load_dataset(called, **{"on_corrupt": settings.on_corrupt, **given})
    elif given:
        what, value = next(iter(given.items()))
        raise InputError(
            f"{OP}: {what} must be left out with a data set at hand; got {shown(value)}"
        )
    dataset = _with_classes_of(trained, live)
    chosen = settings.shots if shots == AS_THE_RUN else shots
    with alone_in(Path(folder)) as held, threads(settings.threads), without_autocast():
        # of one that was killed as it joined; what a run has left is the run's to look after
        held.sweep(set(), below=JOINED)
        name = _free(trained, dataset.name) if name is None else name
        if name in (*trained.joined, *trained.names):
            whose = "which has joined" if name in trained.joined else "a client of the run itself"
            raise InputError(
                f"{OP}: the name of a client must be new; got {name!r}, {whose}: choose another one"
            )
        found, one = _joined(
            trained,
            dataset,
            name,
            chosen,
            participations,
            cache,
            observer,
            _shard(trained, dataset, chosen),
        )
        write_joined(Path(folder), one)
        held.sweep(set(), below=JOINED)  # names no file that is there
    return found


def _joined(
    trained: Model,
    dataset: Dataset,
    name: str,
    shots: int | None,
    participations: int | None,
    cache: str | Path | None,
    observer: Observer,
    shard: Shard,
) -> tuple[Adapted, Joined]:
    settings, method, kept = trained.settings, trained.method, trained.checkpoint
    train = dataset.test if settings.transductive else dataset.train
    number = method.task.clients + trained.newcomers
    store = FeatureStore(None if cache is None else Path(cache))
    store.check()
    workers = Workers(choose_workers(trained.clip.device.type, settings.workers))
    eye = trained.look(store, observer, workers)
    eye = replace(eye, room=make_room(settings, trained.clip.device))
    feed = training_feed(eye, train, shard.train, settings, paired=method.paired)
    trainer = Trainer(settings, method, feed, {number: shard.train}, observer)
    asked = evaluation_feed(eye, dataset.test, "test", shard.test)
    exam = Exam("own", "its own test images", method, asked, [shard.test], dataset.domains)
    now = Round(len(kept.rounds), kept.server)
    domain = _domain(trained, dataset, train.domains[shard.train])
    other = stranger(method, now, name, domain)
    one = join(trainer, now, number, name, domain, participations)
    figures = [c.answers(exam, number, 0).accuracy for c in (other, one)]
    before, after = (figure for figure in figures if figure is not None)  # it has test images
    found = Adapted(name, len(shard.train), len(shard.test), before, after, one.loss)
    about = {
        "dataset": dataset.name,
        "shots": shots,
        "images": found.images,
        "test_images": found.test_images,
        "round": trained.round,
        "participations": method.joins if participations is None else participations,
        "accuracy_before": before,
        "accuracy_after": after,
    }
    digest = trained.clip.weights_digest
    return found, Joined(name, one.down, one.own, digest, name, domain, about)


def _shard(trained: Model, dataset: Dataset, shots: int | None) -> Shard:
    """Give all images to the one client, or so many of each class."""
    (shard,) = partition(
        "iid" if shots is None else "iid-fewshot",
        dataset.train.labels,
        dataset.test.labels,
        dataset.train.domains,
        dataset.test.domains,
        classes=len(dataset.classnames),
        clients=1,
        seed=trained.settings.seed,
        shots=shots,
    )
    every = np.arange(len(dataset.test), dtype=np.int64)
    train = every if trained.settings.transductive else np.sort(shard.train)
    if not len(train) or not len(every):
        raise InputError(
            f"{OP}: dataset must have training images and test images; got {len(train)} and "
            f"{len(every)} of {dataset.name}"
        )
    return Shard(train, every)


class _Renumbered(Split):
    """A split whose classes have other numbers; the images are the same, and so are their features.

    Parameters
    ----------
    split : Split
    numbers : ndarray, shape (C,), int64
        New number of each class.
    """

    def __init__(self, split: Split, numbers: npt.NDArray[np.int64]) -> None:
        self.labels, self.domains = numbers[split.labels], split.domains
        self.fingerprint = split.fingerprint
        self._split = split

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`."""
        return self._split.images(indices)


def _with_classes_of(trained: Model, dataset: Dataset) -> Dataset:
    """Give classes the numbers that the run has for them; refuse those that were not trained."""
    names = [readable(name) for name in dataset.classnames]
    mine = [readable(name) for name in trained.classnames]
    if names == mine:
        return dataset
    lacking = [name for name in mine if name not in names]
    further = [name for name in names if name not in mine]
    if lacking or further:
        parts = [
            f"{what} {', '.join(map(repr, some[:3]))}{', ...' * (len(some) > 3)}"
            for what, some in (("without", lacking), ("besides", further))
            if some
        ]
        raise InputError(
            f"{OP}: dataset must have the {len(mine)} classes of the run, in any order; got "
            f"{len(names)}, {', '.join(parts)}"
        )
    numbers = np.array([mine.index(name) for name in names], dtype=np.int64)
    train, test = (_Renumbered(split, numbers) for split in (dataset.train, dataset.test))
    return replace(dataset, classnames=trained.classnames, train=train, test=test)


def _domain(trained: Model, dataset: Dataset, domains: Any) -> int | None:
    """Return the domain of the images among those of the run, None if it has none of them."""
    own = np.unique(domains)
    known: list[str] = trained.checkpoint.task["domains"]
    if len(own) != 1 or dataset.domains[int(own[0])] not in known:
        return None
    return known.index(dataset.domains[int(own[0])])


def _free(trained: Model, dataset: str) -> str:
    """Make a name of the data set's that nobody has."""
    base = re.sub(r"[^\w.-]+", "-", dataset).strip("-.")[:80] or "newcomer"
    base = f"client-{base}" if base.isdecimal() or base == "global" else base
    taken = [*joined_names(trained.folder), *trained.names]
    names = (base if k == 1 else f"{base}-{k}" for k in range(1, len(taken) + 2))
    return check_name(OP, next(name for name in names if name not in taken))
