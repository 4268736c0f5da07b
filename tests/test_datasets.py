"""Data sets in files: every format read as published, bad files refused, the command line."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import struct
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastfpl
from fastfpl.cli import main
from fastfpl.config import load_preset, preset_names
from fastfpl.data import DATASETS, Statistics, base_novel, load_dataset, partition, restrict
from fastfpl.data import cifar as cifar_module
from fastfpl.data.catalogue import FACTS
from fastfpl.data.check import check_files
from fastfpl.data.clip_sets import write_split
from fastfpl.data.listing import Listing, decode, shuffled
from fastfpl.data.pickles import load_plain
from fastfpl.errors import Damaged, FastfplError, InputError, Missing
from tests import trees
from tests.trees import TREES, Listed, Tree, colour_of

ROOT = Path(__file__).resolve().parent.parent
SPLIT = sorted(name for name, facts in FACTS.items() if facts.split)
MATLAB = {"flowers102", "stanford_cars"}


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


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


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


# -- splits that are drawn -------------------------------------------------------------------


def everything(tree: Tree) -> set[str]:
    assert tree.split is not None
    rows = json.loads(tree.split.read_text())
    inside = FACTS[tree.name].images
    base = tree.folder / inside if inside else tree.folder
    return {
        (base / path).relative_to(tree.root).as_posix()
        for part in ("train", "val", "test")
        for path, _, _ in rows[part]
    }


@pytest.mark.parametrize("name", SPLIT)
def test_without_its_split_a_set_is_cut_the_same_way_everywhere(
    name: str, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    tree = TREES[name](tmp_path / "a")
    complete(monkeypatch, tree)
    assert tree.split is not None
    known = {item.path: item.label for item in (*tree.train, *tree.test)}
    all_images = everything(tree)
    tree.split.unlink()
    files = sorted(path for path in tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING, "fastfpl"):
        dataset = load_dataset(name, tmp_path / "a")
    assert sorted(path for path in tmp_path.rglob("*")) == files, "something was written"
    assert any("a split drawn here with seed 0" in note for note in dataset.notes)
    assert "a split drawn here with seed 0" in caplog.text
    assert dataset.classnames == tree.classnames
    train, test = listed(dataset.train, tree.root), listed(dataset.test, tree.root)
    assert {item.path for item in train} | {item.path for item in test} < all_images
    assert not {item.path for item in train} & {item.path for item in test}
    # of four images 2 train and 1 test; of three of a training list 2
    assert Counter(item.label for item in train) == {0: 2, 1: 2, 2: 2}
    assert Counter(item.label for item in test) == {0: 1, 1: 1, 2: 1}
    for item in (*train, *test):
        assert known.get(item.path, item.label) == item.label
    if FACTS[name].drawn.startswith("80"):
        assert {item.path for item in test} == {item.path for item in tree.test}
    again = TREES[name](tmp_path / "b")
    assert again.split is not None
    again.split.unlink()
    assert load_dataset(name, tmp_path / "b").train.fingerprint == dataset.train.fingerprint


@pytest.mark.parametrize("name", SPLIT)
def test_a_drawn_split_can_be_written_and_says_so(name: str, tmp_path: Path, capsys) -> None:
    tree = TREES[name](tmp_path)
    assert tree.split is not None
    whole = everything(tree)
    tree.split.unlink()
    drawn = load_dataset(name, tmp_path)
    code, out, _ = cli(capsys, "data", "split", name, "--root", str(tmp_path))
    assert (code, out.strip()) == (0, str(tree.split))
    assert everything(tree) == whole
    read = load_dataset(name, tmp_path)
    assert read.notes == drawn.notes
    assert read.classnames == drawn.classnames
    assert read.train.fingerprint == drawn.train.fingerprint
    assert read.test.fingerprint == drawn.test.fingerprint
    code, _, err = cli(capsys, "data", "split", name, "--root", str(tmp_path))
    assert code == 2
    assert "the split must not be there yet" in err


def test_a_set_without_such_a_split_has_none_to_write(tmp_path: Path) -> None:
    trees.imagenet(tmp_path)
    with pytest.raises(InputError, match=r"name must be one of caltech101, .*; got 'imagenet'"):
        write_split("imagenet", tmp_path)


def test_office_without_pickles_is_cut_by_folder(tmp_path: Path) -> None:
    tree = trees.office_caltech10(tmp_path)
    for path in tree.folder.glob("*.pkl"):
        path.unlink()
    for place in ("amazon", "webcam"):
        for number in (4, 5):
            trees.paint(tree.folder / place / "mug" / f"{number}.jpg")
    dataset = load_dataset("office_caltech10", tmp_path)
    assert dataset.classnames == tree.classnames
    assert "80 % train and 20 % test" in dataset.notes[0]
    train, test = listed(dataset.train, tmp_path), listed(dataset.test, tmp_path)
    assert len({item.path for item in (*train, *test)}) == 4 * 10 * 3 + 4
    for item in (*train, *test):
        place, called = Path(item.path).parts[-3:-1]
        assert dataset.domains[item.domain] == place
        assert dataset.classnames[item.label] == called.replace("_", " ")
    # a fifth of three is one, a fifth of five is one
    assert set(Counter((i.label, i.domain) for i in test).values()) == {1}
    # a part of the pickles is not taken for none of them
    (tree.folder / "dslr_test.pkl").write_bytes(b"")
    with pytest.raises(Missing, match=r"amazon_train\.pkl must be there; got nothing: get it from"):
        load_dataset("office_caltech10", tmp_path)


@given(st.sets(st.text(min_size=1), min_size=1, max_size=30), st.text(min_size=1))
def test_one_more_image_moves_no_other(paths: set[str], more: str) -> None:
    order = shuffled(paths)
    assert sorted(order) == sorted(paths)
    assert [path for path in shuffled(paths | {more}) if path != more] == [
        path for path in order if path != more
    ]


def test_the_order_of_a_draw_is_mixed() -> None:
    paths = [f"{n:03d}" for n in range(200)]
    order = [int(path) for path in shuffled(paths)]
    assert order != sorted(order)
    # a permutation without a trend: the first half holds about half of the small numbers
    assert 35 <= sum(n < 100 for n in order[:100]) <= 65


def test_shares_of_a_drawn_split(tmp_path: Path) -> None:
    for number in range(10):
        trees.paint(tmp_path / "dtd" / "images" / "banded" / f"{number}.jpg")
    split = write_split("dtd", tmp_path)
    rows = json.loads(split.read_text())
    assert [len(rows[part]) for part in ("train", "val", "test")] == [5, 2, 3]
    pets = trees.oxford_pets(tmp_path)
    assert pets.split is not None
    pets.split.unlink()
    text = "".join(f"Abyssinian_{n} 1 1 1\n" for n in range(1, 11))
    (pets.folder / "annotations" / "trainval.txt").write_text(text)
    rows = json.loads(write_split("oxford_pets", tmp_path).read_text())
    assert [len(rows[part]) for part in ("train", "val", "test")] == [8, 2, 3]


def test_a_class_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    for number in (2, 3, 4):
        (tree.folder / "images" / "dotted" / f"dotted_000{number}.jpg").unlink()
    with pytest.raises(Damaged, match=r"at least 2 images to be split; got 1 of 'dotted'"):
        load_dataset("dtd", tmp_path)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_folder_that_is_not_there_says_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(Missing, match=f"fastfpl.data.{name}: root must be a folder; got"):
        load_dataset(name, tmp_path / "nowhere")
    with pytest.raises(Missing) as caught:
        load_dataset(name, tmp_path)
    assert f"root must hold {FACTS[name].folders[0]}" in str(caught.value)
    for need in FACTS[name].needs:
        assert need.source.split()[0].rstrip(",") in str(caught.value)
    assert f"fastfpl data check {name} lists its files" in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(FACTS) - set(SPLIT) - {"office_caltech10"}))
def test_each_needed_file_is_missed(name: str, tmp_path: Path) -> None:
    if name.startswith("cifar"):
        trees.cifar(tmp_path, name, name)
        folder = tmp_path / name
    else:
        folder = TREES[name](tmp_path).folder
    for need in FACTS[name].needs:
        (folder / need.path).rename(tmp_path / "aside")
        with pytest.raises(Missing) as caught:
            load_dataset(name, tmp_path)
        assert str(folder / need.path) in str(caught.value)
        assert need.source in str(caught.value)
        (tmp_path / "aside").rename(folder / need.path)


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_that_can_neither_be_read_nor_drawn(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    lacking = (FACTS[name].needs[0], *FACTS[name].stand_in)[-1]
    (tree.folder / lacking.path).rename(tmp_path / "aside")
    with pytest.raises(Missing) as caught:
        load_dataset(name, tmp_path)
    assert f"{tree.split} must be there, or {lacking.path} to draw" in str(caught.value)


def test_the_set_s_own_folder_as_root_is_recognised(tmp_path: Path) -> None:
    tree = trees.food101(tmp_path)
    with pytest.raises(Missing, match=f"name its parent, {tmp_path}, or get the set"):
        load_dataset("food101", tree.folder)


@pytest.mark.parametrize("kind", [k for k in TREES if " " not in k])
def test_missing_images_are_counted(kind: str, tmp_path: Path) -> None:
    tree = TREES[kind](tmp_path)
    if kind == "imagenet":  # lists its folders: what is not there is not listed
        return
    (tmp_path / tree.train[1].path).unlink()
    (tmp_path / tree.test[-1].path).unlink()
    n, m = len(tree.train), len(tree.test)
    with pytest.raises(Missing) as caught:
        load_dataset(tree.name, tmp_path)
    text = str(caught.value)
    assert f"got {n - 1} of {n} train and {m - 1} of {m} test images" in text
    assert tree.train[1].path in text
    (place,) = {
        n.source for n in FACTS[kind].needs if f"/{n.path}/" in f"/{tree.train[1].path}"
    } or {FACTS[kind].needs[0].source}
    assert text.endswith(f"get {place}")


def test_an_image_that_goes_away_later_is_named(tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    dataset = load_dataset("dtd", tmp_path)
    (tmp_path / tree.train[1].path).unlink()
    dataset.train.images([0, 2])
    with pytest.raises(Missing, match=rf"{tree.train[1].path} must stay readable .* FileNotFound"):
        dataset.train.images([0, 1])


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda r: r["train"][0].__setitem__(1, -1), r"must lie in \[0, 47\); got label -1"),
        (lambda r: r["test"][0].__setitem__(1, 47), r"must lie in \[0, 47\); got label 47"),
        (
            lambda r: r["train"][0].__setitem__(1, 5),
            "every class from 0 to 5; got none for label 3",
        ),
        (lambda r: r["train"][0].__setitem__(1, True), r"must be \[path, label, class name\]; got"),
        (lambda r: r["train"][0].__setitem__(1, "1"), r"must be \[path, label, class name\]; got"),
        (
            lambda r: r["val"].append(["a.jpg", 1]),
            r"must be \[path, label, class name\]; got .* val",
        ),
        (lambda r: r["train"][0].__setitem__(2, "knitted"), "a label one class name; got"),
        (lambda r: r.pop("val"), "must hold a list 'val'; got none"),
        (lambda r: r.update(train=[]), "the train list must hold an image; got none"),
        (lambda r: r.update(test={}), "must hold a list 'test'"),
        (lambda r: r["train"][0].__setitem__(0, "/etc/x.jpg"), "below the images' folder; got '/e"),
        (lambda r: r["train"][0].__setitem__(0, "a/../../x.jpg"), "below the images' folder; got"),
        (lambda r: r["test"][0].__setitem__(0, ""), "below the images' folder; got ''"),
    ],
)
def test_a_split_that_is_not_as_published_is_refused(edit, sentence: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    rows = json.loads(tree.split.read_text())
    edit(rows)
    tree.split.write_text(json.dumps(rows))
    with pytest.raises(Damaged, match=sentence) as caught:
        load_dataset("dtd", tmp_path)
    assert str(caught.value).startswith("fastfpl.data.dtd: ")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"train": 1}', "\0", "[" * 100_000])
def test_a_split_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.write_text(text)
    with pytest.raises(Damaged, match=r"split_zhou_DescribableTextures\.json must"):
        load_dataset("dtd", tmp_path)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.write_text(tree.split.read_text().replace('"dotted"', '"banded_"'))
    with pytest.raises(Damaged, match=r"must be unique; got 'banded' for labels 0 and 1"):
        load_dataset("dtd", tmp_path)


def test_an_image_in_both_lists_is_noted(tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    rows = json.loads(tree.split.read_text())
    rows["test"].append(rows["train"][0])
    tree.split.write_text(json.dumps(rows))
    notes = load_dataset("dtd", tmp_path).notes
    assert "1 images stand in the train list and in the test list" in notes


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "sentence"),
    [
        ("oxford_pets", "annotations/test.txt", "4 1 1 4", "4 38 1 4", "[0, 37); got label 37"),
        ("oxford_pets", "annotations/test.txt", "4 1 1 4", "4 1 1", "line 1 of"),
        ("oxford_pets", "annotations/test.txt", "4 1 1 4", "4 2 1 4", "class 2 'american_bulldog'"),
        ("oxford_pets", "annotations/trainval.txt", "1 1 1 1", "1 x 1 1", "line 1 of"),
        ("flowers102", "cat_to_name.json", '"1"', '"9"', "got none for label 0"),
        ("flowers102", "cat_to_name.json", '"1"', '"x"', "must map class numbers to names"),
        ("flowers102", "cat_to_name.json", '"3"', '"103"', "[0, 102); got label 102"),
        ("sun397", "ClassName.txt", "/z/zen_garden", "/z/zen", "line 7 of"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "3 YoYo", "YoYo", "line 3 of"),
        ("ucf101", "ucfTrainTestlist/testlist01.txt", ".avi", ".mp4", "line 1 of"),
    ],
)  # fmt: skip
def test_lists_that_splits_are_drawn_from_are_checked(
    name: str, file: str, old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    tree = TREES[name](tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    path = tree.folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(Damaged) as caught:
        load_dataset(name, tmp_path)
    assert sentence in str(caught.value)
    assert str(tree.folder) in str(caught.value)


@pytest.mark.parametrize("bad", [0, 4, 1.5])
def test_labels_of_a_matlab_file_are_checked(bad: float, tmp_path: Path) -> None:
    from scipy.io import savemat

    tree = trees.flowers102(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    savemat(tree.folder / "imagelabels.mat", {"labels": np.array([[1, 2, bad, 3]])})
    with pytest.raises(Damaged, match=rf"must lie in \[1, 3\]; got {bad}.* for image 3"):
        load_dataset("flowers102", tmp_path)
    savemat(tree.folder / "imagelabels.mat", {"other": np.array([[1]])})
    with pytest.raises(Damaged, match="must be a MATLAB file with 'labels'; got KeyError"):
        load_dataset("flowers102", tmp_path)
    (tree.folder / "imagelabels.mat").write_bytes(b"MATLAB 5.0" + bytes(200))
    with pytest.raises(Damaged, match="must be a MATLAB file with 'labels'"):
        load_dataset("flowers102", tmp_path)


def test_labels_that_matlab_saved_as_doubles_are_read(tmp_path: Path) -> None:
    from scipy.io import savemat

    tree = trees.flowers102(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    before = load_dataset("flowers102", tmp_path).train.fingerprint
    labels = np.array([[1.0 + n % 3 for n in range(12)]])
    savemat(tree.folder / "imagelabels.mat", {"labels": labels})
    assert load_dataset("flowers102", tmp_path).train.fingerprint == before


@pytest.mark.parametrize(("number", "label"), [(0, -1), (4, 3)])
def test_classes_of_cars_are_checked(number: int, label: int, tmp_path: Path) -> None:
    from scipy.io import savemat

    tree = trees.stanford_cars(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    path = tree.folder / "cars_test_annos_withlabels.mat"
    kind = [("class", object), ("fname", object)]
    savemat(path, {"annotations": np.array([[(number, "00001.jpg")]], dtype=kind)})
    with pytest.raises(Damaged, match=rf"test list must lie in \[0, 3\); got {label} for cars_te"):
        load_dataset("stanford_cars", tmp_path)
    savemat(path, {"annotations": np.array([[("x", "00001.jpg")]], dtype=kind)})
    with pytest.raises(Damaged, match="must hold fname and class; got ValueError"):
        load_dataset("stanford_cars", tmp_path)
    savemat(path, {"annotations": np.array([[1, 2]])})
    with pytest.raises(Damaged, match="must hold fname and class; got"):
        load_dataset("stanford_cars", tmp_path)


@pytest.mark.parametrize("name", sorted(MATLAB))
def test_missing_scipy_names_the_cure(name: str, tmp_path: Path, monkeypatch) -> None:
    tree = TREES[name](tmp_path)
    assert tree.split is not None
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    load_dataset(name, tmp_path)  # the published split needs none
    tree.split.unlink()
    with pytest.raises(Missing, match=r'pip install "fastfpl\[mat\]", or get split_zhou_'):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("images_variant_train.txt", "707-320", "707-321", "line "),
        ("images_variant_test.txt", "F-16A/B Block 20", "F-16A/B", "an image and a variant"),
        ("variants.txt", "A300B4", "707-320", "must be unique; got '707-320'"),
    ],
)
def test_aircraft_of_no_variant_are_refused(
    file: str, old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    tree = trees.fgvc_aircraft(tmp_path)
    text = (tree.folder / file).read_text()
    assert old in text
    (tree.folder / file).write_text(text.replace(old, new))
    with pytest.raises(Damaged, match=sentence):
        load_dataset("fgvc_aircraft", tmp_path)


def test_imagenet_folders_and_names_must_agree(tmp_path: Path) -> None:
    tree = trees.imagenet(tmp_path)
    (tree.folder / "images" / "val" / "n09999999").mkdir()
    with pytest.raises(Damaged, match=r"must be classes of .*train; got n09999999"):
        load_dataset("imagenet", tmp_path)
    (tree.folder / "images" / "val" / "n09999999").rmdir()
    (tree.folder / "images" / "train" / "n09999999").mkdir()
    with pytest.raises(Damaged, match=r"must name every folder of .*; got none for n09999999"):
        load_dataset("imagenet", tmp_path)
    (tree.folder / "images" / "train" / "n09999999").rmdir()
    (tree.folder / "classnames.txt").write_text("n01440764\n")
    with pytest.raises(Damaged, match=r"line 1 of .* must hold a folder and a class name; got"):
        load_dataset("imagenet", tmp_path)
    shutil.rmtree(tree.folder / "images" / "val")
    (tree.folder / "images" / "val").mkdir()
    (tree.folder / "classnames.txt").write_text("n01440764 a\nn04355933 b\nn04356056 c\n")
    trees.paint(tree.folder / "images" / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(Damaged, match="val must hold one folder a class; got none"):
        load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sketch/t-shirt/a.jpg", "line 1 of"),
        ("sketch/t-shirt/a.jpg two", "sketch/class/image and a label"),
        ("real/t-shirt/a.jpg 2", "sketch/class/image and a label"),
        ("sketch/a.jpg 2", "sketch/class/image and a label"),
        ("sketch/dog/a.jpg 2", "an image of class 't-shirt' for label 2"),
        ("sketch/dog/a.jpg 345", r"\[0, 345\); got label 345"),
        ("sketch/dog/a.jpg 4", "got none for label 3"),
    ],
)
def test_domainnet_lists_are_checked(line: str, sentence: str, tmp_path: Path) -> None:
    tree = trees.domainnet345(tmp_path)
    (tree.folder / "splits" / "sketch_test.txt").write_text(line + "\n")
    with pytest.raises(Damaged, match=sentence):
        load_dataset("domainnet345", tmp_path)


def test_capitals_may_differ_between_domains(tmp_path: Path) -> None:
    tree = trees.domainnet345(tmp_path)
    path = tree.folder / "splits" / "real_test.txt"
    path.write_text(path.read_text().replace("The_Eiffel", "the_eiffel"))
    old = tree.folder / "real" / "The_Eiffel_Tower"
    shutil.copytree(old, tree.folder / "real" / "the_eiffel_Tower", dirs_exist_ok=True)
    assert load_dataset("domainnet345", tmp_path).classnames[1] == "The Eiffel Tower"


# -- files and trees that are not as they should be ------------------------------------------


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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"train": [], "train": [], "val": [], "test": []}', "got the key 'train' twice"),
        (b'{"train": [["a.jpg", ' + b"9" * 5000 + b', "a"]], "val": [], "test": []}', ""),
        (b'{"train": [["a.jpg", ' + b"9" * 4000 + b', "a"]], "val": [], "test": []}', "label 999"),
        (b'{"a": ' * 20_000, "must be JSON; got"),
        (b'{"train": [' + b"[" * 600 + b"]" * 600 + b'], "val": [], "test": []}', "[path, label, "),
        (b'{"train": ["' + b"x" * 100_000 + b'"], "val": [], "test": []}', "[path, label, "),
        (b'{"train": [], "val": "\xff", "test": []}', "must be text in UTF-8; got 'utf-8' codec"),
        (b'{"train": [["a.jpg", false, "a"]], "val": [], "test": []}', "got ['a.jpg', False, 'a']"),
        (b'{"train": [["a.jpg", 0.0, "a"]], "val": [], "test": []}', "got ['a.jpg', 0.0, 'a']"),
        (b'{"train": [["a.jpg", NaN, "a"]], "val": [], "test": []}', "[path, label, "),
    ],
)  # fmt: skip
def test_hostile_splits_end_in_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.write_bytes(content)
    assert sentence in refused("dtd", tmp_path)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("a\0.jpg", "a control character, U+0000"),
        ("a\x1b[31m.jpg", "a control character, U+001B"),
        ("a\n.jpg", "a control character, U+000A"),
        ("a\ud800.jpg", "half of a character, U+D800"),
        ("a\u202e.jpg", "an invisible character, U+202E"),
        ("a\u2028.jpg", "a line separator, U+2028"),
    ],
)
def test_paths_that_cannot_be_shown_are_refused(path: str, why: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    rows = rows_of(tree)
    rows["train"][3][0] = path
    assert tree.split is not None
    tree.split.write_text(json.dumps(rows))
    assert f"got {path!a} with {why}, entry 3" in refused("dtd", tmp_path)


@pytest.mark.parametrize("name", ["a\x1b[31m.jpg", "a\u202e.jpg", "a\\b.jpg", "a\udcff.jpg"])
def test_files_whose_names_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    (tree.folder / "images" / "banded" / "banded_0001.jpg").rename(
        tree.folder / "images" / "banded" / name
    )
    assert "give the file another name" in refused("dtd", tmp_path)
    with pytest.raises(Damaged, match="give the file another name"):
        write_split("dtd", tmp_path)
    assert not tree.split.exists()


@pytest.mark.parametrize("about", [3, ["x"], "a\x1b]0;b\x07", "a\nb"])
def test_what_a_split_says_of_itself_is_a_line(about: object, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    assert tree.split is not None
    tree.split.write_text(json.dumps({**rows_of(tree), "about": about}))
    assert "'about' of" in refused("dtd", tmp_path)
    tree.split.write_text(json.dumps({**rows_of(tree), "about": "mine " * 1000}))
    (note,) = (n for n in load_dataset("dtd", tmp_path).notes if n.startswith("mine"))
    assert len(note) < 500


@pytest.mark.parametrize("how", ["folder", "pipe", "link to nothing", "loop"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dtd", "split_zhou_DescribableTextures.json"),
        ("domainnet345", "splits/real_test.txt"),
        ("domainnet10", "real_test.pkl"),
        ("cifar10", "cifar-10-batches-py/data_batch_2"),
        ("fgvc_aircraft", "variants.txt"),
        ("imagenet", "classnames.txt"),
    ],
)
def test_what_is_no_file_is_not_read(name: str, file: str, how: str, tmp_path: Path) -> None:
    if name == "cifar10":
        trees.cifar(tmp_path, name, name)
    else:
        TREES[name](tmp_path)
    (path,) = tmp_path.glob(f"*/{file}")
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nothing" if how.endswith("nothing") else path.name)
    text = refused(name, tmp_path)
    assert path.name in text
    kinds = {"folder": "a folder", "pipe": "a named pipe", "loop": "levels of symbolic links"}
    assert kinds.get(how, how) in text


@pytest.mark.parametrize("how", ["folder", "pipe", "link to nothing"])
def test_what_is_no_image_file_is_counted_as_missing(how: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    path = tmp_path / tree.train[1].path
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nothing")
    text = refused("dtd", tmp_path)
    assert (
        f"got 5 of 6 train and 3 of 3 test images, the first that is missing is {path} (a " in text
    )


@pytest.mark.parametrize("name", ["eurosat", "caltech101", "dtd", "food101", "imagenet"])
def test_what_systems_leave_behind_is_no_class(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path)
    places = [tree.folder / FACTS[name].images]
    if tree.split is not None:
        tree.split.unlink()
    else:
        places = [places[0] / part for part in ("train", "val")]
    before = load_dataset(name, tmp_path)
    for place in places:
        a_class = next(path for path in sorted(place.iterdir()) if path.is_dir())
        for left in ("__MACOSX", ".DS_Store", ".ipynb_checkpoints", "@eaDir", "Thumbs.db"):
            trees.paint(place / left / "image_0009.jpg")
            trees.paint(a_class / left / "image_0009.jpg")
        for left in ("._image_0001.jpg", ".DS_Store", ".hidden.png"):
            (a_class / left).unlink() if (a_class / left).is_file() else None
            if not (a_class / left).exists():
                (a_class / left).write_bytes(b"\0\5\x16\7")
        (place / "desktop.ini").write_text("[x]")
        (a_class / "folder.jpg").mkdir()
    after = load_dataset(name, tmp_path)
    assert after.classnames == before.classnames
    assert after.train.fingerprint == before.train.fingerprint
    assert after.test.fingerprint == before.test.fingerprint


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("nowhere", "got clouds (a link to nothing): mend or remove it"),
        ("clouds", "got clouds (Too many levels of symbolic links)"),
        (".", "got clouds (a link to a folder around it)"),
        ("../..", "got clouds (a link to a folder around it)"),
    ],
)
def test_links_of_a_tree_lead_to_classes(target: str, sentence: str, tmp_path: Path) -> None:
    tree = trees.eurosat(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    images = tree.folder / "2750"
    (images / "clouds").symlink_to(target)
    assert sentence in refused("eurosat", tmp_path)
    (images / "clouds").unlink()
    (images / "Forest").rename(tmp_path / "elsewhere")
    (images / "Forest").symlink_to(tmp_path / "elsewhere")
    assert load_dataset("eurosat", tmp_path).classnames == tree.classnames


def test_a_folder_that_is_a_file_ends_in_a_sentence(tmp_path: Path) -> None:
    tree = trees.eurosat(tmp_path)
    assert tree.split is not None
    tree.split.unlink()
    shutil.rmtree(tree.folder / "2750")
    (tree.folder / "2750").write_text("x")
    assert "must be a folder that can be listed; got Not a directory" in refused(
        "eurosat", tmp_path
    )


@pytest.mark.parametrize("kind", ["dtd", "sun397", "ucf101", "domainnet345", "domainnet10"])
def test_lists_that_windows_wrote_are_read(kind: str, tmp_path: Path) -> None:
    tree = TREES[kind](tmp_path)
    before = load_dataset(tree.name, tmp_path)
    if tree.split is not None and kind == "dtd":
        rows = rows_of(tree)
        for row in (row for part in rows.values() for row in part):
            row[0] = str(row[0]).replace("/", "\\")
        tree.split.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    elif kind == "domainnet10":
        for path in tree.folder.glob("*.pkl"):
            images, names = pickle.loads(path.read_bytes())
            images = np.array([image.replace("/", "\\") for image in images])
            path.write_bytes(pickle.dumps((images, names)))
    else:
        if tree.split is not None:
            tree.split.unlink()
            before = load_dataset(tree.name, tmp_path)
        for path in tree.folder.rglob("*.txt"):
            text = path.read_text().replace("/", "\\").replace("\n", "\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    after = load_dataset(tree.name, tmp_path)
    assert listed(after.train, tmp_path) == listed(before.train, tmp_path)
    assert after.test.fingerprint == before.test.fingerprint


@pytest.mark.parametrize("path", ["C:\\data\\a.jpg", "a\\..\\..\\a.jpg", "\\\\host\\a.jpg"])
def test_windows_paths_that_leave_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    tree = trees.dtd(tmp_path)
    rows = rows_of(tree)
    rows["test"][0][0] = path
    assert tree.split is not None
    tree.split.write_text(json.dumps(rows))
    assert "must lead to files below the images' folder" in refused("dtd", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("oxford_pets", "annotations/test.txt", "4 1 1 4", f"4 {'9' * 5000} 1 4"),
        ("flowers102", "cat_to_name.json", '"1"', f'"{"9" * 5000}"'),
        ("flowers102", "cat_to_name.json", '"2"', '"1"'),
        ("flowers102", "cat_to_name.json", '"2"', '"01"'),
        ("flowers102", "cat_to_name.json", '"pink primrose"', "7"),
        ("flowers102", "cat_to_name.json", "{", "[" * 20_000),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "3 YoYo", f"{'9' * 5000} YoYo"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "3 YoYo", "3 BabyCrawling"),
        ("domainnet345", "splits/real_test.txt", " 2\n", f" {'9' * 5000}\n"),
        ("domainnet345", "splits/real_test.txt", " 2\n", " -2\n"),
        ("domainnet345", "splits/real_test.txt", "real/", "real/\x1b[2J"),
        ("fgvc_aircraft", "images_variant_test.txt", "10", "\x1b10"),
        ("imagenet", "classnames.txt", "n04356056 ", "n04355933 "),
    ],
)
def test_hostile_lists_end_in_a_sentence(
    name: str, file: str, old: str, new: str, tmp_path: Path
) -> None:
    tree = TREES[name](tmp_path)
    if tree.split is not None:
        tree.split.unlink()
    text = (tree.folder / file).read_text()
    assert old in text
    (tree.folder / file).write_text(text.replace(old, new, 1))
    refused(name, tmp_path)


def test_an_empty_path_in_a_pickle_is_refused(tmp_path: Path) -> None:
    tree = trees.domainnet10(tmp_path)
    pair = (np.array(["", "DomainNet/real/a.jpg"]), np.array(["bird", "bird"]))
    (tree.folder / "real_test.pkl").write_bytes(pickle.dumps(pair))
    assert "must lead to files below the images' folder; got ''" in refused("domainnet10", tmp_path)


# -- images ----------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[: len(content) // 2], "text": b"<html>not found</html>"}[how]
    )


@pytest.mark.parametrize("how", ["empty", "cut", "text"])
def test_a_corrupt_image_is_refused_with_its_path_and_a_cure(how: str, tmp_path: Path) -> None:
    tree = trees.food101(tmp_path)
    bad = tmp_path / tree.train[2].path
    spoil(bad, how)
    dataset = load_dataset("food101", tmp_path)
    dataset.train.images([0, 1, 3])
    with pytest.raises(Damaged) as caught:
        dataset.train.images([2])
    text = str(caught.value)
    assert text.startswith(f"fastfpl.data.food101: {bad} must be an image; got ")
    assert text.endswith('or load with on_corrupt="skip" (--on-corrupt skip)')
    assert "food-101" in text


@pytest.mark.parametrize("name", ["domainnet345", "domainnet10", "office_caltech10", "imagenet"])
def test_the_cure_of_a_broken_image_names_its_own_archive(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path)
    train = load_dataset(name, tmp_path).train
    for number, item in enumerate(tree.train):
        spoil(tmp_path / item.path, "empty")
        with pytest.raises(Damaged) as caught:
            train.images([number])
        (source,) = {n.source for n in FACTS[name].needs if f"/{n.path}/" in f"/{item.path}"}
        assert f"put it back from {source}, or load" in str(caught.value)
    gone = tree.test[-1].path
    (tmp_path / gone).unlink()
    if name != "imagenet":  # lists its folders
        (source,) = {n.source for n in FACTS[name].needs if f"/{n.path}/" in f"/{gone}"}
        assert refused(name, tmp_path).endswith(f"{tmp_path / gone}: get {source}")


def test_a_domain_of_office_without_a_class_names_its_archive(tmp_path: Path) -> None:
    tree = trees.office_caltech10(tmp_path)
    for path in tree.folder.glob("*.pkl"):
        path.unlink()
    shutil.rmtree(tree.folder / "dslr" / "mug")
    text = refused("office_caltech10", tmp_path)
    assert "dslr/mug must be there; got nothing: get it from https://github.com/med-air" in text


def test_an_image_of_too_many_pixels_is_not_called_damaged(tmp_path: Path) -> None:
    tree = trees.food101(tmp_path)
    path = tmp_path / tree.train[2].path
    Image.new("1", (20_000, 10_000)).save(path, "PNG")
    dataset = load_dataset("food101", tmp_path)
    with pytest.raises(InputError) as caught:
        dataset.train.images([2])
    assert str(caught.value) == (
        f"fastfpl.data.food101: {path} must be an image of few enough pixels; got an image that is "
        "whole but too large, 200000000 pixels where at most 178956970 are decoded: make it "
        'smaller, or load with on_corrupt="skip" (--on-corrupt skip)'
    )
    assert load_dataset("food101", tmp_path, on_corrupt="skip").skipped == 1
    (problem,) = (p for p in check_files("food101", tmp_path, decode=True).problems if "jpg" in p)
    assert "whole but too large" in problem


def test_corrupt_images_are_left_out_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = trees.food101(tmp_path)
    for item, how in ((tree.train[2], "cut"), (tree.train[4], "empty"), (tree.test[0], "text")):
        spoil(tmp_path / item.path, how)
    plain = load_dataset("food101", tmp_path)
    assert (plain.skipped, len(plain.train)) == (0, 6)
    with caplog.at_level(logging.WARNING, "fastfpl"):
        dataset = load_dataset("food101", tmp_path, on_corrupt="skip")
    assert dataset.skipped == 3
    assert "3 image files did not decode and were left out" in dataset.notes
    assert listed(dataset.train, tmp_path) == [tree.train[i] for i in (0, 1, 3, 5)]
    assert listed(dataset.test, tmp_path) == tree.test[1:]
    assert len(dataset.train.images(range(4))) == 4
    assert dataset.train.fingerprint != plain.train.fingerprint
    assert tree.test[0].path in caplog.text
    assert "3 image files did not decode and were left out" in caplog.text
    assert dataset.classnames == plain.classnames


def test_a_whole_set_is_not_changed_by_skipping(tmp_path: Path) -> None:
    trees.food101(tmp_path)
    plain = load_dataset("food101", tmp_path)
    skimmed = load_dataset("food101", tmp_path, on_corrupt="skip")
    assert (skimmed.skipped, skimmed.notes) == (0, plain.notes)
    assert skimmed.train.fingerprint == plain.train.fingerprint


def test_a_list_without_any_image_left_is_refused(tmp_path: Path) -> None:
    tree = trees.food101(tmp_path)
    for item in tree.test:
        spoil(tmp_path / item.path, "cut")
    with pytest.raises(Damaged, match="an image must decode; got none of 3"):
        load_dataset("food101", tmp_path, on_corrupt="skip")


def test_a_missing_image_is_no_corrupt_one(tmp_path: Path) -> None:
    tree = trees.food101(tmp_path)
    (tmp_path / tree.train[0].path).unlink()
    with pytest.raises(Missing, match="got 5 of 6 train and 3 of 3 test images"):
        load_dataset("food101", tmp_path, on_corrupt="skip")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_skipping_is_refused_where_there_are_no_image_files(name: str, tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    root = tmp_path if name == "cifar10" else None
    with pytest.raises(InputError, match=f'on_corrupt must be "refuse" for {name!r}'):
        load_dataset(name, root, on_corrupt="skip")
    with pytest.raises(InputError, match=r"on_corrupt must be .* got 'ignore'"):
        load_dataset(name, root, on_corrupt="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    colour = (200, 40, 90)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    Image.new("RGB", (5, 3), colour).convert(mode).save(tmp_path / "x", kind, quality=100)
    got = decode(tmp_path / "x")
    assert (got.dtype, got.shape) == (np.uint8, (3, 5, 3))
    if mode in ("1", "L", "LA"):
        assert (got == got[..., :1]).all()
    else:
        # palettes are coarse
        assert np.abs(got.astype(int) - colour).max() <= (60 if mode == "P" else 3)


def test_a_transparent_palette_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)
    image.save(tmp_path / "x.png", transparency=bytes([0, 255, 0, 128]))
    assert np.abs(decode(tmp_path / "x.png").astype(int) - (10, 200, 30)).max() <= 8


def test_grey_of_16_bits_is_brought_to_8(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 129, 257], [32_896, 40_000, 65_406, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    pixels = decode(tmp_path / "x.png")
    assert pixels.dtype == np.uint8
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [128, 156, 254, 255]]
    assert (pixels == pixels[..., :1]).all()
    assert pixels.shape == (2, 4, 3)
    tree = trees.food101(tmp_path)
    shutil.copy(tmp_path / "x.png", tmp_path / tree.train[2].path)
    dataset = load_dataset("food101", tmp_path, on_corrupt="skip")
    assert dataset.skipped == 0
    assert np.array_equal(dataset.train.images([2])[0], pixels)


@pytest.mark.parametrize(
    ("deep", "said"),
    [
        (np.full((3, 3), 0.5, dtype=np.float32), r"floats \(mode F\)"),
        (np.full((3, 3), 70_000, dtype=np.int32), "values from 0 to 70000"),
        (np.full((3, 3), -1, dtype=np.int32), "values from -1 to 0"),
    ],
)
def test_pixels_deeper_than_16_bits_are_refused(
    tmp_path: Path, deep: np.ndarray, said: str
) -> None:
    Image.fromarray(deep).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=said):
        decode(tmp_path / "x.tiff")
    # whole as it is, it need not be put back from anywhere
    tree = trees.food101(tmp_path)
    shutil.copy(tmp_path / "x.tiff", tmp_path / tree.train[2].path)
    with pytest.raises(InputError, match=rf"of 8 or 16 bits; got {said}: convert it, or load"):
        load_dataset("food101", tmp_path).train.images([2])
    assert load_dataset("food101", tmp_path, on_corrupt="skip").skipped == 1


def test_postscript_is_not_handed_to_another_program(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n")
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        decode(tmp_path / "x.jpg")


@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"]), st.data())
def test_broken_bytes_decode_or_are_refused_with_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.mktemp("x") / "x.jpg"
    path.write_bytes(content)
    refused, image = "", np.zeros((1, 1, 3), dtype=np.uint8)
    try:
        image = decode(path)
    except ValueError as error:
        refused = str(error)
    assert bool(content) or refused
    assert "\n" not in refused
    assert image.dtype == np.uint8
    assert image.shape[2:] == (3,)


def test_images_are_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    import torch

    tree = trees.domainnet345(tmp_path)
    train = load_dataset("domainnet345", tmp_path).train
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = train.images(range(len(tree.train)))
        torch.set_num_threads(4)
        four = train.images(range(len(tree.train)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(a, b)


# -- pickles ---------------------------------------------------------------------------------


class Touch:
    """Asks to make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["domainnet10", "office_caltech10", "cifar10", "cifar100"])
