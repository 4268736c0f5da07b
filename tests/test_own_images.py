"""A person's folder of images: layouts, names of classes, and splits."""

from __future__ import annotations

import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastfpl.config import make_settings
from fastfpl.data import from_folder, load_dataset
from fastfpl.data.check import check_own
from fastfpl.errors import FastfplError, InputError
from fastfpl.federation.preparation import plan
from tests.own_trees import TWO, table, tree

# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "given", "layout", "clients", "domains"),
    [
        (TWO, False, "class", (), ("photos",)),
        (
            ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "Validation/dog/2.png"),
            False,
            "split/class",
            (),
            ("photos",),
        ),
        (
            [f"{d}/{p}" for d in ("ink", "oil") for p in TWO],
            False,
            "domain/class",
            (),
            ("ink", "oil"),
        ),
        (
            [f"{d}/{p}" for d in ("ann", "bob") for p in TWO],
            True,
            "client/class",
            ("ann", "bob"),
            ("photos",),
        ),
        (
            [f"{s}/{d}/{p}" for s in ("train", "test") for d in ("ink", "oil") for p in TWO],
            False,
            "split/domain/class",
            (),
            ("ink", "oil"),
        ),
        (
            [f"{d}/{s}/{p}" for s in ("train", "test") for d in ("10", "9") for p in TWO],
            True,
            "client/split/class",
            ("9", "10"),
            ("photos",),
        ),
    ],
)
def test_layouts_are_recognised_and_said(tmp_path, paths, given, layout, clients, domains):
    dataset = from_folder(tree(tmp_path / "mine", *paths), given=given)
    assert dataset.notes[0].startswith(f"layout {layout} (recognised): 2 classes")
    assert dataset.name == "mine"
    assert dataset.classnames == ("cat", "dog")
    assert (dataset.clients, dataset.domains) == (clients, domains)
    for split in (dataset.train, dataset.test):
        assert (split.clients is not None) == bool(clients)
        for index, image in enumerate(split.images(range(len(split)))):
            folders = split.path(index).relative_to(tmp_path / "mine").parts[:-1]
            assert image.shape == (9, 7, 3)
            assert folders[-1] == dataset.classnames[split.labels[index]]
            if clients:
                assert dataset.clients[split.clients[index]] in folders
            elif len(domains) > 1:
                assert dataset.domains[split.domains[index]] in folders


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        # superclasses or domains?
        (("pets/cat/1.png", "food/rice/1.png"), "--layout.* class or client/class or domain/class"),
        ((*TWO, "birds/owl/1.png"), "1 and 2 folders deep.*--layout.* class"),
        ((*TWO, "loose.png"), "must lie in one folder a class; got 1 beside the folders"),
        (("a.png", "b.png"), "must lie in one folder a class; got 2 in no folder"),
        (
            ("train/1.png", "test/1.png"),
            "must lie in one folder a class; got none below test, trai",
        ),
        (("train/cat/1.png", "dogs/dog/1.png"), "as a split is called, beside 'dogs'"),
        (("a/b/c/d/1.png", "a/b/x/d/1.png", "a/y/c/d/2.png"), "images 3 folders deep"),
        (("a/b/c/d/e/f/1.png",), "at most 5 folders deep"),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(tmp_path, paths, sentence):
    with pytest.raises(FastfplError, match=sentence):
        from_folder(tree(tmp_path, *paths))


def test_a_layout_can_be_asked_for(tmp_path):
    folder = tree(
        tmp_path, "pets/cat/1.png", "pets/dog/2.png", "food/rice/1.png", "food/rice/2.png"
    )
    assert from_folder(folder, layout="class").classnames == ("food", "pets")
    with pytest.raises(InputError, match=r"layout must be a known one; got 'classes'.*'class'"):
        from_folder(folder, layout="classes")
    with pytest.raises(FastfplError, match=r"must lie in split/domain/class/ .* got one in"):
        from_folder(folder, layout="split/domain/class")
    with pytest.raises(FastfplError, match=r"splits .* must be called train"):
        from_folder(folder, layout="split/class")
    tree(folder, "pets/rice/1.png")
    assert from_folder(folder, layout="domain/class").domains == ("food", "pets")
    # the setting is the same
    said = {"method": "promptfl", "dataset": f"folder:{folder}", "partition": "iid", "clients": 1}
    for layout, classes in (("domain/class", 3), ("class", 2)):
        dataset = plan(make_settings({**said, "layout": layout})).dataset
        assert len(dataset.classnames) == classes


