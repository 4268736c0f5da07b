"""Pixels prepared ahead are the pixels, whoever prepares them, and errors arrive as they are."""

import contextlib
import gc
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from PIL import Image

from fastfpl.data import load_dataset
from fastfpl.data import loader as module
from fastfpl.data.base import Split
from fastfpl.data.loader import Loader, Resident, Workers, choose_workers
from fastfpl.data.transforms import Preprocess
from fastfpl.errors import Damaged, InputError
from tests import trees

SIZE = 12
COUNT = 90
PREPARE = Preprocess(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Pictures(Split):
    """Pictures of many sizes, and a note of who was asked for which."""

    def __init__(self, count=COUNT):
        draw = np.random.default_rng(0)
        self.labels = self.domains = np.zeros(count, np.int64)
        self.fingerprint = "pictures"
        self.pictures = [
            draw.integers(0, 256, (9 + i % 11, 10 + i % 7, 3), dtype=np.uint8) for i in range(count)
        ]
        self.asked = []
        self.by = set()
        self.threads = set()

    def images(self, indices):
        self.asked += [int(i) for i in indices]
        self.by.add(threading.current_thread().name)
        self.threads.add(torch.get_num_threads())
        return [self.pictures[int(i)] for i in indices]


def crops(images, seeds):
    return PREPARE.crops(images, seeds)


def squares(images, seeds):
    return PREPARE.squares(images)


def jobs_of(batches, seed=0):
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, COUNT, size), draw.integers(0, 2**31, size)) for size in batches]


@pytest.fixture(scope="module", params=[1, 2, 5])
def workers(request):
    return Workers(request.param)


SIZES = [40, 1, 7, 300, 0, 64, 65]


@pytest.mark.parametrize("expected", [True, False], ids=["expected", "not expected"])
def test_pixels_do_not_depend_on_who_prepares_them(workers, expected):
    split = Pictures()
    loader = Loader(split.images, crops, SIZE, workers)
    jobs = jobs_of(SIZES)
    if expected:
        loader.expect(jobs)
    for indices, seeds in jobs:
        wanted = crops([split.pictures[i] for i in indices], seeds)
        found = loader.pixels(indices, seeds)
        assert found.dtype == torch.uint8
        assert torch.equal(found, wanted)
    assert all(name.startswith("fastfpl-images") for name in split.by)
    assert len(split.asked) == sum(SIZES)  # nothing is read twice
    in_line = Loader(split.images, crops, SIZE, Workers(0))
    in_line.expect(jobs)
    split.by.clear()
    for indices, seeds in jobs:
        wanted = crops([split.pictures[i] for i in indices], seeds)
        assert torch.equal(in_line.pixels(indices, seeds), wanted)
    assert split.by == {threading.current_thread().name}


def test_what_was_not_foretold_is_right_too(workers):
    split = Pictures()
    loader = Loader(split.images, crops, SIZE, workers)
    jobs = jobs_of([20, 20, 20, 20])
    loader.expect(jobs)
    (a, s), (b, t), (c, u), (d, v) = jobs
    for indices, seeds in ((a, s), (b, s), (b, t), (d, v), (c, None), (c, u)):
        cut = crops if seeds is not None else squares
        loader._cut = cut
        wanted = cut([split.pictures[i] for i in indices], seeds)
        assert torch.equal(loader.pixels(indices, seeds), wanted)
    # told anew: the old is forgotten
    loader.expect(jobs)
    loader.expect(jobs[2:])
    for indices, seeds in jobs[2:]:
        wanted = crops([split.pictures[i] for i in indices], seeds)
        assert torch.equal(loader.pixels(indices, seeds), wanted)


def test_a_loader_that_draws_nothing_needs_no_seeds(workers):
    split = Pictures()
    loader = Loader(split.images, squares, SIZE, workers)
    chunks = [(np.arange(at, min(at + 32, COUNT)), None) for at in range(0, COUNT, 32)]
    loader.expect(chunks)
    for indices, _ in chunks:
        wanted = squares([split.pictures[i] for i in indices], None)
        assert torch.equal(loader.pixels(indices), wanted)


