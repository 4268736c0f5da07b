"""Whether float32 products may run on the matrix units in TF32, as torch is set."""

from __future__ import annotations

import torch

__all__ = ["allows_tf32"]


def allows_tf32() -> bool:
    """Return what cuBLAS' products go by, whichever of torch's switches was used to say it.

    ``torch.get_float32_matmul_precision`` and ``allow_tf32`` raise where TF32 was allowed through
    ``fp32_precision``; that one can be read after all of them.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
