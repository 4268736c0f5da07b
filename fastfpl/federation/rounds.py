"""The in-process federation: rounds of download, local training, merge and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.profiler import record_function

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Dataset, Shard
from fastfpl.errors import NotConverged
from fastfpl.federation.budget import Budget
from fastfpl.federation.cohort import Scores, Share, gather, score, stack, train
from fastfpl.federation.feeds import Feed, Observer, silent
from fastfpl.federation.graphs import StepGraphs
from fastfpl.federation.models import answers_with
from fastfpl.federation.shared import SharedStates
from fastfpl.federation.states import StateFiles
from fastfpl.federation.steps import PHASE
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import Method, State
from fastfpl.methods.contract import asked, check_merged, furthest
from fastfpl.ops.memory import current_limit, memory_limit
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
    clients : StateFiles
        What clients keep, on disk.
    downloads : SharedStates
        What clients had downloaded when they last trained, if they are evaluated with it; on disk.
    tuned : SharedStates
        What clients kept of the fine-tuning before the last round's evaluation, on disk; only of a
        run with a folder.
    folder : Path or None
        Of the run.
    rounds : list of dict
        Rows of ``result.json``.
    trainer : Together or InTurn
        How the clients of a round train.
    graphs : StepGraphs or None
        What replays training steps, if anything does.
    budget : Budget or None
        What decides how many clients share a pass, if ``max_memory`` does.
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
    clients: StateFiles = field(default_factory=StateFiles)
    downloads: SharedStates = field(default_factory=SharedStates)
    tuned: SharedStates = field(default_factory=SharedStates)
    folder: Path | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    trainer: Together | InTurn = field(default_factory=Together)
    graphs: StepGraphs | None = None
    budget: Budget | None = None

    def facts(self) -> dict[str, Any]:
        """Say what a checkpoint must agree with: settings that decide figures, weights, data."""
        kept = settings_facts(self.settings, self.method.options.model_dump())
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
        luck = torch.rand(len(self.shards), generator=draw, dtype=torch.float32)
        return {c for c in selected if luck[c].item() < self.settings.dropout}

    def round(self) -> dict[str, Any]:
        """Play the next round and return its row."""
        round_, settings, method = len(self.rounds), self.settings, self.method
        self._forget_texts()  # a resumed run starts without any
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
        if self.train_feed is not None:
            with record_function(PHASE + "training"):
                self._train(round_, self.train_feed, row)
        self.tuned.clear()
        last = round_ == settings.rounds - 1 or not method.trains
        if last or (round_ + 1) % settings.evaluate_every == 0:
            with record_function(PHASE + "evaluation"):
                asked = self.ask(round_)
            for exam, scores in zip(self.exams, asked, strict=True):
                row["exams"][exam.name] = _marks(scores, exam.domains)
            headline = row["exams"][self.exams[0].name]
            row["clients"], row["accuracy"] = headline["clients"], headline["accuracy"]
        row["seconds"] = time.perf_counter() - begin
        self.rounds.append(row)
        return row

    def _train(self, round_: int, feed: Feed, row: dict[str, Any]) -> None:
        begin = time.perf_counter()
        method, selected = self.method, self.sample(round_)
        device = method.task.classes.tower.device
        lost = self.lost(round_, selected)
        # a thousand clients' worth does not fit into memory
        uploads = StateFiles(device=device, beside=self.folder)
        losses: dict[int, float] = {}
        seen = 0
        for turn in self.trainer.turns(self, feed, round_, selected, lost):
            outcome = turn.outcome
            seen += outcome.images
            for u, client in enumerate(turn.members):
                down = _row(turn.down, u)
                losses[client] = outcome.losses[u].item()
                row["bytes_down"] += _size(down)
                self.clients.put(client, _row(outcome.own, u))
                if client not in lost:
                    upload = _row(outcome.upload, u)
                    row["bytes_up"] += _size(upload)
                    uploads.put(client, upload)
                if method.evaluates_download == "trained":
                    self.downloads.put(client, down)
        counts = {c: len(self.shards[c].train) for c in uploads}
        self.server = self._merged(uploads, counts, round_)
        row["selected"] = selected
        row["lost"] = sorted(lost)
        row["loss"] = sum(losses[c] for c in selected) / len(losses)
        row["images_per_second"] = seen / (time.perf_counter() - begin)

    def _merged(
        self, uploads: StateFiles, counts: Mapping[int, int], round_: int
    ) -> dict[str, Tensor]:
        """Merge, and refuse a server that no client could go on from."""
        method, sent = self.method, dict.fromkeys(n for state in uploads.values() for n in state)
        with asked(method, "merge", upload=sent, server=self.server):
            merged = method.merge(self.server, uploads, counts, round_)
        merged = check_merged(method, self.server, merged)
        wrong = furthest({"merged": {name: t[None] for name, t in merged.items()}}, 1)
        if wrong is not None:
            _, name, _, value = wrong
            raise NotConverged(
                f"fastfpl.run: what is merged must stay finite, its squares too; got {value:g} in "
                f"{name!r} of the server in round {round_}; lower lr={self.settings.lr}"
            )
        return merged

    def alike(self, clients: Sequence[int]) -> dict[int, int] | None:
        """Say how many training images each client has, if that must be equal in a cohort."""
        # a survey sees whole training sets, which must be equally long to be stacked
        if type(self.method).surveys is Method.surveys:
            return None
        return {c: len(self.shards[c].train) for c in clients}

    def rehearse(self) -> None:
        """Let the budget see the cohorts of the first two rounds and the last before any is played.

        A run that does not fit is refused now. What clients send and keep has the shapes of one
        trial.
        """
        if self.budget is None:
            return
        method, feed = self.method, self.train_feed
        server, own = self.server, dict[str, Tensor]()
        counts = {c: len(s.train) for c, s in enumerate(self.shards)}
        one = max(counts, key=lambda c: counts[c])
        for round_ in sorted({0, 1, self.settings.rounds - 1}) if feed is not None else (0,):
            down = method.download(server, one, round_)
            if feed is not None:
                share = self.training_share(feed, round_, one, down, own)
                mine = {one: self.shards[one].train}
                with memory_limit(share.text):
                    outcome = train(
                        *(method, [one], stack([down]), stack([own]), feed, mine, self.settings),
                        *(round_, silent),
                        trial=True,
                    )
                self._forget_texts()
                own = _row(outcome.own, 0)
                upload = _row(outcome.upload, 0)
                uploads = dict.fromkeys(counts, upload) if upload else {}
                server = method.merge(server, uploads, counts if uploads else {}, round_)
                if method.evaluates_download == "merged":
                    down = method.download(server, one, round_ + 1)
            self._exam_share(one, down, own if method.personal else {})

    def training_share(
        self, feed: Feed, round_: int, client: int, down: State, own: State
    ) -> Share:
        """Say what the training of clients with states like these may take in a round."""
        if self.budget is None:
            return Share(self.settings.cohort, current_limit())
        mine = self.shards[client].train
        if self.alike([client]) is None:  # nobody looks at a whole training set
            # two of the largest batches of any client, of this one's images
            longest = max(len(s.train) for s in self.shards)
            mine = np.resize(mine, min(2 * self.settings.batch_size, longest))

        def fit(members: list[int], downs: State, owns: State) -> None:
            images = {client: mine}
            train(
                *(self.method, members, downs, owns, feed, images, self.settings, round_, silent),
                trial=True,
            )

        most = self.settings.cohort
        kind, apart = (down, own), self.method.apart
        return self.budget.share(
            "training", kind, apart, fit, client, len(mine), most, self._forget_texts
        )

    def _forget_texts(self) -> None:
        """Forget text features: what is encoded together decides the last bit."""
        for method in (self.method, *(exam.method for exam in self.exams)):
            method.task.text_features.clear()

    def ask(self, round_: int) -> list[list[Scores]]:
        """Put every exam to every client's model after a round; one list of scores an exam."""
        method = self.method
        everyone = list(range(len(self.shards)))
        if not method.personal:
            # one global model serves every client
            one, _ = self._answers_with(0, round_)
            share = self._exam_share(0, one, {})
            with memory_limit(share.text):
                down = stack([one])
                return [self._answers(exam, everyone, down, {}) for exam in self.exams]

        def states(client: int) -> tuple[State, State]:
            return self._answers_with(client, round_)

        def share_of(client: int, down: State, own: State) -> Share:
            share = self._exam_share(client, down, own)
            if method.tune_epochs:
                assert self.train_feed is not None
                tuning = self.training_share(self.train_feed, round_, client, down, own)
                share = share.both(tuning)
            return share

        found: list[dict[int, Scores]] = [{} for _ in self.exams]
        alike = self.alike(everyone) if method.tune_epochs else None
        for part in gather(everyone, states, share_of, alike):
            members, own = part.members, part.own
            with memory_limit(part.share.text):
                if method.tune_epochs:
                    own = self._tuned(round_, members, part.down, own)
                    for u, client in enumerate(members if self.folder is not None else ()):
                        self.tuned.put(client, _row(own, u))
                for scores, exam in zip(found, self.exams, strict=True):
                    answers = self._answers(exam, members, part.down, own)
                    scores |= dict(zip(members, answers, strict=True))
            self.observer(
                f"round {round_ + 1} of {self.settings.rounds}, evaluating",
                len(found[0]),
                len(everyone),
            )
        return [[scores[c] for c in everyone] for scores in found]

    def _answers_with(self, client: int, round_: int) -> tuple[State, State]:
        return answers_with(
            self.method, self.server, self.clients, self.downloads, client, round_ + 1
        )

    def _exam_share(self, client: int, down: State, own: State) -> Share:
        """Say what the evaluation of clients with states like these may take."""
        if self.budget is None:
            return Share(self.settings.cohort, current_limit())

        def ask(members: list[int], downs: State, owns: State) -> None:
            for exam in self.exams:
                longest = max(exam.images, key=len)
                images = dict.fromkeys(members, longest)
                score(exam.method, members, downs, owns, exam.feed, images, trial=True)

        # one global model serves all
        most = self.settings.cohort if self.method.personal else 1
        kind, apart = (down, own), self.method.apart
        return self.budget.share(
            "evaluation", kind, apart, ask, client, None, most, self._forget_texts
        )

    def _answers(self, exam: Exam, members: Sequence[int], down: State, own: State) -> list[Scores]:
        scores = score(
            exam.method, members, down, own, exam.feed, {c: exam.images[c] for c in members}
        )
        return [scores[c] for c in members]

    def _tuned(self, round_: int, members: list[int], down: State, own: State) -> State:
        """Fine-tune clients for this evaluation alone; return what they would keep, stacked."""
        assert self.train_feed is not None
        images = {c: self.shards[c].train for c in members}
        return train(
            self.method,
            members,
            down,
            own,
            self.train_feed,
            images,
            self.settings,
            round_,
            lambda what, done, total: self.observer("fine-tuning", done, total),
            epochs=self.method.tune_epochs,
            stream="tune",
            graphs=self.graphs,
        ).own

    @property
    def finished(self) -> bool:
        """True when no round is left; a method that trains nothing has one."""
        return len(self.rounds) >= (self.settings.rounds if self.method.trains else 1)


def settings_facts(settings: Settings, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide figures, and with them whether a run can be resumed."""
    loose = {*("rounds", "cohort", "threads", "device", "root"), *("max_memory", "cuda_graphs")}
    loose |= {"workers", "resident"}
    if settings.schedule == "cosine-rounds":
        loose.remove("rounds")
    kept = {k: v for k, v in settings.model_dump().items() if k not in loose}
    return {**kept, "options": dict(options)}


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


def _row(state: State, u: int) -> State:
    """Return what is one client's of a stacked state."""
    return {name: tensor[u] for name, tensor in state.items()}


def _size(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
