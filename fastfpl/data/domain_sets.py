"""Data sets of several visual domains: DomainNet with 345 or ten classes, Office-Caltech10."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fastfpl.data.base import Dataset
from fastfpl.data.catalogue import FACTS, Facts, find_folder, require, source_of
from fastfpl.data.folders import image_names, kind_of
from fastfpl.data.listing import SEED, Item, Lists, build, shuffled
from fastfpl.data.names import named, readable, shown, tidy
from fastfpl.data.pickles import load_plain
from fastfpl.data.texts import bad_line, lines, slashed, whole
from fastfpl.errors import Damaged, Missing

__all__ = ["domainnet10", "domainnet345", "office_caltech10"]

# label = place in these lists; the lists' pickles hold the names
_DOMAINNET10 = (
    "bird", "feather", "headphones", "ice_cream", "teapot", "tiger", "whale", "windmill",
    "wine_glass", "zebra",
)  # fmt: skip
_OFFICE = (
    "back_pack", "bike", "calculator", "headphones", "keyboard", "laptop_computer", "monitor",
    "mouse", "mug", "projector",
)  # fmt: skip


def domainnet10(root: Path) -> Dataset:
    """Load ten classes of DomainNet in six domains, as FedBN lists them; see docs/datasets.md."""
    facts = FACTS["domainnet10"]
    folder = find_folder(facts, root)
    require(facts, folder)
    return build(facts, root, _pickled(facts, folder, _DOMAINNET10))


def office_caltech10(root: Path) -> Dataset:
    """Load Office-Caltech10 in four domains; see docs/datasets.md.

    The lists are FedBN's pickles. If none of them is there, the domains' folders are split here.
    """
    facts = FACTS["office_caltech10"]
    folder = find_folder(facts, root)
    if any(os.path.lexists(folder / need.path) for need in facts.needs if need.spare):
        require(facts, folder)
        return build(facts, root, _pickled(facts, folder, _OFFICE))
    return build(facts, folder, _by_folder(facts, folder, _OFFICE))


def domainnet345(root: Path) -> Dataset:
    """Load DomainNet with all its classes, six domains, cleaned lists; see docs/datasets.md."""
    facts = FACTS["domainnet345"]
    folder = find_folder(facts, root)
    require(facts, folder)
    names: dict[int, str] = {}
    parts: list[list[Item]] = []
    for part in ("train", "test"):
        items: list[Item] = []
        for domain, place in enumerate(facts.domains):
            path = folder / "splits" / f"{place}_{part}.txt"
            for number, line in enumerate(lines(facts, path), 1):
                image, _, text = slashed(line).rpartition(" ")
                pieces, label = image.split("/"), whole(text)
                if len(pieces) < 3 or pieces[0] != place or label is None:
                    raise bad_line(facts, path, number, f"{place}/class/image and a label", line)
                if names.setdefault(label, pieces[1]).casefold() != pieces[1].casefold():
                    rule = f"an image of class {shown(names[label])} for label {label}"
                    raise bad_line(facts, path, number, rule, line)
                items.append(Item(image, label, domain))
        parts.append(items)
    return build(facts, folder, Lists(named(facts, names, folder / "splits"), parts[0], parts[1]))


def _pickled(facts: Facts, folder: Path, classes: Sequence[str]) -> Lists:
    """Read FedBN's pickles: (paths from the root, class names), one a domain and part."""
    labels = {name: label for label, name in enumerate(classes)}
    parts: list[list[Item]] = []
    for part in ("train", "test"):
        items: list[Item] = []
        for domain, place in enumerate(facts.domains):
            path = folder / f"{place}_{part}.pkl"
            for image, name in zip(*_pair(facts, path), strict=True):
                if name not in labels:
                    raise Damaged(
                        f"{facts.op}: class names of {path} must be of {', '.join(classes)}; got "
                        f"{shown(name)} for {tidy(image)}"
                    )
                # paths begin with the folder's usual name; it may be spelled otherwise here
                first, *rest = PurePosixPath(slashed(image)).parts or ("",)
                first = folder.name if first in facts.folders else first
                items.append(Item("/".join((first, *rest)), labels[name], domain))
        parts.append(items)
    return Lists(tuple(readable(name) for name in classes), parts[0], parts[1])


def _pair(facts: Facts, path: Path) -> tuple[list[str], list[str]]:
    content = load_plain(path, facts.op)
    rule = "must hold two arrays of strings of one length, paths and class names"
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise Damaged(f"{facts.op}: {path} {rule}; got {type(content).__name__}")
    lists: list[list[str]] = []
    for array in content:
        values = array.tolist() if isinstance(array, np.ndarray) else array
        if not isinstance(values, list | tuple):
            raise Damaged(f"{facts.op}: {path} {rule}; got {type(array).__name__}")
        texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
        if not all(isinstance(text, str) for text in texts):
            raise Damaged(f"{facts.op}: {path} {rule}; got another kind of entry")
        lists.append(texts)
    if len(lists[0]) != len(lists[1]):
        raise Damaged(f"{facts.op}: {path} {rule}; got {len(lists[0])} and {len(lists[1])}")
    return lists[0], lists[1]


def _by_folder(facts: Facts, folder: Path, classes: Sequence[str]) -> Lists:
    """Cut the images of ``domain/class/`` in 80 % train and 20 % test of each class and domain."""
    lists = Lists(tuple(readable(name) for name in classes), [], [])
    for domain, place in enumerate(facts.domains):
        for label, name in enumerate(classes):
            home = folder / place / name
            if not os.path.isdir(home):
                raise Missing(
                    f"{facts.op}: {home} must be there; got {kind_of(home)}: get it from "
                    f"{source_of(facts, f'{place}/{name}/')}"
                )
            paths = [f"{place}/{name}/{file}" for file in image_names(facts.op, home)]
            mixed = shuffled(paths)
            test = round(0.2 * len(mixed))
            lists.test.extend(Item(path, label, domain) for path in sorted(mixed[:test]))
            lists.train.extend(Item(path, label, domain) for path in sorted(mixed[test:]))
    note = f"FedBN's lists are not there: a split drawn here with seed {SEED} ({facts.drawn})"
    return Lists(lists.classnames, lists.train, lists.test, notes=(note,))
