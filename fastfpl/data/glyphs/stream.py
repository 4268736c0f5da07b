"""Streams of glyphs as splits, what may be said of an image, and the task that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fastfpl.data.base import Dataset, Images, Split
from fastfpl.data.glyphs.canvas import COLOURS, GROUNDS, Canvas, Choices
from fastfpl.data.glyphs.names import CLASSNAMES, DOMAINS, GLYPHS_VERSION, NAMES, SIDE
from fastfpl.data.glyphs.philox import PIXELS, WORDS, shares_of, words_of
from fastfpl.data.glyphs.styles import STYLES
from fastfpl.errors import InputError

__all__ = ["Attributes", "GlyphSplit", "glyphs", "pretrain"]

TRAIN_EACH = 32  # images per class and domain
TEST_EACH = 20
PRETRAIN_EACH = 600


class Attributes(NamedTuple):
    """What may truthfully be said about one image.

    Attributes
    ----------
    classname, domain : str
    colour : str
        Colour of the thing, or of the line where there is only a line.
    ground : str
        The background, to be read after "on a": "plain cream", "textured blue", "paper".
    size : {"small", "medium", "large"}
    position : {"left", "right", "top", "bottom", "centre"}
    tilt : {"upright", "tilted"}
    covered : bool
        Whether part of the thing is hidden, rubbed out or was never drawn.
    """

    classname: str
    domain: str
    colour: str
    ground: str
    size: str
    position: str
    tilt: str
    covered: bool


_BATCH = 64
_LINE_ONLY = {DOMAINS.index("quickdraw"): "black", DOMAINS.index("sketch"): "grey"}


class GlyphSplit(Split):
    """One stream of glyphs, drawn when asked for.

    Parameters
    ----------
    name : str
        Names the stream: splits of different names share no image.
    classnames : tuple of str
        Classes in the order of the labels: the beginning of `CLASSNAMES` and `DIGITNAMES` in turn.
    length : int

    Attributes
    ----------
    labels, domains : ndarray, shape (length,), int64
        Index `i` has class ``i % C`` and domain ``(i % C + i // C) % 6``, so that every ``6 C``
        consecutive images hold each class in each domain once.
    fingerprint : str

    Raises
    ------
    InputError
        If the class names are others, or the length is negative.

    Notes
    -----
    Image `i` takes its choices from its own Philox stream, keyed by `GLYPHS_VERSION` and `name`
    with `i` in the counter: any order and any batching give the same bytes.
    """

    def __init__(self, name: str, classnames: tuple[str, ...], length: int) -> None:
        if not classnames or classnames != NAMES[: len(classnames)]:
            raise InputError(
                "fastfpl.data.glyphs: classnames must begin CLASSNAMES followed by DIGITNAMES; "
                f"got {classnames!r}"
            )
        if length < 0:
            raise InputError(f"fastfpl.data.glyphs: length must be at least 0; got {length}")
        self.name = name
        self.classnames = classnames
        index = np.arange(length, dtype=np.int64)
        self.labels = index % len(classnames)
        self.domains = (self.labels + index // len(classnames)) % len(DOMAINS)
        self.labels.flags.writeable = self.domains.flags.writeable = False
        self.fingerprint = f"{GLYPHS_VERSION}/{name}/{len(classnames)}x{length}"

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Draw images.

        Parameters
        ----------
        indices : sequence of int
            In any order, repeats allowed.

        Returns
        -------
        images : ndarray, shape (n, 28, 28, 3), uint8
            One stacked array.

        Raises
        ------
        InputError
            If an index is not an integer or lies outside the split.
        """
        asked = self._checked(indices)
        out = np.empty((len(asked), SIDE, SIDE, 3), np.uint8)
        domains = self.domains[asked]
        for domain, style in enumerate(STYLES):
            rows = np.flatnonzero(domains == domain)
            for start in range(0, len(rows), _BATCH):
                some = rows[start : start + _BATCH]
                words = words_of(self.name, asked[some], WORDS + PIXELS // 2)
                canvas = Canvas(domain, self.labels[asked[some]], words)
                style(canvas)
                levels = np.clip(canvas.pixels, 0, 1) * np.float32(255) + np.float32(0.5)
                out[some] = levels.astype(np.uint8).reshape(-1, SIDE, SIDE, 3)
        return cast("Images", out)

    def attributes(self, index: int) -> Attributes:
        """Say what image `index` shows, without drawing it.

        Parameters
        ----------
        index : int

        Returns
        -------
        words : Attributes
            From the same draws as the pixels.

        Raises
        ------
        InputError
            If `index` is not an integer or lies outside the split.
        """
        asked = self._checked([index])
        label, domain = int(self.labels[asked[0]]), int(self.domains[asked[0]])
        shares = shares_of(words_of(self.name, asked, WORDS))
        drawn = Choices(domain, self.labels[asked], shares)
        return Attributes(
            classname=self.classnames[label],
            domain=DOMAINS[domain],
            colour=_LINE_ONLY.get(domain, COLOURS[drawn.hue[0]]),
            ground=_ground(domain, drawn),
            size=_size(float(drawn.scale[0])),
            position=_position(float(drawn.dx[0]), float(drawn.dy[0])),
            tilt="tilted" if abs(float(drawn.turn[0])) > _TILTED else "upright",
            covered=bool(drawn.covered[0]),
        )

    def _checked(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        asked = np.asarray(indices)
        if asked.size == 0 and asked.ndim == 1:
            return np.zeros(0, np.int64)
        if asked.ndim != 1 or asked.dtype.kind not in "iu":
            raise InputError(
                "fastfpl.data.glyphs: indices must be a list of integers; got "
                f"{asked.dtype} of shape {asked.shape}"
            )
        wrong = asked[(asked < 0) | (asked >= len(self))]
        if len(wrong):
            raise InputError(
                f"fastfpl.data.glyphs: index must lie in [0, {len(self)}); got {wrong[0]}"
            )
        return asked.astype(np.int64)


_TILTED = 0.14  # radians, eight degrees


def _size(scale: float) -> str:
    return "small" if scale < 8.8 else "large" if scale > 11.0 else "medium"


def _position(dx: float, dy: float) -> str:
    if max(abs(dx), abs(dy)) < 1.6:
        return "centre"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _ground(domain: int, drawn: Choices) -> str:
    pale, vivid = GROUNDS[drawn.pale[0]], COLOURS[drawn.hue_ground[0]]
    return {
        "clipart": f"plain {pale}",
        "infograph": "cluttered " + ("dark blue" if drawn.u["dark"][0] < 0.25 else pale),
        "painting": f"painted {vivid}",
        "quickdraw": "plain white",
        "real": f"blurred {vivid}",
        "sketch": "paper",
    }[DOMAINS[domain]]


def glyphs() -> Dataset:
    """Return the `glyphs` task: 48 classes, six domains, 9216 images to train and 5760 to test.

    Returns
    -------
    Dataset
        Nothing is drawn before images are asked for.
    """
    cells = len(CLASSNAMES) * len(DOMAINS)
    return Dataset(
        name="glyphs",
        classnames=CLASSNAMES,
        domains=DOMAINS,
        train=GlyphSplit("train", CLASSNAMES, cells * TRAIN_EACH),
        test=GlyphSplit("test", CLASSNAMES, cells * TEST_EACH),
    )


def pretrain() -> GlyphSplit:
    """Return the stream that a small CLIP is trained on: the classes of `glyphs` and ten digits.

    Returns
    -------
    GlyphSplit
        Labels 0 to 47 are `CLASSNAMES`, 48 to 57 are `DIGITNAMES`; no image is also in `glyphs`.
    """
    return GlyphSplit("pretrain", NAMES, len(NAMES) * len(DOMAINS) * PRETRAIN_EACH)
