"""What training steps and evaluations see of the images: features, cached or fresh."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Split
from fastfpl.data.transforms import Preprocess
from fastfpl.features import FeatureKey, Features, FeatureStore
from fastfpl.seeds import seed_for

__all__ = ["Feed", "Observer", "evaluation_feed", "training_feed"]

#: ``observer(what, done, total)`` is told of every long step.
Observer = Callable[[str, int, int], None]

Indices = npt.NDArray[np.int64]


class Feed:
    """Unit-length image features of one split.

    Parameters
    ----------
    clip : FrozenCLIP
    split : Split
    rows : ndarray, shape (n,), int64
        Images that may be asked for, ascending.
    stores : list of Features
        One entry a view, each with n rows; empty if every batch is encoded afresh.
    encode : callable
        ``encode(indices, seeds)`` draws, augments and encodes images; used without stores.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        split: Split,
        rows: Indices,
        stores: list[Features],
        encode: Callable[[Indices, Indices], Tensor],
    ) -> None:
        self.split = split
        self.random = len(stores) != 1
        self._device = clip.device
        self._rows = rows
        self._stores = stores
        self._encode = encode

    def labels(self, indices: Indices) -> Tensor:
        """Labels of images, any shape, int64."""
        return torch.from_numpy(self.split.labels[indices]).to(self._device)

    def batch(self, indices: Indices, draws: Indices | None = None) -> Tensor:
        """Features of images of any index shape (...): (..., D).

        ``draws``, integers of the same shape, choose the view or seed the augmentation; a feed
        that is not `random` needs none.
        """
        flat = indices.reshape(-1)
        if not self._stores:
            assert draws is not None
            features = self._encode(flat, draws.reshape(-1))
        else:
            at = np.searchsorted(self._rows, flat)
            if len(self._stores) == 1:
                features = self._stores[0][at]
            else:
                assert draws is not None
                which = draws.reshape(-1) % len(self._stores)
                parts = torch.stack([self._stores[v][at] for v in range(len(self._stores))])
                features = parts[torch.from_numpy(which), torch.arange(len(flat))]
        features = features.to(self._device)
        return features.reshape(*indices.shape, *features.shape[1:])


def training_feed(
    clip: FrozenCLIP,
    split: Split,
    rows: Indices,
    settings: Settings,
    store: FeatureStore,
    observer: Observer,
) -> Feed:
    """Feed training steps with the settings' augmentation."""
    prepare = Preprocess(clip.image_size, clip.mean, clip.std)
    scale = (settings.crop, 1.0)

    def encode(indices: Indices, seeds: Indices) -> Tensor:
        pixels = prepare.augmented(split.images(indices), seeds, scale=scale, flip=settings.flip)
        return clip.encode_image(pixels.to(clip.device, clip.dtype))

    if settings.augment == "fresh":
        return Feed(clip, split, rows, [], encode)
    if settings.augment == "none":
        return _plain(clip, split, "train", rows, store, observer)
    stores = []
    for v in range(settings.views):

        def build(at: Indices, v: int = v) -> Tensor:
            # views do not depend on the run's seed, so that runs share them
            seeds = np.array([seed_for(v, "view", int(i)) for i in rows[at]])
            return encode(rows[at], seeds)

        view = f"crop-{v}-{settings.crop}-{settings.flip}"
        stores.append(
            _stored(clip, split, "train", rows, view, store, build, observer, f"view {v + 1}")
        )
    return Feed(clip, split, rows, stores, encode)


def evaluation_feed(
    clip: FrozenCLIP, split: Split, rows: Indices, store: FeatureStore, observer: Observer
) -> Feed:
    """Feed evaluations: one deterministic view of every image."""
    return _plain(clip, split, "test", rows, store, observer)


def _plain(
    clip: FrozenCLIP,
    split: Split,
    name: str,
    rows: Indices,
    store: FeatureStore,
    observer: Observer,
) -> Feed:
    prepare = Preprocess(clip.image_size, clip.mean, clip.std)

    def encode(indices: Indices, seeds: Indices) -> Tensor:
        return clip.encode_image(prepare(split.images(indices)).to(clip.device, clip.dtype))

    def build(at: Indices) -> Tensor:
        return encode(rows[at], rows[at])

    stored = _stored(clip, split, name, rows, "centre", store, build, observer, "images")
    return Feed(clip, split, rows, [stored], encode)


def _stored(
    clip: FrozenCLIP,
    split: Split,
    name: str,
    rows: Indices,
    view: str,
    store: FeatureStore,
    build: Callable[[Indices], Tensor],
    observer: Observer,
    what: str,
) -> Features:
    # few-shot runs need a small part of the training split: only that part is encoded
    part = "all" if len(rows) == len(split) else f"{seed_for(0, *rows.tolist()):016x}"
    key = FeatureKey(
        weights=clip.weights_digest,
        data=split.fingerprint,
        split=f"{name}-{part}",
        view=f"{view}-{clip.image_size}-{clip.mean}-{clip.std}",
        kind="pooled",
        dtype=str(clip.dtype).removeprefix("torch."),
    )
    title = f"encoding {name} {what}"
    return store.get(key, len(rows), build, lambda done, n: observer(title, done, n))
