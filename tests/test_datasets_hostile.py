"""Files and trees of data sets that are hostile, or as other systems leave them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.data.clip_sets import write_split
from fastfpl.errors import Damaged
from tests import trees
from tests.trees import TREES, listed, refused, rows_of


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
