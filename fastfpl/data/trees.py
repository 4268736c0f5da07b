"""Image trees that people have: a folder or a zip file as one list of files, read once."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastfpl.data.folders import SUFFIXES, kind_of, left_behind, walk
from fastfpl.data.names import tidy
from fastfpl.errors import Damaged, InputError, Missing, shown

__all__ = ["File", "Tree", "file_of", "open_tree", "unzipper"]

# folders above an image; what lies deeper has no layout here
_DEEPEST = 5
# bytes of a file in an archive; a few bytes can ask for all memory there is
_LARGEST = 1 << 28
# images that Pillow reads only with more packages, and what people often have
_UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".dng", ".cr2", ".nef")


class File(NamedTuple):
    """An image file: its bytes, and what tells one version of it from another beside them."""

    size: int
    mark: str


@dataclass(frozen=True)
class Tree:
    """The files of an image tree.

    Attributes
    ----------
    place : Path
        The folder or the zip file.
    base : str
        Folder inside that all paths begin below, empty or with ``/`` at its end.
    images : dict from path to File
        By path below ``base`` with ``/``, in order.
    empty : tuple of str
        Folders without an image in or below them.
    notes : tuple of str
        What a reader of the tree must know.
    read : callable
        ``read(path)`` returns the bytes of a file below ``base``; None if there is none.
    unpack : callable or None
        As `fastfpl.data.listing.Listing` wants it of an archive, by path below ``base``.
    """

    place: Path
    base: str
    images: dict[str, File]
    empty: tuple[str, ...]
    notes: tuple[str, ...]
    read: Callable[[str], bytes | None]
    unpack: Callable[[str], bytes] | None = None

    @property
    def root(self) -> Path:
        """What paths of images are relative to."""
        return self.place / self.base


def open_tree(op: str, place: Path, *, content: bool, depth: int = 1) -> Tree:
    """List the images of a folder or a zip file.

    Parameters
    ----------
    op : str
        What an error begins with.
    place : Path
    content : bool
        Whether files are told apart by a digest of their content, which reads all of them; else by
        size and time, and in an archive by size and its checksum.
    depth : int
        Folders above an image that are wanted: of more, those that all images share are skipped.

    Raises
    ------
    Missing
        If there is nothing.
    Damaged
        If it is neither a folder nor a zip file, cannot be listed, or holds no image.
    """
    kind = kind_of(place)
    if kind == "a folder":
        paths, empty, others = _listed(op, place)
        base = _wrapper(paths, depth)
        images = {p: file_of(op, place / p, content=content) for p in paths}
        read, unpack = _reader(place / base), None
    elif kind == "a file":
        if not zipfile.is_zipfile(place):
            raise Damaged(f"{op}: path must be a folder or a zip file; got {place}, another file")
        archive = _archive(op, place)
        infos, empty, others = _unzipped(op, place, archive)
        base = _wrapper(infos, depth)
        inside = unzipper(archive, base)
        images = {p: _zipped(op, place, archive, info, content) for p, info in infos.items()}
        read, unpack = _zip_reader(archive, base), inside
    else:
        raise Missing(f"{op}: path must be a folder or a zip file of images; got {place} ({kind})")
    if not images:
        unread = [s for s in others if s in _UNREAD]
        got = f"only files of {', '.join(sorted(unread))}" if unread else "none"
        raise Damaged(
            f"{op}: {place} must hold image files ({', '.join(SUFFIXES)}); got {got}"
            + ": convert them" * bool(unread)
        )
    notes = [
        f"{number} files of {suffix} are no images that are read here, and were left out"
        for suffix, number in sorted(others.items())
        if suffix in _UNREAD
    ]
    if base:
        notes.append(f"read from its only folder, {base.rstrip('/')}")
    cut = len(base)
    return Tree(
        place,
        base,
        {path[cut:]: images[path] for path in sorted(images)},
        tuple(path[cut:] for path in empty if path.startswith(base)),
        tuple(notes),
        read,
        unpack,
    )


def file_of(op: str, path: Path, *, content: bool) -> File:
    """Measure a file on disk.

    Raises
    ------
    Missing
        If it is not there to be read.
    """
    try:
        found = os.stat(path)
        if content:
            digest = hashlib.blake2b(digest_size=16)
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            return File(found.st_size, digest.hexdigest())
    except (OSError, ValueError) as error:
        raise Missing(f"{op}: {path} must be a file that can be read; got {tidy(error)}") from error
    return File(found.st_size, str(found.st_mtime_ns))


def unzipper(archive: zipfile.ZipFile, base: str) -> Callable[[str], bytes]:
    """Return what reads a file of an archive, by its path below a folder inside."""

    def unpack(path: str) -> bytes:
        try:
            info = archive.getinfo(base + path)
            if info.file_size > _LARGEST:
                raise ValueError(f"{info.file_size} bytes, where at most {_LARGEST} are unpacked")
            with archive.open(info) as file:
                # what the archive says of a size need not be true
                found = file.read(_LARGEST + 1)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as e:
            raise ValueError(f"{type(e).__name__}: {tidy(e)}") from e
        except KeyError as error:
            raise ValueError("nothing of that name") from error
        if len(found) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        return found

    return unpack


def _listed(op: str, place: Path) -> tuple[list[str], list[str], Counter[str]]:
    paths: list[str] = []
    folders: list[str] = []
    others: Counter[str] = Counter()
    for inside, names in walk(op, place, _DEEPEST):
        folders.append(inside)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                paths.append(f"{inside}/{name}".lstrip("/"))
            else:
                others[suffix] += 1
    return paths, _without_images(paths, folders), others


def _without_images(paths: list[str], folders: list[str]) -> list[str]:
    held = {""}
    for path in paths:
        while path := path.rpartition("/")[0]:
            held.add(path)
    return sorted(folder for folder in folders if folder not in held)


def _archive(op: str, place: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(place)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise Damaged(f"{op}: {place} must be a whole zip file; got {tidy(error)}") from error


def _unzipped(
    op: str, place: Path, archive: zipfile.ZipFile
) -> tuple[dict[str, zipfile.ZipInfo], list[str], Counter[str]]:
    found: dict[str, zipfile.ZipInfo] = {}
    folders: list[str] = []
    others: Counter[str] = Counter()
    for info in archive.infolist():
        parts = info.filename.split("/")
        if any(left_behind(part) and part != ".." for part in parts if part):
            continue
        if info.is_dir():
            folders.append(info.filename.rstrip("/"))
            continue
        if "" in parts or ".." in parts:
            raise Damaged(
                f"{op}: paths of {place} must lead to files inside it; got {shown(info.filename)}"
            )
        suffix = os.path.splitext(info.filename)[1].lower()
        if suffix not in SUFFIXES:
            others[suffix] += 1
            continue
        if info.flag_bits & 1:
            raise InputError(
                f"{op}: {place} must need no password; got one at {shown(info.filename)}: unpack it"
            )
        if info.filename in found:
            raise Damaged(f"{op}: {place} must hold a file once; got {shown(info.filename)} twice")
        if len(parts) - 1 > _DEEPEST:
            raise Damaged(
                f"{op}: {place} must hold its images at most {_DEEPEST} folders deep; got "
                f"{shown(info.filename)}: move them up"
            )
        found[info.filename] = info
    return found, _without_images(list(found), folders), others


def _zipped(
    op: str, place: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: bool
) -> File:
    if not content:
        return File(info.file_size, f"{info.CRC:08x}")
    try:
        digest = hashlib.blake2b(unzipper(archive, "")(info.filename), digest_size=16)
    except (OSError, ValueError) as error:
        raise Damaged(
            f"{op}: {place} must be a whole zip file; got {tidy(error)} at {shown(info.filename)}"
        ) from error
    return File(info.file_size, digest.hexdigest())


def _wrapper(paths: Iterable[str], depth: int) -> str:
    """Return the folders that hold nothing but one folder each, as an unpacked archive begins."""
    split = [path.split("/") for path in paths]
    base: list[str] = []
    while split and min(len(parts) for parts in split) - len(base) > depth + 1:
        first = {parts[len(base)] for parts in split}
        if len(first) > 1:
            break
        base.append(first.pop())
    return "".join(f"{part}/" for part in base)


def _reader(root: Path) -> Callable[[str], bytes | None]:
    def read(path: str) -> bytes | None:
        kind = kind_of(root / path)
        if kind not in ("a file", "nothing"):
            raise ValueError(f"{kind} at {path}")
        return (root / path).read_bytes() if kind == "a file" else None

    return read


def _zip_reader(archive: zipfile.ZipFile, base: str) -> Callable[[str], bytes | None]:
    unpack = unzipper(archive, base)

    def read(path: str) -> bytes | None:
        return unpack(path) if base + path in archive.NameToInfo else None

    return read
