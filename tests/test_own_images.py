"""A person's own images: what is recognised, what is said, what is refused, and a federation."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastfpl
from fastfpl.cli.compare import _swept
from fastfpl.cli.entry import group, main
from fastfpl.config import make_settings
from fastfpl.data import (
    ClassSubset,
    DomainSubset,
    Joined,
    from_arrays,
    from_folder,
    from_manifest,
    from_torch,
    load_dataset,
)
from fastfpl.data.check import check_own
from fastfpl.data.layouts import LAYOUTS
from fastfpl.errors import FastfplError, InputError, Missing
from fastfpl.federation.preparation import plan
from fastfpl.report import load_comparisons, write_report
from fastfpl.report.table import csv_table, markdown_table
from fastfpl.report.words import NONE
from tests.own_trees import VENDORS, WORDS, save, table, tree, vendors
from tests.warm import warm_python

SHORT = ["--rounds", "1", "--local-epochs", "1", "--n-ctx", "2"]
TWO = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


def told(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Run the command as a person does: exit code, what is printed, what is said beside it."""
    done = subprocess.run(
        [*warm_python(), "-m", "fastfpl.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


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


# -- manifests -------------------------------------------------------------------------------------


def rows_of(clients: bool = True) -> list[dict[str, str]]:
    """Twelve training images of two clients, a test image of one of them, two of nobody."""
    rows = []
    for client in ("ann", "bob"):
        for label in ("cat", "dog"):
            for number in range(3):
                path = f"{client}/{label}{number}.png"
                rows.append({"path": path, "label": label, "client": client, "split": "train"})
    rows.append({"path": "ann/late.png", "label": "cat", "client": "ann", "split": "test"})
    for number in range(2):
        path = f"all/{number}.png"
        rows.append({"path": path, "label": "dog", "client": "", "split": "test"})
    return [{k: v for k, v in row.items() if clients or k != "client"} for row in rows]


def written(folder: Path, rows: list[dict[str, str]], name: str = "list.csv") -> Path:
    tree(folder, *(row["path"] for row in rows))
    return table(folder / name, rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_manifest_names_images_labels_clients_and_splits(tmp_path, suffix):
    rows = rows_of()
    tree(tmp_path, *(row["path"] for row in rows))
    file = tmp_path / f"list{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        table(file, rows)
    dataset = from_manifest(file)
    assert (dataset.name, dataset.classnames) == ("list", ("cat", "dog"))
    assert dataset.clients == ("ann", "bob")
    assert np.bincount(dataset.train.clients).tolist() == [6, 6]
    assert sorted(dataset.test.clients.tolist()) == [-1, -1, 0]
    assert dataset.train.images([0])[0].shape == (9, 7, 3)


def test_columns_may_be_called_otherwise_and_images_lie_elsewhere(tmp_path):
    paths = [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(4)]
    tree(tmp_path / "pics", *paths)
    rows = [{"file": path, "kind": path[:3], "site": "xxyy"[int(path[4])]} for path in paths]
    file = table(tmp_path / "list.csv", rows)
    named = {"path": "file", "label": "kind", "domain": "site"}
    with pytest.raises(
        FastfplError, match=r"must have a column 'path'; got file, kind, site: name"
    ):
        from_manifest(file)
    with pytest.raises(Missing, match=r"name the folder that paths are relative to by root"):
        from_manifest(file, columns=named)
    dataset = from_manifest(file, columns=named, root=tmp_path / "pics")
    assert dataset.domains == ("x", "y")
    with pytest.raises(FastfplError, match=r"must have a column 'klass'; got file, kind, site$"):
        from_manifest(file, columns={**named, "label": "klass"})
    with pytest.raises(InputError, match=r"must rename path, label, .*; got 'lable'.*'label'"):
        from_manifest(file, columns={"lable": "kind"})
    # the same from the command line
    code, out, err = told(
        *("data", "check", f"manifest:{file}", "--columns", "path=file,label=kind,domain=site"),
        *("--root", str(tmp_path / "pics")),
    )
    assert code == 0, err
    assert "no problem found" in out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"path": "../secret.png"}, "must lead to files below the images' folder; got '../secret"),
        ({"path": "a/../../secret.png"}, "must lead to files below"),
        ({"path": "/etc/passwd"}, "must lead to files below"),
        ({"path": "C:\\x.png"}, "must lead to files below"),
        ({"path": "ann/dog0.png"}, "must list an image once; got 'ann/dog0.png' again in row 4"),
        ({"path": ""}, "row 1 of .* must have a path; got none"),
        ({"label": " "}, "row 1 of .* must have a label; got none"),
        ({"label": "a\u202eb"}, "must hold text that can be seen"),
        ({"split": "later"}, "must be one of train, .*; got 'later'"),
        ({"split": ""}, "every image of .* must be of a split, or none"),
        ({"client": ""}, "must name its client where one does; got 1 without"),
        ({"client": "Bob"}, "clients of .* must differ in more than capitals"),
        ({"path": "ann/gone.png"}, r"images of .* must be there; got .*gone.png \(nothing\)"),
        ({"path": "ann"}, r"images of .* must be there; got .*ann \(a folder\)"),
    ],
)
def test_rows_that_are_no_image_are_refused(tmp_path, change, sentence):
    rows = rows_of()
    tree(tmp_path, *(row["path"] for row in rows))
    with pytest.raises(FastfplError, match=sentence):
        from_manifest(table(tmp_path / "list.csv", [{**rows[0], **change}, *rows[1:]]))


