"""The tensors of a cohort in training, and the step that moves them without waiting for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from fastfpl.methods import Batch, Method, State
from fastfpl.methods.contract import check_gradients, check_loss, check_text
from fastfpl.training.private import ImagePrivacy

__all__ = ["PHASE", "Cohort", "CohortSGD", "stored"]

#: What the names of a round's parts begin with in a profile.
PHASE = "fastfpl: "


class CohortSGD:
    """SGD with momentum and weight decay over stacked parameters, one fresh state a client.

    Equal to ``torch.optim.SGD`` on every client by itself: a client that does not step keeps its
    parameters and its momentum. Rates are tensors beside the parameters, so that a step that was
    captured follows a schedule.

    Parameters
    ----------
    parameters : State
        Tensors with a leading U; changed in place.
    rates : mapping from name to float
    momentum, weight_decay : float
    buffers : State, optional
        Momentum to begin with, by name; zero for what is not in it.
    """

    def __init__(
        self,
        parameters: State,
        rates: Mapping[str, float],
        momentum: float,
        weight_decay: float,
        buffers: State | None = None,
    ) -> None:
        self._parameters = parameters
        self._base = dict(rates)
        self.momentum = momentum
        self.weight_decay = weight_decay
        begin = buffers or {}
        self.buffers = {
            name: begin[name].clone() if name in begin else torch.zeros_like(p)
            for name, p in parameters.items()
        }
        # half-precision parameters are moved by products in float32, as by a Python number
        self._rates = {
            name: p.new_full((), rates[name], dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in parameters.items()
        }

    def scale(self, scales: Mapping[str, float]) -> None:
        """Multiply the rates that the parameters began with."""
        for name, scale in scales.items():
            self._rates[name].fill_(self._base[name] * scale)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor | None], live: int | None = None) -> None:
        """Move the first ``live`` clients (all if None); gradients have one row for each.

        A parameter without a gradient stays, as in torch.
        """
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            p, buffer = self._parameters[name][:live], self.buffers[name][:live]
            rate = self._rates[name]
            g = gradient.add(p, alpha=self.weight_decay)
            moved = buffer * self.momentum + g
            buffer.copy_(moved)
            p.sub_((moved.to(rate.dtype) * rate).to(p.dtype))


class Cohort:
    """A cohort in training.

    Clients stand in the order of their steps, those with most first: whoever still has images in a
    step is among the first ``live``, and a step works on views of them. Nothing in a step looks at
    a number on the device; `losses` and `beyond` do, after an epoch.

    Parameters
    ----------
    method : Method
    trained, fixed : State
        Stacked; ``trained`` is changed in place, ``fixed`` is not.
    momentum, weight_decay : float
    buffers : State, optional
        Momentum to begin with.
    private : ImagePrivacy, optional
        What cuts the gradients of single images and adds noise.

    Attributes
    ----------
    trained, fixed : State
        As they are now.
    sgd : CohortSGD
    """

    def __init__(
        self,
        method: Method,
        trained: State,
        fixed: State,
        momentum: float,
        weight_decay: float,
        buffers: State | None = None,
        private: ImagePrivacy | None = None,
    ) -> None:
        self.method = method
        self.private = private
        self.trained = trained
        self.fixed = dict(fixed)
        rates = {name: method.rate(name) for name in trained}
        self.sgd = CohortSGD(trained, rates, momentum, weight_decay, buffers)
        self._written: set[str] = set()
        like = next(iter(trained.values()))
        self.size = len(like)
        # sums of losses are never narrower than losses
        sums = torch.promote_types(like.dtype, torch.float32)
        self._total = like.new_zeros(self.size, dtype=sums)
        self._furthest = like.new_zeros(self.size, dtype=sums)
        self._where = like.new_zeros((self.size, 2), dtype=torch.int64)  # image, class

    def begin(self, scales: Mapping[str, float]) -> None:
        """Begin an epoch with these multipliers of the learning rates."""
        self.sgd.scale(scales)
        self._total.zero_()
        self._furthest.zero_()

    def step(self, live: int, batch: Batch) -> None:
        """Move the first ``live`` clients by one step on a batch with one row for each."""
        constants = {k: v[:live] for k, v in self.fixed.items()}
        if self.private is not None:
            self._private_step(live, constants, batch)
            return
        leaves = {k: v[:live].detach().requires_grad_() for k, v in self.trained.items()}
        with record_function(PHASE + "text"):
            text = self.method.text(leaves, constants)
        check_text(self.method, text, live)
        with record_function(PHASE + "loss"):
            loss, residual = self.method.measured_loss(text, leaves, constants, batch)
        check_loss(self.method, loss, live)
        with record_function(PHASE + "gradients"):
            found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        gradients = dict(zip(leaves, found, strict=True))
        check_gradients(self.method, gradients)
        with torch.no_grad(), record_function(PHASE + "update"):
            # before the step: the leaves share storage with what SGD moves
            for name, value in self.method.after_step(text, leaves, constants, batch).items():
                self._own(name)[:live].copy_(value)
            self.sgd.step(gradients, live)
            self._total[:live] += loss.detach()
            if residual is not None:
                self._note(live, residual, batch)

    def _private_step(self, live: int, constants: State, batch: Batch) -> None:
        assert self.private is not None
        trained = {k: v[:live] for k, v in self.trained.items()}
        with record_function(PHASE + "gradients"):
            found = self.private.gradients(self.method, trained, constants, batch)
        gradients, loss, residual = found
        with torch.no_grad(), record_function(PHASE + "update"):
            self.sgd.step(gradients, live)
            self._total[:live] += loss
            if residual is not None:
                self._note(live, residual, batch)

    def _own(self, name: str) -> Tensor:
        """Return a tensor of ``fixed`` that may be written into."""
        if name not in self._written:
            self.fixed[name] = self.fixed[name].clone()
            self._written.add(name)
        return self.fixed[name]

    def _note(self, live: int, residual: Tensor, batch: Batch) -> None:
        """Remember each client's furthest residual (live, B, C), its image and its class."""
        classes = residual.shape[-1]
        each = residual.nan_to_num(nan=torch.inf, posinf=torch.inf)
        each = torch.where(batch.mask[..., None], each, 0).to(self._furthest.dtype)
        largest, at = each.flatten(1).max(dim=1)
        image = batch.positions.gather(1, (at // classes)[:, None])
        further = largest > self._furthest[:live]
        where = torch.cat((image, (at % classes)[:, None]), dim=1)
        self._where[:live].copy_(torch.where(further[:, None], where, self._where[:live]))
        self._furthest[:live].copy_(torch.where(further, largest, self._furthest[:live]))

    def losses(self, steps: Sequence[int]) -> Tensor:
        """Wait for the epoch and return each client's mean loss over its steps, on the CPU."""
        total = self._total.cpu()
        return total / torch.tensor(steps, dtype=total.dtype)

    def beyond(self, tol: float) -> list[tuple[int, float, int, int]]:
        """Wait for the epoch and list the clients with a residual above ``tol``.

        Each with its furthest one, and this one's image and class.
        """
        furthest, where = self._furthest.cpu(), self._where.cpu()
        return [
            (u, furthest[u].item(), *where[u].tolist())
            for u in (furthest > tol).nonzero()[:, 0].tolist()
        ]

    # -- for steps that are replayed -----------------------------------------------------------

    def still(self) -> Cohort:
        """Return a cohort of the same tensors at addresses of its own, which never change."""
        twin = Cohort(
            self.method,
            {name: t.clone() for name, t in self.trained.items()},
            {name: _expanded(stored(t).clone(), t) for name, t in self.fixed.items()},
            self.sgd.momentum,
            self.sgd.weight_decay,
            self.sgd.buffers,
        )
        twin._written = set(self.fixed)
        return twin

    def take(self, other: Cohort) -> None:
        """Copy the tensors of a like cohort to the own addresses."""
        for name, tensor in self.trained.items():
            tensor.copy_(other.trained[name])
            self.sgd.buffers[name].copy_(other.sgd.buffers[name])
        for name, tensor in self.fixed.items():
            stored(tensor).copy_(stored(other.fixed[name]))


def stored(tensor: Tensor) -> Tensor:
    """View what of an expanded tensor is in memory."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _expanded(small: Tensor, like: Tensor) -> Tensor:
    return small.expand(like.shape)
