"""pFedMoAP's attention gate over expert text features, literally."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Gate", "gate_experts"]


@dataclass(frozen=True, eq=False)
class Gate:
    """Parameters of a multi-head attention whose queries are images and whose keys are experts.

    Parameters
    ----------
    w_q, w_k, w_v, w_o : Tensor, shape (..., D, D)
        Projections of queries, keys, values and output, as ``torch.nn.Linear`` lays them out.
    b_q, b_k, b_v, b_o : Tensor, shape (..., D)
    heads : int
        H; divides D.
    scale : float
        Multiplies the scores before the softmax (10 in pFedMoAP, in place of 1/sqrt(D/H)).
    """

    w_q: Tensor
    b_q: Tensor
    w_k: Tensor
    b_k: Tensor
    w_v: Tensor
    b_v: Tensor
    w_o: Tensor
    b_o: Tensor
    heads: int
    scale: float

    @classmethod
    def init(
        cls,
        D: int,
        heads: int,
        scale: float,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Gate:
        """Draw all tensors from U(-1/sqrt(D), 1/sqrt(D)), the default of ``torch.nn.Linear``."""
        bound = D**-0.5

        def draw(*shape: int) -> Tensor:
            uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
            scaled: Tensor = (2 * uniform - 1) * bound
            return scaled.to(device=device, dtype=dtype)

        tensors = {
            name: draw(D, D) if name.startswith("w_") else draw(D) for name in cls.tensor_names()
        }
        return cls(**tensors, heads=heads, scale=scale)

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """Return the names of the eight tensors in their order."""
        return tuple(f.name for f in fields(cls) if f.name[1] == "_")

    def tensors(self) -> dict[str, Tensor]:
        """Return the eight tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_names()}


def gate_experts(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    """Mixture logits, one client after another: (..., B, D), (..., C, E, D) -> (..., B, C)."""
    lead = image.shape[:-2]
    if not lead:
        return _gate_one(image, experts, gate)
    parts = []
    for i in range(lead[0]):
        tensors = {
            name: t[i] if t.dim() > (2 if name[0] == "w" else 1) else t
            for name, t in gate.tensors().items()
        }
        one = replace(gate, **tensors)  # type: ignore[arg-type]  # tensors by name
        parts.append(gate_experts(image[i], experts[i], one))
    if not parts:
        return image.new_zeros(*image.shape[:-1], experts.shape[-3])
    return torch.stack(parts)


def _gate_one(image: Tensor, experts: Tensor, gate: Gate) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (gate.heads, -1))
        return split

    q = heads(F.linear(image, gate.w_q, gate.b_q))
    k = heads(F.linear(experts, gate.w_k, gate.b_k))
    v = heads(F.linear(experts, gate.w_v, gate.b_v))
    score = gate.scale * torch.einsum("bhk,cehk->cbhe", q, k)
    mixed = torch.einsum("cbhe,cehk->cbhk", score.softmax(-1), v).flatten(-2)
    out = F.linear(mixed, gate.w_o, gate.b_o)
    return torch.einsum("bd,cbd->bc", image, out)
