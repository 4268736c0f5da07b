"""fastfpl.ops.transport_plan: every face against the truth, and the laws of the problem."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import fastfpl
from fastfpl.errors import InputError, KindError, NotConverged, NotSupported
from fastfpl.ops import native, transport_plan
from fastfpl.ops.faces import recorded_faces
from fastfpl.reference import transport as reference
from tests.truth import assert_as_good_as_eager, assert_fences_hold, fenced

NATIVE = pytest.mark.skipif(bool(native.missing()), reason="; ".join(native.missing()) or "built")
FACES = [pytest.param("cpu", marks=NATIVE), "reference"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def similar(*shape, seed=0, dtype=torch.float64, spread=0.04):
    """Cosines as CLIP makes them: small, near each other, prompts of a class alike."""
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    prompt = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (0.22 + spread * (0.9 * patch + 0.45 * prompt)).to(dtype)


def even(value, *shape):
    return torch.full(shape, value, dtype=torch.float64)


def solved_with_info(face, sim, **options):
    with fastfpl.face(face):
        return transport_plan(sim, info=True, **options)


def solved(face, sim, **options):
    with fastfpl.face(face), recorded_faces() as seen:
        plan = transport_plan(sim, **options)
    assert seen == {"transport_plan": {face}}
    return plan


@NATIVE
@pytest.mark.parametrize("balanced", [False, True], ids=["capped", "balanced"])
@pytest.mark.parametrize("eps", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape",
    [
        *[(2, 49, 2), (2, 3, 7, 2), (3, 1, 2), (4, 17, 1), (1, 1), (0, 49, 2), (101, 2)],
        *[(2, 49, 4), (3, 15, 3), (2, 1, 5), (1, 33, 16), (0, 5, 3)],
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def test_as_good_as_eager(shape, dtype, eps, balanced):
    sim = similar(*shape, dtype=dtype)
    options = {"eps": eps, "mass": 0.8, "balanced": balanced}
    exact = solved("reference", sim.double(), tol=1e-13, **options)
    if dtype == torch.float64:  # the truth itself is no better than this
        plan = solved("cpu", sim, tol=1e-12, **options)
        torch.testing.assert_close(plan, exact, rtol=1e-9, atol=1e-14)
    else:
        eager = reference.transport_plan(sim.float(), eps, 0.8, balanced, 10_000, 1e-5)[0]
        assert_as_good_as_eager(solved("cpu", sim, **options), eager.to(dtype), exact)


@NATIVE
@pytest.mark.parametrize("patches", [49, 196])
def test_as_good_as_eager_at_the_papers_eps(patches):
    sim = similar(patches, 2, dtype=torch.float32)
    exact, ended = solved_with_info("reference", sim.double(), eps=0.01, mass=0.8, tol=1e-12)
    assert ended.iterations > 100, "a test of the slow case"
    eager = solved("reference", sim, eps=0.01, mass=0.8)
    assert_as_good_as_eager(solved("cpu", sim, eps=0.01, mass=0.8), eager, exact)


@NATIVE
@pytest.mark.parametrize("patches", [1, 2, 5, 49, 196])
@pytest.mark.parametrize("eps", [0.005, 0.01, 0.1])
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.8, 0.99, 1.0])
def test_small_eps_is_exact_where_the_published_loop_crawls(eps, mass, patches):
    # cosines over all of [-1, 1]: exponents span 400 at eps=.005. float32 can say a similarity to
    # 6e-8 and sim / eps to 1.2e-5; a plan moves by that, times what the caps pass on to other rows.
    generator = torch.Generator().manual_seed(patches)
    sim = 2 * torch.rand(24, patches, 2, generator=generator) - 1
    exact = solved("cpu", sim.double(), eps=eps, mass=mass, tol=1e-12)
    assert_optimal(sim.double(), exact, eps, mass, 1e-9)
    plan, ended = solved("cpu", sim, eps=eps, mass=mass, info=True)
    assert ended.iterations.max() <= 200
    assert ended.residual.max() <= 1e-5
    assert (plan - exact).abs().max() * patches <= 1e-3


def assert_optimal(sim, plan, eps, mass, tol, balanced=False):
    """Check the optimality conditions of the docstring's problem; ``sim`` and ``plan`` float64."""
    n_patches, n_prompts = sim.shape[-2:]
    bound = mass if balanced else 1.0
    for s, t in zip(
        sim.reshape(-1, *sim.shape[-2:]), plan.reshape(-1, *sim.shape[-2:]), strict=True
    ):
        rows = t.sum(-1) * n_patches / bound
        assert t.min() >= 0
        assert (t.sum(-2) * n_prompts / mass - 1).abs().max() <= 1e-12
        assert rows.max() <= 1 + tol
        if balanced or mass == 1:
            assert rows.min() >= 1 - tol
        # t = diag(u) K diag(v): what is left beside sim / eps is log u + log v
        left = t.log() - s / eps
        seen = t > 1e-30
        ratio = (left[:, 0] - left[:, -1])[seen.all(-1)]
        assert not ratio.numel() or ratio.max() - ratio.min() <= 1e-8
        # u is 1 in the rows below their bound, and at most 1 elsewhere
        below = rows < 1 - 1e-6
        for n in range(n_prompts):
            log_v = left[below & seen[:, n], n]
            if log_v.numel():
                assert log_v.max() - log_v.min() <= 1e-8
                assert left[seen[:, n], n].max() <= log_v.max() + 1e-8


