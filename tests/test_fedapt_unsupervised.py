"""Unsupervised FedAPT against its literal reference, and the laws of its two phases."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastfpl
from fastfpl.config import make_settings
from fastfpl.data import load_dataset
from fastfpl.errors import InputError
from fastfpl.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fastfpl.federation.models import task_of
from fastfpl.federation.preparation import prepare
from fastfpl.federation.server import Round
from fastfpl.federation.states import CLIENTS, StateFiles
from fastfpl.methods import check_options
from fastfpl.reference import fedapt_unsupervised as reference
from fastfpl.reference.rounds import encode_tokens
from fastfpl.seeds import generator
from fastfpl.training.gathering import stack
from tests.test_fedapt import RELATIVE, RawWorld, assert_near, one_thread  # noqa: F401  # a fixture
from tests.worlds import NAMES, SIZES, Feed, batch_of, drawn, figures, small_clip

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
# the first phase ends after two rounds; client 4 first takes part in the second, client 0 comes
# back to its bank, and client 2 first takes part when the phase has run for a round
SELECTED = [[0, 1, 3], [0, 2], [0, 1, 4], [0, 2, 4], [1, 2, 3]]
OPTIONS = {"pseudo_rounds": 2, "threshold": 0.4, "temperature": 0.4, "neighbours": 2}


def strong_of(features, draws):
    """Distort features in a way of which every draw has its own."""
    tilt = torch.from_numpy(draws % 7 - 3).to(features.dtype)[..., None] / 4
    return features + tilt * features.roll(1, -1)


class Paired(Feed):
    """The plain view, and a strong one that follows the draws."""

    random = True
    paired = True

    def batch(self, indices, draws=None):
        return super().batch(indices)

    def strong(self, indices, draws):
        assert draws.shape == indices.shape
        return strong_of(super().batch(indices), draws)


class PairedWorld(RawWorld):
    """A world with strong views."""

    def __init__(self, dtype=F64, *, of="domains", position="end", options=(), **settings):
        super().__init__(
            "fedapt-unsupervised",
            dtype,
            position,
            options={**OPTIONS, **dict(options)},
            settings={"lr": 0.03, "rounds": 5, **settings},
            of=of,
        )

    def federation(self):
        federation = super().federation()
        federation.trainer.feed.__class__ = Paired
        return federation

    def steps(self, selected):
        """Spell out the order of the images and their strong views."""
        c = self.config
        rounds = []
        for t, members in enumerate(selected):
            plan = {}
            for i in members:
                weak = self.clients[i].train
                count, epochs = len(weak), []
                for epoch in range(c.local_epochs):
                    draw = generator(c.seed, "order", t, i, epoch)
                    order = torch.randperm(count, generator=draw)
                    used = count if count < c.batch_size else count // c.batch_size * c.batch_size
                    order = order[:used]
                    draws = torch.randint(2**31, (used,), generator=draw)
                    strong = strong_of(weak[order], draws.numpy())
                    size = min(c.batch_size, used)
                    epochs.append(list(zip(order.split(size), strong.split(size), strict=True)))
                plan[i] = epochs
            rounds.append(plan)
        return rounds

    def teacher(self):
        """Text features of "a photo of a {class}.", from whole rows of tokens."""
        rows = torch.zeros(len(NAMES), self.tower.context_length, dtype=torch.int64)
        eot = []
        texts = self.clip.tokenize([f"a photo of a {name}." for name in NAMES])
        for c, ids in enumerate(texts):
            line = [self.tower.sos, *ids, self.tower.eot]
            rows[c, : len(line)] = torch.tensor(line)
            eot.append(len(line) - 1)
        return encode_tokens(self.tower, rows, torch.tensor(eot))

    def recipe(self, method):
        o = method.options
        return reference.Recipe(
            pseudo_rounds=o.pseudo_rounds,
            threshold=o.threshold,
            neighbours=o.neighbours,
            repulsion=o.repulsion,
            temperature=o.temperature,
        )

    def played(self, federation, selected=SELECTED):
        """Let the reference play the rounds."""
        return reference.fedapt_unsupervised(
            self.setup(),
            self.clients,
            self.key_of,
            federation.server["ctx"].double(),
            federation.server["query"].double(),
            federation.method.keys.double(),
            self.teacher(),
            self.steps(selected[: self.config.rounds]),
            self.recipe(federation.method),
        )


def play(federation, selected=SELECTED, rounds=None):
    federation.sampling.sample = lambda round_: selected[round_]
    for _ in range(len(selected) if rounds is None else rounds):
        federation.round()
    return federation


def share_of_sure(world):
    """Which part of the training images the teacher is sure of."""
    weak = F.normalize(torch.cat([c.train for c in world.clients]), dim=-1)
    sure = (world.tau * weak @ world.teacher().T).softmax(-1).max(-1).values
    return (sure > world.options["threshold"]).double().mean().item()


# --- against the reference ------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("of", "specific", "options"),
    [
        ("domains", False, {}),
        ("clients", False, {"repulsion": 2.0}),
        ("clients", True, {}),
        ("domains", False, {"pseudo_rounds": 0}),
        ("domains", False, {"pseudo_rounds": 9}),
        ("domains", False, {"neighbours": 50}),
    ],
    ids=["usual", "repelled", "specific", "banks", "pseudo", "everybody"],
)
def test_rounds_equal_the_reference(of, specific, options, dtype):
    world = PairedWorld(dtype, of=of, options={"class_specific": specific, **options})
    assert 0.1 < share_of_sure(world) < 0.9
    federation = world.federation()
    begin = {n: federation.server[n].clone() for n in ("ctx", "query")}
    outcomes = world.played(federation)
    federation.sampling.sample = lambda round_: SELECTED[round_]
    seen = set()
    for t, exact in enumerate(outcomes):
        row = federation.round()
        assert_near(federation.server["ctx"], exact.ctx, dtype, f"round {t}, ctx")
        assert_near(federation.server["query"], exact.query, dtype, f"round {t}, query")
        losses = list(exact.losses.values())
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert row["clients"] == exact.accuracy
        # every client that trained in the second phase keeps the bank that the reference keeps
        if exact.banks:
            seen |= set(SELECTED[t])
        assert set(federation.clients) == seen
        for c in seen:
            kept, bank = federation.clients[c], exact.banks[c]
            assert set(kept) == {"bank.features", "bank.scores"}
            assert_near(kept["bank.features"], bank.features, dtype, f"round {t}, features of {c}")
            assert_near(kept["bank.scores"], bank.scores, dtype, f"round {t}, scores of {c}")
    for name, tensor in begin.items():
        assert (getattr(outcomes[-1], name) - tensor).norm() > 0.2 * tensor.norm()


def test_a_late_client_s_bank_is_that_of_the_phase_s_beginning():
    """Client 2 comes a round late: its bank does not know what happened meanwhile."""
    world = PairedWorld(local_epochs=1)
    federation = world.federation()
    play(federation, rounds=2)
    begin = federation.server["ctx"].clone()
    assert torch.equal(federation.server["begin"], begin)
    play(federation, rounds=1)
    assert not torch.equal(federation.server["ctx"], begin)
    assert torch.equal(federation.server["begin"], begin)
    down = stack([federation.method.download(federation.server, 2, 3)])
    trained, fixed = federation.method.start(down, {}, training=True)
    assert federation.method.surveys(fixed)
    weak = world.clients[2].train
    whole = batch_of(weak[None], torch.zeros(1, len(weak), dtype=torch.int64))
    bank = federation.method.survey(federation.method.text(trained, fixed), trained, fixed, whole)
    keys = federation.method.keys.double()
    exact = reference.build_bank(world.setup(), begin, keys[world.key_of[2]], weak)
    assert_near(bank["bank.features"][0], exact.features, F64, "features")
    assert_near(bank["bank.scores"][0], exact.scores, F64, "scores")


def losses_of(world, federation, round_):
    """Loss and gradients of all clients in one cohort of equal sizes, and what they start from."""
    count, n, size = len(world.clients), 9, 5
    method = federation.method
    server = dict(federation.server)
    if round_ >= method.options.pseudo_rounds:
        server["begin"] = (0.2 * drawn(*server["begin"].shape, seed=60)).to(world.dtype)
    down = stack([method.download(server, c, round_) for c in range(count)])
    for k, name in enumerate(("ctx", "query")):
        down[name] = (0.2 * drawn(*down[name].shape, seed=50 + k)).to(world.dtype)
    weak = torch.stack([drawn(n, 16, seed=70 + c) * world.lengths(n, 40 + c) for c in range(count)])
    trained, fixed = method.start(down, {}, training=True)
    if method.surveys(fixed):
        whole = batch_of(weak.to(world.dtype), torch.zeros(count, n, dtype=torch.int64))
        fixed = {**fixed, **method.survey(method.text(trained, fixed), trained, fixed, whole)}
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(c)) for c in range(count)]
    order = torch.stack([line[:size] for line in orders])
    mask = torch.ones(count, size, dtype=torch.bool)
    mask[1, 3:] = mask[3, 1:] = False
    # what stands in a masked place is an image that the step does not see
    last = torch.stack([line[-1:] for line in orders])
    order[~mask] = last.expand_as(order)[~mask]
    image = weak[torch.arange(count)[:, None], order]
    strong = strong_of(image, np.arange(count * size).reshape(count, size))
    batch = batch_of(
        image.to(world.dtype),
        torch.zeros(count, size, dtype=torch.int64),
        mask,
        positions=order,
        strong=strong.to(world.dtype),
    )
    leaves = {k: v.clone().requires_grad_() for k, v in trained.items()}
    text = method.text(leaves, fixed)
    loss = method.loss(text, leaves, fixed, batch)
    grads = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
    after = method.after_step(text, leaves, fixed, batch)
    return weak, batch, trained, fixed, loss, grads, after


@DTYPES
@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("round_", [0, 2], ids=["pseudo", "bank"])
def test_loss_and_gradients_equal_the_reference(round_, specific, dtype):
    world = PairedWorld(dtype, of="clients", options={"class_specific": specific})
    federation = world.federation()
    method = federation.method
    weak, batch, trained, fixed, loss, grads, after = losses_of(world, federation, round_)
    sure = (world.tau * F.normalize(batch.image.double(), dim=-1) @ world.teacher().T).softmax(-1)
    kept = (sure.max(-1).values > method.options.threshold) & batch.mask
    unsure = (~kept.any(-1)).nonzero()[:, 0].tolist()
    assert 0 < len(unsure) < len(SIZES)
    keys, setup = method.keys.double(), world.setup()
    for u in range(len(SIZES)):
        mine = {k: v[u].double().requires_grad_() for k, v in trained.items()}
        live = batch.mask[u]
        at = batch.positions[u][live]
        image, strong = batch.image[u][live].double(), batch.strong[u][live].double()
        args = setup, mine["ctx"], mine["query"], keys, u, image, strong
        if round_ == 0:
            exact = reference.pseudo_loss(*args, world.teacher(), method.options.threshold)
            assert after == {}
        else:
            begin = fixed["begin"][u].double()
            bank = reference.build_bank(setup, begin, keys[u], weak[u])
            assert_near(fixed["bank.scores"][u], bank.scores, dtype, "bank")
            before = bank.scores.clone()
            exact = reference.bank_loss(*args, at, bank, world.recipe(method))
            assert_near(after["bank.scores"][u], bank.scores, dtype, f"client {u}, refreshed")
            changed = (bank.scores != before).any(-1).nonzero()[:, 0]
            assert changed.tolist() == sorted(at.tolist())
        assert_near(loss[u], exact.detach(), dtype, f"client {u}, loss")
        wanted = torch.autograd.grad(exact, list(mine.values()))
        for name, gradient in zip(mine, wanted, strict=True):
            if name == "ctx" and round_ == 0 and u in unsure:
                assert gradient.abs().max() == grads[name][u].abs().max() == 0
            else:
                assert_near(grads[name][u], gradient, dtype, f"client {u}, gradient of {name}")


# --- by hand --------------------------------------------------------------------------------------


def by_hand(**options):
    """A method over six classes whose text features are axes, tau 8."""
    world = PairedWorld(options={"threshold": 0.75, **options})
    method = world.federation().method
    return method, torch.eye(6, 16, dtype=F64)[None]


def along(*axes, length=1.0):
    return length * torch.stack([F.one_hot(torch.tensor(a), 16).double() for a in axes])[None]


def test_pseudo_labels_by_hand():
    method, text = by_hand()
    query = torch.zeros(1, 2, 16, dtype=F64)
    fixed = {"key": torch.tensor([0]), "teacher": text}
    # of an axis of no class the teacher says 1/6; of a class, e^8 / (e^8 + 5)
    weak, strong = along(1, 12, 3, 2), along(1, 4, 5, 2, length=3.0)
    mask = torch.tensor([[True, True, True, False]])
    labels = torch.zeros(1, 4, dtype=torch.int64)
    batch = batch_of(weak, labels, mask, strong=strong)
    loss = method.loss(text, {"query": query}, fixed, batch)
    right, wrong = math.log1p(5 * math.exp(-8)), 8 + math.log1p(5 * math.exp(-8))
    # image 0 is labelled 1 and seen as 1; image 2 labelled 3 and seen as 5; two keys, no idea
    assert loss.tolist() == [pytest.approx((right + wrong) / 2 + math.log(2), rel=1e-12)]


def test_a_teacher_that_is_never_sure_leaves_the_domain_alone():
    method, text = by_hand()
    query = torch.zeros(1, 2, 16, dtype=F64)
    query[0, 0, 4] = 0.5
    fixed = {"key": torch.tensor([0]), "teacher": text}
    batch = batch_of(
        along(12, 13), torch.zeros(1, 2, dtype=torch.int64), strong=along(4, 4, length=2.0)
    )
    leaf = text.clone().requires_grad_()
    loss = method.loss(leaf, {"query": query}, fixed, batch)
    # the domain is asked of the strong view, with its length: scores (1, 0)
    assert loss.tolist() == [pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)]
    loss.sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() == 0


def test_the_threshold_must_be_exceeded():
    for threshold, kept in ((0.0, True), (0.2, False)):
        method, text = by_hand(threshold=threshold)
        fixed = {"key": torch.tensor([0]), "teacher": text}
        weak = along(12)
        query = torch.zeros(1, 2, 16, dtype=F64)
        batch = batch_of(weak, torch.zeros(1, 1, dtype=torch.int64), strong=weak)
        loss = method.loss(text, {"query": query}, fixed, batch).item()
        # an image that looks like no class: every class has 1/6
        assert loss == pytest.approx(math.log(2) + (math.log(6) if kept else 0))


def test_banks_by_hand():
    """Five images on axes, one of them between two classes; two of them in the batch."""
    method, text = by_hand(neighbours=1, repulsion=0.25)
    weak = along(0, 0, 1, 1, 2)
    weak[0, 1, 3] = 0.1  # image 1 is almost image 0
    weak[0, 3, 3] = 0.2  # image 3 is almost image 2
    unit = F.normalize(weak, dim=-1)
    scores = torch.full((1, 5, 6), 1 / 6, dtype=F64)
    fixed = {
        "key": torch.tensor([1]),
        "bank.features": unit,
        "bank.scores": scores,
    }
    query = torch.zeros(1, 2, 16, dtype=F64)
    at = torch.tensor([[0, 3]])
    batch = batch_of(
        7 * weak[:, [0, 3]],
        torch.zeros(1, 2, dtype=torch.int64),
        positions=at,
        strong=along(0, 5),
    )
    loss = method.loss(text, {"query": query}, fixed, batch)
    p = (8 * unit[0] @ text[0].T).softmax(-1)[[0, 3]]
    # the strong views are classes 0 and 5: log softmax is 0 there but for log(1 + 5 e^-8)
    log_z = 8 + math.log1p(5 * math.exp(-8))
    consistency = log_z - 8 / 6
    attraction = -(p.sum(-1) / 6).mean().item()  # both neighbours' scores are flat
    repulsion = 0.25 * 2 * (p[0] @ p[1]).item() / 2
    wanted = consistency + math.log(2) + attraction + repulsion
    assert loss.tolist() == [pytest.approx(wanted, rel=1e-12)]
    after = method.after_step(text, {"query": query}, fixed, batch)["bank.scores"]
    torch.testing.assert_close(after[0, [0, 3]], p)
    assert torch.equal(after[0, [1, 2, 4]], scores[0, [1, 2, 4]])
    assert torch.equal(scores, torch.full((1, 5, 6), 1 / 6, dtype=F64))  # a value


def test_a_neighbour_in_the_batch_is_asked_as_it_is_now():
    """The two images of a batch are each other's neighbours: the attraction is 2 <p0, p1> / 2."""
    method, text = by_hand(neighbours=1, repulsion=0.0)
    weak = along(0, 0, 5)
    weak[0, 1, 3] = 0.5
    unit = F.normalize(weak, dim=-1)
    scores = torch.full((1, 3, 6), 1 / 6, dtype=F64)
    fixed = {"key": torch.tensor([0]), "bank.features": unit, "bank.scores": scores}
    query = torch.zeros(1, 2, 16, dtype=F64)
    strong = along(9, 9)  # of no class: every class log 1/6
    batch = batch_of(
        weak[:, :2],
        torch.zeros(1, 2, dtype=torch.int64),
        positions=torch.tensor([[0, 1]]),
        strong=strong,
    )
    leaf = text.clone().requires_grad_()
    loss = method.loss(leaf, {"query": query}, fixed, batch)
    p = (8 * unit[0, :2] @ leaf[0].T).softmax(-1)
    wanted = math.log(6) + math.log(2) - p[0] @ p[1]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    # no gradient through the neighbour's side of the product, nor through the bank
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    held = p.detach()
    spread = (8 * strong[0] @ leaf[0].T).log_softmax(-1)
    exact = -spread.sum(-1).mean() / 6 - (p[0] @ held[1] + p[1] @ held[0]) / 2
    torch.testing.assert_close(got, torch.autograd.grad(exact, leaf)[0], rtol=1e-12, atol=1e-13)


