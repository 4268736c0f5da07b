"""Attention gating over prompt experts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfpl.errors import InputError, KindError
from fastfpl.ops.faces import Face, choose
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
    Differentiable in: image, experts, all eight tensors of the gate. Deterministic: yes on CPU.
    Accumulates in the dtype of the inputs, float32 inside 16-bit matrix products.
    Memory of the fast face: H B C E scores, no (B, C, D).
    Source: Luo et al. 2025 (pFedMoAP, ICLR), equations 8 to 10.
    """
    op = "fastfpl.ops.gate_experts"
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
    logits: Tensor = choose("gate_experts", FACES["gate_experts"], image, experts, gate).run(
        image, experts, gate
    )
    return logits


def _gate_reassociated(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
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


FACES = {
    "gate_experts": (
        Face("torch", _gate_reassociated),
        Face("reference", reference.gate_experts),
    )
}
