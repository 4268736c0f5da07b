"""What a pass asks of a card, counted without one: launches, products, bytes.

`counted` plays a pass whose Triton kernels are noted and not run, and says:

- ``triton``: launches of the library's own kernels;
- ``products``: launches of torch's matrix products, which are the vendor's on a card;
- ``torch``: launches of torch's other operators that are no views and no bare allocations;
- ``megabytes``: what all of these read and write if each touches each of its tensors once.

`multiplied` plays one whose kernels are interpreted, and says how many multiplications and
additions its matrix products did, in kernels and in torch; a case knows how many the mathematics
needs. What a kernel pads its blocks with, or forms a second time, shows there.

``counts.json`` holds the figures of `CASES`. ``python -m tests.counts --write`` writes them anew,
``python -m tests.counts`` prints the table of docs/performance.md. A figure that grows is a
regression, and test_counts.py says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.hostile import are_bfloat16

__all__ = ["CASES", "FIGURES", "Case", "Counts", "counted", "figures", "multiplied", "table"]

FIGURES = Path(__file__).parent / "counts.json"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot"}
#: Operators that return new memory and start nothing on a card.
_BARE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "promote_types",
}


@dataclass
class Counts:
    """Of one pass."""

    triton: int = 0
    products: int = 0
    torch: int = 0
    bytes: int = 0
    operations: int = 0  # of torch's products


class _Operators(TorchDispatchMode):
    """Counts torch's operators by what they start on a card."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        made = _tensors(found)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in _arguments(func))
        # a view shares its argument's memory and writes nothing
        is_view = bool(made) and all(t.untyped_storage().data_ptr() in given for t in made)
        if name in _BARE or (is_view and not writes):
            return found
        if name in _PRODUCTS:
            self._counts.products += 1
            left = args[0 if name in ("mm", "bmm", "mv", "dot") else 1]
            self._counts.operations += 2 * made[0].numel() * left.shape[-1]
        else:
            self._counts.torch += 1
        self._counts.bytes += _bytes(_tensors((args, kwargs)) + made)
        return found


def _arguments(func: Any) -> list[Any]:
    return list(func._schema.arguments)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors, each place once."""
    places = {(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}
    return sum(places.values())


@contextlib.contextmanager
def _noted(counts: Counts) -> Iterator[None]:
    """Note launches of Triton's kernels, and run none."""
    from triton.runtime.interpreter import InterpretedFunction

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        counts.triton += 1
        counts.bytes += _bytes(_tensors((args, kwargs)))

    with mock.patch.object(InterpretedFunction, "run", keep):
        yield


def counted(run: Callable[[], object]) -> Counts:
    """Count one pass; what is cached of the first one is not counted."""
    for counts in (Counts(), Counts()):
        with _noted(counts), _Operators(counts):
            run()
    return counts


def multiplied(run: Callable[[], object]) -> int:
    """Count what the matrix products of a pass do, in its kernels and in torch."""
    from triton.runtime.interpreter import InterpreterBuilder

    sixths = 0
    plain = InterpreterBuilder.create_dot

    def dot(self: Any, x: Any, y: Any, total: Any, precision: Any, *rest: Any) -> Any:
        nonlocal sixths
        whole = 2 * math.prod(x.data.shape) * y.data.shape[-1]
        # of float32 in parts of bfloat16 six products are the one that is asked for
        split = x.data.dtype == np.float32 and precision.name == "TF32"
        split = split and are_bfloat16(x.data) and are_bfloat16(y.data)
        sixths += whole if split else 6 * whole
        return plain(self, x, y, total, precision, *rest)

    counts = Counts()
    with mock.patch.object(InterpreterBuilder, "create_dot", dot), _Operators(counts):
        run()
    return sixths // 6 + counts.operations


