"""Where a CLIP comes from: a name, a file, a live model."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfpl.clip.frozen import FrozenCLIP, check_dtype
from fastfpl.clip.image import image_of
from fastfpl.clip.tiny import build_tiny, tiny_config, tiny_tokenizer, tiny_weights
from fastfpl.clip.tokenizer import adapt_tokenizer
from fastfpl.clip.towers import family_of, pooling_of, text_of, vocabulary_of
from fastfpl.clip.trial import check_tensors, prove
from fastfpl.errors import Damaged, InputError, KindError, Missing, near

__all__ = ["load_clip"]

OP = "fastfpl.load_clip"
# of OpenAI's training pixels; open_clip's default too
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# OpenAI's archives hold these beside the weights, and no one else's do
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")


def load_clip(
    name_or_model: Any,
    pretrained: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    quick_gelu: bool | None = None,
    seed: int = 0,
) -> FrozenCLIP:
    """Load a CLIP and freeze it.

    Parameters
    ----------
    name_or_model : str or Module
        ``"tiny"``, the embedded model, which needs no network; a model name of open_clip
        (``"RN50"``, ``"ViT-B-16"``, ``"EVA02-B-16"``, ``"ViT-B-16-SigLIP"``, ...; docs/backbones.md
        lists them; OpenAI's spelling ``"ViT-B/16"`` too); or
        a live model of open_clip, OpenAI's ``clip`` or transformers (``CLIPModel``), which is left
        as it is and shares its weights, see `FrozenCLIP`.
    pretrained : str or Path, optional
        For a name: a tag of open_clip, the path of a checkpoint (safetensors, or a torch file of
        tensors only), or ``"random"``. None is ``"openai"``, for ``"tiny"`` its own weights.
    device : torch.device or str
    dtype : torch.dtype
        float16, bfloat16, float32 or float64.
    tokenizer : object, optional
        open_clip's, OpenAI's or transformers' tokenizer, or a function such as ``clip.tokenize``.
        None is the one that open_clip has for the name; for a live model it is CLIP's own, where
        the vocabulary has its 49408 tokens.
    quick_gelu : bool, optional
        For a name with a path or ``"random"``: the activation that the weights were trained with.
        None is what the name says (``"ViT-B-16-quickgelu"``). OpenAI's weights need True; a tag
        and OpenAI's own archives know by themselves.
    seed : int
        Of ``pretrained="random"``; the global generator is not touched.

    Returns
    -------
    FrozenCLIP

    Raises
    ------
    InputError
        If the name, the tag or the checkpoint does not fit; near names are listed.
    KindError
        If the model's text tower is not CLIP's plain transformer, or the dtype is refused.
    Missing
        If weights or a tokenizer cannot be had; the message names the model, the tag and the cure.
    Damaged
        If a checkpoint cannot be read.

    Examples
    --------
    >>> clip = load_clip("ViT-B-16", pretrained="random")
    >>> clip.dim, clip.patches
    (512, 196)
    """
    check_dtype(OP, dtype)
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    if not isinstance(name_or_model, str):
        if pretrained is not None or quick_gelu is not None:
            given = "pretrained" if pretrained is not None else "quick_gelu"
            raise InputError(f"{OP}: {given} must be None for a live model; got {pretrained!r}")
        model, name, source = name_or_model, type(name_or_model).__name__, ""
        visual = getattr(model, "visual", None)
        mean, std = getattr(visual, "image_mean", mean), getattr(visual, "image_std", std)
    elif name_or_model == "tiny":
        name, source = "tiny", "random" if pretrained == "random" else ""
        if pretrained not in (None, "random"):
            raise InputError(
                f"{OP}: pretrained must be None or 'random' for 'tiny'; got {pretrained!r}"
            )
        config = tiny_config()
        model = _seeded(seed, lambda: build_tiny(config["model_cfg"]))
        if source != "random":
            _fill(model, _read(tiny_weights()), tiny_weights())
        pixels = config.get("preprocess_cfg", {})
        mean, std = pixels.get("mean", mean), pixels.get("std", std)
        tokenizer = tokenizer or tiny_tokenizer(model.context_length)
    else:
        name, source = name_or_model, str(pretrained or "openai")
        plain = known(name)
        config = checked_config(plain)
        tokenizer = tokenizer or _tokenizer_of(plain, config)
        model, mean, std = _named(plain, config, source, quick_gelu, seed)
    live = not isinstance(name_or_model, str)
    return _freeze(model, name, source, tokenizer, mean, std, device, dtype, live)


def _freeze(
    model: Any,
    name: str,
    source: str,
    tokenizer: Any,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype,
    live: bool,
) -> FrozenCLIP:
    family = family_of(model)
    if live:
        check_tensors(model)
    with _structure(model):
        pooling = pooling_of(model, family)
        tokens = adapt_tokenizer(tokenizer, vocabulary_of(model, family))
        if pooling.rule == "eos" and pooling.eos != tokens.eot:
            raise InputError(
                f"{OP}: tokenizer must end a text with the model's token {pooling.eos}; "
                f"got {tokens.eot}"
            )
        place = torch.empty(0, device=device).device
        text, image = text_of(model, family, tokens), image_of(model, place, dtype)
        scale = float(model.logit_scale.detach().float().exp().item())
        if live:
            prove(model, family, tokens, image)
    return FrozenCLIP(
        name=name,
        pretrained=source,
        text=text.to(place, dtype),
        image=image,
        tokenizer=tokens,
        logit_scale=scale,
        mean=mean,
        std=std,
    )


@contextmanager
def _structure(model: Any) -> Iterator[None]:
    """Turn what a model of another build lacks into a sentence."""
    try:
        yield
    except (AttributeError, IndexError, KeyError) as error:
        raise KindError(
            f"{OP}: model must have the parts of open_clip's, OpenAI's or transformers' CLIP; got "
            f"{type(model).__name__} with {_line(error)}"
        ) from error


def known(name: str) -> str:
    """Return open_clip's spelling of a name, or list near ones."""
    import open_clip

    plain = name.replace("/", "-").replace("@336px", "-336")  # OpenAI's spelling
    if plain not in open_clip.list_models():
        known = ["tiny", *open_clip.list_models()]
        raise InputError(
            f"{OP}: name must be 'tiny' or a model of open_clip; got {name!r}{near(plain, known)}"
        )
    return plain


def _named(
    plain: str, config: dict[str, Any], source: str, quick_gelu: bool | None, seed: int
) -> tuple[Any, Sequence[float], Sequence[float]]:
    """Build a model of open_clip by name and fill it from a tag, a file or a seed."""
    import open_clip

    mean, std = _pixels_of(plain)
    tags = open_clip.list_pretrained_tags_by_model(plain)
    facts = open_clip.get_pretrained_cfg(plain, source)
    if source == "random":
        model = _seeded(seed, lambda: build(config, quick_gelu))
        return model, mean, std
    if facts:
        wants = bool(facts.get("quick_gelu", config.get("quick_gelu", False)))
        if quick_gelu is not None and quick_gelu != wants:
            raise InputError(
                f"{OP}: quick_gelu must be None or {wants} for the tag {source!r} of {plain!r}; "
                f"got {quick_gelu}"
            )
        path = _download(plain, source, facts, wants)
        model = _seeded(seed, lambda: build(config, wants))
        try:
            open_clip.load_checkpoint(model, str(path))
        except RuntimeError as error:
            raise Damaged(f"{OP}: weights {path} must fit {plain!r}; got {_line(error)}") from error
        return model, facts.get("mean", MEAN), facts.get("std", STD)
    path = Path(source)
    if not path.is_file():
        looks_like_path = path.suffix != "" or len(path.parts) > 1
        if looks_like_path:
            raise Missing(f"{OP}: pretrained must be a tag, a file or 'random'; no file {source!r}")
        raise InputError(
            f"{OP}: pretrained must be a tag of {plain!r}, a file or 'random'; got {source!r}"
            + (near(source, tags) if tags else "; this model has no tags")
        )
    state = _read(path)
    if quick_gelu is None and any(mark in state for mark in OPENAI_MARKS):
        quick_gelu = True
    model = _seeded(seed, lambda: build(config, quick_gelu))
    _fill(model, state, path)
    return model, mean, std


def _pixels_of(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Give mean and deviation of the pixels where all tags of a model agree, else CLIP's own."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    facts = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    found = {(tuple(f.get("mean", MEAN)), tuple(f.get("std", STD))) for f in facts}
    return found.pop() if len(found) == 1 else (MEAN, STD)


def _tokenizer_of(name: str, config: dict[str, Any]) -> Any:
    """Load the tokenizer that a model of open_clip names; None where it is CLIP's own."""
    import open_clip

    own = config["text_cfg"].get("hf_tokenizer_name")
    if not own:
        return None
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # the hub, transformers and its parsers each have their own
        more = {"context_length": config["text_cfg"].get("context_length", 77)}
        more |= config["text_cfg"].get("tokenizer_kwargs", {})
        arguments = ", ".join(f"{key}={value!r}" for key, value in more.items())
        raise Missing(
            f"{OP}: tokenizer {own!r} of {name!r} must be at hand or in reach; got "
            f"{_line(error)}; with its files in a folder: load_clip({name!r}, tokenizer="
            f'open_clip.tokenizer.HFTokenizer("/path/to/folder", {arguments}))'
        ) from error


def checked_config(name: str) -> dict[str, Any]:
    """Refuse by the config what could only be refused after a download."""
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(name)
    text = config["text_cfg"]
    reason = None
    if "multimodal_cfg" in config:
        reason = "a captioning model (CoCa)"
    elif text.get("hf_model_name"):
        reason = f"the text tower {text['hf_model_name']!r} of transformers"
    if reason:
        raise KindError(f"{OP}: name must have CLIP's text transformer; got {name!r} with {reason}")
    return config


def build(config: dict[str, Any], quick_gelu: bool | None) -> Any:
    """Build open_clip's module from a model config, with random weights."""
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom = config.pop("custom_text", False)
    if quick_gelu is not None:
        config["quick_gelu"] = quick_gelu
    return (CustomTextCLIP if custom else CLIP)(**config)


def _seeded(seed: int, build: Any) -> Any:
    """Build under a seed of its own, so that loading draws nothing from the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _download(name: str, tag: str, facts: dict[str, Any], quick_gelu: bool) -> Path:
    import open_clip

    try:
        path = open_clip.download_pretrained(facts)
    except Exception as error:  # the hub and urllib each have a family of their own
        hint = ", quick_gelu=True" if quick_gelu and not name.endswith("-quickgelu") else ""
        raise Missing(
            f"{OP}: weights {tag!r} of {name!r} must be at hand or in reach; got {_line(error)}; "
            f"with a copy on disk: load_clip({name!r}, "
            f'pretrained="/path/to/weights.safetensors"{hint})'
        ) from error
    return Path(path)


def _line(error: BaseException) -> str:
    """Give an error's first line, which is the one that names the reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _read(path: Path) -> dict[str, Tensor]:
    """Read tensors from a checkpoint without running anything that it holds."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise Damaged(
                f"{OP}: weights {path} must be a safetensors file; got {_line(error)}"
            ) from error
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if program:
            raise InputError(
                f"{OP}: pretrained must hold tensors only; got {path}, a TorchScript archive, "
                "which is a program; if its source is trusted, torch.save(torch.jit.load(path)"
                '.state_dict(), "weights.pt") makes a file of tensors'
            )
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle protocol that it then refuses
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{OP}: pretrained must hold tensors only; got {path}, which holds other objects or "
            "is no checkpoint"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise Damaged(f"{OP}: weights {path} must be readable; got {_line(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"{OP}: pretrained must hold tensors by name; got {path} with {type(state).__name__}"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def _fill(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict whose every name and shape must fit."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = {k: v for k, v in state.items() if k not in OPENAI_MARKS}
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)
    odd = [
        f"{k} {tuple(v.shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape
    ]
    lacking, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    for what, names in (("another shape of", odd), ("no", lacking), ("unknown", extra)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{OP}: weights {path} must fit the model; got {what} {shown}")
    model.load_state_dict(state)
