"""Every algorithm against its literal reference, and the small cases that a hand can compute."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from fastfpl.errors import InputError
from fastfpl.federation import run
from fastfpl.methods import METHODS, check_options
from fastfpl.methods.base import weighted_mean
from fastfpl.methods.facts import method_facts, page
from fastfpl.ops.gate import Gate
from fastfpl.reference import rounds as reference
from fastfpl.reference.text import encode_text
from fastfpl.training import cohort
from fastfpl.training.cohort import train
from fastfpl.training.gathering import stack
from tests.worlds import NAMES, SIZES, World, batch_of, drawn, random_gate, small_clip

ROOT = Path(__file__).resolve().parent.parent
F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
RELATIVE = {F32: 1e-5, F64: 1e-12}
# scores are sharper than the papers', so that random features spread the gate's weights
MOAP = {
    "experts": 3,
    "heads": 2,
    "gate_width": 8,
    "gate_lr": 0.05,
    "local_weight": 0.7,
    "scaling": 40.0,
}
OPTIONS = {"promptfl": {}, "fedprox": {"mu": 2.0}, "local": {}, "pfedmoap": MOAP}
# of five clients: round 0 knows no experts; later ones see first-timers (2, 1), returning clients,
# clients that sit a round out with and without a trained gate, and one that never comes (4)
SELECTED = [[0, 1, 3], [0, 2, 3], [0, 1, 2], [3, 1]]
BASE = 7  # seed of the tensors that one test draws


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_near(result, exact, dtype, name):
    assert result.dtype == dtype, name
    scale = exact.abs().max()
    assert scale > 0, name
    off = ((result.double() - exact).abs().max() / scale).item()
    assert off <= RELATIVE[dtype], f"{name}: off by {off:.2e} of {scale:.2e}"


def common_gate(method):
    """Return the gate that clients start from, as the reference takes it."""
    common = method._common_gate()
    return replace(common, **{name: t.double() for name, t in common.tensors().items()})


def played(world, federation, factors=None, selected=SELECTED):
    """Let the reference play the rounds."""
    rounds = world.plan(selected[: world.config.rounds])
    ctx = federation.server["ctx"].double()
    args = world.setup(factors), world.clients, ctx, rounds
    if world.method == "local":
        return reference.local(*args)
    if world.method in ("promptfl", "fedprox"):
        return reference.promptfl(*args, mu=world.options.get("mu", 0.0))
    o = federation.method.options
    return reference.pfedmoap(
        *args,
        gate=common_gate(federation.method),
        gate_lr=o.gate_lr,
        local_weight=o.local_weight,
        pick=reference.nearest(o.experts - 1),
    )


def assert_same_rounds(world, federation, outcomes, selected=SELECTED):
    federation.sampling.sample = lambda round_: selected[round_]
    dtype = world.dtype
    for t, exact in enumerate(outcomes):
        row = federation.round()
        assert_near(federation.server["ctx"], exact.ctx, dtype, f"round {t}, ctx")
        assert set(federation.clients) == set(exact.kept)
        for c, ctx in exact.kept.items():
            kept = federation.clients[c]
            assert_near(kept["ctx"], ctx, dtype, f"round {t}, client {c}")
            gated = c in exact.gates
            assert len(kept) == 1 + 8 * gated
            if gated:
                for name, tensor in exact.gates[c].tensors().items():
                    assert_near(
                        kept[f"gate.{name}"], tensor, dtype, f"round {t}, client {c}, {name}"
                    )
        if "pool" in federation.server:
            present = [c for c in range(len(world.clients)) if c in exact.kept]
            owner = federation.server["pool_owner"].tolist()
            assert sorted(owner) == present
            for c in present:
                mine = federation.server["pool"][owner.index(c)]
                assert_near(mine, exact.kept[c], dtype, f"pool, {c}")
        losses = [exact.losses[c] for c in sorted(exact.losses)]
        assert row["selected"] == selected[t]
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=RELATIVE[dtype])
        assert row["clients"] == exact.accuracy
        assert row["accuracy"] == pytest.approx(math.fsum(exact.accuracy) / len(exact.accuracy))


@DTYPES
@pytest.mark.parametrize(
    ("method", "position"),
    [
        ("promptfl", "end"),
        ("promptfl", "middle"),
        ("fedprox", "front"),
        ("local", "end"),
        ("pfedmoap", "end"),
        ("pfedmoap", "middle"),
    ],
)
def test_rounds_equal_the_reference(method, position, dtype):
    world = World(method, dtype, position, OPTIONS[method])
    federation = world.federation()
    begin = federation.server["ctx"].double()
    outcomes = played(world, federation)
    assert_same_rounds(world, federation, outcomes)
    # the proof is worth nothing if nothing moved
    moved = [outcomes[-1].ctx - begin] + [ctx - begin for ctx in outcomes[-1].kept.values()]
    assert max(m.norm() for m in moved) > begin.norm()
    assert len({tuple(o.accuracy) for o in outcomes}) > 1


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("method", OPTIONS)
def test_local_epochs_equal_the_reference(method, epochs, dtype):
    settings = {"local_epochs": epochs, "rounds": 2}
    world = World(method, dtype, options=OPTIONS[method], settings=settings)
    federation = world.federation()
    everyone = [list(range(len(SIZES)))] * 2
    outcomes = played(world, federation, selected=everyone)
    assert_same_rounds(world, federation, outcomes, everyone)


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
@pytest.mark.parametrize("schedule", ["cosine", "cosine-rounds"])
def test_schedules_equal_the_reference(schedule, method):
    settings = {"schedule": schedule, "local_epochs": 3, "rounds": 3}
    world = World(method, F64, options=OPTIONS[method], settings=settings)
    factors = [
        [
            (1 + math.cos(math.pi * (e if schedule == "cosine" else t) / 3)) / 2  # both are thirds
            for e in range(3)
        ]
        for t in range(3)
    ]
    federation = world.federation()
    assert_same_rounds(world, federation, played(world, federation, factors))


def stacked_start(world, federation, *, gated):
    """Give every client a prompt of its own, and a gate: what a cohort's step starts from."""
    count, dtype = len(world.clients), world.dtype
    ctx = 0.1 * drawn(count, world.n_ctx, world.tower.width, seed=BASE)
    down, own = {"ctx": ctx.to(dtype)}, {}
    gates, experts = [None] * count, [[] for _ in range(count)]
    if gated:
        o = federation.method.options
        chosen = 0.1 * drawn(count, 2, world.n_ctx, world.tower.width, seed=BASE + 1)
        down |= {
            "experts": chosen.to(dtype),
            "expert_owner": torch.arange(2 * count).view(count, 2),
            "expert_round": torch.zeros(count, 2, dtype=torch.int64),
        }
        gates = [random_gate(o.gate_width, o.heads, o.scaling, seed=c) for c in range(count)]
        own = {
            f"gate.{n}": torch.stack([g.tensors()[n] for g in gates]).to(dtype)
            for n in Gate.tensor_names()
        }
        layout = world.classes.layout(world.n_ctx)
        experts = [[encode_text(world.tower, layout, e, False) for e in row] for row in chosen]
    return down, own, ctx, gates, experts


