"""Prompts with FedAMP against the literal reference, and its messages by hand."""

import math

import pytest
import torch

from fastfpl.errors import InputError
from fastfpl.methods import check_options
from fastfpl.methods.pool import refreshed
from fastfpl.reference import prompt_fedamp as reference
from fastfpl.reference import rounds
from fastfpl.training.gathering import stack
from tests import proofs
from tests.proofs import (
    DTYPES,
    F32,
    F64,
    SELECTED,
    assert_near,
    assert_same_rounds,
    assert_same_step,
)
from tests.worlds import World, drawn

one_thread = pytest.fixture(scope="module", autouse=True)(proofs.one_thread)

# messages that matter: prompts of the small worlds are at squared distances near 1
OPTIONS = {"sigma": 2.0, "alpha": 0.4, "lam": 0.8}


def world_of(dtype=F64, position="end", settings=None, **options):
    return World("prompt-fedamp", dtype, position, {**OPTIONS, **options}, settings or {})


def played(world, federation, selected):
    o = world.options
    return reference.prompt_fedamp(
        world.setup(),
        world.clients,
        federation.server["ctx"].double(),
        world.plan(selected),
        alpha=o["alpha"],
        sigma=o["sigma"],
        lam=o["lam"],
        from_cloud=o.get("start") == "cloud",
    )


def assert_proven(world, selected=SELECTED):
    federation = world.federation()
    outcomes = played(world, federation, selected)

    def server(outcome):
        owner = federation.server["pool_owner"].tolist()
        assert sorted(owner) == sorted(outcome.kept)
        return {"pool": torch.stack([outcome.kept[c] for c in owner])}

    begin = federation.server["ctx"].clone()
    downs = {}
    download = federation.method.download

    def spy(held, client, round_):
        downs[round_, client] = download(held, client, round_)
        return downs[round_, client]

    federation.method.download = spy
    assert_same_rounds(
        world,
        federation,
        outcomes,
        selected,
        server=server,
        kept=lambda o: {c: {"ctx": t} for c, t in o.kept.items()},
    )
    assert torch.equal(federation.server["ctx"], begin)
    assert sorted(federation.server["pool_owner"].tolist()) == sorted(outcomes[-1].kept)
    for t, outcome in enumerate(outcomes):
        for c, cloud in outcome.clouds.items():
            assert set(downs[t, c]) == {"cloud"}
            assert_near(downs[t, c]["cloud"], cloud, world.dtype, f"round {t}, cloud of {c}")


@DTYPES
@pytest.mark.parametrize("start", ["own", "cloud"])
@pytest.mark.parametrize("position", ["end", "middle"])
def test_rounds_equal_the_reference(position, start, dtype):
    assert_proven(world_of(dtype, position, start=start))


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    settings = {"local_epochs": epochs, "rounds": 2}
    assert_proven(world_of(dtype, settings=settings), [[0, 1, 2, 3, 4]] * 2)


@DTYPES
def test_loss_and_gradients_equal_the_reference(dtype):
    world = world_of(dtype)
    setup, o = world.setup(), world.options
    cloud = 0.1 * drawn(5, 3, 32, seed=3, dtype=dtype)

    def exact(u, values, image, labels):
        return reference.loss_of(
            setup, values, image, labels, cloud[u].double(), o["alpha"], o["lam"]
        )

    own = {"ctx": 0.1 * drawn(5, 3, 32, seed=4, dtype=dtype)}
    assert_same_step(world, world.federation(), {"cloud": cloud}, own, exact)


# --- messages by hand -----------------------------------------------------------------------------


def server_of(method, values):
    """A server to which client c has uploaded a constant context, or nothing (None)."""
    uploads = {
        c: {"ctx": torch.full((3, 32), value)}
        for c, value in enumerate(values)
        if value is not None
    }
    held = refreshed(method.server_init(), uploads, {})
    return {**held, "ctx": torch.zeros(3, 32)}


def test_messages_by_hand():
    # squared distances: 96 (v_i - v_j)^2
    method = world_of(F32, sigma=24.0, alpha=6.0).federation().method
    server = server_of(method, (0.0, 0.5, None, -0.25, 0.5))
    weight = {d: 6.0 / 24.0 * math.exp(-96 * d**2 / 24.0) for d in (0.5, 0.25, 0.75, 0.0)}
    wanted = {
        0: weight[0.5] * 0.5 * 2 - weight[0.25] * 0.25,
        1: 0.5 - weight[0.5] * 0.5 - weight[0.75] * 0.75,
        2: weight[0.5] * 0.5 * 2 - weight[0.25] * 0.25,  # from the initial prompt, zero
        3: -0.25 + weight[0.75] * 0.75 * 2 + weight[0.25] * 0.25,
    }
    for client, value in wanted.items():
        cloud = method.download(server, client, 3)["cloud"]
        assert cloud.dtype == F32
        torch.testing.assert_close(cloud, torch.full((3, 32), value))
    others = [torch.full((3, 32), v) for v in (0.5, -0.25, 0.5)]
    exact = reference.cloud_of(torch.zeros(3, 32), others, 6.0, 24.0)
    torch.testing.assert_close(exact, torch.full((3, 32), wanted[0]))


def test_a_message_is_a_step_down_the_attention():
    """u_i = w_i - (alpha / 2) d/dw_i sum_j A(|w_i - w_j|^2), equation 3 up to the half."""
    method = world_of(F64).federation().method
    contexts = 0.1 * drawn(5, 3, 32, seed=1)
    server = {"ctx": contexts[0], "pool": contexts, "pool_owner": torch.arange(5)}
    for c in range(5):
        mine = contexts[c].clone().requires_grad_()
        away = (contexts - mine).square().sum(dim=(-2, -1))
        (slope,) = torch.autograd.grad((1 - torch.exp(-away / 2.0)).sum(), mine)
        cloud = method.download(server, c, 0)["cloud"]
        torch.testing.assert_close(cloud, contexts[c] - 0.4 / 2 * slope, rtol=1e-12, atol=1e-14)
        assert (cloud - contexts[c]).norm() > 0.01


