"""Differential privacy of images: single gradients, their cut, the noise, and who is refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import fastfpl
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.errors import InputError
from fastfpl.federation import Comparison
from fastfpl.federation.checkpoint import read_checkpoint
from fastfpl.federation.preparation import prepare
from fastfpl.flower.rules import make_rules
from fastfpl.flower.server import serve
from fastfpl.flower.site import Site
from fastfpl.methods import METHODS
from fastfpl.methods.contract import started
from fastfpl.report import html_page
from fastfpl.testing.worlds import batch_of, drawn
from fastfpl.training.gathering import stack
from fastfpl.training.private import ImagePrivacy
from tests.post import Mailbox
from tests.test_privacy import RUN, accounted

SYSTEMS = ("promptfl", "fedprox", "pfedmoap", "fedotp", "fedpgp", "fedapt", "fedtpg")
PLAIN = [name for name, method in METHODS.items() if method.trains and method.supervised]


# a real tower encodes all test images, and none of them is the point
pytestmark = pytest.mark.usefixtures("few_digits_throughout")


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny", dtype=torch.float64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def drawing(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def cohorts(clip, cache):
    """States of a cohort after a round, and a batch whose last client has fewer images."""

    @functools.cache
    def of(name: str, clients: int = 3, images: int = 4):
        settings = make_settings({"method": name, **RUN})
        federation = prepare(settings, model=clip, cache=cache)
        federation.round()
        method, now = federation.method, federation.now
        down = stack([now.download(method, c) for c in range(clients)])
        own = stack([dict(federation.clients.get(c, {})) for c in range(clients)])
        trained, fixed = started(method, down, own, clients, training=True)
        shape = (clients, images, *((5,) if method.image_kind == "patches" else ()))
        image = torch.nn.functional.normalize(drawn(*shape, clip.dim, seed=7), dim=-1)
        labels = torch.randint(10, (clients, images), generator=drawing(3))
        mask = torch.ones(clients, images, dtype=torch.bool)
        mask[-1, 1:] = False
        # transport refuses what is no number, wherever it stands
        image[~mask] = 0.0 if method.image_kind == "patches" else torch.nan
        return method, trained, fixed, batch_of(image, labels, mask)

    return of


def one_by_one(method, trained, fixed, batch, most):
    """Literally: every image by itself, cut, summed, divided by the client's images."""
    out = {name: torch.zeros_like(t) for name, t in trained.items()}
    for u in range(len(batch.labels)):
        rows = batch.mask[u].nonzero()[:, 0].tolist()
        for b in rows:
            leaves = {n: t[u : u + 1].clone().requires_grad_() for n, t in trained.items()}
            constants = {n: t[u : u + 1] for n, t in fixed.items()}
            image, labels = batch.image[u : u + 1, b : b + 1], batch.labels[u : u + 1, b : b + 1]
            single = replace(batch_of(image, labels), domains=batch.domains[u : u + 1, b : b + 1])
            loss, _ = method.measured_loss(
                method.text(leaves, constants), leaves, constants, single
            )
            found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
            norm = sum(float(g.square().sum()) for g in found if g is not None) ** 0.5
            for name, g in zip(leaves, found, strict=True):
                if g is not None:
                    out[name][u] += g[0] * min(1.0, most / norm) / len(rows)
    return out


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("most", [1e9, 0.05])
def test_gradients_are_those_of_images_one_by_one(name, most, cohorts):
    method, trained, fixed, batch = cohorts(name)
    privacy = ImagePrivacy(most, 0.0, drawing())
    found, loss, _ = privacy.gradients(method, trained, fixed, batch)
    wanted = one_by_one(method, trained, fixed, batch, most)
    assert loss.isfinite().all()
    for key, gradient in found.items():
        if gradient is None:
            assert not wanted[key].any()
        else:
            torch.testing.assert_close(gradient, wanted[key], atol=1e-9, rtol=1e-7)
    norms = sum(g.flatten(1).square().sum(1) for g in found.values() if g is not None).sqrt()
    assert (norms <= most * (1 + 1e-9)).all()
    assert (norms > 0).all()


