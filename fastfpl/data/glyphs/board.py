"""What glyphs are drawn on: signed distances on a small grid, and the curves of a drawing."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from fastfpl.data.glyphs.names import Array

__all__ = ["CELLS", "REACH", "Board", "Points", "arc", "curve", "regular"]

Points = Sequence[tuple[float, float]]
CELLS = 72
REACH = 1.35
_FAR = 4.0


class Board:
    """One glyph being drawn: x to the right, y down, the glyph within [-1, 1] of both.

    A field holds a distance per cell, negative inside; a later fill covers an earlier one.
    """

    def __init__(self) -> None:
        axis = np.linspace(-REACH, REACH, CELLS, dtype=np.float32)
        self.x: Array = np.tile(axis, CELLS)
        self.y: Array = np.repeat(axis, CELLS)
        self.marks: Array = np.full_like(self.x, _FAR)
        self.layers: list[tuple[Array, Array, bool]] = []

    def disc(self, cx: float, cy: float, r: float) -> Array:
        """Field of a disc about (cx, cy)."""
        field: Array = np.hypot(self.x - np.float32(cx), self.y - np.float32(cy)) - np.float32(r)
        return field

    def oval(self, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> Array:
        """Field of an ellipse, turned by so many radians."""
        x, y = self.x - np.float32(cx), self.y - np.float32(cy)
        c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
        u, v = (c * x + s * y) / np.float32(rx), (c * y - s * x) / np.float32(ry)
        k = np.hypot(u, v)
        # first-order distance: the implicit function over the length of its gradient
        slope = np.hypot(u / np.float32(rx), v / np.float32(ry)) + np.float32(1e-3)
        field: Array = np.maximum(k * (k - 1) / slope, -np.float32(min(rx, ry)))
        return field

    def box(self, cx: float, cy: float, hx: float, hy: float, r: float = 0.0) -> Array:
        """Field of a box of half sides hx and hy with corners of radius r."""
        u = np.abs(self.x - np.float32(cx)) - np.float32(hx - r)
        v = np.abs(self.y - np.float32(cy)) - np.float32(hy - r)
        outside: Array = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
        field: Array = outside + np.minimum(np.maximum(u, v), 0) - np.float32(r)
        return field

    def line(self, points: Points) -> Array:
        """Distance from a line through the points, nowhere negative."""
        p = np.asarray(points, np.float32)
        a, step = p[:-1, :, None], np.diff(p, axis=0)[:, :, None]
        u, v = self.x - a[:, 0], self.y - a[:, 1]
        size = np.maximum((step * step).sum(1), np.float32(1e-9))
        t = np.clip((u * step[:, 0] + v * step[:, 1]) / size, 0, 1)
        field: Array = np.hypot(u - t * step[:, 0], v - t * step[:, 1]).min(0)
        return field

    def poly(self, points: Points) -> Array:
        """Field of a polygon."""
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


def arc(
    cx: float, cy: float, rx: float, ry: float, start: float, stop: float, steps: int = 14
) -> list[tuple[float, float]]:
    """Sample an elliptic arc; angles in degrees, 0 to the right, 90 down."""
    angles = [math.radians(start + (stop - start) * k / steps) for k in range(steps + 1)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in angles]


def curve(points: Points, steps: int = 6) -> list[tuple[float, float]]:
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


def regular(n: int, r: float, first: float, inner: float | None = None) -> Points:
    """Corners of a regular polygon, or of a star where `inner` is given."""
    radii = (r,) if inner is None else (r, inner)
    m = n * len(radii)
    corners = [(radii[k % len(radii)], math.radians(first + 360 * k / m)) for k in range(m)]
    return [(q * math.cos(t), q * math.sin(t)) for q, t in corners]
