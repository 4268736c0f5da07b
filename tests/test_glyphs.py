"""`glyphs`: every image follows from its split and index, and shows what its label says."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fastfpl.data.glyphs import (
    CLASSNAMES,
    DIGITNAMES,
    DOMAINS,
    GLYPHS_VERSION,
    GlyphSplit,
    contact_sheet,
    glyphs,
    pretrain,
)
from fastfpl.errors import InputError

C, D = len(CLASSNAMES), len(DOMAINS)


@pytest.fixture(scope="module")
def task():
    return glyphs()


@pytest.fixture(scope="module")
def every_cell(task):
    """One image of each class in each domain."""
    return task.train.images(np.arange(C * D))


def ink(image):
    """Where the image differs from the commonest colour of its border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.abs(image.astype(int) - np.median(border, axis=0)).sum(-1) > 60


def centre(mask):
    """Centre of the ink in pixels from the middle of the image: to the right, down."""
    rows, columns = np.nonzero(mask)
    return columns.mean() - 13.5, rows.mean() - 13.5


def in_domain(split, domain, n):
    return np.flatnonzero(split.domains == DOMAINS.index(domain))[:n]


def whole(split, classname):
    """Clipart images of one class with nothing in front, and what is said of them."""
    rows = in_domain(split, "clipart", len(split))
    rows = rows[split.labels[rows] == CLASSNAMES.index(classname)]
    said = [split.attributes(int(row)) for row in rows]
    kept = [k for k, words in enumerate(said) if not words.covered]
    assert 0 < len(kept) < len(rows)
    return [(image, said[k]) for k, image in zip(kept, split.images(rows[kept]), strict=True)]


def test_names_are_unique_and_short():
    names = (*CLASSNAMES, *DIGITNAMES)
    assert len(CLASSNAMES) == 48
    assert len(set(names)) == 58
    assert all(1 <= len(name.split()) <= 3 and name == name.lower() for name in names)


def test_task_has_the_announced_sizes(task):
    assert task.name == "glyphs"
    assert task.classnames == CLASSNAMES
    assert task.domains == DOMAINS
    assert len(task.train) == 9216
    assert len(task.test) == 5760
    assert len(pretrain()) == 58 * 6 * 600


def test_images_are_one_stacked_uint8_array(task):
    images = task.test.images([5, 2, 5])
    assert isinstance(images, np.ndarray)
    assert images.shape == (3, 28, 28, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images[0], images[2])
    assert task.test.images([]).shape == (0, 28, 28, 3)


def test_order_and_batching_change_nothing(task):
    indices = np.random.default_rng(0).permutation(len(task.train))[:203]
    together = task.train.images(indices)
    assert np.array_equal(task.train.images(indices[::-1])[::-1], together)
    assert np.array_equal(np.concatenate([task.train.images([i]) for i in indices]), together)
    uneven = [task.train.images(part) for part in np.split(indices, [1, 18, 90])]
    assert np.array_equal(np.concatenate(uneven), together)


def test_another_process_draws_the_same_bytes(task):
    program = (
        "import sys; from fastfpl.data.glyphs import glyphs; "
        "sys.stdout.buffer.write(glyphs().test.images(range(700, 760)).tobytes()); "
        "assert not {'torch', 'PIL', 'matplotlib'} & set(sys.modules)"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    drawn = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, env=path
    ).stdout
    assert drawn == task.test.images(range(700, 760)).tobytes()


def test_streams_share_no_image(task):
    drawn = [s.images(np.arange(600)) for s in (task.train, task.test, pretrain())]
    images = {image.tobytes() for images in drawn for image in images}
    assert len(images) == 1800


def test_splits_are_balanced(task):
    for split, each in ((task.train, 32), (task.test, 20), (pretrain(), 600)):
        cells = np.bincount(split.labels * D + split.domains)
        assert np.all(cells == each)
    block = task.train.labels[: C * D] * D + task.train.domains[: C * D]
    assert np.array_equal(np.sort(block), np.arange(C * D))


def test_only_the_pretraining_stream_holds_digits(task):
    assert pretrain().classnames[C:] == DIGITNAMES
    assert task.train.labels.max() == task.test.labels.max() == C - 1


def test_labels_and_domains_cannot_be_changed(task):
    for array in (task.train.labels, task.train.domains):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_fingerprints_tell_streams_apart(task):
    prints = {task.train.fingerprint, task.test.fingerprint, pretrain().fingerprint}
    assert len(prints) == 3
    assert all(GLYPHS_VERSION in p for p in prints)


def test_every_class_shows_in_every_domain(every_cell, task):
    spread = every_cell.reshape(C * D, -1, 3).std(axis=1).max(axis=1)
    assert spread.min() > 8
    # where only a line shows the thing, the line itself must be there
    for domain in ("quickdraw", "sketch"):
        drawn = every_cell[in_domain(task.train, domain, C)]
        assert min(ink(image).sum() for image in drawn) >= 15