def test_a_pickle_that_runs_a_command_is_refused_unrun(
    name: str, protocol: int, tmp_path: Path
) -> None:
    trap = Touch(tmp_path / "trap")
    if name.startswith("cifar"):
        trees.cifar(tmp_path, name, name)
        file = "test_batch" if name == "cifar10" else "meta"
        (path,) = tmp_path.rglob(file)
        content: object = {b"data": trap, b"labels": [0]}
    else:
        path = TREES[name](tmp_path).folder / f"{FACTS[name].domains[1]}_test.pkl"
        content = (np.array(["a"]), np.array([trap], dtype=object))
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(Damaged, match=r"got UnpicklingError: it names (posix|nt)\.system"):
        load_dataset(name, tmp_path)
    assert not (tmp_path / "trap").exists()
    # the trap is a real one
    pickle.loads(path.read_bytes())
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"cbuiltins\neval\n(V1+1\ntR.", "it names builtins.eval"),
        (b"cnumpy\nload\n(Vx\ntR.", "it names numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "it names numpy.core.multiarray.fromfile"),
        (b"cnumpy\ndtype\n}(Vx\nI1\nub.", "it changes a function"),
        (b"cnumpy\nndarray\n(I1\ntR.", "must be a pickle of plain"),
        (b"cnumpy\ndtype\n(VV8\ntR.", "an array of 'V8'"),
        (b"cnumpy\ndtype\n(VO\ntR.", "it holds a _Dtype"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(tR.", "an array without content"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "it encodes by 'rot13'"),
        (b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.", "must be a pickle of plain"),
        (b"cnumpy\ndtype\n.", "it holds a _Call"),
        (b"]]]]]]]aaaaaa.", "nested deeper than 4 levels"),
        (b"]\x94h\x00a.", "must be a pickle"),
        (b"P1\n.", "must be a pickle"),
        (b"", "EOFError"),
        (b"PK\x03\x04", "must be a pickle"),
        (b"\x80\x04\x8f.", "it holds a set"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc.", "it is cut off"),
        (b"\x80\x02]r\xff\xff\xff\x7fX\xff\xff\xff\x7fa.", "must be a pickle"),
    ],
)
def test_other_tricks_of_pickles_are_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(Damaged, match=r"fastfpl\.test: .*do not trust the file") as caught:
        load_plain(tmp_path / "x.pkl", "fastfpl.test")
    assert sentence in str(caught.value)


def test_lists_that_name_each_other_are_not_walked(tmp_path: Path) -> None:
    def lists(width: int, depth: int) -> bytes:
        content = b"\x80\x04(NNNl\x94"
        for level in range(depth):
            content += b"(" + (b"h" + bytes([level])) * width + b"l\x94"
        return content + b"."

    def tuples(width: int, depth: int, end: bytes) -> bytes:
        content = b"\x80\x04(NNNt\x94"
        for level in range(depth):
            content += b"(" + (b"h" + bytes([level])) * width + b"t\x94"
        return content + end

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    kind = b"cnumpy\ndtype\n(VO\ntR"
    cases = {
        "lists": lists(60, 3),
        "many lists": lists(250, 3),
        "tuples": tuples(60, 3, b"."),
        # their hash walks them
        "keys": b"\x80\x04}" + tuples(60, 8, b"Ns.")[2:],
        "items": b"\x80\x04}(" + tuples(60, 8, b"Nu.")[2:],
        "sets": b"\x80\x04\x8f(" + tuples(60, 8, b"\x90.")[2:],
        # so does their text
        "dtype": b"cnumpy\ndtype\n" + tuples(60, 8, b"\x85R.")[2:],
        "encoding": b"c_codecs\nencode\nVx\n" + tuples(60, 8, b"\x86R.")[2:],
        # each array copies what they share
        "objects": b"(" + b"Vabc\n" * 10_000 + b"l\x94("
        + (array + b"(K\x01M\x10'\x85" + kind + b"I00\nh\x00tb") * 3_000 + b"l.",
        "text": b"V" + b"x" * 100_000 + b"\n\x940("
        + b"c_codecs\nencode\n(h\x00Vlatin1\ntR" * 20_000 + b"l.",
        # arguments that are copied for each call
        "arguments": b"(" + b"N" * 100_000 + b"t\x940("
        + b"cnumpy.core.multiarray\n_reconstruct\nh\x00R" * 20_000 + b"l.",
    }  # fmt: skip
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        start = time.process_time()
        with pytest.raises(Damaged, match="do not trust the file") as caught:
            load_plain(path, "fastfpl.test")
        assert time.process_time() - start < 2, name
        assert len(str(caught.value)) < 1000
        if "lists" in name or name in ("tuples", "text", "objects"):
            assert "name each other to more than its own size" in str(caught.value), name
    # some of it is what an honest file may do
    path.write_bytes(lists(60, 2))
    assert len(load_plain(path, "fastfpl.test")) == 60
    same = [f"{n}.jpg" for n in range(9000)]
    path.write_bytes(pickle.dumps([same, same, {"a": same}]))
    assert load_plain(path, "fastfpl.test") == [same, same, {"a": same}]


ARRAYS = st.one_of(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))).map(
        lambda v: np.array(v, dtype=object)
    ),
    st.lists(st.text("abc/_.", min_size=1), min_size=1).map(np.array),
    st.tuples(st.sampled_from(["u1", "<i8", ">i4", "<f8", ">f4"]), st.integers(0, 5)).map(
        lambda p: np.arange(3 * p[1]).reshape(3, p[1]).astype(p[0])
    ),
    st.just(np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4))),
)
PLAIN = st.one_of(
    ARRAYS, st.integers(), st.text(), st.binary(), st.none(), st.booleans(), st.floats(-9, 9)
)


