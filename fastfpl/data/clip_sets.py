"""The eleven data sets of the CLIP few-shot papers, in CoOp's folders and splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastfpl.data.base import Dataset
from fastfpl.data.catalogue import (
    FACTS,
    Facts,
    Need,
    find_folder,
    first_missing,
    open_root,
    require,
)
from fastfpl.data.folders import image_names, subfolders
from fastfpl.data.listing import SEED, Item, Lists, build, check_items, shuffled
from fastfpl.data.names import flaw, named, readable, shown, spelling, tidy
from fastfpl.data.texts import bad_line, lines, read_json, slashed, whole
from fastfpl.errors import Damaged, InputError, Missing
from fastfpl.files import write_json

__all__ = [
    "caltech101",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "flowers102",
    "food101",
    "imagenet",
    "oxford_pets",
    "stanford_cars",
    "sun397",
    "ucf101",
    "write_split",
]

_CALTECH = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
_CALTECH_LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")
_EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
# CLIP's list calls n03773504 and n04008634 "missile", n04355933 and n04356056 "sunglasses";
# WordNet's first word for the ones that are not that
_IMAGENET_TWICE = {"n04008634": "projectile", "n04355933": "sunglass"}


def caltech101(root: Path) -> Dataset:
    """Load Caltech101 without its background and its easy faces; see docs/datasets.md."""
    return _load("caltech101", root)


def dtd(root: Path) -> Dataset:
    """Load the Describable Textures; see docs/datasets.md."""
    return _load("dtd", root)


def eurosat(root: Path) -> Dataset:
    """Load EuroSAT's RGB images; see docs/datasets.md."""
    return _load("eurosat", root)


def flowers102(root: Path) -> Dataset:
    """Load the Oxford Flowers; see docs/datasets.md."""
    return _load("flowers102", root)


def food101(root: Path) -> Dataset:
    """Load Food-101; see docs/datasets.md."""
    return _load("food101", root)


def oxford_pets(root: Path) -> Dataset:
    """Load the Oxford-IIIT Pets; see docs/datasets.md."""
    return _load("oxford_pets", root)


def stanford_cars(root: Path) -> Dataset:
    """Load the Stanford Cars; see docs/datasets.md."""
    return _load("stanford_cars", root)


def sun397(root: Path) -> Dataset:
    """Load SUN397; see docs/datasets.md."""
    return _load("sun397", root)


def ucf101(root: Path) -> Dataset:
    """Load the middle frames of UCF101; see docs/datasets.md."""
    return _load("ucf101", root)


def fgvc_aircraft(root: Path) -> Dataset:
    """Load the FGVC Aircraft variants; see docs/datasets.md."""
    facts = FACTS["fgvc_aircraft"]
    folder = find_folder(facts, root)
    require(facts, folder)
    variants = folder / "variants.txt"
    names = named(facts, dict(enumerate(lines(facts, variants))), variants)
    labels = {line: label for label, line in enumerate(lines(facts, variants))}
    lists: list[list[Item]] = []
    for part in ("train", "test"):
        path = folder / f"images_variant_{part}.txt"
        items = []
        for number, line in enumerate(lines(facts, path), 1):
            image, _, variant = line.partition(" ")
            if variant not in labels:
                raise bad_line(facts, path, number, "an image and a variant of variants.txt", line)
            items.append(Item(f"{image}.jpg", labels[variant]))
        lists.append(items)
    return build(facts, folder / facts.images, Lists(names, lists[0], lists[1]))


def imagenet(root: Path) -> Dataset:
    """Load ImageNet, tested on its validation images; see docs/datasets.md."""
    facts = FACTS["imagenet"]
    folder = find_folder(facts, root)
    require(facts, folder)
    images, path = folder / facts.images, folder / "classnames.txt"
    known: dict[str, str] = {}
    for number, line in enumerate(lines(facts, path), 1):
        synset, _, name = line.partition(" ")
        if not name.strip():
            raise bad_line(facts, path, number, "a folder and a class name", line)
        if synset in known:
            raise bad_line(facts, path, number, "a folder that no line before it names", line)
        known[synset] = readable(name)
    synsets = subfolders(facts.op, images / "train")
    for synset in synsets:
        if synset not in known:
            raise Damaged(
                f"{facts.op}: {path} must name every folder of {images / 'train'}; "
                f"got none for {tidy(synset)}"
            )
    labels = {synset: label for label, synset in enumerate(synsets)}
    names = {label: known[synset] for synset, label in labels.items()}
    times = Counter(spelling(name) for name in names.values())
    for synset, other in _IMAGENET_TWICE.items():
        if synset in labels and times[spelling(names[labels[synset]])] > 1:
            names[labels[synset]] = other
    lists: list[list[Item]] = []
    for part in ("train", "val"):
        items = []
        for synset in subfolders(facts.op, images / part):
            if synset not in labels:
                raise Damaged(
                    f"{facts.op}: folders of {images / part} must be classes of "
                    f"{images / 'train'}; got {tidy(synset)}"
                )
            items += [
                Item(f"{part}/{synset}/{file}", labels[synset])
                for file in image_names(facts.op, images / part / synset)
            ]
        lists.append(items)
    return build(facts, images, Lists(named(facts, names, path), lists[0], lists[1]))


