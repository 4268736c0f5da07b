"""The text pass over many contexts and classes.

A causal tower computes the shared prefix once and the ragged suffixes packed; a tower whose tokens
see the whole prompt runs at full length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastfpl.errors import InputError, KindError
from fastfpl.handles import held
from fastfpl.ops import launch, native
from fastfpl.ops import tower as engine
from fastfpl.ops.attention import against_cpu, against_size, against_wide, for_transforms
from fastfpl.ops.faces import BY_HAND, Face, choose, face_or_any, forced, in_transform
from fastfpl.ops.functional import (
    Recipe,
    check_graph,
    in_front,
    outside_transforms,
    spread,
    transformed_call,
)
from fastfpl.ops.lifetime import keep
from fastfpl.ops.memory import current_limit, memory_limit
from fastfpl.ops.operators import define
from fastfpl.ops.precision import autocast_dtype, autocast_to
from fastfpl.reference import text as reference
from fastfpl.reference.text import (
    PromptLayout,
    TextTower,
    activate,
    block_norm,
    pooled_rows,
    unit_length,
)
from fastfpl.shapes import check_shapes

__all__ = [
    "FACES",
    "PromptLayout",
    "Replace",
    "TextTower",
    "broadcast_deep",
    "encode_text",
    "packed_tokens",
    "reasons_against",
]


def encode_text(
    tower: TextTower,
    layout: PromptLayout,
    ctx: Tensor,
    *,
    class_specific: bool = False,
    deep: Tensor | None = None,
) -> Tensor:
    r"""Encode the prompts of C classes under many contexts into unit-length text features.

    A prompt is SOS, context, class name, ending and EOT (the layout says in which order). In a
    causal tower the leading tokens that all classes share have the same states for every class in
    every layer: they are computed once per context, and what follows an EOT is never computed. In
    a tower that is not causal, or pools at the last token, every token of the full length decides
    the feature, pads included: the ``torch`` face runs all of them, and spares only what no
    feature needs of the last layer.

    Parameters
    ----------
    tower : TextTower
        Frozen weights.
    layout : PromptLayout
        Positions of the T context vectors and of the fixed tokens, C classes.
    ctx : Tensor, shape (..., T, W), or (..., C, T, W) if class_specific, floating point
        Any leading dimensions (clients, experts). Cast to the tower's dtype where it is used.
    class_specific : bool
        Every class has its own context; then only the SOS token is shared.
    deep : Tensor, shape (..., K, T, W), floating point, or None
        Deep prompts: before layer i of 1 to K (the first is 0) the states in the T slots are
        replaced by ``deep[..., i - 1, :, :]``, without positions. Everything before K T W
        broadcasts to what ctx has before T W: (..., C, K, T, W) where classes differ. K is less
        than the tower's layers and may be 0.

    Returns
    -------
    Tensor, shape (..., C, D), dtype of the tower
        Unit length over D. Under autocast in its dtype, unless the tower's projection has a bias.

    Raises
    ------
    InputError
        If ctx or deep does not have the layout's T and the tower's W, deep has too many layers or
        does not broadcast to ctx, or one class does not fit into the memory limit.
    KindError
        If ctx or deep is not floating point or not on the tower's device.

    Notes
    -----
    Differentiable in: ctx and deep, once on the compiled faces, under ``torch.func`` and
    ``torch.compile`` too; forward mode, and ``torch.func.grad`` of a gradient, take the torch face.
    There the backward pass computes the call once more. Deterministic: yes. LayerNorm and
    normalisation in float32 (float64 for float64). Under autocast matrix products and attention run
    in its dtype and the residual stream in the tower's; the compiled faces keep the rounded
    weights. Equal to the full-length pass up to rounding.
    The compiled faces compute nothing that no context reaches: SOS, the first layer's keys and
    values of names, all but the EOT rows in the last layer.
    Memory: activations of (prefix + suffix) tokens per context when a gradient is wanted, of C·L
    in a tower that is run whole. Inside
    `fastfpl.ops.memory.memory_limit` they stay below it: the call is cut into parts of contexts and
    classes, and what does not fit is computed again in the backward pass (gradient caching).
    Source: shared-prefix identity of causal attention; prompts as in Zhou et al. 2022
    (arXiv 2109.01134), section 3.2; deep prompts as in Jia et al. 2022 (VPT, arXiv 2203.12119),
    section 3.2, for text Khattak et al. 2023 (MaPLe, arXiv 2210.03117), section 3.2. They stand
    where the context does: what is shared and what is packed stays so.
    """
    op = "fastfpl.ops.encode_text"
    if torch.compiler.is_compiling():
        check_graph("encode_text")
        name = forced("encode_text") or ""
        return _operator(*_packed(tower, layout, ctx, class_specific, deep, name))[0]
    classes, slots = layout.slots.shape
    known = {"C": classes, "T": slots, "W": tower.width}
    check_shapes(op, known, ctx=(ctx, "... C T W" if class_specific else "... T W"))
    if not ctx.is_floating_point():
        raise KindError(f"{op}: ctx must be floating point; got {ctx.dtype}")
    if ctx.device != tower.device:
        raise KindError(f"{op}: ctx must be on the tower's device {tower.device}; got {ctx.device}")
    if deep is not None:
        deep = broadcast_deep(op, tower, deep, ctx.shape[:-2], slots, "ctx")
    arguments = (tower, layout, ctx, class_specific, deep)
    face = choose("encode_text", FACES["encode_text"], *arguments)
    if in_transform() and face.name in BY_HAND:
        tensors, *statics = _packed(tower, layout, ctx, class_specific, deep, face.name)
        return transformed_call(_RECIPE, tensors, *statics)[0]
    # without context vectors nothing moves: the empty gradient of nothing is attached below
    given = ctx.resolve_neg() if slots else ctx.detach()
    below = deep.resolve_neg() if slots and deep is not None and deep.shape[-3] else None
    with for_transforms(ctx, deep):
        features: Tensor = face.run(tower, layout, given, class_specific, below)
    if not slots:
        nothing = ctx.sum(dim=(-2, -1), dtype=features.dtype)
        if deep is not None:
            nothing = nothing + deep.sum(dim=(-3, -2, -1), dtype=features.dtype)
        features = features + (nothing[..., None] if class_specific else nothing[..., None, None])
    if not features.numel() and tower.projection_b is None:
        return features.to(_dtype(tower))  # no product has told
    return features


# --- torch.compile and torch.func -----------------------------------------------------------------


def _packed(
    tower: TextTower,
    layout: PromptLayout,
    ctx: Tensor,
    class_specific: bool,
    deep: Tensor | None,
    name: str,
) -> tuple[Any, ...]:
    """Arrange the arguments as an operator takes them: tensors, and what is none."""
    tensors = [ctx] if deep is None else [ctx, deep]
    handles = tower.handle, layout.handle
    return tensors, *handles, class_specific, _dtype(tower), current_limit() or 0, name


def _called(
    tensors: list[Tensor],
    tower: str,
    layout: str,
    class_specific: bool,
    dtype: torch.dtype,
    limit: int,
    name: str,
) -> list[Tensor]:
    weights, places = held(tower, TextTower), held(layout, PromptLayout)
    deep = tensors[1] if len(tensors) > 1 else None
    with (
        face_or_any(name, "encode_text"),
        memory_limit(limit or None),
        autocast_to(weights.device, dtype, weights.dtype),
    ):
        return [encode_text(weights, places, tensors[0], class_specific=class_specific, deep=deep)]


def _shaped(
    tensors: list[Tensor],
    tower: str,
    layout: str,
    class_specific: bool,
    dtype: torch.dtype,
    limit: int,
    name: str,
) -> list[Tensor]:
    weights, places = held(tower, TextTower), held(layout, PromptLayout)
    lead = tensors[0].shape[: -3 if class_specific else -2]
    if weights.projection_b is not None:
        dtype = torch.promote_types(dtype, weights.projection_b.dtype)
    return [tensors[0].new_empty(*lead, len(places.eot), weights.dim, dtype=dtype)]


def _batched(
    size: int, tensors: list[Tensor], dims: list[int | None], *statics: Any
) -> list[Tensor] | None:
    ctx, *deep = (in_front(size, x, d) for x, d in zip(tensors, dims, strict=True))
    # what has fewer leading dimensions keeps the last ones: the batch stands before all
    missing = ctx.dim() + 1 - deep[0].dim() if deep else 0
    return [ctx, *(spread(x, missing) for x in deep)]


_RECIPE = Recipe(
    name="encode_text",
    schema="str tower, str layout, bool class_specific, ScalarType dtype, int limit, str face",
    run=_called,
    fake=_shaped,
    batched=_batched,
    instead=engine.INSTEAD,
)
_operator = define(_RECIPE)


def broadcast_deep(
    op: str, tower: TextTower, deep: Tensor, lead: Sequence[int], slots: int | None, like: str
) -> Tensor:
    """Check deep prompts and return them with all leading dimensions: (*lead, K, T, W).

    Parameters
    ----------
    op : str
        Who asks; begins the errors.
    lead : sequence of int
        Leading dimensions, C among them where classes differ.
    slots : int or None
        T; any if None.
    like : str
        Whose leading dimensions they are, for the error.
    """
    if not isinstance(deep, Tensor) or not deep.is_floating_point():
        got = deep.dtype if isinstance(deep, Tensor) else type(deep).__name__
        raise KindError(f"{op}: deep must be a floating point tensor; got {got}")
    if deep.device != tower.device:
        raise KindError(
            f"{op}: deep must be on the tower's device {tower.device}; got {deep.device}"
        )
    known = {"W": tower.width} if slots is None else {"T": slots, "W": tower.width}
    sizes = check_shapes(op, known, deep=(deep, "... K T W"))
    layers, slots = sizes["K"], sizes["T"]
    most = len(tower.blocks) - 1
    if layers > most:
        raise InputError(
            f"{op}: deep must replace prompts before at most {most} layers, all but the first of "
            f"this tower; got {layers}"
        )
    try:
        return deep.expand(*lead, layers, slots, tower.width)
    except RuntimeError:
        raise InputError(
            f"{op}: deep must broadcast to the leading dimensions {tuple(lead)} of {like}; got "
            f"{tuple(deep.shape[:-3])} before K, T, W"
        ) from None


@dataclass(frozen=True)
class _Packing:
    """All suffix tokens of all classes laid into bins of equal length.

    A bin holds whole classes; inside it a token attends to the shared prefix and, causally, to
    its own class. Bins are the batch of the attention, so no gather is needed between layers.
    """

    shared: int
    bins: int
    span: int  # rows of one bin
    tokens: Tensor  # (R,) ids, 0 in rows without a fixed token
    positions: Tensor  # (R,)
    ctx_rows: Tensor  # (K,) rows that hold a context vector
    ctx_class: Tensor  # (K,)
    ctx_slot: Tensor  # (K,)
    eot_rows: Tensor  # (C,)
    mask: Tensor  # (bins, 1, span, shared + span), True where attention is allowed


_packings: WeakKeyDictionary[PromptLayout, dict[bool, _Packing]] = WeakKeyDictionary()


def packed_tokens(layout: PromptLayout, *, class_specific: bool = False) -> int:
    """Count the tokens that the packed pass computes for one context, filling included."""
    packing = _packing(layout, class_specific)
    return packing.shared + packing.bins * packing.span


def _packing(layout: PromptLayout, class_specific: bool) -> _Packing:
    cached = _packings.setdefault(layout, {})
    if class_specific not in cached:
        with outside_transforms():
            shared = layout.begin if class_specific else layout.shared
            cached[class_specific] = _pack(layout, shared)
    packing: _Packing = keep(cached[class_specific])
    return packing


def _pack(layout: PromptLayout, shared: int) -> _Packing:
    ends = layout.eot.tolist()
    lengths = [end + 1 - shared for end in ends]
    longest = max(lengths)
    # a bin of about 64 rows keeps the masked-out part of the attention near 2 % of the GEMMs
    spans = {longest, *range(longest, max(longest, 97))}
    packed = [(_fill(lengths, span), span) for span in spans]
    bins, span = min(packed, key=lambda b: (len(b[0]) * b[1] * (6144 + 2 * (shared + b[1])), b[1]))

    device = layout.tokens.device
    tokens, slots = layout.tokens.cpu(), layout.slots.cpu()
    rows = len(bins) * span
    owner = torch.full((rows,), -1)
    positions = torch.zeros(rows, dtype=torch.int64)
    eot_rows = torch.zeros(len(ends), dtype=torch.int64)
    for b, members in enumerate(bins):
        row = b * span
        for c in members:
            owner[row : row + lengths[c]] = c
            positions[row : row + lengths[c]] = torch.arange(shared, ends[c] + 1)
            row += lengths[c]
            eot_rows[c] = row - 1
    filled = owner >= 0
    ids = torch.where(filled, tokens[owner.clamp(min=0), positions], 0)
    # which context vector stands in a row: compare the row's position with its class' slots
    hit = (slots[owner.clamp(min=0)] == positions[:, None]) & filled[:, None]
    ctx_rows, ctx_slot = hit.nonzero(as_tuple=True)

    own = owner.view(-1, span)
    at = positions.view(-1, span)
    same = (own[:, :, None] == own[:, None, :]) & (at[:, :, None] >= at[:, None, :])
    prefix = torch.ones(len(bins), span, shared, dtype=torch.bool)
    mask = torch.cat((prefix, same), dim=-1)[:, None]
    return _Packing(
        shared=shared,
        bins=len(bins),
        span=span,
        tokens=ids.to(device),
        positions=positions.to(device),
        ctx_rows=ctx_rows.to(device),
        ctx_class=owner[ctx_rows].to(device),
        ctx_slot=ctx_slot.to(device),
        eot_rows=eot_rows.to(device),
        mask=mask.to(device),
    )


def _fill(lengths: list[int], span: int) -> list[list[int]]:
    """Lay classes into bins of ``span`` rows, always the longest that still fits."""
    waiting: dict[int, list[int]] = {}
    for c in reversed(range(len(lengths))):
        waiting.setdefault(lengths[c], []).append(c)
    sizes = sorted(waiting, reverse=True)
    bins: list[list[int]] = []
    left = len(lengths)
    while left:
        room, members = span, []
        for size in sizes:
            while waiting[size] and size <= room:
                members.append(waiting[size].pop())
                room -= size
        left -= len(members)
        bins.append(members)
    return bins


def _encode_parts(
    tower: TextTower,
    layout: PromptLayout,
    ctx: Tensor,
    class_specific: bool,
    deep: Tensor | None = None,
) -> Tensor:
    inner = 3 if class_specific else 2
    lead = ctx.shape[: ctx.dim() - inner]
    flat = ctx.reshape(math.prod(lead), *ctx.shape[ctx.dim() - inner :]).to(tower.dtype)
    below = None if deep is None else engine.by_layer(deep, len(lead)).to(tower.dtype)
    moving = flat.requires_grad or (below is not None and below.requires_grad)
    wanted = torch.is_grad_enabled() and moving
    row = tower.width * tower.projection.element_size()
    passing, holding = _numbers_of_a_row(tower)
    limit = current_limit()
    cut = engine.cut_pass(
        *(tower, layout, len(flat), class_specific, limit),
        passing=passing * row,
        holding=len(tower.blocks) * holding * row if wanted else 0.0,
    )
    encode: Callable[..., Tensor] = _encode_whole if tower.whole else _encode_pass
    done: dict[int, list[Tensor]] = {}
    for g, c in cut.parts(len(flat), len(layout.eot)):
        some = _some_classes(layout, c)
        places = some if tower.whole else _packing(some, class_specific)
        own = None if below is None else below[:, g, c] if class_specific else below[:, g]
        arguments = (tower, places, flat[g, c] if class_specific else flat[g], class_specific, own)
        if limit is not None and wanted:
            part = checkpoint(encode, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            part = encode(*arguments)
        done.setdefault(g.start, []).append(part)
    columns = [row[0] if len(row) == 1 else torch.cat(row, dim=1) for row in done.values()]
    if not columns:
        return ctx.new_empty(*lead, len(layout.eot), tower.dim, dtype=tower.dtype)
    features = columns[0] if len(columns) == 1 else torch.cat(columns)
    return features.reshape(*lead, len(layout.eot), tower.dim)


def _numbers_of_a_row(tower: TextTower) -> tuple[float, float]:
    """Say how many numbers of the tower's width a row passes by and, for each layer, holds.

    Measured on one layer. Of packed rows autograd holds the attention's scores too; of whole
    prompts only where torch has no kernel without them, which is allowed for.
    """
    if not tower.whole:
        return 16, 24
    mlp = tower.blocks[0].fc_w.shape[0] / tower.width
    scores = tower.heads * tower.context_length / tower.width
    products = 2 if tower.activation == "quick_gelu" else 1
    return 6 + (1 + products) * mlp + scores, 8.5 + products * mlp + scores


_parts: WeakKeyDictionary[PromptLayout, dict[tuple[int, int], PromptLayout]] = WeakKeyDictionary()


def _some_classes(layout: PromptLayout, part: slice) -> PromptLayout:
    """Return the layout of a range of the classes; the same object every time."""
    if part == slice(0, len(layout.eot)):
        return layout
    known = _parts.setdefault(layout, {})
    key = (part.start, part.stop)
    if key not in known:
        with outside_transforms():
            known[key] = PromptLayout(
                *(layout.tokens[part], layout.slots[part], layout.eot[part]),
                *(layout.shared, layout.begin),
            )
    return known[key]


def _behind(packing: _Packing, ctx: Tensor, class_specific: bool) -> Tensor:
    """Lay vectors (G, T, W) or (G, C, T, W) in the order of the packing's ``ctx_rows``."""
    if class_specific:
        return ctx[:, packing.ctx_class, packing.ctx_slot]
    return ctx[:, packing.ctx_slot]


