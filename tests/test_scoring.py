"""Scores of a cohort: whose answers come to the host when, and who is named."""

import numpy as np
import pytest
import torch

import fastfpl
from fastfpl.errors import NotConverged
from fastfpl.methods import PromptFL
from fastfpl.training import scoring
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import score
from tests.test_graphs import tiny, world_of
from tests.worlds import small_clip


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def brought(monkeypatch):
    """How many answers came to the host each time."""
    plain, seen = torch.Tensor.cpu, []

    def cpu(self, *arguments):
        seen.append(len(self))
        return plain(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    return seen


def scored(federation, members, images=None):
    (exam,) = federation.examiner.exams
    method = exam.method
    downs = [federation.now.download(method, c) for c in members]
    images = dict(enumerate(exam.images)) if images is None else images
    return score(method, members, stack(downs), {}, exam.feed, images)


def test_answers_of_a_cohort_come_over_at_once(brought, monkeypatch):
    federation = world_of("local").federation()
    members = [0, 2, 3, 4]
    sizes = [len(federation.examiner.exams[0].images[c]) for c in members]
    scored(federation, members)  # lays out its prompts
    brought.clear()
    together = scored(federation, members)
    assert brought == [sum(sizes)]
    monkeypatch.setattr(scoring, "_WAITING", 1)
    monkeypatch.setattr(scoring, "at_once", lambda *_: 2)
    brought.clear()
    apart = scored(federation, members)
    assert brought == [n for size in sizes for n in (2,) * (size // 2) + (1,) * (size % 2)]
    for client, size in zip(members, sizes, strict=True):
        assert len(apart[client].answers) == size
        for name in ("answers", "labels", "domains"):
            one, other = (getattr(found[client], name) for found in (together, apart))
            assert np.array_equal(one, other)


def test_one_model_answers_one_list_of_images_once(brought):
    federation = world_of("promptfl").federation()
    mine = federation.examiner.exams[0].images
    images = {0: mine[1], 1: mine[2], 2: mine[1], 3: mine[1][:0]}
    method = federation.method
    down = stack([federation.now.download(method, 0)])
    exam = federation.examiner.exams[0]
    scored(federation, [0])  # lays out its prompts
    brought.clear()
    found = score(method, [2, 3, 0, 1], down, {}, exam.feed, images)
    assert brought == [len(mine[1]) + len(mine[2])]
    assert found[0] is found[2]
    assert found[3].images == 0
    assert [found[c].images for c in (0, 1)] == [len(mine[1]), len(mine[2])]


@pytest.mark.gpu
def test_no_client_is_waited_for_on_a_gpu(clip, cache, monkeypatch):
    plain_add, plain_bring, brought = scoring._Answers.add, scoring._Answers.bring, []

    def add(self, *answers):
        plain_add(self, *answers)
        torch.cuda.set_sync_debug_mode("error")

    def bring(self):
        torch.cuda.set_sync_debug_mode("default")
        brought.append(len(self._there))
        plain_bring(self)

    monkeypatch.setattr(scoring._Answers, "add", add)
    monkeypatch.setattr(scoring._Answers, "bring", bring)
    try:
        fastfpl.run("local", model=clip.to("cuda"), cache=cache, **tiny("local"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert brought == [4] * 3  # all clients of each evaluation


def test_the_first_client_that_is_wrong_is_named(monkeypatch):
    federation = world_of("local").federation()
    images = dict(enumerate(federation.examiner.exams[0].images))
    plain, calls, wrong = PromptFL.logits, [], set()

    def logits(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise NotConverged("what the last one says of itself")
        found = plain(self, *arguments)
        return found * float("nan") if len(calls) in wrong else found

    monkeypatch.setattr(type(federation.method), "logits", logits)
    for nans, sentence in (
        ({2, 3}, "got one that is not for client 2 in an evaluation of local; lower lr="),
        ({3}, "got one that is not for client 0"),
        (set(), "what the last one says of itself"),
    ):
        calls.clear()
        wrong.clear()
        wrong.update(nans)
        with pytest.raises(NotConverged, match=sentence):
            scored(federation, [4, 2, 0, 1], images)
