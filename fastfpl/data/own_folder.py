"""A folder or a zip file of images as people have it: one folder a class, and more around."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastfpl.data.base import Dataset
from fastfpl.data.catalogue import open_root
from fastfpl.data.layouts import place, recognise
from fastfpl.data.names import tidy
from fastfpl.data.own_lists import Record, assemble, counted, few, own_facts, read_names
from fastfpl.data.trees import Tree, open_tree
from fastfpl.errors import Damaged, InputError, shown

__all__ = ["from_folder"]


def from_folder(
    path: str | Path,
    *,
    layout: str | None = None,
    given: bool = False,
    digest: Literal["time", "content"] = "time",
) -> Dataset:
    """Read a tree of images: ``class/*.jpg``, and splits, domains or clients around the classes.

    Parameters
    ----------
    path : path
        A folder or a zip file. Links inside are followed; hidden files and what systems leave
        behind (``.DS_Store``, ``__MACOSX``) are not looked at.
    layout : str, optional
        ``class``, ``split/class``, ``domain/class``, ``client/class``, ``split/domain/class``,
        ``split/client/class``, ``domain/split/class`` or ``client/split/class``; without it the
        tree says it, or is refused with the choices. Below a ``class`` that is asked for may be
        further folders. With ``split/client/class`` the images of ``test/class`` and ``val/class``
        are asked of all clients.
    given : bool
        Whether folders of class folders are clients; else they are visual domains.
    digest : "time" or "content"
        What tells one version of an image from another: its size and time of change (of a zip
        file's, its size and checksum), or a digest of its bytes, for which all are read.

    Returns
    -------
    Dataset
        Class names are the folders' names with spaces for underscores, or what ``classes.txt``
        (a line a class: folder, name) or ``classes.json`` (an object from folder to name) at the
        top say. Without a test split 20 % of each class, domain and client are drawn by a digest of
        their paths, one image at least where there are two; without it but with a validation
        split, that is tested on. ``notes`` say what was recognised and drawn.

    Raises
    ------
    Missing
        If there is nothing at the path.
    InputError
        If an argument is refused, or the layout cannot be told.
    Damaged
        If the tree holds no image, an empty class, fewer than two classes, a class or client
        without training images, or names that cannot be told apart.
    """
    facts = own_facts("folder")
    if digest not in ("time", "content"):
        raise InputError(f'{facts.op}: digest must be "time" or "content"; got {shown(digest)}')
    home = open_root(facts.op, path)
    depth = 1 if layout is None else layout.count("/") + 1
    tree = open_tree(facts.op, home, content=digest == "content", depth=depth)
    where = tidy(home)
    folders = {image: image.split("/")[:-1] for image in tree.images}
    found = recognise(facts.op, where, list(folders.values()), layout, given=given)
    records = []
    for image, above in folders.items():
        label, split, domain, client = place(found, above)
        records.append(Record(image, tree.images[image], label, split, domain, client))
    labels = sorted({record.label for record in records})
    _empty(facts.op, where, tree, found, labels)
    notes = [_layout_note(found, records, layout is not None), *tree.notes]
    try:
        names = read_names(facts.op, tree.read, labels)
    except (OSError, ValueError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{facts.op}: classes of {where} must be readable; got {error}") from error
    name = tidy(home.resolve().name.removesuffix(".zip")) or "images"
    return assemble(facts, name, tree.root, where, records, names, notes, tree.unpack)


def _empty(op: str, where: str, tree: Tree, layout: str, labels: list[str]) -> None:
    """Refuse class folders without an image, where no other folder has images of that class."""
    depth = layout.count("/") + 1
    for folder in tree.empty:
        parts = folder.split("/")
        if len(parts) == depth and place(layout, parts).label not in labels:
            raise Damaged(
                f"{op}: every class folder of {where} must hold an image; got none in "
                f"{shown(folder + '/')}: fill or remove it"
            )


def _layout_note(layout: str, records: list[Record], asked: bool) -> str:
    said = [counted(len({record.label for record in records}), "class", "classes")]
    for what in ("domain", "client"):
        names = sorted({getattr(record, what) for record in records} - {""})
        if names:
            said.append(f"{counted(len(names), what)} ({few(names)})")
    how = "as asked" if asked else "recognised"
    return f"layout {layout} ({how}): {', '.join(said)}"
