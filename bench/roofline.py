"""Draw rows of a benchmark's JSON under the ceilings that were measured beside them.

python -m bench.roofline bench/results/text-....json --out roofline.svg [--op encode_text]
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import click

from fastfpl.errors import FastfplError, InputError, Missing
from fastfpl.files import write_whole

NEEDED = ("gflop", "moved_bytes", "gflop_per_s", "gemm_gflops", "copy_gb_per_s")


def rows_of(path: Path, op: str | None) -> list[dict[str, Any]]:
    """Read the rows that say what they moved and computed, and the ceilings beside them."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        facts = [row["extra_info"] for row in rows]
    except FileNotFoundError:
        raise Missing(f"roofline: {path} must be a file that --benchmark-json wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"roofline: {path} must be what --benchmark-json writes; got {type(error).__name__}"
        ) from None
    drawn = [f for f in facts if all(k in f for k in NEEDED) and op in (None, f.get("op"))]
    if not drawn:
        ops = sorted({str(f.get("op")) for f in facts})
        raise InputError(f"roofline: {path} holds no row with operations and bytes; ops {ops}")
    return drawn


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Plot rate over intensity, a mark a face, below the copy and the GEMM ceilings."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    x = [row["gflop"] / (1e-9 * row["moved_bytes"]) for row in rows]
    copy = max(row["copy_gb_per_s"] for row in rows)
    dtypes = sorted({str(row["dtype"]) for row in rows})
    peaks = {d: max(r["gemm_gflops"] for r in rows if r["dtype"] == d) for d in dtypes}
    low = min(*x, min(peaks.values()) / copy) / 2
    high = max(*x, max(peaks.values()) / copy) * 2
    for (dtype, peak), line in zip(peaks.items(), ("-", "--", ":", "-."), strict=False):
        ridge = peak / copy
        axes.plot([low, ridge, high], [low * copy, peak, peak], line, color="black", linewidth=1)
        label = f"matrix product in {dtype}: {peak:.0f} GFLOP/s"
        axes.annotate(label, (high, peak), ha="right", va="bottom")
    axes.annotate(f"copy {copy:.0f} GB/s", (low, low * copy), va="bottom")
    kinds = sorted({(str(row["dtype"]), str(row["face"])) for row in rows})
    for (dtype, face), mark in zip(kinds, itertools.cycle("osD^vP*Xhd<>"), strict=False):
        mine = [
            (a, row["gflop_per_s"])
            for a, row in zip(x, rows, strict=True)
            if (row["dtype"], row["face"]) == (dtype, face)
        ]
        axes.scatter(*zip(*mine, strict=True), marker=mark, label=f"{face}, {dtype}", s=36)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move (FLOP/B)")
    axes.set(ylabel="GFLOP/s", title=rows[0]["machine"]["processor"])
    axes.legend(fontsize="small")
    axes.grid(which="both", alpha=0.2)
    kind = out.suffix.lstrip(".") or "png"
    write_whole(out, lambda part: figure.savefig(part, format=kind))
    plt.close(figure)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--op", default=None, help="only the rows of this op")
def main(path: Path, out: Path, op: str | None) -> None:
    """Draw the rows of PATH under the ceilings measured beside them."""
    try:
        draw(rows_of(path, op), out)
    except FastfplError as error:
        raise click.UsageError(str(error)) from None


if __name__ == "__main__":
    main()