@given(st.lists(PLAIN, max_size=4), st.integers(0, 5), st.sampled_from([list, tuple]))
def test_plain_pickles_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], protocol: int, kind: type
) -> None:
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    path.write_bytes(pickle.dumps({"a": kind(values)}, protocol))
    content = load_plain(path, "fastfpl.test")
    assert type(content["a"]) is kind
    for got, wanted in zip(content["a"], values, strict=True):
        if isinstance(wanted, np.ndarray):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)
        else:
            assert got == wanted


@pytest.mark.parametrize("protocol", range(6))
def test_scalars_of_numpy_come_back(protocol: int, tmp_path: Path) -> None:
    values = [np.str_("ice_cream"), np.int64(-7), np.float32(0.5), np.uint8(200), b"", b"\xff"]
    (tmp_path / "x").write_bytes(pickle.dumps(values, protocol))
    plain = ["ice_cream", -7, 0.5, 200, b"", b"\xff"]
    assert load_plain(tmp_path / "x", "fastfpl.test") == plain


@pytest.mark.parametrize("order", "<>")
def test_letters_that_are_none_are_refused(order: str, tmp_path: Path) -> None:
    letters = np.array([0x10FFFF, 97, 0x110000], dtype=f"{order}u4")
    for last, right in ((2, True), (3, False)):
        (tmp_path / "x").write_bytes(pickle.dumps(letters[:last].view(f"{order}U1"), 2))
        if right:
            assert list(load_plain(tmp_path / "x", "fastfpl.test")) == ["\U0010ffff", "a"]
        else:
            with pytest.raises(Damaged, match="text of numbers that are no characters"):
                load_plain(tmp_path / "x", "fastfpl.test")