@DTYPES
@pytest.mark.parametrize("case", [*OPTIONS, "pfedmoap, first time"])
def test_loss_and_gradients_equal_the_reference(case, dtype):
    method, _, first = case.partition(",")
    world = World(method, dtype, options=OPTIONS[method])
    federation = world.federation()
    down, own, ctx, gates, experts = stacked_start(
        world, federation, gated=method == "pfedmoap" and not first
    )
    trained, fixed = federation.method.start(down, own, training=True)
    # away from the start, where FedProx's term has a gradient
    away = 0.1 * drawn(*ctx.shape, seed=BASE + 2)
    leaves = {n: t.clone().requires_grad_() for n, t in trained.items()}
    with torch.no_grad():
        leaves["ctx"] += away
    batch, width = 4, world.tower.dim
    image = torch.zeros(len(SIZES), batch, width, dtype=dtype)
    labels = torch.zeros(len(SIZES), batch, dtype=torch.int64)
    mask = torch.zeros(len(SIZES), batch, dtype=torch.bool)
    for u, client in enumerate(world.clients):
        n = min(batch, SIZES[u])
        image[u, :n], labels[u, :n], mask[u, :n] = client.train[:n], client.train_labels[:n], True
        image[u, n:] = image[u, 0]  # what stands in a masked place must not count
    text = federation.method.text(leaves, fixed)
    loss = federation.method.loss(text, leaves, fixed, batch_of(image, labels, mask))
    grads = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
    setup, lam = world.setup(), world.options.get("local_weight", 1.0)
    for u, client in enumerate(world.clients):
        mine = (ctx[u] + away[u]).requires_grad_()
        gate = gates[u]
        params = {"ctx": mine}
        if gate is not None:
            own_gate = {n: t.clone().requires_grad_() for n, t in gate.tensors().items()}
            params |= {f"gate.{n}": t for n, t in own_gate.items()}
            gate = replace(gate, **own_gate)
        n = min(batch, SIZES[u])
        logits = reference.logits_of(setup, mine, client.train[:n], experts[u], gate, lam)
        mu = world.options.get("mu", 0.0)
        exact = reference.loss_of(logits, client.train_labels[:n], mine, ctx[u], mu)
        assert_near(loss[u], exact.detach(), dtype, f"client {u}, loss")
        wanted = dict(zip(params, torch.autograd.grad(exact, list(params.values())), strict=True))
        assert set(wanted) == set(grads)
        # b_k moves all scores of a query alike, b_v and b_o all classes: what comes is rounding
        noise = RELATIVE[dtype] * max(g.abs().max() for g in wanted.values())
        for name, gradient in wanted.items():
            if name in ("gate.b_k", "gate.b_v", "gate.b_o"):
                assert gradient.abs().max() < noise
                assert grads[name][u].abs().max() < noise
            else:
                assert_near(grads[name][u], gradient, dtype, f"client {u}, gradient of {name}")


