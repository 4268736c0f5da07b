"""The image side of a run: what is stored, what stays in memory, what is prepared ahead."""

import gc
import io
import json
import re
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from rich.console import Console

import fastfpl
from fastfpl.config import Settings, make_settings
from fastfpl.data import load_dataset
from fastfpl.data.base import Split
from fastfpl.data.digits import _Drawings
from fastfpl.data.loader import Loader, Workers
from fastfpl.errors import InputError, KindError
from fastfpl.features import FeatureStore
from fastfpl.tracking import bars
from fastfpl.training import feeds, preparation
from fastfpl.training.budget import Budget, Living
from fastfpl.training.feeds import Eye, Feed, evaluation_feed, silent, training_feed
from tests.command import call
from tests.worlds import TINY_RUN, figures, small_clip


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


def run(method, clip, cache, **more):
    return fastfpl.run(method, model=clip, cache=cache, **{**TINY_RUN, **more})


def eye_of(clip, folder, *, kind="pooled", chunk=16, workers=0, **more):
    store = FeatureStore(folder, chunk=chunk)
    return Eye(clip, kind, store, silent, clip.mean, clip.std, Workers(workers), **more)


def settings_of(**more):
    return make_settings({"method": "promptfl", **more})


# --- threads decide speed, not figures ------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "augment"),
    [
        ("promptfl", "none"),
        ("promptfl", "views:3"),
        ("promptfl", "fresh"),
        ("fedotp", "views:2"),
        ("fedotp", "fresh"),
        ("fedapt-unsupervised", "fresh"),
        ("fedapt-unsupervised", "views:2"),
    ],
)
def test_any_number_of_threads_gives_the_same_run(method, augment, clip, tmp_path):
    found, files = [], []
    for workers, resident in ((0, 0), (1, None), (3, "20kB")):
        cache = tmp_path / f"features {workers}"
        more = {"augment": augment, "workers": workers, "resident": resident}
        result = run(method, clip, cache, **more)
        assert result.settings["workers"] == workers
        found.append(figures(result))
        files.append({path.name: path.read_bytes() for path in cache.iterdir()})
    assert found[1] == found[0] == found[2]
    assert files[1] == files[0] == files[2]


@pytest.fixture
def decoded(monkeypatch):
    """Note which images are decoded, and by whom."""
    seen = []
    plain = _Drawings.images

    def images(self, indices):
        seen.extend((int(i), threading.current_thread().name) for i in indices)
        return plain(self, indices)

    monkeypatch.setattr(_Drawings, "images", images)
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_the_setting_decides_who_decodes(workers, clip, tmp_path, decoded):
    run("promptfl", clip, tmp_path, augment="fresh", workers=workers, rounds=1)
    here = threading.current_thread().name
    assert decoded
    assert all((name == here) == (workers == 0) for _, name in decoded)
    assert len({name for _, name in decoded}) <= max(1, workers)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_left_out_it_is_chosen_by_the_device(device, monkeypatch):
    monkeypatch.setattr(preparation, "choose_workers", lambda *asked: 5 if asked[1] is None else 7)
    dataset = load_dataset("digits")
    model = small_clip()
    for asked, wanted in ((None, 5), (0, 7)):
        settings = settings_of(workers=asked)
        eye = preparation.make_eye(settings, model, dataset, "pooled", FeatureStore(), silent)
        assert eye.workers.count == wanted


# --- decoded images that stay ---------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["fresh", "views:3"])
def test_resident_images_are_decoded_once(augment, clip, tmp_path, decoded):
    more = {"augment": augment, "workers": 1}
    train = load_dataset("digits").train
    counts = {}
    for resident in (None, 0, "3kB"):
        decoded.clear()
        run("promptfl", clip, tmp_path / str(resident), resident=resident, **more)
        counts[resident] = len(decoded)
    # every test image once; 10 classes of 5 shots, four epochs or three views
    tests = len(load_dataset("digits").test)
    assert len(train) > 50
    assert counts[None] == tests + 50
    epochs = {"fresh": counts[0] - tests, "views:3": 150}[augment]
    assert counts[0] == tests + epochs
    assert epochs >= 3 * 32
    assert counts[None] < counts["3kB"] < counts[0]


