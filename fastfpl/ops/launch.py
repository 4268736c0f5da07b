"""Whether Triton's kernels can be launched here, and for which tensors; reasons where not."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from fastfpl.ops.faces import forced

__all__ = ["OLDEST", "UNFAITHFUL", "against", "interpreted", "missing", "unproven"]

#: Compute capability below which no kernel is compiled or tested (Ampere).
OLDEST = (8, 0)


#: What the interpreter does otherwise than a GPU: nothing can be proved of it there.
UNFAITHFUL = (
    "tl.dot of bfloat16",
    "rounding of float32 to bfloat16",
    "programs that run at the same time",
)


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing() -> list[str]:
    """Say why no kernel can be launched on this machine; an empty list when one can."""
    if not _installed():
        return ["triton is not installed; pip install triton"]
    if interpreted() or torch.cuda.is_available():
        return []
    return ["torch sees no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"]


def unproven(name: str) -> list[str]:
    """Say what of the faces called ``name`` cannot be checked on this machine."""
    if name == "cpu" or torch.cuda.is_available():
        return []
    if name == "triton" and interpreted():
        return [f"{what}: the interpreter does it otherwise than a GPU" for what in UNFAITHFUL]
    return ["all of it" if name in ("cuda", "triton") else "tensors on a CUDA device"]


def against(op: str, **tensors: Tensor) -> list[str]:
    """Say why the kernels of ``op`` do not take these tensors, by their names in the sentence.

    Tensors on the CPU are taken by the interpreter alone, and only where the face is asked for: it
    is a proof, not an implementation.
    """
    reasons = []
    for name, tensor in tensors.items():
        if tensor.device.type == "cuda":
            have = torch.cuda.get_device_capability(tensor.device)
            if have < OLDEST:
                reasons.append(
                    f"{name} is on {tensor.device} of compute capability {have[0]}.{have[1]}, "
                    f"at least {OLDEST[0]}.{OLDEST[1]}"
                )
        elif tensor.device.type != "cpu":
            reasons.append(f"{name} is on {tensor.device}, not on a CUDA device")
        elif not interpreted():
            reasons.append(f"{name} is on the CPU, not on a CUDA device")
        elif forced(op) != "triton":
            reasons.append(f"{name} is on the CPU: the interpreter runs only by face('triton')")
    return reasons
