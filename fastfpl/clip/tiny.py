"""The embedded model: a small CLIP of open_clip's build that needs no network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from fastfpl.errors import Missing

__all__ = ["build_tiny", "tiny_config", "tiny_tokenizer", "tiny_weights"]

TINY = Path(__file__).parent / "tiny"


def _file(name: str) -> Path:
    path = TINY / name
    if not path.is_file():
        raise Missing(
            f"fastfpl.load_clip: 'tiny' must have its file fastfpl/clip/tiny/{name}, which is not "
            "there; python -m fastfpl.clip.train_tiny makes it"
        )
    return path


def tiny_config() -> dict[str, Any]:
    """Read ``config.json``: ``model_cfg`` and ``preprocess_cfg`` as open_clip writes them."""
    config: dict[str, Any] = json.loads(_file("config.json").read_text(encoding="utf-8"))
    return config if "model_cfg" in config else {"model_cfg": config}


def tiny_weights() -> Path:
    """Give the path of ``model.safetensors``."""
    return _file("model.safetensors")


def build_tiny(config: dict[str, Any]) -> Any:
    """Build open_clip's ``CLIP`` module from a model config, with random weights.

    Parameters
    ----------
    config : dict
        Keys ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, if wanted, ``quick_gelu``.
    """
    from open_clip.model import CLIP

    return CLIP(**copy.deepcopy(config))


def tiny_tokenizer(context_length: int = 77) -> Any:
    """Give open_clip's tokenizer over the merges in ``bpe.txt.gz``.

    The reader takes line 0 for a header and every later line for a merge, so the file must not end
    with a newline: an empty line would be one more token.
    """
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(_file("bpe.txt.gz")), context_length=context_length)
