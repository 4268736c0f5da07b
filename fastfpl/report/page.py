"""The comparison as one HTML page that loads nothing."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastfpl.config import Settings
from fastfpl.federation import Comparison, Result
from fastfpl.federation.result import RESULT
from fastfpl.report.agreement import differences, warnings
from fastfpl.report.deciding import decision
from fastfpl.report.facts import augmentations, captions, dealt, details, rows, subject
from fastfpl.report.load import run_folder
from fastfpl.report.matrix import Matrix, across
from fastfpl.report.plots import accuracy_plot, clients_plot, curve
from fastfpl.report.published import published
from fastfpl.report.runs import (
    clients_of,
    each,
    group_names,
    named_clients,
    quirks_of,
    runs,
    setting,
    trains,
)
from fastfpl.report.table import INCOMPLETE, REFUSAL, UNEQUAL, cells, headings
from fastfpl.report.words import NONE, count, listed, percent, public, size
from fastfpl.terminal import plain

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["html_page"]


def html_page(
    comparisons: Comparison | Sequence[Comparison],
    folder: str | Path | None = None,
    matrix: Matrix | None = None,
) -> str:
    """Write a page with figures, plots, settings and environment of every run.

    Parameters
    ----------
    comparisons : Comparison or sequence of Comparison
        Each gets a part of its own: nothing is ranked across them.
    folder : path, optional
        Where the page will lie; runs below it are linked by relative names.
    matrix : Matrix, optional
        Methods over tasks, which comes first; if left out, one of comparisons whose data sets alone
        differ.

    Returns
    -------
    str
        HTML with inline images and style. No script, nothing from a network, no absolute path.

    Raises
    ------
    InputError
        If a comparison holds no result.
    """
    all_of = each(comparisons)
    flat = [r for comparison in all_of for r in runs(comparison)]
    names = group_names(all_of)
    methods = len({r.method for r in flat})
    page: str = _template().render(
        title=f"{count(methods, 'method')} on {listed(_names(flat))}",
        groups=[
            _part(comparison, name, f"-{number}" if len(all_of) > 1 else "")
            for number, (comparison, name) in enumerate(zip(all_of, names, strict=True), 1)
        ],
        matrix=across(all_of) if matrix is None else matrix,
        percent=percent,
        refusal=REFUSAL,
        unequal=UNEQUAL,
        incomplete=INCOMPLETE,
        folders=_folders(flat, None if folder is None else Path(folder)),
    )
    return page


@functools.cache
def _template() -> Template:
    """Read and compile the page, once a process."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def written(value: Any) -> Any:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    text = resources.files("fastfpl.report").joinpath("page.html").read_text(encoding="utf-8")
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=written,  # nothing of others' reaches the page but through here
    ).from_string(text)


def _part(comparison: Comparison, name: str, at: str) -> dict[str, Any]:
    """Gather what the page says of one comparison; ``at`` ends the names of its sections."""
    flat = runs(comparison)
    found = warnings(comparison)
    different = {d.about for d in differences(comparison)}
    deal = dealt(comparison)
    return {
        "name": name,
        "at": at,
        "subject": subject(comparison),
        "top": [row for row in rows(comparison) if row.top],
        "missing": comparison.missing,
        "severe": [w for w in found if w.decides_accuracy],
        "mild": [w for w in found if not w.decides_accuracy],
        "headings": headings(comparison),
        "cells": cells(comparison),
        "captions": captions(comparison),
        "details": details(comparison),
        "published": published(comparison),
        "augmentations": augmentations(comparison),
        "plots": [
            _plot(accuracy_plot, comparison, name, _accuracy_words(comparison)),
            _plot(clients_plot, comparison, name, _clients_words(comparison)),
        ],
        "traffic": _traffic(comparison),
        "clients": _clients(comparison),
        "decision": decision(comparison),
        "deal": "" if deal is None else f" {deal[0].upper()}{deal[1:]}.",
        "methods": list(comparison.results),
        "shared": [
            {"name": k, "about": _about(k), "value": setting(flat[0], k)}
            for k in _keys(flat)
            if k not in different
        ],
        "different": [
            {"name": k, "about": _about(k), "cells": _by_method(comparison, k)}
            for k in _keys(flat)
            if k in different
        ],
        "options": [(m, _own_settings(rs[0])) for m, rs in _all(comparison)],
        "seeds": public(sorted({r.settings["seed"] for r in flat})),
        "environment": _environment(comparison),
        "faces": _faces(comparison),
        "data": _data(comparison),
    }


def _all(comparison: Comparison) -> list[tuple[str, Sequence[Result]]]:
    return list(comparison.results.items())


def _names(flat: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(str(r.data["name"]) for r in flat))


def _plot(draw: Any, comparison: Comparison, about: str, words: str) -> dict[str, str]:
    def uri(dark: bool) -> str:
        drawn = draw(comparison, "svg", dark=dark, about=about)
        content = base64.b64encode(drawn).decode("ascii")
        return f"data:image/svg+xml;base64,{content}"

    return {"light": uri(False), "dark": uri(True), "words": words}


