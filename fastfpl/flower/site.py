"""A client of a networked run: it joins, trains on its own images, and answers exams."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfpl import __version__
from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.errors import FastfplError, InputError, shown
from fastfpl.federation import Federation
from fastfpl.federation.checkpoint import settings_facts
from fastfpl.federation.exams import mark
from fastfpl.federation.experiment import pixels_of, threads
from fastfpl.federation.preparation import OWN, Plan, plan, prepare, settled
from fastfpl.federation.result import deal, peak_memory
from fastfpl.flower.identity import digest_of, identity, task_digest
from fastfpl.flower.letters import SCHEMA, Letter, Refused, digest, pack, unpack
from fastfpl.flower.memory import Memory
from fastfpl.flower.own import own_dataset, own_plan
from fastfpl.methods import State
from fastfpl.ops.faces import recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.precision import without_autocast
from fastfpl.training.gathering import row, stack
from fastfpl.training.preparation import choose_device

__all__ = ["Site", "refusal"]


def refusal(why: str, head: Mapping[str, Any] | None = None) -> Letter:
    """Answer that something is refused, and why."""
    kept = {key: (head or {}).get(key) for key in ("round", "client")}
    return Letter({"schema": SCHEMA, "kind": "refusal", "why": why, **kept})


class Site:
    """What answers a client's letters.

    It loads the CLIP and encodes its images with the first letter that needs them; what was
    answered already is answered from disk.

    Parameters
    ----------
    settings : Settings
        Of the run.
    client : int
        Which client this is.
    folder : Path
        Where it keeps its state.
    cache : Path, optional
        Folder of its feature store.
    wire : str
        How floats travel.
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    pretrained : str, optional
        What the run calls its weights, where ``settings`` names this site's own copy; which
        weights they are, digests say.
    data : str, optional
        Where its own images lie, as ``folder:PATH``, in a run with ``dataset="own"``.
    name : str, optional
        What people call it, in such a run.
    """

    def __init__(
        self,
        settings: Settings,
        client: int,
        folder: Path,
        *,
        cache: Path | None = None,
        wire: str = "exact",
        model: FrozenCLIP | None = None,
        pretrained: str | None = None,
        data: str | None = None,
        name: str | None = None,
    ) -> None:
        own = settings.dataset == OWN
        if own != (data is not None):
            rule = "name its own images, as folder:PATH," if own else "be left out of a node"
            raise InputError(
                f"fastfpl.flower: data must {rule} with dataset={settings.dataset!r}; got "
                f"{shown(data)} at client {client}"
            )
        self._pretrained = pretrained
        self._data = data
        self._root = settings.root if own else None
        if own:
            settings = settings.model_copy(update={"root": None})
        self._title = name
        self.settings = settings
        self.client = client
        self.folder = folder
        self._cache = cache
        self._wire = wire
        self._model = model

    @cached_property
    def planned(self) -> Plan:
        """The data, dealt out."""
        if self._data is not None:
            own = own_dataset(self.settings, self._data, self._root)
            return own_plan(self.settings, self.client, own, self._model)
        found = plan(self.settings, model=self._model)
        clients = len(found.scenario.shards)
        if not 0 <= self.client < clients:
            raise InputError(
                f"fastfpl.flower: client must be one of {clients}, 0 to {clients - 1}; got "
                f"{self.client}"
            )
        return found

    @cached_property
    def federation(self) -> Federation:
        """The client's own part of the run, ready to train."""
        return prepare(self.planned, model=self._model, cache=self._cache, members=[self.client])

    def answer(self, letter: Letter) -> Letter:
        """Answer a letter; what cannot be done is answered by a refusal with its reason."""
        head = letter.head
        try:
            if head.get("schema") != SCHEMA:
                raise Refused(
                    f"fastfpl.flower: a letter must have schema {SCHEMA}; got "
                    f"{shown(head.get('schema'))}; use one version of fastfpl on both sides"
                )
            kind = head.get("kind")
            acts = {"join": self._join, "train": self._train, "ask": self._ask}
            if kind not in acts:
                raise Refused(
                    f"fastfpl.flower: a letter must ask to join, train or ask; got {shown(kind)}"
                )
            if kind != "join" and head.get("client") != self.client:
                raise Refused(
                    f"fastfpl.flower: a letter must be for client {self.client}; got "
                    f"{shown(head.get('client'))}"
                )
            with (
                threads(self.settings.threads),
                without_autocast(),
                memory_limit(None),
                recorded_faces() as faces,
            ):
                answer = acts[kind](letter)
            said = {op: sorted(names) for op, names in faces.items()}
            memory = peak_memory(choose_device(self.settings.device))
            return Letter({**answer.head, "faces": said, "memory": memory}, answer.arrays)
        except FastfplError as error:
            return refusal(str(error), head)

    # -- joining ---------------------------------------------------------------------------------

    def _join(self, letter: Letter) -> Letter:
        planned, scenario = self.planned, self.planned.scenario
        federation = self.federation
        exams = federation.examiner.exams
        domains = scenario.client_domains
        return Letter(
            {
                "schema": SCHEMA,
                "kind": "card",
                "client": self.client,
                "clients": len(scenario.shards),
                "held": self._memory(letter.head).holds,
                "identity": identity(federation.clip, planned.kind, self._named, planned.options),
                "classes": list(scenario.dataset.classnames),
                "domains": list(scenario.dataset.domains),
                "client_domains": None if domains is None else list(domains),
                "images": len(scenario.shards[self.client].train),
                **({} if self._title is None else {"name": self._title}),
                "exams": [
                    {
                        "name": exam.name,
                        "about": exam.about,
                        "domains": list(exam.domains),
                        "images": len(exam.images[self.client]),
                    }
                    for exam in exams
                ],
                "data": {
                    "name": scenario.dataset.name,
                    "skipped": scenario.dataset.skipped,
                    "notes": list(scenario.dataset.notes),
                    "activation": federation.clip.text.activation,
                    "deal": deal(scenario.shards),
                    "training": {
                        "used": len(np.unique(np.concatenate([s.train for s in scenario.shards]))),
                        "there": len(scenario.dataset.train),
                    },
                    "clients": list(federation.names),
                    "pixels": pixels_of(federation),
                    "train_images": scenario.dataset.train.fingerprint,
                    "test_images": [exam.feed.split.fingerprint for exam in exams],
                },
            }
        )

    # -- training --------------------------------------------------------------------------------

    def _train(self, letter: Letter) -> Letter:
        head = letter.head
        round_, memory = _round_of(head), self._memory(head)
        asked = digest(letter.arrays)
        before = memory.answer(round_, asked)
        if before is not None:
            return before
        if memory.round is not None and memory.round > round_:
            raise Refused(
                f"fastfpl.flower: a letter must be of round {memory.round} or later, which client "
                f"{self.client} has trained in; got round {round_}; resume from the last "
                "checkpoint, or remove the client's folder"
            )
        begin = time.perf_counter()
        federation = self.federation
        trainer, method = federation.trainer, federation.method
        self._check_task(head)
        if trainer.feed is None:
            raise Refused(f"fastfpl.flower: {method.name} trains nothing; got a letter to train")
        down, own = self._down(letter), self._here(memory.state(round_))
        share = trainer.share(self.client, down, own, round_)
        with memory_limit(share.text):
            outcome = trainer.train(
                [self.client], stack([down]), stack([own]), round_, trainer.observer
            )
        upload, kept = row(outcome.upload, 0), row(outcome.own, 0)
        answer = Letter(
            {
                "schema": SCHEMA,
                "kind": "update",
                "federation": head["federation"],
                "client": self.client,
                "round": round_,
                "asked": asked,
                "images": len(trainer.images[self.client]),
                "loss": outcome.losses[0].item(),
                "seen": outcome.images,
                "seconds": time.perf_counter() - begin,
            },
            pack(upload, self._wire),
        )
        keeps = down if method.evaluates_download == "trained" else {}
        memory.keep(round_, asked, self._facts, own, kept or own, keeps, answer)
        return answer

    # -- exams -----------------------------------------------------------------------------------

    def _ask(self, letter: Letter) -> Letter:
        head = letter.head
        round_, memory = _round_of(head), self._memory(head)
        federation = self.federation
        method, examiner = federation.method, federation.examiner
        self._check_task(head)
        examiner.forget()

        if head.get("held") and not memory.holds:
            raise Refused(
                "fastfpl.flower: a letter must bring what a client is asked with where it has kept "
                f"nothing; got one without, for client {self.client}"
            )

        def states(client: int) -> tuple[State, State]:
            if not method.personal:
                return self._down(letter), {}
            kept = self._here(memory.down)
            return kept or self._down(letter), self._here(memory.own)

        def keep(client: int, tuned: State) -> None:
            memory.keep_tuned(round_, tuned)

        asked = examiner.ask(round_, states, keep)
        return Letter(
            {
                "schema": SCHEMA,
                "kind": "marks",
                "federation": head["federation"],
                "client": self.client,
                "round": round_,
                "marks": [
                    {"name": exam.name, "images": scores[0].images, **mark(scores[0], exam.domains)}
                    for exam, scores in zip(examiner.exams, asked, strict=True)
                ],
            }
        )

    # -- small -----------------------------------------------------------------------------------

    @property
    def _named(self) -> Settings:
        """The settings as the run has them: weights by the run's name for them."""
        # before the data set says how many clients there are: the server has none
        settings, _, _ = settled(self.settings, self._model)
        if self._pretrained is None:
            return settings
        return settings.model_copy(update={"pretrained": self._pretrained})

    @property
    def _facts(self) -> dict[str, Any]:
        kept = settings_facts(self._named, self.planned.options)
        return {"settings": digest_of(kept), "library": __version__}

    def _memory(self, head: Mapping[str, Any]) -> Memory:
        memory = Memory(self.folder, str(head.get("federation")), self.client)
        if memory.round is not None and memory.facts != self._facts:
            raise Refused(
                "fastfpl.flower: a federation must keep its settings and the version of fastfpl; "
                f"got {memory.facts} then, {self._facts} now, at client {self.client}"
            )
        return memory

    def _check_task(self, head: Mapping[str, Any]) -> None:
        """Refuse a task of other classes, domains or clients than this site's."""
        task = self.federation.method.task
        domains = None if task.client_domains is None else list(task.client_domains)
        mine = task_digest(list(task.classes.names), list(task.domains), domains, task.clients)
        if head.get("task") != mine:
            raise Refused(
                "fastfpl.flower: classes, domains and clients must be the same on both sides; got "
                f"digest {shown(head.get('task'))} from the server, {mine} at client {self.client}"
            )

    def _down(self, letter: Letter) -> State:
        """Return what was downloaded, in the dtypes in which it was before it travelled."""
        wanted = letter.head.get("dtypes", {})
        like = {name: getattr(torch, dtype) for name, dtype in wanted.items() if dtype in _FLOATS}
        return unpack(letter.arrays, like, self.federation.clip.device)

    def _here(self, state: Mapping[str, Tensor]) -> State:
        return {name: tensor.to(self.federation.clip.device) for name, tensor in state.items()}


_FLOATS = ("float32", "float64", "float16", "bfloat16")


def _round_of(head: Mapping[str, Any]) -> int:
    round_ = head.get("round")
    if not isinstance(round_, int) or isinstance(round_, bool) or not 0 <= round_ < 2**40:
        raise Refused(f"fastfpl.flower: a round must be a number from 0; got {shown(round_)}")
    return round_
