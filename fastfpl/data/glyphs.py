"""Draw `glyphs`: 48 nameable things in six visual domains, each image from its index alone.

Every glyph is drawn once as signed-distance fields on a small grid. An image samples these fields
through its own affine map and sway, and a domain styles the distances: DomainNet's six looks at
28 × 28. There are no files, and no image depends on which others are asked for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fastfpl.data.base import Dataset, Images, Split
from fastfpl.errors import InputError

__all__ = [
    "CLASSNAMES",
    "DIGITNAMES",
    "DOMAINS",
    "GLYPHS_VERSION",
    "Attributes",
    "GlyphSplit",
    "contact_sheet",
    "glyphs",
    "pretrain",
]

GLYPHS_VERSION = "glyphs-1"
SIDE = 28
TRAIN_EACH = 32  # images per class and domain
TEST_EACH = 20
PRETRAIN_EACH = 600

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

# the halves (base and novel in CoOp's convention) hold as many shapes, symbols and objects each,
# and as many pairs that are easily confused
CLASSNAMES = (
    "house",
    "pentagon",
    "lightning bolt",
    "fish",
    "hexagon",
    "wave",
    "mug",
    "star",
    "ladder",
    "question mark",
    "crescent moon",
    "hourglass",
    "sun",
    "arrow",
    "ice cream",
    "zigzag",
    "triangle",
    "anchor",
    "flower",
    "checkerboard",
    "bow tie",
    "sailboat",
    "butterfly",
    "padlock",
    "tree",
    "circle",
    "exclamation mark",
    "umbrella",
    "ring",
    "number sign",
    "key",
    "square",
    "envelope",
    "music note",
    "heart",
    "flag",
    "mushroom",
    "diamond",
    "light bulb",
    "infinity sign",
    "cross",
    "cloud",
    "cactus",
    "spiral",
    "rocket",
    "snowman",
    "crown",
    "wine glass",
)
DIGITNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAMES = (*CLASSNAMES, *DIGITNAMES)

# writing has a reading direction: its mirror image is another sign, or none
_NEVER_MIRRORED = frozenset(("question mark", "music note", *DIGITNAMES))

Array = npt.NDArray[np.float32]
Points = Sequence[tuple[float, float]]


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


_CELLS = 72
_REACH = 1.35
_VARIANTS = 4
_FAR = 4.0


class _Board:
    """One glyph being drawn: x to the right, y down, the glyph within [-1, 1] of both.

    A field holds a distance per cell, negative inside; a later fill covers an earlier one.
    """

    def __init__(self) -> None:
        axis = np.linspace(-_REACH, _REACH, _CELLS, dtype=np.float32)
        self.x: Array = np.tile(axis, _CELLS)
        self.y: Array = np.repeat(axis, _CELLS)
        self.marks: Array = np.full_like(self.x, _FAR)
        self.layers: list[tuple[Array, Array, bool]] = []

    def disc(self, cx: float, cy: float, r: float) -> Array:
        field: Array = np.hypot(self.x - np.float32(cx), self.y - np.float32(cy)) - np.float32(r)
        return field

    def oval(self, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> Array:
        x, y = self.x - np.float32(cx), self.y - np.float32(cy)
        c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
        u, v = (c * x + s * y) / np.float32(rx), (c * y - s * x) / np.float32(ry)
        k = np.hypot(u, v)
        # first-order distance: the implicit function over the length of its gradient
        slope = np.hypot(u / np.float32(rx), v / np.float32(ry)) + np.float32(1e-3)
        field: Array = np.maximum(k * (k - 1) / slope, -np.float32(min(rx, ry)))
        return field

    def box(self, cx: float, cy: float, hx: float, hy: float, r: float = 0.0) -> Array:
        u = np.abs(self.x - np.float32(cx)) - np.float32(hx - r)
        v = np.abs(self.y - np.float32(cy)) - np.float32(hy - r)
        outside: Array = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
        field: Array = outside + np.minimum(np.maximum(u, v), 0) - np.float32(r)
        return field

    def line(self, points: Points) -> Array:
        p = np.asarray(points, np.float32)
        a, step = p[:-1, :, None], np.diff(p, axis=0)[:, :, None]
        u, v = self.x - a[:, 0], self.y - a[:, 1]
        size = np.maximum((step * step).sum(1), np.float32(1e-9))
        t = np.clip((u * step[:, 0] + v * step[:, 1]) / size, 0, 1)
        field: Array = np.hypot(u - t * step[:, 0], v - t * step[:, 1]).min(0)
        return field

    def poly(self, points: Points) -> Array:
        ring = [*points, points[0]]
        inside = np.zeros(self.x.shape, bool)
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if y0 == y1:
                continue
            spans = (self.y < np.float32(y0)) != (self.y < np.float32(y1))
            cut = x0 + (self.y - y0) * ((x1 - x0) / (y1 - y0))
            inside ^= spans & (self.x < cut)
        edge = self.line(ring)
        return np.where(inside, -edge, edge)

    def fill(self, *fields: Array, accent: bool = False) -> None:
        """Fill the union of the fields."""
        field = functools.reduce(np.minimum, fields)
        self.layers.append((field, np.abs(field), accent))

    def stroke(self, width: float, *lines: Points, accent: bool = False) -> None:
        """Draw thick lines, which a pen would draw as single thin ones."""
        core = functools.reduce(np.minimum, [self.line(points) for points in lines])
        self.layers.append((core - np.float32(width / 2), core, accent))

    def mark(self, *lines: Points) -> None:
        """Draw fine inner lines in the colour of the outline."""
        for points in lines:
            self.marks = np.minimum(self.marks, self.line(points))

    def dot(self, cx: float, cy: float, r: float) -> None:
        """Draw a dark dot."""
        self.marks = np.minimum(self.marks, np.maximum(self.disc(cx, cy, r), 0))

    def fields(self) -> Array:
        """Stack body, accent, edge and pen fields, one row per cell."""
        body = np.full_like(self.x, _FAR)
        accent, edge, pen = body.copy(), self.marks.copy(), self.marks.copy()
        above = body.copy()
        for field, core, is_accent in reversed(self.layers):
            # a line is hidden where a later fill covers it
            edge = np.minimum(edge, np.maximum(np.abs(field), -above))
            pen = np.minimum(pen, np.maximum(core, -above))
            if is_accent:
                accent = np.minimum(accent, np.maximum(field, -above))
            above = np.minimum(above, field)
        return np.stack([above, accent, edge, pen], axis=1)


def _arc(
    cx: float, cy: float, rx: float, ry: float, start: float, stop: float, steps: int = 14
) -> list[tuple[float, float]]:
    """Sample an elliptic arc; angles in degrees, 0 to the right, 90 down."""
    angles = [math.radians(start + (stop - start) * k / steps) for k in range(steps + 1)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in angles]


def _curve(points: Points, steps: int = 6) -> list[tuple[float, float]]:
    """Sample the Catmull-Rom spline through the points."""
    p = [points[0], *points, points[-1]]
    out: list[tuple[float, float]] = []
    for k in range(len(points) - 1):
        for j in range(steps):
            t = j / steps
            w = (
                -0.5 * t + t * t - 0.5 * t**3,
                1 - 2.5 * t * t + 1.5 * t**3,
                0.5 * t + 2 * t * t - 1.5 * t**3,
                0.5 * t**3 - 0.5 * t * t,
            )
            near = p[k : k + 4]
            x = sum(c * q[0] for c, q in zip(w, near, strict=True))
            y = sum(c * q[1] for c, q in zip(w, near, strict=True))
            out.append((x, y))
    return [*out, points[-1]]


def _regular(n: int, r: float, first: float, inner: float | None = None) -> Points:
    """Corners of a regular polygon, or of a star where `inner` is given."""
    radii = (r,) if inner is None else (r, inner)
    m = n * len(radii)
    corners = [(radii[k % len(radii)], math.radians(first + 360 * k / m)) for k in range(m)]
    return [(q * math.cos(t), q * math.sin(t)) for q, t in corners]


_Drawing = Callable[[_Board, float, float], None]
_DRAWINGS: dict[str, _Drawing] = {}


def _draws(name: str) -> Callable[[_Drawing], _Drawing]:
    def register(drawing: _Drawing) -> _Drawing:
        _DRAWINGS[name] = drawing
        return drawing

    return register


@_draws("circle")
def _circle(d: _Board, a: float, b: float) -> None:
    d.fill(d.disc(0, 0, 0.86))


@_draws("ring")
def _ring(d: _Board, a: float, b: float) -> None:
    d.fill(np.maximum(d.disc(0, 0, 0.9), -d.disc(0, 0, 0.42 + 0.18 * a)))


@_draws("square")
def _square(d: _Board, a: float, b: float) -> None:
    d.fill(d.box(0, 0, 0.78, 0.78))


@_draws("triangle")
def _triangle(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly([(0.7 * (a - 0.5), -0.88), (0.9, 0.72), (-0.9, 0.72)]))


@_draws("pentagon")
def _pentagon(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly(_regular(5, 0.92, -90)))


@_draws("hexagon")
def _hexagon(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly(_regular(6, 0.92, 0 if a < 0.6 else 30)))


@_draws("star")
def _star(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly(_regular(5, 0.98, -90, inner=0.38 + 0.12 * a)))


@_draws("heart")
def _heart(d: _Board, a: float, b: float) -> None:
    turns = [2 * math.pi * k / 36 for k in range(36)]
    wave = [(13, 1), (-5, 2), (-2, 3), (-1, 4)]
    d.fill(
        d.poly(
            [
                (0.9 * math.sin(t) ** 3, -0.056 * sum(c * math.cos(k * t) for c, k in wave) - 0.08)
                for t in turns
            ]
        )
    )


@_draws("crescent moon")
def _crescent_moon(d: _Board, a: float, b: float) -> None:
    d.fill(np.maximum(d.disc(-0.1, 0, 0.92), -d.disc(0.3 + 0.15 * a, -0.12, 0.74)))


@_draws("cross")
def _cross(d: _Board, a: float, b: float) -> None:
    w = 0.22 + 0.12 * a
    d.fill(d.box(0, 0, 0.86, w), d.box(0, 0, w, 0.86))


@_draws("arrow")
def _arrow(d: _Board, a: float, b: float) -> None:
    w, neck = 0.16 + 0.12 * b, 0.1
    right = [(-0.92, -w), (neck, -w), (neck, -0.6), (0.95, 0.0)]
    right += [(x, -y) for x, y in reversed(right[:-1])]
    # two of four variants point to the side, which mirroring turns into left and right
    turned = right if a < 0.5 else [(y, -x) if a < 0.75 else (-y, x) for x, y in right]
    d.fill(d.poly(turned))


@_draws("diamond")
def _diamond(d: _Board, a: float, b: float) -> None:
    w = 0.55 + 0.12 * a
    d.fill(d.poly([(0, -0.96), (w, 0), (0, 0.96), (-w, 0)]))


@_draws("checkerboard")
def _checkerboard(d: _Board, a: float, b: float) -> None:
    n = 4 if a < 0.6 else 3
    h = 0.86 / n
    cells = [
        d.box(h * (2 * i + 1 - n), h * (2 * j + 1 - n), h, h)
        for i in range(n)
        for j in range(n)
        if (i + j) % 2 == 0
    ]
    d.fill(d.box(0, 0, 0.86, 0.86))
    d.fill(*cells, accent=True)


@_draws("lightning bolt")
def _lightning_bolt(d: _Board, a: float, b: float) -> None:
    d.fill(
        d.poly(
            [
                (0.2, -0.97),
                (-0.52 - 0.1 * a, 0.14),
                (-0.06, 0.14),
                (-0.3, 0.97),
                (0.56 + 0.1 * a, -0.2),
                (0.1, -0.2),
                (0.48, -0.97),
            ]
        )
    )


@_draws("question mark")
def _question_mark(d: _Board, a: float, b: float) -> None:
    w = 0.24 + 0.08 * a
    hook = _arc(0, -0.42, 0.46, 0.44, 175, 400, 16)
    d.stroke(w, [*hook, (0.06, 0.12), (0.0, 0.38)])
    d.fill(d.disc(0, 0.78, 0.17))


@_draws("exclamation mark")
def _exclamation_mark(d: _Board, a: float, b: float) -> None:
    w = 0.2 + 0.08 * a
    d.fill(d.poly([(-w, -0.95), (w, -0.95), (0.5 * w, 0.38), (-0.5 * w, 0.38)]))
    d.fill(d.disc(0, 0.76, 0.2))


@_draws("number sign")
def _number_sign(d: _Board, a: float, b: float) -> None:
    lean = 0.14 * a
    d.stroke(
        0.18 + 0.06 * b,
        [(-0.32 + lean, -0.88), (-0.32 - lean, 0.88)],
        [(0.32 + lean, -0.88), (0.32 - lean, 0.88)],
        [(-0.85, -0.32), (0.85, -0.32)],
        [(-0.85, 0.32), (0.85, 0.32)],
    )


@_draws("music note")
def _music_note(d: _Board, a: float, b: float) -> None:
    if a < 0.5:
        d.stroke(0.16, [(0.12, 0.62), (0.12, -0.9)], _curve([(0.12, -0.9), (0.5, -0.5), (0.52, 0)]))
        d.fill(d.oval(-0.16, 0.66, 0.34, 0.25, -0.35))
    else:
        d.stroke(0.16, [(-0.34, 0.66), (-0.34, -0.72), (0.72, -0.88), (0.72, 0.5)])
        d.stroke(0.16, [(-0.34, -0.46), (0.72, -0.62)])
        d.fill(d.oval(-0.58, 0.68, 0.3, 0.23, -0.35))
        d.fill(d.oval(0.48, 0.52, 0.3, 0.23, -0.35))


@_draws("infinity sign")
def _infinity_sign(d: _Board, a: float, b: float) -> None:
    turns = [2 * math.pi * k / 40 for k in range(41)]
    loop = [
        (0.92 * math.cos(t) / (1 + math.sin(t) ** 2), 1.25 * math.sin(t) * math.cos(t))
        for t in turns
    ]
    d.stroke(0.2 + 0.06 * a, [(x, 0.62 * y) for x, y in loop])


@_draws("spiral")
def _spiral(d: _Board, a: float, b: float) -> None:
    rounds = 2.1 + 0.6 * a
    turns = [k / 60 for k in range(61)]
    path = [
        (
            (0.06 + 0.84 * t) * math.cos(2 * math.pi * rounds * t + 6 * b),
            (0.06 + 0.84 * t) * math.sin(2 * math.pi * rounds * t + 6 * b),
        )
        for t in turns
    ]
    d.stroke(0.15, path)


@_draws("wave")
def _wave(d: _Board, a: float, b: float) -> None:
    n = 1.5 if a < 0.5 else 2.0
    turns = [k / 40 for k in range(41)]
    path = [(-0.95 + 1.9 * t, -0.34 * math.sin(2 * math.pi * n * t)) for t in turns]
    d.stroke(0.2 + 0.06 * b, path)


@_draws("zigzag")
def _zigzag(d: _Board, a: float, b: float) -> None:
    n = 4 if a < 0.5 else 5
    path = [(-0.95 + 1.9 * k / n, 0.38 if k % 2 == 0 else -0.38) for k in range(n + 1)]
    d.stroke(0.2 + 0.06 * b, path)


@_draws("house")
def _house(d: _Board, a: float, b: float) -> None:
    if a > 0.5:
        d.fill(d.box(0.48, -0.55, 0.13, 0.32))
    d.fill(d.box(0, 0.4, 0.66, 0.5))
    d.fill(d.poly([(0, -0.92), (0.95, 0.0), (-0.95, 0.0)]), accent=True)
    x = -0.1 if b < 0.5 else -0.35
    d.fill(d.box(x, 0.6, 0.17, 0.3), accent=True)


@_draws("tree")
def _tree(d: _Board, a: float, b: float) -> None:
    d.fill(d.box(0, 0.65, 0.14, 0.32), accent=True)
    if a < 0.5:
        d.fill(d.disc(0, -0.48, 0.48), d.disc(-0.4, -0.02, 0.42), d.disc(0.4, -0.02, 0.42))
    else:
        for top, wide in ((-0.25, 0.78), (-0.6, 0.64), (-0.95, 0.48)):
            d.fill(d.poly([(0, top), (wide, top + 0.78), (-wide, top + 0.78)]))


@_draws("fish")
def _fish(d: _Board, a: float, b: float) -> None:
    tail = 0.36 + 0.14 * a
    d.fill(d.poly([(0.35, 0), (0.95, -tail), (0.82, 0), (0.95, tail)]), accent=True)
    d.fill(d.oval(-0.2, 0, 0.72, 0.4 + 0.1 * b))
    d.dot(-0.55, -0.1, 0.06)
    d.mark(_arc(-0.42, 0, 0.3, 0.4, -50, 50, 6))


@_draws("umbrella")
def _umbrella(d: _Board, a: float, b: float) -> None:
    d.stroke(0.12, [(0, -0.9), (0, 0.66), *_arc(-0.18, 0.68, 0.18, 0.22, 0, 180, 8)], accent=True)
    dome = np.maximum(d.oval(0, 0.05, 0.95, 0.86), d.y - np.float32(0.05))
    scallops = [d.oval(x, 0.12, 0.32, 0.2) for x in (-0.63, 0.0, 0.63)]
    d.fill(functools.reduce(np.maximum, [dome, *[-s for s in scallops]]))
    d.mark(
        _curve([(0, -0.8), (-0.26, -0.45), (-0.32, 0.0)]),
        _curve([(0, -0.8), (0.26, -0.45), (0.32, 0.0)]),
    )


@_draws("mug")
def _mug(d: _Board, a: float, b: float) -> None:
    d.stroke(0.16, _arc(0.42, 0.12, 0.42, 0.36, -90, 90))
    d.fill(d.box(-0.2, 0.14, 0.6, 0.7, 0.14))
    if a > 0.5:
        d.mark(_curve([(-0.42, -0.7), (-0.32, -0.82), (-0.42, -0.96)]))
        d.mark(_curve([(-0.02, -0.7), (0.08, -0.82), (-0.02, -0.96)]))
    else:
        d.fill(d.box(-0.2, 0.14, 0.6, 0.18), accent=True)


@_draws("key")
def _key(d: _Board, a: float, b: float) -> None:
    shaft = d.box(0.3, 0, 0.64, 0.1)
    teeth = [d.box(0.82, 0.2, 0.1, 0.24), d.box(0.5, 0.16, 0.09, 0.2)]
    bow = d.disc(-0.52, 0, 0.42) if a < 0.6 else d.box(-0.52, 0, 0.38, 0.38, 0.1)
    hole = d.disc(-0.56, 0, 0.19)
    body = functools.reduce(np.minimum, [shaft, *teeth, bow])
    d.fill(np.maximum(body, -hole))


@_draws("ladder")
def _ladder(d: _Board, a: float, b: float) -> None:
    n = 4 if a < 0.5 else 5
    top = 0.3 + 0.12 * b
    rails = [[(-0.45, 0.95), (-top, -0.95)], [(0.45, 0.95), (top, -0.95)]]
    rungs = []
    for k in range(n):
        y = -0.68 + 1.36 * k / (n - 1)
        half = top + (0.45 - top) * (y + 0.95) / 1.9
        rungs.append([(-half, y), (half, y)])
    d.stroke(0.14, *rails, *rungs)


@_draws("envelope")
def _envelope(d: _Board, a: float, b: float) -> None:
    d.fill(d.box(0, 0, 0.94, 0.62))
    flap = [(-0.94, -0.62), (0, 0.1 + 0.15 * a), (0.94, -0.62)]
    if b < 0.5:
        d.fill(d.poly(flap), accent=True)
    else:
        d.mark(flap, [(-0.94, 0.62), (-0.3, -0.08)], [(0.94, 0.62), (0.3, -0.08)])


@_draws("hourglass")
def _hourglass(d: _Board, a: float, b: float) -> None:
    d.fill(
        d.poly([(-0.56, -0.84), (0.56, -0.84), (0.06, 0), (0.56, 0.84), (-0.56, 0.84), (-0.06, 0)])
    )
    d.fill(d.box(0, -0.84, 0.68, 0.11), d.box(0, 0.84, 0.68, 0.11), accent=True)
    if a > 0.5:
        d.fill(d.poly([(0, 0.4), (0.4, 0.74), (-0.4, 0.74)]), accent=True)


@_draws("flag")
def _flag(d: _Board, a: float, b: float) -> None:
    d.stroke(0.14, [(-0.62, -0.92), (-0.62, 0.95)], accent=True)
    if a < 0.5:
        top = _curve([(-0.55, -0.86), (-0.1, -1.0), (0.35, -0.78), (0.9, -0.9)])
        d.fill(d.poly([*top, *[(x, y + 0.92) for x, y in reversed(top)]]))
    else:
        d.fill(d.poly([(-0.55, -0.9), (0.92, -0.42), (-0.55, 0.08)]))


@_draws("anchor")
def _anchor(d: _Board, a: float, b: float) -> None:
    w = 0.16 + 0.05 * a
    d.stroke(
        w,
        _arc(0, -0.72, 0.19, 0.19, 0, 360),
        [(0, -0.52), (0, 0.86)],
        [(-0.42, -0.3), (0.42, -0.3)],
        _arc(0, 0.12, 0.76, 0.74, 8, 172),
        [(-0.92, 0.36), (-0.76, 0.12), (-0.5, 0.3)],
        [(0.92, 0.36), (0.76, 0.12), (0.5, 0.3)],
    )


@_draws("mushroom")
def _mushroom(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly([(-0.22, -0.1), (0.22, -0.1), (0.32, 0.9), (-0.32, 0.9)]), accent=True)
    d.fill(np.maximum(d.oval(0, 0.08, 0.92, 0.92), d.y - np.float32(0.08)))
    d.fill(
        d.disc(-0.42, -0.24, 0.17), d.disc(0.3, -0.4, 0.2), d.disc(-0.08, -0.6, 0.13), accent=True
    )


@_draws("ice cream")
def _ice_cream(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly([(-0.46, -0.02), (0.46, -0.02), (0, 0.97)]), accent=True)
    if a < 0.5:
        d.fill(d.disc(0, -0.36, 0.54))
    else:
        d.fill(d.disc(-0.28, -0.2, 0.36))
        d.fill(d.disc(0.28, -0.2, 0.36))
        d.fill(d.disc(0, -0.6, 0.36))
    d.mark([(-0.2, 0.12), (0.12, 0.62)], [(0.2, 0.12), (-0.12, 0.62)])


@_draws("light bulb")
def _light_bulb(d: _Board, a: float, b: float) -> None:
    neck = d.poly([(-0.5, -0.05), (0.5, -0.05), (0.27, 0.48), (-0.27, 0.48)])
    d.fill(d.disc(0, -0.32, 0.62), neck)
    d.fill(d.box(0, 0.7, 0.27, 0.25, 0.08), accent=True)
    d.mark([(-0.27, 0.7), (0.27, 0.7)])
    d.mark([(-0.12, 0.4), (-0.2, -0.2), (0, -0.02), (0.2, -0.2), (0.12, 0.4)])


@_draws("sun")
def _sun(d: _Board, a: float, b: float) -> None:
    n = 8 if a < 0.6 else 10
    for k in range(n):
        t = 2 * math.pi * k / n
        c, s = math.cos(t), math.sin(t)
        d.stroke(0.14, [(0.68 * c, 0.68 * s), (0.96 * c, 0.96 * s)])
    d.fill(d.disc(0, 0, 0.5))


@_draws("cloud")
def _cloud(d: _Board, a: float, b: float) -> None:
    d.fill(
        d.disc(-0.52, 0.18, 0.38),
        d.disc(0.54, 0.2, 0.36),
        d.disc(-0.14, -0.22, 0.46),
        d.disc(0.34, -0.08 - 0.12 * a, 0.36),
        d.box(0, 0.36, 0.54, 0.2),
    )


@_draws("bow tie")
def _bow_tie(d: _Board, a: float, b: float) -> None:
    h = 0.5 + 0.12 * a
    d.fill(d.poly([(-0.95, -h), (-0.05, -0.1), (-0.05, 0.1), (-0.95, h)]))
    d.fill(d.poly([(0.95, -h), (0.05, -0.1), (0.05, 0.1), (0.95, h)]))
    d.fill(d.box(0, 0, 0.19, 0.24, 0.08), accent=True)
    d.mark([(0.3, -0.06), (0.62, -0.16)], [(-0.3, -0.06), (-0.62, -0.16)])


@_draws("cactus")
def _cactus(d: _Board, a: float, b: float) -> None:
    left, right = -0.1 + 0.3 * a, -0.1 + 0.3 * b
    arms = [
        [(-0.02, left + 0.3), (-0.58, left + 0.3), (-0.58, left - 0.3)],
        [(0.02, right + 0.2), (0.58, right + 0.2), (0.58, right - 0.42)],
    ]
    body = functools.reduce(np.minimum, [d.line(arm) - np.float32(0.14) for arm in arms])
    d.fill(d.box(0, -0.08, 0.24, 0.86, 0.22), body)
    d.fill(d.poly([(-0.5, 0.62), (0.5, 0.62), (0.38, 0.97), (-0.38, 0.97)]), accent=True)


@_draws("sailboat")
def _sailboat(d: _Board, a: float, b: float) -> None:
    d.stroke(0.09, [(0, -0.95), (0, 0.5)], accent=True)
    d.fill(d.poly([(0.1, -0.9), (0.1, 0.3), (0.78, 0.3)]))
    if a > 0.4:
        d.fill(d.poly([(-0.1, -0.66), (-0.1, 0.3), (-0.62, 0.3)]))
    d.fill(d.poly([(-0.95, 0.46), (0.95, 0.46), (0.6, 0.92), (-0.6, 0.92)]), accent=True)


@_draws("rocket")
def _rocket(d: _Board, a: float, b: float) -> None:
    d.fill(d.poly([(-0.2, 0.1), (-0.66, 0.78), (-0.2, 0.66)]), accent=True)
    d.fill(d.poly([(0.2, 0.1), (0.66, 0.78), (0.2, 0.66)]), accent=True)
    if a > 0.4:
        d.fill(d.poly([(-0.2, 0.64), (0.2, 0.64), (0, 0.99)]), accent=True)
    side = _curve([(0, -0.97), (0.28, -0.5), (0.34, 0.1), (0.22, 0.7)])
    d.fill(d.poly([*side, *[(-x, y) for x, y in reversed(side[1:])]]))
    d.fill(d.disc(0, -0.22, 0.15), accent=True)


@_draws("butterfly")
def _butterfly(d: _Board, a: float, b: float) -> None:
    for side in (-1, 1):
        d.fill(d.oval(side * 0.42, 0.42, 0.42, 0.3, side * 0.9))
        d.fill(d.oval(side * 0.5, -0.3, 0.54, 0.36, -side * 0.75))
        d.fill(d.disc(side * 0.56, -0.34, 0.15), accent=True)
    d.fill(d.oval(0, 0.05, 0.1, 0.6), accent=True)
    d.mark([(0, -0.5), (-0.2, -0.92)], [(0, -0.5), (0.2, -0.92)])


@_draws("snowman")
def _snowman(d: _Board, a: float, b: float) -> None:
    d.fill(d.disc(0, 0.44, 0.52))
    d.fill(d.disc(0, -0.28, 0.34))
    if a > 0.4:
        d.fill(d.box(0, -0.58, 0.42, 0.07), d.box(0, -0.78, 0.24, 0.18), accent=True)
    d.mark([(0.34, 0.2), (0.9, -0.12)], [(-0.34, 0.2), (-0.9, -0.12)])
    d.dot(-0.12, -0.34, 0.05)
    d.dot(0.12, -0.34, 0.05)
    d.dot(0, 0.28, 0.05)
    d.dot(0, 0.58, 0.05)


@_draws("padlock")
def _padlock(d: _Board, a: float, b: float) -> None:
    r = 0.38 + 0.06 * b
    d.stroke(0.17, [(-r, 0.1), *_arc(0, -0.38, r, r + 0.04, 180, 360), (r, 0.1)], accent=True)
    d.fill(d.box(0, 0.4, 0.68, 0.52, 0.1))
    d.dot(0, 0.32, 0.1)
    d.mark([(0, 0.34), (0, 0.6)])


@_draws("crown")
def _crown(d: _Board, a: float, b: float) -> None:
    tip = 0.66 + 0.2 * a
    points = [(-0.74, 0.62), (-0.92, -0.5), (-0.42, 0.05), (0, -tip), (0.42, 0.05), (0.92, -0.5)]
    d.fill(d.poly([*points, (0.74, 0.62)]))
    d.fill(d.box(0, 0.6, 0.74, 0.16), accent=True)
    d.fill(d.disc(-0.9, -0.55, 0.12), d.disc(0, -tip, 0.12), d.disc(0.9, -0.55, 0.12), accent=True)


@_draws("flower")
def _flower(d: _Board, a: float, b: float) -> None:
    n = 5 if a < 0.5 else 6
    d.stroke(0.11, [(0, -0.2), (0.04, 0.96)], accent=True)
    d.fill(d.oval(0.3, 0.58, 0.28, 0.13, -0.5), accent=True)
    for k in range(n):
        t = 2 * math.pi * k / n - math.pi / 2
        d.fill(d.disc(0.36 * math.cos(t), -0.36 + 0.36 * math.sin(t), 0.25))
    d.fill(d.disc(0, -0.36, 0.2), accent=True)


@_draws("wine glass")
def _wine_glass(d: _Board, a: float, b: float) -> None:
    d.stroke(0.12, [(0, 0.1), (0, 0.86)])
    d.fill(d.box(0, 0.88, 0.4, 0.07))
    top = -0.92
    side = _curve([(0.42, top), (0.5, -0.4), (0.36, 0.02), (0, 0.18)])
    bowl = d.poly([*side, *[(-x, y) for x, y in reversed(side[:-1])]])
    d.fill(bowl)
    d.fill(np.maximum(bowl + np.float32(0.07), np.float32(-0.55 + 0.25 * a) - d.y), accent=True)


def _digit(lines: Callable[[float], Sequence[Points]]) -> _Drawing:
    def drawing(d: _Board, a: float, b: float) -> None:
        d.stroke(0.16 + 0.12 * b, *lines(a))

    return drawing


_DRAWINGS |= {
    "zero": _digit(lambda a: [_arc(0, 0, 0.42 + 0.12 * a, 0.84, -90, 270, 24)]),
    "one": _digit(
        lambda a: [
            [(-0.3, -0.52), (0.04, -0.86), (0.04, 0.86)],
            *([[(-0.3, 0.86), (0.38, 0.86)]] if a > 0.5 else []),
        ]
    ),
    "two": _digit(
        lambda a: [
            [*_arc(0, -0.4, 0.48, 0.44, 190, 380, 12), (-0.5, 0.84), (0.54, 0.84)],
        ]
    ),
    "three": _digit(
        lambda a: [
            [*_arc(-0.04, -0.44, 0.46, 0.42, 200, 450, 12)],
            [*_arc(-0.04, 0.42, 0.52, 0.44, -90, 160, 12)],
        ]
    ),
    "four": _digit(
        lambda a: [
            [(0.16, -0.86), (-0.56, 0.3), (0.58, 0.3)],
            [(0.24, -0.3 - 0.4 * a), (0.24, 0.88)],
        ]
    ),
    "five": _digit(
        lambda a: [
            [(0.46, -0.84), (-0.36, -0.84), (-0.42, -0.1), *_arc(-0.02, 0.34, 0.5, 0.5, -125, 150)],
        ]
    ),
    "six": _digit(
        lambda a: [
            _curve([(0.32, -0.86), (-0.24, -0.36), (-0.48, 0.36)]),
            _arc(0, 0.38, 0.48, 0.46, 0, 360, 20),
        ]
    ),
    "seven": _digit(
        lambda a: [
            [(-0.52, -0.82), (0.52, -0.82), (-0.1, 0.88)],
            *([[(-0.2, 0.02), (0.42, 0.02)]] if a > 0.5 else []),
        ]
    ),
    "eight": _digit(
        lambda a: [_arc(0, -0.44, 0.38, 0.4, 0, 360, 20), _arc(0, 0.42, 0.48, 0.44, 0, 360, 20)]
    ),
    "nine": _digit(
        lambda a: [
            _arc(0, -0.38, 0.48, 0.46, 0, 360, 20),
            _curve([(0.48, -0.36), (0.4, 0.3), (0.1 - 0.3 * a, 0.88)]),
        ]
    ),
}


@functools.lru_cache(maxsize=1)
def _atlas() -> Array:
    """Fields of every glyph in every variant, a row of four distances per cell."""
    sheets = []
    for name in _NAMES:
        for k in range(_VARIANTS):
            board = _Board()
            # a sweeps its range; b visits it in another order, so that the two do not move together
            _DRAWINGS[name](
                board, (k + 0.5) / _VARIANTS, ((3 * k + 1) % _VARIANTS + 0.5) / _VARIANTS
            )
            sheets.append(board.fields())
    return np.concatenate(sheets)


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


_SLOTS = (
    *("variant", "mirror", "size", "left", "top", "turn", "aspect", "width"),
    *("hue", "hue_accent", "hue_ground", "tone", "red", "green", "blue", "light"),
    *("phase0", "phase1", "phase2", "phase3", "sway", "blot", "blot_angle", "blot_size"),
    *("grain0", "grain1", "grain2", "grain3", "grain_angle", "layout", "contrast", "dark"),
    *("cover", "cover_angle", "cover_depth", "trouble"),
    *(f"clutter{k}" for k in range(28)),
)
_WORDS = len(_SLOTS) // 4  # sixteen bits are enough for one choice
_PIXELS = SIDE * SIDE
_BATCH = 64

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
_NIGHT: Array = np.array([0.14, 0.2, 0.33], np.float32)
_PAPER: Array = np.array([0.95, 0.94, 0.91], np.float32)
_COLOURS = tuple(_PALETTE)
_GROUNDS = tuple(_PALE)
_VIVID = np.array(list(_PALETTE.values()), np.float32)
_LIGHT = np.array(list(_PALE.values()), np.float32)

_INFOGRAPH = DOMAINS.index("infograph")
_COVERED = (0.2, 0.35, 0.35, 0.45, 0.4, 0.45)  # share of each domain's images
_LINE_ONLY = {DOMAINS.index("quickdraw"): "black", DOMAINS.index("sketch"): "grey"}


def _sine(turns: Array) -> Array:
    """Draw a wave of period 1 from two parabolas, which every machine rounds alike."""
    t = turns - np.floor(turns + np.float32(0.5))
    wave: Array = t * (8 - 16 * np.abs(t))
    return wave


def _stream(split: str, indices: npt.NDArray[np.int64], words: int) -> npt.NDArray[np.uint64]:
    """Take the first words of each image's own Philox stream, one row per image."""
    key = _stream_key(split)
    rows = np.empty((len(indices), words), np.uint64)
    for row, index in zip(rows, indices, strict=True):
        # the low words of the counter move while drawing, so the index stands above them
        row[:] = np.random.Philox(key=key, counter=[0, 0, index, 0]).random_raw(words)
    return rows


