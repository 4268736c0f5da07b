"""Features that are computed once."""

import json
import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastfpl
from fastfpl.errors import Damaged, InputError, KindError
from fastfpl.features import FeatureStore, TextFeatures, default_directory
from fastfpl.features import file as module
from tests.stored import KEY, Encoder, N, only_file, truth
from tests.warm import warm_python


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="fastfpl")
    return lambda: [record.getMessage() for record in caplog.records]


# --- the store on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(5,), (7, 3), ()])
def test_rows_come_back_bit_for_bit(store, dtype, shape):
    rows = truth(shape)
    key = replace(KEY, dtype=dtype)
    expected = rows.to(getattr(torch, dtype))
    for _ in range(2):
        found = store.get(key, N, Encoder(rows))
        assert len(found) == N
        assert found.shape == (N, *shape)
        assert found.dtype == expected.dtype
        assert torch.equal(found[:], expected)


def test_every_way_to_ask_for_rows(store):
    rows = truth()
    found = store.get(KEY, N, Encoder(rows))
    for indices in (
        [3, 1, 3, -1],
        np.array([30, 2]),
        torch.tensor([[0, 1], [5, 4]]),
        slice(3, 20, 4),
    ):
        assert torch.equal(found[indices], rows[indices])
    assert torch.equal(found[4], rows[4])
    assert torch.equal(found[np.int64(4)], rows[4])
    assert found[[]].shape == (0, 5)
    with pytest.raises(IndexError):
        found[[N]]
    with pytest.raises(KindError, match="indices must be integers; got float64"):
        found[[0.5]]


def test_returned_rows_are_no_windows_into_the_file(store):
    rows = truth()
    found = store.get(KEY, N, Encoder(rows))
    for indices in (2, slice(0, 4), [2, 3]):
        found[indices].zero_()
    assert torch.equal(found[:], rows)
    assert torch.equal(store.get(KEY, N, Encoder(rows))[:], rows)


def test_each_row_is_encoded_once_in_chunks(store):
    rows = truth()
    encoder = Encoder(rows)
    done = []
    store.get(KEY, N, encoder, lambda at, of: done.append((at, of)))
    assert encoder.asked == list(range(N))
    assert done == [(8, N), (16, N), (24, N), (32, N), (37, N)]
    store.get(KEY, N, encoder, lambda at, of: done.append((at, of)))
    assert len(encoder.asked) == N
    assert len(done) == 5


def test_a_new_store_finds_what_an_old_one_wrote(store, warned):
    rows = truth()
    store.get(KEY, N, Encoder(rows))
    encoder = Encoder(rows)
    found = FeatureStore(store.directory).get(KEY, N, encoder)
    assert encoder.asked == []
    assert torch.equal(found[:], rows)
    assert warned() == []


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "w1"},
        {"data": "d1"},
        {"split": "test"},
        {"view": "views:0"},
        {"kind": "patches"},
        {"dtype": "float16"},
    ],
)
def test_every_part_of_the_key_counts(store, warned, change):
    store.get(KEY, N, Encoder(truth()))
    other = truth(seed=1)
    found = store.get(replace(KEY, **change), N, Encoder(other))
    assert torch.equal(found[:], other.to(found.dtype))
    assert torch.equal(store.get(KEY, N, Encoder(other))[:], truth())
    assert len(list(store.directory.iterdir())) == 2
    assert warned() == []


def test_the_file_is_plain_safetensors_with_its_story(store):
    rows = truth((4, 3))
    store.get(KEY, N, Encoder(rows))
    path = only_file(store)
    assert torch.equal(load_file(path)["features"], rows)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["key"])["weights"] == "w0"
    assert json.loads(facts["shape"]) == [N, 4, 3]
    assert facts["dtype"] == "float32"
    assert facts["version"] == fastfpl.__version__
    assert len(facts["checksum"]) == 32


