"""Entropic transport between given weights, with the argument names of POT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError, NotConverged
from fastfpl.ops import native
from fastfpl.ops.faces import Face, choose, face_or_any, forced, transformed
from fastfpl.ops.functional import Recipe, check_graph, in_front, spread, transformed_call
from fastfpl.ops.operators import define
from fastfpl.ops.precision import as_given
from fastfpl.ops.transport import against_cpu
from fastfpl.ops.transport_checks import refuse_nested, refuse_vmap, vmapped, wide_of
from fastfpl.ops.transport_gradient import pull_back
from fastfpl.reference import entropic as reference
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "sinkhorn"]

_OP = "fastfpl.ops.sinkhorn"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Solved = tuple[Tensor, Tensor, Tensor]  # plan, iterations, residual
_Weights = Tensor | Sequence[float] | None


@overload
def sinkhorn(
    a: _Weights,
    b: _Weights,
    M: Tensor,
    reg: float,
    numItermax: int = ...,
    stopThr: float | None = ...,
    *,
    partial: bool = ...,
    log: Literal[False] = ...,
) -> Tensor: ...
@overload
def sinkhorn(
    a: _Weights,
    b: _Weights,
    M: Tensor,
    reg: float,
    numItermax: int = ...,
    stopThr: float | None = ...,
    *,
    partial: bool = ...,
    log: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...
def sinkhorn(
    a: _Weights,
    b: _Weights,
    M: Tensor,
    reg: float,
    numItermax: int = 10_000,
    stopThr: float | None = None,
    *,
    partial: bool = False,
    log: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Plan the entropic transport between weights a and b, for any number of problems at once.

    .. math:: \min_{T \ge 0} \langle T, M\rangle + reg \sum_{mn} T_{mn} \log T_{mn}
              \quad\text{s.t.}\quad T 1 = a,\; T^T 1 = b

    This is ``ot.sinkhorn(a, b, M, reg)`` of POT with leading dimensions. With ``partial`` the side
    with the larger total is a bound only, :math:`T 1 \le a` or :math:`T^T 1 \le b`; this is
    ``ot.partial.entropic_partial_wasserstein(a, b, M, reg)`` with its default mass.

    Parameters
    ----------
    a : Tensor, shape (..., P), dtype of M, float32 too for 16-bit M, or None
        Weights of the rows, at least 0. None, or an empty sequence as in POT, is 1 / P each.
    b : Tensor, shape (..., N), as a, or None
        Weights of the columns. Without ``partial`` their total must be that of a, to a thousandth
        or to what rounding does to weights of 16 bits: each, and the total they were divided by.
    M : Tensor, shape (..., P, N), float16, bfloat16, float32 or float64
        Costs. Leading dimensions of a, b and M are broadcast.
    reg : float > 0, unit of M
        Temperature. Any value for which M / reg is finite gives numbers.
    numItermax : int > 0
        Most iterations of a problem.
    stopThr : float > 0, optional
        A problem ends when no sum of the side that is scaled last misses its weight by more than a
        factor exp(±stopThr): relative, where POT's is an absolute norm. None is 1e-9 in float64 and
        1e-5 otherwise.
    partial : bool
        See above.
    log : bool
        Also return a dictionary, and then raise nothing where a problem has not converged.

    Returns
    -------
    plan : Tensor, shape (..., P, N), dtype of M
    log : dict
        ``niter`` and ``err`` of shape (...): iterations, and what ``stopThr`` bounds. Potentials
        are not in it: the gradients of a and b are.

    Raises
    ------
    InputError
        If a shape, a value or an option is out of range, totals disagree, or M / reg is not finite.
    KindError
        If dtypes or devices differ, or M is not a tensor of floats.
    NotConverged
        If a problem ends above ``stopThr`` and ``log`` is False.

    Notes
    -----
    Differentiable in: M, a, b, at the optimum and not through the iterations (the system of
    `fastfpl.ops.transport_plan`), backward and forward; under ``torch.func`` too. Inside ``vmap``
    and ``torch.compile`` backward only, and once: give leading dimensions in place of a ``vmap``
    for the rest. Without ``partial`` a is scaled to the total of b, so that a and b may
    be moved one at a time. A weight of 0 has the gradient 0; a row that meets its bound without
    need is taken for held.
    Not covered: a mass below both totals (POT's ``m``), where both sides are bounds; many b for one
    M in the columns of b (broadcast instead); unbalanced transport with penalties.
    Deterministic: yes. Computes in float32, in float64 for float64. The C++ face takes problems of
    which one side (with ``partial`` the side that is met) has at most 16 weights and finds the
    limit by Newton steps; others go to the scaling iteration.

    Source: Cuturi 2013, arXiv 1306.0895; partial transport by scaling: Benamou et al. 2015, arXiv
    1412.5154.
    """
    if not isinstance(M, Tensor):
        raise KindError(f"{_OP}: M must be a torch.Tensor; got {type(M).__name__}")
    if M.dtype not in _DTYPES:
        raise KindError(f"{_OP}: M must be float16, bfloat16, float32 or float64; got {M.dtype}")
    refuse_nested(_OP)
    given = [x for x in (M, a, b) if isinstance(x, Tensor)]
    if torch.compiler.is_compiling() or vmapped(*given):
        weighted = isinstance(a, Tensor), isinstance(b, Tensor)
        found = _opaque(given, *weighted, reg, numItermax, stopThr, partial, log)
        return (found[0], {"niter": found[1], "err": found[2]}) if log else found[0]
    sizes = check_shapes(_OP, M=(M, "... P N"))
    if not sizes["P"] or not sizes["N"]:
        raise InputError(f"{_OP}: M must have rows and columns; got {tuple(M.shape)}")
    a = _weights("a", a, M, sizes["P"])
    b = _weights("b", b, M, sizes["N"])
    try:
        lead = torch.broadcast_shapes(M.shape[:-2], a.shape[:-1], b.shape[:-1])
    except RuntimeError:
        raise InputError(
            f"{_OP}: leading dimensions of a, b and M must be equal or 1; got "
            f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(M.shape)}"
        ) from None
    if not 0 < reg < math.inf:
        raise InputError(f"{_OP}: reg must be positive and finite; got {reg!r}")
    if numItermax < 1:
        raise InputError(f"{_OP}: numItermax must be at least 1; got {numItermax!r}")
    tol = stopThr if stopThr is not None else 1e-9 if M.dtype == torch.float64 else 1e-5
    if not 0 < tol < math.inf:
        raise InputError(f"{_OP}: stopThr must be positive and finite; got {stopThr!r}")
    wide = wide_of(M)
    cost = M.to(wide).expand(*lead, *M.shape[-2:])
    rows, columns = (w.to(wide).expand(*lead, w.shape[-1]) for w in (a, b))
    turned = _turned(cost, rows, columns, partial, _unsure(a) + _unsure(b))
    if turned:
        cost, rows, columns = cost.mT, columns, rows
    if bool((totals := columns.sum(-1) >= rows.sum(-1) * (1 - 1e-6)).any()) and partial:
        # a bound that is met everywhere is an equality
        if not bool(totals.all()):
            raise InputError(
                f"{_OP}: with partial the totals of a and b must be equal in all problems or in "
                "none; got some of each"
            )
        partial = False
    found, iterations, residual = _Plan.apply(
        cost, rows, columns, float(reg), partial, numItermax, float(tol)
    )
    plan: Tensor = (found.mT if turned else found).to(M.dtype)
    if log:
        return plan, {"niter": iterations, "err": residual}
    if not bool((residual <= tol).all()):
        over = int((~(residual <= tol)).sum())
        raise NotConverged(
            f"{_OP}: {over} of {residual.numel()} problems ended above stopThr={tol:g} after at "
            f"most {int(iterations.max())} iterations; the largest residual is "
            f"{float(residual.max()):.1e}; raise numItermax, reg or stopThr"
        )
    return plan