def test_the_gate_of_the_proof_is_neither_flat_nor_one_hot():
    world = World("pfedmoap", F64, options=MOAP)
    o = world.federation().method.options
    gate = random_gate(o.gate_width, o.heads, o.scaling, seed=1)
    stride = world.tower.dim // o.gate_width
    layout = world.classes.layout(world.n_ctx)
    text = encode_text(world.tower, layout, 0.1 * drawn(3, 3, 32, seed=1), False)[..., ::stride]
    q = F.linear(world.clients[3].train[:, ::stride], gate.w_q, gate.b_q).unflatten(-1, (2, -1))
    k = F.linear(text, gate.w_k, gate.b_k).unflatten(-1, (2, -1))
    weight = (o.scaling * torch.einsum("bhk,echk->bche", q, k)).softmax(-1)
    assert 0.45 < weight.max(-1).values.mean() < 0.97


# --- by hand: FedAvg and FedProx ------------------------------------------------------------------


def test_weighted_mean_of_three_clients():
    sent = {c: {"ctx": torch.tensor([[v, -v]])} for c, v in ((2, 8.0), (0, 1.0), (5, 4.0))}
    mean = weighted_mean(sent, {0: 1, 2: 2, 5: 5}, "ctx", torch.zeros(1, 2))
    assert mean.tolist() == [[(1 * 1 + 2 * 8 + 5 * 4) / 8, -(1 * 1 + 2 * 8 + 5 * 4) / 8]]
    # a client that is known but sent nothing has no weight
    assert torch.equal(mean, weighted_mean(sent, {0: 1, 2: 2, 5: 5, 7: 90}, "ctx", mean))


def test_weighted_mean_without_uploads_changes_nothing():
    ctx = drawn(3, 4, seed=1)
    assert torch.equal(weighted_mean({}, {}, "ctx", ctx), ctx)
    with pytest.raises(InputError, match="images must be positive"):
        weighted_mean({0: {"ctx": ctx}}, {0: 0}, "ctx", ctx)


def one_client(world, ctx, anchor):
    """Loss and gradient of client 3's first four images at a context."""
    federation = world.federation()
    client = world.clients[3]
    _, fixed = federation.method.start({"ctx": anchor[None]}, {}, training=True)
    leaf = ctx.clone()[None].requires_grad_()
    text = federation.method.text({"ctx": leaf}, fixed)
    loss = federation.method.loss(
        text,
        {"ctx": leaf},
        fixed,
        batch_of(client.train[None, :4], client.train_labels[None, :4]),
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss[0].detach(), gradient[0]


def test_fedprox_adds_mu_times_the_distance():
    ctx, anchor = (0.1 * drawn(3, 32, seed=s) for s in (1, 2))
    plain, gradient = one_client(World("promptfl", F64), ctx, anchor)
    for mu in (0.0, 0.5, 3.0):
        prox, moved = one_client(World("fedprox", F64, options={"mu": mu}), ctx, anchor)
        torch.testing.assert_close(moved, gradient + mu * (ctx - anchor), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(prox, plain + mu / 2 * (ctx - anchor).norm() ** 2)


def test_fedprox_with_mu_zero_is_promptfl():
    rows = []
    for method, options in (("fedprox", {"mu": 0.0}), ("promptfl", {})):
        federation = World(method, options=options).federation()
        rows.append([federation.round()["loss"] for _ in range(2)])
        rows.append(federation.server["ctx"].tolist())
    assert rows[:2] == rows[2:]


def test_fedprox_pulls_towards_the_global_context():
    far = {}
    for mu in (0.0, 20.0):
        federation = World("fedprox", options={"mu": mu}).federation()
        begin = federation.server["ctx"].clone()
        federation.round()
        far[mu] = (federation.server["ctx"] - begin).norm()
    assert far[20.0] < 0.7 * far[0.0]


def test_default_options_are_the_papers():
    assert check_options("fedprox", {}) == {"mu": 0.5}
    assert check_options("pfedmoap", {}) == {
        "experts": 10,
        "selection": "nearest",
        "local_weight": 0.5,
        "heads": 8,
        "gate_width": 128,
        "scaling": 10.0,
        "gate_lr": 0.01,
    }
    assert check_options("promptfl", {}) == check_options("local", {}) == {}


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("fedprox", {"nu": 1}, "fedprox's; got 'nu'; known: mu"),
        ("promptfl", {"mu": 1}, "promptfl's; got 'mu'; it has none"),
        ("fedprox", {"mu": -1.0}, "option mu is refused"),
        ("pfedmoap", {"selection": "closest"}, "option selection is refused"),
        ("pfedmoap", {"gate_lr": math.inf}, "option gate_lr is refused: .* finite number; got inf"),
        ("fedprox", {"mu": math.nan}, "option mu is refused: .* finite number; got nan"),
    ],
)
def test_wrong_options_are_refused(method, options, sentence):
    with pytest.raises(InputError, match=sentence):
        check_options(method, options)


