"""PromptFolio: text features mixed from a global and a local prompt with a fixed coefficient."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fastfpl.methods.base import Method, State
from fastfpl.methods.base import Options as _Options
from fastfpl.seeds import generator

__all__ = ["PromptFolio"]


class PromptFolio(Method):
    """Clients train a global and a local prompt; the global one is averaged, the local one stays.

    A class is represented by (1 - theta) g(P_global) + theta g(P_local), the mean of two unit
    vectors, which is not normalised again. With ``theta=0`` this is PromptFL, with 1 local CoOp.
    The local prompt starts from a draw of its own, common to all clients, on top of the words of
    ``ctx_init`` where there are any, since equal prompts would stay equal at theta = 1/2.

    Source: Pan et al. 2024 (NeurIPS, arXiv 2409.19610), the prompt portfolio.
    """

    name = "promptfolio"
    summary = "portfolio of a global and a local prompt"
    sends = "the global prompt"
    receives = "the global prompt"
    personal = True
    scores = "mixes two features a class, whose mean has another length in every class"

    class Options(_Options):
        """Options of PromptFolio."""

        theta: float = Field(0.2, ge=0, le=1, description="share of the local prompt's features")

    options: Options

    def _initial(self) -> Tensor:
        """Draw the local prompt that every client starts from: (T, W)."""
        words = self.task.initial_ctx()
        draw = torch.randn(
            words.shape, generator=generator(self.task.seed, "ctx", 1), dtype=torch.float32
        )
        own = (0.02 * draw).to(words)
        return own if self.task.ctx_init is None else words + own

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the global prompt and the client's own, at first from the common one."""
        common = self._initial().expand(len(down["ctx"]), -1, -1)
        return {"ctx": down["ctx"], "local": own.get("local", common)}, {}

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode both prompts together and mix their features: (U, C, D)."""
        both = self.task.encode(torch.stack((trained["ctx"], trained["local"]), dim=1))
        theta = self.options.theta
        return (1 - theta) * both[:, 0] + theta * both[:, 1]

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send the global prompt; keep the local one."""
        return {"ctx": trained["ctx"]}, {"local": trained["local"]}
