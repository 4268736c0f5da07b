"""Secure aggregation: a server learns the weighted mean of uploads, and of none of them more.

The protocol is SecAgg+ (Bell et al. 2020, ACM CCS, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead"), as Flower has it: its ``secaggplus_mod`` at clients, the four stages
of its ``SecAggPlusWorkflow`` at the server, whose records travel in letters of ours, so that the
rules of a run hold for every stage. Secret shares are held by every client of the round.

One part is not Flower's: flwr 1.41 and 1.42 expand a mask from a seed that is folded to 32 bits, by
a Mersenne twister. Whoever has a masked vector finds such a mask by trying. Here ChaCha20 expands
all of the key (`masks`), on both sides.

It is for a server that follows the protocol and looks at what it gets. Keys of clients are not
signed: a server that hands out keys of its own in their names is not held off.

What Flower has not either are marks: with its shares a client sends hashes of them, and of the seed
of its mask. Who is sent a share holds it to its mark before it trains, the server what it is told
at the end, so that wrong shares are refused by the name of whoever sent them.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastfpl.config import Settings
from fastfpl.errors import FastfplError, InputError, shown
from fastfpl.federation.merging import Counts, Expected, counted, only_mean
from fastfpl.federation.sampling import Sampling
from fastfpl.flower.letters import SCHEMA, Letter, Packed, Refused, unpack
from fastfpl.flower.post import Outcome, Post, Taken, exchange
from fastfpl.flower.rules import Rules
from fastfpl.flower.site import Site, refusal
from fastfpl.methods import Method, State

__all__ = ["SecureMean", "check_secagg", "counts_of", "masks", "secure_answer"]

# Flower's record of a stage among a letter's arrays, which are else those of a download
_RECORD = "secagg+"
# ours in such a record: marks of shares, one a client, and of the seed of a mask
_MARKS, _SEED_MARK = "marks", "seed_mark"
# of a mark: of the share of a seed, then of that of a key
_MARK = 32
_LEVELS, _MODULUS = 1 << 22, 1 << 32  # Flower's defaults: of numbers, and of their sum
_MOST_CLIENTS = _MODULUS // _LEVELS - 1  # of largest weight each, whose sum is not to be 0 again


def check_secagg(settings: Settings, rules: Rules) -> None:
    """Refuse settings and rules that a sum of masked uploads cannot serve.

    Raises
    ------
    InputError
    """
    if rules.aggregation != "secagg+":
        return
    for name, wanted, got in (
        ("merge", "mean", settings.merge),
        ("clip_update", None, settings.clip_update),
        ("dropout", 0.0, settings.dropout),
        ("wire", "exact", rules.wire),
    ):
        if got != wanted:
            raise InputError(
                f"fastfpl.flower: {name} must be {wanted or 'left out'} with aggregation=secagg+, "
                f"whose server sees no single upload; got {got}"
            )
    if settings.dp_noise is not None and settings.dp_unit == "client":
        raise InputError(
            "fastfpl.flower: dp_unit must be image with aggregation=secagg+, since a server that "
            "sees no single upload cannot cut one; got client"
        )
    if rules.quorum <= 0.5 + 1e-9:  # as `Rules.enough` rounds
        raise InputError(
            "fastfpl.flower: quorum must be above 0.5 with aggregation=secagg+, or a server could "
            f"ask one half of the clients for one secret of a client, and the other half for the "
            f"other; got {rules.quorum:g}: -r quorum=0.6"
        )


def counts_of(method: Method, server: State, wanted: Expected, sampling: Sampling | None) -> Counts:
    """Return what a method's mean counts, or refuse a method or a run that has no secret mean.

    Parameters
    ----------
    method : Method
    server : State
        Before the first round.
    wanted : Expected
    sampling : Sampling or None
        None where nobody knows yet how many clients a round calls.

    Raises
    ------
    InputError
    """
    found = counted(method, server, wanted)
    if found is None:
        why = only_mean(method, server, wanted) or "its mean counts neither images nor clients"
        raise InputError(
            f"fastfpl.flower: aggregation must be plain for {method.name}; got secagg+, and {why}"
        )
    # the first round may call all
    for called in () if sampling is None else (sampling.fewest, len(sampling.sample(0))):
        if not 3 <= called <= _MOST_CLIENTS:
            raise InputError(
                f"fastfpl.flower: a round must call 3 to {_MOST_CLIENTS} clients with "
                f"aggregation=secagg+; got {called}"
            )
    return found


def masks(seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]) -> list[Any]:
    """Expand a secret into arrays of uniform whole numbers, by ChaCha20 under its SHA-256.

    Parameters
    ----------
    seed : bytes
    num_range : int
        A power of two, at most 2³²: numbers are below it.
    dimensions_list : sequence of tuple of int
        Shapes.

    Returns
    -------
    list of int64 arrays
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    key = hashlib.sha256(b"fastfpl.flower.secagg" + seed).digest()
    # a key is used once: its nonce may be any
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    found = []
    for shape in dimensions_list:
        drawn = np.frombuffer(stream.update(bytes(4 * math.prod(shape))), dtype="<u4")
        found.append((drawn.astype(np.int64) & (num_range - 1)).reshape(shape))
    return found


