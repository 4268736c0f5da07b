"""Miniature copies of data sets in their real formats: three classes, a few tiny images each."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.data.listing import Listing
from fastfpl.errors import FastfplError

#: Sets that are published with a split of their own.
SPLIT = sorted(name for name, facts in FACTS.items() if facts.split)


class Listed(NamedTuple):
    path: str  # from the root
    label: int
    domain: int = 0


@dataclass
class Tree:
    name: str
    root: Path
    folder: Path
    classnames: tuple[str, ...]
    train: list[Listed]
    test: list[Listed]
    split: Path | None = None


def colour_of(key: str) -> tuple[int, int, int]:
    red, green, blue = hashlib.blake2b(key.encode(), digest_size=3).digest()
    return red, green, blue


def paint(path: Path) -> None:
    """Write an image whose colour tells its folder and name, of a size of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = f"{path.parent.name}/{path.name}"
    side = 4 + sum(key.encode()) % 5
    Image.new("RGB", (side, side + 1), colour_of(key)).save(path, "JPEG", quality=100)


def published(
    name: str,
    root: Path,
    folder: str,
    images: str,
    split: str,
    files: dict[str, list[str]],
    spelled: tuple[str, ...],
) -> Tree:
    """Make a tree with a split_zhou json: of each class two images train, one val, one test."""
    home = root / folder
    rows: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for label, (called, paths) in enumerate(files.items()):
        for number, path in enumerate(paths):
            paint(home / images / path)
            rows[("train", "train", "val", "test")[number % 4]].append((path, label, called))
    for part in rows.values():
        random.Random(7).shuffle(part)  # as published, not in the order of labels
    (home / split).write_text(json.dumps(rows))
    inside = f"{folder}/{images}".rstrip("/")
    lists = {
        part: [Listed(f"{inside}/{path}", label) for path, label, _ in rows[part]] for part in rows
    }
    return Tree(name, root, home, spelled, lists["train"], lists["test"], home / split)


def _four(stem: str) -> list[str]:
    return [f"{stem}{n}.jpg" for n in range(1, 5)]


def caltech101(root: Path, folder: str = "caltech-101") -> Tree:
    files = {
        "face": _four("Faces/image_000"),
        "leopard": _four("Leopards/image_000"),
        "ceiling_fan": _four("ceiling_fan/image_000"),
    }
    for left_out in ("BACKGROUND_Google", "Faces_easy"):
        paint(root / folder / "101_ObjectCategories" / left_out / "image_0001.jpg")
    split = "split_zhou_Caltech101.json"
    return published(
        "caltech101", root, folder, "101_ObjectCategories", split, files,
        ("face", "leopard", "ceiling fan"),
    )  # fmt: skip


def oxford_pets(root: Path) -> Tree:
    stems = ("Abyssinian", "american_bulldog", "yorkshire_terrier")
    files = {stem.lower(): _four(f"{stem}_") for stem in stems}
    tree = published(
        "oxford_pets", root, "oxford_pets", "images", "split_zhou_OxfordPets.json", files,
        ("abyssinian", "american bulldog", "yorkshire terrier"),
    )  # fmt: skip
    notes = tree.folder / "annotations"
    notes.mkdir()
    rows = [
        [f"{stem}_{n} {number} {1 + (number > 1)} {n}" for number, stem in enumerate(stems, 1)]
        for n in range(1, 5)
    ]
    (notes / "trainval.txt").write_text("".join(f"{x}\n" for row in rows[:3] for x in row))
    (notes / "test.txt").write_text("\n".join(rows[3]))
    return tree


def flowers102(root: Path) -> Tree:
    from scipy.io import savemat

    names = ("pink primrose", "hard-leaved pocket orchid", "canterbury bells")
    numbered = [f"image_{n:05d}.jpg" for n in range(1, 13)]
    files = {name: numbered[k::3] for k, name in enumerate(names)}
    tree = published(
        "flowers102", root, "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", files, names
    )
    labels = np.array([[1 + n % 3 for n in range(12)]], dtype=np.uint8)
    savemat(tree.folder / "imagelabels.mat", {"labels": labels})
    called = {str(k): name for k, name in enumerate(names, 1)}
    (tree.folder / "cat_to_name.json").write_text(json.dumps(called))
    return tree


