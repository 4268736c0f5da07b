"""The server of a networked run: it drives a `Round`, keeps its folder, and ends with a result."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.errors import Damaged, FastfplError, InputError, cut
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
from fastfpl.federation.exams import joined
from fastfpl.federation.experiment import (
    RoundObserver,
    refuse_held,
    run_name,
    threads,
    unseen,
)
from fastfpl.federation.lock import Held, alone_in
from fastfpl.federation.merging import Expected, epsilon_after, expected, privacy_of
from fastfpl.federation.models import task_of
from fastfpl.federation.preparation import OWN, settled
from fastfpl.federation.result import (
    empty_row,
    environment,
    forget_peak_memory,
    peak_memory,
    summarise,
)
from fastfpl.federation.robust import robust_of
from fastfpl.federation.sampling import Sampling
from fastfpl.federation.server import Round
from fastfpl.federation.shared import DOWNLOADS, TUNED, SharedStates
from fastfpl.federation.states import CLIENTS, StateFiles
from fastfpl.files import read_file, write_json
from fastfpl.flower.checks import Card, Update, check_card, check_marks, check_update
from fastfpl.flower.identity import differing, digest_of, identity, task_digest
from fastfpl.flower.letters import SCHEMA, Letter, digest, pack
from fastfpl.flower.own import check_own
from fastfpl.flower.post import Outcome, Post, exchange
from fastfpl.flower.rules import Rules
from fastfpl.flower.secagg import SecureMean, check_secagg, counts_of
from fastfpl.methods import Method, State, method_source
from fastfpl.methods.base import Upload
from fastfpl.methods.contract import may_follow
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.precision import without_autocast
from fastfpl.released import as_released, visits_of
from fastfpl.tracking import Callback, RunInfo
from fastfpl.tracking.callback import Told
from fastfpl.tracking.lines import Lines
from fastfpl.training.preparation import choose_device, load_model, make_task

__all__ = ["STATUS", "Server", "checked", "read_status", "serve"]

#: What is going on in a networked run's folder.
STATUS = "flower.json"
_FORMAT = "fastfpl-flower-1"
_NOTED = 200  # refusals that the status shows
_LATER = 60.0  # seconds after which a node that failed to join is asked again


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
        Gets ``result.json``, checkpoints, and what is going on (`STATUS`).
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
                server.tell("stopped", why=str(error))
            raise
        result.save(out)
        server.tell("finished")
        told.end(result.final)
        return result


def expected_clients(settings: Settings) -> int:
    """Return how many clients settings name; a server has no data that could tell."""
    if settings.clients is None:
        raise InputError(
            f"fastfpl.flower: clients must be said with partition={settings.partition!r}, since "
            "the server has no data that could tell; got none: --clients N"
        )
    return settings.clients


def checked(
    settings: Settings, model: FrozenCLIP | None = None
) -> tuple[Settings, type[Method], dict[str, Any]]:
    """Refuse what no networked run can be, before anything is started; see `settled`."""
    found = settled(settings, model)
    settings = found[0]
    check_own(settings)
    expected_clients(settings)
    if settings.scenario == "unseen-clients":
        raise InputError(
            "fastfpl.flower: scenario must not be 'unseen-clients', whose newcomers are adapted on "
            "a copy of the server; play it in one process, by fastfpl run, or let clients join late"
        )
    if settings.evaluate_clients is not None:
        raise InputError(
            "fastfpl.flower: evaluate_clients must be left out, since every client answers for "
            f"itself; got {settings.evaluate_clients}; play it in one process, by fastfpl run"
        )
    if visits_of(settings.as_released, settings.schedule, settings.lr):
        raise InputError(
            "fastfpl.flower: as_released must leave out quirks by which clients inherit from each "
            f"other within a round; got {', '.join(settings.as_released)}; play it in one process, "
            "by fastfpl run"
        )
    privacy_of(settings)
    return found


def read_status(out: Path) -> dict[str, Any]:
    """Read what is going on in a folder.

    Raises
    ------
    Damaged
        If it holds no networked run.
    """
    try:
        status = json.loads(read_file(out / STATUS).decode("utf-8"))
        good = status["format"] == _FORMAT and isinstance(status["federation"], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise Damaged(
            f"fastfpl.flower: {out / STATUS} must be what a run on Flower wrote; got none; name "
            "the folder that --out named"
        )
    return dict(status)


@dataclass
class Server:
    """What the server of one run knows.

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
    """

    settings: Settings
    rules: Rules
    held: Held
    post: Post
    resume: bool
    model: FrozenCLIP | None
    log: Callable[[str], None]
    version: str
    _places: dict[int, int] = field(default_factory=dict)  # client to node
    _cards: dict[int, Card] = field(default_factory=dict)
    _turned: dict[int, str] = field(default_factory=dict)  # node to why it was refused
    # node to when it is asked to join again, and what failed
    _later: dict[int, tuple[float, str]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _noted: list[dict[str, Any]] = field(default_factory=list)
    _memory: dict[str, int] = field(default_factory=dict)
    _faces: dict[str, set[str]] = field(default_factory=dict)
    _rounds: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)
    # clients that have kept what they answer exams with
    _holding: set[int] = field(default_factory=set)
    _head: Card | None = None
    _wanted_task: str | None = None

    def __post_init__(self) -> None:
        self.settings, self.kind, self.options = checked(self.settings, self.model)
        check_secagg(self.settings, self.rules)
        self.privacy = privacy_of(self.settings)
        self.robust = robust_of(self.settings)
        self.device = choose_device(self.settings.device)
        self.federation = self._name()

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.held.folder

    # -- the whole run -----------------------------------------------------------------------

    def play(self, on_round: RoundObserver, callbacks: Told) -> Result:
        """Wait for clients, play the rounds that are left, and save after each."""
        facts = {**settings_facts(self.settings, self.options), "engine": "flower"}
        if self.resume:
            head = check_checkpoint(self.folder, facts)
            if head is not None and head["rounds_done"] > self.settings.rounds:
                raise InputError(
                    f"fastfpl.run: rounds must be at least the {head['rounds_done']} that "
                    f"{self.folder} has played; got {self.settings.rounds}"
                )
            if head is not None:
                self._head_of(head["task"])
        self.clip = self.model or load_model(self.settings, self.device)
        self.mine = identity(self.clip, self.kind, self.settings, self.options)
        self._gather()
        method, now = self._begin(facts)
        settings = self.settings
        lines = Lines(self.folder, self._rounds)
        assert self._head is not None
        whole = {**settings.model_dump(), "options": dict(self.options)}
        names = tuple(self._names)
        done = len(self._rounds)
        callbacks.begin(RunInfo(run_name(settings), whole, self.folder, done, names))
        while len(self._rounds) < (settings.rounds if method.trains else 1):
            row, now = self._round(method, now)
            self._rounds.append(row)
            self._save(method, now)
            self.held.settle()
            self.tell(f"round {row['round'] + 1} of {settings.rounds} ended")
            lines.append(row)
            on_round(settings.method, row)
            callbacks.round(row)
        return self._result(method)

    def _begin(self, facts: dict[str, Any]) -> tuple[Method, Round]:
        """Make the method and the first round, or the one that a checkpoint leads to."""
        assert self._head is not None
        head, settings = self._head, self.settings
        kind = as_released(self.kind, settings.as_released)
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
        method = kind(task, self.options)
        self.task = task_digest(head.classes, head.domains, head.client_domains, head.clients)
        self.sampling = Sampling(settings, head.clients, domains, method.all_first)
        now = Round.first(method)
        down = now.download(method, 0)
        self.wanted = expected(method, down) if method.trains else Expected({}, ())
        if self.robust is not None:
            self.robust.check(method, now.server, down, self.sampling.fewest)
        if self.privacy is not None:
            self.privacy.check(method, now.server, down)
        if self.rules.aggregation == "secagg+":
            fewest, most = self.sampling.fewest, max(map(len, map(self.sampling.sample, (0, 1))))
            self.counts = counts_of(method, now.server, self.wanted, fewest, most)
        method.task.text_features.clear()
        self.facts = {
            **facts,
            "weights": self.clip.weights_digest,
            # of images of clients' own each client's are compared when it joins
            "train_images": OWN if self._own else head.data.get("train_images"),
            "test_images": [OWN] if self._own else head.data.get("test_images"),
            "private": [*self.wanted.kept]
            + ["download"] * (method.personal and method.evaluates_download == "trained")
            + ["tuned"] * (method.tune_epochs > 0),
        }
        found = load_checkpoint(self.folder, self.facts, self.clip.device) if self.resume else None
        self.held.sweep(files_of(self.folder) or set())
        if found is None:
            return method, now
        sides = (now.server, found.server)
        same = set(sides[0]) == set(sides[1])
        if not same or not all(may_follow(method, n, *(s[n] for s in sides)) for n in sides[0]):
            raise Damaged(
                f"fastfpl.flower: {self.folder} must hold the server of {method.name}; got other "
                "tensors; start again with another out"
            )
        self._rounds = found.rounds
        for op, names in found.faces.items():
            self._faces.setdefault(op, set()).update(names)
        for row in self._rounds:
            told = row.get("flower", {})
            for key in ("refused", "failed", "absent"):
                self._counts[key] += len(told.get(key, []))
        return method, Round(len(found.rounds), found.server)

    def _save(self, method: Method, now: Round) -> None:
        assert self._head is not None
        folder, device = self.folder, self.clip.device
        save_checkpoint(
            folder,
            Checkpoint(
                self.facts,
                self._rounds,
                {op: sorted(names) for op, names in self._faces.items()},
                now.server,
                StateFiles(folder / CLIENTS, device),
                {},
                SharedStates(folder / DOWNLOADS, device),
                SharedStates(folder / TUNED, device),
                {**self.settings.model_dump(), "options": dict(self.options)},
                {
                    **task_of(method.task),
                    "pixels": self._head.data["pixels"],
                    "names": self._names,
                },
            ),
        )

    # -- who is there ------------------------------------------------------------------------

    def _gather(self) -> None:
        """Wait until all clients have joined, or patience ends and a quorum has."""
        begin = self.post.now()
        self.tell("waiting for clients")
        while True:
            self._greet(self.rules.timeout)
            head = self._most()
            clients = expected_clients(self.settings) if head is None else head.clients
            here = [self._cards[client] for client in self._places]
            there = 0 if head is None else sum(_like(card, head) for card in here)
            waited = self.post.now() - begin >= self.rules.patience
            enough = there >= self.rules.enough(clients)
            if enough and (waited or len(self._places) >= clients):
                break
            if waited:
                failed = [why for _, why in self._later.values()]
                if head is None and here:
                    failed.append(
                        "fastfpl.flower: classes, domains and clients must be those of the "
                        f"checkpoint, {self._wanted_task}; got {_task_of(here[0])}"
                    )
                why = "; ".join(dict.fromkeys([*self._turned.values(), *failed]))
                raise InputError(
                    f"fastfpl.flower: {self.rules.enough(clients)} of {clients} clients must join "
                    f"within patience={self.rules.patience:g} s; got {there}"
                    + (f"; turned away: {cut(why, 1200)}" if why else "; start their SuperNodes")
                )
            self.post.wait()
        self._head = head
        for client, card in sorted(self._cards.items()):
            why_not = self._other(card)
            if why_not is not None and client in self._places:
                self._turn_away(self._places.pop(client), client, why_not)
                self._known.pop(str(client), None)
        self._cards = {c: card for c, card in self._cards.items() if c in self._places}
        if there < clients:
            self.log(f"begins with {there} of {clients} clients; the others may join later")

    def _greet(self, timeout: float) -> None:
        """Let nodes that are new join, and forget those that have gone."""
        nodes = self.post.nodes()
        for client, node in list(self._places.items()):
            if node not in nodes:
                del self._places[client]
                self.log(f"client {client} has left")
        now = self.post.now()
        known = {*self._turned, *self._places.values()}
        known |= {node for node, (until, _) in self._later.items() if now < until}
        new = [node for node in nodes if node not in known]
        if not new:
            return
        letter = Letter({"schema": SCHEMA, "kind": "join", "federation": self.federation})
        outcome = exchange(
            self.post,
            dict.fromkeys(new, letter),
            "join",
            len(self._rounds),
            lambda node, answer: (check_card(answer), answer.head),
            need=len(new),
            grace=0.0,
            timeout=timeout,
        )
        for node in sorted(outcome.good, key=lambda n: outcome.good[n][0].client):
            card, head = outcome.good[node]
            why = self._against(card, node, nodes[node])
            if why is not None:
                self._turn_away(node, card.client, why)
                continue
            self._places[card.client] = node
            self._cards[card.client] = card
            if card.held:
                self._holding.add(card.client)
            self._hear(card.client, head)
            self._known[str(card.client)] = {
                "images": card.images,
                "exams": [exam["images"] for exam in card.exams],
                **(_own_facts(card) if self._own else {}),
            }
            self.log(f"client {card.client} has joined with {card.images} images")
        for node, why in outcome.refused.items():
            self._turn_away(node, None, why)
        for node, why in outcome.failed.items():  # it may be better the next time
            self._later[node] = self.post.now() + _LATER, why
            self._note("failed", None, why)
        self.tell()

    def _turn_away(self, node: int, client: int | None, why: str) -> None:
        self._turned[node] = why
        self._note("refused", client, why)

    def _most(self) -> Card | None:
        """Return a card with the classes, domains, clients and exams that most have.

        Of a run that is resumed, with those of its checkpoint.
        """
        cards = [card for client, card in sorted(self._cards.items()) if client in self._places]
        if self._wanted_task is not None:
            cards = [card for card in cards if _task_of(card) == self._wanted_task]
        return max(cards, key=lambda card: sum(_like(c, card) for c in cards), default=None)

    def _head_of(self, task: Mapping[str, Any]) -> None:
        """Take up the classes, domains and clients of a checkpoint."""
        self._wanted_task = task_digest(
            task["classes"], task["domains"], task["client_domains"], task["clients"]
        )

    def _against(self, card: Card, node: int, name: str) -> str | None:
        """Say why a client may not join."""
        who = f"from client {card.client}"
        found = differing(self.mine, card.identity)
        if found is not None:
            return f"fastfpl.flower: {found} {who}"
        other = self._other(card)
        if other is not None:
            return other
        if name.startswith("client-") and name != f"client-{card.client}":
            return (
                f"fastfpl.flower: the node registered as {name} must join as that client; got "
                f"client {card.client}"
            )
        taken = self._places.get(card.client)
        if taken is not None and taken != node:
            return (
                f"fastfpl.flower: a client must be one node; got client {card.client} from node "
                f"{node}, which node {taken} is already"
            )
        before = self._known.get(str(card.client))
        if before is not None and before["images"] != card.images:
            return (
                f"fastfpl.flower: client {card.client} must keep its {before['images']} training "
                f"images; got {card.images}"
            )
        return self._against_own(card, before) if self._own else None

    def _against_own(self, card: Card, before: Mapping[str, Any] | None) -> str | None:
        """Say what is wrong with the name or the images of a client that has its own."""
        mine = _own_facts(card)
        if before is not None and any(before.get(key) != mine[key] for key in mine):
            was = {key: before.get(key) for key in mine}
            return (
                f"fastfpl.flower: client {card.client} must keep its name and images, "
                f"{digest_of(was)}; got {digest_of(mine)}"
            )
        for other, said in self._known.items():
            if other != str(card.client) and said.get("name") == mine["name"]:
                return (
                    f"fastfpl.flower: clients must have names of their own; got {mine['name']!r} "
                    f"from client {card.client}, which client {other} has"
                )
        return None

    def _other(self, card: Card) -> str | None:
        """Say in what a client's data differ from those that the run was begun with."""
        head, who = self._head, f"from client {card.client}"
        if head is None:
            return None
        if card.classes != head.classes:
            return (
                "fastfpl.flower: the list of classes must be the server's, "
                f"{digest_of(head.classes)}; got {digest_of(card.classes)} {who}"
            )
        if _task_of(card) != _task_of(head):
            return (
                f"fastfpl.flower: domains and clients must be the server's, {_task_of(head)}; got "
                f"{_task_of(card)} {who}"
            )
        if _exams(card) != _exams(head):
            return (
                f"fastfpl.flower: exams must be the server's, {digest_of(_exams(head))}; got "
                f"{digest_of(_exams(card))} {who}"
            )
        return None

    # -- a round ---------------------------------------------------------------------------------

    def _round(self, method: Method, now: Round) -> tuple[dict[str, Any], Round]:
        """Play a round: (its row, what comes next)."""
        settings, begin = self.settings, time.perf_counter()
        round_ = now.number
        told: dict[str, Any] = {"refused": [], "failed": [], "absent": [], "bytes_exam": 0}
        line = {**empty_row(round_), "flower": told}
        self._greet(self.rules.grace)
        now = self._train(method, now, line) if method.trains else now.untrained()
        last = round_ == settings.rounds - 1 or not method.trains
        if last or (round_ + 1) % settings.evaluate_every == 0:
            self._ask(method, now, line)
        line["seconds"] = time.perf_counter() - begin
        return line, now

    def _train(self, method: Method, now: Round, line: dict[str, Any]) -> Round:
        """Let the called clients train, merge what was taken, and note both in the row."""
        begin, told = time.perf_counter(), line["flower"]
        call = self.sampling.call(now.number)
        self.tell(f"round {now.number + 1} of {self.settings.rounds}, training")
        uploads = StateFiles(device=self.clip.device, beside=self.folder)
        losses: dict[int, float] = {}
        seen = 0
        secret = None
        if self.rules.aggregation == "secagg+":
            every = {c: self._cards[c].images for c in call.selected}
            secret = SecureMean(self.wanted.sent, every, self.counts, self.rules, self.clip.device)
        # of a sum under masks a client tells all but its arrays
        told_arrays = self.wanted.sent if secret is None else {}

        def letter(client: int) -> Letter:
            sent = self._letter("train", client, now.number, now.download(method, client))
            line["bytes_down"] += sent.nbytes
            return sent

        def take(client: int, asked: Letter, answer: Letter) -> Update:
            update = check_update(
                answer,
                federation=self.federation,
                client=client,
                round_=now.number,
                asked=digest(asked.arrays),
                images=self._cards[client].images,
                wanted=told_arrays,
                rules=self.rules,
                device=self.clip.device,
            )
            if secret is None and client not in call.lost:
                uploads.put(client, update.upload)
                line["bytes_up"] += update.nbytes
            self._hear(client, answer.head)
            self._holding.add(client)
            return update

        found = self._reach(
            "train",
            now.number,
            call.selected,
            self.rules.enough(len(call.selected)),
            letter,
            take,
            told,
            exchange if secret is None else secret.exchange,
        )
        for client in sorted(found):
            losses[client] = found[client].loss
            seen += found[client].seen
        sent: Mapping[int, Upload] = uploads
        images: Mapping[int, int] = {c: self._cards[c].images for c in uploads}
        if secret is not None:
            assert secret.mean is not None
            sent, images = dict.fromkeys(found, secret.mean), dict.fromkeys(found, 1)
            line["bytes_up"], line["bytes_down"] = secret.nbytes_up, secret.nbytes_down
        if self.privacy is not None:
            down = now.download(method, call.selected[0])
            sent, images = self.privacy.merged(down, uploads, len(call.selected))
        epsilon = epsilon_after(self.settings, now.number + 1)
        if epsilon is not None:
            line["epsilon"] = epsilon
        if self.robust is not None:
            down_of = partial(now.download, method)
            sent, images, line["merge"] = self.robust.merged(uploads, down_of, images)
        after = now.after(method, sent, images, {})
        line["selected"] = list(call.selected)
        line["lost"] = sorted(c for c in call.selected if c in call.lost or c not in found)
        line["loss"] = sum(losses[c] for c in call.selected if c in losses) / len(losses)
        line["images_per_second"] = seen / (time.perf_counter() - begin)
        return after

    def _ask(self, method: Method, now: Round, line: dict[str, Any]) -> None:
        """Put the exams to the clients that are there, and note their marks in the row."""
        assert self._head is not None
        told, head, round_ = line["flower"], self._head, now.number - 1
        self.tell(f"round {round_ + 1} of {self.settings.rounds}, exams")

        kept = method.personal and method.evaluates_download == "trained"
        asked: set[int] = set()

        def letter(client: int) -> Letter:
            if client in asked:  # it may have kept nothing after all
                self._holding.discard(client)
            asked.add(client)
            if kept and client in self._holding:
                return self._letter("ask", client, round_, {}, held=True)
            whose = client if method.personal else 0
            sent = self._letter("ask", client, round_, now.download(method, whose))
            told["bytes_exam"] += sent.nbytes
            return sent

        def take(client: int, asked: Letter, answer: Letter) -> list[dict[str, Any]]:
            marks, said = check_marks(
                answer,
                federation=self.federation,
                client=client,
                round_=round_,
                exams=self._cards[client].exams,
            )
            self._hear(client, said)
            return marks

        everyone = range(head.clients)
        need = self.rules.enough(head.clients)
        found = self._reach("ask", round_, everyone, need, letter, take, told)
        self._holding -= asked - set(found)  # who lost its folder gets the whole the next time
        for k, exam in enumerate(head.exams):
            each = [found[c][k] if c in found else None for c in everyone]
            line["exams"][exam["name"]] = joined(each, tuple(exam["domains"]))
        headline = line["exams"][head.exams[0]["name"]]
        line["clients"], line["accuracy"] = headline["clients"], headline["accuracy"]

    def _reach(
        self,
        kind: str,
        round_: int,
        clients: Any,
        need: int,
        letter: Callable[[int], Letter],
        take: Callable[[int, Letter, Letter], Any],
        told: dict[str, Any],
        how: Callable[..., Outcome[Any]] = exchange,
    ) -> dict[int, Any]:
        """Send to clients until a quorum has answered well: what was taken, by client.

        Who did not answer, or badly, is sent the same again until patience ends; clients answer
        what they answered before from disk.
        """
        begin, pause = self.post.now(), 1.0
        found: dict[int, Any] = {}
        while True:
            # one that joined twice meanwhile has two nodes, of which the last one counts
            places = {self._places[c]: c for c in clients if c in self._places and c not in found}
            letters = {node: letter(client) for node, client in places.items()}
            outcome = how(
                self.post,
                letters,
                kind,
                round_,
                partial(_taken, take, places, letters),
                need=need - len(found),
                grace=self.rules.grace,
                timeout=self.rules.timeout,
            )
            found |= {places[node]: one for node, one in outcome.good.items()}
            for what in ("refused", "failed"):
                for node, why in getattr(outcome, what).items():
                    told[what].append({"client": places[node], "why": why[:2000]})
                    self._note(what, places[node], why)
            if outcome.refused or outcome.failed:
                self.tell()
            if len(found) >= need:
                break
            if self.post.now() - begin >= self.rules.patience:
                last = [entry["why"] for what in ("refused", "failed") for entry in told[what]]
                raise InputError(
                    f"fastfpl.flower: {need} of {len(clients)} clients must answer in round "
                    f"{round_ + 1} within patience={self.rules.patience:g} s; got {len(found)}"
                    + (f", the last: {cut(last[-1], 800)}" if last else "")
                    + "; the rounds that ended are kept, go on by resume"
                )
            self._pause(pause)
            pause = min(2 * pause, 60.0)
            self._greet(self.rules.grace)
        missing = [c for c in clients if c not in found]
        said = {entry["client"] for what in ("refused", "failed") for entry in told[what]}
        absent = [c for c in missing if c not in said]
        told["absent"] += [{"client": c, "asked": kind} for c in absent]
        self._counts["absent"] += len(absent)
        return found

    def _pause(self, seconds: float) -> None:
        """Wait so long, and no longer than patience."""
        end = self.post.now() + min(seconds, self.rules.patience)
        while self.post.now() < end:
            self.post.wait()

    def _letter(
        self, kind: str, client: int, round_: int, down: State, *, held: bool = False
    ) -> Letter:
        return Letter(
            {
                "schema": SCHEMA,
                "kind": kind,
                "federation": self.federation,
                "client": client,
                "round": round_,
                "task": self.task,
                "dtypes": {n: str(t.dtype).removeprefix("torch.") for n, t in down.items()},
                **({"held": True} if held else {}),
            },
            pack(down, self.rules.wire),
        )

    @property
    def _own(self) -> bool:
        """Whether every client has images of its own."""
        return self.settings.dataset == OWN

    @property
    def _names(self) -> list[str]:
        """What the clients are called; nothing if they are but numbers."""
        assert self._head is not None
        if not self._own:
            return list(self._head.data["clients"] or ())
        known = [self._known.get(str(c), {}) for c in range(self._head.clients)]
        return [one.get("name", f"client-{c}") for c, one in enumerate(known)]

    # -- what is said of it ------------------------------------------------------------------

    def _hear(self, client: int, head: Mapping[str, Any]) -> None:
        """Note what a client says of its process, if it is what it should be."""
        memory, faces = head.get("memory"), head.get("faces")
        if isinstance(memory, int) and 0 < memory < 2**50:
            self._memory[str(client)] = max(memory, self._memory.get(str(client), 0))
        if isinstance(faces, dict) and len(faces) < 100:
            for op, names in faces.items():
                if isinstance(names, list) and len(names) < 20 and len(op) < 100:
                    good = {n for n in names if isinstance(n, str) and 0 < len(n) < 100}
                    self._faces.setdefault(op, set()).update(good)

    def _note(self, what: str, client: int | None, why: str) -> None:
        self._counts[what] += 1
        who = "a client" if client is None else f"client {client}"
        self.log(f"{what}: {who}: {why}")
        self._noted.append(
            {"round": len(self._rounds), "what": what, "client": client, "why": why[:2000]}
        )
        del self._noted[:-_NOTED]

    def _name(self) -> str:
        """Return the name of the federation: that of the folder, or a new one."""
        if self.resume and (self.folder / STATUS).exists():
            status = read_status(self.folder)
            self._known = {
                str(c): {**one, "images": int(one["images"]), "exams": list(one["exams"])}
                for c, one in status.get("clients", {}).items()
            }
            return str(status["federation"])
        return secrets.token_hex(16)

    def tell(self, phase: str | None = None, why: str | None = None) -> None:
        """Write down what is going on."""
        self._phase = phase or getattr(self, "_phase", "begins")
        write_json(
            self.folder / STATUS,
            {
                "format": _FORMAT,
                "federation": self.federation,
                "method": self.settings.method,
                "phase": self._phase,
                "why": why,
                "rounds_done": len(self._rounds),
                "rounds": self.settings.rounds,
                "joined": sorted(self._places),
                "clients": self._known,
                "counts": {key: self._counts[key] for key in ("refused", "failed", "absent")},
                "noted": self._noted,
            },
        )

    def _result(self, method: Method) -> Result:
        assert self._head is not None
        head, rules = self._head, self.rules.model_dump()
        nothing = {"images": 0, "exams": [0] * len(head.exams)}
        known = [self._known.get(str(c), nothing) for c in range(head.clients)]
        deals = [card.data.get("deal") for card in self._cards.values()]
        alike = all(one == deals[0] for one in deals)
        data, source = head.data, method_source(self.settings.method)
        skipped, notes, training = data["skipped"], list(data["notes"]), data["training"]
        if self._own:
            alike = False
            skipped = sum(one.get("skipped", 0) for one in known)
            notes = [
                f"{name}: {note}"
                for name, one in zip(self._names, known, strict=True)
                for note in one.get("notes", ())
            ]
            training = {
                "used": sum(one["images"] for one in known),
                "there": sum(one.get("there", 0) for one in known),
            }
        return Result(
            method=self.settings.method,
            settings={**self.settings.model_dump(), "options": dict(self.options)},
            environment=environment(self.clip.device),
            faces={op: sorted(names) for op, names in self._faces.items()},
            rounds=self._rounds,
            final=summarise(self._rounds),
            peak_memory_bytes=peak_memory(self.clip.device),
            data={
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
                **({"clients": self._names} if self._names else {}),
                **({} if source is None else {"method_source": source}),
            },
            flower={
                "rules": rules,
                "version": self.version,
                **{key: self._counts[key] for key in ("refused", "failed", "absent")},
                "stays_with_clients": list(self.facts["private"]),
                "client_memory_bytes": dict(sorted(self._memory.items(), key=lambda i: int(i[0]))),
                "upload_bytes": sum(
                    math.prod(shape) * dtype.itemsize for shape, dtype in self.wanted.sent.values()
                ),
            },
        )


def _taken(
    take: Callable[[int, Letter, Letter], Any],
    places: Mapping[int, int],
    letters: Mapping[int, Letter],
    node: int,
    answer: Letter,
) -> Any:
    """Take the answer of a node as that of its client."""
    return take(places[node], letters[node], answer)


def _own_facts(card: Card) -> dict[str, Any]:
    """Return what of a client's own images must stay, and what a result says of them."""
    return {
        "name": card.name or f"client-{card.client}",
        "train": card.data["train_images"],
        "test": list(card.data["test_images"]),
        "skipped": card.data["skipped"],
        "there": card.data["training"]["there"],
        "notes": list(card.data["notes"]),
    }


def _task_of(card: Card) -> str:
    return task_digest(card.classes, card.domains, card.client_domains, card.clients)


def _like(one: Card, other: Card) -> bool:
    """Whether two clients know the same classes, domains, clients and exams."""
    return _task_of(one) == _task_of(other) and _exams(one) == _exams(other)


def _exams(card: Card) -> list[Any]:
    return [[exam["name"], exam["domains"]] for exam in card.exams]
