"""From pixels to what an image tower takes: resized, cropped, normalised, maybe augmented."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.data.base import Images
from fastfpl.errors import InputError, KindError, Missing

__all__ = ["Preprocess"]

# width over height of a random crop, as torchvision and the papers have it
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10


@dataclass(frozen=True)
class Preprocess:
    """Turn images into the input of an image tower.

    Parameters
    ----------
    size : int
        Side of the square that comes out, in pixels.
    mean, std : tuple of 3 floats
        Per channel, of values in [0, 1].

    Notes
    -----
    Deterministic: yes, bit for bit on one machine; no image influences another one of its batch.
    Resizing is bicubic with antialiasing on 8-bit values, like Pillow's.
    Source: Radford et al. 2021, CLIP, arXiv 2103.00020 (released preprocessing).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"fastfpl.data.Preprocess: size must be positive; got {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                "fastfpl.data.Preprocess: mean and std must be 3 values, std positive; got "
                f"{self.mean} and {self.std}"
            )

    def __call__(self, images: Images) -> Tensor:
        """Resize the short side, crop the centre, normalise.

        Parameters
        ----------
        images : sequence of ndarray, each uint8 of shape (height, width, 3)
            Sizes may differ; an image of ``size`` × ``size`` keeps its pixels.

        Returns
        -------
        batch : Tensor, shape (b, 3, size, size), float32

        Raises
        ------
        InputError, KindError
            If an image has another shape or dtype.
        Missing
            If torchvision cannot be imported.
        """
        pixels = _vision()
        done = []
        for image in _checked(images):
            height, width = image.shape[1:]
            if min(height, width) != self.size:
                image = pixels.resize(
                    image,
                    [self.size],
                    interpolation=pixels.InterpolationMode.BICUBIC,
                    antialias=True,
                )
            if image.shape[1:] != (self.size, self.size):
                image = pixels.center_crop(image, [self.size, self.size])
            done.append(image)
        return self._normalised(done)

    def augmented(
        self,
        images: Images,
        seeds: Sequence[int] | npt.NDArray[np.int64],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
    ) -> Tensor:
        """Cut a random window out of each image, resize it, maybe mirror it, normalise.

        Parameters
        ----------
        images : sequence of ndarray, each uint8 of shape (height, width, 3)
        seeds : sequence of int, shape (b,), not negative
            Seed of each image's own randomness: equal seed and image, equal result, whatever else
            is in the batch.
        scale : (float, float)
            Smallest and largest area of the window as a part of the image, in (0, 1].
        flip : float
            Probability of the mirror image, in [0, 1].

        Returns
        -------
        batch : Tensor, shape (b, 3, size, size), float32

        Raises
        ------
        InputError, KindError
            If an image, a seed, ``scale`` or ``flip`` is refused.
        Missing
            If torchvision cannot be imported.

        Notes
        -----
        Width over height of the window is log-uniform in [3/4, 4/3]; after ten windows that do not
        fit, the largest centred one with an allowed shape is taken.
        Source: Zhou et al. 2022, CoOp, arXiv 2109.01134 (training transforms).
        """
        if len(seeds) != len(images):
            raise InputError(
                "fastfpl.data.Preprocess.augmented: seeds must be one per image; got "
                f"{len(seeds)} with {len(images)} images"
            )
        negative = [int(seed) for seed in seeds if seed < 0]
        if negative:
            raise InputError(
                f"fastfpl.data.Preprocess.augmented: seeds must not be negative; got {negative[0]}"
            )
        if not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(
                "fastfpl.data.Preprocess.augmented: scale must satisfy 0 < low <= high <= 1; got "
                f"{tuple(scale)}"
            )
        if not 0 <= flip <= 1:
            raise InputError(
                f"fastfpl.data.Preprocess.augmented: flip must lie in [0, 1]; got {flip}"
            )
        pixels = _vision()
        done = []
        for image, seed in zip(_checked(images), seeds, strict=True):
            rng = np.random.default_rng(int(seed))
            mirrored = rng.random() < flip
            top, left, height, width = _window(image.shape[1], image.shape[2], scale, rng)
            image = pixels.resized_crop(
                image,
                top,
                left,
                height,
                width,
                [self.size, self.size],
                interpolation=pixels.InterpolationMode.BICUBIC,
                antialias=True,
            )
            done.append(pixels.horizontal_flip(image) if mirrored else image)
        return self._normalised(done)

    def _normalised(self, images: list[Tensor]) -> Tensor:
        if not images:
            return torch.empty((0, 3, self.size, self.size))
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return torch.stack(images).to(torch.float32).div_(255).sub_(mean).div_(std)


def _vision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except (ImportError, RuntimeError) as error:
        raise Missing(
            "fastfpl.data.Preprocess: torchvision must be installed and match torch "
            f"{torch.__version__}; got {type(error).__name__}: {error}: "
            "pip install --upgrade torch torchvision"
        ) from error
    return functional


def _checked(images: Images) -> list[Tensor]:
    """Return each image as a tensor (3, height, width) of its own, uint8."""
    tensors = []
    for number, image in enumerate(images):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise KindError(
                f"fastfpl.data.Preprocess: image {number} must be uint8; got {array.dtype}"
            )
        if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise InputError(
                f"fastfpl.data.Preprocess: image {number} must have shape (height, width, 3); got "
                f"{array.shape}"
            )
        # a copy: torch warns about read-only arrays, and strides may be negative
        tensors.append(torch.from_numpy(array.transpose(2, 0, 1).copy()))
    return tensors


def _window(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a random window."""
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w
