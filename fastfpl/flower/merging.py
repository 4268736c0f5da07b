"""Robust merging: what the server does with uploads before the method's own merge."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.flower.checks import Expected
from fastfpl.flower.rules import Rules
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload
from fastfpl.seeds import generator

__all__ = ["check_merging", "clipped", "only_mean", "robust"]


@torch.no_grad()
def only_mean(method: Method, server: State, wanted: Expected) -> str | None:
    """Say why a method's merge is more than a mean of uploads; None if it is no more.

    Two drawn uploads are merged, then their mean twice: a merge that keeps or compares single
    uploads tells the two apart.
    """
    if not wanted.sent:
        return "its clients send nothing"
    if method.task.clients < 2:
        return "it has one client alone"
    draw = generator(0, "only_mean")
    uploads: dict[int, State] = {0: {}, 1: {}}
    for name, (shape, dtype) in wanted.sent.items():
        if not dtype.is_floating_point:
            return f"its clients send {name!r} of {dtype}, which has no mean"
        for state in uploads.values():
            state[name] = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    device = method.task.classes.tower.device
    uploads = {c: {n: t.to(device) for n, t in s.items()} for c, s in uploads.items()}
    # of equal weights: some methods count images, some clients
    images = {0: 1, 1: 1}
    mean = {n: (uploads[0][n].double() + uploads[1][n].double()) / 2 for n in wanted.sent}
    same = {n: t.to(uploads[0][n].dtype) for n, t in mean.items()}
    one = method.merge(server, uploads, images, 0)
    other = method.merge(server, {0: same, 1: same}, images, 0)
    for name, tensor in one.items():
        gap = tensor.double() - other[name].double()
        scale = other[name].double().abs().max() if tensor.numel() else torch.tensor(0.0)
        if tensor.numel() and gap.abs().max() > 1e-5 * scale.clamp(min=1):
            return f"its server keeps or compares single uploads in {name!r}"
    return None


def check_merging(rules: Rules, method: Method, server: State, down: State, want: Expected) -> None:
    """Refuse rules of merging that have no meaning for a method."""
    if rules.merge != "mean":
        why = only_mean(method, server, want)
        if why is not None:
            raise InputError(
                f"fastfpl.flower: merge must be mean for {method.name}; got {rules.merge}, and "
                f"{why}"
            )
    if rules.clip_update is not None:
        for name, (shape, dtype) in want.sent.items():
            there = down.get(name)
            if there is None or tuple(there.shape) != shape or not dtype.is_floating_point:
                raise InputError(
                    f"fastfpl.flower: clip_update must be left out for {method.name}, whose "
                    f"clients send {name!r} without having downloaded it; got {rules.clip_update}"
                )
        if not want.sent:
            raise InputError(
                f"fastfpl.flower: clip_update must be left out for {method.name}, whose clients "
                f"send nothing; got {rules.clip_update}"
            )


def clipped(down: State, upload: State, most: float) -> tuple[State, float]:
    """Cut what a client moved what it had downloaded to a norm: (upload, norm before)."""
    moved = {name: tensor.double() - down[name].double() for name, tensor in upload.items()}
    norm = math.sqrt(math.fsum(float((m * m).sum()) for m in moved.values()))
    if norm <= most:
        return upload, norm
    kept = {
        name: (down[name].double() + m * (most / norm)).to(upload[name].dtype)
        for name, m in moved.items()
    }
    return kept, norm


def robust(
    rules: Rules, uploads: Mapping[int, Upload], images: Mapping[int, int]
) -> tuple[Mapping[int, Upload], Mapping[int, int]]:
    """Put in the place of every upload what the robust rule makes of all: (uploads, weights).

    The method's own merge then takes the mean of equal uploads. Clients count alike.
    """
    if rules.merge == "mean" or not uploads:
        return uploads, images
    order = sorted(uploads)
    agreed: State = {}
    for name in uploads[order[0]]:
        stacked = torch.stack([uploads[c][name].double() for c in order])
        agreed[name] = _middle(rules, stacked).to(uploads[order[0]][name].dtype)
    return dict.fromkeys(order, agreed), dict.fromkeys(order, 1)


def _middle(rules: Rules, stacked: Tensor) -> Tensor:
    """Coordinate-wise median or trimmed mean along the first dimension."""
    ordered = stacked.sort(dim=0).values
    count = len(ordered)
    cut = (count - 1) // 2 if rules.merge == "median" else int(rules.trim * count)
    return ordered[cut : count - cut].mean(dim=0)
