"""Ops as ``torch.library`` operators ``fastfpl::<op>``: what torch.compile puts into its graphs.

Opaque to the compiler: which face answers, threads and refusals are matters of the run, not of the
tracing. The gradient is another operator, ``fastfpl::<op>_backward``, which computes the op once
more with a graph; outside torch.compile nothing goes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastfpl.handles import alive
from fastfpl.ops.functional import (
    Recipe,
    batched_call,
    batched_pull,
    call,
    pull,
    refuse_second,
)

__all__ = ["define"]

#: ``operator(tensors, *statics)``
Operator = Callable[..., list[Tensor]]


def define(recipe: Recipe) -> Operator:
    """Register both operators of an op, with shapes, gradient and batches; return the first."""
    name = f"fastfpl::{recipe.name}"

    def run(tensors: Sequence[Tensor], *statics: Any) -> list[Tensor]:
        return call(recipe, tensors, statics)

    def gradients(
        by: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool], many: bool, *statics: Any
    ) -> list[Tensor]:
        return pull(recipe, by, tensors, statics, needs, many)

    forward: Any = torch.library.custom_op(
        name, run, mutates_args=(), schema=f"(Tensor[] tensors, {recipe.schema}) -> Tensor[]"
    )
    backward: Any = torch.library.custom_op(
        f"{name}_backward",
        gradients,
        mutates_args=(),
        schema=f"(Tensor by, Tensor[] tensors, bool[] needs, bool many, {recipe.schema}) "
        "-> Tensor[]",
    )

    @forward.register_fake  # type: ignore[untyped-decorator]
    def _(tensors: list[Tensor], *statics: Any) -> list[Tensor]:
        return recipe.fake(tensors, *statics)

    @backward.register_fake  # type: ignore[untyped-decorator]
    def _(
        by: Tensor, tensors: list[Tensor], needs: list[bool], many: bool, *statics: Any
    ) -> list[Tensor]:
        lead = by.shape[:1] if many else ()
        return [x.new_empty(*lead, *x.shape) for x, n in zip(tensors, needs, strict=True) if n]

    def remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, *ctx.statics = inputs
        ctx.alive = alive(ctx.statics)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*output[1:])

    def gradient(ctx: Any, by: list[Tensor]) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[0])
        found = iter(backward(by[0], list(ctx.saved_tensors), needs, False, *ctx.statics))
        return [next(found) if n else None for n in needs], *(None for _ in ctx.statics)

    def second(ctx: Any, *_: Any) -> NoReturn:
        refuse_second(recipe.name, recipe.instead)

    forward.register_autograd(gradient, setup_context=remember)
    backward.register_autograd(second)

    @forward.register_vmap  # type: ignore[untyped-decorator]
    def _(info: Any, dims: Any, tensors: list[Tensor], *statics: Any) -> tuple[list[Tensor], Any]:
        found = batched_call(
            lambda whole: forward(whole, *statics),
            *(recipe, info.batch_size, tensors, dims[0], statics),
        )
        return found, [0] * len(found)

    @backward.register_vmap  # type: ignore[untyped-decorator]
    def _(
        info: Any,
        dims: Any,
        by: Tensor,
        tensors: list[Tensor],
        needs: list[bool],
        many: bool,
        *statics: Any,
    ) -> tuple[list[Tensor], Any]:
        found = batched_pull(
            lambda by, whole, many: backward(by, whole, needs, many, *statics),
            *(recipe, info.batch_size, (by, dims[0]), tensors, dims[1], statics, needs, many),
        )
        return found, [0] * len(found)

    operator: Operator = forward
    return operator
