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
from fastfpl.ops import launch, native
from fastfpl.ops.faces import Face, choose
from fastfpl.reference import transport as reference
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "Convergence", "transport_logits", "transport_plan"]

_PLAN = "fastfpl.ops.transport_plan"
_LOGITS = "fastfpl.ops.transport_logits"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Solved = tuple[Tensor, Tensor, Tensor]  # plan, iterations, residual
_Scored = tuple[Tensor, Tensor, Tensor, Tensor | None]  # logits, iterations, residual, entropy
_Refuse = Callable[[Tensor, float, int], NoReturn]

# similarities of one piece of the logits: 16 MiB, enough for full-speed GEMMs and for all threads
_AT_ONCE = 1 << 22
# plans that are kept for the backward pass: 256 MiB; above that each piece solves its own again
_KEPT = 1 << 26


class Convergence(NamedTuple):
    """How transport problems ended, one number a problem.

    Nothing here waits for a device but `check`. A training loop asks for ``info``, keeps
    ``worst = ended.worst(worst)`` from step to step, and checks it where it reads its loss anyway.

    Attributes
    ----------
    iterations : Tensor, int64
        Passes over the similarities.
    residual : Tensor
        What the op's ``tol`` bounds.
    entropy : Tensor
        Entropy of plan / mass over its largest value, log(P N): 1 for a plan that is the same
        everywhere, 0 for one that holds its mass in one place. With P N = 1 it is 1.
    """

    iterations: Tensor
    residual: Tensor
    entropy: Tensor

    def worst(self, before: Convergence | None = None) -> Convergence:
        """Return the most iterations, the largest residual and the least entropy, as scalars.

        Those of ``before`` count too. A residual of NaN, the mark of a similarity that was not
        finite, is the largest of all. Of no problems these are 0, 0 and 1.
        """
        parts = [self] if before is None else [self, before]

        def largest(fields: list[Tensor]) -> Tensor:
            return torch.cat(
                [fields[0].new_zeros(1), *(x.detach().flatten() for x in fields)]
            ).amax()

        return Convergence(
            largest([part.iterations for part in parts]),
            largest([part.residual for part in parts]),
            1 - largest([1 - part.entropy for part in parts]),
        )

    def check(self, tol: float, op: str = _LOGITS) -> None:
        """Raise where a problem ended above ``tol``; the only method that reads the numbers.

        Raises
        ------
        NotConverged
            With how many problems ended above, the most iterations and the largest residual.
        InputError
            If a residual is NaN: a similarity / eps was not finite.
        """
        if not bool((self.residual <= tol).all()):
            _refuse_unconverged(op, self.iterations, self.residual, tol)