def food101(root: Path, folder: str = "food-101") -> Tree:
    files = {food: _four(f"{food}/10") for food in ("apple_pie", "beef_tartare", "waffles")}
    return published(
        "food101", root, folder, "images", "split_zhou_Food101.json", files,
        ("apple pie", "beef tartare", "waffles"),
    )  # fmt: skip


def dtd(root: Path) -> Tree:
    files = {kind: _four(f"{kind}/{kind}_000") for kind in ("banded", "dotted", "zigzagged")}
    split = "split_zhou_DescribableTextures.json"
    return published("dtd", root, "dtd", "images", split, files, tuple(files))


def stanford_cars(root: Path) -> Tree:
    from scipy.io import savemat

    models = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012")
    spelled = (
        "2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 Ram C/V Cargo Van Minivan",
    )  # fmt: skip
    files = {
        name: [
            *(f"cars_train/0000{3 * n + k + 1}.jpg" for n in range(3)),
            f"cars_test/0000{k + 1}.jpg",
        ]
        for k, name in enumerate(spelled)
    }
    tree = published(
        "stanford_cars", root, "stanford_cars", "", "split_zhou_StanfordCars.json", files, spelled
    )
    kit = tree.folder / "devkit"
    kit.mkdir()
    savemat(kit / "cars_meta.mat", {"class_names": np.array(models, dtype=object)[None]})
    kind = [("bbox_x1", object), ("class", object), ("fname", object)]
    for count, path in (
        (9, kit / "cars_train_annos.mat"),
        (3, tree.folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = [(5, np.uint8(1 + n % 3), f"0000{n + 1}.jpg") for n in range(count)]
        savemat(path, {"annotations": np.array(rows, dtype=kind)[None]})
    return tree


def sun397(root: Path) -> Tree:
    scenes = ("a/abbey", "a/apartment_building/outdoor", "z/zen_garden")
    spelled = ("abbey", "outdoor apartment building", "zen garden")
    files = {name: _four(f"{s}/sun_a{s[-1]}") for name, s in zip(spelled, scenes, strict=True)}
    tree = published("sun397", root, "sun397", "SUN397", "split_zhou_SUN397.json", files, spelled)
    (tree.folder / "ClassName.txt").write_text("".join(f"/{s}\n" for s in scenes))
    for part, wanted in (("Training_01.txt", slice(0, 3)), ("Testing_01.txt", slice(3, 4))):
        text = "".join(f"/{path}\n" for paths in files.values() for path in paths[wanted])
        (tree.folder / part).write_text(text)
    return tree


def ucf101(root: Path) -> Tree:
    actions = {
        "ApplyEyeMakeup": "Apply_Eye_Makeup", "BabyCrawling": "Baby_Crawling", "YoYo": "Yo_Yo",
    }  # fmt: skip
    files = {spelled: _four(f"{spelled}/v_{a}_g01_c0") for a, spelled in actions.items()}
    tree = published(
        "ucf101", root, "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", files,
        ("Apply Eye Makeup", "Baby Crawling", "Yo Yo"),
    )  # fmt: skip
    lists = tree.folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{n} {a}\n" for n, a in enumerate(actions, 1)))
    training = [f"{a}/v_{a}_g01_c0{n}.avi {k}" for k, a in enumerate(actions, 1) for n in (1, 2, 3)]
    (lists / "trainlist01.txt").write_text("\n".join(training))
    (lists / "testlist01.txt").write_text("\n".join(f"{a}/v_{a}_g01_c04.avi" for a in actions))
    return tree


def eurosat(root: Path) -> Tree:
    kinds = {"AnnualCrop": "Annual Crop Land", "Forest": "Forest", "SeaLake": "Sea or Lake"}
    files = {name: _four(f"{kind}/{kind}_") for kind, name in kinds.items()}
    split = "split_zhou_EuroSAT.json"
    return published("eurosat", root, "eurosat", "2750", split, files, tuple(files))


def imagenet(root: Path) -> Tree:
    # as CLIP's list has them: n04355933 and n04356056 share a name
    called = {"n01440764": "tench", "n04355933": "sunglasses", "n04356056": "sunglasses"}
    home = root / "imagenet"
    lists: dict[str, list[Listed]] = {"train": [], "val": []}
    for label, synset in enumerate(called):
        for part, count in (("train", 3), ("val", 2)):
            for number in range(count):
                path = f"images/{part}/{synset}/{synset}_{part}{number}.JPEG"
                paint(home / path)
                lists[part].append(Listed(f"imagenet/{path}", label))
    text = "".join(f"{synset} {name}\n" for synset, name in reversed(called.items()))
    (home / "classnames.txt").write_text(text)
    names = ("tench", "sunglass", "sunglasses")
    return Tree("imagenet", root, home, names, lists["train"], lists["val"])


def fgvc_aircraft(root: Path, folder: str = "fgvc_aircraft") -> Tree:
    variants = ("707-320", "A300B4", "F-16A/B Block 20")
    home = root / folder
    lists: dict[str, list[Listed]] = {"train": [], "val": [], "test": []}
    texts = dict.fromkeys(lists, "")
    for number in range(12):
        part, label = ("train", "train", "val", "test")[number // 3], (2 - number) % 3
        paint(home / "images" / f"10{number:02d}.jpg")
        texts[part] += f"10{number:02d} {variants[label]}\n"
        lists[part].append(Listed(f"{folder}/images/10{number:02d}.jpg", label))
    for part, text in texts.items():
        (home / f"images_variant_{part}.txt").write_text(text)
    (home / "variants.txt").write_text("\n".join(variants) + "\n")
    return Tree("fgvc_aircraft", root, home, variants, lists["train"], lists["test"])


TEN = {
    "DomainNet": (
        "bird", "feather", "headphones", "ice_cream", "teapot", "tiger", "whale", "windmill",
        "wine_glass", "zebra",
    ),
    "office_caltech_10": (
        "back_pack", "bike", "calculator", "headphones", "keyboard", "laptop_computer", "monitor",
        "mouse", "mug", "projector",
    ),
}  # fmt: skip
DOMAINS = {
    "DomainNet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    "office_caltech_10": ("amazon", "caltech", "dslr", "webcam"),
}


def pickled(
    name: str,
    root: Path,
    usual: str,
    folder: str,
    dump: Callable[[list[str]], object] = np.array,
) -> Tree:
    """Make FedBN's pickles: of each class and domain two training images and one test image."""
    lists: dict[str, list[Listed]] = {"train": [], "test": []}
    for domain, place in enumerate(DOMAINS[usual]):
        for part, numbers in (("train", (1, 2)), ("test", (3,))):
            # not in the order of labels: whoever pairs by position alone is found out
            rows = [
                (f"{place}/{called}/{n}.jpg", label)
                for n in numbers
                for label, called in reversed(list(enumerate(TEN[usual])))
            ]
            for path, label in rows:
                paint(root / folder / path)
                lists[part].append(Listed(f"{folder}/{path}", label, domain))
            paths = dump([f"{usual}/{path}" for path, _ in rows])
            labels = dump([TEN[usual][label] for _, label in rows])
            with (root / folder / f"{place}_{part}.pkl").open("wb") as file:
                pickle.dump((paths, labels), file, protocol=2 + domain % 4)
    names = tuple(called.replace("_", " ") for called in TEN[usual])
    return Tree(name, root, root / folder, names, lists["train"], lists["test"])


def domainnet10(root: Path, folder: str = "DomainNet") -> Tree:
    return pickled("domainnet10", root, "DomainNet", folder)


def office_caltech10(root: Path) -> Tree:
    def objects(values: list[str]) -> object:
        return np.array(values, dtype=object)

    usual = "office_caltech_10"
    return pickled("office_caltech10", root, usual, usual, objects)


def domainnet345(root: Path, folder: str = "DomainNet", train: int = 2) -> Tree:
    """Make DomainNet: of each class and domain ``train`` training images and one test image."""
    called = ("aircraft_carrier", "The_Eiffel_Tower", "t-shirt")
    home = root / folder
    (home / "splits").mkdir(parents=True)
    lists: dict[str, list[Listed]] = {"train": [], "test": []}
    for domain, place in enumerate(DOMAINS["DomainNet"]):
        for part, numbers in (("train", range(1, train + 1)), ("test", (train + 1,))):
            text = ""
            for number in numbers:
                for label in (2, 0, 1):
                    path = f"{place}/{called[label]}/{place}_{label:03d}_{number:06d}.jpg"
                    paint(home / path)
                    text += f"{path} {label}\n"
                    inside = path if folder == "." else f"{folder}/{path}"
                    lists[part].append(Listed(inside, label, domain))
            (home / "splits" / f"{place}_{part}.txt").write_text(text)
    names = ("aircraft carrier", "The Eiffel Tower", "t-shirt")
    return Tree("domainnet345", root, home, names, lists["train"], lists["test"])


def cifar(
    root: Path,
    name: str,
    folder: str,
    *,
    python2: bool = True,
    labels: Sequence[int] = (2, 0, 1, 2),
    names: Sequence[str] = ("airplane", "aquarium_fish", "truck"),
) -> np.ndarray:
    """Make CIFAR's batches, an image a label; returns all pixels, (n, 32, 32, 3), train first."""
    rng = np.random.default_rng(3)
    fine = name == "cifar100"
    place = root / folder / ("cifar-100-python" if fine else "cifar-10-batches-py")
    place.mkdir(parents=True)
    batches = (
        ["train", "test"] if fine else [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    )
    everything = []

    def spelled(key: str) -> str | bytes:
        return key.encode() if python2 else key

    for batch in batches:
        pixels = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        everything.append(pixels)
        content: dict[str | bytes, object] = {
            spelled("data"): np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).reshape(-1, 3072)),
            spelled("fine_labels" if fine else "labels"): list(labels),
            spelled("batch_label"): spelled(f"{batch} of 6"),
            spelled("filenames"): [spelled(f"{n}.png") for n in range(len(labels))],
        }
        if fine:
            content[spelled("coarse_labels")] = [11] * len(labels)
        (place / batch).write_bytes(pickle.dumps(content, protocol=2))
    called = [spelled(n) for n in names]
    meta = {spelled("fine_label_names" if fine else "label_names"): called}
    (place / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return np.concatenate(everything)


#: Every set of image files, with both spellings of its folder where it has two.
TREES: dict[str, Callable[[Path], Tree]] = {
    "caltech101": caltech101,
    "caltech101 without a hyphen": lambda root: caltech101(root, "caltech101"),
    "oxford_pets": oxford_pets,
    "flowers102": flowers102,
    "food101": food101,
    "food101 without a hyphen": lambda root: food101(root, "food101"),
    "dtd": dtd,
    "stanford_cars": stanford_cars,
    "sun397": sun397,
    "ucf101": ucf101,
    "eurosat": eurosat,
    "imagenet": imagenet,
    "fgvc_aircraft": fgvc_aircraft,
    "fgvc_aircraft as unpacked": lambda root: fgvc_aircraft(root, "fgvc-aircraft-2013b/data"),
    "domainnet10": domainnet10,
    "domainnet10 in small letters": lambda root: domainnet10(root, "domainnet"),
    "domainnet345": domainnet345,
    "domainnet345 without a folder": lambda root: domainnet345(root, "."),
    "office_caltech10": office_caltech10,
}


def listed(split, root: Path) -> list[Listed]:
    """What a split holds, in its order."""
    assert isinstance(split, Listing)
    return [
        Listed(split.path(i).relative_to(root).as_posix(), int(split.labels[i]), int(d))
        for i, d in enumerate(split.domains)
    ]


def complete(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    """Let the catalogue's sizes be those of the miniature."""
    sizes = {"classes": len(tree.classnames), "train": len(tree.train), "test": len(tree.test)}
    monkeypatch.setitem(FACTS, tree.name, replace(FACTS[tree.name], **sizes))


def rows_of(tree: Tree) -> dict[str, list[list[object]]]:
    assert tree.split is not None
    rows: dict[str, list[list[object]]] = json.loads(tree.split.read_text())
    return rows


def refused(name: str, root: Path) -> str:
    """Load a set that is refused, and return the sentence, which can be shown as it is."""
    with pytest.raises(FastfplError) as caught:
        load_dataset(name, root)
    text = str(caught.value)
    assert text.startswith(f"fastfpl.data.{name}: ")
    assert text.isprintable()
    assert len(text) < 2000
    return text


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[: len(content) // 2], "text": b"<html>not found</html>"}[how]
    )
