"""Kinds of features that come of one pass through the tower: files and figures are the same."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch

import fastfpl
from fastfpl.config import make_settings
from fastfpl.errors import InputError
from fastfpl.features import FeatureStore
from fastfpl.features.file import facts_of
from fastfpl.federation.comparison import Job, kinds_of
from fastfpl.files import Growing
from fastfpl.methods import METHODS
from tests.stored import CHUNK, KEY, N, Stop, truth
from tests.worlds import GATE, TINY_RUN, figures, small_clip

OTHERS = (replace(KEY, kind="raw"), replace(KEY, kind="patches", dtype="float16"))
SHAPES = {KEY: (5,), OTHERS[0]: (5,), OTHERS[1]: (3, 5)}


def rows_of(key):
    return truth(SHAPES[key], seed=list(SHAPES).index(key))


class Together:
    """Build the rows of several keys, until an image; remember what was asked for."""

    def __init__(self, *keys, at=N):
        self.rows = [rows_of(key) for key in keys]
        self.at, self.asked = at, []

    def __call__(self, indices):
        if indices[-1] >= self.at:
            raise Stop
        self.asked += indices.tolist()
        return [rows[torch.from_numpy(indices)] for rows in self.rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of the file of every key, each written alone."""
    mine = FeatureStore(tmp_path_factory.mktemp("whole"), chunk=CHUNK)
    for key in SHAPES:
        mine.get(key, N, lambda at, key=key: rows_of(key)[torch.from_numpy(at)])
    return {path.name: path.read_bytes() for path in mine.directory.iterdir()}


def files(store):
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


def test_files_are_those_of_passes_of_their_own(store, whole):
    build = Together(KEY, *OTHERS)
    found = store.get(KEY, N, build, also=OTHERS)
    assert torch.equal(found[:], rows_of(KEY))
    assert build.asked == list(range(N))
    assert files(store) == whole
    for key in OTHERS:
        assert len(store.get(key, N, None)) == N  # it is there: nothing is built


def test_one_that_is_there_stays(store, whole):
    store.get(OTHERS[0], N, Together(OTHERS[0]))
    (path,) = store.directory.iterdir()
    before = path.stat().st_mtime_ns, path.stat().st_ino
    store.get(KEY, N, Together(KEY, *OTHERS), also=OTHERS)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert files(store) == whole


def test_nothing_is_built_for_others_alone(store):
    store.get(KEY, N, Together(KEY))
    store.get(KEY, N, None, also=OTHERS)
    assert len(files(store)) == 1


def test_one_that_somebody_else_writes_is_his(store, whole):
    store.directory.mkdir()
    path = store.directory / OTHERS[0].filename
    with Growing(path, {**facts_of(OTHERS[0], (N,)), "chunk": CHUNK}):
        store.get(KEY, N, Together(KEY, *OTHERS), also=OTHERS)
    left = files(store)
    assert left == {name: whole[name] for name in whole if name != path.name}


@pytest.mark.parametrize("at", [CHUNK, 3 * CHUNK])
def test_all_go_on_after_a_kill(store, whole, at):
    with pytest.raises(Stop):
        store.get(KEY, N, Together(KEY, *OTHERS, at=at), also=OTHERS)
    assert len(files(store)) == 6  # a part and a journal each
    build, told = Together(KEY, *OTHERS), []
    store.get(KEY, N, build, lambda done, of: told.append(done), also=OTHERS)
    assert build.asked == list(range(at, N))
    assert told == [*range(at, N, CHUNK), N]
    assert files(store) == whole


def test_one_may_be_behind_and_one_may_be_ahead(store, whole):
    with pytest.raises(Stop):
        store.get(KEY, N, Together(KEY, at=2 * CHUNK))
    with pytest.raises(Stop):
        store.get(OTHERS[0], N, Together(OTHERS[0], at=3 * CHUNK))
    build = Together(KEY, *OTHERS)
    store.get(KEY, N, build, also=OTHERS)
    assert build.asked == list(range(N))  # of patches nothing is there
    assert files(store) == whole


def test_what_another_wish_has_left_serves_one_kind(store, whole):
    with pytest.raises(Stop):
        store.get(KEY, N, Together(KEY, *OTHERS, at=2 * CHUNK), also=OTHERS)
    build = Together(OTHERS[1])
    store.get(OTHERS[1], N, build)
    assert build.asked == list(range(2 * CHUNK, N))
    assert files(store)[OTHERS[1].filename] == whole[OTHERS[1].filename]


