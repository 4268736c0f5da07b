"""Images as people have them: files, folders, Pillow's images, arrays, tensors, lists of these."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fastfpl.data.folders import SUFFIXES, image_names, kind_of
from fastfpl.data.listing import TooDeep, as_rgb, decode, eight_bits
from fastfpl.errors import Damaged, InputError, KindError, Missing, cut, shown

__all__ = ["Picture", "pictures"]

OP = "fastfpl.predict"
Pixels = npt.NDArray[np.uint8]
# folders below each other, at most
_DEEPEST = 32


@dataclass(frozen=True)
class Picture:
    """An image that is read when it is asked for.

    Attributes
    ----------
    name : str
        Its path, or its place in what was handed over.
    read : callable
        Returns RGB pixels, uint8 of shape (height, width, 3).
    """

    name: str
    read: Callable[[], Pixels]


def pictures(images: Any) -> list[Picture]:
    """List what was handed over; files are found now and decoded later.

    Parameters
    ----------
    images : path, bytes, Pillow image, ndarray, Tensor, or a list of these
        A folder stands for the image files below it, in the order of their paths; bytes are the
        content of an image file. Arrays have shape
        (height, width), (height, width, 1, 3 or 4) or (B, height, width, 3 or 4) and 8 or 16 bits
        without sign, or floats in [0, 1]; tensors have their channels first, (3, height, width) or
        (B, 3, height, width), and are uint8 or floats in [0, 1].

    Raises
    ------
    Missing
        If a path leads nowhere, or a folder holds no image.
    InputError, KindError
        If something is no image, or its values are not those of pixels.
    """
    found = list(_listed(images, ""))
    if not found:
        raise InputError(f"{OP}: images must hold at least one; got {shown(images)}")
    return found


def _listed(images: Any, place: str) -> Iterator[Picture]:
    if isinstance(images, str | Path):
        yield from _of_path(Path(images))
    elif isinstance(images, bytes):
        yield Picture(_named(place), partial(_decoded, images, _named(place)))
    elif isinstance(images, Image.Image):
        yield Picture(_named(place), partial(_rgb, images, _named(place)))
    elif isinstance(images, Tensor):
        yield from _of_tensor(images, place)
    elif isinstance(images, np.ndarray):
        yield from _of_array(images, place)
    elif isinstance(images, list | tuple):
        for number, one in enumerate(images):
            yield from _listed(one, f"{place}{'.' * bool(place)}{number}")
    else:
        raise KindError(
            f"{OP}: images must be paths, bytes, Pillow images, arrays, tensors or lists of "
            f"these; got {type(images).__name__}"
        )


def _named(place: str) -> str:
    return f"image {place or 0}"


# -- files -------------------------------------------------------------------------------------


def _of_path(path: Path) -> Iterator[Picture]:
    kind = kind_of(path)
    if kind == "a folder":
        found = list(_below(path, 0))
        if not found:
            raise Missing(
                f"{OP}: a folder must hold image files ({', '.join(SUFFIXES)}); got "
                f"{cut(str(path))} without any"
            )
        yield from found
    elif kind == "a file":
        yield Picture(str(path), partial(_decoded, path, str(path)))
    else:
        raise Missing(f"{OP}: an image must be a file or a folder; got {kind} at {cut(str(path))}")


def _below(folder: Path, depth: int) -> Iterator[Picture]:
    """Give the image files of a folder, then those of the folders in it."""
    for name in image_names(OP, folder):
        path = folder / name
        yield Picture(str(path), partial(_decoded, path, str(path)))
    if depth == _DEEPEST:
        return
    for below in sorted(folder.iterdir()):
        # a link could lead back to where it stands
        if below.is_dir() and not below.is_symlink() and not below.name.startswith("."):
            yield from _below(below, depth + 1)


def _decoded(file: Path | bytes, name: str) -> Pixels:
    """Read a file, or what one holds, as a run does."""
    try:
        return decode(io.BytesIO(file) if isinstance(file, bytes) else file)
    except TooDeep as error:
        raise _deep(name, error) from None
    except OSError as error:
        raise Missing(
            f"{OP}: {cut(name)} must be readable; got {error.strerror or error}"
        ) from None
    except ValueError as error:
        raise Damaged(
            f"{OP}: {cut(name)} must be an image; got {error}: convert it, or leave it out"
        ) from None


# -- what is in memory ---------------------------------------------------------------------------


def _rgb(image: Image.Image, name: str) -> Pixels:
    """Turn Pillow's image of any mode into RGB, as a run reads files of it."""
    try:
        return as_rgb(image)
    except TooDeep as error:
        raise _deep(name, error) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise Damaged(f"{OP}: {name} must be a whole image; got {error}") from None


def _deep(name: str, error: TooDeep) -> KindError:
    return KindError(f"{OP}: {cut(name)} must have pixels of 8 or 16 bits; got {error}")


def _of_array(array: npt.NDArray[Any], place: str) -> Iterator[Picture]:
    if array.ndim == 4:
        for number, one in enumerate(array):
            yield from _of_array(one, f"{place}{'.' * bool(place)}{number}")
        return
    name = _named(place)
    pixels = _with_channels(_values(array, name), name)
    yield Picture(name, lambda: pixels)


def _of_tensor(tensor: Tensor, place: str) -> Iterator[Picture]:
    if tensor.ndim == 4:
        for number, one in enumerate(tensor):
            yield from _of_tensor(one, f"{place}{'.' * bool(place)}{number}")
        return
    name = _named(place)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise InputError(
            f"{OP}: a tensor must have shape (3, height, width) or (B, 3, height, width); got "
            f"{tuple(tensor.shape)}"
        )
    here = tensor.detach().cpu()
    here = here.float() if here.dtype in (torch.bfloat16, torch.float16) else here
    pixels = _with_channels(_values(here.permute(1, 2, 0).numpy(), name), name)
    yield Picture(name, lambda: pixels)


def _values(array: npt.NDArray[Any], name: str) -> Pixels:
    """Bring values to 8 bits, or refuse those that are no pixels."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return eight_bits(array)
    if array.dtype == np.bool_:
        white: Pixels = np.where(array, np.uint8(255), np.uint8(0))
        return white
    if not np.issubdtype(array.dtype, np.floating):
        raise KindError(
            f"{OP}: {name} must be uint8, uint16, bool or floats in [0, 1]; got {array.dtype}"
        )
    low, high = float(array.min(initial=1)), float(array.max(initial=0))
    # a NaN is in no range
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"{OP}: {name} must have floats in [0, 1], not normalised by a mean; got values from "
            f"{low:g} to {high:g}"
        )
    levels: Pixels = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return levels


def _with_channels(pixels: Pixels, name: str) -> Pixels:
    """Give grey three channels, and take alpha away."""
    grey = pixels[..., None] if pixels.ndim == 2 else pixels
    if grey.ndim != 3 or grey.shape[2] not in (1, 3, 4) or 0 in grey.shape:
        raise InputError(
            f"{OP}: {name} must have shape (height, width) or (height, width, 1, 3 or 4); got "
            f"{pixels.shape}"
        )
    return np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey[..., :3]
