"""What both ops of the transport refuse, in one sentence each, and what they say of a plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
)

from fastfpl.errors import InputError, KindError, NotConverged, NotSupported

__all__ = [
    "INSTEAD",
    "LOGITS",
    "PLAN",
    "Refuse",
    "check_options",
    "check_products",
    "check_similarities",
    "check_tensor",
    "entropy_of",
    "refuse_nested",
    "refuse_product",
    "refuse_similarity",
    "refuse_unconverged",
    "refuse_vmap",
    "vmapped",
    "wide_of",
]

PLAN = "fastfpl.ops.transport_plan"
LOGITS = "fastfpl.ops.transport_logits"
#: What takes derivatives of second order of the logits.
INSTEAD = "face('reference')"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Names the place of a value in similarities that is not finite after division by eps.
Refuse = Callable[[Tensor, float, int], NoReturn]


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """Refuse what is no tensor of floats."""
    if not isinstance(tensor, Tensor):
        raise KindError(f"{op}: {name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise KindError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}"
        )


def check_options(op: str, eps: float, mass: float, max_iter: int, tol: float) -> None:
    """Refuse options out of their range."""
    if not 0 < eps < math.inf:
        raise InputError(f"{op}: eps must be positive and finite; got {eps!r}")
    if not 0 < mass <= 1:
        raise InputError(f"{op}: mass must lie in (0, 1]; got {mass!r}")
    if not 0 < tol < math.inf:
        raise InputError(f"{op}: tol must be positive and finite; got {tol!r}")
    if max_iter < 1:
        raise InputError(f"{op}: max_iter must be at least 1; got {max_iter!r}")


def vmapped(*tensors: Tensor) -> bool:
    """Say whether a tensor is what torch.func.vmap makes of it, whose values cannot be read."""
    for tensor in tensors:
        inner = tensor
        while is_functorch_wrapped_tensor(inner):
            if is_batchedtensor(inner):
                return True
            inner = get_unwrapped(inner)
    return False


def refuse_vmap(op: str, *tensors: Tensor) -> None:
    """Refuse slices of torch.func.vmap under derivatives that would need to look into them."""
    if not torch.compiler.is_compiling() and vmapped(*tensors):
        raise NotSupported(
            f"{op}: tensors must be whole under forward mode and derivatives of gradients; got a "
            "slice that torch.func.vmap makes; give all of them as a leading dimension"
        )


def refuse_nested(op: str) -> None:
    """Refuse forward mode inside forward mode: torch takes the second one of a Function for 0."""
    if torch.compiler.is_compiling():
        return
    levels = [level.key() for level in get_interpreter_stack() or ()].count(TransformType.Jvp)
    if levels > 1:
        raise NotSupported(
            f"{op}: forward mode must not lie within forward mode; got {levels} levels of it; "
            "torch.func.hessian gives second derivatives"
        )


def refuse_unconverged(op: str, iterations: Tensor, residual: Tensor, tol: float) -> NoReturn:
    """Say how problems ended of which some are above ``tol`` or NaN."""
    if bool(residual.isnan().any()):
        raise InputError(f"{op}: similarity / eps must be finite; got a residual of nan")
    over = int((residual > tol).sum())
    raise NotConverged(
        f"{op}: {over} of {residual.numel()} problems ended above tol={tol:g} after at most "
        f"{int(iterations.max())} iterations; the largest residual is {float(residual.max()):.1e}; "
        "raise max_iter, eps or tol"
    )


def check_similarities(sim: Tensor, eps: float, refuse: Refuse) -> None:
    """Refuse the first similarity that is not finite after division by eps."""
    good = (sim * (4 / eps)).isfinite()
    if not bool(good.all()):
        refuse(sim, eps, int((~good).flatten().nonzero()[0]))


def refuse_similarity(sim: Tensor, eps: float, first: int) -> NoReturn:
    """Name one value that makes a plan meaningless, by its place in ``sim``."""
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), sim.shape))
    raise InputError(
        f"{PLAN}: sim / eps must be finite; got {float(sim[place])!r} at {place} with eps={eps:g}"
    )


def refuse_product(
    lead: tuple[int, ...], corner: tuple[int, int, int], sim: Tensor, eps: float, first: int
) -> NoReturn:
    """Name the patch and the prompt of such a value in a piece (u, b, P, c, N) at ``corner``."""
    u, b, m, c, n = (int(i) for i in torch.unravel_index(torch.tensor(first), sim.shape))
    value = float(sim[u, b, m, c, n])
    client = tuple(int(i) for i in torch.unravel_index(torch.tensor(u + corner[0]), lead or (1,)))
    client = client if lead else ()
    raise InputError(
        f"{LOGITS}: similarity / eps must be finite; got {value!r} of patch "
        f"{(*client, b + corner[1], m)} and prompt {(*client, c + corner[2], n)} with eps={eps:g}"
    )


def check_products(patches: Tensor, prompts: Tensor, residual: Tensor, eps: float) -> None:
    """Form the similarities of the first problem whose residual is NaN, and refuse them."""
    lead, bad = tuple(patches.shape[:-3]), residual.isnan().reshape(-1, *residual.shape[-2:])
    if bool(bad.any()):
        u, b, c = (int(i) for i in bad.nonzero()[0])
        wide = wide_of(patches, prompts)
        x = patches.detach().reshape(-1, *patches.shape[-3:])[u, b].to(wide)
        t = prompts.detach().reshape(-1, *prompts.shape[-3:])[u, c].to(wide)
        refuse = functools.partial(refuse_product, lead, (u, b, c))
        check_similarities((x @ t.mT)[None, None, :, None], eps, refuse)


def wide_of(*tensors: Tensor) -> torch.dtype:
    """Say in which dtype the plans of tensors are computed."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def entropy_of(plan: Tensor, mass: float, places: tuple[int, int]) -> Tensor:
    """Measure how even plans are that lie along two dimensions."""
    count = plan.shape[places[0]] * plan.shape[places[1]]
    entropy = torch.special.entr(plan.detach() / mass).sum(places)
    return entropy / math.log(count) if count > 1 else torch.ones_like(entropy)
