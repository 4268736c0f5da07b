"""Causal attention of many short sequences behind a shared prefix, one sequence after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["prefix_attention"]


def prefix_attention(
    qkv: Tensor,
    heads: int,
    shared: int,
    starts: Sequence[int],
    bias: Tensor | None,
    sos: Tensor | None,
    last_only: bool,
) -> Tensor:
    """Put SOS, prefix and one segment together, attend causally, keep the segment's rows.

    qkv (G, S + R, 3 W), sos (2, W) or None -> (G, S + R, W), with ``last_only`` (G, C, W); see
    `fastfpl.ops.prefix_attention`.
    """
    queries, keys, values = (qkv if bias is None else qkv + bias).chunk(3, dim=-1)
    before = 0
    if sos is not None:
        before = 1
        keys = torch.cat((sos[0].expand(len(qkv), 1, -1), keys), dim=1)
        values = torch.cat((sos[1].expand(len(qkv), 1, -1), values), dim=1)
    lead = before + shared
    prefix = _causal(queries[:, :shared], keys[:, :lead], values[:, :lead], heads)
    parts = [] if last_only else [prefix]
    for begin, end in itertools.pairwise(starts):
        first = shared + (end - 1 if last_only else begin)
        query = queries[:, first : shared + end]
        key = torch.cat((keys[:, :lead], keys[:, lead + begin : lead + end]), dim=1)
        value = torch.cat((values[:, :lead], values[:, lead + begin : lead + end]), dim=1)
        parts.append(_causal(query, key, value, heads))
    return torch.cat(parts, dim=1)


def _causal(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attend from the last n of m positions: (G, n, W), (G, m, W) -> (G, n, W)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    score = q @ k.mT * q.shape[-1] ** -0.5
    n, m = score.shape[-2:]
    later = torch.ones(n, m, dtype=torch.bool, device=score.device).triu(m - n + 1)
    weight = score.masked_fill(later, float("-inf")).softmax(-1)
    mixed: Tensor = (weight @ v).transpose(1, 2).flatten(-2)
    return mixed
