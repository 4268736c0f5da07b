"""The causal text tower over packed rows: forward and backward by hand, within a memory limit.

Weights are constants: the backward pass has input gradients only, and nothing is computed that no
context reaches. A pass is matrix products by the vendor's library and, between them, the kernels of
one face.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.ops import native
from fastfpl.ops.attention import Launchers, cpu_launchers, triton_launchers
from fastfpl.ops.functional import once
from fastfpl.ops.lifetime import keep
from fastfpl.ops.memory import current_limit
from fastfpl.ops.precision import as_given, autocast_dtype
from fastfpl.reference.text import Block, PromptLayout, TextTower

__all__ = [
    "INSTEAD",
    "Cut",
    "Kernels",
    "Rows",
    "by_layer",
    "cpu_kernels",
    "cut_pass",
    "encode",
    "rows_of",
    "triton_kernels",
]

#: What takes derivatives of second order of the pass.
INSTEAD = "torch.func.hessian"

# rows of one pass when no gradient is wanted and no limit is set: large enough for full-speed GEMMs
_ROWS_PER_PASS = 1 << 14
# a limit cuts a pass into parts of a quarter of it as long as these have so many rows
_ROWS_OF_A_PART = 1 << 10


@dataclass(frozen=True)
class Kernels:
    """What a block computes besides matrix products, in one face; contiguous tensors, no graph.

    Attributes
    ----------
    attention : Launchers
    norm_fwd : (x, weight, bias, eps, shift or None) -> (h, x + shift or None, mean, rstd)
    norm_bwd : (d_h, x, weight, mean, rstd, d_x); adds to d_x
    activation_fwd : (u, bias, kind) -> act(u + bias)
    activation_bwd : (d_a, u, bias, kind) -> d_u, written over d_a
    unit_fwd : (y) -> (y / norm, norm)
    unit_bwd : (d_f, f, norm) -> d_y
    """

    attention: Launchers
    norm_fwd: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]
    norm_bwd: Callable[..., None]
    activation_fwd: Callable[..., Tensor]
    activation_bwd: Callable[..., Tensor]
    unit_fwd: Callable[..., tuple[Tensor, Tensor]]
    unit_bwd: Callable[..., Tensor]


def cpu_kernels() -> Kernels:
    """Return those of fastfpl._C."""
    return Kernels(
        attention=cpu_launchers(),
        norm_fwd=_norm_fwd,
        norm_bwd=_norm_bwd,
        activation_fwd=_activation_fwd,
        activation_bwd=_activation_bwd,
        unit_fwd=_unit_fwd,
        unit_bwd=_unit_bwd,
    )


def triton_kernels() -> Kernels:
    """Return those of fastfpl.kernels."""
    from fastfpl.kernels import text

    return Kernels(
        attention=triton_launchers(),
        norm_fwd=text.norm_fwd,
        norm_bwd=text.norm_bwd,
        activation_fwd=text.activation_fwd,
        activation_bwd=text.activation_bwd,
        unit_fwd=text.unit_fwd,
        unit_bwd=text.unit_bwd,
    )


def _norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    h = torch.empty_like(x)
    base = None if shift is None else torch.empty_like(x)
    mean, rstd = weight.new_empty(2, len(x))
    native.load("norm_fwd").norm_fwd(
        x, weight, bias, shift, h, base, mean, rstd, eps, torch.get_num_threads()
    )
    return h, base, mean, rstd


def _norm_bwd(
    d_h: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, d_x: Tensor
) -> None:
    native.load("norm_bwd").norm_bwd(d_h, x, weight, mean, rstd, d_x, torch.get_num_threads())


def _activation_fwd(u: Tensor, bias: Tensor, kind: str) -> Tensor:
    a = torch.empty_like(u)
    native.load("activation_fwd").activation_fwd(u, bias, a, kind, torch.get_num_threads())
    return a


def _activation_bwd(d_a: Tensor, u: Tensor, bias: Tensor, kind: str) -> Tensor:
    native.load("activation_bwd").activation_bwd(d_a, u, bias, kind, torch.get_num_threads())
    return d_a


def _unit_fwd(y: Tensor) -> tuple[Tensor, Tensor]:
    f = torch.empty_like(y)
    norm = y.new_empty(len(y), dtype=torch.promote_types(y.dtype, torch.float32))
    native.load("unit_fwd").unit_fwd(y, f, norm, torch.get_num_threads())
    return f, norm


def _unit_bwd(d_f: Tensor, f: Tensor, norm: Tensor) -> Tensor:
    d_y = torch.empty_like(f)
    native.load("unit_bwd").unit_bwd(d_f, f, norm, d_y, torch.get_num_threads())
    return d_y


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of a range of classes lie: a prefix of S rows, then ragged suffixes.

    SOS has no row: its states are constants of the tower.
    """

    shared: int  # S, context vectors in front of every name
    starts: tuple[int, ...]  # first suffix row of every class, and their number R
    tokens: Tensor  # (R,) ids, 0 in rows of a context vector
    positions: Tensor  # (R,)
    moving: Tensor  # (C * T',) suffix rows that hold a context vector, class by class
    moving_positions: Tensor  # (S + C * T',) in the prompt, prefix first
    ends: Tensor  # (C,) rows of the EOTs, prefix counted

    @property
    def count(self) -> int:
        """Rows of one context."""
        return self.shared + self.starts[-1]


