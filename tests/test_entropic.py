"""fastfpl.ops.sinkhorn: both faces against the truth, POT and GeomLoss, and gradients."""

import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastfpl
from fastfpl.errors import InputError, KindError, NotConverged, NotSupported
from fastfpl.ops import native, sinkhorn, transport_plan
from fastfpl.ops.faces import recorded_faces
from fastfpl.reference import entropic as reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from geomloss import ot as geomloss

NATIVE = pytest.mark.skipif(bool(native.missing()), reason="; ".join(native.missing()) or "built")
FACES = [pytest.param("cpu", marks=NATIVE), "reference"]


def problem(*shape, seed=0, dtype=torch.float64, zeros=False):
    """Weights that differ, of equal totals, and costs in [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    M = torch.rand(*shape, generator=draw, dtype=torch.float64)
    a = 0.1 + torch.rand(*shape[:-1], generator=draw, dtype=torch.float64)
    b = 0.1 + torch.rand(*shape[:-2], shape[-1], generator=draw, dtype=torch.float64)
    if zeros:
        a[..., 0], b[..., -1] = 0, 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return a.to(dtype), b.to(dtype), M.to(dtype)


def solved(face, *arguments, **options):
    with fastfpl.face(face), recorded_faces() as seen:
        plan = sinkhorn(*arguments, **options)
    assert seen == {"sinkhorn": {face}}
    return plan


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (1, 4), (7, 7), (5, 1)], ids=str)
@pytest.mark.parametrize("reg", [0.05, 1.0])
def test_is_ot_sinkhorn(face, shape, reg):
    a, b, M = problem(*shape)
    exact = ot.sinkhorn(*(x.numpy() for x in (a, b, M)), reg, numItermax=100_000, stopThr=1e-14)
    plan = solved(face, a, b, M, reg, stopThr=1e-12, numItermax=10**5)
    torch.testing.assert_close(plan, torch.from_numpy(exact), rtol=1e-8, atol=1e-13)
    # and without weights
    exact = ot.sinkhorn([], [], M.numpy(), reg, numItermax=100_000, stopThr=1e-14)
    for nothing in (None, []):
        plan = solved(face, nothing, nothing, M, reg, stopThr=1e-12, numItermax=10**5)
        torch.testing.assert_close(plan, torch.from_numpy(exact), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shape", [(12, 3), (3, 12)], ids=str)
@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("smaller", ["a", "b"])
def test_is_entropic_partial_wasserstein(face, shape, share, smaller):
    a, b, M = problem(*shape, seed=1)
    a, b = (share * a, b) if smaller == "a" else (a, share * b)
    exact = ot.partial.entropic_partial_wasserstein(
        *(x.numpy() for x in (a, b, M)),
        0.1,
        numItermax=30_000,
        stopThr=1e-15,
    )
    plan = solved(face, a, b, M, 0.1, partial=True, stopThr=1e-12, numItermax=10**6)
    torch.testing.assert_close(plan, torch.from_numpy(exact), rtol=1e-6, atol=1e-9)
    bounded, sums = (a, plan.sum(-1)) if smaller == "b" else (b, plan.sum(-2))
    if share == 0.4 and len(bounded) == 12:
        capped = sums > bounded * (1 - 1e-6)
        assert 0 < capped.double().mean() < 1, "a test of bounds that bind in some places"


@pytest.mark.parametrize("face", FACES)
def test_is_both_batched_solvers(face):
    a, b, M = problem(6, 20, 5, seed=2)
    plan = solved(face, a, b, M, 0.1, stopThr=1e-12)
    theirs = ot.batch.solve_batch(M, 0.1, a, b, max_iter=20_000, tol=1e-14).plan
    torch.testing.assert_close(plan, theirs, rtol=1e-8, atol=1e-13)
    # it lowers the temperature all the way: only its last step is taken at the one asked for
    theirs = geomloss.solve_batch(M, reg=0.1, a=a, b=b, max_iter=3000).plan
    torch.testing.assert_close(plan, theirs, rtol=1e-2, atol=1e-6)


@NATIVE
@given(
    P=st.integers(1, 40),
    N=st.integers(1, 16),
    reg=st.sampled_from([0.005, 0.05, 2.0]),
    kind=st.sampled_from(["apart", "ties", "alike", "zeros"]),
    mass=st.sampled_from([0.3, 0.999, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_marginals(P, N, reg, kind, mass, dtype, seed):
    if kind == "zeros" and min(P, N) == 1:
        kind = "apart"
    a, b, M = problem(2, P, N, seed=seed, dtype=dtype, zeros=kind == "zeros")
    if kind == "ties":
        M = (4 * M).round() / 4
    elif kind == "alike":
        M = M[..., :1].expand_as(M)
    partial = mass < 1
    tol = 1e-9 if dtype == torch.float64 else 1e-4
    plan = sinkhorn(a, mass * b, M, reg, partial=partial, stopThr=tol, numItermax=10**5)
    slack = 4 * tol
    columns, rows = plan.sum(-2), plan.sum(-1)
    assert plan.min() >= 0
    assert (columns - mass * b).abs().max() <= slack * b.max()
    assert (rows <= a * (1 + slack) + 1e-12).all()
    if not partial:
        assert ((rows - a).abs() <= slack * a + 1e-12).all()


@pytest.mark.parametrize("face", FACES)
def test_laws(face):
    a, b, M = problem(3, 9, 4, seed=3)
    near = {"rtol": 1e-8, "atol": 1e-13}
    options = {"stopThr": 1e-12, "numItermax": 10**5}
    plan = solved(face, a, b, M, 0.1, **options)

    def law(expected, *arguments, **more):
        torch.testing.assert_close(solved(face, *arguments, **options, **more), expected, **near)

    law(plan.mT, b, a, M.mT, 0.1)
    law(plan, a, b, 3 * M + 1, 0.3)
    law(2 * plan, 2 * a, 2 * b, M, 0.1)
    law(plan[1], a[1], b[1], M[1], 0.1)
    law(plan.flip(-1), a, b.flip(-1), M.flip(-1), 0.1)
    # broadcast: one pair of weights for all costs
    many = solved(face, a[0], b[0], M, 0.1, **options)
    law(many[2], a[0], b[0], M[2], 0.1)
    # at a high temperature only the weights count
    law(a.unsqueeze(-1) * b.unsqueeze(-2), a, b, M, 1e9)
    # equal weights are the transport of patches onto prompts
    fewer = solved(
        face, None, torch.full((4,), 0.2, dtype=torch.float64), M, 0.1, partial=True, **options
    )
    expected = transport_plan(-M, eps=0.1, mass=0.8, tol=1e-12)
    torch.testing.assert_close(fewer, expected, **near)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 3), (3, 5)], ids=str)
def test_gradcheck(face, partial, shape):
    a, b, M = problem(*shape, seed=4)
    # so much that some rows reach their bound, and not all
    mass = {(2, 6, 3): 0.7, (3, 5): 0.9}[shape]
    leaves = [x.detach().requires_grad_() for x in (a, mass * b if partial else b, M)]

    def run(a, b, M):
        if not partial:  # totals that differ a little are refused only beyond a thousandth
            return solved(face, a, b, M, 0.2, stopThr=1e-14, numItermax=10**5)
        return solved(face, a, b, M, 0.2, partial=True, stopThr=1e-14, numItermax=10**5)

    rows = run(*leaves).sum(-1)
    if partial:
        slack = (rows / leaves[0] - 1).abs()
        assert ((slack < 1e-9) | (slack > 1e-4)).all(), "no row is near its bound"
        assert 0 < (slack < 1e-9).double().mean() < 1
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


@pytest.mark.parametrize("partial", [False, True])
def test_gradients_are_those_of_the_unrolled_iteration(partial):
    a, b, M = problem(2, 6, 3, seed=4)
    leaves = [x.detach().requires_grad_() for x in (a, 0.7 * b if partial else b, M)]
    weight = torch.linspace(-1, 2, M.numel()).double().view_as(M)
    a, b, M = leaves
    unrolled = reference.sinkhorn(M, a, b, 0.2, partial, 10**4, 1e-14)[0]
    exact = torch.autograd.grad((unrolled * weight).sum(), leaves)
    plan = sinkhorn(a, b, M, 0.2, partial=partial, stopThr=1e-14)
    mine = torch.autograd.grad((plan * weight).sum(), leaves)
    for got, true in zip(mine, exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("partial", [False, True])
def test_weights_of_zero_take_no_mass(face, partial):
    a, b, M = problem(3, 7, 4, seed=6)
    a[:, 2], b[:, 1] = 0, 0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    options = {"partial": partial, "stopThr": 1e-12, "numItermax": 10**5}
    rows, columns = torch.tensor([0, 1, 3, 4, 5, 6]), torch.tensor([0, 2, 3])
    b = 0.7 * b if partial else b
    plan = solved(face, a, b, M, 0.1, **options)
    assert not plan[:, 2].any()
    assert not plan[..., 1].any()
    without = solved(face, a[:, rows], b[:, columns], M[:, rows][..., columns], 0.1, **options)
    torch.testing.assert_close(plan[:, rows][..., columns], without, rtol=1e-8, atol=1e-13)


def test_more_weights_than_the_compiled_face_takes():
    a, b, M = problem(2, 20, 18)
    with recorded_faces() as seen:
        plan = sinkhorn(a, b, M, 0.2)
    assert seen == {"sinkhorn": {"reference"}}
    torch.testing.assert_close(plan.sum(-1), a)
    if not native.missing():
        message = r"cpu: N = 18 prompts, at most 16"
        with fastfpl.face("cpu"), pytest.raises(NotSupported, match=message):
            sinkhorn(a, b, M, 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    a, b, M = problem(2, 9, 3, dtype=dtype)
    a, b = (w.new_full(w.shape, 1 / w.shape[-1]) for w in (a, b))
    plan = sinkhorn(a, b, M, 0.1)
    assert plan.dtype == dtype
    exact = sinkhorn(None, None, M.double(), 0.1)
    assert (plan.double() - exact).abs().max() < 0.01 * exact.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_sixteen_bits_have_one_total(dtype):
    draw = torch.Generator().manual_seed(0)
    for P in range(1, 257):
        M = torch.rand(P, 3, generator=draw).to(dtype)
        plan = sinkhorn(None, None, M, 1.0)
        assert plan.dtype == dtype
        # what a caller would make: shares of a total, each rounded as the total was
        a, b = (0.1 + torch.rand(n, generator=draw).to(dtype) for n in (P, 3))
        a, b = a / a.sum(), b / b.sum()
        given = sinkhorn(a, b, M, 1.0).double()
        near = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(given.sum(-2), b.double(), rtol=near, atol=near / 256)
        torch.testing.assert_close(given.sum(-1), a.double(), rtol=near, atol=near / 256)
    wide = b.float() / b.float().sum()
    plan = sinkhorn(None, wide, M, 1.0)
    assert plan.dtype == dtype
    torch.testing.assert_close(plan.double().sum(-2), wide.double(), rtol=near, atol=near / 256)
    # and no more than rounding is forgiven
    with pytest.raises(InputError, match="a and b must have the same total"):
        sinkhorn(a, b * (1 + 4 * torch.finfo(dtype).eps), M, 1.0)
    with pytest.raises(InputError, match="a and b must have the same total"):
        sinkhorn(a.float() * 1.01, b.float(), M, 1.0)
    with pytest.raises(
        KindError, match=rf"a must be {dtype} on cpu as M is, or torch.float32; got"
    ):
        sinkhorn(a.double(), b, M, 1.0)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(("shape", "seed", "share"), [((12, 3), 7, 0.9), ((100, 5), 3, 0.9)])
def test_a_tolerance_near_rounding_is_met(face, shape, seed, share):
    # the shares are right before the level is, which only free rows follow
    a, b, M = problem(*shape, seed=seed)
    b = share * b
    plan, log = solved(face, a, b, M, 1.0, partial=True, stopThr=1e-13, numItermax=10**5, log=True)
    assert log["err"] <= 1e-13
    exact = ot.partial.entropic_partial_wasserstein(
        *(x.numpy() for x in (a, b, M)),
        1.0,
        numItermax=30_000,
        stopThr=1e-16,
    )
    torch.testing.assert_close(plan, torch.from_numpy(exact), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("partial", [False, True])
def test_arguments_of_any_view(face, partial):
    a, b, M = problem(2, 9, 4, seed=5)
    b = 0.8 * b if partial else b
    plan = solved(face, a, b, M, 0.1, partial=partial)
    views = [
        [torch._neg_view(-x) for x in (a, b, M)],
        [torch.complex(x, -x).conj().imag for x in (a, b, M)],  # negative, two numbers apart
        [torch.stack((x, x), -1)[..., 0] for x in (a, b, M)],
    ]
    for view in views:
        torch.testing.assert_close(solved(face, *view, 0.1, partial=partial), plan)
        gradients = []
        for leaves in (view, (a, b, M)):
            leaves = [x.detach().requires_grad_() for x in leaves]
            weight = torch._neg_view(torch.linspace(-1, 2, M.numel()).double().view_as(M))
            found = solved(face, *leaves, 0.1, partial=partial)
            gradients.append(torch.autograd.grad(found, leaves, weight))
        for mine, packed in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, packed)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_changes_no_number(face, kind, dtype):
    a, b, M = problem(2, 9, 4, seed=5, dtype=dtype)
    found = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (a, b, M)]
        with torch.autocast("cpu", dtype=kind, enabled=enabled):
            plan = solved(face, *leaves, 0.1)
            found.append([plan, *torch.autograd.grad(plan.square().sum(), leaves)])
    for plain, cast in zip(*found, strict=True):
        assert cast.dtype == plain.dtype == dtype
        assert torch.equal(cast, plain)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("partial", [False, True])
def test_every_kind_of_derivative(face, partial):
    a, b, M = problem(5, 3, seed=4)
    b = 0.7 * b if partial else b

    def run(a, b, M):
        return solved(face, a, b, M, 0.2, partial=partial, stopThr=1e-13, numItermax=10**5)

    leaves = [x.clone().requires_grad_() for x in (a, b, M)]
    assert torch.autograd.gradcheck(
        run, leaves, atol=1e-6, check_forward_ad=True, check_batched_grad=False
    )
    assert torch.autograd.gradgradcheck(run, leaves, atol=1e-5)
    for backward, forward in zip(
        torch.func.jacrev(run, argnums=(0, 1, 2))(a, b, M),
        torch.func.jacfwd(run, argnums=(0, 1, 2))(a, b, M),
        strict=True,
    ):
        torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-12)

    def value(M):
        return (run(a, b, M) * M).sum()

    exact = torch.autograd.functional.hessian(value, M)
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(hessian(value)(M), exact, rtol=1e-8, atol=1e-10)
    with pytest.raises(NotSupported, match="forward mode must not lie within forward mode; got 2"):
        torch.func.jacfwd(torch.func.jacfwd(value))(M)
    both = torch.stack([M, 0.5 * M])
    each = torch.stack([value(M), value(0.5 * M)])
    torch.testing.assert_close(torch.vmap(value)(both), each, rtol=1e-9, atol=1e-12)
    with pytest.raises(NotSupported, match=r"got a slice that torch\.func\.vmap makes; give all"):
        torch.vmap(lambda M: torch.func.jvp(value, (M,), (M,))[1])(both)


@pytest.mark.parametrize("face", FACES)
def test_log_says_how_it_ended(face):
    a, b, M = problem(2, 3, 9, 4)
    plan, log = solved(face, a, b, M, 0.1, log=True)
    assert plan.shape == M.shape
    assert log["niter"].shape == log["err"].shape == (2, 3)
    assert (log["err"] <= 1e-9).all()
    with fastfpl.face(face):
        with pytest.raises(NotConverged, match=r"6 of 6 problems ended above stopThr=1e-12 after"):
            sinkhorn(a, b, M, 0.01, numItermax=2, stopThr=1e-12)
        _, log = sinkhorn(a, b, M, 0.01, numItermax=2, stopThr=1e-12, log=True)
    assert (log["err"] > 1e-12).all()
    assert (log["niter"] == 2).all()


@pytest.mark.parametrize("face", FACES)
def test_refuses_what_is_not_finite(face):
    for value, shown in [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]:
        a, b, M = problem(2, 7, 3)
        M[1, 5, 1] = value
        with pytest.raises(
            InputError, match=rf"M / reg must be finite; got {shown} at \(1, 5, 1\)"
        ):
            solved(face, a, b, M, 0.1)


def test_refuses_in_sentences():
    a, b, M = problem(2, 7, 3)
    bad = a.clone()
    bad[1, 3] = -0.5
    worse = b.clone()
    worse[0, 2] = math.nan
    for arguments, options, kind, message in [
        ((a, b, M, 0.0), {}, InputError, r"fastfpl.ops.sinkhorn: reg must be positive and finite;"),
        ((a, b, M, 1.0), {"stopThr": 0.0}, InputError, r"stopThr must be positive and finite; got"),
        ((a, b, M, 1.0), {"numItermax": 0}, InputError, r"numItermax must be at least 1; got 0"),
        (
            (bad, b, M, 1.0),
            {},
            InputError,
            r"a must be finite and at least 0; got -0.5 at \(1, 3\)",
        ),
        ((a, worse, M, 1.0), {}, InputError, r"b must be finite and at least 0; got nan at \(0, 2"),
        ((0 * a, b, M, 1.0), {}, InputError, r"a must have a positive total; got 0 at \(0,\)"),
        ((a, 2 * b, M, 1.0), {}, InputError, r"a and b must have the same total without partial;"),
        ((a, b, M[0, 0], 1.0), {}, InputError, r"M must have shape \(..., P, N\); got \(3,\)"),
        ((a, b, M[:, :0], 1.0), {}, InputError, r"M must have rows and columns; got \(2, 0, 3\)"),
        ((b, a, M, 1.0), {}, InputError, r"a must have shape \(..., 7\) for M \(2, 7, 3\); got"),
        ((a[:, None].expand(2, 3, 7), b, M, 1.0), {}, InputError, "leading dimensions of a, b and"),
        (
            (a.float(), b, M, 1.0),
            {},
            KindError,
            r"a must be torch.float64 on cpu as M is; got torch",
        ),
        (([0.5, 0.5], b, M, 1.0), {}, KindError, r"a must be a torch.Tensor or None; got list"),
        ((a, b, M.long(), 1.0), {}, KindError, r"M must be float16, .*; got torch.int64"),
        ((a, b, np.ones((7, 3)), 1.0), {}, KindError, r"M must be a torch.Tensor; got ndarray"),
    ]:
        with pytest.raises(kind, match=message):
            sinkhorn(*arguments, **options)
    mixed = torch.stack([a[0], 2 * a[1]])
    for b_ in (torch.stack([b[0], 3 * b[1]]), torch.stack([1.5 * b[0], b[1]])):
        with pytest.raises(InputError, match="in all problems or"):
            sinkhorn(mixed, b_, M, 1.0, partial=True)


def test_nothing_to_plan():
    a, b, M = problem(0, 5, 3)
    assert sinkhorn(a, b, M, 0.1).shape == (0, 5, 3)