# --- torch.compile and torch.func.vmap ------------------------------------------------------------


def _opaque(
    tensors: list[Tensor],
    rows: bool,
    columns: bool,
    reg: float,
    most: int,
    tol: float | None,
    partial: bool,
    log: bool,
) -> list[Tensor]:
    """Solve where values cannot be read: all problems at once, below what hides them."""
    statics = (rows, columns, float(reg), most, -1.0 if tol is None else float(tol), partial, log)
    name = forced("sinkhorn") or ""
    if torch.compiler.is_compiling():
        check_graph("sinkhorn")
        return _operator(tensors, *statics, name)
    if transformed(*tensors):
        refuse_vmap(_OP, *tensors)
    return transformed_call(_RECIPE, tensors, *statics, name)


def _called(
    tensors: list[Tensor],
    rows: bool,
    columns: bool,
    reg: float,
    most: int,
    tol: float,
    partial: bool,
    log: bool,
    name: str,
) -> list[Tensor]:
    M, *rest = tensors
    a = rest.pop(0) if rows else None
    b = rest.pop(0) if columns else None
    stop = None if tol == -1 else tol
    with face_or_any(name, "sinkhorn"):
        if not log:
            return [sinkhorn(a, b, M, reg, most, stop, partial=partial)]
        plan, ended = sinkhorn(a, b, M, reg, most, stop, partial=partial, log=True)
    return [plan, ended["niter"], ended["err"]]


