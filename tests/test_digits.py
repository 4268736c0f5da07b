"""The bundled digits, the registry of data sets, and views of fewer classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastfpl
from fastfpl import data
from fastfpl.data import digits as digits_module
from fastfpl.data.digits import digits
from fastfpl.errors import InputError, Missing


@pytest.fixture(scope="module")
def dataset():
    return digits()


def test_digits_have_their_published_counts(dataset):
    assert dataset.name == "digits"
    assert dataset.classnames[3] == "three"
    assert dataset.domains == ("handwritten",)
    assert (len(dataset.train), len(dataset.test)) == (1198, 599)
    both = np.concatenate([dataset.train.labels, dataset.test.labels])
    # class counts of the UCI set's test part
    assert np.bincount(both).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    for label, count in enumerate(np.bincount(both)):
        assert (dataset.test.labels == label).sum() == round(count / 3)


def test_train_and_test_share_no_image(dataset):
    train = {image.tobytes() for image in dataset.train.images(range(len(dataset.train)))}
    test = [image.tobytes() for image in dataset.test.images(range(len(dataset.test)))]
    assert len(train) == len(dataset.train)
    assert not train.intersection(test)


def test_pixels_are_the_original_ink_on_white(dataset):
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.asarray(dataset.train.images(range(len(dataset.train))))
    assert images.dtype == np.uint8
    assert images.shape == (1198, 28, 28, 3)
    assert (images[..., 0] == images[..., 1]).all()
    assert (images[..., 0] == images[..., 2]).all()
    # each class' mean drawing is nearest to the original one with a margin, and as dark: the same
    # drawings under the same labels with the right polarity
    means = np.stack([bundle.images[bundle.target == k].mean(axis=0) / 16 for k in range(10)])
    originals = np.kron(np.pad(means, ((0, 0), (1, 1), (1, 1))), np.ones((14, 14)))
    for label in range(10):
        ink = 1 - images[dataset.train.labels == label].mean(axis=(0, 3)) / 255
        assert abs(ink.mean() - originals[label].mean()) < 0.02
        assert ink[0].max() < 0.3
        distances = ((np.kron(ink, np.ones((5, 5))) - originals) ** 2).sum(axis=(1, 2))
        assert int(distances.argmin()) == label


def test_digits_are_the_same_every_time(dataset):
    again = digits()
    assert again.train.fingerprint == dataset.train.fingerprint
    assert again.train.fingerprint != again.test.fingerprint
    np.testing.assert_array_equal(again.test.labels, dataset.test.labels)
    np.testing.assert_array_equal(again.test.images([5, 0]), dataset.test.images([5, 0]))


def test_the_fingerprint_follows_pixels_and_labels(dataset):
    pixels = np.asarray(dataset.test.images([0, 1]))
    labels = dataset.test.labels[:2]
    prints = {digits_module._Drawings(pixels, labels).fingerprint}
    changed = pixels.copy()
    changed[1, 27, 27, 2] ^= 1
    prints.add(digits_module._Drawings(changed, labels).fingerprint)
    prints.add(digits_module._Drawings(pixels, labels + 1).fingerprint)
    assert len(prints) == 3


def test_what_is_returned_cannot_change_the_split(dataset):
    before = np.array(dataset.test.images([7]))
    dataset.test.images([7])[0][:] = 0
    np.testing.assert_array_equal(dataset.test.images([7]), before)


def test_missing_scikit_learn_names_the_cure(monkeypatch):
    digits_module._all.cache_clear()  # drawn once a process
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Missing, match=r'pip install "fastfpl\[digits\]"$'):
        digits()


def test_load_dataset_finds_digits(dataset):
    assert data.load_dataset("digits").train.fingerprint == dataset.train.fingerprint


def test_an_unknown_name_is_answered_with_its_neighbour():
    with pytest.raises(InputError, match="got 'digit'; did you mean 'digits'"):
        data.load_dataset("digit")


def test_a_root_that_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="root must be left out for 'digits'"):
        data.load_dataset("digits", tmp_path)


def test_a_set_in_files_gets_its_root(monkeypatch, tmp_path, dataset):
    opened = []

    def in_files(root):
        opened.append(root)
        return dataset

    monkeypatch.setitem(data._HOME, "files", ("fastfpl.data.digits", "in_files", True))
    monkeypatch.setattr(digits_module, "in_files", in_files, raising=False)
    assert data.load_dataset("files", tmp_path) is dataset
    assert opened == [tmp_path]
    with pytest.raises(InputError, match="root must be the folder that holds 'files'; got None"):
        data.load_dataset("files")


def test_importing_data_loads_nothing_heavy():
    code = (
        "import sys, fastfpl.data as d\n"
        "late = {'Preprocess', *d._MAKERS}\n"
        "assert late <= set(d.__all__)\n"
        "assert all(hasattr(d, n) for n in d.__all__ if n not in late)\n"
        "bad = {'torch', 'torchvision', 'sklearn', 'scipy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded {bad}' if bad else 0)\n"
    )
    home = Path(fastfpl.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_preprocess_is_imported_when_asked_for():
    assert data.Preprocess.__module__ == "fastfpl.data.transforms"
    with pytest.raises(AttributeError, match="has no attribute 'preprocess'"):
        data.preprocess  # noqa: B018


def test_base_and_novel_halves_make_data_sets(dataset):
    base, novel = data.base_novel(10)
    first, second = data.restrict(dataset, base), data.restrict(dataset, novel)
    assert first.classnames + second.classnames == dataset.classnames
    assert second.classnames[0] == "five"
    for side in ("train", "test"):
        whole, a, b = (getattr(d, side) for d in (dataset, first, second))
        assert len(a) + len(b) == len(whole)
        assert set(b.labels) == set(range(5))
        for label in range(5):
            old = np.flatnonzero(whole.labels == label + 5)
            new = np.flatnonzero(b.labels == label)
            np.testing.assert_array_equal(b.images(new), whole.images(old))
        assert len({whole.fingerprint, a.fingerprint, b.fingerprint}) == 3
        assert len(b.domains) == len(b)


def test_the_order_of_the_kept_labels_does_not_matter(dataset):
    one, two = data.restrict(dataset, [7, 2]), data.restrict(dataset, np.array([2, 7]))
    assert one.classnames == two.classnames == ("two", "seven")
    assert one.test.fingerprint == two.test.fingerprint
    np.testing.assert_array_equal(one.test.labels, two.test.labels)


def test_a_subset_of_a_subset_finds_its_images(dataset):
    odd = data.ClassSubset(dataset.test, [1, 3, 5, 7, 9])
    five = data.ClassSubset(odd, [2])
    assert set(dataset.test.labels[odd.indices[five.indices]]) == {5}
    expected = dataset.test.images(np.flatnonzero(dataset.test.labels == 5))
    np.testing.assert_array_equal(five.images(range(len(five))), expected)


@pytest.mark.parametrize("labels", [[], [1, 1]])
def test_labels_that_make_no_subset_are_refused(dataset, labels):
    with pytest.raises(InputError, match="labels must be distinct and at least one"):
        data.restrict(dataset, labels)


def test_labels_outside_are_refused(dataset):
    with pytest.raises(InputError, match=r"labels must lie in \[0, 10\); got \[10\]"):
        data.restrict(dataset, [3, 10])