@functools.lru_cache(maxsize=16)
def _stream_key(split: str) -> npt.NDArray[np.uint64]:
    entropy = list(f"{GLYPHS_VERSION} {split}".encode())
    return np.random.SeedSequence(entropy).generate_state(2, np.uint64).astype(np.uint64)


def _shares(words: npt.NDArray[np.uint64]) -> Array:
    """Turn every sixteen bits into a number in (0, 1)."""
    halves = np.ascontiguousarray(words, "<u8").view("<u2").astype(np.float32)
    shares: Array = (halves + np.float32(0.5)) / np.float32(65536)
    return shares


class _Choices:
    """What n images of one domain drew: `u` by slot, and the map from glyph to pixels."""

    def __init__(self, domain: int, labels: npt.NDArray[np.int64], shares: Array) -> None:
        u = dict(zip(_SLOTS, np.ascontiguousarray(shares.T), strict=True))
        self.u = u
        self.labels = labels
        self.variant = _pick(u["variant"], _VARIANTS)
        self.mirror = np.where((u["mirror"] < 0.5) & _MIRRORED[labels], -1, 1).astype(np.float32)
        low, high = (5.2, 8.6) if domain == _INFOGRAPH else (6.4, 12.4)
        self.scale = _between(u["size"], low, high)
        self.aspect = _between(u["aspect"], 0.82, 1.2)
        # a glyph may reach over the border by a tenth of itself
        room = np.minimum(15 - np.float32(0.85) * self.scale, 6.5).astype(np.float32)
        self.dx = (2 * u["left"] - 1) * room
        self.dy = (2 * u["top"] - 1) * room
        turn = np.where(_ROUND[labels], 0, _between(u["turn"], -0.48, 0.48)).astype(np.float32)
        self.turn: Array = turn
        self.cos, self.sin = _cos_sin(turn)
        n = len(_COLOURS)
        self.hue = _pick(u["hue"], n)
        self.hue_accent = (self.hue + 1 + _pick(u["hue_accent"], n - 1)) % n
        self.hue_ground = (self.hue + 1 + _pick(u["hue_ground"], n - 1)) % n
        self.pale = _pick(u["hue_ground"], len(_GROUNDS))
        self.covered = u["cover"] < np.float32(_COVERED[domain])

    def jitter(self, colours: Array, strength: float) -> Array:
        """Move each image's colour a little, less than to the next name."""
        u = self.u
        step = np.stack([u["red"], u["green"], u["blue"]], axis=1)
        moved: Array = np.clip(colours + (2 * step - 1) * np.float32(strength), 0, 1)
        return moved


