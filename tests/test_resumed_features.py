"""What was encoded before a kill is verified and gone on with, and the file is the same."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastfpl
from fastfpl import files
from fastfpl.errors import InputError
from fastfpl.features import FeatureStore, Whole
from fastfpl.features import store as features
from tests.stored import CHUNK, KEY, Encoder, N, Stop, only_file, truth
from tests.warm import warm_python

ROW = 5 * 4
DAY = 24 * 3600


class Until:
    """Build rows until an image, then raise."""

    def __init__(self, rows, at, error=Stop):
        self.rows, self.at, self.error = rows, at, error

    def __call__(self, indices):
        if indices[0] >= self.at:
            raise self.error
        return self.rows[torch.from_numpy(indices)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file of a run that nobody interrupted."""
    mine = FeatureStore(tmp_path_factory.mktemp("whole"), chunk=CHUNK)
    mine.get(KEY, N, Encoder(truth()))
    return only_file(mine).read_bytes()


def part_of(store):
    (part,) = store.directory.glob(".*.part")
    return part, part.with_suffix(".journal")


def interrupted(store, at=24, key=KEY, rows=None, n=N):
    with pytest.raises(Stop):
        store.get(key, n, Until(truth() if rows is None else rows, at))
    return part_of(store)


def assert_goes_on(store, whole, first):
    """The next run asks for images from ``first`` on, and ends with the very same file."""
    encoder, told = Encoder(truth()), []
    found = store.get(KEY, N, encoder, lambda at, of: told.append(at))
    assert encoder.asked == list(range(first, N))
    assert told == [*([first] if first else []), *range(first + CHUNK, N, CHUNK), N]
    assert torch.equal(found[:], truth())
    assert only_file(store).name == KEY.filename
    assert only_file(store).read_bytes() == whole


@pytest.mark.parametrize("at", [8, 16, 24, 32])
def test_an_interrupted_encoding_goes_on_where_it_stopped(store, whole, at):
    part, journal = interrupted(store, at)
    assert part.name == f".{KEY.filename.removesuffix('.safetensors')}.part"
    # a line that says whose chunks they are, then one a chunk
    head, *sums, end = journal.read_bytes().split(b"\n")
    assert json.loads(head)["facts"]["chunk"] == CHUNK
    assert (len(sums), end) == (at // CHUNK, b"")
    assert_goes_on(store, whole, at)


def test_several_interruptions_in_a_row(store, whole):
    for at in (8, 24, 24, 32):
        interrupted(store, at)
    assert_goes_on(store, whole, 32)


def test_all_chunks_but_no_end(store, whole, monkeypatch):
    def killed(self, head):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(files.Growing, "finish", killed)
        with pytest.raises(Stop):
            store.get(KEY, N, Encoder(truth()))
    encoder, told = Encoder(truth()), []
    assert torch.equal(store.get(KEY, N, encoder, lambda *a: told.append(a))[:], truth())
    assert (encoder.asked, told) == ([], [(N, N)])
    assert only_file(store).read_bytes() == whole


def offset_of(part):
    return part.stat().st_size - 24 * ROW


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def torn(part, journal):
    with part.open("ab") as file:
        file.write(b"half a chunk")
    with journal.open("ab") as file:
        file.write(b"0123")


def lengthened(part, journal):
    with part.open("ab") as file:
        file.write(b"x" * 10_000)


# what happened to the part or its journal, and from where it is encoded again
HARM = {
    "nothing": (lambda part, journal: None, 24),
    "a chunk half written": (torn, 24),
    "part longer than it will be": (lengthened, 24),
    "part a byte short": (lambda part, journal: os.truncate(part, part.stat().st_size - 1), 16),
    "part cut in the second chunk": (
        lambda part, journal: os.truncate(part, offset_of(part) + 9 * ROW),
        8,
    ),
    "part empty": (lambda part, journal: os.truncate(part, 0), 0),
    "first chunk changed": (lambda part, journal: flip(part, offset_of(part)), 0),
    "second chunk changed": (lambda part, journal: flip(part, offset_of(part) + 16 * ROW - 1), 8),
    "last byte changed": (lambda part, journal: flip(part, part.stat().st_size - 1), 16),
    "journal gone": (lambda part, journal: journal.unlink(), 0),
    "journal empty": (lambda part, journal: os.truncate(journal, 0), 0),
    "journal cut in its first line": (lambda part, journal: os.truncate(journal, 40), 0),
    "journal a byte short": (
        # the checksum is whole, its line is not: it counts all the same
        lambda part, journal: os.truncate(journal, journal.stat().st_size - 1),
        24,
    ),
    "journal two bytes short": (
        lambda part, journal: os.truncate(journal, journal.stat().st_size - 2),
        16,
    ),
    "second checksum changed": (
        lambda part, journal: flip(journal, journal.stat().st_size - 2 * 33 + 4),
        8,
    ),
    "journal is no text": (lambda part, journal: journal.write_bytes(b"\xff\0" * 50), 0),
    "journal is another JSON": (lambda part, journal: journal.write_bytes(b"[1]\n"), 0),
    "journal is deep": (lambda part, journal: journal.write_bytes(b"[" * 100_000), 0),
    "part gone": (lambda part, journal: part.unlink(), 0),
}


@pytest.mark.parametrize("harm", HARM)
def test_the_longest_whole_prefix_is_kept(store, whole, harm):
    change, first = HARM[harm]
    change(*interrupted(store))
    assert_goes_on(store, whole, first)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head["facts"].update(key=json.dumps({"weights": "others"})),
        lambda head: head["facts"].update(chunk=4),
        lambda head: head["facts"].update(shape="[36]"),
        lambda head: head["facts"].update(version="9.9.9"),
        lambda head: head.update(format="fastfpl-journal-0"),
        lambda head: head.update(note=[4]),
        lambda head: head.update(note=[10**12]),
        lambda head: head.update(note=[-5]),
        lambda head: head.update(note=[True]),
        lambda head: head.update(note="5"),
        lambda head: head.pop("note"),
    ],
)
def test_the_journal_of_something_else_does_not_count(store, whole, change):
    _, journal = interrupted(store)
    first, *rest = journal.read_bytes().split(b"\n")
    head = json.loads(first)
    change(head)
    journal.write_bytes(b"\n".join([json.dumps(head, sort_keys=True).encode(), *rest]))
    assert_goes_on(store, whole, 0)


