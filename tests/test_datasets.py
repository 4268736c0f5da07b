"""Data sets in files: every format is read as published, and its fingerprint follows the files."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import fastfpl
from fastfpl.config import load_preset, preset_names
from fastfpl.data import DATASETS, Statistics, base_novel, load_dataset, partition, restrict
from fastfpl.data.catalogue import FACTS
from fastfpl.errors import Damaged
from tests import trees
from tests.trees import TREES, colour_of, complete, listed

# -- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TREES)
def test_lists_are_the_published_ones(kind: str, tmp_path: Path, monkeypatch) -> None:
    tree = TREES[kind](tmp_path)
    complete(monkeypatch, tree)
    dataset = load_dataset(tree.name, tmp_path)
    assert dataset.name == tree.name
    assert dataset.classnames == tree.classnames
    assert dataset.domains == FACTS[tree.name].domains
    assert listed(dataset.train, tmp_path) == tree.train
    assert listed(dataset.test, tmp_path) == tree.test
    assert (dataset.notes, dataset.skipped, dataset.statistics) == ((), 0, None)


@pytest.mark.parametrize("kind", TREES)
def test_every_image_is_the_one_its_label_belongs_to(kind: str, tmp_path: Path) -> None:
    tree = TREES[kind](tmp_path)
    dataset = load_dataset(tree.name, tmp_path)
    for split, wanted in ((dataset.train, tree.train), (dataset.test, tree.test)):
        # asked for out of order: what is asked for is what comes
        order = np.arange(len(wanted))[::-1]
        images = split.images(order)
        assert len(images) == len(wanted)
        for image, i in zip(images, order, strict=True):
            path = Path(wanted[i].path)
            assert image.dtype == np.uint8
            assert image.shape[0] == image.shape[1] + 1
            expected = colour_of(f"{path.parent.name}/{path.name}")
            # JPEG moves a flat colour by a level or two
            assert np.abs(image.reshape(-1, 3).astype(int) - expected).max() <= 3


def test_names_that_are_unlike_their_folders(tmp_path: Path) -> None:
    trees.sun397(tmp_path)
    trees.eurosat(tmp_path)
    assert load_dataset("sun397", tmp_path).classnames[1] == "outdoor apartment building"
    assert load_dataset("eurosat", tmp_path).classnames == (
        "Annual Crop Land", "Forest", "Sea or Lake",
    )  # fmt: skip


def test_a_doubled_imagenet_name_is_told_apart_by_its_synset(tmp_path: Path) -> None:
    tree = trees.imagenet(tmp_path)
    text = "n01440764 tench\nn04355933 missile\nn04356056 missile\n"
    (tree.folder / "classnames.txt").write_text(text)
    assert load_dataset("imagenet", tmp_path).classnames[1:] == ("sunglass", "missile")
    # a name that stands alone stays as it is
    (tree.folder / "classnames.txt").write_text(text.replace("33 missile", "33 shades"))
    assert load_dataset("imagenet", tmp_path).classnames[1:] == ("shades", "missile")
    (tree.folder / "classnames.txt").write_text(text.replace("tench", "missile"))
    with pytest.raises(Damaged, match=r"must be unique; got 'missile' for labels 0 and 2"):
        load_dataset("imagenet", tmp_path)


def test_domains_are_counted_in_the_published_order(tmp_path: Path) -> None:
    trees.office_caltech10(tmp_path)
    dataset = load_dataset("office_caltech10", tmp_path)
    assert dataset.domains == ("amazon", "caltech", "dslr", "webcam")
    assert np.bincount(dataset.train.domains).tolist() == [20] * 4
    assert np.bincount(dataset.test.labels).tolist() == [4] * 10
    shards = partition(
        "domain",
        *(dataset.train.labels, dataset.test.labels),
        *(dataset.train.domains, dataset.test.domains),
        classes=10, clients=4, seed=0,
    )  # fmt: skip
    for client, shard in enumerate(shards):
        place = {dataset.train.path(i).parts[-3] for i in shard.train}
        assert place == {dataset.domains[client]}


@pytest.mark.parametrize("python2", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("cifar10", "cifar10"), ("cifar10", "cifar-10"), ("cifar100", "cifar100"), ("cifar100", ".")],
)
def test_cifar_pixels_and_labels(name: str, folder: str, python2: bool, tmp_path: Path) -> None:
    pixels = trees.cifar(tmp_path, name, folder, python2=python2)
    dataset = load_dataset(name, tmp_path)
    assert dataset.classnames == ("airplane", "aquarium fish", "truck")
    assert len(dataset.test) == 4
    got = [*dataset.train.images(range(len(dataset.train))), *dataset.test.images([0, 1, 2, 3])]
    np.testing.assert_array_equal(np.stack(got), pixels)
    assert dataset.train.labels.tolist() == [2, 0, 1, 2] * (len(pixels) // 4 - 1)
    assert dataset.test.labels.tolist() == [2, 0, 1, 2]
    assert set(dataset.train.domains) == {0}
    assert dataset.train.fingerprint != dataset.test.fingerprint
    assert dataset.notes[0].startswith("the lists hold 3 classes")


def test_cifar_tells_the_statistics_of_the_released_codes(tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    trees.cifar(tmp_path, "cifar100", "cifar100")
    ten, hundred = (load_dataset(name, tmp_path).statistics for name in ("cifar10", "cifar100"))
    assert ten == Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert hundred == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def test_a_cifar_batch_as_python_2_wrote_it(tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    raw = np.random.default_rng(0).integers(0, 256, 2 * 3072, dtype=np.uint8).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    )
    batch = b"\x80\x02}(U\x04data" + array + struct.pack("<I", len(raw)) + raw + b"tb"
    batch += b"U\x06labels](K\x02K\x00eu."
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch").write_bytes(batch)
    test = load_dataset("cifar10", tmp_path).test
    assert test.labels.tolist() == [2, 0]
    expected = np.frombuffer(raw, np.uint8).reshape(2, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.stack(test.images([0, 1])), expected)


def test_the_better_filled_folder_is_taken(tmp_path: Path) -> None:
    tree = trees.caltech101(tmp_path, "caltech101")
    (tmp_path / "caltech-101").mkdir()
    assert len(load_dataset("caltech101", tmp_path).train) == len(tree.train)


def test_a_run_on_image_files(tmp_path: Path) -> None:
    trees.oxford_pets(tmp_path)
    result = fastfpl.run(
        "promptfl", dataset="oxford_pets", root=str(tmp_path), clients=3, rounds=1, local_epochs=1,
        n_ctx=2, threads=1, cache=tmp_path / "cache",
    )  # fmt: skip
    assert result.data["classes"] == ["abyssinian", "american bulldog", "yorkshire terrier"]
    assert result.data["train_images"] == [2, 2, 2]


def test_presets_name_known_sets() -> None:
    assert set(FACTS) == set(DATASETS) - {"digits", "glyphs"}
    for name in preset_names():
        assert load_preset(name).settings.get("dataset", "glyphs") in DATASETS


def test_restricted_sets_keep_what_is_known_of_them(tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    dataset = load_dataset("cifar10", tmp_path)
    half = restrict(dataset, base_novel(3)[0])
    assert half.classnames == ("airplane", "aquarium fish")
    assert (half.statistics, half.notes) == (dataset.statistics, dataset.notes)


# -- fingerprints ----------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint(tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path / "a")
    first = load_dataset("dtd", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.jpg"):
        os.utime(path, (1, 1))
    second = load_dataset("dtd", tmp_path / "b")
    assert second.train.fingerprint == first.train.fingerprint
    assert first.train.fingerprint != first.test.fingerprint
    assert tree.name in first.train.fingerprint


@pytest.mark.parametrize("change", ["size", "order", "label", "name"])
def test_the_fingerprint_follows_the_files_and_the_list(change: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    before = load_dataset("dtd", tmp_path).train.fingerprint
    rows = json.loads(tree.split.read_text())
    if change == "size":
        with (tmp_path / tree.train[0].path).open("ab") as file:
            file.write(b"\0")
    elif change == "order":
        rows["train"].reverse()
    elif change == "label":
        one, other = rows["train"][0], next(r for r in rows["train"] if r[1] != rows["train"][0][1])
        one[0], other[0] = other[0], one[0]
    else:
        old = tree.folder / "images" / rows["train"][0][0]
        rows["train"][0][0] = rows["train"][0][0].replace(".jpg", "x.jpg")
        old.rename(tree.folder / "images" / rows["train"][0][0])
    tree.split.write_text(json.dumps(rows))
    assert load_dataset("dtd", tmp_path).train.fingerprint != before
