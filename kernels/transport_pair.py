"""Transport of one or two prompts: a root in two scalars, as csrc/transport_pair.h finds it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastfpl.kernels.rounding import quotient

__all__ = ["plan_of_pair", "plus", "solve_pair"]


@triton.jit
def plus(high, low, x):
    """(high + low) + x; what the sum of high and x rounds away goes into the low part."""
    total = high + x
    back = total - high
    low += (high - (total - back)) + (x - back)
    result = total + low
    return result, low - (result - total)


@triton.jit
def _inside(x, x_low, a, a_low, b, b_low):
    """X where it lies between a and b, else the middle; also where x is NaN or infinite."""
    within = ((x - a) + (x_low - a_low) > 0) & ((b - x) + (b_low - x_low) > 0)
    middle, middle_low = plus(a, a_low, ((b - a) + (b_low - a_low)) * 0.5)
    return tl.where(within, x, middle), tl.where(within, x_low, middle_low)


@triton.jit
def _row(z1, z2, g1, g1_low, g2, g2_low, N: tl.constexpr, BALANCED: tl.constexpr):
    """Entries of a row and their sum, both divided by the same number unless the sum is below 1."""
    t1 = (z1 + g1) + g1_low
    if N == 2:
        t2 = (z2 + g2) + g2_low
        high = tl.maximum(t1, t2)
    else:
        t2 = t1
        high = t1
    if not BALANCED:
        high = tl.maximum(high, 0.0)
    e1 = tl.exp(t1 - high)
    if N == 2:
        e2 = tl.exp(t2 - high)
        return e1, e2, e1 + e2
    else:
        return e1, e1, e1


@triton.jit
def _sums(
    z1,
    z2,
    valid,
    g1,
    g1_low,
    g2,
    g2_low,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Columns of P T; those of the rows below their cap; the product of both in the capped rows."""
    e1, e2, total = _row(
        z1,
        z2,
        tl.expand_dims(g1, AXIS),
        tl.expand_dims(g1_low, AXIS),
        tl.expand_dims(g2, AXIS),
        tl.expand_dims(g2_low, AXIS),
        N,
        BALANCED,
    )
    capped = total >= 1
    u = tl.where(valid, 1 / tl.where(capped, total, 1.0), 0.0)
    t1 = e1 * u
    first = tl.sum(t1, AXIS)
    free1 = tl.sum(tl.where(capped, 0.0, t1), AXIS)
    if N == 2:
        t2 = e2 * u
        second = tl.sum(t2, AXIS)
        free2 = tl.sum(tl.where(capped, 0.0, t2), AXIS)
        mixed = tl.sum(tl.where(capped, t1 * t2, 0.0), AXIS)
    else:
        second = tl.zeros_like(first)
        free2 = second
        mixed = second
    return first, second, free1, free2, mixed