def _cos_sin(angle: Array) -> tuple[Array, Array]:
    """Take n angles to cosines and sines of shape (n, 1).

    One by one, because numpy may round a vector's tail unlike its middle, and an image must not
    depend on its place in the batch.
    """
    angles = angle.tolist()
    c = np.array([math.cos(t) for t in angles], np.float32)
    s = np.array([math.sin(t) for t in angles], np.float32)
    return c[:, None], s[:, None]


def _pick(share: Array, n: int) -> npt.NDArray[np.int64]:
    return (share * n).astype(np.int64)


def _between(share: Array, low: float, high: float) -> Array:
    value: Array = np.float32(low) + share * np.float32(high - low)
    return value


_MIRRORED = np.array([name not in _NEVER_MIRRORED for name in _NAMES])
_ROUND = np.array([name in ("circle", "ring") for name in _NAMES])
_Y: Array = np.repeat(np.arange(SIDE, dtype=np.float32) - np.float32(13.5), SIDE)[None]
_X: Array = np.tile(np.arange(SIDE, dtype=np.float32) - np.float32(13.5), SIDE)[None]


class _Canvas(_Choices):
    """n images of one domain being drawn; pixel arrays have shape (n, 784)."""

    def __init__(
        self, domain: int, labels: npt.NDArray[np.int64], words: npt.NDArray[np.uint64]
    ) -> None:
        super().__init__(domain, labels, _shares(words[:, :_WORDS]))
        pairs = _shares(words[:, _WORDS:]).reshape(len(words), _PIXELS, 2)
        self.noise: Array = pairs[..., 0] + pairs[..., 1] - 1
        self.tint: Array = pairs[..., 0] - pairs[..., 1]
        self.pixels: Array = np.empty((len(words), _PIXELS, 3), np.float32)

    def fields(self, sway: float | Array, shift: tuple[float, float] = (0.0, 0.0)) -> list[Array]:
        """Sample body, accent, edge and pen distances, in pixels, after a smooth sway."""
        u = self.u
        px = _X - self.dx[:, None] - np.float32(shift[0])
        py = _Y - self.dy[:, None] - np.float32(shift[1])
        c, s = self.cos, self.sin
        size = self.scale[:, None]
        x = (c * px + s * py) / (size * self.aspect[:, None])
        y = (c * py - s * px) / (size / self.aspect[:, None])
        if not isinstance(sway, float) or sway > 0:
            strength = np.float32(sway) if isinstance(sway, float) else sway[:, None]
            # a shift also changes the phase: a second stroke of the pencil runs elsewhere
            phase = [u[f"phase{k}"][:, None] + np.float32(1.7 * shift[0]) for k in range(4)]
            x, y = (
                x + strength * (_sine(0.55 * y + phase[0]) + _sine(0.4 * x + phase[1])),
                y + strength * (_sine(0.55 * x + phase[2]) + _sine(0.4 * y + phase[3])),
            )
        step = np.float32((_CELLS - 1) / (2 * _REACH))
        x = np.clip((x * self.mirror[:, None] + np.float32(_REACH)) * step, 0, _CELLS - 1.001)
        y = np.clip((y + np.float32(_REACH)) * step, 0, _CELLS - 1.001)
        column, row = x.astype(np.int32), y.astype(np.int32)
        wx, wy = (x - column)[..., None], (y - row)[..., None]
        glyph = (self.labels * _VARIANTS + self.variant).astype(np.int32)[:, None]
        cell = (glyph * _CELLS + row) * _CELLS + column
        atlas = _atlas()
        upper = atlas[cell]
        upper += wx * (atlas[cell + 1] - upper)
        cell += _CELLS
        lower = atlas[cell]
        lower += wx * (atlas[cell + 1] - lower)
        upper += wy * (lower - upper)
        upper *= size[..., None]
        return [np.ascontiguousarray(upper[..., k]) for k in range(4)]

    def cloth(self, along: float, across: float, slot: int, turn: Array | float = 0.0) -> Array:
        """Sample the noise with so many cells per pixel along and across a direction."""
        u = self.u
        c, s = _cos_sin(np.zeros(len(u["hue"]), np.float32) + turn)
        x, y = _X * c + _Y * s, _Y * c - _X * s
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
        c, s = _cos_sin(u["cover_angle"] * np.float32(2 * math.pi))
        depth = self.scale * _between(u["cover_depth"], low, high)
        field = depth[:, None] - (_X - self.dx[:, None]) * c - (_Y - self.dy[:, None]) * s
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


