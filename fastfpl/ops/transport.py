"""Entropic transport between image patches and prompts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfpl.errors import InputError, KindError, NotConverged
from fastfpl.ops import native
from fastfpl.ops.faces import Face, choose
from fastfpl.reference import transport as reference
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "Convergence", "transport_logits", "transport_plan"]

_PLAN = "fastfpl.ops.transport_plan"
_LOGITS = "fastfpl.ops.transport_logits"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Solved = tuple[Tensor, Tensor, Tensor]  # plan or logits, iterations, residual
_Refuse = Callable[[Tensor, float, int], NoReturn]

# similarities of one piece of the logits: 16 MiB, enough for full-speed GEMMs and for all threads
_AT_ONCE = 1 << 22
# plans that are kept for the backward pass: 256 MiB; above that each piece solves its own again
_KEPT = 1 << 26


class Convergence(NamedTuple):
    """How a transport problem ended: iterations (int64) and residual, one a problem."""

    iterations: Tensor
    residual: Tensor


@overload
def transport_plan(
    sim: Tensor,
    *,
    eps: float = ...,
    mass: float = ...,
    balanced: bool = ...,
    max_iter: int = ...,
    tol: float = ...,
    info: Literal[False] = ...,
) -> Tensor: ...
@overload
def transport_plan(
    sim: Tensor,
    *,
    eps: float = ...,
    mass: float = ...,
    balanced: bool = ...,
    max_iter: int = ...,
    tol: float = ...,
    info: Literal[True],
) -> tuple[Tensor, Convergence]: ...
def transport_plan(
    sim: Tensor,
    *,
    eps: float = 0.1,
    mass: float = 1.0,
    balanced: bool = False,
    max_iter: int = 10_000,
    tol: float = 1e-5,
    info: bool = False,
) -> Tensor | tuple[Tensor, Convergence]:
    r"""Plan the entropic transport of image patches onto the prompts of a class.

    .. math:: \max_{T \ge 0} \langle T, sim\rangle - \varepsilon \sum_{mn} T_{mn}(\log T_{mn} - 1)
              \quad\text{s.t.}\quad T 1 \le 1/P,\; T^T 1 = mass/N

    With ``balanced=True`` the rows are an equality too: T 1 = mass/P.

    Parameters
    ----------
    sim : Tensor, shape (..., P, N), float16, bfloat16, float32 or float64
        Similarities of P patches and N prompts; the cost is 1 - sim. Any leading dimensions, none
        or zero problems included; any strides.
    eps : float > 0, unit of sim
        Temperature (POT: ``reg``). Any value for which sim / eps is finite gives numbers.
    mass : float in (0, 1]
        Total of the plan (FedOTP: gamma). At 1 the row bound is met everywhere and the plan is the
        balanced one.
    balanced : bool
        Rows exactly mass/P instead of at most 1/P.
    max_iter : int > 0
        Most iterations of a problem: passes over its similarities.
    tol : float > 0
        A problem ends when no column of the row-capped plan misses mass/N by more than a factor
        exp(±tol); the C++ face adds one Newton step. Problems of one call do not influence each
        other.
    info : bool
        Also return the `Convergence`, and then raise nothing where it was not reached.

    Returns
    -------
    plan : Tensor, shape (..., P, N), dtype of ``sim``
        Columns sum to mass/N to rounding; rows to at most exp(tol)/P.
    convergence : Convergence of Tensors of shape (...)
        Only with ``info``: iterations, and as residual the largest abs(log(column / (mass/N))) of
        the plan before its columns were rescaled.

    Raises
    ------
    InputError
        If a shape, a value or an option is out of range, or sim / eps is not finite.
    KindError
        If ``sim`` is not a tensor of floats.
    NotConverged
        If a problem ends above ``tol`` and ``info`` is False.

    Notes
    -----
    Not differentiable: the plan is returned detached, a constant as in FedOTP, so that
    ``(plan * sim).sum()`` has the gradient ``plan``. Deterministic: yes, whatever the number of
    threads. Accumulates in float32; in float64 for float64. Memory: the plan, and 2 P numbers a
    thread; the reference face some ten copies of ``sim``.

    The residual bounds the marginals, not the distance to the limit. The published iteration
    (``face("reference")``) is slow for small eps: at eps=.01 it takes hundreds of steps and stops
    10 to 20 residuals from its limit, more as mass nears 1. The C++ face, for N of 1 or 2, finds
    the same limit by Newton steps on two scalars, 4 to 10 for similarities as CLIP makes them.
    Below about 1e-6 float32 cannot tell residuals from rounding.

    Source: Li et al. 2024 (FedOTP), arXiv 2403.00041; partial transport by scaling: Benamou et al.
    2015, arXiv 1412.5154.
    """
    _check_tensor(_PLAN, "sim", sim)
    sizes = check_shapes(_PLAN, sim=(sim, "... P N"))
    if not sizes["P"] or not sizes["N"]:
        raise InputError(f"{_PLAN}: sim must have patches and prompts; got {tuple(sim.shape)}")
    _check_options(_PLAN, eps, mass, max_iter, tol)
    plan, iterations, residual = _solve(
        sim.detach(), float(eps), float(mass), balanced or mass == 1, max_iter, float(tol), not info
    )
    return (plan, Convergence(iterations, residual)) if info else plan


@overload
def transport_logits(
    patches: Tensor,
    prompts: Tensor,
    *,
    eps: float = ...,
    mass: float = ...,
    balanced: bool = ...,
    max_iter: int = ...,
    tol: float = ...,
    info: Literal[False] = ...,
) -> Tensor: ...
@overload
def transport_logits(
    patches: Tensor,
    prompts: Tensor,
    *,
    eps: float = ...,
    mass: float = ...,
    balanced: bool = ...,
    max_iter: int = ...,
    tol: float = ...,
    info: Literal[True],
) -> tuple[Tensor, Convergence]: ...
def transport_logits(
    patches: Tensor,
    prompts: Tensor,
    *,
    eps: float = 0.1,
    mass: float = 0.8,
    balanced: bool = False,
    max_iter: int = 10_000,
    tol: float = 1e-5,
    info: bool = False,
) -> Tensor | tuple[Tensor, Convergence]:
    r"""Score images against classes by transporting their patches onto the prompts of each class.

    .. math:: \mathrm{logit}_{bc} = \sum_{mn} T^{bc}_{mn}\, s^{bc}_{mn},\quad
              s^{bc}_{mn} = \langle x_{bm}, t_{cn}\rangle,\quad
              T^{bc} = \mathrm{transport\_plan}(s^{bc})

    Parameters
    ----------
    patches : Tensor, shape (..., B, P, D), float16, bfloat16, float32 or float64
        Features of P patches of each image, as a rule of unit length; any strides.
    prompts : Tensor, shape (..., C, N, D), float16, bfloat16, float32 or float64
        Text features of N prompts for each class; the same leading dimensions (clients).
    eps, mass, balanced, max_iter, tol
        Of `transport_plan`: rows of a plan hold at most 1/P (with ``balanced`` exactly mass/P) and
        columns mass/N. With mass = 1 the plan is the balanced one.
    info : bool
        Also return the `Convergence` of every pair of image and class, and then raise nothing where
        it was not reached.

    Returns
    -------
    logits : Tensor, shape (..., B, C), the wider dtype of both
        Means of similarities times ``mass``; not multiplied by CLIP's logit scale.
    convergence : Convergence of Tensors of shape (..., B, C)
        Only with ``info``.

    Raises
    ------
    InputError
        If a shape, a value or an option is out of range, or a similarity / eps is not finite.
    KindError
        If the tensors are not floats, or not on one device.
    NotConverged
        If a problem ends above ``tol`` and ``info`` is False.

    Notes
    -----
    Differentiable in: patches, prompts, once. The plan is a constant as in FedOTP, so that
    d logit / d s = T. Deterministic: yes on CPU, whatever the number of threads of the plans.
    Computes in float32, in float64 where one of both has it; 16-bit features are widened piece by
    piece. Memory of the C++ face: some four pieces of 16 MiB, however many images, classes and
    clients there are; where a gradient is wanted, also all plans if they take less than 256 MiB.
    Above that the backward pass solves them again.

    The C++ face is that of `transport_plan` for N of 1 or 2; the torch face takes any N and device
    with the published iteration.

    Source: Li et al. 2024 (FedOTP), arXiv 2403.00041; Chen et al. 2023 (PLOT), arXiv 2210.01253.
    """
    _check_tensor(_LOGITS, "patches", patches)
    _check_tensor(_LOGITS, "prompts", prompts)
    sizes = check_shapes(_LOGITS, patches=(patches, "... B P D"), prompts=(prompts, "... C N D"))
    if prompts.device != patches.device:
        raise KindError(
            f"{_LOGITS}: prompts must be on {patches.device} as patches are; got {prompts.device}"
        )
    if patches.shape[:-3] != prompts.shape[:-3]:
        raise InputError(
            f"{_LOGITS}: prompts must have the leading dimensions {tuple(patches.shape[:-3])} of "
            f"patches; got {tuple(prompts.shape[:-3])}"
        )
    if not sizes["P"]:
        raise InputError(f"{_LOGITS}: patches must have at least one patch an image; got P=0")
    if not sizes["N"]:
        raise InputError(f"{_LOGITS}: prompts must have at least one prompt a class; got N=0")
    _check_options(_LOGITS, eps, mass, max_iter, tol)
    arguments = (
        *(patches, prompts, float(eps), float(mass)),
        *(balanced or mass == 1, max_iter, float(tol)),
    )
    face = choose("transport_logits", FACES["transport_logits"], *arguments)
    logits: Tensor
    logits, iterations, residual = face.run(*arguments)
    if info:
        return logits, Convergence(iterations, residual)
    _refuse_unconverged(_LOGITS, iterations, residual, tol)
    return logits


def _check_tensor(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise KindError(f"{op}: {name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise KindError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}"
        )


def _check_options(op: str, eps: float, mass: float, max_iter: int, tol: float) -> None:
    if not 0 < eps < math.inf:
        raise InputError(f"{op}: eps must be positive and finite; got {eps!r}")
    if not 0 < mass <= 1:
        raise InputError(f"{op}: mass must lie in (0, 1]; got {mass!r}")
    if not 0 < tol < math.inf:
        raise InputError(f"{op}: tol must be positive and finite; got {tol!r}")
    if max_iter < 1:
        raise InputError(f"{op}: max_iter must be at least 1; got {max_iter!r}")


def _refuse_unconverged(op: str, iterations: Tensor, residual: Tensor, tol: float) -> None:
    if bool((residual <= tol).all()):
        return
    over = int((~(residual <= tol)).sum())
    raise NotConverged(
        f"{op}: {over} of {residual.numel()} problems ended above tol={tol:g} after at most "
        f"{int(iterations.max())} iterations; the largest residual is {float(residual.max()):.1e}; "
        "raise max_iter, eps or tol"
    )


# opaque to torch.compile: faces, threads and refusals happen when it runs, not when it is traced
@torch.library.custom_op("fastfpl::transport_plan", mutates_args=())
def _solve(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (sim.to(_wide(sim)), eps, mass, balanced, max_iter, tol)
    plan, iterations, residual = choose("transport_plan", FACES["transport_plan"], *arguments).run(
        *arguments
    )
    if strict:
        _refuse_unconverged(_PLAN, iterations, residual, tol)
    return plan.to(sim.dtype), iterations, residual


@_solve.register_fake
def _(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if sim.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(sim, memory_format=torch.contiguous_format),
        sim.new_empty(sim.shape[:-2], dtype=torch.int64),
        sim.new_empty(sim.shape[:-2], dtype=wide),
    )


def _wide(*tensors: Tensor) -> torch.dtype:
    """Say in which dtype the plans of tensors are computed."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _refuse_similarity(sim: Tensor, eps: float, first: int) -> NoReturn:
    """Name one value that makes a plan meaningless, by its place in ``sim``."""
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), sim.shape))
    raise InputError(
        f"{_PLAN}: sim / eps must be finite; got {float(sim[place])!r} at {place} with eps={eps:g}"
    )


