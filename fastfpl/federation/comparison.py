"""Several methods and seeds on the same task, resumable as a whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings, load_preset, make_settings
from fastfpl.data import Dataset, short_name
from fastfpl.errors import InputError, cut, near, shown
from fastfpl.federation.experiment import RoundObserver, refuse_held, run, unseen
from fastfpl.federation.frames import frame_of
from fastfpl.federation.preparation import (
    Place,
    Plan,
    known_as,
    name_dataset,
    plan,
    weigh,
)
from fastfpl.federation.ranks import elsewhere
from fastfpl.federation.result import Result
from fastfpl.files import write_json
from fastfpl.methods import Method, check_options, find_method, method_name
from fastfpl.released import share_quirks
from fastfpl.tracking import Callback
from fastfpl.training.feeds import Observer, silent
from fastfpl.training.preparation import load_model

if TYPE_CHECKING:
    import pandas

__all__ = [
    "PLAN",
    "SWEEP",
    "Comparison",
    "Job",
    "Sweep",
    "compare",
    "kinds_of",
    "listed",
    "say_what_belongs",
    "say_what_sweeps",
    "sweep",
    "value_folders",
]

#: Names the methods, seeds and rounds that a comparison was asked for.
PLAN = "comparison.json"
#: Names the setting, values, methods, seeds and rounds that a sweep was asked for.
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Comparison:
    """Results by method, one a seed.

    Attributes
    ----------
    results : mapping from method to sequence of Result
    missing : tuple of str
        Runs that belong to it and are not finished, each in words; with one, nothing is ranked.
    """

    results: Mapping[str, Sequence[Result]]
    missing: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row a method: mean and standard deviation over seeds, cost per round.

        ``accuracy``, ``last5`` and ``best`` are means over seeds of the mean over clients;
        ``std_over_seeds`` (n - 1 in the denominator, None for one seed) and ``std_over_clients``
        (mean over seeds) spread the last round's accuracy. ``exams``, ``domains``, ``macro_f1`` and
        ``harmonic_mean`` (None unless base and novel were asked) are means over seeds too.
        """
        table = []
        for method, results in self.results.items():
            finals = [r.final for r in results]
            rows = [row for r in results for row in r.rounds]

            def mean(values: Sequence[float]) -> float:
                return math.fsum(values) / len(values)

            accuracies = [f["accuracy"] for f in finals]
            middle = mean(accuracies)
            spread = (
                math.sqrt(math.fsum((a - middle) ** 2 for a in accuracies) / (len(finals) - 1))
                if len(finals) > 1
                else None
            )
            table.append(
                {
                    "method": method,
                    "seeds": len(results),
                    "accuracy": middle,
                    "std_over_seeds": spread,
                    "std_over_clients": mean([f["std_over_clients"] for f in finals]),
                    "last5": mean([f["last5"] for f in finals]),
                    "best": mean([f["best"] for f in finals]),
                    "macro_f1": mean([f["macro_f1"] for f in finals]),
                    "exams": _means([f["exams"] for f in finals]),
                    "domains": _means([f["domains"] for f in finals]),
                    "harmonic_mean": mean([f["harmonic_mean"] for f in finals])
                    if all("harmonic_mean" in f for f in finals)
                    else None,
                    "images_per_second": mean([row["images_per_second"] for row in rows]),
                    "seconds": mean([sum(row["seconds"] for row in r.rounds) for r in results]),
                    "peak_memory_bytes": max(r.peak_memory_bytes for r in results),
                    "bytes_up": mean([row["bytes_up"] for row in rows]),
                    "bytes_down": mean([row["bytes_down"] for row in rows]),
                }
            )
        return table

    def to_pandas(self) -> pandas.DataFrame:
        """Return every figure of every round of all runs: rows as those of `Result.to_pandas`.

        Returns
        -------
        pandas.DataFrame

        Raises
        ------
        Missing
            If pandas is not installed (extra ``pandas``).
        """
        return frame_of([r for results in self.results.values() for r in results])


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average figures by name, over those that have one."""
    names = dict.fromkeys(name for part in parts for name in part)
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class Sweep:
    """The same comparison under several values of one setting.

    Attributes
    ----------
    key : str
        Field of `fastfpl.Settings`.
    comparisons : mapping from value to Comparison
    """

    key: str
    comparisons: Mapping[Any, Comparison]


def value_folders(key: str, values: Sequence[Any]) -> dict[Any, str]:
    """Name the folder of every value of a sweep.

    What no folder may be called is percent-encoded; data sets of one's own have their last name.
    """
    found: dict[Any, str] = {}
    for value in values:
        short = short_name(value) if key == "dataset" and isinstance(value, str) else str(value)
        text = re.sub(r"[%/\\\x00-\x1f\x7f]", lambda m: f"%{ord(m.group()):02X}", short)
        base, number = f"{key}={text}", 1
        while (name := base if number == 1 else f"{base}-{number}") in found.values():
            number += 1
        found[value] = name
    return found


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes
    ----------
    settings : Settings
    folder : Path or None
    label : str
        What it is called among the others.
    """

    settings: Settings
    folder: Path | None
    label: str


