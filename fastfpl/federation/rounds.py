"""The in-process federation: rounds of download, local training, merge and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import record_function

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Dataset, Shard
from fastfpl.federation.cohort import Scores, group, score, stack, train, unstack
from fastfpl.federation.feeds import Feed, Observer
from fastfpl.federation.graphs import StepGraphs
from fastfpl.federation.steps import PHASE
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import Method, State
from fastfpl.seeds import generator

__all__ = ["Exam", "Federation"]

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
class Federation:
    """A prepared run (see `prepare`): frozen parts, shards, and the state that rounds move.

    Attributes
    ----------
    settings : Settings
    clip : FrozenCLIP
    dataset : Dataset
        What is trained on.
    shards : list of Shard
        Each client's images.
    method : Method
    train_feed : Feed or None
    exams : list of Exam
        What every client's model is asked; the first is the headline.
    client_domains : tuple of int or None
        Domain of each client, if each has one.
    server : State
    clients : dict from client to State
        What clients keep; no two share storage with each other or with the server.
    rounds : list of dict
        Rows of ``result.json``.
    trainer : Together or InTurn
        How the clients of a round train.
    graphs : StepGraphs or None
        What replays training steps, if anything does.
    """

    settings: Settings
    clip: FrozenCLIP
    dataset: Dataset
    shards: list[Shard]
    method: Method
    train_feed: Feed | None
    exams: list[Exam]
    client_domains: tuple[int, ...] | None
    observer: Observer
    server: State
    clients: dict[int, State] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    trainer: Together | InTurn = field(default_factory=Together)
    graphs: StepGraphs | None = None

    def facts(self) -> dict[str, Any]:
        """Say what a checkpoint must agree with: settings that decide figures, weights, data."""
        loose = {*("rounds", "cohort", "threads", "device", "root"), *("max_memory", "cuda_graphs")}
        loose |= {"workers", "resident"}
        if self.settings.schedule == "cosine-rounds":
            loose.remove("rounds")
        kept = {k: v for k, v in self.settings.model_dump().items() if k not in loose}
        kept["options"] = self.method.options.model_dump()
        return {
            **kept,
            "weights": self.clip.weights_digest,
            "train_images": self.dataset.train.fingerprint,
            "test_images": [exam.feed.split.fingerprint for exam in self.exams],
        }

    def sample(self, round_: int) -> list[int]:
        """Say which clients train in a round, ascending.

        max(int(participation · N), 1) of them, or one of each domain; all in round 0 if the method
        wants it.
        """
        return sorted(self.drawn(round_))

    def drawn(self, round_: int) -> list[int]:
        """Draw the clients that train in a round, in the order in which they were drawn."""
        total = len(self.shards)
        if round_ == 0 and self.method.all_first:
            return list(range(total))
        draw = generator(self.settings.seed, "sample", round_)
        order = torch.randperm(total, generator=draw).tolist()
        if self.settings.sampling == "domain":
            assert self.client_domains is not None
            first: dict[int, int] = {}
            for client in order:
                first.setdefault(self.client_domains[client], client)
            return list(first.values())
        # the small addend keeps 0.29 · 100 = 28.999999999999996 from losing a client
        count = max(int(self.settings.participation * total + 1e-9), 1)
        return order[:count]

    def lost(self, round_: int, selected: Sequence[int]) -> set[int]:
        """Draw whose uploads never arrive."""
        if not self.settings.dropout:
            return set()
        draw = generator(self.settings.seed, "dropout", round_)
        luck = torch.rand(len(self.shards), generator=draw)
        return {c for c in selected if luck[c].item() < self.settings.dropout}

    def round(self) -> dict[str, Any]:
        """Play the next round and return its row."""
        round_, settings, method = len(self.rounds), self.settings, self.method
        # a resumed run starts without these; what is encoded together decides the last bit
        method.task.text_features.clear()
        begin = time.perf_counter()
        row: dict[str, Any] = {
            "round": round_,
            "accuracy": None,
            "clients": [],
            "exams": {},
            "selected": [],
            "lost": [],
            "loss": None,
            "seconds": 0.0,
            "images_per_second": 0.0,
            "bytes_up": 0,
            "bytes_down": 0,
        }
        trained_with: dict[int, State] = {}
        if self.train_feed is not None:
            with record_function(PHASE + "training"):
                trained_with = self._train(round_, self.train_feed, row)
        last = round_ == settings.rounds - 1 or not method.trains
        if last or (round_ + 1) % settings.evaluate_every == 0:
            with record_function(PHASE + "evaluation"):
                asked = self._ask(round_, trained_with)
            for exam, scores in zip(self.exams, asked, strict=True):
                row["exams"][exam.name] = _marks(scores, exam.domains)
            headline = row["exams"][self.exams[0].name]
            row["clients"], row["accuracy"] = headline["clients"], headline["accuracy"]
        row["seconds"] = time.perf_counter() - begin
        self.rounds.append(row)
        return row

    def _train(self, round_: int, feed: Feed, row: dict[str, Any]) -> dict[int, State]:
        begin = time.perf_counter()
        method, selected = self.method, self.sample(round_)
        lost = self.lost(round_, selected)
        images = {c: self.shards[c].train for c in selected}
        downs: dict[int, State] = {}
        uploads: dict[int, State] = {}
        losses: dict[int, float] = {}
        kept: dict[int, State] = {}
        seen = 0
        for turn in self.trainer.turns(self, feed, round_, selected, lost):
            members, outcome = turn.members, turn.outcome
            downs |= turn.downs
            seen += outcome.images
            for u, client in enumerate(members):
                losses[client] = outcome.losses[u].item()
            kept |= dict(zip(members, unstack(outcome.own, len(members)), strict=True))
            if outcome.upload:
                sent = unstack(outcome.upload, len(members))
                uploads |= dict(zip(members, sent, strict=True))
        uploads = {c: state for c, state in uploads.items() if c not in lost}
        self.clients.update({c: s for c, s in kept.items() if s})
        self.server = method.merge(
            self.server, uploads, {c: len(images[c]) for c in uploads}, round_
        )
        row["selected"] = selected
        row["lost"] = sorted(lost)
        row["loss"] = sum(losses.values()) / len(losses)
        row["images_per_second"] = seen / (time.perf_counter() - begin)
        row["bytes_down"] = sum(_size(state) for state in downs.values())
        row["bytes_up"] = sum(_size(state) for state in uploads.values())
        return downs

    def cohorts(
        self, clients: Sequence[int], downs: Mapping[int, State], owns: Mapping[int, State]
    ) -> list[list[int]]:
        """Put clients that can train together into cohorts."""
        # a survey sees whole training sets, which must be equally long to be stacked
        alike = type(self.method).surveys is not Method.surveys
        sizes = {c: len(self.shards[c].train) for c in clients} if alike else None
        return group(clients, downs, owns, self.settings.cohort, sizes)

    def _ask(self, round_: int, trained_with: Mapping[int, State]) -> list[list[Scores]]:
        """Put every exam to every client's model; one list of scores an exam."""
        method = self.method
        everyone = list(range(len(self.shards)))
        if not method.personal:
            # one global model serves every client
            down = stack([method.download(self.server, 0, round_ + 1)])
            return [self._answers(exam, everyone, down, {}) for exam in self.exams]
        downs = {
            c: trained_with[c]
            if method.evaluates_download == "trained" and c in trained_with
            else method.download(self.server, c, round_ + 1)
            for c in everyone
        }
        owns = {c: self.clients.get(c, {}) for c in everyone}
        if method.tune_epochs:
            owns = self._tuned(round_, downs, owns)
        found: list[dict[int, Scores]] = [{} for _ in self.exams]
        for members in group(everyone, downs, owns, self.settings.cohort):
            down = stack([downs[c] for c in members])
            own = stack([owns[c] for c in members])
            for scores, exam in zip(found, self.exams, strict=True):
                scores |= dict(zip(members, self._answers(exam, members, down, own), strict=True))
            self.observer(
                f"round {round_ + 1} of {self.settings.rounds}, evaluating",
                len(found[0]),
                len(everyone),
            )
        return [[scores[c] for c in everyone] for scores in found]

    def _answers(self, exam: Exam, members: Sequence[int], down: State, own: State) -> list[Scores]:
        scores = score(
            exam.method, members, down, own, exam.feed, {c: exam.images[c] for c in members}
        )
        return [scores[c] for c in members]

    def _tuned(
        self, round_: int, downs: Mapping[int, State], owns: Mapping[int, State]
    ) -> dict[int, State]:
        """Fine-tune every client for this evaluation alone; return what it would keep."""
        assert self.train_feed is not None
        images = {c: self.shards[c].train for c in downs}
        tuned: dict[int, State] = {}
        for members in self.cohorts(list(downs), downs, owns):
            outcome = train(
                self.method,
                members,
                stack([downs[c] for c in members]),
                stack([owns[c] for c in members]),
                self.train_feed,
                images,
                self.settings,
                round_,
                lambda what, done, total: self.observer("fine-tuning", done, total),
                epochs=self.method.tune_epochs,
                stream="tune",
                graphs=self.graphs,
            )
            tuned |= dict(zip(members, unstack(outcome.own, len(members)), strict=True))
        return tuned

    @property
    def finished(self) -> bool:
        """True when no round is left; a method that trains nothing has one."""
        return len(self.rounds) >= (self.settings.rounds if self.method.trains else 1)


def _marks(scores: Sequence[Scores], domains: tuple[str, ...]) -> dict[str, Any]:
    """Say how one exam went: unweighted means over clients, in all and domain by domain.

    The figure of a domain is a mean over the clients that have test images of it.
    """
    clients = [s.accuracy for s in scores]
    by_domain = {}
    for d, name in enumerate(domains):
        right = [s.answers[s.domains == d] == s.labels[s.domains == d] for s in scores]
        shares = [float(r.mean()) for r in right if len(r)]
        if shares:
            by_domain[name] = math.fsum(shares) / len(shares)
    return {
        "accuracy": math.fsum(clients) / len(clients),
        "macro_f1": math.fsum(s.macro_f1 for s in scores) / len(scores),
        "clients": clients,
        "domains": by_domain,
    }


def _size(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
