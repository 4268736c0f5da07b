"""The laws of a round, and that every setting does what it says."""

import contextlib
import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

import fastfpl
import fastfpl.federation.preparation
import fastfpl.methods.base
from fastfpl.config import Settings, make_settings
from fastfpl.data import load_dataset
from fastfpl.errors import InputError, NotConverged
from fastfpl.features import TextFeatures
from fastfpl.federation.result import summarise
from fastfpl.federation.turns import Together
from fastfpl.methods import METHODS
from fastfpl.ops import gate, text, transport
from fastfpl.training.cohort import learning_rate
from fastfpl.training.gathering import Share, gather, stack, unstack
from fastfpl.training.steps import CohortSGD
from tests.worlds import GATE, TINY_RUN, Feed, World, drawn, figures, small_clip

F32, F64 = torch.float32, torch.float64
MOAP = {"experts": 3, "heads": 2, "gate_width": 8, "scaling": 40.0}
OPTIONS = {
    "promptfl": {},
    "fedprox": {"mu": 2.0},
    "local": {},
    "pfedmoap": MOAP,
    "fedpgp": {"bottleneck": 2, "mu": 2.0},
    "promptfl-ft": {"epochs": 2},
    "prompt-fedper": {"personal": 1},
    "prompt-fedamp": {"sigma": 2.0, "alpha": 0.4, "lam": 0.8},
    "promptfolio": {"theta": 0.4},
    "fedtpg": {"widening": 1},
}
ALL = pytest.mark.parametrize("method", OPTIONS)
SELECTED = [[0, 1, 3], [0, 2, 3], [0, 1, 2], [1, 3]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def world_of(method, dtype=F32, **settings):
    return World(method, dtype, options=OPTIONS[method], settings=settings)


def play(federation, rounds=4, selected=SELECTED):
    if selected is not None:
        federation.sampling.sample = lambda round_: selected[round_]
    for _ in range(rounds):
        federation.round()
    return federation


def state_of(federation):
    sides = {"server": federation.server, **federation.clients}
    return {(side, name): t for side, state in sides.items() for name, t in state.items()}


def assert_same_state(one, other, **tolerance):
    a, b = state_of(one), state_of(other)
    assert set(a) == set(b)
    for key, tensor in a.items():
        if tolerance:
            torch.testing.assert_close(
                tensor, b[key], **tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )
        else:
            assert torch.equal(tensor, b[key]), key
    rows = [[dict(row, seconds=0, images_per_second=0) for row in f.rounds] for f in (one, other)]
    if not tolerance:
        assert rows[0] == rows[1]
    else:
        assert [r["clients"] for r in rows[0]] == [r["clients"] for r in rows[1]]


def uploads_of(server, clients):
    """What clients may send: a context, or whatever else the server holds."""
    names = ["ctx"] if "ctx" in server else list(server)
    return {c: {n: drawn(*server[n].shape, seed=c, dtype=F32) for n in names} for c in clients}


# --- the laws of a round --------------------------------------------------------------------------


@ALL
def test_the_servers_side_is_a_value(method):
    """Whoever drives it: the same uploads make the same next round, and the old one stays."""
    federation = world_of(method, dropout=0.3).federation()
    for number in range(3):
        now, call = federation.now, federation.sampling.call(number)
        before = {name: tensor.clone() for name, tensor in now.server.items()}
        sent = {}
        for turn in Together().turns(federation.trainer, now, call, federation.clients):
            uploads = unstack(turn.outcome.upload, len(turn.members))
            sent |= {c: u for c, u in zip(turn.members, uploads, strict=True) if u}
        sent = {c: state for c, state in sent.items() if c not in call.lost}
        images = {c: len(federation.trainer.images[c]) for c in sent}
        ways = [now.after(federation.method, sent, images, now.handed) for _ in range(2)]
        federation.round()
        assert federation.now is not now
        for way in (*ways, federation.now):
            assert way.number == number + 1
            assert set(way.server) == set(federation.server)
            assert all(torch.equal(way.server[n], t) for n, t in federation.server.items())
        assert now.number == number
        assert all(torch.equal(now.server[n], t) for n, t in before.items())


@ALL
def test_any_order_of_clients_gives_the_same_round(method):
    orders = [SELECTED, [s[::-1] for s in SELECTED], [s[1:] + s[:1] for s in SELECTED]]
    one, *others = [play(world_of(method).federation(), 3, order) for order in orders]
    for other in others:
        for row, mine in zip(other.rounds, one.rounds, strict=True):
            row["selected"] = mine["selected"]
        assert_same_state(one, other)


@ALL
def test_a_merge_does_not_see_the_order_of_uploads(method):
    federation = world_of(method).federation()
    sent = uploads_of(federation.server, range(5))
    images = {c: 3 + c**2 for c in range(5)}
    merged = [
        federation.method.merge(
            federation.server, {c: sent[c] for c in order}, {c: images[c] for c in order}, 0
        )
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 4, 1, 0, 2])
    ]
    for other in merged[1:]:
        assert all(torch.equal(other[name], merged[0][name]) for name in merged[0])


