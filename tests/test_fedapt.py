"""FedAPT against its literal reference, its hand-made cases, and its grouped inference."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastfpl
import fastfpl.federation.preparation
import fastfpl.methods.fedapt as module
from fastfpl.config import make_settings
from fastfpl.data import Dataset, Split, load_dataset
from fastfpl.federation.preparation import prepare
from fastfpl.methods import check_options
from fastfpl.methods.fedapt import key_weights
from fastfpl.prompts import ClassPrompts
from fastfpl.reference import fedapt as reference
from fastfpl.training.gathering import stack
from tests.worlds import NAMES, SIZES, World, batch_of, drawn, small_clip

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
RELATIVE = {F32: 1e-5, F64: 1e-12}
SELECTED = [[0, 1, 3], [0, 2, 4], [1, 2, 3]]
# two domains, or one a client
DOMAINS = {"domains": (1, 0, 1, 0, 1), "clients": None}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class RawWorld(World):
    """A world whose images are as a tower gives them: each of a length of its own."""

    of = "domains"

    def __init__(self, *args, of="domains", **more):
        self.of = of
        super().__init__(*args, **more)
        for u, client in enumerate(self.clients):
            sides = {
                side: getattr(client, side) * self.lengths(len(getattr(client, side)), 10 * u + k)
                for k, side in enumerate(("train", "test"))
            }
            self.clients[u] = replace(client, **sides)

    @staticmethod
    def lengths(count, seed):
        return (1 + 3 * drawn(count, 1, seed=900 + seed).abs()).float().double()

    @property
    def client_domains(self):
        return DOMAINS["domains"]

    def federation(self):
        federation = super().federation()
        if DOMAINS[self.of] is None:
            task = replace(federation.method.task, client_domains=None)
            method = type(federation.method)(task, self.options)
            federation.trainer.method = method
            examiner = federation.examiner
            examiner.exams = [replace(exam, method=method) for exam in examiner.exams]
            server = {
                n: t.to(self.dtype) if t.is_floating_point() else t
                for n, t in method.server_init().items()
            }
            federation.now = replace(federation.now, server=server)
        return federation

    @property
    def key_of(self):
        """Which key each client has."""
        return DOMAINS[self.of] or tuple(range(len(self.sizes)))


def world_of(dtype=F64, *, method="fedapt", of="domains", position="end", options=(), **settings):
    return RawWorld(
        method,
        dtype,
        position,
        options={"temperature": 0.4, **dict(options)},
        settings={"lr": 0.05, **settings},
        of=of,
    )


def assert_near(result, exact, dtype, name):
    assert result.dtype == dtype, name
    scale = exact.abs().max()
    assert scale > 0, name
    off = ((result.double() - exact).abs().max() / scale).item()
    assert off <= RELATIVE[dtype], f"{name}: off by {off:.2e} of {scale:.2e}"


def played(world, federation, selected=SELECTED):
    """Let the reference play the rounds."""
    return reference.fedapt(
        world.setup(),
        world.clients,
        world.key_of,
        federation.server["ctx"].double(),
        federation.server["query"].double(),
        federation.method.keys.double(),
        world.plan(selected[: world.config.rounds]),
        federation.method.options.temperature,
    )


# --- against the reference ------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("of", "position", "specific"),
    [
        ("domains", "end", True),
        ("domains", "middle", False),
        ("clients", "front", True),
        ("clients", "end", False),
    ],
)
def test_rounds_equal_the_reference(of, position, specific, dtype):
    options = {"class_specific": specific}
    world = world_of(dtype, of=of, position=position, options=options, rounds=3)
    federation = world.federation()
    begin = {n: federation.server[n].clone() for n in ("ctx", "query")}
    keys = federation.method.keys.clone()
    outcomes = played(world, federation)
    federation.sampling.sample = lambda round_: SELECTED[round_]
    for t, exact in enumerate(outcomes):
        row = federation.round()
        assert_near(federation.server["ctx"], exact.ctx, dtype, f"round {t}, ctx")
        assert_near(federation.server["query"], exact.query, dtype, f"round {t}, query")
        losses = list(exact.losses.values())
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert row["clients"] == exact.accuracy
    # the proof is worth nothing if nothing moved
    for name, tensor in begin.items():
        assert (getattr(outcomes[-1], name) - tensor).norm() > 0.2 * tensor.norm()
    assert len({tuple(o.accuracy) for o in outcomes}) > 1
    assert torch.equal(federation.method.keys, keys)
    assert federation.clients == {}


@DTYPES
@pytest.mark.parametrize("epochs", [1, 2])
def test_local_epochs_equal_the_reference(epochs, dtype):
    world = world_of(dtype, local_epochs=epochs, rounds=1)
    federation = world.federation()
    everyone = [list(range(len(SIZES)))]
    (exact,) = played(world, federation, everyone)
    federation.sampling.sample = lambda round_: everyone[round_]
    row = federation.round()
    assert_near(federation.server["ctx"], exact.ctx, dtype, "ctx")
    assert_near(federation.server["query"], exact.query, dtype, "query")
    assert row["clients"] == exact.accuracy


def leaves_of(world, federation, spread=0.1):
    """Give every client a context and a query of its own; return them and what is downloaded."""
    count = len(world.clients)
    downs = [federation.method.download(federation.server, c, 0) for c in range(count)]
    down = stack(downs)
    for n, (name, dtype) in enumerate((("ctx", world.dtype), ("query", world.dtype))):
        down[name] = (spread * drawn(*down[name].shape, seed=7 + n)).to(dtype)
    return down


@DTYPES
@pytest.mark.parametrize("specific", [True, False])
@pytest.mark.parametrize("of", DOMAINS)
def test_loss_and_gradients_equal_the_reference(of, specific, dtype):
    world = world_of(dtype, of=of, options={"class_specific": specific})
    federation = world.federation()
    method = federation.method
    down = leaves_of(world, federation)
    trained, fixed = method.start(down, {}, training=True)
    leaves = {n: t.clone().requires_grad_() for n, t in trained.items()}
    size, width = 4, world.tower.dim
    image = torch.zeros(len(SIZES), size, width, dtype=dtype)
    labels = torch.zeros(len(SIZES), size, dtype=torch.int64)
    mask = torch.zeros(len(SIZES), size, dtype=torch.bool)
    for u, client in enumerate(world.clients):
        n = min(size, SIZES[u])
        image[u, :n], labels[u, :n], mask[u, :n] = client.train[:n], client.train_labels[:n], True
        image[u, n:] = image[u, 0]  # what stands in a masked place must not count
    text = method.text(leaves, fixed)
    loss = method.loss(text, leaves, fixed, batch_of(image, labels, mask))
    grads = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
    for u, client in enumerate(world.clients):
        mine = {n: t[u].double().requires_grad_() for n, t in trained.items()}
        n = min(size, SIZES[u])
        exact = reference.loss_of(
            world.setup(),
            mine["ctx"],
            mine["query"],
            method.keys.double(),
            world.key_of[u],
            client.train[:n],
            client.train_labels[:n],
        )
        assert_near(loss[u], exact.detach(), dtype, f"client {u}, loss")
        wanted = torch.autograd.grad(exact, list(mine.values()))
        for name, gradient in zip(mine, wanted, strict=True):
            assert_near(grads[name][u], gradient, dtype, f"client {u}, gradient of {name}")


# --- weights of the keys --------------------------------------------------------------------------


def test_weights_by_hand():
    # mean 2, unbiased variance 1: standardised (-1, 0, 1)
    e = [math.exp(-1 / 0.5), 1.0, math.exp(1 / 0.5)]
    wanted = torch.tensor([x / sum(e) for x in e], dtype=F64)
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    torch.testing.assert_close(key_weights(scores, 0.5), wanted, rtol=1e-14, atol=0)
    # of two keys the standardised scores are always 1/sqrt(2) and -1/sqrt(2)
    two = key_weights(torch.tensor([[0.1, 7.0], [5.0, 4.0]], dtype=F64), 1.0)
    share = 1 / (1 + math.exp(-math.sqrt(2)))
    wanted = torch.tensor([[1 - share, share], [share, 1 - share]], dtype=F64)
    torch.testing.assert_close(two, wanted, rtol=1e-14, atol=0)


def test_weights_do_not_depend_on_the_scores_scale_and_offset():
    scores = drawn(20, 6, seed=1)
    one = key_weights(scores, 0.3)
    torch.testing.assert_close(key_weights(1000 * scores - 50, 0.3), one, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(one.sum(-1), torch.ones(20, dtype=F64))
    assert torch.equal(one.argmax(-1), scores.argmax(-1))
    exact = torch.stack([reference.key_weights(s, 0.3) for s in scores])
    torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [F32, F64, torch.float16])
@pytest.mark.parametrize(
    "scores",
    [[0.1] * 3, [0.0] * 4, [-7.3] * 6, [3.0], [1e-3, 1e-3]],
    ids=["equal", "zero", "six", "one", "two"],
)
def test_equal_scores_give_equal_weights(scores, dtype):
    for temperature in (0.01, 1.0):
        weights = key_weights(torch.tensor([scores], dtype=dtype), temperature)
        wanted = torch.full_like(weights, 1 / len(scores))
        torch.testing.assert_close(weights, wanted)
        one = reference.key_weights(torch.tensor(scores, dtype=dtype), temperature)
        torch.testing.assert_close(one, wanted[0])


def test_two_equal_winners_share():
    weights = key_weights(torch.tensor([2.0, 1.0, 2.0], dtype=F64), 0.01)
    assert weights[0] == weights[2] == 0.5
    assert weights[1] < 1e-30


def test_towards_zero_temperature_one_key_is_chosen():
    scores = drawn(50, 6, seed=2)
    weights = key_weights(scores, 1e-6)
    assert torch.equal(weights, F.one_hot(scores.argmax(-1), 6).double())


# --- grouped inference ----------------------------------------------------------------------------


def inference(world, federation, scale=1.0):
    """Context and query with which some images choose one key and others do not."""
    trained = {
        "ctx": 0.1 * drawn(*federation.server["ctx"].shape, seed=31),
        "query": scale * drawn(*federation.server["query"].shape, seed=32),
    }
    return {n: t.to(world.dtype) for n, t in trained.items()}


def answers(method, trained, image):
    stacked = {n: t[None] for n, t in trained.items()}
    text = method.text(stacked, {})
    return method.logits(text, stacked, {}, image[None])[0]


@pytest.fixture
def passes(monkeypatch):
    """Count how many contexts each call of the text tower encodes."""
    seen = []
    encode = module.encode_text

    def spy(tower, layout, ctx, *, class_specific=False):
        inner = 3 if class_specific else 2
        seen.append(math.prod(ctx.shape[: ctx.dim() - inner]))
        return encode(tower, layout, ctx, class_specific=class_specific)

    monkeypatch.setattr(module, "encode_text", spy)
    return seen


@DTYPES
@pytest.mark.parametrize("specific", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_grouped_inference_equals_one_image_at_a_time(temperature, specific, dtype, passes):
    options = {"class_specific": specific, "temperature": temperature}
    world = world_of(dtype, of="clients", options=options)
    federation = world.federation()
    method = federation.method
    trained = inference(world, federation)
    image = torch.cat([c.test for c in world.clients])
    image = torch.cat((image, image[:9], 2 * image[:5]))  # equal images, equal weights
    got = answers(method, trained, image.to(dtype))
    exact = reference.answer(
        world.setup(),
        trained["ctx"].double(),
        trained["query"].double(),
        method.keys.double(),
        image,
        temperature,
    )
    off = (got.double() - exact).abs().max() / exact.abs().max()
    assert off < RELATIVE[dtype]
    weights = key_weights(image.to(dtype) @ trained["query"].T, temperature)
    alone = weights.max(-1).values == 1
    share = alone.double().mean().item()
    assert {0.01: 0.5 < share < 1, 0.1: share < 0.5, 1.0: share == 0}[temperature]
    # the keys once, and no mixture twice; doubled images may differ from the single in rounding
    mixtures = len(weights[~alone].unique(dim=0))
    assert sum(passes) == len(method.keys) + mixtures
    assert mixtures <= int((~alone).sum()) - (0 if share > 0.5 else 9)


def test_images_that_choose_one_key_cost_no_text_pass(passes):
    world = world_of(options={"temperature": 1e-5}, of="clients")
    federation = world.federation()
    method = federation.method
    trained = inference(world, federation)
    image = torch.cat([c.test for c in world.clients])
    got = answers(method, trained, image)
    assert passes == [5]
    setup = world.setup()
    for row, one in zip(got, image, strict=True):
        key = method.keys[int((trained["query"] @ one).argmax())].double()
        exact = reference.logits_of(setup, trained["ctx"], key, one[None])[0]
        torch.testing.assert_close(row, exact, rtol=1e-11, atol=1e-12)


def test_equal_scores_share_one_mixture(passes):
    """An untrained query that says nothing: all images under the mean of the keys."""
    world = world_of(of="clients", options={"temperature": 0.01})
    federation = world.federation()
    method = federation.method
    trained = inference(world, federation, scale=0.0)
    image = world.clients[0].test
    got = answers(method, trained, image)
    assert got.isfinite().all()
    exact = reference.logits_of(
        world.setup(), trained["ctx"], method.keys.double().mean(dim=0), image
    )
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
    assert passes == [5, 1]


@pytest.mark.parametrize("specific", [True, False])
def test_passes_are_bounded(specific, passes, monkeypatch):
    options = {"temperature": 1.0, "class_specific": specific}
    world = world_of(of="clients", options=options)
    federation = world.federation()
    trained = inference(world, federation)
    image = torch.cat([c.test for c in world.clients])
    whole = answers(federation.method, trained, image)
    assert passes == [5, len(image)]
    passes.clear()
    context = world.n_ctx * world.tower.width * (len(NAMES) if specific else 1)
    numbers = context + len(NAMES) * world.tower.dim
    monkeypatch.setattr(
        module, "_BYTES_PER_PASS", 3 * numbers * federation.method.task.dtype.itemsize
    )
    parts = answers(federation.method, trained, image)
    assert max(passes) == 3
    assert sum(passes) == 5 + len(image)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    passes.clear()
    monkeypatch.setattr(module, "_BYTES_PER_PASS", 1)
    torch.testing.assert_close(answers(federation.method, trained, image), whole)
    assert set(passes) == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_the_weights(dtype, passes):
    """A key that weighs 1 to half an ulp of the tower's dtype is alone."""
    world = world_of(F32, of="clients", options={"temperature": 0.1})
    wide = world.federation()
    trained = inference(world, wide)
    image = torch.cat([c.test for c in world.clients]).to(dtype)
    exact = answers(wide.method, trained, image.float())
    world.clip.text = world.tower.to("cpu", dtype)
    world.classes = ClassPrompts(world.clip, NAMES)
    passes.clear()
    narrow = world.federation().method
    got = answers(narrow, trained, image)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (got.float() - exact).abs().max() < 20 * eps * exact.abs().max()
    weights = key_weights(image.float() @ trained["query"].T, 0.1)
    lonely = int((weights.max(-1).values >= 1 - eps / 4).sum())
    assert lonely > int((weights.max(-1).values == 1).sum())
    assert sum(passes) <= 5 + len(image) - lonely


