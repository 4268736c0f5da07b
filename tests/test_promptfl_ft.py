"""PromptFL with fine-tuning against its literal reference."""

import math

import pytest
import torch

from fastfpl.errors import InputError
from fastfpl.methods import check_options
from fastfpl.reference import promptfl_ft as reference
from fastfpl.seeds import generator
from fastfpl.training.gathering import stack, unstack
from tests import proofs
from tests.proofs import DTYPES, F32, F64, SELECTED, assert_near
from tests.worlds import SIZES, World

one_thread = pytest.fixture(scope="module", autouse=True)(proofs.one_thread)


def world_of(dtype=F64, position="end", settings=None, epochs=3):
    return World("promptfl-ft", dtype, position, {"epochs": epochs}, settings or {})


def tuning_of(world, round_):
    """Say in which order every client sees its images before an evaluation."""
    plan = {}
    for c, count in enumerate(SIZES):
        epochs = []
        for epoch in range(world.options["epochs"]):
            draw = generator(world.config.seed, "tune", round_, c, epoch)
            order = torch.randperm(count, generator=draw)
            whole = [order[i : i + 4] for i in range(0, count - 3, 4)]
            epochs.append(whole or [order])
        plan[c] = epochs
    return plan


def played(world, federation, selected, factors=None, tuned=None):
    count = world.config.rounds
    return reference.promptfl_ft(
        world.setup(factors),
        world.clients,
        federation.server["ctx"].double(),
        world.plan(selected[:count]),
        [tuning_of(world, t) for t in range(count)],
        tuned or [[1.0] * world.options["epochs"]] * count,
    )


def assert_proven(world, selected=SELECTED, **factors):
    federation = world.federation()
    outcomes = played(world, federation, selected, **factors)
    federation.sampling.sample = lambda round_: selected[round_]
    ask, asked = federation.trainer.tuned, []

    def spy(members, down, own, round_):
        owns = ask(members, down, own, round_)
        asked[-1] |= dict(zip(members, unstack(owns, len(members)), strict=True))
        return owns

    federation.trainer.tuned = spy
    for t, exact in enumerate(outcomes):
        asked.append({})
        row = federation.round()
        assert_near(federation.server["ctx"], exact.ctx, world.dtype, f"round {t}, ctx")
        assert set(asked[t]) == set(exact.kept)
        for c, tuned in exact.kept.items():
            assert_near(asked[t][c]["tuned"], tuned, world.dtype, f"round {t}, tuned {c}")
            assert (tuned - exact.ctx).norm() > 0.01
        losses = [exact.losses[c] for c in sorted(exact.losses)]
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert row["clients"] == exact.accuracy
        assert row["selected"] == selected[t]
    assert len({tuple(o.accuracy) for o in outcomes}) > 1


@DTYPES
@pytest.mark.parametrize("position", ["end", "middle"])
def test_rounds_equal_the_reference(position, dtype):
    assert_proven(world_of(dtype, position))


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    settings = {"local_epochs": epochs, "rounds": 2}
    # rounding grows with every epoch at this rate: the long fine-tuning is proven in float64
    tuned = 4 if dtype == F64 else 2
    assert_proven(world_of(dtype, settings=settings, epochs=tuned), [[0, 1, 2, 3, 4]] * 2)


def test_schedules_equal_the_reference():
    """A cosine runs over the epochs of the fine-tuning, not over the round's."""
    world = world_of(settings={"schedule": "cosine", "local_epochs": 2, "rounds": 2}, epochs=3)

    def cosine(epochs):
        return [[(1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs)]] * 2

    assert_proven(world, factors=cosine(2), tuned=cosine(3))


def test_the_rounds_are_promptfls():
    federation, plain = world_of(F32).federation(), World("promptfl", F32).federation()
    for f in (federation, plain):
        f.sample = lambda round_: SELECTED[round_]
    for _ in range(4):
        one, other = federation.round(), plain.round()
        torch.testing.assert_close(federation.server["ctx"], plain.server["ctx"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["bytes_up"] == other["bytes_up"]
        assert one["bytes_down"] == other["bytes_down"]
        assert one["clients"] != other["clients"]


@pytest.mark.parametrize("evaluate_every", [2, 4])
def test_evaluations_leave_the_rounds_alone(evaluate_every):
    rare = world_of(F32, settings={"evaluate_every": evaluate_every}).federation()
    often = world_of(F32).federation()
    for f in (rare, often):
        f.sample = lambda round_: SELECTED[round_]
    rows = [(rare.round(), often.round()) for _ in range(4)]
    assert torch.equal(rare.server["ctx"], often.server["ctx"])
    for one, other in rows:
        assert one["loss"] == other["loss"]
        assert one["clients"] in ([], other["clients"])


def test_more_epochs_move_further():
    far = []
    for epochs in (1, 3, 9):
        federation = world_of(F64, epochs=epochs).federation()
        down = stack([federation.method.download(federation.server, c, 0) for c in range(5)])
        tuned = federation.trainer.tuned(list(range(5)), down, {}, 0)
        far.append((tuned["tuned"] - federation.server["ctx"]).norm().item())
    assert far == sorted(far)
    assert far[2] > 2 * far[0]


def test_without_a_tuned_context_the_merged_one_answers():
    method = world_of().federation().method
    down = stack([{"ctx": torch.ones(3, 32)}])
    for training in (True, False):
        trained, fixed = method.start(down, {}, training=training)
        assert torch.equal(trained["ctx"], down["ctx"])
        assert fixed == {}
    own = {"tuned": torch.zeros(1, 3, 32)}
    assert torch.equal(method.start(down, own, training=True)[0]["ctx"], down["ctx"])
    assert torch.equal(method.start(down, own, training=False)[0]["ctx"], own["tuned"])


def test_options():
    assert check_options("promptfl-ft", {}) == {"epochs": 5}
    with pytest.raises(InputError, match="option epochs is refused"):
        check_options("promptfl-ft", {"epochs": 0})