def _refuse_product(
    lead: tuple[int, ...], corner: tuple[int, int, int], sim: Tensor, eps: float, first: int
) -> NoReturn:
    """Name the patch and the prompt of such a value in a piece (u, b, c, P, N) at ``corner``."""
    u, b, c, m, n = (int(i) for i in torch.unravel_index(torch.tensor(first), sim.shape))
    value = float(sim[u, b, c, m, n])
    client = tuple(int(i) for i in torch.unravel_index(torch.tensor(u + corner[0]), lead or (1,)))
    client = client if lead else ()
    raise InputError(
        f"{_LOGITS}: similarity / eps must be finite; got {value!r} of patch "
        f"{(*client, b + corner[1], m)} and prompt {(*client, c + corner[2], n)} with eps={eps:g}"
    )


def _reference(
    sim: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    refuse: _Refuse = _refuse_similarity,
) -> _Solved:
    good = (sim * (4 / eps)).isfinite()
    if not bool(good.all()):
        refuse(sim, eps, int((~good).flatten().nonzero()[0]))
    return reference.transport_plan(sim, eps, mass, balanced, max_iter, tol)


def _cpu(
    sim: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    refuse: _Refuse = _refuse_similarity,
) -> _Solved:
    sim = sim.resolve_neg().contiguous()
    plan = torch.empty_like(sim)
    iterations = sim.new_empty(sim.shape[:-2], dtype=torch.int64)
    residual = sim.new_empty(sim.shape[:-2])
    first_bad = native.load("transport_plan").transport_plan(
        sim, plan, iterations, residual, eps, mass, balanced, max_iter, tol, torch.get_num_threads()
    )
    if first_bad >= 0:
        refuse(sim, eps, first_bad)
    return plan, iterations, residual