def _cover(field: Array, soft: float = 1.0) -> Array:
    """Share of a pixel that lies inside: a ramp of `soft` pixels about the border."""
    share: Array = np.clip(np.float32(0.5) - field * np.float32(1 / soft), 0, 1)
    return share


def _grey(level: Array) -> Array:
    return np.repeat(level[:, None], 3, axis=1)


def _clipart(d: _Canvas) -> None:
    u = d.u
    body, accent, edge, _ = d.fields(0.02)
    d.pixels[:] = _LIGHT[d.pale][:, None]
    line = d.jitter(_VIVID[d.hue] * np.float32(0.22), 0.06)
    half = _between(u["width"], 0.45, 0.85)[:, None]
    d.paint(line, _cover(body - half))
    d.paint(d.jitter(_VIVID[d.hue], 0.07), _cover(body + half))
    d.paint(d.jitter(_VIVID[d.hue_accent], 0.07), _cover(np.maximum(accent, body + half)))
    d.paint(line, _cover(edge - half))
    # a strip of paper stuck over it
    strip = d.band(0.0, 0.8, 0.22)
    d.paint(_LIGHT[d.pale] * np.float32(0.72), _cover(strip))
    d.paint(_LIGHT[(d.pale + 1) % len(_GROUNDS)], _cover(strip + np.float32(0.8)))
    d.pixels += (d.noise * np.float32(0.015))[..., None]


