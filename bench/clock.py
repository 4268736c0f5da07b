"""How a bench measures: a clock that waits for the device, and a check before any time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["checked", "synced"]


def synced() -> float:
    """Seconds, read after the device has finished what was asked of it before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def checked(
    benchmark: Any,
    run: Callable[[], Tensor],
    exact: Tensor,
    limit: float,
    rounds: int | None = None,
    **row: Any,
) -> Tensor:
    """Time ``run`` only if its result is right, and put the error beside the time.

    Parameters
    ----------
    benchmark
        pytest-benchmark's fixture.
    run : callable
        Returns the result that is judged, and is then timed.
    exact : Tensor
        The float64 truth.
    limit : float
        The largest relative error, by the largest value of ``exact``, with which a time is given.
    rounds : int, optional
        So many rounds of one call each instead of as many as the plugin wants: for what takes
        seconds.
    **row
        What the row is about: sizes by letter, dtype, face, direction.
    """
    result = run()
    assert result.shape == exact.shape, f"not timed: shape {result.shape}, not {exact.shape}"
    error = float((result.double() - exact).abs().max() / exact.abs().max())
    assert error <= limit, f"not timed: relative error {error:.2e}, at most {limit:.0e}"
    benchmark.extra_info |= row | {"relative_error": error, "limit": limit}
    benchmark.group = " ".join(f"{k}={v}" for k, v in row.items() if k != "face")
    result = benchmark.pedantic(run, rounds=rounds) if rounds else benchmark(run)
    again = float((result.double() - exact).abs().max() / exact.abs().max())
    assert again <= limit, f"wrong after timing: relative error {again:.2e}, at most {limit:.0e}"
    return result