@pytest.mark.parametrize("options", [{"gate_width": 12}, {"gate_width": 8, "heads": 3}])
def test_a_gate_that_does_not_fit_is_refused(options):
    with pytest.raises(InputError, match=r"gate_width must divide D=16 and be a multiple of"):
        World("pfedmoap", options={"heads": 2, **options}).federation()


def test_options_are_frozen():
    options = METHODS["fedprox"].Options()
    with pytest.raises(ValidationError):
        options.mu = 1.0


# --- by hand: pFedMoAP ----------------------------------------------------------------------------


def moap(**options):
    world = World("pfedmoap", F64, options={**MOAP, **options})
    return world, world.federation().method


def gated_logits(method, gates, experts, text, image):
    """Call the method's logits for one client with experts (C, K, d) as they were pooled."""
    trained = {f"gate.{n}": t[None] for n, t in gates.tensors().items()}
    return method.logits(text[None], trained, {"experts": experts[None]}, image[None])[0]


@pytest.fixture
def parts():
    text = F.normalize(drawn(4, 6, 16, seed=3), dim=-1)  # expert, class, feature
    image = F.normalize(drawn(5, 16, seed=4), dim=-1)
    return random_gate(8, 2, 10.0, seed=5), text, image


def by_hand(gate, pooled_text, pooled_image, scaling):
    """One image, one class, one head after another: sum over experts of softmax(10 q k) v."""
    rows = []
    for x in pooled_image:
        row = []
        for c in range(pooled_text.shape[1]):
            heads = []
            for h in range(2):
                at = slice(4 * h, 4 * h + 4)
                q = gate.w_q[at] @ x + gate.b_q[at]
                k = [gate.w_k[at] @ t[c] + gate.b_k[at] for t in pooled_text]
                v = [gate.w_v[at] @ t[c] + gate.b_v[at] for t in pooled_text]
                weight = [math.exp(scaling * float(q @ key)) for key in k]
                heads.append(sum(w * val for w, val in zip(weight, v, strict=True)) / sum(weight))
            row.append(x @ (gate.w_o @ torch.cat(heads) + gate.b_o))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_logits_by_hand(parts):
    gate, text, image = parts
    for scaling, lam in ((10.0, 0.7), (0.25, 0.0), (10.0, 0.0)):
        _, method = moap(scaling=scaling, local_weight=lam)
        # every second feature (16 -> 8), as it is: not normalised again
        pooled = text[..., ::2]
        assert pooled.norm(dim=-1).max() < 0.95
        mixed = by_hand(gate, pooled, image[:, ::2], scaling)
        wanted = 8.0 * (lam * image @ text[0].T + mixed)
        got = gated_logits(method, gate, pooled[1:].transpose(0, 1), text[0], image)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_a_client_s_gate_has_the_options_heads_and_scaling():
    _, method = moap(scaling=10.0)
    assert method._common_gate().scale == 10.0
    assert method._common_gate().heads == 2


