"""Robust merging: what the server does with uploads before the method's own merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.federation.merging import Expected, only_mean, unmoved
from fastfpl.flower.rules import Rules
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload

__all__ = ["check_merging", "robust"]


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
        why = unmoved(down, want)
        if why is not None:
            raise InputError(
                f"fastfpl.flower: clip_update must be left out for {method.name}; got "
                f"{rules.clip_update}, and {why}"
            )


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
