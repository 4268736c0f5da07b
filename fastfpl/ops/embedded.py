"""The text pass over prompts that are already embedded: other people's prompts, any layout."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError
from fastfpl.handles import held
from fastfpl.ops.attention import for_transforms
from fastfpl.ops.faces import Face, choose, face_or_any, forced
from fastfpl.ops.functional import Recipe, check_graph, in_front, outside_transforms, spread
from fastfpl.ops.lifetime import keep
from fastfpl.ops.memory import current_limit, memory_limit
from fastfpl.ops.operators import define
from fastfpl.ops.precision import autocast_dtype, autocast_to
from fastfpl.ops.text import (
    PromptLayout,
    Replace,
    TextTower,
    _pack,
    _Packing,
    against_whole,
    broadcast_deep,
    packed_states,
)
from fastfpl.ops.tower import by_layer
from fastfpl.reference import embedded as reference
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "encode_embedded"]

# rows of one pass when no gradient is wanted, as in ops/text.py
_ROWS_PER_PASS = 1 << 14


def encode_embedded(
    tower: TextTower,
    prompts: Tensor,
    eot: Tensor,
    *,
    shared: int = 0,
    deep: Tensor | None = None,
    first: int = 1,
) -> Tensor:
    r"""Encode embedded prompts into the states of their EOT tokens.

    What follows an EOT is never computed, and the leading rows that all classes share are computed
    once: with them, this is the pass of `encode_text` for prompts that somebody else laid out.

    Parameters
    ----------
    tower : TextTower
        Frozen weights; ``token_embedding`` and ``projection`` are not used.
    prompts : Tensor, shape (..., C, L, W), floating point
        Token embeddings without positions, at most the tower's context length of them. Any leading
        dimensions (clients, several prompts a class). Cast to the tower's dtype.
    eot : Tensor, shape (C,), int64
        Position of each EOT token. On the CPU its values are read without waiting for a device.
    shared : int
        How many leading rows are the same for all classes. They are taken from the first class,
        values and gradient: whoever passes it answers for it. It may not exceed an EOT position.
    deep : Tensor, shape (..., K, T, W), floating point, or None
        Deep prompts, the same for all classes: before layer i of 1 to K (the first is 0) the T
        states from ``first`` on are replaced by ``deep[..., i - 1, :, :]``, without positions.
        Everything before K T W broadcasts to what prompts has before C L W. K is less than the
        tower's layers and may be 0.
    first : int
        Position of the first state that is replaced: 1, behind SOS, unless said otherwise.

    Returns
    -------
    Tensor, shape (..., C, W)
        After the last LayerNorm, before the projection; dtype of the tower's residual stream.

    Raises
    ------
    InputError
        If a shape, an EOT position, ``shared``, ``first`` or the number of deep layers is out of
        range, or deep does not broadcast to prompts.
    KindError
        If ``prompts`` or ``deep`` is not floating point or not on the tower's device.
    NotSupported
        Inside `fastfpl.ops.memory.memory_limit`: this pass keeps to none. If the tower is not
        causal: nothing of a prompt could be shared or left out.

    Notes
    -----
    Differentiable in: prompts and deep. Deterministic: yes on CPU. LayerNorm in the dtype of its
    weights. Under autocast matrix products and attention run in autocast's dtype and the residual
    stream in that of ``prompts``, as they do in the literal pass.
    Memory: activations of (shared + suffix) tokens a group when a gradient is wanted.
    Source: shared-prefix identity of causal attention; deep prompts as in Khattak et al. 2023
    (MaPLe, arXiv 2210.03117), section 3.2.
    """
    op = "fastfpl.ops.encode_embedded"
    if torch.compiler.is_compiling():
        check_graph("encode_embedded")
        return _compiled(tower, prompts, eot, shared, deep, first)
    known = {"C": len(eot), "W": tower.width}
    sizes = check_shapes(op, known, prompts=(prompts, "... C L W"), eot=(eot, "C"))
    lead = prompts.shape[:-3]
    if not prompts.is_floating_point():
        raise KindError(f"{op}: prompts must be floating point; got {prompts.dtype}")
    if prompts.device != tower.device:
        raise KindError(
            f"{op}: prompts must be on the tower's device {tower.device}; got {prompts.device}"
        )
    dtype = tower.blocks[0].qkv_w.dtype
    if autocast_dtype(tower.device, dtype) == dtype:
        prompts = prompts.to(dtype)
    ends = tuple(eot.tolist())
    if sizes["L"] > tower.context_length:
        raise InputError(
            f"{op}: prompts must have at most {tower.context_length} tokens; got {sizes['L']}"
        )
    if not ends or not 0 <= min(ends) <= max(ends) < sizes["L"]:
        raise InputError(f"{op}: eot must lie in [0, {sizes['L']}) for every class; got {ends}")
    if not 0 <= shared <= min(ends):
        raise InputError(f"{op}: shared must be from 0 to {min(ends)}; got {shared}")
    if deep is not None:
        deep = broadcast_deep(op, tower, deep, lead, None, "prompts")
        slots = deep.shape[-2]
        if not 0 <= first <= sizes["L"] - slots:
            raise InputError(
                f"{op}: first must be from 0 to {sizes['L'] - slots}, so that {slots} deep prompts "
                f"fit; got {first}"
            )
        deep = deep if deep.shape[-3] and slots else None
    arguments = (tower, prompts, eot, shared, deep, first)
    face = choose("encode_embedded", FACES["encode_embedded"], *arguments)
    with for_transforms(prompts, deep):
        states: Tensor = face.run(*arguments)
    return states


# --- torch.compile --------------------------------------------------------------------------------


def _compiled(
    tower: TextTower, prompts: Tensor, eot: Tensor, shared: int, deep: Tensor | None, first: int
) -> Tensor:
    tensors = [prompts, eot] if deep is None else [prompts, eot, deep]
    dtype = autocast_dtype(tower.device, tower.blocks[0].qkv_w.dtype)
    name, limit = forced("encode_embedded") or "", current_limit() or 0
    return _operator(tensors, tower.handle, shared, first, dtype, limit, name)[0]


def _called(
    tensors: list[Tensor],
    tower: str,
    shared: int,
    first: int,
    dtype: torch.dtype,
    limit: int,
    name: str,
) -> list[Tensor]:
    weights, (prompts, eot, *deep) = held(tower, TextTower), tensors
    options = {"shared": shared, "deep": deep[0] if deep else None, "first": first}
    with (
        face_or_any(name, "encode_embedded"),
        memory_limit(limit or None),
        autocast_to(weights.device, dtype, weights.blocks[0].qkv_w.dtype),
    ):
        return [encode_embedded(weights, prompts, eot, **options)]  # type: ignore[arg-type]


def _shaped(
    tensors: list[Tensor],
    tower: str,
    shared: int,
    first: int,
    dtype: torch.dtype,
    limit: int,
    name: str,
) -> list[Tensor]:
    weights, prompts = held(tower, TextTower), tensors[0]
    if dtype != weights.blocks[0].qkv_w.dtype:
        dtype = torch.promote_types(prompts.dtype, dtype)
    *lead, classes, _, width = prompts.shape
    return [prompts.new_empty(*lead, classes, width, dtype=dtype)]


def _batched(
    size: int, tensors: list[Tensor], dims: list[int | None], *_: Any
) -> list[Tensor] | None:
    if dims[1] is not None:  # the EOTs are the same for all prompts
        return None
    prompts, *deep = (in_front(size, x, d) for x, d in zip(tensors[::2], dims[::2], strict=True))
    missing = prompts.dim() - deep[0].dim() if deep else 0
    return [prompts, tensors[1], *(spread(x, missing) for x in deep)]


_operator = define(
    Recipe(
        name="encode_embedded",
        schema="str tower, int shared, int first, ScalarType dtype, int limit, str face",
        run=_called,
        fake=_shaped,
        batched=_batched,
        instead="torch.func.hessian",
    )
)


@functools.lru_cache(maxsize=64)
def _packing(ends: tuple[int, ...], shared: int, device: torch.device) -> _Packing:
    """Pack the rows of prompts; ``tokens`` are rows of the prompts cut behind the last EOT."""
    length = max(ends) + 1
    count = len(ends)
    # kept beyond this call: a tensor made in inference mode could not be saved for a backward pass
    with torch.inference_mode(False):
        layout = PromptLayout(
            tokens=torch.arange(count * length, device=device).view(count, length),
            slots=torch.zeros(count, 0, dtype=torch.int64, device=device),
            eot=torch.tensor(ends, device=device),
            shared=shared,
        )
        return _pack(layout, shared)


def _encode_packed(
    tower: TextTower,
    prompts: Tensor,
    eot: Tensor,
    shared: int,
    deep: Tensor | None = None,
    first: int = 1,
) -> Tensor:
    ends = tuple(eot.tolist())
    with outside_transforms():
        packing = keep(_packing(ends, shared, prompts.device))
    *lead, classes, _, width = prompts.shape
    cut = prompts[..., : max(ends) + 1, :]
    flat = cut.reshape(math.prod(lead), classes * cut.shape[-2], width)
    below = None if deep is None else by_layer(deep, len(lead))
    moving = flat.requires_grad or (below is not None and below.requires_grad)
    rows = packing.shared + packing.bins * packing.span
    wanted = torch.is_grad_enabled() and moving
    size = max(1, len(flat)) if wanted else max(1, _ROWS_PER_PASS // rows)
    parts = []
    for part in (slice(g, g + size) for g in range(0, max(1, len(flat)), size)):
        replace = None if below is None else _replace(packing, below[:, part], first)
        parts.append(_encode_pass(tower, packing, flat[part], replace))
    states = parts[0] if len(parts) == 1 else torch.cat(parts)
    return states.reshape(*lead, classes, width)


def _replace(packing: _Packing, deep: Tensor, first: int) -> Replace:
    """Find the rows of the pass that deep prompts (K, G, T, W) stand in.

    With ``first`` 0 those that fill a bin up are among them: nobody reads these.
    """
    last, shared = first + deep.shape[2], packing.shared
    front = torch.arange(min(first, shared), min(last, shared), device=deep.device)
    positions = packing.positions
    behind = ((positions >= first) & (positions < last)).nonzero()[:, 0]
    slots = torch.cat((front, positions[behind])) - first
    return Replace(torch.cat((front, shared + behind)), list(deep[:, :, slots]))


def _encode_pass(
    tower: TextTower, packing: _Packing, flat: Tensor, replace: Replace | None
) -> Tensor:
    """Run groups of embedded rows (G, C L', W) and return their EOT states (G, C, W)."""
    shared = packing.shared
    positional = tower.positional.to(flat.dtype)
    x = flat.index_select(1, packing.tokens) + positional[packing.positions]
    if shared:
        x = torch.cat((flat[:, :shared] + positional[:shared], x), dim=1)
    return packed_states(tower, packing, x, replace)


def _against(tower: TextTower, *_: object) -> list[str]:
    limited = ["it keeps to no memory limit"] if current_limit() is not None else []
    return against_whole(tower) + limited


FACES = {
    "encode_embedded": (
        Face("torch", _encode_packed, against=_against),
        Face("reference", reference.encode_embedded, against=_against),
    )
}