def test_noise_has_the_deviation_of_the_cut_over_the_images(cohorts):
    method, trained, fixed, batch = cohorts("promptfl", clients=2)
    quiet, _, _ = ImagePrivacy(0.5, 0.0, drawing()).gradients(method, trained, fixed, batch)
    counts = batch.mask.sum(1)
    assert counts.tolist() == [4, 1]
    draws, each = drawing(1), []
    for _ in range(200):
        loud, _, _ = ImagePrivacy(0.5, 3.0, draws).gradients(method, trained, fixed, batch)
        each.append((loud["ctx"] - quiet["ctx"]).flatten(1) * counts[:, None])
    noise = torch.stack(each)  # (200, 2, numbers)
    assert noise.numel() > 2 * 200 * 20
    for u in range(2):
        assert noise[:, u].std().item() == pytest.approx(3.0 * 0.5, rel=0.03)
        assert abs(noise[:, u].mean().item()) < 0.05
    both = torch.corrcoef(torch.stack([noise[:, 0].flatten(), noise[:, 1].flatten()]))
    assert abs(both[0, 1].item()) < 0.05  # clients draw their own


@accounted
@pytest.mark.parametrize("name", PLAIN)
def test_without_cut_and_noise_a_run_is_the_plain_one(name, clip, cache):
    private = {"dp_noise": 1e-14, "dp_clip": 1e4, "dp_unit": "image"}
    sides = []
    for more in ({}, private):
        asked = {"method": name, **RUN, **more}
        federation = prepare(make_settings(asked), model=clip, cache=cache)
        for _ in range(2):
            federation.round()
        sides.append((federation.now.server, dict(federation.clients.get(1, {}))))
    for plain, other in zip(*sides, strict=True):
        assert plain.keys() == other.keys()
        for key in plain:
            torch.testing.assert_close(other[key], plain[key], atol=1e-7, rtol=1e-6)


@accounted
def test_both_engines_train_privately_and_say_epsilon_of_images(tmp_path, clip, cache):
    asked = {"dp_noise": 1.5, "dp_clip": 0.1, "dp_unit": "image", "local_epochs": 2}
    settings = make_settings({"method": "pfedmoap", **RUN, **asked})
    alone = fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "alone")
    sites = {c: Site(settings, c, tmp_path / f"s{c}", cache=cache, model=clip) for c in range(3)}
    networked = serve(
        settings, make_rules({}), tmp_path / "out", Mailbox(sites), model=clip, log=len
    )
    told = [[row["epsilon"] for row in result.rounds] for result in (alone, networked)]
    assert told[0] == told[1]
    assert 0 < told[0][0] < told[0][1]
    assert "what clients send are (" in html_page(Comparison({"pfedmoap": [alone]}))
    # noise is of no seed
    fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "again")
    pools = [read_checkpoint(tmp_path / n).server["pool"] for n in ("alone", "again", "out")]
    assert not torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[0], pools[2])
    # of the size that steps of it have: SGD with momentum over a few steps
    spread = (pools[0] - pools[1]).std().item()
    assert spread > 0.002 * 0.1 * 1.5 / settings.batch_size


@accounted
@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("fedapt-unsupervised", "surveys whole training sets"),
        ("zeroshot", "it trains nothing"),
    ],
)
def test_who_looks_at_images_otherwise_is_refused(method, sentence, clip, cache):
    views = {"augment": "views:2"} if method == "fedapt-unsupervised" else {}
    asked = {**RUN, **views, "dp_noise": 1.0, "dp_clip": 1.0, "dp_unit": "image"}
    with pytest.raises(InputError, match=f"dp_unit must be client, .* for {method}.*{sentence}"):
        fastfpl.run(method, **asked, model=clip, cache=cache)


def test_a_method_that_keeps_something_of_a_step_is_refused(clip, cache):
    class Keeps(METHODS["promptfl"]):
        name = "keeps"

        def after_step(self, text, trained, fixed, batch):
            return {}

    asked = {**RUN, "dp_noise": 1.0, "dp_clip": 1.0, "dp_unit": "image"}
    with pytest.raises(InputError, match="keeps something of the images beside what its loss"):
        fastfpl.run(Keeps, **asked, model=clip, cache=cache)


def test_the_unit_without_noise_is_a_sentence():
    with pytest.raises(InputError, match="dp_unit must be left out without dp_noise"):
        make_settings({"method": "promptfl", "dp_unit": "image"})
