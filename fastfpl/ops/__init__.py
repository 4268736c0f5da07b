"""The ops: one file each, named as its reference, its kernels, its C++, its tests and its bench.

Parts of one that would be too long are beside it, as ``<op>_<part>.py``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfpl.ops.attention import prefix_attention
    from fastfpl.ops.embedded import encode_embedded
    from fastfpl.ops.entropic import sinkhorn
    from fastfpl.ops.faces import Face
    from fastfpl.ops.gate import Gate, gate_experts
    from fastfpl.ops.text import encode_text
    from fastfpl.ops.transport import transport_logits, transport_plan

__all__ = [
    "Gate",
    "all_faces",
    "encode_embedded",
    "encode_text",
    "gate_experts",
    "prefix_attention",
    "sinkhorn",
    "transport_logits",
    "transport_plan",
]

_HOME = {
    "Gate": "fastfpl.ops.gate",
    "encode_embedded": "fastfpl.ops.embedded",
    "encode_text": "fastfpl.ops.text",
    "gate_experts": "fastfpl.ops.gate",
    "prefix_attention": "fastfpl.ops.attention",
    "sinkhorn": "fastfpl.ops.entropic",
    "transport_logits": "fastfpl.ops.transport",
    "transport_plan": "fastfpl.ops.transport",
}


def all_faces() -> dict[str, tuple[Face, ...]]:
    """Return every op's faces, best first, by the op's name; `fastfpl doctor` prints them."""
    faces: dict[str, tuple[Face, ...]] = {}
    for home in dict.fromkeys(_HOME.values()):
        faces |= importlib.import_module(home).FACES
    return faces


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastfpl.ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