@overload
def transport_plan(
    sim: Tensor,
    *,
    eps: float = ...,
    mass: float = ...,
    balanced: bool = ...,
    max_iter: int = ...,
    tol: float = ...,
    plan_gradient: bool = ...,
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
    plan_gradient: bool = ...,
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
    plan_gradient: bool = False,
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
    plan_gradient : bool
        Let gradients flow through the plan; see Notes.
    info : bool
        Also return the `Convergence`, and then raise nothing where it was not reached; nothing is
        then read from a GPU (see Notes).

    Returns
    -------
    plan : Tensor, shape (..., P, N), dtype of ``sim``
        Columns sum to mass/N to rounding; rows to at most exp(tol)/P.
    convergence : Convergence of Tensors of shape (...)
        Only with ``info``: iterations, as residual the largest abs(log(column / (mass/N))) of
        the plan before its columns were rescaled, and the plan's entropy.

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
    Differentiable in: sim, only with ``plan_gradient``. Without it the plan is returned detached, a
    constant as in FedOTP, so that ``(plan * sim).sum()`` has the gradient ``plan``. With it the
    gradient is that of the optimum, whatever iterations led there: for the gradient G of the plan

    .. math:: \frac{\partial}{\partial sim_{mn}} = \frac1\varepsilon T_{mn}
              (G_{mn} - \alpha_m - \beta_n)

    with the alpha (0 in rows below their bound) and beta for which this has the sum 0 in every
    capped row and in every column: beta solves a system of N equations a problem, and alpha is a
    mean of G - beta over its row. It is as exact as the plan is converged. Where a row meets its
    bound without need the plan has two one-sided derivatives; a row within 2 tol of its bound is
    taken for capped, and the derivative is that of the side on which it stays so.

    Deterministic: yes, whatever the number of threads. Accumulates in float32; in float64 for
    float64. Memory: the plan, and a few times P N numbers a thread; the reference face some ten
    copies of ``sim``.

    Without ``info`` the host waits for the residuals, and names what was wrong. With it the Triton
    face never waits: a problem that has not converged is as far as it came, and one whose
    similarities were not finite is NaN, in its residual too. The other faces refuse it either way.

    The residual bounds the marginals, not the distance to the limit. The published iteration
    (``face("reference")``) is slow for small eps: at eps=.01 it takes hundreds of steps and stops
    10 to 20 residuals from its limit, more as mass nears 1. The C++ face, for N up to 16, finds
    the same limit by Newton steps, 3 to 10 for similarities as CLIP makes them: on two scalars for
    N of 1 or 2, for more on the shares of the columns, with the level of all of them found exactly
    at each. The Triton face, for N up to 16 and P up to 1024, takes the same steps on two scalars
    for N of 1 or 2 and the published ones for more, all in registers. Below about 1e-6 float32
    cannot tell residuals from rounding.

    Source: Li et al. 2024 (FedOTP), arXiv 2403.00041; partial transport by scaling: Benamou et al.
    2015, arXiv 1412.5154.
    """
    _check_tensor(_PLAN, "sim", sim)
    sizes = check_shapes(_PLAN, sim=(sim, "... P N"))
    if not sizes["P"] or not sizes["N"]:
        raise InputError(f"{_PLAN}: sim must have patches and prompts; got {tuple(sim.shape)}")
    _check_options(_PLAN, eps, mass, max_iter, tol)
    wide = (sim if plan_gradient else sim.detach()).to(_wide(sim))
    plan: Tensor
    plan, iterations, residual = _solve(
        wide, float(eps), float(mass), balanced or mass == 1, max_iter, float(tol), not info
    )
    if not info:
        return plan.to(sim.dtype)
    return plan.to(sim.dtype), Convergence(iterations, residual, _entropy(plan, mass, (-2, -1)))


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
    plan_gradient: bool = ...,
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
    plan_gradient: bool = ...,
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
    plan_gradient: bool = False,
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
    plan_gradient : bool
        Let gradients flow through the plans as well, as `transport_plan` says; FedOTP does not.
    info : bool
        Also return the `Convergence` of every pair of image and class, and then raise nothing where
        it was not reached; nothing is then read from a GPU (see Notes).

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
    d logit / d s = T; with ``plan_gradient`` it is T + T (s - alpha - beta) / eps, the derivative
    of the optimum (see `transport_plan`), except that the reference face differentiates its
    iterations. Deterministic: yes on CPU, whatever the number of threads of the plans.
    Computes in float32, in float64 where one of both has it; 16-bit features are widened piece by
    piece. Memory of the C++ face: some four pieces of 16 MiB, however many images, classes and
    clients there are; where a gradient is wanted, also all plans if they take less than 256 MiB.
    Above that the backward pass solves them again.

    The C++ face is that of `transport_plan`; the torch face takes any N and device with the
    published iteration. The Triton face forms similarities, plans and logits in one launch, and
    keeps 3 N + 1 numbers of each plan, from which the backward pass builds it again; both sum in a
    fixed order, and neither writes anything of the size of the plans.

    A step that must not wait for a GPU asks for ``info`` and looks at the numbers later::

        logits, ended = transport_logits(patches, prompts, tol=1e-3, info=True)
        worst = ended.worst(worst)  # None before the first step
        ...
        worst.check(1e-3)  # where the epoch's loss is read: raises what each step would have

    In between, pairs whose similarities were not finite have logits of NaN.

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
        *(balanced or mass == 1, max_iter, float(tol), plan_gradient, info),
    )
    face = choose("transport_logits", FACES["transport_logits"], *arguments)
    logits: Tensor
    logits, iterations, residual, entropy = face.run(*arguments)
    if info:
        return logits, Convergence(iterations, residual, entropy)
    if not bool((residual <= tol).all()):
        _check_products(patches, prompts, residual, float(eps))
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


def _refuse_unconverged(op: str, iterations: Tensor, residual: Tensor, tol: float) -> NoReturn:
    if bool(residual.isnan().any()):
        raise InputError(f"{op}: similarity / eps must be finite; got a residual of nan")
    over = int((residual > tol).sum())
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
    arguments = (sim, eps, mass, balanced, max_iter, tol)
    face = choose("transport_plan", FACES["transport_plan"], *arguments)
    plan, iterations, residual = face.run(*arguments)
    if strict and not bool((residual <= tol).all()):
        _check_similarities(sim, eps, _refuse_similarity)
        _refuse_unconverged(_PLAN, iterations, residual, tol)
    return plan, iterations, residual


@_solve.register_fake
def _(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(sim, memory_format=torch.contiguous_format),
        sim.new_empty(sim.shape[:-2], dtype=torch.int64),
        sim.new_empty(sim.shape[:-2]),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: _Solved) -> None:
    sim, ctx.eps, _, balanced, _, ctx.tol, _ = inputs
    ctx.bound = None if balanced else 1 / sim.shape[-2]
    ctx.save_for_backward(output[0])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, d_plan: Tensor, *__: Tensor) -> tuple[Tensor | None, ...]:
    (plan,) = ctx.saved_tensors
    pulled, *_ = pull_back(plan, d_plan, ctx.bound, ctx.tol)
    return pulled / ctx.eps, None, None, None, None, None, None


_solve.register_autograd(_differentiate, setup_context=_remember)


def pull_back(
    plan: Tensor, by: Tensor, bound: Tensor | float | None, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Project a gradient of a plan on what the plan can do: plan * (by - alpha - beta).

    Parameters
    ----------
    plan, by : Tensor, shape (..., P, N)
        An optimal plan, and the gradient of something in it.
    bound : Tensor of shape (..., P), float or None
        What the rows hold at most; None where they are all held to their sums.
    tol : float
        Rows within a factor 1 - 2 tol of their bound are held too.

    Returns
    -------
    projected, alpha, beta : Tensor of shapes (..., P, N), (..., P, 1), (..., 1, N)
        Sums of the first vanish in every held row and every column. Alpha, 0 where a row is not
        held, and beta are the gradients of the sums of rows and columns; where all rows are held
        they are known up to a constant that goes from one to the other.
    """
    rows = plan.sum(-1, keepdim=True)
    if bound is None:
        held = torch.ones_like(rows, dtype=torch.bool)
    else:
        least = 1 - 2 * tol - 8 * torch.finfo(plan.dtype).eps
        limit = bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound
        held = rows >= least * limit
    share = plan / rows.clamp_min(torch.finfo(plan.dtype).tiny)
    of_held, free = plan * held, plan * ~held
    # what is left of by when held rows have been centred; free rows share one constant, the level
    centred = by - torch.where(held, (share * by).sum(-1, keepdim=True), 0)
    loose = free.sum(-2).double()  # (..., N)
    level = (free * by).sum((-2, -1)).double()
    total = loose.sum(-1)
    one = torch.where(total > 0, total, 1)
    right = (plan * centred).sum(-2).double() - loose * (level / one).unsqueeze(-1)
    # the Laplacian of a graph on the columns, by its edges: nothing cancels
    edge = (of_held.mT @ share).double() + loose.unsqueeze(-1) * (
        loose / one.unsqueeze(-1)
    ).unsqueeze(-2)
    size = plan.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device=plan.device)
    edge = edge * (1 - eye)
    degree = edge.sum(-1)
    most = degree.amax(-1)[..., None, None]
    scale = torch.where(most > 0, most, 1)  # no edge at all, as with one column: beta is the level
    # of the constants that do not matter take none; columns that share no row are left alone
    system = torch.diag_embed(degree) - edge + scale * (1 / size + 1e-14 * eye)
    beta = torch.linalg.solve(system, right.unsqueeze(-1)).mT  # (..., 1, N)
    shift = (level - (loose * beta.squeeze(-2)).sum(-1)) / one
    beta = (beta + shift[..., None, None]).to(plan.dtype)
    alpha = torch.where(held, (share * (by - beta)).sum(-1, keepdim=True), 0)
    return plan * (by - alpha - beta), alpha, beta


