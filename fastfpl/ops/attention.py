"""Causal attention of many short sequences that share a prefix."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfpl.errors import InputError, KindError
from fastfpl.ops import launch, native
from fastfpl.ops.faces import (
    BY_HAND,
    Face,
    choose,
    face_or_any,
    forced,
    in_transform,
    transformed,
)
from fastfpl.ops.functional import (
    Recipe,
    check_graph,
    in_front,
    once,
    outside_transforms,
    transformed_call,
)
from fastfpl.ops.lifetime import keep
from fastfpl.ops.operators import define
from fastfpl.ops.precision import as_given, autocast_dtype, without_autocast
from fastfpl.reference import attention as reference
from fastfpl.shapes import check_shapes

__all__ = [
    "FACES",
    "Launchers",
    "against_cpu",
    "against_size",
    "against_wide",
    "cpu_launchers",
    "for_transforms",
    "prefix_attention",
    "triton_launchers",
]

_OP = "fastfpl.ops.prefix_attention"


def prefix_attention(
    qkv: Tensor,
    *,
    heads: int,
    shared: int,
    starts: Sequence[int],
    bias: Tensor | None = None,
    sos: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    r"""Attend causally in C sequences of every group that have their first tokens in common.

    .. math:: o_i = \sum_{j \in J(i)} \mathrm{softmax}_{j \in J(i)}(q_i \cdot k_j / \sqrt{d})\, v_j

    for every head of d numbers. Row i of the prefix attends to J(i) = {SOS, prefix rows up to i};
    row i of a segment to {SOS, the whole prefix, rows of its segment up to i}.

    Parameters
    ----------
    qkv : Tensor, shape (..., S + R, 3 W), float16, bfloat16, float32 or float64
        Queries, keys and values of a group's S prefix rows and of the R rows of its C segments.
    heads : int
        H; divides W.
    shared : int >= 0
        S.
    starts : sequence of C + 1 int
        First row of every segment behind the prefix, and R: rising from 0.
    bias : Tensor, shape (3 W,), or None
        Added to ``qkv``; not differentiated.
    sos : Tensor, shape (2, W), or None
        Key and value, bias included, of one token that stands before all others; a constant.
    last_only : bool
        Only the last row of each segment is a query; other rows' queries are not read.

    Returns
    -------
    Tensor, shape (..., S + R, W), or (..., C, W) if last_only; dtype of qkv

    Raises
    ------
    InputError
        If shapes disagree, or starts do not rise from 0 to R.
    KindError
        If dtypes or devices differ.

    Notes
    -----
    Differentiable in: qkv, once, under ``torch.func`` and ``torch.compile`` too; forward mode, and
    ``torch.func.grad`` of a gradient, take the torch face. Deterministic: yes, on every face; the
    prefix' gradients are sums of parts in a fixed order. Accumulates in float32; in float64 for
    float64. Under autocast the operands are rounded to its dtype, which is the result's. Memory:
    the result; the softmax is recomputed in the backward pass and nothing but the arguments is
    kept. The C++ face takes heads of at most 128 numbers and no float16, the Triton face heads of
    at most 64 numbers in float32 and 80 in 16 bits.
    Source: causal attention of Vaswani et al. 2017 (arXiv 1706.03762), equation 1; shared prefixes
    as in design section 4.1.
    """
    if torch.compiler.is_compiling():
        check_graph("prefix_attention")
        return _compiled(qkv, heads, shared, starts, bias, sos, last_only)
    sizes = check_shapes(_OP, qkv=(qkv, "... M K"))
    if not qkv.is_floating_point():
        raise KindError(f"{_OP}: qkv must be floating point; got {qkv.dtype}")
    rows, triple = sizes["M"], sizes["K"]
    if triple % 3 or heads < 1 or triple % (3 * heads):
        raise InputError(
            f"{_OP}: qkv must hold three times heads={heads} equal parts; got {triple} columns"
        )
    bounds = tuple(int(s) for s in starts)
    if len(bounds) < 2 or bounds[0] != 0 or any(b <= a for a, b in itertools.pairwise(bounds)):
        raise InputError(f"{_OP}: starts must rise from 0; got {bounds[:8]}")
    if shared < 0 or shared + bounds[-1] != rows:
        raise InputError(
            f"{_OP}: shared and starts must make up the {rows} rows of qkv; got {shared} and "
            f"{bounds[-1]}"
        )
    width = triple // 3
    for name, tensor, pattern in (("bias", bias, "K"), ("sos", sos, "2 W")):
        if tensor is None:
            continue
        check_shapes(_OP, {"K": triple, "W": width}, **{name: (tensor, pattern)})
        if tensor.dtype != qkv.dtype or tensor.device != qkv.device:
            raise KindError(
                f"{_OP}: {name} must be {qkv.dtype} on {qkv.device} as qkv is; got {tensor.dtype} "
                f"on {tensor.device}"
            )
    # a lazily negated view keeps its sign in a bit that kernels do not see
    qkv = qkv.resolve_neg()
    bias, sos = (None if x is None else x.resolve_neg() for x in (bias, sos))
    qkv, bias, sos = _as_autocast_asks(qkv, bias, sos)
    arguments = (heads, shared, bounds, bias, sos, last_only)
    face = choose("prefix_attention", FACES["prefix_attention"], qkv, *arguments)
    if in_transform() and face.name in BY_HAND:
        tensors, statics = _packed(qkv, heads, shared, bounds, bias, sos, last_only, face.name)
        with as_given(qkv.device):
            (found,) = transformed_call(_RECIPE, tensors, *statics)
        return found
    flat = qkv.reshape(math.prod(qkv.shape[:-2]), rows, triple)
    with as_given(qkv.device), for_transforms(qkv, bias, sos):
        mixed: Tensor = face.run(flat, *arguments)
    return mixed.reshape(*qkv.shape[:-2], *mixed.shape[1:])


# --- torch.compile and torch.func -----------------------------------------------------------------


def _as_autocast_asks(
    qkv: Tensor, bias: Tensor | None, sos: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = autocast_dtype(qkv.device, qkv.dtype)
    if dtype != qkv.dtype:
        qkv, bias = (qkv if bias is None else qkv + bias).to(dtype), None
        sos = None if sos is None else sos.to(dtype)
    return qkv, bias, sos


def _compiled(
    qkv: Tensor,
    heads: int,
    shared: int,
    starts: Sequence[int],
    bias: Tensor | None,
    sos: Tensor | None,
    last_only: bool,
) -> Tensor:
    given = _as_autocast_asks(qkv, bias, sos)
    name = forced("prefix_attention") or ""
    tensors, statics = _packed(given[0], heads, shared, starts, *given[1:], last_only, name)
    return _operator(tensors, *statics)[0]


def _packed(
    qkv: Tensor,
    heads: int,
    shared: int,
    starts: Sequence[int],
    bias: Tensor | None,
    sos: Tensor | None,
    last_only: bool,
    name: str,
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Arrange the arguments as an operator takes them: tensors, and what is none."""
    # what is not differentiated is a constant to every transform
    given = [x if x is None else x.detach() for x in (bias, sos)]
    tensors = [qkv, *(x for x in given if x is not None)]
    return tensors, (heads, shared, list(starts), bias is not None, last_only, name)


