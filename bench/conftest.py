"""Beneath pytest-benchmark's table: what its columns leave out, and ratios within each group."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if b.stats.rounds]
    if not rows:
        return
    terminalreporter.section("error and cost beside each time")
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(row.group or row.name, []).append(row)
    for group, members in groups.items():
        terminalreporter.write_line(group)
        slowest = max(row.stats.median for row in members)
        for row in sorted(members, key=lambda r: r.stats.median):
            facts = {k: v for k, v in row.extra_info.items() if k in SHOWN and v is not None}
            shown = "  ".join(f"{SHOWN[k][0]} {SHOWN[k][1](v)}" for k, v in facts.items())
            noisy = "  (IQR above a tenth of the median)" if _noisy(row) else ""
            terminalreporter.write_line(
                f"  {row.extra_info.get('face', row.name):<14} {1e3 * row.stats.median:10.3f} ms "
                f"± {1e3 * row.stats.iqr:.2g}  {slowest / row.stats.median:6.1f}x  {shown}{noisy}"
            )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _mib(value: float) -> str:
    return f"{value / 2**20:.3g} MiB"


#: What a row shows beside its time: its word, and how the number is written.
SHOWN = {
    "relative_error": ("error", _short),
    "tokens": ("tokens", _short),
    "gflop": ("GFLOP", _short),
    "gflop_per_s": ("GFLOP/s", _short),
    "gemm_gflops": ("GEMM rate GFLOP/s", _short),
    "share_of_gemm": ("share of it", _short),
    "moved_bytes": ("moves", _mib),
    "gb_per_s": ("GB/s", _short),
    "peak_bytes": ("peak", _mib),
    "images_per_s": ("images/s", _short),
}


def _noisy(row: Any) -> bool:
    return row.stats.rounds > 3 and row.stats.iqr > 0.1 * row.stats.median
