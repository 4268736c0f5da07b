"""Where a CLIP comes from: a name, a file, a live model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastfpl.clip.checkpoints import fill, first_line, of_openai, read_tensors, weights_in
from fastfpl.clip.frozen import FrozenCLIP, check_dtype
from fastfpl.clip.image import image_of
from fastfpl.clip.origins import HUB, LOCAL, Origin, from_hub, origin_of, read_folder
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
        lists them; OpenAI's spelling ``"ViT-B/16"`` too); ``"hf-hub:ORG/REPO"`` of the Hugging
        Face hub or ``"local-dir:FOLDER"``, with a config of open_clip or of transformers'
        ``CLIPModel``; or
        a live model of open_clip, OpenAI's ``clip`` or transformers (``CLIPModel``), which is left
        as it is and shares its weights, see `FrozenCLIP`.
    pretrained : str or Path, optional
        For a name: a tag of open_clip, the path of a checkpoint (safetensors, or a torch file of
        tensors only; open_clip's names or transformers', also with the prefixes and under the keys
        that trainers add) or of a folder that holds one, or ``"random"``. None is ``"openai"``,
        for ``"tiny"`` its own weights.
    device : torch.device or str
    dtype : torch.dtype
        float16, bfloat16, float32 or float64.
    tokenizer : object, optional
        open_clip's, OpenAI's or transformers' tokenizer, or a function such as ``clip.tokenize``.
        None is the one that open_clip has for the name; for a live model it is CLIP's own, where
        the vocabulary has its 49408 tokens.
    quick_gelu : bool, optional
        The activation that the weights were trained with, for a path, a folder or ``"random"``.
        None is what is known: a tag, OpenAI's own archives and a config beside the file know by
        themselves; else it is what the name says (``"ViT-B-16-quickgelu"``), with a warning where
        the model has weights of both kinds.
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
        If the model's text tower is not CLIP's plain transformer, a live model's own passes do
        something else, its weights are no plain tensors, or the dtype is refused.
    Missing
        If weights or a tokenizer cannot be had; the message names the model, the tag and the cure.
    Damaged
        If a checkpoint cannot be read.

    Warns
    -----
    UserWarning
        If a file may have been trained with QuickGELU, and nothing tells.

    Notes
    -----
    The structure of a live model is read once, and a trial proves it: random tokens and pixels go
    through the model's own passes (its hooks fire), in a copy in eval mode that shares the weights,
    and must give what the reading gives. Adapters in the image tower are taken along; those of the
    text tower, and hooks, are refused with the path of the part. What is attached to the model
    later is not seen.

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
            given = "quick_gelu" if pretrained is None else "pretrained"
            got = quick_gelu if pretrained is None else pretrained
            raise InputError(f"{OP}: {given} must be None for a live model; got {got!r}")
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
        if quick_gelu is False:
            raise InputError(f"{OP}: quick_gelu must be None or True for 'tiny'; got False")
        model = _seeded(seed, lambda: build_tiny(config["model_cfg"]))
        if source != "random":
            fill(model, read_tensors(tiny_weights()), tiny_weights())
        pixels = config.get("preprocess_cfg", {})
        mean, std = pixels.get("mean", mean), pixels.get("std", std)
        tokenizer = tokenizer or tiny_tokenizer(model.context_length)
    elif name_or_model.startswith((HUB, LOCAL)):
        name, source = name_or_model, "random" if pretrained == "random" else ""
        if pretrained not in (None, "random"):
            raise InputError(
                f"{OP}: pretrained must be None or 'random' for {name!r}, which has its own "
                f"weights; got {str(pretrained)!r}"
            )
        model, origin, config = _placed(name, source, quick_gelu, seed)
        mean, std = origin.mean or mean, origin.std or std
        tokenizer = tokenizer or _tokenizer_of(name, config)
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
        place = torch.empty(0, device=device, dtype=torch.float32).device
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
            f"{type(model).__name__} with {first_line(error)}"
        ) from error


def known(name: str) -> str:
    """Return open_clip's spelling of a name, or list near ones."""
    import open_clip

    plain = name.replace("/", "-").replace("@336px", "-336")  # OpenAI's spelling
    if plain not in open_clip.list_models():
        known = ["tiny", *open_clip.list_models()]
        hint = near(plain, known)
        if os.path.isdir(name):
            hint = f"; a folder is '{LOCAL}{name}'"
        elif name.count("/") == 1 and hint.startswith("; known"):
            hint = f"; a model of the Hugging Face hub is '{HUB}{name}'"
        raise InputError(f"{OP}: name must be 'tiny' or a model of open_clip; got {name!r}{hint}")
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
        except Exception as error:  # every reader of open_clip has its own
            raise Damaged(
                f"{OP}: weights {path} must fit {plain!r}; got {first_line(error)}"
            ) from error
        return model, facts.get("mean", MEAN), facts.get("std", STD)
    path = Path(source)
    folder = os.path.isdir(path)  # pathlib's own raise of names that no system takes
    if not folder and not os.path.isfile(path):
        looks_like_path = path.suffix != "" or len(path.parts) > 1
        if looks_like_path:
            what = "is there, but is no file" if os.path.exists(path) else "no file"
            raise Missing(f"{OP}: pretrained must be a tag, a file or 'random'; {what} {source!r}")
        raise InputError(
            f"{OP}: pretrained must be a tag of {plain!r}, a file or 'random'; got {source!r}"
            + (near(source, tags) if tags else "; this model has no tags")
        )
    path = weights_in(path) if folder else path
    state = read_tensors(path)
    origin = origin_of(path, plain)
    if of_openai(state):
        origin = replace(origin, quick_gelu=True, said="what OpenAI's archives hold")
    wants, doubt = _activation(plain, config, path, origin, quick_gelu)
    model = _seeded(seed, lambda: build(config, wants))
    fill(model, state, path)
    if doubt:
        warnings.warn(doubt, stacklevel=3)
    return model, origin.mean or mean, origin.std or std


