"""What the folders of an image tree mean: split, domain, client or class."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from fastfpl.errors import Damaged, InputError, near, shown

__all__ = ["LAYOUTS", "SPLITS", "Place", "part_of", "place", "recognise"]

#: Every layout that is read.
LAYOUTS = (
    "class",
    "client/class",
    "client/split/class",
    "domain/class",
    "domain/split/class",
    "split/class",
    "split/client/class",
    "split/domain/class",
)
#: What the three splits are called in trees and manifests, in small letters.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# the layout whose test images may be of all clients
_SHARED = "split/client/class"


class Place(NamedTuple):
    """What the folders above an image say; empty where they say nothing."""

    label: str
    split: str = ""
    domain: str = ""
    client: str = ""


def part_of(name: str) -> str | None:
    """Return train, val or test for a name that people give a split; else None."""
    return SPLITS.get(name.strip().lower())


def place(layout: str, folders: Sequence[str]) -> Place:
    """Read the folders above an image, of which `recognise` has seen that they fit."""
    names = (unicodedata.normalize("NFC", name) for name in folders)
    parts = ("split", "class") if _of_all(layout, folders) else layout.split("/")
    # below a class may be more
    found = dict(zip(parts, names, strict=False))
    return Place(
        found["class"],
        part_of(found.get("split", "")) or "",
        found.get("domain", ""),
        found.get("client", ""),
    )


def recognise(
    op: str, where: str, images: Sequence[Sequence[str]], layout: str | None, *, given: bool
) -> str:
    """Say which layout an image tree has, or refuse one that may be read in two ways.

    Parameters
    ----------
    op, where : str
        What an error begins with, and the tree's name in it.
    images : sequence of sequence of str
        The folders above each image, from the outermost.
    layout : str, optional
        One of `LAYOUTS` that the tree must have, if it is not to be guessed. Under a ``class``
        that is named so may be further folders.
    given : bool
        Whether folders of class folders are clients; else they are domains.

    Returns
    -------
    str
        One of `LAYOUTS`. With ``split/client/class`` the images of ``test/class`` and ``val/class``
        are of all clients.

    Raises
    ------
    InputError
        If the layout is none, or cannot be told; the sentence names the choices.
    Damaged
        If the tree has no layout that is read here, or not the one that it must have.
    """
    if layout is not None:
        _check(op, where, images, layout)
        return layout
    depths = sorted({len(folders) for folders in images})
    if depths[0] == 0:
        loose = sum(not folders for folders in images)
        if len(depths) == 1:
            raise Damaged(
                f"{op}: images of {where} must lie in one folder a class; got {loose} in no folder"
            )
        raise Damaged(
            f"{op}: images of {where} must lie in one folder a class; got {loose} beside the "
            "folders: move them into one of them"
        )
    if len(depths) > 1:
        few = next(f for f in images if len(f) == depths[0])
        many = next(f for f in images if len(f) == depths[-1])
        choices = ["class"] if part_of(few[0]) is None else []
        if all(_of_all(_SHARED, f) or (len(f) == 3 and part_of(f[0])) for f in images):
            if given:
                return _SHARED
            choices = [_SHARED]
        raise _unclear(
            op,
            where,
            f"images {depths[0]} and {depths[-1]} folders deep, in {_path(few)} and {_path(many)}",
            choices,
        )
    depth = depths[0]
    columns = [sorted({folders[at] for folders in images}) for at in range(depth)]
    splits = [at for at in range(depth - 1) if all(part_of(name) for name in columns[at])]
    if depth == 1:
        if all(part_of(name) for name in columns[0]):
            raise Damaged(
                f"{op}: images of {where} must lie in one folder a class; got none below "
                f"{', '.join(columns[0])}"
            )
        return "class"
    group = "client" if given else "domain"
    some = [name for name in columns[0] if part_of(name)]
    if 0 not in splits and some:
        others = [name for name in columns[0] if not part_of(name)]
        unclear = _unclear(
            op,
            where,
            f"{shown(some[0])}, as a split is called, beside {shown(others[0])}",
            [f"{group}/class", "class"] if depth == 2 else ["class"],
        )
        if given and depth == 2 and {part_of(name) for name in some} <= {"test", "val"}:
            raise InputError(
                f"{unclear}, or move the folders of clients into train/, and {shown(some[0])} is "
                "asked of all of them"
            )
        raise unclear
    if depth == 2:
        if 0 in splits:
            return "split/class"
        if given or _shared(images, 0, 1):
            return f"{group}/class"
        raise _unclear(
            op,
            where,
            f"folders of folders that share no name, such as {_path(images[0])} and "
            f"{_path(images[-1])}",
            ["class", "client/class", "domain/class"],
        )
    if depth == 3 and len(splits) == 1:
        outer = 1 - splits[0]
        if given or _shared(images, outer, 2):
            return f"split/{group}/class" if splits[0] == 0 else f"{group}/split/class"
        choices = [f"{one}/split/class" for one in ("client", "domain")]
        if splits[0] == 0:
            choices = [f"split/{one}/class" for one in ("client", "domain")]
        raise _unclear(
            op,
            where,
            f"folders of folders that share no name, such as {_path(images[0])} and "
            f"{_path(images[-1])}",
            choices,
        )
    raise _unclear(op, where, f"images {depth} folders deep, as in {_path(images[0])}", ["class"])


def _of_all(layout: str, folders: Sequence[str]) -> bool:
    """Whether images in these folders are asked of all clients, being in no client's folder."""
    return layout == _SHARED and len(folders) == 2 and part_of(folders[0]) in ("test", "val")


def _shared(images: Sequence[Sequence[str]], outer: int, inner: int) -> bool:
    """Whether a class folder stands in more than one of the folders around."""
    around: dict[str, set[str]] = defaultdict(set)
    for folders in images:
        around[unicodedata.normalize("NFC", folders[inner])].add(folders[outer])
    return any(len(found) > 1 for found in around.values())


def _check(op: str, where: str, images: Sequence[Sequence[str]], layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(
            f"{op}: layout must be a known one; got {shown(layout)}" + near(layout, LAYOUTS)
        )
    parts = layout.split("/")
    for folders in images:
        deep = len(folders) == len(parts) or (layout == "class" and len(folders) > 1)
        deep = deep or _of_all(layout, folders)
        if not deep:
            raise Damaged(
                f"{op}: images of {where} must lie in {layout}/ with that layout; got one in "
                f"{_path(folders)}"
            )
        if "split" in parts and part_of(folders[parts.index("split")]) is None:
            raise Damaged(
                f"{op}: splits of {where} must be called {', '.join(SPLITS)} with the layout "
                f"{layout}; got {shown(folders[parts.index('split')])}"
            )


def _unclear(op: str, where: str, got: str, choices: Sequence[str]) -> InputError:
    cure = f": choose by layout (--layout) {' or '.join(choices)}" if choices else ""
    return InputError(
        f"{op}: {where} must have one layout that can be told from its folders; got {got}{cure}"
        + ("" if choices else ": sort them alike, or write a manifest")
    )


def _path(folders: Sequence[str]) -> str:
    return shown("/".join(folders) + "/")