# --- by hand --------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Two classes, two domains, two images of length 2 and 4 along the axes."""
    world = world_of(options={"class_specific": False})
    method = world.federation().method
    text = torch.zeros(1, 2, 16, dtype=F64)
    text[0, 0, 0] = text[0, 1, 1] = 1
    image = torch.zeros(1, 3, 16, dtype=F64)
    image[0, 0, 0], image[0, 1, 1], image[0, 2, 5] = 2, 4, 1e9  # the last one is masked
    query = torch.zeros(1, 2, 16, dtype=F64)
    query[0, 0, 0], query[0, 1, 1] = 0.5, 0.25
    trained, fixed = {"query": query}, {"key": torch.tensor([1])}
    labels, mask = torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, False]])
    loss = method.loss(text, trained, fixed, batch_of(image, labels, mask))
    # logits (8, 0) and (0, 8), both of label 0; scores (1, 0) and (0, 1), both of domain 1

    def entropy(gap):
        return math.log1p(math.exp(-gap))

    labelled = (entropy(8) + entropy(-8)) / 2
    domains = (entropy(-1) + entropy(1)) / 2
    assert loss.tolist() == [pytest.approx(labelled + domains, rel=1e-12)]


def test_a_longer_image_is_surer_of_its_domain_only():
    world = world_of()
    federation = world.federation()
    method = federation.method
    down = leaves_of(world, federation)
    trained, fixed = method.start(down, {}, training=True)
    text = method.text(trained, fixed)
    image = torch.stack([c.train[:3] for c in world.clients])
    one, two = (method.logits(text, trained, fixed, s * image) for s in (1.0, 5.0))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    scores = [method.domain_scores(trained, s * image) for s in (1.0, 5.0)]
    torch.testing.assert_close(5 * scores[0], scores[1], rtol=1e-12, atol=1e-12)


