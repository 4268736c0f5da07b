"""Launchers on odd sizes and places, each launch made again by Triton alone: python -m, no card.

Prints how many launches there were, how many of them came back, and which were another's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is imported

import torch
from torch import Tensor

from tests.no_card import Card, no_card


def drawn(*shape: int, dtype: torch.dtype, off: int = 0) -> Tensor:
    """Return numbers that begin ``off`` elements behind where the allocator puts them."""
    flat = torch.ones(int(torch.tensor(shape).prod()) + off, dtype=dtype)
    return flat[off:].view(shape)


@contextlib.contextmanager
def compared(card: Card) -> Iterator[dict[str, Any]]:
    """Make every launch twice, as the library makes it and as Triton makes it."""
    from fastfpl.kernels import attention, gate, launching, text, transport_logits, transport_plan

    seen: dict[str, Any] = {"launches": 0, "back": 0, "wrong": [], "kernels": []}

    def both(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        known = len(launching._known)
        launching.launched(kernel, programs, *arguments, **constants)
        seen["back"] += len(launching._known) == known
        kernel[(programs,)](*arguments, **constants)
        ours, tritons = card.launches[-2:]
        seen["launches"] += 1
        if kernel.__name__ not in seen["kernels"]:
            seen["kernels"].append(kernel.__name__)
        if ours != tritons:
            seen["wrong"].append([kernel.__name__, repr(ours), repr(tritons)])

    with contextlib.ExitStack() as stack:
        for module in (attention, gate, text, transport_logits, transport_plan):
            stack.enter_context(mock.patch.object(module, "launched", both))
        yield seen


def rows() -> None:
    """Rows: 1 and multiples of 16, for which Triton compiles by themselves, and other counts."""
    from fastfpl.kernels import text

    for count, off in itertools.product((1, 7, 16, 16, 17, 7), (0, 1, 0)):
        x = drawn(count, 32, dtype=torch.float16, off=off)
        weight = drawn(32, dtype=torch.float16)
        _, _, mean, rstd = text.norm_fwd(x, weight, weight, 1e-5, None if off else weight)
        text.norm_bwd(x, x, weight, mean, rstd, torch.empty_like(x))
    for kind in ("gelu", "quick_gelu", "gelu"):
        text.activation_bwd(x, text.activation_fwd(x, weight, kind), weight, kind)
    text.unit_bwd(x, *text.unit_fwd(x))


def attention() -> None:
    """With a bias and without, with a prefix and without, of last rows and of all."""
    from fastfpl.kernels.attention import prefix_attention_bwd, prefix_attention_fwd

    cases = itertools.product((0, 5), (None, 3), (False, True), (0, 1, 0))
    for shared, biased, last, off in cases:
        starts = (0, 3, 5, 9)
        qkv = drawn(2, shared + 9, 96, dtype=torch.float16, off=off)
        bias = None if biased is None else drawn(96, dtype=torch.float16, off=biased)
        given = (qkv, bias, shared, starts, 2, None, last)
        mixed = prefix_attention_fwd(*given)
        prefix_attention_bwd(mixed, *given)
    # so many queries that the prefix' gradient is summed in parts
    qkv = drawn(1, 5 + 90, 96, dtype=torch.float16)
    given = (qkv, None, 5, tuple(range(0, 91, 3)), 2, None, False)
    prefix_attention_bwd(prefix_attention_fwd(*given), *given)


def gate() -> None:
    from fastfpl.kernels.gate import gate_bwd, gate_fwd

    for images, off in itertools.product((3, 16, 3), (0, 1)):
        qz = drawn(1, images, 2, 2, 16, dtype=torch.float16, off=off)
        kv = drawn(1, 5, 3, 2, 2, 16, dtype=torch.float16)
        logits, stats = gate_fwd(qz, kv, 0.25, True)
        gate_bwd(logits, qz, kv, stats, 0.25, True, True)


def transport() -> None:
    from fastfpl.kernels.transport_logits import transport_logits_fwd
    from fastfpl.kernels.transport_plan import transport_plan_fwd

    for images, off in itertools.product((1, 3, 1), (0, 1)):
        patches = drawn(1, images, 9, 32, dtype=torch.float16, off=off)
        prompts = drawn(1, 2, 2, 32, dtype=torch.float16)
        for mass in (1.0, 0.5):
            transport_logits_fwd(
                patches, prompts, 0.1, mass, mass == 1.0, 10, 1e-3, measure=True, keep=False
            )
            sim = drawn(images, 9, 2, dtype=torch.float32, off=off)
            transport_plan_fwd(sim, 0.1, mass, mass == 1.0, 10, 1e-3)


PLAYS: dict[str, Callable[[], None]] = {
    "rows": rows,
    "attention": attention,
    "gate": gate,
    "transport": transport,
}

if __name__ == "__main__":
    with no_card() as made, compared(made) as found:
        for asked in sys.argv[1:] * 2:
            PLAYS[asked]()
    sys.stdout.write(json.dumps(found))
