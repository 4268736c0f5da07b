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
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastfpl.config import Settings
from fastfpl.errors import InputError, shown
from fastfpl.federation.merging import Counts, Expected, counted, only_mean
from fastfpl.federation.sampling import Sampling
from fastfpl.flower.letters import SCHEMA, Letter, Packed, Refused
from fastfpl.flower.rules import Rules
from fastfpl.methods import Method, State

__all__ = [
    "LEVELS",
    "MARK",
    "MARKS",
    "MODULUS",
    "MOST_CLIENTS",
    "RECORD",
    "SEED_MARK",
    "check_secagg",
    "counts_of",
    "flower_parts",
    "mark_of",
    "masks",
    "pack_record",
    "read_record",
    "share_marks",
    "stage_head",
]

#: Flower's record of a stage among a letter's arrays, which are else those of a download.
RECORD = "secagg+"
#: Ours in such a record: marks of shares, one a client, and of the seed of a mask.
MARKS, SEED_MARK = "marks", "seed_mark"
#: Bytes of the mark of a seed's share, which that of a key's follows.
MARK = 32
#: Flower's defaults: steps of a number, and what sums are taken by.
LEVELS, MODULUS = 1 << 22, 1 << 32
#: Clients of largest weight each whose sum is not 0 again.
MOST_CLIENTS = MODULUS // LEVELS - 1


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
        if not 3 <= called <= MOST_CLIENTS:
            raise InputError(
                f"fastfpl.flower: a round must call 3 to {MOST_CLIENTS} clients with "
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


def mark_of(what: str, numbers: Sequence[int], secret: bytes) -> bytes:
    """Say what a secret can be told by; it has 128 bits of chance or more, and stays one."""
    text = "|".join(["fastfpl.flower.mark", what, *map(str, numbers), ""])
    return hashlib.sha256(text.encode() + secret).digest()


def share_marks(dealer: int, holder: int, seed: bytes, key: bytes) -> bytes:
    """Mark the two shares that a client deals another."""
    who = (dealer, holder)
    return mark_of("share of seed", who, seed) + mark_of("share of key", who, key)


def flower_parts() -> SimpleNamespace:
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
        if "factor_extract" not in server.SecAggPlusWorkflow.unmask_stage.__code__.co_names:
            raise AttributeError("unmask_stage reads sums of weights by something else")
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
            opening=server,
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


def pack_record(record: Any) -> Packed:
    """Put a record of Flower's into an array of bytes."""
    data = record.deflate()
    return Packed("uint8", (len(data),), data)


def read_record(letter: Letter) -> Any:
    """Read a record of Flower's, or refuse what is none."""
    from flwr.app import ConfigRecord

    try:
        return ConfigRecord.inflate(letter.arrays[RECORD].data)
    except Exception as error:  # what a parser says of bytes that are anything
        raise Refused(
            "fastfpl.flower: a letter of secure aggregation must hold a record of Flower's; got "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from None


def stage_head(kind: str, head: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Head a letter of a stage like the letter that asks for what it is a stage of."""
    kept = {key: head.get(key) for key in ("federation", "client", "round")}
    return {"schema": SCHEMA, "kind": kind, **kept, **more}