def test_a_client_with_one_image_has_no_neighbours():
    method, text = by_hand()
    weak = along(0)
    fixed = {
        "key": torch.tensor([0]),
        "bank.features": weak,
        "bank.scores": torch.full((1, 1, 6), 1 / 6, dtype=F64),
    }
    query = torch.zeros(1, 2, 16, dtype=F64)
    batch = batch_of(weak, torch.zeros(1, 1, dtype=torch.int64), strong=along(9))
    loss = method.loss(text, {"query": query}, fixed, batch)
    assert loss.tolist() == [pytest.approx(math.log(6) + math.log(2), rel=1e-12)]


def test_images_twice_in_the_bank_are_neighbours_not_themselves():
    """Equal images: the one that is left out is the image itself, whoever comes first."""
    method, text = by_hand(neighbours=1, repulsion=0.0)
    weak = along(0, 0)
    scores = torch.eye(2, 6, dtype=F64)[None]  # image 0 says class 0, image 1 class 1
    fixed = {"key": torch.tensor([0]), "bank.features": weak, "bank.scores": scores}
    query = torch.zeros(1, 2, 16, dtype=F64)
    p = (8 * weak[0, 0] @ text[0].T).softmax(-1)
    for at, other in ((0, 1), (1, 0)):
        batch = batch_of(
            weak[:, :1],
            torch.zeros(1, 1, dtype=torch.int64),
            positions=torch.tensor([[at]]),
            strong=along(9),
        )
        loss = method.loss(text, {"query": query}, fixed, batch).item()
        assert loss == pytest.approx(math.log(6) + math.log(2) - p[other].item(), rel=1e-9)


