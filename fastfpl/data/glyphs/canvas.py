"""Images being drawn: what they chose, how a glyph lies in them, and what paints."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from fastfpl.data.glyphs.board import CELLS, REACH
from fastfpl.data.glyphs.drawings import VARIANTS, atlas
from fastfpl.data.glyphs.names import DIGITNAMES, DOMAINS, NAMES, SIDE, Array
from fastfpl.data.glyphs.philox import PIXELS, SLOTS, WORDS, shares_of

__all__ = [
    "COLOURS",
    "GROUNDS",
    "LIGHT",
    "VIVID",
    "Canvas",
    "Choices",
    "X",
    "Y",
    "between",
    "cos_sin",
    "coverage",
    "greys",
    "pick",
    "sine",
]

# writing has a reading direction: its mirror image is another sign, or none
_NEVER_MIRRORED = frozenset(("question mark", "music note", *DIGITNAMES))
_CLOTH = 256


@functools.lru_cache(maxsize=1)
def _cloth() -> Array:
    """Smooth noise on a torus, mean 0 and deviation 1: the grain of paper, paint and rooms."""
    words = np.random.Philox(key=2**64 - 1).random_raw(_CLOTH * _CLOTH)
    field = (words >> np.uint64(40)).astype(np.float64).reshape(_CLOTH, _CLOTH)
    for _ in range(8):
        for axis in (0, 1):
            field = 2 * field + np.roll(field, 1, axis) + np.roll(field, -1, axis)
            field /= 4
    field = (field - field.mean()) / field.std()
    noise: Array = field.astype(np.float32).ravel()
    return noise


_PALETTE = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.12),
    "yellow": (0.97, 0.83, 0.18),
    "green": (0.2, 0.64, 0.27),
    "turquoise": (0.15, 0.72, 0.7),
    "blue": (0.17, 0.38, 0.85),
    "purple": (0.53, 0.26, 0.72),
    "pink": (0.95, 0.48, 0.68),
    "brown": (0.52, 0.33, 0.18),
    "grey": (0.52, 0.54, 0.57),
}
_PALE = {
    "white": (0.99, 0.99, 0.99),
    "cream": (0.99, 0.95, 0.84),
    "light blue": (0.82, 0.91, 0.99),
    "light green": (0.85, 0.96, 0.84),
    "light pink": (0.99, 0.87, 0.91),
    "light grey": (0.87, 0.88, 0.89),
}
COLOURS = tuple(_PALETTE)
GROUNDS = tuple(_PALE)
VIVID = np.array(list(_PALETTE.values()), np.float32)
LIGHT = np.array(list(_PALE.values()), np.float32)
_INFOGRAPH = DOMAINS.index("infograph")
_COVERED = (0.2, 0.35, 0.35, 0.45, 0.4, 0.45)  # share of each domain's images


def sine(turns: Array) -> Array:
    """Draw a wave of period 1 from two parabolas, which every machine rounds alike."""
    t = turns - np.floor(turns + np.float32(0.5))
    wave: Array = t * (8 - 16 * np.abs(t))
    return wave


class Choices:
    """What n images of one domain drew: `u` by slot, and the map from glyph to pixels."""

    def __init__(self, domain: int, labels: npt.NDArray[np.int64], shares: Array) -> None:
        u = dict(zip(SLOTS, np.ascontiguousarray(shares.T), strict=True))
        self.u = u
        self.labels = labels
        self.variant = pick(u["variant"], VARIANTS)
        self.mirror = np.where((u["mirror"] < 0.5) & _MIRRORED[labels], -1, 1).astype(np.float32)
        low, high = (5.2, 8.6) if domain == _INFOGRAPH else (6.4, 12.4)
        self.scale = between(u["size"], low, high)
        self.aspect = between(u["aspect"], 0.82, 1.2)
        # a glyph may reach over the border by a tenth of itself
        room = np.minimum(15 - np.float32(0.85) * self.scale, 6.5).astype(np.float32)
        self.dx = (2 * u["left"] - 1) * room
        self.dy = (2 * u["top"] - 1) * room
        turn = np.where(_ROUND[labels], 0, between(u["turn"], -0.48, 0.48)).astype(np.float32)
        self.turn: Array = turn
        self.cos, self.sin = cos_sin(turn)
        n = len(COLOURS)
        self.hue = pick(u["hue"], n)
        self.hue_accent = (self.hue + 1 + pick(u["hue_accent"], n - 1)) % n
        self.hue_ground = (self.hue + 1 + pick(u["hue_ground"], n - 1)) % n
        self.pale = pick(u["hue_ground"], len(GROUNDS))
        self.covered = u["cover"] < np.float32(_COVERED[domain])

    def jitter(self, colours: Array, strength: float) -> Array:
        """Move each image's colour a little, less than to the next name."""
        u = self.u
        step = np.stack([u["red"], u["green"], u["blue"]], axis=1)
        moved: Array = np.clip(colours + (2 * step - 1) * np.float32(strength), 0, 1)
        return moved