def changed(rows, where, **change):
    return [{**row, **change} if where(row) else row for row in rows]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            changed(rows_of(), lambda r: r["client"] == "bob", split="test"),
            "must hold training images of every client; got only test images of 'bob'",
        ),
        (
            changed(rows_of(), lambda r: r["label"] == "dog", split="test"),
            "must hold training images of every class; got only test images of 'dog'",
        ),
        (changed(rows_of(), lambda r: True, split="test"), "must hold training images; got only"),
        (changed(rows_of(), lambda r: True, label="cat"), "at least two classes; got 1, 'cat'"),
        (
            changed(
                changed(rows_of(), lambda r: r["label"] == "dog", label="1"),
                lambda r: r["label"] == "cat",
                label="0",
            ),
            "must have names that people would say, .*; got 0, 1: write them into classes.json",
        ),
    ],
    ids=["client", "class", "test", "one", "numbers"],
)
def test_lists_that_make_no_data_set_are_refused(tmp_path, rows, sentence):
    with pytest.raises(FastfplError, match=sentence):
        from_manifest(written(tmp_path, rows))


def test_labels_that_are_numbers_get_names_beside_the_manifest(tmp_path):
    rows = [{"path": path, "label": "10" if "cat" in path else "9"} for path in TWO]
    file = written(tmp_path, rows)
    (tmp_path / "classes.txt").write_text("10 cat\n9 dog\n")
    assert from_manifest(file).classnames == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "must list an image; got no row"),
        ("a.csv", "path,label\n", "must list an image; got no row"),
        ("a.csv", "path,label\na.png,cat,dog\n", "row 1 of .* must have 2 cells .*; got 3"),
        ("a.csv", "path,path\na.png,cat\n", "columns of .* must differ; got 'path' twice"),
        ("a.csv", 'path,label\n"a.png,cat\n', "must be a table in UTF-8"),
        ("a.csv", "path,label\n\udcff.png,cat\n", "must be a table in UTF-8"),
        ("a.csv", "path,label\n\udcff.png,cat\n", "save it as CSV in UTF-8"),
        ("a.csv", "path;label\na.png;cat\n", "must have a column .*: separate .*',', not by ';'"),
        ("a.tsv", "path,label\na.png,cat\n", "separate cells by '.t', not by ','"),
        ("a.jsonl", "[1]\n", "row 1 of .* must be a JSON object"),
        ("a.jsonl", "{\n", "row 1 of .* must be JSON"),
        ("a.xlsx", "x", "path must end with .csv, .tsv, .jsonl, .ndjson, .parquet; got a.xlsx"),
        ("a.parquet", "x", "must be parquet|pyarrow, or pandas with fastparquet, must be there"),
    ],
)
def test_files_that_are_no_manifest_are_refused(tmp_path, name, text, sentence):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FastfplError, match=sentence):
        from_manifest(tmp_path / name)
    with pytest.raises(Missing, match=r"path must be a file; got"):
        from_manifest(tmp_path / "nowhere.csv")