def test_by_default_a_cloud_prompt_is_a_mean():
    """Weights of the default options are positive and sum to one; the same prompts stay."""
    federation = World("prompt-fedamp", F64).federation()
    method = federation.method
    contexts = torch.zeros(5, 3, 32, dtype=F64)
    for c in range(5):
        contexts[c, 0, c] = 0.3 + c
    server = {"ctx": contexts[0], "pool": contexts, "pool_owner": torch.arange(5)}
    for c in range(5):
        # the coordinates of c's cloud prompt are the weights times the numbers
        weight = method.download(server, c, 0)["cloud"][0, :5] / contexts[:, 0, :5].sum(0)
        assert weight.min() > 0
        assert weight.sum() == pytest.approx(1.0)
        assert weight[c] > 1 / 5
    same = {**server, "pool": contexts[:1].expand(5, -1, -1)}
    torch.testing.assert_close(method.download(same, 2, 0)["cloud"], contexts[0])
    # prompts that are as good as equal are averaged evenly
    near = {**server, "pool": 1e-4 * contexts}
    mean = (1e-4 * contexts).mean(0)
    torch.testing.assert_close(method.download(near, 2, 0)["cloud"], mean, rtol=1e-5, atol=1e-11)


def test_far_prompts_are_not_heard():
    method = world_of(F64, sigma=0.01).federation().method
    contexts = 0.2 * drawn(5, 3, 32, seed=1)
    server = {"ctx": contexts[0], "pool": contexts, "pool_owner": torch.arange(5)}
    for c in range(5):
        assert torch.equal(method.download(server, c, 0)["cloud"], contexts[c])


def test_a_round_does_not_hear_its_own_uploads():
    federation = world_of().federation()
    federation.sampling.sample = lambda round_: [0, 1, 2]
    begin = federation.server["ctx"].clone()
    assert torch.equal(federation.method.download(federation.server, 3, 0)["cloud"], begin)
    federation.round()
    assert torch.equal(federation.server["ctx"], begin)
    assert not torch.equal(federation.method.download(federation.server, 3, 1)["cloud"], begin)


# --- the proximal term ----------------------------------------------------------------------------


def test_the_proximal_term_weighs_lambda_over_two_alpha():
    def loss(**options):
        world = world_of(F64, **options)
        method = world.federation().method
        ctx, cloud = drawn(5, 3, 32, seed=1), drawn(5, 3, 32, seed=2)
        trained = {"ctx": ctx}
        batch = proofs.first_images(world)
        value = method.loss(method.text(trained, {}), trained, {"cloud": cloud}, batch)
        return value, (ctx - cloud).square().sum(dim=(-2, -1))

    plain, away = loss(lam=0.0)
    for options, weight in (
        ({"lam": 3.0, "alpha": 0.5}, 3.0),
        ({"lam": 3.0, "alpha": 2.0}, 0.75),
        ({"lam": None, "alpha": 0.1}, 0.5),
        ({"lam": 1.0, "alpha": None, "sigma": 2.5}, 1.0),  # alpha = 2.5 / 5 clients
    ):
        torch.testing.assert_close(loss(**options)[0], plain + weight * away)


def test_without_messages_and_term_this_is_local_coop():
    world = world_of(F64, alpha=1e-300, lam=0.0)
    federation, plain = world.federation(), World("local", F64).federation()
    for f in (federation, plain):
        f.sample = lambda round_: SELECTED[round_]
    for _ in range(3):
        one, other = federation.round(), plain.round()
        assert one["clients"] == other["clients"]
        for c, state in plain.clients.items():
            assert_near(federation.clients[c]["ctx"], state["ctx"], F64, f"client {c}")


def test_a_strong_term_keeps_clients_at_their_cloud_prompts():
    far = {}
    # momentum would swing past them
    settings = {"local_epochs": 10, "momentum": 0.0, "lr": 0.05}
    for lam in (0.0, 4.0):
        federation = world_of(F64, lam=lam, start="cloud", settings=settings).federation()
        for _ in range(2):
            clouds = {c: federation.method.download(federation.server, c, 0) for c in range(5)}
            federation.round()
        away = [federation.clients[c]["ctx"] - clouds[c]["cloud"] for c in range(5)]
        far[lam] = torch.stack(away).norm()
    assert far[4.0] < 0.5 * far[0.0]


def test_who_never_trained_answers_with_its_cloud_prompt():
    world = world_of()
    federation = world.federation()
    federation.sampling.sample = lambda round_: [0, 1, 2, 3]
    row = federation.round()
    down = federation.method.download(federation.server, 4, 1)
    logits = rounds.logits_of(world.setup(), down["cloud"], world.clients[4].test)
    assert row["clients"][4] == rounds.accuracy_of(logits, world.clients[4].test_labels)
    trained, _ = federation.method.start(stack([down]), {}, training=False)
    assert torch.equal(trained["ctx"][0], down["cloud"])


def test_options():
    assert check_options("prompt-fedamp", {}) == {
        "sigma": 1.0,
        "alpha": None,
        "lam": None,
        "start": "own",
    }
    for options in ({"sigma": 0.0}, {"alpha": 0.0}, {"lam": -1.0}, {"start": "server"}):
        with pytest.raises(InputError, match=f"option {next(iter(options))} is refused"):
            check_options("prompt-fedamp", options)
