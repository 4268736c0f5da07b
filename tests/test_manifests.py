"""Lists of a person's images: what a manifest names, and what is refused of it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from fastfpl.data import from_manifest
from fastfpl.errors import FastfplError, InputError, Missing
from tests.command import told
from tests.own_trees import TWO, rows_of, table, tree, written


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


def test_parquet_that_nothing_reads_is_not_called_damaged(tmp_path, monkeypatch):
    """Pandas alone reads none, and says so by an ImportError of its own."""
    for name in ("pyarrow", "pyarrow.parquet", "fastparquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(Missing, match=r"to read a.parquet; got neither: pip install pyarrow"):
        from_manifest(tmp_path / "a.parquet")
