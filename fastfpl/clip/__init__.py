"""The frozen CLIP: loaded from anywhere, converted to one text tower and one image tower.

Nothing here imports open_clip, torchvision, transformers or timm before `load_clip` needs it.
"""

from __future__ import annotations

from fastfpl.clip.frozen import FrozenCLIP
from fastfpl.clip.loading import load_clip

__all__ = ["FrozenCLIP", "load_clip"]
