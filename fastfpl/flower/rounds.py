"""The rounds of a networked run: clients train, what they send is merged, exams are put to them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.federation.exams import joined
from fastfpl.federation.merging import epsilon_after
from fastfpl.federation.result import empty_row
from fastfpl.federation.sampling import Sampling
from fastfpl.federation.server import Round
from fastfpl.federation.states import StateFiles
from fastfpl.flower.checks import Card, Update, check_marks, check_update
from fastfpl.flower.correspondence import Correspondence
from fastfpl.flower.letters import SCHEMA, Letter, digest, pack
from fastfpl.flower.post import exchange
from fastfpl.flower.preparation import Merging
from fastfpl.flower.roster import Roster
from fastfpl.flower.rules import Rules
from fastfpl.flower.secagg_server import SecureMean
from fastfpl.flower.status import Status
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload

__all__ = ["Rounds"]


@dataclass
class Rounds:
    """What plays the rounds of a run.

    Attributes
    ----------
    settings : Settings
    rules : Rules
    method : Method
    device : torch.device
    folder : Path
        The run's, in which uploads lie until they are merged.
    head : Card
        With the classes, domains, clients and exams of the run.
    sampling : Sampling
    merging : Merging
        What clients send, and what stands between that and the method's own merge.
    roster : Roster
    status : Status
    correspondence : Correspondence
    """

    settings: Settings
    rules: Rules
    method: Method
    device: torch.device
    folder: Path
    head: Card
    sampling: Sampling
    merging: Merging
    roster: Roster
    status: Status
    correspondence: Correspondence

    def play(self, now: Round) -> tuple[dict[str, Any], Round]:
        """Play a round: (its row, what comes next)."""
        settings, trains, begin = self.settings, self.method.trains, time.perf_counter()
        round_ = now.number
        told: dict[str, Any] = {"refused": [], "failed": [], "absent": [], "bytes_exam": 0}
        line = {**empty_row(round_), "flower": told}
        self.correspondence.greet(self.rules.grace)
        now = self._train(now, line) if trains else now.untrained()
        last = round_ == settings.rounds - 1 or not trains
        if last or (round_ + 1) % settings.evaluate_every == 0:
            self._ask(now, line)
        line["seconds"] = time.perf_counter() - begin
        return line, now

    def _train(self, now: Round, line: dict[str, Any]) -> Round:
        """Let the called clients train, merge what was taken, and note both in the row."""
        begin, method = time.perf_counter(), self.method
        call = self.sampling.call(now.number)
        self.status.tell(f"round {now.number + 1} of {self.settings.rounds}, training")
        uploads = StateFiles(device=self.device, beside=self.folder)

        def images_of(client: int) -> int:
            return self.roster.cards[client].images

        # under masks, what a client says is checked without its arrays
        sends, counts = self.merging.wanted.sent, self.merging.counts
        masked = counts and SecureMean(
            sends,
            images_of,
            counts,
            self.rules,
            self.device,
            self.status.summed_in(now.number),
            partial(self.status.sums, now.number),
        )

        def letter(client: int) -> Letter:
            sent = self._letter("train", client, now.number, now.download(method, client))
            line["bytes_down"] += sent.nbytes
            return sent

        def take(client: int, question: Letter, answer: Letter) -> Update:
            update = check_update(
                answer,
                federation=self.status.federation,
                client=client,
                round_=now.number,
                asked=digest(question.arrays),
                images=images_of(client),
                wanted={} if masked else sends,
                rules=self.rules,
                device=self.device,
            )
            if not masked and client not in call.lost:
                uploads.put(client, update.upload)
                line["bytes_up"] += update.nbytes
            self.roster.holding.add(client)
            return update

        how = masked.exchange if masked else exchange
        try:
            found = self.correspondence.reach(
                "train", now.number, call.selected, letter, take, line["flower"], how
            )
        except InputError as error:
            if not masked or masked.asked_of is None:
                raise
            raise InputError(
                f"{error}; of clients {', '.join(map(str, sorted(masked.asked_of)))} a sum was "
                "asked for, and another one of this round would tell the difference: all of them "
                "must come"
            ) from None
        sent: Mapping[int, Upload] = uploads
        images: Mapping[int, int] = {c: images_of(c) for c in uploads}
        if masked and masked.mean is not None:  # the method's merge is of equal ones
            sent, images = dict.fromkeys(found, masked.mean), dict.fromkeys(found, 1)
            line["bytes_up"], line["bytes_down"] = masked.nbytes_up, masked.nbytes_down
        if self.merging.privacy is not None:
            down = now.download(method, call.selected[0])
            sent, images = self.merging.privacy.merged(down, uploads, len(call.selected))
        epsilon = epsilon_after(self.settings, now.number + 1)
        if epsilon is not None:
            line["epsilon"] = epsilon
        if self.merging.robust is not None:
            down_of = partial(now.download, method)
            sent, images, line["merge"] = self.merging.robust.merged(uploads, down_of, images)
        after = now.after(method, sent, images, {})
        line["selected"] = list(call.selected)
        line["lost"] = sorted(c for c in call.selected if c in call.lost or c not in found)
        line["loss"] = sum(found[c].loss for c in call.selected if c in found) / len(found)
        seen = sum(update.seen for update in found.values())
        line["images_per_second"] = seen / (time.perf_counter() - begin)
        return after

    def _ask(self, now: Round, line: dict[str, Any]) -> None:
        """Put the exams to the clients that are there, and note their marks in the row."""
        method, head, round_ = self.method, self.head, now.number - 1
        told, holding = line["flower"], self.roster.holding
        self.status.tell(f"round {round_ + 1} of {self.settings.rounds}, exams")

        kept = method.personal and method.evaluates_download == "trained"
        asked: set[int] = set()

        def letter(client: int) -> Letter:
            if client in asked:  # it may have kept nothing after all
                holding.discard(client)
            asked.add(client)
            if kept and client in holding:
                return self._letter("ask", client, round_, {}, held=True)
            whose = client if method.personal else 0
            sent = self._letter("ask", client, round_, now.download(method, whose))
            told["bytes_exam"] += sent.nbytes
            return sent

        def take(client: int, question: Letter, answer: Letter) -> list[dict[str, Any]]:
            return check_marks(
                answer,
                federation=self.status.federation,
                client=client,
                round_=round_,
                exams=self.roster.cards[client].exams,
            )

        everyone = range(head.clients)
        found = self.correspondence.reach("ask", round_, everyone, letter, take, told)
        holding -= asked - set(found)  # who lost its folder gets the whole the next time
        for k, exam in enumerate(head.exams):
            each = [found[c][k] if c in found else None for c in everyone]
            line["exams"][exam["name"]] = joined(each, tuple(exam["domains"]))
        headline = line["exams"][head.exams[0]["name"]]
        line["clients"], line["accuracy"] = headline["clients"], headline["accuracy"]

    def _letter(
        self, kind: str, client: int, round_: int, down: State, *, held: bool = False
    ) -> Letter:
        return Letter(
            {
                "schema": SCHEMA,
                "kind": kind,
                "federation": self.status.federation,
                "client": client,
                "round": round_,
                "task": self.head.task,
                "dtypes": {n: str(t.dtype).removeprefix("torch.") for n, t in down.items()},
                **({"held": True} if held else {}),
            },
            pack(down, self.rules.wire),
        )