def test_the_next_batches_are_prepared_before_they_are_asked_for(workers):
    split = Pictures()
    jobs = jobs_of([100] * 8)
    took = iter(jobs)
    loader = Loader(split.images, crops, SIZE, workers)
    loader.expect(took)

    def settled(count):
        limit = time.monotonic() + 20
        while len(split.asked) < count:
            assert time.monotonic() < limit
            time.sleep(0.005)
        time.sleep(0.05)
        return len(split.asked)

    # nobody has asked yet: up to 256 images, in whole batches
    assert settled(300) == 300
    loader.pixels(*jobs[0])
    assert settled(400) == 400
    assert len(list(took)) == 4  # and the rest is not even looked at


def test_no_more_than_one_chunk_is_ahead_of_the_one_that_is_asked_for(workers):
    split = Pictures()
    loader = Loader(split.images, crops, SIZE, workers)
    jobs = jobs_of([256] * 4)
    loader.expect(jobs)
    loader.pixels(*jobs[0])
    assert sum(len(coming.job[0]) for coming in loader._coming) == 256


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("foretold", [True, False])
def test_an_error_arrives_as_it_was_raised(count, foretold):
    split = Pictures()
    right = split.images

    def images(indices):
        if 33 in indices:
            raise Damaged("picture 33 must be an image; got none")
        return right(indices)

    loader = Loader(images, squares, SIZE, Workers(count))
    chunks = [(np.arange(at, at + 30), None) for at in (0, 30, 60)]
    if foretold:
        loader.expect(chunks)
    loader.pixels(*chunks[0])  # the error of a later batch is not this one's
    with pytest.raises(Damaged, match=r"^picture 33 must be an image; got none$"):
        loader.pixels(*chunks[1])
    # and the loader goes on
    wanted = squares(split.pictures[60:90], None)
    assert torch.equal(loader.pixels(*chunks[2]), wanted)


