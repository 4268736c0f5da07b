"""What a run trains on and what it is asked: the protocols of the papers as data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastfpl.config import Settings
from fastfpl.data import (
    Dataset,
    Shard,
    Split,
    base_novel,
    load_dataset,
    restrict,
    scheme_of,
    split_domain,
)
from fastfpl.errors import InputError
from fastfpl.seeds import generator

__all__ = ["Question", "Scenario", "arrange", "listed_clients", "personal"]

# whose files have a digest
_DATED = ("folder", "manifest")
_LOG = logging.getLogger("fastfpl")

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Question:
    """A list of test images and classes that every client's model is asked about.

    Attributes
    ----------
    name : str
    about : str
        What a client is asked, for the report.
    classnames, domains : tuple of str
    split : Split
    images : list of ndarray
        Positions in ``split`` for each client.
    """

    name: str
    about: str
    classnames: tuple[str, ...]
    domains: tuple[str, ...]
    split: Split
    images: list[Indices]


@dataclass(frozen=True, eq=False)
class Scenario:
    """A data set to learn from, dealt to clients, and questions; the first is the headline.

    Attributes
    ----------
    dataset : Dataset
        Classes and domains that are trained on.
    shards : list of Shard
    questions : list of Question
        What they are asked.
    newcomers : list of Shard
        Of clients that never train with those, and join after them.
    arrivals : list of Question
        What the newcomers are asked; these come first.
    names : tuple of str
        What the data set calls the clients, newcomers last; empty if they are but numbers.
    """

    dataset: Dataset
    shards: list[Shard]
    questions: list[Question]
    newcomers: list[Shard] = field(default_factory=list)
    arrivals: list[Question] = field(default_factory=list)
    names: tuple[str, ...] = ()

    @property
    def client_domains(self) -> tuple[int, ...] | None:
        """Domain of each client, or None if one's training images come from several."""
        if len(self.dataset.domains) == 1:  # also of a client whose images are elsewhere
            return (0,) * len(self.shards)
        found = [np.unique(self.dataset.train.domains[s.train]) for s in self.shards]
        if any(len(domains) != 1 for domains in found):
            return None
        return tuple(int(domains[0]) for domains in found)

    def noted(self, settings: Settings) -> Scenario:
        """Say in the data set's notes which clients are asked nothing.

        Raises
        ------
        InputError
            If nobody is asked a question, or a client would train on test images that it lacks.
        """
        notes = list(self.dataset.notes)
        together, exams = len(self.shards), len(self.questions) + len(self.arrivals)
        for first, question in (
            *((0, question) for question in self.questions),
            *((together, question) for question in self.arrivals),
        ):
            lacking = [first + u for u, images in enumerate(question.images) if not len(images)]
            if not lacking:
                continue
            names = self.names
            if settings.partition == "domain":  # numbers in tables, which say little here
                held = [
                    self.dataset.train.domains[s.train[0]] for s in (*self.shards, *self.newcomers)
                ]
                names = tuple(f"{u} ({self.dataset.domains[d]})" for u, d in enumerate(held))
            who = listed_clients(lacking, names)
            if len(lacking) == len(question.images):
                raise InputError(
                    "fastfpl.run: a client must have a test image to be asked about "
                    f"{question.about}; got none of {len(lacking)} clients: test on more images"
                )
            if settings.transductive:
                raise InputError(
                    "fastfpl.run: every client must have test images to train on with "
                    f"transductive=true; got none for {who}"
                )
            notes.append(
                f"{who} {'has' if len(lacking) == 1 else 'have'} no test images of "
                f"{'its' if len(lacking) == 1 else 'their'} own, left out of the mean"
                + (f" of {question.name}" if exams > 1 else "")
            )
        for note in notes[len(self.dataset.notes) :]:
            _LOG.warning("fastfpl.run: %s", note)
        return replace(self, dataset=replace(self.dataset, notes=tuple(notes)))

    @property
    def newcomer_domains(self) -> tuple[int | None, ...]:
        """Domain of each newcomer; None where its training images come from several."""
        found = [np.unique(self.dataset.train.domains[s.train]) for s in self.newcomers]
        return tuple(int(domains[0]) if len(domains) == 1 else None for domains in found)

    def transductive(self) -> Scenario:
        """Return the scenario in which every client trains on its own test images."""
        shards, newcomers = (
            [Shard(s.test, s.test) for s in some] for some in (self.shards, self.newcomers)
        )
        dataset = replace(self.dataset, train=self.dataset.test)
        return replace(self, dataset=dataset, shards=shards, newcomers=newcomers)


def arrange(
    settings: Settings, dataset: Dataset, deal: Callable[[Dataset], list[Shard]]
) -> Scenario:
    """Lay out a scenario.

    Parameters
    ----------
    settings : Settings
    dataset : Dataset
    deal : callable
        ``deal(dataset)`` gives the clients' shards.

    Raises
    ------
    InputError
        If the data set cannot play the scenario.

    Notes
    -----
    Source: base-to-novel Zhou et al. 2022 (CoCoOp, arXiv 2203.05557), asked as FedPGP does: every
    client's model on the images of its own base classes, then on all base and all novel ones;
    leave-one-domain-out as in FedPGP: every source client's model on all images of the target.
    """
    found = _laid_out(settings, dataset, deal)
    return found if found.names else replace(found, names=_names(settings, dataset))


