"""A text tower of CLIP, literally: every class at full length, one context after another."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfpl.handles import Handled

__all__ = [
    "Block",
    "PromptLayout",
    "TextTower",
    "activate",
    "block_norm",
    "encode_text",
    "encode_together",
    "pooled_rows",
    "unit_length",
]


@dataclass(frozen=True)
class Block:
    """Frozen weights of one pre-norm transformer block, laid out as ``torch.nn.Linear`` has them.

    Attributes
    ----------
    ln_1_w, ln_1_b, ln_2_w, ln_2_b : Tensor, shape (W,), float32 (float64 in a float64 tower)
    qkv_w : Tensor, shape (3 W, W)
        Rows of the query, key and value projections, in this order.
    qkv_b : Tensor, shape (3 W,)
    out_w, out_b : Tensor, shapes (W, W) and (W,)
    fc_w, fc_b : Tensor, shapes (M, W) and (M,)
        First linear layer of the MLP.
    proj_w, proj_b : Tensor, shapes (W, M) and (W,)
        Second linear layer of the MLP.
    """

    ln_1_w: Tensor
    ln_1_b: Tensor
    qkv_w: Tensor
    qkv_b: Tensor
    out_w: Tensor
    out_b: Tensor
    ln_2_w: Tensor
    ln_2_b: Tensor
    fc_w: Tensor
    fc_b: Tensor
    proj_w: Tensor
    proj_b: Tensor


@dataclass(frozen=True, eq=False)
class TextTower(Handled):
    """Frozen weights of a CLIP text transformer, whatever family they came from.

    Attributes
    ----------
    token_embedding : Tensor, shape (V, W)
    positional : Tensor, shape (L, W)
    blocks : tuple of Block
    ln_w, ln_b : Tensor, shape (W,), float32 (float64 in a float64 tower)
        The final LayerNorm.
    projection : Tensor, shape (W, D)
    projection_b : Tensor, shape (D,), or None
    heads : int
    activation : "quick_gelu", "gelu" or "gelu_tanh"
    eps : float
        Of every LayerNorm.
    sos : int or None
        Token id that begins a prompt; None where nothing stands in front of the text (SigLIP).
    eot : int
        Token id that ends a prompt.
    pad : int
        Token id behind the EOT, up to L tokens. It decides nothing unless the tower is ``whole``.
    causal : bool
        Whether a token attends to itself and what stands before it, or to all L tokens.
    pooling : "eot" or "last"
        Whose state becomes the feature: the EOT's, or that of the last of the L tokens.

    Notes
    -----
    LayerNorm's parameters stay in float32 when the tower computes in 16 bits, as CLIP has it.
    """

    token_embedding: Tensor
    positional: Tensor
    blocks: tuple[Block, ...]
    ln_w: Tensor
    ln_b: Tensor
    projection: Tensor
    projection_b: Tensor | None
    heads: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"]
    eps: float
    sos: int | None
    eot: int
    pad: int = 0
    causal: bool = True
    pooling: Literal["eot", "last"] = "eot"

    @property
    def begin(self) -> int:
        """Tokens in front of the text: 1 with SOS, 0 without."""
        return 0 if self.sos is None else 1

    @property
    def whole(self) -> bool:
        """Whether features depend on all L tokens, pads included: then nothing can be cut."""
        return not self.causal or self.pooling == "last"

    @property
    def width(self) -> int:
        """Text width W."""
        return self.positional.shape[1]

    @property
    def context_length(self) -> int:
        """Tokens L of a full prompt."""
        return self.positional.shape[0]

    @property
    def dim(self) -> int:
        """Joint width D."""
        return self.projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.projection.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projection.device

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextTower:
        """Return the tower on a device in a dtype; storage is shared where nothing changes."""
        norm = torch.promote_types(dtype, torch.float32)

        def move(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=norm if name.startswith("ln_") else dtype)

        blocks = tuple(
            Block(**{f.name: move(f.name, getattr(b, f.name)) for f in fields(b)})
            for b in self.blocks
        )
        loose = {
            f.name: move(f.name, value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, blocks=blocks, **loose)  # type: ignore[arg-type]  # by field name


@dataclass(frozen=True, eq=False)
class PromptLayout(Handled):
    """Where the tokens of every class prompt stand for one number of context tokens.

    Attributes
    ----------
    tokens : Tensor, shape (C, L), int64
        Ids of all tokens; 0 where a context vector stands, the tower's pad behind the EOT.
    slots : Tensor, shape (C, T), int64
        Position of each context vector.
    eot : Tensor, shape (C,), int64
        Position of the EOT token.
    shared : int
        How many leading positions (SOS and context vectors) are the same for every class as long
        as the classes share a context.
    begin : int
        How many of them hold no context vector: 1 with SOS, 0 without.
    """

    tokens: Tensor
    slots: Tensor
    eot: Tensor
    shared: int
    begin: int = 1


def block_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm in float32 or wider, returned in the dtype of ``x``."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """QuickGELU ``x * sigmoid(1.702 x)`` (the original CLIP), GELU or its tanh form."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def unit_length(x: Tensor) -> Tensor:
    """Divide by the Euclidean norm over the last axis, computed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit: Tensor = wide / wide.norm(dim=-1, keepdim=True)
    return unit.to(x.dtype)


def pooled_rows(tower: TextTower, layout: PromptLayout) -> Tensor:
    """Give the position whose state becomes the feature of each class: (C,)."""
    if tower.pooling == "eot":
        return layout.eot
    return torch.full_like(layout.eot, tower.context_length - 1)


def embed_prompts(tower: TextTower, layout: PromptLayout, ctx: Tensor) -> Tensor:
    """Embed full-length prompts: ctx (T, W) or class-specific (C, T, W) -> (C, L, W)."""
    classes = layout.tokens.shape[0]
    x = tower.token_embedding[layout.tokens].to(tower.dtype)
    rows = torch.arange(classes, device=x.device)[:, None]
    x = x.index_put((rows, layout.slots), ctx.to(tower.dtype).expand(classes, -1, -1))
    return x + tower.positional.to(tower.dtype)


def encode_text(
    tower: TextTower,
    layout: PromptLayout,
    ctx: Tensor,
    class_specific: bool,
    deep: Tensor | None = None,
) -> Tensor:
    """Encode contexts (..., T, W) or (..., C, T, W) one by one at full length -> (..., C, D).

    With ``deep`` (..., K, T, W) or (..., C, K, T, W) the states in the slots are replaced before
    the layers 1 to K, as in Khattak et al. 2023 (arXiv 2210.03117), section 3.2.
    """
    inner = 3 if class_specific else 2
    lead = ctx.shape[: ctx.dim() - inner]
    flat = ctx.reshape(math.prod(lead), *ctx.shape[ctx.dim() - inner :])
    classes = layout.tokens.shape[0]
    if flat.shape[0] == 0:
        return ctx.new_zeros((*lead, classes, tower.dim), dtype=tower.dtype)
    if deep is None:
        deep = ctx.new_zeros(*ctx.shape[:-2], 0, *ctx.shape[-2:])
    deeps = deep.reshape(len(flat), *deep.shape[len(lead) :])
    encoded = [_encode_one(tower, layout, *one) for one in zip(flat, deeps, strict=True)]
    return torch.stack(encoded).reshape(*lead, classes, tower.dim)


def encode_together(tower: TextTower, layout: PromptLayout, ctx: Tensor) -> Tensor:
    """Encode class-specific contexts (B, C, T, W) in one pass of B C prompts -> (B, C, D)."""
    tokens = tower.token_embedding[layout.tokens].to(tower.dtype)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    # any number of contexts in one pass: what is the same in all of them is written B times
    x = tokens.expand(ctx.shape[0], *tokens.shape).transpose(0, 1)
    places = ctx.to(tower.dtype).permute(1, 2, 0, 3)
    x = x.transpose(1, 2).index_put((rows, layout.slots), places).transpose(1, 2)
    x = (x + tower.positional.to(tower.dtype)).transpose(0, 1)
    count = layout.tokens.shape[0]
    flat = x.reshape(-1, *x.shape[2:])
    eot = pooled_rows(tower, layout).repeat(ctx.shape[0])
    features: Tensor = _transformed(tower, flat, eot).unflatten(0, (ctx.shape[0], count))
    return features


def _encode_one(tower: TextTower, layout: PromptLayout, ctx: Tensor, deep: Tensor) -> Tensor:
    x, eot = embed_prompts(tower, layout, ctx), pooled_rows(tower, layout)
    return _transformed(tower, x, eot, layout.slots, deep)


def _transformed(
    tower: TextTower,
    x: Tensor,
    pooled_at: Tensor,
    slots: Tensor | None = None,
    deep: Tensor | None = None,
) -> Tensor:
    """Pass embedded prompts (count, L, W) through the tower; the feature is that of one token.

    Deep prompts (..., K, T, W) take the place of the states in ``slots`` (count, T).
    """
    count, length, width = x.shape
    rows = torch.arange(count, device=x.device)[:, None]
    for depth, block in enumerate(tower.blocks):
        if slots is not None and deep is not None and 1 <= depth <= deep.shape[-3]:
            # without positions: the layer's own prompts take the place of what was made of the last
            own = deep[..., depth - 1, :, :].to(x.dtype).expand(count, -1, -1)
            x = x.index_put((rows, slots), own)
        h = block_norm(x, block.ln_1_w, block.ln_1_b, tower.eps)
        qkv = F.linear(h, block.qkv_w, block.qkv_b)
        q, k, v = (
            part.view(count, length, tower.heads, -1).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tower.causal)
        x = x + F.linear(
            mixed.transpose(1, 2).reshape(count, length, width), block.out_w, block.out_b
        )
        h = block_norm(x, block.ln_2_w, block.ln_2_b, tower.eps)
        h = activate(F.linear(h, block.fc_w, block.fc_b), tower.activation)
        x = x + F.linear(h, block.proj_w, block.proj_b)
    x = block_norm(x, tower.ln_w, tower.ln_b, tower.eps)
    pooled = x[torch.arange(count, device=x.device), pooled_at]
    features = pooled @ tower.projection
    if tower.projection_b is not None:
        features = features + tower.projection_b
    return unit_length(features)