def compare(
    methods: Sequence[str | type[Method]],
    *,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    model: FrozenCLIP | None = None,
    cache: str | Path | None = None,
    observer: Observer = silent,
    on_round: RoundObserver = unseen,
    callbacks: Sequence[Callback] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: str | Path | Dataset | None = None,
    **settings: Any,
) -> Comparison:
    """Run several methods under the same settings and seeds.

    Parameters
    ----------
    methods : sequence of str or type of Method
        Each once, by name or as in `run`.
    seeds : sequence of int
    preset, out, resume, model, cache, observer, on_round, callbacks
        As in `run`; ``out`` gets one folder a method and seed, and ``comparison.json``, which says
        what belongs together.
    options : mapping from method to its options
    dataset : str, path or Dataset, optional
        As in `run`.
    **settings
        Fields of `fastfpl.Settings` but ``method``, ``seed`` and ``options``. Of ``as_released``
        every method gets the quirks that are its own.
    """
    live = _named("fastfpl.compare", dataset, settings)
    names = [method_name(method, "fastfpl.compare") for method in methods]
    jobs = _jobs(names, seeds, preset, out, options, settings)
    _check(jobs, live, resume, model)
    how = (live, preset, resume, model, cache, observer, on_round, callbacks)
    return _play(names, jobs, *how)


def _named(op: str, dataset: str | Path | Dataset | None, settings: dict[str, Any]) -> Any:
    """Let settings name a data set, and return the one that is at hand, if so."""
    if dataset is None:
        return None
    settings["dataset"], live = name_dataset(op, dataset)
    return live


