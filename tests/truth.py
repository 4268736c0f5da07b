"""The judge: what counts as right for every face of every op."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_good_as_eager", "assert_fences_hold", "fenced"]

_GUARD = 64


def assert_as_good_as_eager(
    result: Tensor, eager: Tensor, exact: Tensor, *, name: str = "result"
) -> None:
    """Let a face err at most twice as much as eager PyTorch in the same dtype, in three ways.

    ``exact`` is the float64 reference. Plain rounding is allowed on top: half an ulp of the largest
    value for the largest error, a quarter for the root mean square. The largest error is blind to a
    small error everywhere, the mean to one wrong element in a hundred thousand.

    The third is the bias, <error, exact> / <exact, exact>: a result that is short everywhere by
    less than it is rounded by passes the first two, and misleads an optimiser. Errors of eager's
    size, and the last rounding's, are allowed what they add up to where their signs are random:
    four standard deviations, exceeded once in 16 000; and an ulp of what kernels add up in, float32
    or wider: a factor that all numbers share is rounded once for all of them, and sums are cut off
    where matrix units form them. What has the same sign everywhere is not averaged away, and is
    seen the better the more numbers there are.
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
    mine, theirs, noise = _biases(result.double(), eager.double(), exact, result.dtype)
    shared = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
    limit = 2 * abs(theirs) + 4 * noise + shared
    assert abs(mine) <= limit, (
        f"{name}: bias {mine:.3e}, eager's {theirs:.3e}, limit {limit:.3e} for {exact.numel()} "
        "numbers"
    )


def _biases(
    result: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Return biases of result and eager, and the deviation of one where signs are random."""
    size = exact.abs().max()
    if not size:
        return 0.0, 0.0, 0.0
    exact, off, allowed = (x / size for x in (exact, result - exact, eager - exact))
    square = exact.square().sum()
    kind = torch.finfo(dtype)
    ulp = (exact.abs() * kind.eps).clamp_min(kind.smallest_normal * kind.eps / float(size))
    # an ulp is half to all of eps times the number; a rounding's deviation is the 12th's root of it
    noise = (allowed * exact).norm() + (ulp * exact).norm() / 12**0.5
    found = [(error * exact).sum() / square for error in (off, allowed)]
    return float(found[0]), float(found[1]), float(noise / square)


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
