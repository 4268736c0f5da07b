"""Images that a program holds already: arrays, PIL images, a data set of PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastfpl.data.base import Dataset, Images, Split
from fastfpl.data.own_lists import Record, arrange
from fastfpl.data.trees import File
from fastfpl.errors import InputError, KindError, shown

__all__ = ["Held", "as_rgb", "from_arrays", "from_torch", "hold"]


class Held(Split):
    """A split of images that are asked for one by one.

    Parameters
    ----------
    read : callable
        ``read(number)`` returns an RGB image, uint8 of shape (height, width, 3).
    numbers : sequence of int
        What ``read`` calls the images.
    labels, domains : sequence of int
    clients : sequence of int or None
        As `Split.clients`.
    fingerprint : str
        Of the content that ``read`` gives.
    """

    def __init__(
        self,
        read: Callable[[int], npt.NDArray[np.uint8]],
        numbers: Sequence[int],
        labels: Sequence[int],
        domains: Sequence[int],
        clients: Sequence[int] | None,
        fingerprint: str,
    ) -> None:
        self._read = read
        self._numbers = list(numbers)
        self.labels = np.array(labels, dtype=np.int64)
        self.domains = np.array(domains, dtype=np.int64)
        self.clients = None if clients is None else np.array(clients, dtype=np.int64)
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
        for column in (np.array(numbers, dtype=np.int64), self.labels, self.domains, self.clients):
            digest.update(b"-" if column is None else column.astype("<i8").tobytes())
        self.fingerprint = f"held-{digest.hexdigest()}"

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`."""
        asked: list[int] = np.asarray(indices, dtype=np.int64).tolist()
        return [self._read(self._numbers[index]) for index in asked]