def _infograph(d: _Canvas) -> None:
    u = d.u
    dark = u["dark"] < 0.25
    ground = np.where(dark[:, None], _NIGHT, _LIGHT[d.pale])
    d.pixels[:] = ground[:, None]
    body, accent, edge, _ = d.fields(0.0)
    colours = d.jitter(_VIVID[d.hue], 0.07)
    second = _VIVID[d.hue_accent]
    ink = np.where(dark[:, None], np.float32(0.85), np.float32(0.3)) * np.ones((1, 3), np.float32)
    for k, (x0, x1, y0, y1) in enumerate(_clutter(d)):
        x, y = _X + np.float32(13.5), _Y + np.float32(13.5)
        wide = np.clip(np.minimum(x - x0, x1 - x) + 1, 0, 1)
        high = np.clip(np.minimum(y - y0, y1 - y) + 1, 0, 1)
        # bars first, then a rule, then lines that look like text
        shade = (second, colours, _VIVID[d.hue_ground])[k % 3] if k < 5 else ink
        d.paint(shade, wide * high * np.float32(0.8))
    badge = u["layout"] < 0.3
    reach = np.sqrt((_X - d.dx[:, None]) ** 2 + (_Y - d.dy[:, None]) ** 2)
    plate = np.where(badge[:, None], reach - 1.06 * d.scale[:, None], body - np.float32(1.2))
    plain = np.where(badge[:, None], ground * np.float32(0.75) + np.float32(0.12), ground)
    d.paint(plain.astype(np.float32), _cover(plate.astype(np.float32)))
    d.paint(colours, _cover(body - np.float32(0.1)))
    d.paint(second, _cover(np.maximum(accent, body)))
    rule = ground * np.float32(0.9)
    d.paint(rule.astype(np.float32), _cover(edge - np.float32(0.1)) * _cover(body + np.float32(1)))
    # a label with a line of text laid over the figure
    label = d.band(-0.2, 0.7, 0.26)
    d.paint(ground.astype(np.float32), _cover(label))
    dashes = _cover(np.float32(0.35) - _sine(_X * np.float32(0.23) + u["clutter27"][:, None]))
    d.paint(ink, _cover(label + np.float32(0.22) * d.scale[:, None]) * dashes)
    d.pixels += (d.noise * np.float32(0.02))[..., None]


