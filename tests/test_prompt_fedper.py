"""PromptFL with FedPer's split against its literal reference, and its two ends."""

import pytest
import torch

from fastfpl.errors import InputError
from fastfpl.methods import check_options
from fastfpl.reference import prompt_fedper as reference
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
    return World("prompt-fedper", dtype, position, options, settings or {})


def assert_proven(world, selected=SELECTED, *, personal):
    federation = world.federation()
    ctx = federation.method.task.initial_ctx().double()
    outcomes = reference.prompt_fedper(
        world.setup(), world.clients, ctx, world.plan(selected), personal=personal
    )
    assert_same_rounds(
        world,
        federation,
        outcomes,
        selected,
        server=lambda o: {"ctx": o.ctx},
        kept=lambda o: {c: {"personal": t} for c, t in o.kept.items()},
    )


@DTYPES
@pytest.mark.parametrize(
    ("personal", "position"), [(1, "end"), (2, "end"), (1, "middle"), (2, "front")]
)
def test_rounds_equal_the_reference(personal, position, dtype):
    assert_proven(world_of(dtype, position, personal=personal), personal=personal)


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    settings = {"local_epochs": epochs, "rounds": 2}
    assert_proven(world_of(dtype, settings=settings), [[0, 1, 2, 3, 4]] * 2, personal=1)


@DTYPES
def test_loss_and_gradients_equal_the_reference(dtype):
    world = world_of(dtype, personal=2)
    setup = world.setup()

    def exact(u, values, image, labels):
        renamed = {"shared": values["ctx"], "personal": values["personal"]}
        return reference.loss_of(setup, renamed, image, labels)

    down = {"ctx": 0.1 * drawn(5, 1, 32, seed=3, dtype=dtype)}
    own = {"personal": 0.1 * drawn(5, 2, 32, seed=4, dtype=dtype)}
    assert_same_step(world, world.federation(), down, own, exact)


def test_shared_vectors_come_first():
    world = world_of(personal=1)
    federation = world.federation()
    whole = federation.method.task.initial_ctx().double()
    assert torch.equal(federation.server["ctx"], whole[:2])
    trained, fixed = federation.method.start(stack([federation.server]), {}, training=True)
    assert torch.equal(trained["personal"], whole[None, 2:])
    text = federation.method.text(trained, fixed)
    torch.testing.assert_close(text[0], federation.method.task.encode(whole))


@pytest.mark.parametrize(("n_ctx", "kept"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_half_of_the_vectors_stay_by_default(n_ctx, kept):
    world = World("prompt-fedper", F32, n_ctx=n_ctx)
    federation = world.federation()
    federation.sampling.sample = lambda round_: [0, 2]
    row = federation.round()
    assert federation.server["ctx"].shape == (n_ctx - kept, 32)
    assert row["bytes_up"] == row["bytes_down"] == 2 * (n_ctx - kept) * 32 * 4
    assert set(federation.clients) == {0, 2}
    assert federation.clients[0]["personal"].shape == (kept, 32)


def test_without_personal_vectors_this_is_promptfl():
    world = world_of(personal=0)
    federation, plain = world.federation(), World("promptfl", F64).federation()
    for f in (federation, plain):
        f.sample = lambda round_: SELECTED[round_]
    for _ in range(3):
        one, other = federation.round(), plain.round()
        assert_near(federation.server["ctx"], plain.server["ctx"], F64, "ctx")
        assert one["clients"] == other["clients"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_with_all_vectors_personal_this_is_local_coop():
    world = world_of(personal=3)
    federation, plain = world.federation(), World("local", F64).federation()
    # the library draws the common context in float32
    assert torch.equal(federation.method.task.initial_ctx().double(), plain.server["ctx"])
    for f in (federation, plain):
        f.sample = lambda round_: SELECTED[round_]
    for _ in range(3):
        one, other = federation.round(), plain.round()
        assert federation.server["ctx"].shape == (0, 32)
        assert one["bytes_up"] == 0
        assert one["clients"] == other["clients"]
        for c, state in plain.clients.items():
            assert_near(federation.clients[c]["personal"], state["ctx"], F64, f"client {c}")


def test_who_never_trained_answers_with_the_common_vectors():
    world = world_of(personal=1)
    federation = world.federation()
    federation.sampling.sample = lambda round_: [0, 1, 2, 3]
    row = federation.round()
    whole = torch.cat((federation.server["ctx"], federation.method.task.initial_ctx()[2:].double()))
    logits = rounds.logits_of(world.setup(), whole, world.clients[4].test)
    assert row["clients"][4] == rounds.accuracy_of(logits, world.clients[4].test_labels)


def test_options():
    assert check_options("prompt-fedper", {}) == {"personal": None}
    with pytest.raises(InputError, match="option personal is refused"):
        check_options("prompt-fedper", {"personal": -1})
    with pytest.raises(InputError, match="personal must be at most n_ctx=3; got 4"):
        world_of(personal=4).federation()
