"""Secure aggregation at the server: four stages, and the mean of uploads that it sees none of.

What both sides share is in `fastfpl.flower.secagg`.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastfpl.errors import FastfplError, InputError, shown
from fastfpl.federation.merging import Counts
from fastfpl.flower.letters import Letter, Refused
from fastfpl.flower.post import Outcome, Post, Taken, exchange
from fastfpl.flower.rules import Rules
from fastfpl.flower.secagg import (
    LEVELS,
    MARK,
    MARKS,
    MODULUS,
    RECORD,
    SEED_MARK,
    flower_parts,
    mark_of,
    pack_record,
    read_record,
    stage_head,
)
from fastfpl.methods import State

__all__ = ["SecureMean"]


class _Unfit(Exception):
    """Shares that are the ones that were dealt, and open no secret that they were said to be of.

    Attributes
    ----------
    nodes : set of int
        Who dealt them.
    """

    def __init__(self, nodes: set[int]) -> None:
        super().__init__(nodes)
        self.nodes = nodes


@dataclass
class _Attempt:
    """What clients have said of their secrets, since keys were last drawn.

    Attributes
    ----------
    keys : dict from node to bytes
        The public one whose private half is shared.
    seeds : dict from node to bytes
        Marks of the seeds of masks.
    marks : dict from node to (dict from node to bytes)
        Of the shares that a client dealt, by who holds them.
    alive : set of int
        Whose masked uploads are there, so that the seeds of their masks are asked for.
    shares : dict from node to list of bytes
        Of a client's seed, or of the key of one that is lost, as far as they were told.
    at_odds : dict from node to set of int
        Whose shares for a client do not open, as it says.
    used : set of bytes
        All public keys.
    """

    keys: dict[int, bytes] = field(default_factory=dict)
    seeds: dict[int, bytes] = field(default_factory=dict)
    marks: dict[int, dict[int, bytes]] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    shares: dict[int, list[bytes]] = field(default_factory=dict)
    at_odds: dict[int, set[int]] = field(default_factory=dict)
    used: set[bytes] = field(default_factory=set)


def _left_out(at_odds: Mapping[int, set[int]], need: int) -> tuple[set[int], set[int]]:
    """Say who is left out of a sum: (on the word of a quorum, in pairs of which one is wrong).

    Two clients that follow the protocol are never at odds. Who is at odds with a quorum is wrong,
    unless that many are. Of any other pair nobody can say who is: both go, so that whoever is wrong
    takes one with it at most, and fewer hostile ones than a quorum never single an upload out.
    """
    pairs = {frozenset((one, other)) for one, others in at_odds.items() for other in others}
    degree = Counter(node for pair in pairs for node in pair)
    alone = {node for node, count in degree.items() if count >= need}
    both: set[int] = set()
    for pair in sorted(map(sorted, pairs), key=lambda p: (-max(degree[n] for n in p), p)):
        if not {*pair} & (alone | both):
            both |= {*pair}
    return alone, both


class SecureMean:
    """One round's sum under masks.

    Parameters
    ----------
    wanted : mapping from name to (shape, dtype)
        What clients send.
    images_of : callable
        ``images_of(client)`` are the training images of one that has joined.
    counts : "images" or "clients"
        What the mean counts.
    rules : Rules
    device : torch.device
    asked_of : set of int, optional
        Clients that a sum was asked of in this round before, by a process that was ended.
    asks : callable, optional
        ``asks(clients)`` writes such clients down, before they are asked.

    Attributes
    ----------
    asked_of : set of int or None
        Clients that a sum was asked of, who alone are summed in this round.
    mean : State or None
        The weighted mean of the uploads of those whose answers were taken, when it is known.
    nbytes_up, nbytes_down : int
        Bytes of the arrays of all stages, over all clients.
    """

    def __init__(
        self,
        wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        images_of: Callable[[int], int],
        counts: Counts,
        rules: Rules,
        device: torch.device | str = "cpu",
        asked_of: set[int] | None = None,
        asks: Callable[[set[int]], None] = lambda clients: None,
    ) -> None:
        self._wanted = dict(sorted(wanted.items()))
        self._images_of = images_of
        self._counts = counts
        self._rules = rules
        self._device = device
        self._asks = asks
        self.asked_of = asked_of
        self.mean: State | None = None
        self.nbytes_up = self.nbytes_down = 0

    def exchange(
        self,
        post: Post,
        letters: Mapping[int, Letter],
        kind: str,
        round_: int,
        take: Callable[[int, Letter], Taken],
        *,
        need: int,
        grace: float,
        timeout: float,
    ) -> Outcome[Taken]:
        """Do the four stages in the place of one exchange; see `fastfpl.flower.post.exchange`.

        ``take`` is given what clients say of their training, without arrays. Nobody's answer is
        good unless the mean is known. Who is lost before uploads are masked is left out, and the
        others begin anew: Flower's last stage asks for shares that such a client never gave. So do
        they where clients are at odds on shares (`_left_out`), before a sum is asked for.

        Once clients were asked to open a sum, no other clients are summed in the round: answers
        that come late open the first one too, and two sums tell their difference. But for a client
        that has dealt shares of no secret: it alone is what the two can differ by.
        """
        whole: Outcome[Taken] = Outcome()
        end = post.now() + timeout
        may = self.asked_of
        here = {n: one for n, one in letters.items() if may is None or one.head["client"] in may}
        while len(here) >= max(need, 3):
            updates: dict[int, Taken] = {}

            def told(stage: str, sealed: Mapping[int, Letter], opened: Any) -> list[Any]:
                rest = end - post.now()
                if rest <= 0:  # a life of 0 is twelve hours to Flower
                    return []
                outcome: Outcome[Any] = exchange(
                    post, sealed, kind, round_, opened, need=need, grace=grace, timeout=rest
                )
                whole.refused |= outcome.refused
                whole.failed |= outcome.failed
                return [answer for answer in outcome.good.values() if answer is not None]

            def taken(node: int, update: Letter) -> None:
                updates[node] = take(node, update)  # noqa: B023

            there = self._attempt(here, round_, need, told, taken, whole.refused)
            if self.mean is not None:
                whole.good = updates
                break
            if not there < set(here):
                break
            here = {node: letters[node] for node in here if node in there}
        known = {*whole.good, *whole.refused, *whole.failed}
        whole.absent = sorted(node for node in letters if node not in known)
        return whole

    def _attempt(
        self,
        letters: Mapping[int, Letter],
        round_: int,
        need: int,
        told: Callable[[str, Mapping[int, Letter], Any], list[Any]],
        taken: Callable[[int, Letter], None],
        refused: dict[int, str],
    ) -> set[int]:
        """Go through the stages: who is left to begin anew with; everybody where there is no use.

        ``told(stage, letters, opened)`` sends a stage, and returns what ``opened(node, answer)``
        made of good answers, if anything; ``taken(node, update)`` checks what a client says of its
        training; ``refused`` says why an answer was not taken.
        """
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict
        from flwr.common import FitIns, Parameters, parameters_to_ndarrays

        flowers = flower_parts()
        found: list[Any] = []
        so_far = _Attempt()

        def send_and_receive(messages: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
            """Be what Flower's stages send by."""
            asked = {m.metadata.dst_node_id: m.content for m in messages}
            stage = str(messages[0].content.config_records[flowers.name][flowers.key.STAGE])
            third = stage == "collect_masked_vectors"
            if third:
                for node, content in asked.items():
                    record = content.config_records[flowers.name]
                    sources = record[flowers.key.SOURCE_LIST]
                    record[MARKS] = [so_far.marks[source][node] for source in sources]
            sealed = {
                node: self._stage(letters[node], content.config_records[flowers.name], third)
                for node, content in asked.items()
            }
            self.nbytes_down += sum(letter.nbytes for letter in sealed.values())

            def opened(node: int, answer: Letter) -> Any:
                client = letters[node].head["client"]
                _check_told(answer.head, stage_head("secure", letters[node].head))
                if answer.nbytes > self._rules.most_bytes:
                    raise Refused(
                        f"fastfpl.flower: an answer must have at most most_bytes="
                        f"{self._rules.most_bytes} bytes; got {answer.nbytes} from client {client}"
                    )
                self.nbytes_up += answer.nbytes
                record, content = read_record(answer), RecordDict()
                asked_for, others = asked[node].config_records[flowers.name], {*letters} - {node}
                if third and "unopened" in answer.head:
                    so_far.at_odds[node] = _accused(answer.head["unopened"], others, client)
                    return None  # it has answered: whoever is silent is waited for no longer
                _check_stage(flowers, stage, asked_for, record, others, client)
                self._note(flowers, stage, so_far, node, record, asked_for, client)
                if third:
                    self._check_masked(flowers, record, client)
                    said = answer.head.get("update")
                    taken(node, Letter(said if isinstance(said, dict) else {}))
                    content = self._untold(flowers, self._weight(letters[node]))
                content.config_records[flowers.name] = record
                return SimpleNamespace(
                    content=content,
                    metadata=SimpleNamespace(src_node_id=node),
                    has_error=lambda: False,
                )

            answers = told(stage, sealed, opened)
            unfit = {n for n, s in so_far.shares.items() if not _fits(flowers, so_far, n, s, need)}
            if unfit:
                raise _Unfit(unfit)
            return answers

        def configure_fit(*_: Any) -> list[Any]:
            return [(SimpleNamespace(node_id=n), FitIns(Parameters([], ""), {})) for n in letters]

        def aggregate_fit(round_: int, results: list[Any], failures: list[Any]) -> Any:
            found.extend(parameters_to_ndarrays(results[0][1].parameters))
            return None, {}

        context = SimpleNamespace(
            state=RecordDict(
                {
                    flowers.config: ConfigRecord({flowers.round: round_}),
                    flowers.parameters: ArrayRecord({}),
                }
            ),
            strategy=SimpleNamespace(configure_fit=configure_fit, aggregate_fit=aggregate_fit),
            client_manager=SimpleNamespace(num_available=lambda: len(letters)),
            history=SimpleNamespace(add_metrics_distributed_fit=lambda **_: None),
        )
        weights = {node: self._weight(letter) for node, letter in letters.items()}
        most = float(max(weights.values()))
        whole = {node: round(weight / most * LEVELS) for node, weight in weights.items()}
        # every client of the round holds a share of every secret, and `need` of them open it
        workflow = flowers.workflow(
            1.0,
            need,
            max_weight=most,
            clipping_range=self._rules.secagg_clip,
            quantization_range=LEVELS,
            modulus_range=MODULUS,
        )
        grid, progress = SimpleNamespace(send_and_receive=send_and_receive), flowers.progress()
        try:
            for stage in ("setup", "share_keys"):
                if not getattr(workflow, f"{stage}_stage")(grid, context, progress):
                    return set(letters)
                if progress.active_node_ids != set(letters):
                    return set(progress.active_node_ids)
            collected = workflow.collect_masked_vectors_stage(grid, context, progress)
            if so_far.at_odds:
                here = {*progress.active_node_ids, *so_far.at_odds}
                return here - self._leave_out(letters, so_far.at_odds, need, refused)
            if collected:
                summed = {letters[node].head["client"] for node in progress.active_node_ids}
                if self.asked_of not in (None, summed):
                    return set(letters)
                self._ask(summed)
                with _weighing(flowers, sum(whole[node] for node in progress.active_node_ids)):
                    workflow.unmask_stage(grid, context, progress)
        except FastfplError:
            raise
        except _Unfit as error:
            gone = {node: letters[node].head["client"] for node in error.nodes}
            for node, client in gone.items():
                refused[node] = (
                    "fastfpl.flower: shares that a client deals must open the secret that it has "
                    f"marked; got others from client {client}: it is left out of the round"
                )
            may = (self.asked_of or set()) - {*gone.values()}
            self._ask(may)
            return {node for node, one in letters.items() if one.head["client"] in may}
        except Exception as error:  # a secret that does not fit, of a client that nobody can name
            raise InputError(
                "fastfpl.flower: the sum of masked uploads must open; got "
                f"{type(error).__name__}: {error}; the rounds that ended are kept, go on by resume"
            ) from error
        if found:
            self.mean = self._checked(found)
        return set(letters)

    def _ask(self, clients: set[int]) -> None:
        """Note who alone is summed in this round from now on."""
        if self.asked_of != clients:
            self._asks(clients)
        self.asked_of = clients

    def _note(
        self,
        flowers: SimpleNamespace,
        stage: str,
        so_far: _Attempt,
        node: int,
        record: Mapping[str, Any],
        asked: Mapping[str, Any],
        client: int,
    ) -> None:
        """Note what a client says of its secrets, or refuse keys and shares that are not its own.

        Keys are drawn: who has another's is wrong, or both are. A client has held the shares that
        it was sent to their marks before it trained, so that others are its own doing.
        """
        key = flowers.key
        if stage == "setup":
            keys = record[key.PUBLIC_KEY_1], record[key.PUBLIC_KEY_2]
            if so_far.used & {*keys}:
                raise Refused(
                    "fastfpl.flower: keys must be of one client alone; got another's from client "
                    f"{client}"
                )
            so_far.used |= {*keys}
            so_far.keys[node] = keys[0]
        elif stage == "share_keys":
            holders = [*record[key.DESTINATION_LIST], node]
            so_far.marks[node] = dict(zip(holders, record[MARKS], strict=True))
            so_far.seeds[node] = record[SEED_MARK]
        elif stage == "unmask":
            so_far.alive = {*asked[key.ACTIVE_NODE_ID_LIST]}
            told = dict(zip(record[key.NODE_ID_LIST], record[key.SHARE_LIST], strict=True))
            for owner, share in told.items():
                whole, who = so_far.marks[owner][node], (owner, node)
                if owner in so_far.alive:
                    good = mark_of("share of seed", who, share) == whole[:MARK]
                else:
                    good = mark_of("share of key", who, share) == whole[MARK:]
                if not good:
                    raise Refused(
                        "fastfpl.flower: a client must tell the shares that it has taken; got "
                        f"others from client {client}"
                    )
            for owner, share in told.items():
                so_far.shares.setdefault(owner, []).append(share)

    def _leave_out(
        self,
        letters: Mapping[int, Letter],
        at_odds: Mapping[int, set[int]],
        need: int,
        refused: dict[int, str],
    ) -> set[int]:
        """Say who is left out of a round whose clients are at odds on shares, and why."""
        alone, both = _left_out(at_odds, need)
        for node in {*at_odds, *alone, *both}:
            others = {*at_odds.get(node, ())} | {n for n, them in at_odds.items() if node in them}
            names = ", ".join(str(letters[n].head["client"]) for n in sorted(others))
            odds = (
                "fastfpl.flower: what a client seals for another must open; client "
                f"{letters[node].head['client']} is at odds with {names}"
            )
            if node in alone:
                refused[node] = f"{odds}, who are a quorum: it is left out of the round"
            elif node in both:
                refused[node] = (
                    f"{odds}, and nobody can say who is wrong: both of a pair are left out of the "
                    "round"
                )
        return alone | both

    def _weight(self, train: Letter) -> int:
        """Return what the client of a letter counts."""
        return self._images_of(train.head["client"]) if self._counts == "images" else 1

    def _stage(self, train: Letter, record: Any, with_download: bool) -> Letter:
        """Put a stage into a letter; what is to be trained from goes with the third."""
        more = {"train": train.head, "counts": self._counts} if with_download else {}
        arrays = {**(train.arrays if with_download else {}), RECORD: pack_record(record)}
        return Letter(stage_head("secure", train.head, **more), arrays)

    def _untold(self, flowers: SimpleNamespace, weight: int) -> Any:
        """Write the result of a client as Flower wants it, without what is not told."""
        from flwr.common import Code, FitRes, Parameters, Status

        fit = FitRes(Status(Code.OK, ""), Parameters([], ""), weight, {})
        return flowers.compat.fitres_to_recorddict(fit, keep_input=True)

    def _check_masked(self, flowers: SimpleNamespace, record: Any, client: int) -> None:
        """Refuse masked arrays that are not of the shapes that are summed."""
        shapes = [(1,), *((math.prod(shape),) for shape, _ in self._wanted.values())]
        try:
            got = [flowers.vector(data) for data in record[flowers.key.MASKED_PARAMETERS]]
            good = [one.shape for one in got] == shapes
            good = good and all(one.dtype == np.int64 for one in got)
            good = good and all(one.min(initial=0) >= 0 for one in got)
            good = good and all(one.max(initial=0) < MODULUS for one in got)
        except Exception:  # what NumPy says of bytes that are anything
            good = False
        if not good:
            raise Refused(
                f"fastfpl.flower: masked uploads must be whole numbers below 2^32 of shapes "
                f"{shown(shapes)}; got others from client {client}"
            )

    def _checked(self, found: Sequence[Any]) -> State:
        """Refuse a mean that no uploads within bounds can have: it is not tried again.

        A second sum over other clients would tell the difference of the two.
        """
        mean: State = {}
        for (name, (shape, dtype)), array in zip(self._wanted.items(), found, strict=True):
            tensor = torch.as_tensor(np.asarray(array)).reshape(shape)
            norm = torch.linalg.vector_norm(tensor).item()
            if not norm <= self._rules.most_norm:
                raise InputError(
                    f"fastfpl.flower: the norm of the mean of {name!r} must be at most most_norm="
                    f"{self._rules.most_norm:g}; got {norm:g}; the rounds that ended are kept"
                )
            mean[name] = tensor.to(dtype).to(self._device)
        return mean


