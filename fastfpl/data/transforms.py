"""From pixels to what an image tower takes: resized, cropped, normalised, maybe augmented."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fastfpl.data.base import Images
from fastfpl.errors import InputError, KindError, Missing

__all__ = ["Preprocess"]

# width over height of a random crop, as torchvision and the papers have it
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# long side over short side, or over the size that comes out: beyond it a resized image is more than
# what is cut out of it is worth, and a file of a few bytes could ask for all memory
_LONGEST = 64
# the strong view: probabilities of colour jitter, of grey and of blur, the range of each factor of
# the jitter (brightness, contrast and saturation; hue), and the blur's kernel and sigmas
_JITTERED, _GREYED, _BLURRED = 0.8, 0.2, 0.2
_FACTOR, _HUE = (0.2, 1.8), (-0.2, 0.2)
_KERNEL, _SIGMA = 3, (1.0, 2.0)


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
    Resizing is bicubic with antialiasing on 8-bit values, like Pillow's. An image of more than 64
    times the length of its short side is resized by Pillow itself, only where it is seen: to one
    8-bit level the same, in memory that its length does not decide.
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
        return self.normalised(self.squares(images))

    def squares(self, images: Images) -> Tensor:
        """Resize the short side and crop the centre: (b, 3, size, size), uint8."""
        pixels = _vision()
        done = []
        for image in _checked(images):
            height, width = image.shape[1:]
            short = min(height, width)
            if short != self.size and max(height, width) > _LONGEST * short:
                image = _middle(image, self.size)
            elif short != self.size:
                image = pixels.resize(
                    image,
                    [self.size],
                    interpolation=pixels.InterpolationMode.BICUBIC,
                    antialias=True,
                )
            if image.shape[1:] != (self.size, self.size):
                image = pixels.center_crop(image, [self.size, self.size])
            done.append(image)
        return self._together(done)

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
        return self.normalised(self.crops(images, seeds, scale=scale, flip=flip))

    def crops(
        self,
        images: Images,
        seeds: Sequence[int] | npt.NDArray[np.int64],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
    ) -> Tensor:
        """Cut and maybe mirror as `augmented` does: (b, 3, size, size), uint8."""
        _check_seeds("augmented", images, seeds)
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
        return self._together(done)

    def strong(self, images: Images, seeds: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """Squeeze each image into the square, maybe mirror it, and distort its colours.

        Parameters
        ----------
        images : sequence of ndarray, each uint8 of shape (height, width, 3)
        seeds : sequence of int, shape (b,), not negative
            Seed of each image's own randomness: equal seed and image, equal result, whatever else
            is in the batch.

        Returns
        -------
        batch : Tensor, shape (b, 3, size, size), float32

        Raises
        ------
        InputError, KindError
            If an image or a seed is refused.
        Missing
            If torchvision cannot be imported.

        Notes
        -----
        In this order: both sides resized to ``size`` (bilinear, antialiased; the shape of the image
        is not kept); mirrored with probability 1/2; with probability 4/5 brightness, contrast,
        saturation (factors uniform in [0.2, 1.8]) and hue (shift uniform in [-0.2, 0.2] of a turn),
        in a random order; grey with probability 1/5; with probability 1/5 a Gaussian blur of 3 × 3
        pixels, sigma uniform in [1, 2].
        Source: strong augmentation of FedAPT (Su et al. 2024, arXiv 2211.07864) as released.
        """
        return self.normalised(self.distorted(images, seeds))

    def distorted(self, images: Images, seeds: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """Squeeze and distort as `strong` does: (b, 3, size, size), uint8."""
        _check_seeds("strong", images, seeds)
        pixels = _vision()
        change = {
            "brightness": pixels.adjust_brightness,
            "contrast": pixels.adjust_contrast,
            "saturation": pixels.adjust_saturation,
            "hue": pixels.adjust_hue,
        }
        done = []
        for image, seed in zip(_checked(images), seeds, strict=True):
            drawn = _distortion(np.random.default_rng(int(seed)))
            for side in self._sides(image):
                image = pixels.resize(
                    image,
                    side,
                    interpolation=pixels.InterpolationMode.BILINEAR,
                    antialias=True,
                )
            if drawn.mirrored:
                image = pixels.horizontal_flip(image)
            for name, factor in drawn.jitter:
                image = change[name](image, factor)
            if drawn.grey:
                image = pixels.rgb_to_grayscale(image, num_output_channels=3)
            if drawn.sigma is not None:
                image = pixels.gaussian_blur(image, [_KERNEL, _KERNEL], [drawn.sigma, drawn.sigma])
            done.append(image)
        return self._together(done)

    def normalised(self, squares: Tensor) -> Tensor:
        """Normalise pixels (b, 3, size, size), uint8, where they are: float32, 0 to 1 before."""
        pixels = squares.to(torch.float32).div_(255)
        # by numbers, not tensors, which a CUDA device would have to be waited for
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            pixels[:, channel].sub_(mean).div_(std)
        return pixels

    def _sides(self, image: Tensor) -> list[list[int]]:
        """Say to which sides an image is squeezed, one after the other."""
        height, width = image.shape[1:]
        whole = [self.size, self.size]
        if (height, width) == (self.size, self.size):
            return []
        # torch makes rows wider before it makes them fewer
        high = height > _LONGEST * self.size and width < self.size
        return [[self.size, width], whole] if high else [whole]

    def _together(self, images: list[Tensor]) -> Tensor:
        if not images:
            return torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        return torch.stack(images)


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


def _check_seeds(name: str, images: Images, seeds: Sequence[int] | npt.NDArray[np.int64]) -> None:
    op = f"fastfpl.data.Preprocess.{name}"
    if len(seeds) != len(images):
        raise InputError(
            f"{op}: seeds must be one per image; got {len(seeds)} with {len(images)} images"
        )
    negative = [int(seed) for seed in seeds if seed < 0]
    if negative:
        raise InputError(f"{op}: seeds must not be negative; got {negative[0]}")


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


def _middle(image: Tensor, size: int) -> Tensor:
    """Resize the short side and crop the centre of a long image, of which the rest is not made."""
    height, width = image.shape[1:]
    short, long = min(height, width), max(height, width)
    # as torchvision rounds: the long side as it would be, and where the centre begins
    made = size * long // short
    start = round((made - size) / 2.0)
    low, high = start * long / made, (start + size) * long / made
    reach = 2 * max(1.0, long / made) + 1  # of a bicubic weight, and a pixel for its rounding
    first = max(0, math.floor(low - reach))
    last = min(long, math.ceil(high + reach))
    near = image[:, first:last] if height > width else image[:, :, first:last]
    seen = Image.fromarray(near.permute(1, 2, 0).contiguous().numpy())
    # rows first, as torch does: values are cut to 8 bits between the two
    part = (low - first, high - first)
    left, right = (0, seen.width) if height > width else part
    top, bottom = part if height > width else (0, seen.height)
    wide = seen.resize(
        (size, seen.height), Image.Resampling.BICUBIC, box=(left, 0, right, seen.height)
    )
    cut = wide.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))
    return torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy())


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


@dataclass(frozen=True)
class _Distortion:
    """What one image's strong view does: ``jitter`` names each change with its factor, in order."""

    mirrored: bool
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    sigma: float | None


def _distortion(rng: np.random.Generator) -> _Distortion:
    """Draw a strong view; everything is drawn, whatever is used of it."""
    mirrored, jittered, grey, blurred = (
        bool(rng.random() < share) for share in (0.5, _JITTERED, _GREYED, _BLURRED)
    )
    factors = [
        ("brightness", rng.uniform(*_FACTOR)),
        ("contrast", rng.uniform(*_FACTOR)),
        ("saturation", rng.uniform(*_FACTOR)),
        ("hue", rng.uniform(*_HUE)),
    ]
    order = rng.permutation(len(factors))
    sigma = rng.uniform(*_SIGMA)
    return _Distortion(
        mirrored=mirrored,
        jitter=tuple(factors[i] for i in order) if jittered else (),
        grey=grey,
        sigma=sigma if blurred else None,
    )
