"""PromptFolio against its literal reference, its features by hand and its two ends."""

import pytest
import torch

from fastfpl.errors import InputError
from fastfpl.methods import check_options
from fastfpl.reference import promptfolio as reference
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


def world_of(dtype=F64, position="end", settings=None, **options):
    return World("promptfolio", dtype, position, {"theta": 0.4, **options}, settings or {})


def assert_proven(world, selected=SELECTED):
    federation = world.federation()
    outcomes = reference.promptfolio(
        world.setup(),
        world.clients,
        federation.server["ctx"].double(),
        federation.method._initial().double(),
        world.plan(selected),
        theta=federation.method.options.theta,
    )
    assert_same_rounds(
        world,
        federation,
        outcomes,
        selected,
        server=lambda o: {"ctx": o.ctx},
        kept=lambda o: {c: {"local": t} for c, t in o.kept.items()},
    )


@DTYPES
@pytest.mark.parametrize(("position", "theta"), [("end", 0.2), ("middle", 0.5), ("front", 0.9)])
def test_rounds_equal_the_reference(position, theta, dtype):
    assert_proven(world_of(dtype, position, theta=theta))


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    settings = {"local_epochs": epochs, "rounds": 2}
    assert_proven(world_of(dtype, settings=settings), [[0, 1, 2, 3, 4]] * 2)


@DTYPES
def test_loss_and_gradients_equal_the_reference(dtype):
    world = world_of(dtype)
    setup = world.setup()

    def exact(u, values, image, labels):
        renamed = {"global": values["ctx"], "local": values["local"]}
        return reference.loss_of(setup, renamed, image, labels, 0.4)

    down = {"ctx": 0.1 * drawn(5, 3, 32, seed=3, dtype=dtype)}
    own = {"local": 0.1 * drawn(5, 3, 32, seed=4, dtype=dtype)}
    assert_same_step(world, world.federation(), down, own, exact)


def test_features_by_hand():
    """(1 - theta) global + theta local, shorter than one: not normalised again."""
    world = world_of(theta=0.3)
    method = world.federation().method
    trained = {"ctx": drawn(2, 3, 32, seed=1), "local": drawn(2, 3, 32, seed=2)}
    text = method.text(trained, {})
    mixed = 0.7 * method.task.encode(trained["ctx"]) + 0.3 * method.task.encode(trained["local"])
    torch.testing.assert_close(text, mixed)
    assert text.norm(dim=-1).max() < 0.99
    image = world.clients[3].train[None, :4].expand(2, -1, -1)
    logits = method.logits(text, trained, {}, image)
    torch.testing.assert_close(logits, 8.0 * image @ mixed.mT)


def test_without_a_local_share_this_is_promptfl():
    federation = world_of(theta=0.0).federation()
    plain = World("promptfl", F64).federation()
    for f in (federation, plain):
        f.sample = lambda round_: SELECTED[round_]
    for _ in range(3):
        one, other = federation.round(), plain.round()
        assert_near(federation.server["ctx"], plain.server["ctx"], F64, "ctx")
        assert one["clients"] == other["clients"]


def test_with_the_local_prompt_alone_this_is_local_coop():
    federation = world_of(theta=1.0).federation()
    plain = World("local", F64).federation()
    # from a draw of its own
    plain.server["ctx"] = federation.method._initial().double()
    for f in (federation, plain):
        f.sample = lambda round_: SELECTED[round_]
    for _ in range(3):
        one, other = federation.round(), plain.round()
        assert one["clients"] == other["clients"]
        for c, state in plain.clients.items():
            assert_near(federation.clients[c]["local"], state["ctx"], F64, f"client {c}")


def test_the_two_prompts_start_apart():
    one, other = (world_of(settings={"seed": s}).federation() for s in (0, 1))
    local = one.method._initial()
    assert local.std() == pytest.approx(0.02, rel=0.3)
    assert (local - one.server["ctx"]).norm() > 0.1
    assert not torch.equal(local, other.method._initial())
    assert torch.equal(local, world_of().federation().method._initial())
    trained, _ = one.method.start(stack([one.server] * 2), {}, training=True)
    assert torch.equal(trained["local"], local.double().expand(2, -1, -1))


def test_the_global_prompt_travels():
    federation = world_of(F32).federation()
    federation.sampling.sample = lambda round_: [0, 2]
    row = federation.round()
    assert row["bytes_up"] == row["bytes_down"] == 2 * 3 * 32 * 4
    assert {c: set(s) for c, s in federation.clients.items()} == {0: {"local"}, 2: {"local"}}


def test_who_never_trained_answers_with_the_common_local_prompt():
    world = world_of()
    federation = world.federation()
    federation.sampling.sample = lambda round_: [0, 1, 2, 3]
    row = federation.round()
    values = {"global": federation.server["ctx"], "local": federation.method._initial().double()}
    logits = reference.logits_of(world.setup(), values, world.clients[4].test, 0.4)
    assert row["clients"][4] == rounds.accuracy_of(logits, world.clients[4].test_labels)


def test_options():
    assert check_options("promptfolio", {}) == {"theta": 0.2}
    for theta in (-0.1, 1.1):
        with pytest.raises(InputError, match="option theta is refused"):
            check_options("promptfolio", {"theta": theta})