# --- what must not enter, and what must -----------------------------------------------------------


def test_labels_never_enter():
    runs = []
    for change in (0, 1):
        world = PairedWorld(F32)
        for u, client in enumerate(world.clients):
            labels = (client.train_labels + change) % len(NAMES)
            world.clients[u] = replace(client, train_labels=labels)
        runs.append(play(world.federation()))
    one, other = runs
    assert all(torch.equal(one.server[n], t) for n, t in other.server.items())
    assert [r["loss"] for r in one.rounds] == [r["loss"] for r in other.rounds]


@pytest.mark.parametrize(
    "option",
    [
        {"pseudo_rounds": 1},
        {"threshold": 0.5},
        {"neighbours": 1},
        {"repulsion": 0.0},
        {"class_specific": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_has_an_effect(option):
    one = play(PairedWorld(F32).federation())
    other = play(PairedWorld(F32, options=option).federation())
    assert [r["loss"] for r in one.rounds] != [r["loss"] for r in other.rounds]


@pytest.mark.parametrize("method", ["fedapt", "fedapt-unsupervised"])
def test_the_temperature_decides_answers_only(method):
    worlds = []
    for temperature in (0.01, 100.0):
        options = {"temperature": temperature}
        if method == "fedapt":
            world = RawWorld(
                method, F32, options=options, settings={"lr": 0.05, "rounds": 5}, of="clients"
            )
        else:
            world = PairedWorld(F32, of="clients", options=options)
        worlds.append(play(world.federation()))
    one, other = worlds
    assert [r["loss"] for r in one.rounds] == [r["loss"] for r in other.rounds]
    assert [r["clients"] for r in one.rounds] != [r["clients"] for r in other.rounds]


def test_default_options_are_the_papers():
    assert check_options("fedapt-unsupervised", {}) == {
        "class_specific": False,
        "temperature": 0.01,
        "pseudo_rounds": 10,
        "threshold": 0.75,
        "neighbours": 5,
        "repulsion": 0.5,
    }


def test_the_class_name_must_stand_last():
    with pytest.raises(InputError, match="position must be 'end' for fedapt-unsupervised"):
        PairedWorld(position="front").federation()


# --- the laws of a round --------------------------------------------------------------------------


def fresh(method, dtype=F32, **settings):
    if method == "fedapt":
        return RawWorld(method, dtype, settings={"lr": 0.05, "rounds": 5, **settings}).federation()
    return PairedWorld(dtype, **settings).federation()


def state_of(federation):
    sides = {"server": federation.server, **federation.clients}
    return {(side, name): t for side, state in sides.items() for name, t in state.items()}


def assert_same_state(one, other, **tolerance):
    a, b = state_of(one), state_of(other)
    assert set(a) == set(b)
    for key, tensor in a.items():
        if tolerance:
            torch.testing.assert_close(tensor, b[key], **tolerance)
        else:
            assert torch.equal(tensor, b[key]), key


BOTH = pytest.mark.parametrize("method", ["fedapt", "fedapt-unsupervised"])


@BOTH
def test_any_order_of_clients_gives_the_same_run(method):
    one = play(fresh(method))
    other = play(fresh(method), [s[::-1] for s in SELECTED])
    assert_same_state(one, other)


@BOTH
def test_a_cohort_of_one_equals_a_cohort_of_many(method):
    one, *others = [play(fresh(method, F64, cohort=cohort)) for cohort in (None, 1, 2)]
    for other in others:
        assert_same_state(one, other, rtol=1e-6, atol=1e-7)
        assert [r["clients"] for r in one.rounds] == [r["clients"] for r in other.rounds]


def test_clients_of_equal_sizes_share_a_cohort():
    """Banks are stacked: four clients of six images in one cohort, and one of nine."""
    sent = []
    for cohort in (None, 1):
        world = PairedWorld(F64, cohort=cohort)
        for u in (0, 1, 2, 3):
            source = world.clients[3]
            rows = slice(u, u + 6)
            world.clients[u] = replace(
                source, train=source.train[rows], train_labels=source.train_labels[rows]
            )
        everyone = [list(range(5))] * 4
        sent.append(play(world.federation(), everyone))
    assert_same_state(*sent, rtol=1e-6, atol=1e-7)
    banks = [sent[0].clients[c]["bank.scores"] for c in range(4)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(banks))


@BOTH
def test_a_client_that_sends_nothing_changes_nothing(method):
    federation = play(fresh(method), rounds=3)
    merged = federation.method.merge(federation.server, {}, {}, 3)
    assert set(merged) == set(federation.server)
    assert all(torch.equal(merged[n], t) for n, t in federation.server.items())


def test_a_lost_upload_keeps_its_bank():
    """What a client remembers does not depend on what arrives; it is not sent the past twice."""
    federation = fresh("fedapt-unsupervised")
    federation.sampling.sample = lambda round_: SELECTED[round_]
    federation.sampling.lost = lambda round_, selected: {4} if round_ == 2 else set()
    for _ in range(3):
        federation.round()
    assert 4 in federation.clients
    assert federation.server["surveyed"].tolist() == [True, True, False, False, False]
    kept = federation.clients[4]["bank.scores"].clone()
    seen = []
    surveys = federation.method.surveys
    federation.method.surveys = lambda fixed: seen.append(surveys(fixed)) or seen[-1]
    federation.round()
    # clients 0 and 4 have banks, client 2 builds its own
    assert sorted(seen) == [False, False, True]
    assert not torch.equal(federation.clients[4]["bank.scores"], kept)
    assert federation.server["surveyed"].tolist() == [True, True, True, False, True]


@BOTH
def test_no_two_clients_share_storage(method):
    federation = play(fresh(method))
    spans = []
    for key, tensor in state_of(federation).items():
        storage = tensor.untyped_storage()
        spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), key))
    for (_, end, one), (begin, _, other) in itertools.pairwise(sorted(spans)):
        assert end <= begin, f"{one} and {other} share storage"


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(stop, tmp_path):
    whole = play(fresh("fedapt-unsupervised"))
    part = play(fresh("fedapt-unsupervised"), rounds=stop)
    facts = {"run": 1}
    files = StateFiles(tmp_path / CLIENTS)
    for client, state in part.clients.items():
        files.put(client, state)
    with pytest.raises(InputError, match="the clients of a checkpoint must lie in "):
        save_checkpoint(tmp_path, Checkpoint(facts, part.rounds, {}, part.server, part.clients))
    task = task_of(part.method.task)
    save_checkpoint(tmp_path, Checkpoint(facts, part.rounds, {}, part.server, files, task=task))
    found = load_checkpoint(tmp_path, facts)
    again = fresh("fedapt-unsupervised")
    again.now = Round(len(found.rounds), found.server)
    again.clients, again.rounds = found.clients, found.rounds
    play(again, rounds=5 - stop)
    assert_same_state(whole, again)
    assert [r["loss"] for r in whole.rounds] == [r["loss"] for r in again.rounds]