def _shaped(tensors: list[Tensor], *statics: Any) -> list[Tensor]:
    M, *weights = tensors
    lead = torch.broadcast_shapes(M.shape[:-2], *(x.shape[:-1] for x in weights))
    plan = M.new_empty(*lead, *M.shape[-2:])
    if not statics[-2]:
        return [plan]
    return [plan, M.new_empty(lead, dtype=torch.int64), M.new_empty(lead, dtype=wide_of(M))]


def _batched(
    size: int, tensors: list[Tensor], dims: list[int | None], *_: Any
) -> list[Tensor] | None:
    whole = [in_front(size, x, d) for x, d in zip(tensors, dims, strict=True)]
    leads = [x.dim() - own for x, own in zip(whole, (2, 1, 1), strict=False)]
    # leading dimensions are broadcast by their last ones: the batch stands before all
    return [spread(x, max(leads) - lead) for x, lead in zip(whole, leads, strict=True)]


_RECIPE = Recipe(
    name="sinkhorn",
    schema="bool rows, bool columns, float reg, int most, float tol, bool partial, bool log, "
    "str face",
    run=_called,
    fake=_shaped,
    batched=_batched,
    instead="the op outside torch.compile and torch.func.vmap",
)
_operator = define(_RECIPE)


def _weights(name: str, weights: _Weights, M: Tensor, size: int) -> Tensor:
    if weights is None or (not isinstance(weights, Tensor) and not len(weights)):
        return M.new_full((size,), 1 / size, dtype=wide_of(M))
    if not isinstance(weights, Tensor):
        raise KindError(
            f"{_OP}: {name} must be a torch.Tensor or None; got {type(weights).__name__}"
        )
    if weights.dtype not in (M.dtype, wide_of(M)) or weights.device != M.device:
        wider = "" if wide_of(M) == M.dtype else f", or {wide_of(M)}"
        raise KindError(
            f"{_OP}: {name} must be {M.dtype} on {M.device} as M is{wider}; got {weights.dtype} on "
            f"{weights.device}"
        )
    if weights.ndim < 1 or weights.shape[-1] != size:
        raise InputError(
            f"{_OP}: {name} must have shape (..., {size}) for M {tuple(M.shape)}; got "
            f"{tuple(weights.shape)}"
        )
    bad = ~((weights >= 0) & weights.isfinite())
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{_OP}: {name} must be finite and at least 0; got {float(weights[place])!r} at {place}"
        )
    empty = weights.sum(-1) <= 0
    if bool(empty.any()):
        place = tuple(int(i) for i in empty.nonzero()[0])
        raise InputError(f"{_OP}: {name} must have a positive total; got 0 at {place}")
    return weights


def _unsure(weights: Tensor) -> Tensor:
    """Say how far a total may be from the one meant: each weight is rounded, and what it is of."""
    kind = torch.finfo(weights.dtype)
    each = kind.smallest_normal * kind.eps * weights.shape[-1]  # where a weight is subnormal
    return weights.detach().to(wide_of(weights)).sum(-1) * kind.eps + each


def _turned(cost: Tensor, rows: Tensor, columns: Tensor, partial: bool, unsure: Tensor) -> bool:
    """Say whether rows and columns change places, so that the scaled side is met or is small."""
    of_rows, of_columns = rows.sum(-1), columns.sum(-1)
    if not partial:
        far = (of_rows - of_columns).abs() > (1e-3 * of_rows).maximum(unsure)
        if bool(far.any()):
            place = tuple(int(i) for i in far.nonzero()[0])
            raise InputError(
                f"{_OP}: a and b must have the same total without partial; got "
                f"{float(of_rows[place]):g} and {float(of_columns[place]):g} at {place}"
            )
        return cost.shape[-1] > cost.shape[-2]
    fewer = of_rows < of_columns
    if bool(fewer.any()) and not bool(fewer.all()):
        raise InputError(
            f"{_OP}: with partial the total of a must be at least that of b in all problems or "
            "smaller in all; got some of each"
        )
    return bool(fewer.any())


