"""A sweep as a table and a plot: methods down, values of the setting across."""

from __future__ import annotations

import io
import math
from dataclasses import replace

from fastfpl.federation import Sweep
from fastfpl.report.facts import subject
from fastfpl.report.matrix import Matrix, matrix_of
from fastfpl.report.plots import DPI, LIGHT, MARKERS, figure_of, matplotlib_defaults, shortened
from fastfpl.report.table import Sheet, matrix_markdown, matrix_table
from fastfpl.report.words import public

__all__ = ["sweep_markdown", "sweep_matrix", "sweep_plot", "sweep_table"]


def sweep_matrix(sweep: Sweep) -> Matrix:
    """Lay the sweep out: methods down, values across."""
    return matrix_of(sweep.key, sweep.comparisons)


def sweep_table(sweep: Sweep) -> Sheet:
    """Lay the sweep out for a terminal."""
    sheet = matrix_table(sweep_matrix(sweep))
    first = next((one for one in sweep.comparisons.values() if one.results), None)
    # data sets differ in more than a title can say
    titled = first is not None and sweep.key != "dataset"
    return replace(sheet, title=subject(first)) if first is not None and titled else sheet


def sweep_markdown(sweep: Sweep) -> str:
    """Write the sweep as a GitHub table."""
    return matrix_markdown(sweep_matrix(sweep))


def sweep_plot(sweep: Sweep) -> bytes:
    """Draw accuracy over the values, one line a method, as a PNG.

    Numbers stand on a logarithmic axis if they are positive and span a factor of eight.
    """
    there = {value: one for value, one in sweep.comparisons.items() if one.results}
    values = list(there)
    rows = [{row["method"]: row for row in one.rows()} for one in there.values()]
    methods = list(dict.fromkeys(method for found in rows for method in found))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    with matplotlib_defaults({}):
        figure = figure_of(4.2, layout="constrained")
        axes = figure.add_subplot()
        places = values if numeric else list(range(len(values)))
        for number, method in enumerate(methods):
            mine = [found.get(method) for found in rows]
            spreads = [0.0 if row is None else row["std_over_seeds"] or 0.0 for row in mine]
            axes.errorbar(
                places,
                [math.nan if row is None else 100 * row["accuracy"] for row in mine],
                [100 * spread for spread in spreads],
                label=shortened(method),
                color=LIGHT.lines[number % len(LIGHT.lines)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if numeric else "none",
                capsize=3,
            )
        if numeric and min(values) > 0 and max(values) >= 8 * min(values):
            axes.set_xscale("log")
        axes.set_xticks(places, [shortened(public(v)) for v in values])
        axes.minorticks_off()
        axes.set_xlabel(sweep.key.replace("_", " "))
        axes.set_ylabel("accuracy %, last round")
        axes.grid(color=LIGHT.grid)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
