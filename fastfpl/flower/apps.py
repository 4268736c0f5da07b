"""Flower's side: a ClientApp that hands letters to a `Site`, a ServerApp that drives a `Server`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfpl.config import Settings, make_settings
from fastfpl.errors import InputError, Missing, shown
from fastfpl.flower.letters import Letter, Packed, Refused
from fastfpl.flower.rules import Rules, make_rules
from fastfpl.flower.secagg_client import secure_answer
from fastfpl.flower.server import serve
from fastfpl.flower.site import Site, refusal
from fastfpl.tracking import make_trackers

__all__ = ["GridPost", "client_app", "flower_version", "records", "server_app"]

# how arrays lie in Flower's records: raw bytes, which nobody unpickles
_STYPE = "fastfpl.raw-1"
_HEAD, _ARRAYS, _JSON = "head", "arrays", "json"
# seconds between two looks for answers; Flower's own sleeps are longer
_POLL = 0.3
_KINDS = {"join": "query", "train": "train", "ask": "evaluate"}


def flower_version() -> str:
    """Return flwr's version, or say how to get it."""
    try:
        from importlib import metadata

        import flwr

        del flwr
        return metadata.version("flwr")
    except ImportError:
        raise Missing(
            "fastfpl.flower: flwr must be installed; got none (it needs Python 3.11 or later); "
            'run: pip install "fastfpl[flower]"'
        ) from None


# -- letters in Flower's records -------------------------------------------------------------------


def records(letter: Letter) -> Any:
    """Put a letter into a RecordDict: a text of JSON, and arrays as raw bytes."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    parts: dict[str, Any] = {_HEAD: ConfigRecord({_JSON: letter.text})}
    if letter.arrays:
        parts[_ARRAYS] = ArrayRecord(
            {
                name: Array(dtype=one.dtype, shape=one.shape, stype=_STYPE, data=one.data)
                for name, one in letter.arrays.items()
            }
        )
    return RecordDict(parts)


def letter_of(content: Any) -> Letter:
    """Read a letter from a RecordDict, or refuse what is none."""
    head = content.config_records.get(_HEAD)
    text = None if head is None else head.get(_JSON)
    others = set(content) - {_HEAD, _ARRAYS}
    if not isinstance(text, str) or others:
        raise Refused(
            "fastfpl.flower: a message must hold a head of JSON and arrays; got "
            f"{shown(sorted(map(str, content)))}"
        )
    arrays = {}
    for name, one in content.array_records.get(_ARRAYS, {}).items():
        if one.stype != _STYPE:
            raise Refused(
                f"fastfpl.flower: arrays must be of {_STYPE}; got {shown(one.stype)} in "
                f"{shown(name)}"
            )
        arrays[str(name)] = Packed(str(one.dtype), tuple(one.shape), bytes(one.data))
    return Letter.read(text, arrays)


# -- what stands in Flower's configurations --------------------------------------------------------


def _run_settings(config: Mapping[str, Any]) -> tuple[Settings, Rules]:
    """Read settings and rules of the run configuration."""
    found = []
    for key in ("settings", "rules"):
        try:
            values = json.loads(str(config.get(key) or "{}"))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise InputError(
                f"fastfpl.flower: {key} of the run must be JSON of one mapping; got "
                f"{shown(config.get(key))}"
            )
        found.append(values)
    return make_settings(found[0]), make_rules(found[1])


#: What a SuperNode may be told by ``--node-config``, beside what Flower itself takes.
NODE_KEYS = {
    "client": "which client this is, from 0 (also: partition-id)",
    "state-dir": "folder in which it keeps its state",
    "cache": "folder of its image features",
    "root": "folder of its data set",
    "data": "its own images, as folder:PATH, of a run with --dataset own",
    "name": "what people call it, in such a run",
    "pretrained": "its own copy of the CLIP's weights",
    "device": "cpu, cuda or auto",
    "threads": "CPU threads",
    "aggregation": "secagg+: it trains for a server alone that learns means under masks",
}


def site_of(run: Mapping[str, Any], node: Mapping[str, Any]) -> Site:
    """Make the client that a node's configuration says it is."""
    settings, rules = _run_settings(run)
    client = node.get("client", node.get("partition-id"))
    if not isinstance(client, int) or isinstance(client, bool):
        raise InputError(
            "fastfpl.flower: client must be a whole number in the node's configuration; got "
            f"{shown(client)}; start the SuperNode with --node-config 'client=0 state-dir=\"...\"'"
        )
    folder = node.get("state-dir")
    if not isinstance(folder, str) or not folder:
        raise InputError(
            "fastfpl.flower: state-dir must name a folder in the node's configuration; got "
            f"{shown(folder)}; start the SuperNode with --node-config 'client={client} "
            'state-dir="..."\''
        )
    own = {key: node[key] for key in ("root", "pretrained", "device", "threads") if key in node}
    values = {**settings.model_dump(), **own}
    if "pretrained" in own and settings.pretrained is None:
        raise InputError(
            "fastfpl.flower: pretrained of a node must be left out where the run names no weights;"
            f" got {shown(own['pretrained'])}"
        )
    cache = node.get("cache")
    texts: dict[str, str] = {}
    for key in ("data", "name"):
        if key in node:
            if not isinstance(node[key], str) or not node[key]:
                raise InputError(
                    f"fastfpl.flower: {key} must be text in the node's configuration; got "
                    f"{shown(node[key])}"
                )
            texts[key] = str(node[key])
    return Site(
        make_settings(values),
        client,
        Path(folder),
        cache=None if cache is None else Path(str(cache)),
        wire=rules.wire,
        pretrained=settings.pretrained,
        data=texts.get("data"),
        name=texts.get("name"),
    )