@pytest.mark.parametrize("count", [0, 2])
def test_a_broken_file_gives_the_same_sentence_in_a_thread(count, tmp_path):
    trees.caltech101(tmp_path)
    split = load_dataset("caltech101", tmp_path).train
    path = split.path(4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(Damaged) as wanted:
        split.images(range(len(split)))
    assert str(path) in str(wanted.value)
    loader = Loader(split.images, squares, SIZE, Workers(count))
    loader.expect([(np.arange(len(split)), None)])
    with pytest.raises(Damaged) as found:
        loader.pixels(np.arange(len(split)))
    assert str(found.value) == str(wanted.value)


def test_an_interrupt_while_waiting_leaves_nothing_that_hangs():
    split, go = Pictures(), threading.Event()

    def images(indices):
        go.wait(20)
        return split.images(indices)

    loader = Loader(images, squares, SIZE, Workers(1))
    jobs = [(np.arange(64), None), (np.arange(64, 90), None)]
    loader.expect(jobs)
    first = loader._coming[0].tasks[0]

    def interrupted():
        raise KeyboardInterrupt

    plain = first.result
    first.result = interrupted
    with pytest.raises(KeyboardInterrupt):
        loader.pixels(*jobs[0])
    assert not loader._coming
    go.set()
    with contextlib.suppress(CancelledError):  # where it had not begun
        plain(20)
    assert torch.equal(loader.pixels(*jobs[1]), squares(split.pictures[64:], None))


def test_threads_compute_with_one_thread_and_change_nobody_elses_number():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        split = Pictures()
        loader = Loader(split.images, crops, SIZE, Workers(3))
        (job,) = jobs_of([300])
        loader.pixels(*job)
        assert split.threads == {1}
        assert torch.get_num_threads() == 2
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_threads_are_kept_and_end_with_their_owner():
    def names():
        return {t.name for t in threading.enumerate() if t.name.startswith("fastfpl-images")}

    before = names()
    split, workers = Pictures(), Workers(2)
    assert names() == before  # none before they are needed
    loaders = [Loader(split.images, crops, SIZE, workers) for _ in range(3)]
    for seed in range(4):
        for loader in loaders:
            (job,) = jobs_of([40], seed)
            loader.pixels(*job)
    assert len(split.by) <= 2  # the same two for all of them
    pool = weak_threads(workers)
    del workers, loaders, loader
    gc.collect()
    for thread in pool:
        thread.join(20)
        assert not thread.is_alive()


def weak_threads(workers):
    return list(workers._pool._threads)


def test_threads_that_cannot_be_started_end_in_an_error_and_no_hang(monkeypatch):
    workers = Workers(3)
    plain, count = threading.Thread.start, []

    def start(self):
        if self.name.startswith("fastfpl-images"):
            count.append(self.name)
            if len(count) == 2:
                raise RuntimeError("can't start new thread")
        plain(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        workers.submit(lambda: None)
    assert torch.get_num_threads() == before


def test_how_many_threads_are_chosen(monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert choose_workers("cuda") == 8
    assert choose_workers("cpu") == 2
    assert [choose_workers(d, n) for d in ("cuda", "cpu") for n in (0, 3)] == [0, 3, 0, 3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_workers("cpu") == 0
    assert choose_workers("cuda") == 8
    monkeypatch.setattr(module, "_cores", lambda: 2)
    assert choose_workers("cuda") == 2
    monkeypatch.undo()
    assert module._cores() >= 1
    monkeypatch.delattr(module.os, "sched_getaffinity")
    assert module._cores() >= 1


def test_no_negative_number_of_threads():
    with pytest.raises(InputError, match="count must not be negative; got -1"):
        Workers(-1)


# --- decoded images that stay ---------------------------------------------------------------------


def test_an_image_is_decoded_once_where_it_fits():
    split = Pictures()
    resident = Resident(split, 1 << 20)
    for indices in ([3, 5, 3], [5, 7], [7, 3, 5]):
        found = resident.images(np.array(indices))
        for index, image in zip(indices, found, strict=True):
            assert np.array_equal(image, split.pictures[index])
    assert split.asked == [3, 5, 7]
    assert len(resident) == 3
    assert resident.nbytes == sum(split.pictures[i].nbytes for i in (3, 5, 7))


def test_what_does_not_fit_is_decoded_every_time():
    split = Pictures()
    sizes = [p.nbytes for p in split.pictures]
    resident = Resident(split, sum(sizes[:10]))
    for _ in range(3):
        resident.images(np.arange(20))
    assert split.asked[:20] == list(range(20))
    assert resident.nbytes <= sum(sizes[:10])
    assert split.asked[20:] == [i for i in range(20) if i not in resident._kept] * 2
    assert len(resident) >= 10
    none = Resident(split, 0)
    none.images(np.arange(4))
    assert (len(none), none.nbytes) == (0, 0)


def test_a_kept_image_does_not_keep_its_batch_alive():
    split = load_dataset("glyphs").train
    resident = Resident(split, 3 * 28 * 28 * 3)
    wanted = split.images(np.arange(50))
    assert np.array_equal(np.stack(list(resident.images(np.arange(50)))), wanted)
    assert len(resident) == 3
    assert all(image.base is None for image in resident._kept.values())


def test_threads_share_what_is_kept():
    split = Pictures()
    resident = Resident(split, 1 << 20)
    loader = Loader(resident.images, crops, SIZE, Workers(3))
    jobs = [(np.random.default_rng(k).permutation(COUNT), np.arange(COUNT)) for k in range(5)]
    loader.expect(jobs)
    for indices, seeds in jobs:
        wanted = crops([split.pictures[i] for i in indices], seeds)
        assert torch.equal(loader.pixels(indices, seeds), wanted)
    assert len(resident) == COUNT
    assert resident.nbytes == sum(p.nbytes for p in split.pictures)


def test_real_files_give_equal_pixels_with_any_number_of_threads(tmp_path):
    draw = np.random.default_rng(1)
    trees.caltech101(tmp_path)
    split = load_dataset("caltech101", tmp_path).train
    for index in range(len(split)):
        pixels = draw.integers(0, 256, (90 + index, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(split.path(index), "JPEG", quality=80)
    jobs = [(np.arange(len(split)).repeat(20), draw.integers(0, 99, 20 * len(split)))]
    found = []
    for count in (0, 1, 3):
        loader = Loader(split.images, crops, SIZE, Workers(count))
        loader.expect(jobs)
        found.append(loader.pixels(*jobs[0]))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