def _called(
    tensors: list[Tensor],
    heads: int,
    shared: int,
    starts: list[int],
    biased: bool,
    last_only: bool,
    name: str,
) -> list[Tensor]:
    qkv, *rest = tensors
    bias = rest.pop(0) if biased else None
    with face_or_any(name, "prefix_attention"), without_autocast():
        mixed = prefix_attention(
            qkv,
            heads=heads,
            shared=shared,
            starts=starts,
            bias=bias,
            sos=rest[0] if rest else None,
            last_only=last_only,
        )
    return [mixed]


def _shaped(
    tensors: list[Tensor],
    heads: int,
    shared: int,
    starts: list[int],
    biased: bool,
    last_only: bool,
    name: str,
) -> list[Tensor]:
    *lead, rows, triple = tensors[0].shape
    rows = len(starts) - 1 if last_only else rows
    return [tensors[0].new_empty(*lead, rows, triple // 3)]


def _batched(
    size: int, tensors: list[Tensor], dims: list[int | None], *_: Any
) -> list[Tensor] | None:
    if any(d is not None for d in dims[1:]):  # a bias and a SOS are the same for all groups
        return None
    return [in_front(size, tensors[0], dims[0]), *tensors[1:]]


_RECIPE = Recipe(
    name="prefix_attention",
    schema="int heads, int shared, int[] starts, bool biased, bool last_only, str face",
    run=_called,
    fake=_shaped,
    batched=_batched,
    instead="torch.func.hessian",
)
_operator = define(_RECIPE)


def for_transforms(*arguments: Any) -> AbstractContextManager[object]:
    """Take torch's plain attention in a block where its fused one has no derivative forward."""
    seen = in_transform() or transformed(*arguments)
    return sdpa_kernel(SDPBackend.MATH) if seen else nullcontext()


def _torch(
    qkv: Tensor,
    heads: int,
    shared: int,
    starts: tuple[int, ...],
    bias: Tensor | None,
    sos: Tensor | None,
    last_only: bool,
) -> Tensor:
    """Pad every segment to the longest, behind a copy of the prefix: one batched attention."""
    groups = len(qkv)
    q, k, v = (qkv if bias is None else qkv + bias).chunk(3, dim=-1)
    with outside_transforms():
        at, real = keep(_padding(starts, qkv.device))
    classes, longest = at.shape

    def split(x: Tensor) -> Tensor:  # (..., rows, W) -> (..., H, rows, d)
        parts: Tensor = x.unflatten(-1, (heads, -1)).transpose(-3, -2)
        return parts

    def behind(x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """SOS and prefix alone, and before every segment."""
        lead = x[:, :shared]
        if first is not None:
            lead = torch.cat((first.expand(groups, 1, -1), lead), dim=1)
        own = x[:, shared:][:, at]
        copies = lead[:, None].expand(-1, classes, -1, -1)
        return split(lead), split(torch.cat((copies, own), dim=2))

    k_lead, k_all = behind(k, None if sos is None else sos[0])
    v_lead, v_all = behind(v, None if sos is None else sos[1])
    before = k_lead.shape[-2]
    query = torch.arange(longest, device=qkv.device)
    causal = query[:, None] >= query
    if last_only:
        last = real.sum(-1, keepdim=True) - 1
        q_own = q[:, shared:][:, at.gather(1, last)]
        own_mask = real[:, None]
    else:
        q_own = q[:, shared:][:, at]
        own_mask = real[:, None] & causal
    mask = torch.cat((own_mask.new_ones(*own_mask.shape[:2], before), own_mask), dim=-1)
    mixed = F.scaled_dot_product_attention(split(q_own), k_all, v_all, attn_mask=mask[:, None])
    own: Tensor = mixed.transpose(2, 3).flatten(-2)
    if last_only:
        return own[:, :, 0]
    lead_mask = torch.ones(shared, before, dtype=torch.bool, device=qkv.device)
    lead_mask = lead_mask.tril(before - shared)
    lead = F.scaled_dot_product_attention(split(q[:, :shared]), k_lead, v_lead, attn_mask=lead_mask)
    return torch.cat((lead.transpose(1, 2).flatten(-2), own[:, real]), dim=1)


@functools.lru_cache(maxsize=1024)
def _padding(starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of every place of every segment, filled up with its last: (C, longest); which are real.

    Every segment has a row, so that no place is without a key.
    """
    first = torch.tensor(starts)
    length = first.diff()
    place = torch.arange(int(length.max()))
    at = first[:-1, None] + torch.minimum(place, length[:, None] - 1)
    return at.to(device), (place < length[:, None]).to(device)


class Launchers(NamedTuple):
    """The compiled forward and backward of one face, on contiguous tensors without a graph.

    ``forward(qkv, bias, shared, starts, heads, sos, last_only)`` returns the mixed values,
    ``backward(d_mixed, qkv, bias, shared, starts, heads, sos, last_only)`` the gradient of ``qkv``.
    `fastfpl.ops.text` calls them without autograd between.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


def cpu_launchers() -> Launchers:
    """Return those of the C++ face."""
    return Launchers(_cpu_forward, _cpu_backward)


def triton_launchers() -> Launchers:
    """Return those of the Triton face."""
    from fastfpl.kernels import attention

    return Launchers(attention.prefix_attention_fwd, attention.prefix_attention_bwd)


def _cpu_forward(
    qkv: Tensor,
    bias: Tensor | None,
    shared: int,
    starts: tuple[int, ...],
    heads: int,
    sos: Tensor | None,
    last_only: bool,
) -> Tensor:
    rows = len(starts) - 1 if last_only else qkv.shape[1]
    mixed = qkv.new_empty(qkv.shape[0], rows, qkv.shape[2] // 3)
    native.load("prefix_attention_fwd").prefix_attention_fwd(
        *(qkv, bias, sos, mixed, _host(starts), shared, heads, last_only),
        torch.get_num_threads(),
    )
    return mixed


def _cpu_backward(
    d_mixed: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    shared: int,
    starts: tuple[int, ...],
    heads: int,
    sos: Tensor | None,
    last_only: bool,
) -> Tensor:
    d_qkv = torch.empty_like(qkv)
    native.load("prefix_attention_bwd").prefix_attention_bwd(
        *(d_mixed, qkv, bias, sos, d_qkv, _host(starts), shared, heads, last_only),
        torch.get_num_threads(),
    )
    return d_qkv


@functools.lru_cache(maxsize=1024)
def _host(starts: tuple[int, ...]) -> Tensor:
    return torch.tensor(starts)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        launchers: Launchers,
        heads: int,
        shared: int,
        starts: tuple[int, ...],
        bias: Tensor | None,
        sos: Tensor | None,
        last_only: bool,
    ) -> Tensor:
        given, qkv = qkv, qkv.contiguous()
        bias = None if bias is None else bias.detach().contiguous()
        sos = None if sos is None else sos.detach().contiguous()
        ctx.save_for_backward(given, bias, sos)
        ctx.rest = launchers, shared, starts, heads, last_only
        return launchers.forward(qkv, bias, shared, starts, heads, sos, last_only)

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        given, bias, sos = ctx.saved_tensors
        qkv = given.detach().contiguous()
        launchers, shared, starts, heads, last_only = ctx.rest
        with torch.no_grad(), as_given(qkv.device):
            d_qkv = launchers.backward(
                d_mixed.resolve_neg().contiguous(), qkv, bias, shared, starts, heads, sos, last_only
            )
        return *once(_RECIPE.name, _RECIPE.instead, (d_qkv,), d_mixed, given), *(None,) * 7


def _run(launchers: Callable[[], Launchers], qkv: Tensor, *arguments: Any) -> Tensor:
    mixed: Tensor = _Attention.apply(qkv, launchers(), *arguments)
    return mixed


def against_size(heads: int, width: int) -> list[str]:
    """Say why compiled attention does not take heads of this size."""
    size = width // heads
    return [] if size <= 128 else [f"{size} numbers a head, at most 128"]


def against_wide(heads: int, width: int, dtype: torch.dtype) -> list[str]:
    """Say why the Triton kernels do not take heads of this size in this dtype."""
    size, most = width // heads, {torch.float32: 64, torch.float64: 128}.get(dtype, 80)
    if size <= most:
        return []
    return [f"{size} numbers a head in {dtype}, at most {most}: wider ones leave no registers"]


def against_cpu(name: str, tensor: Tensor) -> list[str]:
    """Say why the C++ faces of the text pass do not take a tensor."""
    reasons = []
    if tensor.device.type != "cpu":
        reasons.append(f"{name} is on {tensor.device}, not on the CPU")
    if tensor.dtype == torch.float16:
        reasons.append(f"{name} is float16, one of bfloat16, float32, float64")
    return reasons


def _against_cpu(qkv: Tensor, heads: int, *_: object) -> list[str]:
    return against_cpu("qkv", qkv) + against_size(heads, qkv.shape[-1] // 3)


def _against_triton(qkv: Tensor, heads: int, *_: object) -> list[str]:
    reasons = launch.against("prefix_attention", qkv=qkv)
    return reasons + against_wide(heads, qkv.shape[-1] // 3, qkv.dtype)


FACES = {
    "prefix_attention": (
        Face(
            "triton",
            functools.partial(_run, triton_launchers),
            launch.missing,
            _against_triton,
        ),
        Face(
            "cpu",
            functools.partial(_run, cpu_launchers),
            functools.partial(native.missing, "prefix_attention_bwd"),
            _against_cpu,
        ),
        Face("torch", _torch),
        Face("reference", reference.prefix_attention),
    )
}
