"""Local CoOp: every client trains its own context and sends nothing."""

from __future__ import annotations

from collections.abc import Mapping

from fastfpl.methods.base import Method, State, Upload

__all__ = ["LocalCoOp"]


class LocalCoOp(Method):
    """Context optimisation without communication; all clients start from the same context.

    A client goes on from its own context in every round, so R rounds of E local epochs are R·E
    epochs of CoOp with a fresh optimiser a round.
    Source: Zhou et al. 2022 (arXiv 2109.01134), equation 2.
    """

    name = "local"
    summary = "CoOp on every client alone"
    sends = "nothing"
    receives = "the context that all clients start from"
    personal = True

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the client's own context, at first from the common one."""
        return {"ctx": own.get("ctx", down["ctx"])}, {}

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send nothing, keep the context."""
        return {}, {"ctx": trained["ctx"]}

    def merge(
        self,
        server: State,
        uploads: Mapping[int, Upload],
        images: Mapping[int, int],
        round_: int,
    ) -> State:
        """Nothing to merge."""
        return server
