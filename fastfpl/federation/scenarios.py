"""What a run trains on and what it is asked: the protocols of the papers as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    split_domain,
)
from fastfpl.errors import InputError
from fastfpl.seeds import generator

__all__ = ["Question", "Scenario", "arrange", "personal"]

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
    """

    dataset: Dataset
    shards: list[Shard]
    questions: list[Question]
    newcomers: list[Shard] = field(default_factory=list)
    arrivals: list[Question] = field(default_factory=list)

    @property
    def client_domains(self) -> tuple[int, ...] | None:
        """Domain of each client, or None if one's training images come from several."""
        found = [np.unique(self.dataset.train.domains[s.train]) for s in self.shards]
        if any(len(domains) != 1 for domains in found):
            return None
        return tuple(int(domains[0]) for domains in found)

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
        other = load_dataset(settings.target, root, on_corrupt=settings.on_corrupt)
        target = _all("target", f"all test images of {settings.target}", other, shards)
        return Scenario(dataset, shards, [target, own])
    return plain


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
    who = f"{'client' if count == 1 else 'clients'} {', '.join(map(str, later))} of the deal"
    plain = personal(dataset, there)
    return replace(
        plain,
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
