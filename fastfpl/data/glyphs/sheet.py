"""A labelled sheet of all glyphs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from fastfpl.data.glyphs.names import DOMAINS, SIDE
from fastfpl.data.glyphs.stream import pretrain

__all__ = ["contact_sheet"]


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