def _embed(tower: TextTower, packing: _Packing, ctx: Tensor, class_specific: bool) -> Tensor:
    """Lay out the first layer's input, prefix and then suffixes: (G, shared + R, W)."""
    groups = ctx.shape[0]
    positional = tower.positional.to(tower.dtype)
    begin = tower.begin
    fixed = tower.token_embedding[packing.tokens].to(tower.dtype) + positional[packing.positions]
    suffix = fixed.expand(groups, -1, -1)
    if len(packing.ctx_rows):
        moved = _behind(packing, ctx, class_specific)
        moved = moved + positional[packing.positions[packing.ctx_rows]]
        suffix = suffix.index_copy(1, packing.ctx_rows, moved)
    parts = [suffix]
    if packing.shared > begin:
        parts.insert(0, ctx[:, : packing.shared - begin] + positional[begin : packing.shared])
    if tower.sos is not None:
        sos = tower.token_embedding[tower.sos].to(tower.dtype) + positional[0]
        parts.insert(0, sos.expand(groups, 1, -1))
    return torch.cat(parts, dim=1)


def _encode_pass(
    tower: TextTower,
    packing: _Packing,
    ctx: Tensor,
    class_specific: bool,
    deep: Tensor | None,
) -> Tensor:
    x = _embed(tower, packing, ctx, class_specific)
    replace = None if deep is None else _replace(tower, packing, deep, class_specific)
    return _project(tower, packed_states(tower, packing, x, replace))


