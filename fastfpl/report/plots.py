"""Two plots of a comparison, drawn without pyplot: no backend is chosen, no global state moves."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastfpl.federation import Comparison, Result
from fastfpl.report.facts import rows, subject
from fastfpl.report.runs import clients_of, evaluations, runs, trains
from fastfpl.report.words import percent
from fastfpl.terminal import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_plot",
    "clients_plot",
    "curve",
    "figure_of",
    "matplotlib_defaults",
    "shortened",
    "stacked",
]

DPI = 160
WIDTH = 8.0  # inches; 1280 pixels, about half of which remain in a README

#: Letters of a name that a plot shows.
_LONGEST = 40
#: More dots than this become pixels inside an SVG, where each would cost a hundred bytes.
_MANY_DOTS = 1500


@dataclass(frozen=True)
class _Scheme:
    paper: str
    ink: str
    faint: str
    grid: str
    still: str  # methods that train nothing
    lines: tuple[str, ...]


# Okabe and Ito 2008 without yellow, which white swallows; the dark scheme is the same hues, lighter
LIGHT = _Scheme(
    paper="#ffffff",
    ink="#1c2126",
    faint="#5b6570",
    grid="#e3e7eb",
    still="#6b7580",
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4f2b", "#332288"),
)
_DARK = _Scheme(
    paper="#16191d",
    ink="#e6e9ec",
    faint="#9aa4ae",
    grid="#2b3138",
    still="#98a2ac",
    lines=("#4da3e0", "#f2793a", "#2cc295", "#e39bc4", "#f0b43a", "#9bd5f7", "#c69a72", "#a79df0"),
)
MARKERS = "osD^vPX*"


def accuracy_plot(
    comparison: Comparison,
    kind: Literal["png", "svg"] = "png",
    *,
    dark: bool = False,
    about: str = "",
) -> bytes:
    """Draw accuracy over rounds, one line a method.

    Lines are means over clients and seeds, bands reach from the smallest to the largest seed. A
    method with one evaluation is a dashed level.

    Parameters
    ----------
    comparison : Comparison
    kind : "png" or "svg"
    dark : bool
        Light ink on a dark ground.
    about : str
        Tells a plot from its neighbours, at the end of its title.

    Returns
    -------
    bytes
        Content of the file; the same for the same comparison.
    """
    return _draw(_accuracy, comparison, kind, _DARK if dark else LIGHT, about)


def clients_plot(
    comparison: Comparison,
    kind: Literal["png", "svg"] = "png",
    *,
    dark: bool = False,
    about: str = "",
) -> bytes:
    """Draw every client's accuracy in the last round, one row a method.

    Parameters
    ----------
    comparison : Comparison
    kind : "png" or "svg"
    dark : bool
        Light ink on a dark ground.
    about : str
        Tells a plot from its neighbours, at the end of its title.

    Returns
    -------
    bytes
        Content of the file; the same for the same comparison.
    """
    return _draw(_clients, comparison, kind, _DARK if dark else LIGHT, about)


def _draw(
    draw: Callable[[Comparison, _Scheme, str], Figure],
    comparison: Comparison,
    kind: str,
    look: _Scheme,
    about: str,
) -> bytes:
    runs(comparison)
    with matplotlib_defaults(
        {
            "font.size": 10.5,
            "axes.edgecolor": look.faint,
            "axes.labelcolor": look.ink,
            "axes.facecolor": look.paper,
            "figure.facecolor": look.paper,
            "text.color": look.ink,
            "xtick.color": look.faint,
            "ytick.color": look.faint,
            "xtick.labelcolor": look.ink,
            "ytick.labelcolor": look.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": look.grid,
            "grid.linewidth": 0.8,
            "svg.hashsalt": "fastfpl",
        }
    ):
        figure = draw(comparison, look, about)
        out = io.BytesIO()
        # no date: the same figures give the same file
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(out, format=kind, dpi=DPI, metadata=metadata)
    return out.getvalue() if kind == "svg" else _palette(out)


@contextmanager
def matplotlib_defaults(changes: Mapping[str, Any]) -> Iterator[None]:
    """Draw with matplotlib's own defaults and a few changes; the caller's settings come back.

    Text is text: no dollar sign starts a formula, and a letter that the font lacks is no warning.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        # a user's style sheet must not change the report
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, **changes})
        yield


