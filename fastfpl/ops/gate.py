"""Attention gating over prompt experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError
from fastfpl.ops import launch, native
from fastfpl.ops.faces import BY_HAND, Face, choose, face_or_any, forced, in_transform
from fastfpl.ops.functional import (
    Recipe,
    check_graph,
    in_front,
    once,
    spread,
    transformed_call,
)
from fastfpl.ops.operators import define
from fastfpl.ops.precision import as_given, widest, without_autocast
from fastfpl.reference import gate as reference
from fastfpl.reference.gate import Gate
from fastfpl.shapes import check_shapes

__all__ = ["FACES", "Gate", "gate_experts"]


def gate_experts(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    r"""Score images against a mixture of expert text features.

    .. math:: \mathrm{logit}_{bc} = \langle x_b,\ W_o\,[\textstyle\sum_e
              \mathrm{softmax}_e(s\, q_{bh}\cdot k_{ceh})\, v_{ceh}]_h + b_o \rangle

    with q = W_q x + b_q, and k, v the projections of the experts.

    Parameters
    ----------
    image : Tensor, shape (..., B, D), floating point
        Image features.
    experts : Tensor, shape (..., C, E, D), dtype of image
        Text features of E experts for each of C classes; their order does not matter.
    gate : Gate
        Tensors of shape (..., D, D) and (..., D) with the same leading dimensions as the features,
        or none.

    Returns
    -------
    Tensor, shape (..., B, C), dtype of image
        Not multiplied by CLIP's logit scale.

    Raises
    ------
    InputError
        If shapes disagree, the heads do not divide D, or there is no expert.
    KindError
        If the dtypes differ.

    Notes
    -----
    Differentiable in: image, experts, all eight tensors of the gate; once in the triton and cpu
    faces, under ``torch.func`` and ``torch.compile`` too. Forward mode, and ``torch.func.grad`` of
    a gradient, take the torch face; a second derivative by autograd is refused. A bias of keys
    changes no softmax, so the gradient of b_k is zero there, and rounding in the others.
    Deterministic: yes, whatever the number of threads; no atomics on a GPU. Accumulates in float32,
    in float64 for float64. Under autocast dtypes may differ, and everything is computed and
    returned in the widest of them. On a GPU float32 is multiplied exactly, or in TF32 where torch
    is set to allow that. The C++ face takes float32 and float64, the kernels heads of at most 128
    numbers. Memory of the triton and cpu faces: the projections of images and experts, and where a
    gradient is wanted three numbers an image, class and head; no (B, C, D) and no H B C E. The
    torch face keeps H B C E scores and values.
    Source: Luo et al. 2025 (pFedMoAP, ICLR), equations 8 to 10.
    """
    op = "fastfpl.ops.gate_experts"
    # a lazily negated view keeps its sign in a bit that kernels do not see
    own = (gate.w_q, gate.b_q, gate.w_k, gate.b_k, gate.w_v, gate.b_v, gate.w_o, gate.b_o)
    given = [x.resolve_neg() for x in (image, experts, *own)]
    image, experts, *tensors = widest(image.device, *given)
    if torch.compiler.is_compiling():
        check_graph("gate_experts")
        statics = gate.heads, gate.scale, forced("gate_experts") or ""
        return _operator([image, experts, *tensors], *statics)[0]
    gate = replace(gate, **dict(zip(gate.tensor_names(), tensors, strict=True)))  # type: ignore[arg-type]
    sizes = check_shapes(op, image=(image, "... B D"), experts=(experts, "... C E D"))
    for name, tensor in gate.tensors().items():
        check_shapes(
            op, {"D": sizes["D"]}, **{name: (tensor, "... D D" if name[0] == "w" else "... D")}
        )
        if tensor.dtype != image.dtype:
            raise KindError(f"{op}: {name} must be {image.dtype} as image is; got {tensor.dtype}")
        lead = tensor.shape[: -2 if name[0] == "w" else -1]
        if lead and lead != image.shape[:-2]:
            raise InputError(
                f"{op}: {name} must have leading dimensions {tuple(image.shape[:-2])} or none; "
                f"got {tuple(lead)}"
            )
    if experts.dtype != image.dtype:
        raise KindError(f"{op}: experts must be {image.dtype} as image is; got {experts.dtype}")
    if image.shape[:-2] != experts.shape[:-3]:
        raise InputError(
            f"{op}: experts must have the leading dimensions {tuple(image.shape[:-2])} of image; "
            f"got {tuple(experts.shape[:-3])}"
        )
    if gate.heads < 1 or sizes["D"] % gate.heads:
        raise InputError(f"{op}: heads must divide D; got {gate.heads} with D={sizes['D']}")
    if sizes["E"] < 1:
        raise InputError(f"{op}: experts must hold at least one expert; got E=0")
    face = choose("gate_experts", FACES["gate_experts"], image, experts, gate)
    logits: Tensor
    with as_given(image.device):
        if in_transform() and face.name in BY_HAND:
            (logits,) = transformed_call(
                _RECIPE, [image, experts, *tensors], gate.heads, gate.scale, face.name
            )
        else:
            logits = face.run(image, experts, gate)
    return logits


# --- torch.compile and torch.func -----------------------------------------------------------------


def _called(tensors: list[Tensor], heads: int, scale: float, name: str) -> list[Tensor]:
    image, experts, *others = tensors
    with face_or_any(name, "gate_experts"), without_autocast():
        named: dict[str, Any] = dict(zip(Gate.tensor_names(), others, strict=True))
        return [gate_experts(image, experts, Gate(**named, heads=heads, scale=scale))]


def _shaped(tensors: list[Tensor], heads: int, scale: float, name: str) -> list[Tensor]:
    image, experts = tensors[:2]
    return [image.new_empty(*image.shape[:-1], experts.shape[-3])]


def _batched(
    size: int, tensors: list[Tensor], dims: list[int | None], *_: Any
) -> list[Tensor] | None:
    image, experts, *others = (in_front(size, x, d) for x, d in zip(tensors, dims, strict=True))
    lead = image.shape[1:-2]
    own = (1 if name[0] == "b" else 2 for name in Gate.tensor_names())
    # tensors without the other leading dimensions are repeated for them
    others = [
        x if x.dim() > n + 1 or not lead else spread(x, len(lead)).expand(size, *lead, *x.shape[1:])
        for x, n in zip(others, own, strict=True)
    ]
    return [image, experts, *others]


_RECIPE = Recipe(
    name="gate_experts",
    schema="int heads, float scale, str face",
    run=_called,
    fake=_shaped,
    batched=_batched,
    instead="face('torch')",
)
_operator = define(_RECIPE)


def _reassociated(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    """Project images and experts once and contract with W_oᵀ x instead of forming outputs."""
    *lead, classes, count, width = experts.shape

    def bias(b: Tensor) -> Tensor:
        return b.unsqueeze(-2)

    flat = experts.reshape(*lead, classes * count, width)

    def split(x: Tensor) -> Tensor:  # (..., rows, D) -> (..., H, rows, D / H)
        heads: Tensor = x.unflatten(-1, (gate.heads, -1)).transpose(-3, -2)
        return heads

    q = split((image @ gate.w_q.mT + bias(gate.b_q)) * gate.scale)
    k = split(flat @ gate.w_k.mT + bias(gate.b_k))
    v = split(flat @ gate.w_v.mT + bias(gate.b_v))
    z = split(image @ gate.w_o)
    weight = (q @ k.mT).unflatten(-1, (classes, count)).softmax(-1)
    value = (z @ v.mT).unflatten(-1, (classes, count))
    constant = (image @ gate.b_o.unsqueeze(-1)).expand(*lead, -1, classes)
    return torch.einsum("...hbce,...hbce->...bc", weight, value) + constant


_Stats = tuple[Tensor, ...]


class _Fused(NamedTuple):
    """What a face does between the products with weights.

    With qz (U, B, 2, H, d), queries and Wₒᵀ x, and kv (U, C, E, 2, H, d), keys and values without
    their biases:

    forward(qz, kv, scale, wanted) -> logits (U, B, C) and what the backward pass looks up;
    backward(d_logits, qz, kv, stats, scale, of_images, of_experts) -> d_qz and d_kv, None where
    nobody asks for them.
    """

    forward: Callable[[Tensor, Tensor, float, bool], tuple[Tensor, _Stats]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]


class _Gate(torch.autograd.Function):
    """The gate of U clients: products with weights by torch, all between them by `_Fused`.

    A bias of keys adds one number to all scores of a softmax and changes nothing; one of values
    passes through the mean, so that with b_o it is a bias W_o b_v + b_o of the output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fused: _Fused,
        heads: int,
        scale: float,
        image: Tensor,
        experts: Tensor,
        w_q: Tensor,
        b_q: Tensor,
        w_k: Tensor,
        b_k: Tensor,
        w_v: Tensor,
        b_v: Tensor,
        w_o: Tensor,
        b_o: Tensor,
    ) -> Tensor:
        (clients, images, width), (classes, count) = image.shape, experts.shape[1:3]
        rows = experts.reshape(clients, classes * count, width)
        w_qz, w_kv = torch.cat((w_q, w_o.mT), dim=1), torch.cat((w_k, w_v), dim=1)
        qz, kv = image @ w_qz.mT, rows @ w_kv.mT
        qz[..., :width] += b_q[:, None]
        b_out = torch.baddbmm(b_o[..., None], w_o, b_v[..., None])
        wanted = any(ctx.needs_input_grad)
        logits, stats = fused.forward(
            qz.view(clients, images, 2, heads, width // heads),
            kv.view(clients, classes, count, 2, heads, width // heads),
            scale,
            wanted,
        )
        if wanted:
            given = (image, experts, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o)
            ctx.save_for_backward(*given, w_qz, w_kv, qz, kv, b_out, *stats)
            ctx.fused, ctx.heads, ctx.scale, ctx.count = fused, heads, scale, count
        return (logits + image @ b_out).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), as_given(d_logits.device):
            found = _Gate._gradients(ctx, d_logits.resolve_neg())
        return *found[:3], *once(
            _RECIPE.name, _RECIPE.instead, found[3:], d_logits, *ctx.saved_tensors[:10]
        )

    @staticmethod
    def _gradients(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        (image, experts, *_, b_v, w_o, _), rest = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        w_qz, w_kv, qz, kv, b_out, *stats = rest
        rows = experts.flatten(1, 2)
        needs = ctx.needs_input_grad[3:]
        of_image, of_experts, of_w_q, of_b_q, of_w_k, of_b_k, of_w_v, of_b_v, of_w_o, of_b_o = needs
        (clients, images, width), count = image.shape, ctx.count
        classes = rows.shape[1] // count
        d_qz, d_kv = ctx.fused.backward(
            d_logits,
            qz.view(clients, images, 2, ctx.heads, width // ctx.heads),
            kv.view(clients, classes, count, 2, ctx.heads, width // ctx.heads),
            stats,
            ctx.scale,
            of_image or of_w_q or of_b_q or of_w_o,
            of_experts or of_w_k or of_w_v,
        )
        grads: dict[str, Tensor] = {}
        # sums of few numbers over all images and classes: float64 costs nothing here
        by_image = d_logits.sum(dim=-1, keepdim=True, dtype=torch.float64)
        if of_b_v or of_w_o or of_b_o:
            d_b_out = image.mT.double() @ by_image
            grads["b_o"] = d_b_out[..., 0].to(image.dtype)
            grads["b_v"] = (w_o.mT.double() @ d_b_out)[..., 0].to(image.dtype)
        if d_qz is not None:
            d_qz = d_qz.view(clients, images, 2 * width)
            if of_image:
                grads["image"] = torch.baddbmm(by_image.to(image.dtype) * b_out.mT, d_qz, w_qz)
            if of_w_q and of_w_o:
                grads["w_q"], d_z = (d_qz.mT @ image).split(width, dim=1)
                grads["w_o"] = torch.baddbmm(d_z.mT, grads["b_o"][..., None], b_v[:, None])
            elif of_w_q:
                grads["w_q"] = d_qz[..., :width].mT @ image
            elif of_w_o:
                d_z = image.mT @ d_qz[..., width:]
                grads["w_o"] = torch.baddbmm(d_z, grads["b_o"][..., None], b_v[:, None])
            grads["b_q"] = d_qz[..., :width].sum(dim=1)
        if d_kv is not None:
            d_kv = d_kv.view(clients, classes * count, 2 * width)
            if of_experts:
                grads["experts"] = (d_kv @ w_kv).view(clients, classes, count, width)
            if of_w_k or of_w_v:
                grads["w_k"], grads["w_v"] = _over_rows(d_kv, rows).split(width, dim=1)
        if of_b_k:
            grads["b_k"] = torch.zeros_like(b_v)
        names = ("image", "experts", *Gate.tensor_names())
        return (
            *(None, None, None),
            *(grads[name] if needed else None for name, needed in zip(names, needs, strict=True)),
        )


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """Give ``left.mT @ right``, (U, n, K) and (U, n, D) -> (U, K, D), in up to four sums.

    Where a vector has eight numbers the vendor's product adds up all rows in one chain, whose
    error grows with its length: four chains err 2.5 times less at 132 rows and 1.4 times at 1000,
    for 50 µs and for a tenth more of this product's time.
    """
    parts = min(4, left.shape[1] // 32) if left.is_cpu else 1
    if parts < 2:
        return left.mT @ right
    total: Tensor | None = None
    for x, y in zip(left.tensor_split(parts, dim=1), right.tensor_split(parts, dim=1), strict=True):
        total = x.mT @ y if total is None else torch.baddbmm(total, x.mT, y)
    assert total is not None
    return total


def _run(fused: _Fused, image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    """Give every tensor one leading dimension of clients."""
    lead = image.shape[:-2]
    clients = math.prod(lead)
    tensors = [
        # a gate that clients share gets the sum of their gradients through expand
        t.expand(clients, *t.shape) if t.dim() == own else t.reshape(clients, *t.shape[-own:])
        for own, t in ((2 if n[0] == "w" else 1, t) for n, t in gate.tensors().items())
    ]
    logits: Tensor = _Gate.apply(
        fused,
        gate.heads,
        gate.scale,
        image.reshape(clients, *image.shape[-2:]),
        experts.reshape(clients, *experts.shape[-3:]),
        *tensors,
    )
    return logits.reshape(*lead, *logits.shape[1:])


# numbers in a vector of the C++ face, by bytes of a number
_LANES = {4: 16, 8: 8}
# parts that the sum over classes is made of, whatever the number of threads
_PARTS = 16


def _cpu_forward(qz: Tensor, kv: Tensor, scale: float, wanted: bool) -> tuple[Tensor, _Stats]:
    clients, images, _, heads, width = qz.shape
    classes = kv.shape[1]
    padded = -(-images // _LANES[qz.itemsize]) * _LANES[qz.itemsize]
    by_number = qz.new_zeros(clients, 2, heads, width, padded)
    by_number[..., :images] = qz.permute(0, 2, 3, 4, 1)
    logits = qz.new_empty(clients, classes, padded)
    stats = qz.new_empty(clients, classes, heads, 3, padded) if wanted else None
    native.load("gate_fwd").gate_fwd(by_number, kv, logits, stats, scale, torch.get_num_threads())
    return logits[..., :images].mT, () if stats is None else (by_number, stats)


def _cpu_backward(
    d_logits: Tensor,
    qz: Tensor,
    kv: Tensor,
    stats: _Stats,
    scale: float,
    of_images: bool,
    of_experts: bool,
) -> tuple[Tensor | None, Tensor | None]:
    by_number, kept = stats
    clients, images, _, heads, width = qz.shape
    classes, padded = kv.shape[1], by_number.shape[-1]
    by_class = qz.new_zeros(clients, classes, padded)
    by_class[..., :images] = d_logits.mT
    chunks = max(1, min(classes, _PARTS))
    parts = rows = d_kv = None
    if of_images:
        parts = qz.new_zeros(clients, chunks, *by_number.shape[1:])
    if of_experts:
        line = _LANES[qz.itemsize]
        rows = qz.new_zeros(clients, 2, heads, padded, -(-width // line) * line)
        rows[..., :images, :width] = qz.permute(0, 2, 3, 1, 4)
        d_kv = torch.empty_like(kv)
    if of_images or of_experts:
        native.load("gate_bwd").gate_bwd(
            *(by_class, by_number, rows, kv, kept, parts, d_kv, scale),
            *(chunks, torch.get_num_threads()),
        )
    d_qz = None
    if parts is not None:
        d_qz = parts.sum(dim=1)[..., :images].permute(0, 4, 1, 2, 3).contiguous()
    return d_qz, d_kv


def _against_cpu(image: Tensor, experts: Tensor, gate: Gate) -> list[str]:
    reasons = []
    if image.device.type != "cpu":
        reasons.append(f"image is on {image.device}, not on the CPU")
    if image.dtype not in (torch.float32, torch.float64):
        reasons.append(f"image is {image.dtype}, not float32 or float64")
    return reasons


def _triton(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    from fastfpl.kernels.gate import gate_bwd, gate_fwd

    return _run(_Fused(gate_fwd, gate_bwd), image, experts, gate)


def _against_triton(image: Tensor, experts: Tensor, gate: Gate) -> list[str]:
    from fastfpl.kernels.gate import WIDEST

    reasons = launch.against("gate_experts", image=image)
    width = image.shape[-1] // gate.heads
    if width > WIDEST:
        reasons.append(f"heads have {width} numbers, at most {WIDEST}")
    return reasons


FACES = {
    "gate_experts": (
        Face("triton", _triton, launch.missing, _against_triton),
        Face(
            "cpu",
            functools.partial(_run, _Fused(_cpu_forward, _cpu_backward)),
            functools.partial(native.missing, "gate_fwd"),
            _against_cpu,
        ),
        Face("torch", _reassociated),
        Face("reference", reference.gate_experts),
    )
}