@given(st.data())
def test_broken_pickles_are_refused_or_plain(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = (np.array(["a/b.jpg", "c.jpg"], dtype=object), np.array(["x", "y"]), np.arange(3))
    content = bytearray(pickle.dumps(rows, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    path.write_bytes(content)
    refused = "fastfpl.test: do not trust the file"
    try:
        load_plain(path, "fastfpl.test")
    except Damaged as error:
        refused = str(error)
    assert refused.startswith("fastfpl.test: ")
    assert "do not trust the file" in refused


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ((np.array(["DomainNet/real/a.jpg"]),), "must hold two arrays of strings"),
        (({"a": 1}, {"b": 1}), "must hold two arrays of strings of one length"),
        ((np.array(["a", "b"]), np.array(["bird"])), "of one length, paths and class names; got 2"),
        ((np.array([1, 2]), np.array(["bird", "tiger"])), "got another kind of entry"),
        ((np.array(["DomainNet/real/a.jpg"]), np.array(["dog"])), "must be of bird, .* got 'dog'"),
        ((np.array(["/abs/a.jpg"]), np.array(["bird"])), "below the images' folder; got '/"),
        ((np.array(["DomainNet/../../x"]), np.array(["bird"])), "below the images' folder"),
    ],
)
def test_pairs_that_are_no_lists_of_images_are_refused(
    pair: object, sentence: str, tmp_path: Path
) -> None:
    tree = trees.domainnet10(tmp_path)
    (tree.folder / "real_test.pkl").write_bytes(pickle.dumps(pair))
    with pytest.raises(Damaged, match=sentence):
        load_dataset("domainnet10", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("labels", [0, 1, 2, 3], r"must lie in \[0, 3\); got 3"),
        ("labels", [0, 1, 2, -1], r"must lie in \[0, 3\); got -1"),
        ("labels", [0, 1, 2, True], r"must lie in \[0, 3\); got True"),
        ("labels", [0, 1, 2], "one per image; got 3 with 4 images"),
        ("labels", None, "must be a list, one per image; got NoneType"),
        ("data", np.zeros((4, 3072)), r"must be uint8 \(n, 3072\); got float64"),
        (
            "data",
            np.zeros((4, 1024), np.uint8),
            r"must be uint8 \(n, 3072\); got uint8 \(4, 1024\)",
        ),
        ("data", b"x", r"must be uint8 \(n, 3072\); got"),
    ],
)
def test_cifar_batches_are_checked(key: str, value: object, sentence: str, tmp_path: Path) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, key.encode(): value}))
    with pytest.raises(Damaged, match=sentence) as caught:
        load_dataset("cifar10", tmp_path)
    assert "data_batch_3" in str(caught.value)
    del content[key.encode()]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(Damaged, match=f"data_batch_3 must hold '{key}'; got"):
        load_dataset("cifar10", tmp_path)