class Replace(NamedTuple):
    """Rows (n,) of a pass, and what stands in them before the layers 1 to K: (K, G, n, W)."""

    rows: Tensor
    states: Tensor | list[Tensor]

    def before(self, depth: int, x: Tensor) -> Tensor:
        """Exchange the rows of (G, rows, W) as the layer wants them."""
        if not 1 <= depth <= len(self.states):
            return x
        return x.index_copy(1, self.rows, self.states[depth - 1].to(x.dtype))


def _replace(tower: TextTower, packing: _Packing, deep: Tensor, class_specific: bool) -> Replace:
    begin, shared = tower.begin, packing.shared
    front = torch.arange(begin, shared, device=deep.device)
    states = [
        torch.cat((own[:, : shared - begin], _behind(packing, own, class_specific)), dim=1)
        if shared > begin
        else _behind(packing, own, class_specific)
        for own in deep
    ]
    return Replace(torch.cat((front, shared + packing.ctx_rows)), states)


def _project(tower: TextTower, states: Tensor) -> Tensor:
    features = states @ tower.projection
    if tower.projection_b is not None:
        features = features + tower.projection_b
    return unit_length(features)


def _embed_whole(
    tower: TextTower, layout: PromptLayout, ctx: Tensor, class_specific: bool
) -> Tensor:
    """Lay out the first layer's input, every prompt at full length: (G, C, L, W)."""
    groups, (classes, length) = len(ctx), layout.tokens.shape
    positional = tower.positional.to(tower.dtype)
    fixed = tower.token_embedding[layout.tokens].to(tower.dtype) + positional
    each = ctx if class_specific else ctx[:, None].expand(-1, classes, -1, -1)
    moved = each + positional[layout.slots]
    rows = torch.arange(classes, device=ctx.device)[:, None] * length + layout.slots
    whole = fixed.flatten(0, 1).expand(groups, -1, -1)
    whole = whole.index_copy(1, rows.flatten(), moved.flatten(1, 2))
    return whole.view(groups, classes, length, -1)


