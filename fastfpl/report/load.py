"""Results of a finished comparison, read again from its folder."""

from __future__ import annotations

import re
from pathlib import Path

from fastfpl.errors import Damaged, Missing
from fastfpl.federation import Comparison, Result
from fastfpl.federation.result import RESULT
from fastfpl.report.facts import trains

__all__ = ["load_comparison", "run_folder"]

_RUN = re.compile(r"(?P<method>.+)-seed(?P<seed>[0-9]+)")


def run_folder(result: Result) -> str:
    """Name the folder that `fastfpl.compare` gives a run."""
    return f"{result.method}-seed{result.settings['seed']}"


def load_comparison(folder: str | Path) -> Comparison:
    """Read every ``METHOD-seedN/result.json`` below a folder; unfinished runs are left out.

    Parameters
    ----------
    folder : path
        The ``out`` of `fastfpl.compare`.

    Returns
    -------
    Comparison
        Methods that train nothing first, then by name; seeds ascending.

    Raises
    ------
    Missing
        If there is no such folder, or no finished run in it.
    Damaged
        If a result cannot be read, or is not that of the run its folder is named after.
    """
    op, folder = "fastfpl.load_comparison", Path(folder)
    if not folder.is_dir():
        raise Missing(f"{op}: folder must exist; got {folder}")
    found: list[Result] = []
    for path in sorted(folder.glob(f"*/{RESULT}")):
        if not _RUN.fullmatch(path.parent.name):
            continue
        result = Result.load(path.parent)
        try:
            name = run_folder(result)
        except (KeyError, TypeError):
            raise Damaged(f"{op}: {path} must name its seed; got none") from None
        if name != path.parent.name:
            raise Damaged(
                f"{op}: {path} must be the result of the run its folder is named after; got {name}"
            )
        found.append(result)
    if not found:
        raise Missing(
            f"{op}: folder must hold finished runs as METHOD-seedN/{RESULT}; got none in {folder}"
        )
    found.sort(key=lambda r: (trains([r]), r.method, r.settings["seed"]))
    methods = dict.fromkeys(result.method for result in found)
    return Comparison({m: [r for r in found if r.method == m] for m in methods})
