"""Images of data sets in files: colour modes and depths, and what does not decode."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastfpl.data import load_dataset
from fastfpl.data.catalogue import FACTS
from fastfpl.data.check import check_files
from fastfpl.data.listing import decode
from fastfpl.errors import Damaged, InputError, Missing
from tests import trees
from tests.trees import TREES, listed, refused, spoil


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
