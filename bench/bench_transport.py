"""The plan alone, similarities given: every face and the published loop, error beside the time."""

import functools

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.clock import checked
from fastfpl.ops import native, transport_plan

MASS = 0.8
PROBLEMS, PATCHES, EPS = (320, 3200), (49, 196), (0.01, 0.05, 0.1)


@functools.cache
def similarities(problems: int, patches: int) -> Tensor:
    """Cosines like CLIP's: about .22 ± .04, the two prompts of a class nearly alike."""
    generator = torch.Generator().manual_seed(0)
    patch = torch.randn(problems, patches, 1, generator=generator)
    prompt = torch.randn(problems, patches, 2, generator=generator)
    return 0.22 + 0.04 * (0.9 * patch + 0.45 * prompt)


@functools.cache
def exact(problems: int, patches: int, eps: float) -> Tensor:
    """The limit in float64, and the proof for eight of the problems that it is the reference's."""
    sim = similarities(problems, patches).double()
    limit = transport_plan(sim, eps=eps, mass=MASS, tol=1e-11)
    with fastfpl.face("reference"):
        some = transport_plan(sim[:8], eps=eps, mass=MASS, tol=1e-11)
    torch.testing.assert_close(limit[:8], some, rtol=1e-6, atol=1e-12)
    return limit


def published(sim: Tensor, eps: float, *, max_iter: int = 100, threshold: float = 1e-3) -> Tensor:
    """FedOTP's loop from its description: plain numbers, one stop for the whole batch.

    At eps=.01 v is of the size 1e32, so that the threshold is never met.
    """
    n_patches, n_prompts = sim.shape[-2:]
    kernel = (-(1 - sim) / eps).exp()
    by_row, by_column = kernel * n_patches, kernel.mT * (n_prompts / MASS)
    u = sim.new_ones(*sim.shape[:-1], 1)
    v = sim.new_ones(*sim.shape[:-2], n_prompts, 1)
    for _ in range(max_iter):
        before = v
        u = (1 / (by_row @ v)).clamp(max=1)
        v = 1 / (by_column @ u)
        if (v - before).abs().mean().item() < threshold:
            break
    return u * kernel * v.mT


# The largest relative error that is timed. The published loop stops where it stops, up to a half
# from its own limit at eps=.01; its error is shown beside its time.
FACES = {"cpu": 1e-3, "reference": 1e-2, "published": 0.5}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("problems", PROBLEMS)
def bench_plan(benchmark, problems, patches, eps, face):
    if face == "cpu" and native.missing():
        pytest.skip("; ".join(native.missing()))
    if face == "reference" and problems > 320:
        pytest.skip("the literal reference takes up to a minute at this size; see the 320 rows")
    sim = similarities(problems, patches)
    truth = exact(problems, patches, eps)
    row = {"op": "transport_plan", "B": problems, "P": patches, "N": 2, "eps": eps}
    row |= {"dtype": "float32", "face": face, "threads": torch.get_num_threads()}

    def run() -> Tensor:
        if face == "published":
            return published(sim, eps)
        with fastfpl.face(face):
            return transport_plan(sim, eps=eps, mass=MASS)

    checked(benchmark, run, truth, FACES[face], rounds=1 if face == "reference" else None, **row)
