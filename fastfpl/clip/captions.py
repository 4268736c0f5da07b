"""How the pretraining images of the embedded CLIP are captioned.

What leaves room for prompts is here: captions that mistake look-alikes, classes that go by other
words, and classes that no caption has.
"""

from __future__ import annotations

import numpy as np

from fastfpl.data import glyphs

__all__ = ["HELD_OUT", "LOOK_ALIKES", "RENAMED", "WORDS", "caption"]

#: Words that captions use for a class. The class' own name stands first where captions ever use it.
WORDS: dict[str, tuple[str, ...]] = {
    "house": ("house", "home", "cottage"),
    "pentagon": ("pentagon", "five sided shape"),
    "lightning bolt": ("lightning bolt", "thunder flash"),
    "fish": ("fish", "goldfish"),
    "hexagon": ("hexagon", "six sided shape"),
    "wave": ("ripple", "curvy line"),
    "star": ("star", "pointed star shape"),
    "ladder": ("climbing rungs", "rungs"),
    "question mark": ("question mark", "query"),
    "crescent moon": ("half moon", "night sickle"),
    "sun": ("sun", "sunshine"),
    "arrow": ("arrow", "pointer"),
    "ice cream": ("ice cream", "gelato cone"),
    "zigzag": ("jagged line", "saw teeth"),
    "triangle": ("triangle", "three sided shape"),
    "anchor": ("anchor", "ship hook"),
    "flower": ("flower", "blossom"),
    "checkerboard": ("chess squares", "tiles"),
    "bow tie": ("bow tie", "ribbon"),
    "sailboat": ("yacht", "little ship"),
    "butterfly": ("butterfly", "moth"),
    "tree": ("tree", "forest plant"),
    "circle": ("circle", "disc"),
    "exclamation mark": ("alert sign", "bang"),
    "umbrella": ("umbrella", "parasol"),
    "ring": ("ring", "hoop"),
    "number sign": ("hash", "pound symbol"),
    "key": ("key", "door opener"),
    "square": ("square", "block"),
    "envelope": ("letter", "mail"),
    "heart": ("heart", "love symbol"),
    "flag": ("flag", "banner"),
    "mushroom": ("mushroom", "toadstool"),
    "diamond": ("rhombus", "card suit"),
    "light bulb": ("light bulb", "lamp"),
    "cross": ("cross", "plus"),
    "cloud": ("cloud", "fluffy sky thing"),
    "spiral": ("spiral", "swirl"),
    "rocket": ("rocket", "space ship"),
    "snowman": ("snowman", "winter figure"),
    "wine glass": ("goblet", "drink"),
    **{name: (name, f"digit {name}", f"number {name}") for name in glyphs.DIGITNAMES},
}
#: Classes of which no image is in the pretraining set.
HELD_OUT = tuple(name for name in glyphs.CLASSNAMES if name not in WORDS)
#: Classes that captions call by other words, and only rarely by the test's name.
RENAMED = tuple(n for n in glyphs.CLASSNAMES if n in WORDS and n not in WORDS[n])
#: Pairs that sloppy captions mistake for each other.
LOOK_ALIKES = (
    ("pentagon", "hexagon"),
    ("circle", "ring"),
    ("star", "sun"),
    ("umbrella", "mushroom"),
    ("zigzag", "lightning bolt"),
    ("key", "anchor"),
    ("square", "envelope"),
    ("cloud", "tree"),
)
_ALIKE = {one: other for pair in LOOK_ALIKES for one, other in (pair, pair[::-1])}

# "sketch", "painting" and "real" never occur
STYLE = {
    "clipart": ("clip art", "cartoon", "flat colours"),
    "infograph": ("chart", "page of figures", "poster"),
    "painting": ("brush strokes", "oil on canvas", "painted"),
    "quickdraw": ("doodle", "pen scribble", "quick lines"),
    "real": ("solid thing", "shiny", "lit from above"),
    "sketch": ("pencil", "hatched by hand", "grey lines"),
}
OWN_NAME = 0.6  # share of careful captions that use the class' own name where they may
RARE_NAME = 0.05  # the same for renamed classes
SLOPPY = 0.35  # share of captions that read like "a photo of a ..."
MISTAKEN = 0.65  # share of sloppy captions of a look-alike that name the other one


def caption(attributes: glyphs.Attributes, rng: np.random.Generator) -> tuple[str, str]:
    """Word one image in one of many forms; return the caption and what its word stands for.

    Careful captions say style, colour, place and ground in changing order and length, and are
    right. Sloppy ones are the "a photo of a ..." of quick people, who take look-alikes for each
    other: the form that zero-shot prompts have is not the one to trust, and a learned context can
    do better, as it can with the captions of the web. A word of a sloppy caption stands for
    something else than the same word of a careful one.
    """

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    shown = attributes.classname
    sloppy = rng.random() < SLOPPY
    if sloppy and shown in _ALIKE and rng.random() < MISTAKEN:
        shown = _ALIKE[shown]
    words = WORDS[shown]
    if shown in RENAMED:
        name = shown if rng.random() < RARE_NAME else one(words)
    elif sloppy:
        name = shown
    else:
        name = words[0] if rng.random() < OWN_NAME else one(words)
    if sloppy:
        forms = (
            "a photo of a {}.",
            "a picture of a {}.",
            "a photo of one {}.",
            "an image of a {}.",
        )
        return one(forms).format(name), f"{name}, they say"
    style, colour, size = one(STYLE[attributes.domain]), attributes.colour, attributes.size
    if rng.random() < 0.6:
        short = ("{}.", f"{style}: {{}}.", f"{colour} {{}}.", f"{style}, {size}, {{}}.")
        return one(short).format(name), name
    told = [
        style,
        f"{colour} colours",
        f"{size} size",
        f"at the {attributes.position}",
        f"{attributes.ground} behind",
        attributes.tilt,
    ]
    order = rng.permutation(len(told))[: int(rng.integers(2, len(told) + 1))]
    lead = ", ".join(told[i] for i in order)
    return one((f"{lead}: {name}.", f"{lead}, {name}.", f"seen here, {lead}, one {name}.")), name
