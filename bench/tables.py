"""Write a benchmark's JSON as tables: ``python -m bench.tables RESULTS.json... --into PAGE``.

Replaces what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` in the page, where NAME is
a file's name without its ending; ``--out PAGE`` writes a page that holds nothing else. Without both
the tables are printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastfpl.errors import FastfplError, InputError, Missing
from fastfpl.files import write_text

# what some rows have: title, name of the fact, factor
MORE = (
    ("s a client", "seconds_per_client", 1.0),
    ("images/s", "images_per_s", 1.0),
    ("error", "relative_error", 1.0),
    ("GFLOP/s", "gflop_per_s", 1.0),
    ("of GEMM", "share_of_gemm", 1.0),
    ("device busy", "busy", 1.0),
    ("tensors MiB", "tensors_bytes", 2**-20),
    ("peak MiB", "peak_bytes", 2**-20),
    ("kB up", "bytes_up", 1e-3),
    ("kB down", "bytes_down", 1e-3),
)
#: An interquartile range above this share of the median makes a row one not to quote.
NOISY = 0.1


def table(path: Path) -> str:
    """Write the rows of one file, a table a group of equal sizes."""
    try:
        shown = json.loads(path.read_text(encoding="utf-8"))
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in shown["benchmarks"]:
            groups.setdefault(row["group"] or row["name"], []).append(row)
        machine = shown["machine_info"]["fastfpl"]
        commit = shown["commit_info"]
    except FileNotFoundError:
        raise Missing(f"tables: {path} must be a file that --benchmark-json wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"tables: {path} must be what --benchmark-json writes; got {type(error).__name__}"
        ) from None
    place = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    dirty = " with changes" if commit["dirty"] else ""
    lines = [f"{place}; torch {machine['torch']}, commit {commit['id'][:7]}{dirty}."]
    for name, rows in groups.items():
        more = [one for one in MORE if any(row["extra_info"].get(one[1]) for row in rows)]
        heads = ["way", "median ms", "IQR", "times the slowest", *(title for title, _, _ in more)]
        lines += ["", f"`{name}`", "", _cells(heads), "|" + "---|" * len(heads)]
        slowest = max(_work(row) for row in rows)
        lines += [_line(row, slowest, more) for row in sorted(rows, key=_work)]
    return "\n".join(lines)


def _work(row: dict[str, Any]) -> float:
    """Seconds for the same work: of a client where rows are of several."""
    median: float = row["stats"]["median"]
    return float(row["extra_info"].get("seconds_per_client") or median)


def _cells(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _line(row: dict[str, Any], slowest: float, more: Sequence[tuple[str, str, float]]) -> str:
    stats, facts = row["stats"], row["extra_info"]
    median, iqr = stats["median"], stats["iqr"]

    def number(name: str, by: float) -> str:
        value = facts.get(name)
        return "" if value is None else f"{by * value:.3g}"

    noisy = " (noisy)" if stats["rounds"] > 3 and iqr > NOISY * median else ""
    cells = (
        f"{facts.get('face', row['name'])}{noisy}",
        f"{1e3 * median:.4g}",
        f"{1e3 * iqr:.2g}" if stats["rounds"] > 1 else "one call",
        f"{slowest / _work(row):.1f}",
        *(number(name, by) for _, name, by in more),
    )
    return _cells(cells)


def insert(page: str, name: str, text: str) -> str:
    """Replace one marked part of a page."""
    marked = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marked.search(page):
        raise InputError(f"tables: the page must hold <!-- table {name} --> ... <!-- end -->")
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


@click.command()
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--into", type=click.Path(path_type=Path, exists=True), default=None)
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(paths: tuple[Path, ...], into: Path | None, out: Path | None) -> None:
    """Print the tables of PATHS, or put them into a page."""
    try:
        tables = {path.stem: table(path) for path in paths}
        if out is not None:
            parts = (
                f"## {n}\n\n<!-- table {n} -->\n{t}\n<!-- end -->\n" for n, t in tables.items()
            )
            write_text(out, "\n".join(parts))
        if into is None:
            if out is None:
                click.echo("\n\n".join(tables.values()))
            return
        page = into.read_text(encoding="utf-8")
        for name, text in tables.items():
            page = insert(page, name, text)
        write_text(into, page)
    except FastfplError as error:
        raise click.UsageError(str(error)) from None


if __name__ == "__main__":
    main()