def test_another_chunk_begins_anew(store, tmp_path):
    interrupted(store)
    encoder = Encoder(truth())
    other = FeatureStore(store.directory, chunk=12)
    assert torch.equal(other.get(KEY, N, encoder)[:], truth())
    assert encoder.asked == list(range(N))


def test_another_number_of_images_begins_anew(store):
    interrupted(store)
    encoder = Encoder(truth())
    assert len(store.get(KEY, N - 1, encoder)) == N - 1
    assert encoder.asked == list(range(N - 1))


def test_another_key_has_its_own_part(store, whole):
    interrupted(store)
    other = replace(KEY, split="test")
    with pytest.raises(Stop):
        store.get(other, N, Until(truth(seed=1), 16))
    assert len(list(store.directory.iterdir())) == 4
    encoder = Encoder(truth(seed=1))
    assert torch.equal(store.get(other, N, encoder)[:], truth(seed=1))
    assert encoder.asked == list(range(16, N))
    (store.directory / other.filename).unlink()
    assert_goes_on(store, whole, 24)


def test_rows_that_changed_their_shape_begin_anew(store):
    interrupted(store)
    rows = truth((4,))
    encoder = Encoder(rows)
    assert torch.equal(store.get(KEY, N, encoder)[:], rows)
    assert encoder.asked == [*range(24, 32), *range(N)]


def test_all_16_bit_types_go_on(store):
    for dtype in ("float16", "bfloat16"):
        key = replace(KEY, dtype=dtype)
        with pytest.raises(Stop):
            store.get(key, N, Until(truth(), 16))
        encoder = Encoder(truth())
        assert torch.equal(store.get(key, N, encoder)[:], truth().to(getattr(torch, dtype)))
        assert encoder.asked == list(range(16, N))


def test_the_encoder_is_told_of_what_is_left(store):
    for at, wanted in ((16, range(N)), (N, range(16, N))):
        told = []
        build = Until(truth(), at)
        with contextlib.suppress(Stop):
            store.get(KEY, N, build, ahead=lambda chunks, told=told: told.extend(chunks))
        assert [i for chunk in told for i in chunk.tolist()] == list(wanted)


def test_a_device_gets_the_next_chunk_before_the_last_one_is_written(monkeypatch):
    order = []

    def leave(rows, key):
        return SimpleNamespace(rows=rows, event=object())

    def build(at):
        if at == [3]:
            raise Stop
        order.append(f"build {at}")
        return [at]

    monkeypatch.setattr(features, "_leave", leave)

    def consume():
        files = [SimpleNamespace(column=0, key=KEY)]
        for at, (leaving,) in features._built([[1], [2], [3], [4]], build, files):
            order.append(f"write {leaving.rows} {at}")

    with pytest.raises(Stop):
        consume()
    # and what was built before an error is written all the same
    assert order == ["build [1]", "build [2]", "write [1] [1]", "write [2] [2]"]


# --- kills ----------------------------------------------------------------------------------------