def test_what_is_looked_at_once_is_not_kept(clip, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(feeds, "Resident", lambda *asked: made.append(asked))
    run("promptfl", clip, tmp_path, augment="none")
    run("promptfl", clip, tmp_path, augment="views:1")
    assert made == []


def test_what_fixed_views_needed_is_let_go_of(clip, tmp_path):
    split = load_dataset("digits").train
    kept = []
    plain = feeds.Resident

    class Watched(plain):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self.images.__func__)
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    alive = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "Resident", Watched)
        eye = eye_of(clip, tmp_path)
        feed = training_feed(eye, split, np.arange(40), settings_of(augment="views:3"))
        assert kept
        gc.collect()
        assert alive == set()
        fresh = training_feed(eye, split, np.arange(40), settings_of(augment="fresh"))
        gc.collect()
        assert len(alive) == 1
    assert feed.random
    assert fresh.random


@pytest.mark.parametrize("augment", ["none", "fresh"])
def test_decoded_images_have_their_part_of_a_budget(augment, clip):
    budget = Budget(64 << 30, torch.device("cpu"))
    dataset, room = load_dataset("digits"), budget.room

    def bytes_of(asked):
        settings = settings_of(augment=augment, resident=asked)
        arguments = (settings, clip, dataset, "pooled", FeatureStore(), silent)
        return preparation.make_eye(*arguments, budget).resident

    assert bytes_of(1000) == 1000
    used = 0 if augment == "none" else 1000
    assert (budget.decoded, budget.room) == (used, room - used)
    assert budget.to_json()["image_cache_bytes"] == used
    if augment == "fresh":
        budget.decoded = 0
        assert bytes_of("64GiB") == room // 8  # more is not to be had
    # on a GPU the budget is the card's, and images stay on the host
    budget._device = torch.device("cuda")
    assert bytes_of("64GiB") == 64 << 30


# --- what is prepared ahead -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["promptfl", "fedapt-unsupervised"])
def test_training_steps_find_their_pixels_prepared(method, clip, tmp_path, monkeypatch):
    asked, foretold = [], []
    plain, begin = Loader.pixels, Loader._begin

    def pixels(self, indices, seeds=None):
        foretold.clear()
        asked.append(None)
        found = plain(self, indices, seeds)
        asked[-1] = (len(indices), list(foretold))
        return found

    def noted(self, job):
        foretold.append(len(job[0]))
        return begin(self, job)

    run(method, clip, tmp_path, augment="fresh", workers=1, rounds=1)  # fills the store
    monkeypatch.setattr(Loader, "pixels", pixels)
    monkeypatch.setattr(Loader, "_begin", noted)
    run(method, clip, tmp_path, augment="fresh", workers=1, rounds=1)
    # an epoch's batches are all small enough to be ahead: none is begun when it is asked for
    assert len(asked) >= 2
    assert all(begun == [] for _, begun in asked)


def test_encoding_finds_the_next_chunks_prepared(clip, tmp_path, monkeypatch):
    begun = []
    begin = Loader._begin

    def noted(self, job):
        begun.append((len(job[0]), len(self._coming)))
        return begin(self, job)

    monkeypatch.setattr(Loader, "_begin", noted)
    eye = eye_of(clip, tmp_path, workers=1, chunk=200)
    evaluation_feed(eye, load_dataset("digits").test, "test", np.arange(599))
    # two chunks before the first is asked for, since one has less than 256 images
    assert begun == [(200, 0), (200, 1), (199, 1)]


# --- 16-bit storage -------------------------------------------------------------------------------

HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("kind", ["pooled", "raw", "patches"])
@pytest.mark.parametrize("name", HALF)
def test_half_the_bytes_cost_half_an_ulp(name, kind, clip, tmp_path):
    split, rows = load_dataset("digits").test, np.arange(300)
    feeds_of = {}
    for dtype in (None, getattr(torch, name)):
        eye = eye_of(clip, tmp_path / str(dtype), kind=kind, dtype=dtype)
        feeds_of[dtype] = evaluation_feed(eye, split, "test", rows)
    exact, half = (feed.batch(rows) for feed in feeds_of.values())
    # they come back in the dtype that the run computes in
    assert exact.dtype == half.dtype == torch.float32
    error = (half - exact).abs()
    assert (error <= HALF[name] * exact.abs() + 2.0**-24).all()
    assert error.max() > 0
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.safetensors")]
    numbers = exact.numel()
    assert sorted(sizes)[0] == pytest.approx(2 * numbers, abs=1000)
    assert sorted(sizes)[1] == pytest.approx(4 * numbers, abs=1000)


