"""Balanced transport between given weights: both faces, POT and GeomLoss."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor

import fastfpl
from bench.clock import DEVICE, checked, elsewhere
from fastfpl.ops import native, sinkhorn

FACES = {"cpu": 1e-3, "pot": 0.05, "geomloss": 0.5, "reference": 1e-2}
SIZES = {"B": 320, "P": 49, "N": 8}


@functools.cache
def problem() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    B, P, N = SIZES.values()
    a, b = (0.1 + torch.rand(B, n, generator=draw) for n in (P, N))
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return tuple(x.to(DEVICE) for x in (a, b, torch.rand(B, P, N, generator=draw)))


@functools.cache
def exact(reg: float) -> Tensor:
    a, b, M = (x.double() for x in problem())
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    limit = sinkhorn(a, b, M, reg, stopThr=1e-11)
    with fastfpl.face("reference"):
        some = sinkhorn(a[:4], b[:4], M[:4], reg, stopThr=1e-11, numItermax=10**5)
    torch.testing.assert_close(limit[:4], some, rtol=1e-6, atol=1e-12)
    return limit


def plan(face: str, reg: float) -> Tensor:
    a, b, M = problem()
    if face == "pot":
        from ot.batch import solve_batch

        return solve_batch(M, reg, a, b, max_iter=10_000, tol=1e-5, grad="detach").plan
    if face == "geomloss":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from geomloss.ot import solve_batch

            return solve_batch(M, reg=reg, a=a, b=b, max_iter=100).plan
    with fastfpl.face(face):
        return sinkhorn(a, b, M, reg)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("reg", [0.02, 0.1])
def bench_sinkhorn(benchmark, reg, face):
    if face == "cpu" and (why := native.missing() or elsewhere(face)):
        pytest.skip("; ".join(why))
    row = {"op": "sinkhorn", **SIZES, "eps": reg, "dtype": "float32"}
    row |= {"threads": torch.get_num_threads(), "device": DEVICE, "face": face}
    checked(
        *(benchmark, lambda: plan(face, reg), exact(reg), FACES[face]),
        rounds=None if face == "cpu" else 3,
        moved=2 * problem()[2].numel() * 4,
        **row,
    )
