"""Quirks of released code: each does what is described, changes figures, and is off by default."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastfpl
import fastfpl.federation.preparation
from fastfpl.cli import main
from fastfpl.data import Dataset, Shard, Split, load_dataset, restrict
from fastfpl.errors import InputError
from fastfpl.federation.checkpoint import CHECKPOINT
from fastfpl.federation.server import Round
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import METHODS, FedOTP, check_options
from fastfpl.reference import released as reference
from fastfpl.released import QUIRKS, Visits, as_released, choose_quirks, disturbed, visits_of
from fastfpl.released.fedotp import TEST_BATCH, stopped_together
from fastfpl.report import html_page, markdown_table, text_table
from fastfpl.report.agreement import warnings
from fastfpl.report.facts import released
from fastfpl.seeds import generator
from tests.proofs import F32, F64, assert_near, assert_same_rounds, first_images, one_thread
from tests.test_fedapt_unsupervised import PairedWorld
from tests.test_methods import MOAP
from tests.worlds import GATE, SIZES, TINY_RUN, World, batch_of, drawn, figures, small_clip

one = pytest.fixture(scope="module", autouse=True)(one_thread)

# in the order in which they are visited: first-timers, one of them (2) after gates have trained,
# returning clients, and one that never comes (4)
VISITED = [[3, 0, 1], [3, 0, 2], [1, 2, 0], [3, 1]]
# of one order for all that may choose
ALL = {
    "zeroshot": [],
    "local": ["shared-optimiser", "warmup", "fp16-context"],
    "promptfl": ["shared-optimiser", "warmup", "fp16-context"],
    "fedprox": ["shared-optimiser", "warmup", "fp16-context", "fedprox-no-gradient"],
    "pfedmoap": [
        "shared-optimiser",
        "warmup",
        "fp16-context",
        "pfedmoap-shared-random-experts",
        "pfedmoap-pool-in-round",
        "pfedmoap-inherited-gate",
    ],
    "fedotp": ["shared-optimiser", "fp16-context", "fedotp-batch-stop"],
    "fedpgp": ["shared-optimiser"],
    "fedapt-unsupervised": ["fedapt-double-softmax"],
}
DOMAIN = ["domain-scrambled-labels", "domain-set-ordered-names"]


def federation_of(world, *quirks):
    """Lay quirks over the federation of a world, as `prepare` does."""
    clean = world.federation()
    method = as_released(type(clean.method), quirks)(world_task(clean), world.options)
    visits = visits_of(quirks, world.config.schedule, world.config.lr)
    trainer = replace(clean.trainer, method=method)
    exams = [replace(exam, method=method) for exam in clean.examiner.exams]
    return replace(
        clean,
        trainer=trainer,
        examiner=replace(clean.examiner, trainer=trainer, exams=exams),
        now=Round.first(method),
        order=Together() if visits is None else InTurn(visits),
    )


def world_task(federation):
    return federation.method.task


def turns_of(federation):
    """Play the turns of the next round."""
    now = federation.now
    call = federation.sampling.call(now.number)
    return federation.order.turns(federation.trainer, now, call, federation.clients)


def in_order(federation, visited=VISITED):
    """Let a federation draw these clients in this order."""
    federation.sampling.drawn = lambda round_: visited[round_]
    return [sorted(members) for members in visited]


# -- the trainer ---------------------------------------------------------------------------------


def rates(visits, epochs, count):
    """Write the learning rates of some visits, in units of 1e-5."""
    state, lines = {}, []
    for _ in range(count):
        lines.append([f * visits.lr * 1e5 for f in visits.factors(state, epochs)])
        state = visits.after(state, epochs, {}, {})
    return lines


def test_rates_are_those_measured():
    # of the released trainers with five local epochs, base rate 0.002 and one epoch of warm-up
    visits = Visits(shared=True, warmup=True, cosine=True, lr=0.002)
    measured = [[1, 200, 181, 131, 69], [19, 0, 19, 69, 131], [181, 200, 181, 131, 69]]
    measured += [measured[1], measured[2]]
    for line, wanted in zip(rates(visits, 5, 5), measured, strict=True):
        assert line == pytest.approx(wanted, abs=0.51)
    assert rates(visits, 5, 2)[1][1] == 0
    # with one local epoch every second visit trains with a rate of exactly zero
    assert rates(visits, 1, 5) == [[pytest.approx(1)], [200], [0], [200], [0]]


def test_without_warmup_the_cosine_begins_at_once():
    visits = Visits(shared=True, warmup=False, cosine=True, lr=0.002)
    assert rates(visits, 5, 1)[0] == pytest.approx([200, 181, 131, 69, 19], abs=0.51)
    assert rates(visits, 1, 3) == [[200], [0], [200]]


def test_a_constant_schedule_stays_constant():
    visits = Visits(shared=True, warmup=True, cosine=False, lr=0.002)
    assert rates(visits, 2, 2) == [[pytest.approx(1), 200], [200, 200]]


def test_rates_are_those_of_torch():
    """The reference steps torch's own scheduler."""
    world = World("promptfl", F64, settings={"schedule": "cosine", "local_epochs": 3})
    federation = world.federation()
    ctx = federation.server["ctx"]
    for warmup in (False, True):
        model = reference.Model(
            world.setup(), ctx, epochs=3, shared=True, cosine=True, warmup=warmup
        )
        visits = Visits(shared=True, warmup=warmup, cosine=True, lr=world.config.lr)
        state = {}
        for number in range(5):
            steps = world.plan([[0]])[0][0]
            *_, theirs = model.visit(world.clients[0], steps, ctx)
            ours = [f * world.config.lr for f in visits.factors(state, 3)]
            assert ours == pytest.approx(theirs, abs=1e-12), number
            state = visits.after(state, 3, {}, {})


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("method", "schedule", "warmup"),
    [
        ("promptfl", "constant", False),
        ("promptfl", "cosine", False),
        ("promptfl", "cosine", True),
        ("fedprox", "cosine", True),
    ],
)
def test_one_optimiser_for_all_equals_the_reference(method, schedule, warmup, dtype):
    options = {"mu": 2.0} if method == "fedprox" else {}
    settings = {"schedule": schedule, "lr": 0.02}
    world = World(method, dtype, options=options, settings=settings)
    quirks = ["shared-optimiser", *["warmup"] * warmup]
    # the reference's proximal term has no gradient
    quirks += ["fedprox-no-gradient"] * (method == "fedprox")
    federation = federation_of(world, *quirks)
    ctx = federation.server["ctx"].double()
    model = reference.Model(
        world.setup(), ctx, epochs=2, shared=True, cosine=schedule == "cosine", warmup=warmup
    )
    outcomes = reference.promptfl(
        world.setup(), world.clients, ctx, world.plan(VISITED), model, **options
    )
    assert_same_rounds(
        world,
        federation,
        outcomes,
        in_order(federation),
        server=lambda o: {"ctx": o.ctx},
        kept=lambda o: {},
    )
    # a fresh optimiser goes elsewhere
    clean = world.federation()
    clean.sampling.sample = lambda round_: sorted(VISITED[round_])
    for _ in VISITED:
        clean.round()
    assert (clean.server["ctx"] - outcomes[-1].ctx).norm() > 0.01 * outcomes[-1].ctx.norm()


