"""The in-process federation: rounds of download, local training, merge and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Dataset, Shard
from fastfpl.federation.checkpoint import settings_facts
from fastfpl.federation.exams import Exam, Examiner, marks
from fastfpl.federation.merging import Privacy, epsilon_after
from fastfpl.federation.models import answers_with
from fastfpl.federation.newcomers import Newcomers
from fastfpl.federation.result import empty_row
from fastfpl.federation.robust import Robust
from fastfpl.federation.sampling import Call, Sampling
from fastfpl.federation.server import Round
from fastfpl.federation.shared import SharedStates
from fastfpl.federation.states import StateFiles
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload
from fastfpl.training.gathering import row
from fastfpl.training.scoring import Scores
from fastfpl.training.steps import PHASE
from fastfpl.training.trainer import Trainer

__all__ = ["Federation", "Played", "StateKeeper"]


class StateKeeper(Protocol):
    """What takes up states of clients."""

    def put(self, client: int, state: Mapping[str, Tensor], /) -> None:
        """Take up the state of a client."""


@dataclass
class Played:
    """What the local training of a round was.

    Attributes
    ----------
    losses : dict from client to float
        Of the last local epoch.
    images, bytes_up, bytes_down : int
        That were trained on, sent and received, of all clients together.
    handed : State
        What the last client hands on.
    """

    losses: dict[int, float] = field(default_factory=dict)
    images: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    handed: State = field(default_factory=dict)


@dataclass
class Federation:
    """A prepared run (see `prepare`): what plays its rounds, and the state that they move.

    Attributes
    ----------
    clip : FrozenCLIP
    dataset : Dataset
        What is trained on.
    shards : list of Shard
        Each client's images.
    names : tuple of str
        What the data set calls the clients, newcomers last; empty if they are but numbers.
    trainer : Trainer
    examiner : Examiner
    sampling : Sampling
    now : Round
        What the server goes on from.
    order : Together or InTurn
        How the clients of a round train.
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
    newcomers : Newcomers or None
        Clients that join after every evaluated round, if the scenario has some.
    privacy : Privacy or None
        What cuts uploads and adds noise before they are merged.
    robust : Robust or None
        What a merge that bears hostile clients takes of the uploads.
    """

    clip: FrozenCLIP
    dataset: Dataset
    shards: list[Shard]
    trainer: Trainer
    examiner: Examiner
    sampling: Sampling
    now: Round
    order: Together | InTurn = field(default_factory=Together)
    clients: StateFiles = field(default_factory=StateFiles)
    downloads: SharedStates = field(default_factory=SharedStates)
    tuned: SharedStates = field(default_factory=SharedStates)
    names: tuple[str, ...] = ()
    folder: Path | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    newcomers: Newcomers | None = None
    privacy: Privacy | None = None
    robust: Robust | None = None

    @property
    def exams(self) -> list[Exam]:
        """All that is asked; the first is the headline."""
        arriving = [] if self.newcomers is None else self.newcomers.exams
        return [*arriving, *self.examiner.exams]

    @property
    def settings(self) -> Settings:
        """Those of the run."""
        return self.trainer.settings

    @property
    def method(self) -> Method:
        """What is trained."""
        return self.trainer.method

    @property
    def server(self) -> State:
        """What the server holds."""
        return self.now.server

    def facts(self) -> dict[str, Any]:
        """Say what a checkpoint must agree with: settings that decide figures, weights, data."""
        kept = settings_facts(self.settings, self.method.options.model_dump())
        return {
            **kept,
            "weights": self.clip.weights_digest,
            "train_images": self.dataset.train.fingerprint,
            "test_images": [exam.feed.split.fingerprint for exam in self.exams],
        }

    def round(self) -> dict[str, Any]:
        """Play the next round and return its row."""
        round_, settings, method = self.now.number, self.settings, self.method
        self.examiner.forget()  # a resumed run starts without any
        begin = time.perf_counter()
        line = empty_row(round_)
        if self.trainer.feed is not None:
            with record_function(PHASE + "training"):
                self._train(line)
        else:
            self.now = self.now.untrained()
        self.tuned.clear()
        last = round_ == settings.rounds - 1 or not method.trains
        if last or (round_ + 1) % settings.evaluate_every == 0:
            with record_function(PHASE + "evaluation"):
                self._evaluate(line)
        line["seconds"] = time.perf_counter() - begin
        self.rounds.append(line)
        return line

    def _train(self, line: dict[str, Any]) -> None:
        """Let the clients of the round train, merge what arrives, and note both in its row."""
        begin = time.perf_counter()
        call = self.sampling.call(self.now.number)
        # a thousand clients' worth does not fit into memory
        uploads = StateFiles(device=self._device, beside=self.folder)
        played = self._play(call, uploads, self.downloads)
        self._merge(call, played, uploads, line)
        self._note(call, played, line, begin)

    def _play(self, call: Call, uploads: StateFiles, downloads: StateKeeper) -> Played:
        """Let clients train: what they send goes to ``uploads``, what they keep to its files."""
        method = self.method
        played = Played(handed=self.now.handed)
        for turn in self.order.turns(self.trainer, self.now, call, self.clients):
            outcome, played.handed = turn.outcome, turn.handed
            played.images += outcome.images
            for u, client in enumerate(turn.members):
                down = row(turn.down, u)
                played.losses[client] = outcome.losses[u].item()
                played.bytes_down += _size(down)
                self.clients.put(client, row(outcome.own, u))
                if client not in call.lost:
                    upload = row(outcome.upload, u)
                    played.bytes_up += _size(upload)
                    uploads.put(client, upload)
                if method.evaluates_download == "trained":
                    downloads.put(client, down)
        return played

    def _merge(self, call: Call, played: Played, uploads: StateFiles, line: dict[str, Any]) -> None:
        """Merge what arrived into the next `Round`."""
        method, now = self.method, self.now
        sent: Mapping[int, Upload] = uploads
        counts: Mapping[int, int] = {c: len(self.trainer.images[c]) for c in uploads}
        if self.privacy is not None:
            down = now.download(method, call.selected[0])
            sent, counts = self.privacy.merged(down, uploads, len(call.selected))
        epsilon = epsilon_after(self.trainer.settings, now.number + 1)
        if epsilon is not None:
            line["epsilon"] = epsilon
        if self.robust is not None:
            down_of = partial(now.download, method)
            sent, counts, line["merge"] = self.robust.merged(uploads, down_of, counts)
        self.now = now.after(method, sent, counts, played.handed)

    def _note(self, call: Call, played: Played, line: dict[str, Any], begin: float) -> None:
        """Note in a round's row who trained and how it went."""
        line["selected"] = call.selected
        line["lost"] = sorted(call.lost)
        line["bytes_up"], line["bytes_down"] = played.bytes_up, played.bytes_down
        line["loss"] = sum(played.losses[c] for c in call.selected) / len(played.losses)
        line["images_per_second"] = played.images / (time.perf_counter() - begin)

    @property
    def _device(self) -> torch.device:
        return self.method.task.classes.tower.device

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Put every exam to the clients' models and note their marks in the round's row."""
        exams = self.exams
        self._mark(
            line,
            [marks(s, exam.domains) for s, exam in zip(self.ask(), exams, strict=True)],
        )

    def _mark(self, line: dict[str, Any], all_marks: Sequence[dict[str, Any]]) -> None:
        """Note the marks of every exam; the first one's are the headline."""
        for exam, mine in zip(self.exams, all_marks, strict=True):
            line["exams"][exam.name] = mine
        line["clients"], line["accuracy"] = all_marks[0]["clients"], all_marks[0]["accuracy"]

    def ask(self) -> list[list[Scores]]:
        """Put every exam to the clients' models as they are now; one list of scores an exam."""
        return self._ask(None, None, None if self.folder is None else self.tuned.put)

    def _ask(
        self,
        clients: Sequence[int] | None,
        places: Sequence[int] | None,
        keep: Callable[[int, State], None] | None,
    ) -> list[list[Scores]]:
        """Ask these clients, and newcomers of these places; all where there is None."""
        now = self.now

        def states(client: int) -> tuple[State, State]:
            return answers_with(
                self.method, now.server, self.clients, self.downloads, client, now.number
            )

        asked = self.examiner.ask(now.number - 1, states, keep, clients)
        if self.newcomers is None:
            return asked
        return [*self.newcomers.ask(self.trainer, now, keep, places), *asked]

    @property
    def finished(self) -> bool:
        """True when no round is left; a method that trains nothing has one."""
        return len(self.rounds) >= (self.settings.rounds if self.method.trains else 1)


def _size(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