def _activation(
    plain: str, config: dict[str, Any], path: Path, origin: Origin, quick_gelu: bool | None
) -> tuple[bool, str]:
    """Decide whether weights in a file want QuickGELU, and what to warn of where nothing tells."""
    import open_clip

    named = bool(config.get("quick_gelu", False))
    if quick_gelu is not None:
        return quick_gelu, ""
    if origin.quick_gelu is not None:
        if named and not origin.quick_gelu:
            raise InputError(
                f"{OP}: quick_gelu must be given where name and origin disagree; got {plain!r} "
                f"and {path}, of which {origin.said} says GELU"
            )
        return origin.quick_gelu, ""
    tags = open_clip.list_pretrained_tags_by_model(plain)
    quick = [t for t in tags if open_clip.get_pretrained_cfg(plain, t).get("quick_gelu")]
    if named or not quick:
        return named, ""
    return named, (
        f"{OP}: weights {path} do not say their activation and are taken for GELU ones, as the "
        f"name {plain!r} has it; those of {', '.join(quick)} need quick_gelu=True (--quick-gelu "
        "yes), and quick_gelu=False (no) says that these do not"
    )


def _placed(
    name: str, source: str, quick_gelu: bool | None, seed: int
) -> tuple[Any, Origin, dict[str, Any]]:
    """Build and fill a model that a folder or a repository of the hub describes."""
    if name.startswith(HUB):
        origin, path = from_hub(name)
    else:
        folder = Path(name.removeprefix(LOCAL))
        if not os.path.isdir(folder):
            raise Missing(f"{OP}: name must be '{LOCAL}' and a folder; got no folder {folder}")
        found = read_folder(folder)
        if found is None:
            raise Missing(
                f"{OP}: folder {folder} must hold open_clip_config.json, or config.json of "
                "transformers; got neither"
            )
        origin, path = found, folder if source == "random" else weights_in(folder)
    config = checked_config(name, origin.config)
    wants = bool(origin.quick_gelu) if quick_gelu is None else quick_gelu
    try:
        model = _seeded(seed, lambda: build(config, wants))
    except Exception as error:  # whatever open_clip's classes say of a config that is not theirs
        raise Damaged(
            f"{OP}: config {origin.said} must be one that open_clip can build; got "
            f"{first_line(error)}"
        ) from error
    if source != "random":
        fill(model, read_tensors(path), path)
    return model, origin, config


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
            f"{first_line(error)}; with its files in a folder: load_clip({name!r}, tokenizer="
            f'open_clip.tokenizer.HFTokenizer("/path/to/folder", {arguments}))'
        ) from error


def checked_config(name: str, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Refuse by the config what could only be refused after a download."""
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(name) if own is None else own
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
        quick = quick_gelu and not name.endswith("-quickgelu")
        hint = ", quick_gelu=True" if quick else ""
        raise Missing(
            f"{OP}: weights {tag!r} of {name!r} must be at hand or in reach; got "
            f"{first_line(error)}; with a copy on disk: load_clip({name!r}, "
            f'pretrained="/path/to/weights.safetensors"{hint})'
            + (" or --quick-gelu yes" if quick else "")
        ) from error
    return Path(path)
