"""Scikit-learn's handwritten digits as drawings: real images that need no download."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastfpl.data.base import Dataset, Images, Split
from fastfpl.errors import Missing

__all__ = ["digits"]

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIDE = 28
_SEED = 0


class _Drawings(Split):
    """Images in memory, uint8 of shape (n, 28, 28, 3)."""

    def __init__(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        self._pixels = pixels
        self.labels = labels
        self.domains = np.zeros_like(labels)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
        digest.update(labels.tobytes())
        self.fingerprint = f"digits-{digest.hexdigest()}"

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`."""
        return cast("Images", self._pixels[np.asarray(indices, dtype=np.int64)])


def digits() -> Dataset:
    """Load the 1797 handwritten digits that come with scikit-learn.

    Returns
    -------
    dataset : Dataset
        Classes ``"zero"`` to ``"nine"``, one domain ``"handwritten"``, 1198 train and 599 test
        images of 28×28 pixels: the 8×8 originals with a margin of one,
        enlarged bicubically, dark ink on white paper.

    Raises
    ------
    Missing
        If scikit-learn is not installed.

    Notes
    -----
    Deterministic: yes; of each class a third, rounded, is test, drawn once with a fixed seed.
    Source: Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits (test part).
    """
    pixels, labels = _all()
    rng = np.random.default_rng(_SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(len(_NAMES)):
        items = rng.permutation(np.flatnonzero(labels == label))
        is_test[items[: round(len(items) / 3)]] = True
    return Dataset(
        name="digits",
        classnames=_NAMES,
        domains=("handwritten",),
        train=_Drawings(pixels[~is_test], labels[~is_test]),
        test=_Drawings(pixels[is_test], labels[is_test]),
    )


@functools.cache
def _all() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draw all digits, once a process (4 MB): pixels and labels, which nobody may write to."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Missing(
            "fastfpl.data.digits: scikit-learn must be installed; got "
            f'{error}: pip install "fastfpl[digits]"'
        ) from error
    bundle = load_digits()
    labels = np.asarray(bundle.target, dtype=np.int64)
    pixels = np.stack([_drawn(grey) for grey in np.asarray(bundle.images)])
    for array in (pixels, labels):
        array.flags.writeable = False
    return pixels, labels


def _drawn(grey: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Turn ink strengths of 0 to 16, shape (8, 8), into dark ink on white, (28, 28, 3)."""
    small = Image.fromarray(np.pad(grey, 1).astype(np.float32))
    ink = np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    paper = np.rint(255 * (1 - np.clip(ink / 16, 0, 1))).astype(np.uint8)
    return np.repeat(paper[:, :, None], 3, axis=2)
