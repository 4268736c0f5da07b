"""Entropic transport of image patches onto prompts: whole problems in registers, one launch.

Every problem is shifted by the middle of its similarities and divided by eps, so that P times its
plan is exp(z + log v) where a row stays below its cap, and that row divided by its sum elsewhere.
log v is kept as a pair of numbers: at eps = .005 it is up to 400, where the last bit of a float32
is 3e-5, and in rows near their cap z and log v cancel.

Loops end by themselves: a problem that is not finite never starts and gives NaN, and no problem
takes more than max_iter passes.
"""

from __future__ import annotations

from fastfpl.kernels.transport_logits import transport_logits_fwd
from fastfpl.kernels.transport_plan import transport_plan_fwd

__all__ = [
    "MOST_ENTRIES_DOUBLE",
    "MOST_ENTRIES_SINGLE",
    "MOST_PATCHES",
    "MOST_PATCHES_DOUBLE",
    "MOST_PROMPTS",
    "transport_logits_fwd",
    "transport_plan_fwd",
]

#: Most patches of an image and prompts of a class: what one program holds in registers.
MOST_PATCHES, MOST_PROMPTS = 1024, 16
#: Of float64 in `transport_logits_fwd`: of more, one step of the product needs 128 KiB.
MOST_PATCHES_DOUBLE = 512
#: Of float64 most entries of a plan, P and N rounded up to powers of two: more leave no registers.
MOST_ENTRIES_DOUBLE = 4096
#: Of float32 in `transport_logits_fwd`, likewise: of more, Hopper's products spill.
MOST_ENTRIES_SINGLE = 8192
