"""What training steps and evaluations see of the images: features, cached or fresh."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Split
from fastfpl.data.transforms import Preprocess
from fastfpl.errors import InputError
from fastfpl.features import FeatureKey, Features, FeatureStore
from fastfpl.seeds import seed_for

__all__ = ["Eye", "Feed", "Observer", "evaluation_feed", "moved", "silent", "training_feed"]

#: ``observer(what, done, total)`` is told of every long step.
Observer = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


Indices = npt.NDArray[np.int64]

# batches of features on their way to a device
_AHEAD = 4


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for the device."""
    ready = tensor.pin_memory() if device.type == "cuda" else tensor
    return ready.to(device, non_blocking=True)


class Feed:
    """Image features of one split.

    Parameters
    ----------
    device : torch.device
    split : Split
    rows : ndarray, shape (n,), int64
        Images that may be asked for, ascending.
    stores : list of Features
        One entry a view, each with n rows; empty if every batch is encoded afresh.
    encode : callable
        ``encode(indices, seeds)`` draws, augments and encodes images; used without stores.
    strong : callable or list of Features, optional
        The strongly augmented view, likewise.
    """

    def __init__(
        self,
        device: torch.device,
        split: Split,
        rows: Indices,
        stores: list[Features],
        encode: Callable[[Indices, Indices], Tensor],
        strong: Callable[[Indices, Indices], Tensor] | list[Features] | None = None,
    ) -> None:
        self.split = split
        self.paired = strong is not None
        self.random = len(stores) != 1 or self.paired
        self._device = device
        self._rows = rows
        self._stores = stores
        self._encode = encode
        self._strong = strong
        self._copies: deque[torch.cuda.Event] = deque()

    def labels(self, indices: Indices) -> Tensor:
        """Labels of images, any shape, int64."""
        return moved(torch.from_numpy(self.split.labels[indices]), self._device)

    def domains(self, indices: Indices) -> Tensor:
        """Visual domains of images, any shape, int64."""
        return moved(torch.from_numpy(self.split.domains[indices]), self._device)

    def batch(self, indices: Indices, draws: Indices | None = None) -> Tensor:
        """Features of images of any index shape (...): (..., D) or (..., P, D).

        ``draws``, integers of the same shape, choose the view or seed the augmentation; a feed
        that is not `random` needs none.
        """
        return self._view(self._stores or self._encode, indices, draws)

    def strong(self, indices: Indices, draws: Indices) -> Tensor:
        """Features of the strongly augmented view, as `batch` gives those of the plain one."""
        assert self._strong is not None
        return self._view(self._strong, indices, draws)

    def _view(
        self,
        source: Callable[[Indices, Indices], Tensor] | list[Features],
        indices: Indices,
        draws: Indices | None,
    ) -> Tensor:
        flat = indices.reshape(-1)
        if callable(source):
            assert draws is not None
            features = source(flat, draws.reshape(-1))  # on the device: the tower made them
        else:
            at = np.searchsorted(self._rows, flat)
            if len(source) == 1:
                features = source[0][at]
            else:
                assert draws is not None
                which = draws.reshape(-1) % len(source)
                parts = torch.stack([view[at] for view in source])
                features = parts[torch.from_numpy(which), torch.arange(len(flat))]
            features = moved(features, self._device)
            self._stay_near()
        return features.reshape(*indices.shape, *features.shape[1:])

    def _stay_near(self) -> None:
        """Let the host be a few batches ahead of a CUDA device, not an epoch of pinned memory."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._copies.append(event)
        if len(self._copies) > _AHEAD:
            # the device has the work of the batches since then
            self._copies.popleft().synchronize()


@dataclass(frozen=True, eq=False)
class Eye:
    """How a frozen CLIP looks at images for one method.

    Attributes
    ----------
    clip : FrozenCLIP
    kind : "pooled", "raw" or "patches"
        As `Method.image_kind`.
    store : FeatureStore
    observer : Observer
    mean, std : tuple of float
        What pixels are normalised by.
    """

    clip: FrozenCLIP
    kind: str
    store: FeatureStore
    observer: Observer
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.kind == "patches" and self.clip.patches is None:
            raise InputError(
                "fastfpl.run: clip must give features of patches for this method; got "
                f"{self.clip.name!r}, which has none; use a ViT or a modified ResNet"
            )

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels into features of the kind."""
        ready = moved(pixels, self.clip.device).to(self.clip.dtype)
        if self.kind == "patches":
            return self.clip.encode_image_tokens(ready)
        return self.clip.encode_image(ready, normalize=self.kind == "pooled")

    @property
    def prepare(self) -> Preprocess:
        """Size and normalisation of pixels."""
        return Preprocess(self.clip.image_size, self.mean, self.std)