def test_turns_are_taken_in_the_order_of_the_draw():
    world = World("promptfl", F64, settings={"participation": 0.8})
    federation = federation_of(world, "shared-optimiser")
    orders = [federation.sampling.drawn(round_) for round_ in range(4)]
    assert any(order != sorted(order) for order in orders)
    assert [sorted(order) for order in orders] == [federation.sampling.sample(r) for r in range(4)]
    turns = list(turns_of(federation))
    assert [turn.members for turn in turns] == [[c] for c in orders[0]]
    assert int(turns[-1].handed["epochs"]) == 2 * len(orders[0])


def test_turns_without_anything_shared_change_nothing():
    """Only the order differs, which a clean client does not see."""
    world = World("promptfl", F64)
    clean, federation = world.federation(), federation_of(world, "shared-optimiser")
    federation.order = InTurn(Visits(shared=False, warmup=False, cosine=False, lr=0.1))
    for _ in range(2):
        clean.round()
        federation.round()
    assert_near(federation.server["ctx"], clean.server["ctx"], F64, "ctx")
    assert federation.now.handed == {}


# -- FedProx -------------------------------------------------------------------------------------


def test_the_proximal_term_is_printed_and_does_nothing():
    plain = World("promptfl", F64).federation()
    world = World("fedprox", F64, options={"mu": 2.0})
    quirk, clean = federation_of(world, "fedprox-no-gradient"), world.federation()
    for _ in range(2):
        rows = [f.round() for f in (plain, quirk, clean)]
    assert torch.equal(quirk.server["ctx"], plain.server["ctx"])
    assert not torch.equal(clean.server["ctx"], plain.server["ctx"])
    assert rows[1]["loss"] > rows[0]["loss"]
    assert rows[1]["clients"] == rows[0]["clients"]