def _matplotlib() -> Any:
    """Import matplotlib, also where the environment names a backend that is not installed.

    A name that is known becomes the caller's backend, as it does where the caller imports it.
    """
    first = "matplotlib" not in sys.modules
    theirs = os.environ.pop("MPLBACKEND", None) if first else None
    try:
        import matplotlib
    finally:
        if theirs is not None:
            os.environ["MPLBACKEND"] = theirs
    if theirs:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = theirs
    return matplotlib


def shortened(name: str) -> str:
    """Shorten a name to what a plot has room for; controls are spelled."""
    text = plain(name)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _palette(png: io.BytesIO) -> bytes:
    """Halve a PNG: 256 colours are enough for a dozen inks and their edges."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(png) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(small, format="png", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()


def stacked(pictures: Sequence[bytes]) -> bytes:
    """Put PNGs of one width below each other; a single one is left as it is."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    whole = Image.new("RGB", (opened[0].width, sum(one.height for one in opened)))
    top = 0
    for one in opened:
        whole.paste(one, (0, top))
        top += one.height
    out = io.BytesIO()
    whole.save(out, format="png")
    return _palette(out)


def curve(results: Sequence[Result]) -> list[tuple[int, float, float, float]]:
    """Return (rounds played, mean, smallest, largest over seeds) of every evaluated round."""
    by: dict[int, list[float]] = {}
    for result in results:
        for row in evaluations(result):
            by.setdefault(row["round"] + 1, []).append(float(row["accuracy"]))
    return [(at, math.fsum(a) / len(a), min(a), max(a)) for at, a in sorted(by.items())]