def training_feed(
    eye: Eye, split: Split, rows: Indices, settings: Settings, *, paired: bool = False
) -> Feed:
    """Feed training steps with the settings' augmentation.

    A paired feed's plain view is the deterministic one; ``augment`` decides whether the strong view
    is drawn anew every time or is one of a fixed number of views.
    """
    prepare, scale = eye.prepare, (settings.crop, 1.0)

    def crop(indices: Indices, seeds: Indices) -> Tensor:
        pixels = prepare.augmented(split.images(indices), seeds, scale=scale, flip=settings.flip)
        return eye.encode(pixels)

    def distort(indices: Indices, seeds: Indices) -> Tensor:
        return eye.encode(prepare.strong(split.images(indices), seeds))

    def views(encode: Callable[[Indices, Indices], Tensor], name: str) -> list[Features]:
        stores = []
        for v in range(settings.views):

            def build(at: Indices, v: int = v) -> Tensor:
                # views do not depend on the run's seed, so that runs share them
                seeds = np.array([seed_for(v, "view", int(i)) for i in rows[at]])
                return encode(rows[at], seeds)

            stores.append(_stored(eye, split, "train", rows, f"{name}-{v}", build, f"view {v + 1}"))
        return stores

    if paired:
        plain = _plain(eye, split, "train", rows)
        strong = distort if settings.augment == "fresh" else views(distort, "strong")
        return Feed(eye.clip.device, split, rows, [plain], crop, strong)
    if settings.augment == "fresh":
        return Feed(eye.clip.device, split, rows, [], crop)
    if settings.augment == "none":
        return Feed(eye.clip.device, split, rows, [_plain(eye, split, "train", rows)], crop)
    stores = views(crop, f"crop-{settings.crop}-{settings.flip}")
    return Feed(eye.clip.device, split, rows, stores, crop)


def evaluation_feed(eye: Eye, split: Split, name: str, rows: Indices) -> Feed:
    """Feed evaluations: one deterministic view of every image."""

    def encode(indices: Indices, seeds: Indices) -> Tensor:
        return eye.encode(eye.prepare(split.images(indices)))

    return Feed(eye.clip.device, split, rows, [_plain(eye, split, name, rows)], encode)


def _plain(eye: Eye, split: Split, name: str, rows: Indices) -> Features:
    def build(at: Indices) -> Tensor:
        return eye.encode(eye.prepare(split.images(rows[at])))

    return _stored(eye, split, name, rows, "centre", build, "images")


def _stored(
    eye: Eye,
    split: Split,
    name: str,
    rows: Indices,
    view: str,
    build: Callable[[Indices], Tensor],
    what: str,
) -> Features:
    # few-shot runs need a small part of the training split: only that part is encoded
    part = "all" if len(rows) == len(split) else f"{seed_for(0, *rows.tolist()):016x}"
    clip = eye.clip
    key = FeatureKey(
        weights=clip.weights_digest,
        data=split.fingerprint,
        split=f"{name}-{part}",
        view=f"{view}-{clip.image_size}-{eye.mean}-{eye.std}",
        kind=eye.kind,
        dtype=str(clip.dtype).removeprefix("torch."),
    )
    title = f"encoding {name} {what}"
    return eye.store.get(key, len(rows), build, lambda done, n: eye.observer(title, done, n))