def test_the_merge_does_not_weigh_by_images():
    federation = world_of(F32).federation()
    sent = {
        c: {n: torch.full_like(federation.server[n], v) for n in ("ctx", "query")}
        for c, v in ((4, 1.0), (0, 2.0), (3, 6.0))
    }
    merged = federation.method.merge(federation.server, sent, {4: 1, 0: 1000, 3: 5}, 0)
    assert set(merged) == {"ctx", "query"}
    for name, tensor in merged.items():
        assert torch.equal(tensor, torch.full_like(federation.server[name], 3.0))
    nothing = federation.method.merge(federation.server, {}, {}, 0)
    assert all(torch.equal(nothing[n], t) for n, t in federation.server.items())


# --- keys and beginnings --------------------------------------------------------------------------


def method_of(domains, **changes):
    """Build the method for clients of given domains."""
    world = world_of(F32)
    task = replace(world.federation().method.task, client_domains=domains, **changes)
    return type(world.federation().method)(task, {})


@pytest.mark.parametrize(
    ("domains", "keys"),
    [
        ((0, 1, 2, 0, 1), (0, 1, 2, 0, 1)),
        ((5, 1, 5, 1, 3), (2, 0, 2, 0, 1)),  # domains 0, 2 and 4 are left out
        (None, (0, 1, 2, 3, 4)),
        ((3, 3, 3, 3, 3), (0, 1, 2, 3, 4)),  # one domain tells nobody apart
    ],
)
def test_which_key_is_whose(domains, keys):
    method = method_of(domains)
    server = method.server_init()
    assert [int(method.download(server, c, 0)["key"]) for c in range(5)] == list(keys)
    assert len(method.keys) == len(server["query"]) == len(set(keys))


