"""What one client's model says of images, as the run's own evaluation asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastfpl.clip import FrozenCLIP
from fastfpl.errors import InputError, KindError, NotConverged, NotSupported
from fastfpl.methods import Method, State
from fastfpl.methods.contract import check_logits, check_text, started
from fastfpl.ops.precision import without_autocast
from fastfpl.prompts import ClassPrompts
from fastfpl.trained.images import Picture, pictures
from fastfpl.training.feeds import Eye
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import at_once

__all__ = ["Client", "Head", "Prediction"]

#: Images that are read, cut and encoded at once, as a run's feature store does.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers to images.

    Attributes
    ----------
    names : list of str
        The class that each image was taken for.
    probabilities : Tensor, shape (B, C), float32 or wider
        Softmax of the logits.
    logits : Tensor, shape (B, C)
        As the run's evaluation computes them, multiplier included.
    classnames : tuple of str
        C classes.
    images : list of str
        Paths of the images, or their places in what was handed over.
    """

    names: list[str]
    probabilities: Tensor
    logits: Tensor
    classnames: tuple[str, ...]
    images: list[str]

    def top(self, count: int = 5) -> list[list[tuple[str, float]]]:
        """Return the likeliest classes of each image with their probabilities, best first."""
        best = self.probabilities.topk(min(count, len(self.classnames)), dim=-1)
        return [
            [(self.classnames[c], p) for c, p in zip(classes, shares, strict=True)]
            for classes, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Head:
    """A method with the tensors that one client answers with, its text encoded.

    Attributes
    ----------
    method : Method
        Over the classes that are asked for.
    text : Tensor, shape (1, ...)
        As `Method.text` gives it.
    trained, fixed : State
        As `Method.start` gives them for an evaluation.
    """

    method: Method
    text: Tensor
    trained: State
    fixed: State

    @classmethod
    @torch.no_grad()
    def of(cls, method: Method, down: State, own: State) -> Head:
        """Start a client for an evaluation and encode its text."""
        with without_autocast():
            pair = started(method, stack([down]), stack([own]), 1, training=False)
            text = method.text(*pair)
        check_text(method, text, 1)
        return cls(method, text, *pair)

    def class_features(self) -> Tensor | None:
        """Return the features (C, D) that all of the logits are a product with, or None."""
        found = self.method.class_features(self.text, self.trained, self.fixed)
        return None if found is None else found[0]


class Client:
    """One client's model, ready to be asked.

    `fastfpl.trained.Model.client` makes it.

    Attributes
    ----------
    name : str
        Of the client; ``"global"`` of a model that serves everybody.
    classnames : tuple of str
        C classes that are asked for.
    """

    def __init__(self, name: str, method: Method, down: State, own: State, eye: Eye) -> None:
        self.name = name
        self._method, self._down, self._own, self._eye = method, down, own, eye
        self._head: Head | None = None

    @property
    def classnames(self) -> tuple[str, ...]:
        """The classes that are asked for."""
        return self._method.task.classes.names

    @property
    def head(self) -> Head:
        """What answers, encoded when it is first needed."""
        if self._head is None:
            self._head = Head.of(self._method, self._down, self._own)
        return self._head

    @property
    def eye(self) -> Eye:
        """How images are looked at."""
        return self._eye

    def on(self, classnames: Sequence[str]) -> Client:
        """Return the same client asked about other classes, as `Method.on` carries it there.

        Parameters
        ----------
        classnames : sequence of str
        """
        task = self._method.task
        names = ClassPrompts(self._eye.clip, classnames, task.classes.position)
        return Client(self.name, self._method.on(names), self._down, self._own, self._eye)

    def moved(self, clip: FrozenCLIP) -> Client:
        """Return the same client over its CLIP on another device."""
        device = clip.device
        down, own = (
            {name: tensor.to(device) for name, tensor in state.items()}
            for state in (self._down, self._own)
        )
        task = self._method.task
        classes = ClassPrompts(clip, task.classes.names, task.classes.position)
        method = self._method.on(classes)
        return Client(self.name, method, down, own, replace(self._eye, clip=clip))

    def predict(self, images: Any) -> Prediction:
        """Classify images.

        Parameters
        ----------
        images : path, bytes, Pillow image, ndarray, Tensor, or a list of these
            See `fastfpl.trained.images.pictures`. Files are decoded 256 at a time.

        Returns
        -------
        Prediction

        Raises
        ------
        FastfplError
            If something is no image; the sentence names which.
        """
        asked = pictures(images)
        parts = [self.logits(self._encoded(asked[i : i + CHUNK])) for i in _chunks(len(asked))]
        logits = torch.cat(parts)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        names = [self.classnames[c] for c in logits.argmax(dim=-1).tolist()]
        return Prediction(
            names, wide.softmax(dim=-1), logits, self.classnames, [one.name for one in asked]
        )

    def image_features(self, images: Any) -> Tensor:
        """Encode images as the run sees them.

        Returns
        -------
        Tensor, shape (B, D), or (B, P, D) for methods that see patches; dtype of the CLIP
            Unit length, but for methods that see what the tower gives (FedAPT).
        """
        asked = pictures(images)
        return torch.cat([self._encoded(asked[i : i + CHUNK]) for i in _chunks(len(asked))])

    def text_features(self) -> Tensor:
        """Return one feature a class: the logits are the multiplier times image times feature.

        Returns
        -------
        Tensor, shape (C, D)

        Raises
        ------
        NotSupported
            If the method scores an image in another way.
        """
        found = self.head.class_features()
        if found is None:
            raise NotSupported(
                "fastfpl.Client.text_features: the method must score images by one text feature a "
                f"class; got {self._method.name}, which {self._method.scores}; use logits"
            )
        return found

    @torch.no_grad()
    def logits(self, image_features: Tensor) -> Tensor:
        """Score image features as the run's evaluation does.

        Parameters
        ----------
        image_features : Tensor, shape (B, D) or (B, P, D)
            Those of `image_features`.

        Returns
        -------
        Tensor, shape (B, C)
        """
        head, clip = self.head, self._eye.clip
        method = head.method
        wanted = (clip.patches, clip.dim) if method.image_kind == "patches" else (clip.dim,)
        if not isinstance(image_features, Tensor) or not image_features.is_floating_point():
            got = getattr(image_features, "dtype", type(image_features).__name__)
            raise KindError(
                f"fastfpl.Client.logits: image_features must be a tensor of floats; got {got}"
            )
        if tuple(image_features.shape[1:]) != wanted:
            shape = ", ".join(map(str, ("B", *wanted)))
            raise InputError(
                f"fastfpl.Client.logits: image_features must have shape ({shape}), those of "
                f"{method.name}; got {tuple(image_features.shape)}"
            )
        given = image_features.to(clip.device, clip.dtype)[None]
        if not given.shape[1]:
            return given.new_zeros(0, len(method.task.classes), dtype=method.task.dtype)
        parts = []
        with without_autocast():
            for part in given.split(at_once(method, head.fixed, given[:, :1]), dim=1):
                logits = method.logits(head.text, head.trained, head.fixed, part)
                check_logits(method, logits, (1, part.shape[1], len(method.task.classes)))
                parts.append(logits[0])
        found = torch.cat(parts)
        if not found.isfinite().all():
            raise NotConverged(
                "fastfpl.Client.logits: logits must be finite; got one that is not of "
                f"{method.name}"
            )
        return found

    def _encoded(self, part: Sequence[Picture]) -> Tensor:
        eye = self._eye
        features = eye.encode(eye.prepare.squares([one.read() for one in part]))
        # what a run has stored in 16 bits has lost the rest
        return features.to(eye.dtype or eye.clip.dtype).to(eye.clip.dtype)

    def __repr__(self) -> str:
        return (
            f"Client({self.name!r}, method={self._method.name!r}, {len(self.classnames)} classes)"
        )


def _chunks(count: int) -> range:
    return range(0, count, CHUNK)