def test_what_systems_leave_behind_is_no_image(tmp_path):
    folder = tree(tmp_path, *TWO, "cat/.hidden.png", "__MACOSX/cat/1.png", ".git/cat/1.png")
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/notes.txt", "README.md"):
        (folder / name).write_bytes(b"nothing")
    dataset = from_folder(folder)
    assert len(dataset.train) + len(dataset.test) == 4
    (folder / "cat/a.HEIC").write_bytes(b"")
    assert "1 files of .heic are no images that are read here" in from_folder(folder).notes[1]


def test_names_are_as_people_write_them(tmp_path):
    composed = unicodedata.normalize("NFC", "café crème")
    apart = unicodedata.normalize("NFD", composed)
    paths = [f"ink/{composed}/1.PNG", f"oil/{apart}/1.JPEG", "ink/sea_horse 🦄/a b.png"]
    dataset = from_folder(tree(tmp_path, *paths, f"ink/{composed}/ü.png", f"oil/{apart}/3.tif"))
    assert dataset.classnames == (composed, "sea horse 🦄")
    assert dataset.domains == ("ink", "oil")
    assert len(dataset.train) + len(dataset.test) == 5
    assert all(len(s.images(range(len(s)))) == len(s) for s in (dataset.train, dataset.test))


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_links_are_followed_unless_they_lead_nowhere(tmp_path):
    far = tree(tmp_path / "far", "1.png", "2.png")
    folder = tree(tmp_path / "mine", "cat/1.png", "cat/2.png")
    (folder / "dog").symlink_to(far)
    (folder / "cat/link.png").symlink_to(far / "1.png")
    dataset = from_folder(folder)
    assert len(dataset.train) + len(dataset.test) == 5
    (folder / "cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FastfplError, match=r"gone.png \(a link to nothing\): mend or remove it"):
        from_folder(folder)
    (folder / "cat/gone.png").unlink()
    (folder / "cat/around").symlink_to(folder)
    with pytest.raises(FastfplError, match=r"a link to a folder around it"):
        from_folder(folder)


def zipped(path: Path, folder: Path, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("top", ["", "export/images/"])
@pytest.mark.parametrize("digest", ["time", "content"])
def test_a_zip_file_is_read_as_the_folder_that_it_holds(tmp_path, top, digest):
    folder = tree(tmp_path / "pets", *(f"{d}/{p}" for d in ("ink", "oil") for p in TWO))
    (folder / "classes.txt").write_text("cat house cat\ndog\n")
    archive = zipped(tmp_path / "pets.zip", folder, top)
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr("__MACOSX/ink/cat/._1.png", b"x")
        more.writestr("ink/.DS_Store" if not top else f"{top}.DS_Store", b"x")
    plain, packed = from_folder(folder), from_folder(archive, digest=digest)
    assert packed.name == "pets"
    assert packed.classnames == ("house cat", "dog")
    for one, other in ((plain.train, packed.train), (plain.test, packed.test)):
        assert one.labels.tolist() == other.labels.tolist()
        for left, right in zip(*(s.images(range(len(s))) for s in (one, other)), strict=True):
            assert (left == right).all()
    assert any("read from its only folder" in note for note in packed.notes) == bool(top)
    assert check_own(f"folder:{archive}", decode=True).problems == ()


def test_a_zip_file_must_be_whole_and_harmless(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK no")
    with pytest.raises(FastfplError, match=r"must be a folder or a zip file; got .*a.zip"):
        from_folder(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("cat/../../1.png", b"x")
    with pytest.raises(FastfplError, match=r"must lead to files inside it"):
        from_folder(tmp_path / "b.zip")
    folder = tree(tmp_path / "c", *TWO)
    archive = zipped(tmp_path / "c.zip", folder)
    content = bytearray(archive.read_bytes())
    at = content.index(b"\x89PNG")
    content[at : at + 4] = b"oops"
    archive.write_bytes(bytes(content))
    dataset = from_folder(archive)
    with pytest.raises(FastfplError, match=r"c.zip/cat/1.png must be an image; got BadZipFile"):
        [split.images(range(len(split))) for split in (dataset.train, dataset.test)]


# -- names of classes ------------------------------------------------------------------------------


def test_classes_have_the_names_that_people_would_say(tmp_path):
    folder = tree(tmp_path, "n01/1.png", "n01/2.png", "n 02/1.png", "n 02/2.png")
    (folder / "classes.json").write_text(json.dumps({"n01": "tench", "n 02": "gold_fish"}))
    assert from_folder(folder).classnames == ("gold fish", "tench")
    (folder / "classes.txt").write_text("n01\ttench\nn 02 gold fish\n\n")
    with pytest.raises(FastfplError, match=r"got both: remove one"):
        from_folder(folder)
    (folder / "classes.json").unlink()
    assert from_folder(folder).classnames == ("gold fish", "tench")


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("classes.json", '{"cat": "cat"}', "must name every class; got none for 'dog'"),
        ("classes.json", '{"cat": "a", "dog": "b", "dgo": "c"}', "got 'dgo'; did you mean 'dog'"),
        ("classes.json", '{"cat": "a", "cat": "b"}', "must name a class once; got 'cat' twice"),
        ("classes.json", '["cat", "dog"]', "must be an object from folder to name"),
        ("classes.json", '{"cat": 1, "dog": 2}', "must be an object from folder to name"),
        ("classes.json", "{", "must be JSON"),
        ("classes.json", '{"cat": "Dog", "dog": "dog"}', "must differ to CLIP"),
        ("classes.json", '{"cat": "  ", "dog": "dog"}', "must be text that can be seen"),
        ("classes.txt", "cat\u200b a\ndog b", "must name classes that have images|every class"),
        ("classes.txt", "dog a cat", "must name every class; got none for 'cat'"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, file, text, sentence):
    folder = tree(tmp_path, *TWO)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(FastfplError, match=sentence):
        from_folder(folder)


def test_names_in_what_is_no_file_are_refused(tmp_path):
    folder = tree(tmp_path, *TWO)
    os.mkfifo(folder / "classes.json")
    with pytest.raises(FastfplError, match=r"must be readable; got a named pipe at classes.json"):
        from_folder(folder)


# -- splits ----------------------------------------------------------------------------------------


def test_without_a_test_split_one_is_drawn_and_said(tmp_path):
    paths = [f"{d}/{c}/{n}.png" for d in ("ink", "oil") for c in ("cat", "dog") for n in range(10)]
    folder = tree(tmp_path / "a", *paths, "ink/owl/1.png", "oil/owl/1.png", "oil/owl/2.png")
    dataset = from_folder(folder)
    assert "20 % are tested on, drawn here by their paths" in dataset.notes[1]
    # two of ten of each class and domain; one of two; none of one
    assert len(dataset.test) == 2 * 4 + 1
    assert np.bincount(dataset.test.labels).tolist() == [4, 4, 1]

    def names(data):
        return sorted(data.test.path(i).name for i in range(len(data.test)))

    # where it lies is nothing, and one image more moves no other
    moved = tree(tmp_path / "b/c", *paths, "ink/owl/1.png", "oil/owl/1.png", "oil/owl/2.png")
    assert names(from_folder(moved)) == names(dataset)


def test_validation_images_are_tested_on_where_there_is_no_test_split(tmp_path):
    folder = tree(tmp_path, *(f"{s}/{p}" for s in ("train", "val") for p in TWO))
    dataset = from_folder(folder)
    assert (len(dataset.train), len(dataset.test)) == (4, 4)
    assert "no test split: tested on the validation images" in dataset.notes
    tree(folder, "test/cat/7.png")
    dataset = from_folder(folder)
    assert (len(dataset.train), len(dataset.test)) == (4, 1)
    assert "4 validation images are not used" in dataset.notes


@pytest.mark.parametrize("scheme", ["folder", "manifest"])
def test_an_image_that_changes_is_another_one(tmp_path, scheme):
    folder = tree(tmp_path, *TWO)
    rows = [{"path": path, "label": path[:3]} for path in TWO]
    name = f"folder:{folder}" if scheme == "folder" else f"manifest:{table(folder / 'm.csv', rows)}"
    first = {d: load_dataset(name, digest=d).train.fingerprint for d in ("time", "content")}
    os.utime(folder / TWO[0], (1, 1))
    os.utime(folder / TWO[1], (1, 1))
    again = {d: load_dataset(name, digest=d).train.fingerprint for d in ("time", "content")}
    assert again["content"] == first["content"]
    assert again["time"] != first["time"]
    times = [(folder / path).stat() for path in TWO]
    for number, path in enumerate(TWO):
        content = bytearray((folder / path).read_bytes())
        content[-20] ^= 1
        (folder / path).write_bytes(bytes(content))
        os.utime(folder / path, ns=(times[number].st_atime_ns, times[number].st_mtime_ns))
    assert load_dataset(name).train.fingerprint == again["time"]
    assert load_dataset(name, digest="content").train.fingerprint != again["content"]
