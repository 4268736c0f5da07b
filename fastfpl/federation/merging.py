"""What may stand between uploads and a method's merge: cut norms, and noise for privacy."""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastfpl.config import Settings
from fastfpl.errors import InputError, Missing
from fastfpl.methods import Method, State
from fastfpl.methods.base import Upload
from fastfpl.methods.contract import check_states, started
from fastfpl.seeds import generator
from fastfpl.training.gathering import stack

__all__ = [
    "Counts",
    "Expected",
    "Privacy",
    "clipped",
    "counted",
    "expected",
    "only_mean",
    "privacy_of",
    "unmoved",
]


@dataclass(frozen=True)
class Expected:
    """What clients of a method send and keep.

    Attributes
    ----------
    sent : dict from name to (shape, dtype)
    kept : tuple of str
        Names of what stays with a client.
    """

    sent: dict[str, tuple[tuple[int, ...], torch.dtype]]
    kept: tuple[str, ...]


@torch.no_grad()
def expected(method: Method, down: State) -> Expected:
    """Ask a method what a client that starts from a download would send and keep."""
    trained, fixed = started(method, stack([down]), {}, 1, training=True)
    left = method.finish(trained, dict(fixed), {})
    sent, kept = check_states(method, "finish", left, 1)
    shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in sent.items()}
    return Expected(shapes, tuple(sorted(kept)))


#: What a mean of uploads may count.
Counts = Literal["images", "clients"]


@torch.no_grad()
def only_mean(
    method: Method, server: State, wanted: Expected, counts: Counts | None = None
) -> str | None:
    """Say why a method's merge is more than a mean of uploads; None if it is no more.

    Drawn uploads of up to four clients are merged, then their mean in the place of each: a merge
    that keeps or compares single uploads, or weighs them otherwise, tells the two apart.

    Parameters
    ----------
    method : Method
    server : State
    wanted : Expected
    counts : "images" or "clients", optional
        What the mean is to count; left out, clients have as many images each, and both are one.
    """
    if not wanted.sent:
        return "its clients send nothing"
    clients = range(min(method.task.clients, 4))
    if len(clients) < 2:
        return "it has one client alone"
    draw = generator(0, "only_mean")
    uploads: dict[int, State] = {client: {} for client in clients}
    for name, (shape, dtype) in wanted.sent.items():
        if not dtype.is_floating_point:
            return f"its clients send {name!r} of {dtype}, which has no mean"
        for state in uploads.values():
            state[name] = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    device = method.task.classes.tower.device
    uploads = {c: {n: t.to(device) for n, t in s.items()} for c, s in uploads.items()}
    images = {c: 1 if counts is None else (1, 3, 2, 5)[c] for c in clients}
    weights = {c: images[c] if counts == "images" else 1 for c in clients}
    same: State = {}
    for name, (_, dtype) in wanted.sent.items():
        whole = torch.stack([uploads[c][name].double() * weights[c] for c in clients]).sum(0)
        same[name] = (whole / sum(weights.values())).to(dtype)
    apart = method.merge(server, uploads, images, 0)
    alike = method.merge(server, dict.fromkeys(clients, same), images, 0)
    for name, tensor in apart.items():
        gap = tensor.double() - alike[name].double()
        if tensor.numel() and gap.abs().max() > 1e-5 * alike[name].double().abs().max().clamp(1):
            return f"its server keeps or compares single uploads in {name!r}"
    return None


def counted(method: Method, server: State, wanted: Expected) -> Counts | None:
    """Say what a method's mean of uploads counts; None where its merge is more than a mean."""
    kinds: tuple[Counts, ...] = ("images", "clients")
    return next((k for k in kinds if only_mean(method, server, wanted, k) is None), None)


def unmoved(down: State, wanted: Expected) -> str | None:
    """Say why what clients send cannot be compared with what they downloaded; None if it can."""
    if not wanted.sent:
        return "its clients send nothing"
    for name, (shape, dtype) in wanted.sent.items():
        there = down.get(name)
        if there is None or tuple(there.shape) != shape or not dtype.is_floating_point:
            return f"its clients send {name!r} without having downloaded it"
    return None


