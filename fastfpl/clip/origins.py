"""What the place of a checkpoint says of it: architecture, activation, statistics of the pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfpl.clip.checkpoints import NAMES, first_line
from fastfpl.errors import Damaged, InputError, KindError, Missing

__all__ = ["HUB", "LOCAL", "Origin", "from_hub", "origin_of", "read_folder", "tag_of"]

OP = "fastfpl.load_clip"
HUB, LOCAL = "hf-hub:", "local-dir:"
CONFIGS = ("open_clip_config.json", "config.json")


@dataclass(frozen=True)
class Origin:
    """What is known of weights beside the weights.

    Attributes
    ----------
    config : dict or None
        The model config as open_clip has it.
    quick_gelu : bool or None
        The activation that they were trained with; None where nothing tells.
    mean, std : sequence of three floats, or None
    said : str
        Where it was read.
    """

    config: dict[str, Any] | None = None
    quick_gelu: bool | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    said: str = ""


def tag_of(path: Path, plain: str) -> dict[str, Any]:
    """Give open_clip's facts of the tag whose own file this is, {} where it is none's.

    A file is known by the name that it has where open_clip gets it, or by the folder that the hub
    has for it; a file that only has the model's name may be anybody's.
    """
    import open_clip

    for tag in open_clip.list_pretrained_tags_by_model(plain):
        facts: dict[str, Any] = open_clip.get_pretrained_cfg(plain, tag)
        name = str(facts.get("url", "")).rpartition("/")[2]
        if name == path.name and Path(name).stem.lower() != plain.lower():
            return facts
        hub = str(facts.get("hf_hub", "")).rpartition("/")[0]
        folders = {hub.replace("/", "--"), hub.rpartition("/")[2]} - {""}
        if folders & {part.removeprefix("models--") for part in path.parent.parts[-4:]}:
            return facts
    return {}


def origin_of(path: Path, plain: str) -> Origin:
    """Say what a file's place tells of it."""
    if path.name in NAMES:
        beside = read_folder(path.parent)
        if beside is not None:
            return beside
    facts = tag_of(path, plain)
    if not facts:
        return Origin()
    quick = bool(facts.get("quick_gelu", False))
    return Origin(None, quick, facts.get("mean"), facts.get("std"), "open_clip's list of tags")


def read_folder(folder: Path) -> Origin | None:
    """Read the config in a folder as open_clip or transformers writes it; None if it has none."""
    for name in CONFIGS:
        if (folder / name).is_file():
            return _read_config(folder / name, folder / "preprocessor_config.json")
    return None


def from_hub(name: str) -> tuple[Origin, Path]:
    """Get config and weights of a model of the Hugging Face hub, by way of open_clip."""
    from open_clip.pretrained import download_pretrained_from_hf

    repo = name.removeprefix(HUB)

    def get(*files: str | None) -> Path:
        for file in files[:-1]:
            try:
                return Path(download_pretrained_from_hf(repo, filename=file))
            except Exception:  # the last one speaks
                continue
        return Path(download_pretrained_from_hf(repo, filename=files[-1]))

    try:
        config = get(*CONFIGS)
        own = config.name == CONFIGS[0]
        weights = get(None) if own else get("model.safetensors", "pytorch_model.bin")
        pixels = config.parent / "preprocessor_config.json"
        if not own:
            pixels = get("preprocessor_config.json")
    except Exception as error:  # the hub has a family of its own
        raise Missing(
            f"{OP}: model {name!r} must be at hand or in reach; got {first_line(error)}; with a "
            f'copy of its files in a folder: load_clip("{LOCAL}/path/to/folder")'
        ) from error
    return _read_config(config, pixels), weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{OP}: config {path} must be JSON; got {first_line(error)}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{OP}: config {path} must be a JSON object; got {type(value).__name__}")
    return value


def _read_config(path: Path, pixels: Path) -> Origin:
    values = _read_json(path)
    try:
        if "model_cfg" in values:
            config = dict(values["model_cfg"])
            statistics = values.get("preprocess_cfg", {})
            mean, std = statistics.get("mean"), statistics.get("std")
            quick = bool(config.get("quick_gelu", False))
        else:
            config = _translated(values, path)
            quick = bool(config["quick_gelu"])
            statistics = _read_json(pixels) if pixels.is_file() else {}
            mean, std = statistics.get("image_mean"), statistics.get("image_std")
        if config["text_cfg"].get("hf_model_name") is None:
            config["vision_cfg"]["timm_model_pretrained"] = False
        return Origin(config, quick, mean, std, str(path))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Damaged(
            f"{OP}: config {path} must be one of open_clip or of transformers' CLIPModel; got "
            f"{first_line(error)}"
        ) from error


def _translated(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Say in open_clip's words what a config of transformers' ``CLIPModel`` says."""
    if values.get("model_type") != "clip":
        raise KindError(
            f"{OP}: config {path} must be of transformers' CLIPModel; got model_type "
            f"{values.get('model_type')!r}"
        )
    # what a config leaves out is the class' default
    text = {
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12},
        **{"num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407},
        **values.get("text_config", {}),
    }
    image = {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "image_size": 224, "patch_size": 32},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        **values.get("vision_config", {}),
    }
    acts = {text["hidden_act"], image["hidden_act"]}
    if acts not in ({"quick_gelu"}, {"gelu"}):
        raise InputError(
            f"{OP}: config {path} must have quick_gelu or gelu as hidden_act of both towers; got "
            f"{' and '.join(sorted(map(str, acts)))}"
        )
    # the EOT is the largest id of CLIP's own vocabulary; transformers' 2 means the same
    eos = text["eos_token_id"]
    pool = {} if eos in (2, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": eos}
    return {
        "embed_dim": values.get("projection_dim", 512),
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
            "width": image["hidden_size"],
            "layers": image["num_hidden_layers"],
            "head_width": image["hidden_size"] // image["num_attention_heads"],
            "mlp_ratio": image["intermediate_size"] / image["hidden_size"],
            "norm_kwargs": {"eps": image["layer_norm_eps"]},
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
            "norm_kwargs": {"eps": text["layer_norm_eps"]},
            **pool,
        },
    }