def _mark(what: str, numbers: Sequence[int], secret: bytes) -> bytes:
    """Say what a secret can be told by; it has 128 bits of chance or more, and stays one."""
    text = "|".join(["fastfpl.flower.mark", what, *map(str, numbers), ""])
    return hashlib.sha256(text.encode() + secret).digest()


def _share_marks(dealer: int, holder: int, seed: bytes, key: bytes) -> bytes:
    """Mark the two shares that a client deals another."""
    who = (dealer, holder)
    return _mark("share of seed", who, seed) + _mark("share of key", who, key)


def _flowers() -> SimpleNamespace:
    """Return Flower's parts of the protocol, with masks of ours.

    Raises
    ------
    InputError
        If this flwr has them elsewhere.
    """
    try:
        client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        server = importlib.import_module(
            "flwr.server.workflow.secure_aggregation.secaggplus_workflow"
        )
        for module, function in (
            (client, client._collect_masked_vectors),
            (server, server.SecAggPlusWorkflow.unmask_stage),
        ):
            if "pseudo_rand_gen" not in function.__code__.co_names:
                raise AttributeError(f"{function.__name__} expands masks by something else")
            module.pseudo_rand_gen = masks  # type: ignore[attr-defined]
        return SimpleNamespace(
            answer=client.secaggplus_mod,
            key=client.Key,
            name=client.RECORD_KEY_CONFIGS,
            state=client.RECORD_KEY_STATE,
            kept=client.SecAggPlusState,
            decrypt=client.decrypt,
            separate=client.share_keys_plaintext_separate,
            combine=server.combine_shares,
            private_key=server.bytes_to_private_key,
            public_bytes=client.public_key_to_bytes,
            compat=server.compat,
            workflow=server.SecAggPlusWorkflow,
            progress=server.WorkflowState,
            config=server.MAIN_CONFIGS_RECORD,
            parameters=server.MAIN_PARAMS_RECORD,
            round=server.WorkflowKey.CURRENT_ROUND,
            vector=server.bytes_to_ndarray,
            public_key=server.bytes_to_public_key,
        )
    except (ImportError, AttributeError) as error:
        raise InputError(
            "fastfpl.flower: flwr must have SecAgg+ as 1.41 and 1.42 have it, with "
            f"aggregation=secagg+; got another: {error}"
        ) from None


def _sealed(record: Any) -> Packed:
    """Put a record of Flower's into an array of bytes."""
    data = record.deflate()
    return Packed("uint8", (len(data),), data)