def _clutter(d: _Canvas) -> Iterable[tuple[Array, Array, Array, Array]]:
    """Left, right, top and bottom of five bars, a rule and eight lines of text per image."""
    u = d.u
    c = [u[f"clutter{k}"][:, None] for k in range(28)]
    # the bars stand on the side that the glyph leaves free
    down = d.dy[:, None] <= 0
    left = c[0] * 12
    for k in range(5):
        x0 = left + np.float32(3.2 * k)
        tall = 2 + 7 * c[1 + k]
        y0, y1 = np.where(down, 27 - tall, 0), np.where(down, 27, tall)
        yield x0, x0 + np.float32(1.2), y0.astype(np.float32), y1.astype(np.float32)
    rule = np.where(down, 1 + 2 * c[6], 24 + 2 * c[6]).astype(np.float32)
    yield 2 + 4 * c[7], 16 + 10 * c[8], rule, rule + np.float32(0.3)
    side = np.where(d.dx[:, None] <= 0, 20, 0).astype(np.float32)
    for k in range(8):
        x0 = side + 3 * c[9 + k]
        y0 = (4 * c[17] + np.float32(3 * k)).astype(np.float32)
        yield x0, x0 + 2 + 5 * c[18 + k], y0, y0 + np.float32(0.1)


def _painting(d: _Canvas) -> None:
    u = d.u
    turn = u["grain_angle"] * np.float32(math.pi)
    sway = d.cloth(0.8, 0.8, 2)
    body, accent, _, _ = d.fields(0.045)
    body, accent = body + sway * np.float32(0.4), accent + sway * np.float32(0.4)
    streak = d.cloth(0.7, 3.2, 0, turn)
    daub = d.cloth(0.9, 0.9, 1)
    light = np.where(u["dark"] < 0.5, np.float32(1), np.float32(-1))[:, None]
    # a common tone holds the palette together, and takes its contrast away
    tone = _VIVID[_pick(u["tone"], len(_COLOURS))]
    level = _between(u["contrast"], 0.08, 0.24)[:, None]

    def mix(hue: npt.NDArray[np.int64], share: float, lift: Array) -> Array:
        muted = _VIVID[hue] * np.float32(share) + tone * np.float32(0.15) + np.float32(0.13)
        mixed: Array = np.clip(muted + lift, 0, 1)
        return mixed

    ground = d.jitter(mix(d.hue_ground, 0.6, -light * level), 0.06)
    other = d.jitter(mix(d.hue_accent, 0.45, -light * level), 0.06)
    d.pixels[:] = ground[:, None]
    d.paint(other, np.clip(daub * np.float32(0.5) + np.float32(0.2), 0, 0.6))
    d.paint(d.jitter(mix(d.hue, 0.68, light * level), 0.05), _cover(body, 1.6))
    d.paint(mix(d.hue_accent, 0.68, light * level), _cover(np.maximum(accent, body), 1.6))
    rim = _cover(np.abs(body) - np.float32(0.25), 1.4) * np.float32(0.35)
    d.paint(_grey(np.full(len(body), 0.15, np.float32)), rim)
    # one broad stroke of the background's paint across it
    d.paint(other, _cover(d.band(0.0, 0.8, 0.2) + daub * np.float32(0.9), 2.0))
    cross = d.cloth(3.2, 0.7, 3, turn)
    stroke = np.where(body < 0, cross, streak) * np.float32(0.085)
    d.pixels += (stroke + d.noise * np.float32(0.03))[..., None]