def _against_cpu(sim: Tensor, *_: object) -> list[str]:
    return _against("sim", sim, sim.shape[-1])


def _against_cpu_logits(patches: Tensor, prompts: Tensor, *_: object) -> list[str]:
    return _against("patches", patches, prompts.shape[-2])


def _against(name: str, tensor: Tensor, n_prompts: int) -> list[str]:
    reasons = []
    if tensor.device.type != "cpu":
        reasons.append(f"{name} is on {tensor.device}, not on the CPU")
    if n_prompts > 2:
        reasons.append(f"N = {n_prompts} prompts, at most 2")
    return reasons


def _reference_logits(
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
) -> _Solved:
    wide = _wide(patches, prompts)
    x, t = patches.to(wide), prompts.to(wide)
    with torch.no_grad():
        sim = reference.similarities(x, t)
        good = (sim * (4 / eps)).isfinite()
    if not bool(good.all()):
        lead = patches.shape[:-3]
        first = int((~good).flatten().nonzero()[0])
        _refuse_product(lead, (0, 0, 0), sim.reshape(-1, *sim.shape[-4:]), eps, first)
    logits, iterations, residual = reference.transport_logits(
        x, t, eps, mass, balanced, max_iter, tol
    )
    return logits.to(torch.promote_types(patches.dtype, prompts.dtype)), iterations, residual


