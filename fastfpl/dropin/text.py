"""What recognised text encoders share: how their parts are told, and the packed pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastfpl.dropin.proof import Through
from fastfpl.dropin.sharing import Sharing
from fastfpl.dropin.swap import refuse
from fastfpl.ops.embedded import encode_embedded
from fastfpl.ops.memory import current_limit
from fastfpl.reference.text import TextTower

__all__ = [
    "check_dtypes",
    "check_mask",
    "check_plain",
    "deep_of",
    "example_ends",
    "has_tower",
    "project",
    "states_of",
    "takes",
]


def takes(method: Any) -> list[inspect.Parameter]:
    """Return the parameters that a call by position has to give, self left out."""
    try:
        parameters = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in positional and p.default is p.empty]


def has_tower(module: Any) -> bool:
    """Tell whether a module has the parts of a text tower over residual blocks."""
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    positional = getattr(module, "positional_embedding", None)
    return (
        isinstance(blocks, nn.Module)
        and isinstance(positional, Tensor)
        and isinstance(getattr(module, "ln_final", None), nn.Module)
        and hasattr(module, "text_projection")
    )


def check_mask(module: Any) -> None:
    """Refuse a text tower that says itself that it is bidirectional."""
    if hasattr(module, "attn_mask") and module.attn_mask is None:
        refuse(
            "its text tower is bidirectional (it has no attention mask), so that neither a shared "
            "prefix nor a cut is exact"
        )


def check_plain(tensor: Tensor, weight: Tensor) -> None:
    """Refuse what only the original code can take."""
    if type(tensor) not in (Tensor, nn.Parameter):
        refuse(f"the input is a {type(tensor).__name__}")
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        refuse("a CUDA graph is being captured, which cannot look at values")
    if current_limit() is not None:
        refuse("a memory limit is set, which this pass does not keep")
    if tensor.device != weight.device:
        refuse(f"the input is on {tensor.device} and the text tower on {weight.device}")


def check_dtypes(x: Tensor, weight: Tensor) -> None:
    """Refuse embeddings of another dtype than the weights, but for autocast."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        refuse(f"the embeddings are {x.dtype} and the text tower {weight.dtype}")


def deep_of(deep: Any, live: TextTower, prompts: Tensor, through: Through) -> Tensor | None:
    """Give deep prompts as one tensor (K, T, W) on their way into the pass; None where none is.

    Those that no layer would ask for are left out.
    """
    deep = (deep if isinstance(deep, Tensor) else tuple(deep))[: len(live.blocks) - 1]
    if not len(deep):
        return None
    whole: Tensor = deep if isinstance(deep, Tensor) else torch.stack(deep)
    if whole.device != prompts.device:
        refuse(f"the deep prompts are on {whole.device} and the prompts on {prompts.device}")
    if whole.shape[1] >= prompts.shape[1]:
        refuse("the deep prompts do not fit behind the first token")
    return whole if through is None else whole.to(through).to(whole.dtype)


def states_of(
    live: TextTower,
    prompts: Tensor,
    ends: list[int],
    sharing: Sharing,
    deep: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Encode (R, L, W) with EOTs at ``ends`` into states (R, W); say how.

    Deep prompts (K, T, W) take the place of the states behind the first token.
    """
    if deep is not None and max(ends) < deep.shape[1]:
        refuse("the prompts end among the deep prompts")
    shared = min(sharing.shared, *ends)
    prompts = sharing.grouped(prompts[:, : max(ends) + 1])
    eot = sharing.grouped(torch.tensor(ends))
    if bool((eot == eot[:1]).all()):
        states = encode_embedded(live, prompts, eot[0], shared=shared, deep=deep)
    else:
        parts = zip(prompts, eot, strict=True)
        states = torch.stack(
            [encode_embedded(live, x, e, shared=shared, deep=deep) for x, e in parts]
        )
    how = f"fast, cut behind the EOT, {shared} leading rows shared"
    if deep is not None:
        how += f", prompts replaced before {len(deep)} layers"
    return sharing.ungrouped(states), how


def project(holder: Any, states: Tensor) -> Tensor:
    """Project pooled states by a module or a matrix, where there is one."""
    projection = holder.text_projection
    if projection is None:
        return states
    module = isinstance(projection, nn.Module)
    features: Tensor = projection(states) if module else states @ projection
    return features


def example_ends(length: int, count: int) -> list[int]:
    """Say where texts of an example end: at three different places, in turn."""
    places = (max(2, length // 3), max(2, length - 3), max(2, length // 2))
    return [min(length - 1, places[i % 3]) for i in range(count)]
