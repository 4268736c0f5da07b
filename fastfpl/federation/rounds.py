"""The in-process federation: rounds of download, local training, merge and evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Dataset, Shard
from fastfpl.federation.checkpoint import settings_facts
from fastfpl.federation.exams import Exam, Examiner, marks
from fastfpl.federation.merging import Privacy
from fastfpl.federation.models import answers_with
from fastfpl.federation.newcomers import Newcomers
from fastfpl.federation.result import empty_row
from fastfpl.federation.sampling import Sampling
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

__all__ = ["Federation"]


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
                asked = self.ask()
            exams = self.exams
            for exam, scores in zip(exams, asked, strict=True):
                line["exams"][exam.name] = marks(scores, exam.domains)
            headline = line["exams"][exams[0].name]
            line["clients"], line["accuracy"] = headline["clients"], headline["accuracy"]
        line["seconds"] = time.perf_counter() - begin
        self.rounds.append(line)
        return line

    def _train(self, line: dict[str, Any]) -> None:
        """Let the clients of the round train, merge what arrives, and note both in its row."""
        begin = time.perf_counter()
        method, now = self.method, self.now
        device = method.task.classes.tower.device
        call = self.sampling.call(now.number)
        # a thousand clients' worth does not fit into memory
        uploads = StateFiles(device=device, beside=self.folder)
        losses: dict[int, float] = {}
        seen, handed = 0, now.handed
        for turn in self.order.turns(self.trainer, now, call, self.clients):
            outcome, handed = turn.outcome, turn.handed
            seen += outcome.images
            for u, client in enumerate(turn.members):
                down = row(turn.down, u)
                losses[client] = outcome.losses[u].item()
                line["bytes_down"] += _size(down)
                self.clients.put(client, row(outcome.own, u))
                if client not in call.lost:
                    upload = row(outcome.upload, u)
                    line["bytes_up"] += _size(upload)
                    uploads.put(client, upload)
                if method.evaluates_download == "trained":
                    self.downloads.put(client, down)
        sent: Mapping[int, Upload] = uploads
        counts = {c: len(self.trainer.images[c]) for c in uploads}
        if self.privacy is not None:
            down = now.download(method, call.selected[0])
            sent, counts = self.privacy.merged(down, uploads, len(call.selected))
            line["epsilon"] = self.privacy.epsilon(now.number + 1)
        self.now = now.after(method, sent, counts, handed)
        line["selected"] = call.selected
        line["lost"] = sorted(call.lost)
        line["loss"] = sum(losses[c] for c in call.selected) / len(losses)
        line["images_per_second"] = seen / (time.perf_counter() - begin)

    def ask(self) -> list[list[Scores]]:
        """Put every exam to the clients' models as they are now; one list of scores an exam."""
        now, keep = self.now, None if self.folder is None else self.tuned.put

        def states(client: int) -> tuple[State, State]:
            return answers_with(
                self.method, now.server, self.clients, self.downloads, client, now.number
            )

        asked = self.examiner.ask(now.number - 1, states, keep)
        if self.newcomers is None:
            return asked
        return [*self.newcomers.ask(self.trainer, now, keep), *asked]

    @property
    def finished(self) -> bool:
        """True when no round is left; a method that trains nothing has one."""
        return len(self.rounds) >= (self.settings.rounds if self.method.trains else 1)


def _size(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