# -- clients that the data name --------------------------------------------------------------------


def test_parquet_that_nothing_reads_is_not_called_damaged(tmp_path, monkeypatch):
    """Pandas alone reads none, and says so by an ImportError of its own."""
    for name in ("pyarrow", "pyarrow.parquet", "fastparquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(Missing, match=r"to read a.parquet; got neither: pip install pyarrow"):
        from_manifest(tmp_path / "a.parquet")


def test_leaving_each_domain_out_of_a_manifest_with_names_of_its_own(tmp_path):
    rows = [
        {"file": f"{d}/{p}", "label": p[:3], "style": d, "split": part}
        for d in ("ink", "oil")
        for p, part in zip(TWO, ("train", "test", "train", "test"), strict=True)
    ]
    tree(tmp_path, *(row["file"] for row in rows))
    table(tmp_path / "list.csv", rows)
    names = {"path": "file", "domain": "style"}
    asked = {"scenario": "leave-one-domain-out", "dataset": f"manifest:{tmp_path / 'list.csv'}"}
    for columns in (names, "path=file,domain=style"):  # of a file of settings, of the flag
        assert _swept(None, {**asked, "columns": columns}) == ("target", ["ink", "oil"])


def test_views_carry_the_clients_through(tmp_path):
    dataset = from_manifest(written(tmp_path, rows_of()))
    train = dataset.train
    some = ClassSubset(train, [1])
    assert some.clients.tolist() == train.clients[train.labels == 1].tolist()
    assert DomainSubset(train, [0]).clients.tolist() == train.clients.tolist()
    both = Joined(train, dataset.test)
    assert both.clients.tolist() == [*train.clients.tolist(), *dataset.test.clients.tolist()]
    glyphs = load_dataset("glyphs")
    assert Joined(glyphs.train, glyphs.test).clients is None
    assert ClassSubset(glyphs.train, [1]).clients is None


def test_given_deals_as_the_file_says_and_knows_the_number(tmp_path):
    name = f"manifest:{written(tmp_path, rows_of())}"
    said = {"method": "promptfl", "dataset": name, "partition": "given", "shots": "all"}
    planned = plan(make_settings(said))
    assert planned.settings.clients == 2
    shards = planned.scenario.shards
    assert [len(s.train) for s in shards] == [6, 6]
    # its own and those of nobody
    assert [len(s.test) for s in shards] == [3, 2]
    assert plan(make_settings({**said, "clients": 2})).settings.clients == 2
    with pytest.raises(InputError, match=r"must be left out with partition='given': the 2 clients"):
        plan(make_settings({**said, "clients": 3}))
    with pytest.raises(
        InputError, match=r"'given' for a data set that names no clients; got glyphs"
    ):
        plan(make_settings({**said, "dataset": "glyphs"}))
    few = plan(make_settings({**said, "shots": 1})).scenario.shards
    assert [len(s.train) for s in few] == [2, 2]


def test_domains_decide_how_many_clients_there_are():
    said = {"method": "promptfl", "dataset": "glyphs", "partition": "domain"}
    assert make_settings(said).clients is None
    assert plan(make_settings(said)).settings.clients == 6
    with pytest.raises(
        InputError, match=r"must be left out with partition='domain': the 6 domains"
    ):
        plan(make_settings({**said, "clients": 5}))
    left = {"scenario": "leave-one-domain-out", "target": "real"}
    assert plan(make_settings({**said, **left})).settings.clients == 5
    with pytest.raises(InputError, match=r"clients must be a number with partition='iid'"):
        make_settings({"method": "promptfl", "partition": "iid", "clients": None})


def test_a_client_without_test_images_is_said_and_left_out_of_the_mean(tmp_path, caplog):
    rows = [r for r in rows_of() if r["client"]]
    out = tmp_path / "run"
    result = fastfpl.run(
        "promptfl",
        dataset=written(tmp_path / "mine", rows),
        partition="given",
        rounds=2,
        local_epochs=1,
        n_ctx=2,
        out=out,
        cache=tmp_path / "cache",
    )
    note = "client bob has no test images of its own, left out of the mean"
    assert note in result.data["notes"]
    assert note in caplog.text
    for row in result.rounds:
        assert row["clients"][1] is None
        assert row["accuracy"] == row["clients"][0]
    assert result.final["std_over_clients"] == 0
    # read again, and shown as a dash
    comparison = load_comparisons(out)[0]
    assert comparison.results["promptfl"][0].rounds == result.rounds
    text = markdown_table(comparison)
    assert "| ann | bob |" in text
    assert f"| {100 * result.final['accuracy']:.1f} | {NONE} |" in text
    line = csv_table(comparison).splitlines()
    assert line[0].endswith("accuracy of ann,accuracy of bob")
    assert line[1].endswith(",")
    write_report(comparison, tmp_path / "page")
    page = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert '<th scope="row">bob</th>' in page
    with pytest.raises(InputError, match=r"to train on with transductive=true; got none for"):
        plan(
            make_settings(
                {
                    "method": "fedapt-unsupervised",
                    "dataset": f"manifest:{tmp_path / 'mine/list.csv'}",
                    "partition": "given",
                    "transductive": True,
                    "shots": "all",
                    "augment": "fresh",
                }
            )
        )


def test_own_images_play_the_scenarios(tmp_path):
    folder = vendors(tmp_path / "emoji", each=4)
    same = {"rounds": 1, "local_epochs": 1, "n_ctx": 2, "shots": 2, "cache": tmp_path / "cache"}
    for scenario, more in (
        ("base-to-novel", {"partition": "given"}),
        ("leave-one-domain-out", {"partition": "domain", "target": "google"}),
        ("multi-domain", {"partition": "domain"}),
        ("global", {"partition": "iid", "clients": 2}),
    ):
        result = fastfpl.run("promptfl", dataset=folder, scenario=scenario, **more, **same)
        assert all(0 <= exam["accuracy"] <= 1 for exam in result.rounds[-1]["exams"].values())
    more = {"scenario": "cross-dataset", "target": f"folder:{folder}", "clients": 2}
    result = fastfpl.run("promptfl", dataset="digits", partition="iid", **more, **same)
    # no page says where the images lie
    assert result.data["exams"]["target"] == "all test images of emoji"
    with pytest.raises(
        Missing, match=r"must be a folder or a zip file of images; got .*nowhere \("
    ):
        fastfpl.run("promptfl", dataset=tmp_path / "nowhere", **same)
    with pytest.raises(Missing, match=r"path must be a file; got .*nowhere.csv \(nothing\)"):
        fastfpl.run("promptfl", dataset=tmp_path / "nowhere.csv", **same)


def test_a_domain_without_test_images_is_said_too(tmp_path):
    paths = [f"train/{d}/{p}" for d in ("ink", "oil") for p in TWO]
    folder = tree(tmp_path, *paths, "test/ink/cat/9.png")
    said = {"method": "promptfl", "dataset": f"folder:{folder}", "partition": "domain"}
    planned = plan(make_settings(said))
    assert [len(s.test) for s in planned.scenario.shards] == [1, 0]
    assert "client 1 (oil) has no test images of its own" in planned.scenario.dataset.notes[-1]


# -- from the command line -------------------------------------------------------------------------


@pytest.mark.slow
def test_every_vendor_is_a_client_of_a_federation(tmp_path):
    folder = vendors(tmp_path / "emoji")
    code, out, err = told(
        *("run", "local", "--dataset", f"folder:{folder}", "--partition", "given"),
        *("--shots", "3", "--cache", str(tmp_path / "cache"), *SHORT),
        cwd=tmp_path,
    )
    assert code == 0, err
    assert "layout client/class (recognised): 3 classes, 4 clients (apple, google" in err
    assert "20 % are tested on, drawn here" in err
    assert "3 shots" in out
    assert "36 of 60 training images" in " ".join(out.split())
    (result,) = (tmp_path / "runs").glob("local-folder-emoji-seed0/result.json")
    content = json.loads(result.read_text())
    assert content["data"]["clients"] == list(VENDORS)
    assert content["data"]["classes"] == sorted(n.replace("_", " ") for n in WORDS)
    assert content["settings"]["clients"] == 4
    assert all(0 <= a <= 1 for a in content["rounds"][-1]["clients"])
    for vendor in VENDORS:
        assert vendor in out
    # nobody reads where the images lie
    code, out, err = told("report", str(tmp_path / "runs/local-folder-emoji-seed0"), cwd=tmp_path)
    assert code == 0, err
    for page in (tmp_path / "runs/local-folder-emoji-seed0").glob("*.html"):
        assert str(tmp_path) not in page.read_text(encoding="utf-8")


def test_a_run_goes_on_where_its_images_moved_to_but_not_with_others(tmp_path):
    folder = vendors(tmp_path / "emoji", each=3)
    same = {"partition": "domain", "local_epochs": 1, "n_ctx": 2, "cache": tmp_path / "cache"}
    out = tmp_path / "run"
    fastfpl.run("promptfl", dataset=folder, out=out, rounds=1, **same)
    moved = folder.rename(tmp_path / "moved")
    result = fastfpl.run("promptfl", dataset=moved, out=out, rounds=2, resume=True, **same)
    assert len(result.rounds) == 2
    save(moved / "apple/red_heart/new.png")
    with pytest.raises(InputError, match=r"must have the settings of .*train_images"):
        fastfpl.run("promptfl", dataset=moved, out=out, rounds=3, resume=True, **same)


@pytest.mark.slow
def test_a_manifest_becomes_a_federation(tmp_path):
    folder = vendors(tmp_path / "emoji", each=4)
    rows = [
        {
            "image": path.relative_to(folder).as_posix(),
            "what": path.parts[-2],
            "who": path.parts[-3],
        }
        for path in sorted(folder.rglob("*.png"))
    ]
    table(folder / "list.tsv", rows)
    code, out, err = told(
        *("compare", "zeroshot", "promptfl", "--dataset", "manifest:emoji/list.tsv"),
        *("--columns", "path=image,label=what,client=who", "--partition", "given"),
        *("--shots", "all", "--digest", "content", "--cache", str(tmp_path / "cache"), *SHORT),
        cwd=tmp_path,
    )
    assert code == 0, err
    assert (tmp_path / "runs/compare-manifest-list.tsv/index.html").exists()
    for vendor in VENDORS:
        assert vendor in out
    content = json.loads(
        (tmp_path / "runs/compare-manifest-list.tsv/promptfl-seed0/result.json").read_text()
    )
    assert content["data"]["training"] == {"used": 36, "there": 36}
    assert content["settings"]["columns"] == {"path": "image", "label": "what", "client": "who"}


@pytest.mark.parametrize(
    ("dataset", "more", "sentence"),
    [
        ("folder:empty", (), "must hold image files"),
        ("folder:nowhere", (), "must be a folder or a zip file of images; got nowhere"),
        ("folder:", (), "must say where the data lies; got 'folder:'"),
        ("folder:one", (), "at least two classes; got 1, 'cat'"),
        ("folder:hole", (), "every class folder of hole must hold an image; got none in 'owl/'"),
        ("folder:mixed", (), "1 and 2 folders deep"),
        ("folder:alike", (), "must differ to CLIP"),
        ("folder:testonly", (), "must hold training images of every class; got only test .* 'dog'"),
        ("folder:numbers", (), "must have names that people would say"),
        ("folder:broken", (), r"[12].png must be an image; got .*put it back from your own copy"),
        ("folder:broken", (), r'or load with on_corrupt="skip" \(--on-corrupt skip\)$'),
        ("manifest:leaves.csv", (), "must lead to files below .* row 1: write paths .*--root"),
        ("folder:bob.csv", (), "got bob.csv, a list: write manifest:bob.csv"),
        ("manifest:good", (), r"path must be a file; got good \(a folder\): write folder:good"),
        ("foldr:good", (), "must begin with folder:, .*; got 'foldr:good'; did you mean 'folder:'"),
        ("my_images", (), "images of your own are folder:PATH, manifest:FILE or hf:PATH_OR_NAME"),
        ("manifest:bob.csv", ("--partition", "given"), "got only test images of 'bob'"),
        ("good", (), "must be a data set; got 'good'.*or write folder:good"),
        ("./good", (), "got './good', a path: write folder:./good"),
        ("folder:good", ("--clients", "3", "--partition", "given"), "names no clients"),
        ("folder:good", ("--columns", "path=x"), "columns must be left out but for manifest: and"),
        ("manifest:bob.csv", ("--columns", "path"), "columns is refused: it must read path=file"),
        ("folder:good", ("--root", "x"), "root must be left out for folder:"),
        ("glyphs", ("--layout", "class"), "layout must be left out but for folder:; got 'class'"),
        ("live:good", (), "must be handed over again by dataset="),
    ],
)
def test_bad_input_ends_with_a_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, dataset, more, sentence
):
    os.makedirs(tmp_path / "empty")
    tree(tmp_path / "good", *TWO)
    tree(tmp_path / "one", "cat/1.png", "cat/2.png")
    tree(tmp_path / "hole", *TWO)
    os.makedirs(tmp_path / "hole/owl")
    tree(tmp_path / "mixed", *TWO, "birds/owl/1.png")
    tree(tmp_path / "alike", "sea_horse/1.png", "Sea horse/1.png")
    tree(tmp_path / "testonly", "train/cat/1.png", "test/cat/1.png", "test/dog/1.png")
    tree(tmp_path / "numbers", "0/1.png", "1/1.png", "0/2.png", "1/2.png")
    tree(tmp_path / "broken", *TWO)
    for path in TWO:
        (tmp_path / "broken" / path).write_bytes(b"\x89PNG no image")
    rows = [{"path": "../a.png", "label": "cat"}]
    table(tmp_path / "leaves.csv", rows)
    table(
        tmp_path / "bob.csv",
        [
            {"path": f"good/{path}", "label": path[:3], "split": part, "client": who}
            for path, part, who in zip(
                TWO, ("train", "test", "train", "train"), ("ann", "bob", "ann", "ann"), strict=True
            )
        ],
    )
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    arguments = ["run", "promptfl", "--dataset", dataset, "--partition", "iid", "--clients", "1"]
    arguments += [*more, "--out", "run", "--cache", str(tmp_path / "run/cache"), *SHORT]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert re.search(sentence, lines[0]), lines[0]
    after = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} - set(before)
    assert not [p for p in after if p.is_file() or tmp_path.joinpath(p).is_file()]


