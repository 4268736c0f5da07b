"""Clients' training folders with one test set for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastfpl
from fastfpl.data import from_folder
from fastfpl.errors import Damaged, InputError
from tests.own_trees import tree

TRAIN = [f"train/{client}/{name}/{k}.png" for client in ("apple", "google")
         for name in ("cat", "dog") for k in range(2)]  # fmt: skip
TEST = [f"test/{name}/{k}.png" for name in ("cat", "dog") for k in range(3)]


def of(dataset, split: str) -> list[str]:
    """Names of the clients of a split's images; * is of all."""
    numbers = getattr(dataset, split).clients
    return ["*" if n < 0 else dataset.clients[n] for n in numbers]


@pytest.mark.parametrize("asked", [{"given": True}, {"layout": "split/client/class"}])
def test_a_test_set_beside_the_clients_is_asked_of_all(tmp_path: Path, asked) -> None:
    dataset = from_folder(tree(tmp_path, *TRAIN, *TEST), **asked)
    assert dataset.clients == ("apple", "google")
    assert of(dataset, "train") == ["apple"] * 4 + ["google"] * 4
    assert of(dataset, "test") == ["*"] * 6
    assert dataset.classnames == ("cat", "dog")
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.notes[0].startswith("layout split/client/class")
    assert "6 test images of no client: asked of all of them" in dataset.notes


def test_a_client_may_have_test_images_of_its_own_too(tmp_path: Path) -> None:
    own = ["test/apple/cat/0.png", "val/dog/7.png"]
    dataset = from_folder(tree(tmp_path, *TRAIN, *TEST, *own), given=True)
    assert sorted(of(dataset, "test")) == ["*"] * 6 + ["apple"]
    assert "1 validation image are not used" in dataset.notes


def test_validation_images_may_be_of_all(tmp_path: Path) -> None:
    dataset = from_folder(tree(tmp_path, *TRAIN, "val/cat/1.png", "val/dog/1.png"), given=True)
    assert of(dataset, "test") == ["*"] * 2


def test_a_run_asks_every_client_about_the_whole_set(tmp_path: Path) -> None:
    folder = tree(tmp_path / "photos", *TRAIN, *TEST)
    result = fastfpl.run(
        "local", dataset=f"folder:{folder}", partition="given", rounds=1, local_epochs=1,
        n_ctx=4, cache=tmp_path / "cache",
    )  # fmt: skip
    assert result.data["clients"] == ["apple", "google"]
    shares = {round(a * 6, 6) for a in result.rounds[-1]["clients"]}
    assert all(share == round(share) for share in shares)  # of six images


@pytest.mark.parametrize(
    ("paths", "options", "kind", "sentence"),
    [
        # nobody says that folders are clients
        ([*TRAIN, *TEST], {}, InputError, r"choose by layout \(--layout\) split/client/class$"),
        # training images of nobody
        (
            [*TRAIN, *TEST, "train/cat/9.png"], {"given": True}, InputError,
            r"images 2 and 3 folders deep, in '(train|test)/cat/' and .*: sort them alike, or",
        ),
        (
            [*TRAIN, "train/cat/9.png"], {"layout": "split/client/class"}, Damaged,
            r"must lie in split/client/class/ with that layout; got one in 'train/cat/'",
        ),
        # a class that nobody trains
        ([*TRAIN, *TEST, "test/owl/1.png"], {"given": True}, Damaged, "only test images of 'owl'"),
        # the clients' folders are beside the test set's: the cure is one that works
        (
            [*(p.removeprefix("train/") for p in TRAIN), *TEST], {"given": True}, InputError,
            r"client/class or class, or move the folders of clients into train/, and 'test' is ask",
        ),
        # domains have no test set in common
        (
            [*TRAIN, *TEST], {"layout": "split/domain/class"}, Damaged,
            r"must lie in split/domain/class/ with that layout; got one in 'test/cat/'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_with_a_cure(
    tmp_path: Path, paths, options, kind, sentence
) -> None:
    with pytest.raises(kind, match=sentence):
        from_folder(tree(tmp_path, *paths), **options)
