"""Every glyph as it is drawn once: shapes, symbols, objects and digits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from fastfpl.data.glyphs.board import Board, Points, arc, curve, regular
from fastfpl.data.glyphs.names import NAMES, Array

__all__ = ["VARIANTS", "atlas"]

VARIANTS = 4
_Drawing = Callable[[Board, float, float], None]
_DRAWINGS: dict[str, _Drawing] = {}


def _draws(name: str) -> Callable[[_Drawing], _Drawing]:
    def register(drawing: _Drawing) -> _Drawing:
        _DRAWINGS[name] = drawing
        return drawing

    return register


@_draws("circle")
def _circle(d: Board, a: float, b: float) -> None:
    d.fill(d.disc(0, 0, 0.86))


@_draws("ring")
def _ring(d: Board, a: float, b: float) -> None:
    d.fill(np.maximum(d.disc(0, 0, 0.9), -d.disc(0, 0, 0.42 + 0.18 * a)))


@_draws("square")
def _square(d: Board, a: float, b: float) -> None:
    d.fill(d.box(0, 0, 0.78, 0.78))


@_draws("triangle")
def _triangle(d: Board, a: float, b: float) -> None:
    d.fill(d.poly([(0.7 * (a - 0.5), -0.88), (0.9, 0.72), (-0.9, 0.72)]))


@_draws("pentagon")
def _pentagon(d: Board, a: float, b: float) -> None:
    d.fill(d.poly(regular(5, 0.92, -90)))


@_draws("hexagon")
def _hexagon(d: Board, a: float, b: float) -> None:
    d.fill(d.poly(regular(6, 0.92, 0 if a < 0.6 else 30)))


@_draws("star")
def _star(d: Board, a: float, b: float) -> None:
    d.fill(d.poly(regular(5, 0.98, -90, inner=0.38 + 0.12 * a)))


@_draws("heart")
def _heart(d: Board, a: float, b: float) -> None:
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
def _crescent_moon(d: Board, a: float, b: float) -> None:
    d.fill(np.maximum(d.disc(-0.1, 0, 0.92), -d.disc(0.3 + 0.15 * a, -0.12, 0.74)))


@_draws("cross")
def _cross(d: Board, a: float, b: float) -> None:
    w = 0.22 + 0.12 * a
    d.fill(d.box(0, 0, 0.86, w), d.box(0, 0, w, 0.86))


@_draws("arrow")
def _arrow(d: Board, a: float, b: float) -> None:
    w, neck = 0.16 + 0.12 * b, 0.1
    right = [(-0.92, -w), (neck, -w), (neck, -0.6), (0.95, 0.0)]
    right += [(x, -y) for x, y in reversed(right[:-1])]
    # two of four variants point to the side, which mirroring turns into left and right
    turned = right if a < 0.5 else [(y, -x) if a < 0.75 else (-y, x) for x, y in right]
    d.fill(d.poly(turned))


@_draws("diamond")
def _diamond(d: Board, a: float, b: float) -> None:
    w = 0.55 + 0.12 * a
    d.fill(d.poly([(0, -0.96), (w, 0), (0, 0.96), (-w, 0)]))


@_draws("checkerboard")
def _checkerboard(d: Board, a: float, b: float) -> None:
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
def _lightning_bolt(d: Board, a: float, b: float) -> None:
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
def _question_mark(d: Board, a: float, b: float) -> None:
    w = 0.24 + 0.08 * a
    hook = arc(0, -0.42, 0.46, 0.44, 175, 400, 16)
    d.stroke(w, [*hook, (0.06, 0.12), (0.0, 0.38)])
    d.fill(d.disc(0, 0.78, 0.17))


@_draws("exclamation mark")
def _exclamation_mark(d: Board, a: float, b: float) -> None:
    w = 0.2 + 0.08 * a
    d.fill(d.poly([(-w, -0.95), (w, -0.95), (0.5 * w, 0.38), (-0.5 * w, 0.38)]))
    d.fill(d.disc(0, 0.76, 0.2))


@_draws("number sign")
def _number_sign(d: Board, a: float, b: float) -> None:
    lean = 0.14 * a
    d.stroke(
        0.18 + 0.06 * b,
        [(-0.32 + lean, -0.88), (-0.32 - lean, 0.88)],
        [(0.32 + lean, -0.88), (0.32 - lean, 0.88)],
        [(-0.85, -0.32), (0.85, -0.32)],
        [(-0.85, 0.32), (0.85, 0.32)],
    )


@_draws("music note")
def _music_note(d: Board, a: float, b: float) -> None:
    if a < 0.5:
        d.stroke(0.16, [(0.12, 0.62), (0.12, -0.9)], curve([(0.12, -0.9), (0.5, -0.5), (0.52, 0)]))
        d.fill(d.oval(-0.16, 0.66, 0.34, 0.25, -0.35))
    else:
        d.stroke(0.16, [(-0.34, 0.66), (-0.34, -0.72), (0.72, -0.88), (0.72, 0.5)])
        d.stroke(0.16, [(-0.34, -0.46), (0.72, -0.62)])
        d.fill(d.oval(-0.58, 0.68, 0.3, 0.23, -0.35))
        d.fill(d.oval(0.48, 0.52, 0.3, 0.23, -0.35))


@_draws("infinity sign")
def _infinity_sign(d: Board, a: float, b: float) -> None:
    turns = [2 * math.pi * k / 40 for k in range(41)]
    loop = [
        (0.92 * math.cos(t) / (1 + math.sin(t) ** 2), 1.25 * math.sin(t) * math.cos(t))
        for t in turns
    ]
    d.stroke(0.2 + 0.06 * a, [(x, 0.62 * y) for x, y in loop])


@_draws("spiral")
def _spiral(d: Board, a: float, b: float) -> None:
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
def _wave(d: Board, a: float, b: float) -> None:
    n = 1.5 if a < 0.5 else 2.0
    turns = [k / 40 for k in range(41)]
    path = [(-0.95 + 1.9 * t, -0.34 * math.sin(2 * math.pi * n * t)) for t in turns]
    d.stroke(0.2 + 0.06 * b, path)


@_draws("zigzag")
def _zigzag(d: Board, a: float, b: float) -> None:
    n = 4 if a < 0.5 else 5
    path = [(-0.95 + 1.9 * k / n, 0.38 if k % 2 == 0 else -0.38) for k in range(n + 1)]
    d.stroke(0.2 + 0.06 * b, path)


@_draws("house")
def _house(d: Board, a: float, b: float) -> None:
    if a > 0.5:
        d.fill(d.box(0.48, -0.55, 0.13, 0.32))
    d.fill(d.box(0, 0.4, 0.66, 0.5))
    d.fill(d.poly([(0, -0.92), (0.95, 0.0), (-0.95, 0.0)]), accent=True)
    x = -0.1 if b < 0.5 else -0.35
    d.fill(d.box(x, 0.6, 0.17, 0.3), accent=True)


@_draws("tree")
def _tree(d: Board, a: float, b: float) -> None:
    d.fill(d.box(0, 0.65, 0.14, 0.32), accent=True)
    if a < 0.5:
        d.fill(d.disc(0, -0.48, 0.48), d.disc(-0.4, -0.02, 0.42), d.disc(0.4, -0.02, 0.42))
    else:
        for top, wide in ((-0.25, 0.78), (-0.6, 0.64), (-0.95, 0.48)):
            d.fill(d.poly([(0, top), (wide, top + 0.78), (-wide, top + 0.78)]))


@_draws("fish")
def _fish(d: Board, a: float, b: float) -> None:
    tail = 0.36 + 0.14 * a
    d.fill(d.poly([(0.35, 0), (0.95, -tail), (0.82, 0), (0.95, tail)]), accent=True)
    d.fill(d.oval(-0.2, 0, 0.72, 0.4 + 0.1 * b))
    d.dot(-0.55, -0.1, 0.06)
    d.mark(arc(-0.42, 0, 0.3, 0.4, -50, 50, 6))


@_draws("umbrella")
def _umbrella(d: Board, a: float, b: float) -> None:
    d.stroke(0.12, [(0, -0.9), (0, 0.66), *arc(-0.18, 0.68, 0.18, 0.22, 0, 180, 8)], accent=True)
    dome = np.maximum(d.oval(0, 0.05, 0.95, 0.86), d.y - np.float32(0.05))
    scallops = [d.oval(x, 0.12, 0.32, 0.2) for x in (-0.63, 0.0, 0.63)]
    d.fill(functools.reduce(np.maximum, [dome, *[-s for s in scallops]]))
    d.mark(
        curve([(0, -0.8), (-0.26, -0.45), (-0.32, 0.0)]),
        curve([(0, -0.8), (0.26, -0.45), (0.32, 0.0)]),
    )


@_draws("mug")
def _mug(d: Board, a: float, b: float) -> None:
    d.stroke(0.16, arc(0.42, 0.12, 0.42, 0.36, -90, 90))
    d.fill(d.box(-0.2, 0.14, 0.6, 0.7, 0.14))
    if a > 0.5:
        d.mark(curve([(-0.42, -0.7), (-0.32, -0.82), (-0.42, -0.96)]))
        d.mark(curve([(-0.02, -0.7), (0.08, -0.82), (-0.02, -0.96)]))
    else:
        d.fill(d.box(-0.2, 0.14, 0.6, 0.18), accent=True)


@_draws("key")
def _key(d: Board, a: float, b: float) -> None:
    shaft = d.box(0.3, 0, 0.64, 0.1)
    teeth = [d.box(0.82, 0.2, 0.1, 0.24), d.box(0.5, 0.16, 0.09, 0.2)]
    bow = d.disc(-0.52, 0, 0.42) if a < 0.6 else d.box(-0.52, 0, 0.38, 0.38, 0.1)
    hole = d.disc(-0.56, 0, 0.19)
    body = functools.reduce(np.minimum, [shaft, *teeth, bow])
    d.fill(np.maximum(body, -hole))


@_draws("ladder")
def _ladder(d: Board, a: float, b: float) -> None:
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
def _envelope(d: Board, a: float, b: float) -> None:
    d.fill(d.box(0, 0, 0.94, 0.62))
    flap = [(-0.94, -0.62), (0, 0.1 + 0.15 * a), (0.94, -0.62)]
    if b < 0.5:
        d.fill(d.poly(flap), accent=True)
    else:
        d.mark(flap, [(-0.94, 0.62), (-0.3, -0.08)], [(0.94, 0.62), (0.3, -0.08)])


@_draws("hourglass")
def _hourglass(d: Board, a: float, b: float) -> None:
    d.fill(
        d.poly([(-0.56, -0.84), (0.56, -0.84), (0.06, 0), (0.56, 0.84), (-0.56, 0.84), (-0.06, 0)])
    )
    d.fill(d.box(0, -0.84, 0.68, 0.11), d.box(0, 0.84, 0.68, 0.11), accent=True)
    if a > 0.5:
        d.fill(d.poly([(0, 0.4), (0.4, 0.74), (-0.4, 0.74)]), accent=True)


@_draws("flag")
def _flag(d: Board, a: float, b: float) -> None:
    d.stroke(0.14, [(-0.62, -0.92), (-0.62, 0.95)], accent=True)
    if a < 0.5:
        top = curve([(-0.55, -0.86), (-0.1, -1.0), (0.35, -0.78), (0.9, -0.9)])
        d.fill(d.poly([*top, *[(x, y + 0.92) for x, y in reversed(top)]]))
    else:
        d.fill(d.poly([(-0.55, -0.9), (0.92, -0.42), (-0.55, 0.08)]))


@_draws("anchor")
def _anchor(d: Board, a: float, b: float) -> None:
    w = 0.16 + 0.05 * a
    d.stroke(
        w,
        arc(0, -0.72, 0.19, 0.19, 0, 360),
        [(0, -0.52), (0, 0.86)],
        [(-0.42, -0.3), (0.42, -0.3)],
        arc(0, 0.12, 0.76, 0.74, 8, 172),
        [(-0.92, 0.36), (-0.76, 0.12), (-0.5, 0.3)],
        [(0.92, 0.36), (0.76, 0.12), (0.5, 0.3)],
    )


@_draws("mushroom")
def _mushroom(d: Board, a: float, b: float) -> None:
    d.fill(d.poly([(-0.22, -0.1), (0.22, -0.1), (0.32, 0.9), (-0.32, 0.9)]), accent=True)
    d.fill(np.maximum(d.oval(0, 0.08, 0.92, 0.92), d.y - np.float32(0.08)))
    d.fill(
        d.disc(-0.42, -0.24, 0.17), d.disc(0.3, -0.4, 0.2), d.disc(-0.08, -0.6, 0.13), accent=True
    )


@_draws("ice cream")
def _ice_cream(d: Board, a: float, b: float) -> None:
    d.fill(d.poly([(-0.46, -0.02), (0.46, -0.02), (0, 0.97)]), accent=True)
    if a < 0.5:
        d.fill(d.disc(0, -0.36, 0.54))
    else:
        d.fill(d.disc(-0.28, -0.2, 0.36))
        d.fill(d.disc(0.28, -0.2, 0.36))
        d.fill(d.disc(0, -0.6, 0.36))
    d.mark([(-0.2, 0.12), (0.12, 0.62)], [(0.2, 0.12), (-0.12, 0.62)])


@_draws("light bulb")
def _light_bulb(d: Board, a: float, b: float) -> None:
    neck = d.poly([(-0.5, -0.05), (0.5, -0.05), (0.27, 0.48), (-0.27, 0.48)])
    d.fill(d.disc(0, -0.32, 0.62), neck)
    d.fill(d.box(0, 0.7, 0.27, 0.25, 0.08), accent=True)
    d.mark([(-0.27, 0.7), (0.27, 0.7)])
    d.mark([(-0.12, 0.4), (-0.2, -0.2), (0, -0.02), (0.2, -0.2), (0.12, 0.4)])


@_draws("sun")
def _sun(d: Board, a: float, b: float) -> None:
    n = 8 if a < 0.6 else 10
    for k in range(n):
        t = 2 * math.pi * k / n
        c, s = math.cos(t), math.sin(t)
        d.stroke(0.14, [(0.68 * c, 0.68 * s), (0.96 * c, 0.96 * s)])
    d.fill(d.disc(0, 0, 0.5))


@_draws("cloud")
def _cloud(d: Board, a: float, b: float) -> None:
    d.fill(
        d.disc(-0.52, 0.18, 0.38),
        d.disc(0.54, 0.2, 0.36),
        d.disc(-0.14, -0.22, 0.46),
        d.disc(0.34, -0.08 - 0.12 * a, 0.36),
        d.box(0, 0.36, 0.54, 0.2),
    )


@_draws("bow tie")
def _bow_tie(d: Board, a: float, b: float) -> None:
    h = 0.5 + 0.12 * a
    d.fill(d.poly([(-0.95, -h), (-0.05, -0.1), (-0.05, 0.1), (-0.95, h)]))
    d.fill(d.poly([(0.95, -h), (0.05, -0.1), (0.05, 0.1), (0.95, h)]))
    d.fill(d.box(0, 0, 0.19, 0.24, 0.08), accent=True)
    d.mark([(0.3, -0.06), (0.62, -0.16)], [(-0.3, -0.06), (-0.62, -0.16)])


@_draws("cactus")
def _cactus(d: Board, a: float, b: float) -> None:
    left, right = -0.1 + 0.3 * a, -0.1 + 0.3 * b
    arms = [
        [(-0.02, left + 0.3), (-0.58, left + 0.3), (-0.58, left - 0.3)],
        [(0.02, right + 0.2), (0.58, right + 0.2), (0.58, right - 0.42)],
    ]
    body = functools.reduce(np.minimum, [d.line(arm) - np.float32(0.14) for arm in arms])
    d.fill(d.box(0, -0.08, 0.24, 0.86, 0.22), body)
    d.fill(d.poly([(-0.5, 0.62), (0.5, 0.62), (0.38, 0.97), (-0.38, 0.97)]), accent=True)


@_draws("sailboat")
def _sailboat(d: Board, a: float, b: float) -> None:
    d.stroke(0.09, [(0, -0.95), (0, 0.5)], accent=True)
    d.fill(d.poly([(0.1, -0.9), (0.1, 0.3), (0.78, 0.3)]))
    if a > 0.4:
        d.fill(d.poly([(-0.1, -0.66), (-0.1, 0.3), (-0.62, 0.3)]))
    d.fill(d.poly([(-0.95, 0.46), (0.95, 0.46), (0.6, 0.92), (-0.6, 0.92)]), accent=True)


@_draws("rocket")
def _rocket(d: Board, a: float, b: float) -> None:
    d.fill(d.poly([(-0.2, 0.1), (-0.66, 0.78), (-0.2, 0.66)]), accent=True)
    d.fill(d.poly([(0.2, 0.1), (0.66, 0.78), (0.2, 0.66)]), accent=True)
    if a > 0.4:
        d.fill(d.poly([(-0.2, 0.64), (0.2, 0.64), (0, 0.99)]), accent=True)
    side = curve([(0, -0.97), (0.28, -0.5), (0.34, 0.1), (0.22, 0.7)])
    d.fill(d.poly([*side, *[(-x, y) for x, y in reversed(side[1:])]]))
    d.fill(d.disc(0, -0.22, 0.15), accent=True)


@_draws("butterfly")
def _butterfly(d: Board, a: float, b: float) -> None:
    for side in (-1, 1):
        d.fill(d.oval(side * 0.42, 0.42, 0.42, 0.3, side * 0.9))
        d.fill(d.oval(side * 0.5, -0.3, 0.54, 0.36, -side * 0.75))
        d.fill(d.disc(side * 0.56, -0.34, 0.15), accent=True)
    d.fill(d.oval(0, 0.05, 0.1, 0.6), accent=True)
    d.mark([(0, -0.5), (-0.2, -0.92)], [(0, -0.5), (0.2, -0.92)])


@_draws("snowman")
def _snowman(d: Board, a: float, b: float) -> None:
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
def _padlock(d: Board, a: float, b: float) -> None:
    r = 0.38 + 0.06 * b
    d.stroke(0.17, [(-r, 0.1), *arc(0, -0.38, r, r + 0.04, 180, 360), (r, 0.1)], accent=True)
    d.fill(d.box(0, 0.4, 0.68, 0.52, 0.1))
    d.dot(0, 0.32, 0.1)
    d.mark([(0, 0.34), (0, 0.6)])


@_draws("crown")
def _crown(d: Board, a: float, b: float) -> None:
    tip = 0.66 + 0.2 * a
    points = [(-0.74, 0.62), (-0.92, -0.5), (-0.42, 0.05), (0, -tip), (0.42, 0.05), (0.92, -0.5)]
    d.fill(d.poly([*points, (0.74, 0.62)]))
    d.fill(d.box(0, 0.6, 0.74, 0.16), accent=True)
    d.fill(d.disc(-0.9, -0.55, 0.12), d.disc(0, -tip, 0.12), d.disc(0.9, -0.55, 0.12), accent=True)


@_draws("flower")
def _flower(d: Board, a: float, b: float) -> None:
    n = 5 if a < 0.5 else 6
    d.stroke(0.11, [(0, -0.2), (0.04, 0.96)], accent=True)
    d.fill(d.oval(0.3, 0.58, 0.28, 0.13, -0.5), accent=True)
    for k in range(n):
        t = 2 * math.pi * k / n - math.pi / 2
        d.fill(d.disc(0.36 * math.cos(t), -0.36 + 0.36 * math.sin(t), 0.25))
    d.fill(d.disc(0, -0.36, 0.2), accent=True)


@_draws("wine glass")
def _wine_glass(d: Board, a: float, b: float) -> None:
    d.stroke(0.12, [(0, 0.1), (0, 0.86)])
    d.fill(d.box(0, 0.88, 0.4, 0.07))
    top = -0.92
    side = curve([(0.42, top), (0.5, -0.4), (0.36, 0.02), (0, 0.18)])
    bowl = d.poly([*side, *[(-x, y) for x, y in reversed(side[:-1])]])
    d.fill(bowl)
    d.fill(np.maximum(bowl + np.float32(0.07), np.float32(-0.55 + 0.25 * a) - d.y), accent=True)


def _digit(lines: Callable[[float], Sequence[Points]]) -> _Drawing:
    def drawing(d: Board, a: float, b: float) -> None:
        d.stroke(0.16 + 0.12 * b, *lines(a))

    return drawing


_DRAWINGS |= {
    "zero": _digit(lambda a: [arc(0, 0, 0.42 + 0.12 * a, 0.84, -90, 270, 24)]),
    "one": _digit(
        lambda a: [
            [(-0.3, -0.52), (0.04, -0.86), (0.04, 0.86)],
            *([[(-0.3, 0.86), (0.38, 0.86)]] if a > 0.5 else []),
        ]
    ),
    "two": _digit(
        lambda a: [
            [*arc(0, -0.4, 0.48, 0.44, 190, 380, 12), (-0.5, 0.84), (0.54, 0.84)],
        ]
    ),
    "three": _digit(
        lambda a: [
            [*arc(-0.04, -0.44, 0.46, 0.42, 200, 450, 12)],
            [*arc(-0.04, 0.42, 0.52, 0.44, -90, 160, 12)],
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
            [(0.46, -0.84), (-0.36, -0.84), (-0.42, -0.1), *arc(-0.02, 0.34, 0.5, 0.5, -125, 150)],
        ]
    ),
    "six": _digit(
        lambda a: [
            curve([(0.32, -0.86), (-0.24, -0.36), (-0.48, 0.36)]),
            arc(0, 0.38, 0.48, 0.46, 0, 360, 20),
        ]
    ),
    "seven": _digit(
        lambda a: [
            [(-0.52, -0.82), (0.52, -0.82), (-0.1, 0.88)],
            *([[(-0.2, 0.02), (0.42, 0.02)]] if a > 0.5 else []),
        ]
    ),
    "eight": _digit(
        lambda a: [arc(0, -0.44, 0.38, 0.4, 0, 360, 20), arc(0, 0.42, 0.48, 0.44, 0, 360, 20)]
    ),
    "nine": _digit(
        lambda a: [
            arc(0, -0.38, 0.48, 0.46, 0, 360, 20),
            curve([(0.48, -0.36), (0.4, 0.3), (0.1 - 0.3 * a, 0.88)]),
        ]
    ),
}


@functools.lru_cache(maxsize=1)
def atlas() -> Array:
    """Fields of every glyph in every variant, a row of four distances per cell."""
    sheets = []
    for name in NAMES:
        for k in range(VARIANTS):
            board = Board()
            # a sweeps its range; b visits it in another order, so that the two do not move together
            _DRAWINGS[name](board, (k + 0.5) / VARIANTS, ((3 * k + 1) % VARIANTS + 0.5) / VARIANTS)
            sheets.append(board.fields())
    return np.concatenate(sheets)
