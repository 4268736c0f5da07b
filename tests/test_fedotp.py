"""FedOTP against its literal reference, and what a hand can compute of it."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

import fastfpl
from fastfpl.clip import FrozenCLIP
from fastfpl.errors import InputError, NotConverged
from fastfpl.methods import METHODS, check_options
from fastfpl.methods.base import cross_entropy
from fastfpl.ops import native, transport_plan
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import fedotp as reference
from fastfpl.reference.rounds import Client
from fastfpl.training.cohort import train
from fastfpl.training.gathering import stack
from tests.worlds import NAMES, SIZES, TINY_RUN, World, batch_of, drawn, figures, small_clip

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
RELATIVE = {F32: 1e-5, F64: 1e-9}
PATCHES = 7
# the papers' temperature and mass, solved to the last digit that the dtype has
OPTIONS = {"eps": 0.1, "mass": 0.8, "max_iter": 10**5}
# where both end; sums of doubles over the patches cannot tell less apart
TOL = {F32: 1e-6, F64: 1e-12}
# round 0 is everybody's; later ones see returning clients, and clients that sit out
SELECTED = [[0, 1, 2, 3, 4], [0, 2, 3], [3, 4]]
PROVEN = 2  # rounds that the reference plays
TESTED = (3, 3, 5, 4, 3)  # test images: the first training ones, blurred


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class PatchWorld(World):
    """A world whose images are sets of patches."""

    method: str = "fedotp"

    def __post_init__(self):
        self.options = {**OPTIONS, "tol": TOL[self.dtype], **self.options}
        self.settings = {"rounds": PROVEN, **self.settings}
        super().__post_init__()
        for u, (client, tested) in enumerate(zip(self.clients, TESTED, strict=True)):
            # patches of an image resemble each other, and some stand out
            shape = len(client.train), PATCHES, self.tower.dim
            image = drawn(shape[0], 1, shape[2], seed=900 + u) + 1.5 * drawn(*shape, seed=950 + u)
            near = image[:tested] + 0.7 * drawn(tested, *shape[1:], seed=990 + u)
            sides = [
                torch.nn.functional.normalize(x, dim=-1).float().double() for x in (image, near)
            ]
            labels = client.train_labels
            self.clients[u] = Client(sides[0], labels, sides[1], labels[:tested])

    @property
    def transport(self):
        o = {k: self.options[k] for k in ("eps", "mass", "balanced") if k in self.options}
        return reference.Transport(**o)

    def initial(self):
        """Return the prompts that every client starts from, in float64."""
        return self.federation().method._initial().double()

    def played(self, factors=None, selected=SELECTED[:PROVEN]):
        """Let the reference play the rounds; its numbers do not depend on the world's dtype."""
        asked = {k: v for k, v in self.options.items() if k not in ("tol", "max_iter")}
        key = repr((asked, self.settings, self.position, factors, selected))
        if key not in _PLAYED:
            _PLAYED[key] = reference.fedotp(
                self.setup(factors),
                self.clients,
                self.initial(),
                self.plan(selected),
                shared=self.options.get("shared", 1),
                transport=self.transport,
            )
        return _PLAYED[key]


_PLAYED = {}


def assert_near(result, exact, dtype, name):
    assert result.dtype == dtype, name
    assert result.shape == exact.shape, name
    if not exact.numel():
        return
    scale = exact.abs().max()
    assert scale > 0, name
    off = ((result.double() - exact).abs().max() / scale).item()
    assert off <= RELATIVE[dtype], f"{name}: off by {off:.2e} of {scale:.2e}"


def assert_same_rounds(world, federation, outcomes, selected=SELECTED):
    federation.sampling.sample = lambda round_: selected[round_]
    dtype = world.dtype
    for t, exact in enumerate(outcomes):
        row = federation.round()
        assert set(federation.server) == {"ctx"}
        assert_near(federation.server["ctx"], exact.ctx, dtype, f"round {t}, ctx")
        assert set(federation.clients) == set(exact.kept)
        for c, local in exact.kept.items():
            assert set(federation.clients[c]) == {"local"}
            kept = federation.clients[c]["local"]
            assert_near(kept, local, dtype, f"round {t}, client {c}")
        losses = [exact.losses[c] for c in sorted(exact.losses)]
        assert row["selected"] == selected[t]
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=RELATIVE[dtype])
        assert row["clients"] == exact.accuracy