def refuse_plain(letter: Letter, run: Mapping[str, Any], node: Mapping[str, Any]) -> None:
    """Refuse to train in the clear where the run, or this client, wants sums under masks."""
    demand = node.get("aggregation")
    if demand not in (None, "plain", "secagg+"):
        raise InputError(
            "fastfpl.flower: aggregation must be secagg+ in the node's configuration, or left out; "
            f"got {shown(demand)}"
        )
    _, rules = _run_settings(run)
    if letter.head.get("kind") == "train" and "secagg+" in (demand, rules.aggregation):
        raise Refused(
            "fastfpl.flower: uploads of this client must be summed under masks, as "
            f"{'its own configuration' if demand == 'secagg+' else 'the run'} says; got a letter "
            "that asks for one in the clear: -r aggregation=secagg+"
        )


def client_app() -> Any:
    """Return a ClientApp that plays one client of any method; the run's configuration says which.

    A SuperNode is told by ``--node-config`` which client it is and where its files lie, see
    `NODE_KEYS`.
    """
    flower_version()
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def answered(message: Message, context: Any) -> Message:
        try:
            letter = letter_of(message.content)
            site = site_of(context.run_config, context.node_config)
            refuse_plain(letter, context.run_config, context.node_config)
            if letter.head.get("kind") == "secure":
                answer = secure_answer(letter, message, context, site)
            else:
                answer = site.answer(letter)
        except InputError as error:
            answer = refusal(str(error))
        return Message(records(answer), reply_to=message)

    for kind in (app.query(), app.train(), app.evaluate()):
        kind(answered)
    return app


class GridPost:
    """Carries letters over Flower's grid.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def nodes(self) -> Mapping[int, str]:
        """Return who can be reached now: node to registered name."""
        return {int(one.node_id): str(one.name or "") for one in self._grid.get_nodes()}

    def send(
        self, letters: Mapping[int, Letter], kind: str, round_: int, ttl: float
    ) -> Mapping[str, int]:
        """Send a letter to each node."""
        nodes = list(letters)
        # a list: the grid reads what it is given twice
        messages = [
            self._grid.create_message(records(letters[n]), _KINDS[kind], n, str(round_), ttl)
            for n in nodes
        ]
        numbers = list(self._grid.push_messages(messages))
        if len(numbers) != len(nodes):  # the SuperLink could not be reached
            return {f"unsent {n}": n for n in nodes}
        # what is not delivered has no number, and is as good as absent
        return {number or f"unsent {n}": n for number, n in zip(numbers, nodes, strict=True)}

    def fetch(self, numbers: Sequence[str]) -> Sequence[tuple[str, Letter | str]]:
        """Return the answers that are there."""
        found: list[tuple[str, Letter | str]] = []
        sent = [number for number in numbers if not number.startswith("unsent ")]
        found += [(n, "Flower did not deliver the letter") for n in numbers if n not in sent]
        for message in self._grid.pull_messages(sent) if sent else ():
            number = message.metadata.reply_to_message_id
            if message.has_error():
                error = message.error
                found.append((number, f"Flower's error {error.code}: {error.reason}"))
                continue
            try:
                found.append((number, letter_of(message.content)))
            except Refused as error:
                found.append((number, Letter({"kind": "unreadable", "why": str(error)})))
        return found

    def now(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def wait(self) -> None:
        """Wait a moment."""
        time.sleep(_POLL)


def server_app() -> Any:
    """Return a ServerApp that drives a run of any method; the run's configuration says which.

    Its keys: ``settings`` and ``rules`` as JSON, ``out`` the folder of results, ``resume``,
    ``track`` names of trackers.
    """
    version = flower_version()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator,unused-ignore]
    def main(grid: Any, context: Any) -> None:
        config = context.run_config
        settings, rules = _run_settings(config)
        out = config.get("out")
        if not isinstance(out, str) or not out:
            raise InputError(f"fastfpl.flower: out of the run must name a folder; got {shown(out)}")
        track = str(config.get("track") or "")
        serve(
            settings,
            rules,
            Path(out),
            GridPost(grid),
            resume=bool(config.get("resume", False)),
            log=_say,
            version=version,
            on_round=_told,
            callbacks=make_trackers([track] if track else []),
        )

    return app


def _say(text: str) -> None:
    import logging

    logging.getLogger("flwr").info("%s", text)


def _told(method: str, row: Mapping[str, Any]) -> None:
    accuracy = row["accuracy"]
    figure = "not asked" if accuracy is None else f"accuracy {100 * accuracy:.1f} %"
    _say(f"{method}: round {row['round'] + 1}, {figure}, {row['seconds']:.1f} s")
