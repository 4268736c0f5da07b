"""Proofs of a method: that it keeps the contract, and that it is what its literal reference says.

`check_method` needs nothing but the class. `World` is a small task that both the library's
federation and a reference play; `assert_same_rounds` and `assert_same_step` compare the two.
"""

from __future__ import annotations

from fastfpl.testing.contract import check_method
from fastfpl.testing.proofs import (
    EVERYONE,
    F32,
    F64,
    RELATIVE,
    SELECTED,
    assert_near,
    assert_same_rounds,
    assert_same_step,
    first_images,
    whole_rows,
)
from fastfpl.testing.worlds import World, batch_of, batches_of, drawn

__all__ = [
    "EVERYONE",
    "F32",
    "F64",
    "RELATIVE",
    "SELECTED",
    "World",
    "assert_near",
    "assert_same_rounds",
    "assert_same_step",
    "batch_of",
    "batches_of",
    "check_method",
    "drawn",
    "first_images",
    "whole_rows",
]