def _encode_whole(
    tower: TextTower,
    layout: PromptLayout,
    ctx: Tensor,
    class_specific: bool,
    deep: Tensor | None,
) -> Tensor:
    """Encode contexts (G, T, W) or (G, C, T, W) at full length: (G, C, D)."""
    groups, classes = len(ctx), len(layout.eot)
    heads, width = tower.heads, tower.width
    pooled = pooled_rows(tower, layout).repeat(groups)
    prompts = torch.arange(groups * classes, device=ctx.device)
    x = _embed_whole(tower, layout, ctx, class_specific).flatten(0, 1)
    slots = layout.slots.repeat(groups, 1)
    for depth, block in enumerate(tower.blocks):
        last = depth == len(tower.blocks) - 1
        if deep is not None and 1 <= depth <= len(deep):
            own = deep[depth - 1] if class_specific else deep[depth - 1][:, None]
            own = own.expand(-1, classes, -1, -1).flatten(0, 1).to(x.dtype)
            x = x.index_put((prompts[:, None], slots), own)
        h = block_norm(x, block.ln_1_w, block.ln_1_b, tower.eps)
        if last:
            # only the pooled rows reach the features; in a causal tower they are the last ones,
            # which see every key
            q = F.linear(h[prompts, pooled][:, None], block.qkv_w[:width], block.qkv_b[:width])
            k, v = F.linear(h, block.qkv_w[width:], block.qkv_b[width:]).chunk(2, dim=-1)
            x = x[prompts, pooled]
        else:
            q, k, v = F.linear(h, block.qkv_w, block.qkv_b).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        causal = tower.causal and not last
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        mixed = mixed[:, 0] if last else mixed
        x = x + F.linear(mixed, block.out_w, block.out_b)
        h = block_norm(x, block.ln_2_w, block.ln_2_b, tower.eps)
        h = activate(F.linear(h, block.fc_w, block.fc_b), tower.activation)
        x = x + F.linear(h, block.proj_w, block.proj_b)
    x = block_norm(x, tower.ln_w, tower.ln_b, tower.eps)
    return _project(tower, x.unflatten(0, (groups, classes)))