def test_the_order_of_experts_does_not_matter(parts):
    gate, text, image = parts
    _, method = moap()
    experts = text[1:, :, ::2].transpose(0, 1)
    one = gated_logits(method, gate, experts, text[0], image)
    other = gated_logits(method, gate, experts.flip(1), text[0], image)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # but which one is one's own does
    mixed_up = gated_logits(method, gate, text[[0, 2, 3], :, ::2].transpose(0, 1), text[1], image)
    assert (one - mixed_up).abs().max() > 0.01


def test_logits_without_experts_are_plain(parts):
    _, text, image = parts
    _, method = moap(local_weight=0.1)
    got = method.logits(text[:1], {}, {}, image[None])[0]
    torch.testing.assert_close(got, 8.0 * image @ text[0].T)


def test_local_weight_zero_still_trains_the_prompt(parts):
    gate, text, image = parts
    _, method = moap(local_weight=0.0)
    own = text[0].clone().requires_grad_()
    gated_logits(method, gate, text[1:, :, ::2].transpose(0, 1), own, image).sum().backward()
    # of the strided features only
    assert own.grad[:, ::2].abs().min() > 0
    assert own.grad[:, 1::2].abs().max() == 0


def pool_of(values, n_ctx=3, width=32):
    """A server whose client c has uploaded a context that is constant, None if it has not."""
    # who uploaded first has no small number
    owner = [c for c in reversed(range(len(values))) if values[c] is not None]
    pool = torch.stack([torch.full((n_ctx, width), values[c]) for c in owner])
    there = {"pool": pool, "pool_owner": torch.tensor(owner), "pool_round": torch.tensor(owner)}
    return {"ctx": torch.zeros(n_ctx, width), **there}


def chosen_by(method, server, client, round_=5):
    down = method.download(server, client, round_)
    if "experts" not in down:
        assert set(down) == {"ctx"}
        return []
    owner = down["expert_owner"].tolist()
    rows = [server["pool_owner"].tolist().index(c) for c in owner]
    assert torch.equal(down["experts"], server["pool"][rows])
    assert down["expert_round"].tolist() == server["pool_round"][rows].tolist()
    return owner


@pytest.mark.parametrize(
    ("values", "client", "experts", "wanted"),
    [
        ((0.0, 3.0, 1.0, -2.0, 9.0), 0, 3, [2, 3]),
        ((0.0, 3.0, 1.0, -2.0, 9.0), 4, 3, [1, 2]),
        ((0.0, 3.0, 1.0, -2.0, 9.0), 4, 2, [1]),
        ((0.0, 3.0, 1.0, -2.0, 9.0), 1, 10, [0, 2, 3, 4]),
        ((0.0, 3.0, 1.0, -2.0, 9.0), 1, 1, []),
        ((0.0, 2.0, -2.0, 2.0, 1.0), 0, 3, [1, 4]),  # clients 1, 2, 3 are equally far
        ((5.0, 5.0, 5.0, 5.0, 5.0), 2, 3, [0, 1]),
        ((0.0, None, 1.0, None, 9.0), 0, 3, [2, 4]),
        ((None, 3.0, 1.0, -2.0, 9.0), 0, 3, []),  # the first time
        ((0.0, None, None, None, None), 0, 3, []),  # alone
    ],
)
def test_nearest_prompts_of_a_hand_made_pool(values, client, experts, wanted):
    _, method = moap(experts=experts)
    assert chosen_by(method, pool_of(values), client) == wanted


def test_nearest_agrees_with_the_reference_on_random_pools():
    _, method = moap(experts=4)
    pick = reference.nearest(3)
    for seed in range(20):
        server = pool_of([0.0] * 9)
        server["pool"] = drawn(9, 3, 32, seed=seed, dtype=F32)
        entries = dict(zip(server["pool_owner"].tolist(), server["pool"], strict=True))
        for client in range(9):
            assert chosen_by(method, server, client) == sorted(pick(0, client, entries))


def test_random_selection_is_drawn_for_each_client_and_round():
    _, method = moap(experts=4, selection="random")
    server = pool_of([float(v) for v in range(12)])
    draws = {(c, r): chosen_by(method, server, c, r) for c in range(12) for r in range(6)}
    for (client, _), owners in draws.items():
        assert len(set(owners)) == 3
        assert client not in owners
    assert all(draws[c, r] == chosen_by(method, server, c, r) for c, r in draws)
    assert len({tuple(draws[c, 0]) for c in range(12)}) > 8
    assert len({tuple(draws[0, r]) for r in range(6)}) > 4
    # every other client is drawn about equally often: 72 · 3 / 12 = 18
    counts = [sum(c in owners for owners in draws.values()) for c in range(12)]
    assert min(counts) > 8
    assert max(counts) < 30