def test_rows_of_another_shape_begin_again(store, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(SHAPES, OTHERS[1], (2, 5))
        with pytest.raises(Stop):
            store.get(KEY, N, Together(KEY, *OTHERS, at=2 * CHUNK), also=OTHERS)
    build = Together(KEY, *OTHERS)
    store.get(KEY, N, build, also=OTHERS)
    # the chunk that showed it, then all
    assert build.asked == [*range(2 * CHUNK, 3 * CHUNK), *range(N)]
    assert files(store) == whole


def test_what_is_not_finite_is_refused_and_leaves_no_file(store):
    build = Together(KEY, *OTHERS)
    build.rows[2][20, 1, 1] = float("nan")
    with pytest.raises(InputError, match="must return features that are finite in float16"):
        store.get(KEY, N, build, also=OTHERS)
    assert not list(store.directory.glob("*.safetensors"))


# --- runs -----------------------------------------------------------------------------------------

RUN = {**TINY_RUN, "rounds": 1, "local_epochs": 1, "threads": 1}
ASKED = ["promptfl", "fedotp", "fedapt", "pfedmoap"]


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture
def passes(clip, monkeypatch):
    """Count the images that go through each pass of the tower."""
    counted = Counter()
    for name in ("pooled", "tokens", "both"):
        own = getattr(clip._image, name)

        def count(pixels, own=own, name=name):
            counted[name] += len(pixels)
            return own(pixels)

        monkeypatch.setattr(clip._image, name, count, raising=False)
    return counted


def test_a_comparison_looks_at_every_image_once(clip, passes, tmp_path):
    how = {**RUN, "model": clip, "options": {"pfedmoap": GATE}}
    together = fastfpl.compare(ASKED, cache=tmp_path / "together", **how)
    once = dict(passes)
    assert set(once) == {"both"}
    mine = {**RUN, "model": clip, "cache": tmp_path / "alone"}
    for method in ASKED:
        one = fastfpl.run(method, **mine, options=GATE if method == "pfedmoap" else {})
        (other,) = together.results[method]
        assert figures(one) == figures(other), method
    alone = FeatureStore(tmp_path / "alone")
    assert files(FeatureStore(tmp_path / "together")) == files(alone)
    assert len(files(alone)) == 6  # three kinds of training and of test images
    assert passes["pooled"] == 2 * once["both"]
    assert passes["tokens"] == once["both"]


def test_other_images_are_not_of_one_pass():
    settings = {method: make_settings({**RUN, "method": method}) for method in ASKED}
    settings["fedotp"] = settings["fedotp"].model_copy(update={"shots": 3})
    jobs = [Job(one, None, name) for name, one in settings.items()]
    assert kinds_of(jobs) == ("raw", "pooled")
    assert kinds_of(jobs[1:]) == ()


def test_pairs_are_not_of_one_pass(clip, passes, tmp_path):
    how = {**RUN, "model": clip, "cache": tmp_path, "augment": "views:1"}
    assert METHODS["fedapt-unsupervised"].paired
    fastfpl.compare(["promptfl", "fedapt-unsupervised"], **how)
    kinds = Counter(path.name.split("-")[0] for path in tmp_path.iterdir())
    # the unsupervised one's: training images, a strong view of them, test images
    assert kinds == {"pooled": 2, "raw": 3}


def test_images_are_encoded_ahead_in_one_pass(clip, passes, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="fastfpl")
    asked = {"methods": ["promptfl", "fedapt", "fedotp"], "model": clip, "cache": tmp_path}
    (one,) = fastfpl.encode(["digits"], **asked)
    assert set(one.kinds) == {"pooled", "raw", "patches"}
    assert dict(passes) == {"both": one.train + one.test}
    assert not caplog.records


def test_kinds_are_stored_where_a_run_is_told_to(clip, tmp_path):
    fastfpl.run("zeroshot", model=clip, cache=tmp_path, also=["patches", "pooled"], **RUN)
    kinds = Counter(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert kinds == {"pooled": 1, "patches": 1}
    for also, sentence in (
        (["patch"], "also must be of patches, pooled, raw; got 'patch'; did you mean 'patches'"),
        ([3], "got 3"),
    ):
        with pytest.raises(InputError, match=sentence):
            fastfpl.run("zeroshot", model=clip, cache=tmp_path, also=also, **RUN)


def test_a_tower_without_patches_refuses_before_the_first_run(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(clip._image, "patches", None)
    rounds = []
    with pytest.raises(InputError, match="clip must give features of patches for a method of"):
        fastfpl.compare(
            ["promptfl", "fedotp"],
            model=clip,
            cache=tmp_path,
            on_round=lambda label, row: rounds.append(label),
            **RUN,
        )
    assert rounds == []
