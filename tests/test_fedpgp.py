"""FedPGP against its literal reference, and its loss by hand."""

import math
import re
from dataclasses import replace

import pytest
import torch

import fastfpl
import fastfpl.methods.base
from fastfpl.errors import InputError
from fastfpl.methods import check_options, find_method
from fastfpl.methods.fedpgp import FedPGP
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import fedpgp as reference
from fastfpl.reference import rounds
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import score
from tests import proofs
from tests.proofs import (
    DTYPES,
    EVERYONE,
    F32,
    F64,
    assert_near,
    assert_same_rounds,
    assert_same_step,
    whole_rows,
)
from tests.worlds import NAMES, TINY_RUN, WORDS, World, batch_of, drawn, small_clip

one_thread = pytest.fixture(scope="module", autouse=True)(proofs.one_thread)

# strong enough that the contrastive term decides where prompts go
OPTIONS = {"bottleneck": 2, "mu": 3.0, "temperature": 0.25}
TEMPLATES = {"photo": "a photo of a {}.", "x": "X X X {}."}


@pytest.fixture(autouse=True)
def the_letter_x(monkeypatch):
    """The small tokenizer knows no X; "some" stands for it."""
    monkeypatch.setattr(
        "tests.worlds.Clip.tokenize",
        lambda self, texts: [
            [1 + WORDS.index(w.replace("X", "some")) for w in re.findall(r"\w+|[^\w\s]+", t)]
            for t in texts
        ],
    )


def world_of(dtype=F64, position="end", settings=None, **options):
    return World("fedpgp", dtype, position, {**OPTIONS, **options}, settings or {})


def guidance(world):
    o = FedPGP.Options(**world.options)
    return reference.Guidance(*whole_rows(world, TEMPLATES[o.reference]), o.mu, o.temperature)


def initial(federation):
    """The tensors that every client starts from, in float64."""
    first = {name: t.double() for name, t in federation.method._initial().items()}
    return federation.server["ctx"].double(), first["u"], first["v"]


def played(world, federation, selected, factors=None):
    plan = world.plan(selected[: world.config.rounds])
    return reference.fedpgp(
        world.setup(factors), world.clients, *initial(federation), plan, guidance(world)
    )


def assert_proven(world, federation, outcomes, selected):
    assert_same_rounds(
        world,
        federation,
        outcomes,
        selected,
        server=lambda o: {"ctx": o.sigma},
        kept=lambda o: o.kept,
    )


# --- against the reference ------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("position", "text"),
    [("end", "photo"), ("end", "x"), ("middle", "x"), ("front", "x")],
)
def test_rounds_equal_the_reference(position, text, dtype):
    world = world_of(dtype, position, reference=text)
    if text == "x" and position != "end":
        # X stand where the context stands: rows are what the layout says, with X in its slots
        layout = world.classes.layout(3)
        tokens = layout.tokens.scatter(1, layout.slots, 1 + WORDS.index("some"))
        given = reference.Guidance(tokens, layout.eot, OPTIONS["mu"], OPTIONS["temperature"])
    else:
        given = guidance(world)
    federation = world.federation()
    outcomes = reference.fedpgp(
        world.setup(), world.clients, *initial(federation), world.plan(EVERYONE), given
    )
    assert_proven(world, federation, outcomes, EVERYONE)


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    world = world_of(dtype, settings={"local_epochs": epochs, "rounds": 2})
    everyone = [list(range(5))] * 2
    federation = world.federation()
    assert_proven(world, federation, played(world, federation, everyone), everyone)