def _colours(comparison: Comparison, look: _Scheme) -> dict[str, tuple[str, str]]:
    """Give every method a colour and a marker; grey to those that train nothing."""
    moving = [m for m, results in comparison.results.items() if trains(results)]
    out = dict.fromkeys(comparison.results, (look.still, "o"))
    for number, method in enumerate(moving):
        colour = look.lines[number % len(look.lines)]
        out[method] = (colour, MARKERS[(number + number // len(look.lines)) % len(MARKERS)])
    return out


def _head(figure: Any, title: str, *below: str, look: _Scheme) -> None:
    high = figure.get_size_inches()[1]
    title = title if len(title) <= 90 else title[:89] + "…"
    figure.text(0.16 / WIDTH, 1 - 0.16 / high, plain(title), fontsize=13, weight="bold", va="top")
    for number, line in enumerate(below):
        at = 1 - (0.45 + 0.2 * number) / high
        line = line if len(line) <= 130 else line[:129] + "…"
        figure.text(0.16 / WIDTH, at, plain(line), fontsize=9.5, color=look.faint, va="top")


def _axes(figure: Any, left: float, right: float, top: float, bottom: float) -> Any:
    """Place axes by margins in inches."""
    wide, high = figure.get_size_inches()
    return figure.add_axes(
        (left / wide, bottom / high, 1 - (left + right) / wide, 1 - (top + bottom) / high)
    )


def figure_of(high: float, **options: Any) -> Any:
    """Make a figure of the report's width on a canvas of its own, whatever the backend is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, high), **options)
    FigureCanvasAgg(figure)
    return figure


def _accuracy(comparison: Comparison, look: _Scheme, about: str) -> Figure:
    results = comparison.results
    curves = {m: curve(r) for m, r in results.items()}
    colours = _colours(comparison, look)
    several = any(len(r) > 1 for r in results.values())
    figure = figure_of(4.6)
    label = {m: f"{shortened(m)}  {percent(c[-1][1])}" for m, c in curves.items()}
    longest = max(len(text) for text in label.values())
    axes = _axes(figure, left=0.72, right=0.42 + 0.08 * longest, top=0.98, bottom=0.62)

    last = max(c[-1][0] for c in curves.values())
    lows = [100 * low for c in curves.values() for _, _, low, _ in c]
    highs = [100 * high for c in curves.values() for _, _, _, high in c]
    bottom, top = _limits([*lows, *highs])
    axes.set_xlim((1, last) if last > 1 else (0.5, 1.5))
    axes.set_ylim(bottom, top)
    axes.set_xticks(_round_ticks(last))
    axes.yaxis.set_major_locator(_ticks())

    for method, points in curves.items():
        colour, marker = colours[method]
        at = [p[0] for p in points]
        mean = [100 * p[1] for p in points]
        if len(points) == 1:
            axes.axhline(mean[0], color=colour, linewidth=1.6, linestyle=(0, (5, 3)))
            if trains(results[method]):
                axes.plot(at, mean, marker, color=colour, markersize=6, clip_on=False, zorder=4)
            continue
        if len(results[method]) > 1:
            low, high = [100 * p[2] for p in points], [100 * p[3] for p in points]
            axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            at,
            mean,
            color=colour,
            linewidth=1.9,
            marker=marker,
            markersize=5,
            markeredgecolor=look.paper,
            markeredgewidth=0.6,
            # about twenty marks tell lines apart, more hide them
            markevery=max(1, -(-len(at) // 20)),
            clip_on=False,
            zorder=3,
        )

    ends = [100 * c[-1][1] for c in curves.values()]
    high_in = axes.get_position().height * figure.get_size_inches()[1]
    gap = 0.19 / high_in * (top - bottom)
    for method, true, shown in zip(curves, ends, spread(ends, gap, bottom, top), strict=True):
        across = axes.get_yaxis_transform()
        axes.plot(
            (1.006, 1.022, 1.04, 1.052),
            (true, true, shown, shown),
            transform=across,
            color=colours[method][0],
            linewidth=1.2,
            clip_on=False,
        )
        axes.text(1.062, shown, label[method], transform=across, va="center", fontsize=9.5)

    axes.set_xlabel("rounds played")
    axes.set_ylabel("accuracy, mean over clients (%)")
    notes = ["right: last round (%)"]
    if any(len(c) == 1 for c in curves.values()) and last > 1:
        notes.append("dashed: evaluated once")
    if several:
        notes.append("band: smallest to largest seed")
    title = "Accuracy over rounds" + f": {about}" * bool(about)
    _head(figure, title, subject(comparison), " · ".join(notes), look=look)
    return figure  # type: ignore[no-any-return]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Frame percentages with a margin, at least eight points wide, hardly beyond 0 and 100."""
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), (8 - (high - low)) / 2, 1.0)
    return max(low - margin, -1.5), min(high + margin, 101.5)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(8, steps=[1, 2, 5, 10])


def _round_ticks(last: int) -> list[int]:
    """One round played, then round numbers, at most a dozen."""
    if last <= 12:
        return list(range(1, last + 1))
    step = next(s * 10**p for p in range(9) for s in (1, 2, 5) if last <= 11 * s * 10**p)
    return [1, *range(step, last + 1, step)]


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move values apart to at least ``gap``, each as little as possible, within the limits.

    Least squares under an order is isotonic regression of the values less their rank's gaps: groups
    that touch are pooled to their mean.
    """
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    pools: list[list[float]] = []  # mean and number of members
    for rank, i in enumerate(order):
        pools.append([values[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, n), (other, m) = pools.pop(), pools.pop()
            pools.append([(mean * n + other * m) / (n + m), n + m])
    flat = [mean for mean, n in pools for _ in range(int(n))]
    out = [0.0] * len(values)
    for rank, i in enumerate(order):
        limit = high - (len(values) - 1) * gap
        out[i] = min(max(flat[rank], low), limit) + rank * gap
    return out


def _clients(comparison: Comparison, look: _Scheme, about: str) -> Figure:
    results = comparison.results
    colours = _colours(comparison, look)
    values = {
        m: [100 * a for r in rs for a in clients_of(r) if a is not None]
        for m, rs in results.items()
    }
    means = {row.method: 100 * row.accuracy for row in rows(comparison)}
    pitch = 0.62 if max(len(v) for v in values.values()) <= 40 else 0.8
    figure = figure_of(1.72 + pitch * len(values))
    longest = max(len(shortened(method)) for method in values)
    axes = _axes(figure, left=0.3 + 0.086 * longest, right=0.25, top=0.98, bottom=0.62)

    everything = [v for vs in values.values() for v in vs]
    left, right = _limits(everything)
    axes.set_xlim(left, right)
    axes.set_ylim(len(values) - 0.42, -0.5)

    wide = axes.get_position().width * WIDTH
    dot = 0.066 if len(everything) <= _MANY_DOTS else 0.04  # inches
    for row, (method, points) in enumerate(values.items()):
        colour = colours[method][0]
        ordered = sorted(points)
        if len(points) >= 4:
            quarter, half, three = (_quantile(ordered, q) for q in (0.25, 0.5, 0.75))
            # of equal quarters a line remains
            thick = max(three - quarter, 0.002 * (right - left))
            axes.barh(row, thick, 0.72, left=quarter, color=colour, alpha=0.17, linewidth=0)
            axes.plot((half, half), (row - 0.36, row + 0.36), color=colour, linewidth=1.8)
        inches = [(v - left) / (right - left) * wide for v in ordered]
        offsets = swarm(inches, dot, 0.34 * pitch)
        axes.scatter(
            ordered,
            [row + offset / pitch for offset in offsets],
            s=(72 * dot) ** 2,
            color=colour,
            edgecolors=look.paper,
            linewidths=0.4,
            alpha=0.85,
            clip_on=False,
            zorder=3,
            rasterized=len(everything) > _MANY_DOTS,
        )
        axes.plot(
            means[method],
            row + 0.43,
            "^",
            markersize=6.5,
            color=look.ink,
            markeredgewidth=0,
            clip_on=False,
            zorder=4,
        )
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(values)), [shortened(method) for method in values])
    axes.xaxis.set_major_locator(_ticks())
    axes.set_xlabel("accuracy of a client on its own test images, last round (%)")
    many = any(len(r) > 1 for r in results.values())
    notes = ["dot: a client" + (" in one seed" if many else ""), "triangle: mean"]
    if any(len(v) >= 4 for v in values.values()):
        notes.append("bar: middle half, line: median")
    title = "Accuracy of each client" + f": {about}" * bool(about)
    _head(figure, title, subject(comparison), " · ".join(notes), look=look)
    return figure  # type: ignore[no-any-return]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Interpolate a quantile linearly between order statistics, as numpy does."""
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def swarm(places: Sequence[float], width: float, limit: float) -> list[float]:
    """Offset ascending places sideways so that dots of a width do not touch.

    Every dot takes the free offset nearest to the line; a crowd that would leave ``limit`` is
    squeezed into it, so that all stay visible.
    """
    offsets: list[float] = []
    for i, place in enumerate(places):
        near = [
            (place - places[j], offsets[j]) for j in range(i) if place - places[j] < width * 0.999
        ]
        # a free offset is the line itself, or touches a neighbour
        reach = [math.sqrt(max(width**2 - dx**2, 0.0)) for dx, _ in near]
        options = [0.0]
        for (_, dy), r in zip(near, reach, strict=True):
            options += [dy + r, dy - r]
        options.sort(key=lambda o: (abs(o), o))
        offsets.append(
            next(
                o
                for o in options
                if all(abs(o - dy) >= r - 1e-9 for (_, dy), r in zip(near, reach, strict=True))
            )
        )
    furthest = max((abs(o) for o in offsets), default=0.0)
    squeeze = min(1.0, limit / furthest) if furthest else 1.0
    return [o * squeeze for o in offsets]