CHILD = """
import warnings
warnings.simplefilter("error")
import sys, time
from pathlib import Path
import torch
from fastfpl.features import FeatureStore
from fastfpl.features import store as features
from tests.stored import KEY, N, truth

directory, mark, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rows = truth()

def build(indices):
    if indices[0] == stop:
        mark.touch()
        time.sleep(120)
    return rows[torch.from_numpy(indices)]

FeatureStore(directory, chunk=8).get(KEY, N, build)
"""


def started(store, mark, stop):
    """Start a process that encodes and hangs before an image; return it when it is there."""
    process = subprocess.Popen(
        [*warm_python(), "-c", CHILD, store.directory, mark, str(stop)],
        env={**os.environ, "PYTHONPATH": str(Path(fastfpl.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 100
    while not mark.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.read()  # its end is that of the fork that wrote to it
    process.stderr.close()


@pytest.mark.slow
def test_sigkill_loses_no_whole_chunk(store, whole, tmp_path):
    for stop in (16, 32):  # the second one goes on after the first
        kill(started(store, tmp_path / f"at {stop}", stop))
    part, _ = part_of(store)
    assert part.stat().st_size >= 32 * ROW
    assert_goes_on(store, whole, 32)


def test_who_waits_for_a_process_that_is_killed_goes_on_in_its_place(
    store, whole, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(features, "_POLL", 0.05)
    process = started(store, tmp_path / "there", 16)
    reports, encoder = [], Encoder(truth())

    def progress(done, n):
        if not reports:  # it waits
            kill(process)
        reports.append((done, n))

    with caplog.at_level(logging.WARNING, "fastfpl"):
        assert torch.equal(store.get(KEY, N, encoder, progress)[:], truth())
    assert reports[0] == (16, N)  # of the other one
    assert encoder.asked == list(range(16, N))
    assert (store.directory / KEY.filename).read_bytes() == whole
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"another process is encoding these {N} images" in said[0]
    assert not list(store.directory.glob(".*"))


def test_who_waits_gets_what_the_other_one_has_encoded(store, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_POLL", 0.05)
    child = CHILD.replace("time.sleep(120)", "time.sleep(1)")
    command = [*warm_python(), "-c", child, store.directory, tmp_path / "there", "16"]
    root = str(Path(fastfpl.__file__).parents[1])
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}) as process:
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        encoder = Encoder(truth())
        assert torch.equal(store.get(KEY, N, encoder)[:], truth())
        assert encoder.asked == []
        assert process.wait() == 0
    assert (store.directory / KEY.filename).read_bytes() == whole


def test_a_part_is_taken_from_the_whole_that_is_there_or_about_to_be(store, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_POLL", 0.05)
    part, rows = replace(KEY, split="part"), np.array([3, 1, 36])
    whole = Whole(KEY, N, rows)
    own = Encoder(truth()[rows])
    assert torch.equal(store.get(part, 3, own, whole=whole)[:], truth()[rows])
    assert own.asked == [0, 1, 2]  # there was none
    store.get(KEY, N, Encoder(truth()))
    (store.directory / part.filename).unlink()
    taken = store.get(part, 3, own, whole=whole)
    assert own.asked == [0, 1, 2]
    assert taken.shape == (3, *truth().shape[1:])
    assert torch.equal(taken[[2, 0]], truth()[[36, 3]])
    assert torch.equal(taken[1], truth()[1])
    assert torch.equal(taken[1:], truth()[[1, 36]])
    assert len(taken) == 3
    # what is damaged serves nobody, and is left for who needs all of it
    path = store.directory / KEY.filename
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(store.get(part, 3, own, whole=whole)[:], truth()[rows])
    assert own.asked == [0, 1, 2] * 2
    # a part that is there is gone on with
    path.unlink()
    store.get(KEY, N, Encoder(truth() + 1))
    assert torch.equal(store.get(part, 3, own, whole=whole)[:], truth()[rows])


def test_for_a_process_that_hangs_nobody_waits_for_ever(store, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "STALLED", 0.2)
    monkeypatch.setattr(features, "_POLL", 0.05)
    process = started(store, tmp_path / "there", 16)
    try:
        held, _ = part_of(store)
        encoder = Encoder(truth())
        began = time.monotonic()
        assert torch.equal(store.get(KEY, N, encoder)[:], truth())
        assert time.monotonic() - began < 20  # it did not wait for long
        assert encoder.asked == list(range(N))
        assert (store.directory / KEY.filename).read_bytes() == whole
        # and took nothing from the one that holds it, nor does a sweep
        assert part_of(store)[0] == held
        long_ago = (time.time() - 30 * DAY,) * 2
        os.utime(held, long_ago)
        files.sweep_parts(store.directory, features._MINE, private=DAY, resumable=7 * DAY)
        assert held.exists()
        os.utime(held)
        # an interrupted private part leaves nothing
        with pytest.raises(Stop):
            store.get(replace(KEY, split="x"), N, Until(truth(), 0))
        (store.directory / KEY.filename).unlink()
        with pytest.raises(Stop):
            store.get(KEY, N, Until(truth(), 24))
        assert part_of(store)[0] == held
    finally:
        kill(process)
    assert_goes_on(store, whole, 16)


@pytest.mark.parametrize("there", [True, False])
def test_a_part_whose_holder_ended_meanwhile_is_not_written_into(store, whole, monkeypatch, there):
    """The name is looked up, the file is opened, its holder gives it its final name."""
    interrupted(store)
    opened = []
    plain = os.fdopen

    def fdopen(number, *rest):
        file = plain(number, *rest)
        if not opened:
            opened.append(file)
            monkeypatch.setattr(files.os, "fdopen", plain)
            assert_goes_on(store, whole, 24)
            if not there:
                (store.directory / KEY.filename).unlink()
        return file

    monkeypatch.setattr(files.os, "fdopen", fdopen)
    encoder = Encoder(truth())
    assert torch.equal(store.get(KEY, N, encoder)[:], truth())
    assert encoder.asked == ([] if there else list(range(N)))
    assert only_file(store).read_bytes() == whole


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_parts_are_private(store, whole, monkeypatch, number):
    import fcntl

    def flock(file, how):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Stop):
        store.get(KEY, N, Until(truth(), 16))
    assert [p for p in store.directory.iterdir() if p.stat().st_size] == []
    monkeypatch.undo()
    assert_goes_on(store, whole, 0)


def test_another_users_part_is_left_alone(store, monkeypatch):
    part, _ = interrupted(store)
    plain = os.open

    def refusing(path, *rest):
        if path == part:
            raise PermissionError(errno.EACCES, "not yours", str(path))
        return plain(path, *rest)

    monkeypatch.setattr(files.os, "open", refusing)
    encoder = Encoder(truth())
    assert torch.equal(store.get(KEY, N, encoder)[:], truth())
    assert encoder.asked == list(range(N))
    assert part.exists()


# --- what is left behind --------------------------------------------------------------------------


def test_old_parts_go_and_young_ones_stay(store, whole):
    interrupted(store)
    interrupted_names = {path.name for path in store.directory.iterdir()}
    other = replace(KEY, split="other")
    with pytest.raises(Stop):
        store.get(other, N, Until(truth(), 16))
    name = f".pooled-{'0123' * 8}"
    private = store.directory / f"{name}-4567-89abcdef.part"
    private.touch()
    stray = store.directory / f"{name}.journal"
    stray.touch()

    def age(days, *paths):
        for path in paths:
            os.utime(path, (time.time() - days * DAY,) * 2)

    everything = list(store.directory.iterdir())
    assert len(everything) == 6
    age(6, *everything)
    store.get(replace(KEY, split="a"), 1, Encoder(truth()))
    assert not private.exists()
    assert stray.exists()
    mine = [store.directory / name for name in interrupted_names]
    assert all(path.exists() for path in mine)
    age(8, stray, *(p for p in everything if p.exists() and p.name not in interrupted_names))
    store.get(replace(KEY, split="b"), 1, Encoder(truth()))
    assert {p.name for p in store.directory.iterdir() if p.name.startswith(".")} == (
        interrupted_names
    )
    for name in ("a", "b"):
        (store.directory / replace(KEY, split=name).filename).unlink()
    assert_goes_on(store, whole, 24)


def full(after):
    """A disk that has room for so many writes."""
    plain, left = files.Growing.append, [after]

    def append(self, chunk):
        if not left[0]:
            self._file.write(chunk[: len(chunk) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        plain(self, chunk)

    return append


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(store, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files.Growing, "append", full(2))
        sentence = "directory must be writable and have room; got OSError: .*No space left"
        with pytest.raises(InputError, match=sentence):
            store.get(KEY, N, Encoder(truth()))
    assert_goes_on(store, whole, 16)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_file_that_cannot_be_flushed_is_closed_all_the_same(store):
    store.directory.mkdir(parents=True)
    with files.Growing(store.directory / "x.safetensors", {}) as growing:
        growing.begin(8, [1])
        growing._file.close()
        growing._file = io.BufferedWriter(io.FileIO("/dev/full", "r+"))
        with pytest.raises(OSError, match="No space left"):
            growing.append(b"much")
    assert growing._file.closed
    assert list(store.directory.iterdir()) == []


def test_checksums_of_the_journal_are_those_of_the_chunks(store):
    part, journal = interrupted(store)
    data = part.read_bytes()[-24 * ROW :]
    sums = journal.read_text().splitlines()[1:]
    assert sums == [
        hashlib.blake2b(data[k * 8 * ROW : (k + 1) * 8 * ROW], digest_size=16).hexdigest()
        for k in range(3)
    ]
