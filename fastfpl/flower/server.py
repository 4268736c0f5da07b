"""The server of a networked run: its folder, from the first client that joins to the result."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.errors import Damaged, FastfplError, InputError
from fastfpl.features import TextFeatures
from fastfpl.federation import Result
from fastfpl.federation.checkpoint import (
    Checkpoint,
    check_checkpoint,
    files_of,
    load_checkpoint,
    save_checkpoint,
    settings_facts,
)
from fastfpl.federation.experiment import (
    RoundObserver,
    refuse_held,
    run_name,
    threads,
    unseen,
)
from fastfpl.federation.lock import Held, alone_in
from fastfpl.federation.models import task_of
from fastfpl.federation.preparation import OWN
from fastfpl.federation.result import (
    environment,
    forget_peak_memory,
    peak_memory,
    summarise,
)
from fastfpl.federation.sampling import Sampling
from fastfpl.federation.server import Round
from fastfpl.federation.shared import DOWNLOADS, TUNED, SharedStates
from fastfpl.federation.states import CLIENTS, StateFiles
from fastfpl.flower.checks import Card
from fastfpl.flower.correspondence import Correspondence
from fastfpl.flower.identity import identity, task_digest
from fastfpl.flower.post import Post
from fastfpl.flower.preparation import checked, expected_clients, merging
from fastfpl.flower.roster import Roster
from fastfpl.flower.rounds import Rounds
from fastfpl.flower.rules import Rules
from fastfpl.flower.status import STATUS, Status, read_status
from fastfpl.methods import method_source
from fastfpl.methods.contract import may_follow
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.precision import without_autocast
from fastfpl.released import as_released
from fastfpl.tracking import Callback, RunInfo
from fastfpl.tracking.callback import Told
from fastfpl.tracking.lines import Lines
from fastfpl.training.preparation import choose_device, load_model, make_task

__all__ = ["Server", "serve"]


def serve(
    settings: Settings,
    rules: Rules,
    out: Path,
    post: Post,
    *,
    resume: bool = False,
    model: FrozenCLIP | None = None,
    on_round: RoundObserver = unseen,
    callbacks: Sequence[Callback] = (),
    log: Callable[[str], None] = print,
    version: str = "",
) -> Result:
    """Play a run whose clients are elsewhere; its folder is as that of `fastfpl.run`.

    Parameters
    ----------
    settings : Settings
    rules : Rules
    out : Path
        Gets ``result.json``, checkpoints, and what is going on (`fastfpl.flower.status`).
    post : Post
        What carries letters.
    resume : bool
        Go on from the checkpoint in ``out``, or start if there is none.
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    on_round, log : callable
        Told of rounds that ended, and of everything else in sentences.
    callbacks : sequence of Callback
        As in `fastfpl.run`.
    version : str
        Of what carries letters, for the result.

    Returns
    -------
    Result

    Raises
    ------
    FastfplError
        What cannot be played, or whose clients stay away for longer than ``patience``; what ended
        is kept, and ``resume`` goes on.
    """
    refuse_held(out, resume=True)
    with alone_in(out) as held, threads(settings.threads), without_autocast(), memory_limit(None):
        refuse_held(out, resume)
        forget_peak_memory()
        server = Server(settings, rules, held, post, resume, model, log, version)
        told = Told(callbacks)
        try:
            result = server.play(on_round, told)
        except BaseException as error:
            told.stop()
            if isinstance(error, FastfplError):
                server.status.tell("stopped", why=str(error))
            raise
        result.save(out)
        server.status.tell("finished")
        told.end(result.final)
        return result


@dataclass
class Server:
    """A run, from the first client that joins to its result, and what its folder keeps of it.

    Attributes
    ----------
    settings : Settings
    rules : Rules
    held : Held
        Its folder.
    post : Post
    resume : bool
    model : FrozenCLIP or None
    log : callable
    version : str
    kind : type of Method
    options : dict
        Of the method.
    device : torch.device
    rows : list of dict
        Of ``result.json``, one for every round that ended.
    roster : Roster
    status : Status
    facts : dict
        What a checkpoint must have been written with; `play` makes it and what follows.
    clip : FrozenCLIP
    correspondence : Correspondence
        Once the CLIP is loaded.
    rounds : Rounds
        Once clients have joined.
    """

    settings: Settings
    rules: Rules
    held: Held
    post: Post
    resume: bool
    model: FrozenCLIP | None
    log: Callable[[str], None]
    version: str

    def __post_init__(self) -> None:
        self.settings, self.kind, self.options = checked(self.settings, self.rules, self.model)
        self.device = choose_device(self.settings.device)
        self.rows: list[dict[str, Any]] = []
        federation, known, summed = self._before()
        self.roster = Roster(self.settings.dataset == OWN, known)
        self.status = Status(
            self.folder, self.settings, federation, self.roster, self.log, summed=summed
        )

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.held.folder

    @property
    def whole(self) -> dict[str, Any]:
        """All settings, options included."""
        return {**self.settings.model_dump(), "options": dict(self.options)}

    def play(self, on_round: RoundObserver, callbacks: Told) -> Result:
        """Wait for clients, play the rounds that are left, and save after each."""
        settings = self.settings
        self.facts = {**settings_facts(settings, self.options), "engine": "flower"}
        # what was summed under masks is never asked for again without
        self.facts["aggregation"] = self.rules.aggregation
        task = self._task_before()
        self.clip = self.model or load_model(settings, self.device)
        mine = identity(self.clip, self.kind, settings, self.options)
        self.correspondence = Correspondence(self.post, self.rules, self.roster, self.status, mine)
        head = self.correspondence.gather(expected_clients(settings), task)
        now = self._begin(head)
        lines = Lines(self.folder, self.rows)
        names = tuple(self.roster.names)
        done = len(self.rows)
        callbacks.begin(RunInfo(run_name(settings), self.whole, self.folder, done, names))
        while len(self.rows) < (settings.rounds if self.rounds.method.trains else 1):
            row, now = self.rounds.play(now)
            self.rows.append(row)
            self.status.rounds_done = len(self.rows)
            self._save(now)
            self.held.settle()
            self.status.tell(f"round {row['round'] + 1} of {settings.rounds} ended")
            lines.append(row)
            on_round(settings.method, row)
            callbacks.round(row)
        return self._result()

    # -- what was before ---------------------------------------------------------------------

    def _before(self) -> tuple[str, dict[int, dict[str, Any]], dict[str, Any] | None]:
        """Return what the folder says, or what is new: (federation, clients that it knew, summed).

        The last is that of `Status`.
        """
        if not self.resume or not (self.folder / STATUS).exists():
            return secrets.token_hex(16), {}, None
        status = read_status(self.folder)
        known = {
            int(c): {**one, "images": int(one["images"]), "exams": list(one["exams"])}
            for c, one in status.get("clients", {}).items()
        }
        return str(status["federation"]), known, status.get("summed")

    def _task_before(self) -> str | None:
        """Digest classes, domains and clients of the checkpoint that the run goes on from."""
        head = check_checkpoint(self.folder, self.facts) if self.resume else None
        if head is None:
            return None
        if head["rounds_done"] > self.settings.rounds:
            raise InputError(
                f"fastfpl.run: rounds must be at least the {head['rounds_done']} that "
                f"{self.folder} has played; got {self.settings.rounds}"
            )
        task = head["task"]
        return task_digest(
            task["classes"], task["domains"], task["client_domains"], task["clients"]
        )

    def _begin(self, head: Card) -> Round:
        """Make what plays rounds; return the first round, or the one that a checkpoint leads to."""
        settings = self.settings
        domains = None if head.client_domains is None else tuple(head.client_domains)
        if settings.sampling == "domain" and domains is None:
            raise InputError(
                "fastfpl.run: sampling must be 'uniform' where a client holds several domains; "
                f"got 'domain' with partition={settings.partition!r}"
            )
        task = make_task(
            settings,
            self.clip,
            tuple(head.classes),
            tuple(head.domains),
            domains,
            head.clients,
            TextFeatures(),
        )
        method = as_released(self.kind, settings.as_released)(task, self.options)
        sampling = Sampling(settings, head.clients, domains, method.all_first)
        now = Round.first(method)
        found = merging(settings, self.rules, method, now, sampling)
        self.rounds = Rounds(
            settings=settings,
            rules=self.rules,
            method=method,
            device=self.clip.device,
            folder=self.folder,
            head=head,
            sampling=sampling,
            merging=found,
            roster=self.roster,
            status=self.status,
            correspondence=self.correspondence,
        )
        own = self.roster.own
        self.facts |= {
            "weights": self.clip.weights_digest,
            # of images of clients' own each client's are compared when it joins
            "train_images": OWN if own else head.data.get("train_images"),
            "test_images": [OWN] if own else head.data.get("test_images"),
            "private": [*found.wanted.kept]
            + ["download"] * (method.personal and method.evaluates_download == "trained")
            + ["tuned"] * (method.tune_epochs > 0),
        }
        return self._resumed(now)

    def _resumed(self, first: Round) -> Round:
        """Take up the checkpoint in the folder, if there is one to go on from: what comes next."""
        method, device = self.rounds.method, self.clip.device
        found = load_checkpoint(self.folder, self.facts, device) if self.resume else None
        self.held.sweep(files_of(self.folder) or set())
        if found is None:
            return first
        sides = (first.server, found.server)
        same = set(sides[0]) == set(sides[1])
        if not same or not all(may_follow(method, n, *(s[n] for s in sides)) for n in sides[0]):
            raise Damaged(
                f"fastfpl.flower: {self.folder} must hold the server of {method.name}; got other "
                "tensors; start again with another out"
            )
        self.rows = found.rounds
        self.status.rounds_done = len(self.rows)
        for op, names in found.faces.items():
            self.correspondence.faces.setdefault(op, set()).update(names)
        for row in self.rows:
            told = row.get("flower", {})
            for key in self.status.counts:
                self.status.counts[key] += len(told.get(key, []))
        return Round(len(self.rows), found.server)

    # -- what is kept ------------------------------------------------------------------------

    @property
    def _faces(self) -> dict[str, list[str]]:
        return {op: sorted(names) for op, names in self.correspondence.faces.items()}

    def _save(self, now: Round) -> None:
        folder, device = self.folder, self.clip.device
        save_checkpoint(
            folder,
            Checkpoint(
                self.facts,
                self.rows,
                self._faces,
                now.server,
                StateFiles(folder / CLIENTS, device),
                {},
                SharedStates(folder / DOWNLOADS, device),
                SharedStates(folder / TUNED, device),
                self.whole,
                {
                    **task_of(self.rounds.method.task),
                    "pixels": self.rounds.head.data["pixels"],
                    "names": self.roster.names,
                },
            ),
        )

    def _result(self) -> Result:
        memory = sorted(self.correspondence.memory.items())
        return Result(
            method=self.settings.method,
            settings=self.whole,
            environment=environment(self.clip.device),
            faces=self._faces,
            rounds=self.rows,
            final=summarise(self.rows),
            peak_memory_bytes=peak_memory(self.clip.device),
            data=self._data(),
            flower={
                "rules": self.rules.model_dump(),
                "version": self.version,
                **self.status.counts,
                "stays_with_clients": list(self.facts["private"]),
                "client_memory_bytes": {str(client): size for client, size in memory},
                "upload_bytes": sum(
                    math.prod(shape) * dtype.itemsize
                    for shape, dtype in self.rounds.merging.wanted.sent.values()
                ),
            },
        )

    def _data(self) -> dict[str, Any]:
        """Return what the result says of the images that were trained on and asked about."""
        head, roster = self.rounds.head, self.roster
        nothing = {"images": 0, "exams": [0] * len(head.exams)}
        known = [roster.known.get(c, nothing) for c in range(head.clients)]
        deals = [card.data.get("deal") for card in roster.cards.values()]
        alike = all(one == deals[0] for one in deals)
        data, source = head.data, method_source(self.settings.method)
        skipped, notes, training = data["skipped"], list(data["notes"]), data["training"]
        if roster.own:
            alike = False
            skipped = sum(one.get("skipped", 0) for one in known)
            notes = [
                f"{name}: {note}"
                for name, one in zip(roster.names, known, strict=True)
                for note in one.get("notes", ())
            ]
            training = {
                "used": sum(one["images"] for one in known),
                "there": sum(one.get("there", 0) for one in known),
            }
        return {
            "name": data["name"],
            "classes": list(head.classes),
            "train_images": [one["images"] for one in known],
            "test_images": [one["exams"][0] for one in known],
            "exams": {exam["name"]: exam["about"] for exam in head.exams},
            "transductive": self.settings.transductive,
            "skipped": skipped,
            "notes": notes,
            "weights": self.clip.weights_digest,
            "activation": self.clip.text.activation,
            **({"deal": deals[0]} if alike else {}),
            "training": training,
            **({"clients": roster.names} if roster.names else {}),
            **({} if source is None else {"method_source": source}),
        }
