"""Plans and logits: every face, the published loop and other libraries, error beside the time.

The libraries' batched solvers know the balanced problem only, which has rows of its own. 32000
problems are timed where ``-k large`` asks for them.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.clock import DEVICE, checked
from fastfpl.ops import launch, native, transport_logits, transport_plan

MASS = 0.8
PROBLEMS, PATCHES, PROMPTS, EPS = (320, 3200, 32_000), (49, 196), (2, 4), (0.01, 0.05, 0.1)
# the product whose rate a share is of: 32 images of RN50 against 100 classes of two prompts
GEMM = (32 * 49, 1024, 200)


@functools.lru_cache(maxsize=1)  # the largest takes 100 MB
def similarities(problems: int, patches: int, prompts: int) -> Tensor:
    """Cosines like CLIP's: about .22 ± .04, the prompts of a class nearly alike."""
    generator = torch.Generator().manual_seed(0)
    patch = torch.randn(problems, patches, 1, generator=generator)
    prompt = torch.randn(problems, patches, prompts, generator=generator)
    return (0.22 + 0.04 * (0.9 * patch + 0.45 * prompt)).to(DEVICE)


@functools.lru_cache(maxsize=1)
def exact(problems: int, patches: int, prompts: int, eps: float, mass: float) -> tuple[Tensor, int]:
    """The limit in float64, passes, and the proof for four problems that it is the reference's."""
    sim = similarities(problems, patches, prompts)
    _, ended = transport_plan(sim, eps=eps, mass=mass, info=True)
    limit = transport_plan(sim.double(), eps=eps, mass=mass, tol=1e-11)
    with fastfpl.face("reference"):
        some = transport_plan(sim[:4].double(), eps=eps, mass=mass, tol=1e-11, max_iter=10**5)
    torch.testing.assert_close(limit[:4], some, rtol=1e-6, atol=1e-12)
    return limit, int(ended.iterations.sum())


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