# --- the passes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One pass.

    Attributes
    ----------
    size : str
        In words.
    whole : callable
        Makes the pass at its size.
    small : callable, optional
        Makes one that is small enough to be interpreted.
    needed : int
        Multiplications and additions that the products of the small one need.
    """

    size: str
    whole: Callable[[], Callable[[], object]]
    small: Callable[[], Callable[[], object]] | None = None
    needed: int = 0


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _pass(call: Callable[..., Tensor], leaves: list[Tensor], back: bool) -> Callable[[], object]:
    """Return the pass of an op by its Triton face, forward or forward and backward."""
    import fastfpl

    for leaf in leaves:
        leaf.requires_grad_(back)

    def run() -> None:
        with fastfpl.face("triton"):
            found = call()
            if back:
                torch.autograd.grad(found, leaves, torch.ones_like(found))

    return run


def _text(classes: int, count: int, back: bool) -> Callable[[], object]:
    from bench.bench_text import contexts, layout, tower
    from fastfpl.ops import encode_text

    ctx, places = contexts(count).cpu(), layout(classes, 16, "cpu")
    return _pass(lambda: encode_text(tower(), places, ctx), [ctx], back)


def _gate(u: int, b: int, c: int, e: int, back: bool) -> Callable[[], object]:
    from fastfpl.ops import gate_experts
    from fastfpl.reference.gate import Gate

    gate = Gate.init(512, 8, 10.0, torch.Generator().manual_seed(0))
    many = {name: t.expand(u, *t.shape).clone() for name, t in gate.tensors().items()}
    image, experts = _drawn(u, b, 512), _drawn(u, c, e, 512)
    leaves = list(many.values())
    return _pass(lambda: gate_experts(image, experts, replace(gate, **many)), leaves, back)


def _transport(b: int, c: int, back: bool) -> Callable[[], object]:
    from fastfpl.ops import transport_logits

    unit = torch.nn.functional.normalize
    patches, prompts = unit(_drawn(1, b, 196, 512), dim=-1), unit(_drawn(1, c, 2, 512), dim=-1)
    # kernels that are not run leave numbers that say nothing of convergence
    return _pass(lambda: transport_logits(patches, prompts, info=True)[0], [prompts], back)


def _attention(classes: int, width: int, back: bool) -> Callable[[], object]:
    from fastfpl.ops import prefix_attention

    starts = tuple(range(0, 3 * classes + 1, 3))
    qkv, sos = _drawn(1, 16 + 3 * classes, 3 * width), _drawn(2, width)
    how = {"heads": width // 64, "shared": 16, "starts": starts, "sos": sos}
    return _pass(lambda: prefix_attention(qkv, **how), [qkv], back)


def _pairs(classes: int) -> int:
    """Rows and keys of 16 shared rows behind SOS, and of three rows of each class behind them."""
    return sum(row + 2 for row in range(16)) + classes * sum(18 + row for row in range(3))


def _gate_needs(b: int, c: int, e: int, back: bool) -> int:
    """Projections of queries, outputs, keys and values, and scores and values of every head.

    Back, each is the product of a gradient once more, as images and experts are frozen; scores and
    values have two.
    """
    projections = 4 * 512 * 512 * (b + c * e)
    return (projections + 4 * b * c * e * 512) + back * (projections + 8 * b * c * e * 512)


CASES = {
    "text": Case("C=100, T=16, one context", partial(_text, 100, 1, False)),
    "text, both": Case("C=100, T=16, one context", partial(_text, 100, 1, True)),
    "attention": Case(
        "C=100 of 3 tokens, T=16, D=512",
        partial(_attention, 100, 512, False),
        partial(_attention, 100, 128, False),
        4 * 128 * _pairs(100),
    ),
    "attention, both": Case(
        "C=100 of 3 tokens, T=16, D=512",
        partial(_attention, 100, 512, True),
        partial(_attention, 100, 128, True),
        12 * 128 * _pairs(100),
    ),
    "gate": Case(
        "U=10, B=32, C=100, E=10, D=512",
        partial(_gate, 10, 32, 100, 10, False),
        partial(_gate, 1, 32, 16, 10, False),
        _gate_needs(32, 16, 10, False),
    ),
    "gate, both": Case(
        "U=10, B=32, C=100, E=10, D=512",
        partial(_gate, 10, 32, 100, 10, True),
        partial(_gate, 1, 32, 16, 10, True),
        _gate_needs(32, 16, 10, True),
    ),
    "transport": Case(
        "B=32, C=100, P=196, N=2, D=512",
        partial(_transport, 32, 100, False),
        partial(_transport, 2, 16, False),
        2 * 2 * 16 * 196 * 2 * 512,
    ),
    "transport, both": Case(
        "B=32, C=100, P=196, N=2, D=512",
        partial(_transport, 32, 100, True),
        partial(_transport, 2, 16, True),
        2 * (2 * 2 * 16 * 196 * 2 * 512),
    ),
}


def figures(name: str) -> dict[str, float]:
    """Count a case."""
    case = CASES[name]
    found = counted(case.whole())
    row: dict[str, float] = {
        "triton": found.triton,
        "products": found.products,
        "torch": found.torch,
        "megabytes": round(found.bytes / 1e6, 1),
    }
    if case.small is not None:
        row["work"] = round(multiplied(case.small()) / case.needed, 2)
    return row


def table() -> str:
    """Return the committed figures in Markdown."""
    lines = [
        "| pass | size | Triton launches | products | other launches | MB moved | work / needed |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for name, row in json.loads(FIGURES.read_text()).items():
        cells = [name, CASES[name].size, *(row[k] for k in ("triton", "products", "torch"))]
        cells += [row["megabytes"], row.get("work", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.counts")
    parser.add_argument("--write", action="store_true", help="write the figures anew")
    chosen = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    if chosen.write:
        rows = {name: figures(name) for name in CASES}
        lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in rows.items())
        FIGURES.write_text(f"{{\n{lines}\n}}\n")
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    _main()