def packed_states(
    tower: TextTower, packing: _Packing, x: Tensor, replace: Replace | None = None
) -> Tensor:
    """Run embedded rows (G, shared + R, W); return EOT states after the last norm (G, C, W).

    Plain operations, so that autocast and autograd see them as they see the literal pass. The rows
    of ``replace`` are exchanged between the layers.
    """
    groups, shared, bins, span = len(x), packing.shared, packing.bins, packing.span
    heads, width = tower.heads, tower.width
    size = width // heads
    bias: Tensor | None = None
    for depth, block in enumerate(tower.blocks):
        last = depth == len(tower.blocks) - 1
        if replace is not None:
            x = replace.before(depth, x)
        h = block_norm(x, block.ln_1_w, block.ln_1_b, tower.eps)
        qkv = F.linear(h, block.qkv_w, block.qkv_b)
        if bias is None:  # in the dtype of the products, which autocast chooses
            hidden = ~packing.mask.expand(groups, -1, -1, -1, -1)
            hidden = hidden.reshape(groups * bins, 1, span, shared + span)
            bias = torch.zeros(hidden.shape, dtype=qkv.dtype, device=x.device)
            bias.masked_fill_(hidden, float("-inf"))
        own = qkv[:, shared:].view(groups, bins, span, 3, heads, size)
        lead = qkv[:, None, :shared, width:].expand(-1, bins, -1, -1)
        kv = torch.cat((lead.unflatten(-1, (2, heads, size)), own[:, :, :, 1:]), dim=2)
        q = own[:, :, :, 0].reshape(groups * bins, span, heads, size).transpose(1, 2)
        k, v = kv.view(groups * bins, shared + span, 2, heads, size).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed = mixed.transpose(1, 2).reshape(groups, bins * span, width)
        if last:
            # only the EOT rows reach the features
            mixed, x = mixed[:, packing.eot_rows], x[:, shared + packing.eot_rows]
        elif shared:
            q, k, v = (
                part.unflatten(-1, (heads, size)).transpose(1, 2)
                for part in qkv[:, :shared].chunk(3, dim=-1)
            )
            first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = torch.cat((first.transpose(1, 2).flatten(2), mixed), dim=1)
        x = x + F.linear(mixed, block.out_w, block.out_b)
        h = block_norm(x, block.ln_2_w, block.ln_2_b, tower.eps)
        h = activate(F.linear(h, block.fc_w, block.fc_b), tower.activation)
        x = x + F.linear(h, block.proj_w, block.proj_b)
    return block_norm(x, tower.ln_w, tower.ln_b, tower.eps)