@functools.cache
def ten_steps() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Ten of the literal scaling steps, compiled as one."""

    def run(log_k: Tensor, log_v: Tensor, mass: float) -> tuple[Tensor, Tensor, Tensor]:
        n_patches, n_prompts = log_k.shape[-2:]
        before = log_v
        for _ in range(10):
            log_u = -math.log(n_patches) - (log_k + log_v).logsumexp(-1, keepdim=True)
            log_u = log_u.clamp(max=0)
            before = log_v
            log_v = math.log(mass / n_prompts) - (log_k + log_u).logsumexp(-2, keepdim=True)
        return log_u, log_v, (log_v - before).abs().amax()

    return torch.compile(run)


def compiled(sim: Tensor, eps: float, tol: float = 1e-5) -> Tensor:
    """The literal formula in the log domain, until no problem moves, looked at every ten steps."""
    log_k = (sim - sim.mean((-2, -1), keepdim=True)) / eps
    log_v, change = torch.zeros_like(log_k[..., :1, :]), math.inf
    log_u = torch.zeros_like(log_k[..., :1])
    for _ in range(1000):
        log_u, log_v, moved = ten_steps()(log_k, log_v, MASS)
        change = float(moved)
        if change <= tol:
            break
    return (log_u + log_k + log_v).exp()


def forced(name: str, sim: Tensor, eps: float, mass: float) -> Tensor:
    with fastfpl.face(name):
        return transport_plan(sim, eps=eps, mass=mass)


def pot(sim: Tensor, eps: float) -> Tensor:
    from ot.batch import solve_batch

    return solve_batch(1 - sim, eps, max_iter=1000, tol=1e-5, grad="detach").plan


def geomloss(sim: Tensor, eps: float) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from geomloss.ot import solve_batch

        return solve_batch(1 - sim, reg=eps, max_iter=100).plan


# The largest relative error that is timed. The published loop stops where it stops, up to a half
# from its own limit at eps=.01, and so do the libraries; their error is shown beside their time.
#: The compiled face: kernels where there is a card.
OURS = "cpu" if DEVICE == "cpu" else "triton"
FACES = {OURS: 1e-3, "published": 0.5, "literal": 1e-2, "literal+compile": 1e-2}
BALANCED = {OURS: 1e-3, "pot": 0.5, "geomloss": 0.5}


def unlaunched(face: str) -> None:
    """Skip the compiled face where it cannot run, with the reason."""
    missing = {"cpu": native.missing, "triton": launch.missing}.get(face, list)()
    if missing:
        pytest.skip("; ".join(missing))


def affordable(request: Any, problems: int, patches: int, prompts: int, face: str) -> None:
    """Skip what was not asked for or takes more than a minute on two cores, with a sentence."""
    unlaunched(face)
    if problems > 3200 and "large" not in request.config.getoption("keyword"):
        pytest.skip("32000 problems are timed where -k large asks for them")
    if face != OURS and problems > 3200 and face != "published":
        pytest.skip(f"{face} takes minutes at this size; see the rows with fewer problems")
    if face in ("literal", "literal+compile", "geomloss", "pot") and problems * patches > 320 * 196:
        pytest.skip(f"{face} takes up to a minute at this size; see the rows with 320 problems")
    if face != OURS and prompts > 2 and problems > 320:
        pytest.skip(f"{face}: the rows with two prompts show how time grows with problems")


def facts(op: str, problems: int, patches: int, prompts: int, eps: float, face: str) -> dict:
    row = {"op": op, "problems": problems, "P": patches, "N": prompts, "eps": eps}
    row |= {"dtype": "float32", "threads": torch.get_num_threads(), "device": DEVICE}
    return row | {"face": face}


def time_plan(benchmark: Any, run: Callable, limit: float, mass: float, **row: Any) -> None:
    sizes = row["problems"], row["P"], row["N"]
    truth, passes = exact(*sizes, row["eps"], mass)
    sim = similarities(*sizes)
    slow = row["face"] in ("literal", "literal+compile", "geomloss", "pot")
    # a pass of the compiled face multiplies and adds twice a number
    checked(
        benchmark,
        lambda: run(sim),
        truth,
        limit,
        rounds=(3 if row["problems"] * row["P"] < 320 * 196 else 1) if slow else None,
        flops=4 * passes * sizes[1] * sizes[2],
        moved=2 * sim.numel() * sim.element_size(),
        gemm=GEMM,
        **row,
    )


SIZES = [pytest.param(n, id=f"large-{n}" if n > 3200 else str(n)) for n in PROBLEMS]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("problems", SIZES)
def bench_plan(benchmark, request, problems, patches, prompts, eps, face):
    affordable(request, problems, patches, prompts, face)
    runs = {
        OURS: lambda sim: forced(OURS, sim, eps, MASS),
        "published": lambda sim: published(sim, eps),
        "literal": lambda sim: forced("reference", sim, eps, MASS),
        "literal+compile": lambda sim: compiled(sim, eps),
    }
    row = facts("transport_plan", problems, patches, prompts, eps, face)
    time_plan(benchmark, runs[face], FACES[face], MASS, **row)


@pytest.mark.parametrize("face", BALANCED)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("problems", SIZES[:2])
def bench_balanced(benchmark, request, problems, patches, prompts, eps, face):
    affordable(request, problems, patches, prompts, face)
    runs = {
        OURS: lambda sim: forced(OURS, sim, eps, 1.0),
        "pot": lambda sim: pot(sim, eps),
        "geomloss": lambda sim: geomloss(sim, eps),
    }
    row = facts("transport_plan, balanced", problems, patches, prompts, eps, face)
    time_plan(benchmark, runs[face], BALANCED[face], 1.0, **row)


# --- the logits, forward and backward -------------------------------------------------------------

IMAGES, CLASSES = 32, 100
TOWERS = {49: 1024, 196: 512}  # patches and joint width: RN50, ViT-B/16


@functools.cache
def features(patches: int) -> tuple[Tensor, Tensor]:
    """Unit vectors whose cosines are about as CLIP's."""
    generator = torch.Generator().manual_seed(0)
    width = TOWERS[patches]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, width, generator=generator)

    image = 0.5 + draw(IMAGES, 1) + 0.7 * draw(IMAGES, patches)
    text = 0.5 + draw(CLASSES, 1) + 0.5 * draw(CLASSES, 2)
    return tuple(torch.nn.functional.normalize(x, dim=-1).to(DEVICE) for x in (image, text))


