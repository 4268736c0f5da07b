"""Trees of image files on disk: what counts as a class, what as an image, and what as neither."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fastfpl.errors import Damaged, shown

__all__ = [
    "SUFFIXES",
    "image_names",
    "kind_of",
    "left_behind",
    "size_of",
    "subfolders",
    "walk",
]

#: What the name of an image file ends with where a folder is listed.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# what systems and programs leave behind; so are names that begin with a dot
_LEFT_BEHIND = {
    "$recycle.bin", "@eadir", "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def subfolders(op: str, path: Path) -> list[str]:
    """Return the names of the folders in a folder, in the order of their code points.

    ``op`` is what an error begins with.

    Raises
    ------
    Damaged
        If there is none, or one is a link that leads nowhere or to a folder around it.
    """
    names = []
    for entry in _entries(op, path):
        # a class that is not there would move the labels of all that follow
        if entry.is_symlink():
            _follow(op, path, entry.name)
        if _is_folder(entry):
            names.append(entry.name)
    if not names:
        raise Damaged(f"{op}: {path} must hold one folder a class; got none")
    return sorted(names)


def image_names(op: str, path: Path) -> list[str]:
    """Return the names of the image files in a folder, in the order of their code points."""
    return sorted(
        entry.name
        for entry in _entries(op, path)
        if entry.name.lower().endswith(SUFFIXES) and not _is_folder(entry)
    )


def walk(op: str, path: Path, deepest: int) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder below a folder, and itself, with the names of its files, both in order.

    Folders are named by their path from the first one with ``/``, which itself is empty.

    Raises
    ------
    Damaged
        If one cannot be listed, is a link that leads nowhere or to a folder around it, or lies
        deeper than so many folders.
    """
    level = [""]
    for depth in range(deepest + 1):
        below: list[str] = []
        for inside in level:
            here = path / inside
            names: list[str] = []
            for entry in _entries(op, here):
                if entry.is_symlink():
                    _follow(op, here, entry.name)
                if _is_folder(entry):
                    below.append(f"{inside}/{entry.name}".lstrip("/"))
                else:
                    names.append(entry.name)
            yield inside, sorted(names)
        level = sorted(below)
        if level and depth == deepest:
            raise Damaged(
                f"{op}: {path} must hold its images at most {deepest} folders deep; got "
                f"{shown(level[0])}: move them up"
            )


def left_behind(name: str) -> bool:
    """Whether a name is hidden, or one that systems and programs leave behind."""
    return name.startswith(".") or name.casefold() in _LEFT_BEHIND


def kind_of(path: Path) -> str:
    """Say what is there: a file, a folder, a link to nothing, nothing, or something else."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else "nothing"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return next((name for holds, name in _KINDS if holds(mode)), "a device")


def size_of(path: str) -> int | None:
    """Return the bytes of a file; None if there is none, or no file to be read from."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _entries(op: str, path: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder but for hidden names and what systems leave behind."""
    try:
        with os.scandir(path) as entries:
            found = list(entries)
    except OSError as error:
        raise Damaged(
            f"{op}: {path} must be a folder that can be listed; got {error.strerror}"
        ) from error
    for entry in found:
        if not left_behind(entry.name):
            yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # an entry itself raises where links go round in a circle
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _follow(op: str, path: Path, name: str) -> None:
    """Refuse a link that leads nowhere, round in a circle, or to a folder around it."""
    got = kind_of(path / name)
    if got in ("a file", "a folder"):
        if not path.resolve().is_relative_to((path / name).resolve()):
            return
        got = "a link to a folder around it"
    raise Damaged(
        f"{op}: links in {path} must lead to classes; got {name} ({got}): mend or remove it"
    )