def _jobs(
    methods: Sequence[str],
    seeds: Sequence[int],
    preset: str | None,
    out: str | Path | None,
    options: Mapping[str, Mapping[str, Any]] | None,
    settings: Mapping[str, Any],
) -> list[Job]:
    """List the runs of a comparison, each with complete settings."""
    op = "fastfpl.compare"
    if not methods or len(set(methods)) != len(methods):
        raise InputError(f"{op}: methods must be one or more, each once; got {list(methods)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"{op}: seeds must be one or more, each once; got {list(seeds)}")
    for name in options or {}:
        if name not in methods:
            raise InputError(
                f"{op}: options must belong to one of {', '.join(methods)}; got {name!r}"
            )
    origin = None if preset is None else load_preset(preset)
    jobs: list[Job] = []
    asked = found = False
    for name in methods:
        find_method(name)
        mine = {**settings, "method": name, "options": dict((options or {}).get(name, {}))}
        mine = mine if origin is None else origin.on_top(name, mine)
        filled = check_options(name, mine["options"])
        for seed in seeds:
            folder = None if out is None else Path(out) / f"{name}-seed{seed}"
            one = make_settings({**mine, "seed": seed})
            quirks = share_quirks(one.as_released, name, methods, one.model_dump(), filled)
            asked, found = asked or bool(one.as_released), found or bool(quirks)
            label = name if len(seeds) == 1 else f"{name}, seed {one.seed}"
            jobs.append(Job(one.model_copy(update={"as_released": quirks}), folder, label))
    if asked and not found:
        raise InputError(
            f"{op}: as_released must be left out where no quirk of {', '.join(methods)} would "
            "change something; got 'all'"
        )
    return jobs


def _check(
    jobs: Sequence[Job], live: Dataset | None, resume: bool, model: FrozenCLIP | None
) -> None:
    """Refuse what can be refused in any run before the first one is played.

    A mistake in the last one must not show after the first one's hour. Without weights: settings,
    folders, data, deals. Where the runs differ in more than their seeds, prompts and widths too,
    with each CLIP loaded once.
    """
    if len(jobs) < 2:
        return  # a run checks itself first
    plans: dict[str, Plan] = {}
    datasets: dict[Place, Dataset] = {}
    for job in jobs:
        # of several ranks the first one looks, before it writes
        if job.folder is not None and not elsewhere():
            refuse_held(job.folder, resume)
        datasets |= {
            place: known
            for place, known in known_as(job.settings, live).items()
            if place not in datasets
        }
        planned = plan(job.settings, model=model, datasets=datasets)
        # one of each: over seeds only lists of images differ
        plans[job.settings.model_dump_json(exclude={"seed"})] = planned
    if len(plans) < 2:
        return
    clips: dict[tuple[Any, ...], list[Plan]] = {}
    for planned in plans.values():
        s = planned.settings
        clips.setdefault((s.clip, s.pretrained, s.quick_gelu, s.dtype, s.device), []).append(
            planned
        )
    for same in clips.values():
        clip = model or load_model(same[0].settings, same[0].device)
        for planned in same:
            weigh(planned, clip)


def say_what_belongs(methods: Sequence[str], jobs: Sequence[Job]) -> None:
    """Write down beside the folders of a comparison's runs what belongs to it."""
    if jobs[0].folder is None:
        return
    whole = {
        "methods": list(methods),
        "seeds": list(dict.fromkeys(job.settings.seed for job in jobs)),
        "rounds": jobs[0].settings.rounds,
    }
    write_json(jobs[0].folder.parent / PLAN, whole)


def _play(
    methods: Sequence[str],
    jobs: Sequence[Job],
    live: Dataset | None,
    preset: str | None,
    resume: bool,
    model: FrozenCLIP | None,
    cache: str | Path | None,
    observer: Observer,
    on_round: RoundObserver,
    callbacks: Sequence[Callback],
) -> Comparison:
    @lru_cache(maxsize=1)
    def begin() -> None:
        """Say what belongs to the comparison as soon as a round of it is there."""
        if not elsewhere():
            say_what_belongs(methods, jobs)

    results: dict[str, list[Result]] = {name: [] for name in methods}
    for nth, job in enumerate(jobs):

        def tell(what: str, done: int, total: int, label: str = job.label) -> None:
            observer(f"{label}: {what}", done, total)

        def tell_round(method: str, row: Mapping[str, Any], label: str = job.label) -> None:
            begin()
            on_round(label, row)

        results[job.settings.method].append(
            run(
                job.settings,
                dataset=live,
                preset=preset,
                out=job.folder,
                resume=resume,
                model=model,
                cache=cache,
                observer=tell,
                on_round=tell_round,
                callbacks=callbacks,
                also=kinds_of([job, *jobs[nth + 1 :]]),
            )
        )
        begin()
    return Comparison(results)


#: Settings that decide neither which images a run sees nor how.
_UNSEEN = frozenset({"method", "options", "as_released", "lr", "rounds", "local_epochs"})


def kinds_of(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Name the kinds of image features that runs still to come ask of the images of the first.

    Methods that learn from pairs see images in views of their own.
    """
    first, *later = jobs
    same = first.settings.model_dump(exclude=set(_UNSEEN))
    kinds = [
        find_method(job.settings.method)
        for job in later
        if job.settings.model_dump(exclude=set(_UNSEEN)) == same
    ]
    return tuple(dict.fromkeys(kind.image_kind for kind in kinds if not kind.paired))


def sweep(
    methods: Sequence[str | type[Method]],
    key: str,
    values: Sequence[Any],
    *,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    model: FrozenCLIP | None = None,
    cache: str | Path | None = None,
    observer: Observer = silent,
    on_round: RoundObserver = unseen,
    callbacks: Sequence[Callback] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: str | Path | Dataset | None = None,
    **settings: Any,
) -> Sweep:
    """Compare methods under several values of one setting.

    Parameters
    ----------
    methods : sequence of str or type of Method
    key : str
        Field of `fastfpl.Settings` but ``method``, ``seed`` and ``options``.
    values : sequence
        Its values, each once.
    out : path, optional
        Gets one folder ``KEY=VALUE`` a value (`value_folders`), and ``sweep.json``.
    seeds, preset, resume, model, cache, observer, on_round, callbacks, options, dataset, **settings
        As for `compare`.
    """
    live = _named("fastfpl.sweep", dataset, settings)
    names = [method_name(method, "fastfpl.sweep") for method in methods]
    jobs = _sweep_jobs(names, key, values, seeds, preset, out, options, settings)
    _check([job for mine in jobs.values() for job in mine], live, resume, model)

    @lru_cache(maxsize=1)
    def begin() -> None:
        """Say what belongs to the sweep as soon as a round of it is there."""
        if out is not None and not elsewhere():
            say_what_sweeps(Path(out), key, names, jobs)

    def tell(label: str, row: Mapping[str, Any]) -> None:
        begin()
        on_round(label, row)

    how = (live, preset, resume, model, cache, observer, tell, callbacks)
    return Sweep(key, {value: _play(names, mine, *how) for value, mine in jobs.items()})


def say_what_sweeps(
    out: Path, key: str, methods: Sequence[str], jobs: Mapping[Any, Sequence[Job]]
) -> None:
    """Write down in the folder of a sweep what belongs to it."""
    first = next(iter(jobs.values()))
    write_json(
        out / SWEEP,
        {
            "key": key,
            "values": list(jobs),
            "methods": list(methods),
            "seeds": list(dict.fromkeys(job.settings.seed for job in first)),
            "rounds": first[0].settings.rounds,
        },
    )


def _sweep_jobs(
    methods: Sequence[str],
    key: str,
    values: Sequence[Any],
    seeds: Sequence[int],
    preset: str | None,
    out: str | Path | None,
    options: Mapping[str, Mapping[str, Any]] | None,
    settings: Mapping[str, Any],
) -> dict[Any, list[Job]]:
    """List the runs of a sweep by value."""
    op = "fastfpl.sweep"
    known = [name for name in Settings.model_fields if name not in ("method", "seed", "options")]
    if key not in known:
        raise InputError(f"{op}: key must be a setting; got {shown(key)}" + near(cut(key), known))
    if key in settings:
        raise InputError(
            f"{op}: {key} must come from the sweep alone; got {shown(settings[key])} too"
        )
    if not values or len({str(value) for value in values}) != len(values):
        raise InputError(f"{op}: values must be one or more, each once; got {shown(list(values))}")
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise InputError(f"{op}: values must be numbers or texts; got {shown(value)}")
    places = value_folders(key, values)
    return {
        value: _jobs(
            methods,
            seeds,
            preset,
            None if out is None else Path(out) / places[value],
            options,
            {**settings, key: value},
        )
        for value in values
    }


def listed(
    methods: Sequence[str],
    *,
    swept: tuple[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> dict[Any, list[Job]]:
    """List the runs that `compare` or, at each value of a setting, `sweep` would play.

    They are checked as these check them. One list a value; of a comparison that of None.
    """
    if swept is None:
        jobs: dict[Any, list[Job]] = {None: _jobs(methods, seeds, preset, out, options, settings)}
    else:
        jobs = _sweep_jobs(methods, *swept, seeds, preset, out, options, settings)
    _check([job for mine in jobs.values() for job in mine], None, resume, None)
    return jobs