def step(logits_of: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, patches: int) -> Tensor:
    """Logits and both gradients, each divided by its norm."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in features(patches)]
    logits = logits_of(*leaves)
    weight = torch.linspace(-1, 2, logits.numel(), dtype=dtype, device=DEVICE)
    weight = weight.reshape(logits.shape)
    gradients = torch.autograd.grad((logits * weight).sum(), leaves)
    return torch.cat([(x / x.norm()).flatten() for x in (logits.detach(), *gradients)])


def published_logits(image: Tensor, text: Tensor, eps: float) -> Tensor:
    sim = torch.einsum("bpd,cnd->bcpn", image, text).flatten(0, 1)
    with torch.no_grad():
        plan = published(sim, eps)
    return (plan * sim).sum((-2, -1)).view(IMAGES, CLASSES)


@functools.cache
def exact_step(patches: int, eps: float) -> Tensor:
    def logits_of(image: Tensor, text: Tensor) -> Tensor:
        return transport_logits(image, text, eps=eps, mass=MASS, tol=1e-11)

    return step(logits_of, torch.float64, patches)


@functools.cache
def weights(patches: int, eps: float) -> Tensor:
    """d sim of the true step as one matrix (B P, C N), which the bare GEMMs are given."""
    image, text = (x.double() for x in features(patches))
    sim = torch.einsum("bpd,cnd->bcpn", image, text)
    plan = transport_plan(sim, eps=eps, mass=MASS, tol=1e-11)
    by = torch.linspace(-1, 2, IMAGES * CLASSES, dtype=torch.float64, device=DEVICE)
    by = by.view(IMAGES, CLASSES, 1, 1)
    return (by * plan).transpose(1, 2).reshape(IMAGES * patches, 2 * CLASSES).float()


def gemms(patches: int, eps: float) -> Tensor:
    """The three products that no way of scoring avoids; logits are left out."""
    image, text = (x.flatten(0, 1) for x in features(patches))
    d_sim, sim = weights(patches, eps), image @ text.T
    assert sim.shape == d_sim.shape
    d_image, d_text = d_sim @ text, d_sim.T @ image
    return torch.cat([(x / x.norm()).flatten() for x in (d_image, d_text)])


LOGIT_FACES = {"gemms": 1e-4, OURS: 1e-3, "torch": 1e-2, "published": 0.5}


@pytest.mark.parametrize("face", LOGIT_FACES)
@pytest.mark.parametrize("eps", [0.01, 0.1])
@pytest.mark.parametrize("patches", TOWERS)
def bench_logits_forward_backward(benchmark, patches, eps, face):
    unlaunched(face)
    if face == "torch" and eps < 0.1:
        pytest.skip("the published iteration to its limit takes up to a minute at this size")
    truth = exact_step(patches, eps)
    row = {"op": "transport_logits", "B": IMAGES, "C": CLASSES, "P": patches, "N": 2}
    row |= {"D": TOWERS[patches], "eps": eps, "direction": "fwd+bwd", "dtype": "float32"}
    row |= {"threads": torch.get_num_threads(), "device": DEVICE, "face": face}

    def logits_of(image: Tensor, text: Tensor) -> Tensor:
        if face == "published":
            return published_logits(image, text, eps)
        with fastfpl.face(face):
            return transport_logits(image, text, eps=eps, mass=MASS)

    def run() -> Tensor:
        return gemms(patches, eps) if face == "gemms" else step(logits_of, torch.float32, patches)

    if face == "gemms":
        weights(patches, eps)
        truth = truth[IMAGES * CLASSES :]
    if face == "published" and not bool(run().isfinite().all()):
        pytest.skip("published: exp(-(1 - sim) / eps) underflows at these cosines, and gives NaN")
    rows, columns = IMAGES * patches, 2 * CLASSES
    numbers = rows * TOWERS[patches] + columns * TOWERS[patches]
    checked(
        *(benchmark, run, truth, LOGIT_FACES[face]),
        rounds=3 if face == "torch" else None,
        flops=3 * 2 * rows * columns * TOWERS[patches],
        moved=4 * (2 * numbers + 2 * rows * columns),
        gemm=(rows, TOWERS[patches], columns),
        **row,
    )
