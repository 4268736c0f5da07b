"""Differential privacy of clients: what is cut, how much noise there is, and what ε is said."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import fastfpl
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.errors import InputError, Missing
from fastfpl.federation import Comparison, Result
from fastfpl.federation.checkpoint import read_checkpoint
from fastfpl.federation.merging import Privacy, clipped, epsilon_after
from fastfpl.flower.rules import make_rules
from fastfpl.flower.server import serve
from fastfpl.flower.site import Site
from fastfpl.report import html_page
from tests.post import Mailbox
from tests.worlds import TINY_RUN

RUN = {**TINY_RUN, "clients": 3, "local_epochs": 1, "threads": 1}

accounted = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp_accounting is not installed"
)


# a real tower encodes all test images, and none of them is the point
pytestmark = pytest.mark.usefixtures("few_digits_throughout")


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_move_is_cut_to_the_norm_and_no_further():
    down = {"a": torch.ones(3), "b": torch.zeros(2)}
    upload = {"a": torch.tensor([4.0, 1.0, 1.0]), "b": torch.tensor([0.0, 4.0])}
    cut, norm = clipped(down, upload, 2.0)
    assert norm == pytest.approx(5.0)
    moved = torch.cat([cut["a"] - down["a"], cut["b"] - down["b"]])
    torch.testing.assert_close(moved, torch.tensor([3.0, 0.0, 0.0, 0.0, 4.0]) * 2 / 5)
    same, _ = clipped(down, upload, 5.1)
    assert all(torch.equal(same[n], upload[n]) for n in upload)


def test_the_noise_is_that_of_the_clip_and_the_called():
    down = {"a": torch.zeros(400, 100)}
    uploads = {c: {"a": torch.full((400, 100), 1e-9)} for c in (1, 4)}
    sent, weights = Privacy(clip=3.0, noise=0.5).merged(down, uploads, called=4)
    assert weights == {1: 1, 4: 1}
    assert sent[1]["a"] is sent[4]["a"]
    # 40 000 numbers: the deviation of their deviation is 0.35 %
    assert sent[1]["a"].std().item() == pytest.approx(0.5 * 3.0 / 4, rel=0.03)
    again, _ = Privacy(clip=3.0, noise=0.5).merged(down, uploads, called=4)
    assert not torch.equal(again[1]["a"], sent[1]["a"])
    assert Privacy(1.0, 1.0).merged(down, {}, 4) == ({}, {})


def test_without_noise_it_would_be_the_mean_of_cut_moves_over_all_called():
    down = {"a": torch.ones(2)}
    uploads = {0: {"a": torch.tensor([1.0, 2.0])}, 2: {"a": torch.tensor([11.0, 1.0])}}
    sent, _ = Privacy(clip=2.0, noise=1e-9).merged(down, uploads, called=4)
    torch.testing.assert_close(sent[0]["a"], torch.tensor([1 + 2 / 4, 1 + 1 / 4]))


def told(rounds, **settings):
    asked = {"dp_noise": 1.0, "dp_clip": 1.0, **settings}
    return epsilon_after(make_settings({"method": "promptfl", **RUN, **asked}), rounds)


@accounted
def test_epsilon_is_the_accountants():
    # of one Gaussian mechanism, sigma 1, three times: 9.01 in dp_accounting's and Flower's own
    assert told(3) == pytest.approx(9.01, abs=0.01)
    assert told(3, dp_noise=2.0) < told(3, dp_noise=2.0, dp_delta=1e-7) < 9.01
    assert told(3, dp_noise=2.0, dp_clip=5.0) == told(3, dp_noise=2.0)
    assert told(3, dp_noise=None, dp_clip=None) is None
    # an image is in one step of every epoch
    assert told(3, local_epochs=4) == told(3)
    assert told(3, local_epochs=4, dp_unit="image") == told(12)


@accounted
def test_both_engines_cut_add_noise_and_say_epsilon(tmp_path, clip, cache):
    settings = make_settings(
        {"method": "promptfl", **RUN, "dp_noise": 1e-6, "dp_clip": 0.01, "dropout": 0.3}
    )
    alone = fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "alone")
    sites = {c: Site(settings, c, tmp_path / f"s{c}", cache=cache, model=clip) for c in range(3)}
    networked = serve(
        settings, make_rules({}), tmp_path / "out", Mailbox(sites), model=clip, log=len
    )
    servers = [read_checkpoint(tmp_path / name).server["ctx"] for name in ("alone", "out")]
    torch.testing.assert_close(*servers, atol=1e-5, rtol=0)
    begin = fastfpl.federation.preparation.prepare(settings, model=clip, cache=cache).server["ctx"]
    assert 0.001 < (servers[0] - begin).norm().item() < 2 * 0.0101  # two rounds
    for result in (alone, networked):
        told = [row["epsilon"] for row in result.rounds]
        assert 0 < told[0] < told[1]
    assert Result.load(tmp_path / "alone").rounds[1]["epsilon"] == networked.rounds[1]["epsilon"]
    page = html_page(Comparison({"promptfl": [alone]}))
    assert "1e-05)-differentially private of clients after the last round" in page
    other = settings.model_copy(update={"dp_delta": 1e-3})
    assert fastfpl.run(other, model=clip, cache=cache).rounds[1]["epsilon"] < told[1]
    loud = settings.model_copy(update={"dp_noise": 50.0, "dp_clip": 1.0})
    fastfpl.run(loud, model=clip, cache=cache, out=tmp_path / "loud")
    # noise of deviation 50 · 1 / 3, twice, in every number
    spread = (read_checkpoint(tmp_path / "loud").server["ctx"] - begin).std().item()
    assert 50 / 3 < spread < 50


@accounted
@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("pfedmoap", "keeps or compares single uploads in 'pool'"),
        ("prompt-fedamp", "without having downloaded it|keeps or compares single uploads"),
        ("local", "its clients send nothing"),
    ],
)
def test_a_method_without_a_mean_is_refused(method, sentence, clip, cache):
    with pytest.raises(
        InputError, match=f"dp_noise must be left out, .*, for {method}.*({sentence})"
    ):
        fastfpl.run(method, **RUN, dp_noise=1.0, dp_clip=1.0, model=clip, cache=cache)


def test_a_missing_package_is_a_sentence(clip, cache, monkeypatch):
    private = {**RUN, "dp_noise": 1.0, "dp_clip": 1.0}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Missing, match=r'pip install "fastfpl\[dp\]"'):
        fastfpl.run("promptfl", **private, model=clip, cache=cache)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dp_noise": 1.0}, "dp_clip must be given with dp_noise"),
        ({"dp_clip": 1.0}, "dp_clip must be given with dp_noise and without it left out"),
        ({"dp_delta": 1e-6}, "dp_delta must be left out without dp_noise"),
        ({"dp_noise": 0.0, "dp_clip": 1.0}, "dp_noise is refused"),
        ({"dp_noise": 1.0, "dp_clip": 1.0, "dp_delta": 1.0}, "dp_delta is refused"),
        (
            {"dp_noise": 1.0, "dp_clip": 1.0, "merge": "median"},
            "merge must be mean and clip_update left out with dp_noise",
        ),
        (
            {"dp_noise": 1.0, "dp_clip": 1.0, "clip_update": 1.0},
            "merge must be mean and clip_update left out with dp_noise",
        ),
    ],
)
def test_wrong_settings_of_privacy_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        make_settings({"method": "promptfl", **values})
