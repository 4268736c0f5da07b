"""The names of glyphs and of their looks; whoever changes one changes every image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["CLASSNAMES", "DIGITNAMES", "DOMAINS", "GLYPHS_VERSION", "NAMES", "SIDE", "Array"]

GLYPHS_VERSION = "glyphs-1"
SIDE = 28
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
NAMES = (*CLASSNAMES, *DIGITNAMES)
Array = npt.NDArray[np.float32]
