"""Image files by list: found at once, decoded when asked for, known by their names and sizes."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fastfpl.data.base import Dataset, Images, Split
from fastfpl.data.catalogue import Facts, source_of
from fastfpl.data.folders import kind_of, size_of
from fastfpl.data.names import flaw, shown, tidy
from fastfpl.errors import Damaged, InputError, Missing, cut

__all__ = [
    "SEED",
    "Item",
    "Listing",
    "Lists",
    "MissingImages",
    "build",
    "check_items",
    "decode",
    "shuffled",
    "size_notes",
    "without_corrupt",
]

_LOG = logging.getLogger("fastfpl")
_T = TypeVar("_T")
# images that are verified before progress is told
_PIECE = 512
# no format that Pillow hands to another program, as it does PostScript
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# a path that Windows takes for one of a drive
_DRIVE = re.compile(r"[A-Za-z]:/")

#: Of the splits that are drawn here.
SEED = 0


class Item(NamedTuple):
    """One image: its path below the images' folder with ``/``, its label, its domain."""

    path: str
    label: int
    domain: int = 0


@dataclass(frozen=True)
class Lists:
    """What the files of a data set say, before an image is looked at.

    ``validation`` is used by nobody; it is kept so that a split can be written whole.
    """

    classnames: tuple[str, ...]
    train: list[Item]
    test: list[Item]
    validation: list[Item] = field(default_factory=list)
    notes: tuple[str, ...] = ()


class MissingImages(Missing):
    """Image files that a list names and the disk does not hold.

    Attributes
    ----------
    found : dict from "train" and "test" to int
        Images that are there.
    """

    def __init__(self, sentence: str, found: Mapping[str, int]) -> None:
        super().__init__(sentence)
        self.found = dict(found)


class TooLarge(ValueError):
    """An image of more pixels than are decoded, which a few bytes of a file can ask for."""


class TooDeep(ValueError):
    """An image whose pixels are not of 8 or 16 bits: whole, but nobody says what is white."""


