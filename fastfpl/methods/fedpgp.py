"""FedPGP: a shared prompt, a low-rank personal change of it, and CLIP's own text as guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fastfpl.errors import InputError
from fastfpl.methods.base import Batch, Method, State, Task
from fastfpl.methods.base import Options as _Options
from fastfpl.seeds import generator

__all__ = ["FedPGP"]


class FedPGP(Method):
    """Clients train sigma + U V; sigma is averaged, the low-rank U (T, r) and V (r, W) stay.

    The loss of a client is the cross entropy of its images under sigma + U V plus mu times

        mean over classes of -log( e^(cos(z0, zs)/t) / (e^(cos(z0, zs)/t) + e^(cos(zs, z)/t)) ),

    with z0 the features of a hand-written prompt, zs those of sigma alone and z those of
    sigma + U V: sigma is drawn to what CLIP knows, the personal prompt pushed away from sigma.
    U and V start from the same small draws everywhere, not from zero. Every client trains in the
    first round; all are evaluated after the merge with the new sigma and their own U, V.

    The hand-written prompt is "a photo of a {class}." as the paper's figure has it, or a row of as
    many X as there are context vectors, the text that the released code encodes. That code trains
    two prompts, of which the second answers no label; here there is one.

    Source: Cui et al. 2024 (FedPGP, ICML), arXiv 2405.09771; the contrastive term as its released
    code computes it.
    """

    name = "fedpgp"
    summary = "global prompt plus personal low-rank change, guided by CLIP's text"
    sends = "the shared prompt"
    receives = "the shared prompt"
    personal = True
    all_first = True

    class Options(_Options):
        """Options of FedPGP; the defaults are the released script's."""

        bottleneck: int = Field(8, ge=1, description="rank r of the personal change")
        mu: float = Field(0.5, ge=0, description="weight of the contrastive term")
        temperature: float = Field(0.5, gt=0, description="t, divides the cosines")
        reference: Literal["photo", "x"] = Field(
            "photo", description="hand-written prompt: a photo of a {class}, or X X X {class}"
        )

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        position = task.classes.position
        if self.options.mu and self.options.reference == "photo" and position != "end":
            raise InputError(
                "fastfpl.run: position must be 'end' for fedpgp with reference='photo', whose "
                f"words stand before the class name; got {position!r}; use reference=x"
            )

    def _initial(self) -> State:
        """Draw U and V that every client starts from."""
        seed, rank, tower = self.task.seed, self.options.bottleneck, self.task.classes.tower
        shapes = {"u": (self.task.n_ctx, rank), "v": (rank, tower.width)}
        draws = {
            name: torch.randn(*shape, generator=generator(seed, name), dtype=torch.float32)
            for name, shape in shapes.items()
        }
        return {name: (0.02 * t).to(tower.device, self.task.dtype) for name, t in draws.items()}

    def _reference(self) -> Tensor:
        """Encode the hand-written prompts, constants of the run: (C, D)."""
        words = "a photo of a"
        if self.options.reference == "x":
            words = " ".join("X" * self.task.n_ctx)
        ctx = self.task.classes.words(words)
        return self.task.text_features.get_or_encode(
            [("reference", 0)], lambda key: ctx, self.task.encode
        )[0]

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the new sigma and the client's own U, V, at first from the common ones."""
        clients = len(down["ctx"])
        trained = {"ctx": down["ctx"]}
        for name, tensor in self._initial().items():
            trained[name] = own.get(name, tensor.expand(clients, -1, -1))
        if not training or not self.options.mu:
            return trained, {}
        return trained, {"reference": self._reference().expand(clients, -1, -1)}

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode sigma + U V, and for the contrastive term sigma alone: (U, 1 or 2, C, D)."""
        contexts = [self.one_context(trained, fixed)]
        if "reference" in fixed:
            contexts.append(trained["ctx"])
        return self.task.encode(torch.stack(contexts, dim=1))

    def one_context(self, trained: State, fixed: State) -> Tensor:
        """Return sigma + U V."""
        return trained["ctx"] + trained["u"] @ trained["v"]

    def class_features(self, text: Tensor, trained: State, fixed: State) -> Tensor:
        """Return the features of the personal prompt."""
        return text[:, 0]

    def logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Score images with the personal prompt."""
        return super().logits(text[:, 0], trained, fixed, image)

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Cross entropy plus the contrastive term."""
        loss = super().loss(text, trained, fixed, batch)
        if "reference" not in fixed:
            return loss
        wide = text.to(self.task.dtype)
        # features have unit length: a dot product is the cosine
        positive = (fixed["reference"].to(wide) * wide[:, 1]).sum(dim=-1)
        negative = (wide[:, 1] * wide[:, 0]).sum(dim=-1)
        # -log(e^p / (e^p + e^n)) = log(1 + e^(n - p))
        contrast = F.softplus((negative - positive) / self.options.temperature).mean(dim=-1)
        return loss + self.options.mu * contrast

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send sigma; keep U and V."""
        return {"ctx": trained["ctx"]}, {"u": trained["u"], "v": trained["v"]}