@pytest.mark.parametrize("augment", ["none", "views:2"])
@pytest.mark.parametrize("method", ["promptfl", "fedotp"])
def test_a_run_on_16_bit_features_is_near_one_on_32(method, augment, clip, tmp_path):
    results = {
        dtype: run(method, clip, tmp_path / dtype, feature_dtype=dtype, augment=augment)
        for dtype in ("auto", "float32", "float16", "bfloat16")
    }
    assert results["auto"].settings["feature_dtype"] == "auto"
    assert figures(results["auto"]) == figures(results["float32"])
    for dtype in HALF:
        assert results[dtype].settings["feature_dtype"] == dtype
        rows = zip(results[dtype].rounds, results["auto"].rounds, strict=True)
        for row, wanted in rows:
            assert row["loss"] != wanted["loss"]
            assert row["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    names = [{p.name for p in (tmp_path / d).iterdir()} for d in ("auto", "float32", "float16")]
    assert names[0] == names[1]
    assert not names[0] & names[2]


@pytest.mark.usefixtures("few_digits")
def test_auto_is_the_clips_dtype(tmp_path):
    for name in ("float32", "bfloat16"):
        arguments = {**TINY_RUN, "clip": "tiny", "dtype": name, "rounds": 1}
        fastfpl.run("zeroshot", cache=tmp_path / name, **arguments)
        (path,) = (tmp_path / name).iterdir()
        length = int.from_bytes(path.read_bytes()[:8], "little")
        facts = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
        assert facts["dtype"] == name


def test_stored_dtype_is_a_fact_of_a_run_and_threads_are_not(clip, tmp_path):
    arguments = {"out": tmp_path / "run", "augment": "views:2"}
    run("promptfl", clip, tmp_path / "cache", rounds=1, **arguments)
    with pytest.raises(InputError, match="feature_dtype: 'auto' then, 'float16' now"):
        run(
            *("promptfl", clip, tmp_path / "cache"),
            **{**arguments, "resume": True, "feature_dtype": "float16"},
        )
    more = {**arguments, "resume": True, "workers": 2, "resident": "1MiB"}
    resumed = run("promptfl", clip, tmp_path / "cache", **more)
    assert len(resumed.rounds) == 2
    whole = run("promptfl", clip, tmp_path / "cache", augment="views:2")
    assert figures(resumed) == figures(whole)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "count"), [(None, None), (0, 0), ("0", 0), ("4GiB", 4 << 30), (1000, 1000)]
)
def test_resident_bytes_as_people_write_them(value, count):
    assert settings_of(resident=value).resident == count


