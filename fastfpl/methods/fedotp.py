"""FedOTP: global and local prompts whose logits come from transporting image patches onto them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.methods.base import Batch, Method, State, Task, Tolerance, cross_entropy
from fastfpl.methods.base import Options as _Options
from fastfpl.ops.transport import transport_logits
from fastfpl.reference import transport as reference
from fastfpl.seeds import generator

__all__ = ["FedOTP"]


class FedOTP(Method):
    """Clients train N prompts; the first few are averaged, the others never leave their client.

    An image is the set of its patches. Its logit for a class is tau times the similarity that the
    entropic transport plan of patches onto the class's N prompts collects:

        tau * sum_mn T_mn <x_m, t_n>,   rows of T at most 1/P, columns mass/N,

    with T a constant of the step. Every client trains in the first round. All are evaluated after
    the merge with the new global prompts and their own local ones. All prompts start from draws of
    their own, on top of the words of ``ctx_init`` where there are any, since equal prompts of a
    client would stay equal; the first starts where one-prompt methods start.

    Source: Li et al. 2024 (FedOTP, CVPR), arXiv 2403.00041.
    """

    name = "fedotp"
    summary = "global and local prompts, transport of image patches"
    sends = "its global prompts"
    receives = "the global prompts"
    personal = True
    image_kind = "patches"
    all_first = True
    scores = "transports the patches of an image onto several prompts a class"

    class Options(_Options):
        """Options of FedOTP."""

        prompts: int = Field(2, ge=1, description="prompts N of a client")
        shared: int = Field(1, ge=0, description="how many of them are global")
        eps: float = Field(0.1, gt=0, description="temperature of the transport")
        mass: float = Field(0.8, gt=0, le=1, description="gamma, the total of a plan")
        balanced: bool = Field(
            False, description="patches are held to mass/P exactly, not to 1/P at most"
        )
        tol: float = Field(1e-3, gt=0, description="where a transport problem ends")
        max_iter: int = Field(100, ge=1, description="iterations in which every problem must end")

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        if self.options.shared > self.options.prompts:
            raise InputError(
                f"fastfpl.run: shared must be at most prompts={self.options.prompts}; "
                f"got {self.options.shared}"
            )

    def _initial(self) -> Tensor:
        """Draw the prompts that every client starts from: (N, T, W)."""
        first = self.task.initial_ctx()
        words = torch.zeros_like(first) if self.task.ctx_init is None else first
        prompts = [first]
        for n in range(1, self.options.prompts):
            draw = torch.randn(
                first.shape, generator=generator(self.task.seed, "ctx", n), dtype=torch.float32
            )
            prompts.append(words + (0.02 * draw).to(first))
        return torch.stack(prompts)

    def server_init(self) -> State:
        """Hold the global prompts (shared, T, W)."""
        return {"ctx": self._initial()[: self.options.shared].clone()}

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the global prompts and the client's own, at first from the common ones."""
        if "local" in own:
            return {"ctx": down["ctx"], "local": own["local"]}, {}
        local = self._initial()[self.options.shared :]
        return {"ctx": down["ctx"], "local": local.expand(len(down["ctx"]), -1, -1, -1)}, {}

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode global and local prompts: (U, C, N, D)."""
        prompts = torch.cat((trained["ctx"], trained["local"]), dim=-3)
        return self.task.encode(prompts).transpose(-3, -2)

    def logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Transport patches (U, B, P, D) onto the prompts (U, C, N, D) of each class."""
        # the wider dtype decides about the logits
        logits: Tensor = transport_logits(image, text.to(self.task.dtype), **self._transport())
        return self.task.logit_scale * logits

    def class_features(self, text: Tensor, trained: State, fixed: State) -> None:
        """Return none: an image is a set of patches."""
        return

    def one_context(self, trained: State, fixed: State) -> None:
        """Return none: there are several prompts a class."""
        return

    def traced_logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Transport to the optimum, by the published iteration.

        A face ends as near to it as ``tol`` says; no other number is common to all of them.
        """
        wide = torch.promote_types(self.task.dtype, image.dtype)
        o = self.options
        sim = reference.similarities(image.to(wide), text.to(wide))
        plan = reference.optimal_plan(sim, o.eps, o.mass, o.balanced).to(wide)
        return self.task.logit_scale * (plan * sim).sum((-2, -1))

    def _transport(self) -> dict[str, Any]:
        return self.options.model_dump(include={"eps", "mass", "balanced", "max_iter", "tol"})

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Cross entropy; whether the transport ended is what `measured_loss` says."""
        return self.measured_loss(text, trained, fixed, batch)[0]

    def measured_loss(
        self, text: Tensor, trained: State, fixed: State, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Cross entropy, and the residuals of the transport."""
        logits, ended = transport_logits(
            batch.image, text.to(self.task.dtype), info=True, **self._transport()
        )
        scaled = (self.task.logit_scale * logits).to(self.task.dtype)
        return cross_entropy(scaled, batch.labels, batch.mask), ended.residual

    @property
    def tolerance(self) -> Tolerance:
        """How well the transport must be solved."""
        o = self.options
        rule = f"transport must end below tol={o.tol:g} after at most {o.max_iter} iterations"
        return Tolerance(o.tol, rule, "raise max_iter, eps or tol")

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send the global prompts, keep the local ones."""
        return {"ctx": trained["ctx"]}, {"local": trained["local"]}