def from_arrays(
    images: Sequence[Any] | npt.NDArray[np.uint8],
    labels: Sequence[int] | Sequence[str] | npt.NDArray[np.int64],
    *,
    classnames: Sequence[str] | None = None,
    split: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    clients: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """Make a data set of images in memory.

    Parameters
    ----------
    images : sequence of n images
        uint8 arrays of shape (height, width, 3) or (height, width), or PIL images; one array
        (n, height, width, 3) will do. They are kept, not copied, and must not change.
    labels : sequence of n int or str
        Numbers in [0, C) with ``classnames``; or the names themselves, whose order is then that of
        their code points.
    classnames : sequence of C str, optional
        As people would say them.
    split : sequence of n str, optional
        train, val or test; drawn as for `from_folder` without it.
    domains, clients : sequence of n str, optional
        Visual domain and client of each image; an empty client of a test image gives it to all.
    name : str
        What tables call the set.

    Returns
    -------
    Dataset
        Its fingerprint is a digest of all pixels: a run on the same ones can be resumed.

    Raises
    ------
    InputError
        If lengths differ, a label has no name, or an image is none.
    KindError
        If pixels are not uint8.
    Damaged
        If the lists make no data set, as for `from_folder`.
    """
    op = "fastfpl.data.from_arrays"

    def read(number: int) -> npt.NDArray[np.uint8]:
        return as_rgb(op, images[number], number)

    return hold(
        op,
        name,
        read,
        texts(op, labels, len(images), classnames),
        classnames,
        split=split,
        domains=domains,
        clients=clients,
    )


def from_torch(
    dataset: Any,
    *,
    test: Any = None,
    classnames: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    clients: Sequence[str] | None = None,
    name: str = "torch",
    fingerprint: str | None = None,
) -> Dataset:
    """Make a data set of a map-style one of PyTorch or torchvision; its images stay there.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        ``dataset[i]`` is (image, label): a PIL image, a uint8 array (height, width, 3) or a uint8
        tensor (3, height, width), and a whole number. Leave its transform out: the CLIP has one.
    test : torch.utils.data.Dataset, optional
        The same classes; a split is drawn as for `from_folder` without it.
    classnames : sequence of str, optional
        As people would say them; ``dataset.classes`` by default.
    domains, clients : sequence of str, optional
        Of each image, those of ``test`` after those of ``dataset``.
    name : str
        What tables call the set.
    fingerprint : str, optional
        Your own name of this version of the images. Without it every image is read once, now, for
        a digest of all pixels.

    Raises
    ------
    InputError, KindError, Damaged
        As `from_arrays`.
    """
    op = "fastfpl.data.from_torch"
    parts = [part for part in (dataset, test) if part is not None]
    for part in parts:
        if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise InputError(
                f"{op}: dataset must be map-style, with a length; got {type(part).__name__}: list "
                "its images for from_arrays"
            )
    names = classnames if classnames is not None else getattr(dataset, "classes", None)
    if names is None:
        raise InputError(f"{op}: classnames must be given where dataset.classes is not there")
    border = len(dataset)

    def pair(number: int) -> tuple[Any, Any]:
        part, at = (dataset, number) if number < border else (test, number - border)
        found = part[at]
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise InputError(
                f"{op}: an image must come with its label, as (image, label); got {shown(found)} "
                f"at {at}"
            )
        return found[0], found[1]

    def read(number: int) -> npt.NDArray[np.uint8]:
        return as_rgb(op, pair(number)[0], number)

    labels: list[Any] = []
    for part, begin in zip(parts, (0, border), strict=False):
        known = getattr(part, "targets", None)
        count = len(part)
        if known is None or len(known) != count:
            known = [pair(begin + number)[1] for number in range(count)]
        labels += [int(label) for label in known]
    return hold(
        op,
        name,
        read,
        texts(op, labels, len(labels), list(names)),
        list(names),
        split=None if test is None else ["train"] * border + ["test"] * len(test),
        domains=domains,
        clients=clients,
        fingerprint=fingerprint,
    )


def hold(
    op: str,
    name: str,
    read: Callable[[int], npt.NDArray[np.uint8]],
    labels: Sequence[str],
    classnames: Sequence[str] | None,
    *,
    split: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    clients: Sequence[str] | None = None,
    fingerprint: str | None = None,
) -> Dataset:
    """Make a data set of images that ``read`` gives by number; labels are as `texts` writes."""
    columns: dict[str, Sequence[str]] = {}
    for column, values in (("split", split), ("domains", domains), ("clients", clients)):
        if values is not None and len(values) != len(labels):
            raise InputError(
                f"{op}: {column} must be as long as the images, {len(labels)}; got {len(values)}"
            )
        columns[column] = [""] * len(labels) if values is None else [str(v) for v in values]
    digest = hashlib.blake2b(digest_size=16)
    if fingerprint is None:
        for number in range(len(labels)):
            pixels = read(number)
            digest.update(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
    records = [
        Record(f"{number:09d}", File(0, ""), label, *of_image)
        for number, (label, *of_image) in enumerate(
            zip(
                labels,
                [_part(op, part) for part in columns["split"]],
                columns["domains"],
                columns["clients"],
                strict=True,
            )
        )
    ]
    names = {}
    if classnames is not None:
        present = set(labels)
        names = {_number(c): n for c, n in enumerate(classnames) if _number(c) in present}
    found = arrange(op, name, records, names, ())
    splits = {}
    for part, mine in (("train", found.train), ("test", found.test)):
        items = found.items(mine)
        splits[part] = Held(
            read,
            [int(item.path) for item in items],
            [item.label for item in items],
            [item.domain for item in items],
            found.clients_of(mine),
            fingerprint or digest.hexdigest(),
        )
    return Dataset(
        name=name,
        classnames=found.classnames,
        domains=found.domains,
        train=splits["train"],
        test=splits["test"],
        notes=found.notes,
        clients=found.clients,
    )


def texts(
    op: str, labels: Sequence[Any] | npt.NDArray[Any], images: int, names: Sequence[str] | None
) -> list[str]:
    """Write labels so that their order is that of the numbers, or of the names."""
    if len(labels) != images:
        raise InputError(f"{op}: labels must be one an image, {images}; got {len(labels)}")
    found = [label.item() if hasattr(label, "item") else label for label in labels]
    if names is None:
        for label in found:
            if not isinstance(label, str) or not label.strip():
                raise InputError(
                    f"{op}: classnames must be given unless labels are names; got {shown(label)}"
                )
        return found
    for label in found:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names):
            raise InputError(
                f"{op}: labels must lie in [0, {len(names)}), the classnames; got {shown(label)}"
            )
    gone = sorted(set(range(len(names))) - set(found))
    if gone:
        raise InputError(
            f"{op}: every class must have an image; got none of {shown(names[gone[0]])}: leave it "
            "out of classnames, and count labels without it"
        )
    return [_number(label) for label in found]


def as_rgb(op: str, image: Any, number: int) -> npt.NDArray[np.uint8]:
    """Return an image as RGB, uint8 of shape (height, width, 3).

    Raises
    ------
    InputError
        If it has another shape.
    KindError
        If its pixels are not uint8.
    """
    if hasattr(image, "convert"):  # of PIL
        return np.asarray(image.convert("RGB"))
    first = hasattr(image, "numpy")  # a tensor has its channels first
    array = np.asarray(image.numpy() if first else image)
    if array.dtype != np.uint8:
        raise KindError(
            f"{op}: pixels must be uint8 in 0 to 255; got {array.dtype} of image {number}: leave "
            "transforms out"
        )
    if first and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(
            f"{op}: an image must have shape (height, width, 3) or (height, width); got "
            f"{array.shape} of image {number}"
        )
    return array


def _part(op: str, name: str) -> str:
    from fastfpl.data.layouts import SPLITS, part_of

    found = part_of(name) if name else ""
    if found is None:
        raise InputError(f"{op}: split must be one of {', '.join(SPLITS)}; got {shown(name)}")
    return found


def _number(label: int) -> str:
    return f"{label:09d}"
