"""What a pass costs the host: its Python, torch's operators and the way to every launch.

    python -m bench.host_time [--classes 2] [--repeat 200]

A card computes while the host goes on; where the host is slower, its time is the pass'. It is
measured without a card: Triton's whole way to a launch is gone and nothing launched
(`tests/no_card.py`), torch's operators are the CPU's, on numbers so few (width 32) that they take
the time of a call. A card's operators and launches take a few microseconds more or less each: the
figures compare ways of one machine with each other, they are no times of a card.

Printed are medians, beside the literal tower on the same numbers and what is left when Triton finds
out of every launch anew what it asks (`fastfpl/kernels/launching.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is imported

import torch
from torch import Tensor

import fastfpl
from bench import bench_text
from fastfpl.ops import encode_text
from tests.no_card import no_card

WIDTH = 32


def measured(run: Callable[[], object], repeat: int) -> float:
    """Return the median time of a call in microseconds, after calls that load and compile."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def passes(classes: int, face: str) -> dict[str, Callable[[], object]]:
    """Return the text pass of one context, forward and both ways, of a tower of CLIP's depth."""
    with mock.patch.object(bench_text, "WIDTH", WIDTH):
        tower = bench_text.tower.__wrapped__()
    places = bench_text.layout(classes, 16, "cpu")
    ctx = torch.randn(16, WIDTH)
    leaf = ctx.clone().requires_grad_()

    def run(context: Tensor) -> Tensor:
        with fastfpl.face(face, "encode_text"):
            return encode_text(tower, places, context)

    def both() -> None:
        found = run(leaf)
        torch.autograd.grad(found, leaf, torch.ones_like(found))

    return {"forward": functools.partial(run, ctx), "both": both}


def _anew(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants)


def rows(classes: int, repeat: int) -> list[list[object]]:
    """Return a row of the table for each pass."""
    from fastfpl.kernels import attention, text

    found: list[list[object]] = []
    with no_card(notes=False) as card:
        literal = passes(classes, "reference")
        for name, run in passes(classes, "triton").items():
            kept = measured(run, repeat)
            before = card.count
            run()
            launches = card.count - before
            with contextlib.ExitStack() as stack:
                for module in (attention, text):
                    stack.enter_context(mock.patch.object(module, "launched", _anew))
                anew = measured(run, repeat)
            figures = (kept, anew, measured(literal[name], repeat))
            found.append([name, launches, *(f"{figure / 1000:.2f}" for figure in figures)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=400)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["pass", "Triton launches", "ms", "ms, every launch anew", "ms, literal tower"]
    for row in (heads, ["---"] * len(heads), *rows(asked.classes, asked.repeat)):
        sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")


if __name__ == "__main__":
    main()