@pytest.mark.parametrize("face", FACES)
def test_plan_solves_the_documented_problem(face):
    sim = similar(6, 49, 2)
    for eps, mass, balanced in [(0.02, 0.8, False), (0.02, 0.8, True), (0.1, 1.0, False)]:
        plan = solved(face, sim, eps=eps, mass=mass, balanced=balanced, tol=1e-12)
        assert_optimal(sim, plan, eps, mass, 1e-11, balanced)
    rows = solved(face, sim, eps=0.02, mass=0.8, tol=1e-12).sum(-1) * 49
    capped = rows > 1 - 1e-6
    assert 0.2 < capped.double().mean() < 0.8, (
        "a test of caps that bind in some rows and not in all"
    )


@pytest.mark.parametrize("face", FACES)
@given(
    patches=st.integers(1, 66),
    prompts=st.integers(1, 6),
    mass=st.sampled_from([0.05, 0.5, 0.8, 0.97, 1.0]),
    eps=st.sampled_from([0.02, 0.1, 3.0]),
    balanced=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_marginals(face, patches, prompts, mass, eps, balanced, dtype, seed):
    sim = similar(2, patches, prompts, seed=seed, dtype=dtype)
    plan = solved(face, sim, eps=eps, mass=mass, balanced=balanced, tol=1e-4)
    assert plan.dtype == dtype
    plan, slack = plan.double(), 1e-4 + ROUNDING[dtype]
    assert plan.min() >= 0
    assert (plan.sum(-2) * prompts / mass - 1).abs().max() <= ROUNDING[dtype]
    rows = plan.sum(-1) * patches
    if balanced:
        assert (rows / mass - 1).abs().max() <= slack
    else:
        assert rows.max() <= 1 + slack


@pytest.mark.parametrize("face", FACES)
@given(
    batch=st.integers(1, 5),
    patches=st.integers(1, 40),
    eps=st.sampled_from([0.05, 0.3]),
    balanced=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20)
def test_laws(face, batch, patches, eps, balanced, seed):
    sim = similar(batch, patches, 2, seed=seed)
    options = {"eps": eps, "mass": 0.7, "balanced": balanced, "tol": 1e-11}
    plan = solved(face, sim, **options)
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    near = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(solved(face, sim[:, order], **options), plan[:, order], **near)
    torch.testing.assert_close(solved(face, sim.flip(-1), **options), plan.flip(-1), **near)
    torch.testing.assert_close(solved(face, sim + 0.5, **options), plan, **near)
    torch.testing.assert_close(solved(face, 3 * sim, **options | {"eps": 3 * eps}), plan, **near)
    torch.testing.assert_close(solved(face, sim[0], **options), plan[0], **near)
    if balanced:  # the plan is proportional to its mass
        half = solved(face, sim, **options | {"mass": 0.35})
        torch.testing.assert_close(half, plan / 2, **near)


@pytest.mark.parametrize("face", FACES)
def test_all_mass_leaves_only_the_balanced_plan(face):
    sim = similar(3, 30, 2)
    capped, balanced = (solved(face, sim, eps=0.05, mass=1, balanced=b) for b in (False, True))
    assert torch.equal(capped, balanced)
    nearly = solved(face, sim, eps=0.05, mass=1 - 1e-7, max_iter=10**6, tol=1e-9)
    assert 1e-12 < (nearly - balanced).abs().max() * 30 < 1e-3


@pytest.mark.parametrize("face", FACES)
def test_closed_forms(face):
    near = {"rtol": 1e-9, "atol": 0.0}
    sim, eps = similar(5, 2, 2, spread=0.2), 0.1
    # two by two, balanced: the diagonal holds half a sigmoid of half the double difference
    lift = (sim[:, 0, 0] + sim[:, 1, 1] - sim[:, 0, 1] - sim[:, 1, 0]) / (2 * eps)
    plan = solved(face, sim, eps=eps, tol=1e-13)
    torch.testing.assert_close(plan[:, 0, 0], lift.sigmoid() / 2, **near)
    torch.testing.assert_close(plan[:, 0, 1], (1 - lift.sigmoid()) / 2, **near)
    # so little mass that no row meets its bound: a softmax over the patches
    sim = similar(4, 31, 2)
    plan = solved(face, sim, eps=0.1, mass=0.05, tol=1e-13)
    torch.testing.assert_close(plan, (sim / 0.1).softmax(-2) * 0.025, **near)
    # one patch, one prompt
    torch.testing.assert_close(solved(face, sim[:, :1], mass=0.6), even(0.3, 4, 1, 2))
    torch.testing.assert_close(
        solved(face, sim[..., :1], mass=0.6, balanced=True), even(0.6 / 31, 4, 31, 1)
    )
    # by hand: at a low temperature each prompt fills its best row and starts its second
    sim = torch.tensor([[0.9, 0.0], [0.7, 0.1], [0.2, 0.6], [0.0, 0.8]]).double()
    table = torch.tensor([[0.25, 0.0], [0.05, 0.0], [0.0, 0.05], [0.0, 0.25]]).double()
    plan = solved(face, sim, eps=0.01, mass=0.6, tol=1e-12)
    torch.testing.assert_close(plan, table, rtol=0.0, atol=1e-8)
    # at a high temperature similarities no longer matter
    plan = solved(face, similar(2, 10, 2), eps=1e9, mass=0.6, tol=1e-12)
    torch.testing.assert_close(plan, even(0.03, 2, 10, 2), **near)


def test_reference_takes_the_published_steps():
    # FedOTP's loop on plain numbers, for one problem; seven steps, before anything has converged
    sim, eps, mass = similar(49, 2), 0.1, 0.8
    kernel = (-(1 - sim) / eps).exp()
    v = torch.ones(2).double()
    for _ in range(7):
        u = (1 / (49 * kernel @ v)).clamp(max=1)
        v = (mass / 2) / (kernel.T @ u)
    published = u[:, None] * kernel * v
    plan, iterations, residual = reference.transport_plan(sim, eps, mass, False, 7, 1e-13)
    assert int(iterations) == 7
    assert residual > 1e-6
    torch.testing.assert_close(plan, published, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("face", FACES)
def test_problems_do_not_influence_each_other(face):
    easy, hard = similar(1, 49, 2, seed=1, spread=0.001), similar(1, 49, 2, seed=2, spread=0.5)
    with fastfpl.face(face):
        both, ended = transport_plan(torch.cat([easy, hard]), eps=0.05, mass=0.8, info=True)
        alone, ended_alone = transport_plan(easy, eps=0.05, mass=0.8, info=True)
    assert ended.iterations[0] < ended.iterations[1]
    assert ended.iterations[0] == ended_alone.iterations[0]
    torch.testing.assert_close(both[:1], alone, rtol=1e-12, atol=0.0)


@NATIVE
@pytest.mark.parametrize(
    ("problems", "prompts", "spread"),
    [(9001, 2, 0.04), (3001, 3, 0.04), (6001, 4, 1.0)],
    ids=["pair", "many", "many in double"],
)
def test_threads_do_not_change_a_bit(problems, prompts, spread):
    sim = similar(problems, 37, prompts, dtype=torch.float32, spread=spread)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solved("cpu", sim, eps=0.02, mass=0.8)
        torch.set_num_threads(5)
        assert torch.equal(solved("cpu", sim, eps=0.02, mass=0.8), one)
        # whichever thread finds it: the first value that is not finite is named
        sim[[10, -10], 5, 1] = torch.tensor([math.inf, math.nan])
        with pytest.raises(InputError, match=r"got inf at \(10, 5, 1\)"):
            solved("cpu", sim)
    finally:
        torch.set_num_threads(before)
    rows = torch.tensor([0, 1, problems // 2, problems - 2, problems - 1])
    sim = similar(problems, 37, prompts, dtype=torch.float32, spread=spread)
    assert torch.equal(solved("cpu", sim[rows], eps=0.02, mass=0.8), one[rows])


@pytest.mark.parametrize("face", FACES)
def test_any_strides(face):
    sim = similar(4, 2, 15, 3)
    options = {"eps": 0.05, "mass": 0.8}
    views = {
        "transposed": sim[..., :2].transpose(0, 1),
        "sliced": sim[:, :, ::2, 1:],
        "expanded": sim[:1, :, :, :2].expand(3, 2, 15, 2),
        "alike": sim[..., :1].expand(4, 2, 15, 2),
        "negative": torch._neg_view(sim[..., :2]),
    }
    for name, view in views.items():
        packed = view.resolve_neg().clone(memory_format=torch.contiguous_format)
        plan, expected = solved(face, view, **options), solved(face, packed, **options)
        assert plan.is_contiguous(), name
        # torch's reductions round by the strides, the C++ face never sees them
        rtol = 0.0 if face == "cpu" else 1e-10
        torch.testing.assert_close(plan, expected, rtol=rtol, atol=0.0)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 49, 2), (1, 1, 2), (5, 17, 1), (3, 17, 3), (2, 1, 16)])
def test_reads_and_writes_stay_inside(shape, dtype):
    sim = fenced(similar(*shape, dtype=dtype))
    plan = fenced(torch.zeros(shape, dtype=dtype))
    iterations = fenced(torch.zeros(shape[0], dtype=torch.int64))
    residual = fenced(torch.zeros(shape[0], dtype=dtype))
    bad = native.load().transport_plan(
        sim, plan, iterations, residual, 0.05, 0.8, False, 1000, 1e-5, 4
    )
    assert bad == -1
    assert torch.equal(plan, solved("cpu", sim.clone(), eps=0.05, mass=0.8))
    for tensor in (plan, iterations, residual):
        assert_fences_hold(tensor)


def test_no_gradient_flows_through_the_plan():
    sim = similar(2, 9, 2, dtype=torch.float32).requires_grad_()
    plan = transport_plan(sim, mass=0.8)
    assert not plan.requires_grad
    (plan * sim).sum().backward()
    assert torch.equal(sim.grad, plan)


def test_survives_torch_compile():
    sim = similar(2, 9, 2, dtype=torch.float32)

    def value(sim):
        return (transport_plan(sim * 1.0, eps=0.05, mass=0.8) * sim).sum()

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sim), value(sim))
    arguments = (sim, 0.05, 0.8, False, 1000, 1e-5, True)
    torch.library.opcheck(torch.ops.fastfpl.transport_plan.default, arguments)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("prompts", [2, 3])
