"""Entropic transport between image patches and prompts."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError, NotConverged
from fastfpl.ops import native
from fastfpl.ops.faces import Face, choose
from fastfpl.reference import transport as reference
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "Convergence", "transport_plan"]

_OP = "fastfpl.ops.transport_plan"
_Solved = tuple[Tensor, Tensor, Tensor]  # plan, iterations, residual


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
    if not isinstance(sim, Tensor):
        raise KindError(f"{_OP}: sim must be a torch.Tensor; got {type(sim).__name__}")
    if sim.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise KindError(
            f"{_OP}: sim must be float16, bfloat16, float32 or float64; got {sim.dtype}"
        )
    sizes = check_shapes(_OP, sim=(sim, "... P N"))
    if not sizes["P"] or not sizes["N"]:
        raise InputError(f"{_OP}: sim must have patches and prompts; got {tuple(sim.shape)}")
    if not 0 < eps < math.inf:
        raise InputError(f"{_OP}: eps must be positive and finite; got {eps!r}")
    if not 0 < mass <= 1:
        raise InputError(f"{_OP}: mass must lie in (0, 1]; got {mass!r}")
    if not 0 < tol < math.inf:
        raise InputError(f"{_OP}: tol must be positive and finite; got {tol!r}")
    if max_iter < 1:
        raise InputError(f"{_OP}: max_iter must be at least 1; got {max_iter!r}")
    plan, iterations, residual = _solve(
        sim.detach(), float(eps), float(mass), balanced or mass == 1, max_iter, float(tol), not info
    )
    return (plan, Convergence(iterations, residual)) if info else plan


# opaque to torch.compile: faces, threads and refusals happen when it runs, not when it is traced
@torch.library.custom_op("fastfpl::transport_plan", mutates_args=())
def _solve(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = sim if sim.dtype == torch.float64 else sim.float()
    arguments = (wide, eps, mass, balanced, max_iter, tol)
    plan, iterations, residual = choose("transport_plan", FACES["transport_plan"], *arguments).run(
        *arguments
    )
    if strict and not bool((residual <= tol).all()):
        over = int((~(residual <= tol)).sum())
        raise NotConverged(
            f"{_OP}: {over} of {residual.numel()} problems ended above tol={tol:g} after at most "
            f"{int(iterations.max())} iterations; the largest residual is "
            f"{float(residual.max()):.1e}"
        )
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


def _refuse_unfinite(sim: Tensor, eps: float, first: int) -> None:
    """Name one value that makes a plan meaningless, by its place in ``sim``."""
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), sim.shape))
    raise InputError(
        f"{_OP}: sim / eps must be finite; got {float(sim[place])!r} at {place} with eps={eps:g}"
    )


def _reference(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float
) -> _Solved:
    good = (sim * (4 / eps)).isfinite()
    if not bool(good.all()):
        _refuse_unfinite(sim, eps, int((~good).flatten().nonzero()[0]))
    return reference.transport_plan(sim, eps, mass, balanced, max_iter, tol)


def _cpu(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float
) -> _Solved:
    sim = sim.resolve_neg().contiguous()
    plan = torch.empty_like(sim)
    iterations = sim.new_empty(sim.shape[:-2], dtype=torch.int64)
    residual = sim.new_empty(sim.shape[:-2])
    first_bad = native.load("transport_plan").transport_plan(
        sim, plan, iterations, residual, eps, mass, balanced, max_iter, tol, torch.get_num_threads()
    )
    if first_bad >= 0:
        _refuse_unfinite(sim, eps, first_bad)
    return plan, iterations, residual


def _against_cpu(sim: Tensor, *_: object) -> list[str]:
    reasons = []
    if sim.device.type != "cpu":
        reasons.append(f"sim is on {sim.device}, not on the CPU")
    if sim.shape[-1] > 2:
        reasons.append(f"N = {sim.shape[-1]} prompts, at most 2")
    return reasons


#: The faces of this file's ops, best first.
FACES: dict[str, tuple[Face, ...]] = {
    "transport_plan": (
        Face("cpu", _cpu, partial(native.missing, "transport_plan"), _against_cpu),
        Face("reference", _reference),
    )
}
