"""A sweep as a table and a plot: methods down, values of the setting across."""

from __future__ import annotations

import io
import math

from fastfpl.federation import Sweep
from fastfpl.report.facts import released, subject
from fastfpl.report.plots import DPI, LIGHT, MARKERS, figure_of, matplotlib_defaults, shortened
from fastfpl.report.table import Sheet, escaped, markdown_line
from fastfpl.report.words import NONE, count, percent, public

__all__ = ["sweep_cells", "sweep_markdown", "sweep_plot", "sweep_table"]


def sweep_cells(sweep: Sweep) -> list[list[str]]:
    """Texts of the table: one heading line, then a line a method.

    Accuracies in per cent, with the standard deviation over seeds where there are several. A sweep
    over target domains ends with their unweighted mean.
    """
    rows = {value: one.rows() for value, one in sweep.comparisons.items()}
    averaged = sweep.key == "target"
    table = [["method", *(f"{sweep.key}={public(v)}" for v in rows), *(["mean"] * averaged)]]
    for number, first in enumerate(next(iter(rows.values()))):
        mine = [found[number] for found in rows.values()]
        texts = []
        for row in mine:
            spread = row["std_over_seeds"]
            texts.append(
                percent(row["accuracy"]) + ("" if spread is None else f" ± {percent(spread)}")
            )
        if averaged:
            texts.append(percent(math.fsum(row["accuracy"] for row in mine) / len(mine)))
        table.append([first["method"], *texts])
    return table


def _about(sweep: Sweep) -> str:
    first = next(iter(sweep.comparisons.values()))
    seeds = {r.settings["seed"] for results in first.results.values() for r in results}
    lines = [line for one in sweep.comparisons.values() for line in released(one)]
    about = "accuracy in %, last round, unweighted mean over clients" + (
        f", mean and standard deviation (n-1) over {count(len(seeds), 'seed')}"
    ) * (len(seeds) > 1)
    return "; ".join([about, *dict.fromkeys(lines)])


def sweep_table(sweep: Sweep) -> Sheet:
    """Lay the sweep out for a terminal."""
    heading, *lines = sweep_cells(sweep)
    return Sheet(
        [name.replace("=", "=\n") for name in heading],
        [[text or NONE for text in line] for line in lines],
        title=subject(next(iter(sweep.comparisons.values()))),
        notes=[_about(sweep)],
    )


def sweep_markdown(sweep: Sweep) -> str:
    """Write the sweep as a GitHub table."""
    heading, *lines = sweep_cells(sweep)
    rule = [":--"] + ["--:"] * (len(heading) - 1)
    texts = [[escaped(text) for text in line] for line in lines]
    text = [markdown_line(cells) for cells in ([escaped(t) for t in heading], rule, *texts)]
    return "\n".join([*text, "", f"<sub>{escaped(_about(sweep))}.</sub>"]) + "\n"


def sweep_plot(sweep: Sweep) -> bytes:
    """Draw accuracy over the values, one line a method, as a PNG.

    Numbers stand on a logarithmic axis if they are positive and span a factor of eight.
    """
    values = list(sweep.comparisons)
    rows = [one.rows() for one in sweep.comparisons.values()]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    with matplotlib_defaults({}):
        figure = figure_of(4.2, layout="constrained")
        axes = figure.add_subplot()
        places = values if numeric else list(range(len(values)))
        for number, first in enumerate(rows[0]):
            axes.errorbar(
                places,
                [100 * found[number]["accuracy"] for found in rows],
                [100 * (found[number]["std_over_seeds"] or 0.0) for found in rows],
                label=shortened(first["method"]),
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
