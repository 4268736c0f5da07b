"""Draw `glyphs`: 48 nameable things in six visual domains, each image from its index alone.

Every glyph is drawn once as signed-distance fields on a small grid. An image samples these fields
through its own affine map and sway, and a domain styles the distances: DomainNet's six looks at
28 × 28. There are no files, and no image depends on which others are asked for.
"""

from __future__ import annotations

from fastfpl.data.glyphs.names import CLASSNAMES, DIGITNAMES, DOMAINS, GLYPHS_VERSION, SIDE
from fastfpl.data.glyphs.sheet import contact_sheet
from fastfpl.data.glyphs.stream import Attributes, GlyphSplit, glyphs, pretrain

__all__ = [
    "CLASSNAMES",
    "DIGITNAMES",
    "DOMAINS",
    "GLYPHS_VERSION",
    "SIDE",
    "Attributes",
    "GlyphSplit",
    "contact_sheet",
    "glyphs",
    "pretrain",
]