CASES = [
    ("end", {}),
    ("middle", {"balanced": True}),
    ("front", {"prompts": 3, "shared": 1}),
    ("end", {"prompts": 3, "shared": 2, "eps": 0.05, "mass": 0.5}),
    ("end", {"prompts": 2, "shared": 2}),
    ("end", {"prompts": 2, "shared": 0}),
    ("end", {"prompts": 1, "shared": 1, "mass": 1.0}),
]


@DTYPES
@pytest.mark.parametrize(("position", "options"), CASES[:5], ids=str)
def test_rounds_equal_the_reference(position, options, dtype):
    world = PatchWorld(dtype=dtype, position=position, options=options)
    federation = world.federation()
    outcomes = world.played()
    assert_same_rounds(world, federation, outcomes)
    # the proof is worth nothing if nothing moved
    begin, shared = world.initial(), world.options.get("shared", 1)
    for name, moved in [
        ("global", outcomes[-1].ctx - begin[:shared]),
        *((f"client {c}", x - begin[shared:]) for c, x in outcomes[-1].kept.items()),
    ]:
        assert not moved.numel() or moved.norm() > 0.1 * begin.norm(), name
    assert len(set(outcomes[-1].accuracy)) > 1


@DTYPES
def test_a_local_epoch_equals_the_reference(dtype):
    world = PatchWorld(dtype=dtype, settings={"local_epochs": 1, "rounds": 1})
    assert_same_rounds(world, world.federation(), world.played(selected=SELECTED[:1]))


@pytest.mark.parametrize("schedule", ["cosine", "cosine-rounds"])
def test_schedules_equal_the_reference(schedule):
    world = PatchWorld(dtype=F64, settings={"schedule": schedule})
    factors = [[1.0, 0.5], [1.0, 0.5]] if schedule == "cosine" else [[1.0, 1.0], [0.5, 0.5]]
    assert_same_rounds(world, world.federation(), world.played(factors))


def step_of(world):
    """Every client's loss and gradients at prompts of its own, four images at most."""
    federation, count, dtype = world.federation(), len(world.clients), world.dtype
    o = federation.method.options
    ctx = 0.1 * drawn(count, o.prompts, world.n_ctx, world.tower.width, seed=3)
    down, own = {"ctx": ctx[:, : o.shared].to(dtype)}, {"local": ctx[:, o.shared :].to(dtype)}
    trained, fixed = federation.method.start(down, own, training=True)
    assert fixed == {}
    leaves = {n: t.clone().requires_grad_() for n, t in trained.items()}
    image = torch.zeros(count, 4, PATCHES, world.tower.dim, dtype=dtype)
    labels = torch.zeros(count, 4, dtype=torch.int64)
    mask = torch.zeros(count, 4, dtype=torch.bool)
    for u, client in enumerate(world.clients):
        n = min(4, SIZES[u])
        image[u, :n], labels[u, :n], mask[u, :n] = client.train[:n], client.train_labels[:n], True
        image[u, n:] = image[u, 0]  # what stands in a masked place must not count
    text = federation.method.text(leaves, fixed)
    loss = federation.method.loss(text, leaves, fixed, batch_of(image, labels, mask))
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return ctx, loss, dict(zip(leaves, gradients, strict=True))


@DTYPES
@pytest.mark.parametrize(("position", "options"), CASES, ids=str)
def test_loss_and_gradients_equal_the_reference(position, options, dtype):
    world = PatchWorld(dtype=dtype, position=position, options=options)
    ctx, loss, gradients = step_of(world)
    shared, setup = world.options.get("shared", 1), world.setup()
    for u, client in enumerate(world.clients):
        mine = ctx[u].clone().requires_grad_()
        logits = reference.logits_of(setup, mine, client.train[:4], world.transport)
        exact = torch.nn.functional.cross_entropy(logits, client.train_labels[:4])
        (wanted,) = torch.autograd.grad(exact, mine)
        assert_near(loss[u].detach(), exact.detach(), dtype, f"client {u}, loss")
        assert_near(gradients["ctx"][u], wanted[:shared], dtype, f"client {u}, global")
        assert_near(gradients["local"][u], wanted[shared:], dtype, f"client {u}, local")


