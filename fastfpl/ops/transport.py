"""Entropic transport between image patches and prompts."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError
from fastfpl.ops import launch, native
from fastfpl.ops.faces import Face, choose, face_or_any, forced, in_transform, transformed
from fastfpl.ops.functional import Recipe, check_graph, in_front, once, transformed_call
from fastfpl.ops.operators import define
from fastfpl.ops.precision import as_given
from fastfpl.ops.transport_checks import (
    INSTEAD,
    LOGITS,
    PLAN,
    check_options,
    check_products,
    check_similarities,
    check_tensor,
    entropy_of,
    refuse_nested,
    refuse_product,
    refuse_similarity,
    refuse_unconverged,
    refuse_vmap,
    vmapped,
    wide_of,
)
from fastfpl.ops.transport_gradient import pull_back
from fastfpl.ops.transport_pieces import (
    CPU,
    TORCH,
    Corner,
    Problem,
    Scored,
    are_kept,
    multiplied,
    pieced,
    pieces,
    weigh_torch,
)
from fastfpl.reference import transport as reference
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "Convergence", "transport_logits", "transport_plan"]

_Solved = tuple[Tensor, Tensor, Tensor]  # plan, iterations, residual


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

    def check(self, tol: float, op: str = LOGITS) -> None:
        """Raise where a problem ended above ``tol``; the only method that reads the numbers.

        Raises
        ------
        NotConverged
            With how many problems ended above, the most iterations and the largest residual.
        InputError
            If a residual is NaN: a similarity / eps was not finite.
        """
        if not bool((self.residual <= tol).all()):
            refuse_unconverged(op, self.iterations, self.residual, tol)


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
    Differentiable in: sim, only with ``plan_gradient``, backward and forward, under ``torch.func``
    too. Without it the plan is returned detached, a constant as in FedOTP, so that
    ``(plan * sim).sum()`` has the gradient ``plan``. With it the gradient is that of the optimum,
    whatever iterations led there: for the gradient G of the plan

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
    at each. There it may take some hundreds where columns fill whole rows: cosines of all of
    [-1, 1] at eps=.005. The Triton face, for N up to 16 and P up to 1024, takes the same steps on
    two scalars for N of 1 or 2 and the published ones for more, all in registers. Below about 1e-6
    float32 cannot tell residuals from rounding.

    Source: Li et al. 2024 (FedOTP), arXiv 2403.00041; partial transport by scaling: Benamou et al.
    2015, arXiv 1412.5154.
    """
    check_tensor(PLAN, "sim", sim)
    sizes = check_shapes(PLAN, sim=(sim, "... P N"))
    if not sizes["P"] or not sizes["N"]:
        raise InputError(f"{PLAN}: sim must have patches and prompts; got {tuple(sim.shape)}")
    check_options(PLAN, eps, mass, max_iter, tol)
    refuse_nested(PLAN)
    wide = (sim if plan_gradient else sim.detach()).to(wide_of(sim))
    plan: Tensor
    # torch.compile takes no Function with a forward mode
    solve = _solve if torch.compiler.is_compiling() else _Plan.apply
    plan, iterations, residual = solve(
        wide, float(eps), float(mass), balanced or mass == 1, max_iter, float(tol), not info
    )
    if not info:
        return plan.to(sim.dtype)
    return plan.to(sim.dtype), Convergence(iterations, residual, entropy_of(plan, mass, (-2, -1)))


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
    Differentiable in: patches, prompts, once, backward, under ``torch.func`` and ``torch.compile``
    too; forward mode, and ``torch.func.grad`` of a gradient, go to ``face("reference")``. The plan
    is a constant as in FedOTP, so that d logit / d s = T; with ``plan_gradient`` it is
    T + T (s - alpha - beta) / eps, the derivative of the optimum (see `transport_plan`), except
    that the reference face differentiates
    its iterations. Deterministic: yes on CPU, whatever the number of threads of the plans.
    Computes in float32, in float64 where one of both has it; 16-bit features are widened piece by
    piece, and autocast is not asked. Memory of the C++ face: some four pieces of 16 MiB, however
    many images, classes and clients there are; where a gradient is wanted, also all plans if they
    take less than 256 MiB. Above that the backward pass solves them again.

    The C++ face is that of `transport_plan`; the torch face takes any N and device with the
    published iteration. The Triton face forms similarities, plans and logits in one launch. Where a
    gradient is wanted it keeps plans as the C++ face does, and multiplies them, weighed, in the
    vendor's batched products; without one it writes nothing of their size.

    A step that must not wait for a GPU asks for ``info`` and looks at the numbers later::

        logits, ended = transport_logits(patches, prompts, tol=1e-3, info=True)
        worst = ended.worst(worst)  # None before the first step
        ...
        worst.check(1e-3)  # where the epoch's loss is read: raises what each step would have

    In between, pairs whose similarities were not finite have logits of NaN.

    Source: Li et al. 2024 (FedOTP), arXiv 2403.00041; Chen et al. 2023 (PLOT), arXiv 2210.01253.
    """
    if torch.compiler.is_compiling():
        check_graph("transport_logits")
        problem = (float(eps), float(mass), balanced, max_iter, float(tol), plan_gradient)
        found = _operator([patches, prompts], *problem, info, forced("transport_logits") or "")
        return (found[0], Convergence(*found[1:])) if info else found[0]
    check_tensor(LOGITS, "patches", patches)
    check_tensor(LOGITS, "prompts", prompts)
    sizes = check_shapes(LOGITS, patches=(patches, "... B P D"), prompts=(prompts, "... C N D"))
    if prompts.device != patches.device:
        raise KindError(
            f"{LOGITS}: prompts must be on {patches.device} as patches are; got {prompts.device}"
        )
    if patches.shape[:-3] != prompts.shape[:-3]:
        raise InputError(
            f"{LOGITS}: prompts must have the leading dimensions {tuple(patches.shape[:-3])} of "
            f"patches; got {tuple(prompts.shape[:-3])}"
        )
    if not sizes["P"]:
        raise InputError(f"{LOGITS}: patches must have at least one patch an image; got P=0")
    if not sizes["N"]:
        raise InputError(f"{LOGITS}: prompts must have at least one prompt a class; got N=0")
    check_options(LOGITS, eps, mass, max_iter, tol)
    arguments = (
        *(patches, prompts, float(eps), float(mass)),
        *(balanced or mass == 1, max_iter, float(tol), plan_gradient, info),
    )
    if transformed(patches, prompts):
        refuse_vmap(LOGITS, patches, prompts)
    face = choose("transport_logits", FACES["transport_logits"], *arguments)
    if in_transform() and (face.name != "reference" or vmapped(patches, prompts)):
        found = transformed_call(_RECIPE, [patches, prompts], *arguments[2:], face.name)
        return (found[0], Convergence(*found[1:])) if info else found[0]
    logits: Tensor
    with as_given(patches.device):
        logits, iterations, residual, entropy = face.run(*arguments)
    if info:
        return logits, Convergence(iterations, residual, entropy)
    if not bool((residual <= tol).all()):
        check_products(patches, prompts, residual, float(eps))
        refuse_unconverged(LOGITS, iterations, residual, tol)
    return logits


# --- torch.compile and torch.func -----------------------------------------------------------------


def _called(
    tensors: list[Tensor],
    eps: float,
    mass: float,
    balanced: bool,
    max_iter: int,
    tol: float,
    plan_gradient: bool,
    info: bool,
    name: str,
) -> list[Tensor]:
    options: dict[str, Any] = {"eps": eps, "mass": mass, "balanced": balanced, "tol": tol}
    options |= {"max_iter": max_iter, "plan_gradient": plan_gradient}
    with face_or_any(name, "transport_logits"):
        if not info:
            return [transport_logits(*tensors, **options)]
        logits, ended = transport_logits(*tensors, **options, info=True)
    return [logits, *ended]


def _shaped(tensors: list[Tensor], *statics: Any) -> list[Tensor]:
    patches, prompts = tensors
    *_, info, _ = statics
    shape = (*patches.shape[:-2], prompts.shape[-3])
    dtypes = [torch.promote_types(patches.dtype, prompts.dtype)]
    if info:
        dtypes += [torch.int64, *(wide_of(patches, prompts),) * 2]
    return [patches.new_empty(shape, dtype=dtype) for dtype in dtypes]


def _batched(
    size: int, tensors: list[Tensor], dims: list[int | None], *_: Any
) -> list[Tensor] | None:
    return [in_front(size, x, d) for x, d in zip(tensors, dims, strict=True)]


_RECIPE = Recipe(
    name="transport_logits",
    schema="float eps, float mass, bool balanced, int max_iter, float tol, bool plan_gradient, "
    "bool info, str face",
    run=_called,
    fake=_shaped,
    batched=_batched,
    instead=INSTEAD,
)
_operator = define(_RECIPE)


# opaque to torch.compile: faces, threads and refusals happen when it runs, not when it is traced
@torch.library.custom_op("fastfpl::transport_plan", mutates_args=())
def _solve(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (sim, eps, mass, balanced, max_iter, tol)
    face = choose("transport_plan", FACES["transport_plan"], *arguments)
    plan, iterations, residual = face.run(*arguments)
    if strict and not bool((residual <= tol).all()):
        check_similarities(sim, eps, refuse_similarity)
        refuse_unconverged(PLAN, iterations, residual, tol)
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


@_solve.register_vmap
def _(
    info: Any, dims: tuple[int | None, ...], sim: Tensor, *options: Any
) -> tuple[_Solved, tuple[int, int, int]]:
    return _solve(sim.movedim(dims[0] or 0, 0), *options), (0, 0, 0)


class _Plan(torch.autograd.Function):
    """A plan whose derivatives are those of the optimum: one projection, its own transpose."""

    @staticmethod
    def forward(
        sim: Tensor,
        eps: float,
        mass: float,
        balanced: bool,
        max_iter: int,
        tol: float,
        strict: bool,
    ) -> _Solved:
        found: _Solved = _solve(sim, eps, mass, balanced, max_iter, tol, strict)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Solved) -> None:
        sim, ctx.eps, _, balanced, _, ctx.tol, _ = inputs
        ctx.bound = None if balanced else 1 / sim.shape[-2]
        ctx.save_for_backward(output[0])
        ctx.save_for_forward(output[0])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, d_plan: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _project(ctx, d_plan), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, d_sim: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return _project(ctx, d_sim), None, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], sim: Tensor, *options: Any
    ) -> tuple[_Solved, tuple[int, ...]]:
        return _Plan.apply(sim.movedim(dims[0] or 0, 0), *options), (0, 0, 0)


_solve.register_autograd(_Plan.backward, setup_context=_Plan.setup_context)


def _project(ctx: Any, by: Tensor) -> Tensor:
    (plan,) = ctx.saved_tensors
    with as_given(plan.device):
        pulled, *_ = pull_back(plan, by, ctx.bound, ctx.tol)
    projected: Tensor = pulled / ctx.eps
    return projected


def _reference(
    sim: Tensor, eps: float, mass: float, balanced: bool, max_iter: int, tol: float
) -> _Solved:
    check_similarities(sim, eps, refuse_similarity)
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
        refuse_similarity(sim, eps, first_bad)
    return plan, iterations, residual


def _triton(sim: Tensor, *options: Any) -> _Solved:
    from fastfpl.kernels.transport import transport_plan_fwd

    flat = sim.resolve_neg().reshape(-1, *sim.shape[-2:])
    plan, iterations, residual = transport_plan_fwd(flat, *options)
    lead = sim.shape[:-2]
    return plan.view(sim.shape), iterations.view(lead), residual.view(lead)


def _against_triton(sim: Tensor, *_: object) -> list[str]:
    return launch.against("transport_plan", sim=sim) + _beyond_kernels(*sim.shape[-2:], sim)


def _against_triton_logits(patches: Tensor, prompts: Tensor, *options: Any) -> list[str]:
    from fastfpl.kernels.launching import power
    from fastfpl.kernels.transport import MOST_ENTRIES_SINGLE, MOST_PATCHES_DOUBLE
    from fastfpl.kernels.transport_launch import wide_of

    n_patches, n_prompts = patches.shape[-2], prompts.shape[-2]
    reasons = launch.against("transport_logits", patches=patches)
    reasons += _beyond_kernels(n_patches, n_prompts, patches, prompts)
    entries = power(n_patches) * power(n_prompts)
    single = torch.promote_types(patches.dtype, prompts.dtype) == torch.float32
    if not reasons and single and entries > MOST_ENTRIES_SINGLE:
        reasons.append(_too_many(n_patches, n_prompts, "float32", entries, MOST_ENTRIES_SINGLE))
    if wide_of(patches, prompts) == torch.float64 and n_patches > MOST_PATCHES_DOUBLE:
        reasons.append(f"P = {n_patches} patches in float64, at most {MOST_PATCHES_DOUBLE}")
    *_, plan_gradient, _ = options
    return [*reasons, "gradients through the plan: cpu, torch faces"] if plan_gradient else reasons


def _beyond_kernels(n_patches: int, n_prompts: int, *tensors: Tensor) -> list[str]:
    from fastfpl.kernels.launching import power
    from fastfpl.kernels.transport import MOST_ENTRIES_DOUBLE, MOST_PATCHES, MOST_PROMPTS
    from fastfpl.kernels.transport_launch import wide_of

    reasons = []
    if n_patches > MOST_PATCHES:
        reasons.append(f"P = {n_patches} patches, at most {MOST_PATCHES}")
    if n_prompts > MOST_PROMPTS:
        reasons.append(f"N = {n_prompts} prompts, at most {MOST_PROMPTS}")
    entries = power(n_patches) * power(n_prompts)
    if not reasons and wide_of(*tensors) == torch.float64 and entries > MOST_ENTRIES_DOUBLE:
        reasons.append(_too_many(n_patches, n_prompts, "float64", entries, MOST_ENTRIES_DOUBLE))
    return reasons


def _too_many(n_patches: int, n_prompts: int, kind: str, entries: int, most: int) -> str:
    return (
        f"P = {n_patches} patches and N = {n_prompts} prompts in {kind}: {entries} entries "
        f"where both are rounded up to powers of two, at most {most}"
    )


def _against_torch_logits(*arguments: Any) -> list[str]:
    seen_by = transformed(*arguments)
    return [f"{seen_by} cannot look into it: its gradient is backward only"] if seen_by else []


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
) -> Scored:
    wide = wide_of(patches, prompts)
    x, t = patches.to(wide), prompts.to(wide)
    with torch.no_grad():
        sim = reference.similarities(x, t)
        sim = sim.reshape(math.prod(sim.shape[:-4]), *sim.shape[-4:]).transpose(2, 3)
    check_similarities(sim, eps, functools.partial(refuse_product, patches.shape[:-3], (0, 0, 0)))
    logits, plan, iterations, residual = reference.transport_logits(
        x, t, eps, mass, balanced, max_iter, tol, plan_gradient
    )
    entropy = entropy_of(plan, mass, (-2, -1)) if measure else None
    logits = logits.to(torch.promote_types(patches.dtype, prompts.dtype))
    return logits, iterations, residual, entropy


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
) -> Scored:
    """Score in one launch, all clients together."""
    lead = patches.shape[:-3]
    clients = math.prod(lead)
    x = patches.resolve_neg().reshape(clients, *patches.shape[-3:])
    t = prompts.resolve_neg().reshape(clients, *prompts.shape[-3:])
    wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
    logits, iterations, residual, entropy = _Triton.apply(
        x, t, Problem(eps, mass, balanced, max_iter, tol), wanted, measure
    )
    shape = (*lead, x.shape[1], t.shape[1])
    ended = (iterations.view(shape), residual.view(shape))
    return logits.view(shape), *ended, None if entropy is None else entropy.view(shape)


class _Triton(torch.autograd.Function):
    """The kernel forward; back the plans, weighed, in the vendor's products.

    Where plans are too many to be kept, their problems are solved again, piece by piece.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, prompts: Tensor, problem: Problem, keep: bool, measure: bool
    ) -> Scored:
        from fastfpl.kernels.transport import transport_logits_fwd

        entries = math.prod((*patches.shape[:3], *prompts.shape[1:3]))
        logits, iterations, residual, entropy, plans = transport_logits_fwd(
            patches, prompts, *problem, keep=keep and are_kept(entries), measure=measure
        )
        if keep:
            ctx.save_for_backward(patches, prompts, plans)
        ctx.problem = problem
        ended = (iterations, residual) if entropy is None else (iterations, residual, entropy)
        ctx.mark_non_differentiable(*ended)
        logits = logits.to(torch.promote_types(patches.dtype, prompts.dtype))
        return logits, iterations, residual, entropy

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        from fastfpl.kernels.transport import transport_logits_fwd

        patches, prompts, plans = ctx.saved_tensors

        def weights() -> Iterator[tuple[Corner, Tensor]]:
            if plans is not None:
                yield (slice(None),) * 3, weigh_torch(plans, d_logits)
                return
            for u, b, c in pieces(patches, prompts):
                *_, part = transport_logits_fwd(
                    *(patches[u, b], prompts[u, c], *ctx.problem), keep=True, measure=False
                )
                assert part is not None
                yield (u, b, c), weigh_torch(part, d_logits[u, b, c])

        gradients = multiplied(patches, prompts, weights(), *ctx.needs_input_grad[:2])
        given = (d_logits, patches, prompts)
        return *once("transport_logits", INSTEAD, gradients, *given), None, None, None


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
            functools.partial(pieced, CPU),
            functools.partial(native.missing, "weigh_plan"),
            _against_cpu_logits,
        ),
        Face("torch", functools.partial(pieced, TORCH), against=_against_torch_logits, waits=True),
        Face("reference", _reference_logits, waits=True),
    ),
}
