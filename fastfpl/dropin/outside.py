"""Gates and transport in other people's code: seen, left, with the reason and the piece to call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

__all__ = ["outside"]


def outside(module: nn.Module) -> Iterator[str]:
    """Say what of a module fastfpl has a piece for that cannot be swapped in exactly."""
    if _gates(module):
        yield (
            "it is an attention over experts whose output is multiplied with the image features "
            "outside of it; call fastfpl.ops.gate_experts where both meet"
        )
    for name in _transports(type(module)):
        yield (
            f"its method {name} stops its iteration by a rule of its own, on the mean of a batch, "
            "so that no other solver gives the same plan; call fastfpl.ops.transport_logits"
        )


def _gates(module: nn.Module) -> bool:
    """Recognise four square linear layers of one width and a number of heads."""
    linears = [m for m in module.children() if isinstance(m, nn.Linear)]
    sizes = {size for m in linears for size in (m.in_features, m.out_features)}
    heads = any(
        isinstance(value, int) and "head" in name and not isinstance(value, bool)
        for name, value in vars(module).items()
    )
    return len(linears) == 4 and len(sizes) == 1 and heads


def _transports(cls: type) -> Iterator[str]:
    """Find methods that are Sinkhorn iterations by name and take a kernel and two marginals."""
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        low = name.lower()
        if ("sinkhorn" in low or "cot" in low.split("_")) and len(
            inspect.signature(method).parameters
        ) >= 4:
            yield name
