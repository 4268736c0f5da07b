"""FedTPG against its literal reference, its attention against torch's, and its symmetries."""

import pytest
import torch
from torch.nn import functional as F

from fastfpl.errors import InputError
from fastfpl.methods import check_options
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import fedtpg as reference
from fastfpl.reference import rounds
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import score
from tests import proofs
from tests.proofs import (
    DTYPES,
    F32,
    F64,
    SELECTED,
    assert_near,
    assert_same_rounds,
    assert_same_step,
    whole_rows,
)
from tests.worlds import World, drawn

one_thread = pytest.fixture(scope="module", autouse=True)(proofs.one_thread)

SHARED_KEY = "b_k"  # moves all scores of a query alike: its gradient is rounding


def world_of(dtype=F64, position="end", settings=None, **options):
    return World("fedtpg", dtype, position, {"heads": 2, "widening": 1, **options}, settings or {})


def names_of(world):
    return reference.Names(*whole_rows(world, "{}"), world.options["heads"])


def wide(state):
    return {name: tensor.double() for name, tensor in state.items()}


def assert_proven(world, selected=SELECTED):
    federation = world.federation()
    begin = federation.server
    outcomes = reference.fedtpg(
        world.setup(), world.clients, wide(begin), world.plan(selected), names_of(world)
    )

    def server(outcome):
        return {name: t for name, t in outcome.net.items() if name != SHARED_KEY}

    assert_same_rounds(
        world,
        federation,
        outcomes,
        selected,
        server=server,
        kept=lambda o: {},
        moved_by=("query", 0.1),
    )
    assert set(federation.server) == set(outcomes[-1].net)
    assert federation.server[SHARED_KEY].abs().max() < 1e-6


# rounds of larger steps, which the generator turns into larger ones, amplify rounding
SLOW = {"lr": 0.002}


@DTYPES
@pytest.mark.parametrize(("position", "heads"), [("end", 2), ("middle", 4), ("front", 1)])
def test_rounds_equal_the_reference(position, heads, dtype):
    assert_proven(world_of(dtype, position, SLOW, heads=heads))


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    settings = {**SLOW, "local_epochs": epochs, "rounds": 2}
    assert_proven(world_of(dtype, settings=settings, widening=2), [[0, 1, 2, 3, 4]] * 2)


@DTYPES
def test_loss_and_gradients_equal_the_reference(dtype):
    world = world_of(dtype)
    federation = world.federation()
    setup, names = world.setup(), names_of(world)

    def exact(u, values, image, labels):
        return reference.loss_of(setup, names, values, image, labels)

    down = {
        name: torch.stack([t + 0.05 * drawn(*t.shape, seed=u, dtype=dtype) for u in range(5)])
        for name, t in federation.server.items()
    }
    assert_same_step(world, federation, down, {}, exact, vanishing=(SHARED_KEY,))


def test_the_attention_is_torchs():
    method = world_of(heads=4).federation().method
    net = {name: t[None].double() for name, t in method.server_init().items()}
    net |= {name: drawn(1, *t.shape[1:], seed=i) for i, (name, t) in enumerate(net.items())}
    names = drawn(1, 6, 16, seed=99)
    layer = torch.nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True).double()
    one = {name: t[0] for name, t in net.items()}
    layer.load_state_dict(
        {
            "q_proj_weight": one["w_q"],
            "k_proj_weight": one["w_k"],
            "v_proj_weight": one["w_v"],
            "in_proj_bias": torch.cat((one["b_q"], one["b_k"], one["b_v"])),
            "out_proj.weight": one["w_o"],
            "out_proj.bias": one["b_o"],
        }
    )
    query = F.layer_norm(one["query"], (32,), one["ln_query_w"], one["ln_query_b"])
    seen = F.layer_norm(names[0], (16,), one["ln_names_w"], one["ln_names_b"])
    x, weight = layer(query, seen, seen)
    assert 0.2 < weight.max(dim=-1).values.mean() < 0.99
    hidden = F.linear(F.layer_norm(x, (32,), one["ln_x_w"], one["ln_x_b"]), one["w_1"], one["b_1"])
    a, b = hidden.chunk(2, dim=-1)
    wanted = x + F.linear(a * F.gelu(b), one["w_2"], one["b_2"])
    torch.testing.assert_close(method.context(net, names)[0], wanted)


