"""The harness that compiles ahead of time refuses what it should, and records what is launched."""

from __future__ import annotations

import pytest
import torch

from tests.aot import CARDS, Launch, assert_fits, compiled, faults, record, table

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")
tl = triton.language


@triton.jit
def _double_kernel(out, x, count, shift, scale: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0)
    if shift is not None:
        value += tl.load(shift + at, mask=at < count, other=0.0)
    tl.store(out + at, value * scale, mask=at < count)


@triton.jit
def _outer_kernel(out, x, y, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    both = tl.load(x + rows)[:, None] * tl.load(y + columns)[None, :]
    tall = tl.sum(both, 1)
    wide = tl.sum(both, 0)
    both = both * tall[:, None] + wide[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], both * tl.sum(both, 0)[None, :])


@triton.jit
def _product_kernel(out, x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision="tf32"))


@triton.jit
def _broken_kernel(x, N: tl.constexpr):
    for i in range(N):
        if tl.load(x + i) > 0:
            break


def launches():
    for count in (1008, 1001, 1008):
        x = torch.empty(count, dtype=torch.float16, device="meta")
        _double_kernel[(triton.cdiv(count, 128),)](x, x, count, None, 2.0, BLOCK=128, num_warps=2)


def spilling():
    x = torch.empty(1 << 16, device="meta")
    _outer_kernel[(1,)](x, x, x, 64, 128, num_warps=1)


def oversized():
    x = torch.empty(1 << 16, device="meta")
    _product_kernel[(1,)](x, x, x, 128, num_warps=8)


def broken():
    _broken_kernel[(1,)](torch.empty(64, device="meta"), 64)


def test_distinct_launches_are_recorded_and_not_run():
    x = torch.ones(64)

    def run():
        launches()
        _double_kernel[(1,)](x, x[1:], 1, x, 3.0, BLOCK=32)

    first, second, third = record(run)
    types = [("out", "*fp16"), ("x", "*fp16"), ("count", "i32"), ("shift", "constexpr")]
    types += [("scale", "constexpr"), ("BLOCK", "constexpr")]
    assert first == Launch(
        module=__name__,
        kernel="_double_kernel",
        signature=tuple(types),
        constants=((3, None), (4, 2.0), (5, 128)),
        aligned=(0, 1, 2),
        options=(("num_warps", 2),),
    )
    assert second.aligned == (0, 1)
    assert second.constants == first.constants
    assert third.signature[2] == ("count", "constexpr")
    assert third.constants == ((2, 1), (4, 3.0), (5, 32))
    assert third.aligned == (0, 3)
    assert bool((x == 1).all())


def test_a_good_kernel_fits_every_card():
    reports = assert_fits(launches)
    assert {report.card for report in reports} == set(CARDS)
    assert all(0 < report.registers < 64 for report in reports)
    assert "sm_120" in table(reports)
    assert "_double_kernel[*fp16; scale=2.0, BLOCK=128, num_warps=2]" in table(reports)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (spilling, r"_outer_kernel\[.*\] on sm_90: spills \d+ bytes of registers to memory"),
        (oversized, r"_product_kernel\[.*needs 131072 bytes of shared memory, the card has 101376"),
        (broken, r"_broken_kernel\[.*on sm_80: does not compile: .*break"),
    ],
)
def test_a_planted_misfit_is_refused(run, sentence):
    card = (90,) if run is spilling else (80, 86)
    with pytest.raises(AssertionError, match=sentence):
        assert_fits(run, card)


def test_a_card_with_room_is_not_refused():
    reports = compiled(record(oversized), (86, 90))
    assert [r.card for r in reports if r.shared > CARDS[r.card]] == [86]
    assert len(faults(reports)) == 1


def test_a_grid_beyond_the_cards_is_refused():
    x = torch.empty(64, device="meta")
    with pytest.raises(AssertionError, match="_double_kernel: 65536 programs along axis 1"):
        record(lambda: _double_kernel[(1, 65536)](x, x, 64, None, 1.0, BLOCK=64))


def test_nothing_launched_is_not_taken_for_a_success():
    with pytest.raises(AssertionError, match="nothing was launched"):
        record(lambda: None)
