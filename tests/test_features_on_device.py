"""Stored features that stay on a device: the same bits, read once."""

import numpy as np
import pytest
import torch

import fastfpl
from fastfpl.config import make_settings
from fastfpl.errors import FastfplError
from fastfpl.features import DeviceFeatures, DeviceRoom, Features, gathered, on_device
from fastfpl.training.budget import Budget
from fastfpl.training.feeds import Feed
from tests.worlds import TINY_RUN, figures, small_clip

CPU = torch.device("cpu")


def features_of(dtype=torch.float32, n=37, row=(3, 5)):
    """Return features of n rows that no two share, as if they were mapped."""
    rows = torch.randn(n, *row, generator=torch.Generator().manual_seed(0)).to(dtype)
    same_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return Features(rows.view(same_width).numpy(), dtype), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", [False, True])
def test_rows_are_the_same_wherever_they_stay(dtype, part, monkeypatch):
    features, rows = features_of(dtype)
    if part:
        of = np.array([30, 2, 2, 11, 36])
        features, rows = features.part(of), rows[of]
    monkeypatch.setattr(on_device, "_PIECE", 4 * rows[0].nbytes)  # several pieces, the last short
    kept = DeviceFeatures([features], CPU)
    assert kept.rows.dtype == dtype
    assert torch.equal(kept.rows, rows)
    for at in ([1, 4, 0, 4], []):
        where = np.array(at, dtype=np.int64)
        out = torch.empty(len(at), *rows.shape[1:], dtype=dtype)
        assert features.read(where, out) is out
        for found in (gathered(kept, where, CPU), gathered([features], where, CPU), out):
            assert torch.equal(found, rows[where])
            assert found.data_ptr() != kept.rows.data_ptr() or not at
        other, _ = features_of(dtype)
        views = [features, other.part(np.arange(36, 36 - len(rows), -1))]
        which = np.array([1, 0, 0, 1][: len(at)], dtype=np.int64)
        wanted = gathered(views, where, CPU, which)
        for one, row, v in zip(wanted, at, which, strict=True):
            assert torch.equal(one, views[v][row])
        assert torch.equal(gathered(DeviceFeatures(views, CPU), where, CPU, which), wanted)


def test_who_asks_first_has_the_room():
    features, _ = features_of()
    room = DeviceRoom(CPU)
    views = [features, features.part(np.arange(37))]
    assert room.keep(views) is views  # files are mapped there
    room.left = 3 * features.nbytes + 1
    assert isinstance(room.keep(views), DeviceFeatures)
    assert room.keep(views) is views  # all of them, or none
    assert isinstance(room.keep([features]), DeviceFeatures)
    assert room.left == 1
    assert room.keep([features]) == [features]


def test_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    card = torch.device("cuda", 0)
    assert DeviceRoom(card).left == 250
    assert DeviceRoom(card, 700).left == 700
    assert DeviceRoom(card, 0).left == 0
    assert DeviceRoom(CPU, 700).left == 0


def test_a_budget_gives_a_quarter_of_its_room():
    budget = Budget(64 << 30, CPU)
    assert budget.device_features(None) == budget.room // 4
    assert budget.device_features(5) == 5
    assert budget.device_features(1 << 50) == budget.room // 4


def test_the_setting_takes_bytes_and_none():
    def asked(value):
        return make_settings({"method": "promptfl", "resident_features": value}).resident_features

    assert make_settings({"method": "promptfl"}).resident_features is None
    assert (asked("2GiB"), asked("0"), asked(0)) == (2 << 30, 0, 0)
    for wrong in ("much", -1, False):
        with pytest.raises(FastfplError, match="resident_features"):
            asked(wrong)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("promptfl", {}),
        ("fedotp", {"augment": "views:2", "feature_dtype": "bfloat16"}),
        ("fedapt-unsupervised", {"augment": "views:2"}),
    ],
)
def test_a_run_is_the_same_and_reads_its_features_once(method, more, tmp_path, monkeypatch):
    clip = small_clip()

    def play(name):
        where = {"out": tmp_path / name, "cache": tmp_path / "features"}
        return fastfpl.run(method, model=clip, **where, **TINY_RUN, **more)

    plain = play("plain")

    def room(*_):
        found = DeviceRoom(CPU)
        found.left = 1 << 30
        return found

    reads = []
    plain_read, plain_item = Features.read, Features.__getitem__

    def read(self, at, out):
        reads.append(len(at))
        return plain_read(self, at, out)

    def item(self, indices):
        reads.append(len(indices))
        return plain_item(self, indices)

    batches = []
    view = Feed._view

    def noted(self, source, indices, draws):
        if not batches:
            batches.append(len(reads))  # all that was brought before the first batch
        assert isinstance(source, DeviceFeatures)
        return view(self, source, indices, draws)

    monkeypatch.setattr("fastfpl.federation.preparation.make_room", room)
    monkeypatch.setattr(Features, "read", read)
    monkeypatch.setattr(Features, "__getitem__", item)
    monkeypatch.setattr(Feed, "_view", noted)
    near = play("near")
    assert len(reads) == batches[0] > 0
    assert figures(near) == figures(plain)
