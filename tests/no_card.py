"""Triton's whole way to a launch, without a card: kernels are compiled for one, and not run.

`no_card` puts a driver under Triton that compiles for a GPU, asks tensors for their addresses,
wherever they are, and hands every launch to a list instead of a card. What the way costs, and what
arrives at its end, can be seen with it. Triton must not interpret in the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["Card", "no_card"]


@dataclass
class Card:
    """A card that is not there.

    Attributes
    ----------
    launches : list of tuple
        Kernel's number, grid and arguments of each launch; tensors by address.
    count : int
        Launches.
    notes : bool
        Whether launches are listed, or counted only.
    """

    capability: int = 90
    notes: bool = True
    count: int = 0
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    _loaded: int = 0

    # what Triton asks of a driver's ``utils``
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self._loaded += 1
        return self._loaded, f"{name} {self._loaded}", 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def launch(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        """Take a launch: ``rest`` is metadata of kernel and launch, two hooks, and arguments."""
        self.count += 1
        if self.notes:
            given = [a.data_ptr() if isinstance(a, Tensor) else a for a in rest[4:]]
            self.launches.append((function, (x, y, z), stream, *given))


class _Driver:
    def __init__(self, card: Card) -> None:
        self.utils = card

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.utils.launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.utils.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def no_card(capability: int = 90, *, notes: bool = True) -> Iterator[Card]:
    """Launch nothing inside the block, on a card of a compute capability; ops take CPU tensors."""
    import triton
    from triton.runtime import driver

    from fastfpl.kernels import launching
    from fastfpl.ops import launch

    assert not triton.knobs.runtime.interpret, "set TRITON_INTERPRET=0 before Triton is imported"
    card, before = Card(capability, notes), driver._active
    driver.set_active(_Driver(card))
    with (
        # who interprets takes tensors on the CPU
        mock.patch.object(launch, "interpreted", return_value=True),
        # a card's memory begins at multiples of 512 bytes, torch's on a CPU of 64
        mock.patch.object(launching, "_ALIGNED", 63),
    ):
        try:
            yield card
        finally:
            driver.set_active(before)