def against_whole(tower: TextTower) -> list[str]:
    """Say why a pass that cuts behind the EOT does not take a tower."""
    if not tower.causal:
        return [
            "the tower is not causal: every token sees the whole prompt, so that no prefix can be "
            "shared and nothing be cut"
        ]
    if tower.pooling == "last":
        return ["the tower pools at the last token, which sees the pads behind the EOT"]
    return []


def reasons_against(tower: TextTower) -> dict[str, list[str]]:
    """Say of every face why it does not take a tower here; an empty list where it does."""
    return {face.name: face.missing() or face.against(tower) for face in FACES["encode_text"]}


def _dtype(tower: TextTower) -> torch.dtype:
    """Return the dtype that the tower's products have here."""
    return autocast_dtype(tower.device, tower.dtype)


def _against_kernels(tower: TextTower) -> list[str]:
    reasons = against_whole(tower)
    if tower.sos is None:
        reasons.append("the tower's prompts begin without SOS, which the kernels keep as constants")
    if tower.activation == "gelu_tanh":
        reasons.append("the tower's activation is tanh GELU, the kernels have QuickGELU and GELU")
    return reasons


def _against_cpu(tower: TextTower, *_: object) -> list[str]:
    reasons = _against_kernels(tower) + against_cpu("the tower", tower.projection)
    if not reasons and _dtype(tower) == torch.float16:
        reasons.append("autocast asks for float16, the face has bfloat16, float32, float64")
    return reasons + against_size(tower.heads, tower.width)


def _against_triton(tower: TextTower, *_: object) -> list[str]:
    from fastfpl.kernels.text import WIDEST

    reasons = _against_kernels(tower) + launch.against("encode_text", tower=tower.projection)
    widest = max(tower.projection.shape)
    if widest > WIDEST:
        reasons.append(f"rows of {widest} numbers, at most {WIDEST}")
    return reasons + against_wide(tower.heads, tower.width, _dtype(tower))


def _against_reference(*_: object) -> list[str]:
    return ["the literal pass keeps to no memory limit"] if current_limit() is not None else []


FACES = {
    "encode_text": (
        Face(
            "triton",
            functools.partial(engine.encode, engine.triton_kernels),
            launch.missing,
            _against_triton,
        ),
        Face(
            "cpu",
            functools.partial(engine.encode, engine.cpu_kernels),
            functools.partial(native.missing, "unit_bwd"),
            _against_cpu,
        ),
        Face("torch", _encode_parts),
        Face("reference", reference.encode_text, against=_against_reference),
    )
}
