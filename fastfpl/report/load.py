"""Results of finished runs, read again from their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastfpl.data import short_name
from fastfpl.errors import Damaged, InputError, Missing
from fastfpl.federation import Comparison, Result, Sweep
from fastfpl.federation.checkpoint import CHECKPOINT
from fastfpl.federation.comparison import PLAN, SWEEP, value_folders
from fastfpl.federation.result import RESULT
from fastfpl.federation.result_schema import MOST_BYTES
from fastfpl.report.runs import task, trains
from fastfpl.report.words import count

__all__ = ["load_comparisons", "load_sweep", "run_folder"]

_OP = "fastfpl.load_comparisons"
_RUN = re.compile(r"(?P<method>.+)-seed(?P<seed>[0-9]+)")


class _Plan(BaseModel):
    """What `fastfpl.compare` was asked for."""

    model_config = ConfigDict(strict=True, extra="forbid")

    methods: Annotated[list[str], Field(max_length=1000)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=100_000)]
    rounds: Annotated[int, Field(ge=1)]


_Some = TypeVar("_Some", bound=_Plan)


class _SweepPlan(_Plan):
    """What `fastfpl.sweep` was asked for."""

    key: Annotated[str, Field(max_length=100)]
    values: Annotated[list[str | int | float | bool | None], Field(min_length=1, max_length=1000)]


def run_folder(result: Result) -> str:
    """Name the folder that `fastfpl.compare` gives a run."""
    return f"{result.method}-seed{result.settings['seed']}"


def load_comparisons(*folders: str | Path) -> list[Comparison]:
    """Read the finished runs of one or more folders.

    Parameters
    ----------
    *folders : path
        Each the folder of a run, with its ``result.json``; or one with runs below it, as
        ``METHOD-seedN`` (the ``out`` of `fastfpl.compare`) or ``METHOD-DATASET-seedN`` (where
        ``fastfpl run`` writes by itself). Unfinished ones are named in `Comparison.missing`, with
        those that `fastfpl.compare` had not begun.

    Returns
    -------
    list of Comparison
        One for each task (data set, scenario, CLIP, partition, shots, views of the images; see
        `fastfpl.report.runs.TASK`), in the order of the folders: accuracies of different tasks
        have no common ranking. In each, methods that train nothing first, then by name; seeds
        ascending.

    Raises
    ------
    Missing
        If there is no such folder, or no finished run in it.
    Damaged
        If a result cannot be read, or is not that of the run its folder is named after.
    InputError
        If no folder is named, or two runs of a task have the same method and seed.
    """
    if not folders:
        raise InputError(f"{_OP}: folders must be one or more; got none")
    found: dict[Path, Result] = {}
    missing: dict[Path, list[str]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise Missing(f"{_OP}: folder must exist; got {folder}")
        mine = dict(_finished(folder))
        lacking = list(_unfinished(folder))
        if not mine:
            raise Missing(
                f"{_OP}: folder must hold finished runs as METHOD-seedN/{RESULT}, or one as "
                f"{RESULT}; got none in {folder}" + "".join(f"; {text}" for text in lacking)
            )
        # a folder may be named twice, or beside the one that it lies in
        known = {path.resolve() for path in found}
        fresh = {path: result for path, result in mine.items() if path.resolve() not in known}
        found |= fresh
        if lacking:
            missing[next(iter(mine))] = lacking
    tasks: dict[tuple[str, ...], dict[Path, Result]] = {}
    for path, result in found.items():
        tasks.setdefault(task(result), {})[path] = result
    return [_comparison(runs, missing) for runs in tasks.values()]


def load_sweep(folder: str | Path) -> Sweep | None:
    """Read the finished runs of a sweep, of one that is half done too.

    Parameters
    ----------
    folder : path
        The ``out`` of `fastfpl.sweep`, or of a comparison over several data sets.

    Returns
    -------
    Sweep or None
        None if the folder is not that of a sweep. What is not finished stands in
        `Comparison.missing` of its value, whose results are empty if nothing is.

    Raises
    ------
    Missing, Damaged, InputError
        As for `load_comparisons`; also if no run of the sweep is finished.
    """
    root = Path(folder)
    plan = _plan(root / SWEEP, _SweepPlan)
    if plan is None:
        return None
    if len({repr(value) for value in plan.values}) < len(plan.values):
        raise Damaged(f"{_OP}: {root / SWEEP} must name each value once; got one twice")
    wanted = [f"{m} seed {s}: not begun" for m in plan.methods for s in plan.seeds]
    found: dict[object, Comparison] = {}
    for value, name in value_folders(plan.key, plan.values).items():
        place = root / name
        there = place.is_dir() and any(_finished(place))
        if not there:
            lacking = list(_unfinished(place)) if place.is_dir() else []
            found[value] = Comparison({}, tuple(lacking or wanted))
            continue
        several = load_comparisons(place)
        if len(several) > 1:
            raise InputError(
                f"{_OP}: a value of a sweep must hold runs of one task; got {len(several)} in "
                f"{place}: report it by itself"
            )
        found[value] = several[0]
    if not any(one.results for one in found.values()):
        raise Missing(f"{_OP}: a sweep must have finished runs; got none in {root}; go on with it")
    return Sweep(plan.key, found)


def _comparison(found: dict[Path, Result], missing: dict[Path, list[str]]) -> Comparison:
    names: dict[str, Path] = {}
    for path, result in found.items():
        other = names.setdefault(run_folder(result), path)
        if other != path:
            raise InputError(
                f"{_OP}: runs must differ in method or seed; got {run_folder(result)} in "
                f"{other.parent} and in {path.parent}"
            )
    ordered = sorted(found.values(), key=lambda r: (trains([r]), r.method, r.settings["seed"]))
    methods = dict.fromkeys(result.method for result in ordered)
    return Comparison(
        {m: [r for r in ordered if r.method == m] for m in methods},
        # what a folder lacks is of the task of its first run
        tuple(dict.fromkeys(text for path in found for text in missing.get(path, []))),
    )


def _finished(folder: Path) -> Iterator[tuple[Path, Result]]:
    """Read the result of a folder and those of the runs below it."""
    if (folder / RESULT).is_file():
        yield folder / RESULT, Result.load(folder)
    for path in sorted(folder.glob(f"*/{RESULT}")):
        if not _RUN.fullmatch(path.parent.name):
            continue
        result = Result.load(path.parent)
        name, dataset = run_folder(result), short_name(result.settings["dataset"])
        alone = f"{result.method}-{dataset}-seed{result.settings['seed']}"
        if path.parent.name not in (name, alone):
            raise Damaged(
                f"{_OP}: {path} must be the result of the run its folder is named after; got {name}"
            )
        yield path, result


def _unfinished(folder: Path) -> Iterator[str]:
    """Say which runs of a folder did not end, or did not begin."""
    plan = _plan(folder / PLAN, _Plan)
    wanted = [] if plan is None else [f"{m}-seed{s}" for m in plan.methods for s in plan.seeds]
    there = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and _RUN.fullmatch(p.name)]
    for name in dict.fromkeys([*wanted, *there]):
        if (folder / name / RESULT).is_file():
            continue
        run = _RUN.fullmatch(name)
        about = name if run is None else f"{run['method']} seed {run['seed']}"
        total = plan.rounds if plan is not None and name in wanted else None
        yield f"{about}: {_progress(folder / name, total)}"
    if (folder / CHECKPOINT).is_file() and not (folder / RESULT).is_file():
        yield f"{folder.name}: {_progress(folder, None)}"


def _progress(folder: Path, total: int | None) -> str:
    """Say how far a run came that has no result."""
    if not folder.exists():
        return "not begun"
    path = folder / CHECKPOINT
    done = 0
    if path.is_file():
        head = _json(path)
        if not isinstance(head, dict) or type(head.get("rounds_done")) is not int:
            return f"not finished, and {CHECKPOINT} does not say how far it came"
        done = head["rounds_done"]
    of = "" if total is None else f" of {total}"
    return f"not finished, {done}{of} rounds" if of else f"not finished, {count(done, 'round')}"


def _plan(path: Path, kind: type[_Some]) -> _Some | None:
    if not path.is_file():
        return None
    try:
        return kind.model_validate(_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1]) or "content"
        raise Damaged(
            f"{_OP}: {where} of {path} must be what fastfpl compare wrote; got "
            f"{first['msg'][:200]}; remove the file to report without it"
        ) from None


def _json(path: Path) -> object:
    """Read JSON, or None where it is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        content: object = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError, RecursionError):
        return None
