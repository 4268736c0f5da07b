"""Prompts with FedAMP: every client is drawn to a cloud prompt mixed from those that are near."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastfpl.methods import pool
from fastfpl.methods.base import Batch, Method, State, Task, Upload
from fastfpl.methods.base import Options as _Options

__all__ = ["PromptFedAMP"]


class PromptFedAMP(Method):
    """The server mixes a cloud prompt u_i for each client; the client trains close to it.

    With A(x) = 1 - e^(-x / sigma), the attention-inducing function of a squared distance,

        u_i = (1 - alpha sum_j A'(|w_i - w_j|^2)) w_i + alpha sum_j A'(|w_i - w_j|^2) w_j,
        w_i <- argmin F_i(w) + (lambda / (2 alpha)) |w - u_i|^2,

    j running over the other clients, of whom the last uploaded prompts count; who has not uploaded
    sends no message, and its own w_i is the common initial prompt. The minimisation is the round's
    local epochs, from the client's own prompt on. A client is evaluated with its own prompt as it
    trained; one that never took part with the cloud prompt that it would receive.

    Source: Huang et al. 2021 (FedAMP, AAAI), arXiv 2007.03797, equations 3 to 7 and Algorithm 1.
    """

    name = "prompt-fedamp"
    summary = "personal prompts drawn to those of similar clients"
    sends = "its prompt"
    receives = "a cloud prompt of its own, mixed from those of all clients"
    personal = True
    grows = pool.GROWS

    class Options(_Options):
        """Options of prompts with FedAMP.

        By default alpha = sigma / N, with which no client weighs more than 1/N in another's cloud
        prompt and at least 1/N is left to its own, and lambda = alpha, a proximal term of
        |w - u_i|^2 / 2 however many clients there are.
        """

        sigma: float = Field(1.0, gt=0, description="squared distance at which attention fades")
        alpha: float | None = Field(
            None, gt=0, description="step of the message passing (sigma / clients)"
        )
        lam: float | None = Field(
            None, ge=0, description="lambda; the proximal term weighs lambda / (2 alpha) (alpha)"
        )
        start: Literal["own", "cloud"] = Field(
            "own", description="prompt from which the local epochs begin"
        )

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        o = self.options
        self._alpha = o.sigma / task.clients if o.alpha is None else o.alpha
        self._weight = 1.0 if o.lam is None else o.lam / self._alpha

    def server_init(self) -> State:
        """Hold the initial prompt and an empty pool of uploads."""
        ctx = self.task.initial_ctx()
        return {"ctx": ctx, **pool.empty(ctx)}

    def download(self, server: State, client: int, round_: int) -> State:
        """Pass the messages: send the client's cloud prompt."""
        held, row = server["pool"], pool.row_of(server, client)
        mine = server["ctx"] if row is None else held[row]
        sigma = self.options.sigma
        cloud = mine.double()
        # a client's message to itself is zero
        for part in pool.blocks(held):
            away = part - mine.double()
            weight = self._alpha / sigma * torch.exp(-away.square().sum(dim=(-2, -1)) / sigma)
            cloud = cloud + torch.einsum("j,jtw->tw", weight, away)
        return {"cloud": cloud.to(mine.dtype)}

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the own prompt, or the cloud prompt, and remember the latter."""
        cloud = down["cloud"]
        if not training:
            return {"ctx": own.get("ctx", cloud)}, {}
        begin = cloud
        if self.options.start == "own":
            begin = own.get("ctx", self.task.initial_ctx().expand_as(cloud))
        return {"ctx": begin}, {"cloud": cloud}

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Cross entropy plus the proximal term."""
        away = (trained["ctx"] - fixed["cloud"]).square().sum(dim=(-2, -1))
        return super().loss(text, trained, fixed, batch) + self._weight / 2 * away

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send the prompt, and keep it."""
        return {"ctx": trained["ctx"]}, {"ctx": trained["ctx"]}

    def merge(
        self, server: State, uploads: Mapping[int, Upload], images: Mapping[int, int], round_: int
    ) -> State:
        """Refresh the pool; nothing is averaged."""
        return {"ctx": server["ctx"], **pool.refreshed(server, uploads, {})}
