"""fastfpl.ops.transport_logits: every face against the truth, its pieces, gradients and laws."""

import contextlib
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastfpl
from fastfpl.errors import InputError, KindError, NotConverged, NotSupported
from fastfpl.ops import transport_logits, transport_pieces, transport_plan
from fastfpl.ops.faces import recorded_faces
from tests.test_transport import DTYPES, NATIVE, even, similar
from tests.truth import assert_as_good_as_eager, fenced

LOGIT_FACES = [pytest.param("cpu", marks=NATIVE), "torch", "reference"]
FAST = LOGIT_FACES[:2]
PAIR = {"capped": False, "balanced": True}
BOTH = pytest.mark.parametrize("balanced", PAIR.values(), ids=PAIR)


def features(B, P, C, N, D, lead=(), seed=0, dtype=torch.float64, spread=1.0):
    """Unit vectors; the prompts of a class are alike, and so are the patches of an image."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    patches = draw(B, 1, D) + spread * draw(B, P, D)
    prompts = draw(C, 1, D) + spread * draw(C, N, D)
    return [torch.nn.functional.normalize(x, dim=-1).to(dtype) for x in (patches, prompts)]


def scored(face, patches, prompts, **options):
    with fastfpl.face(face), recorded_faces() as seen:
        logits = transport_logits(patches, prompts, **options)
    assert seen == {"transport_logits": {face}}
    return logits


def weights_of(logits):
    return torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)


def with_gradients(face, patches, prompts, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (patches, prompts)]
    logits = scored(face, *leaves, **options)
    return [logits.detach(), *torch.autograd.grad((logits * weights_of(logits)).sum(), leaves)]


def published(sim, eps, mass, balanced):
    """FedOTP's loop for one problem in plain numbers, until nothing moves."""
    n_patches, n_prompts = sim.shape
    kernel, v = (-(1 - sim) / eps).exp(), torch.ones(n_prompts, dtype=sim.dtype)
    for _ in range(20_000):
        u = (1 / n_patches) / (kernel @ v)
        u = mass * u if balanced else u.clamp(max=1)
        before, v = v, (mass / n_prompts) / (kernel.T @ u)
        if ((v - before).abs() <= 1e-14 * v).all():
            break
    return u[:, None] * kernel * v


SHAPES = [  # lead, B, P, C, N, D
    ((), 1, 1, 1, 1, 1),
    ((), 3, 7, 5, 2, 4),
    ((2,), 3, 49, 4, 2, 9),
    ((2, 3), 2, 5, 3, 1, 8),
    ((1,), 5, 13, 7, 3, 6),
    ((), 2, 17, 3, 6, 5),
    ((), 2, 9, 3, 4, 5),
]


