"""Read a live text tower at every call, so that nothing read from a weight can be stale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastfpl.clip.towers import (
    activation_of,
    check_causal,
    check_plain,
    layer_weights,
    resblock_weights,
)
from fastfpl.dropin.swap import hooked, refuse
from fastfpl.errors import FastfplError
from fastfpl.reference.text import TextTower

__all__ = ["Family", "Layers", "Live", "Resblocks", "own_prompts", "read"]


class Resblocks:
    """Text towers of OpenAI's clip and of open_clip."""

    norms = ("ln_1", "ln_2")
    read = staticmethod(resblock_weights)

    @staticmethod
    def blocks(holder: Any) -> list[Any]:
        """Give the transformer's blocks."""
        return list(holder.transformer.resblocks)

    @staticmethod
    def containers(holder: Any) -> tuple[nn.Module, ...]:
        """Give the modules whose call a pass replaces as a whole."""
        return holder.transformer, holder.transformer.resblocks

    @staticmethod
    def shorten(holder: Any, keep: int) -> None:
        """Keep the first blocks alone."""
        _shorten(holder.transformer.resblocks, keep)

    @staticmethod
    def positional(holder: Any) -> Tensor:
        """Give the position embeddings (L, W)."""
        positional: Tensor = holder.positional_embedding
        return positional

    @staticmethod
    def norm(holder: Any) -> Any:
        """Give the last LayerNorm."""
        return holder.ln_final

    @staticmethod
    def parts(block: Any) -> tuple[Any, ...]:
        """Give what must stay the same object for an inspection to hold."""
        attn, mlp = block.attn, block.mlp
        mask = getattr(block, "attn_mask", None)
        return (
            *(block, block.ln_1, attn, attn.out_proj, block.ln_2, mlp, mlp.c_fc, mlp.gelu),
            *(mlp.c_proj, mask),
        )

    @staticmethod
    def linears(block: Any) -> tuple[Any, ...]:
        """Give a block's linear layers."""
        return block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj

    @staticmethod
    def tensors(block: Any) -> tuple[Tensor | None, ...]:
        """Give the tensors that a pass reads."""
        attn, mlp = block.attn, block.mlp
        modules = (block.ln_1, attn.out_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
        own = (attn.in_proj_weight, attn.in_proj_bias)
        return (*own, *(t for m in modules for t in (m.weight, m.bias)))

    @staticmethod
    def heads(block: Any) -> int:
        """Give the number of attention heads."""
        return int(block.attn.num_heads)

    @staticmethod
    def dropout(block: Any) -> float:
        """Give the attention's dropout as its mode has it."""
        return float(block.attn.dropout) if block.attn.training else 0.0

    @staticmethod
    def activation(block: Any) -> Any:
        """Give the module between the MLP's two linear layers."""
        return block.mlp.gelu

    @staticmethod
    def check(holder: Any, blocks: list[Any]) -> None:
        """Refuse extra parts, and a mask that is in sight and not causal."""
        if hasattr(holder, "attn_mask") or hasattr(blocks[0], "attn_mask"):
            check_causal(holder, blocks)
        if getattr(holder, "cls_emb", None) is not None:
            refuse("its text tower has a class token (CoCa)")
        for i, block in enumerate(blocks):
            check_plain(i, block)


class Layers:
    """Text towers of transformers."""

    norms = ("layer_norm1", "layer_norm2")
    read = staticmethod(layer_weights)

    @staticmethod
    def blocks(holder: Any) -> list[Any]:
        """Give the encoder's layers."""
        return list(holder.encoder.layers)

    @staticmethod
    def containers(holder: Any) -> tuple[nn.Module, ...]:
        """Give the modules whose call a pass replaces as a whole."""
        return holder.encoder, holder.embeddings, holder.embeddings.position_embedding

    @staticmethod
    def shorten(holder: Any, keep: int) -> None:
        """Keep the first layers alone."""
        _shorten(holder.encoder.layers, keep)

    @staticmethod
    def positional(holder: Any) -> Tensor:
        """Give the position embeddings (L, W)."""
        positional: Tensor = holder.embeddings.position_embedding.weight
        return positional

    @staticmethod
    def norm(holder: Any) -> Any:
        """Give the last LayerNorm."""
        return holder.final_layer_norm

    @staticmethod
    def parts(block: Any) -> tuple[Any, ...]:
        """Give what must stay the same object for an inspection to hold."""
        attn, mlp = block.self_attn, block.mlp
        return (
            *(block, block.layer_norm1, attn, block.layer_norm2, mlp, mlp.activation_fn),
            *Layers.linears(block),
        )

    @staticmethod
    def linears(block: Any) -> tuple[Any, ...]:
        """Give a block's linear layers."""
        attn, mlp = block.self_attn, block.mlp
        return attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, mlp.fc1, mlp.fc2

    @staticmethod
    def tensors(block: Any) -> tuple[Tensor | None, ...]:
        """Give the tensors that a pass reads."""
        modules = (block.layer_norm1, block.layer_norm2, *Layers.linears(block))
        return tuple(t for m in modules for t in (m.weight, m.bias))

    @staticmethod
    def heads(block: Any) -> int:
        """Give the number of attention heads."""
        return int(block.self_attn.num_heads)

    @staticmethod
    def dropout(block: Any) -> float:
        """Give the attention's dropout as its mode has it."""
        return float(block.self_attn.dropout) if block.self_attn.training else 0.0

    @staticmethod
    def activation(block: Any) -> Any:
        """Give the module between the MLP's two linear layers."""
        return block.mlp.activation_fn

    @staticmethod
    def check(holder: Any, blocks: list[Any]) -> None:
        """Nothing is in sight here: the mask is made in ``forward``, the proof compares results."""


Family = type[Resblocks] | type[Layers]


class Live(NamedTuple):
    """A tower as it is now.

    Attributes
    ----------
    tower : TextTower
    own : tuple of Tensor, shapes (T, W)
        Deep prompts that blocks keep themselves, from the second block on; live parameters.
    """

    tower: TextTower
    own: tuple[Tensor, ...]


def own_prompts(blocks: list[Any], width: int) -> tuple[Tensor, ...]:
    """Give the parameters that blocks hold beside their layers, if they can be deep prompts.

    CLIP's blocks hold none: one of (T, W) in each from the second on, up to some depth, is what
    VPT puts in place of the context's states. Whether it is, a trial tells.
    """
    found: list[tuple[str, Tensor]] = []
    for i, block in enumerate(blocks):
        # a replica of DataParallel has its parameters as attributes
        names = block.__dict__.get("_former_parameters") or block._parameters
        own = [(name, t) for name in names if (t := getattr(block, name, None)) is not None]
        if not own:
            continue
        name, prompt = own[0]
        flat = prompt[0] if prompt.dim() == 3 and len(prompt) == 1 else prompt
        like = found[0][1] if found else flat
        fits = len(own) == 1 and len(found) == i - 1 and flat.shape == like.shape
        if not fits or flat.dim() != 2 or flat.shape[1] != width or flat.dtype != like.dtype:
            refuse(f"its text blocks have a parameter {own[-1][0]} that CLIP's have not")
        found.append((name, flat))
    return tuple(prompt for _, prompt in found)


def read(family: Family, holder: Any, memory: dict[Any, Any], around: Iterable[Any]) -> Live:
    """Return the tower as it is now; `Instead` says why this call cannot be taken.

    Structure is inspected once and compared by identity afterwards; weights are read at every call,
    as aliases of the owner's storage (transformers' query, key and value weights are fused, thus
    copied, at every call). ``around`` are modules outside the transformer that a pass replaces.
    """
    blocks = family.blocks(holder)
    norm = family.norm(holder)
    mask = getattr(holder, "attn_mask", None)
    try:
        parts = (*(p for b in blocks for p in family.parts(b)), norm, mask)
    except AttributeError as error:
        refuse(f"its text blocks are not CLIP's: {error}")
    masks = tuple(p._version for p in parts if isinstance(p, Tensor) and not p.is_inference())
    seen = memory.get("tower")
    if seen is None or seen[1] != masks or not _same(seen[0], parts):
        seen = (parts, masks, *_inspect(family, holder, blocks, norm))
        memory["tower"] = seen
    _, _, facts, modules = seen
    for module in (*modules, *family.containers(holder), *around):
        if "forward" in module.__dict__:
            refuse("a forward inside the text tower was replaced")
        if hooked(module):
            refuse("a module inside the text tower has a hook, which must fire")
    if _has_any_global_hook():
        refuse("there is a hook on all modules, which must fire")
    if any(family.dropout(b) for b in blocks):
        refuse("the text tower is in training mode with attention dropout")
    positional = family.positional(holder)
    own = own_prompts(blocks, positional.shape[1])
    tensors = [t for b in blocks for t in family.tensors(b) if t is not None]
    tensors += [t for t in (positional, norm.weight, norm.bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        refuse("the text tower's own weights require a gradient")
    with torch.no_grad():
        read = tuple(family.read(b) for b in blocks)
        ln_w = norm.weight.detach()
        ln_b = torch.zeros_like(ln_w) if norm.bias is None else norm.bias.detach()
        kinds = {w.dtype for b in read for w in (b.qkv_w, b.out_w, b.fc_w, b.proj_w)}
        if len(kinds) != 1 or len({t.device for t in tensors}) != 1:
            refuse("the text tower's weights are not of one dtype on one device")
        like = read[0].qkv_w
        width = positional.shape[1]
        tower = TextTower(
            token_embedding=like.new_empty(0, width),
            positional=positional.detach(),
            blocks=read,
            ln_w=ln_w,
            ln_b=ln_b,
            projection=like.new_empty(width, 0),
            projection_b=None,
            sos=0,
            eot=0,
            **facts,
        )
    return Live(tower, own)


def _shorten(blocks: nn.Module, keep: int) -> None:
    for name in list(blocks._modules)[keep:]:
        del blocks._modules[name]


def _same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _inspect(
    family: Family, holder: Any, blocks: list[Any], norm: Any
) -> tuple[dict[str, Any], list[nn.Module]]:
    """Check that the tower is the plain one; its facts, and the modules that a pass replaces."""
    if not blocks:
        refuse("its text tower has no layer")
    try:
        family.check(holder, blocks)
        found: dict[str, set[Any]] = {
            "heads": {family.heads(b) for b in blocks},
            "activation": {activation_of(family.activation(b)) for b in blocks},
            "eps": {n.eps for b in blocks for n in (getattr(b, x) for x in family.norms)}
            | {norm.eps},
        }
        for block in blocks:
            family.read(block)
    except FastfplError as error:
        rule = str(error).partition(": model must ")[2] or str(error)
        refuse(f"it would have to {rule}")
    for what, values in found.items():
        if len(values) != 1:
            refuse(f"its layers differ in {what}")
    for block in blocks:
        for layer in family.linears(block):
            # a subclass passes for a linear layer; its own part (an adapter) would be lost
            plain = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
            if type(layer) is not nn.Linear and not plain:
                refuse(f"its text tower has a {type(layer).__name__} in place of a linear layer")
        # its own parameters are `own_prompts`' to judge
        own = {id(t) for t in (*family.tensors(block), *block._parameters.values())}
        extra = [name for name, p in block.named_parameters() if id(p) not in own]
        if extra:
            refuse(f"its text blocks have a parameter {extra[0]} that CLIP's have not")
    modules = [m for b in blocks for m in b.modules()] + [norm]
    return {name: values.pop() for name, values in found.items()}, modules