def test_the_printed_loss_holds_the_term():
    world = World("fedprox", F64, options={"mu": 2.0})
    quirk, clean = federation_of(world, "fedprox-no-gradient").method, world.federation().method
    batch = first_images(world)
    fixed = {"anchor": drawn(len(SIZES), 3, 32, seed=1)}
    found = []
    for method in (quirk, clean):
        leaf = (fixed["anchor"] + 0.5).requires_grad_()
        loss = method.loss(method.text({"ctx": leaf}, fixed), {"ctx": leaf}, fixed, batch)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        found.append((loss.detach(), gradient))
    assert torch.equal(found[0][0], found[1][0])
    # the gradient that is missing is mu (P - P_global)
    assert_near(found[1][1] - found[0][1], torch.full_like(leaf, 2.0 * 0.5), F64, "difference")


# -- pFedMoAP ------------------------------------------------------------------------------------


def listed_order(method):
    """Read the list from the definition."""
    draw = generator(method.task.seed, "experts", "list")
    return torch.randperm(method.task.clients, generator=draw).tolist()


def first_of(order, count):
    def pick(round_, client, pool):
        return [j for j in order if j in pool and j != client][:count]

    return pick


@pytest.mark.parametrize(
    "quirks",
    [
        ["pfedmoap-shared-random-experts"],
        ["pfedmoap-pool-in-round"],
        ["pfedmoap-inherited-gate"],
        ["pfedmoap-pool-in-round", "pfedmoap-inherited-gate"],
        [n for n in ALL["pfedmoap"] if n != "fp16-context"],
    ],
    ids=lambda names: "+".join(n.removeprefix("pfedmoap-") for n in names),
)
def test_pfedmoap_equals_the_reference(quirks):
    shared, warmup = "shared-optimiser" in quirks, "warmup" in quirks
    settings = {"schedule": "cosine" if shared else "constant"}
    world = World("pfedmoap", F64, options=MOAP, settings=settings)
    federation = federation_of(world, *quirks)
    method = federation.method
    o = method.options
    gate = method._common_gate()
    ctx = federation.server["ctx"].double()
    pick = reference_pick(method, "pfedmoap-shared-random-experts" in quirks)

    def play(**changes):
        chosen = {
            "pick": pick,
            "pool_in_round": "pfedmoap-pool-in-round" in quirks,
            "inherit": "pfedmoap-inherited-gate" in quirks,
            "shared": shared,
            **changes,
        }
        together = chosen.pop("shared")
        model = reference.Model(
            world.setup(),
            ctx,
            gate,
            o.gate_lr,
            epochs=2,
            shared=together,
            cosine=together,
            warmup=together and warmup,
        )
        return reference.pfedmoap(
            world.setup(),
            world.clients,
            ctx,
            world.plan(VISITED),
            model,
            local_weight=o.local_weight,
            **chosen,
        )

    def kept(outcome):
        return {
            c: {"ctx": own}
            | (
                {f"gate.{n}": t for n, t in outcome.gates[c].tensors().items()}
                if c in outcome.gates
                else {}
            )
            for c, own in outcome.kept.items()
        }

    outcomes = play()
    assert_same_rounds(
        world,
        federation,
        outcomes,
        in_order(federation),
        server=lambda o: {"ctx": o.ctx},
        kept=kept,
    )
    clean = play(
        pick=reference_pick(method, False), pool_in_round=False, inherit=False, shared=False
    )
    assert (clean[-1].ctx - outcomes[-1].ctx).norm() > 1e-3 * outcomes[-1].ctx.norm()


def reference_pick(method, shared):
    from fastfpl.reference.rounds import nearest

    count = method.options.experts - 1
    return first_of(listed_order(method), count) if shared else nearest(count)


def test_everybody_takes_experts_from_one_list():
    world = World("pfedmoap", F64, options={**MOAP, "experts": 3})
    for quirks, same in (([], False), (["pfedmoap-shared-random-experts"], True)):
        federation = federation_of(world, *quirks)
        everyone = list(range(len(SIZES)))
        federation.sampling.sample = lambda round_, everyone=everyone: everyone
        federation.round()
        method = federation.method
        order = listed_order(method)
        downs = [method.download(federation.server, c, 1) for c in everyone]
        owners = [down["expert_owner"].tolist() for down in downs]
        listed = [sorted([j for j in order if j != c][:2]) for c in everyone]
        assert (owners == listed) is same