def clipped(down: State, upload: Upload, most: float) -> tuple[State, float]:
    """Cut what a client moved what it had downloaded to a norm: (upload, norm before)."""
    moved = {name: upload[name].double() - down[name].double() for name in upload}
    norm = math.sqrt(math.fsum(float((m * m).sum()) for m in moved.values()))
    if norm <= most:
        return {name: upload[name] for name in upload}, norm
    kept = {
        name: (down[name].double() + m * (most / norm)).to(upload[name].dtype)
        for name, m in moved.items()
    }
    return kept, norm


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of clients: what the merged prompts tell of any one client is bounded.

    Whether a client takes part in a round moves the sum of cut moves by at most ``clip``, under
    Gaussian noise of deviation ``noise · clip``. What clients say beside (losses, accuracies) is
    not covered.

    Attributes
    ----------
    clip : float
        Norm to which each client's move is cut.
    noise : float
        Multiplier of the noise.
    """

    clip: float
    noise: float

    def check(self, method: Method, server: State, down: State) -> None:
        """Refuse a method whose merge is more than a mean of what clients moved."""
        wanted = expected(method, down)
        why = unmoved(down, wanted) or only_mean(method, server, wanted)
        if why is not None:
            raise InputError(
                f"fastfpl.run: dp_noise must be left out, or dp_unit be image, for {method.name}; "
                f"got {self.noise}, and {why}"
            )

    def merged(
        self, down: State, uploads: Mapping[int, Upload], called: int
    ) -> tuple[dict[int, Upload], dict[int, int]]:
        """Put the noisy mean of cut moves in the place of every upload: (uploads, weights).

        The mean is over all that were called, whether their uploads arrived or not. The method's
        own merge then takes the mean of equal uploads. Noise is of the system's randomness, and of
        no seed.
        """
        if not uploads:
            return {}, {}
        draw = np.random.Generator(np.random.PCG64(secrets.randbits(128)))
        total: State = {}
        for client in sorted(uploads):
            kept, _ = clipped(down, uploads[client], self.clip)
            for name, tensor in kept.items():
                move = tensor.double() - down[name].double()
                total[name] = total[name] + move if name in total else move
        agreed: State = {}
        for name, move in total.items():
            drawn = draw.normal(0.0, self.noise * self.clip, tuple(move.shape))
            noise = torch.as_tensor(drawn, dtype=torch.float64).to(move.device)
            mean = down[name].double() + (move + noise) / called
            agreed[name] = mean.to(down[name].dtype)
        return dict.fromkeys(uploads, agreed), dict.fromkeys(uploads, 1)


def epsilon_after(settings: Settings, rounds: int) -> float | None:
    """Return ε at ``dp_delta`` after so many rounds, None without ``dp_noise``.

    Every round counts whole, whoever was called: once where clients are hidden, and once an epoch
    where images are (`fastfpl.training.private.ImagePrivacy`).
    """
    if settings.dp_noise is None:
        return None
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    times = rounds * (settings.local_epochs if settings.dp_unit == "image" else 1)
    accountant.compose(dp_accounting.GaussianDpEvent(settings.dp_noise), times)
    return float(accountant.get_epsilon(settings.dp_delta))


def privacy_of(settings: Settings) -> Privacy | None:
    """Return the privacy of clients that settings ask for, or None."""
    if settings.dp_noise is None:
        return None
    if importlib.util.find_spec("dp_accounting") is None:
        raise Missing(
            "fastfpl.run: dp_accounting must be installed with dp_noise; got none; run: pip "
            'install "fastfpl[dp]"'
        )
    if settings.dp_unit == "image":  # the steps of clients are private, the merge is as it is
        return None
    assert settings.dp_clip is not None
    return Privacy(settings.dp_clip, settings.dp_noise)
