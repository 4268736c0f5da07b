"""Splits of data sets that come without their own: drawn the same way everywhere, and written."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.data.clip_sets import write_split
from fastfpl.data.listing import shuffled
from fastfpl.errors import Damaged, InputError, Missing
from tests import trees
from tests.command import call
from tests.trees import SPLIT, TREES, Tree, complete, listed


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
    code, out, _ = call(capsys, "data", "split", name, "--root", str(tmp_path))
    assert (code, out.strip()) == (0, str(tree.split))
    assert everything(tree) == whole
    read = load_dataset(name, tmp_path)
    assert read.notes == drawn.notes
    assert read.classnames == drawn.classnames
    assert read.train.fingerprint == drawn.train.fingerprint
    assert read.test.fingerprint == drawn.test.fingerprint
    code, _, err = call(capsys, "data", "split", name, "--root", str(tmp_path))
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