def test_bytes_that_travel():
    federation = fresh("fedapt-unsupervised")
    rows = play(federation).rounds
    ctx, query, marks = 4 * 3 * 32, 4 * 2 * 16, 8 + 8
    assert [row["bytes_up"] for row in rows] == [len(s) * (ctx + query) for s in SELECTED]
    # the context of the phase's beginning for whoever has no bank yet
    first = [0, 0, 3, 1, 1]
    assert [row["bytes_down"] for row in rows] == [
        len(s) * (ctx + query + marks) + n * ctx for s, n in zip(SELECTED, first, strict=True)
    ]


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


RUN = {
    "dataset": "digits",
    "clients": 3,
    "partition": "iid",
    "shots": 4,
    "rounds": 3,
    "local_epochs": 1,
    "batch_size": 8,
    "n_ctx": 4,
    "lr": 0.05,
    "augment": "views:1",
    "options": {"pseudo_rounds": 1, "threshold": 0.0},
}


def test_a_run_needs_strong_views(cache):
    with pytest.raises(InputError, match="augment must be fresh or views:V"):
        fastfpl.run("fedapt-unsupervised", model=small_clip(), **{**RUN, "augment": "none"})


@pytest.mark.parametrize("augment", ["views:1", "views:2", "fresh"])
def test_a_run_is_the_same_bit_for_bit(augment, cache):
    settings = {**RUN, "augment": augment}
    one, other = (
        fastfpl.run("fedapt-unsupervised", model=small_clip(), cache=cache, **settings)
        for _ in range(2)
    )
    assert figures(one) == figures(other)
    assert all(0 < row["loss"] < 20 for row in one.rounds)
    assert one.data["transductive"] is False