def test_layers_are_drawn_as_torch_draws_them():
    states = [world_of(settings={"seed": s}).federation().method.server_init() for s in (0, 0, 1)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        if name in ("query", "w_q", "w_k", "w_v", "w_o", "w_1", "b_1", "w_2", "b_2"):
            assert not torch.equal(tensor, states[2][name])
            assert tensor.mean().abs() < 3 * tensor.std() / tensor.numel() ** 0.5
        else:
            assert torch.equal(
                tensor,
                torch.full_like(tensor, float(name.startswith("ln_") and name.endswith("_w"))),
            )
    drawn_ = states[0]
    assert drawn_["query"].std() == pytest.approx(0.02, rel=0.3)
    attention = torch.nn.MultiheadAttention(32, 2, kdim=16, vdim=16)
    pairs = [
        ("w_q", attention.q_proj_weight),
        ("w_k", attention.k_proj_weight),
        ("w_v", attention.v_proj_weight),
        ("w_o", attention.out_proj.weight),
        ("w_1", torch.nn.Linear(32, 64).weight),
        ("b_1", torch.nn.Linear(32, 64).bias),
        ("w_2", torch.nn.Linear(32, 32).weight),
    ]
    for name, layer in pairs:
        assert drawn_[name].shape == layer.shape, name
        # of uniform numbers the largest is near the bound
        assert drawn_[name].abs().max() == pytest.approx(layer.abs().max().item(), rel=0.1), name


def test_the_order_of_classes_does_not_matter():
    world = world_of()
    federation = world.federation()
    method = federation.method
    turned = method.on(ClassPrompts(world.clip, world.classes.names[::-1]))
    down = stack([federation.server])
    trained, fixed = method.start(down, {}, training=False)
    other = turned.start(down, {}, training=False)
    text, mirror = method.text(trained, fixed), turned.text(*other)
    torch.testing.assert_close(text, mirror.flip(1))


def test_states_answer_over_other_classes():
    world = world_of()
    federation = world.federation()
    for _ in range(2):
        federation.round()
    novel = federation.method.on(ClassPrompts(world.clip, ("some", "owl", "photo")))
    world.classes = novel.task.classes
    images = {c: federation.shards[c].test for c in range(5)}
    down = stack([federation.server])
    scores = score(novel, range(5), down, {}, federation.examiner.exams[0].feed, images)
    for c in range(5):
        logits = reference.logits_of(
            world.setup(), names_of(world), federation.server, world.clients[c].test
        )
        assert scores[c].answers.tolist() == logits.argmax(-1).tolist()
    # the class list decides the context
    contexts = [m.start(down, {}, training=False) for m in (federation.method, novel)]
    one, other = (novel.context(trained, fixed["names"]) for trained, fixed in contexts)
    assert (one - other).norm() > 0.01 * one.norm()


def test_names_are_encoded_bare():
    world = world_of()
    method = world.federation().method
    tokens, eot = whole_rows(world, "{}")
    assert_near(method._names(), rounds.encode_tokens(world.tower, tokens, eot), F64, "names")


def test_the_whole_generator_travels():
    federation = world_of(F32).federation()
    federation.sampling.sample = lambda round_: [0, 2]
    row = federation.round()
    size = sum(t.numel() * 4 for t in federation.server.values())
    assert row["bytes_up"] == row["bytes_down"] == 2 * size
    assert federation.clients == {}


def test_options():
    assert check_options("fedtpg", {}) == {"heads": 4, "widening": 4}
    for options in ({"heads": 0}, {"widening": 0}):
        with pytest.raises(InputError, match=f"option {next(iter(options))} is refused"):
            check_options("fedtpg", options)
    with pytest.raises(InputError, match="heads must divide the text width 32; got 3"):
        world_of(heads=3).federation()


def test_words_for_a_generated_context_are_refused():
    task = world_of().federation().method.task
    kind = type(world_of().federation().method)
    with pytest.raises(InputError, match="ctx_init must be left out for fedtpg"):
        kind(task.__class__(**{**task.__dict__, "ctx_init": "a photo of a"}))
