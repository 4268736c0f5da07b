"""An op under torch.func: derivatives of first order, backward, and batches of calls.

An op whose gradient is written by hand is a step that no transform can look into. Here it is one
Function with rules for all of them, for any op: its forward is the op itself, its backward the op
once more with a graph, and a batch is a leading dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from fastfpl.errors import NotSupported
from fastfpl.handles import alive
from fastfpl.ops.faces import in_transform

__all__ = [
    "Recipe",
    "above_autograd",
    "batched_call",
    "batched_pull",
    "call",
    "check_graph",
    "in_front",
    "once",
    "outside_transforms",
    "pull",
    "refuse_second",
    "spread",
    "transformed_call",
]

#: Dimension of every tensor that a batch lies along; None where it has none.
Dims = Sequence[int | None]
Statics = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Recipe:
    """One op as operators and transforms know it.

    Attributes
    ----------
    name : str
        Of the op.
    schema : str
        Of its arguments that are no tensors, e.g. ``"int heads, str face"``.
    run : callable
        ``run(tensors, *statics)`` is the op on whole tensors: a list of results, of which the first
        is differentiable.
    fake : callable
        ``fake(tensors, *statics)`` gives results of the right shapes and dtypes, of no value.
    batched : callable
        ``batched(size, tensors, dims, *statics)`` gives every tensor the batch as its leading
        dimension, so that ``run`` answers with results that have it too; None where the op has no
        room for it, and calls must follow one another.
    instead : str
        What does take derivatives of second order.
    """

    name: str
    schema: str
    run: Callable[..., list[Tensor]]
    fake: Callable[..., list[Tensor]]
    batched: Callable[..., list[Tensor] | None]
    instead: str


@contextmanager
def above_autograd() -> Iterator[None]:
    """Let autograd and autocast see what is computed inside an operator, below which they lie."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in ("AutogradFunctionality", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(keys, key), False))
        yield