def test_says_when_it_has_not_converged(face, prompts):
    sim = similar(2, 3, 49, prompts)
    with fastfpl.face(face):
        with pytest.raises(
            NotConverged, match=r"6 of 6 problems .* tol=1e-09 after at most 2 iter"
        ):
            transport_plan(sim, eps=0.02, mass=0.8, max_iter=2, tol=1e-9)
        plan, ended = transport_plan(sim, eps=0.02, mass=0.8, max_iter=2, tol=1e-9, info=True)
    assert ended.iterations.tolist() == [[2] * 3] * 2
    assert (ended.residual > 1e-9).all()
    # columns are exact at any time, and the residual bounds the rows
    torch.testing.assert_close(plan.sum(-2), even(0.8 / prompts, 2, 3, prompts))
    assert (plan.sum(-1).amax(-1) * 49 <= ended.residual.exp() + 1e-12).all()


@NATIVE
def test_a_tolerance_below_rounding_spoils_nothing():
    sim = similar(64, 49, 2, dtype=torch.float32)
    for mass in (0.3, 0.8, 1.0):
        exact = solved("cpu", sim.double(), eps=0.01, mass=mass, tol=1e-12)
        with fastfpl.face("cpu"):
            plan, ended = transport_plan(sim, eps=0.01, mass=mass, tol=1e-12, info=True)
        assert ended.residual.max() < 1e-5
        assert (plan - exact).abs().max() * 49 < 1e-4


