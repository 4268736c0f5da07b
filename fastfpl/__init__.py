"""Federated prompt learning of CLIP: exact, tested, fast.

Importing this package loads nothing heavy: every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfpl.clip import FrozenCLIP, load_clip
    from fastfpl.dropin import accelerate, accelerated, explain, restore
    from fastfpl.federation import Result, Settings, compare, encode, run, sweep
    from fastfpl.ops.faces import face
    from fastfpl.prompts import ClassPrompts, encode_prompts
    from fastfpl.trained import load

__version__ = "0.1.0"
__all__ = [
    "ClassPrompts",
    "FrozenCLIP",
    "Result",
    "Settings",
    "__version__",
    "accelerate",
    "accelerated",
    "compare",
    "encode",
    "encode_prompts",
    "explain",
    "face",
    "load",
    "load_clip",
    "restore",
    "run",
    "sweep",
]

_HOME = {
    "ClassPrompts": "fastfpl.prompts",
    "FrozenCLIP": "fastfpl.clip",
    "Result": "fastfpl.federation",
    "Settings": "fastfpl.federation",
    "accelerate": "fastfpl.dropin",
    "accelerated": "fastfpl.dropin",
    "compare": "fastfpl.federation",
    "encode": "fastfpl.federation",
    "encode_prompts": "fastfpl.prompts",
    "explain": "fastfpl.dropin",
    "face": "fastfpl.ops.faces",
    "load": "fastfpl.trained",
    "load_clip": "fastfpl.clip",
    "restore": "fastfpl.dropin",
    "run": "fastfpl.federation",
    "sweep": "fastfpl.federation",
}
_ROOMS = (
    *("clip", "data", "dropin", "errors", "features", "federation", "methods", "ops", "prompts"),
    *("testing", "tracking", "trained"),
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastfpl.{name}")
    raise AttributeError(f"module 'fastfpl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


def _join_installed_copy() -> None:
    """Let a source tree find the parts that only an installed copy has.

    Python started in the repository's root imports ./fastfpl, which holds neither the compiled
    module ``_C`` nor ``kernels``; after a plain ``pip install .`` both lie in site-packages.
    """
    import sys

    here = Path(__file__).resolve().parent
    if (here / "kernels").exists() or not (here.parent / "kernels" / "__init__.py").exists():
        return
    for entry in sys.path:
        other = Path(entry or ".").resolve() / "fastfpl"
        if other != here and (other / "kernels" / "__init__.py").exists():
            __path__.append(str(other))
            return


_join_installed_copy()
