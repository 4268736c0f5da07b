"""A limit of memory reaches every pass, moves no figure, and is read as people write it."""

import re
import sys
from dataclasses import replace

import pytest
import torch

import fastfpl
from fastfpl.config import make_settings
from fastfpl.errors import InputError, KindError
from fastfpl.methods import METHODS
from fastfpl.ops.memory import current_limit, memory_limit, parse_bytes
from fastfpl.ops.text import FACES
from fastfpl.prompts import ClassPrompts, encode_prompts
from fastfpl.released import as_released
from fastfpl.training import budget, scoring
from fastfpl.training.feeds import Feed
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import score
from tests.command import call
from tests.worlds import GATE, NAMES, TINY_RUN, World, drawn, figures, small_clip

OPTIONS = {
    "pfedmoap": GATE,
    # the second round is the second phase's first, and builds banks
    "fedapt-unsupervised": {"pseudo_rounds": 1},
    "promptfl-ft": {"epochs": 2},  # what five hold, two hold
}


# what encodes texts beside training and evaluation
OWN_PASSES = {
    "pfedmoap": {"_encode_experts"},
    "fedapt-unsupervised": {"survey"},
    "promptfl-ft": {"tuned"},
    "fedpgp": {"_reference"},
    "fedtpg": {"_names"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def limits(monkeypatch):
    """Say under which limit each text pass ran, and for whom."""
    seen = []

    def watched(run):
        def pass_(*arguments):
            asking = {f.f_code.co_name for f in frames()}
            seen.append((current_limit(), frozenset(asking)))
            return run(*arguments)

        return pass_

    faces = tuple(replace(face, run=watched(face.run)) for face in FACES["encode_text"])
    monkeypatch.setitem(FACES, "encode_text", faces)
    return seen


def frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def run(method, clip, cache, **more):
    paired = {"augment": "views:1"} if METHODS[method].paired else {}
    settings = {**TINY_RUN, "options": OPTIONS.get(method, {}), **paired, **more}
    return fastfpl.run(method, model=clip, cache=cache, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_reaches_every_text_pass(method, clip, cache, limits, monkeypatch):
    monkeypatch.setattr(budget, "_taken", lambda device: 0)
    result = run(method, clip, cache, max_memory="3 MiB", rounds=3)
    assert result.settings["max_memory"] == 3 << 20
    chosen = {one["text_bytes"] for one in result.memory["passes"] if "text_bytes" in one}
    # a look before the trials has half of the room, and what has two passes the lesser part
    assert all(limit is not None and limit <= 0.85 * (3 << 20) / 2 for limit, _ in limits)
    played = {limit for limit, names in limits if not {"_choose", "prepare"} & names}
    assert played
    assert played <= chosen
    assert current_limit() is None
    asked = set().union(*(names for _, names in limits if "_choose" not in names))
    wanted = {"score"} | ({"step"} if METHODS[method].trains else set())
    assert wanted | OWN_PASSES.get(method, set()) <= asked
    # without a limit the same passes run, without one
    limits.clear()
    free = run(method, clip, cache, rounds=3)
    assert free.settings["max_memory"] is free.memory is None
    assert {limit for limit, _ in limits} == {None}
    for row, other in zip(figures(result)[:-1], figures(free)[:-1], strict=True):
        if METHODS[method].trains:
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["clients"] == pytest.approx(other["clients"], abs=0.02)


def test_a_limit_around_a_run_is_not_the_runs(clip, cache, limits):
    with memory_limit(12345):
        run("zeroshot", clip, cache)
        assert current_limit() == 12345
    assert {limit for limit, _ in limits} == {None}


# --- evaluations ----------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """Say how many bytes of features each call for images of an evaluation brought."""
    seen = []
    plain = Feed.batch

    def batch(self, indices, draws=None):
        features = plain(self, indices, draws)
        seen.append((features.nbytes, indices.size))
        return features

    monkeypatch.setattr(Feed, "batch", batch)
    return seen


@pytest.mark.parametrize("method", ["zeroshot", "pfedmoap", "fedapt", "fedotp"])
@pytest.mark.parametrize("limit", [1, 5000, 8000])
def test_images_are_scored_within_the_limit(method, limit, clip, cache, scored, monkeypatch):
    counts = []
    # no text pass stays below these
    monkeypatch.setattr(scoring, "current_limit", lambda: limit)
    plain = scoring.at_once

    def at_once(*arguments):
        scored.clear()  # of training
        counts.append(plain(*arguments))
        return counts[-1]

    monkeypatch.setattr(scoring, "at_once", at_once)
    small = run(method, clip, cache, rounds=1)
    assert all(size <= limit or images == 1 for size, images in scored)
    assert max(images for _, images in scored) <= max(counts)
    if limit == 1:
        assert set(counts) == {1}
    calls = len(scored)
    monkeypatch.setattr(scoring, "current_limit", current_limit)
    whole = run(method, clip, cache, rounds=1)
    assert len(scored) < calls
    assert small.rounds[0]["clients"] == whole.rounds[0]["clients"]


def test_without_a_limit_64_mib_are_scoredat_once():
    method = World("promptfl").federation().method
    # 197 x 512 numbers: 393 KiB an image
    patches = torch.zeros(1, 1, 197, 512)
    count = (64 << 20) // (patches.nbytes + 2 * len(NAMES) * 4)
    assert scoring.at_once(method, {}, patches) == count == 166
    with memory_limit(1 << 40):  # more would not be faster
        assert scoring.at_once(method, {}, patches) == count
    with memory_limit(10 * patches.nbytes):
        assert scoring.at_once(method, {}, patches) == 9
    with memory_limit(1):
        assert scoring.at_once(method, {}, patches) == 1


def test_a_gates_scores_count():
    options = {"experts": 3, "heads": 2, "gate_width": 8}
    method = World("pfedmoap", options=options).federation().method
    image = torch.zeros(1, 1, 16)
    plain = scoring.at_once(method, {}, image)
    gated = scoring.at_once(method, {"experts": torch.zeros(1, len(NAMES), 2, 8)}, image)
    # two heads, six classes, three experts: scores, their softmax and what is summed
    assert plain == (64 << 20) // (4 * (16 + 12))
    assert gated == (64 << 20) // (4 * (16 + 12 + 3 * 2 * 6 * 3))


def test_images_that_stop_together_are_scored_together(monkeypatch):
    world = World("fedotp", options={"max_iter": 3})
    clean = world.federation().method
    method = as_released(type(clean), ["fedotp-batch-stop"])(clean.task, {"max_iter": 3})
    patches = torch.zeros(1, 1, 4, 16)
    for limit in (1, 10**6, 10**8, None):
        with memory_limit(limit):
            assert scoring.at_once(method, {}, patches) % 100 == 0
    # whatever the limit, the plans of an image are those of its hundred
    down = stack([{"ctx": method.server_init()["ctx"]}])
    features = torch.nn.functional.normalize(drawn(250, 4, 16, seed=1), dim=-1).float()
    feed = Patches(features)
    images = {0: torch.arange(250).numpy()}
    answers = []
    for limit in (1, 10**6, None):
        feed.calls.clear()
        monkeypatch.setattr(scoring, "current_limit", lambda limit=limit: limit)
        answers.append(score(method, [0], down, {}, feed, images)[0].answers.tolist())
        assert feed.calls[1:] == ([100, 100, 50] if limit == 1 else feed.calls[1:])
    assert answers[0] == answers[1] == answers[2]


class Patches:
    """Patch features of one split."""

    def __init__(self, features):
        self._features = features
        self.calls = []
        none = torch.zeros(len(features), dtype=torch.int64).numpy()
        self.split = type("Split", (), {"labels": none, "domains": none})

    def batch(self, indices):
        self.calls.append(indices.size)
        return self._features[torch.from_numpy(indices)]


# --- what people write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1500, 1500),
        ("1500", 1500),
        ("2GiB", 2 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 3 kib ", 3072),
        ("1TB", 10**12),
        ("7 b", 7),
    ],
)
def test_bytes_as_people_write_them(text, count):
    assert parse_bytes("test", text) == count
    assert make_settings({"method": "local", "max_memory": text}).max_memory == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 XB", "1e9", "2GiBs", "1.GiB", "nan"])
def test_what_is_no_number_of_bytes_is_refused(text):
    sentence = (
        rf"^fastfpl\.Settings: max_memory must be bytes or a text such as '2GiB'; got {text!r}$"
    )
    with pytest.raises(InputError, match=sentence):
        make_settings({"method": "local", "max_memory": text})


@pytest.mark.parametrize("text", [0, "0", "0.2 B"])
def test_no_bytes_at_all_are_refused(text):
    with pytest.raises(InputError, match=r"max_memory must be positive; got "):
        make_settings({"method": "local", "max_memory": text})


@pytest.mark.parametrize("value", [True, 1.5, [1]])
def test_other_kinds_are_refused(value):
    with pytest.raises(KindError, match=r"max_memory must be bytes or a text .*; got (bool|fl|li)"):
        make_settings({"method": "local", "max_memory": value})


def test_prompts_are_encoded_within_a_limit(clip, limits):
    classes = ClassPrompts(clip, ["a cat", "a dog"])
    ctx = drawn(3, 4, clip.text_width, seed=1, dtype=torch.float32)
    whole = encode_prompts(classes, ctx)
    small = encode_prompts(classes, ctx, max_memory="10 MB")
    assert [limit for limit, _ in limits] == [None, 10**7]
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-7)
    with memory_limit(77_000):
        encode_prompts(classes, ctx)  # a limit around it holds
        encode_prompts(classes, ctx, max_memory=88_000)
    assert [limit for limit, _ in limits[2:]] == [77_000, 88_000]
    with pytest.raises(InputError, match=r"^fastfpl\.encode_prompts: max_memory must be positive"):
        encode_prompts(classes, ctx, max_memory=0)


@pytest.mark.usefixtures("few_digits")
def test_the_flag(capsys, tmp_path):
    quick = ["--dataset", "digits", "--clients", "2", "--shots", "2", "--threads", "1"]
    where = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "a")]
    code, out, err = call(capsys, "run", "zeroshot", *quick, *where, "--max-memory", "64GiB")
    assert code == 0
    assert re.fullmatch(r"zeroshot  round 1  accuracy .*\n", err)  # no terminal: a line a round
    assert "memory: 65536 MiB allowed, " in out
    assert "evaluation: 1 client at most, texts in " in out
    result = fastfpl.Result.load(tmp_path / "a")
    assert result.settings["max_memory"] == 64 << 30
    code, _, err = call(capsys, "run", "zeroshot", *quick, "--memory", "much")
    assert code == 2
    assert err == (
        "error: fastfpl.Settings: max_memory must be bytes or a text such as '2GiB'; got 'much'\n"
    )
