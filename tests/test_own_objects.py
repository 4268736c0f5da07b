"""Images that are no files: arrays, datasets of torch, and of the datasets library."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastfpl
from fastfpl.data import from_arrays, from_torch, load_dataset
from fastfpl.errors import FastfplError, InputError, Missing


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
