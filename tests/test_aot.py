"""The harness that compiles ahead of time refuses what it should, and records what is launched."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests import aot
from tests.aot import (
    CARDS,
    COUNTED,
    MOST_SPILLED,
    PIPELINED,
    SAYS,
    TRIED,
    Launch,
    Report,
    assert_fits,
    compiled,
    digest,
    digests,
    every_pair,
    faults,
    figures,
    multiplied,
    on_units,
    record,
    said,
    table,
    taken,
)

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
def _multiply(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _precise_kernel(out, x, y, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, _multiply(tl.load(x + at), tl.load(y + at), PRECISION))


@triton.jit
def _broken_kernel(x, N: tl.constexpr):
    for i in range(N):
        if tl.load(x + i) > 0:
            break


_SHIFT = tl.constexpr(2)


@triton.jit
def _helper(x):
    return x + _SHIFT


@triton.jit
def _other_helper(x):
    return x - _SHIFT


@triton.jit
def _with_parts_kernel(x, N: tl.constexpr):
    tl.store(x, _helper(tl.load(x)) * N)


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


def test_a_good_kernel_fits_every_card(capsys):
    reports = assert_fits(launches)
    assert "_double_kernel on sm_120: registers" in capsys.readouterr().out
    assert {report.card for report in reports} == set(TRIED)
    assert all(0 < report.registers < 64 for report in reports)
    assert "sm_120" in table(reports)
    assert "_double_kernel[*fp16; scale=2.0, BLOCK=128, num_warps=2]" in table(reports)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (oversized, r"_product_kernel\[.*needs 131072 bytes of shared memory, sm_86 has 101376"),
        (broken, r"_broken_kernel\[.*on sm_80: does not compile: .*break"),
    ],
)
def test_what_cannot_launch_is_refused_with_every_triton(run, sentence, monkeypatch):
    monkeypatch.setattr("tests.aot.figures", dict)  # no version has a row
    with pytest.raises(AssertionError, match=sentence):
        assert_fits(run, (80,))


def test_a_spill_is_bounded_by_the_row_of_its_triton(monkeypatch, capsys):
    (report,) = compiled(record(spilling), (90,))
    bytes_ = report.spilled
    assert bytes_ > 0
    assert report.products == report.copies == 0

    def with_row(spilled: int) -> list[str]:
        row = {"registers": 255, "shared": report.shared, "spilled": spilled}
        return faults([report], {"_outer_kernel": {"sm_90": row}})

    assert with_row(bytes_) == []
    (sentence,) = with_row(bytes_ - 1)
    assert f"on sm_90: spills {bytes_} bytes of registers to memory" in sentence
    assert sentence.endswith(f"its row in compiled.json has {bytes_ - 1}")
    # a version with figures, but none of this kernel's
    assert len(faults([report], {})) == 1
    # a version that nobody tried: figures are said, and nothing is judged by them
    monkeypatch.setattr("tests.aot.compiled", lambda *_: [report])
    monkeypatch.setattr("tests.aot.figures", dict)
    assert_fits(spilling, (90,))
    line = capsys.readouterr().out
    assert line.startswith(SAYS)
    assert f"_outer_kernel on sm_90: registers {report.registers}" in line
    assert f"spilled {bytes_}; it has no row" in line


def test_a_program_with_too_many_registers_is_refused():
    (launch,) = record(spilling)
    wide = replace(launch, options=(("num_warps", 16),))
    assert faults([Report(wide, 90, registers=128, shared=0, spilled=0)]) == []
    (sentence,) = faults([Report(wide, 90, registers=129, shared=0, spilled=0)])
    assert "needs 129 registers for each of 512 threads" in sentence


def test_a_figure_that_left_its_row_is_said():
    (launch,) = record(spilling)
    report = Report(launch, 90, registers=40, shared=0, spilled=0)
    row = {"registers": 40, "shared": 16, "spilled": 0}
    assert said([report], "3.9.0", {"_outer_kernel": {"sm_90": row}}) == []
    (line,) = said([report], "3.9.0", {"_outer_kernel": {"sm_90": row | {"registers": 39}}})
    assert line == (
        f"{SAYS}Triton 3.9.0, _outer_kernel on sm_90: registers 40, shared 0, spilled 0; "
        "its row: registers 39, shared 16, spilled 0"
    )


def precise(dtype: torch.dtype, precision: str = "ieee") -> Launch:
    x = torch.empty(1 << 10, dtype=dtype, device="meta")
    sums = torch.empty(1 << 10, dtype=torch.promote_types(dtype, torch.float32), device="meta")
    (launch,) = record(lambda: _precise_kernel[(1,)](sums, x, x, N=32, PRECISION=precision))
    return launch


def test_what_is_multiplied_is_known_by_its_dtype_or_precision():
    asked = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float64, "ieee")]
    asked += [(torch.float32, precision) for precision in ("ieee", "tf32", "tf32x3")]
    found = [multiplied(precise(*row)) for row in asked]
    assert found == ["fp16", "bf16", "fp64", "ieee", "tf32", "tf32x3"]
    assert multiplied(record(launches)[0]) == ""
    assert [on_units(kind, 80) for kind in found] == [True, True, True, False, True, True]
    assert [on_units("fp64", card) for card in CARDS] == [True, False, False, True, False]


def test_products_beside_the_matrix_units_are_refused_with_every_triton():
    wanted = [precise(torch.float16), precise(torch.float32), precise(torch.float32, "tf32")]
    reports = compiled(wanted, (80, 120))
    assert [report.products > 0 for report in reports] == [True, True, False, False, True, True]
    assert faults(reports) == []
    (sentence,) = faults([replace(reports[0], products=0)])
    assert sentence.endswith("on sm_80: multiplies fp16 without the matrix units")


@pytest.mark.parametrize("name", COUNTED)
def test_a_count_that_leaves_its_row_is_refused(name):
    report = replace(Report(precise(torch.float16), 90, 40, 0, 0), products=8, copies=8)
    row = {"registers": 40, "shared": 0, "spilled": 0, name: {"fp16": [4, 8], "tf32": [1, 1]}}
    rows = {"_precise_kernel": {"sm_90": row}}
    assert faults([report, replace(report, **{name: 4})], rows) == []
    for now in (3, 9):
        (sentence,) = faults([replace(report, **{name: now})], rows)
        assert f"on sm_90: has {now} {COUNTED[name]} where it multiplies fp16" in sentence
        assert sentence.endswith("its row in compiled.json has 4 to 8")
    # of a row without counts, a kind or a version that has none, nothing is known
    del row[name]
    assert faults([replace(report, **{name: 9})], rows) == []


def test_rows_hold_the_fewest_and_the_most_of_what_is_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "FIGURES", tmp_path / "compiled.json")
    monkeypatch.setattr(aot, "LAUNCHES", tmp_path / "launches.json")

    def row() -> dict:
        return figures()["3.8.0"]["_precise_kernel"]["sm_90"]

    def write(dtype: torch.dtype, products: int, precision: str = "ieee") -> None:
        report = Report(precise(dtype, precision), 90, 9, 0, 0, copies=1, products=products)
        aot._write([report], "3.8.0")

    for products in (8, 4, 6):
        write(torch.float16, products)
    write(torch.float32, 2, "tf32")
    assert row()["products"] == {"fp16": [4, 8], "tf32": [2, 2]}
    assert row()["copies"] == {"fp16": [1, 1], "tf32": [1, 1]}
    # a row that was written before this was counted would hold those of some launches only
    plain = {"registers": 10, "shared": 0, "spilled": 0}
    aot._put("3.8.0", {"_precise_kernel": {"sm_90": plain}}, {})
    write(torch.float16, 8)
    assert row() == plain


def test_the_committed_counts_are_those_of_kernels_that_use_their_card():
    seen = set()
    for version, kernels in figures().items():
        for kernel, cards in kernels.items():
            for card, row in cards.items():
                where = version, kernel, card
                assert set(row) & COUNTED.keys() in (set(), set(COUNTED)), where
                for kind, (least, _) in row.get("products", {}).items():
                    assert (least > 0) == on_units(kind, int(card.removeprefix("sm_"))), where
                    seen.add((kernel, kind))
                    if kind in PIPELINED.get(kernel, ()):
                        assert row["copies"][kind][1] > 0, (*where, kind)
    attention = ("bf16", "fp16", "fp64", "tf32", "bf16x6")
    expected = PIPELINED | {"_prefix_attention_fwd_kernel": attention}
    assert {(kernel, kind) for kernel, kinds in expected.items() for kind in kinds} <= seen


def test_no_row_spills_more_than_the_bound():
    rows = figures()
    assert {"3.6.0", "3.7.1", "3.8.0", "3.9.0"} <= set(rows)
    kernels = [set(version) for version in rows.values()]
    assert all(names == kernels[0] for names in kernels), "a version lacks kernels of another"
    for version, names in rows.items():
        for kernel, cards in names.items():
            assert set(cards) == {f"sm_{card}" for card in CARDS}, (version, kernel)
            for card, row in cards.items():
                assert row["spilled"] <= MOST_SPILLED, (version, kernel, card)


def test_a_launch_is_compiled_again_only_where_something_of_it_has_changed(monkeypatch):
    first, second = record(launches)
    assert digest(first) == digest(replace(first, module="tests.test_aot"))
    others = [second, replace(first, options=(("num_warps", 4),)), replace(first, aligned=())]
    assert len({digest(x) for x in (first, *others)}) == 4
    wanted = []
    monkeypatch.setattr("tests.aot.compiled", lambda found, _: wanted.append(list(found)) or [])
    monkeypatch.setattr("tests.aot.SAMPLED", 1 << 70)  # nothing is in the sample
    monkeypatch.setattr("tests.aot.digests", lambda: {triton.__version__: {digest(first)}})
    assert_fits(launches)
    monkeypatch.setattr("tests.aot.digests", lambda: {"0.1": {digest(first), digest(second)}})
    assert_fits(launches)
    assert wanted == [[second], [first, second]]
    monkeypatch.setattr("tests.aot.SAMPLED", 1)  # all is
    monkeypatch.setattr("tests.aot.digests", lambda: {triton.__version__: {digest(first)}})
    assert_fits(launches)
    assert wanted[-1] == [first, second]


def test_the_digest_of_a_launch_holds_what_its_kernel_calls_and_names():
    (launch,) = record(lambda: _with_parts_kernel[(1,)](torch.empty(1, device="meta"), _SHIFT))
    found = [digest(launch)]
    for name, value in (("_SHIFT", tl.constexpr(3)), ("_helper", _other_helper)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.{name}", value)
            found.append(digest(launch))
    assert len(set(found)) == 3
    assert digest(launch) == found[0]


def _named(kernel: str, constant: int) -> Launch:
    return Launch("tests.test_aot", kernel, (("N", "constexpr"),), ((0, constant),), (), ())


def test_rows_hold_the_largest_figures_of_what_is_launched(monkeypatch, tmp_path):
    old = [_named("_double_kernel", n) for n in (16, 32)]
    other, new = _named("_outer_kernel", 16), _named("_double_kernel", 64)
    gone = _named("_product_kernel", 16)
    monkeypatch.setattr(aot, "FIGURES", tmp_path / "compiled.json")
    monkeypatch.setattr(aot, "LAUNCHES", tmp_path / "launches.json")

    def registers() -> dict[str, int]:
        return {name: row["sm_90"]["registers"] for name, row in figures()["3.8.0"].items()}

    aot._write([Report(x, 90, 8 * n, 0, 0) for n, x in enumerate([*old, other, gone], 1)], "3.8.0")
    assert registers() == {"_double_kernel": 16, "_outer_kernel": 24, "_product_kernel": 32}
    # one more: what the others need stands, if it is more
    aot._forget([*old, other, new], "3.8.0")
    assert digests()["3.8.0"] == {digest(x) for x in (*old, other)}
    aot._write([Report(new, 90, 9, 0, 0)], "3.8.0")
    assert registers() == {"_double_kernel": 16, "_outer_kernel": 24}
    assert digests()["3.8.0"] == {digest(x) for x in (*old, other, new)}
    # one is gone, which may have needed most: the rest is compiled again
    aot._forget([old[0], other, new], "3.8.0")
    assert registers() == {"_outer_kernel": 24}
    assert digests()["3.8.0"] == {digest(other)}


def test_any_two_values_of_a_table_stand_in_one_row():
    axes = {"a": (1, 2, 3), "b": ("x", "y", "z"), "c": (False, True), "d": (False, True)}
    rows = every_pair(**axes)
    assert 9 <= len(rows) <= 10
    for one, two in itertools.combinations(axes, 2):
        met = {(row[one], row[two]) for row in rows}
        assert met == set(itertools.product(axes[one], axes[two]))
    assert rows == every_pair(**axes)

    def admitted(row):
        return row["a"] != 3 or row["b"] == "x"

    rows = every_pair(admitted, **axes)
    assert all(map(admitted, rows))
    assert {(row["a"], row["b"]) for row in rows} == {
        (a, b) for a, b in itertools.product(axes["a"], axes["b"]) if a != 3 or b == "x"
    }


def test_a_face_is_asked_wherever_tensors_are():
    sim = torch.empty(2, 1024, 3, device="meta")
    assert taken("transport_plan", sim)
    assert not taken("transport_plan", sim.new_empty(2, 1025, 3))


def test_processes_share_the_launches_and_keep_their_order():
    found = record(launches)
    reports = compiled(found, (86, 89), processes=2)
    assert [(x.launch, x.card) for x in reports] == [(x, card) for x in found for card in (86, 89)]
    # assembled from the other card's code, or compiled for itself
    assert reports[3] == compiled(found[1:], (89,))[0]


def test_every_version_with_figures_has_launches():
    assert set(digests()) == set(figures())
    assert all(len(found) > 100 for found in digests().values())


def test_a_card_with_room_is_not_refused():
    reports = compiled(record(oversized), (80, 90))
    assert [r.shared > CARDS[86] for r in reports] == [True, True]
    assert all(r.products > 0 for r in reports)
    (sentence,) = faults(reports)
    assert "on sm_80: needs 131072 bytes of shared memory, sm_86 has 101376" in sentence


def test_a_grid_beyond_the_cards_is_refused():
    x = torch.empty(64, device="meta")
    with pytest.raises(AssertionError, match="_double_kernel: 65536 programs along axis 1"):
        record(lambda: _double_kernel[(1, 65536)](x, x, 64, None, 1.0, BLOCK=64))


def test_nothing_launched_is_not_taken_for_a_success():
    with pytest.raises(AssertionError, match="nothing was launched"):
        record(lambda: None)