def _pieced(
    solve: Callable[..., _Solved],
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
) -> _Solved:
    """Form similarities, plans and logits piece by piece."""
    lead = patches.shape[:-3]
    clients = math.prod(lead)
    x = patches.reshape(clients, *patches.shape[-3:])
    t = prompts.reshape(clients, *prompts.shape[-3:])
    plans = clients * x.shape[1] * t.shape[1] * x.shape[2] * t.shape[2]
    wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)

    def plan_of(sim: Tensor, corner: tuple[int, int, int]) -> _Solved:
        refuse = functools.partial(_refuse_product, tuple(lead), corner)
        return solve(sim, eps, mass, balanced, max_iter, tol, refuse)

    logits, iterations, residual = _Logits.apply(x, t, plan_of, wanted and plans <= _KEPT)
    shape = (*lead, x.shape[1], t.shape[1])
    return logits.reshape(shape), iterations.reshape(shape), residual.reshape(shape)


def _pieces(x: Tensor, t: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut clients, images and classes so that no piece has more than `_AT_ONCE` numbers.

    Images are cut first: whole rows of classes keep the GEMMs wide.
    """
    clients, images, n_patches, width = x.shape
    classes, n_prompts = t.shape[1:3]
    c = max(1, min(classes, _AT_ONCE // (n_prompts * max(n_patches, width))))
    image = n_patches * max(c * n_prompts, width)
    b = max(1, min(images, _AT_ONCE // image))
    u = max(1, _AT_ONCE // (image * b)) if (b, c) == (images, classes) else 1
    for i in range(0, clients, u):
        for j in range(0, images, b):
            for k in range(0, classes, c):
                yield slice(i, i + u), slice(j, j + b), slice(k, k + c)


def _similarities(x: Tensor, t: Tensor) -> Tensor:
    """Multiply (u, b, P, D) and (u, c, N, D), one GEMM a client -> (u, b, c, P, N), contiguous."""
    flat = x.flatten(1, 2) @ t.flatten(1, 2).mT
    return flat.view(*x.shape[:3], *t.shape[1:3]).transpose(2, 3).contiguous()


class _Logits(torch.autograd.Function):
    """Sums of plan * sim whose gradient takes the plan for a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        patches: Tensor,
        prompts: Tensor,
        plan_of: Callable[[Tensor, tuple[int, int, int]], _Solved],
        keep: bool,
    ) -> _Solved:
        shape = (patches.shape[0], patches.shape[1], prompts.shape[1])
        wide = _wide(patches, prompts)
        logits = patches.new_empty(shape, dtype=torch.promote_types(patches.dtype, prompts.dtype))
        iterations = patches.new_empty(shape, dtype=torch.int64)
        residual = patches.new_empty(shape, dtype=wide)
        plans = []
        for u, b, c in _pieces(patches, prompts):
            sim = _similarities(patches[u, b].to(wide), prompts[u, c].to(wide))
            plan, iterations[u, b, c], residual[u, b, c] = plan_of(sim, (u.start, b.start, c.start))
            logits[u, b, c] = sim.mul_(plan).sum((-2, -1))
            if keep:
                plans.append(plan)
        ctx.save_for_backward(patches, prompts, *plans)
        ctx.plan_of = plan_of
        ctx.mark_non_differentiable(iterations, residual)
        return logits, iterations, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        patches, prompts, *plans = ctx.saved_tensors
        wide = _wide(patches, prompts)
        of_patches, of_prompts = ctx.needs_input_grad[:2]
        d_patches = torch.zeros_like(patches, dtype=wide) if of_patches else None
        d_prompts = torch.zeros_like(prompts, dtype=wide) if of_prompts else None
        for i, (u, b, c) in enumerate(_pieces(patches, prompts)):
            x, t = patches[u, b].to(wide), prompts[u, c].to(wide)
            if plans:
                plan = plans[i]
            else:
                plan, *_ = ctx.plan_of(_similarities(x, t), (u.start, b.start, c.start))
            weight = plan.new_empty(*x.shape[:3], *t.shape[1:3])
            by = d_logits[u, b, c].to(wide)[:, :, None, :, None]
            torch.mul(plan.transpose(2, 3), by, out=weight)
            weight = weight.view(len(x), x.shape[1] * x.shape[2], -1)
            if d_patches is not None:
                d_patches[u, b] += (weight @ t.flatten(1, 2)).view(x.shape)
            if d_prompts is not None:
                d_prompts[u, c] += (weight.mT @ x.flatten(1, 2)).view(t.shape)
        return (
            None if d_patches is None else d_patches.to(patches.dtype),
            None if d_prompts is None else d_prompts.to(prompts.dtype),
            None,
            None,
        )


#: The faces of this file's ops, best first.
FACES: dict[str, tuple[Face, ...]] = {
    "transport_plan": (
        Face("cpu", _cpu, functools.partial(native.missing, "transport_plan"), _against_cpu),
        Face("reference", _reference, waits=True),
    ),
    "transport_logits": (
        Face(
            "cpu",
            functools.partial(_pieced, _cpu),
            functools.partial(native.missing, "transport_plan"),
            _against_cpu_logits,
        ),
        Face("torch", functools.partial(_pieced, _reference), waits=True),
        Face("reference", _reference_logits, waits=True),
    ),
}