def _quickdraw(d: _Canvas) -> None:
    u = d.u
    pen = d.fields(_between(u["sway"], 0.05, 0.13))[3]
    # the pen jumps here and there, and once in a while it slips
    turn = u["blot_angle"] * np.float32(2 * math.pi)
    c, s = _cos_sin(turn)
    x = d.dx[:, None] + d.scale[:, None] * c * np.float32(0.7)
    y = d.dy[:, None] + d.scale[:, None] * s * np.float32(0.7)
    near = np.sqrt((_X - x) ** 2 + (_Y - y) ** 2)
    half = _between(u["width"], 0.4, 0.75)[:, None]
    gap = np.where(u["blot"] < 0.6, _between(u["blot_size"], 1.0, 2.6), 0).astype(np.float32)
    stroke = np.maximum(pen - half, gap[:, None] - near)
    c, s = _cos_sin(turn + np.float32(1.2) + u["blot_size"])
    along = np.clip((_X - x) * c + (_Y - y) * s, -3, 4)
    slip = np.sqrt((_X - x - along * c) ** 2 + (_Y - y - along * s) ** 2)
    slips = (u["blot"] > 0.75)[:, None]
    stroke = np.where(slips, np.minimum(stroke, slip - half), stroke)
    # some never finish
    stroke = np.maximum(stroke, -d.beyond(-0.05, 0.7))
    d.pixels[:] = 1
    d.paint(_grey(np.full(len(pen), 0.06, np.float32)), _cover(stroke))