def rows_of(
    layout: PromptLayout, class_specific: bool, first: int = 0, last: int | None = None
) -> Rows:
    """Lay out the classes from ``first`` to before ``last``."""
    part = slice(first, last)
    device = layout.tokens.device
    tokens, slots, eot = (x[part].cpu() for x in (layout.tokens, layout.slots, layout.eot))
    lead = 1 if class_specific else layout.shared
    lengths = eot + 1 - lead
    starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    owner = torch.repeat_interleave(torch.arange(len(eot)), lengths)
    positions = torch.arange(int(starts[-1])) - starts[owner] + lead
    inside = lead - 1  # slots of the prefix are the first ones
    moving = slots[:, inside:]
    return Rows(
        shared=inside,
        starts=tuple(starts.tolist()),
        tokens=tokens[owner, positions].to(device),
        positions=positions.to(device),
        moving=(starts[:-1, None] + moving - lead).flatten().to(device),
        moving_positions=torch.cat((torch.arange(1, lead), moving.flatten())).to(device),
        ends=(inside + starts[1:] - 1).to(device),
    )


@dataclass(frozen=True)
class Cut:
    """How a call is cut into parts that stay within a memory limit."""

    contexts: int  # of one part
    classes: int
    kept: int  # parts whose activations stay for the backward pass

    def parts(self, groups: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Yield the contexts and classes of every part."""
        for g in range(0, groups, self.contexts):
            for c in range(0, count, self.classes):
                end = min(g + self.contexts, groups), min(c + self.classes, count)
                yield slice(g, end[0]), slice(c, end[1])


_lengths: WeakKeyDictionary[PromptLayout, list[int]] = WeakKeyDictionary()


def cut_pass(
    tower: TextTower,
    layout: PromptLayout,
    groups: int,
    class_specific: bool,
    limit: int | None,
    *,
    passing: float,
    holding: float,
) -> Cut:
    """Cut a call of ``groups`` contexts so that no part takes more than ``limit`` bytes.

    Parameters
    ----------
    passing : float
        Bytes of a row while one part is computed.
    holding : float
        Bytes of a row that stay for the backward pass; 0 if there is none.
    """
    if layout not in _lengths:
        _lengths[layout] = (layout.eot + 1).tolist()
    if tower.whole:
        lead, suffixes = 0, [tower.context_length] * len(layout.eot)
    else:
        lead = 0 if class_specific else layout.shared - layout.begin  # SOS has no row
        suffixes = [length - lead - layout.begin for length in _lengths[layout]]
    classes, whole = len(suffixes), lead + sum(suffixes)
    if limit is None and holding:
        return Cut(max(1, groups), classes, 1)

    def rows_of_part(fitting: int) -> int:
        starts = range(0, classes, fitting)
        return lead + max(sum(suffixes[c : c + fitting]) for c in starts)

    def largest(rows: int) -> tuple[int, int]:
        """Contexts and classes of the largest part of so many rows; 0 classes if none fits."""
        if rows >= whole:
            return max(1, min(groups, rows // whole)), classes
        fitting = classes
        while fitting and rows_of_part(fitting) > rows:
            share = (rows - lead) / (rows_of_part(fitting) - lead)
            fitting = max(0, min(fitting - 1, int(fitting * share)))
        return 1, fitting

    if limit is None:
        contexts, fitting = largest(_ROWS_PER_PASS)
        return Cut(contexts, max(1, fitting), 1)
    contexts, fitting = largest(int(limit // (passing + holding)))
    if not fitting:
        least = rows_of_part(1) * (passing + holding)
        raise InputError(
            f"fastfpl.ops.encode_text: max_memory must be at least {math.ceil(least)} bytes for "
            f"one class of this tower; got {limit}"
        )
    if not holding or groups * whole * (passing + holding) <= limit:
        return Cut(contexts, fitting, 1)
    # smaller parts leave room to keep the activations of some of them
    for share in (4, 2):
        fewer = largest(int(limit / share // (passing + holding)))
        if fewer[1] and fewer[0] * rows_of_part(fewer[1]) >= _ROWS_OF_A_PART:
            contexts, fitting = fewer
            break
    rows = contexts * rows_of_part(fitting)
    return Cut(contexts, fitting, int((limit - rows * passing) // (rows * holding)))


@dataclass(frozen=True, eq=False)
class _Fixed:
    """What no context changes in the first layer: rows of the suffixes, R of them."""

    base: Tensor  # (R, W) input plus the bias of the first output projection
    qkv: Tensor  # (R, 3 W) without its bias


@dataclass(eq=False)
class _Constants:
    """Constants of one tower; a change of its weights in place begins them anew."""

    stamp: int
    sos: list[Tensor]  # (2, W) a layer: key and value of SOS, bias included
    layouts: WeakKeyDictionary[PromptLayout, dict[tuple[bool, int, int], tuple[Rows, _Fixed]]]


_constants: WeakKeyDictionary[TextTower, dict[Kernels, _Constants]] = WeakKeyDictionary()


def _stamp(tower: TextTower) -> int:
    """Count the changes in place of all weights, as far as torch sees them."""
    owners: list[Any] = [tower, *tower.blocks]
    tensors = (getattr(o, f.name) for o in owners for f in fields(o))
    return sum(t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference())


_narrowed: WeakKeyDictionary[TextTower, dict[torch.dtype, tuple[int, TextTower]]] = (
    WeakKeyDictionary()
)


def _as_autocast_asks(tower: TextTower) -> TextTower:
    """Return the tower with its products in autocast's dtype, its norms and sums wide, as eager.

    The rounded weights stay, as autocast keeps them for the length of its block.
    """
    dtype = autocast_dtype(tower.device, tower.dtype)
    if dtype == tower.dtype:
        return tower
    stamp, known = _stamp(tower), _narrowed.setdefault(tower, {})
    if dtype not in known or known[dtype][0] != stamp:
        wide = torch.promote_types(tower.dtype, dtype)

        def block(one: Block) -> Block:
            moved = {f.name: getattr(one, f.name) for f in fields(one)}
            for name in ("qkv_w", "qkv_b", "out_w", "fc_w", "fc_b", "proj_w"):
                moved[name] = moved[name].to(dtype)
            for name in ("out_b", "proj_b"):
                moved[name] = moved[name].to(wide)
            return Block(**moved)

        # kept beyond this call: tensors made in inference mode could not be saved for a gradient
        with torch.inference_mode(False), torch.no_grad():
            narrow = replace(
                tower,
                blocks=tuple(block(one) for one in tower.blocks),
                projection=tower.projection.to(dtype),
            )
        known[dtype] = stamp, narrow
    return known[dtype][1]


def _stream(tower: TextTower) -> torch.dtype:
    """Return the dtype of the residual stream; products have the tower's."""
    return tower.blocks[0].out_b.dtype


def _features_dtype(tower: TextTower) -> torch.dtype:
    offset = tower.projection_b
    return tower.dtype if offset is None else torch.promote_types(tower.dtype, offset.dtype)


def _add_product(base: Tensor, a: Tensor, w: Tensor) -> Tensor:
    """Add a wᵀ to ``base`` in place, in one step where the dtypes allow it."""
    return base.addmm_(a, w.t()) if a.dtype == base.dtype else base.add_(a @ w.t())


def _constants_of(kernels: Kernels, tower: TextTower) -> _Constants:
    stamp, by_kernels = _stamp(tower), _constants.setdefault(tower, {})
    if kernels not in by_kernels or by_kernels[kernels].stamp != stamp:
        by_kernels[kernels] = _Constants(stamp, _sos(kernels, tower), WeakKeyDictionary())
    constants: _Constants = keep(by_kernels[kernels])
    return constants


def _first_input(tower: TextTower, tokens: Tensor, positions: Tensor) -> Tensor:
    """Embed fixed tokens: (n, W)."""
    stream = _stream(tower)
    return tower.token_embedding[tokens].to(stream) + tower.positional[positions].to(stream)


@torch.no_grad()
def _sos(kernels: Kernels, tower: TextTower) -> list[Tensor]:
    """Follow SOS through the tower: it attends to itself alone."""
    start = torch.tensor([tower.sos], device=tower.device)
    x = _first_input(tower, start, torch.zeros_like(start))
    pairs = []
    for block in tower.blocks:
        h, base, _, _ = kernels.norm_fwd(x, block.ln_1_w, block.ln_1_b, tower.eps, block.out_b)
        assert base is not None
        qkv = torch.addmm(block.qkv_b, h.to(tower.dtype), block.qkv_w.t())
        _, key, value = qkv.chunk(3, dim=-1)
        pairs.append(torch.cat((key, value)))
        x = _add_product(base, value, block.out_w)
        x, *_ = _mlp(kernels, tower, block, x)
    return pairs


def _fixed(kernels: Kernels, tower: TextTower, rows: Rows) -> _Fixed:
    block = tower.blocks[0]
    x = _first_input(tower, rows.tokens, rows.positions)
    h, base, _, _ = kernels.norm_fwd(x, block.ln_1_w, block.ln_1_b, tower.eps, block.out_b)
    assert base is not None
    return _Fixed(base, h.to(tower.dtype) @ block.qkv_w.t())


class _Deep(NamedTuple):
    """What takes the place of the context's rows before the layers 1 to ``layers``."""

    layers: int
    rows: Callable[[int], Any]  # of a layer: (G, K, W)


#: Mean and reciprocal deviation of every row of a LayerNorm.
_Stats = tuple[Tensor, Tensor]


def _mlp(
    kernels: Kernels, tower: TextTower, block: Block, x: Tensor
) -> tuple[Tensor, _Stats, Tensor]:
    """Return the block's output, its second norm's statistics, and the MLP's first product."""
    h, base, mean, rstd = kernels.norm_fwd(x, block.ln_2_w, block.ln_2_b, tower.eps, block.proj_b)
    assert base is not None
    u = h.to(tower.dtype) @ block.fc_w.t()
    del h
    a = kernels.activation_fwd(u, block.fc_b, tower.activation)
    return _add_product(base, a, block.proj_w), (mean, rstd), u


@dataclass(eq=False)
class _Kept:
    """What the backward pass of one block needs; rows without a meaning in a layer are left out."""

    x: Tensor  # input of the first norm: (G n, W); in the first layer its moving rows
    norm_1: _Stats
    qkv: Tensor  # (G, n, 3 W)
    x_2: Tensor  # input of the second norm; in the last layer the EOT rows
    norm_2: _Stats
    u: Tensor  # first product of the MLP


@dataclass(eq=False)
class _Tape:
    """What the backward pass of one part needs."""

    blocks: list[_Kept]
    x: Tensor  # input of the final norm: (G C, W)
    norm: _Stats
    features: Tensor  # (G C, D), unit length
    length: Tensor  # (G C,)


@dataclass(frozen=True, eq=False)
class _Pass:
    """One part of a call: some classes under some contexts."""

    kernels: Kernels
    tower: TextTower
    rows: Rows
    fixed: _Fixed
    sos: list[Tensor]

    def forward(self, moved: Tensor, deep: _Deep, keep: bool) -> tuple[Tensor, _Tape | None]:
        """Encode context vectors in the order of ``rows.moving_positions``: (G, K, W) -> (G C, D).

        ``deep`` gives, in the same order, what takes their place before a layer. With ``keep`` also
        return what `backward` needs.
        """
        kernels, tower, rows = self.kernels, self.tower, self.rows
        groups, width = len(moved), tower.width
        kept: list[_Kept] = []
        x = moved
        for depth, block in enumerate(tower.blocks):
            last = depth == len(tower.blocks) - 1
            norm_1: _Stats
            if 1 <= depth <= deep.layers:
                # nobody else holds what the last layer gave: it may be written to
                self._put(x.view(groups, -1, width), deep.rows(depth))
            if depth == 0:
                x, norm_1, qkv, base = self._enter(moved, block)
                base = self._at_ends(base) if last else base.view(-1, width)
            elif last:
                h, norm_1 = self._norm(x, block.ln_1_w, block.ln_1_b)
                qkv = self._last_qkv(h, block)
                base = self._at_ends(x.view(groups, -1, width)) + block.out_b
            else:
                h, base, norm_1 = self._norm_and_shift(x, block.ln_1_w, block.ln_1_b, block.out_b)
                qkv = (h @ block.qkv_w.t()).view(groups, rows.count, 3 * width)
            mixed = kernels.attention.forward(
                *(qkv, block.qkv_b, rows.shared, rows.starts, tower.heads, self.sos[depth], last)
            )
            x_2 = _add_product(base, mixed.view(-1, width), block.out_w)
            del mixed, base
            out, norm_2, u = _mlp(kernels, tower, block, x_2)
            if keep:
                kept.append(_Kept(x, norm_1, qkv, x_2, norm_2, u))
            x = out
        h, norm = self._norm(x, tower.ln_w, tower.ln_b)
        y = h @ tower.projection
        if tower.projection_b is not None:
            y = y + tower.projection_b  # which may be wider, as in eager
        features, length = kernels.unit_fwd(y)
        return features, _Tape(kept, x, norm, features, length) if keep else None

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, _Stats]:
        h, _, mean, rstd = self.kernels.norm_fwd(x, weight, bias, self.tower.eps, None)
        return h.to(self.tower.dtype), (mean, rstd)

    def _norm_and_shift(
        self, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, _Stats]:
        """Also return x + shift: the residual stream with the bias of what will be added to it."""
        h, base, mean, rstd = self.kernels.norm_fwd(x, weight, bias, self.tower.eps, shift)
        assert base is not None
        return h.to(self.tower.dtype), base, (mean, rstd)

    def _at_ends(self, x: Tensor) -> Tensor:
        """Take the EOT rows: (G, n, ...) -> (G C, ...), contiguous."""
        return x[:, self.rows.ends].flatten(0, 1)

    def _enter(self, moved: Tensor, block: Block) -> tuple[Tensor, _Stats, Tensor, Tensor]:
        """Begin the first layer: only rows with a context vector are computed."""
        groups, width = len(moved), self.tower.width
        x = moved.reshape(-1, width)
        h, base, norm = self._norm_and_shift(x, block.ln_1_w, block.ln_1_b, block.out_b)
        own = (h @ block.qkv_w.t()).view(groups, -1, 3 * width)
        qkv = self._lay_out(own, self.fixed.qkv)
        return x, norm, qkv, self._lay_out(base.view(groups, -1, width), self.fixed.base)

    def _lay_out(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Put rows of context vectors among the fixed ones: (G, K, n), (R, n) -> (G, S + R, n)."""
        rows, shared = self.rows, self.rows.shared
        whole = moved.new_empty(len(moved), rows.count, moved.shape[2])
        whole[:, :shared] = moved[:, :shared]
        whole[:, shared:] = fixed
        if len(rows.moving):
            whole.index_copy_(1, rows.moving + shared, moved[:, shared:])
        return whole

    def _last_qkv(self, h: Tensor, block: Block) -> Tensor:
        """Keys and values of all rows, queries of the EOT rows: (G, n, 3 W)."""
        width = self.tower.width
        qkv = h.new_empty(len(h), 3 * width)
        torch.mm(h, block.qkv_w[width:].t(), out=qkv[:, width:])
        qkv = qkv.view(-1, self.rows.count, 3 * width)
        ends = self._at_ends(h.view(-1, self.rows.count, width))
        query = ends @ block.qkv_w[:width].t()
        qkv[:, self.rows.ends, :width] = query.view(len(qkv), -1, width)
        return qkv

    def backward(
        self, d_features: Tensor, tape: _Tape, layers: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradient of ``moved`` (G, K, W), and those of ``layers`` deep prompts.

        The tape is used up.
        """
        kernels, tower, rows, width = self.kernels, self.tower, self.rows, self.tower.width
        d_y = kernels.unit_bwd(d_features, tape.features, tape.length)
        d_x, stream = torch.zeros_like(tape.x), tape.x.dtype
        d_h = (d_y.to(tower.dtype) @ tower.projection.t()).to(stream)
        kernels.norm_bwd(d_h, tape.x, tower.ln_w, *tape.norm, d_x)
        d_deep: list[Tensor] = []
        for depth in reversed(range(len(tower.blocks))):
            block, kept = tower.blocks[depth], tape.blocks.pop()
            last = depth == len(tower.blocks) - 1
            d_a = d_x.to(tower.dtype) @ block.proj_w
            d_u = kernels.activation_bwd(d_a, kept.u, block.fc_b, tower.activation)
            d_h = (d_u @ block.fc_w).to(stream)
            del d_a, d_u
            kernels.norm_bwd(d_h, kept.x_2, block.ln_2_w, *kept.norm_2, d_x)
            d_mixed = (d_x.to(tower.dtype) @ block.out_w).view(len(kept.qkv), -1, width)
            d_qkv = kernels.attention.backward(
                *(d_mixed, kept.qkv, block.qkv_b, rows.shared, rows.starts, tower.heads),
                *(self.sos[depth], last),
            )
            del d_mixed, d_h
            if last:
                d_x = self._from_ends(d_x, len(d_qkv))
            if depth == 0:
                d_x = self._moving(d_x.view(len(d_qkv), -1, width)).flatten(0, 1)
                d_h = self._moving(d_qkv).flatten(0, 1) @ block.qkv_w
            elif last:
                flat = d_qkv.view(-1, 3 * width)
                d_h = flat[:, width:] @ block.qkv_w[width:]
                query = self._at_ends(d_qkv)[:, :width] @ block.qkv_w[:width]
                d_h.view(len(d_qkv), -1, width)[:, rows.ends] += query.view(len(d_qkv), -1, width)
            else:
                d_h = d_qkv.view(-1, 3 * width) @ block.qkv_w
            del d_qkv
            kernels.norm_bwd(d_h.to(stream), kept.x, block.ln_1_w, *kept.norm_1, d_x)
            if 1 <= depth <= layers:
                whole = d_x.view(len(kept.qkv), -1, width)
                d_deep.append(self._moving(whole).clone())
                self._put(whole, None)
        d_deep.reverse()
        return d_x.view(-1, len(rows.moving_positions), width), d_deep

    def _put(self, whole: Tensor, moved: Tensor | None) -> None:
        """Write the rows of context vectors of (G, n, W) in place; None writes zeros."""
        rows, shared = self.rows, self.rows.shared
        if moved is None:
            whole[:, :shared] = 0
            if len(rows.moving):
                whole.index_fill_(1, rows.moving + shared, 0)
            return
        whole[:, :shared] = moved[:, :shared]
        if len(rows.moving):
            whole.index_copy_(1, rows.moving + shared, moved[:, shared:])

    def _from_ends(self, d: Tensor, groups: int) -> Tensor:
        """Put gradients of the EOT rows among zeros: (G C, W) -> (G n, W)."""
        whole = d.new_zeros(groups, self.rows.count, d.shape[1])
        whole[:, self.rows.ends] = d.view(groups, -1, d.shape[1])
        return whole.view(-1, d.shape[1])

    def _moving(self, whole: Tensor) -> Tensor:
        """Take the rows of context vectors: (G, n, ...) -> (G, K, ...)."""
        rows, shared = self.rows, self.rows.shared
        if not len(rows.moving):
            return whole[:, :shared].contiguous()
        return torch.cat((whole[:, :shared], whole[:, rows.moving + shared]), dim=1)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call: how it is cut into parts."""

    kernels: Kernels
    tower: TextTower
    layout: PromptLayout
    class_specific: bool
    constants: _Constants
    cut: Cut

    def parts(self, groups: int) -> Iterator[tuple[slice, slice, _Pass]]:
        count = len(self.layout.eot)
        for g, at in self.cut.parts(groups, count):
            yield g, at, self._pass(at)

    def _pass(self, at: slice) -> _Pass:
        passes = self.constants.layouts.setdefault(self.layout, {})
        key = (self.class_specific, at.start, at.stop)
        if key not in passes:
            rows = rows_of(self.layout, self.class_specific, at.start, at.stop)
            with torch.no_grad():
                passes[key] = rows, _fixed(self.kernels, self.tower, rows)
        rows, fixed = keep(passes[key])
        return _Pass(self.kernels, self.tower, rows, fixed, self.constants.sos)

    def gather(self, ctx: Tensor, at: slice, rows: Rows) -> Tensor:
        """Lay the vectors of a part in the order of its rows: (G, K, W)."""
        return ctx[:, at].flatten(1, 2) if self.class_specific else self._repeat(ctx, rows)

    def enter(self, ctx: Tensor, at: slice, rows: Rows) -> Tensor:
        """Add positions to the context vectors of a part, in the order of its rows: (G, K, W)."""
        own = self.gather(ctx, at, rows)
        return own + self.tower.positional[rows.moving_positions].to(ctx.dtype)

    def deep(self, deep: Tensor | None, g: slice, at: slice, rows: Rows) -> _Deep:
        """Give the deep prompts (layers, G, ...) of a part, laid out when a layer asks for them."""
        if deep is None:
            return _Deep(0, lambda depth: None)
        return _Deep(len(deep), lambda depth: self.gather(deep[depth - 1, g], at, rows))

    def _repeat(self, ctx: Tensor, rows: Rows) -> Tensor:
        """Repeat what stands behind the prefix for every class."""
        if not len(rows.moving):
            return ctx
        behind = ctx[:, None, rows.shared :].expand(-1, len(rows.ends), -1, -1)
        return torch.cat((ctx[:, : rows.shared], behind.flatten(1, 2)), dim=1)

    def scatter(self, d_moved: Tensor, d_ctx: Tensor, at: slice, rows: Rows) -> None:
        """Add the gradient of `gather`'s result to that of the part's contexts."""
        if self.class_specific:
            d_ctx[:, at] += d_moved.view_as(d_ctx[:, at])
            return
        d_ctx[:, : rows.shared] += d_moved[:, : rows.shared]
        if len(rows.moving):
            behind = d_moved[:, rows.shared :].unflatten(1, (len(rows.ends), -1))
            d_ctx[:, rows.shared :] += behind.sum(1)


class _Encode(torch.autograd.Function):
    """Parts one after another; activations of some are kept, those of the rest made again."""

    @staticmethod
    def forward(ctx: Any, contexts: Tensor, deep: Tensor | None, call: _Call) -> Tensor:
        groups, tower = len(contexts), call.tower
        features = contexts.new_empty(
            groups, len(call.layout.eot), tower.dim, dtype=_features_dtype(tower)
        )
        tapes: list[_Tape] = []
        for part, (g, c, one) in enumerate(call.parts(groups)):
            moved = call.enter(contexts[g], c, one.rows)
            keep = part < call.cut.kept and any(ctx.needs_input_grad)
            found, tape = one.forward(moved, call.deep(deep, g, c, one.rows), keep)
            features[g, c] = found.view(len(moved), -1, tower.dim)
            if tape is not None:
                tapes.append(tape)
        ctx.save_for_backward(contexts, deep)
        ctx.call, ctx.tapes = call, tapes
        return features

    @staticmethod
    def backward(ctx: Any, d_features: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        with torch.no_grad(), as_given(d_features.device):
            found = _Encode._gradient(ctx, d_features.resolve_neg())
        d_contexts, d_deep = once("encode_text", INSTEAD, found, d_features, *ctx.saved_tensors)
        return d_contexts, d_deep, None

    @staticmethod
    def _gradient(ctx: Any, d_features: Tensor) -> tuple[Tensor, Tensor | None]:
        contexts, deep = ctx.saved_tensors
        call: _Call = ctx.call
        # kept parts come first: what they held is free before any other is made again
        tapes, ctx.tapes = ctx.tapes, []
        tapes.reverse()
        d_contexts = torch.zeros_like(contexts)
        d_deep = None if deep is None else torch.zeros_like(deep)
        for g, c, one in call.parts(len(contexts)):
            tape = tapes.pop() if tapes else None
            below = call.deep(deep, g, c, one.rows)
            if tape is None:
                _, tape = one.forward(call.enter(contexts[g], c, one.rows), below, keep=True)
            assert tape is not None
            # the gradient of a plain sum is an expanded scalar
            wanted = d_features[g, c].reshape(-1, call.tower.dim).contiguous()
            d_moved, d_below = one.backward(wanted, tape, below.layers)
            call.scatter(d_moved, d_contexts[g], c, one.rows)
            for depth, d_layer in enumerate(d_below):
                assert d_deep is not None
                call.scatter(d_layer, d_deep[depth, g], c, one.rows)
            del tape
        return d_contexts, d_deep


def by_layer(deep: Tensor, lead: int) -> Tensor:
    """Bring deep prompts of ``lead`` leading dimensions to (K, G, T, W) or (K, G, C, T, W)."""
    flat = deep.reshape(math.prod(deep.shape[:lead]), *deep.shape[lead:])
    return flat.movedim(-3, 0)


def encode(
    kernels: Callable[[], Kernels],
    tower: TextTower,
    layout: PromptLayout,
    ctx: Tensor,
    class_specific: bool,
    deep: Tensor | None = None,
) -> Tensor:
    """Encode contexts as `fastfpl.ops.encode_text` does: (..., C, D)."""
    inner = 3 if class_specific else 2
    lead = ctx.shape[: ctx.dim() - inner]
    tower = _as_autocast_asks(tower)
    stream = _stream(tower)
    flat = ctx.reshape(math.prod(lead), *ctx.shape[ctx.dim() - inner :]).to(stream)
    below = None if deep is None else by_layer(deep, len(lead)).to(stream)
    moving = flat.requires_grad or (below is not None and below.requires_grad)
    wanted = torch.is_grad_enabled() and moving
    # Numbers of a row of the tower's width. Kept: the inputs of both norms, qkv and the MLP's first
    # product. Passing by: these of one layer where they are not kept, the MLP's activation, two
    # states of the residual stream.
    mlp = tower.blocks[0].fc_w.shape[0] / tower.width
    row = tower.width * stream.itemsize
    cut = cut_pass(
        *(tower, layout, len(flat), class_specific, current_limit()),
        passing=(5 + mlp + mlp + 2) * row,
        holding=len(tower.blocks) * (5 + mlp) * row if wanted else 0.0,
    )
    found = kernels()
    with as_given(tower.device):
        constants = _constants_of(found, tower)
        call = _Call(found, tower, layout, class_specific, constants, cut)
        features: Tensor = _Encode.apply(flat, below, call)
    return features.reshape(*lead, len(layout.eot), tower.dim)