def test_images_that_do_not_decode_can_be_skipped(tmp_path):
    paths = [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(5)]
    folder = tree(tmp_path, *paths)
    (folder / paths[0]).write_bytes(b"nothing")
    dataset = load_dataset(f"folder:{folder}", on_corrupt="skip")
    assert dataset.skipped == 1
    assert len(dataset.train) + len(dataset.test) == 9


# -- data check ------------------------------------------------------------------------------------


def test_data_check_counts_and_finds_what_spoils_figures(tmp_path):
    folder = tree(tmp_path / "pets", *(f"{d}/{p}" for d in ("ann", "bob") for p in TWO))
    dataset = from_folder(folder, given=True)
    one, other = dataset.train.path(0), dataset.test.path(0)
    good = CliRunner().invoke(group, ["data", "check", f"folder:{folder}", "--given", "--decode"])
    assert good.exit_code == 0
    assert "no problem found" in good.output
    found = check_own(f"folder:{folder}", given=True)
    assert found.counts["client"] == {"ann": (2, 2), "bob": (2, 2)}
    assert found.counts["class"] == {"cat": (2, 2), "dog": (2, 2)}
    assert check_own(f"folder:{folder}").counts["domain"] == {"ann": (2, 2), "bob": (2, 2)}
    other.write_bytes(one.read_bytes())
    broken = dataset.train.path(1)
    broken.write_bytes(b"nothing")
    (twice,) = check_own(f"folder:{folder}").problems
    assert str(other) in twice
    assert str(one) in twice
    assert len(check_own(f"folder:{folder}", decode=True).problems) == 2
    code, out, _ = told("data", "check", f"folder:{folder}", "--decode")
    assert code == 2
    assert "2 problems" in out
    assert "is tested on, and trained on as" in out.replace("\n", " ")