def test_classes_differ_beyond_their_variation(task):
    def view(split, n):
        rows = in_domain(split, "clipart", n)
        masks = [ink(image) for image in split.images(rows)]
        middle = [np.roll(m, [-round(x) for x in centre(m)[::-1]], (0, 1)) for m in masks]
        coarse = np.stack(middle).astype(float).reshape(len(rows), 14, 2, 14, 2).mean((2, 4))
        return coarse.reshape(len(rows), -1), split.labels[rows]

    train, labels = view(task.train, C * 32)
    test, truth = view(task.test, C * 20)
    centres = np.stack([train[labels == c].mean(0) for c in range(C)])
    apart = ((test[:, None] - centres) ** 2).sum(-1)
    assert np.mean(apart.argmin(1) == truth) > 12 / C


def test_attributes_tell_where_the_glyph_is(task):
    # the circle fills its outline evenly, so that its ink is centred where it was put
    seen = set()
    for image, said in whole(task.train, "circle") + whole(task.test, "circle"):
        x, y = centre(ink(image))
        where = said.position
        seen.add(where)
        if where == "centre":
            assert max(abs(x), abs(y)) < 2.4
        else:
            along = {"left": -x, "right": x, "top": -y, "bottom": y}[where]
            assert along > 0.8
            assert along > max(abs(x), abs(y)) - 1
    assert len(seen) >= 4


def test_attributes_tell_the_size(task):
    areas = {"small": [], "medium": [], "large": []}
    for image, said in whole(task.train, "square"):
        areas[said.size].append(ink(image).sum())
    assert max(areas["small"]) < min(areas["large"])


def test_attributes_tell_colour_and_ground(task):
    lean = {"red": (0, 2), "green": (1, 0), "blue": (2, 0)}
    grounds = {"plain white": (252, 252, 252), "plain cream": (252, 242, 214)}
    checked = 0
    for image, said in whole(task.train, "circle") + whole(task.test, "circle"):
        x, y = centre(ink(image))
        middle = image[round(13.5 + y), round(13.5 + x)].astype(int)
        if said.colour in lean:
            more, less = lean[said.colour]
            assert middle[more] > middle[less] + 40
            checked += 1
        if said.ground in grounds:
            border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert np.abs(np.median(border, axis=0) - grounds[said.ground]).max() < 6
            checked += 1
    assert checked > 8


def test_attributes_agree_with_label_and_domain():
    split = pretrain()
    for index in range(0, len(split), 9973):
        said = split.attributes(index)
        assert said.classname == split.classnames[split.labels[index]]
        assert said.domain == DOMAINS[split.domains[index]]
        assert said.tilt in ("upright", "tilted")
        assert (said.colour == "black") == (said.domain == "quickdraw")


def test_length_does_not_change_the_images():
    long, short = GlyphSplit("test", CLASSNAMES, 9999), GlyphSplit("test", CLASSNAMES, 10)
    assert np.array_equal(long.images(range(10)), short.images(range(10)))
    assert long.fingerprint != short.fingerprint


@pytest.mark.parametrize("index", [5760, -1, 9999])
def test_an_index_outside_is_refused(task, index):
    said = rf"fastfpl\.data\.glyphs: index must lie in \[0, 5760\); got {index}$"
    with pytest.raises(InputError, match=said):
        task.test.images([0, index])
    with pytest.raises(InputError, match=said):
        task.test.attributes(index)


@pytest.mark.parametrize("indices", [[0.5], [True], ["a"], [[1, 2]], 3, None])
def test_what_is_no_list_of_integers_is_refused(task, indices):
    with pytest.raises(InputError, match="indices must be a list of integers; got"):
        task.test.images(indices)


@pytest.mark.parametrize(
    ("name", "classnames", "length", "said"),
    [
        ("train", CLASSNAMES[:5], -1, "length must be at least 0; got -1"),
        ("train", ("circle", "yacht"), 10, "classnames must begin CLASSNAMES"),
        ("train", (), 10, "classnames must begin CLASSNAMES"),
    ],
)
def test_a_split_that_cannot_be_drawn_is_refused(name, classnames, length, said):
    with pytest.raises(InputError, match=said):
        GlyphSplit(name, classnames, length)


def test_contact_sheet_shows_every_cell(tmp_path):
    image = pytest.importorskip("PIL.Image")
    contact_sheet(tmp_path / "sheet.png")
    sheet = np.asarray(image.open(tmp_path / "sheet.png").convert("RGB"))
    assert sheet.shape[0] > 20 * 56
    assert sheet.shape[1] > 18 * 56
    assert (tmp_path / "sheet.png").stat().st_size < 600_000