def write_split(name: str, root: str | Path) -> Path:
    """Draw the split that stands in for a missing published one, and write it in its format.

    Parameters
    ----------
    name : str
        A set whose published split is one file.
    root : path
        Folder that holds the set's folder.

    Returns
    -------
    path : Path
        The file, in the set's folder. It says that it was drawn here, and so will the set.

    Raises
    ------
    InputError
        If the set has no such split, or the file is there already.
    Missing, Damaged
        As loading the set.

    Notes
    -----
    Deterministic: yes; the images of a class are ordered by a keyed digest of their paths, so that
    the split is the same on every machine, and another image moves none of the others.
    """
    splittable = sorted(name for name, facts in FACTS.items() if facts.split)
    if name not in splittable:
        raise InputError(
            f"fastfpl.data.write_split: name must be one of {', '.join(splittable)}; got {name!r}"
        )
    facts = FACTS[name]
    folder = find_folder(facts, open_root("fastfpl.data.write_split", root))
    path = folder / facts.split
    if os.path.lexists(path):
        raise InputError(
            f"fastfpl.data.write_split: the split must not be there yet; got {path}: "
            "remove it first if another one shall be drawn"
        )
    lists = _drawn(facts, folder)
    parts = {"train": lists.train, "val": lists.validation, "test": lists.test}
    for part, items in parts.items():  # what could not be read back is not written
        check_items(facts, part, items, len(lists.classnames))
    rows = {
        part: [[item.path, item.label, lists.classnames[item.label]] for item in items]
        for part, items in parts.items()
    }
    try:
        write_json(path, {"about": _about(facts), **rows})
    except OSError as error:
        raise InputError(
            f"fastfpl.data.write_split: {path} must be a file that can be written; got "
            f"{error.strerror}"
        ) from error
    return path


def _load(name: str, root: Path) -> Dataset:
    facts = FACTS[name]
    folder = find_folder(facts, root)
    split = folder / facts.split
    # a link to nothing is a published split that has gone, no reason to draw another one
    lists = read_split(facts, split) if os.path.lexists(split) else _drawn(facts, folder)
    return build(facts, folder / facts.images, lists)


# -- published splits ------------------------------------------------------------------------


def read_split(facts: Facts, path: Path) -> Lists:
    """Read a ``split_zhou_*.json``: lists of (path, label, class name) for train, val and test."""
    content = read_json(facts, path, _published(facts).source)
    names: dict[int, str] = {}
    lists: dict[str, list[Item]] = {}
    for part in ("train", "val", "test"):
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise Damaged(f"{facts.op}: {path} must hold a list {part!r}; got none")
        lists[part] = [_item(facts, path, part, row, names) for row in rows]
    about = content.get("about", "")
    if not isinstance(about, str) or flaw(about):
        raise Damaged(
            f"{facts.op}: 'about' of {path} must be a line of text that can be seen; got "
            f"{shown(about)}"
        )
    return Lists(
        named(facts, names, path),
        lists["train"],
        lists["test"],
        lists["val"],
        notes=(tidy(about),) if about else (),
    )


def _item(facts: Facts, path: Path, part: str, row: Any, names: dict[int, str]) -> Item:
    good = isinstance(row, list) and len(row) == 3
    good = good and isinstance(row[0], str) and type(row[1]) is int and isinstance(row[2], str)
    if not good:
        raise Damaged(
            f"{facts.op}: entries of {path} must be [path, label, class name]; got {shown(row)} "
            f"in {part}"
        )
    image, label, name = row
    if names.setdefault(label, name) != name:
        raise Damaged(
            f"{facts.op}: {path} must give a label one class name; got "
            f"{shown(names[label])} and {shown(name)} for label {shown(label)}"
        )
    return Item(slashed(image), label)


# -- splits that are drawn here --------------------------------------------------------------


def _about(facts: Facts) -> str:
    return (
        f"{facts.split} is not the published one: a split drawn here with seed {SEED} stands in "
        f"({facts.drawn})"
    )


