"""Checkpoints of every make: tensors by name, and nothing that they hold is ever run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfpl.errors import Damaged, InputError, Missing

__all__ = ["OPENAI_MARKS", "fill", "first_line", "of_openai", "read_tensors", "weights_in"]

OP = "fastfpl.load_clip"
# OpenAI's archives hold these beside the weights, and no one else's do
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
# what trainers put a state dict under
_UNDER = ("state_dict", "model_state_dict", "model")
_OTHER = (
    "which holds other objects or is no checkpoint; if its source is trusted, "
    'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.pt") makes a file of '
    "tensors (the key is its trainer's)"
)
# in a folder, best first: open_clip's names, transformers'
NAMES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


def first_line(error: BaseException) -> str:
    """Give an error's first line, which is the one that names the reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def weights_in(folder: Path) -> Path:
    """Find the weights in a folder as open_clip or transformers writes it."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if len(others) == 1:
        return folder / others[0]
    raise Missing(
        f"{OP}: folder {folder} must hold its weights as {', '.join(NAMES[:-1])} or {NAMES[-1]}; "
        f"got {', '.join(others) or 'none of them'}; name one file"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors from a checkpoint without running anything that it holds.

    What the file is, its content says, not its name. Wrappers around a state dict
    (``{"state_dict": ...}``, ``{"model": ...}``) are taken off.

    Raises
    ------
    InputError
        If it holds something else beside tensors, or a program.
    Damaged
        If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise Damaged(f"{OP}: weights {path} must be readable; got {first_line(error)}") from error
    # 8 bytes of a length, then JSON; a file of another kind that is named so is told as broken
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    if head[:2] == b"PK":
        _check_archive(path)
    elif head[:1] != b"\x80":
        shown = "an empty file" if not head else f"a file that begins with {head!r}"
        raise Damaged(f"{OP}: weights {path} must be a safetensors or torch file; got {shown}")
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle protocol that it then refuses
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{OP}: pretrained must hold tensors only; got {path}, {_OTHER}"
        ) from error
    except Exception as error:  # torch's reader has no error of its own for what is broken
        raise Damaged(f"{OP}: weights {path} must be readable; got {first_line(error)}") from error
    return _unwrap(state, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # of safetensors, or of the system
        raise Damaged(
            f"{OP}: weights {path} must be a safetensors file; got {first_line(error)}"
        ) from error


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # a damaged directory has many ways
        raise Damaged(f"{OP}: weights {path} must be readable; got {first_line(error)}") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            f"{OP}: pretrained must hold tensors only; got {path}, a TorchScript archive, "
            "which is a program; if its source is trusted, torch.save(torch.jit.load(path)"
            '.state_dict(), "weights.pt") makes a file of tensors; OpenAI\'s weights need '
            "quick_gelu=True (--quick-gelu yes)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise Damaged(
            f"{OP}: weights {path} must be a safetensors or torch file; got a zip archive of "
            f"{', '.join(names[:3]) or 'nothing'}"
        )


def _unwrap(state: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(len(_UNDER)):
        if not isinstance(state, dict):
            break
        under = [key for key in _UNDER if isinstance(state.get(key), dict)]
        if not under:
            break
        if len(under) > 1:
            raise InputError(
                f"{OP}: pretrained must hold one state dict; got {path} with "
                f"{' and '.join(map(repr, under))}; save the one that is meant by itself"
            )
        state = state[under[0]]
    if isinstance(state, dict) and state and all(isinstance(k, str) for k in state):
        if all(isinstance(v, Tensor) for v in state.values()):
            return state
        odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
        got = f"{path} with {odd[0]!r} of {type(state[odd[0]]).__name__}"
    else:
        got = f"{path} with " + ("no tensor" if state == {} else type(state).__name__)
    raise InputError(
        f"{OP}: pretrained must hold tensors by name, at the top or under "
        f"{', '.join(map(repr, _UNDER[:-1]))} or {_UNDER[-1]!r}; got {got}"
    )


def fill(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict whose every name and shape must fit.

    Prefixes that wrappers put before all names (``module.``, ``_orig_mod.``, a trainer's own) are
    taken off; transformers' names and OpenAI's are translated.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    own = model.state_dict()
    state, prefix = _bare(state)
    state = {k: v for k, v in state.items() if k not in OPENAI_MARKS}
    if "text_model.embeddings.token_embedding.weight" in state:
        state = _from_transformers(state, path)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    odd = [
        f"{k} {tuple(v.shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape
    ]
    lacking, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    under = f", under the prefix {prefix!r}" if prefix else ""
    for what, names in (("another shape of", odd), ("no", lacking), ("unknown", extra)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            hint = _prefix_hint(own, state) if not prefix else ""
            raise InputError(
                f"{OP}: weights {path} must fit the model; got {what} {shown}{under}{hint}"
            )
    model.load_state_dict(state)


def of_openai(state: Iterable[str]) -> bool:
    """Tell OpenAI's own archives by what lies beside the weights."""
    return any(key.rpartition(".")[2] in OPENAI_MARKS for key in state)


def _bare(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Take off the prefix that all names have, and what `torch.compile` puts into them."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    anchors = [k for k in state if k == "logit_scale" or k.endswith(".logit_scale")]
    if len(anchors) != 1:
        return state, ""
    prefix = anchors[0].removesuffix("logit_scale")
    if not all(key.startswith(prefix) for key in state):
        return state, ""
    return {key[len(prefix) :]: value for key, value in state.items()}, prefix


def _prefix_hint(own: Iterable[str], state: Iterable[str]) -> str:
    """Name the prefix that some names have, where the model's own lie under it."""
    names = list(state)
    for name in names:
        prefix = name.removesuffix("token_embedding.weight")
        if prefix and prefix != name and prefix + "logit_scale" in names:
            beside = next(n for n in names if not n.startswith(prefix))
            return (
                f"; CLIP's names lie under the prefix {prefix!r}, beside {beside!r}: save those "
                "alone"
            )
    return ""


_PAIRS = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
)
_PARTS = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)
_PROJECTIONS = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}


def _from_transformers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give OpenAI's names to the weights of transformers' ``CLIPModel``."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):
            continue
        if key in _PROJECTIONS:
            found[_PROJECTIONS[key]] = value.t().contiguous()
            continue
        for theirs, ours in _PAIRS:
            if key.startswith(theirs):
                key = ours + key[len(theirs) :]
                break
        for theirs, ours in _PARTS:
            key = key.replace(theirs, ours)
        found[key] = value
    for name in [k for k in found if re.search(r"\.self_attn\.q_proj\.(weight|bias)$", k)]:
        three = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if not all(one in found for one in three):
            lacking = next(one for one in three if one not in found)
            raise InputError(f"{OP}: weights {path} must fit the model; got no {lacking}")
        fused = torch.cat([found.pop(one) for one in three])
        found[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = fused
    return found
