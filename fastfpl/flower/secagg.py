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
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
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
        rule = "a share for each of the other clients"
        nodes = record.get(key.DESTINATION_LIST)
        good = isinstance(nodes, list) and sorted(nodes) == sorted(others)
        good = good and texts(key.CIPHERTEXT_LIST, len(others))
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
    said: dict[str, Any] = {}

    def train(message: Any, context: Any) -> Any:
        down = {name: one for name, one in letter.arrays.items() if name != _RECORD}
        answer = site.answer(Letter(dict(letter.head.get("train") or {}), down))
        if answer.head.get("kind") != "update":
            raise Refused(str(answer.head.get("why")))
        said.update(answer.head)
        most = float(context.state.config_records[flowers.state]["clipping_range"])
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
    if stage == "unmask":  # Flower would keep keys and shares until the next sum
        context.state.config_records[flowers.state] = ConfigRecord()
    sealed = {_RECORD: _sealed(answer.content.config_records[flowers.name])}
    return Letter(_told("secure", letter.head, **({"update": said} if said else {})), sealed)


# -- at the server ---------------------------------------------------------------------------------


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
        others begin anew: Flower's last stage asks for shares that such a client never gave.

        Once clients were asked to open a sum, no other clients are summed in the round: answers
        that come late open the first one too, and two sums tell their difference.
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

            there = self._attempt(here, round_, need, told, taken)
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
    ) -> set[int]:
        """Go through the stages: who is left to begin anew with; everybody where there is no use.

        ``told(stage, letters, opened)`` sends a stage, and returns what ``opened(node, answer)``
        made of good answers; ``taken(node, update)`` checks what a client says of its training.
        """
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict
        from flwr.common import FitIns, Parameters, parameters_to_ndarrays

        flowers = _flowers()
        found: list[Any] = []

        def send_and_receive(messages: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
            """Be what Flower's stages send by."""
            asked = {m.metadata.dst_node_id: m.content for m in messages}
            stage = str(messages[0].content.config_records[flowers.name][flowers.key.STAGE])
            third = stage == "collect_masked_vectors"
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
                asked_for = asked[node].config_records[flowers.name]
                _check_stage(flowers, stage, asked_for, record, {*letters} - {node}, client)
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

            return told(stage, sealed, opened)

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
            if workflow.collect_masked_vectors_stage(grid, context, progress):
                summed = {letters[node].head["client"] for node in progress.active_node_ids}
                if self._asked_of not in (None, summed):
                    return set(letters)
                self._asked_of = summed
                workflow.unmask_stage(grid, context, progress)
        except FastfplError:
            raise
        except Exception as error:  # a secret that does not fit, of a client that nobody can name
            raise InputError(
                "fastfpl.flower: the sum of masked uploads must open; got "
                f"{type(error).__name__}: {error}; the rounds that ended are kept, go on by resume"
            ) from error
        if found:
            self.mean = self._checked(found)
        return set(letters)

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