# -- the command line ------------------------------------------------------------------------


def test_list_shows_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli(capsys, "data", "list")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert set(rows) == set(DATASETS)
    assert rows["flowers102"] == ["flowers102", "oxford_flowers", "102", "4093", "2463", "1"]
    assert rows["domainnet345"][2:] == ["345", "409832", "176743", "6"]
    assert rows["glyphs"] == ["glyphs", "needs", "no", "files"]


@pytest.mark.parametrize("kind", TREES)
def test_a_complete_set_is_said_to_be_complete(
    kind: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES[kind](tmp_path)
    code, out, _ = cli(capsys, "data", "check", tree.name, "--root", str(tmp_path))
    assert code == 2, "a miniature has not the published size"
    assert f"{len(tree.train)} of {FACTS[tree.name].train} train images" in out
    assert out.endswith(f"{tree.name} is not complete\n")
    complete(monkeypatch, tree)
    code, out, _ = cli(capsys, "data", "check", tree.name, "--root", str(tmp_path))
    assert (code, "MISSING" in out) == (0, False)
    for need in FACTS[tree.name].needs:
        assert f"  there    {need.path}\n" in out
    assert f"  {len(tree.test)} of {len(tree.test)} test images\n" in out
    assert out.endswith(f"{tree.name} is complete\n")
    spoil(tmp_path / tree.test[0].path, "cut")
    code, out, _ = cli(capsys, "data", "check", tree.name, "--root", str(tmp_path))
    assert code == 0
    code, out, _ = cli(capsys, "data", "check", tree.name, "--root", str(tmp_path), "--decode")
    assert code == 2
    assert f"{tmp_path / tree.test[0].path} does not decode: " in out


def test_cifar_is_checked_too(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    facts = replace(FACTS["cifar10"], classes=3, train=20, test=4)
    monkeypatch.setitem(FACTS, "cifar10", facts)
    code, out, _ = cli(capsys, "data", "check", "cifar10", "--root", str(tmp_path), "--decode")
    assert code == 0
    assert "20 of 20 train images" in out
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_4").write_bytes(b"x")
    code, out, _ = cli(capsys, "data", "check", "cifar10", "--root", str(tmp_path))
    assert code == 2
    assert "data_batch_4 must be a pickle of plain lists and arrays" in out


@pytest.mark.parametrize("name", sorted(FACTS))
def test_check_says_where_to_get_what_is_missing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = cli(capsys, "data", "check", name, "--root", str(tmp_path))
    assert (code, err) == (2, "")
    for need in FACTS[name].needs:
        assert f"  MISSING  {need.path}\n           get it from {need.source}\n" in out
    assert "root must hold" in out


def test_check_says_what_stands_in_for_a_missing_split(
    tmp_path: Path,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tree = trees.caltech101(tmp_path)
    complete(monkeypatch, tree)
    assert tree.split is not None
    tree.split.unlink()
    code, out, _ = cli(capsys, "data", "check", "caltech101", "--root", str(tmp_path))
    assert code == 2
    assert "MISSING  split_zhou_Caltech101.json" in out
    assert "there    101_ObjectCategories" in out
    assert "a split drawn here with seed 0 stands in" in out
    assert "6 of 6 train images" in out
    assert not caplog.text, "what is shown is not logged as well"


def test_check_counts_the_images_that_are_there(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = trees.food101(tmp_path)
    complete(monkeypatch, tree)
    (tmp_path / tree.train[0].path).unlink()
    found = check_files("food101", tmp_path)
    assert found.counts == (("train images", 5, 6), ("test images", 3, 3))
    assert not found.complete
    code, out, _ = cli(capsys, "data", "check", "food101", "--root", str(tmp_path))
    assert code == 2
    assert "  5 of 6 train images\n" in out
    assert tree.train[0].path in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("data check digits --root .", "must be a data set that lives in files; got 'digits'"),
        ("data check food10 --root .", "did you mean 'food101'"),
        ("data check food101", "root (--root) must name the folder that holds the set's folder"),
        ("data check food101 --root . --layout class", "layout must be left out with 'food101'"),
        ("data split cifar10 --root .", "name must be one of caltech101"),
        ("data download food101 --root .", "got 'food101': get it from https://data.vision"),
        ("data download glyphs --root .", "name must be one of cifar10, cifar100"),
        (
            "data check dtd --root ~nobody-here/x",
            "got '~nobody-here/x', of a home that is not known",
        ),
        (
            "data split dtd --root conftest.py/x",
            "root must be a folder; got conftest.py/x (Not a d",
        ),
        ("data split dtd --root nowhere", "root must be a folder; got nowhere (nothing)"),
        (
            "data download cifar10 --root /dev/null/x",
            "must be a folder that can be made; got Not a",
        ),
    ],
)
def test_mistakes_end_with_a_sentence(arguments: str, sentence: str, capsys) -> None:
    code, out, err = cli(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    ("root", "got"),
    [("nowhere", "(nothing)"), ("/dev/null", "(a device)"), ("x" * 300, "(File name too long)")],
)
def test_check_of_no_folder_says_what_is_there(root: str, got: str, capsys) -> None:
    for name in ("eurosat", "cifar10", "domainnet345"):
        code, out, err = cli(capsys, "data", "check", name, "--root", root, "--decode")
        assert (code, err) == (2, "")
        assert f"  fastfpl.data.{name}: root must be a folder; got {root} {got}\n" in out
        assert out.endswith(f"{name} is not complete\n")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_download_fetches_what_torchvision_names_once(
    name: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision.datasets.utils as fetching

    asked = []

    def fetch(url: str, root: str, *, filename: str, md5: str) -> None:
        asked.append((url, filename, len(md5)))
        trees.cifar(Path(root), name, ".")

    monkeypatch.setattr(fetching, "download_and_extract_archive", fetch)
    root = tmp_path / "new"
    for _ in range(2):
        code, out, _ = cli(capsys, "data", "download", name, "--root", str(root))
        assert (code, out.strip()) == (0, str(root / name))
    archive = f"cifar-{name[5:]}-python.tar.gz"
    assert asked == [(f"https://www.cs.toronto.edu/~kriz/{archive}", archive, 32)]
    assert len(load_dataset(name, root).test) == 4


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    import torchvision.datasets.utils as fetching

    def fetch(*_: object, **__: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(fetching, "download_and_extract_archive", fetch)
    with pytest.raises(Missing, match=r"must be reachable and whole; got .*corrupted.*by hand"):
        cifar_module.download("cifar10", tmp_path)


# -- the page --------------------------------------------------------------------------------


def rows_of_the_page() -> list[str]:
    rows = []
    for name, facts in sorted(FACTS.items()):
        folders = " or ".join(f"`{f}/`" if f != "." else "the root" for f in facts.folders)
        paths = [need.path for need in facts.needs]
        for domain in facts.domains if len(facts.domains) > 1 else ():
            paths = [path.replace(domain, "DOMAIN") for path in paths]
        needs = ", ".join(f"`{path}`" for path in dict.fromkeys(paths))
        if facts.stand_in and facts.split:
            needs += "; without the split " + ", ".join(f"`{n.path}`" for n in facts.stand_in)
        sources = ", ".join(
            dict.fromkeys(need.source.split()[0].rstrip(",") for need in facts.needs)
        )
        sizes = f"{facts.classes} | {facts.train} | {facts.test}"
        rows.append(
            f"| `{name}` | {facts.title} | {folders} | {needs} | {sizes} | {sources} "
            f"| {facts.protocol} |"
        )
    return rows


def test_the_page_holds_the_catalogue() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if line.startswith("| `")]
    assert shown == rows_of_the_page(), "\n" + "\n".join(rows_of_the_page())


def test_facts_are_sound() -> None:
    for name, facts in FACTS.items():
        assert facts.name == name
        assert min(facts.classes, facts.train, facts.test) > 0
        assert facts.train >= facts.classes
        assert bool(facts.drawn) == any(need.spare for need in facts.needs)
        assert not facts.split or facts.split in {need.path for need in facts.needs}
        for need in (*facts.needs, *facts.stand_in):
            assert need.source.startswith("https://")
        with pytest.raises(FastfplError):
            load_dataset(name)
