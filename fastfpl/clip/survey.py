"""What of a CLIP is taken, told by its name alone: built without weights, on torch's meta device.

``python -m fastfpl.clip.survey`` prints the table of docs/backbones.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from fastfpl.clip.image import ImageTower, image_of
from fastfpl.clip.loading import build, checked_config, known
from fastfpl.clip.tiny import tiny_config
from fastfpl.clip.tokenizer import Tokenizer
from fastfpl.clip.towers import family_of, text_of
from fastfpl.errors import KindError
from fastfpl.reference.text import TextTower

__all__ = ["Backbone", "survey", "table"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model of open_clip as the library sees it.

    Attributes
    ----------
    name : str
    tokenizer : str
        Of the Hugging Face hub; empty where CLIP's own is used.
    refusal : str
        Why it is not taken; empty where it is.
    text : TextTower or None
        Without values; what begins a prompt is the tokenizer's to say, and is not known here.
    image : ImageTower or None
    """

    name: str
    tokenizer: str
    refusal: str = ""
    text: TextTower | None = None
    image: ImageTower | None = None

    def row(self) -> tuple[str, str, str]:
        """Say how the text is encoded, what images give, and whose tokenizer it takes."""
        if self.text is None or self.image is None:
            return f"refused: {self.refusal}", "", ""
        text, patches = self.text, self.image.patches
        traits = ["not causal"] * (not text.causal)
        traits += ["last token pooled"] * (text.pooling == "last")
        how = f"full pass ({', '.join(traits)})" if text.whole else "shared prefix"
        tokens = "patches" if patches else f"no patches: it {self.image.why_no_patches()}"
        return f"{how}, {text.context_length} tokens", tokens, self.tokenizer or "CLIP's own"


def survey(name: str) -> Backbone:
    """Build a model by its name without weights and say what of it is taken.

    Parameters
    ----------
    name : str
        ``"tiny"`` or a model of open_clip.
    """
    plain = name if name == "tiny" else known(name)
    tokenizer = ""
    try:
        config: dict[str, Any]
        config = tiny_config()["model_cfg"] if plain == "tiny" else checked_config(plain)
        tokenizer = config["text_cfg"].get("hf_tokenizer_name", "")
        with torch.device("meta"):
            model = build(config, None)
        _fill_mask(model)
        family = family_of(model)
        text = text_of(model, family, Tokenizer(0, 0, lambda text: []))
        return Backbone(plain, tokenizer, "", text, image_of(model, text.device, text.dtype))
    except KindError as error:
        got = str(error).rpartition("; got ")[2]
        return Backbone(plain, tokenizer, got.removeprefix(f"{plain!r} with "))


def _fill_mask(model: Any) -> None:
    """Give the mask its values, which the meta device has not, by the builder's own function."""
    from open_clip.transformer import TextTransformer

    text = getattr(model, "text", model)
    if getattr(text, "attn_mask", None) is not None:
        text.attn_mask = TextTransformer.build_causal_mask(
            SimpleNamespace(num_pos=text.context_length)
        )


def on(tower: TextTower, device: torch.device | str) -> TextTower:
    """Return a tower without values as if it were on a device, to ask which faces take it."""
    return replace(tower, projection=torch.empty_like(tower.projection, device=device))


def table(names: Iterable[str]) -> str:
    """Survey models into a table in Markdown, models of one kind in one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        rows.setdefault(survey(name).row(), []).append(name)
    lines = ["| models | text | images | tokenizer |", "|---|---|---|---|"]
    for row, alike in sorted(rows.items(), key=lambda pair: (pair[0][0][:7] == "refused", pair)):
        lines.append(f"| {', '.join(alike)} | {' | '.join(row)} |")
    return "\n".join(lines)


def _main() -> None:
    import open_clip

    sys.stdout.write(table(open_clip.list_models()) + "\n")


if __name__ == "__main__":
    _main()