def _entropy(plan: Tensor, mass: float, places: tuple[int, int]) -> Tensor:
    """Measure how even plans are that lie along two dimensions."""
    count = plan.shape[places[0]] * plan.shape[places[1]]
    entropy = torch.special.entr(plan.detach() / mass).sum(places)
    return entropy / math.log(count) if count > 1 else torch.ones_like(entropy)


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
    """Name the patch and the prompt of such a value in a piece (u, b, P, c, N) at ``corner``."""
    u, b, m, c, n = (int(i) for i in torch.unravel_index(torch.tensor(first), sim.shape))
    value = float(sim[u, b, m, c, n])
    client = tuple(int(i) for i in torch.unravel_index(torch.tensor(u + corner[0]), lead or (1,)))
    client = client if lead else ()
    raise InputError(
        f"{_LOGITS}: similarity / eps must be finite; got {value!r} of patch "
        f"{(*client, b + corner[1], m)} and prompt {(*client, c + corner[2], n)} with eps={eps:g}"
    )


def _check_similarities(sim: Tensor, eps: float, refuse: _Refuse) -> None:
    good = (sim * (4 / eps)).isfinite()
    if not bool(good.all()):
        refuse(sim, eps, int((~good).flatten().nonzero()[0]))


def _check_products(patches: Tensor, prompts: Tensor, residual: Tensor, eps: float) -> None:
    """Form the similarities of the first problem whose residual is NaN, and refuse them."""
    lead, bad = tuple(patches.shape[:-3]), residual.isnan().reshape(-1, *residual.shape[-2:])
    if bool(bad.any()):
        u, b, c = (int(i) for i in bad.nonzero()[0])
        wide = _wide(patches, prompts)
        x = patches.detach().reshape(-1, *patches.shape[-3:])[u, b].to(wide)
        t = prompts.detach().reshape(-1, *prompts.shape[-3:])[u, c].to(wide)
        refuse = functools.partial(_refuse_product, lead, (u, b, c))
        _check_similarities((x @ t.mT)[None, None, :, None], eps, refuse)