def _apart(results: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give results memory of their own, without gaps: what a graph is told of them."""
    seen = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
    own = []
    for x in (one.detach() for one in results):
        whole = x.resolve_neg().contiguous()
        place = whole.untyped_storage().data_ptr()
        own.append(whole.clone() if place in seen and whole.numel() else whole)
        seen.add(own[-1].untyped_storage().data_ptr())
    return own


def call(recipe: Recipe, tensors: Sequence[Tensor], statics: Statics) -> list[Tensor]:
    """Run the op on whole tensors, without a graph."""
    with above_autograd(), torch.no_grad():
        return _apart(recipe.run([x.detach() for x in tensors], *statics), tensors)


def pull(
    recipe: Recipe,
    by: Tensor,
    tensors: Sequence[Tensor],
    statics: Statics,
    needs: Sequence[bool],
    many: bool,
) -> list[Tensor]:
    """Return the gradients of the tensors that need one, for the gradient of the first result.

    With ``many``, ``by`` holds several in front, and so does every gradient: the op is computed
    once, and its backward pass for each.
    """
    with above_autograd(), torch.enable_grad():
        leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, needs, strict=True)]
        wanted = [x for x in leaves if x.requires_grad]
        result = recipe.run(leaves, *statics)[0]
        if not result.requires_grad:  # nothing was computed
            lead = by.shape[:1] if many else ()
            return [x.new_zeros(*lead, *x.shape) for x in wanted]
        found = [
            torch.autograd.grad(result, wanted, one, retain_graph=many, allow_unused=True)
            for one in (by.detach().unbind() if many else (by.detach(),))
        ]
        filled = [
            [
                torch.zeros_like(x) if g is None else g
                for g, x in zip(gradients, wanted, strict=True)
            ]
            for gradients in found
        ]
    if many:
        return [torch.stack(each) for each in zip(*filled, strict=True)] or [
            x.new_zeros(0, *x.shape) for x in wanted
        ]
    return _apart(filled[0], (by, *tensors))


def refuse_second(op: str, instead: str) -> NoReturn:
    """Refuse the derivative of a gradient."""
    raise NotSupported(
        f"fastfpl.ops.{op}: derivatives must be of first order; got one of a gradient; "
        f"{instead} takes it"
    )


def once(
    op: str, instead: str, gradients: tuple[Tensor | None, ...], *of: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return gradients that depend on ``of``, whose own derivatives are refused, not taken for 0.

    For the backward pass of a Function: what it computed must know nothing of a graph.
    """
    if not torch.is_grad_enabled():
        return gradients
    found: tuple[Tensor | None, ...] = _Once.apply(op, instead, len(gradients), *gradients, *of)
    return found


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, instead: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.op, ctx.instead = op, instead
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse_second(ctx.op, ctx.instead)


def outside_transforms() -> AbstractContextManager[object]:
    """Make tensors inside the block that belong to no transform, and may be kept beyond it."""
    if not in_transform():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    clear: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return clear


def check_graph(op: str) -> bool:
    """Refuse, while torch.compile traces, what an operator in a graph has no rule for.

    torch would take the tangents of forward mode for 0.
    """
    names = {TransformType.Jvp: "forward mode", TransformType.Grad: "torch.func.grad or vjp"}
    for level in get_interpreter_stack() or ():
        if level.key() in names:
            raise NotSupported(
                f"fastfpl.ops.{op}: transforms inside torch.compile must be torch.func.vmap; got "
                f"{names[level.key()]}; call backward(), or use torch.func outside"
            )
    return True


# run when a graph is traced: what torch.compiler.assume_constant_result does, which loads seconds
check_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- batches --------------------------------------------------------------------------------------


def in_front(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    """Put the batch of a tensor in front; repeat one that has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def spread(tensor: Tensor, count: int) -> Tensor:
    """Put so many dimensions of one behind the batch."""
    return tensor.reshape(len(tensor), *(1,) * count, *tensor.shape[1:])


def _slices(size: int, tensors: Sequence[Tensor], dims: Dims) -> Iterator[list[Tensor]]:
    for i in range(size):
        yield [x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True)]


def batched_call(
    apply: Callable[..., Sequence[Tensor]],
    recipe: Recipe,
    size: int,
    tensors: Sequence[Tensor],
    dims: Dims,
    statics: Statics,
) -> list[Tensor]:
    """Run a batch by ``apply(tensors)``: results with the batch in front."""
    whole = recipe.batched(size, list(tensors), list(dims), *statics)
    if whole is not None:
        return list(apply(whole))
    rows = [apply(one) for one in _slices(size, tensors, dims)]
    return [torch.stack(list(column)) for column in zip(*rows, strict=True)]


def batched_pull(
    apply: Callable[..., Sequence[Tensor]],
    recipe: Recipe,
    size: int,
    by: tuple[Tensor, int | None],
    tensors: Sequence[Tensor],
    dims: Dims,
    statics: Statics,
    needs: Sequence[bool],
    many: bool,
) -> list[Tensor]:
    """Pull a batch back by ``apply(by, tensors, many)``: gradients with the batch in front."""
    if not many and all(d is None for d in dims):
        return list(apply(in_front(size, *by), list(tensors), True))
    whole = None if many else recipe.batched(size, list(tensors), list(dims), *statics)
    if whole is None:
        rows = [
            apply(one[0], one[1:], many) for one in _slices(size, (by[0], *tensors), (by[1], *dims))
        ]
        return [torch.stack(list(column)) for column in zip(*rows, strict=True)]
    found = apply(in_front(size, *by), whole, False)
    # a tensor that was repeated for its place in the batch has the sum over the repeats
    plain = [x.dim() - (d is not None) for x, d, n in zip(tensors, dims, needs, strict=True) if n]
    shapes = [
        x.shape if d is None else x.movedim(d, 0).shape[1:]
        for x, d, n in zip(tensors, dims, needs, strict=True)
        if n
    ]
    reduced = []
    for gradient, own, shape in zip(found, plain, shapes, strict=True):
        extra = tuple(range(1, gradient.dim() - own))
        one = gradient.sum(extra) if extra else gradient
        reduced.append(one.sum_to_size(size, *shape))
    return reduced


# --- torch.func -----------------------------------------------------------------------------------


def transformed_call(recipe: Recipe, tensors: Sequence[Tensor], *statics: Any) -> list[Tensor]:
    """Run the op where a transform of torch.func sees its tensors."""
    return list(_Call.apply(recipe, statics, *tensors))


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(recipe: Recipe, statics: Statics, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(recipe, tensors, statics))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, ctx.statics, *tensors = inputs
        ctx.alive = alive(ctx.statics)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, by: Tensor, *_: Tensor) -> tuple[Any, ...]:
        needs = tuple(ctx.needs_input_grad[2:])
        found = iter(_Pull.apply(ctx.recipe, ctx.statics, needs, False, by, *ctx.saved_tensors))
        return None, None, *(next(found) if n else None for n in needs)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], recipe: Recipe, statics: Statics, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = batched_call(
            lambda whole: _Call.apply(recipe, statics, *whole),
            *(recipe, info.batch_size, tensors, dims[2:], statics),
        )
        return tuple(found), (0,) * len(found)


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(
        recipe: Recipe,
        statics: Statics,
        needs: tuple[bool, ...],
        many: bool,
        by: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(pull(recipe, by, tensors, statics, needs, many))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse_second(ctx.recipe.name, ctx.recipe.instead)

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[Any, ...],
        recipe: Recipe,
        statics: Statics,
        needs: tuple[bool, ...],
        many: bool,
        by: Tensor,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = batched_pull(
            lambda by, whole, many: _Pull.apply(recipe, statics, needs, many, by, *whole),
            *(recipe, info.batch_size, (by, dims[4]), tensors, dims[5:], statics, needs, many),
        )
        return tuple(found), (0,) * len(found)