def test_keys_are_drawn_once_for_all():
    one, same, other = (method_of(None, seed=seed).keys for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (5, 3, 32)
    assert one.min() >= 0
    assert one.max() < 1
    # 480 numbers of U[0, 1)
    assert one.mean() == pytest.approx(0.5, abs=0.06)
    assert one.std() == pytest.approx(12**-0.5, rel=0.1)
    assert one.unique().numel() == one.numel()
    method = method_of(None)
    # nothing of them travels or is trained
    server = method.server_init()
    down = method.download(server, 2, 0)
    assert set(down) == {"ctx", "query", "key"}
    trained, fixed = method.start(stack([down]), {}, training=True)
    assert set(trained) == {"ctx", "query"}
    upload, own = method.finish(trained, fixed, {})
    assert set(upload) == {"ctx", "query"}
    assert own == {}


def test_contexts_and_query_begin_small():
    world = world_of(F32)
    server = world.federation().server
    assert server["ctx"].shape == (6, 3, 32)
    assert server["ctx"].std() == pytest.approx(0.02, rel=0.1)
    assert server["ctx"].unique().numel() == server["ctx"].numel()
    assert server["query"].shape == (2, 16)
    bound = 16**-0.5
    assert 0.8 * bound < server["query"].abs().max() <= bound
    shared = world_of(F32, options={"class_specific": False}).federation().server
    assert shared["ctx"].shape == (3, 32)
    again = world_of(F32).federation().server
    assert all(torch.equal(again[n], t) for n, t in server.items())
    other = world_of(F32, seed=1).federation().server
    assert not any(torch.equal(other[n], t) for n, t in server.items())


def test_words_begin_every_class_alike():
    method = method_of(None, ctx_init="a photo of")
    server = method.server_init()
    words = method.task.classes.words("a photo of")
    assert server["ctx"].shape == (6, 3, 32)
    assert all(torch.equal(ctx, words) for ctx in server["ctx"])


def test_default_options_are_the_papers():
    assert check_options("fedapt", {}) == {"class_specific": True, "temperature": 0.01}


def test_bytes_that_travel():
    federation = world_of(F32).federation()
    federation.sampling.sample = lambda round_: [0, 2, 3]
    row = federation.round()
    sent = 4 * (6 * 3 * 32 + 2 * 16)
    assert row["bytes_up"] == 3 * sent
    assert row["bytes_down"] == 3 * (sent + 8)  # which key is whose


# --- other class lists ----------------------------------------------------------------------------


@pytest.mark.parametrize("specific", [True, False])
def test_other_classes_take_what_was_trained(specific):
    world = world_of(options={"class_specific": specific}, of="clients")
    federation = world.federation()
    method = federation.method
    trained = inference(world, federation)
    image = world.clients[3].test
    base = answers(method, trained, image)
    same = method.on(ClassPrompts(world.clip, NAMES))
    assert torch.equal(answers(same, trained, image), base)
    # "photo" is novel; the others are known, in another order
    names = ["owl", "photo", "ant"]
    other = method.on(ClassPrompts(world.clip, names))
    got = answers(other, trained, image)
    torch.testing.assert_close(got[:, [0, 2]], base[:, [2, 0]], rtol=1e-11, atol=1e-12)
    mean = trained["ctx"].mean(dim=0) if specific else trained["ctx"]
    novel = replace(world.setup(), layout=ClassPrompts(world.clip, ["photo"]).layout(3))
    exact = reference.answer(
        novel, mean, trained["query"], method.keys.double(), image, method.options.temperature
    )
    torch.testing.assert_close(got[:, 1:2], exact, rtol=1e-11, atol=1e-12)
    # and back again: the contexts are those of the trained list
    again = other.on(ClassPrompts(world.clip, NAMES))
    assert torch.equal(answers(again, trained, image), base)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


class Tinted(Split):
    """Some digits in three domains: white on black, black on white, and red."""

    def __init__(self, split, count):
        self._split = split
        self.labels = split.labels[:count]
        self.domains = np.arange(count, dtype=np.int64) % 3
        self.fingerprint = f"tinted-{split.fingerprint}-{count}"

    def images(self, indices):
        asked = np.asarray(indices)
        images = [np.array(image) for image in self._split.images(asked)]
        for image, domain in zip(images, self.domains[asked], strict=True):
            if domain == 1:
                image[:] = 255 - image
            elif domain == 2:
                image[..., 1:] //= 4
        return images


TINTED = {
    "dataset": "digits",
    "shots": "all",
    "local_epochs": 2,
    "batch_size": 16,
    "n_ctx": 4,
    "lr": 0.05,
    "evaluate_every": 50,
}


@pytest.fixture(scope="module", autouse=True)
def tinted():
    """Give runs the tinted digits, drawn once."""
    whole = load_dataset("digits")
    domains = ("white", "black", "red")
    split = Tinted(whole.train, 240), Tinted(whole.test, 120)
    patch = pytest.MonkeyPatch()
    patch.setattr(
        fastfpl.federation.preparation,
        "load_dataset",
        lambda name, root, **more: Dataset("tinted", whole.classnames, domains, *split),
    )
    yield
    patch.undo()


def test_a_run_learns_which_domain_an_image_is_of(cache):
    settings = {**TINTED, "partition": "domain", "clients": 3, "lr": 0.2, "rounds": 12}
    federation = prepare(
        make_settings({"method": "fedapt", **settings}), model=small_clip(), cache=cache
    )
    assert len(federation.method.keys) == 3
    feed, test = federation.examiner.exams[0].feed, np.arange(120)

    def right():
        scores = federation.method.domain_scores(federation.server, feed.batch(test))
        return (scores.argmax(-1).numpy() == feed.split.domains).mean()

    before = right()
    losses = [federation.round()["loss"] for _ in range(12)]
    assert right() > 0.9 > before
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", ["fedapt", "fedapt-unsupervised"])
@pytest.mark.parametrize("target", ["white", "red"])
def test_a_domain_that_is_left_out_has_no_key(target, method, cache):
    settings = {**TINTED, "scenario": "leave-one-domain-out", "target": target}
    settings |= {"partition": "domain-dirichlet", "clients": 4, "sampling": "domain", "rounds": 2}
    if method == "fedapt-unsupervised":
        settings |= {"augment": "views:1", "options": {"pseudo_rounds": 1, "threshold": 0.0}}
    federation = prepare(
        make_settings({"method": method, **settings}), model=small_clip(), cache=cache
    )
    assert federation.sampling.client_domains == (0, 0, 1, 1)
    assert len(federation.method.keys) == len(federation.server["query"]) == 2
    for _ in range(2):
        row = federation.round()
        assert len(row["selected"]) == 2
    assert 0 <= row["exams"]["target"]["accuracy"] <= 1


def test_base_to_novel_gives_novel_classes_the_mean_context(cache):
    settings = {**TINTED, "scenario": "base-to-novel", "partition": "domain", "clients": 3}
    result = fastfpl.run("fedapt", model=small_clip(), cache=cache, **{**settings, "rounds": 1})
    exams = result.rounds[0]["exams"]
    assert set(exams) == {"local", "base", "novel"}
    assert result.rounds[0]["bytes_up"] == 3 * 4 * (5 * 4 * 32 + 3 * 32)


def test_a_run_without_domains_has_a_key_a_client(cache):
    result = fastfpl.run(
        "fedapt", model=small_clip(), cache=cache, **{**TINTED, "clients": 4, "rounds": 1}
    )
    assert result.rounds[0]["bytes_up"] == 4 * 4 * (10 * 4 * 32 + 4 * 32)
