"""Gradients of single images, each cut to a norm, their sum under noise: privacy of images."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.methods import Batch, Method, State
from fastfpl.methods.contract import check_gradients, check_loss, check_text

if TYPE_CHECKING:
    from fastfpl.config import Settings

__all__ = ["ImagePrivacy", "image_privacy"]


@dataclass(frozen=True, eq=False)
class ImagePrivacy:
    """Differentially private steps of a client: what they tell of any one of its images is bounded.

    In an epoch an image is in one step. Taking its gradient away moves the sum of the cut gradients
    by at most ``clip``, under Gaussian noise of deviation ``noise · clip``; an epoch is one such
    mechanism, whatever the number of its steps. Source: Abadi et al. 2016, DP-SGD (arXiv
    1607.00133), with shuffled batches and no amplification claimed.

    Attributes
    ----------
    clip : float
        Norm to which the gradient of an image is cut, over all that the method trains.
    noise : float
        Multiplier of the noise.
    draws : Generator
        Of the system's randomness, and of no seed: who knew a seed could take the noise off.
    """

    clip: float
    noise: float
    draws: torch.Generator

    def gradients(
        self, method: Method, trained: State, fixed: State, batch: Batch
    ) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None]:
        """Return private gradients, each client's mean loss (U,), and residuals (U, B, C).

        Every image is given a copy of its client, so that the gradient of a copy is the image's:
        the text pass runs over U·B contexts instead of U.

        Parameters
        ----------
        method : Method
        trained, fixed : State
            Stacked, with a leading U.
        batch : Batch
            U clients with B images each.
        """
        clients, images = batch.labels.shape
        copies = clients * images
        leaves = {n: _each(t, images).detach().requires_grad_() for n, t in trained.items()}
        constants = {n: _each(t, images) for n, t in fixed.items()}
        text = method.text(leaves, constants)
        check_text(method, text, copies)
        loss, residual = method.measured_loss(text, leaves, constants, _single(batch))
        check_loss(method, loss, copies)
        found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        single: dict[str, Tensor | None] = dict(zip(leaves, found, strict=True))
        check_gradients(method, single)
        with torch.no_grad():
            # sums of squares are never narrower than float32
            norms = [
                g.flatten(1).to(torch.promote_types(g.dtype, torch.float32)).square().sum(1)
                for g in single.values()
                if g is not None
            ]
            norm = torch.stack(norms).sum(0).sqrt()
            weight = (self.clip / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
            weight = torch.where(batch.mask.flatten(), weight, 0)
            count = batch.mask.sum(1).to(norm.dtype)
            private: dict[str, Tensor | None] = {
                name: None if g is None else self._noisy(g, weight, count, images)
                for name, g in single.items()
            }
            each = torch.where(batch.mask, loss.unflatten(0, (clients, images)), 0)
            mean = each.sum(1) / count.to(loss.dtype)
        if residual is not None:
            residual = residual.unflatten(0, (clients, images)).squeeze(2)
        return private, mean, residual

    def _noisy(self, each: Tensor, weight: Tensor, count: Tensor, images: int) -> Tensor:
        """Sum the cut gradients (U·B, ...) of each client, add noise, divide by its images."""
        lines = each.flatten(1).unflatten(0, (-1, images)).to(weight.dtype)
        # an image that is not there may have any gradient, also none that is a number
        lines = torch.where(weight.view(-1, images, 1) > 0, lines, 0)
        total = torch.einsum("ubk,ub->uk", lines, weight.view(-1, images))
        noise = torch.randn(
            total.shape, generator=self.draws, dtype=total.dtype, device=total.device
        )
        total = (total + self.clip * self.noise * noise) / count[:, None]
        return total.view(-1, *each.shape[1:]).to(each.dtype)


def _each(tensor: Tensor, images: int) -> Tensor:
    """Repeat every client's row for its images: (U, ...) -> (U·B, ...)."""
    if len(tensor) == 1 or tensor.stride(0) == 0:  # one for all: nothing is copied
        return tensor[:1].expand(len(tensor) * images, *tensor.shape[1:])
    return tensor[:, None].expand(-1, images, *tensor.shape[1:]).flatten(0, 1)


def _single(batch: Batch) -> Batch:
    """Make every image a client's only one: (U, B, ...) -> (U·B, 1, ...)."""
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    parts = {n: t if t is None else t.flatten(0, 1)[:, None] for n, t in parts.items()}
    # a mean over no image would be no number
    return Batch(**parts | {"mask": torch.ones_like(parts["mask"])})


def image_privacy(settings: Settings, method: Method) -> ImagePrivacy | None:
    """Return the privacy of images that settings ask for, or None.

    Raises
    ------
    InputError
        If the method trains nothing, or looks at training images but through its loss.
    """
    if settings.dp_noise is None or settings.dp_unit != "image":
        return None
    why = None
    if not method.trains:
        why = "it trains nothing"
    elif type(method).surveys is not Method.surveys:
        why = "it surveys whole training sets before it trains"
    elif type(method).after_step is not Method.after_step:
        why = "it keeps something of the images beside what its loss teaches"
    if why is not None:
        raise InputError(
            f"fastfpl.run: dp_unit must be client, or dp_noise left out, for {method.name}; got "
            f"image, and {why}"
        )
    assert settings.dp_clip is not None
    draws = torch.Generator(method.task.classes.tower.device)
    draws.manual_seed(secrets.randbits(63))
    return ImagePrivacy(settings.dp_clip, settings.dp_noise, draws)