@pytest.mark.parametrize("face", FACES)
def test_refuses_what_is_not_finite(face):
    for value, shown in [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (3e38, "3.*e[+]38"),
    ]:
        sim = similar(2, 3, 7, 2, dtype=torch.float32)
        sim[1, 0, 5, 1] = value
        sim[1, 2, 0, 0] = math.nan
        with pytest.raises(
            InputError, match=rf"finite; got {shown} at \(1, 0, 5, 1\) with eps=0.1"
        ):
            solved(face, sim)


def test_refuses_in_sentences():
    sim = similar(2, 7, 2)
    for options, message in [
        ({"eps": 0.0}, r"fastfpl.ops.transport_plan: eps must be positive and finite; got 0.0"),
        ({"eps": math.nan}, r"eps must be positive and finite; got nan"),
        ({"mass": 1.1}, r"mass must lie in \(0, 1\]; got 1.1"),
        ({"mass": 0}, r"mass must lie in \(0, 1\]; got 0"),
        ({"tol": -1.0}, r"tol must be positive and finite; got -1.0"),
        ({"max_iter": 0}, r"max_iter must be at least 1; got 0"),
    ]:
        with pytest.raises(InputError, match=message):
            transport_plan(sim, **options)
    with pytest.raises(InputError, match=r"sim must have shape \(..., P, N\); got \(7,\)"):
        transport_plan(sim[0, :, 0])
    with pytest.raises(InputError, match=r"sim must have patches and prompts; got \(2, 0, 2\)"):
        transport_plan(sim[:, :0])
    with pytest.raises(KindError, match=r"sim must be float16, .*; got torch.int64"):
        transport_plan(sim.long())
    with pytest.raises(KindError, match=r"sim must be a torch.Tensor; got ndarray"):
        transport_plan(sim.numpy())