def _real(d: _Canvas) -> None:
    u = d.u
    body, accent, edge, _ = d.fields(0.015)
    light = np.where(u["dark"] < 0.5, np.float32(1), np.float32(-1))[:, None]
    level = _between(u["contrast"], 0.02, 0.16)[:, None]
    day = _between(u["tone"], 0.18, 0.46)[:, None]
    room = _VIVID[d.hue_ground] * np.float32(0.46) + day - light * level
    room = d.jitter(room, 0.06)
    d.pixels[:] = room[:, None]
    # a far wall, a table below it, and things out of focus
    table = np.clip((_Y - _between(u["layout"], -4, 12)[:, None]) * np.float32(0.7), 0, 1)
    board = _VIVID[d.hue_accent] * np.float32(0.3) + np.float32(0.3) - light * level
    d.paint(board.astype(np.float32), table * np.float32(0.65))
    blur = d.cloth(0.45, 0.45, 0)
    d.pixels += (blur * np.float32(0.085))[..., None]
    d.pixels[..., 0] += d.cloth(0.3, 0.3, 1) * np.float32(0.05)
    d.pixels[..., 2] += d.cloth(0.3, 0.3, 2) * np.float32(0.05)
    angle = u["light"] * np.float32(math.pi) + np.float32(math.pi)
    lx, ly = _cos_sin(angle)
    d.paint(np.zeros((len(body), 3), np.float32), _shifted(body, 2, 2) * np.float32(0.4))
    height = np.clip(-body / (np.float32(0.32) * d.scale[:, None]), 0, 1)
    dome = (np.sqrt(height * (2 - height)) * np.float32(2.2)).reshape(-1, SIDE, SIDE)
    gx, gy = np.zeros_like(dome), np.zeros_like(dome)
    gx[:, :, 1:-1] = dome[:, :, 2:] - dome[:, :, :-2]
    gy[:, 1:-1] = dome[:, 2:] - dome[:, :-2]
    slope_x, slope_y = gx.reshape(body.shape), gy.reshape(body.shape)
    long = np.sqrt(slope_x * slope_x + slope_y * slope_y + np.float32(1))
    facing = (np.float32(0.75) - (slope_x * lx + slope_y * ly)) / long
    shade = np.float32(0.58) + np.float32(0.5) * np.clip(facing, -0.4, 1)
    gloss = np.clip(facing - np.float32(0.86), 0, 1) * np.float32(2.2)
    skin = np.float32(1) + blur * np.float32(0.04)
    lift = np.float32(0.06) * light
    for hue, cover in (
        (d.hue, _cover(body, 1.3)),
        (d.hue_accent, _cover(np.maximum(accent, body), 1.3)),
    ):
        flat = d.jitter(_VIVID[hue] * np.float32(0.9) + lift, 0.07)
        d.paint(flat[:, None] * (shade * skin)[..., None] + gloss[..., None], cover)
    seam = _cover(edge - np.float32(0.2), 1.4) * _cover(body + np.float32(0.8))
    d.paint(np.zeros((len(body), 3), np.float32), seam * np.float32(0.35))
    # something stands in front, too near to be sharp
    front = d.beyond(0.05, 0.8) + blur * np.float32(0.8)
    d.paint(room * np.float32(0.8) + np.float32(0.08), _cover(front, 2.5))
    d.soften(np.clip(2 * u["trouble"] - np.float32(0.6), 0, 1))
    far = (_X * _X + _Y * _Y) * np.float32(1 / 1500)
    d.pixels *= ((1 - far) * _between(u["hue_accent"], 0.85, 1.12)[:, None])[..., None]
    grain = np.float32(0.06) + np.float32(0.14) * u["blot"] * u["blot"]
    d.pixels += (d.noise * grain[:, None])[..., None]
    d.pixels[..., 0] += d.tint * np.float32(0.04)
    d.pixels[..., 2] -= d.tint * np.float32(0.04)


def _shifted(body: Array, right: int, down: int) -> Array:
    """Cover of a soft shadow of the body, so many pixels to the right and down."""
    shadow = np.zeros((len(body), SIDE, SIDE), np.float32)
    cover = _cover(body, 3.0).reshape(-1, SIDE, SIDE)
    shadow[:, down:, right:] = cover[:, :-down, :-right]
    return shadow.reshape(body.shape)


def _sketch(d: _Canvas) -> None:
    u = d.u
    body, accent, _, pen = d.fields(0.05)
    again = d.fields(0.06, (0.45, -0.3))[3]
    grain = d.cloth(3.7, 3.7, 0)
    tooth = np.clip(np.float32(0.78) + grain * np.float32(0.22) + d.noise * np.float32(0.35), 0, 1)
    paper = _PAPER - np.float32(0.09) * u["tone"][:, None]
    d.pixels[:] = paper[:, None]
    d.pixels += (grain * np.float32(0.022) + d.noise * np.float32(0.05))[..., None]
    lead = _grey(_between(u["contrast"], 0.14, 0.36))
    half = _between(u["width"], 0.2, 0.5)[:, None]
    angle = _between(u["grain_angle"], 0.5, 1.2)
    c, s = _cos_sin(angle)
    pitch = _between(u["light"], 0.28, 0.42)[:, None]
    lines = _sine((_X * c + _Y * s) * pitch + u["grain1"][:, None])
    hatch = np.clip(lines * np.float32(0.9), 0, 1) * _cover(body + np.float32(0.4))
    # half of the drawings are hatched all over, the others only where the accent lies
    everywhere = np.where(u["layout"] < 0.5, np.float32(0.45), np.float32(0))[:, None]
    dense = np.maximum(everywhere, _cover(accent) * np.float32(0.6))
    # the hand presses unevenly, and part may be rubbed out
    press = np.float32(1) - np.float32(0.7) * u["trouble"][:, None]
    tooth = tooth * press * (1 - np.float32(0.85) * _cover(d.beyond(0.0, 0.75), 3.0))
    d.paint(lead, hatch * dense * tooth)
    d.paint(lead, _cover(pen - half, 1.3) * tooth * np.float32(0.75))
    d.paint(lead, _cover(again - half, 1.3) * tooth * np.float32(0.55))
    # a construction line, as one draws before the thing itself
    c, s = _cos_sin(u["blot_angle"] * np.float32(math.pi))
    ruler = _X * c + _Y * s - _between(u["blot"], -9, 9)[:, None]
    d.paint(lead, _cover(np.abs(ruler) - np.float32(0.1)) * tooth * np.float32(0.3))


_STYLES: tuple[Callable[[_Canvas], None], ...] = (
    _clipart,
    _infograph,
    _painting,
    _quickdraw,
    _real,
    _sketch,
)


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
        if not classnames or classnames != _NAMES[: len(classnames)]:
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
        for domain, style in enumerate(_STYLES):
            rows = np.flatnonzero(domains == domain)
            for start in range(0, len(rows), _BATCH):
                some = rows[start : start + _BATCH]
                words = _stream(self.name, asked[some], _WORDS + _PIXELS // 2)
                canvas = _Canvas(domain, self.labels[asked[some]], words)
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
        shares = _shares(_stream(self.name, asked, _WORDS))
        drawn = _Choices(domain, self.labels[asked], shares)
        return Attributes(
            classname=self.classnames[label],
            domain=DOMAINS[domain],
            colour=_LINE_ONLY.get(domain, _COLOURS[drawn.hue[0]]),
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


def _ground(domain: int, drawn: _Choices) -> str:
    pale, vivid = _GROUNDS[drawn.pale[0]], _COLOURS[drawn.hue_ground[0]]
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
    return GlyphSplit("pretrain", _NAMES, len(_NAMES) * len(DOMAINS) * PRETRAIN_EACH)


def contact_sheet(path: str | Path) -> None:
    """Show every class in every domain on one labelled sheet: the first image that is not covered.

    Parameters
    ----------
    path : str or Path
        A PNG file to write.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    split = pretrain()
    n, cell, gap, label, head, columns = len(split.classnames), 2 * SIDE, 4, 132, 30, 3
    deep = -(-n // columns)
    wide = label + len(DOMAINS) * (cell + gap) + 24
    sheet = Image.new("RGB", (columns * wide, head + deep * (cell + gap) + gap), "white")
    ink = ImageDraw.Draw(sheet)
    face = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font, small = ImageFont.truetype(str(face), 14), ImageFont.truetype(str(face), 11)
    for c, name in enumerate(split.classnames):
        left, top = (c // deep) * wide, head + (c % deep) * (cell + gap)
        ink.text((left + label - 10, top + cell // 2), name, fill="#333333", font=font, anchor="rm")
        for d in range(len(DOMAINS)):
            first = n * ((d - c) % len(DOMAINS)) + c
            cells = range(first, len(split), n * len(DOMAINS))
            shown = next(k for k in cells if not split.attributes(k).covered)
            image = np.asarray(split.images([shown])[0])
            large = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(large, (left + label + d * (cell + gap), top))
    for k, (d, name) in itertools.product(range(columns), enumerate(DOMAINS)):
        middle = k * wide + label + d * (cell + gap) + cell // 2
        ink.text((middle, head - 6), name, fill="#777777", font=small, anchor="ms")
    # 256 colours halve the file, and the grain hides the rounding
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