def _reference(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float
) -> _Solved:
    _check_similarities(sim, eps, _refuse_similarity)
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
        _refuse_similarity(sim, eps, first_bad)
    return plan, iterations, residual


def _triton(sim: Tensor, *options: Any) -> _Solved:
    from fastfpl.kernels.transport import transport_plan_fwd

    flat = sim.resolve_neg().reshape(-1, *sim.shape[-2:])
    plan, iterations, residual = transport_plan_fwd(flat, *options)
    lead = sim.shape[:-2]
    return plan.view(sim.shape), iterations.view(lead), residual.view(lead)


def _against_triton(sim: Tensor, *_: object) -> list[str]:
    return launch.against("transport_plan", sim=sim) + _beyond_kernels(*sim.shape[-2:])


def _against_triton_logits(patches: Tensor, prompts: Tensor, *options: Any) -> list[str]:
    reasons = launch.against("transport_logits", patches=patches)
    reasons += _beyond_kernels(patches.shape[-2], prompts.shape[-2])
    *_, plan_gradient, _ = options
    return [*reasons, "gradients through the plan: cpu, torch faces"] if plan_gradient else reasons


def _beyond_kernels(n_patches: int, n_prompts: int) -> list[str]:
    from fastfpl.kernels.transport import MOST_PATCHES, MOST_PROMPTS

    reasons = []
    if n_patches > MOST_PATCHES:
        reasons.append(f"P = {n_patches} patches, at most {MOST_PATCHES}")
    if n_prompts > MOST_PROMPTS:
        reasons.append(f"N = {n_prompts} prompts, at most {MOST_PROMPTS}")
    return reasons