def test_a_random_federation_equals_the_reference():
    world = World("pfedmoap", F64, options={**MOAP, "selection": "random"})
    federation = world.federation()
    asked = {}

    def pick(round_, client, pool):
        # the reference does not know how draws are made: it asks the method for their outcome
        server = dict(federation.server)
        server["pool"] = torch.stack(list(pool.values()))
        server["pool_owner"] = torch.tensor(list(pool))
        server["pool_round"] = torch.zeros(len(pool), dtype=torch.int64)
        down = federation.method.download(server, client, round_)
        asked[round_, client] = down["expert_owner"].tolist()
        return asked[round_, client]

    o = federation.method.options
    outcomes = reference.pfedmoap(
        world.setup(),
        world.clients,
        federation.server["ctx"],
        world.plan(SELECTED),
        gate=common_gate(federation.method),
        gate_lr=o.gate_lr,
        local_weight=o.local_weight,
        pick=pick,
    )
    assert_same_rounds(world, federation, outcomes)
    nearest = played(World("pfedmoap", F64, options=MOAP), federation)
    assert not torch.equal(nearest[-1].ctx, outcomes[-1].ctx)
    assert len(asked) > 6


def test_a_round_does_not_see_its_own_uploads():
    world = World("pfedmoap", options={**MOAP, "experts": 10})
    federation = world.federation()
    seen = []
    download = federation.method.download

    def spy(server, client, round_):
        down = download(server, client, round_)
        versions = down.get("expert_round", torch.zeros(0)).tolist()
        seen.append((round_, client, down.get("expert_owner", torch.zeros(0)).tolist(), versions))
        return down

    federation.method.download = spy
    federation.sampling.sample = lambda round_: SELECTED[round_]
    for t in range(3):
        seen.clear()
        before = {c for past in SELECTED[:t] for c in past}
        federation.round()
        training = {c: (owners, v) for r, c, owners, v in seen if r == t}
        assert set(training) == set(SELECTED[t])
        for client, (owners, versions) in training.items():
            known = sorted(before - {client}) if client in before else []
            assert owners == known
            latest = [max(r for r in range(t) if c in SELECTED[r]) for c in known]
            assert versions == latest
        # clients that sat out receive nothing: they answer with the experts that they trained with
        never = set(range(5)) - before - set(SELECTED[t])
        assert {client for r, client, *_ in seen if r == t + 1} == never


def test_idle_clients_answer_with_the_experts_that_they_trained_with():
    """Client 0 sits out while its neighbours move: its answers stay, to the last bit."""
    federation = World("pfedmoap", options=MOAP, settings={"lr": 0.5}).federation()
    federation.sampling.sample = lambda round_: [[0, 1, 2], [0, 1, 2], [1, 2], [1, 2, 3]][round_]
    held, answers = [], []
    for t in range(4):
        federation.round()
        held.append({name: t.clone() for name, t in federation.downloads[0].items()})
        answers.append([scores.answers.tolist() for scores in federation.ask()[0]])
    assert held[1]["expert_round"].tolist() == [0, 0]
    for later in (2, 3):
        assert all(torch.equal(held[later][name], held[1][name]) for name in held[1])
        assert answers[later][0] == answers[1][0]
        assert answers[later][1] != answers[1][1]
    # with new neighbours it would answer otherwise
    fresh = federation.method.download(federation.server, 0, 4)
    assert fresh["expert_round"].tolist() == [3, 3]
    federation.downloads.put(0, fresh)
    assert federation.ask()[0][0].answers.tolist() != answers[3][0]
    assert set(federation.downloads) == {0, 1, 2, 3}


def test_the_gate_waits_for_the_second_participation():
    federation = World("pfedmoap", options=MOAP).federation()
    federation.sampling.sample = lambda round_: [[0, 1], [0, 2], [1, 2]][round_]
    common = federation.method._common_gate().tensors()
    gates = []
    for _ in range(3):
        federation.round()
        gates.append({c: {k for k in s if k != "ctx"} for c, s in federation.clients.items()})
    full = {f"gate.{name}" for name in common}
    assert gates == [
        {0: set(), 1: set()},
        {0: full, 1: set(), 2: set()},
        {0: full, 1: full, 2: full},
    ]
    # trained, and each on its own
    for name, tensor in common.items():
        own = [federation.clients[c][f"gate.{name}"] for c in range(3)]
        if name != "b_k":
            assert all(not torch.equal(t, tensor) for t in own)
            assert not torch.equal(own[1], own[2])