def test_the_plans_of_the_proof_are_neither_flat_nor_one_hot():
    world = PatchWorld(dtype=F64)
    federation = world.federation()
    trained, fixed = federation.method.start(stack([federation.server]), {}, training=False)
    text = federation.method.text(trained, fixed)[0]
    sim = torch.einsum("bpd,cnd->bcpn", world.clients[3].train, text)
    plan = transport_plan(sim, eps=0.1, mass=0.8)
    rows = plan.sum(-1) * PATCHES
    capped = rows > 1 - 1e-4
    assert 0.3 < capped.double().mean() < 0.8
    assert rows.amin() < 0.2
    # prompts choose different patches
    assert ((plan[..., 0] - plan[..., 1]).abs() / plan.amax(-1)).mean() > 0.05


# --- by hand --------------------------------------------------------------------------------------


def tau_logits(sim, **options):
    """Call the method's logits for one client, image and class, whose similarities are given."""
    sim = torch.tensor(sim, dtype=F64)
    method = PatchWorld(dtype=F64, options=options).federation().method
    axes = torch.eye(len(sim), dtype=F64)[None, None]
    return method.logits(sim.T[None, None], {}, {}, axes).item() / 8.0  # tau


def test_logits_by_hand():
    three = 0.1 * math.log(3)  # at eps=.1 three times as likely
    good = [[three, three], [0.0, 0.0]]
    # mass .4: columns of .2, three parts in the first patch and one in the second; no cap binds
    assert tau_logits(good, mass=0.4) == pytest.approx(0.3 * three)
    # mass .8: the first patch would hold .6, is capped at 1/2, and the second takes .3
    assert tau_logits(good, mass=0.8) == pytest.approx(0.5 * three)
    # balanced: each patch holds .4
    assert tau_logits(good, mass=0.8, balanced=True) == pytest.approx(0.4 * three)
    # all mass: the same as balanced
    assert tau_logits(good, mass=1.0) == pytest.approx(0.5 * three)
    # each prompt its own patch: three parts of four of every column
    assert tau_logits([[three, 0.0], [0.0, three]]) == pytest.approx(0.6 * three)
    # at half the temperature nine parts of ten
    assert tau_logits(good, mass=0.4, eps=0.05) == pytest.approx(0.36 * three)
    # one prompt, three patches, at a low temperature: the best two are filled, the third gets rest
    assert tau_logits([[0.9], [0.6], [0.1]], eps=0.005) == pytest.approx(
        (0.9 + 0.6) / 3 + (0.8 - 2 / 3) * 0.1
    )