class _Plan(torch.autograd.Function):
    """A plan whose gradient is that of the optimum."""

    @staticmethod
    def forward(
        cost: Tensor,
        rows: Tensor,
        columns: Tensor,
        reg: float,
        partial: bool,
        max_iter: int,
        tol: float,
    ) -> _Solved:
        arguments = (cost, rows, columns, reg, partial, max_iter, tol)
        found: _Solved = choose("sinkhorn", FACES["sinkhorn"], *arguments).run(*arguments)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Solved) -> None:
        _, rows, columns, ctx.reg, ctx.partial, _, ctx.tol = inputs
        plan, *ended = output
        ctx.save_for_backward(plan, rows, columns)
        ctx.save_for_forward(plan, rows, columns)
        ctx.mark_non_differentiable(*ended)

    @staticmethod
    def backward(ctx: Any, d_plan: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_pull(ctx, d_plan), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, rows, columns = ctx.saved_tensors
        moved = [
            like.new_zeros(like.shape) if tangent is None else tangent
            for tangent, like in zip(tangents, (plan, rows, columns), strict=False)
        ]
        # the gradient is linear in that of the plan: its transpose goes the other way
        turn = torch.func.vjp(functools.partial(_pull, ctx), torch.zeros_like(plan))[1]
        return turn(tuple(moved))[0], None, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[_Solved, tuple[int, ...]]:
        whole = [
            x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            for x, at in zip(arguments[:3], dims, strict=False)
        ]
        return _Plan.apply(*whole, *arguments[3:]), (0, 0, 0)


def _pull(ctx: Any, d_plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of the plan back to costs, rows and columns."""
    plan, rows, columns = ctx.saved_tensors
    with as_given(plan.device):
        pulled, alpha, beta = pull_back(plan, d_plan, rows if ctx.partial else None, ctx.tol)
    d_rows = torch.where(rows > 0, alpha.squeeze(-1), 0)
    d_columns = torch.where(columns > 0, beta.squeeze(-2), 0)
    if not ctx.partial:  # through the scaling of the rows to the total of the columns
        total, held = rows.sum(-1, keepdim=True), columns.sum(-1, keepdim=True)
        mean = (d_rows * rows).sum(-1, keepdim=True) / total
        d_rows = torch.where(rows > 0, (d_rows - mean) * held / total, 0)
        d_columns = torch.where(columns > 0, d_columns + mean, 0)
    return -pulled / ctx.reg, d_rows, d_columns


def _refuse(cost: Tensor, reg: float, first: int) -> None:
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), cost.shape))
    raise InputError(
        f"{_OP}: M / reg must be finite; got {float(cost[place])!r} at {place} with reg={reg:g}"
    )


def _reference(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    reg: float,
    partial: bool,
    max_iter: int,
    tol: float,
) -> _Solved:
    good = (cost * (4 / reg)).isfinite()
    if not bool(good.all()):
        _refuse(cost, reg, int((~good).flatten().nonzero()[0]))
    return reference.sinkhorn(cost, rows, columns, reg, partial, max_iter, tol)


def _cpu(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    reg: float,
    partial: bool,
    max_iter: int,
    tol: float,
) -> _Solved:
    plan = cost.neg().contiguous()  # the solver reads a problem before it writes it
    iterations = cost.new_empty(cost.shape[:-2], dtype=torch.int64)
    residual = cost.new_empty(cost.shape[:-2])
    first_bad = native.load("transport_plan").transport_plan(
        *(plan, plan, iterations, residual, reg, 1.0, not partial, max_iter, tol),
        torch.get_num_threads(),
        rows=rows.resolve_neg().contiguous(),
        columns=columns.resolve_neg().contiguous(),
    )
    if first_bad >= 0:
        _refuse(cost, reg, first_bad)
    return plan, iterations, residual


def _against_cpu(cost: Tensor, *_: object) -> list[str]:
    return against_cpu("M", cost, cost.shape[-1])


#: The faces of this file's op, best first.
FACES: dict[str, tuple[Face, ...]] = {
    "sinkhorn": (
        Face("cpu", _cpu, functools.partial(native.missing, "transport_plan"), _against_cpu),
        Face("reference", _reference, waits=True),
    ),
}