@NATIVE
def test_more_prompts_go_to_the_reference():
    sim = similar(2, 9, 17)
    with recorded_faces() as seen:
        plan = transport_plan(sim, mass=0.8)
    assert seen == {"transport_plan": {"reference"}}
    torch.testing.assert_close(plan.sum(-2), even(0.8 / 17, 2, 17))
    message = r"cpu: N = 17 prompts, at most 16"
    with fastfpl.face("cpu"), pytest.raises(NotSupported, match=message):
        transport_plan(sim)


@NATIVE
def test_compiled_entry_refuses_what_it_cannot_read():
    entry = native.load().transport_plan
    good = {
        "sim": similar(2, 7, 2, dtype=torch.float32),
        "plan": torch.zeros(2, 7, 2),
        "iterations": torch.zeros(2, dtype=torch.int64),
        "residual": torch.zeros(2),
    }
    options = {"eps": 0.1, "mass": 0.8, "balanced": False, "max_iter": 9, "tol": 1.0, "threads": 1}
    assert entry(**good, **options) == -1
    with FakeTensorMode():
        fake = torch.zeros(2, 7, 2)
    sim = good["sim"]
    for name, tensor, kind, message in [
        ("sim", sim.numpy(), TypeError, r"sim must be a torch.Tensor; got numpy.ndarray"),
        ("sim", sim.half(), TypeError, r"sim must be float32; got float16"),
        ("sim", sim.bfloat16(), TypeError, r"sim must be float32; got bfloat16"),
        ("sim", sim.cfloat().conj(), TypeError, r"sim must be float32; got complex64"),
        ("sim", sim.double(), TypeError, r"plan must be float64; got float32"),
        ("sim", torch._neg_view(sim), ValueError, r"sim must be resolved; got a negative view"),
        ("sim", sim[:, ::2], ValueError, r"sim must be contiguous; got strides \(14, 4, 1\)"),
        ("sim", sim[:1].expand(2, 7, 2), ValueError, r"contiguous; got strides \(0, 2, 1\)"),
        ("sim", sim[0, 0], ValueError, r"at least 2 dimensions; got shape \(2,\)"),
        ("sim", sim[:, :0], ValueError, r"sim must have patches; got 0"),
        ("sim", sim.new_zeros(2, 7, 17), ValueError, r"sim must have 1 to 16 prompts; got 17"),
        ("sim", sim.new_zeros(2, 7, 0), ValueError, r"sim must have 1 to 16 prompts; got 0"),
        ("plan", sim[:1].clone(), ValueError, r"plan must have 28 elements; got shape \(1, 7, 2\)"),
        ("iterations", torch.zeros(2), TypeError, r"iterations must be int64; got float32"),
        (
            "residual",
            torch.zeros(3),
            ValueError,
            r"residual must have 2 elements; got shape \(3,\)",
        ),
        ("sim", fake, (TypeError, UserWarning), r"FakeTensor|data pointer"),
        ("sim", sim.to("meta"), Exception, r"meta|device"),
    ]:
        with pytest.raises(kind, match=message):
            entry(**good | {name: tensor}, **options)
    weights = {"rows": torch.ones(2, 7), "columns": torch.ones(2, 2), "logits": torch.zeros(2)}
    for names, message in [
        (["rows"], r"columns must come with rows; got one of both"),
        (["columns"], r"columns must come with rows; got one of both"),
        (["rows", "columns", "logits"], r"logits must come without rows; got both"),
    ]:
        with pytest.raises(ValueError, match=message):
            entry(**good, **options, **{name: weights[name] for name in names})
    assert np.isfinite(good["plan"].numpy()).all()