def _names(settings: Settings, dataset: Dataset) -> tuple[str, ...]:
    """Return what the data set calls the clients of its own deal."""
    return dataset.clients if settings.partition == "given" else ()


def _laid_out(
    settings: Settings, dataset: Dataset, deal: Callable[[Dataset], list[Shard]]
) -> Scenario:
    kind = settings.scenario
    if kind == "base-to-novel":
        base, novel = (restrict(dataset, half) for half in base_novel(len(dataset.classnames)))
        shards = deal(base)
        return Scenario(
            base,
            shards,
            [
                _own("local", "its own test images, over all base classes", base, shards),
                _all("base", "all test images of the base classes", base, shards),
                _all("novel", "all test images of the novel classes", novel, shards),
            ],
        )
    if kind == "leave-one-domain-out":
        assert settings.target is not None
        sources, images = split_domain(dataset, settings.target)
        shards = deal(sources)
        every = np.arange(len(images), dtype=np.int64)
        target = Question(
            "target",
            f"all images of the domain {settings.target}, which no client has",
            dataset.classnames,
            (settings.target,),
            images,
            [every] * len(shards),
        )
        own = _own("own", "its own test images of the source domains", sources, shards)
        return Scenario(sources, shards, [target, own])
    shards = deal(dataset)
    plain = personal(dataset, shards)
    (own,) = plain.questions
    if kind == "global":
        return Scenario(dataset, shards, [_all("all", "all test images", dataset, shards), own])
    if kind == "unseen-clients":
        return _unseen(settings, dataset, shards)
    if kind == "multi-domain":
        return Scenario(dataset, shards, [_domain(dataset, shards), own])
    if kind == "cross-dataset":
        assert settings.target is not None
        root = None if settings.target_root is None else Path(settings.target_root)
        how: dict[str, Any] = {}
        if settings.digest is not None and scheme_of(settings.target) in _DATED:
            how["digest"] = settings.digest
        other = load_dataset(settings.target, root, on_corrupt=settings.on_corrupt, **how)
        target = _all("target", f"all test images of {other.name}", other, shards)
        return Scenario(dataset, shards, [target, own])
    return plain


def listed_clients(clients: Sequence[int], names: Sequence[str]) -> str:
    """Write clients for a sentence, the first ten."""
    said = [names[u] if names else str(u) for u in clients[:10]]
    more = f" and {len(clients) - 10} more" if len(clients) > 10 else ""
    return f"client{'s' * (len(clients) > 1)} {', '.join(said)}{more}"


def _unseen(settings: Settings, dataset: Dataset, shards: list[Shard]) -> Scenario:
    """Keep a share of the clients, drawn by the seed, from the others; they come last."""
    if len(shards) < 2:
        raise InputError(
            "fastfpl.run: clients must be two at least in the scenario unseen-clients; got "
            f"{len(shards)}"
        )
    share = 0.2 if settings.unseen is None else settings.unseen
    count = min(max(round(share * len(shards)), 1), len(shards) - 1)
    draw = generator(settings.seed, "unseen")
    drawn = torch.randperm(len(shards), generator=draw)[:count].tolist()
    later = sorted(drawn)
    there = [shard for c, shard in enumerate(shards) if c not in drawn]
    newcomers = [shards[c] for c in later]
    names = _names(settings, dataset)
    who = f"{listed_clients(later, names)} of the deal"
    order = [*(c for c in range(len(shards)) if c not in drawn), *later]
    plain = personal(dataset, there)
    return replace(
        plain,
        names=tuple(names[c] for c in order) if names else (),
        newcomers=newcomers,
        arrivals=[
            _own(
                "unseen",
                f"its own test images, after it joined those that trained together: {who}",
                dataset,
                newcomers,
            ),
            _own("before", "the same, before it has trained at all", dataset, newcomers),
        ],
    )


def personal(dataset: Dataset, shards: list[Shard]) -> Scenario:
    """Ask every client about its own test images."""
    return Scenario(dataset, shards, [_own("own", "its own test images", dataset, shards)])


def _own(name: str, about: str, dataset: Dataset, shards: Sequence[Shard]) -> Question:
    return Question(
        name, about, dataset.classnames, dataset.domains, dataset.test, [s.test for s in shards]
    )


def _all(name: str, about: str, dataset: Dataset, shards: Sequence[Shard]) -> Question:
    every = np.arange(len(dataset.test), dtype=np.int64)
    return Question(
        name, about, dataset.classnames, dataset.domains, dataset.test, [every] * len(shards)
    )


def _domain(dataset: Dataset, shards: Sequence[Shard]) -> Question:
    """Ask every client about the whole test list of its domain."""
    images = []
    for u, shard in enumerate(shards):
        mine = np.unique(dataset.train.domains[shard.train])
        if len(mine) != 1:
            raise InputError(
                "fastfpl.run: a client must hold one domain in the scenario multi-domain; got "
                f"{len(mine)} at client {u}; use partition=domain or domain-dirichlet"
            )
        images.append(np.flatnonzero(dataset.test.domains == mine[0]).astype(np.int64))
    return Question(
        "domain",
        "all test images of its domain",
        dataset.classnames,
        dataset.domains,
        dataset.test,
        images,
    )
