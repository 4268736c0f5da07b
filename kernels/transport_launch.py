"""How transport kernels are launched: dtypes, numbers in two parts, sizes of blocks."""

from __future__ import annotations

import ctypes

import torch
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.launching import power
from fastfpl.kernels.transport_tile import INTERPRETED

__all__ = ["LANGUAGE", "depth_of", "kinds_of", "stored", "two_parts", "warps", "wide_of"]

LANGUAGE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def two_parts(x: float) -> tuple[float, float]:
    """Split a number so that float32 arguments carry it whole; a kernel in float64 needs both."""
    high = ctypes.c_float(x).value
    return high, x - high


def wide_of(*tensors: Tensor) -> torch.dtype:
    """Say in which dtype problems are solved."""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def stored(dtype: torch.dtype) -> torch.dtype:
    """Say in which dtype a kernel stores: the interpreter does not round to bfloat16."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def warps(count: int) -> dict[str, int]:
    """Let threads have all registers; left alone, ptxas spills a few to reach a round number."""
    return {"num_warps": count, "maxnreg": min(255, 2048 // count)}


def kinds_of(patches: Tensor, prompts: Tensor) -> dict[str, object]:
    """Say in which dtypes and precisions the products are formed.

    The exponential of sim / eps magnifies errors: tf32 is never enough for products of float32.
    """
    wide = wide_of(patches, prompts)
    features = torch.promote_types(patches.dtype, prompts.dtype)
    return {
        "ACC": LANGUAGE[wide],
        "DOT": LANGUAGE[features],
        "PRECISION": "ieee" if wide == torch.float64 else "tf32x3",
    }


def depth_of(patches: Tensor, prompts: Tensor, rows: int, width: int) -> int:
    """Say how many of D numbers a step of the product takes.

    A line of the cache from each row; less of many rows, whose addresses would take the registers.
    """
    if patches.device.type == "cpu":
        return max(16, power(width))
    line = 128 // max(patches.element_size(), prompts.element_size())
    return max(16, min(line, (1 << 13) // rows))