def touched(path, content):
    """Write content and make sure that the file looks younger, however coarse the clock is."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def flipped(content, at):
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def foreign(path):
    save_file({"features": truth()}, path)
    return path.read_bytes()


DAMAGE = {
    "empty": lambda content, path: b"",
    "header cut": lambda content, path: content[:40],
    "last byte gone": lambda content, path: content[:-1],
    "one byte more": lambda content, path: content + b"\0",
    "first value": lambda content, path: flipped(content, len(content) - 4 * 5 * N),
    "last value": lambda content, path: flipped(content, len(content) - 1),
    "header length": lambda content, path: flipped(content, 3),
    "shape": lambda content, path: content.replace(b'"shape": [37, 5]', b'"shape": [37, 4]'),
    "type": lambda content, path: content.replace(b'"F32"', b'"I32"'),
    "checksum": lambda content, path: flipped(content, content.index(b'"checksum": "') + 15),
    "not ours": lambda content, path: b"\x10\0\0\0\0\0\0\0" + b"[" * 4000,
    "deep": lambda content, path: (200_000).to_bytes(8, "little") + b"[" * 300_000,
    "plain safetensors": lambda content, path: foreign(path),
    "of another version": lambda content, path: content.replace(
        json.dumps(fastfpl.__version__).encode(), b'"9.9.9"'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_and_computed_again(store, warned, monkeypatch, damage):
    monkeypatch.setattr(module, "_PIECE", 64)  # hashed in several pieces
    rows = truth()
    store.get(KEY, N, Encoder(rows))
    path = only_file(store)
    content = path.read_bytes()
    changed = DAMAGE[damage](content, path)
    assert changed != content
    touched(path, changed)
    encoder = Encoder(rows)
    found = store.get(KEY, N, encoder)
    assert encoder.asked == list(range(N))
    assert torch.equal(found[:], rows)
    (warning,) = warned()
    assert warning.startswith(f"fastfpl.features: {path} must be a whole feature file of its key; ")
    assert warning.endswith("it is computed again")
    assert ("got one of fastfpl 9.9.9" in warning) == (damage == "of another version")
    assert path.read_bytes() == content
    store.get(KEY, N, encoder)
    assert len(encoder.asked) == N
    assert len(warned()) == 1


def test_the_features_of_another_key_under_this_name_are_noticed(store, warned):
    other = replace(KEY, weights="w1")
    store.get(other, N, Encoder(truth(seed=1)))
    only_file(store).rename(store.directory / KEY.filename)
    assert torch.equal(store.get(KEY, N, Encoder(truth()))[:], truth())
    assert 'got the key {"data": "d0"' in warned()[0]


def test_another_number_of_images_is_noticed(store, warned):
    store.get(KEY, N, Encoder(truth()))
    assert len(store.get(KEY, N - 1, Encoder(truth()))) == N - 1
    assert "got shape (37, 5) for 36 images" in warned()[0]


def test_the_checksum_is_computed_once_per_process_and_file(store, monkeypatch):
    store.get(KEY, N, Encoder(truth()))
    counted = []
    real = module.digest_of
    monkeypatch.setattr(module, "digest_of", lambda *a: counted.append(a) or real(*a))
    store.get(KEY, N, Encoder(truth()))
    assert counted == []
    path = only_file(store)
    touched(path, path.read_bytes())
    store.get(KEY, N, Encoder(truth()))
    store.get(KEY, N, Encoder(truth()))
    assert len(counted) == 1


@pytest.mark.parametrize("at", [0, 16])
def test_an_encoder_that_fails_leaves_whole_chunks_or_nothing(store, at):
    def fails(indices):
        if indices[0] >= at:
            raise ZeroDivisionError
        return truth()[indices]

    with pytest.raises(ZeroDivisionError):
        store.get(KEY, N, fails)
    assert len(list(store.directory.iterdir())) == (2 if at else 0)
    encoder = Encoder(truth())
    assert torch.equal(store.get(KEY, N, encoder)[:], truth())
    assert encoder.asked == list(range(at, N))
    assert only_file(store).name == KEY.filename


@pytest.mark.parametrize(
    ("rows", "error", "rest"),
    [
        (torch.ones(8, 5, dtype=torch.int64), KindError, "floating point; got torch.int64"),
        (torch.ones(7, 5), InputError, r"must return shape \(8, 5\), none of it 0; got \(7, 5\)"),
        (torch.ones(8, 0), InputError, r"none of it 0; got \(8, 0\)"),
        (torch.full((8, 5), float("nan")), InputError, "finite in float16"),
        (torch.full((8, 5), 1e6), InputError, "finite in float16"),  # overflows
    ],
)
def test_features_that_make_no_sense_are_refused(store, rows, error, rest):
    with pytest.raises(error, match=rest):
        store.get(replace(KEY, dtype="float16"), N, lambda indices: rows)
    assert list(store.directory.iterdir()) == []


def test_rows_of_two_shapes_are_refused(store):
    with pytest.raises(InputError, match=r"must return shape \(8, 5\).*got \(8, 6\)"):
        store.get(KEY, N, lambda indices: torch.ones(8, 5 if indices[0] == 0 else 6))


def test_a_tensor_with_a_graph_or_strides_is_stored_as_its_values(store):
    rows = truth((3, 5)).requires_grad_()
    found = store.get(KEY, N, lambda indices: rows[torch.from_numpy(indices)].mT)
    assert torch.equal(found[:], rows.detach().mT)


@pytest.mark.parametrize(
    ("change", "rest"),
    [
        ({"kind": "patch"}, r"kind must be one of patches, pooled, raw; got 'patch'; did you mean"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
    ],
)
def test_keys_that_make_no_sense_are_refused(change, rest):
    with pytest.raises(InputError, match=rest):
        replace(KEY, **change)


def test_sizes_that_make_no_sense_are_refused(store):
    with pytest.raises(InputError, match="n must be positive; got 0"):
        store.get(KEY, 0, Encoder(truth()))
    with pytest.raises(InputError, match="chunk must be positive; got 0"):
        FeatureStore(store.directory, chunk=0)


def test_a_directory_that_cannot_be_made_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = FeatureStore(tmp_path / "file" / "features")
    with pytest.raises(InputError, match="directory must be writable and have room; got NotADir"):
        store.get(KEY, N, Encoder(truth()))


def test_a_name_that_is_taken_by_a_folder_ends_in_a_sentence(store, warned):
    (store.directory / KEY.filename).mkdir(parents=True)
    with pytest.raises(InputError, match="directory must be writable and have room; got IsADir"):
        store.get(KEY, N, Encoder(truth()))
    assert "got IsADirectoryError" in warned()[0]


def test_a_file_that_vanishes_at_once_ends_in_a_sentence(store, monkeypatch):
    monkeypatch.setattr(module.os, "replace", lambda part, path: None)
    with pytest.raises(Damaged, match="must stay while it is in use; got no file"):
        store.get(KEY, N, Encoder(truth()))


def test_the_default_directory_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FeatureStore().directory == tmp_path / "fastfpl" / "features"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_directory() == tmp_path / "home" / ".cache" / "fastfpl" / "features"


# --- several processes ----------------------------------------------------------------------------

CHILD = """
import warnings
warnings.simplefilter("error")
import sys, time
from pathlib import Path
import torch
from fastfpl.features import FeatureKey, FeatureStore, store

