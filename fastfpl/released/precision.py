"""Contexts as released: half-precision parameters without a wider copy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfpl.methods import Batch, Method, State

__all__ = ["HalfContext"]


class HalfContext(Method):
    """Contexts, their gradients and their momentum are float16; a step that is too small is lost.

    Everything else is computed in the dtype that the clean method has, from the widened context.
    Laid before a method's class.
    """

    def server_init(self) -> State:
        """Hold contexts in half precision."""
        return {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in super().server_init().items()
        }

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start contexts in half precision; a gate stays as it is."""
        trained, fixed = super().start(  # type: ignore[safe-super]  # a method's class comes next
            self._widened(down), self._widened(own), training=training
        )
        return {
            name: tensor if name.startswith("gate.") else tensor.half()
            for name, tensor in trained.items()
        }, fixed

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode the widened contexts."""
        return super().text(self._widened(trained), fixed)

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Compute the loss from the widened contexts."""
        return super().loss(text, self._widened(trained), fixed, batch)

    def measured_loss(
        self, text: Tensor, trained: State, fixed: State, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Compute loss and residuals from the widened contexts."""
        return super().measured_loss(text, self._widened(trained), fixed, batch)

    def _widened(self, state: State) -> State:
        return {
            name: tensor.to(self.task.dtype) if tensor.dtype == torch.float16 else tensor
            for name, tensor in state.items()
        }
