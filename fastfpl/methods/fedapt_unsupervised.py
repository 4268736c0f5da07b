"""Unsupervised FedAPT: pseudo labels of zero-shot CLIP first, then memory banks of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fastfpl.errors import InputError
from fastfpl.methods.base import Batch, Method, State, Task, Upload, masked_mean
from fastfpl.methods.fedapt import FedAPT, unit_images

__all__ = ["FedAPTUnsupervised"]


class FedAPTUnsupervised(FedAPT):
    """FedAPT without labels: context, keys, query network, merge and inference are FedAPT's.

    In the first phase a teacher, zero-shot CLIP, sees the plain view of each image; where it is
    surer than the threshold, its answer is the label of the strong view. The loss adds the cross
    entropy of the domain, W_q f of the strong view, over all images. A batch of which the teacher
    is never sure has that term alone.

    In the second phase every client has a bank of its training images: unit-length features F and
    scores S, softmax of the logits of the global model with which the phase began. With p the
    softmax of the plain view's logits z, the loss averages over images b

        - sum_c S_bc log_softmax(z_strong)_c  +  CE(W_q f_b, domain)
        - sum_k <p_b, S_k>  +  repulsion * sum_b' <p_b, p_b'>

    where k runs over the nearest other images in F, b' over the other images of the batch, the
    first S is the bank as it was and the second the bank refreshed with this batch's p. No gradient
    flows through S. F is refreshed by writing what is there: the plain view is always the same.

    A client that first takes part when the phase has begun builds its bank then, from the context
    with which the phase began: the same bank. Labels are never looked at.

    Source: Su et al. 2024 (FedAPT, AAAI, arXiv 2211.07864) as its released code has it, with the
    log-softmax of the logits where the code takes the softmax of a softmax, the attraction as a
    dot product, and no term for an empty selection.
    """

    name = "fedapt-unsupervised"
    summary = "FedAPT that adapts to images without labels"
    sends = "the context and the domain query network"
    receives = (
        "the context, the domain query network, which key is its own, and the "
        "phase; once, the context with which the second phase began"
    )
    paired = True
    supervised = False

    class Options(FedAPT.Options):
        """Options of unsupervised FedAPT."""

        class_specific: bool = Field(False, description="every class has a context of its own")
        pseudo_rounds: int = Field(10, ge=0, description="rounds of the first phase")
        threshold: float = Field(
            0.75, ge=0, lt=1, description="what the teacher must exceed for a pseudo label to count"
        )
        neighbours: int = Field(5, ge=0, description="nearest images of the bank that attract")
        repulsion: float = Field(
            0.5, ge=0, description="weight of the images of a batch repelling each other"
        )

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        if task.classes.position != "end":
            raise InputError(
                f"fastfpl.run: position must be 'end' for {self.name}, whose teacher's words stand "
                f"before the class name; got {task.classes.position!r}"
            )

    def admit(self, server: State, name: str, domain: int | None) -> tuple[Method, State]:
        """Admit like FedAPT; the newcomer has no bank yet."""
        other, room = super().admit(server, name, domain)
        surveyed = server["surveyed"]
        return other, {**room, "surveyed": torch.cat((surveyed, torch.zeros_like(surveyed[:1])))}

    def server_init(self) -> State:
        """Hold FedAPT's state and the context with which the second phase begins."""
        state = super().server_init()
        surveyed = torch.zeros(self.task.clients, dtype=torch.bool)
        return {**state, "begin": state["ctx"].clone(), "surveyed": surveyed}

    def download(self, server: State, client: int, round_: int) -> State:
        """Send FedAPT's state, the phase, and to whom has no bank what it is built from."""
        second = round_ >= self.options.pseudo_rounds
        phase = torch.tensor(2 if second else 1, device=server["ctx"].device)
        down = {**super().download(server, client, round_), "phase": phase}
        if second and not server["surveyed"][client]:
            down["begin"] = server["begin"]
        return down

    def merge(
        self, server: State, uploads: Mapping[int, Upload], images: Mapping[int, int], round_: int
    ) -> State:
        """Average like FedAPT; remember who has a bank, and in the first phase the context."""
        new = super().merge(server, uploads, images, round_)
        if round_ < self.options.pseudo_rounds:
            return {**new, "begin": new["ctx"].clone()}
        surveyed = server["surveyed"].clone()
        surveyed[sorted(uploads)] = True
        return {**new, "surveyed": surveyed}

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start like FedAPT, with the teacher in the first phase and the bank in the second."""
        trained, fixed = super().start(down, own, training=training)
        if not training:
            return trained, fixed
        if int(down["phase"][0]) == 1:
            teacher = self.task.encode(self.task.classes.words("a photo of a"))
            return trained, {**fixed, "teacher": teacher.expand(len(fixed["key"]), -1, -1)}
        if "bank.scores" in own:
            return trained, {**fixed, **{n: own[n] for n in ("bank.features", "bank.scores")}}
        return trained, {**fixed, "begin": down["begin"]}

    def surveys(self, fixed: State) -> bool:
        """Whether the second phase has begun without a bank."""
        return "begin" in fixed and "bank.scores" not in fixed

    def survey(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> State:
        """Build the bank of all training images as the phase's first model sees them."""
        begin = self._encode(fixed["begin"], self.keys[fixed["key"]])
        scores = self._scores(begin, trained, fixed, batch.image)
        return {"bank.features": unit_images(batch.image), "bank.scores": scores}

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send context and query; keep the bank."""
        upload, own = super().finish(trained, fixed, own)
        return upload, {**own, **{n: t for n, t in fixed.items() if n.startswith("bank.")}}

    # -- losses --------------------------------------------------------------------------------

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Loss of the phase: pseudo labels, or the bank."""
        assert batch.strong is not None
        strong = self.logits(text, trained, fixed, batch.strong).to(self.task.dtype)
        if "teacher" in fixed:
            domain = self.domain_loss(trained, fixed, batch.strong, batch.mask)
            return self._pseudo(strong, fixed["teacher"], batch) + domain
        domain = self.domain_loss(trained, fixed, batch.image, batch.mask)
        p = self._scores(text, trained, fixed, batch.image)
        return self._consistency(strong, fixed, batch) + domain + self._spread(p, fixed, batch)

    def _scores(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Softmax of the logits: (U, B, C)."""
        return self.logits(text, trained, fixed, image).to(self.task.dtype).softmax(dim=-1)

    def _pseudo(self, strong: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Cross entropy against the teacher where it is sure, 0 where it never is: (U,)."""
        with torch.no_grad():
            weak = self.task.logit_scale * unit_images(batch.image) @ teacher.mT
            sure, answer = weak.to(self.task.dtype).softmax(dim=-1).max(dim=-1)
            kept = batch.mask & (sure > self.options.threshold)
            # nobody kept: all of a client's terms are masked below, whatever the divisor
            count = kept.sum(dim=-1).clamp(min=1)
        each = F.cross_entropy(strong.mT, answer, reduction="none")
        return torch.where(kept, each, 0).sum(dim=-1) / count

    def _consistency(self, strong: Tensor, fixed: State, batch: Batch) -> Tensor:
        """Cross entropy of the strong view against what the bank said before this step: (U,)."""
        rows = torch.arange(len(batch.positions), device=strong.device)[:, None]
        before = fixed["bank.scores"][rows, batch.positions]
        return masked_mean(-(strong.log_softmax(dim=-1) * before).sum(dim=-1), batch.mask)

    def _spread(self, p: Tensor, fixed: State, batch: Batch) -> Tensor:
        """Attraction to the neighbours and repulsion by the batch: (U,)."""
        with torch.no_grad():
            bank = _refreshed(fixed["bank.scores"], p, batch)
            similar = unit_images(batch.image) @ fixed["bank.features"].mT  # (U, B, n)
            similar.scatter_(-1, batch.positions[..., None], float("-inf"))
            count = min(self.options.neighbours, similar.shape[-1] - 1)
            nearest = similar.topk(count, dim=-1).indices  # (U, B, k)
            rows = torch.arange(len(bank), device=bank.device)[:, None, None]
            near = bank[rows, nearest].sum(dim=-2)
            mask = batch.mask[..., None]
        attraction = -(p * near).sum(dim=-1)
        # the others' sum is everybody's without one's own
        everybody = torch.where(mask, p, 0).sum(dim=-2, keepdim=True)
        repulsion = (p * (everybody - p)).sum(dim=-1)
        return masked_mean(attraction + self.options.repulsion * repulsion, batch.mask)

    def after_step(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> State:
        """Refresh the bank's scores with those that the step saw."""
        if "bank.scores" not in fixed:
            return {}
        p = self._scores(text, trained, fixed, batch.image)
        return {"bank.scores": _refreshed(fixed["bank.scores"], p, batch)}


def _refreshed(bank: Tensor, p: Tensor, batch: Batch) -> Tensor:
    """Write p (U, B, C) into a copy of the bank (U, n, C), masked images left out."""
    rows = torch.arange(len(bank), device=bank.device)[:, None]
    # a masked place writes into a spare row behind the images
    fresh = torch.cat((bank, bank[:, :1]), dim=1)
    fresh[rows, torch.where(batch.mask, batch.positions, bank.shape[1])] = p.detach()
    return fresh[:, :-1]