store.STALLED, store._POLL = 0.3, 0.05  # the other one makes no progress
directory, marks, me, wait_for = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
key = FeatureKey("w0", "d0", "train", "none", "pooled", "float32")
rows = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))

def build(indices):
    if indices[0] == 8:
        (marks / me).touch()
        limit = time.monotonic() + 60
        while not (marks / wait_for).exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
    return rows[torch.from_numpy(indices)]

assert torch.equal(FeatureStore(directory, chunk=8).get(key, 37, build)[:], rows)
"""


def child(store, marks, me, wait_for):
    return subprocess.Popen(
        [*warm_python(), "-c", CHILD, store.directory, marks, me, wait_for],
        env={**os.environ, "PYTHONPATH": str(Path(fastfpl.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_may_build_at_the_same_time(store, tmp_path, warned):
    # each waits in the middle of its build until the other one is there too
    children = [child(store, tmp_path, *pair) for pair in (("a", "b"), ("b", "a"))]
    for process in children:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert only_file(store).name == KEY.filename
    encoder = Encoder(truth())
    assert torch.equal(store.get(KEY, N, encoder)[:], truth())
    assert encoder.asked == []
    assert warned() == []


def test_a_mapped_file_outlives_its_replacement(store):
    rows = truth()
    found = store.get(KEY, N, Encoder(rows))
    only_file(store).unlink()
    assert torch.equal(store.get(KEY, N, Encoder(truth(seed=1)))[:], truth(seed=1))
    assert torch.equal(found[:], rows)


# --- text features in memory ----------------------------------------------------------------------


class Tower:
    """Encode (m, T, W) as (m, C, D), row by row, and remember the batches."""

    def __init__(self, classes=3):
        self.classes = classes
        self.batches = []

    def __call__(self, ctx):
        self.batches.append(len(ctx))
        return torch.stack([ctx.sum(1) * (c + 1) for c in range(self.classes)], dim=1)


@pytest.fixture
def contexts():
    rows = truth((4, 2), n=6)
    return {("client", k): rows[k] for k in range(6)}


def test_missing_keys_are_encoded_in_one_call(contexts):
    cache, tower = TextFeatures(), Tower()
    keys = list(contexts)
    expected = Tower()(torch.stack([contexts[k] for k in keys]))
    first = cache.get_or_encode([keys[1], keys[4]], contexts.__getitem__, tower)
    assert torch.equal(first, expected[[1, 4]])
    mixed = [keys[0], keys[4], keys[2], keys[0], keys[1]]
    assert torch.equal(
        cache.get_or_encode(mixed, contexts.__getitem__, tower), expected[[0, 4, 2, 0, 1]]
    )
    assert torch.equal(cache.get_or_encode(mixed, None, None), expected[[0, 4, 2, 0, 1]])
    assert tower.batches == [2, 2]
    assert len(cache) == 4
    assert cache.nbytes == 4 * 3 * 2 * 4


def test_a_new_version_is_encoded_anew(contexts):
    cache, tower = TextFeatures(), Tower()
    one = cache.get_or_encode([("client", 0)], contexts.__getitem__, tower)
    two = cache.get_or_encode([("client", 1)], contexts.__getitem__, tower)
    assert not torch.equal(one, two)
    other = cache.get_or_encode([("server", 0)], lambda key: contexts["client", 2], tower)
    assert not torch.equal(one, other)
    assert tower.batches == [1, 1, 1]


def test_cached_equals_uncached_after_a_step_that_hides_from_version_counters():
    ctx = truth((4, 2), n=1)[0].requires_grad_()
    step = torch.optim.SGD([ctx], lr=0.5, fused=True)
    cache, tower = TextFeatures(), Tower()
    for version in range(3):
        cached = cache.get_or_encode([("client", version)], lambda key: ctx, tower)
        assert torch.equal(cached, Tower()(ctx.detach()[None]))
        (ctx**2).sum().backward()
        step.step()
    assert tower.batches == [1, 1, 1]


def test_nothing_that_a_caller_does_reaches_the_cache(contexts):
    kept = []

    def tower(ctx):
        kept.append(Tower()(ctx))
        return kept[0]

    cache = TextFeatures()
    keys = list(contexts)[:2]
    first = cache.get_or_encode(keys, contexts.__getitem__, tower)
    expected = first.clone()
    first.zero_()
    kept[0].zero_()
    for key in keys:
        contexts[key].zero_()
    second = cache.get_or_encode(keys, None, None)
    assert torch.equal(second, expected)
    second.zero_()
    assert torch.equal(cache.get_or_encode(keys, None, None), expected)
    single = cache.get_or_encode(keys[:1], None, None)
    single.zero_()
    assert torch.equal(cache.get_or_encode(keys, None, None), expected)


def test_features_are_constants_and_usable_in_a_graph(contexts):
    cache, tower = TextFeatures(), Tower()
    keys = list(contexts)[:2]
    for context in contexts.values():
        context.requires_grad_()
    with torch.inference_mode():
        cache.get_or_encode(keys, contexts.__getitem__, tower)
    constant = cache.get_or_encode(list(contexts)[:3], contexts.__getitem__, tower)
    assert not constant.requires_grad
    image = torch.ones(2, requires_grad=True)
    (constant @ image).sum().backward()
    torch.testing.assert_close(image.grad, constant.sum((0, 1)))


def test_the_least_recently_used_goes_first(contexts):
    row = 3 * 2 * 4
    cache, tower = TextFeatures(max_bytes=3 * row), Tower()
    a, b, c, d, *_ = contexts
    cache.get_or_encode([a, b, c], contexts.__getitem__, tower)
    cache.get_or_encode([a], contexts.__getitem__, tower)
    cache.get_or_encode([d], contexts.__getitem__, tower)
    assert [key in cache for key in (a, b, c, d)] == [True, False, True, True]
    assert cache.nbytes == 3 * row
    assert tower.batches == [3, 1]


@pytest.mark.parametrize(("room", "left"), [(0, 0), (23, 0), (24, 1), (60, 2)])
def test_a_call_larger_than_the_bound_is_answered_all_the_same(contexts, room, left):
    cache, tower = TextFeatures(max_bytes=room), Tower()
    keys = list(contexts)
    found = cache.get_or_encode(keys, contexts.__getitem__, tower)
    assert torch.equal(found, Tower()(torch.stack(list(contexts.values()))))
    assert len(cache) == left
    assert cache.nbytes == 24 * left <= room


def test_a_kept_row_does_not_keep_its_batch_alive(contexts):
    cache = TextFeatures()
    cache.get_or_encode(list(contexts), contexts.__getitem__, Tower())
    for row, _ in cache._kept.values():
        assert row.untyped_storage().nbytes() == 24


def test_clear_forgets(contexts):
    cache, tower = TextFeatures(), Tower()
    for _ in range(2):
        cache.get_or_encode(list(contexts), contexts.__getitem__, tower)
        cache.clear()
        assert (len(cache), cache.nbytes) == (0, 0)
    assert tower.batches == [6, 6]


def test_without_verify_a_reused_key_is_believed(contexts):
    cache, tower = TextFeatures(), Tower()
    (key, *_), old = contexts, None
    old = cache.get_or_encode([key], contexts.__getitem__, tower)
    contexts[key].data.add_(1)
    assert torch.equal(cache.get_or_encode([key], contexts.__getitem__, tower), old)


def test_verify_notices_a_key_used_for_a_changed_tensor(contexts):
    cache, tower = TextFeatures(verify=True), Tower()
    a, b, *_ = contexts
    first = cache.get_or_encode([a], contexts.__getitem__, tower)
    assert torch.equal(cache.get_or_encode([a, b], contexts.__getitem__, tower)[:1], first)
    contexts[a].data[3, 1] += 1e-3  # leaves the version counter alone
    with pytest.raises(Damaged, match=r"key must get a new version .* got \('client', 0\)"):
        cache.get_or_encode([b, a], contexts.__getitem__, tower)
    assert tower.batches == [1, 1]


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.reshape(2, 4)])
def test_verify_looks_at_dtype_and_shape_too(contexts, change):
    cache = TextFeatures(verify=True)
    key = ("client", 0)
    contexts[key].zero_()
    cache.get_or_encode([key], contexts.__getitem__, Tower())
    contexts[key] = change(contexts[key])
    with pytest.raises(Damaged, match="key must get a new version"):
        cache.get_or_encode([key], contexts.__getitem__, Tower())


def test_look_ups_that_make_no_sense_are_refused(contexts):
    cache = TextFeatures()
    with pytest.raises(InputError, match="keys must name at least one context; got none"):
        cache.get_or_encode([], contexts.__getitem__, Tower())
    with pytest.raises(KindError, match=r"key must be \(owner, version\); got 'client'"):
        cache.get_or_encode(["client"], contexts.__getitem__, Tower())
    with pytest.raises(InputError, match=r"encode must return 6 rows; got shape \(1, 3, 2\)"):
        cache.get_or_encode(list(contexts), contexts.__getitem__, lambda ctx: Tower()(ctx[:1]))
    contexts["client", 0] = torch.ones(5, 2)
    with pytest.raises(InputError, match=r"one shape; got \(4, 2\) and \(5, 2\)"):
        cache.get_or_encode(list(contexts), contexts.__getitem__, Tower())
    with pytest.raises(InputError, match="max_bytes must not be negative; got -1"):
        TextFeatures(-1)
    assert len(cache) == 0