def _published(facts: Facts) -> Need:
    return next(need for need in facts.needs if need.path == facts.split)


def _drawn(facts: Facts, folder: Path) -> Lists:
    lacking = first_missing(folder, (facts.needs[0], *facts.stand_in))
    if lacking is not None:
        raise Missing(
            f"{facts.op}: {folder / facts.split} must be there, or {lacking.path} to draw a split "
            f"from; got neither: get the first from {_published(facts).source}, "
            f"the second from {lacking.source}"
        )
    lists = _STAND_INS[facts.name](facts, folder)
    return Lists(lists.classnames, lists.train, lists.test, lists.validation, (_about(facts),))


def _in_three(facts: Facts, names: tuple[str, ...], groups: Mapping[int, Iterable[str]]) -> Lists:
    """Cut each class in 50 % train, 20 % validation and 30 % test."""
    lists = Lists(names, [], [])
    for label, paths in sorted(groups.items()):
        mixed = shuffled(paths)
        train, rest = round(0.5 * len(mixed)), round(0.2 * len(mixed))
        parts = (mixed[:train], mixed[train : train + rest], mixed[train + rest :])
        if not parts[0] or not parts[2]:
            raise Damaged(
                f"{facts.op}: a class must hold at least 2 images to be split; got {len(mixed)} "
                f"of {names[label]!r}"
            )
        for target, part in zip((lists.train, lists.validation, lists.test), parts, strict=True):
            target += [Item(path, label) for path in sorted(part)]
    return lists


def _in_two(names: tuple[str, ...], training: list[Item], test: list[Item]) -> Lists:
    """Cut each class of a training list in 80 % train and 20 % validation."""
    groups: dict[int, list[str]] = {}
    for item in training:
        groups.setdefault(item.label, []).append(item.path)
    lists = Lists(names, [], test)
    for label, paths in sorted(groups.items()):
        mixed = shuffled(paths)
        rest = round(0.2 * len(mixed))
        lists.validation.extend(Item(path, label) for path in sorted(mixed[:rest]))
        lists.train.extend(Item(path, label) for path in sorted(mixed[rest:]))
    return lists


