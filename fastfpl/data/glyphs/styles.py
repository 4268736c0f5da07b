"""Six visual domains: each styles the distances of a glyph into a look of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from fastfpl.data.glyphs.canvas import (
    COLOURS,
    GROUNDS,
    LIGHT,
    VIVID,
    Canvas,
    X,
    Y,
    between,
    cos_sin,
    coverage,
    greys,
    pick,
    sine,
)
from fastfpl.data.glyphs.names import SIDE, Array

__all__ = ["STYLES"]

_NIGHT: Array = np.array([0.14, 0.2, 0.33], np.float32)
_PAPER: Array = np.array([0.95, 0.94, 0.91], np.float32)


def _clipart(d: Canvas) -> None:
    u = d.u
    body, accent, edge, _ = d.fields(0.02)
    d.pixels[:] = LIGHT[d.pale][:, None]
    line = d.jitter(VIVID[d.hue] * np.float32(0.22), 0.06)
    half = between(u["width"], 0.45, 0.85)[:, None]
    d.paint(line, coverage(body - half))
    d.paint(d.jitter(VIVID[d.hue], 0.07), coverage(body + half))
    d.paint(d.jitter(VIVID[d.hue_accent], 0.07), coverage(np.maximum(accent, body + half)))
    d.paint(line, coverage(edge - half))
    # a strip of paper stuck over it
    strip = d.band(0.0, 0.8, 0.22)
    d.paint(LIGHT[d.pale] * np.float32(0.72), coverage(strip))
    d.paint(LIGHT[(d.pale + 1) % len(GROUNDS)], coverage(strip + np.float32(0.8)))
    d.pixels += (d.noise * np.float32(0.015))[..., None]


def _infograph(d: Canvas) -> None:
    u = d.u
    dark = u["dark"] < 0.25
    ground = np.where(dark[:, None], _NIGHT, LIGHT[d.pale])
    d.pixels[:] = ground[:, None]
    body, accent, edge, _ = d.fields(0.0)
    colours = d.jitter(VIVID[d.hue], 0.07)
    second = VIVID[d.hue_accent]
    ink = np.where(dark[:, None], np.float32(0.85), np.float32(0.3)) * np.ones((1, 3), np.float32)
    for k, (x0, x1, y0, y1) in enumerate(_clutter(d)):
        x, y = X + np.float32(13.5), Y + np.float32(13.5)
        wide = np.clip(np.minimum(x - x0, x1 - x) + 1, 0, 1)
        high = np.clip(np.minimum(y - y0, y1 - y) + 1, 0, 1)
        # bars first, then a rule, then lines that look like text
        shade = (second, colours, VIVID[d.hue_ground])[k % 3] if k < 5 else ink
        d.paint(shade, wide * high * np.float32(0.8))
    badge = u["layout"] < 0.3
    reach = np.sqrt((X - d.dx[:, None]) ** 2 + (Y - d.dy[:, None]) ** 2)
    plate = np.where(badge[:, None], reach - 1.06 * d.scale[:, None], body - np.float32(1.2))
    plain = np.where(badge[:, None], ground * np.float32(0.75) + np.float32(0.12), ground)
    d.paint(plain.astype(np.float32), coverage(plate.astype(np.float32)))
    d.paint(colours, coverage(body - np.float32(0.1)))
    d.paint(second, coverage(np.maximum(accent, body)))
    rule = ground * np.float32(0.9)
    d.paint(
        rule.astype(np.float32), coverage(edge - np.float32(0.1)) * coverage(body + np.float32(1))
    )
    # a label with a line of text laid over the figure
    label = d.band(-0.2, 0.7, 0.26)
    d.paint(ground.astype(np.float32), coverage(label))
    dashes = coverage(np.float32(0.35) - sine(X * np.float32(0.23) + u["clutter27"][:, None]))
    d.paint(ink, coverage(label + np.float32(0.22) * d.scale[:, None]) * dashes)
    d.pixels += (d.noise * np.float32(0.02))[..., None]


def _clutter(d: Canvas) -> Iterable[tuple[Array, Array, Array, Array]]:
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


def _painting(d: Canvas) -> None:
    u = d.u
    turn = u["grain_angle"] * np.float32(math.pi)
    sway = d.cloth(0.8, 0.8, 2)
    body, accent, _, _ = d.fields(0.045)
    body, accent = body + sway * np.float32(0.4), accent + sway * np.float32(0.4)
    streak = d.cloth(0.7, 3.2, 0, turn)
    daub = d.cloth(0.9, 0.9, 1)
    light = np.where(u["dark"] < 0.5, np.float32(1), np.float32(-1))[:, None]
    # a common tone holds the palette together, and takes its contrast away
    tone = VIVID[pick(u["tone"], len(COLOURS))]
    level = between(u["contrast"], 0.08, 0.24)[:, None]

    def mix(hue: npt.NDArray[np.int64], share: float, lift: Array) -> Array:
        muted = VIVID[hue] * np.float32(share) + tone * np.float32(0.15) + np.float32(0.13)
        mixed: Array = np.clip(muted + lift, 0, 1)
        return mixed

    ground = d.jitter(mix(d.hue_ground, 0.6, -light * level), 0.06)
    other = d.jitter(mix(d.hue_accent, 0.45, -light * level), 0.06)
    d.pixels[:] = ground[:, None]
    d.paint(other, np.clip(daub * np.float32(0.5) + np.float32(0.2), 0, 0.6))
    d.paint(d.jitter(mix(d.hue, 0.68, light * level), 0.05), coverage(body, 1.6))
    d.paint(mix(d.hue_accent, 0.68, light * level), coverage(np.maximum(accent, body), 1.6))
    rim = coverage(np.abs(body) - np.float32(0.25), 1.4) * np.float32(0.35)
    d.paint(greys(np.full(len(body), 0.15, np.float32)), rim)
    # one broad stroke of the background's paint across it
    d.paint(other, coverage(d.band(0.0, 0.8, 0.2) + daub * np.float32(0.9), 2.0))
    cross = d.cloth(3.2, 0.7, 3, turn)
    stroke = np.where(body < 0, cross, streak) * np.float32(0.085)
    d.pixels += (stroke + d.noise * np.float32(0.03))[..., None]


def _quickdraw(d: Canvas) -> None:
    u = d.u
    pen = d.fields(between(u["sway"], 0.05, 0.13))[3]
    # the pen jumps here and there, and once in a while it slips
    turn = u["blot_angle"] * np.float32(2 * math.pi)
    c, s = cos_sin(turn)
    x = d.dx[:, None] + d.scale[:, None] * c * np.float32(0.7)
    y = d.dy[:, None] + d.scale[:, None] * s * np.float32(0.7)
    near = np.sqrt((X - x) ** 2 + (Y - y) ** 2)
    half = between(u["width"], 0.4, 0.75)[:, None]
    gap = np.where(u["blot"] < 0.6, between(u["blot_size"], 1.0, 2.6), 0).astype(np.float32)
    stroke = np.maximum(pen - half, gap[:, None] - near)
    c, s = cos_sin(turn + np.float32(1.2) + u["blot_size"])
    along = np.clip((X - x) * c + (Y - y) * s, -3, 4)
    slip = np.sqrt((X - x - along * c) ** 2 + (Y - y - along * s) ** 2)
    slips = (u["blot"] > 0.75)[:, None]
    stroke = np.where(slips, np.minimum(stroke, slip - half), stroke)
    # some never finish
    stroke = np.maximum(stroke, -d.beyond(-0.05, 0.7))
    d.pixels[:] = 1
    d.paint(greys(np.full(len(pen), 0.06, np.float32)), coverage(stroke))


def _real(d: Canvas) -> None:
    u = d.u
    body, accent, edge, _ = d.fields(0.015)
    light = np.where(u["dark"] < 0.5, np.float32(1), np.float32(-1))[:, None]
    level = between(u["contrast"], 0.02, 0.16)[:, None]
    day = between(u["tone"], 0.18, 0.46)[:, None]
    room = VIVID[d.hue_ground] * np.float32(0.46) + day - light * level
    room = d.jitter(room, 0.06)
    d.pixels[:] = room[:, None]
    # a far wall, a table below it, and things out of focus
    table = np.clip((Y - between(u["layout"], -4, 12)[:, None]) * np.float32(0.7), 0, 1)
    board = VIVID[d.hue_accent] * np.float32(0.3) + np.float32(0.3) - light * level
    d.paint(board.astype(np.float32), table * np.float32(0.65))
    blur = d.cloth(0.45, 0.45, 0)
    d.pixels += (blur * np.float32(0.085))[..., None]
    d.pixels[..., 0] += d.cloth(0.3, 0.3, 1) * np.float32(0.05)
    d.pixels[..., 2] += d.cloth(0.3, 0.3, 2) * np.float32(0.05)
    angle = u["light"] * np.float32(math.pi) + np.float32(math.pi)
    lx, ly = cos_sin(angle)
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
        (d.hue, coverage(body, 1.3)),
        (d.hue_accent, coverage(np.maximum(accent, body), 1.3)),
    ):
        flat = d.jitter(VIVID[hue] * np.float32(0.9) + lift, 0.07)
        d.paint(flat[:, None] * (shade * skin)[..., None] + gloss[..., None], cover)
    seam = coverage(edge - np.float32(0.2), 1.4) * coverage(body + np.float32(0.8))
    d.paint(np.zeros((len(body), 3), np.float32), seam * np.float32(0.35))
    # something stands in front, too near to be sharp
    front = d.beyond(0.05, 0.8) + blur * np.float32(0.8)
    d.paint(room * np.float32(0.8) + np.float32(0.08), coverage(front, 2.5))
    d.soften(np.clip(2 * u["trouble"] - np.float32(0.6), 0, 1))
    far = (X * X + Y * Y) * np.float32(1 / 1500)
    d.pixels *= ((1 - far) * between(u["hue_accent"], 0.85, 1.12)[:, None])[..., None]
    grain = np.float32(0.06) + np.float32(0.14) * u["blot"] * u["blot"]
    d.pixels += (d.noise * grain[:, None])[..., None]
    d.pixels[..., 0] += d.tint * np.float32(0.04)
    d.pixels[..., 2] -= d.tint * np.float32(0.04)


def _shifted(body: Array, right: int, down: int) -> Array:
    """Cover of a soft shadow of the body, so many pixels to the right and down."""
    shadow = np.zeros((len(body), SIDE, SIDE), np.float32)
    cover = coverage(body, 3.0).reshape(-1, SIDE, SIDE)
    shadow[:, down:, right:] = cover[:, :-down, :-right]
    return shadow.reshape(body.shape)


def _sketch(d: Canvas) -> None:
    u = d.u
    body, accent, _, pen = d.fields(0.05)
    again = d.fields(0.06, (0.45, -0.3))[3]
    grain = d.cloth(3.7, 3.7, 0)
    tooth = np.clip(np.float32(0.78) + grain * np.float32(0.22) + d.noise * np.float32(0.35), 0, 1)
    paper = _PAPER - np.float32(0.09) * u["tone"][:, None]
    d.pixels[:] = paper[:, None]
    d.pixels += (grain * np.float32(0.022) + d.noise * np.float32(0.05))[..., None]
    lead = greys(between(u["contrast"], 0.14, 0.36))
    half = between(u["width"], 0.2, 0.5)[:, None]
    angle = between(u["grain_angle"], 0.5, 1.2)
    c, s = cos_sin(angle)
    pitch = between(u["light"], 0.28, 0.42)[:, None]
    lines = sine((X * c + Y * s) * pitch + u["grain1"][:, None])
    hatch = np.clip(lines * np.float32(0.9), 0, 1) * coverage(body + np.float32(0.4))
    # half of the drawings are hatched all over, the others only where the accent lies
    everywhere = np.where(u["layout"] < 0.5, np.float32(0.45), np.float32(0))[:, None]
    dense = np.maximum(everywhere, coverage(accent) * np.float32(0.6))
    # the hand presses unevenly, and part may be rubbed out
    press = np.float32(1) - np.float32(0.7) * u["trouble"][:, None]
    tooth = tooth * press * (1 - np.float32(0.85) * coverage(d.beyond(0.0, 0.75), 3.0))
    d.paint(lead, hatch * dense * tooth)
    d.paint(lead, coverage(pen - half, 1.3) * tooth * np.float32(0.75))
    d.paint(lead, coverage(again - half, 1.3) * tooth * np.float32(0.55))
    # a construction line, as one draws before the thing itself
    c, s = cos_sin(u["blot_angle"] * np.float32(math.pi))
    ruler = X * c + Y * s - between(u["blot"], -9, 9)[:, None]
    d.paint(lead, coverage(np.abs(ruler) - np.float32(0.1)) * tooth * np.float32(0.3))


STYLES: tuple[Callable[[Canvas], None], ...] = (
    _clipart,
    _infograph,
    _painting,
    _quickdraw,
    _real,
    _sketch,
)