def cos_sin(angle: Array) -> tuple[Array, Array]:
    """Take n angles to cosines and sines of shape (n, 1).

    One by one, because numpy may round a vector's tail unlike its middle, and an image must not
    depend on its place in the batch.
    """
    angles = angle.tolist()
    c = np.array([math.cos(t) for t in angles], np.float32)
    s = np.array([math.sin(t) for t in angles], np.float32)
    return c[:, None], s[:, None]


def pick(share: Array, n: int) -> npt.NDArray[np.int64]:
    """Turn shares into numbers from 0 to n - 1."""
    return (share * n).astype(np.int64)


def between(share: Array, low: float, high: float) -> Array:
    """Turn shares into values between two bounds."""
    value: Array = np.float32(low) + share * np.float32(high - low)
    return value


_MIRRORED = np.array([name not in _NEVER_MIRRORED for name in NAMES])
_ROUND = np.array([name in ("circle", "ring") for name in NAMES])
Y: Array = np.repeat(np.arange(SIDE, dtype=np.float32) - np.float32(13.5), SIDE)[None]
X: Array = np.tile(np.arange(SIDE, dtype=np.float32) - np.float32(13.5), SIDE)[None]


class Canvas(Choices):
    """n images of one domain being drawn; pixel arrays have shape (n, 784)."""

    def __init__(
        self, domain: int, labels: npt.NDArray[np.int64], words: npt.NDArray[np.uint64]
    ) -> None:
        super().__init__(domain, labels, shares_of(words[:, :WORDS]))
        pairs = shares_of(words[:, WORDS:]).reshape(len(words), PIXELS, 2)
        self.noise: Array = pairs[..., 0] + pairs[..., 1] - 1
        self.tint: Array = pairs[..., 0] - pairs[..., 1]
        self.pixels: Array = np.empty((len(words), PIXELS, 3), np.float32)

    def fields(self, sway: float | Array, shift: tuple[float, float] = (0.0, 0.0)) -> list[Array]:
        """Sample body, accent, edge and pen distances, in pixels, after a smooth sway."""
        u = self.u
        px = X - self.dx[:, None] - np.float32(shift[0])
        py = Y - self.dy[:, None] - np.float32(shift[1])
        c, s = self.cos, self.sin
        size = self.scale[:, None]
        x = (c * px + s * py) / (size * self.aspect[:, None])
        y = (c * py - s * px) / (size / self.aspect[:, None])
        if not isinstance(sway, float) or sway > 0:
            strength = np.float32(sway) if isinstance(sway, float) else sway[:, None]
            # a shift also changes the phase: a second stroke of the pencil runs elsewhere
            phase = [u[f"phase{k}"][:, None] + np.float32(1.7 * shift[0]) for k in range(4)]
            x, y = (
                x + strength * (sine(0.55 * y + phase[0]) + sine(0.4 * x + phase[1])),
                y + strength * (sine(0.55 * x + phase[2]) + sine(0.4 * y + phase[3])),
            )
        step = np.float32((CELLS - 1) / (2 * REACH))
        x = np.clip((x * self.mirror[:, None] + np.float32(REACH)) * step, 0, CELLS - 1.001)
        y = np.clip((y + np.float32(REACH)) * step, 0, CELLS - 1.001)
        column, row = x.astype(np.int32), y.astype(np.int32)
        wx, wy = (x - column)[..., None], (y - row)[..., None]
        glyph = (self.labels * VARIANTS + self.variant).astype(np.int32)[:, None]
        cell = (glyph * CELLS + row) * CELLS + column
        table = atlas()
        upper = table[cell]
        upper += wx * (table[cell + 1] - upper)
        cell += CELLS
        lower = table[cell]
        lower += wx * (table[cell + 1] - lower)
        upper += wy * (lower - upper)
        upper *= size[..., None]
        return [np.ascontiguousarray(upper[..., k]) for k in range(4)]

    def cloth(self, along: float, across: float, slot: int, turn: Array | float = 0.0) -> Array:
        """Sample the noise with so many cells per pixel along and across a direction."""
        u = self.u
        c, s = cos_sin(np.zeros(len(u["hue"]), np.float32) + turn)
        x, y = X * c + Y * s, Y * c - X * s
        left = u[f"grain{slot}"][:, None] * np.float32(_CLOTH)
        top = u[f"grain{(slot + 1) % 4}"][:, None] * np.float32(_CLOTH)
        column = (x * np.float32(along) + left).astype(np.int32) % _CLOTH
        row = (y * np.float32(across) + top + np.float32(_CLOTH)).astype(np.int32) % _CLOTH
        noise: Array = _cloth()[row * _CLOTH + column]
        return noise

    def beyond(self, low: float, high: float) -> Array:
        """Measure how far each pixel is from what lies past a line across the glyph.

        Negative past the line, far wherever the glyph is not covered. The line passes the middle
        at between `low` and `high` of the glyph's half size.
        """
        u = self.u
        c, s = cos_sin(u["cover_angle"] * np.float32(2 * math.pi))
        depth = self.scale * between(u["cover_depth"], low, high)
        field = depth[:, None] - (X - self.dx[:, None]) * c - (Y - self.dy[:, None]) * s
        spared: Array = np.where(self.covered[:, None], field, np.float32(SIDE))
        return spared

    def band(self, low: float, high: float, half: float) -> Array:
        """Measure how far each pixel is from a band along that line, `half` wide to each side."""
        field: Array = np.abs(self.beyond(low, high)) - np.float32(half) * self.scale[:, None]
        return field

    def soften(self, share: Array) -> None:
        """Put each picture out of focus by its share."""
        picture = self.pixels.reshape(-1, SIDE, SIDE, 3)
        soft = picture.copy()
        soft[:, 1:-1] = picture[:, 1:-1] / 2 + (picture[:, 2:] + picture[:, :-2]) / 4
        wide = soft.copy()
        wide[:, :, 1:-1] = soft[:, :, 1:-1] / 2 + (soft[:, :, 2:] + soft[:, :, :-2]) / 4
        self.pixels += share[:, None, None] * (wide.reshape(self.pixels.shape) - self.pixels)

    def paint(self, colour: Array, cover: Array) -> None:
        """Lay one colour per image, or one per pixel, over the picture."""
        ink = colour[:, None] if colour.ndim == 2 else colour
        self.pixels += cover[..., None] * (ink - self.pixels)


def coverage(field: Array, soft: float = 1.0) -> Array:
    """Share of a pixel that lies inside: a ramp of `soft` pixels about the border."""
    share: Array = np.clip(np.float32(0.5) - field * np.float32(1 / soft), 0, 1)
    return share


def greys(level: Array) -> Array:
    """Colours (n, 3) of grey levels (n,)."""
    return np.repeat(level[:, None], 3, axis=1)
