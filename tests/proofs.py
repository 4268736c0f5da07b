"""Proofs of `fastfpl.testing` for the library's own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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

__all__ = [
    "DTYPES",
    "EVERYONE",
    "F32",
    "F64",
    "RELATIVE",
    "SELECTED",
    "assert_near",
    "assert_same_rounds",
    "assert_same_step",
    "first_images",
    "one_thread",
    "whole_rows",
]

DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def one_thread() -> Iterator[None]:
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