def _opened(letter: Letter) -> Any:
    """Read a record of Flower's, or refuse what is none."""
    from flwr.app import ConfigRecord

    try:
        return ConfigRecord.inflate(letter.arrays[_RECORD].data)
    except Exception as error:  # what a parser says of bytes that are anything
        raise Refused(
            "fastfpl.flower: a letter of secure aggregation must hold a record of Flower's; got "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from None


def _told(kind: str, head: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    kept = {key: head.get(key) for key in ("federation", "client", "round")}
    return {"schema": SCHEMA, "kind": kind, **kept, **more}


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
        good = good and texts(key.CIPHERTEXT_LIST, len(others)) and texts(_MARKS, len(others) + 1)
        good = good and all(len(one) == 2 * _MARK for one in record[_MARKS])
        good = good and isinstance(record.get(_SEED_MARK), bytes)
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
            return _mark("seed", (node,), secret) == so_far.seeds[node]
        public = flowers.private_key(secret).public_key()
        return bool(flowers.public_bytes(public) == so_far.keys[node])
    except Exception:  # what cryptography says of bytes that are anything
        return False


def _is_key(flowers: SimpleNamespace, data: object) -> bool:
    try:
        return bool(flowers.public_key(data).curve.name == "secp384r1")
    except Exception:  # what a parser says of bytes that are anything
        return False


# -- at a client -----------------------------------------------------------------------------------


def secure_answer(letter: Letter, message: Any, context: Any, site: Site) -> Letter:
    """Answer a letter of a stage; what the client trains leaves it masked alone.

    Parameters
    ----------
    letter : Letter
    message : flwr.app.Message
        What carried it.
    context : flwr.app.Context
        Whose state keeps the client's secrets until the round's last stage.
    site : Site
    """
    try:
        return _stage(letter, message, context, site)
    except FastfplError as error:
        return refusal(str(error), letter.head)
    except Exception as error:  # of Flower's own checks, and of its cryptography
        return refusal(
            "fastfpl.flower: a stage of secure aggregation must be what its protocol says; got "
            f"{type(error).__name__}: {error}",
            letter.head,
        )


def _stage(letter: Letter, message: Any, context: Any, site: Site) -> Letter:
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

    flowers, record = _flowers(), _opened(letter)
    key, stage = flowers.key, record.get(flowers.key.STAGE)
    if stage == "setup":
        held, need = record.get(key.SHARE_NUMBER), record.get(key.THRESHOLD)
        if not isinstance(held, int) or not isinstance(need, int) or held < 3 or 2 * need <= held:
            raise Refused(
                "fastfpl.flower: secrets must be shared by three clients or more, and open to more "
                f"than half of them alone; got {shown(need)} of {shown(held)}"
            )
    if stage == "unmask":
        alive, dead = (record.get(k) for k in (key.ACTIVE_NODE_ID_LIST, key.DEAD_NODE_ID_LIST))
        if set(alive or ()) & set(dead or ()):
            raise Refused(
                "fastfpl.flower: a client must be there or lost, of whom one secret each is told; "
                "got one that is said to be both"
            )

    def kept() -> Any:
        # Flower's records are read anew: a view of them holds what was there
        return flowers.kept(**context.state.config_records.get(flowers.state, {}))

    def forget() -> None:
        context.state.config_records[flowers.state] = ConfigRecord()

    if stage == "collect_masked_vectors":
        wrong = _unopened(flowers, kept(), record)
        if wrong:  # what it has dealt itself is never opened
            forget()
            sealed = {_RECORD: _sealed(ConfigRecord())}
            return Letter(_told("secure", letter.head, unopened=wrong), sealed)
    said: dict[str, Any] = {}

    def train(message: Any, context: Any) -> Any:
        down = {name: one for name, one in letter.arrays.items() if name != _RECORD}
        answer = site.answer(Letter(dict(letter.head.get("train") or {}), down))
        if answer.head.get("kind") != "update":
            raise Refused(str(answer.head.get("why")))
        said.update(answer.head)
        most = float(kept().clipping_range)
        vectors = []
        for name, tensor in sorted(unpack(answer.arrays).items()):
            vector = tensor.double().reshape(-1).numpy()  # Flower's sums miss a number alone
            finite = bool(np.isfinite(vector).all())
            if not finite or np.abs(vector).max(initial=0.0) > most:
                # not which: the server is to see none of them
                found = f"larger ones: -r secagg_clip={2 * most:g}" if finite else "NaN or inf"
                raise Refused(
                    f"fastfpl.flower: numbers of {name!r} must lie within secagg_clip={most:g}, or "
                    f"masks would not come off; client {site.client} got {found}"
                )
            vectors.append(vector)
        weight = answer.head["images"] if letter.head.get("counts") == "images" else 1
        fit = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(vectors), weight, {})
        content = flowers.compat.fitres_to_recorddict(fit, keep_input=True)
        return Message(content, reply_to=message)

    inner = Message(RecordDict({flowers.name: record}), metadata=message.metadata)
    answer = flowers.answer(inner, context, train)
    told = answer.content.config_records[flowers.name]
    if stage == "share_keys":
        _add_marks(flowers, kept(), told)
    if stage == "unmask":  # Flower would keep keys and shares until the next sum
        forget()
    more = {"update": said} if said else {}
    return Letter(_told("secure", letter.head, **more), {_RECORD: _sealed(told)})


def _add_marks(flowers: SimpleNamespace, kept: Any, told: Any) -> None:
    """Add marks to the shares that a client deals: for each of the others, then for itself."""
    key, own = flowers.key, kept.nid
    others = told[key.DESTINATION_LIST]
    marks = []
    for node, sealed in zip(others, told[key.CIPHERTEXT_LIST], strict=True):
        shares = flowers.separate(flowers.decrypt(kept.ss2_dict[node], sealed))[2:]
        marks.append(_share_marks(own, node, *shares))
    mine = kept.rd_seed_share_dict[own], kept.sk1_share_dict[own]
    told[_MARKS] = [*marks, _share_marks(own, own, *mine)]
    told[_SEED_MARK] = _mark("seed", (own,), kept.rd_seed)


def _unopened(flowers: SimpleNamespace, kept: Any, record: Any) -> list[int]:
    """Return whose shares for a client do not open, or are others than they were said to be."""
    key, own, wrong = flowers.key, kept.nid, []
    mine = kept.rd_seed_share_dict[own], kept.sk1_share_dict[own]
    sources, sealed, marks = (record[k] for k in (key.SOURCE_LIST, key.CIPHERTEXT_LIST, _MARKS))
    for source, text, mark in zip(sources, sealed, marks, strict=True):
        try:
            dealer, holder, *shares = flowers.separate(flowers.decrypt(kept.ss2_dict[source], text))
            good = (dealer, holder) == (source, own) and list(map(len, shares)) == list(
                map(len, mine)
            )
            good = good and _share_marks(dealer, holder, *shares) == mark
        except Exception:  # what cryptography says of bytes that are anything
            good = False
        if not good:
            wrong.append(source)
    return wrong


# -- at the server ---------------------------------------------------------------------------------


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

    Attributes
    ----------
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
    ) -> None:
        self._wanted = dict(sorted(wanted.items()))
        self._images_of = images_of
        self._counts = counts
        self._rules = rules
        self._device = device
        self._asked_of: set[int] | None = None
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
        may = self._asked_of
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
                return list(outcome.good.values())

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
        made of good answers; ``taken(node, update)`` checks what a client says of its training;
        ``refused`` says why an answer was not taken.
        """
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict
        from flwr.common import FitIns, Parameters, parameters_to_ndarrays

        flowers = _flowers()
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
                    record[_MARKS] = [so_far.marks[source][node] for source in sources]
            sealed = {
                node: self._stage(letters[node], content.config_records[flowers.name], third)
                for node, content in asked.items()
            }
            self.nbytes_down += sum(letter.nbytes for letter in sealed.values())

            def opened(node: int, answer: Letter) -> Any:
                client = letters[node].head["client"]
                _check_told(answer.head, _told("secure", letters[node].head))
                if answer.nbytes > self._rules.most_bytes:
                    raise Refused(
                        f"fastfpl.flower: an answer must have at most most_bytes="
                        f"{self._rules.most_bytes} bytes; got {answer.nbytes} from client {client}"
                    )
                self.nbytes_up += answer.nbytes
                record, content = _opened(answer), RecordDict()
                asked_for, others = asked[node].config_records[flowers.name], {*letters} - {node}
                if third and "unopened" in answer.head:
                    so_far.at_odds[node] = _accused(answer.head["unopened"], others, client)
                    raise Refused(
                        "fastfpl.flower: what clients seal for another must open; client "
                        f"{client} says that it does not"
                    )
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
        # every client of the round holds a share of every secret, and `need` of them open it
        workflow = flowers.workflow(
            1.0,
            need,
            max_weight=float(max(map(self._weight, letters.values()))),
            clipping_range=self._rules.secagg_clip,
            quantization_range=_LEVELS,
            modulus_range=_MODULUS,
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
                if self._asked_of not in (None, summed):
                    return set(letters)
                self._asked_of = summed
                workflow.unmask_stage(grid, context, progress)
        except FastfplError:
            raise
        except _Unfit as error:
            for node in error.nodes:
                client = letters[node].head["client"]
                refused[node] = (
                    "fastfpl.flower: shares that a client deals must open the secret that it has "
                    f"marked; got others from client {client}: it is left out of the round"
                )
                assert self._asked_of is not None
                self._asked_of = self._asked_of - {client}
            return {n for n, one in letters.items() if one.head["client"] in self._asked_of}
        except Exception as error:  # a secret that does not fit, of a client that nobody can name
            raise InputError(
                "fastfpl.flower: the sum of masked uploads must open; got "
                f"{type(error).__name__}: {error}; the rounds that ended are kept, go on by resume"
            ) from error
        if found:
            self.mean = self._checked(found)
        return set(letters)

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
            so_far.marks[node] = dict(zip(holders, record[_MARKS], strict=True))
            so_far.seeds[node] = record[_SEED_MARK]
        elif stage == "unmask":
            so_far.alive = {*asked[key.ACTIVE_NODE_ID_LIST]}
            told = dict(zip(record[key.NODE_ID_LIST], record[key.SHARE_LIST], strict=True))
            for owner, share in told.items():
                whole, who = so_far.marks[owner][node], (owner, node)
                if owner in so_far.alive:
                    good = _mark("share of seed", who, share) == whole[:_MARK]
                else:
                    good = _mark("share of key", who, share) == whole[_MARK:]
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
            else:  # it is asked again, and has done nothing that is known to be wrong
                refused.pop(node, None)
        return alone | both

    def _weight(self, train: Letter) -> int:
        """Return what the client of a letter counts."""
        return self._images_of(train.head["client"]) if self._counts == "images" else 1

    def _stage(self, train: Letter, record: Any, with_download: bool) -> Letter:
        """Put a stage into a letter; what is to be trained from goes with the third."""
        more = {"train": train.head, "counts": self._counts} if with_download else {}
        arrays = {**(train.arrays if with_download else {}), _RECORD: _sealed(record)}
        return Letter(_told("secure", train.head, **more), arrays)

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
            good = good and all(one.max(initial=0) < _MODULUS for one in got)
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