def _accuracy_words(comparison: Comparison) -> str:
    parts = []
    for method, results in comparison.results.items():
        points = curve(results)
        (first, begin, _, _), (last, end, _, _) = points[0], points[-1]
        if len(points) == 1:
            parts.append(f"{method} {percent(end)} %, evaluated once")
        else:
            parts.append(
                f"{method} from {percent(begin)} % after {count(first, 'round')} to "
                f"{percent(end)} % after {last}"
            )
    return "Accuracy over rounds. " + "; ".join(parts) + "."


def _clients_words(comparison: Comparison) -> str:
    parts = []
    for method, results in comparison.results.items():
        values = [a for r in results for a in clients_of(r) if a is not None]
        parts.append(f"{method} {percent(min(values))} to {percent(max(values))} %")
    return "Accuracy of each client in the last round, lowest to highest. " + "; ".join(parts) + "."


def _traffic(comparison: Comparison) -> list[dict[str, str]]:
    out = []
    for row in rows(comparison):
        results = comparison.results[row.method]
        joined = sorted({len(line["selected"]) for r in results for line in r.rounds})
        if row.bytes_up is None:
            out.append(dict.fromkeys(("joined", "up", "down", "all_up", "all_down"), NONE))
        else:
            assert row.bytes_down is not None
            assert row.total_up is not None
            assert row.total_down is not None
            out.append(
                {
                    "joined": listed(joined, "or"),
                    "up": size(row.bytes_up),
                    "down": size(row.bytes_down),
                    "all_up": size(row.total_up),
                    "all_down": size(row.total_down),
                }
            )
        out[-1]["method"] = row.method
    return out


def _clients(comparison: Comparison) -> list[dict[str, Any]]:
    """One table a seed: under another seed the same number may be another client (`dealt`)."""
    tables = []
    for seed in sorted({r.settings["seed"] for r in runs(comparison)}):
        mine = {
            method: next((r for r in results if r.settings["seed"] == seed), None)
            for method, results in _all(comparison)
        }
        there = [r for r in mine.values() if r is not None]
        accuracy = {m: [] if r is None else clients_of(r) for m, r in mine.items()}
        lines, names = [], named_clients(there)
        for number in range(max(len(a) for a in accuracy.values())):
            lines.append(
                {
                    "number": names[number] if names else number,
                    "train": _of_client(there, "train_images", number),
                    "test": _of_client(there, "test_images", number),
                    "cells": [
                        None if one is None else percent(one)
                        for one in (
                            a[number] if number < len(a) else None for a in accuracy.values()
                        )
                    ],
                }
            )
        tables.append({"seed": seed, "lines": lines})
    return tables


def _of_client(results: Sequence[Result], key: str, number: int) -> str:
    found = {r.data[key][number] for r in results if number < len(r.data[key])}
    return listed(sorted(found), "or")


def _keys(flat: Sequence[Result]) -> list[str]:
    keys = dict.fromkeys(key for r in flat for key in r.settings)
    known = [k for k in Settings.model_fields if k in keys]
    hidden = ("method", "seed", "options", "as_released", "root", "target_root")
    return [k for k in (*known, *(k for k in keys if k not in known)) if k not in hidden]


def _own_settings(result: Result) -> str:
    """Write a method's options, and the quirks of released code it had."""
    quirks = quirks_of(result)
    own = {"as_released": quirks} if quirks else {}
    return public({**result.settings.get("options", {}), **own})


def _about(key: str) -> str:
    field = Settings.model_fields.get(key)
    return "" if field is None else field.description or ""


def _by_method(comparison: Comparison, key: str) -> list[str]:
    return [
        ", ".join(dict.fromkeys(setting(r, key) for r in results))
        for _, results in _all(comparison)
    ]


def _environment(comparison: Comparison) -> list[dict[str, Any]]:
    flat = runs(comparison)
    out = []
    for key in dict.fromkeys(key for r in flat for key in r.environment):
        values = dict.fromkeys(public(r.environment.get(key)) for r in flat)
        out.append({"name": key.replace("_", " "), "value": " or ".join(values)})
    return out


def _faces(comparison: Comparison) -> list[dict[str, Any]]:
    ops = dict.fromkeys(op for r in runs(comparison) for op in sorted(r.faces))
    out = []
    for op in sorted(ops):
        line = []
        for _, results in _all(comparison):
            names = dict.fromkeys(name for r in results for name in r.faces.get(op, []))
            line.append(", ".join(names) or NONE)
        out.append({"op": op, "cells": line})
    return out


def _data(comparison: Comparison) -> list[dict[str, Any]]:
    """Facts of each data set and weights that occur."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in runs(comparison):
        key = (r.data["name"], r.data["weights"], tuple(r.data["classes"]))
        found.setdefault(
            key,
            {
                "name": str(r.data["name"]),
                "weights": public(r.data["weights"]),
                "classes": [str(c) for c in r.data["classes"]],
                "train": sum(r.data["train_images"]) if trains([r]) else None,
                "test": sum(r.data["test_images"]),
            },
        )
        if found[key]["train"] is None and trains([r]):
            found[key]["train"] = sum(r.data["train_images"])
    return list(found.values())


def _folders(flat: Sequence[Result], folder: Path | None) -> list[dict[str, str]]:
    names = list(dict.fromkeys(run_folder(r) for r in flat))
    there = [n for n in names if folder is not None and (folder / n / RESULT).is_file()]
    return [{"name": n, "link": f"{quote(n, safe='')}/{RESULT}"} for n in there]
