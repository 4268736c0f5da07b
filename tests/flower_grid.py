"""Flower's grid in one process, after `shared/flower.md`: real messages, no SuperLink, no Ray."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

__all__ = ["LocalGrid"]


class LocalGrid(Grid):
    """Calls a ClientApp where a SuperNode would start a process for it.

    Every message is written to bytes and read again, as on the wire, and every call gets a context
    that knows nothing of the one before, or, as at a SuperNode that stays, its state.

    Attributes
    ----------
    counted : int
        Bytes of arrays that were sent to clients.
    replies : list of Message
        What clients answered.
    lost : callable
        ``lost(message)`` tells whose answer never arrives.
    """

    def __init__(
        self,
        client: Any,
        nodes: Mapping[int, Mapping[str, Any]],
        config: Mapping[str, Any],
        *,
        stays: bool = False,
        lost: Callable[[Message], bool] = lambda message: False,
    ) -> None:
        self._client = client
        self._nodes = {node: dict(one) for node, one in nodes.items()}
        self._config = dict(config)
        self._numbers = itertools.count(1)
        self._answers: dict[str, Message] = {}
        self.counted = 0
        self.replies: list[Message] = []
        self.lost = lost
        self._states = {node: RecordDict() for node in nodes} if stays else {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        assert ttl is not None  # twelve hours otherwise, in which rounds are played again
        metadata = Metadata(
            run_id=1,
            message_id=f"m{next(self._numbers)}",
            src_node_id=1,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=0.0,
            ttl=1e12,
            message_type=message_type,
        )
        return Message(content, metadata=metadata)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        assert isinstance(messages, list)  # read twice in a deployment
        numbers = []
        for message in messages:
            self.counted += sum(r.count_bytes() for r in message.content.array_records.values())
            node = message.metadata.dst_node_id
            state = self._states.get(node, RecordDict())
            context = Context(1, node, self._nodes[node], state, dict(self._config))
            reply = self._client(copy.deepcopy(message), context)
            self.replies.append(copy.deepcopy(reply))
            if not self.lost(message):
                self._answers[message.metadata.message_id] = copy.deepcopy(reply)
            numbers.append(message.metadata.message_id)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(one) for one in list(message_ids) if one in self._answers]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError
