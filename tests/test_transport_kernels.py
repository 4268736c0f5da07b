"""Triton kernels of the transport: against the truth, in every shape that they are launched in.

Interpreted, a pass of the solver takes some 30 ms whatever the size: problems are few and small.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastfpl
from fastfpl.errors import InputError, NotConverged, NotSupported
from fastfpl.ops import launch, transport_logits, transport_pieces, transport_plan
from fastfpl.ops.faces import recorded_faces
from fastfpl.ops.transport import FACES, Convergence
from fastfpl.reference import transport as reference
from tests.aot import assert_fits, every_pair, taken
from tests.test_transport import DTYPES, ROUNDING, assert_optimal, even, similar
from tests.test_transport_logits import BOTH, features, weights_of
from tests.truth import assert_as_good_as_eager, assert_fences_hold, fenced

pytest.importorskip("triton")
pytestmark = [
    # where a GPU computes an infinity in silence, numpy says so
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
INTERPRETED = pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here")
DEVICE = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)],
)
KINDS = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def solved(sim, device="cpu", **options):
    with fastfpl.face("triton"), recorded_faces() as seen:
        plan, ended = transport_plan(sim.to(device), info=True, **options)
    assert seen == {"transport_plan": {"triton"}}
    return plan.cpu(), Convergence(*(x.cpu() for x in ended))


def scored(patches, prompts, device="cpu", **options):
    with fastfpl.face("triton"), recorded_faces() as seen:
        logits, ended = transport_logits(
            patches.to(device), prompts.to(device), info=True, **options
        )
    assert seen == {"transport_logits": {"triton"}}
    return logits.cpu(), Convergence(*(x.cpu() for x in ended))


def with_gradients(patches, prompts, device="cpu", **options):
    leaves = [x.detach().to(device).requires_grad_() for x in (patches, prompts)]
    with fastfpl.face("triton"):
        logits, _ = transport_logits(*leaves, info=True, **options)
    gradients = torch.autograd.grad((logits * weights_of(logits).to(device)).sum(), leaves)
    return [x.detach().cpu() for x in (logits, *gradients)]


def true_gradients(patches, prompts, **options):
    leaves = [x.detach().double().requires_grad_() for x in (patches, prompts)]
    with fastfpl.face("reference"):
        logits = transport_logits(*leaves, max_iter=10**6, tol=1e-13, **options)
    weights = weights_of(logits.to(torch.promote_types(patches.dtype, prompts.dtype)))
    gradients = torch.autograd.grad((logits * weights).sum(), leaves)
    return [logits.detach(), *gradients]


# --- plans ----------------------------------------------------------------------------------------


@DEVICE
@BOTH
@KINDS
@pytest.mark.parametrize(
    "shape",
    [(2, 49, 2), (2, 2, 7, 2), (3, 1, 2), (4, 17, 1), (1, 1), (0, 49, 2), (33, 2), (3, 9, 3)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_plan_as_good_as_eager(shape, dtype, balanced, device):
    sim = similar(*shape, dtype=dtype)
    for eps in (0.05, 1.0) if shape == (2, 49, 2) else (0.1,):
        options = {"eps": eps, "mass": 0.8, "balanced": balanced}
        with fastfpl.face("reference"):
            exact = transport_plan(sim.double(), tol=1e-13, **options)
        tol = 1e-12 if dtype == torch.float64 else 1e-5
        plan, ended = solved(sim, device, tol=tol, **options)
        assert (ended.residual <= tol).all()
        assert ended.iterations.shape == ended.residual.shape == shape[:-2]
        assert ended.iterations.dtype == torch.int64
        if dtype == torch.float64:  # the truth itself is no better than this
            torch.testing.assert_close(plan, exact, rtol=1e-9, atol=1e-14)
        else:
            eager = reference.transport_plan(sim.float(), eps, 0.8, balanced, 10_000, 1e-5)[0]
            assert_as_good_as_eager(plan, eager.to(dtype), exact)


@DEVICE
@pytest.mark.parametrize("patches", [5, 196])
@pytest.mark.parametrize("eps", [0.005, 0.01])
@pytest.mark.parametrize("mass", [0.01, 0.8, 0.99, 1.0])
def test_small_eps_is_exact(eps, mass, patches, device):
    # cosines over all of [-1, 1]: exponents span 400 at eps=.005
    generator = torch.Generator().manual_seed(patches)
    sim = 2 * torch.rand(8, patches, 2, generator=generator) - 1
    exact, _ = solved(sim.double(), device, eps=eps, mass=mass, tol=1e-12)
    assert_optimal(sim.double(), exact, eps, mass, 1e-9)
    plan, ended = solved(sim, device, eps=eps, mass=mass)
    assert ended.iterations.max() <= 200
    assert ended.residual.max() <= 1e-5
    assert (plan - exact).abs().max() * patches <= 1e-3


@DEVICE
@pytest.mark.parametrize(("prompts", "eps"), [(3, 0.05), (4, 0.02), (16, 0.1)])
@BOTH
def test_more_prompts_solve_the_documented_problem(prompts, eps, balanced, device):
    sim = similar(2, 21, prompts)
    options = {"eps": eps, "mass": 0.8, "balanced": balanced}
    plan, ended = solved(sim, device, tol=1e-9, **options)
    assert_optimal(sim, plan, eps, 0.8, 1e-8, balanced)
    assert (ended.iterations > 1).all()
    with fastfpl.face("reference"):
        exact = transport_plan(sim, tol=1e-12, max_iter=10**5, **options)
    torch.testing.assert_close(plan, exact, rtol=1e-6, atol=1e-9)


@DEVICE
@given(
    patches=st.integers(1, 66),
    prompts=st.sampled_from([1, 2, 2, 3]),
    mass=st.sampled_from([0.05, 0.5, 0.8, 0.97, 1.0]),
    eps=st.sampled_from([0.05, 0.1, 3.0]),
    balanced=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15)
def test_marginals(device, patches, prompts, mass, eps, balanced, dtype, seed):
    sim = similar(2, patches, prompts, seed=seed, dtype=dtype)
    plan, _ = solved(sim, device, eps=eps, mass=mass, balanced=balanced, tol=1e-4)
    assert plan.dtype == dtype
    plan, slack = plan.double(), 1e-4 + ROUNDING[dtype]
    assert plan.min() >= 0
    assert (plan.sum(-2) * prompts / mass - 1).abs().max() <= ROUNDING[dtype]
    rows = plan.sum(-1) * patches
    if balanced:
        assert (rows / mass - 1).abs().max() <= slack
    else:
        assert rows.max() <= 1 + slack


@DEVICE
@given(
    patches=st.integers(1, 20),
    prompts=st.sampled_from([2, 3]),
    balanced=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=8)
def test_laws(device, patches, prompts, balanced, seed):
    sim = similar(patches, prompts, seed=seed)
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    easy = similar(patches, prompts, seed=seed + 1, spread=0.001)
    both = torch.stack([sim, sim[order], sim.flip(-1), sim + 0.5, easy, sim[:, :1].expand_as(sim)])
    options = {"eps": 0.2, "mass": 0.7, "balanced": balanced, "tol": 1e-11}
    plans, _ = solved(both, device, **options)
    near = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(plans[1], plans[0][order], **near)
    torch.testing.assert_close(plans[2], plans[0].flip(-1), **near)
    torch.testing.assert_close(plans[3], plans[0], **near)
    # prompts that are alike share their mass
    torch.testing.assert_close(plans[5], plans[5][:, :1].expand_as(sim), **near)
    # problems of a program do not influence each other
    alone, _ = solved(sim, device, **options)
    torch.testing.assert_close(alone, plans[0], **near)
    scaled, _ = solved(3 * sim, device, **options | {"eps": 0.6})
    torch.testing.assert_close(scaled, plans[0], **near)


@DEVICE
def test_plans_in_closed_form(device):
    near = {"rtol": 1e-9, "atol": 0.0}
    sim = similar(3, 31, 2)
    # so little mass that no row meets its bound: a softmax over the patches
    plan, _ = solved(sim, device, eps=0.1, mass=0.05, tol=1e-13)
    torch.testing.assert_close(plan, (sim / 0.1).softmax(-2) * 0.025, **near)
    # one patch, one prompt
    torch.testing.assert_close(solved(sim[:, :1], device, mass=0.6)[0], even(0.3, 3, 1, 2))
    plan, _ = solved(sim[..., :1], device, mass=0.6, balanced=True)
    torch.testing.assert_close(plan, even(0.6 / 31, 3, 31, 1))
    # ties: equal rows, equal columns
    plan, _ = solved(torch.full((2, 8, 2), 0.3).double(), device, eps=0.01, mass=0.8)
    torch.testing.assert_close(plan, even(0.05, 2, 8, 2))
    # by hand: at a low temperature each prompt fills its best row and starts its second
    sim = torch.tensor([[0.9, 0.0], [0.7, 0.1], [0.2, 0.6], [0.0, 0.8]]).double()
    table = torch.tensor([[0.25, 0.0], [0.05, 0.0], [0.0, 0.05], [0.0, 0.25]]).double()
    plan, _ = solved(sim, device, eps=0.01, mass=0.6, tol=1e-12)
    torch.testing.assert_close(plan, table, rtol=0.0, atol=1e-8)
    # at a high temperature similarities no longer matter
    plan, _ = solved(similar(2, 10, 2), device, eps=1e9, mass=0.6, tol=1e-12)
    torch.testing.assert_close(plan, even(0.03, 2, 10, 2), **near)


@DEVICE
def test_all_mass_is_the_limit_of_nearly_all(device):
    sim = similar(2, 30, 2)
    balanced, _ = solved(sim, device, eps=0.05, mass=1)
    nearly, _ = solved(sim, device, eps=0.05, mass=1 - 1e-7, tol=1e-9)
    assert 1e-12 < (nearly - balanced).abs().max() * 30 < 1e-3


@DEVICE
def test_a_tolerance_below_rounding_spoils_nothing(device):
    sim = similar(16, 49, 2, dtype=torch.float32)
    for mass in (0.3, 0.8, 1.0):
        exact, _ = solved(sim.double(), device, eps=0.01, mass=mass, tol=1e-12)
        plan, ended = solved(sim, device, eps=0.01, mass=mass, tol=1e-12, max_iter=200)
        assert ended.iterations.max() < 200, "stops where rounding does"
        assert ended.residual.max() < 1e-5
        assert (plan - exact).abs().max() * 49 < 1e-4


@DEVICE
@pytest.mark.parametrize("prompts", [2, 3])
def test_says_when_it_has_not_converged(prompts, device):
    sim = similar(2, 3, 49, prompts)
    options = {"eps": 0.02, "mass": 0.8, "max_iter": 2, "tol": 1e-9}
    with (
        fastfpl.face("triton"),
        pytest.raises(NotConverged, match=r"plan: 6 of 6 problems .* tol=1e-09 after at most 2 it"),
    ):
        transport_plan(sim.to(device), **options)
    plan, ended = solved(sim, device, **options)
    assert ended.iterations.tolist() == [[2] * 3] * 2
    assert (ended.residual > 1e-9).all()
    # columns are exact at any time, and the residual bounds the rows
    torch.testing.assert_close(plan.sum(-2), even(0.8 / prompts, 2, 3, prompts))
    assert (plan.sum(-1).amax(-1) * 49 <= ended.residual.exp() + 1e-12).all()


@DEVICE
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_plans_of_what_is_not_finite_are_nan(value, prompts, device):
    sim = similar(3, 7, prompts, dtype=torch.float32)
    good, _ = solved(sim, device)
    sim[1, 5, -1] = value
    plan, ended = solved(sim, device)
    assert plan[1].isnan().all()
    assert ended.residual[1].isnan()
    assert ended.iterations[1] == 0
    assert torch.equal(plan[::2], good[::2])
    with (
        fastfpl.face("triton"),
        pytest.raises(InputError, match=rf"finite; got .* at \(1, 5, {prompts - 1}\) with eps=0.1"),
    ):
        transport_plan(sim.to(device))


@DEVICE
@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_plans_of_any_view(prompts, device):
    sim = similar(3, 2, 9, 4, dtype=torch.float32).to(device)
    options = {"eps": 0.1, "mass": 0.8}
    views = {
        "transposed": sim[..., :prompts].transpose(0, 1),
        "sliced": sim[:, :, ::2, 4 - prompts :],
        "turned": sim[..., :prompts].mT.contiguous().mT,
        "expanded": sim[:1, :, :, :prompts].expand(3, 2, 9, prompts),
        "negative": torch._neg_view(sim[..., :prompts]),
    }
    for name, view in views.items():
        packed = view.resolve_neg().clone(memory_format=torch.contiguous_format)
        plan, _ = solved(view, device, **options)
        assert plan.is_contiguous(), name
        assert torch.equal(plan, solved(packed, device, **options)[0]), name


# --- logits ---------------------------------------------------------------------------------------

SHAPES = [  # lead, B, P, C, N, D
    ((), 1, 1, 1, 1, 1),
    ((), 2, 7, 5, 2, 4),
    ((2,), 2, 49, 3, 2, 19),
    ((2, 1), 2, 5, 3, 1, 8),
    ((1,), 2, 13, 7, 3, 6),
]


@DEVICE
@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_equal_the_reference(shape, balanced, device):
    lead, *sizes = shape
    pair = features(*sizes, lead)
    options = {"eps": 0.2, "mass": 0.8, "balanced": balanced}
    found = with_gradients(*pair, device, tol=1e-13, max_iter=10**4, **options)
    for mine, exact in zip(found, true_gradients(*pair, **options), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


@DEVICE
@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_plans_that_are_too_many_are_solved_again(prompts, device, monkeypatch):
    pair = features(3, 7, 5, prompts, 6, (2,))
    options = {"eps": 0.2, "mass": 0.8, "tol": 1e-12}
    kept = with_gradients(*pair, device, **options)
    monkeypatch.setattr(transport_pieces, "_KEPT", 0)
    monkeypatch.setattr(transport_pieces, "_AT_ONCE", 7 * 3 * prompts)  # several pieces a side
    assert len(list(transport_pieces.pieces(*pair))) > 6
    for mine, exact in zip(with_gradients(*pair, device, **options), kept, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


@DEVICE
@BOTH
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_logits_as_good_as_eager(dtype, balanced, device):
    pair = features(3, 49, 6, 2, 32, dtype=dtype, spread=3.0)
    options = {"eps": 0.05, "mass": 0.8, "balanced": balanced}
    exact = true_gradients(*pair, **options)
    leaves = [x.requires_grad_() for x in pair]
    with fastfpl.face("reference"):
        logits = transport_logits(*leaves, **options)
    eager = torch.autograd.grad((logits * weights_of(logits)).sum(), leaves)
    mine = with_gradients(*pair, device, **options)
    for name, got, theirs, true in zip(
        ("logits", "d_patches", "d_prompts"), mine, (logits.detach(), *eager), exact, strict=True
    ):
        assert_as_good_as_eager(got, theirs, true, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_the_largest_images_as_good_as_eager(dtype):
    """ViT-L/14 at 336 pixels: P = 576, D = 768."""
    pair = features(2, 576, 5, 2, 768, dtype=dtype)
    options = {"eps": 0.1, "mass": 0.8, "balanced": False}
    exact = true_gradients(*pair, **options)
    leaves = [x.requires_grad_() for x in pair]
    with fastfpl.face("reference"):
        logits = transport_logits(*leaves, **options)
    eager = torch.autograd.grad((logits * weights_of(logits)).sum(), leaves)
    mine = with_gradients(*pair, "cuda", **options)
    for name, got, theirs, true in zip(
        ("logits", "d_patches", "d_prompts"), mine, (logits.detach(), *eager), exact, strict=True
    ):
        assert_as_good_as_eager(got, theirs, true, name=name)


@DEVICE
@BOTH
def test_gradcheck(balanced, device):
    """Where eps times the plan's entropy is added, the optimal plan may as well be a constant."""
    eps = 0.3
    pair = features(1, 3, 2, 2, 2)
    options = {"eps": eps, "mass": 0.8, "balanced": balanced, "max_iter": 10**5, "tol": 1e-13}

    def value(patches, prompts):
        with fastfpl.face("triton"):
            logits, _ = transport_logits(patches, prompts, info=True, **options)
        with fastfpl.face("reference"):
            plan = transport_plan(
                reference.similarities(patches.detach(), prompts.detach()), **options
            )
        return logits - eps * (plan * (plan.log() - 1)).sum((-2, -1))

    leaves = [x.to(device).requires_grad_() for x in pair]
    assert torch.autograd.gradcheck(value, leaves, eps=1e-5, atol=1e-6)


TILES = [
    {"BLOCK_C": 8, "BLOCK_D": 32},  # as on a GPU
    {"BLOCK_C": 2, "BLOCK_D": 16},
]


@INTERPRETED
@pytest.mark.parametrize(("prompts", "balanced"), [(1, False), (2, False), (3, True)])
def test_tiles_do_not_change_the_result(prompts, balanced):
    from fastfpl.kernels import transport as kernels

    x, t = features(2, 21, 3, prompts, 19, (1,))
    options = (0.2, 0.8, balanced, 1000, 1e-11)
    whole = kernels.transport_logits_fwd(x, t, *options, measure=True, keep=True)
    sim = reference.similarities(x, t)
    plans = reference.transport_plan(sim, *options)[0]  # (1, 2, 3, P, N)
    torch.testing.assert_close(whole[4], plans.transpose(2, 3), rtol=1e-7, atol=1e-10)
    near = {"rtol": 1e-9, "atol": 1e-12}
    for tile in TILES:
        part = kernels.transport_logits_fwd(x, t, *options, measure=True, keep=True, tile=tile)
        for mine, exact in zip(part, whole, strict=True):
            torch.testing.assert_close(mine, exact, **near)
    logits, _, _, entropy, none = kernels.transport_logits_fwd(
        x, t, *options, measure=False, keep=False
    )
    assert entropy is None
    assert none is None
    assert torch.equal(logits, whole[0])
    sim = similar(3, 21, prompts)
    plans = kernels.transport_plan_fwd(sim, *options)
    pieces = kernels.transport_plan_fwd(sim, *options, tile={"BLOCK_G": 2})
    for mine, exact in zip(pieces, plans, strict=True):
        torch.testing.assert_close(mine, exact, **near)


@DEVICE
@given(
    B=st.integers(1, 2),
    P=st.integers(1, 20),
    C=st.integers(1, 4),
    N=st.integers(1, 3),
    balanced=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=5)
def test_laws_of_logits(device, B, P, C, N, balanced, seed):
    patches, prompts = features(B, P, C, N, 6, seed=seed)
    options = {"eps": 0.4, "balanced": balanced, "tol": 1e-11}
    near = {"rtol": 1e-8, "atol": 1e-11}
    generator = torch.Generator().manual_seed(seed)
    images, classes, rows = (torch.randperm(n, generator=generator) for n in (B, C, P))
    # a client of its own for each law
    x = torch.stack([patches, patches[images], patches[:, rows], patches])
    t = torch.stack(
        [prompts, prompts[classes], prompts.flip(-2), prompts[:, :1].expand_as(prompts)]
    )
    logits, _ = scored(x, t, device, **options)
    torch.testing.assert_close(logits[1], logits[0][images][:, classes], **near)
    torch.testing.assert_close(logits[2], logits[0], **near)
    alone, _ = scored(patches, prompts[-1:], device, **options)
    torch.testing.assert_close(alone, logits[0][:, -1:], **near)
    scaled, _ = scored(3 * patches, prompts, device, **options | {"eps": 1.2})
    torch.testing.assert_close(scaled, 3 * logits[0], **near)
    # prompts that are there several times share their mass
    once, _ = scored(patches, prompts[:, :1], device, **options)
    torch.testing.assert_close(logits[3], once, **near)


@DEVICE
@BOTH
@pytest.mark.parametrize("eps", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_sixteen_bits_never_give_nan(dtype, eps, balanced, device):
    patches, prompts = features(1, 49, 4, 2, 8, spread=2.0, dtype=dtype)
    prompts[0] = patches[0, :2]  # cosines of one, and at the other end of the range
    prompts[1] = -prompts[0]
    prompts[2, 1] = prompts[2, 0]
    options = {"eps": eps, "balanced": balanced, "mass": 0.8}
    found = with_gradients(patches, prompts, device, tol=1e-3, **options)
    wide = [x.double() for x in (patches, prompts)]
    with fastfpl.face("torch"):
        leaves = [x.requires_grad_() for x in wide]
        logits = transport_logits(*leaves, **options, tol=1e-4)
        exact = torch.autograd.grad((logits * weights_of(logits)).sum(), leaves)
    for x, true in zip(found, (logits.detach(), *exact), strict=True):
        assert x.dtype == dtype
        assert x.isfinite().all()
        assert (x.double() - true).abs().max() <= 0.03 * true.abs().max()


@DEVICE
def test_the_wider_dtype_decides(device):
    patches, prompts = features(2, 5, 3, 2, 6)
    exact, _ = scored(patches, prompts, device)
    for kinds, out in [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
        ((torch.float16, torch.bfloat16), torch.float32),
    ]:
        pair = [x.to(k) for x, k in zip((patches, prompts), kinds, strict=True)]
        logits, *gradients = with_gradients(*pair, device)
        assert logits.dtype == out
        torch.testing.assert_close(logits.double(), exact, rtol=0, atol=5e-3)
        assert tuple(g.dtype for g in gradients) == kinds


@DEVICE
def test_only_the_wanted_gradients_are_formed(device):
    patches, prompts = features(2, 5, 4, 2, 6)
    _, d_patches, d_prompts = with_gradients(patches, prompts, device)
    for name, wanted in (("patches", d_patches), ("prompts", d_prompts)):
        pair = {"patches": patches.to(device), "prompts": prompts.to(device)}
        pair[name] = pair[name].clone().requires_grad_()
        with fastfpl.face("triton"):
            logits = transport_logits(*pair.values())
        (logits * weights_of(logits).to(device)).sum().backward()
        torch.testing.assert_close(pair[name].grad.cpu(), wanted, rtol=1e-12, atol=1e-14)
        assert all(x.grad is None for n, x in pair.items() if n != name)


@DEVICE
@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_how_even_the_plans_are(prompts, device):
    pair = features(2, 7, 3, prompts, 6)
    for options in ({"eps": 0.1, "mass": 0.7}, {"eps": 0.3, "balanced": True}):
        _, ended = scored(*pair, device, tol=1e-9, **options)
        with fastfpl.face("reference"):
            _, exact = transport_logits(*pair, info=True, tol=1e-9, **options)
        torch.testing.assert_close(ended.entropy, exact.entropy, rtol=1e-6, atol=1e-9)
    _, ended = scored(pair[0][:, :1], pair[1][:, :1], device)
    assert torch.equal(ended.entropy, torch.ones(2, 3).double())


@INTERPRETED
def test_gradients_through_the_plan_are_for_other_faces():
    pair = features(2, 3, 2, 2, 4)
    with (
        fastfpl.face("triton"),
        pytest.raises(NotSupported, match="triton: gradients through the plan: cpu, torch faces"),
    ):
        transport_logits(*pair, plan_gradient=True)
    # a plan alone is differentiated by torch, whoever solved it
    by, found = torch.linspace(-1, 1, 42).double().view(3, 7, 2), []
    for face in ("triton", "reference"):
        sim = similar(3, 7, 2).requires_grad_()
        with fastfpl.face(face):
            plan = transport_plan(sim, mass=0.7, tol=1e-11, plan_gradient=True)
        found.append(torch.autograd.grad((plan * by).sum(), sim)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@DEVICE
def test_logits_of_any_view(device):
    patches, prompts = (x.to(device) for x in features(2, 6, 3, 2, 8, (2, 1)))
    wide = torch.full((2, 1, 2, 6, 16), math.nan, device=device).double()
    wide[..., ::2] = patches
    views = {
        "sliced": (wide[..., ::2], prompts),
        "expanded": (patches[:1].expand(2, 1, 2, 6, 8), prompts[:, :1].expand(2, 1, 3, 2, 8)),
        "negative": (torch._neg_view(patches), prompts),
        "conjoined": (patches.mT.contiguous().mT, prompts.transpose(-3, -2).contiguous().mT.mT),
    }
    views["conjoined"] = (views["conjoined"][0], prompts.mT.contiguous().mT)
    for name, pair in views.items():
        packed = [x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in pair]
        leaves = [x.detach().requires_grad_() for x in pair]
        with fastfpl.face("triton"):
            logits = transport_logits(*leaves)
        weights = weights_of(logits).flip(-1).mT.contiguous().mT  # the gradient may be a view too
        found = [logits, *torch.autograd.grad((logits * weights).sum(), leaves)]
        leaves = [x.requires_grad_() for x in packed]
        with fastfpl.face("triton"):
            logits = transport_logits(*leaves)
        exact = [logits, *torch.autograd.grad((logits * weights).sum(), leaves)]
        for mine, true in zip(found, exact, strict=True):
            assert mine.shape == true.shape, name
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12)


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_reads_and_writes_stay_inside(monkeypatch, prompts, dtype):
    from fastfpl.kernels import transport as kernels

    x, t = features(2, 7, 5, prompts, 21, (1,), dtype=dtype)
    sim = similar(3, 7, prompts, dtype=dtype)
    options = (0.2, 0.8, False, 100, 1e-4)

    def run(wall):
        made = kernels.transport_logits_fwd(wall(x), wall(t), *options, measure=True, keep=True)
        return [*made, *kernels.transport_plan_fwd(wall(sim), *options)]

    plain = run(lambda tensor: tensor)
    made = []

    plain_empty = torch.Tensor.new_empty

    def new_empty(tensor, shape, *, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return plain_empty(tensor, shape, device=device)
        made.append(fenced(torch.full(shape, 77, dtype=dtype or tensor.dtype)))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    walled = run(fenced)
    assert len(made) == 8
    for tensor in made:
        assert_fences_hold(tensor)
    for mine, exact in zip(walled, plain, strict=True):
        assert torch.equal(mine, exact)


@DEVICE
@pytest.mark.parametrize(
    "shape",
    [((), 0, 3, 4, 2, 5), ((), 2, 3, 0, 2, 5), ((0,), 2, 3, 4, 2, 5), ((), 2, 3, 4, 3, 0)],
    ids=str,
)
def test_nothing_to_score(shape, device):
    lead, *sizes = shape
    pair = features(*sizes, lead)
    found = with_gradients(*pair, device)
    assert found[0].shape == (*lead, sizes[0], sizes[2])
    assert [x.shape for x in found[1:]] == [x.shape for x in pair]
    assert all(not x.any() for x in found)


@DEVICE
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_logits_of_what_is_not_finite_are_nan(value, prompts, device):
    x, t = features(3, 4, 5, prompts, 6, (2,), dtype=torch.float32)
    options = {"eps": 0.1, "max_iter": 20}
    good = with_gradients(x, t, device, **options)
    x[1, 2, 1, 3] = value
    t[0, 4, -1, 5] = value
    logits, ended = scored(x, t, device, **options)
    bad = torch.zeros(2, 3, 5, dtype=torch.bool)
    bad[1, 2] = bad[0, :, 4] = True
    assert torch.equal(logits.isnan(), bad)
    assert torch.equal(ended.residual.isnan(), bad)
    torch.testing.assert_close(logits[~bad], good[0][~bad])
    found = with_gradients(x, t, device, **options)
    # a gradient is NaN where a NaN takes part in it, and nowhere else
    torch.testing.assert_close(found[1][1, :2], good[1][1, :2])
    torch.testing.assert_close(found[2][0, :4], good[2][0, :4])
    assert found[1][1, 2].isnan().any()
    assert found[2][0, 4].isnan().any()
    with (
        fastfpl.face("triton"),
        pytest.raises(
            InputError,
            match=rf"got .* of patch \(0, 0, 0\) and prompt \(0, 4, {prompts - 1}\) with eps=0.1",
        ),
    ):
        transport_logits(x.to(device), t.to(device), **options)


@DEVICE
def test_what_is_kept_for_the_backward_pass(device):
    patches, prompts = (x.to(device) for x in features(3, 9, 5, 2, 6))
    for leaves, expected in [
        ((patches, prompts.clone().requires_grad_()), 3 * 9 * 5 * 2),
        ((patches, prompts), 0),
    ]:
        kept = []

        def pack(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, fastfpl.face("triton"):
            transport_logits(*leaves)
        inputs = {x.untyped_storage().data_ptr() for x in leaves}
        own = [x for x in kept if x.untyped_storage().data_ptr() not in inputs]
        assert sum(x.numel() for x in own) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_two_runs_agree_to_the_bit_at_the_papers_size(dtype):
    pair = features(32, 196, 100, 2, 512, (2,), dtype=dtype)
    first, again = (with_gradients(*pair, "cuda", eps=0.05) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)


# --- without waiting for the device ---------------------------------------------------------------


class _NoReads(TorchDispatchMode):
    """Refuse everything whose result a host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}, name
        return func(*args, **(kwargs or {}))


@DEVICE
@pytest.mark.parametrize("prompts", [2, 3])
def test_a_step_with_info_reads_nothing(prompts, device):
    patches, prompts = (x.to(device) for x in features(2, 5, 3, prompts, 6, dtype=torch.float32))
    prompts.requires_grad_()
    options = {"eps": 0.1, "tol": 1e-3, "max_iter": 100, "info": True}

    def steps():
        worst = None
        for _ in range(2):
            logits, ended = transport_logits(patches, prompts, **options)
            logits.square().sum().backward()
            worst = ended.worst(worst)
            worst = transport_plan(patches.detach(), **options)[1].worst(worst)
        return worst

    with fastfpl.face("triton"):
        steps()  # compiles
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with _NoReads():
                worst = steps()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    worst.check(1e-3)
    assert worst.iterations.item() > 0
    with _NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        worst.check(1e-3)


def test_the_worst_of_several_steps():
    first = Convergence(
        torch.tensor([[3, 9]]), torch.tensor([[1e-6, 2e-6]]), torch.tensor([[0.25, 0.75]])
    )
    second = Convergence(torch.tensor([4]), torch.tensor([5e-3]), torch.tensor([0.5]))
    worst = second.worst(first.worst())
    assert (int(worst.iterations), worst.iterations.dtype) == (9, torch.int64)
    assert float(worst.residual) == pytest.approx(5e-3)
    assert float(worst.entropy) == 0.25
    assert worst.iterations.shape == worst.residual.shape == ()
    worst.check(1e-2)
    with pytest.raises(
        NotConverged,
        match=r"transport_logits: 1 of 1 problems ended above tol=0.001 after at most 9 "
        r"iterations; the largest residual is 5.0e-03; raise max_iter, eps or tol",
    ):
        worst.check(1e-3)
    nan = Convergence(torch.tensor([0]), torch.tensor([math.nan]), torch.tensor([math.nan]))
    nan = nan.worst(worst)
    assert nan.residual.isnan()
    with pytest.raises(InputError, match=r"similarity / eps must be finite; got a residual of nan"):
        nan.check(1e-2)
    none = Convergence(torch.zeros(0, 3).long(), torch.zeros(0, 3), torch.zeros(0, 3)).worst()
    assert [float(x) for x in none] == [0, 0, 1]
    none.check(1e-9)


# --- what it takes, and where it fits -------------------------------------------------------------


@INTERPRETED
def test_sizes_beyond_the_kernels_are_refused_in_sentences():
    with fastfpl.face("triton"):
        for shape, reason in [
            ((1025, 2), "triton: P = 1025 patches, at most 1024"),
            ((3, 17), "triton: N = 17 prompts, at most 16"),
        ]:
            with pytest.raises(NotSupported, match=reason):
                transport_plan(torch.zeros(shape))
            with pytest.raises(NotSupported, match=reason):
                transport_logits(torch.zeros(1, shape[0], 2), torch.zeros(1, shape[1], 2))
        for few in (4, 8):  # 513 count as 1024
            double = torch.zeros(513 if few == 4 else 257, few + 1, dtype=torch.float64)
            with pytest.raises(NotSupported, match=r"in float64: 8192 entries .* most 4096"):
                transport_plan(double)
            reasons = FACES["transport_plan"][0].against(double[:, :few])
            assert not any("entries" in reason for reason in reasons)
        single = torch.zeros(1, 513, 2), torch.zeros(1, 9, 2)
        with pytest.raises(NotSupported, match=r"in float32: 16384 entries .* most 8192"):
            transport_logits(*single)
        for fits in ((single[0].half(), single[1].half()), (single[0], single[1][:, :8])):
            against = FACES["transport_logits"][0].against
            reasons = against(*fits, 0.1, 0.8, False, 100, 1e-3, False, True)
            assert not any("entries" in reason for reason in reasons)
        for kinds in ((torch.float64, torch.float16), (torch.float32, torch.float64)):
            with pytest.raises(NotSupported, match="P = 513 patches in float64, at most 512"):
                transport_logits(*(torch.zeros(1, 513, 2, dtype=k) for k in kinds))
    for face in ("cpu", "reference"):
        with fastfpl.face(face), recorded_faces() as seen:
            transport_plan(torch.zeros(3, 2))
        assert seen == {"transport_plan": {face}}
    with recorded_faces() as seen:
        transport_plan(torch.zeros(3, 2))
    assert "triton" not in seen["transport_plan"], "the interpreter runs only where it is asked for"


def launches():
    """Every kernel at the papers' sizes, with every count of prompts in two of three dtypes."""
    from fastfpl.kernels import transport as kernels

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for i, (patches, width) in enumerate([(49, 1024), (196, 512)]):
        for j, prompts in enumerate((1, 2, 4)):
            dtype, balanced = dtypes[(i + j) % 3], bool((i + j) % 2)
            options = (0.1, 0.8, balanced, 100, 1e-3)
            x = torch.empty(1, 32, patches, width, device="meta", dtype=dtype)
            t = torch.empty(1, 100, prompts, width, device="meta", dtype=dtype)
            kernels.transport_logits_fwd(x, t, *options, measure=True, keep=True)
            kernels.transport_logits_fwd(x, t, *options, measure=False, keep=False)
            sim = torch.empty(320, patches, prompts, device="meta", dtype=dtype)
            kernels.transport_plan_fwd(sim, *options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_fit_every_card():
    assert_fits(launches)


#: What the faces are asked for beyond the papers' sizes: patches of ViT-B/16, of what is between,
#: of ViT-L-14-336 and ViT-H-14-378, which take the same tile, and the most; prompts of every tile.
LIMITS = {
    "patches": (196, 512, 729, 1024),
    "prompts": (1, 2, 3, 16),
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "balanced": (True, False),
    "clients": (1, 10),
}


def limits_launches():
    """Launch what the faces say that they take, any two of their limits together."""
    from fastfpl.kernels import transport as kernels

    def similarities(row):
        shape = (100 * row["clients"], row["patches"], row["prompts"])
        return torch.empty(shape, dtype=row["dtype"], device="meta")

    def pair(row):
        kind = {"dtype": row["dtype"], "device": "meta"}
        x = torch.empty(row["clients"], 2, row["patches"], 768, **kind)
        return x, torch.empty(row["clients"], 100, row["prompts"], 768, **kind)

    def options(row):
        return 0.1, 0.8, row["balanced"], 100, 1e-3

    def solved(row):
        return taken("transport_plan", similarities(row), *options(row))

    def scored(row):
        return taken("transport_logits", *pair(row), *options(row), False, True)

    for row in every_pair(solved, **LIMITS):
        kernels.transport_plan_fwd(similarities(row), *options(row))
    for row in every_pair(scored, **LIMITS):
        kernels.transport_logits_fwd(*pair(row), *options(row), measure=True, keep=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_fit_at_the_limits_of_the_faces():
    assert_fits(limits_launches)