# -- objects ---------------------------------------------------------------------------------------


def images(count: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_arrays_are_a_data_set(tmp_path):
    pixels = images(12)
    labels = [0, 1, 2] * 4
    who = ["ann", "bob"] * 6
    dataset = from_arrays(pixels, labels, classnames=["c", "b", "a"], clients=who, name="mine")
    assert dataset.classnames == ("c", "b", "a")
    assert dataset.clients == ("ann", "bob")
    same = {"partition": "given", "rounds": 1, "local_epochs": 1, "n_ctx": 2}
    same |= {"cache": tmp_path / "cache"}
    result = fastfpl.run("promptfl", dataset=dataset, out=tmp_path / "run", **same)
    assert result.settings["dataset"] == "live:mine"
    assert result.data["clients"] == ["ann", "bob"]
    json.dumps(result.settings)
    # another object of the same pixels goes on, one of others does not
    again = from_arrays(pixels.copy(), labels, classnames=["c", "b", "a"], clients=who, name="mine")
    more = {**same, "rounds": 2, "resume": True, "out": tmp_path / "run"}
    assert len(fastfpl.run("promptfl", dataset=again, **more).rounds) == 2
    pixels = pixels.copy()
    pixels[0, 0, 0] ^= 1
    other = from_arrays(pixels, labels, classnames=["c", "b", "a"], clients=who, name="mine")
    with pytest.raises(InputError, match=r"train_images|test_images"):
        fastfpl.run("promptfl", dataset=other, **{**more, "rounds": 3})
    comparison = fastfpl.compare(["zeroshot", "promptfl"], dataset=dataset, **same)
    assert set(comparison.results) == {"zeroshot", "promptfl"}
    swept = fastfpl.sweep(["promptfl"], "shots", [1, 2], dataset=dataset, **same)
    assert list(swept.comparisons) == [1, 2]


def test_images_may_be_of_any_kind(tmp_path):
    grey = np.full((5, 4), 7, dtype=np.uint8)
    dataset = from_arrays(
        [Image.fromarray(grey), grey, grey[..., None], np.dstack([grey] * 3)] * 2,
        ["ant", "bee"] * 4,
        split=["train", "train", "test", "test"] * 2,
    )
    assert dataset.classnames == ("ant", "bee")
    for split in (dataset.train, dataset.test):
        for image in split.images(range(len(split))):
            assert image.shape == (5, 4, 3)
            assert (image == 7).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [0, 1]}, "labels must be one an image, 4; got 2"),
        ({"labels": [0, 1, 2, 0]}, r"labels must lie in \[0, 2\), the classnames; got 2"),
        ({"labels": [0, 0, 0, 0]}, "every class must have an image; got none of 'b'"),
        ({"classnames": None}, "classnames must be given unless labels are names; got 0"),
        ({"clients": ["x"]}, "clients must be as long as the images, 4; got 1"),
        ({"split": ["late"] * 4}, "split must be one of train"),
        ({"images": np.zeros((4, 5, 5, 3))}, "pixels must be uint8 in 0 to 255; got float64"),
        ({"images": np.zeros((4, 5, 5, 2), dtype=np.uint8)}, "must have shape"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(change, sentence):
    good = {"images": images(4), "labels": [0, 1, 0, 1], "classnames": ["a", "b"], **change}
    pixels, labels = good.pop("images"), good.pop("labels")
    with pytest.raises(FastfplError, match=sentence):
        from_arrays(pixels, labels, **good)


class Pairs(torch.utils.data.Dataset):
    """What people have written for PyTorch."""

    classes = ("ant", "bee")

    def __init__(self, count, kind):
        self.count, self.kind = count, kind

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = images(self.count)[index]
        image = {"pil": Image.fromarray(pixels), "tensor": torch.tensor(pixels).permute(2, 0, 1)}
        return image[self.kind], index % 2


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_a_torch_dataset_is_a_data_set(kind):
    dataset = from_torch(Pairs(8, kind), test=Pairs(4, kind))
    assert dataset.classnames == ("ant", "bee")
    assert (len(dataset.train), len(dataset.test)) == (8, 4)
    assert (dataset.train.images([5])[0] == images(8)[5]).all()
    assert (dataset.test.images([2])[0] == images(4)[2]).all()
    assert dataset.train.labels.tolist() == [0, 1] * 4
    drawn = from_torch(Pairs(10, kind), fingerprint="mine-1")
    assert (len(drawn.train), len(drawn.test)) == (8, 2)
    assert from_torch(Pairs(10, kind)).train.fingerprint != drawn.train.fingerprint
    with pytest.raises(InputError, match=r"map-style"):
        from_torch(iter([]))


def test_a_dataset_of_another_kind_is_refused():
    with pytest.raises(InputError, match=r"must be a name, a path or a fastfpl.data.Dataset; got "):
        fastfpl.run("promptfl", dataset=Pairs(4, "pil"))  # type: ignore[arg-type]
    dataset = from_arrays(images(4), ["a", "b"] * 2)
    with pytest.raises(InputError, match=r"layout must be left out with a data set at hand"):
        fastfpl.run("promptfl", dataset=dataset, layout="class")


@pytest.mark.filterwarnings("ignore")  # the library's own, at work with pickles
def test_a_set_of_the_datasets_library_is_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["ant", "bee"]),
            "site": datasets.Value("string"),
        }
    )
    rows = {
        "picture": [Image.fromarray(image) for image in images(8)],
        "kind": [0, 1] * 4,
        "site": ["x", "x", "y", "y"] * 2,
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": made, "test": made.select(range(4))}).save_to_disk(
        str(tmp_path / "mine")
    )
    dataset = load_dataset(f"hf:{tmp_path / 'mine'}", columns={"client": "site"})
    assert (dataset.name, dataset.classnames) == ("mine", ("ant", "bee"))
    assert dataset.clients == ("x", "y")
    assert (len(dataset.train), len(dataset.test)) == (8, 4)
    assert (dataset.train.images([3])[0] == images(8)[3]).all()
    made.to_parquet(str(tmp_path / "mine.parquet"))
    assert len(load_dataset(f"hf:{tmp_path / 'mine.parquet'}").train) == 6
    with pytest.raises(InputError, match=r"columns must be of .*; got 'nothing'"):
        load_dataset(f"hf:{tmp_path / 'mine'}", columns={"label": "nothing"})