def _against_cpu(sim: Tensor, *_: object) -> list[str]:
    return against_cpu("sim", sim, sim.shape[-1])


def _against_cpu_logits(patches: Tensor, prompts: Tensor, *_: object) -> list[str]:
    return against_cpu("patches", patches, prompts.shape[-2])


def against_cpu(name: str, tensor: Tensor, n_prompts: int) -> list[str]:
    """Say why the compiled solver does not take a tensor with so many prompts."""
    reasons = []
    if tensor.device.type != "cpu":
        reasons.append(f"{name} is on {tensor.device}, not on the CPU")
    most = native.load("transport_plan").most_prompts
    if n_prompts > most:
        reasons.append(f"N = {n_prompts} prompts, at most {most}")
    return reasons


def _reference_logits(
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    plan_gradient: bool,
    measure: bool,
) -> _Scored:
    wide = _wide(patches, prompts)
    x, t = patches.to(wide), prompts.to(wide)
    with torch.no_grad():
        sim = reference.similarities(x, t)
        sim = sim.reshape(math.prod(patches.shape[:-3]), *_shape(patches, prompts)).transpose(2, 3)
    _check_similarities(sim, eps, functools.partial(_refuse_product, patches.shape[:-3], (0, 0, 0)))
    logits, plan, iterations, residual = reference.transport_logits(
        x, t, eps, mass, balanced, max_iter, tol, plan_gradient
    )
    entropy = _entropy(plan, mass, (-2, -1)) if measure else None
    logits = logits.to(torch.promote_types(patches.dtype, prompts.dtype))
    return logits, iterations, residual, entropy


def _shape(patches: Tensor, prompts: Tensor) -> tuple[int, int, int, int]:
    return patches.shape[-3], prompts.shape[-3], patches.shape[-2], prompts.shape[-2]


class _Problem(NamedTuple):
    """What the problems of all pieces share, in the order of the ops' arguments."""

    eps: float
    mass: float
    balanced: bool
    max_iter: int
    tol: float


class _Engine(NamedTuple):
    """How a face solves a piece of similarities (u, b, P, c, N), and how it weighs the plans.

    ``score(sim, problem, refuse)`` may overwrite ``sim``; it returns plans in its layout, their
    logits (u, b, c), iterations and residuals. ``weigh(plan, by)`` multiplies with by (u, b, c).
    """

    score: Callable[[Tensor, _Problem, _Refuse], tuple[Tensor, Tensor, Tensor, Tensor]]
    weigh: Callable[[Tensor, Tensor], Tensor]