@pytest.mark.parametrize(
    ("more", "error", "sentence"),
    [
        ({"resident": "much"}, InputError, "resident must be bytes or a text such as '2GiB'; got"),
        ({"resident": "-1"}, InputError, "resident must be bytes or a text such as '2GiB'; got"),
        ({"resident": False}, KindError, "resident must be bytes or a text .*; got bool"),
        ({"workers": -1}, InputError, "workers is refused: .* greater than or equal to 0; got -1"),
        ({"workers": 1.5}, InputError, "workers is refused: .*; got 1.5"),
        ({"workers": True}, InputError, "workers is refused: .*; got True"),
        (
            {"feature_dtype": "int8"},
            InputError,
            "feature_dtype is refused: .*; got 'int8'",
        ),
        ({"feature_dtype": "float64"}, InputError, "feature_dtype is refused: .*; got 'float64'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(more, error, sentence):
    with pytest.raises(error, match=rf"^fastfpl\.Settings: {sentence}"):
        settings_of(**more)


@pytest.mark.usefixtures("few_digits")
def test_the_flags(capsys, tmp_path):
    quick = ["--dataset", "digits", "--clients", "2", "--shots", "2", "--threads", "1"]
    quick += ["--n-ctx", "2", "--rounds", "1", "--augment", "views:2"]
    where = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "a")]
    flags = ["--workers", "2", "--resident", "1.5MiB", "--feature-dtype", "bfloat16"]
    code, _, err = call(capsys, "run", "promptfl", *quick, *where, *flags)
    assert code == 0
    assert re.fullmatch(r"promptfl  round 1  accuracy .*\n", err)  # no terminal: a line a round
    settings = fastfpl.Result.load(tmp_path / "a").settings
    assert settings["workers"] == 2
    assert settings["resident"] == 3 << 19
    assert settings["feature_dtype"] == "bfloat16"
    code, _, err = call(capsys, "run", "promptfl", *quick, "--workers", "many")
    assert code == 2
    code, out, _ = call(capsys, "run", "--help")
    for name in ("workers", "resident", "feature_dtype"):
        assert f"--{name.replace('_', '-')}" in out
        assert Settings.model_fields[name].description


# --- memory ---------------------------------------------------------------------------------------


class Many(Split):
    """So many images that their patch tokens would be seen."""

    def __init__(self, count):
        self.labels = self.domains = np.zeros(count, np.int64)
        self.fingerprint = f"many {count}"

    def images(self, indices):
        return [np.full((28, 28, 3), int(i) % 251, np.uint8) for i in indices]


@pytest.mark.parametrize(("stored", "workers"), [(torch.float32, 0), (torch.float16, 1)])
def test_nothing_as_large_as_all_patch_tokens_is_in_memory(clip, tmp_path, stored, workers):
    count, views = 2500, 6
    row = clip.patches * clip.dim * 4  # a float32 image: 16 patches of 32 numbers
    everything = count * row
    split, rows = Many(count), np.arange(count)
    eye = eye_of(clip, tmp_path, kind="patches", chunk=32, dtype=stored, workers=workers)
    # modules and threads that come with the first image
    evaluation_feed(eye, Many(40), "test", np.arange(40))

    def measured(work):
        """Most bytes of tensors, and of arrays, that lived at once."""
        tracemalloc.start()
        try:
            with Living() as seen, torch.no_grad():
                result = work()
            return result, max(seen.most, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    feed, most = measured(lambda: evaluation_feed(eye, split, "test", rows))
    assert most < everything / 2, most / everything
    batch, most = measured(lambda: feed.batch(rows[:64].reshape(4, 16)))
    assert batch.shape == (4, 16, clip.patches, clip.dim)
    assert most < 5 * 64 * row
    # of a view's file only the rows that are chosen are read
    settings = settings_of(augment=f"views:{views}")
    few = rows[:400]
    feed, most = measured(lambda: training_feed(eye, split, few, settings))
    assert most < 400 * views * row / 2
    draws = np.arange(64)
    batch, most = measured(lambda: feed.batch(few[:64], draws))
    assert most < 5 * 64 * row
    assert len(feed._plain) == views


def test_every_image_gets_the_view_that_its_draw_chooses(clip, tmp_path):
    split, rows = load_dataset("digits").train, np.arange(5, 45)
    eye = eye_of(clip, tmp_path)
    feed = training_feed(eye, split, rows, settings_of(augment="views:3"))
    draws = np.random.default_rng(0).integers(0, 2**31, (8, 6))
    asked = np.random.default_rng(1).choice(rows, (8, 6))
    found = feed.batch(asked, draws)
    for at in np.ndindex(8, 6):
        view = feed._plain[draws[at] % 3]
        assert torch.equal(found[at], view[int(asked[at]) - 5])
    assert feed.batch(asked[:0], draws[:0]).shape == (0, 6, clip.dim)
    assert isinstance(feed, Feed)


# --- rate and time left ---------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def shown(monkeypatch, steps):
    """What the command line shows after each (seconds, done) of an encoding of 1000 images."""
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, get_time=clock)
    monkeypatch.setattr(bars, "console", lambda stderr=False: console)
    lines = []
    with bars.progress() as (observer, _):
        for seconds, done in steps:
            clock.now += seconds
            observer("encoding train images", done, 1000)
            kept = observer.__closure__
            (progress,) = (c.cell_contents for c in kept if hasattr(c.cell_contents, "tasks"))
            text = io.StringIO()
            Console(file=text, width=150, get_time=clock).print(progress.get_renderable())
            lines.append(" ".join(text.getvalue().split()))
    return lines


def test_the_rate_and_the_time_that_is_left_are_shown(monkeypatch):
    lines = shown(monkeypatch, [(10, 100), (20, 200), (20, 300), (40, 500)])
    assert "100/1000" in lines[0]
    assert "images/s" not in lines[0]  # there is nothing to compare with
    assert "200/1000 5.0 images/s 0:02:40" in lines[1]
    assert "300/1000 5.0 images/s 0:02:20" in lines[2]
    assert "500/1000 5.0 images/s 0:01:40" in lines[3]


def test_after_a_resume_only_what_is_encoded_now_counts(monkeypatch):
    # 800 were there already
    lines = shown(monkeypatch, [(0, 800), (50, 900), (30, 940)])
    assert "900/1000 2.0 images/s 0:00:50" in lines[1]
    assert "940/1000 1.8 images/s 0:00:35" in lines[2]


def test_a_slow_chunk_does_not_end_the_rate(monkeypatch):
    lines = shown(monkeypatch, [(0, 0), (100, 100), (100, 200), (100, 300)])
    assert "1.0 images/s 0:11:40" in lines[3]
