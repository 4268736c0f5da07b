"""PromptFL: federated averaging of one context shared by all classes and clients."""

from __future__ import annotations

from fastfpl.methods.base import Method, State

__all__ = ["PromptFL"]


class PromptFL(Method):
    """Clients train the global context, the server averages it by training images.

    Source: Guo et al. 2023 (arXiv 2208.11625), Algorithm 1. Only the context is averaged.
    """

    name = "promptfl"
    summary = "one global prompt, federated averaging"

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the global context."""
        return {"ctx": down["ctx"]}, {}
