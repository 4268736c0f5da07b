"""PromptFL with FedPer's split: the first context vectors are shared, the last ones personal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.methods.base import Method, State, Task
from fastfpl.methods.base import Options as _Options

__all__ = ["PromptFedPer"]


class PromptFedPer(Method):
    """Clients train the whole context; only its first vectors are averaged.

    FedPer shares a network's base layers and keeps the layers nearest to the answer. Of a context
    the last vectors are those: with the class name at the end they are the nearest to it. A client
    starts and is evaluated with the new shared vectors and its own last ones; before its first
    participation those are the common initial ones. With ``personal=0`` this is PromptFL, with all
    vectors personal local CoOp.

    Source: Arivazhagan et al. 2019 (FedPer), arXiv 1912.00818, Algorithms 1 and 2.
    """

    name = "prompt-fedper"
    summary = "PromptFL, the last context vectors stay with the client"
    sends = "the first context vectors"
    receives = "the first context vectors"
    personal = True

    class Options(_Options):
        """Options of PromptFL with FedPer."""

        personal: int | None = Field(
            None, ge=0, description="context vectors, the last ones, that stay (half of them)"
        )

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        chosen = self.options.personal
        self._own = task.n_ctx // 2 if chosen is None else chosen
        if self._own > task.n_ctx:
            raise InputError(
                f"fastfpl.run: personal must be at most n_ctx={task.n_ctx}; got {self._own}"
            )
        self._shared = task.n_ctx - self._own

    def server_init(self) -> State:
        """Hold the shared vectors."""
        return {"ctx": self.task.initial_ctx()[: self._shared].clone()}

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the shared vectors and the client's own, at first from the common ones."""
        common = self.task.initial_ctx()[self._shared :]
        mine = own.get("personal", common.expand(len(down["ctx"]), -1, -1))
        return {"ctx": down["ctx"], "personal": mine}, {}

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode shared and personal vectors as one context."""
        return self.task.encode(self.one_context(trained, fixed))

    def one_context(self, trained: State, fixed: State) -> Tensor:
        """Put the personal vectors behind the shared ones."""
        return torch.cat((trained["ctx"], trained["personal"]), dim=-2)

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send the shared vectors; keep the personal ones."""
        return {"ctx": trained["ctx"]}, {"personal": trained["personal"]}