def test_the_common_gate_is_drawn_like_linear_layers():
    for seed in (0, 1):
        world = World("pfedmoap", options=MOAP, settings={"seed": seed})
        gates = [world.federation().method._common_gate().tensors() for _ in range(2)]
        assert all(torch.equal(gates[0][n], gates[1][n]) for n in gates[0])
        values = torch.cat([t.flatten() for t in gates[0].values()])
        assert len(values) == 4 * (64 + 8)
        bound = 8**-0.5
        assert values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert values.unique().numel() == len(values)


WIDE = [(F32, F32), (F64, F64), (torch.bfloat16, F32)]


@pytest.mark.parametrize(("tower", "trained"), WIDE, ids=str)
@pytest.mark.parametrize("words", [None, "a photo of a"])
def test_prompts_and_gates_train_in_float32_or_wider(words, tower, trained):
    method = World("pfedmoap", tower, options=MOAP).federation().method
    method.task = replace(method.task, ctx_init=words)
    server = method.server_init()
    assert (server["ctx"].dtype, server["pool"].dtype) == (trained, trained)
    assert {t.dtype for t in method._common_gate().tensors().values()} == {trained}
    if words is not None:
        assert torch.equal(server["ctx"].to(tower), method.task.classes.words(words))


def test_each_parameter_has_its_own_rate():
    _, method = moap()
    assert method.rate("ctx") == 0.01
    assert {method.rate(f"gate.{n}") for n in Gate.tensor_names()} == {0.05}
    assert method.scheduled("ctx")
    assert not any(method.scheduled(f"gate.{n}") for n in Gate.tensor_names())


def test_a_schedule_leaves_the_gate_s_rate_alone(monkeypatch):
    """With factor 0 the prompt stands still, and the gate's first step is that of factor 1."""
    ends = []
    for factor in (0.0, 1.0):
        federation = World("pfedmoap", options=MOAP, settings={"local_epochs": 1}).federation()
        federation.sampling.sample = lambda round_: [0, 1]
        federation.round()
        begin = federation.server["ctx"]
        monkeypatch.setattr(cohort, "learning_rate", lambda *a, factor=factor: factor)
        federation.round()
        monkeypatch.undo()
        # client 0 has images for one step
        ends.append(dict(federation.clients[0]))
        assert torch.equal(ends[-1]["ctx"], begin) == (factor == 0.0)
    common = federation.method._common_gate().tensors()
    for name in ("w_q", "w_k", "w_v", "w_o", "b_q"):
        assert not torch.equal(ends[0][f"gate.{name}"], common[name])
        assert torch.equal(ends[0][f"gate.{name}"], ends[1][f"gate.{name}"])


def test_only_the_prompt_is_sent():
    federation = World("pfedmoap", options=MOAP).federation()
    federation.sampling.sample = lambda round_: [0, 1, 2]
    sizes = [federation.round() for _ in range(2)]
    prompt = 3 * 32 * 4
    assert [row["bytes_up"] for row in sizes] == [3 * prompt, 3 * prompt]
    # two experts with their owner and version
    assert [row["bytes_down"] for row in sizes] == [3 * prompt, 3 * (3 * prompt + 2 * 2 * 8)]


@pytest.mark.parametrize("method", ["promptfl", "fedprox", "local"])
def test_bytes_that_travel(method):
    federation = World(method).federation()
    federation.sampling.sample = lambda round_: [0, 2]
    row = federation.round()
    prompt = 3 * 32 * 4
    assert row["bytes_down"] == 2 * prompt
    assert row["bytes_up"] == (0 if method == "local" else 2 * prompt)


# --- local CoOp and zero-shot ---------------------------------------------------------------------


def test_local_clients_ignore_each_other():
    alone = World("local")
    federation = alone.federation()
    federation.sampling.sample = lambda round_: [2]
    together = World("local").federation()
    for _ in range(2):
        federation.round()
        together.round()
    assert list(federation.clients) == [2]
    torch.testing.assert_close(federation.clients[2]["ctx"], together.clients[2]["ctx"])


def test_local_rounds_are_epochs_of_one_run():
    """With no momentum to lose, two rounds of one epoch equal two epochs in their data order."""
    world = World("local", F64, settings={"local_epochs": 1, "momentum": 0.0, "rounds": 2})
    federation = world.federation()
    for _ in range(2):
        federation.round()
    joined = [
        [[b for r in range(2) for b in world.plan([range(5)] * 2)[r][c][0]]] for c in range(5)
    ]
    once = reference.local(
        world.setup(),
        world.clients,
        world.federation().server["ctx"],
        [dict(enumerate(joined))],
    )
    for c in range(5):
        assert_near(federation.clients[c]["ctx"], once[0].kept[c], F64, f"client {c}")


