"""The text tower on prompts that are already embedded, literally: every token of every prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfpl.reference.text import TextTower, activate, block_norm

__all__ = ["encode_embedded"]


def encode_embedded(
    tower: TextTower,
    prompts: Tensor,
    eot: Tensor,
    shared: int,
    deep: Tensor | None = None,
    first: int = 1,
) -> Tensor:
    """Run (..., C, L, W) at full length and pick the EOT states after the last norm: (..., C, W).

    The first ``shared`` rows of every class are those of the first class. With ``deep``
    (..., K, T, W) the T states from ``first`` on are replaced before the layers 1 to K.
    """
    *lead, classes, length, width = prompts.shape
    leading = prompts[..., :1, :shared, :].expand(*prompts.shape[:-2], shared, width)
    x = torch.cat((leading, prompts[..., shared:, :]), dim=-2).reshape(-1, length, width)
    x = x + tower.positional[:length].to(x.dtype)
    for depth, block in enumerate(tower.blocks):
        if deep is not None and 1 <= depth <= deep.shape[-3]:
            own = deep[..., None, depth - 1, :, :].to(x.dtype)
            own = own.expand(*lead, classes, -1, -1).reshape(len(x), -1, width)
            x = torch.cat((x[:, :first], own, x[:, first + own.shape[1] :]), dim=1)
        h = block_norm(x, block.ln_1_w, block.ln_1_b, tower.eps)
        qkv = F.linear(h, block.qkv_w, block.qkv_b)
        q, k, v = (
            part.unflatten(-1, (tower.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), block.out_w, block.out_b)
        h = block_norm(x, block.ln_2_w, block.ln_2_b, tower.eps)
        h = activate(F.linear(h, block.fc_w, block.fc_b), tower.activation)
        x = x + F.linear(h, block.proj_w, block.proj_b)
    x = block_norm(x, tower.ln_w, tower.ln_b, tower.eps).reshape(*lead, classes, length, width)
    return x[..., torch.arange(classes, device=x.device), eot.to(x.device), :]