class Listing(Split):
    """A split of image files.

    Parameters
    ----------
    facts : Facts
        Names the set in errors, and where its files come from.
    base : Path
        Folder that the paths are relative to.
    items : sequence of Item
    sizes : sequence of int
        Bytes of each file.
    marks : sequence of str, optional
        What tells one version of each file from another beside its size, e.g. its time.
    clients : sequence of int, optional
        Client of each image, -1 for all of them; see `Split.clients`.
    unpack : callable, optional
        ``unpack(path)`` returns the bytes of an image in an archive, ``base`` being the archive.

    Notes
    -----
    Files are read by `images` only, in torch's number of threads. The fingerprint covers paths,
    sizes in bytes, labels and domains, and marks and clients where they are given: without marks a
    copy elsewhere or at another time has the same one, and an image that is changed without
    changing its size is not noticed.
    Palettes, greys and CMYK become RGB as Pillow does it; orientation tags are not looked at, as in
    the released codes.
    """

    def __init__(
        self,
        facts: Facts,
        base: Path,
        items: Sequence[Item],
        sizes: Sequence[int],
        *,
        marks: Sequence[str] | None = None,
        clients: Sequence[int] | None = None,
        unpack: Callable[[str], bytes] | None = None,
    ) -> None:
        self._facts = facts
        self._base = base
        self._items = list(items)
        self._sizes = list(sizes)
        self._marks = None if marks is None else list(marks)
        self._unpack = unpack
        self.labels = np.array([item.label for item in items], dtype=np.int64)
        self.domains = np.array([item.domain for item in items], dtype=np.int64)
        self.clients = None if clients is None else np.array(clients, dtype=np.int64)
        digest = hashlib.blake2b(digest_size=16)
        for index, (item, size) in enumerate(zip(self._items, self._sizes, strict=True)):
            line = f"{item.path}\0{size}\0{item.label}\0{item.domain}"
            line += "" if marks is None else f"\0{marks[index]}"
            line += "" if clients is None else f"\0client {clients[index]}"
            digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
        self.fingerprint = f"{facts.name}-{digest.hexdigest()}"

    def path(self, index: int) -> Path:
        """Return where an image lies; of one in an archive, that and the path inside."""
        return self._base / self._items[index].path

    def content(self, index: int) -> bytes:
        """Return the bytes of an image's file.

        Raises
        ------
        OSError
            If it cannot be read.
        ValueError
            If an archive does not give it.
        """
        if self._unpack is None:
            return self.path(index).read_bytes()
        return self._unpack(self._items[index].path)

    def size(self, index: int) -> int:
        """Return the bytes of an image's file as they were counted when the list was made."""
        return self._sizes[index]

    def _decoded(self, index: int) -> npt.NDArray[np.uint8]:
        if self._unpack is None:
            return decode(self.path(index))
        return decode(io.BytesIO(self._unpack(self._items[index].path)))

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`.

        Raises
        ------
        Missing
            If a file has gone since the set was loaded.
        Damaged
            If a file does not decode; the sentence names it and the cure.
        InputError
            If an image holds more pixels than Pillow takes for harmless (178 956 970).
        """
        chosen: list[int] = np.asarray(indices, dtype=np.int64).tolist()
        return _each(self._read, chosen)

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        path = self.path(index)
        try:
            return self._decoded(index)
        except OSError as error:
            raise self._gone(path, error) from None
        except TooLarge as error:
            raise InputError(
                f"{self._facts.op}: {path} must be an image of few enough pixels; got "
                f'{error}: make it smaller, or load with on_corrupt="skip" (--on-corrupt skip)'
            ) from error
        except TooDeep as error:
            raise InputError(
                f"{self._facts.op}: {path} must be an image of 8 or 16 bits; got {error}: convert "
                'it, or load with on_corrupt="skip" (--on-corrupt skip)'
            ) from error
        except ValueError as error:
            source = source_of(self._facts, self._items[index].path)
            raise Damaged(
                f"{self._facts.op}: {path} must be an image; got {error}: put it back from "
                f'{source}, or load with on_corrupt="skip" (--on-corrupt skip)'
            ) from error

    def _gone(self, path: Path, error: OSError) -> Missing:
        return Missing(
            f"{self._facts.op}: {path} must stay readable while it is in use; got "
            f"{type(error).__name__}: {error.strerror}"
        )

    def corrupt(
        self, observer: Callable[[str, int, int], None] | None = None, what: str = "verifying"
    ) -> dict[int, str]:
        """Decode every image and return a sentence for each one that fails, by its index.

        ``observer(what, done, total)`` is told now and then.
        """
        found: dict[int, str] = {}
        for start in range(0, len(self), _PIECE):
            piece = range(start, min(start + _PIECE, len(self)))
            for index, sentence in zip(piece, _each(self._verdict, piece), strict=True):
                if sentence:
                    found[index] = sentence
            if observer is not None:
                observer(what, piece.stop, len(self))
        return found

    def _verdict(self, index: int) -> str:
        path = self.path(index)
        try:
            self._decoded(index)
        except OSError as error:
            raise self._gone(path, error) from None
        except ValueError as error:
            return f"{path} does not decode: {error}"
        return ""

    def without(self, indices: Iterable[int]) -> Listing:
        """Return the split without some of its images."""
        dropped = set(indices)
        kept = [i for i in range(len(self)) if i not in dropped]
        if not kept:
            raise Damaged(f"{self._facts.op}: an image must decode; got none of {len(self)}")
        return Listing(
            self._facts,
            self._base,
            [self._items[i] for i in kept],
            [self._sizes[i] for i in kept],
            marks=None if self._marks is None else [self._marks[i] for i in kept],
            clients=None if self.clients is None else self.clients[kept].tolist(),
            unpack=self._unpack,
        )


def eight_bits(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Bring 16 bits to 8, to nearest: 65535 becomes 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def as_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Turn Pillow's image of any mode into RGB, uint8 of shape (height, width, 3).

    Grey of 16 bits is brought to 8, whatever part of its range an image uses: images of one source
    stay comparable.

    Raises
    ------
    TooDeep
        If pixels are floats, or integers beyond 16 bits.
    """
    if image.mode == "F":
        raise TooDeep("floats (mode F)")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        low, high = int(levels.min(initial=0)), int(levels.max(initial=0))
        if low < 0 or high > 65535:
            raise TooDeep(f"values from {low} to {high}")
        return np.repeat(eight_bits(levels.astype(np.uint16))[..., None], 3, axis=2)
    # Pillow warns when it drops a palette's transparency in one step
    see_through = image.mode == "P" and "transparency" in image.info
    return np.asarray((image.convert("RGBA") if see_through else image).convert("RGB"))


def decode(file: Path | BinaryIO) -> npt.NDArray[np.uint8]:
    """Read an image file as RGB, uint8 of shape (height, width, 3).

    Raises
    ------
    OSError
        If there is no file, or the system does not let it be read.
    ValueError
        If it does not decode; `TooDeep` if its pixels are deeper than 16 bits, `TooLarge` if they
        are so many that Pillow takes the file for a trap.
    """
    try:
        with Image.open(file, formats=_FORMATS) as found:
            return as_rgb(found)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise TooLarge(
            f"an image that is whole but too large, {pixels[0] if pixels else 'too many'} pixels "
            f"where at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} are decoded"
        ) from error
    except TooDeep:
        raise
    except UnidentifiedImageError as error:
        # Pillow's own words end with the file, which the sentence names, or where it is in memory
        raise ValueError("UnidentifiedImageError: no image of a kind that is read here") from error
    except Exception as error:
        # only the system sets a number; what decoders raise on broken bytes is of any kind
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{type(error).__name__}: {tidy(error)}") from error


def _each(function: Callable[[int], _T], values: Sequence[int]) -> list[_T]:
    """Apply a function to each value, in as many threads as torch computes with."""
    import torch

    threads = min(torch.get_num_threads(), len(values) // 4)
    if threads < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, values))


def shuffled(paths: Iterable[str]) -> list[str]:
    """Order paths by a keyed digest: equal on every machine, and one path moves no other."""

    def key(path: str) -> bytes:
        text = f"{SEED} {path}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=16).digest()

    return sorted(paths, key=key)


def build(facts: Facts, base: Path, lists: Lists) -> Dataset:
    """Find the listed files and make the data set of them.

    Raises
    ------
    Missing
        If image files are not there; the sentence counts them and names the first.
    Damaged
        If a list is empty, or holds a path that leaves the folder or a label without a name.
    """
    splits: dict[str, tuple[list[Item], list[int]]] = {}
    absent: dict[str, list[str]] = {}
    for part, items in (("train", lists.train), ("test", lists.test)):
        if not items:
            raise Damaged(f"{facts.op}: the {part} list must hold an image; got none")
        check_items(facts, part, items, len(lists.classnames))
        sizes = [size_of(f"{base}/{item.path}") for item in items]
        absent[part] = [item.path for item, size in zip(items, sizes, strict=True) if size is None]
        splits[part] = (items, [size or 0 for size in sizes])
    if any(absent.values()):
        found = {part: len(items) - len(absent[part]) for part, (items, _) in splits.items()}
        first = next(path for paths in absent.values() for path in paths)
        kind = kind_of(base / first)
        there = "" if kind == "nothing" else f" ({kind})"
        raise MissingImages(
            f"{facts.op}: the images of its lists must be there to be read; got "
            f"{found['train']} of {len(lists.train)} train and {found['test']} of "
            f"{len(lists.test)} test images, the first that is missing is "
            f"{cut(str(base / first), 400)}{there}: "
            f"get {source_of(facts, first)}",
            found,
        )
    notes = list(lists.notes)
    both = len({item.path for item in lists.train} & {item.path for item in lists.test})
    if both:
        notes.append(f"{both} images stand in the train list and in the test list")
    notes += size_notes(facts, len(lists.classnames), len(lists.train), len(lists.test))
    return Dataset(
        name=facts.name,
        classnames=lists.classnames,
        domains=facts.domains,
        train=Listing(facts, base, *splits["train"]),
        test=Listing(facts, base, *splits["test"]),
        notes=tuple(notes),
    )


def size_notes(facts: Facts, classes: int, train: int, test: int) -> tuple[str, ...]:
    """Say how lists differ from the published ones, if they do."""
    here, published = (classes, train, test), (facts.classes, facts.train, facts.test)
    if here == published:
        return ()
    mine, theirs = (f"{c} classes, {n} train and {m} test images" for c, n, m in (here, published))
    return (f"the lists hold {mine}; the published ones {theirs}",)


def check_items(
    facts: Facts, part: str, items: Sequence[Item], classes: int, *, rows: bool = False
) -> None:
    """Refuse labels without a name, and paths that leave the folder or cannot be shown.

    ``rows``: a person wrote the list as a table, and may say what its paths are relative to.
    """
    cure = ": write paths below the folder that root (--root) names" if rows else ""
    for number, (path, label, domain) in enumerate(items):
        entry = f"row {number + 1}" if rows else f"entry {number}"
        if not 0 <= label < classes or not 0 <= domain < len(facts.domains):
            raise Damaged(
                f"{facts.op}: labels of the {part} list must lie in [0, {classes}); got "
                f"{shown(label)} for {tidy(path)}, {entry}"
            )
        if flaw(path) or "\\" in path:
            raise Damaged(
                f"{facts.op}: paths of the {part} list must hold no backslash, and nothing that "
                f"cannot be seen; got {shown(path)} with {flaw(path) or 'a backslash'}, {entry}: "
                "give the file another name"
            )
        outside = path[:1] in ("", "/") or (".." in path and ".." in path.split("/"))
        if outside or _DRIVE.match(path):
            raise Damaged(
                f"{facts.op}: paths of the {part} list must lead to files below the images' "
                f"folder; got {shown(path)}, {entry}{cure}"
            )


def without_corrupt(
    dataset: Dataset, observer: Callable[[str, int, int], None] | None = None
) -> Dataset:
    """Decode every image once and leave out those that fail.

    Parameters
    ----------
    dataset : Dataset
        Of image files.
    observer : callable, optional
        ``observer(what, done, total)`` is told now and then.

    Returns
    -------
    dataset : Dataset
        With `Dataset.skipped` the number of images that were left out; the fingerprints follow.

    Raises
    ------
    InputError
        If the set does not live in image files.
    Damaged
        If no image of a list decodes.
    """
    kept: dict[str, Listing] = {}
    skipped = 0
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        if not isinstance(split, Listing):
            raise InputError(
                f'fastfpl.data.load_dataset: on_corrupt must be "refuse" for {dataset.name!r}, '
                'which holds no image files; got "skip"'
            )
        bad = split.corrupt(observer, f"verifying {part} images")
        for sentence in bad.values():
            _LOG.warning("%s: %s; it is left out", f"fastfpl.data.{dataset.name}", sentence)
        skipped += len(bad)
        kept[part] = split.without(bad) if bad else split
    if not skipped:
        return dataset
    note = f"{skipped} image files did not decode and were left out"
    return replace(
        dataset,
        train=kept["train"],
        test=kept["test"],
        skipped=dataset.skipped + skipped,
        notes=(*dataset.notes, note),
    )