@pytest.mark.parametrize("face", FAST)
@BOTH
@pytest.mark.parametrize("eps", [0.03, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_equal_the_reference(face, shape, eps, balanced):
    lead, *sizes = shape
    pair = features(*sizes, lead)
    options = {"eps": eps, "mass": 0.8, "balanced": balanced, "max_iter": 10**6, "tol": 1e-13}
    for mine, exact in zip(
        with_gradients(face, *pair, **options),
        with_gradients("reference", *pair, **options),
        strict=True,
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("face", LOGIT_FACES)
@BOTH
def test_logits_and_gradients_equal_the_published_loop(face, balanced):
    patches, prompts = features(4, 21, 3, 2, 12, seed=1)
    eps, mass = 0.05, 0.8
    leaves = [x.clone().requires_grad_() for x in (patches, prompts)]
    exact, rows = torch.zeros(4, 3).double(), []
    for b in range(4):
        for c in range(3):
            sim = leaves[0][b] @ leaves[1][c].T
            plan = published(sim.detach(), eps, mass, balanced)
            full = (plan.sum(-1) * 21 > (mass if balanced else 1) - 1e-6).double().mean()
            rows.append(float(full))
            exact[b, c] = (plan * sim).sum()
    # caps that bind in some rows and not in all
    assert min(rows) == 1 if balanced else 0.2 < sum(rows) / len(rows) < 0.8
    wanted = [exact.detach(), *torch.autograd.grad((exact * weights_of(exact)).sum(), leaves)]
    options = {"eps": eps, "mass": mass, "balanced": balanced, "max_iter": 10**6, "tol": 1e-13}
    for mine, true in zip(with_gradients(face, *leaves, **options), wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12)
    # a mean over all patches would be something else: the plans are not flat
    flat = mass * torch.einsum("bpd,cnd->bc", patches, prompts) / 42
    assert (wanted[0] - flat).abs().max() > 0.02


@pytest.mark.parametrize("face", FAST)
@BOTH
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_logits_as_good_as_eager(face, dtype, eps, balanced):
    pair = features(5, 49, 6, 2, 32, (2,), dtype=dtype, spread=3.0)
    options = {"eps": eps, "balanced": balanced}
    tight = options | {"max_iter": 10**6, "tol": 1e-13}
    exact = with_gradients("reference", *(x.double() for x in pair), **tight)
    eager = with_gradients("reference", *pair, **options)
    mine = with_gradients(face, *pair, **options)
    for name, got, theirs, true in zip(
        ("logits", "d_patches", "d_prompts"), mine, eager, exact, strict=True
    ):
        # weights_of rounds in 16 bits: the truth must take the same weights
        if dtype not in (torch.float16, torch.bfloat16) or name == "logits":
            assert_as_good_as_eager(got, theirs, true, name=name)
        else:
            torch.testing.assert_close(got, theirs, rtol=2e-2, atol=2e-2 * float(true.abs().max()))


@pytest.mark.parametrize("face", FAST)
def test_gradcheck(face):
    """The plan is a constant: numbers agree with the gradient while it is held."""
    pair = features(3, 5, 2, 2, 4, (2,))
    options = {"eps": 0.1, "mass": 0.8, "balanced": False, "max_iter": 10**5, "tol": 1e-12}
    held = {}

    own = {"cpu": transport_pieces.CPU, "torch": transport_pieces.TORCH}[face]

    def score(sim, *arguments):
        key = tuple(sim.shape)
        if key not in held:
            plan, _, *ended = own.score(sim.clone(), *arguments)
            held[key] = plan, ended
        plan, ended = held[key]
        return plan, (plan * sim).sum((2, 4)), *ended

    def run(patches, prompts):
        engine = transport_pieces.Engine(score, own.weigh)
        return transport_pieces.pieced(engine, patches, prompts, *options.values(), False, False)[0]

    leaves = [x.requires_grad_() for x in pair]
    assert torch.autograd.gradcheck(run, leaves)
    assert len(held) == 1
    # and it is the gradient that the op gives at this point
    for mine, here in zip(
        with_gradients(face, *pair, **options)[1:],
        torch.autograd.grad((run(*leaves) * weights_of(run(*leaves))).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, here, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("face", FAST)
def test_no_second_derivative_of_a_held_plan(face):
    patches, prompts = features(2, 3, 2, 2, 4)
    prompts.requires_grad_()
    for value in (torch.sum, lambda logits: logits.square().sum()):
        logits = scored(face, patches, prompts)
        (gradient,) = torch.autograd.grad(value(logits), prompts, create_graph=True)
        with pytest.raises(NotSupported, match="logits: derivatives must be of first order; got"):
            gradient.sum().backward()


@pytest.mark.parametrize("face", FAST)
@pytest.mark.parametrize("at_once", [1, 60, 130, 700, 1 << 20])
def test_pieces_do_not_change_the_result(monkeypatch, face, at_once):
    pair = features(4, 5, 6, 2, 7, (3,))
    options = {"eps": 0.5, "tol": 1e-10}
    whole = with_gradients(face, *pair, **options)
    monkeypatch.setattr(transport_pieces, "_AT_ONCE", at_once)
    seen = []
    for kept in (1 << 30, 0):
        monkeypatch.setattr(transport_pieces, "_KEPT", kept)
        for mine, exact in zip(with_gradients(face, *pair, **options), whole, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)
    for u, b, c in transport_pieces.pieces(*pair):
        x, t = pair[0][u, b], pair[1][u, c]
        problems = len(x) * x.shape[1] * t.shape[1]
        assert problems * 5 * 2 <= max(at_once, 10)
        seen += itertools.product(
            *(range(*s.indices(n)) for s, n in zip((u, b, c), (3, 4, 6), strict=True))
        )
    assert sorted(seen) == list(itertools.product(range(3), range(4), range(6)))


@pytest.mark.parametrize("face", FAST)
def test_what_is_kept_for_the_backward_pass(monkeypatch, face):
    patches, prompts = features(4, 9, 5, 2, 6, (3,))
    plans = 3 * 4 * 5 * 9 * 2
    monkeypatch.setattr(transport_pieces, "_AT_ONCE", 200)
    for leaves, limit, expected in [
        ((patches, prompts.clone().requires_grad_()), plans, plans),
        ((patches, prompts.clone().requires_grad_()), plans - 1, 0),
        ((patches, prompts), plans, 0),
    ]:
        monkeypatch.setattr(transport_pieces, "_KEPT", limit)
        kept = []

        def pack(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scored(face, *leaves)
        inputs = {x.untyped_storage().data_ptr() for x in leaves}
        own = [x for x in kept if x.untyped_storage().data_ptr() not in inputs]
        assert sum(x.untyped_storage().nbytes() for x in own) == 8 * expected


@pytest.mark.parametrize("face", FAST)
def test_no_plan_outlives_its_piece_unless_a_gradient_is_wanted(monkeypatch, face):
    patches, prompts = features(4, 9, 5, 2, 6, (3,))
    prompts.requires_grad_()
    monkeypatch.setattr(transport_pieces, "_AT_ONCE", 200)
    most, plans = [], weakref.WeakSet()

    own = {"cpu": transport_pieces.CPU, "torch": transport_pieces.TORCH}[face]

    def score(*arguments):
        solved = own.score(*arguments)
        plans.add(solved[0])
        most.append(len(plans))
        return solved

    def run():
        most.clear()
        options = (0.1, 0.8, False, 10**4, 1e-5, False, False)
        engine = transport_pieces.Engine(score, own.weigh)
        return transport_pieces.pieced(engine, patches, prompts, *options)[0]

    with torch.no_grad():
        assert not run().requires_grad
    assert len(most) > 5
    assert max(most) <= 2
    logits = run()
    assert max(most) == len(most)
    logits.sum().backward()
    del logits
    assert len(plans) == 0


@pytest.mark.parametrize("face", FAST)
def test_only_the_wanted_gradients_are_formed(face):
    patches, prompts = features(3, 5, 4, 2, 6)
    _, d_patches, d_prompts = with_gradients(face, patches, prompts)
    for name, wanted in (("patches", d_patches), ("prompts", d_prompts)):
        pair = {"patches": patches.clone(), "prompts": prompts.clone()}
        pair[name].requires_grad_()
        logits = scored(face, *pair.values())
        (logits * weights_of(logits)).sum().backward()
        torch.testing.assert_close(pair[name].grad, wanted, rtol=1e-12, atol=1e-14)
        assert all(x.grad is None for n, x in pair.items() if n != name)


@pytest.mark.parametrize("face", FAST)
@BOTH
@pytest.mark.parametrize("eps", [0.005, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_sixteen_bits_never_give_nan(face, dtype, eps, balanced):
    patches, prompts = features(2, 49, 4, 2, 8, spread=2.0, dtype=dtype)
    prompts[0] = patches[0, :2]  # cosines of one, and at the other end of the range
    prompts[1] = -prompts[0]
    prompts[2, 1] = prompts[2, 0]
    options = {"eps": eps, "balanced": balanced, "max_iter": 10**5, "tol": 1e-3}
    found = with_gradients(face, patches, prompts, **options)
    wide = [x.double() for x in (patches, prompts)]
    exact = with_gradients("reference", *wide, **options | {"tol": 1e-6})
    for x, true in zip(found, exact, strict=True):
        assert x.dtype == dtype
        assert x.isfinite().all()
        assert (x.double() - true).abs().max() <= 0.03 * true.abs().max()


def test_the_wider_dtype_decides():
    patches, prompts = features(3, 5, 4, 2, 6)
    exact = transport_logits(patches, prompts)
    for kinds, out in [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
        ((torch.float16, torch.bfloat16), torch.float32),
    ]:
        for face in ("torch", "reference"):
            leaves = [
                x.to(k).requires_grad_() for x, k in zip((patches, prompts), kinds, strict=True)
            ]
            logits = scored(face, *leaves)
            assert logits.dtype == out
            torch.testing.assert_close(logits.double(), exact, rtol=0, atol=5e-3)
            gradients = torch.autograd.grad(logits.sum(), leaves)
            assert tuple(g.dtype for g in gradients) == kinds


@pytest.mark.parametrize("face", LOGIT_FACES)
def test_logits_of_any_view(face):
    patches, prompts = features(4, 6, 5, 2, 8, (2, 3))
    wide = torch.full((2, 3, 4, 6, 16), math.nan).double()
    wide[..., ::2] = patches
    deep = torch.full((3, 2, 5, 3, 8), math.nan).double()
    deep[..., :2, :] = prompts.transpose(0, 1)
    views = {
        "sliced": (wide[..., ::2], prompts),
        "transposed": (patches, deep[..., :2, :].transpose(0, 1)),
        "expanded": (patches[:1].expand(2, 3, 4, 6, 8), prompts[:, :1].expand(2, 3, 5, 2, 8)),
        "negative": (torch._neg_view(patches), prompts),
        "conjoined": (patches, prompts.transpose(-3, -2).contiguous().transpose(-3, -2)),
    }
    for name, pair in views.items():
        packed = [x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in pair]
        for mine, exact in zip(
            with_gradients_through(face, pair), with_gradients(face, *packed), strict=True
        ):
            assert mine.shape == exact.shape, name
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def with_gradients_through(face, pair):
    """As `with_gradients`, on the views as they are."""
    leaves = [x.detach().requires_grad_() for x in pair]
    logits = scored(face, *leaves)
    return [logits.detach(), *torch.autograd.grad((logits * weights_of(logits)).sum(), leaves)]


@pytest.mark.parametrize("face", LOGIT_FACES)
@pytest.mark.parametrize("plan_gradient", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_changes_no_number(face, plan_gradient, kind):
    # similarities in 16 bits would be off by up to a fiftieth of eps
    patches, prompts = features(3, 9, 4, 2, 8, dtype=torch.float32)
    options = {"eps": 0.1, "plan_gradient": plan_gradient, "tol": 1e-3}
    for pair in ((patches, prompts), (patches.to(kind), prompts), (patches.to(kind),) * 2):
        pair = [x.detach().requires_grad_() for x in pair]
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=kind, enabled=enabled):
                logits = scored(face, *pair, **options)
                # torch's own products follow autocast on their way back too
                within = contextlib.nullcontext if face != "reference" else plainly
                with within():
                    gradients = torch.autograd.grad((logits * weights_of(logits)).sum(), pair)
            found.append([logits, *gradients])
        for plain, cast in zip(*found, strict=True):
            assert cast.dtype == plain.dtype
            assert torch.equal(cast, plain)


def plainly():
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("face", FAST)
def test_gradients_given_as_any_view(face):
    pair = [x.requires_grad_() for x in features(3, 5, 4, 2, 6)]
    by = torch.linspace(-1, 2, 12).double().view(3, 4)
    exact = torch.autograd.grad(scored(face, *pair), pair, by)
    for view in (torch._neg_view(-by), by.mT.contiguous().mT, torch.stack((by, by), -1)[..., 0]):
        found = torch.autograd.grad(scored(face, *pair), pair, view)
        assert all(torch.equal(x, true) for x, true in zip(found, exact, strict=True))


@pytest.mark.parametrize("face", LOGIT_FACES)
@pytest.mark.parametrize(
    "shape",
    [((), 0, 3, 4, 2, 5), ((), 2, 3, 0, 2, 5), ((0,), 2, 3, 4, 2, 5), ((2, 0), 1, 3, 4, 2, 5)],
    ids=str,
)
def test_nothing_to_score(face, shape):
    lead, *sizes = shape
    pair = features(*sizes, lead)
    found = with_gradients(face, *pair)
    assert found[0].shape == (*lead, sizes[0], sizes[2])
    assert [x.shape for x in found[1:]] == [x.shape for x in pair]
    assert all(not x.any() for x in found)


@pytest.mark.parametrize("face", LOGIT_FACES)
def test_features_of_no_width(face):
    logits, d_patches, d_prompts = with_gradients(
        face, torch.zeros(2, 3, 0).double(), torch.zeros(4, 2, 0).double()
    )
    assert torch.equal(logits, torch.zeros(2, 4).double())
    assert (d_patches.shape, d_prompts.shape) == ((2, 3, 0), (4, 2, 0))


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_logits_read_inside(dtype):
    patches, prompts = features(3, 7, 5, 2, 6, dtype=dtype)
    plain = with_gradients("cpu", patches, prompts)
    walled = with_gradients_through("cpu", [fenced(patches), fenced(prompts)])
    for mine, exact in zip(walled, plain, strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("face", LOGIT_FACES)
@BOTH
@given(
    patches=st.integers(1, 40),
    prompts=st.integers(1, 2),
    mass=st.sampled_from([0.05, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15)
def test_the_gradient_is_a_plan_with_its_marginals(face, balanced, patches, prompts, mass, seed):
    # patches that are unit axes: the similarities are the prompts' entries, their gradient the plan
    sim = similar(3, patches, prompts, seed=seed)
    leaf = sim.mT.clone().requires_grad_()
    options = {"eps": 0.1, "mass": mass, "balanced": balanced, "tol": 1e-10, "max_iter": 10**5}
    logits = scored(face, torch.eye(patches).double()[None], leaf, **options)
    (gradient,) = torch.autograd.grad(logits.sum(), leaf)
    plan = gradient.mT
    torch.testing.assert_close(logits[0], (plan * sim).sum((-2, -1)))
    torch.testing.assert_close(plan.sum(-2), even(mass / prompts, 3, prompts))
    rows = plan.sum(-1) * patches
    if balanced or mass == 1:
        torch.testing.assert_close(rows, even(mass, 3, patches), rtol=1e-8, atol=0.0)
    else:
        assert rows.max() <= 1 + 1e-8
    with fastfpl.face("reference"):
        torch.testing.assert_close(
            plan, transport_plan(sim, **options), rtol=1e-6, atol=1e-9 / patches
        )


@pytest.mark.parametrize("face", LOGIT_FACES)
@given(
    B=st.integers(1, 4),
    P=st.integers(1, 20),
    C=st.integers(1, 4),
    N=st.integers(1, 2),
    balanced=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15)
def test_laws_of_logits(face, B, P, C, N, balanced, seed):
    patches, prompts = features(B, P, C, N, 6, (2,), seed=seed)
    options = {"eps": 0.2, "balanced": balanced, "tol": 1e-11, "max_iter": 10**5}
    near = {"rtol": 1e-8, "atol": 1e-11}

    def law(x, t, expected, **changes):
        torch.testing.assert_close(scored(face, x, t, **options | changes), expected, **near)

    logits = scored(face, patches, prompts, **options)
    generator = torch.Generator().manual_seed(seed)
    images, classes, rows = (torch.randperm(n, generator=generator) for n in (B, C, P))
    law(patches[:, images], prompts[:, classes], logits[:, images][:, :, classes])
    law(patches[:, :, rows], prompts.flip(-2), logits)
    law(patches.flip(0), prompts.flip(0), logits.flip(0))
    law(patches[1], prompts[1], logits[1])
    law(patches[:, :1], prompts[:, -1:], logits[:, :1, -1:])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    law(patches @ turn, prompts @ turn, logits)
    law(3 * patches, prompts, 3 * logits, eps=0.6)
    # patches that are there twice share their mass
    law(patches.repeat_interleave(2, -2), prompts, logits)
    if N == 1:  # so do prompts
        law(patches, prompts.expand(-1, -1, 2, -1), logits)
    if balanced:
        law(patches, prompts, logits / 2, mass=0.4)


@pytest.mark.parametrize("face", LOGIT_FACES)
def test_logits_by_hand(face):
    # patches along the axes: entries of the prompts are the similarities
    def both(sim, **options):
        sim = torch.tensor(sim, dtype=torch.float64)
        leaf = sim.T[None].clone().requires_grad_()
        axes = torch.eye(len(sim)).double()[None]
        logits = scored(face, axes, leaf, tol=1e-13, max_iter=10**6, **options)
        (plan,) = torch.autograd.grad(logits.sum(), leaf)
        return logits.item(), plan[0].T

    three = 0.1 * math.log(3)  # at eps=.1 three times as likely
    # columns hold .2 each: three parts in the first row, one in the second; no row reaches its 1/2
    logit, plan = both([[three, three], [0.0, 0.0]], eps=0.1, mass=0.4)
    torch.testing.assert_close(plan, torch.tensor([[0.15, 0.15], [0.05, 0.05]]).double())
    assert logit == pytest.approx(0.3 * three)
    # with mass .8 the first row would hold .6: it is capped at .5 and the second takes the rest
    logit, plan = both([[three, three], [0.0, 0.0]], eps=0.1, mass=0.8)
    torch.testing.assert_close(plan, torch.tensor([[0.25, 0.25], [0.15, 0.15]]).double())
    assert logit == pytest.approx(0.5 * three)
    # balanced, rows hold .4 each, and nothing is left to choose
    logit, plan = both([[three, three], [0.0, 0.0]], eps=0.1, mass=0.8, balanced=True)
    torch.testing.assert_close(plan, even(0.2, 2, 2))
    assert logit == pytest.approx(0.4 * three)
    # each prompt has a patch of its own: three to one, rows of .4 stay below 1/2
    logit, plan = both([[three, 0.0], [0.0, three]], eps=0.1, mass=0.8)
    torch.testing.assert_close(plan, torch.tensor([[0.3, 0.1], [0.1, 0.3]]).double())
    assert logit == pytest.approx(0.6 * three)
    # one patch and one prompt leave no choice
    assert both([[0.7]], mass=0.8)[0] == pytest.approx(0.56)
    # at a high temperature the logit is a mean
    assert both([[0.7, 0.1], [0.3, 0.5]], eps=1e9, mass=0.8)[0] == pytest.approx(0.8 * 0.4)


@pytest.mark.parametrize("face", LOGIT_FACES)
def test_logits_say_when_they_have_not_converged(face):
    pair = features(3, 49, 2, 2, 8)
    options = {"eps": 0.02, "max_iter": 2, "tol": 1e-9}
    with fastfpl.face(face):
        with pytest.raises(
            NotConverged,
            match=r"transport_logits: 6 of 6 problems ended above tol=1e-09 after at most 2 .*; "
            r"the largest residual is .*; raise max_iter, eps or tol",
        ):
            transport_logits(*pair, **options)
        logits, ended = transport_logits(*pair, **options, info=True)
    assert ended.iterations.tolist() == [[2] * 2] * 3
    assert (ended.residual > 1e-9).all()
    assert logits.isfinite().all()
    plain, ended = transport_logits(*(x.float() for x in pair), info=True)
    assert (ended.residual <= 1e-5).all()
    assert (plain.dtype, ended.residual.dtype) == (torch.float32, torch.float32)


@NATIVE
def test_logits_of_more_prompts_go_to_torch():
    pair = features(2, 9, 3, 17, 5)
    with recorded_faces() as seen:
        transport_logits(*pair)
    assert seen == {"transport_logits": {"torch"}}
    message = r"cpu: N = 17 prompts, at most 16"
    with fastfpl.face("cpu"), pytest.raises(NotSupported, match=message):
        transport_logits(*pair)


@pytest.mark.parametrize("face", LOGIT_FACES)
def test_logits_refuse_what_is_not_finite(monkeypatch, face):
    for at_once in (1, 1 << 20):
        monkeypatch.setattr(transport_pieces, "_AT_ONCE", at_once)
        for lead, place in (((), ()), ((2, 2), (1, 0))):
            patches, prompts = features(3, 4, 5, 2, 6, lead)
            patches[(*place, 2, 1, 3)] = math.nan
            said = r"similarity / eps must be finite; got nan of patch \({}\) and prompt \({}\)"
            where = [", ".join(map(str, (*place, *x))) for x in ((2, 1), (0, 0))]
            with pytest.raises(InputError, match=said.format(*where)):
                scored(face, patches, prompts)
            patches, prompts = features(3, 4, 5, 2, 6, lead)
            prompts[(*place, 3, 1, 5)] = math.nan
            where = [", ".join(map(str, (*place, *x))) for x in ((0, 0), (3, 1))]
            with pytest.raises(InputError, match=said.format(*where)):
                scored(face, patches, prompts)
    patches, prompts = features(3, 4, 5, 2, 6, dtype=torch.float32)
    prompts[3, 1] *= 1e38
    with pytest.raises(InputError, match=r"got .*e\+37 of patch \(0, 0\) and prompt \(3, 1\)"):
        scored(face, patches, prompts, eps=0.005)


def test_logits_refuse_in_sentences():
    patches, prompts = features(2, 3, 4, 2, 5, (2,))
    for options, message in [
        ({"eps": 0.0}, r"fastfpl.ops.transport_logits: eps must be positive and finite; got 0.0"),
        ({"mass": 1.1}, r"mass must lie in \(0, 1\]; got 1.1"),
        ({"tol": math.inf}, r"tol must be positive and finite; got inf"),
        ({"max_iter": 0}, r"max_iter must be at least 1; got 0"),
    ]:
        with pytest.raises(InputError, match=message):
            transport_logits(patches, prompts, **options)
    for pair, kind, message in [
        ((patches[..., :4], prompts), InputError, r"prompts must have shape \(..., C, N, D\); got"),
        ((patches[0, 0], prompts), InputError, r"patches must have shape \(..., B, P, D\); got"),
        ((patches[0], prompts), InputError, r"leading dimensions \(\) of patches; got \(2,\)"),
        ((patches, prompts[:1]), InputError, r"dimensions \(2,\) of patches; got \(1,\)"),
        ((patches[..., :0, :], prompts), InputError, "at least one patch an image; got P=0"),
        ((patches, prompts[..., :0, :]), InputError, "at least one prompt a class; got N=0"),
        ((patches.long(), prompts), KindError, "patches must be float16, .*; got torch.int64"),
        ((patches, prompts.tolist()), KindError, "prompts must be a torch.Tensor; got list"),
        ((patches, prompts.to("meta")), KindError, "prompts must be on cpu as patches are; got m"),
    ]:
        with pytest.raises(kind, match=message):
            transport_logits(*pair)
