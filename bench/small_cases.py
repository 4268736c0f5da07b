"""Every kernel once, forward and backward, at small odd sizes: for compute-sanitizer.

``compute-sanitizer --tool memcheck python -m bench.small_cases``; with TRITON_INTERPRET=1 and
``--device cpu`` the same cases run in the interpreter. What they give is judged by the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import click
import torch
from torch import Tensor

import fastfpl
from fastfpl.ops import prefix_attention, transport_logits, transport_plan
from fastfpl.ops.gate import Gate, gate_experts
from fastfpl.ops.text import encode_text
from fastfpl.prompts import ClassPrompts
from tests.test_text import NAMES, WordsClip, random_tower

DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,)}
OPS = ("encode_text", "prefix_attention", "gate_experts", "transport_logits", "transport_plan")
Case = tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Name, function and leaves of each."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    tower = random_tower().to(device, dtype)
    layout = ClassPrompts(WordsClip(tower), NAMES[:3]).layout(4)
    for own in (False, True):
        ctx = normal(2, *((3,) if own else ()), 4, tower.width)
        yield (
            f"encode_text{', class-specific' * own}",
            lambda x, own=own: encode_text(tower, layout, x, class_specific=own),
            (ctx,),
        )
    starts = (0, *itertools.accumulate((3, 4, 1, 9)))
    for last in (False, True):
        options = {"heads": 2, "shared": 5, "starts": starts, "sos": normal(2, 64)}
        yield (
            f"prefix_attention{', last rows' * last}",
            lambda x, options=options, last=last: prefix_attention(x, last_only=last, **options),
            (normal(2, 5 + starts[-1], 3 * 64),),
        )
    tensors = Gate.init(24, 3, 10.0, draw).tensors()
    leaves = tuple(t.to(device, dtype) for t in tensors.values())

    def gate(image: Tensor, experts: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip(tensors, given, strict=True))
        return gate_experts(image, experts, Gate(**named, heads=3, scale=10.0))

    yield "gate_experts", gate, (normal(5, 24), normal(7, 3, 24), *leaves)
    for patches, prompts in ((35, 2), (33, 3)):
        pair = normal(2, patches, 40), normal(3, prompts, 40)
        unit = tuple(torch.nn.functional.normalize(x, dim=-1) for x in pair)
        yield (
            f"transport_logits of {patches} patches",
            lambda x, t: transport_logits(x, t, eps=1.0, mass=0.8, tol=1e-3),
            unit,
        )
    with torch.no_grad():
        yield (
            "transport_plan",
            lambda sim: transport_plan(sim, eps=1.0, mass=0.8, tol=1e-3),
            (0.2 * normal(3, 50, 2),),
        )


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), help="only these  [all]")
def main(device: str, ops: tuple[str, ...]) -> None:
    """Run every kernel once, forward and backward."""
    kind, count = torch.device(device).type, 0
    for dtype in DTYPES[kind]:
        for name, run, inputs in cases(device, dtype):
            if not name.startswith(ops or OPS):
                continue
            leaves = [x.detach().requires_grad_(name != "transport_plan") for x in inputs]
            with fastfpl.face("triton"):
                result = run(*leaves)
                if result.requires_grad:
                    torch.autograd.grad(result.float().square().sum(), leaves)
            if kind == "cuda":
                torch.cuda.synchronize()
            count += 1
            click.echo(f"{name}, {str(dtype)[6:]}")
    click.echo(f"{count} cases")


if __name__ == "__main__":
    main()
