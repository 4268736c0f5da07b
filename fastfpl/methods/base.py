"""What an algorithm is to the rest of the library: values that travel, a loss, a merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from fastfpl.errors import InputError
from fastfpl.features import TextFeatures
from fastfpl.ops.text import encode_text
from fastfpl.prompts import ClassPrompts
from fastfpl.seeds import generator

__all__ = [
    "Batch",
    "Method",
    "Options",
    "State",
    "Task",
    "Tolerance",
    "Upload",
    "cross_entropy",
    "masked_mean",
    "weighted_mean",
]

#: Named tensors: what a server or client holds or sends. In a cohort all carry a leading U.
State = dict[str, Tensor]
#: What a client has sent: named tensors that may lie on disk, each read when it is looked at.
Upload = Mapping[str, Tensor]


class Options(BaseModel):
    """Options of one method; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step of a cohort, or of its clients' whole training sets.

    Attributes
    ----------
    image : Tensor, shape (U, B, D) or (U, B, P, D)
        What the method's ``image_kind`` says: unit-length pooled features, pooled features as the
        tower gives them, or unit-length features of every patch.
    labels, domains : Tensor, shape (U, B), int64
        Class and visual domain, the latter an index into `Task.domains`.
    positions : Tensor, shape (U, B), int64
        Place of each image in its client's own list of training images.
    mask : Tensor, shape (U, B), bool
        False where nothing stands: other clients of the cohort have more images.
    strong : Tensor or None
        A strongly augmented view, shaped like ``image``; only for methods with ``paired``.
    """

    image: Tensor
    labels: Tensor
    domains: Tensor
    positions: Tensor
    mask: Tensor
    strong: Tensor | None = None


@dataclass(frozen=True)
class Tolerance:
    """How well the problems inside a loss must be solved.

    Attributes
    ----------
    tol : float
        What no residual may exceed.
    rule, cure : str
        What must hold, and what helps where it does not; parts of a sentence.
    """

    tol: float
    rule: str
    cure: str


@dataclass(frozen=True, eq=False)
class Task:
    """What every method is given.

    Attributes
    ----------
    classes : ClassPrompts
        The C classes over the frozen text tower.
    logit_scale : float
        CLIP's multiplier of cosine similarities.
    clients : int
        N.
    domains : tuple of str
        Visual domains of the data set.
    client_domains : tuple of int or None
        Domain of each client; None if a client's training images come from several.
    n_ctx : int
        Context vectors T.
    ctx_init : str or None
        Words that initialise the context; None draws N(0, 0.02²).
    lr : float
        Learning rate of prompts.
    seed : int
    text_features : TextFeatures
        Cache of text features that are constants of a round, keyed by (owner, version).
    """

    classes: ClassPrompts
    logit_scale: float
    clients: int
    domains: tuple[str, ...]
    client_domains: tuple[int, ...] | None
    n_ctx: int
    ctx_init: str | None
    lr: float
    seed: int
    text_features: TextFeatures

    @property
    def dtype(self) -> torch.dtype:
        """Of trained tensors, loss and gate: float32, or float64 in a float64 tower."""
        return torch.promote_types(self.classes.tower.dtype, torch.float32)

    def initial_ctx(self) -> Tensor:
        """Draw the context every client starts from: shape (T, W)."""
        tower = self.classes.tower
        if self.ctx_init is not None:
            return self.classes.words(self.ctx_init).to(self.dtype)
        draw = torch.randn(
            self.n_ctx, tower.width, generator=generator(self.seed, "ctx"), dtype=torch.float32
        )
        return (0.02 * draw).to(tower.device, self.dtype)

    def encode(self, ctx: Tensor) -> Tensor:
        """Encode contexts (..., T, W) -> (..., C, D)."""
        return encode_text(self.classes.tower, self.classes.layout(ctx.shape[-2]), ctx)


class Method(ABC):
    """One algorithm. The in-process federation and a networked one call the same six verbs.

    A round is: `download` to each selected client; the client `start`s from that and from what it
    keeps; SGD moves the trained tensors along `loss`; `finish` says what is sent and what is kept;
    the server `merge`s. `start`, `text`, `logits`, `loss` and `finish` work on a cohort: every
    tensor has a leading dimension U, one entry a client, and no entry may look at another.
    Methods with memory banks also use `survey` and `after_step`.

    `text`, `loss`, `measured_loss` and `after_step` are a training step. They read no number of a
    tensor (nothing that waits for the device), draw nothing, and take what changes from step to
    step or round to round from their arguments alone: a step may be replayed without them, and so
    may `text` in an evaluation.

    Attributes
    ----------
    name : str
        On the command line.
    summary : str
        One line for people.
    sends, receives : str
        What a client that trains uploads and downloads in a round; "nothing" if so.
    trains : bool
        False if there is nothing to train (zero-shot).
    personal : bool
        True if clients are evaluated with different parameters.
    evaluates_download : "merged" or "trained"
        Whether a client is evaluated with what it would download after the merge, or with what it
        had downloaded when it last trained; the latter is kept with the run. Who never trained is
        evaluated with what it would download.
    image_kind : "pooled", "raw" or "patches"
        What `logits` and `loss` see of an image, as `Batch.image` says.
    paired : bool
        True if training steps also need a strongly augmented view.
    supervised : bool
        False if the loss never looks at labels.
    all_first : bool
        True if every client trains in round 0, whatever the participation.
    scored_together : int
        Images of an evaluation whose logits depend on each other: the first so many, the next ones
        and so on. 1 for every method as its paper has it.
    scores : str
        How it scores an image where that is not one text feature a class; ends a sentence that
        begins with its name.
    joins : int
        How often a client that comes later takes part until it has everything of its own.
    grows : set of str
        Names of the server's tensors to whose first dimension a merge may add rows, as for clients
        that upload for the first time.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    sends: ClassVar[str] = "the context"
    receives: ClassVar[str] = "the context"
    trains: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    evaluates_download: ClassVar[str] = "merged"
    image_kind: ClassVar[str] = "pooled"
    paired: ClassVar[bool] = False
    supervised: ClassVar[bool] = True
    all_first: ClassVar[bool] = False
    scored_together: ClassVar[int] = 1
    scores: ClassVar[str] = "scores images in a way of its own"
    joins: ClassVar[int] = 1
    grows: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[Options]] = Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        self.task = task
        self.options = self.Options(**dict(options or {}))

    @property
    def tune_epochs(self) -> int:
        """Epochs that a client trains before an evaluation, from what it would download.

        Nothing of it is sent or kept.
        """
        return 0

    @property
    def tolerance(self) -> Tolerance | None:
        """How well the problems inside the loss must be solved; None if it solves none."""
        return None

    def on(self, classes: ClassPrompts) -> Method:
        """Return the same method over another class list; states stay valid."""
        cache = TextFeatures(self.task.text_features.max_bytes)
        task = replace(self.task, classes=classes, text_features=cache)
        return type(self)(task, self.options.model_dump())

    def admit(self, server: State, name: str, domain: int | None) -> tuple[Method, State]:
        """Return method and server with room for one client more, whose number is `Task.clients`.

        Neither is changed, and nothing of the other clients: it is a copy for the newcomer alone.

        Parameters
        ----------
        server : State
        name : str
            Of the newcomer; whatever is drawn for it depends on the run's seed and on this alone.
        domain : int or None
            Visual domain of its images, an index into `Task.domains`; None if it has none that the
            run knows.
        """
        return self, server

    # -- values ------------------------------------------------------------------------------

    def server_init(self) -> State:
        """Return what the server holds before the first round."""
        return {"ctx": self.task.initial_ctx()}

    def download(self, server: State, client: int, round_: int) -> State:
        """Return what the server sends to one client; it may differ from client to client."""
        return {"ctx": server["ctx"]}

    def apart(self, down: State, number: int) -> State:
        """Return a download that shares no cached text feature with that of another number.

        For trials of memory, in which one client stands for many.
        """
        return down

    def merge(
        self, server: State, uploads: Mapping[int, Upload], images: Mapping[int, int], round_: int
    ) -> State:
        """Merge uploads into a new server state; clients that sent nothing are not in the mappings.

        Parameters
        ----------
        server : State
            Not changed.
        uploads : mapping from client to Upload
        images : mapping from client to int
            Training images of the client, its weight.
        round_ : int
        """
        return {**server, "ctx": weighted_mean(uploads, images, "ctx", server["ctx"])}

    # -- a cohort, leading dimension U -------------------------------------------------------

    @abstractmethod
    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Return (trained, fixed): what SGD moves and what stays constant for the round.

        ``own`` is what the clients kept, empty before their first participation.
        """

    def rate(self, name: str) -> float:
        """Return the learning rate of one trained tensor."""
        return self.task.lr

    def scheduled(self, name: str) -> bool:
        """Return whether the schedule scales the learning rate of one trained tensor."""
        return True

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode the text features of the cohort: (U, C, D) unless the method says otherwise."""
        return self.task.encode(trained["ctx"])

    def logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Score unit-length image features (U, B, D) -> logits (U, B, C)."""
        return self.task.logit_scale * image @ text.mT

    def class_features(self, text: Tensor, trained: State, fixed: State) -> Tensor | None:
        """Return the features (U, C, D) whose product with an image, scaled, is all of its logits.

        None where `logits` is more than that; `scores` says what. Arguments are those of `logits`.
        """
        return text if type(self).logits is Method.logits and text.ndim == 3 else None

    def one_context(self, trained: State, fixed: State) -> Tensor | None:
        """Return the one context (U, T, W) whose encoding `class_features` is, None if none is."""
        return trained.get("ctx") if type(self).text is Method.text else None

    def traced_logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Score as `logits` does, in plain tensor operations that depend on no value.

        That is what `torch.export` can follow; ``image`` may have any number of rows.
        """
        return self.logits(text, trained, fixed, image)

    def scoring_numbers(self, fixed: State, image: Sequence[int]) -> int:
        """Count the numbers that `logits` holds for each image beside its features, about.

        ``image`` is the shape of one image's features.
        """
        return 2 * len(self.task.classes)

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Return each client's mean loss over its unmasked images: (U,)."""
        logits = self.logits(text, trained, fixed, batch.image)
        return cross_entropy(logits.to(self.task.dtype), batch.labels, batch.mask)

    def measured_loss(
        self, text: Tensor, trained: State, fixed: State, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss and, if it solves problems, their residuals: (U,) and (U, B, C).

        Whoever trains reads the residuals after an epoch, and refuses those above `tolerance`.
        """
        return self.loss(text, trained, fixed, batch), None

    def surveys(self, fixed: State) -> bool:
        """Whether `survey` must see the clients' training sets before the local epochs."""
        return False

    def survey(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> State:
        """Return tensors to add to ``fixed`` from all training images of the clients at once.

        ``batch`` holds the plain view; the clients of the cohort have equally many images.
        """
        return {}

    def after_step(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> State:
        """Return new values of tensors of ``fixed`` for the clients of a step.

        ``text`` and ``trained`` are those that the step's loss saw.
        """
        return {}

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Return (upload, own): what the clients send and what they keep."""
        return {"ctx": trained["ctx"]}, own


def masked_mean(each: Tensor, mask: Tensor) -> Tensor:
    """Average over images (U, B) -> (U,), each client over its unmasked ones."""
    kept = mask.to(each.dtype)
    return torch.where(mask, each, 0).sum(-1) / kept.sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy of logits (U, B, C) over unmasked images -> (U,), at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return masked_mean(F.cross_entropy(wide.mT, labels, reduction="none"), mask)


def weighted_mean(
    uploads: Mapping[int, Upload], images: Mapping[int, int], name: str, otherwise: Tensor
) -> Tensor:
    """Average one tensor over clients, weighted by training images, independent of their order.

    Accumulates in float64 in the order of client numbers; returns ``otherwise`` without uploads.
    """
    total = sum(images[c] for c in uploads)
    if not uploads:
        return otherwise
    if total <= 0:
        raise InputError(f"fastfpl.merge: images must be positive; got {dict(images)}")
    mean = torch.zeros_like(otherwise, dtype=torch.float64)
    for client in sorted(uploads):
        mean += uploads[client][name].double() * (images[client] / total)
    return mean.to(otherwise.dtype)
