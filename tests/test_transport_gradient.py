"""Gradients through the plan: against autograd through every step, and exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from torch.autograd import forward_ad

import fastfpl
from fastfpl.errors import NotSupported
from fastfpl.ops import launch, transport_logits, transport_plan
from fastfpl.ops.faces import recorded_faces
from fastfpl.ops.transport_gradient import pull_back
from fastfpl.reference import transport as reference
from tests.test_transport import FACES, NATIVE, similar, solved
from tests.test_transport_logits import (
    BOTH,
    LOGIT_FACES,
    features,
    scored,
    weights_of,
    with_gradients,
)

TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here"),
        # where a GPU computes an infinity in silence, numpy says so
        pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
        pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    ],
)
PLAN_FACES = [*FACES, TRITON]


def slack_of(plan, balanced):
    """How far the rows are from their bound, which must be clear for a derivative."""
    slack = (plan.sum(-1) * plan.shape[-2] - 1).abs()
    if not balanced:
        assert ((slack < 1e-8) | (slack > 1e-4)).all()
        assert 0 < (slack < 1e-8).double().mean() < 1, "rows that are capped, and others"


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("balanced", [False, True], ids=["capped", "balanced"])
def test_gradients_through_the_plan(face, prompts, balanced):
    sim = similar(2, 7, prompts, spread=0.1).requires_grad_()
    options = {"eps": 0.1, "mass": 0.8, "balanced": balanced, "tol": 1e-13, "max_iter": 10**5}

    def run(sim):
        return solved(face, sim, plan_gradient=True, **options)

    plan = run(sim)
    slack_of(plan.detach(), balanced)
    assert torch.autograd.gradcheck(run, sim)
    assert torch.autograd.gradgradcheck(run, sim)
    # the truth again: autograd through every step of the published iteration
    unrolled = reference.transport_plan(sim, 0.1, 0.8, balanced, 10**4, 1e-14)[0]
    weight = weights_of(plan)
    (exact,) = torch.autograd.grad((unrolled * weight).sum(), sim)
    (mine,) = torch.autograd.grad((plan * weight).sum(), sim)
    torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-10)
    # by the formula of the docstring: the parts that are added change no sum that is held
    assert mine.sum((-2, -1)).abs().max() < 1e-10
    assert (mine.sum(-2)).abs().max() < 1e-10


@pytest.mark.parametrize("face", LOGIT_FACES)
@BOTH
def test_gradients_of_logits_through_the_plan(face, balanced):
    pair = [x.requires_grad_() for x in features(2, 7, 2, 3, 4, (2,), spread=0.3)]
    options = {"eps": 0.1, "balanced": balanced, "tol": 1e-13, "max_iter": 10**5}

    def run(patches, prompts):
        return scored(face, patches, prompts, plan_gradient=True, **options)

    # the truth is autograd's own, and takes minutes for every direction one by one
    assert torch.autograd.gradcheck(run, pair, fast_mode=face == "reference")
    without = with_gradients(face, *pair, **options)
    # and it is another gradient than with the plan held
    through = torch.autograd.grad((run(*pair) * weights_of(without[0])).sum(), pair)
    torch.testing.assert_close(run(*pair).detach(), without[0])
    assert (through[1] - without[2]).abs().max() > 1e-3 * without[2].abs().max()


@pytest.mark.parametrize("face", PLAN_FACES)
def test_every_kind_of_derivative(face):
    sim, step = similar(3, 5, 2, spread=0.1), similar(3, 5, 2, seed=1)

    def run(sim):
        with fastfpl.face(face):
            return transport_plan(sim, eps=0.2, mass=0.8, tol=1e-12, plan_gradient=True)

    exact = torch.autograd.functional.jacobian(run, sim)
    near = {"rtol": 1e-8, "atol": 1e-11}
    moved = torch.einsum("bpncqm,cqm->bpn", exact, step)
    assert moved.abs().max() > 1e-3
    with forward_ad.dual_level():
        plan = run(forward_ad.make_dual(sim, step))
        torch.testing.assert_close(forward_ad.unpack_dual(plan).tangent, moved, **near)
        held = transport_plan(forward_ad.make_dual(sim, step), eps=0.2)
        assert forward_ad.unpack_dual(held).tangent is None
    torch.testing.assert_close(torch.func.jvp(run, (sim,), (step,))[1], moved, **near)
    torch.testing.assert_close(torch.func.jacrev(run)(sim), exact, **near)
    torch.testing.assert_close(torch.vmap(run)(sim), run(sim), **near)
    torch.testing.assert_close(torch.vmap(run, 1)(sim.transpose(0, 1)), run(sim), **near)

    def value(sim, step):
        return (run(sim) * step).sum()

    torch.testing.assert_close(
        torch.vmap(torch.func.grad(value))(sim, step),
        torch.func.grad(value)(sim, step),
        **near,
    )
    sim, step = sim[0], step[0]
    exact = torch.autograd.functional.hessian(lambda sim: value(sim, step), sim)
    torch.testing.assert_close(torch.func.hessian(value)(sim, step), exact, **near)
    with pytest.raises(NotSupported, match="forward mode must not lie within forward mode; got 2"):
        torch.func.jacfwd(torch.func.jacfwd(value))(sim, step)


@pytest.mark.parametrize("face", [*LOGIT_FACES, TRITON])
@pytest.mark.parametrize("plan_gradient", [False, True])
def test_every_kind_of_derivative_of_logits(face, plan_gradient):
    if face == "triton" and plan_gradient:
        pytest.skip("gradients through the plan are for other faces")
    patches, prompts = features(2, 5, 2, 2, 4)
    step = features(2, 5, 2, 2, 4, seed=1)[1]

    def run(prompts):
        with fastfpl.face(face):
            return transport_logits(
                patches, prompts, eps=0.2, tol=1e-12, plan_gradient=plan_gradient
            )

    near = {"rtol": 1e-8, "atol": 1e-10}
    both = torch.stack([prompts, step])
    each = torch.stack([run(prompts), run(step)])
    torch.testing.assert_close(torch.vmap(run)(both), each, **near)

    def forward(dual):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(prompts, dual))).tangent

    exact = torch.autograd.functional.jacobian(run, prompts)
    moved = torch.einsum("bcdnk,dnk->bc", exact, step)
    torch.testing.assert_close(torch.func.jacrev(run)(prompts), exact, **near)
    for found in (lambda: forward(step), lambda: torch.func.jvp(run, (prompts,), (step,))[1]):
        if face == "reference":
            torch.testing.assert_close(found(), moved, **near)
        else:
            with pytest.raises(NotSupported, match=f"{face}: forward-mode differentiation cannot"):
                found()
    with pytest.raises(NotSupported, match=r"got a slice that torch\.func\.vmap makes; give all"):
        torch.vmap(lambda x: torch.func.jvp(run, (x,), (step,))[1])(both)


def test_without_a_choice_the_reference_answers_other_derivatives_of_logits():
    patches, prompts = features(2, 5, 2, 2, 4)
    step = torch.ones_like(prompts)
    with recorded_faces() as seen:
        torch.func.jvp(lambda prompts: transport_logits(patches, prompts), (prompts,), (step,))
    assert seen == {"transport_logits": {"reference"}}


@NATIVE
def test_a_row_that_meets_its_bound_without_need_counts_as_capped():
    # mass 1/2 on two patches, one prompt: the first row wants exactly its bound
    lift = 0.1 * math.log(3)
    sim = torch.tensor([[lift], [0.0]]).double().requires_grad_()
    plan = transport_plan(sim, eps=0.1, mass=2 / 3, tol=1e-13, plan_gradient=True)
    torch.testing.assert_close(plan.detach(), torch.tensor([[0.5], [1 / 6]]).double())
    (gradient,) = torch.autograd.grad(plan[0, 0], sim)
    assert gradient.abs().max() < 1e-12, "held on this side"
    lower = (sim.detach() - torch.tensor([[1e-4], [0.0]])).requires_grad_()
    plan = transport_plan(lower, eps=0.1, mass=2 / 3, tol=1e-13, plan_gradient=True)
    (gradient,) = torch.autograd.grad(plan[0, 0], lower)
    assert gradient[0, 0] == pytest.approx(0.125 / 0.1, rel=1e-2), "free on the other"


@pytest.mark.parametrize("face", PLAN_FACES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_number_of_a_plan(face, kind, dtype):
    sim = similar(2, 9, 2, dtype=dtype).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=kind, enabled=enabled), fastfpl.face(face):
            plan = transport_plan(sim, eps=0.2, mass=0.8, plan_gradient=True)
            found.append([plan, *torch.autograd.grad(plan.square().sum(), sim)])
    for plain, cast in zip(*found, strict=True):
        assert cast.dtype == dtype
        assert torch.equal(cast, plain)


def test_plan_gradient_in_sixteen_bits():
    sim = similar(2, 9, 2, dtype=torch.bfloat16).requires_grad_()
    plan = transport_plan(sim, eps=0.05, mass=0.8, plan_gradient=True)
    (mine,) = torch.autograd.grad((plan * weights_of(plan)).sum(), sim)
    wide = sim.detach().double().requires_grad_()
    exact = transport_plan(wide, eps=0.05, mass=0.8, plan_gradient=True)
    (true,) = torch.autograd.grad((exact * weights_of(plan).double()).sum(), wide)
    assert (plan.dtype, mine.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (mine.double() - true).abs().max() <= 0.02 * true.abs().max()


def test_plan_gradient_survives_torch_compile():
    found = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        sim = similar(2, 9, 2).requires_grad_()
        run = wrap(lambda sim: transport_plan(sim * 1.0, eps=0.2, mass=0.8, plan_gradient=True))
        found.append(torch.autograd.grad(run(sim).square().sum(), sim)[0])
    assert torch.equal(*found)


# --- columns that hardly share a row --------------------------------------------------------------


def literal_pull_back(plan, by, held):
    """The projection by the normal equations of alpha and beta, in fractions: nothing rounds."""
    plan, by = ([[Fraction(x) for x in row] for row in t.tolist()] for t in (plan, by))
    rows = [m for m, here in enumerate(held) if here]
    size, columns = len(rows) + len(plan[0]), range(len(plan[0]))
    system = [[Fraction(0)] * (size + 1) for _ in range(size)]
    for m, row in enumerate(plan):
        for n, t in enumerate(row):
            unknowns = [len(rows) + n, *([rows.index(m)] if m in rows else [])]
            for i in unknowns:
                system[i][size] += t * by[m][n]
                for j in unknowns:
                    system[i][j] += t
    if len(rows) == len(plan):  # a constant may go from alpha to beta: the first beta is 0
        system[len(rows)] = [Fraction(int(j == len(rows))) for j in range(size)] + [Fraction(0)]
    for i in range(size):  # Gauss and Jordan
        pivot = next(j for j in range(i, size) if system[j][i])
        system[i], system[pivot] = system[pivot], system[i]
        system[i] = [x / system[i][i] for x in system[i]]
        for j in range(size):
            if j != i and system[j][i]:
                factor = system[j][i]
                system[j] = [x - factor * y for x, y in zip(system[j], system[i], strict=True)]
    found = [row[size] for row in system]
    alpha = [found[rows.index(m)] if m in rows else Fraction(0) for m in range(len(plan))]
    beta = found[len(rows) :]
    projected = [
        [plan[m][n] * (by[m][n] - alpha[m] - beta[n]) for n in columns] for m in range(len(plan))
    ]
    rows = [[float(x) for x in row] for row in (*projected, beta)]
    return torch.tensor(rows, dtype=torch.float64)


def apart(decades, patches, dtype):
    """A plan whose row m is of column m % N, the others being so many decades below."""
    draw = torch.Generator().manual_seed(0)
    size = len(decades)
    weight = torch.tensor(
        [[10.0 ** -decades[m % size][n] for n in range(size)] for m in range(patches)]
    )
    weight = weight.double() * (0.5 + torch.rand(patches, size, generator=draw).double())
    return (weight / weight.sum(-1, keepdim=True) / patches).to(dtype)


APART = {
    "two": [[0, 30], [30, 0]],
    "two, barely": [[0, 12], [12, 0]],
    "a pair and one": [[0, 5, 20], [5, 0, 20], [20, 20, 0]],
    "a loose pair and one": [[0, 14, 30], [14, 0, 30], [30, 30, 0]],
    "two pairs": [[0, 9, 28, 28], [9, 0, 28, 28], [28, 28, 0, 3], [28, 28, 3, 0]],
    "a chain": [[0, 8, 16, 24], [8, 0, 8, 16], [16, 8, 0, 8], [24, 16, 8, 0]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("free", [0, 1, 4])
@pytest.mark.parametrize("kind", APART)
def test_columns_that_hardly_share_a_row(kind, free, dtype):
    # between two columns only their common rows decide, however little of them they hold
    size = len(APART[kind])
    plan = apart(APART[kind], 2 * size + 1, dtype)
    by = torch.randn(plan.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    held = torch.arange(len(plan)) < len(plan) - free
    plan = torch.where(held[:, None], plan, plan / 2)
    exact = literal_pull_back(plan, by, held.tolist())
    bound = None if not free else plan.new_full((len(plan),), 1 / len(plan))
    projected, alpha, beta = pull_back(plan, by, bound, 1e-6)
    near = 64 * torch.finfo(dtype).eps
    assert (projected.double() - exact[:-1]).abs().max() <= near * plan.max()
    beta = beta[0] if free else beta[0] - beta[0, 0]
    torch.testing.assert_close(beta.double(), exact[-1], rtol=near, atol=near)
    # and it is a gradient, not rounding: of what hardly moves, too
    assert exact[:-1].abs().max() > 0
    assert ((alpha[:, 0] == 0) == ~held).all()


@pytest.mark.parametrize("decades", [2, 4, 6])
def test_gradients_of_a_small_eps_are_those_of_float64(decades):
    # two prompts that share patches so many decades below their own, and a third twenty below
    lift, far = (0.3 - 0.005 * d * math.log(10) for d in (decades, 20))
    rows = [[0.3, lift, far], [lift, 0.3, far], [far, far, 0.3]]
    sim = torch.tensor(rows * 3) + 0.004 * similar(9, 3, spread=1, dtype=torch.float32)
    by = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = sim.to(dtype).requires_grad_()
        options = {"tol": 1e-12 if dtype == torch.float64 else 1e-5, "max_iter": 10**5}
        plan = transport_plan(leaf, eps=0.005, plan_gradient=True, **options)
        found += torch.autograd.grad((plan * by.to(dtype)).sum(), leaf)
    exact, mine = found
    # an entry of the plan / eps is 22, which float32 rounds to 1e-6
    assert (mine.double() - exact).abs().max() <= 1e-3 * exact.abs().max() + 3e-6
