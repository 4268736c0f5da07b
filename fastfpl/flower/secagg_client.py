"""Secure aggregation at a client: what it trains leaves it masked alone.

What both sides share is in `fastfpl.flower.secagg`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from fastfpl.errors import FastfplError, shown
from fastfpl.flower.letters import Letter, Refused, unpack
from fastfpl.flower.secagg import (
    MARKS,
    RECORD,
    SEED_MARK,
    flower_parts,
    mark_of,
    pack_record,
    read_record,
    share_marks,
    stage_head,
)
from fastfpl.flower.site import Site, refusal

__all__ = ["secure_answer"]


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

    flowers, record = flower_parts(), read_record(letter)
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
            sealed = {RECORD: pack_record(ConfigRecord())}
            return Letter(stage_head("secure", letter.head, unopened=wrong), sealed)
    said: dict[str, Any] = {}

    def train(message: Any, context: Any) -> Any:
        down = {name: one for name, one in letter.arrays.items() if name != RECORD}
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
    return Letter(stage_head("secure", letter.head, **more), {RECORD: pack_record(told)})


def _add_marks(flowers: SimpleNamespace, kept: Any, told: Any) -> None:
    """Add marks to the shares that a client deals: for each of the others, then for itself."""
    key, own = flowers.key, kept.nid
    others = told[key.DESTINATION_LIST]
    marks = []
    for node, sealed in zip(others, told[key.CIPHERTEXT_LIST], strict=True):
        shares = flowers.separate(flowers.decrypt(kept.ss2_dict[node], sealed))[2:]
        marks.append(share_marks(own, node, *shares))
    mine = kept.rd_seed_share_dict[own], kept.sk1_share_dict[own]
    told[MARKS] = [*marks, share_marks(own, own, *mine)]
    told[SEED_MARK] = mark_of("seed", (own,), kept.rd_seed)


def _unopened(flowers: SimpleNamespace, kept: Any, record: Any) -> list[int]:
    """Return whose shares for a client do not open, or are others than they were said to be."""
    key, own, wrong = flowers.key, kept.nid, []
    mine = kept.rd_seed_share_dict[own], kept.sk1_share_dict[own]
    sources, sealed, marks = (record[k] for k in (key.SOURCE_LIST, key.CIPHERTEXT_LIST, MARKS))
    for source, text, mark in zip(sources, sealed, marks, strict=True):
        try:
            dealer, holder, *shares = flowers.separate(flowers.decrypt(kept.ss2_dict[source], text))
            good = (dealer, holder) == (source, own) and list(map(len, shares)) == list(
                map(len, mine)
            )
            good = good and share_marks(dealer, holder, *shares) == mark
        except Exception:  # what cryptography says of bytes that are anything
            good = False
        if not good:
            wrong.append(source)
    return wrong