def _score_cpu(
    sim: Tensor, problem: _Problem, refuse: _Refuse
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = sim.new_empty(*sim.shape[:2], sim.shape[3])
    iterations, residual = torch.empty_like(logits, dtype=torch.int64), torch.empty_like(logits)
    first_bad = native.load("transport_plan").transport_plan(
        *(sim, sim, iterations, residual, *problem, torch.get_num_threads()),
        logits=logits,
        classes=sim.shape[3],
    )
    if first_bad >= 0:
        refuse(sim, problem.eps, first_bad)
    return sim, logits, iterations, residual


def _weigh_cpu(plan: Tensor, by: Tensor) -> Tensor:
    out = torch.empty_like(plan)
    native.load("weigh_plan").weigh_plan(plan, by.contiguous(), out, torch.get_num_threads())
    return out


def _score_torch(
    sim: Tensor, problem: _Problem, refuse: _Refuse
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_similarities(sim, problem.eps, refuse)
    plan, iterations, residual = reference.transport_plan(
        sim.transpose(2, 3).contiguous(), *problem
    )
    plan = plan.transpose(2, 3)
    return plan, sim.mul_(plan).sum((2, 4)), iterations, residual


def _weigh_torch(plan: Tensor, by: Tensor) -> Tensor:
    out = torch.empty_like(plan, memory_format=torch.contiguous_format)
    return torch.mul(plan, by[:, :, None, :, None], out=out)


_CPU, _TORCH = _Engine(_score_cpu, _weigh_cpu), _Engine(_score_torch, _weigh_torch)


def _pieced(
    engine: _Engine,
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    plan_gradient: bool,
    measure: bool,
) -> _Scored:
    """Form similarities, plans and logits piece by piece."""
    lead = patches.shape[:-3]
    clients = math.prod(lead)
    x = patches.reshape(clients, *patches.shape[-3:])
    t = prompts.reshape(clients, *prompts.shape[-3:])
    plans = clients * math.prod(_shape(x, t))
    wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
    work = _Work(engine, _Problem(eps, mass, balanced, max_iter, tol), tuple(lead), plan_gradient)
    logits, iterations, residual, entropy = _Logits.apply(
        x, t, work, wanted and plans <= _KEPT, measure
    )
    shape = (*lead, x.shape[1], t.shape[1])
    ended = (iterations.reshape(shape), residual.reshape(shape))
    return logits.reshape(shape), *ended, None if entropy is None else entropy.reshape(shape)


class _Work(NamedTuple):
    """What forward and backward do with a piece."""

    engine: _Engine
    problem: _Problem
    lead: tuple[int, ...]
    plan_gradient: bool

    def score(
        self, x: Tensor, t: Tensor, corner: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return d logit / d sim, the plan, and logits, iterations and residual."""
        sim = _similarities(x, t)
        refuse = functools.partial(_refuse_product, self.lead, corner)
        given = sim.clone() if self.plan_gradient else sim
        plan, logits, iterations, residual = self.engine.score(given, self.problem, refuse)
        if not self.plan_gradient:
            return plan, plan, logits, iterations, residual
        bound = None if self.problem.balanced else 1 / x.shape[2]
        pulled, *_ = pull_back(plan.transpose(2, 3), sim.transpose(2, 3), bound, self.problem.tol)
        slope = plan + pulled.transpose(2, 3) / self.problem.eps
        return slope, plan, logits, iterations, residual


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
    """Multiply (u, b, P, D) and (u, c, N, D), one GEMM a client -> (u, b, P, c, N), as it comes."""
    flat = x.flatten(1, 2) @ t.flatten(1, 2).mT
    return flat.view(*x.shape[:3], *t.shape[1:3])


class _Logits(torch.autograd.Function):
    """Sums of plan * sim; d logit / d sim is formed with them, and kept or formed again."""

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, prompts: Tensor, work: _Work, keep: bool, measure: bool
    ) -> _Scored:
        shape = (patches.shape[0], patches.shape[1], prompts.shape[1])
        wide = _wide(patches, prompts)
        logits = patches.new_empty(shape, dtype=torch.promote_types(patches.dtype, prompts.dtype))
        iterations = patches.new_empty(shape, dtype=torch.int64)
        residual = patches.new_empty(shape, dtype=wide)
        entropy = patches.new_empty(shape, dtype=wide) if measure else None
        slopes = []
        for u, b, c in _pieces(patches, prompts):
            x, t = patches[u, b].to(wide), prompts[u, c].to(wide)
            slope, plan, logits[u, b, c], iterations[u, b, c], residual[u, b, c] = work.score(
                x, t, (u.start, b.start, c.start)
            )
            if entropy is not None:
                entropy[u, b, c] = _entropy(plan, work.problem.mass, (2, 4))
            if keep:
                slopes.append(slope)
        ctx.save_for_backward(patches, prompts, *slopes)
        ctx.work = work
        ended = (iterations, residual) if entropy is None else (iterations, residual, entropy)
        ctx.mark_non_differentiable(*ended)
        return logits, iterations, residual, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        patches, prompts, *slopes = ctx.saved_tensors
        wide = _wide(patches, prompts)
        of_patches, of_prompts = ctx.needs_input_grad[:2]
        d_patches = _zeros(patches, prompts, wide) if of_patches else None
        d_prompts = _zeros(prompts, patches, wide) if of_prompts else None
        for i, (u, b, c) in enumerate(_pieces(patches, prompts)):
            x, t = patches[u, b].to(wide), prompts[u, c].to(wide)
            if slopes:
                slope = slopes[i]
            else:
                slope, *_ = ctx.work.score(x, t, (u.start, b.start, c.start))
            weight = ctx.work.engine.weigh(slope, d_logits[u, b, c].to(wide))
            weight = weight.view(len(x), x.shape[1] * x.shape[2], -1)
            if d_patches is not None:
                _multiply(weight, t, d_patches[u, b], first=c.start == 0)
            if d_prompts is not None:
                _multiply(weight.mT, x, d_prompts[u, c], first=b.start == 0)
        return (
            None if d_patches is None else d_patches.to(patches.dtype),
            None if d_prompts is None else d_prompts.to(prompts.dtype),
            *(None, None, None),
        )


def _triton_logits(
    patches: Tensor,
    prompts: Tensor,
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    _plan_gradient: bool,
    measure: bool,
) -> _Scored:
    """Score in one launch, all clients together."""
    lead = patches.shape[:-3]
    clients = math.prod(lead)
    x = patches.resolve_neg().reshape(clients, *patches.shape[-3:])
    t = prompts.resolve_neg().reshape(clients, *prompts.shape[-3:])
    wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
    logits, iterations, residual, entropy = _Triton.apply(
        x, t, _Problem(eps, mass, balanced, max_iter, tol), wanted, measure
    )
    shape = (*lead, x.shape[1], t.shape[1])
    ended = (iterations.view(shape), residual.view(shape))
    return logits.view(shape), *ended, None if entropy is None else entropy.view(shape)


class _Triton(torch.autograd.Function):
    """The kernels; of each plan the few numbers that determine it are kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, prompts: Tensor, problem: _Problem, keep: bool, measure: bool
    ) -> _Scored:
        from fastfpl.kernels.transport import transport_logits_fwd

        logits, iterations, residual, entropy, state = transport_logits_fwd(
            patches, prompts, *problem, keep=keep, measure=measure
        )
        if state is not None:
            ctx.save_for_backward(patches, prompts, state)
        ctx.problem = problem
        ended = (iterations, residual) if entropy is None else (iterations, residual, entropy)
        ctx.mark_non_differentiable(*ended)
        logits = logits.to(torch.promote_types(patches.dtype, prompts.dtype))
        return logits, iterations, residual, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        from fastfpl.kernels.transport import transport_logits_bwd

        of_patches, of_prompts = ctx.needs_input_grad[:2]
        gradients = transport_logits_bwd(
            d_logits.contiguous(),
            *ctx.saved_tensors,
            ctx.problem.eps,
            ctx.problem.balanced,
            of_patches=of_patches,
            of_prompts=of_prompts,
        )
        return *gradients, None, None, None


def _zeros(like: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Make room for a gradient; where there are pieces each of its parts is written before read."""
    make = torch.empty if like.numel() and others.numel() else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def _multiply(weight: Tensor, features: Tensor, out: Tensor, *, first: bool) -> None:
    """Write (u, rows, k) @ (u, x, y, D), flattened to (u, k, D), into ``out``, or add it."""
    flat = features.flatten(1, 2)
    place = out.view(len(out), out.shape[1] * out.shape[2], out.shape[3])
    if first:
        torch.bmm(weight, flat, out=place)
    else:
        place.baddbmm_(weight, flat)


#: The faces of this file's ops, best first.
FACES: dict[str, tuple[Face, ...]] = {
    "transport_plan": (
        Face("triton", _triton, launch.missing, _against_triton),
        Face("cpu", _cpu, functools.partial(native.missing, "transport_plan"), _against_cpu),
        Face("reference", _reference, waits=True),
    ),
    "transport_logits": (
        Face("triton", _triton_logits, launch.missing, _against_triton_logits),
        Face(
            "cpu",
            functools.partial(_pieced, _CPU),
            functools.partial(native.missing, "weigh_plan"),
            _against_cpu_logits,
        ),
        Face("torch", functools.partial(_pieced, _TORCH), waits=True),
        Face("reference", _reference_logits, waits=True),
    ),
}
