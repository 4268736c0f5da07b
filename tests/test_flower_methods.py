"""Every method by real processes on loopback: the numbers of one process.

One SuperLink and two SuperNodes stand for all of them. On two cores of a busy machine a method took
18 to 27 s, and a minute more where features of a new kind had to be encoded; all of them 8 minutes.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import fastfpl
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.errors import InputError
from fastfpl.federation.checkpoint import read_checkpoint
from fastfpl.flower.lab import Lab, standing
from fastfpl.flower.rules import make_rules
from fastfpl.methods import METHODS
from tests.worlds import GATE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed"),
    # of what flwr imports, not of anything here
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(400),
]
# two rounds: what a client has kept of the first is there in the second
RUN = {
    "dataset": "glyphs",
    "clip": "tiny",
    "clients": 2,
    "shots": 2,
    "rounds": 2,
    "local_epochs": 1,
    "batch_size": 8,
    "n_ctx": 4,
    "lr": 0.05,
    "threads": 1,
}
OPTIONS = {"pfedmoap": GATE, "fedpgp": {"bottleneck": 2}, "fedtpg": {"widening": 1}}
MORE = {"fedapt-unsupervised": {"augment": "views:2"}}
FACTS = ("accuracy", "clients", "exams", "selected", "lost", "bytes_up", "bytes_down", "loss")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with standing(Lab(tmp_path_factory.mktemp("lab"), RUN["clients"])) as one:
        yield one


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("method", METHODS)
def test_real_processes_give_the_numbers_of_one_for_every_method(
    method, lab, clip, cache, tmp_path
):
    """Bit for bit one process that trains one client after the other, as sites do."""
    chosen = {**RUN, **MORE.get(method, {}), "method": method}
    settings = make_settings({**chosen, "options": OPTIONS.get(method, {})})
    networked = lab.play(settings, make_rules({"quorum": 1.0}), tmp_path / "out")
    one = settings.model_copy(update={"cohort": 1})
    alone = fastfpl.run(one, model=clip, cache=cache, out=tmp_path / "alone")
    assert len(networked.rounds) == (2 if METHODS[method].trains else 1)
    for a, b in zip(networked.rounds, alone.rounds, strict=True):
        assert {key: a[key] for key in FACTS} == {key: b[key] for key in FACTS}
    assert networked.data == alone.data
    assert networked.flower["refused"] == networked.flower["failed"] == 0
    ours, theirs = (read_checkpoint(tmp_path / name) for name in ("out", "alone"))
    assert set(ours.server) == set(theirs.server)
    for name, tensor in theirs.server.items():
        assert torch.equal(ours.server[name], tensor), name
    if networked.flower["stays_with_clients"]:
        with pytest.raises(InputError, match="stays with them"):
            fastfpl.load(tmp_path / "out", model=clip).client(0)
        return
    downs = [fastfpl.load(tmp_path / n, model=clip).states(1)[0] for n in ("out", "alone")]
    for name, tensor in downs[1].items():
        assert torch.equal(downs[0][name], tensor), name


def test_a_lab_plays_runs_of_its_clients(lab, tmp_path):
    settings = make_settings({**RUN, "method": "zeroshot", "clients": 3})
    with pytest.raises(InputError, match="clients must be the 2 that stand; got 3"):
        lab.play(settings, make_rules({}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
