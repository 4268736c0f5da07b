"""The judge: what counts as right for every face of every op."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_good_as_eager", "assert_fences_hold", "fenced"]

_GUARD = 64


def assert_as_good_as_eager(
    result: Tensor, eager: Tensor, exact: Tensor, *, name: str = "result"
) -> None:
    """Let a face err at most twice as much as eager PyTorch in the same dtype, in two norms.

    ``exact`` is the float64 reference. Plain rounding is allowed on top: half an ulp of the largest
    value for the largest error, a quarter for the root mean square. The largest error is blind to a
    small bias everywhere, the mean to one wrong element in a hundred thousand; together they see
    both.
    """
    assert exact.dtype == torch.float64, f"{name}: the truth must be float64; got {exact.dtype}"
    assert result.shape == exact.shape, (
        f"{name}: shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    )
    assert result.dtype == eager.dtype, f"{name}: dtype {result.dtype}, not {eager.dtype}"
    assert bool(result.isfinite().all()), f"{name}: {int((~result.isfinite()).sum())} not finite"
    if not exact.numel():
        return
    off = (result.double() - exact).abs()
    allowed = (eager.double() - exact).abs()
    _, exponent = torch.frexp(exact.abs().max())
    ulp = torch.finfo(result.dtype).eps * 2.0 ** (float(exponent) - 1)
    worst = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    where = f"worst at {worst}: {float(result[worst])!r}, not {float(exact[worst])!r}"
    for norm, mine, theirs, rounding in (
        ("largest", off.max(), allowed.max(), ulp / 2),
        ("rms", off.square().mean().sqrt(), allowed.square().mean().sqrt(), ulp / 4),
    ):
        limit = 2 * float(theirs) + rounding
        assert float(mine) <= limit, (
            f"{name}: {norm} error {float(mine):.3e}, eager's {float(theirs):.3e}, "
            f"limit {limit:.3e}; {where}"
        )


def fenced(tensor: Tensor) -> Tensor:
    """Return the same values, contiguous, in the middle of a buffer of NaN.

    A kernel that reads beyond its input then computes NaN; one that writes beyond its output is
    seen by `assert_fences_hold`. Integers are fenced with their largest value.
    """
    wall = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    buffer = torch.full(
        (tensor.numel() + 2 * _GUARD,), wall, dtype=tensor.dtype, device=tensor.device
    )
    inside = buffer[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor.detach())


def assert_fences_hold(tensor: Tensor) -> None:
    """Check that nothing was written round a tensor made by `fenced`."""
    buffer = tensor._base
    assert buffer is not None, "not a fenced tensor"
    walls = torch.cat([buffer[:_GUARD], buffer[_GUARD + tensor.numel() :]])
    if buffer.dtype.is_floating_point:
        intact = walls.isnan()
    else:
        intact = walls == torch.iinfo(buffer.dtype).max
    assert bool(intact.all()), f"{int((~intact).sum())} cells of the fence were overwritten"