def whole_rows(world, template):
    """Tokenise whole sentences: SOS, everything, EOT, zeros."""
    rows = torch.zeros(len(NAMES), world.tower.context_length, dtype=torch.int64)
    eot = []
    for c, ids in enumerate(world.clip.tokenize([template.format(name) for name in NAMES])):
        line = [world.tower.sos, *ids, world.tower.eot]
        rows[c, : len(line)] = torch.tensor(line)
        eot.append(len(line) - 1)
    return rows, torch.tensor(eot)


@DTYPES
@pytest.mark.parametrize("words", ["a photo of a", "some"])
def test_zeroshot_is_the_sentence(words, dtype):
    world = World("zeroshot", dtype, options={} if words == "a photo of a" else {"words": words})
    federation = world.federation()
    tokens, eot = whole_rows(world, words + " {}.")
    text = reference.encode_tokens(world.tower, tokens, eot)
    _, fixed = federation.method.start(stack([federation.server]), {}, training=False)
    assert_near(federation.method.text({}, fixed)[0], text, dtype, "text")
    row = federation.round()
    assert row["clients"] == reference.zeroshot(world.tower, tokens, eot, 8.0, world.clients)
    assert federation.finished
    assert (row["selected"], row["loss"], row["bytes_up"], row["bytes_down"]) == ([], None, 0, 0)
    assert federation.clients == {}


def test_zeroshot_needs_the_name_at_the_end():
    with pytest.raises(InputError, match="position must be 'end'"):
        World("zeroshot", position="middle").federation()


# --- what a cohort must not do --------------------------------------------------------------------


@pytest.mark.parametrize("method", OPTIONS)
def test_clients_in_a_cohort_do_not_see_each_other(method):
    """Changing one client's images changes that client only."""
    sent = []
    for change in (False, True):
        world = World(method, F64, options=OPTIONS[method])
        if change:
            world.clients[1] = replace(world.clients[1], train=world.clients[2].train[:5])
        federation = world.federation()
        down = {"ctx": (0.1 * drawn(5, 3, 32, seed=2))}
        done = train(
            federation.method,
            range(5),
            down,
            {},
            federation.trainer.feed,
            {c: federation.shards[c].train for c in range(5)},
            world.config,
            0,
            lambda what, done, total: None,
        )
        sent.append(((done.upload or done.own)["ctx"], done.losses))
        assert done.images == 2 * (3 + 4 + 8 + 12 + 4)
    (one, loss), (other, changed) = sent
    same = [c for c in range(5) if torch.equal(one[c], other[c]) and loss[c] == changed[c]]
    assert same == [0, 2, 3, 4]


# --- what is said of a method ---------------------------------------------------------------------


def test_every_option_and_method_says_what_it_is():
    for name, method in METHODS.items():
        facts = method_facts(name)
        assert facts.about
        assert re.search(r"\b(19|20)\d\d\b", facts.source), name
        assert [option.name for option in facts.options] == list(method.Options.model_fields)
        for option in facts.options:
            assert option.about, f"{name}.{option.name}"
            default = method.Options.model_fields[option.name].default
            # without a value of its own, the meaning ends with what happens
            assert (option.default != "") == (default is not None)
            assert option.default or re.search(r"\(.+\)", option.about)
    assert method_facts("fedprox").options[0].kind == "NUMBER ≥ 0"
    assert method_facts("fedotp").options[3].kind == "NUMBER > 0, ≤ 1"
    assert method_facts("pfedmoap").options[1].kind == "nearest|random"


def test_the_page_of_methods_is_current():
    found = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert found == page(), "python -m fastfpl.methods.facts > docs/methods.md"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return {"model": small_clip(), "cache": tmp_path_factory.mktemp("features")}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_to_travel_travels(name, small):
    facts = method_facts(name)
    result = run(
        name,
        **{"dataset": "digits", "clients": 2, "shots": 2, "n_ctx": 2, "rounds": 1},
        **{"local_epochs": 1, "augment": "views:1" if METHODS[name].paired else "none"},
        **{"options": {"gate_width": 8, "heads": 2} if name == "pfedmoap" else {}},
        **small,
    )
    (row,) = result.rounds
    assert (row["bytes_up"] == 0) == (facts.sends == "nothing")
    assert (row["bytes_down"] == 0) == (facts.receives == "nothing")