def _by_folder(
    facts: Facts,
    folder: Path,
    left_out: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Lists:
    """One folder a class, in the order of their names; capitals come first."""
    base = folder / facts.images
    classes = [name for name in subfolders(facts.op, base) if name not in left_out]
    names = {label: (renamed or {}).get(name, name) for label, name in enumerate(classes)}
    groups = {
        label: [f"{name}/{file}" for file in image_names(facts.op, base / name)]
        for label, name in enumerate(classes)
    }
    return _in_three(facts, named(facts, names, base), groups)


def _caltech(facts: Facts, folder: Path) -> Lists:
    return _by_folder(facts, folder, _CALTECH_LEFT_OUT, _CALTECH)


def _eurosat(facts: Facts, folder: Path) -> Lists:
    return _by_folder(facts, folder, renamed=_EUROSAT)


def _pets(facts: Facts, folder: Path) -> Lists:
    names: dict[int, str] = {}
    lists: list[list[Item]] = []
    for part in ("trainval", "test"):
        path = folder / "annotations" / f"{part}.txt"
        items = []
        for number, line in enumerate(lines(facts, path), 1):
            image, *fields = line.split()
            numbers = [whole(field) for field in fields]
            if len(numbers) != 3 or numbers[0] is None or None in numbers:
                raise bad_line(facts, path, number, "an image and three numbers", line)
            label, name = numbers[0] - 1, image.rpartition("_")[0].lower()
            if names.setdefault(label, name) != name:
                raise bad_line(facts, path, number, f"class {label + 1} {names[label]!r}", line)
            items.append(Item(f"{image}.jpg", label))
        lists.append(items)
    return _in_two(named(facts, names, folder / "annotations"), *lists)


def _flowers(facts: Facts, folder: Path) -> Lists:
    path = folder / "cat_to_name.json"
    content = read_json(facts, path, facts.stand_in[-1].source)
    called: dict[int, str] = {}
    for key, name in content.items() if isinstance(content, dict) else [("", content)]:
        label = whole(key)
        if label is None or not isinstance(name, str) or label - 1 in called:
            raise Damaged(
                f"{facts.op}: {path} must map class numbers to names; got {shown(name)} for "
                f"{shown(key)}"
            )
        called[label - 1] = name
    labels = np.atleast_1d(_matlab(facts, folder / "imagelabels.mat", "labels"))
    names = named(facts, called, path)
    groups: dict[int, list[str]] = {}
    for number, label in enumerate(labels.tolist(), 1):
        if label not in range(1, len(names) + 1):
            raise Damaged(
                f"{facts.op}: labels of {folder / 'imagelabels.mat'} must lie in "
                f"[1, {len(names)}]; got {shown(label)} for image {number}"
            )
        groups.setdefault(int(label) - 1, []).append(f"image_{number:05d}.jpg")
    return _in_three(facts, names, groups)


def _cars(facts: Facts, folder: Path) -> Lists:
    meta = folder / "devkit" / "cars_meta.mat"
    models = [str(name) for name in np.atleast_1d(_matlab(facts, meta, "class_names"))]
    # "Audi R8 Coupe 2012" -> "2012 Audi R8 Coupe"
    turned = (" ".join([*name.split()[-1:], *name.split()[:-1]]) for name in models)
    names = named(facts, dict(enumerate(turned)), meta)
    lists: list[list[Item]] = []
    for images, path in (
        ("cars_train", folder / "devkit" / "cars_train_annos.mat"),
        ("cars_test", folder / "cars_test_annos_withlabels.mat"),
    ):
        items = []
        for row in np.atleast_1d(_matlab(facts, path, "annotations")):
            try:
                items.append(Item(f"{images}/{row['fname']}", int(row["class"]) - 1))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise Damaged(
                    f"{facts.op}: annotations of {path} must hold fname and class; got "
                    f"{type(error).__name__}: {tidy(error)}"
                ) from error
        lists.append(items)
    return _in_two(names, *lists)


def _sun(facts: Facts, folder: Path) -> Lists:
    path = folder / "ClassName.txt"
    scenes = {slashed(line).strip("/"): label for label, line in enumerate(lines(facts, path))}
    # "a/apartment_building/outdoor" -> "outdoor apartment_building"
    called = {label: " ".join(scene.split("/")[:0:-1]) for scene, label in scenes.items()}
    lists: list[list[Item]] = []
    for part in ("Training_01.txt", "Testing_01.txt"):
        items = []
        for number, line in enumerate(lines(facts, folder / part), 1):
            image = slashed(line).strip("/")
            scene = image.rpartition("/")[0]
            if scene not in scenes:
                raise bad_line(facts, folder / part, number, "an image of a known class", line)
            items.append(Item(image, scenes[scene]))
        lists.append(items)
    return _in_two(named(facts, called, path), *lists)


def _ucf(facts: Facts, folder: Path) -> Lists:
    place = folder / "ucfTrainTestlist"
    actions: dict[str, int] = {}
    for number, line in enumerate(lines(facts, place / "classInd.txt"), 1):
        text, _, action = line.partition(" ")
        label = whole(text)
        if label is None or not action or action in actions:
            raise bad_line(facts, place / "classInd.txt", number, "a number and an action", line)
        actions[action] = label - 1
    # "ApplyEyeMakeup" -> "Apply_Eye_Makeup", which is the folder's name too
    spelled = {action: "_".join(re.findall("[A-Z][^A-Z]*", action)) for action in actions}
    lists: list[list[Item]] = []
    for part in ("trainlist01.txt", "testlist01.txt"):
        items = []
        for number, line in enumerate(lines(facts, place / part), 1):
            action, _, video = slashed(line.split()[0]).partition("/")
            if action not in actions or not video.endswith(".avi"):
                raise bad_line(facts, place / part, number, "a video of a known action", line)
            items.append(Item(f"{spelled[action]}/{video[:-4]}.jpg", actions[action]))
        lists.append(items)
    called = {label: spelled[action] for action, label in actions.items()}
    return _in_two(named(facts, called, place / "classInd.txt"), *lists)


_STAND_INS: dict[str, Callable[[Facts, Path], Lists]] = {
    "caltech101": _caltech,
    "dtd": _by_folder,
    "eurosat": _eurosat,
    "flowers102": _flowers,
    "food101": _by_folder,
    "oxford_pets": _pets,
    "stanford_cars": _cars,
    "sun397": _sun,
    "ucf101": _ucf,
}


# -- files -----------------------------------------------------------------------------------


def _matlab(facts: Facts, path: Path, key: str) -> Any:
    """Read one variable of a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise Missing(
            f"{facts.op}: scipy must be installed to read {path.name}; got {error}: "
            f'pip install "fastfpl[mat]", or get {facts.split}, which needs no scipy, from '
            f"{_published(facts).source}"
        ) from error
    try:
        return loadmat(path, simplify_cells=True)[key]
    # what a broken file makes of the reader is not of one kind
    except Exception as error:
        raise Damaged(
            f"{facts.op}: {path} must be a MATLAB file with {key!r}; got "
            f"{type(error).__name__}: {tidy(error)}"
        ) from error