# --- more than two prompts, and how even a plan is ---------------------------------------------


@NATIVE
@pytest.mark.parametrize("prompts", [3, 4, 8, 16])
@pytest.mark.parametrize("patches", [1, 7, 49])
def test_many_prompts_are_exact_where_the_published_loop_crawls(patches, prompts):
    # cosines over all of [-1, 1]: exponents span 400 at eps=.005
    generator = torch.Generator().manual_seed(patches)
    sim = 2 * torch.rand(8, patches, prompts, generator=generator) - 1
    for eps, mass in [(0.005, 0.8), (0.005, 0.999), (0.005, 1.0), (0.01, 0.01), (0.05, 0.99)]:
        options = {"eps": eps, "mass": mass, "max_iter": 2000}
        exact = solved("cpu", sim.double(), tol=1e-10, **options)
        assert_optimal(sim.double(), exact, eps, mass, 1e-8)
        plan, ended = solved_with_info("cpu", sim, **options)
        assert ended.residual.max() <= 1e-5
        assert (plan - exact).abs().max() * patches <= 2e-3


@NATIVE
@given(
    patches=st.integers(1, 60),
    prompts=st.integers(1, 16),
    eps=st.sampled_from([0.005, 0.01, 0.05, 1.0]),
    mass=st.sampled_from([0.02, 0.5, 0.8, 0.999, 1.0]),
    kind=st.sampled_from(["ties", "alike", "one-hot", "far", "flat", "twice"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_adversarial_similarities(patches, prompts, eps, mass, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    sim = 2 * torch.rand(2, patches, prompts, generator=generator, dtype=torch.float64) - 1
    if kind == "ties":
        sim = sim.round()
    elif kind == "alike":
        sim = sim[..., :1].expand_as(sim)
    elif kind == "one-hot":
        sim = torch.nn.functional.one_hot(sim.argmax(-1), prompts).double()
    elif kind == "far":
        sim[..., 0] += 1
        sim[:, 0] -= 3
    elif kind == "flat":
        sim = sim[:, :1, :1].expand_as(sim)
    elif kind == "twice":
        sim = torch.cat([sim, sim], 1)
    sim = sim.to(dtype)
    with fastfpl.face("cpu"):
        plan, ended = transport_plan(sim, eps=eps, mass=mass, info=True)
    assert (ended.residual <= 1e-5).all()
    plan, patches = plan.double(), plan.shape[-2]
    assert plan.min() >= 0
    assert (plan.sum(-2) * prompts / mass - 1).abs().max() <= ROUNDING[torch.float32]
    rows = plan.sum(-1) * patches
    assert rows.max() <= 1 + 4e-5
    if mass == 1:
        assert rows.min() >= 1 - 4e-5
    if kind in ("alike", "flat"):
        torch.testing.assert_close(plan, plan[..., :1].expand_as(plan), rtol=1e-4, atol=1e-9)
    if kind == "flat":
        even_plan = torch.full_like(plan, mass / patches / prompts)
        torch.testing.assert_close(plan, even_plan, rtol=1e-4, atol=0.0)


@NATIVE
def test_many_prompts_say_the_same_as_few():
    # a prompt that is there twice shares its mass: the general solver against the root form
    sim = similar(5, 33, 2)
    options = {"eps": 0.02, "mass": 0.8, "tol": 1e-12}
    pair = solved("cpu", sim, **options)
    four = solved("cpu", sim.repeat_interleave(2, -1), **options)
    torch.testing.assert_close(four, pair.repeat_interleave(2, -1) / 2, rtol=1e-9, atol=1e-14)
    order = torch.tensor([2, 0, 1])
    sim = similar(5, 33, 3)
    plan = solved("cpu", sim, **options)
    torch.testing.assert_close(solved("cpu", sim[..., order], **options), plan[..., order])


@NATIVE
def test_pot_solves_the_same_capped_problem():
    import ot

    sim, eps = similar(20, 4, spread=0.2), 0.1
    a, b = even(1 / 20, 20), even(0.2, 4)
    exact = ot.partial.entropic_partial_wasserstein(
        *(x.numpy() for x in (a, b, 1 - sim)), eps, m=0.8, numItermax=20_000, stopThr=1e-15
    )
    plan = solved("cpu", sim, eps=eps, mass=0.8, tol=1e-12)
    torch.testing.assert_close(plan, torch.from_numpy(exact), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("face", FACES)
def test_entropy_says_how_even_a_plan_is(face):
    def entropy(sim, **options):
        return solved_with_info(face, sim, **options)[1].entropy

    assert entropy(even(0.3, 2, 5, 3), mass=0.7).tolist() == pytest.approx([1, 1])
    # one patch and two prompts, or the diagonal of two by two: half of the places
    half = math.log(2) / math.log(4)
    diagonal = torch.eye(2).double()[None]
    assert entropy(diagonal, eps=0.01, max_iter=10**5).item() == pytest.approx(half)
    assert entropy(even(0.3, 1, 1, 1)).tolist() == [1]
    sim = similar(3, 4, 7, 2)
    plan, ended = solved_with_info(face, sim, mass=0.8, eps=0.05)
    part = plan / 0.8
    expected = -(part * part.log()).sum((-2, -1)) / math.log(14)
    torch.testing.assert_close(ended.entropy, expected)
    assert (ended.entropy > 0.5).all()
    assert (ended.entropy < 0.99).all()