@triton.jit
def solve_pair(
    z1,
    z2,
    valid,
    running,
    mass,
    tol,
    max_iter,
    P: tl.constexpr,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Find log v = level ± share/2 as csrc/transport_pair.h does, for all problems of a tile.

    The total of the plan rises with level and, along the levels that give the right total, the
    first column rises with share: Newton steps on the logarithms of total and column ratio, each in
    a bracket that always holds the root. A problem that has ended waits for the others of its tile.
    """
    big = float("inf")
    low = tl.min(tl.where(valid, z1, big), AXIS)
    high = tl.max(tl.where(valid, z1, -big), AXIS)
    zero = tl.zeros_like(low)
    share = zero
    share_low = zero
    if N == 2:
        low = tl.minimum(low, tl.min(tl.where(valid, z2, big), AXIS))
        high = tl.maximum(high, tl.max(tl.where(valid, z2, -big), AXIS))
        gap = z1 - z2
        # at the lower end every row prefers the second column, at the upper end the first
        left = -tl.max(tl.where(valid, gap, -big), AXIS)
        right = -tl.min(tl.where(valid, gap, big), AXIS)
        mean = tl.sum(tl.where(valid, gap, 0.0), AXIS) / P
        share, share_low = _inside(-mean, zero, left, zero, right, zero)
        tilt = tl.expand_dims(share, AXIS) * 0.5
        z = tl.where(valid, tl.maximum(z1 + tilt, z2 - tilt), 0.0)
    else:
        left = zero
        right = zero
        z = tl.where(valid, z1, 0.0)
    left_low = zero
    right_low = zero

    target = mass * P
    level = zero
    level_low = zero
    # at the lower end every row is below mass / P, at the upper end every row is capped
    bottom = tl.log(mass * 0.5) - high
    low_end = bottom - tl.abs(share) * 0.5
    low_end_low = zero
    high_end = tl.abs(share) * 0.5 - low
    high_end_low = zero
    if BALANCED:
        target = zero + P
    else:
        # about where a normal distribution leaves mass above: logit / 1.7 is within .02 of probit
        mean = tl.sum(z, AXIS) / P
        deviation = tl.sqrt(tl.maximum(tl.sum(z * z, AXIS) / P - mean * mean, 0.0))
        spread = (tl.log(mass) - tl.log(tl.maximum(1 - mass, 1e-30))) / 1.702
        level, level_low = _inside(
            tl.log(mass * 0.5) - mean + spread * deviation, zero, low_end, zero, high_end, zero
        )
    column = target / N

    best = zero + big
    best_level = level
    best_level_low = level_low
    best_share = share
    best_share_low = share_low
    best_first = zero
    best_second = zero
    passes = running.to(tl.int32) * 0
    polishing = running & (zero > 0)
    while tl.max(running.to(tl.int32), 0) > 0:
        g1, g1_low = plus(level, level_low + share_low * 0.5, share * 0.5)
        g2, g2_low = plus(level, level_low - share_low * 0.5, share * -0.5)
        first, second, free1, free2, mixed = _sums(
            z1, z2, valid, g1, g1_low, g2, g2_low, N, BALANCED, AXIS
        )
        passes += running.to(tl.int32)
        total = first + second
        miss = tl.abs(tl.log(column / first))
        share_gap = zero
        level_gap = zero
        if N == 2:
            miss = tl.maximum(miss, tl.abs(tl.log(column / second)))
            share_gap = tl.log(second / first)
        if not BALANCED:
            level_gap = tl.log(target / total)
        better = running & (miss <= best)
        best = tl.where(better, miss, best)
        best_level = tl.where(better, level, best_level)
        best_level_low = tl.where(better, level_low, best_level_low)
        best_share = tl.where(better, share, best_share)
        best_share_low = tl.where(better, share_low, best_share_low)
        best_first = tl.where(better, first, best_first)
        best_second = tl.where(better, second, best_second)
        running = running & (polishing == 0) & (passes < max_iter) & (miss > tol / 32)
        # one more step: Newton's last is worth all before it
        polishing = miss <= tol

        free = free1 + free2
        newton = level_gap * total / free  # infinite where every row is capped
        enough = tl.maximum(tol / 8, 0.1 * tl.minimum(tl.abs(share_gap), 1.0))
        rising = running & (tl.abs(level_gap) > enough)
        if N == 2:
            rising = rising & (polishing == 0)
        low_end = tl.where(rising & (level_gap > 0), level, low_end)
        low_end_low = tl.where(rising & (level_gap > 0), level_low, low_end_low)
        high_end = tl.where(rising & (level_gap <= 0), level, high_end)
        high_end_low = tl.where(rising & (level_gap <= 0), level_low, high_end_low)
        new, new_low = plus(level, level_low, newton)
        new, new_low = _inside(new, new_low, low_end, low_end_low, high_end, high_end_low)
        rising = rising & ((new - level) + (new_low - level_low) != 0)
        # otherwise the total is so near that it cannot change the sign of share_gap
        sharing = running & (rising == 0)
        if N == 2:
            left = tl.where(sharing & (share_gap > 0), share, left)
            left_low = tl.where(sharing & (share_gap > 0), share_low, left_low)
            right = tl.where(sharing & (share_gap <= 0), share, right)
            right_low = tl.where(sharing & (share_gap <= 0), share_low, right_low)
            slope = tl.where(free > 0, free1 * free2 / free, 0.0) + mixed
            step = share_gap * first * second / (total * slope)
            turned, turned_low = plus(share, share_low, step)
            turned, turned_low = _inside(turned, turned_low, left, left_low, right, right_low)
            step = (turned - share) + (turned_low - share_low)
            stuck = sharing & (step == 0) & (polishing == 0)
            running = running & (stuck == 0)
            sharing = sharing & (stuck == 0)
            share = tl.where(sharing, turned, share)
            share_low = tl.where(sharing, turned_low, share_low)
            if not BALANCED:
                follow = newton - (free1 - free2) / (2 * free) * step
                near, near_low = plus(level, level_low, tl.where(free > 0, follow, 0.0))
                half = tl.abs(share) * 0.5
                low_end = tl.where(sharing, bottom - half, low_end)
                low_end_low = tl.where(sharing, zero, low_end_low)
                high_end = tl.where(sharing, half - low, high_end)
                high_end_low = tl.where(sharing, zero, high_end_low)
                near, near_low = _inside(
                    near, near_low, low_end, low_end_low, high_end, high_end_low
                )
                level = tl.where(sharing, near, level)
                level_low = tl.where(sharing, near_low, level_low)
        else:
            running = running & (sharing == 0)
        if not BALANCED:
            level = tl.where(rising, new, level)
            level_low = tl.where(rising, new_low, level_low)

    g1, g1_low = plus(best_level, best_level_low + best_share_low * 0.5, best_share * 0.5)
    g2, g2_low = plus(best_level, best_level_low - best_share_low * 0.5, best_share * -0.5)
    v1 = quotient(mass * (1.0 / N), best_first)  # 1 / N is exact
    v2 = v1
    if N == 2:
        v2 = quotient(mass * (1.0 / N), best_second)
    return g1, g1_low, g2, g2_low, v1, v2, best, passes


@triton.jit
def plan_of_pair(
    z1,
    z2,
    g1,
    g1_low,
    g2,
    g2_low,
    v1,
    v2,
    N: tl.constexpr,
    BALANCED: tl.constexpr,
    AXIS: tl.constexpr,
):
    e1, e2, total = _row(
        z1,
        z2,
        tl.expand_dims(g1, AXIS),
        tl.expand_dims(g1_low, AXIS),
        tl.expand_dims(g2, AXIS),
        tl.expand_dims(g2_low, AXIS),
        N,
        BALANCED,
    )
    u = 1 / tl.maximum(total, 1.0)
    return e1 * u * tl.expand_dims(v1, AXIS), e2 * u * tl.expand_dims(v2, AXIS)