def test_a_transductive_run_adapts_to_the_test_images(cache):
    settings = {**RUN, "shots": "all", "transductive": True, "rounds": 2, "batch_size": 32}
    result = fastfpl.run("fedapt-unsupervised", model=small_clip(), cache=cache, **settings)
    assert result.data["transductive"] is True
    assert result.settings["transductive"] is True
    assert result.data["train_images"] == result.data["test_images"]
    federation = prepare(
        make_settings({"method": "fedapt-unsupervised", **settings}),
        model=small_clip(),
        cache=cache,
    )
    test = load_dataset("digits").test
    assert federation.trainer.feed.split.fingerprint == test.fingerprint
    for shard in federation.shards:
        assert np.array_equal(shard.train, shard.test)
    usual = fastfpl.run(
        "fedapt-unsupervised",
        model=small_clip(),
        cache=cache,
        **{**settings, "transductive": False},
    )
    assert usual.rounds[0]["loss"] != result.rounds[0]["loss"]
    assert usual.data["train_images"] != usual.data["test_images"]


@pytest.mark.parametrize("method", ["fedapt", "promptfl", "zeroshot"])
def test_methods_that_see_labels_are_not_transductive(method):
    settings = {"dataset": "digits", "shots": "all", "transductive": True}
    with pytest.raises(InputError, match=f"look at no label; got True for {method}"):
        fastfpl.run(method, model=small_clip(), **settings)


def test_transductive_takes_every_test_image():
    with pytest.raises(InputError, match=r"shots must be 'all' with transductive=true.*got 16"):
        make_settings({"method": "fedapt-unsupervised", "transductive": True})