def test_schedules_equal_the_reference():
    world = world_of(settings={"schedule": "cosine", "local_epochs": 3, "rounds": 2})
    factors = [[(1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]] * 2
    federation = world.federation()
    assert_proven(world, federation, played(world, federation, EVERYONE, factors), EVERYONE)


@DTYPES
@pytest.mark.parametrize("text", ["photo", "x"])
def test_loss_and_gradients_equal_the_reference(text, dtype):
    world = world_of(dtype, reference=text)
    federation = world.federation()
    setup, given = world.setup(), guidance(world)
    own = {
        "u": 0.3 * drawn(5, 3, 2, seed=1, dtype=dtype),
        "v": drawn(5, 2, 32, seed=2, dtype=dtype),
    }

    def exact(u, values, image, labels):
        renamed = {"sigma": values["ctx"], "u": values["u"], "v": values["v"]}
        return reference.loss_of(setup, given, renamed, image, labels)

    down = {"ctx": 0.1 * drawn(5, 3, 32, seed=3, dtype=dtype)}
    assert_same_step(world, federation, down, own, exact)


def test_the_contrastive_term_of_the_proof_decides():
    """The pairs of the proof are neither equal nor saturated."""
    world = world_of()
    given = guidance(world)
    sigma, u, v = initial(world.federation())
    z0 = rounds.encode_tokens(world.tower, given.tokens, given.eot)
    layout = world.classes.layout(3)
    z_sigma, z = (
        reference.encode_text(world.tower, layout, ctx, False)
        for ctx in (0.1 * drawn(3, 32, seed=3), 0.1 * drawn(3, 32, seed=3) + drawn(3, 32, seed=4))
    )
    gap = ((z_sigma * z).sum(-1) - (z0 * z_sigma).sum(-1)) / given.temperature
    right = torch.sigmoid(-gap)
    assert right.min() > 0.02
    assert right.max() < 0.98
    assert sigma.std() == pytest.approx(0.02, rel=0.3)
    assert torch.cat((u.flatten(), v.flatten())).std() == pytest.approx(0.02, rel=0.3)


# --- by hand --------------------------------------------------------------------------------------


def by_hand(pairs, mu, temperature):
    """mu · mean over classes of -log(e^(p/t) / (e^(p/t) + e^(n/t)))."""
    terms = []
    for positive, negative in pairs:
        right, wrong = (math.exp(cosine / temperature) for cosine in (positive, negative))
        terms.append(-math.log(right / (right + wrong)))
    return mu * sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", [F32, F64, torch.float16])
@pytest.mark.parametrize(("mu", "temperature"), [(1.0, 1.0), (0.5, 0.5), (2.0, 0.05)])
def test_the_contrastive_term_by_hand(mu, temperature, dtype):
    # cosines of classes in the plane: reference, sigma and full features as angles
    angles = [(0.0, 60.0, 90.0), (0.0, 90.0, 90.0), (10.0, 10.0, 130.0)]
    pairs = [(math.cos(math.radians(b - a)), math.cos(math.radians(c - b))) for a, b, c in angles]

    def unit(k):
        rows = [(math.cos(math.radians(a[k])), math.sin(math.radians(a[k]))) for a in angles]
        return torch.tensor(rows, dtype=dtype)[None]

    method = world_of(mu=mu, temperature=temperature).federation().method
    text = torch.stack((unit(2), unit(1)), dim=1)
    image = unit(2)[:, :2]
    labels = torch.tensor([[2, 1]])
    batch = batch_of(image, labels)
    loss = method.loss(text, {}, {"reference": unit(0)}, batch)
    # image 0 is as near to class 0 as to class 1; image 1 the same: logits 8, 8, 8 cos 40
    answer = math.log(2 * math.exp(8) + math.exp(8 * math.cos(math.radians(40))))
    entropy = answer - (8 * math.cos(math.radians(40)) + 8) / 2
    rel = 2e-3 if dtype == torch.float16 else 1e-5
    assert loss.item() == pytest.approx(entropy + by_hand(pairs, mu, temperature), rel=rel)
    plain = method.loss(text, {}, {}, batch)
    assert plain.item() == pytest.approx(entropy, rel=rel)


def test_one_pair_by_hand():
    """Cosines 1/2 and 0 at t = 1/2: -log(e / (e + 1)) = 0.313261688."""
    assert by_hand([(0.5, 0.0)], 1.0, 0.5) == pytest.approx(0.313261687518)
    assert by_hand([(0.3, 0.3)] * 4, 2.0, 0.5) == pytest.approx(2 * math.log(2))


def test_the_contrastive_term_pulls_sigma_to_the_reference_and_pushes_the_rest_away():
    def cosines(mu):
        world = world_of(mu=mu, settings={"lr": 0.1, "weight_decay": 0.0, "rounds": 6})
        federation = world.federation()
        method = federation.method
        # where z equals z_sigma their cosine has no slope: start apart
        first = {name: 15 * t for name, t in method._initial().items()}
        method._initial = lambda: first
        for _ in range(6):
            federation.round()
        down = stack([federation.server] * 5)
        own = stack([federation.clients[c] for c in range(5)])
        trained, _ = method.start(down, own, training=False)
        z, z_sigma = method.text(trained, {"reference": method._reference()}).unbind(1)
        return (z_sigma * method._reference()).sum(-1).mean(), (z * z_sigma).sum(-1).mean()

    (plain, apart), (pulled, pushed) = cosines(0.0), cosines(20.0)
    assert pulled > plain + 0.05
    assert pushed < apart - 0.05


# --- what travels, what stays ---------------------------------------------------------------------


def test_sigma_travels_and_u_v_stay():
    world = world_of(F32)
    federation = world.federation()
    row = federation.round()
    assert row["selected"] == [0, 1, 2, 3, 4]
    assert row["bytes_up"] == row["bytes_down"] == 5 * 3 * 32 * 4
    assert set(federation.clients) == set(range(5))
    for state in federation.clients.values():
        assert {n: tuple(t.shape) for n, t in state.items()} == {"u": (3, 2), "v": (2, 32)}


def test_everybody_trains_first():
    federation = world_of(F32, settings={"participation": 0.4}).federation()
    assert [len(federation.round()["selected"]) for _ in range(3)] == [5, 2, 2]


def test_who_never_trained_answers_with_the_common_u_v():
    world = world_of()
    federation = world.federation()
    method = federation.method
    trained, fixed = method.start(stack([federation.server] * 2), {}, training=False)
    _, u, v = initial(federation)
    for c in range(2):
        assert torch.equal(trained["u"][c], u)
        assert torch.equal(trained["v"][c], v)
    assert fixed == {}
    # text and logits are those of sigma + U V
    ctx = federation.server["ctx"] + u @ v
    text = method.text(trained, fixed)
    torch.testing.assert_close(text[:, 0], method.task.encode(ctx).expand(2, -1, -1))
    image = world.clients[3].train[None].expand(2, -1, -1)
    logits = method.logits(text, trained, fixed, image)
    torch.testing.assert_close(logits[1], 8.0 * image[0] @ text[0, 0].T)


def test_initial_values_are_drawn_once_for_all():
    one, other = (world_of(settings={"seed": s}).federation() for s in (0, 1))
    again = world_of().federation()
    for name in ("u", "v"):
        assert torch.equal(one.method._initial()[name], again.method._initial()[name])
        assert not torch.equal(one.method._initial()[name], other.method._initial()[name])


def test_a_rank_of_the_whole_width_can_be_any_change():
    """r is only a limit: at r = T the change U V of a client can be any matrix."""
    federation = world_of(bottleneck=3).federation()
    wanted = drawn(3, 32, seed=8)
    own = {"u": torch.eye(3, dtype=F64)[None], "v": wanted[None]}
    trained, _ = federation.method.start(stack([federation.server]), own, training=False)
    text = federation.method.text(trained, {})
    exact = federation.method.task.encode(federation.server["ctx"] + wanted)
    torch.testing.assert_close(text[0, 0], exact)


# --- passes of the text tower ---------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    seen = []
    encode = fastfpl.methods.base.encode_text

    def spy(tower, layout, ctx):
        seen.append((tuple(ctx.shape), len(layout.tokens)))
        return encode(tower, layout, ctx)

    monkeypatch.setattr(fastfpl.methods.base, "encode_text", spy)
    return seen


def test_two_passes_a_step_and_one_reference(passes):
    federation = world_of(F32, settings={"local_epochs": 1, "batch_size": 3}).federation()
    federation.sampling.sample = lambda round_: [0, 2]
    federation.round()
    # the four words once, then steps of both clients together; client 0 has one step, 2 has three
    training = [((1, 4, 32), 6), ((2, 2, 3, 32), 6), *[((1, 2, 3, 32), 6)] * 2]
    assert passes[:4] == training
    # evaluations encode the personal prompt alone
    assert {shape for shape, _ in passes[4:]} == {(2, 1, 3, 32), (3, 1, 3, 32)}


def test_without_the_term_nothing_is_encoded_for_it(passes):
    world = world_of(F64, mu=0.0)
    federation = world.federation()
    outcomes = played(world, federation, EVERYONE)
    assert_proven(world, federation, outcomes, EVERYONE)
    assert all(shape[1] == 1 for shape, _ in passes)


@pytest.mark.parametrize(("text", "words"), [("photo", "a photo of a"), ("x", "X X X")])
def test_the_reference_is_the_sentence(text, words):
    world = world_of(reference=text)
    method = world.federation().method
    tokens, eot = whole_rows(world, words + " {}.")
    exact = rounds.encode_tokens(world.tower, tokens, eot)
    assert_near(method._reference(), exact, F64, "reference")
    assert exact.shape == (len(NAMES), world.tower.dim)


def test_the_reference_needs_its_words_before_the_name():
    for position in ("middle", "front"):
        with pytest.raises(InputError, match="position must be 'end' for fedpgp with reference="):
            world_of(position=position).federation()
        world_of(position=position, mu=0.0).federation()


# --- other classes --------------------------------------------------------------------------------


def test_states_answer_over_other_classes():
    """Base to novel: the same sigma, U and V under new names, with a reference of their own."""
    world = world_of(F64)
    federation = world.federation()
    for _ in range(2):
        federation.round()
    names = ("some", "owl", "photo")
    novel = federation.method.on(ClassPrompts(world.clip, names))
    assert isinstance(novel, FedPGP)
    assert novel.options == federation.method.options
    twin = replace(world)
    twin.classes = novel.task.classes
    clients = range(5)
    images = {c: federation.shards[c].test for c in clients}
    down = stack([federation.server] * 5)
    own = stack([federation.clients[c] for c in clients])
    scores = score(novel, clients, down, own, federation.examiner.exams[0].feed, images)
    setup = twin.setup()
    for c in clients:
        values = {"sigma": federation.server["ctx"], **federation.clients[c]}
        logits = reference.logits_of(setup, values, world.clients[c].test)
        assert scores[c].answers.tolist() == logits.argmax(-1).tolist()
        assert logits.shape[1] == 3
    # neither method knows the other's reference
    for method, who in ((novel, twin), (federation.method, world)):
        tokens, eot = whole_rows(who, TEMPLATES["photo"])
        exact = rounds.encode_tokens(world.tower, tokens, eot)
        assert_near(method._reference(), exact, F64, "reference")


def test_a_run_from_base_to_novel(tmp_path):
    settings = {**TINY_RUN, "partition": "iid", "scenario": "base-to-novel"}
    result = fastfpl.run("fedpgp", model=small_clip(), cache=tmp_path, **settings)
    exams = result.rounds[-1]["exams"]
    assert set(exams) == {"local", "base", "novel"}
    assert all(len(exam["clients"]) == 4 for exam in exams.values())
    assert len({tuple(exam["clients"]) for exam in exams.values()}) == 3
    assert result.settings["options"] == check_options("fedpgp", {})


# --- options --------------------------------------------------------------------------------------


def test_default_options_are_the_released_scripts():
    assert check_options("fedpgp", {}) == {
        "bottleneck": 8,
        "mu": 0.5,
        "temperature": 0.5,
        "reference": "photo",
    }
    assert find_method("fedpgp").all_first


@pytest.mark.parametrize(
    "options", [{"bottleneck": 0}, {"mu": -1.0}, {"temperature": 0.0}, {"reference": "words"}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(InputError, match=f"option {next(iter(options))} is refused"):
        check_options("fedpgp", options)