class Views(Feed):
    """Three views of every image, chosen by the draws."""

    random = True

    def batch(self, indices, draws=None):
        assert draws is not None
        assert draws.shape == indices.shape
        features = self._features[torch.from_numpy(indices)]
        return features.roll(1, -1) * torch.from_numpy(draws % 3 - 1)[..., None] + features


@pytest.mark.parametrize(
    ("dtype", "augmented"), [(F64, False), (F32, True)], ids=["float64", "float32, augmented"]
)
@ALL
def test_a_cohort_of_one_equals_a_cohort_of_many(method, dtype, augmented):
    federations = []
    for cohort in (None, 1, 2):
        federation = world_of(method, dtype, cohort=cohort).federation()
        if augmented:
            federation.trainer.feed.__class__ = Views
        federations.append(play(federation, 3))  # the third begins with all that the second made
    tolerance = {F32: 1e-4, F64: 1e-11}[dtype]
    for other in federations[1:]:
        assert_same_state(federations[0], other, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_augmentation_draws_anew_each_time(method):
    seen = []

    class Spy(Views):
        def batch(self, indices, draws=None):
            # client 3 holds the images 17 to 30
            seen.extend(
                (i.tolist(), d.tolist())
                for i, d in zip(indices, draws, strict=True)
                if 17 <= i[0] <= 30
            )
            return super().batch(indices, draws)

    def watched(selected):
        seen.clear()
        federation = world_of(method).federation()
        federation.trainer.feed.__class__ = Spy
        play(federation, 2, selected)
        return list(seen)

    alone = watched([[3], [3]])
    # of its 14 images it takes 12 an epoch: two rounds of two epochs of three steps
    assert len(alone) == 12
    for epoch in range(4):
        images = [i for step, _ in alone[3 * epoch : 3 * epoch + 3] for i in step]
        assert len(set(images)) == 12
    assert len({d for _, draws in alone for d in draws}) == 48
    # whoever else trains, it sees the same images and draws
    assert watched([[0, 1, 3], [2, 3]]) == alone


@ALL
def test_a_client_that_sends_nothing_changes_nothing(method):
    federation = play(world_of(method).federation(), 1)
    before = {k: v.clone() for k, v in federation.server.items()}
    merged = federation.method.merge(federation.server, {}, {}, 1)
    assert set(merged) == set(before)
    assert all(torch.equal(merged[k], before[k]) for k in before)
    sent = uploads_of(before, (1, 2))
    some = federation.method.merge(federation.server, sent, {1: 3, 2: 5}, 1)
    also = federation.method.merge(federation.server, sent, {1: 3, 2: 5, 4: 1000}, 1)
    assert all(torch.equal(some[k], also[k]) for k in some)
    if method != "local":
        assert not all(torch.equal(some[k], before[k]) for k in before)


@ALL
def test_clients_that_do_not_train_are_left_alone(method):
    federation = play(world_of(method).federation(), 2)
    kept = {c: {k: v.clone() for k, v in s.items()} for c, s in federation.clients.items()}
    federation.sampling.sample = lambda round_: [2]
    federation.round()
    for c, state in kept.items():
        if c != 2:
            assert all(torch.equal(federation.clients[c][k], v) for k, v in state.items())
    assert 4 not in federation.clients


def ranges(tensors):
    """First and last byte of every tensor's storage."""
    spans = []
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), key))
    return sorted(spans)


