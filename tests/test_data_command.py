"""`fastfpl data`: the sets it lists, what it checks, and what it downloads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastfpl.data import DATASETS, load_dataset
from fastfpl.data import cifar as cifar_module
from fastfpl.data.catalogue import FACTS
from fastfpl.data.check import check_files
from fastfpl.errors import Missing
from tests import trees
from tests.command import call
from tests.trees import TREES, complete, spoil


def test_list_shows_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "data", "list")
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
    code, out, _ = call(capsys, "data", "check", tree.name, "--root", str(tmp_path))
    assert code == 2, "a miniature has not the published size"
    assert f"{len(tree.train)} of {FACTS[tree.name].train} train images" in out
    assert out.endswith(f"{tree.name} is not complete\n")
    complete(monkeypatch, tree)
    code, out, _ = call(capsys, "data", "check", tree.name, "--root", str(tmp_path))
    assert (code, "MISSING" in out) == (0, False)
    for need in FACTS[tree.name].needs:
        assert f"  there    {need.path}\n" in out
    assert f"  {len(tree.test)} of {len(tree.test)} test images\n" in out
    assert out.endswith(f"{tree.name} is complete\n")
    spoil(tmp_path / tree.test[0].path, "cut")
    code, out, _ = call(capsys, "data", "check", tree.name, "--root", str(tmp_path))
    assert code == 0
    code, out, _ = call(capsys, "data", "check", tree.name, "--root", str(tmp_path), "--decode")
    assert code == 2
    assert f"{tmp_path / tree.test[0].path} does not decode: " in out


def test_cifar_is_checked_too(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.cifar(tmp_path, "cifar10", "cifar10")
    facts = replace(FACTS["cifar10"], classes=3, train=20, test=4)
    monkeypatch.setitem(FACTS, "cifar10", facts)
    code, out, _ = call(capsys, "data", "check", "cifar10", "--root", str(tmp_path), "--decode")
    assert code == 0
    assert "20 of 20 train images" in out
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_4").write_bytes(b"x")
    code, out, _ = call(capsys, "data", "check", "cifar10", "--root", str(tmp_path))
    assert code == 2
    assert "data_batch_4 must be a pickle of plain lists and arrays" in out


@pytest.mark.parametrize("name", sorted(FACTS))
def test_check_says_where_to_get_what_is_missing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "data", "check", name, "--root", str(tmp_path))
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
    code, out, _ = call(capsys, "data", "check", "caltech101", "--root", str(tmp_path))
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
    code, out, _ = call(capsys, "data", "check", "food101", "--root", str(tmp_path))
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
    code, out, err = call(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    ("root", "got"),
    [("nowhere", "(nothing)"), ("/dev/null", "(a device)"), ("x" * 300, "(File name too long)")],
)
def test_check_of_no_folder_says_what_is_there(root: str, got: str, capsys) -> None:
    for name in ("eurosat", "cifar10", "domainnet345"):
        code, out, err = call(capsys, "data", "check", name, "--root", root, "--decode")
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
        code, out, _ = call(capsys, "data", "download", name, "--root", str(root))
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