def test_without_the_datasets_library_there_is_a_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Missing, match=r"pip install fastfpl\[hf\]"):
        load_dataset("hf:somebody/something")


# -- the guide -------------------------------------------------------------------------------------

GUIDE = (Path(__file__).resolve().parent.parent / "docs/own_images.md").read_text(encoding="utf-8")


def test_the_guide_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Every command and the program, on what the guide says lies there; short, for time's sake."""
    folder = vendors(tmp_path / "emoji", each=20)
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    rows = [
        {"file": path.as_posix(), "what": path.parts[1], "vendor": path.parts[0]} for path in paths
    ]
    table(folder / "list.csv", rows)
    (tmp_path / "lists").mkdir()
    table(tmp_path / "lists/mine.tsv", [{"path": r["file"], "label": r["what"]} for r in rows])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 6
    for number, command in enumerate(commands):
        name, *arguments = shlex.split(command, comments=True)
        assert name == "fastfpl"
        if arguments[0] != "data":
            arguments += [*SHORT, "--out", f"out{number}"]
        main(arguments)
    assert "no problem found" in capsys.readouterr().out
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(program, "own_images.md", "exec"), {})  # the guide's own lines
    assert re.match(r"\{'apple': [01]\.\d*, 'google'", capsys.readouterr().out)
    (line,) = re.findall(r"\| layout \|.*\n\|.*\n((?:\|.*\n)+)", GUIDE)
    assert set(re.findall(r"`((?:\w+/)*class)`", line)) <= set(LAYOUTS)