def test_a_prompt_is_in_the_pool_at_once():
    world = World("pfedmoap", F64, options={**MOAP, "experts": 5})
    federation = federation_of(world, "pfedmoap-pool-in-round")
    in_order(federation, [[4, 2, 0, 1, 3]] * 2)
    federation.round()
    federation.sampling.lost = lambda round_, selected: {2}
    turns = turns_of(federation)
    rounds = {
        turn.members[0]: dict(
            zip(
                *(turn.down[f"expert_{k}"][0].tolist() for k in ("owner", "round")),
                strict=True,
            )
        )
        for turn in turns
    }
    # those before it are of this round, but for 2, whose upload is lost
    assert rounds[4] == {0: 0, 1: 0, 2: 0, 3: 0}
    assert rounds[2] == {0: 0, 1: 0, 3: 0, 4: 1}
    assert rounds[3] == {0: 1, 1: 1, 2: 0, 4: 1}


def test_the_first_gate_is_the_one_trained_last():
    world = World("pfedmoap", F64, options={**MOAP, "experts": 5})
    federation = federation_of(world, "pfedmoap-inherited-gate")
    order = [4, 2, 0, 1, 3]
    in_order(federation, [order] * 3)
    started = []
    start = federation.method.start

    def spy(down, own, *, training):
        trained, fixed = start(down, own, training=training)
        if training:
            started.append({k: v[0].clone() for k, v in trained.items() if "gate" in k})
        return trained, fixed

    federation.method.start = spy
    for _ in range(3):
        federation.round()
        if len(started) == 10:
            kept = [dict(federation.clients[c]) for c in order]
    # round 0 trains no gate; in round 1 each goes on from the one before; then from its own
    assert started[:5] == [{}] * 5
    common = federation.method._common_gate().tensors()
    wanted = [{f"gate.{k}": v for k, v in common.items()}, *kept[:-1], *kept]
    for mine, theirs in zip(started[5:], wanted, strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
        assert len(mine) == 8


# -- FedOTP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.03])
def test_a_batch_stops_at_once(eps):
    sim = 0.22 + 0.04 * drawn(3, 6, 4, 7, 2, seed=5)
    full = torch.ones(3, 6, dtype=torch.bool)
    steps = []
    for u in range(3):
        exact, done = reference.stopped_together(sim[u], eps, 0.8, 100, 1e-3)
        steps.append(done)
        plan = stopped_together(sim, full, eps, 0.8, 100, 1e-3)[u]
        assert_near(plan, exact, F64, f"client {u}")
        assert_near(plan.sum(-2), torch.full((6, 4, 2), 0.4, dtype=F64), F64, "columns")
    assert 1 < min(steps) <= max(steps)
    # an image of which the batch is wide awake keeps the others going
    alone, done = reference.stopped_together(sim[0, :1], eps, 0.8, 100, 1e-3)
    assert done != steps[0] or not torch.allclose(alone, exact[:1])
    # a masked place does not count
    mask = full.clone()
    mask[0, 4:] = False
    exact, _ = reference.stopped_together(sim[0, :4], eps, 0.8, 100, 1e-3)
    assert_near(stopped_together(sim, mask, eps, 0.8, 100, 1e-3)[0, :4], exact, F64, "masked")


def test_a_small_temperature_ends_without_a_complaint():
    sim = 0.22 + 0.04 * drawn(1, 2, 3, 49, 2, seed=6).float()
    plan = stopped_together(sim, torch.ones(1, 2, dtype=torch.bool), 0.002, 0.8, 100, 1e-3)
    assert plan.isfinite().all()
    # exp(390) is not a float32: the change of v is never a small number
    assert_near(plan.double().sum((-2, -1)), torch.full((1, 2, 3), 0.8, dtype=F64), F64, "m", 1e8)


def test_fedotp_trains_through_plans_of_whole_batches():
    world = World("fedotp", F64)
    task = world.federation().method.task
    options = {"tol": 1e-3}
    quirk = as_released(FedOTP, ["fedotp-batch-stop"])(task, options)
    patches = F.normalize(drawn(2, 5, 7, 16, seed=8), dim=-1)
    labels = torch.arange(10).reshape(2, 5) % 6
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    text = F.normalize(drawn(2, 6, 2, 16, seed=9), dim=-1).requires_grad_()
    loss = quirk.loss(text, {}, {}, batch_of(patches, labels, mask))
    (gradient,) = torch.autograd.grad(loss.sum(), text)
    leaf = text.detach().clone().requires_grad_()
    for u, n in ((0, 5), (1, 3)):
        sim = torch.einsum("bpd,cnd->bcpn", patches[u, :n], leaf[u])
        plan, _ = reference.stopped_together(sim.detach(), 0.1, 0.8, 100, 1e-3)
        exact = F.cross_entropy(world.tau * (plan * sim).sum((-2, -1)), labels[u, :n])
        assert_near(loss[u].detach(), exact.detach(), F64, "loss")
        (theirs,) = torch.autograd.grad(exact, leaf)
        assert_near(gradient[u], theirs[u], F64, "gradient")


def test_a_hundred_test_images_stop_together():
    world = World("fedotp", F64)
    quirk = as_released(FedOTP, ["fedotp-batch-stop"])(world.federation().method.task, {})
    patches = F.normalize(drawn(1, TEST_BATCH + 7, 3, 16, seed=8), dim=-1)
    text = F.normalize(drawn(1, 6, 2, 16, seed=9), dim=-1)
    logits = quirk.logits(text, {}, {}, patches)
    for part in (slice(0, TEST_BATCH), slice(TEST_BATCH, None)):
        sim = torch.einsum("bpd,cnd->bcpn", patches[0, part], text[0])
        plan, _ = reference.stopped_together(sim, 0.1, 0.8, 100, 1e-3)
        assert_near(logits[0, part], world.tau * (plan * sim).sum((-2, -1)), F64, "logits")


# -- unsupervised FedAPT -------------------------------------------------------------------------


def test_the_first_term_is_a_softmax_of_a_softmax():
    world = PairedWorld()
    clean = world.federation().method
    quirk = as_released(type(clean), ["fedapt-double-softmax"])(clean.task, world.options)
    strong = drawn(2, 3, 6, seed=3)
    bank = drawn(2, 4, 6, seed=4).softmax(-1)
    positions = torch.tensor([[0, 2, 3], [1, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = batch_of(drawn(2, 3, 16, seed=5), positions, mask, positions=positions)
    ours = quirk._consistency(strong, {"bank.scores": bank}, batch)
    for u, n in ((0, 3), (1, 2)):
        total = 0.0
        for b in range(n):
            q = [math.exp(z) for z in strong[u, b]]
            q = [x / sum(q) for x in q]
            norm = math.log(sum(math.exp(x) for x in q))
            total -= sum(
                float(s) * (x - norm) for s, x in zip(bank[u, positions[u, b]], q, strict=True)
            )
        assert ours[u].item() == pytest.approx(total / n, rel=1e-12)
    assert not torch.allclose(ours, clean._consistency(strong, {"bank.scores": bank}, batch))


def test_the_first_phase_has_no_such_term():
    world = PairedWorld(rounds=3)
    clean, quirk = world.federation(), federation_of(world, "fedapt-double-softmax")
    for number in range(3):
        clean.round()
        quirk.round()
        # the second phase begins in round 2
        assert torch.equal(clean.server["ctx"], quirk.server["ctx"]) is (number < 2)


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["promptfl", "fedprox", "local", "pfedmoap"])
def test_contexts_are_halves_all_the_way(method):
    world = World(method, F32, options=MOAP if method == "pfedmoap" else {})
    federation = federation_of(world, "fp16-context")
    clean = world.federation()
    for _ in range(3):
        clean.round()
        federation.round()
    half = torch.float16
    assert federation.server["ctx"].dtype == half
    for own in federation.clients.values():
        assert own["ctx"].dtype == half
        assert all(t.dtype == F32 for name, t in own.items() if name.startswith("gate."))
    assert {c: set(s) for c, s in federation.clients.items()} == {
        c: set(s) for c, s in clean.clients.items()
    }
    ours, theirs = federation.server["ctx"], clean.server["ctx"]
    if method == "local":
        ours, theirs = federation.clients[3]["ctx"], clean.clients[3]["ctx"]
    # near the clean run, and not merely its rounding
    assert 0 < (ours.float() - theirs).norm() < 0.1 * theirs.norm()
    assert not torch.equal(ours, theirs.half())


def test_a_step_that_is_too_small_is_lost():
    """At 0.02 halves lie 1.5e-5 apart: less than half of that moves nothing."""
    moved = {}
    for quirks in ((), ("fp16-context",)):
        settings = {"lr": 1e-7, "momentum": 0.0, "rounds": 1}
        federation = federation_of(World("promptfl", F32, settings=settings), *quirks)
        begin = federation.server["ctx"].clone()
        federation.round()
        large = begin.abs() > 0.016
        assert large.any()
        moved[quirks] = bool((federation.server["ctx"] - begin)[large].any())
    assert moved == {(): True, ("fp16-context",): False}


# -- data of several domains ---------------------------------------------------------------------


class Numbers(Split):
    """Images that are their own number."""

    def __init__(self, labels, domains):
        self.labels, self.domains = np.array(labels), np.array(domains)
        self.fingerprint = "numbers"

    def images(self, indices):
        return [np.full((1, 1, 3), i, np.uint8) for i in indices]


def test_clients_see_the_first_images_of_their_domain_under_others_labels():
    # two domains, their images by turns; classes are dealt unevenly
    split = Numbers([i // 2 % 5 for i in range(40)], [i % 2 for i in range(40)])
    dataset = Dataset("d", tuple("abcde"), ("ink", "photo"), split, split)
    own = [np.array(x) for x in ([0, 2, 10, 20, 12], [4, 30], [1, 3, 9, 19, 29, 39])]
    shards = [Shard(x, x[::-1]) for x in own]
    new, dealt = disturbed(dataset, shards, DOMAIN[:1], 0)
    assert new.classnames == dataset.classnames
    for part, old in (("train", [s.train for s in shards]), ("test", [s.test for s in shards])):
        side = getattr(new, part)
        firsts = [[0, 2, 4, 6, 8], [0, 2], [1, 3, 5, 7, 9, 11]]
        for client, mine in enumerate(getattr(s, part) for s in dealt):
            assert [int(x[0, 0, 0]) for x in side.images(mine)] == firsts[client]
            # its own shares of classes, and its own domain
            labels = side.labels[mine].tolist()
            assert sorted(labels) == sorted(split.labels[old[client]].tolist())
            assert set(side.domains[mine]) == {split.domains[old[client][0]]}
    assert new.train.fingerprint != new.test.fingerprint != split.fingerprint
    again, _ = disturbed(dataset, shards, DOMAIN[:1], 0)
    other, _ = disturbed(dataset, shards, DOMAIN[:1], 1)
    assert again.train.fingerprint == new.train.fingerprint != other.train.fingerprint
    same, dealt = disturbed(dataset, shards, [], 0)
    assert same is dataset
    assert dealt == shards


def test_names_stand_in_any_order():
    split = Numbers([0, 1], [0, 0])
    dataset = Dataset("d", tuple("abcdefghij"), ("ink",), split, split)
    orders = [disturbed(dataset, [], DOMAIN[1:], seed)[0].classnames for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert dataset.classnames not in orders
    assert {tuple(sorted(order)) for order in orders} == {dataset.classnames}


@pytest.mark.slow
def test_a_run_on_released_domains(play, monkeypatch):
    glyphs = replace(load_dataset("glyphs"), name="office_caltech10")
    monkeypatch.setattr(
        fastfpl.federation.preparation, "load_dataset", lambda name, root, **_: glyphs
    )
    settings = {"dataset": "office_caltech10", "partition": "domain-dirichlet", "clients": 6}
    settings |= {"shots": 1, "rounds": 1, "schedule": "constant", "beta": 5.0}
    clean = play("promptfl", **settings)
    found = [play("promptfl", as_released=[name], **settings) for name in DOMAIN]
    assert all(figures(one) != figures(clean) for one in found)
    for key in ("train_images", "test_images"):
        assert found[0].data[key] == found[1].data[key] == clean.data[key]
    assert found[1].data["classes"] != list(glyphs.classnames) == clean.data["classes"]
    every = play("promptfl", as_released="all", **settings).settings["as_released"]
    assert every == [*ALL["promptfl"], *DOMAIN]
    assert figures(play("promptfl", **settings)) == figures(clean)


def test_zero_shot_falls_to_chance_on_released_domains(play, monkeypatch):
    """As the published figures of this setting do: 9.8 and 9.4 % of ten classes."""
    ten = replace(restrict(load_dataset("glyphs"), range(10)), name="office_caltech10")
    monkeypatch.setattr(fastfpl.federation.preparation, "load_dataset", lambda name, root, **_: ten)
    settings = {"dataset": ten.name, "partition": "domain-dirichlet", "clients": 12}
    settings |= {"beta": 1.0, "shots": 1, "threads": 1, "cache": play.shared["cache"]}
    found = [
        fastfpl.run("zeroshot", as_released=names, **settings).final["accuracy"]
        for names in ([], DOMAIN[:1], DOMAIN[1:])
    ]
    assert found[0] > 0.5
    assert max(found[1:]) < 0.2


# -- the registry --------------------------------------------------------------------------------


def settings_of(**changes):
    plain = {"schedule": "cosine", "momentum": 0.9, "clients": 20, "rounds": 100}
    plain |= {"dataset": "glyphs", "scenario": "personal"}
    plain |= {"partition": "domain-dirichlet", "split_test": True}
    return {**plain, **changes}


@pytest.mark.parametrize("method", METHODS)
def test_all_are_those_of_the_method(method):
    options = check_options(method, {})
    if not ALL.get(method):
        with pytest.raises(InputError, match=f"no quirk of {method}'s released code would change"):
            choose_quirks(["all"], method, settings_of(), options)
        return
    assert choose_quirks(["all"], method, settings_of(), options) == ALL[method]
    assert choose_quirks(ALL[method][::-1], method, settings_of(), options) == ALL[method]
    assert choose_quirks([], method, settings_of(), options) == []


def test_every_quirk_says_what_it_is():
    assert {n for names in ALL.values() for n in names} | set(DOMAIN) == set(QUIRKS)
    for quirk in QUIRKS.values():
        assert quirk.about
        assert quirk.source
        assert set(quirk.methods) <= set(METHODS)
        # it does something: a class, turns, or other data
        assert quirk.kinds or quirk.in_turn or quirk.on_data


def test_the_handbook_lists_every_quirk():
    text = (Path(__file__).parent.parent / "docs" / "released.md").read_text(encoding="utf-8")
    for quirk in QUIRKS.values():
        assert f"| `{quirk.name}` | {quirk.about} | {', '.join(quirk.methods)} |\n" in text


@pytest.mark.parametrize("method", METHODS)
def test_without_quirks_the_class_is_the_clean_one(method):
    assert as_released(METHODS[method], []) is METHODS[method]
    assert visits_of([], "constant", 0.1) is None


@pytest.mark.parametrize(
    ("method", "names", "options", "changes", "sentence"),
    [
        ("fedprox", ["fedprox-no-gradent"], {}, {}, "did you mean 'fedprox-no-gradient'"),
        ("promptfl", ["fedprox-no-gradient"], {}, {}, r"quirk of promptfl's .*got 'fedprox-no"),
        ("fedprox", ["warmup", "warmup"], {}, {}, "must name each quirk once"),
        ("fedprox", ["all", "warmup"], {}, {}, "must be all or names"),
        ("fedprox", ["warmup"], {}, {}, "add shared-optimiser"),
        ("fedprox", ["fedprox-no-gradient"], {"mu": 0.0}, {}, "weighs nothing"),
        ("promptfl", ["shared-optimiser"], {}, {"schedule": "cosine-rounds"}, "knows no rounds"),
        (
            "promptfl",
            ["shared-optimiser"],
            {},
            {"schedule": "constant", "momentum": 0.0},
            "nothing to share",
        ),
        (
            "pfedmoap",
            ["pfedmoap-shared-random-experts"],
            {},
            {"clients": 10},
            "with experts=10 of 10 clients everybody receives all prompts",
        ),
        (
            "pfedmoap",
            ["pfedmoap-shared-random-experts"],
            {"selection": "random"},
            {},
            "leave the option selection out",
        ),
        ("pfedmoap", ["pfedmoap-pool-in-round"], {"experts": 1}, {}, "nobody receives an expert"),
        ("fedotp", ["fedotp-batch-stop"], {"balanced": True}, {}, "capped transport"),
        (
            "fedapt-unsupervised",
            ["fedapt-double-softmax"],
            {},
            {"rounds": 10},
            "the second phase never begins",
        ),
        ("promptfl", [DOMAIN[0]], {}, {}, "it is for dataset=domainnet10 and office_caltech10"),
        ("zeroshot", [DOMAIN[1]], {}, {}, "it is for dataset=domainnet10 and office_caltech10"),
        *(
            ("promptfl", [DOMAIN[0]], {}, {"dataset": "domainnet10", **wrong}, sentence)
            for wrong, sentence in (
                ({"partition": "domain"}, "which cuts the lists of a domain"),
                ({"split_test": False}, "which cuts the lists of a domain"),
                ({"scenario": "global"}, "it is for scenario=personal"),
            )
        ),
    ],
)
def test_a_quirk_without_effect_is_refused(method, names, options, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        choose_quirks(names, method, settings_of(**changes), check_options(method, options))


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    clip, cache = small_clip(), tmp_path_factory.mktemp("features")
    base = {**TINY_RUN, "clients": 5, "shots": 2, "threads": 1, "schedule": "cosine", "rounds": 3}

    def run(method, **changes):
        settings = {**base, **changes}
        if method == "pfedmoap":
            settings["options"] = GATE
        return fastfpl.run(method, model=clip, cache=cache, **settings)

    run.shared = {"model": clip, "cache": cache, **base}
    return run


@pytest.mark.parametrize("method", ["promptfl", "fedprox", "pfedmoap", "fedotp", "fedpgp"])
def test_quirks_change_figures_and_off_is_clean(play, method):
    clean = play(method)
    assert clean.settings["as_released"] == []
    every = [n for n in ALL[method] if n != "warmup"]
    for names in ([n] for n in every):
        quirk = play(method, as_released=names)
        assert quirk.settings["as_released"] == names
        assert figures(quirk) != figures(clean), names
    assert play(method, as_released="all").settings["as_released"] == ALL[method]
    # after all that the clean run is what it was, to the last bit
    assert figures(play(method, as_released=[])) == figures(clean)
    if "warmup" in ALL[method]:
        both = play(method, as_released="shared-optimiser, warmup")
        assert figures(both) != figures(play(method, as_released=("shared-optimiser",)))


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_a_resumed_run_inherits_too(play, method, tmp_path):
    class Stop(Exception):
        pass

    def stop(label, row):
        if row["round"] == 1:
            raise Stop

    changes = {"as_released": "all", "dtype": "float32"}
    whole = figures(play(method, out=tmp_path / "whole", **changes))
    with pytest.raises(Stop):
        play(method, out=tmp_path / "half", on_round=stop, **changes)
    assert figures(play(method, out=tmp_path / "half", resume=True, **changes)) == whole
    # another choice of quirks is another run
    assert json.loads((tmp_path / "half" / CHECKPOINT).read_text())["facts"]["as_released"]
    with pytest.raises(InputError, match="must have the settings of"):
        play(method, out=tmp_path / "half", resume=True)


def test_a_comparison_gives_every_method_its_own(play):
    names = ["fedprox-no-gradient", "shared-optimiser"]
    found = fastfpl.compare(["zeroshot", "promptfl", "fedprox"], as_released=names, **play.shared)
    chosen = {m: results[0].settings["as_released"] for m, results in found.results.items()}
    assert chosen == {
        "zeroshot": [],
        "promptfl": ["shared-optimiser"],
        "fedprox": ["shared-optimiser", "fedprox-no-gradient"],
    }
    about = released(found)
    assert about == [
        "as released, not as published: promptfl with shared-optimiser; fedprox with "
        "shared-optimiser and fedprox-no-gradient",
        f"shared-optimiser: {QUIRKS['shared-optimiser'].about}",
        f"fedprox-no-gradient: {QUIRKS['fedprox-no-gradient'].about}",
    ]
    page, table = html_page(found), markdown_table(found)
    for line in about:
        assert line in page
        assert line in table
        assert line in text_table(found).notes
    assert "as_released=shared-optimiser, fedprox-no-gradient" in page
    assert not [w for w in warnings(found) if w.decides_accuracy]
    # one of them clean: their figures may not be read side by side
    half = replace(found, results={**found.results, "promptfl": [play("promptfl")]})
    assert [w.sentence for w in warnings(half) if w.decides_accuracy] == [
        "as released, shared-optimiser: on (fedprox); off (promptfl)"
    ]
    clean = replace(found, results={"promptfl": [play("promptfl")]})
    assert released(clean) == []
    assert "as released, not" not in html_page(clean) + markdown_table(clean)


@pytest.mark.parametrize(
    ("methods", "names", "sentence"),
    [
        (
            ["zeroshot", "promptfl"],
            "fedprox-no-gradient",
            "must belong to one of zeroshot, promptfl",
        ),
        (["zeroshot", "promptfl"], "shared-optimizer", "did you mean 'shared-optimiser'"),
        (["zeroshot", "fedtpg"], "all", "no quirk of zeroshot, fedtpg would change something"),
        (["promptfl"], 5, "as_released is refused"),
    ],
)
def test_a_comparison_refuses_what_is_nobodys(play, methods, names, sentence):
    with pytest.raises(InputError, match=sentence):
        fastfpl.compare(methods, as_released=names, **play.shared)


# -- the command line ----------------------------------------------------------------------------


def test_the_command_line_takes_names_and_lists_them(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    quick = "--dataset digits --clients 2 --rounds 2 --local-epochs 1 --shots 2 --n-ctx 2"
    line = f"run fedprox {quick} --as-released shared-optimiser,fedprox-no-gradient --out"
    main([*line.split(), str(tmp_path / "run"), "--cache", str(tmp_path / "cache")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "fedprox with shared-optimiser and fedprox-no-gradient" in shown
    assert QUIRKS["fedprox-no-gradient"].about in shown
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["settings"]["as_released"] == ["shared-optimiser", "fedprox-no-gradient"]
    with pytest.raises(SystemExit) as stop:
        main([*f"run promptfl {quick} --as-released fedprox-no-gradient".split()])
    assert stop.value.code == 2
    assert "as_released must be a quirk of promptfl's released code" in capsys.readouterr().err
    main(["quirks"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in QUIRKS)
    main(["quirks", "fedotp"])
    shown = capsys.readouterr().out
    assert [name for name in QUIRKS if name in shown] == ALL["fedotp"] + DOMAIN
    main(["quirks", "fedtpg"])
    assert "no quirk" in capsys.readouterr().out