def test_the_published_plan_by_hand():
    three = 0.1 * math.log(3)
    sim = torch.tensor([[three, three], [0.0, 0.0]], dtype=F64)
    for mass, balanced, table in [
        (0.4, False, [[0.15, 0.15], [0.05, 0.05]]),
        (0.8, False, [[0.25, 0.25], [0.15, 0.15]]),
        (0.8, True, [[0.2, 0.2], [0.2, 0.2]]),
    ]:
        plan = reference.plan_of(sim, reference.Transport(0.1, mass, balanced))
        torch.testing.assert_close(plan, torch.tensor(table, dtype=F64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_the_published_plan_is_the_ops(eps, balanced):
    sim = 0.2 + 0.05 * drawn(49, 2, seed=4)
    plan = reference.plan_of(sim, reference.Transport(eps, 0.8, balanced))
    mine = transport_plan(sim, eps=eps, mass=0.8, balanced=balanced, tol=1e-12, max_iter=10**5)
    torch.testing.assert_close(mine, plan, rtol=1e-6, atol=1e-10)


def test_a_published_plan_that_never_settles_says_so(monkeypatch):
    monkeypatch.setattr(reference, "_LONGEST", 50)
    with pytest.raises(NotConverged, match="must settle within 50 iterations; got one with sim"):
        reference.plan_of(torch.full((3, 2), math.nan), reference.Transport(0.1, 0.8))


def test_the_loss_by_hand():
    # two classes that two patches tell apart, all similarities equal within a class
    method = PatchWorld(dtype=F64).federation().method
    text = torch.tensor([[[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2]], dtype=F64)  # (U, C, N, D)
    image = torch.tensor([[[[0.6, 0.8]] * 3, [[1.0, 0.0]] * 3]], dtype=F64)  # (U, B, P, D)
    logits = 8.0 * 0.8 * torch.tensor([[[0.6, 0.8], [1.0, 0.0]]], dtype=F64)
    torch.testing.assert_close(method.logits(text, {}, {}, image), logits, rtol=1e-9, atol=1e-12)
    labels = torch.tensor([[1, 0]])
    loss = method.loss(text, {}, {}, batch_of(image, labels))
    each = [math.log(1 + math.exp(-6.4 * gap)) for gap in (0.2, 1.0)]
    assert loss.item() == pytest.approx(sum(each) / 2)
    one = method.loss(text, {}, {}, batch_of(image, labels, torch.tensor([[True, False]])))
    assert one.item() == pytest.approx(each[0])


def test_prompts_of_a_class_are_scored_together_and_in_no_order():
    method = PatchWorld(dtype=F64).federation().method
    text = torch.nn.functional.normalize(drawn(2, 4, 2, 16, seed=1), dim=-1)
    image = torch.nn.functional.normalize(drawn(2, 3, 5, 16, seed=2), dim=-1)
    logits = method.logits(text, {}, {}, image)
    near = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(method.logits(text.flip(2), {}, {}, image), logits, **near)
    torch.testing.assert_close(method.logits(text, {}, {}, image.flip(2)), logits, **near)
    torch.testing.assert_close(method.logits(text.flip(1), {}, {}, image), logits.flip(2), **near)
    torch.testing.assert_close(method.logits(text[1:], {}, {}, image[1:]), logits[1:], **near)


def test_prompts_that_are_alike_make_a_capped_coop():
    """Equal prompts share the mass, and patches that are all alike make it PromptFL times gamma."""
    world = PatchWorld(dtype=F64)
    method = world.federation().method
    pooled = World("promptfl", F64).federation().method
    ctx = 0.1 * drawn(1, 1, 3, 32, seed=5)
    text = method.text({"ctx": ctx, "local": ctx}, {})
    plain = pooled.text({"ctx": ctx[:, 0]}, {})
    torch.testing.assert_close(text, plain[:, :, None].expand(-1, -1, 2, -1))
    image = world.clients[3].train[None, :, 0]
    logits = method.logits(text, {}, {}, image[:, :, None].expand(-1, -1, 5, -1))
    torch.testing.assert_close(logits, 0.8 * pooled.logits(plain, {}, {}, image))


# --- what a client starts from --------------------------------------------------------------------


@pytest.mark.parametrize("words", [None, "a photo of"])
def test_every_prompt_starts_from_a_draw_of_its_own(words):
    world = PatchWorld(options={"prompts": 4, "shared": 2})
    method = world.federation().method
    method.task = replace(method.task, ctx_init=words)
    start = method._initial()
    assert start.shape == (4, 3, 32)
    base = method.task.initial_ctx()
    assert torch.equal(start[0], base)
    assert torch.equal(start, method._initial())
    other = replace(method.task, seed=1)
    method.task = other
    assert not any(torch.equal(a, b) for a, b in zip(start[1:], method._initial()[1:], strict=True))
    draws = start[1:] - (0 if words is None else base)
    assert draws.std() == pytest.approx(0.02, rel=0.15)
    assert (draws[0] - draws[1]).abs().max() > 0.01
    if words is None:
        assert torch.equal(base, World("promptfl").federation().server["ctx"])


def test_a_client_that_never_trained_has_the_common_local_prompts():
    federation = PatchWorld(options={"prompts": 3}).federation()
    down = stack([federation.method.download(federation.server, c, 0) for c in range(2)])
    for training in (False, True):
        trained, fixed = federation.method.start(down, {}, training=training)
        assert fixed == {}
        assert trained["ctx"].shape == (2, 1, 3, 32)
        assert trained["local"].shape == (2, 2, 3, 32)
        start = federation.method._initial()
        for u in range(2):
            assert torch.equal(torch.cat((trained["ctx"][u], trained["local"][u])), start)


def test_everybody_trains_in_the_first_round():
    settings = {"participation": 0.4, "rounds": 3}
    federation = PatchWorld(settings=settings).federation()
    rows = [federation.round() for _ in range(3)]
    assert rows[0]["selected"] == [0, 1, 2, 3, 4]
    assert [len(row["selected"]) for row in rows[1:]] == [2, 2]
    assert sorted(federation.clients) == [0, 1, 2, 3, 4]


# --- what travels and what stays ------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "shared"), [(2, 1), (5, 2), (2, 2), (3, 0)])
def test_only_global_prompts_travel(prompts, shared):
    options = {"prompts": prompts, "shared": shared, "tol": 1e-3}
    federation = PatchWorld(options=options).federation()
    one = 3 * 32 * 4  # T, W, float32
    for members in SELECTED[:2]:
        federation.sampling.sample = lambda round_, members=members: members
        row = federation.round()
        assert row["bytes_up"] == row["bytes_down"] == len(members) * shared * one
    for state in federation.clients.values():
        assert sum(t.numel() * t.element_size() for t in state.values()) == (prompts - shared) * one


def test_local_prompts_stay_with_their_client():
    federation = PatchWorld().federation()
    federation.sampling.sample = lambda round_: SELECTED[round_]
    federation.round()
    before = {c: s["local"].clone() for c, s in federation.clients.items()}
    old = federation.server["ctx"].clone()
    federation.round()
    for c, local in before.items():
        assert torch.equal(federation.clients[c]["local"], local) == (c not in SELECTED[1])
    assert not torch.equal(federation.server["ctx"], old)
    assert all(not torch.equal(before[a], before[b]) for a in range(5) for b in range(5) if a != b)
    spans = sorted(
        (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        for state in (federation.server, *federation.clients.values())
        for t in state.values()
    )
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


def test_the_merge_by_hand():
    federation = PatchWorld().federation()
    sent = {c: {"ctx": torch.full((1, 3, 32), v)} for c, v in ((2, 8.0), (0, 1.0), (3, 4.0))}
    merged = federation.method.merge(federation.server, sent, {0: 1, 2: 2, 3: 5}, 0)
    assert set(merged) == {"ctx"}
    assert torch.equal(merged["ctx"], torch.full((1, 3, 32), (1 + 2 * 8 + 5 * 4) / 8))
    none = federation.method.merge(federation.server, {}, {}, 0)
    assert torch.equal(none["ctx"], federation.server["ctx"])


def test_evaluation_takes_the_new_global_and_the_own_local_prompts():
    world = PatchWorld(dtype=F64, settings={"local_epochs": 6, "lr": 0.03})
    for u, client in enumerate(world.clients):  # what they have learnt they also know
        world.clients[u] = replace(client, test=client.train, test_labels=client.train_labels)
    federation = world.federation()
    federation.sampling.sample = lambda round_: SELECTED[round_]
    for _ in range(2):
        before = federation.server["ctx"]
        row = federation.round()
    setup, local, seen = world.setup(), federation.clients, {}
    for name, ctx_of in {
        "new": lambda c: (federation.server["ctx"], local[c]["local"]),
        "another's": lambda c: (federation.server["ctx"], local[(c + 1) % 5]["local"]),
        "old": lambda c: (before, local[c]["local"]),
    }.items():
        seen[name] = []
        for c, client in enumerate(world.clients):
            logits = reference.logits_of(setup, torch.cat(ctx_of(c)), client.test, world.transport)
            seen[name].append(float((logits.argmax(-1) == client.test_labels).double().mean()))
    assert row["clients"] == seen["new"]
    assert sum(seen["new"]) > sum(seen["another's"])
    assert row["clients"] != seen["old"]


# --- the laws of a round --------------------------------------------------------------------------


def play(rounds=3, selected=SELECTED, dtype=F32, **settings):
    settings = {"rounds": rounds, **settings}
    federation = PatchWorld(dtype=dtype, settings=settings).federation()
    if selected is not None:
        federation.sampling.sample = lambda round_: selected[round_]
    for _ in range(rounds):
        federation.round()
    return federation


def state_of(federation):
    sides = {"server": federation.server, **federation.clients}
    return {(side, name): t for side, state in sides.items() for name, t in state.items()}


def test_any_order_of_clients_gives_the_same_round():
    one, other = (state_of(play(selected=s)) for s in (SELECTED, [s[::-1] for s in SELECTED]))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("cohort", [1, 2])
def test_a_cohort_decides_no_figure(cohort):
    many, few = play(dtype=F64), play(dtype=F64, cohort=cohort)
    one, other = state_of(many), state_of(few)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-9, atol=1e-11)
    assert [r["clients"] for r in many.rounds] == [r["clients"] for r in few.rounds]


def test_the_same_seed_gives_the_same_run():
    one, again, other = (play(selected=None, seed=s, participation=0.6) for s in (3, 3, 4))
    a, b, c = (state_of(f) for f in (one, again, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["server", "ctx"], c["server", "ctx"])


def test_clients_in_a_cohort_do_not_see_each_other():
    sent = []
    for change in (False, True):
        world = PatchWorld(dtype=F64)
        if change:
            world.clients[1] = replace(world.clients[1], train=world.clients[2].train[:5])
        federation = world.federation()
        outcome = train(
            federation.method,
            range(5),
            {"ctx": 0.1 * drawn(5, 1, 3, 32, seed=2)},
            {"local": 0.1 * drawn(5, 1, 3, 32, seed=8)},
            federation.trainer.feed,
            {c: federation.shards[c].train for c in range(5)},
            world.config,
            0,
            lambda what, done, total: None,
        )
        sent.append((outcome.upload["ctx"], outcome.own["local"], outcome.losses))
    same = [
        c
        for c in range(5)
        if all(torch.allclose(x[c], y[c], rtol=1e-12, atol=0) for x, y in zip(*sent, strict=True))
    ]
    assert same == [0, 2, 3, 4]


def test_a_lost_upload_leaves_the_local_prompts_trained():
    settings = {"dropout": 0.5, "seed": 1, "rounds": 2}
    federation = PatchWorld(settings=settings).federation()
    row = federation.round()
    assert 0 < len(row["lost"]) < 5
    assert row["bytes_up"] == (5 - len(row["lost"])) * 3 * 32 * 4
    start = federation.method._initial()[1:]
    assert all(not torch.equal(federation.clients[c]["local"], start) for c in range(5))


# --- options and whole runs -----------------------------------------------------------------------


def test_default_options_are_the_papers():
    assert check_options("fedotp", {}) == {
        "prompts": 2,
        "shared": 1,
        "eps": 0.1,
        "mass": 0.8,
        "balanced": False,
        "tol": 1e-3,
        "max_iter": 100,
    }
    kind = METHODS["fedotp"]
    assert (kind.personal, kind.all_first, kind.image_kind) == (True, True, "patches")
    assert (kind.trains, kind.evaluates_download) == (True, "merged")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gamma": 1}, "fedotp's; got 'gamma'"),
        ({"mass": 1.5}, "fedotp's option mass is refused"),
        ({"eps": 0.0}, "fedotp's option eps is refused"),
        ({"prompts": 0}, "fedotp's option prompts is refused"),
        ({"shared": -1}, "fedotp's option shared is refused"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        check_options("fedotp", options)


def test_more_global_prompts_than_prompts_are_refused():
    with pytest.raises(InputError, match="shared must be at most prompts=2; got 3"):
        PatchWorld(options={"shared": 3}).federation()


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def outcome(clip, cache):
    """Play a tiny run once for each choice of settings."""
    known = {}

    def run(model=None, **changes):
        key = repr((id(model), sorted(changes.items())))
        if key not in known:
            settings = {**TINY_RUN, **changes}
            known[key] = fastfpl.run("fedotp", model=model or clip, cache=cache, **settings)
        return known[key]

    return run


def losses(result):
    return [row["loss"] for row in result.rounds]


def test_who_is_averaged_shows_after_the_first_round(outcome):
    one, other = losses(outcome()), losses(outcome(options={"shared": 2}))
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1] != pytest.approx(other[1], rel=1e-4)


def test_a_tolerance_moves_figures_within_it(outcome):
    fine, rough = losses(outcome(options={"tol": 1e-5})), losses(outcome(options={"tol": 0.05}))
    assert fine != rough
    assert fine == pytest.approx(rough, rel=0.05)
    assert fine == pytest.approx(losses(outcome()), rel=1e-3)


def test_problems_that_do_not_end_in_time_stop_the_run(outcome):
    with pytest.raises(NotConverged, match=r"after at most 1 iterations; .*; raise max_iter, eps"):
        outcome(options={"max_iter": 1})


def test_a_run(outcome):
    result = outcome()
    face = "torch" if native.missing() else "cpu"
    assert result.faces["transport_logits"] == [face]
    assert "transport_plan" not in result.faces
    ctx = 4 * 32 * 4
    assert [row["bytes_up"] for row in result.rounds] == [4 * ctx] * 2
    assert losses(result)[1] < losses(result)[0]
    assert all(0 <= a <= 1 for row in result.rounds for a in row["clients"])


def test_a_run_is_the_same_bit_for_bit(outcome, clip, tmp_path):
    again = fastfpl.run("fedotp", model=clip, cache=tmp_path, **TINY_RUN)
    assert figures(again) == figures(outcome())


def test_a_resumed_run_is_the_same_bit_for_bit(outcome, clip, cache, tmp_path):
    for more in ({"rounds": 1}, {"rounds": 2, "resume": True}):
        result = fastfpl.run("fedotp", model=clip, cache=cache, out=tmp_path, **TINY_RUN | more)
    assert figures(result) == figures(outcome())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(outcome, clip, dtype):
    narrow = clip.to(dtype=getattr(torch, dtype))
    rel = {"float64": 1e-4, "bfloat16": 0.05, "float16": 0.01}[dtype]
    for options in ({}, {"eps": 0.01}):
        wide = outcome(options=options)
        result = outcome(model=narrow, dtype=dtype, options=options)
        assert losses(result) != losses(wide)
        assert losses(result) == pytest.approx(losses(wide), rel=rel)


def test_a_clip_without_patches_is_refused(clip, monkeypatch, tmp_path):
    monkeypatch.setattr(FrozenCLIP, "patches", property(lambda self: None))
    with pytest.raises(
        InputError, match=r"clip must give features of patches for this method; .* use a ViT or"
    ):
        fastfpl.run("fedotp", model=clip, cache=tmp_path, **TINY_RUN)


def test_prompts_meet_classes_they_were_not_trained_on(outcome):
    result = outcome(scenario="base-to-novel", clients=2)
    exams = result.rounds[-1]["exams"]
    assert set(exams) == {"local", "base", "novel"}
    world = PatchWorld(dtype=F64)
    method = world.federation().method
    other = method.on(ClassPrompts(world.clip, NAMES[:2]))
    assert other.options == method.options
    ctx = 0.1 * drawn(1, 2, 3, 32, seed=6)
    trained = {"ctx": ctx[:, :1], "local": ctx[:, 1:]}
    image = world.clients[2].train[None]
    few = other.logits(other.text(trained, {}), trained, {}, image)
    all_ = method.logits(method.text(trained, {}), trained, {}, image)
    torch.testing.assert_close(few, all_[..., :2])


def test_the_loss_takes_float32_at_least():
    method = PatchWorld().federation().method
    text = torch.nn.functional.normalize(drawn(1, 4, 2, 16, seed=1, dtype=F32), dim=-1).bfloat16()
    image = torch.nn.functional.normalize(drawn(1, 3, 5, 16, seed=2, dtype=F32), dim=-1).bfloat16()
    logits = method.logits(text, {}, {}, image)
    assert logits.dtype == F32
    exact = method.logits(text.double(), {}, {}, image.double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    loss = method.loss(text, {}, {}, batch_of(image, labels))
    assert loss == cross_entropy(logits, labels, torch.ones(1, 3, dtype=torch.bool))