@pytest.mark.parametrize("cohort", [None, 1])
@ALL
def test_no_two_clients_share_storage(method, cohort):
    federation = world_of(method, cohort=cohort).federation()
    federation.sampling.sample = lambda round_: SELECTED[round_]
    for _ in range(4):
        old = federation.server, {k: v.clone() for k, v in federation.server.items()}
        federation.round()
        spans = ranges(state_of(federation))
        for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
            assert end <= begin, f"{one} and {other} share storage"
        # the server's old state is a value: nobody wrote into it
        assert all(torch.equal(old[0][k], v) for k, v in old[1].items())


@ALL
def test_the_same_seed_gives_the_same_run(method):
    runs = [
        play(world_of(method, seed=seed, participation=0.6).federation(), selected=None)
        for seed in (3, 3, 4)
    ]
    assert_same_state(runs[0], runs[1])
    assert not all(torch.equal(t, runs[2].server[name]) for name, t in runs[0].server.items())
    assert [r["selected"] for r in runs[0].rounds] != [r["selected"] for r in runs[2].rounds]


@ALL
def test_the_callers_generators_are_left_alone(method):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  # the global one is meant
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = play(world_of(method).federation(), 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(6)
    assert_same_state(one, play(world_of(method).federation(), 2))


def test_cached_text_features_equal_uncached_after_optimiser_steps():
    caches, federations = [], []
    for size in (1 << 28, 0):
        federation = world_of("pfedmoap", F64).federation()
        cache = TextFeatures(size, verify=True)
        federation.method.task = replace(federation.method.task, text_features=cache)
        federation.sampling.sample = lambda round_: SELECTED[round_]
        caches.append(cache)
        federations.append(federation)
    for _ in range(4):
        for federation in federations:
            federation.round()
        assert_same_state(*federations, rtol=1e-11, atol=1e-12)
        pool, task = federations[0].server["pool"], federations[0].method.task
        marks = (federations[0].server[f"pool_{name}"].tolist() for name in ("owner", "round"))
        for place, (client, version) in enumerate(zip(*marks, strict=True)):
            key = (f"client-{client}", version)
            if key in caches[0]:
                mine = pool[place]
                kept = caches[0].get_or_encode([key], lambda _, mine=mine: mine, task.encode)
                torch.testing.assert_close(kept, task.encode(mine[None]), rtol=1e-12, atol=1e-13)
    assert len(caches[0]) > 0
    assert len(caches[1]) == 0


@pytest.mark.parametrize("evaluate_every", [1, 3])
@ALL
def test_a_round_depends_on_the_checkpointed_state_only(method, evaluate_every, monkeypatch):
    """Whoever goes on from the state encodes the same contexts in the same passes."""
    passes = []
    encode = fastfpl.methods.base.encode_text

    def spy(tower, layout, ctx):
        passes.append(ctx.detach().clone())
        return encode(tower, layout, ctx)

    monkeypatch.setattr(fastfpl.methods.base, "encode_text", spy)
    first = world_of(method, evaluate_every=evaluate_every).federation()
    for done in range(4):
        second = world_of(method, evaluate_every=evaluate_every).federation()
        server = {k: v.clone() for k, v in first.server.items()}
        second.now = replace(first.now, server=server)
        for client, state in first.clients.items():
            second.clients.put(client, state)
        for client, state in first.downloads.items():
            second.downloads.put(client, state)
        second.rounds = [dict(row) for row in first.rounds]
        seen = []
        for federation in (first, second):
            passes.clear()
            play(federation, 1)
            seen.append(list(passes))
        assert len(seen[0]) == len(seen[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), done
        assert_same_state(first, second)


# --- the parts of a round -------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_cohort_sgd_equals_torch(momentum, weight_decay):
    shapes, rates = {"a": (5, 3, 2), "b": (5, 4), "frozen": (5, 2)}, {"a": 0.1, "b": 0.03}
    start = {n: drawn(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    ours = {n: t.clone() for n, t in start.items()}
    sgd = CohortSGD(ours, {**rates, "frozen": 1.0}, momentum, weight_decay)
    theirs = [{n: t[u].clone().requires_grad_() for n, t in start.items()} for u in range(5)]
    optimisers = [
        torch.optim.SGD(
            [{"params": [p[n]], "lr": rates.get(n, 1.0)} for n in shapes],
            momentum=momentum,
            weight_decay=weight_decay,
        )
        for p in theirs
    ]
    for step in range(7):
        scale = [1.0, 0.5, 0.0][step % 3]
        # the first few clients step, client 0 always does
        live = [4, 1, 3, None, 4, 2, 3][step]
        members = range(5)[:live]
        gradients = {n: drawn(*shapes[n], seed=100 + step) for n in ("a", "b")}
        given = {n: g[:live] for n, g in gradients.items()}
        # b's rate follows no schedule
        scales = {"a": scale, "b": 1.0, "frozen": scale}
        sgd.scale(scales)
        sgd.step({**given, "frozen": None}, live)
        for u in members:
            for optimiser_group, name in zip(optimisers[u].param_groups, shapes, strict=True):
                optimiser_group["lr"] = scales[name] * rates.get(name, 1.0)
                theirs[u][name].grad = gradients[name][u] if name in gradients else None
            optimisers[u].step()
        for u in range(5):
            for name in shapes:
                wanted = theirs[u][name].detach()
                torch.testing.assert_close(ours[name][u], wanted, rtol=1e-13, atol=1e-14)
    assert torch.equal(ours["frozen"], start["frozen"])
    assert not torch.equal(ours["a"][:4], start["a"][:4])


def test_learning_rates():
    def factors(schedule):
        settings = Settings(method="local", schedule=schedule, local_epochs=4, rounds=2)
        return [learning_rate(settings, t, e, 4) for t in range(2) for e in range(4)]

    half = math.sqrt(0.5)
    cosine = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert factors("constant") == [1.0] * 8
    assert factors("cosine") == pytest.approx(cosine * 2)
    assert factors("cosine-rounds") == pytest.approx([1.0] * 4 + [0.5] * 4)
    annealed = torch.optim.lr_scheduler.CosineAnnealingLR
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = annealed(optimiser, T_max=4), []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert factors("cosine")[:4] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("share", "clients", "count"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.07, 100, 7),
        (1.0, 7, 7),
        (0.5, 7, 3),
        (0.25, 30, 7),
        (0.01, 5, 1),
        (0.999, 10, 9),
    ],
)
def test_how_many_clients_train(share, clients, count):
    federation = World(settings={"participation": share}).federation()
    federation.sampling.clients = clients
    drawn_ = [federation.sampling.sample(round_) for round_ in range(20)]
    for members in drawn_:
        assert members == sorted(set(members))
        assert len(members) == count
        assert set(members) <= set(range(clients))
    assert drawn_ == [federation.sampling.sample(round_) for round_ in range(20)]
    if 1 < count < clients:
        assert len({tuple(m) for m in drawn_}) > 5
    other = World(settings={"participation": share, "seed": 1}).federation()
    other.sampling.clients = clients
    assert ([other.sampling.sample(r) for r in range(20)] == drawn_) == (count == clients)


def test_every_client_is_sampled_equally_often():
    federation = World(settings={"participation": 0.4}).federation()
    drawn_ = [federation.sampling.sample(round_) for round_ in range(500)]
    counts = np.bincount(np.concatenate(drawn_), minlength=5)
    assert counts.sum() == 1000
    assert counts.min() > 160
    assert counts.max() < 240


def gathered(clients, downs, owns, limit, sizes=None):
    asked, read = [], []

    def states(client):
        read.append(client)
        return downs[client], owns[client]

    def share(client, down, own):
        asked.append(client)
        assert (down, own) == (downs[client], owns[client])
        return Share(limit)

    parts = list(gather(clients, states, share, sizes))
    assert sorted(read) == sorted(clients)
    for part in parts:
        for name in downs[part.members[0]]:
            wanted = torch.stack([downs[c][name] for c in part.members])
            assert torch.equal(part.down[name], wanted)
    return [part.members for part in parts], asked


def test_cohorts_hold_like_clients_only():
    one, two = torch.zeros(2, 3), torch.zeros(4, 3)
    downs = {0: {"a": one}, 1: {"a": two}, 2: {"a": one}, 3: {"a": one}, 4: {"a": one, "b": one}}
    owns = {0: {}, 1: {}, 2: {}, 3: {"k": one}, 4: {}}
    members, asked = gathered([4, 3, 2, 1, 0], downs, owns, None)
    assert members == [[0, 2], [1], [3], [4]]
    assert asked == [0, 1, 3, 4]  # once a kind
    assert gathered([4, 3, 2, 1, 0], downs, owns, 1)[0] == [[0], [1], [2], [3], [4]]
    alike, nothing = {c: {"a": one} for c in range(5)}, {c: {} for c in range(5)}
    assert gathered(range(5), alike, nothing, 2)[0] == [[0, 1], [2, 3], [4]]
    sizes = {0: 7, 1: 6, 2: 7, 3: 6, 4: 5}
    assert gathered(range(5), alike, nothing, None, sizes)[0] == [[4], [1, 3], [0, 2]]


def test_cohorts_are_read_as_they_come():
    """A cohort is done before the states of the next one are read."""
    read = []

    def states(client):
        read.append(client)
        return {"a": torch.zeros(1)}, {}

    parts = gather(range(100), states, lambda *one: Share(3))
    assert next(parts).members == [0, 1, 2]
    assert read == [0, 1, 2]
    sizes = {c: c for c in range(100)}
    parts = gather(range(100), states, lambda *one: Share(3), sizes)
    read.clear()
    assert next(parts).members == [0]
    assert read == [0, 1]


def test_unstacking_gives_each_its_own_storage():
    states = [{"a": drawn(2, 3, seed=u)} for u in range(3)]
    again = unstack(stack(states), 3)
    assert all(torch.equal(a["a"], b["a"]) for a, b in zip(states, again, strict=True))
    spans = ranges({u: state["a"] for u, state in enumerate(again)})
    assert all(end <= begin for (_, end, _), (begin, _, _) in itertools.pairwise(spans))


@ALL
def test_a_loss_that_is_not_finite_is_refused(method):
    federation = world_of(method, lr=1e30).federation()
    with pytest.raises(NotConverged, match=r"loss must stay finite; got nan for client [0-4] in"):
        play(federation, 3, [[0, 1, 2, 3, 4]] * 3)


def test_the_summary_by_hand():
    def row(*accuracies):
        mean = sum(accuracies) / len(accuracies)
        exam = {"accuracy": mean, "macro_f1": mean / 2, "clients": [], "domains": {"ink": mean}}
        return {"accuracy": mean, "clients": list(accuracies), "exams": {"own": exam}}

    none = {"accuracy": None, "clients": [], "exams": {}}
    rows = [row(0.8, 1.0), none, row(0.1, 0.3), row(0.2, 0.2), row(0.3, 0.3), none]
    final = summarise([*rows, row(0.4, 0.4), row(0.1, 0.5)])
    assert final.pop("exams") == {"own": 0.3}
    assert final.pop("domains") == {"ink": 0.3}
    assert final == pytest.approx(
        {
            "accuracy": 0.3,
            "macro_f1": 0.15,
            "last5": (0.2 + 0.2 + 0.3 + 0.4 + 0.3) / 5,
            "best": 0.9,
            "std_over_clients": 0.2,
        }
    )


# --- every setting has an effect ------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module", autouse=True)
def one_digits():
    """Draw the digits once, not for every run."""
    sets = {}

    def load(name, root, **more):
        if name not in sets:
            sets[name] = load_dataset(name, root)
        return sets[name]

    patch = pytest.MonkeyPatch()
    patch.setattr(fastfpl.federation.preparation, "load_dataset", load)
    yield
    patch.undo()


# of the tiny run: a gate that fits, and prompts so far apart that FedAMP's defaults are deaf
TINY_OPTIONS = {"pfedmoap": GATE, "prompt-fedamp": {"sigma": 50.0}}


@pytest.fixture(scope="module")
def outcome(clip, cache):
    """Play a tiny run once for each choice of settings."""
    known = {}

    def run(method, changes):
        settings = {**TINY_RUN, **changes}
        settings["options"] = {**TINY_OPTIONS.get(method, {}), **settings.get("options", {})}
        settings = {k: v for k, v in settings.items() if v is not ...}
        key = repr((method, sorted(settings.items())))
        if key not in known:
            known[key] = fastfpl.run(method, model=clip, cache=cache, **settings)
        return known[key]

    return run


VIEWS = {"augment": "views:1"}
CHANGES = {
    "n_ctx": ({}, {"n_ctx": 5}),
    "ctx_init": ({}, {"n_ctx": ..., "ctx_init": "a photo of a"}),
    "position": ({}, {"position": "middle"}),
    "position, front": ({"position": "middle"}, {"position": "front"}),
    "partition": ({}, {"partition": "iid"}),
    "beta": ({"partition": "dirichlet"}, {"partition": "dirichlet", "beta": 5.0}),
    "classes_per_client": (
        {"partition": "labeluni", "clients": 5},
        {"partition": "labeluni", "clients": 5, "classes_per_client": 4},
    ),
    "repeat_rate": ({}, {"repeat_rate": 0.2}),
    "shots": ({}, {"shots": 9}),
    "shots, all": ({"rounds": 1}, {"rounds": 1, "shots": None}),
    "clients": ({}, {"clients": 3}),
    "participation": ({}, {"participation": 0.5}),
    "rounds": ({}, {"rounds": 1}),
    "local_epochs": ({}, {"local_epochs": 1}),
    "batch_size": ({}, {"batch_size": 5}),
    "lr": ({}, {"lr": 0.04}),
    "momentum": ({}, {"momentum": 0.8}),
    "weight_decay": ({}, {"weight_decay": 0.01}),
    "schedule": ({}, {"schedule": "cosine"}),
    "schedule, rounds": ({}, {"schedule": "cosine-rounds"}),
    "augment": ({}, VIEWS),
    "augment, views": (VIEWS, {"augment": "views:2"}),
    "augment, fresh": (VIEWS, {"augment": "fresh"}),
    "crop": (VIEWS, {**VIEWS, "crop": 0.5}),
    "crop, fresh": ({"augment": "fresh"}, {"augment": "fresh", "crop": 0.5}),
    "flip": (VIEWS, {**VIEWS, "flip": 0.0}),
    "flip, fresh": ({"augment": "fresh"}, {"augment": "fresh", "flip": 0.0}),
    "seed": ({}, {"seed": 1}),
}
# told apart by tests of their own: below, and dataset and root in test_glyphs and test_digits
ELSEWHERE = {
    *("method", "options", "evaluate_every", "cohort", "dtype", "threads", "device"),
    *("max_memory", "cuda_graphs"),  # test_memory, test_graphs
    *("workers", "resident", "feature_dtype"),  # test_images
    "resident_features",  # test_features_on_device
    *("split_test", "partition_seed"),  # the seed in test_scenarios
    *("on_corrupt", "statistics"),  # test_scenarios
    "as_released",  # test_released
    *("dataset", "root", "clip", "pretrained"),
    "quick_gelu",  # test_clip_files
    *("scenario", "target", "target_root", "sampling", "dropout"),  # test_scenarios
    "transductive",  # test_fedapt_unsupervised
    *("layout", "digest"),  # test_own_images
    "columns",  # test_manifests
    "evaluate_clients",  # test_many_clients
    "unseen",  # test_adapt
    *("dp_noise", "dp_clip", "dp_delta", "dp_unit"),  # test_privacy, test_private_images
    *("merge", "trim", "krum_malicious", "krum_kept", "clip_update"),  # test_robust
}


FLOATS = [
    name
    for name, field in Settings.model_fields.items()
    if float in (field.annotation, *get_args(field.annotation))
]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_are_not_finite_are_refused(name, value):
    rule = rf"fastfpl\.Settings: {name} is refused: input should be a finite number; got {value}"
    with pytest.raises(InputError, match=rule):
        make_settings({"method": "promptfl", name: value})


def test_every_float_is_among_them():
    assert {"lr", "momentum", "weight_decay", "beta", "crop", "flip", "participation"} <= {*FLOATS}


def losses(result):
    return [row["loss"] for row in result.rounds]


def test_every_setting_is_tested():
    assert {name.partition(",")[0] for name in CHANGES} | ELSEWHERE == set(Settings.model_fields)


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_has_an_effect(outcome, name):
    one, other = (outcome("promptfl", change) for change in CHANGES[name])
    assert losses(one) != losses(other)
    assert all(0 < loss < 20 for loss in losses(one) + losses(other))


METHOD_CHANGES = {
    ("fedprox", "mu"): 2.0,
    ("pfedmoap", "experts"): 2,
    ("pfedmoap", "selection"): "random",
    ("pfedmoap", "local_weight"): 0.9,
    ("pfedmoap", "heads"): 4,
    ("pfedmoap", "gate_width"): 8,
    ("pfedmoap", "scaling"): 1.0,
    ("pfedmoap", "gate_lr"): 0.1,
    ("fedotp", "prompts"): 3,
    ("fedotp", "shared"): 2,
    ("fedotp", "eps"): 0.05,
    ("fedotp", "mass"): 0.5,
    ("fedotp", "balanced"): True,
    ("fedotp", "tol"): 0.3,
    ("fedpgp", "bottleneck"): 2,
    ("fedpgp", "mu"): 2.0,
    ("fedpgp", "temperature"): 1.0,
    ("fedpgp", "reference"): "x",
    ("prompt-fedper", "personal"): 1,
    ("prompt-fedamp", "sigma"): 10.0,
    ("prompt-fedamp", "alpha"): 0.5,
    ("prompt-fedamp", "lam"): 3.0,
    ("prompt-fedamp", "start"): "cloud",
    ("promptfolio", "theta"): 0.6,
    ("fedtpg", "heads"): 2,
    ("fedtpg", "widening"): 1,
}
# what shows elsewhere than in the loss of rounds: in tests of their own
METHOD_ELSEWHERE = {("fedotp", "max_iter"), ("promptfl-ft", "epochs"), ("zeroshot", "words")}


def test_every_option_is_tested():
    known = {(name, o) for name, kind in METHODS.items() for o in kind.Options.model_fields}
    # told apart in tests of its own
    own_file = {(name, o) for name, o in known if name.startswith("fedapt")}
    assert set(METHOD_CHANGES) | METHOD_ELSEWHERE == known - own_file


@pytest.mark.parametrize(("method", "option"), METHOD_CHANGES)
def test_an_option_has_an_effect(outcome, method, option):
    one = outcome(method, {})
    other = outcome(method, {"options": {option: METHOD_CHANGES[method, option]}})
    assert losses(one) != losses(other)
    # before there are experts, nothing but CoOp happens
    if method == "pfedmoap":
        assert losses(one)[0] == losses(other)[0]


def test_methods_differ(outcome):
    rows = {
        m: losses(outcome(m, {"rounds": 3})) for m in ("promptfl", "fedprox", "local", "pfedmoap")
    }
    # the first round is the same but for FedProx's term; the later ones are not
    assert rows["promptfl"][0] == rows["local"][0] == rows["pfedmoap"][0] < rows["fedprox"][0]
    assert len({tuple(r) for r in rows.values()}) == 4


def test_words_of_zeroshot(outcome):
    one = outcome("zeroshot", {})
    assert len(one.rounds) == 1
    names = [{}, {"options": {"words": "a photo of a"}}, {"options": {"words": "dark blurry"}}]
    accuracies = [outcome("zeroshot", change).rounds[0]["clients"] for change in names]
    assert accuracies[0] == accuracies[1]
    assert accuracies[0] != accuracies[2]


def test_whole_test_lists(outcome):
    kind = {"partition": "domain-dirichlet"}
    cut, whole = (outcome("promptfl", {**kind, "split_test": s}) for s in (True, False))
    assert sum(cut.data["test_images"]) == 599
    assert whole.data["test_images"] == [599] * 4
    assert len(set(whole.rounds[-1]["clients"])) == 1  # one prompt, one list


def test_evaluations_between_rounds(outcome):
    every, second = (outcome("promptfl", {"rounds": 3, "evaluate_every": e}) for e in (1, 2))
    assert losses(every) == losses(second)
    assert [row["accuracy"] is None for row in second.rounds] == [True, False, False]
    assert [row["clients"] == [] for row in second.rounds] == [True, False, False]
    for row, seen in zip(second.rounds, every.rounds, strict=True):
        assert row["accuracy"] in (None, seen["accuracy"])
    assert second.final["last5"] == pytest.approx(
        (every.rounds[1]["accuracy"] + every.rounds[2]["accuracy"]) / 2
    )


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_a_cohort_decides_no_figure(outcome, method):
    one, *others = [outcome(method, {"cohort": cohort}) for cohort in (None, 1, 3)]
    for other in others:
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
        for row, mine in zip(other.rounds, one.rounds, strict=True):
            assert row["clients"] == pytest.approx(mine["clients"], abs=0.02)
            assert row["bytes_up"] == mine["bytes_up"]


def test_threads_and_device_decide_no_figure(outcome):
    one = outcome("promptfl", {"threads": 1, "device": "cpu"})
    assert one.environment["threads"] == 1
    assert losses(one) == pytest.approx(losses(outcome("promptfl", {})), rel=1e-5)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_threads_are_given_back(clip, cache, error):
    before, seen = torch.get_num_threads(), []

    def on_round(method, row):
        seen.append(torch.get_num_threads())
        if error is not None:
            raise error

    settings = {**TINY_RUN, "rounds": 1, "threads": before + 1}
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        fastfpl.run("promptfl", model=clip, cache=cache, on_round=on_round, **settings)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    # refused before anything is played
    with pytest.raises(InputError, match="did you mean 'digits'"):
        fastfpl.run("promptfl", model=clip, **{**settings, "dataset": "digit"})
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(outcome, clip, cache, dtype):
    narrow = clip.to(dtype=getattr(torch, dtype))
    result = fastfpl.run("promptfl", model=narrow, cache=cache, dtype=dtype, **TINY_RUN)
    rel = {"float64": 1e-5, "bfloat16": 0.05, "float16": 0.01}[dtype]
    assert losses(result) != losses(outcome("promptfl", {}))
    assert losses(result) == pytest.approx(losses(outcome("promptfl", {})), rel=rel)


@pytest.mark.usefixtures("few_digits")
def test_where_the_clip_comes_from(cache):
    small = {**TINY_RUN, "rounds": 1, "local_epochs": 1}
    tiny = fastfpl.run("promptfl", cache=cache, **small)
    rand = fastfpl.run("promptfl", cache=cache, pretrained="random", dtype="float64", **small)
    assert losses(tiny) != losses(rand)
    assert tiny.data["weights"] != rand.data["weights"]
    assert tiny.data["name"] == "digits"
    assert tiny.data["train_images"] == [10, 10, 10, 20]
    assert tiny.settings["n_ctx"] == 4
    assert tiny.faces["encode_text"] in (["cpu"], ["torch"])  # compiled where fastfpl._C is built


def test_a_run_is_the_same_bit_for_bit(outcome, clip, cache, tmp_path):
    for method in ("promptfl", "pfedmoap"):
        options = {"options": GATE} if method == "pfedmoap" else {}
        other_cache = tmp_path / method
        settings = {**TINY_RUN, **options}
        again = fastfpl.run(method, model=clip, cache=other_cache, **settings)
        assert figures(again) == figures(outcome(method, {}))


def test_settings_come_alone_or_as_keywords(clip):
    settings = make_settings({"method": "promptfl", **TINY_RUN})
    with pytest.raises(InputError, match="settings must come alone"):
        fastfpl.run(settings, model=clip, lr=0.1)
    with pytest.raises(InputError, match="out must name the folder to resume"):
        fastfpl.run(settings, model=clip, resume=True)


@pytest.mark.parametrize("method", ["zeroshot", "pfedmoap", "fedotp", "fedapt", "promptfl-ft"])
def test_a_result_names_every_face_that_ran(method, clip, cache, monkeypatch):
    ran = {}

    def watched(op, one):
        def run(*arguments):
            ran.setdefault(op, set()).add(one.name)
            return one.run(*arguments)

        return replace(one, run=run)

    for home in (text, gate, transport):
        for op, faces in home.FACES.items():
            monkeypatch.setitem(home.FACES, op, tuple(watched(op, one) for one in faces))
    settings = {**TINY_RUN, "options": TINY_OPTIONS.get(method, {})}
    result = fastfpl.run(method, model=clip, cache=cache, **settings)
    assert {op: set(names) for op, names in result.faces.items()} == ran
    own = {"pfedmoap": {"gate_experts"}, "fedotp": {"transport_logits"}}
    assert set(ran) == {"encode_text"} | own.get(method, set())
    with fastfpl.face("reference", "encode_text"):
        named = fastfpl.run(method, model=clip, cache=cache, **settings).faces
    assert named["encode_text"] == ["reference"]
