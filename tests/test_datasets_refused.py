"""What of a data set's files is missing, or is not as published, ends in a sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.errors import Damaged, Missing
from tests import trees
from tests.trees import SPLIT, TREES

MATLAB = {"flowers102", "stanford_cars"}


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