@contextlib.contextmanager
def _weighing(flowers: SimpleNamespace, whole: int) -> Iterator[None]:
    """Refuse a sum whose weights are not its clients': its masks have not come off."""
    honest = flowers.opening.factor_extract

    def extracted(arrays: list[Any]) -> Any:
        if int(arrays[0][0]) != whole:
            raise InputError(
                "fastfpl.flower: the weights of a sum of masked uploads must be those of its "
                f"clients, {whole} in all; got {int(arrays[0][0])}: one has masked its upload by "
                "other secrets than it dealt, and nobody can say which; the rounds that ended are "
                "kept"
            )
        return honest(arrays)

    flowers.opening.factor_extract = extracted
    try:
        yield
    finally:
        flowers.opening.factor_extract = honest


# -- what clients answer ---------------------------------------------------------------------------


def _check_told(head: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse an answer to another stage's letter, or of another client's."""
    for key, value in wanted.items():
        if head.get(key) != value or isinstance(head.get(key), bool):
            raise Refused(
                f"fastfpl.flower: a stage must be answered with {key} {shown(value)}; got "
                f"{shown(head.get(key))} from client {wanted['client']}"
            )


def _check_stage(
    flowers: SimpleNamespace,
    stage: str,
    asked: Mapping[str, Any],
    record: Mapping[str, Any],
    others: set[int],
    client: int,
) -> None:
    """Refuse an answer of which Flower's next stage can make nothing, for all clients."""
    key = flowers.key

    def texts(name: str, many: int) -> bool:
        got = record.get(name)
        if not isinstance(got, list) or len(got) != many:
            return False
        return all(isinstance(one, bytes) and one for one in got)

    if stage == "setup":
        rule = "two keys of the curve P-384"
        keys = [record.get(k) for k in (key.PUBLIC_KEY_1, key.PUBLIC_KEY_2)]
        good = keys[0] != keys[1] and all(_is_key(flowers, one) for one in keys)
    elif stage == "share_keys":
        rule = "a share for each of the other clients, with its marks"
        nodes = record.get(key.DESTINATION_LIST)
        good = isinstance(nodes, list) and sorted(nodes) == sorted(others)
        good = good and texts(key.CIPHERTEXT_LIST, len(others)) and texts(MARKS, len(others) + 1)
        good = good and all(len(one) == 2 * MARK for one in record[MARKS])
        good = good and isinstance(record.get(SEED_MARK), bytes)
    elif stage == "unmask":
        rule = "the shares that it was asked for"
        wanted = [*asked[key.ACTIVE_NODE_ID_LIST], *asked[key.DEAD_NODE_ID_LIST]]
        good = texts(key.SHARE_LIST, len(wanted)) and record.get(key.NODE_ID_LIST) == wanted
        good = good and all(len(one) % 16 == 4 for one in record[key.SHARE_LIST])
    else:
        return
    if not good:
        raise Refused(
            f"fastfpl.flower: a client's answer to the stage {stage} must hold {rule}; got others "
            f"from client {client}"
        )


def _accused(nodes: object, others: set[int], client: int) -> set[int]:
    """Read whose shares do not open, as a client says."""
    good = isinstance(nodes, list) and nodes and all(type(node) is int for node in nodes)
    if not good or not {*nodes} <= others:  # type: ignore[misc]
        raise Refused(
            "fastfpl.flower: a client must say whose shares do not open, of the others of its "
            f"round; got {shown(nodes)} from client {client}"
        )
    return {*nodes}  # type: ignore[misc]


def _fits(
    flowers: SimpleNamespace, so_far: _Attempt, node: int, shares: Sequence[bytes], need: int
) -> bool:
    """Whether shares of a client open what it has marked; fewer than are needed open nothing."""
    if len(shares) < need:
        return True
    try:
        secret = flowers.combine(shares)
        if node in so_far.alive:
            return mark_of("seed", (node,), secret) == so_far.seeds[node]
        public = flowers.private_key(secret).public_key()
        return bool(flowers.public_bytes(public) == so_far.keys[node])
    except Exception:  # what cryptography says of bytes that are anything
        return False


def _is_key(flowers: SimpleNamespace, data: object) -> bool:
    try:
        return bool(flowers.public_key(data).curve.name == "secp384r1")
    except Exception:  # what a parser says of bytes that are anything
        return False
