"""FedOTP as released: the transport of a whole batch stops at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfpl.methods import Batch, FedOTP, State
from fastfpl.methods.base import cross_entropy

__all__ = ["TEST_BATCH", "BatchStop", "stopped_together"]

#: Images of an evaluation that stop together.
TEST_BATCH = 100


class BatchStop(FedOTP):
    """All transport problems of a client's batch stop when their mean change is small.

    The change is that of v itself, not of its logarithm, so that few large entries decide, and a
    small temperature may never be done: then the iteration ends after ``max_iter`` without a
    complaint. In evaluations the images of every `TEST_BATCH` stop together.
    """

    scored_together = TEST_BATCH

    def logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Transport patches (U, B, P, D), a hundred images at a time."""
        parts = [
            self._together(text, part, part.new_ones(part.shape[:2], dtype=torch.bool))
            for part in image.split(TEST_BATCH, dim=1)
        ]
        return torch.cat(parts, dim=1)

    def scoring_numbers(self, fixed: State, image: Sequence[int]) -> int:
        """Count the numbers of an image's plans, and of the logarithms that make them."""
        plans = image[0] * len(self.task.classes) * self.options.prompts
        return super().scoring_numbers(fixed, image) + 6 * plans

    def measured_loss(
        self, text: Tensor, trained: State, fixed: State, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Cross entropy; what stands in masked places does not delay the batch."""
        logits = self._together(text, batch.image, batch.mask)
        return cross_entropy(logits, batch.labels, batch.mask), None

    def _together(self, text: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        wide = torch.promote_types(self.task.dtype, image.dtype)
        sim = torch.einsum("ubpd,ucnd->ubcpn", image.to(wide), text.to(wide))
        o = self.options
        plan = stopped_together(sim.detach(), mask, o.eps, o.mass, o.max_iter, o.tol)
        return self.task.logit_scale * (plan * sim).sum((-2, -1))


def stopped_together(
    sim: Tensor, mask: Tensor, eps: float, mass: float, max_iter: int, tol: float
) -> Tensor:
    """Iterate u = min(1 / (P K v), 1), v = (mass / N) / (K^T u) from v = 1 -> plans like ``sim``.

    Parameters
    ----------
    sim : Tensor, shape (U, B, C, P, N)
        K = exp((sim - 1) / eps). Logarithms are kept, so that K does not vanish.
    mask : Tensor, shape (U, B), bool
        Whose images count for the stop.
    eps, mass : float
    max_iter : int
    tol : float
        A client's problems stop when the mean over images, classes and prompts of |v - v_before| is
        smaller.
    """
    n_patches, n_prompts = sim.shape[-2:]
    log_k = (sim - 1) / eps
    log_u = sim.new_zeros(*sim.shape[:-1], 1)
    log_v = sim.new_zeros(*sim.shape[:-2], 1, n_prompts)
    counted = mask[:, :, None, None, None]
    count = mask.sum(dim=-1) * sim.shape[2] * n_prompts
    running = torch.ones(len(sim), dtype=torch.bool, device=sim.device)
    for _ in range(max_iter):
        new_u = (-math.log(n_patches) - (log_k + log_v).logsumexp(-1, keepdim=True)).clamp(max=0)
        new_v = math.log(mass / n_prompts) - (log_k + new_u).logsumexp(-2, keepdim=True)
        change = torch.where(counted, (new_v.exp() - log_v.exp()).abs(), 0)
        go = running[:, None, None, None, None]
        log_u, log_v = torch.where(go, new_u, log_u), torch.where(go, new_v, log_v)
        # the difference of two infinities is never small, as it is in the released arithmetic
        running = running & ~(change.sum(dim=(1, 2, 3, 4)) / count < tol)
        # a device goes on with what stands still: asking would wait for it
        if sim.device.type == "cpu" and not running.any():
            break
    return (log_u + log_k + log_v).exp()
