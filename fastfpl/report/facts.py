"""What a comparison amounts to in words: units, augmentation, agreement of its runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.federation import Comparison, Result
from fastfpl.released import QUIRKS

__all__ = [
    "NONE",
    "TASK",
    "Beside",
    "Difference",
    "Row",
    "augmentation",
    "augmentations",
    "captions",
    "clients_of",
    "count",
    "dealt",
    "details",
    "differences",
    "duration",
    "each",
    "evaluations",
    "group_names",
    "listed",
    "percent",
    "public",
    "published",
    "quirks_of",
    "rate",
    "released",
    "rows",
    "runs",
    "setting",
    "size",
    "subject",
    "task",
    "trains",
    "warnings",
]

#: Stands where there is no figure or value: an en dash.
NONE = "\u2013"
#: What two runs may disagree in without being different experiments.
_OWN = ("method", "seed", "options")
#: Settings that decide time and memory, not accuracy.
_COST = ("cohort", "device", "threads")
#: Settings that say what is learnt from and what is asked: between two values nothing is ranked.
TASK = (
    *("dataset", "scenario", "target", "on_corrupt", "statistics", "clip", "pretrained"),
    *("partition", "partition_seed", "beta", "classes_per_client", "repeat_rate", "split_test"),
    *("clients", "shots", "augment", "crop", "flip"),
)


# -- numbers ---------------------------------------------------------------------------------


def percent(share: float) -> str:
    """Write a share of 1 in percent, without the sign: 0.6132 -> ``61.3``."""
    return f"{100 * share:.1f}"


def size(number: float) -> str:
    """Write bytes in decimal units: 32768 -> ``33 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        # 999.5 would be written as 1000
        if number < 999.5:
            small = unit != "B" and number < 9.95
            return f"{number:.1f} {unit}" if small else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """Write a time: 4.21 -> ``4.2 s``, 1500 -> ``25 min``."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 999.5:
        return f"{seconds:.0f} s"
    if seconds < 7170:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def rate(number: float) -> str:
    """Write a number a second: 12345.6 -> ``12,346``."""
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"


def count(number: int, thing: str) -> str:
    """Count things: (1, "seed") -> ``1 seed``, (3, "seed") -> ``3 seeds``."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def listed(values: Sequence[Any], word: str = "and") -> str:
    """Join values: ``a, b and c``."""
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {word} {texts[-1]}"


# -- runs ------------------------------------------------------------------------------------


def each(comparisons: Comparison | Sequence[Comparison]) -> list[Comparison]:
    """List one comparison, or several; refuse none."""
    found = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    if not found:
        raise InputError("fastfpl.report: comparisons must be one or more; got none")
    return found


def runs(comparison: Comparison) -> list[Result]:
    """List all results, method by method; refuse a comparison without any."""
    flat = [result for results in comparison.results.values() for result in results]
    if not flat or not all(comparison.results.values()):
        raise InputError(
            "fastfpl.report: comparison must hold a result of every method; "
            f"got {len(flat)} of {len(comparison.results)} methods"
        )
    return flat


def trains(results: Sequence[Result]) -> bool:
    """Whether a client trained in any round."""
    return any(row["selected"] for result in results for row in result.rounds)


def evaluations(result: Result) -> list[dict[str, Any]]:
    """List the rounds with an evaluation."""
    return [row for row in result.rounds if row["accuracy"] is not None]


def clients_of(result: Result) -> list[float]:
    """Accuracy of every client in the last round."""
    return [float(a) for a in evaluations(result)[-1]["clients"]]


@dataclass(frozen=True)
class Row:
    """One method's figures; ``None`` where it has none.

    Accuracies lie in [0, 1]. ``bytes_up`` and ``bytes_down`` are those of one participating client
    in one round; ``total_up`` and ``total_down`` those of a whole run over all clients. Figures are
    means over seeds; ``memory`` is the largest.
    """

    method: str
    seeds: int
    accuracy: float
    std_over_clients: float
    std_over_seeds: float | None
    last5: float
    best: float
    images_per_second: float | None
    seconds: float
    memory: int
    bytes_up: float | None
    bytes_down: float | None
    total_up: float | None
    total_down: float | None
    top: bool


def rows(comparison: Comparison) -> list[Row]:
    """One row a method; ``top`` marks the largest accuracy, if it may be compared at all."""
    runs(comparison)
    table = comparison.rows()
    largest = max(row["accuracy"] for row in table)
    comparable = len(table) > 1 and not comparison.missing
    comparable = comparable and not any(w.decides_accuracy for w in warnings(comparison))
    out = []
    for row in table:
        results = comparison.results[row["method"]]
        moving = trains(results)
        out.append(
            Row(
                method=row["method"],
                seeds=row["seeds"],
                accuracy=row["accuracy"],
                std_over_clients=row["std_over_clients"],
                std_over_seeds=row["std_over_seeds"],
                last5=row["last5"],
                best=row["best"],
                images_per_second=row["images_per_second"] if moving else None,
                seconds=row["seconds"],
                memory=row["peak_memory_bytes"],
                bytes_up=_per_client(results, "bytes_up") if moving else None,
                bytes_down=_per_client(results, "bytes_down") if moving else None,
                total_up=_total(results, "bytes_up") if moving else None,
                total_down=_total(results, "bytes_down") if moving else None,
                top=comparable and row["accuracy"] == largest,
            )
        )
    return out


def _per_client(results: Sequence[Result], key: str) -> float:
    shares = [
        row[key] / len(row["selected"]) for r in results for row in r.rounds if row["selected"]
    ]
    return math.fsum(shares) / len(shares)


def _total(results: Sequence[Result], key: str) -> float:
    return math.fsum(row[key] for r in results for row in r.rounds) / len(results)


def captions(comparison: Comparison) -> list[str]:
    """Say what the table's figures are means of, a sentence a line."""
    table = rows(comparison)
    several = any(row.seeds > 1 for row in table)
    seeds = ", mean over seeds" if several else ""
    lines = [
        f"accuracy: in %, unweighted mean over the clients, each on {_asked(comparison)}, over all "
        f"{_classes(comparison)} classes, last round{seeds}; "
        f"± standard deviation over clients, last round{seeds}"
        + ("; ± seeds: standard deviation over seeds (n-1)" if several else "")
        + "; last 5: mean of the last five evaluations"
        + "; best on test: largest of all rounds, not a headline",
        "images/s: trained images a second of training, mean over rounds; time: all rounds of a "
        "run with evaluation; memory: largest resident set of the process during the run "
        "(allocations on a GPU); up, down: bytes a participating client sends and receives in a "
        "round",
    ]
    for text in dict.fromkeys(note for r in runs(comparison) for note in _of_data(r)):
        lines.append(text)
    deal = dealt(comparison)
    if deal is not None:
        lines.append(deal)
    if any(row.images_per_second is None for row in table):
        lines[1] += f"; {NONE}: trains nothing"
    return [*lines, *released(comparison)]


def dealt(comparison: Comparison) -> str | None:
    """Say what the spread over seeds knows of the deal, as the runs themselves dealt.

    None for one seed, and for runs that did not record their deal.
    """
    flat = runs(comparison)
    deals = [r.data.get("deal") for r in flat]
    if len({r.settings["seed"] for r in flat}) < 2 or None in deals:
        return None
    same = {
        side: all(
            len({r.data["deal"][side] for r in results}) == 1
            for results in comparison.results.values()
        )
        for side in ("train", "test")
    }
    if same["train"] and same["test"]:
        return (
            "every seed deals the same images to the same clients: a spread over seeds does not "
            "contain the deal"
        )
    if same["test"]:
        return (
            "every seed gives a client the same test images and deals training images anew: a "
            "spread over seeds does not contain the deal of test images"
        )
    return (
        "every seed deals the images anew: client 0 of one seed is not client 0 of another, and a "
        "spread over seeds contains the deal"
    )


def quirks_of(result: Result) -> list[str]:
    """List the quirks of released code that a run had."""
    return [str(name) for name in result.settings.get("as_released", [])]


def released(comparison: Comparison) -> list[str]:
    """Say which runs had quirks of released code, and what those do; nothing if none had."""
    by = {
        method: list(dict.fromkeys(name for r in results for name in quirks_of(r)))
        for method, results in comparison.results.items()
    }
    if not any(by.values()):
        return []
    parts = [f"{method} with {listed(names)}" for method, names in by.items() if names]
    known = [name for name in QUIRKS if any(name in names for names in by.values())]
    return [
        "as released, not as published: " + "; ".join(parts),
        *(f"{name}: {QUIRKS[name].about}" for name in known),
    ]


def _of_data(result: Result) -> list[str]:
    """Say what a reader of the figures must know of the images."""
    lines = [f"{result.data['name']}: {note}" for note in result.data["notes"]]
    if result.data["transductive"]:
        lines.append(f"{result.method} adapted on the unlabelled test images (transductive)")
    return lines


def _asked(comparison: Comparison) -> str:
    """Say on which images clients are tested for the headline."""
    found = [next(iter(r.data["exams"].values())) for r in runs(comparison)]
    return listed(list(dict.fromkeys(found)), "or")


def details(comparison: Comparison) -> tuple[list[str], list[list[str]], list[str]] | None:
    """Figures beside the headline: column titles, a line a method, and what the columns mean.

    None if there is one question and one visual domain: the headline says it all.
    """
    table = comparison.rows()
    exams = list(dict.fromkeys(name for row in table for name in row["exams"]))
    domains = list(dict.fromkeys(name for row in table for name in row["domains"]))
    if len(exams) < 2 and len(domains) < 2:
        return None
    columns = [*(exams if len(exams) > 1 else [])]
    harmonic = any(row["harmonic_mean"] is not None for row in table)
    titles = ["method", *columns, *(["harmonic mean"] * harmonic), "macro F1"]
    titles += domains if len(domains) > 1 else []
    lines = []
    for row in table:
        figures = [row["exams"].get(name) for name in columns]
        figures += [row["harmonic_mean"]] * harmonic
        figures.append(row["macro_f1"])
        figures += [row["domains"].get(name) for name in domains] if len(domains) > 1 else []
        lines.append([row["method"], *(NONE if f is None else percent(f) for f in figures)])
    abouts: dict[str, str] = {}
    for result in runs(comparison):
        abouts |= result.data["exams"]
    notes = [f"{name}: accuracy on {abouts[name]}" for name in columns]
    if harmonic:
        notes.append("harmonic mean: of base and novel")
    notes.append(
        "macro F1: of the headline's question, mean over the classes that occur among a client's "
        "labels, then over clients"
    )
    if len(domains) > 1:
        notes.append(
            "by domain: the headline's accuracy on the images of one visual domain, mean over the "
            "clients that have some"
        )
    return titles, lines, notes


@dataclass(frozen=True)
class Beside:
    """Figures of papers beside the measured ones.

    Attributes
    ----------
    titles : list of str
        Of the columns.
    lines : list of list of str
        One a figure: method, which figure, published, measured, number of the source.
    notes : list of str
        What the columns mean, and the sources.
    cautions : list of str
        Why figures of a source must not be trusted.
    """

    titles: list[str]
    lines: list[list[str]]
    notes: list[str]
    cautions: list[str]


def published(comparison: Comparison) -> Beside | None:
    """Set what papers report beside what was measured; None if no run has a preset with figures.

    The spread of a measured figure is that over seeds, where there are several.
    """
    table = {row["method"]: row for row in comparison.rows()}
    sources: dict[str, int] = {}
    lines: list[list[str]] = []
    cautions: dict[str, list[str]] = {}
    matched: dict[str, set[str]] = {}
    for method, results in comparison.results.items():
        found = [one for r in results if r.preset is not None for one in r.preset["published"]]
        for one in _distinct(found):
            number = sources.setdefault(one["source"], len(sources) + 1)
            matched.setdefault(method, set()).update(one["where"])
            for name, text in one["figures"].items():
                lines.append([method, name, text, _measured(table[method], name), f"[{number}]"])
            for text in one["cautions"]:
                cautions.setdefault(text, []).append(method)
    if not lines:
        return None
    ours = list(dict.fromkeys(r.preset["name"] for r in runs(comparison) if r.preset is not None))
    changed = _changed(comparison, matched)
    seeds = {r.settings["seed"] for r in runs(comparison)}
    quirks = any(quirks_of(r) for r in runs(comparison))
    fresh = "" if quirks else ", fresh optimiser for every client and round"
    notes = [
        f"measured: on this machine, in %, by the protocol of the preset {listed(ours, 'or')} "
        f"(last round{fresh}), not by the paper's code, {count(len(seeds), 'seed')}"
        + (f"; with {', '.join(changed)}" if changed else ""),
        "published: in %, as printed; accuracy is the headline",
        *(f"[{number}]: {source}" for source, number in sources.items()),
    ]
    # quirks of released code lead towards the paper's figures, not away from them
    if any(not text.startswith("as_released=") for text in changed):
        notes.insert(1, "settings differ from the preset's: the two columns are not comparable")
    return Beside(
        ["method", "figure", "published", "measured", "source"],
        lines,
        notes,
        [
            f"published figures of {listed(list(dict.fromkeys(who)))}: {text}"
            for text, who in cautions.items()
        ],
    )


def _distinct(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what another seed has said already."""
    return [one for number, one in enumerate(found) if one not in found[:number]]


def _measured(row: dict[str, Any], name: str) -> str:
    if name == "accuracy":
        spread = row["std_over_seeds"]
        return percent(row["accuracy"]) + ("" if spread is None else f" ± {percent(spread)}")
    value = row["exams"].get(name, row["domains"].get(name))
    return NONE if value is None else percent(value)


def _changed(comparison: Comparison, matched: dict[str, set[str]]) -> list[str]:
    """Name the settings that runs have in place of their preset's: ``rounds=1 in place of 10``.

    What a source's own settings ask for, and the run has, is no change.
    """
    texts: dict[str, None] = {}
    for result in runs(comparison):
        if result.preset is None or result.method not in matched:
            continue
        for key, (theirs, mine) in result.preset["changed"].items():
            if key.removeprefix(f"{result.method}.") in matched[result.method]:
                continue
            shown = ["all" if key == "shots" and v is None else public(v) for v in (mine, theirs)]
            texts[f"{key}={shown[0]} in place of {shown[1]}"] = None
    return list(texts)


def _classes(comparison: Comparison) -> str:
    found = sorted({len(r.data["classes"]) for r in runs(comparison)})
    return listed(found, "or")


# -- words -----------------------------------------------------------------------------------


def augmentation(settings: dict[str, Any]) -> str:
    """Say in words which views of an image training sees."""
    kind = str(settings["augment"])
    if kind == "none":
        return "one deterministic view each, encoded once (augment=none)"
    crops = f"random crops of at least {100 * settings['crop']:g} % of the area"
    if settings["flip"]:
        crops += f", mirrored with probability {settings['flip']:g}"
    if kind == "fresh":
        return f"new {crops} in every step (augment=fresh)"
    return f"{kind[6:]} fixed {crops} each, encoded once (augment={kind})"


def augmentations(comparison: Comparison) -> list[str]:
    """Say which views training sees, once for each way that occurs among runs that train."""
    found = [augmentation(r.settings) for r in runs(comparison) if trains([r])]
    return list(dict.fromkeys(found)) or ["none, nothing trains"]


def subject(comparison: Comparison) -> str:
    """Name data set, partition, clients, rounds and seeds, as every run has them."""
    flat = runs(comparison)

    def each(values: Sequence[Any]) -> str:
        return " or ".join(dict.fromkeys(str(v) for v in values))

    clients = sorted({len(r.data["test_images"]) for r in flat})
    rounds = sorted({len(r.rounds) for r in flat if trains([r])} or {len(r.rounds) for r in flat})
    seeds = {r.settings["seed"] for r in flat}
    return ", ".join(
        [
            each([r.data["name"] for r in flat]),
            f"{each([r.settings['partition'] for r in flat])} partition",
            f"{each(clients)} {'client' if clients == [1] else 'clients'}",
            f"{each(rounds)} {'round' if rounds == [1] else 'rounds'}",
            count(len(seeds), "seed"),
        ]
    )


_ABSOLUTE = re.compile(r"^(file:|~|/|\\\\|[A-Za-z]:[\\/])")


def public(value: Any) -> str:
    """Write a setting for people; of a path, only its last name, never where it lies."""
    if value is None:
        return NONE
    if isinstance(value, dict):
        return ", ".join(f"{k}={public(v)}" for k, v in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(public(v) for v in value) or NONE
    text = str(value)
    if _ABSOLUTE.match(text):
        last = PureWindowsPath(PurePosixPath(text).name).name
        return f"…/{last}"
    return text


def setting(result: Result, key: str) -> str:
    """Write a run's setting for people."""
    value = result.settings.get(key)
    return "all" if key == "shots" and value is None else public(value)


# -- tasks -----------------------------------------------------------------------------------


def task(result: Result) -> tuple[str, ...]:
    """Say what a run's accuracy is an accuracy of: equal for runs that may stand in one table."""
    data = result.data
    return (
        *(repr(result.settings.get(key)) for key in TASK),
        *(repr(data[key]) for key in ("name", "classes", "weights")),
    )


def group_names(comparisons: Sequence[Comparison]) -> list[str]:
    """Name each of several comparisons by the settings in which their tasks differ."""
    firsts = [runs(comparison)[0] for comparison in comparisons]
    if len(firsts) < 2:
        return [""] * len(firsts)
    keys = [k for k in TASK if len({repr(r.settings.get(k)) for r in firsts}) > 1]
    names = [", ".join(f"{key}={setting(r, key)}" for key in keys) for r in firsts]
    if len(set(names)) < len(names):  # other lists of classes, other weights of one name
        names = [f"task {n}" + f": {name}" * bool(name) for n, name in enumerate(names, 1)]
    return names


# -- agreement -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Something in which runs disagree.

    Attributes
    ----------
    about : str
        What differs.
    values : dict from str to list of str
        The runs that have each value.
    decides_accuracy : bool
        False if only time and memory can depend on it.
    """

    about: str
    values: dict[str, list[str]]
    decides_accuracy: bool

    @property
    def sentence(self) -> str:
        """Say who has what."""
        return f"{self.about}: " + "; ".join(
            f"{value} ({', '.join(who)})" for value, who in self.values.items()
        )


def differences(comparison: Comparison) -> list[Difference]:
    """List the settings that differ between runs, but method, seed and the method's options."""
    flat = runs(comparison)
    keys = dict.fromkeys(key for r in flat for key in r.settings)
    ordered = [k for k in Settings.model_fields if k in keys]
    ordered += [k for k in keys if k not in Settings.model_fields]
    # where a data set lies does not matter, its content does; quirks are compared one by one
    skipped = (*_OWN, "root", "target_root", "as_released")
    return list(
        _compare(
            comparison,
            [(k, k, k not in _COST) for k in ordered if k not in skipped],
            lambda result, key: setting(result, key),
        )
    )


def warnings(comparison: Comparison) -> list[Difference]:
    """List everything that forbids to read the runs' figures side by side."""
    found = differences(comparison)
    # augmentation first: it is the easiest to overlook
    found.sort(key=lambda d: (d.about != "augment", not d.decides_accuracy))
    found += _compare(
        comparison,
        [("name", "data set", True), ("weights", "weights of CLIP", True)],
        lambda result, key: result.data.get(key),
    )
    found += _classes_differ(comparison)
    found += _seeds_differ(comparison)
    found += _quirks_differ(comparison)
    names = dict.fromkeys(key for r in runs(comparison) for key in r.environment)
    found += _compare(
        comparison,
        [(name, name.replace("_", " "), False) for name in names],
        lambda result, key: result.environment.get(key),
    )
    return _once(found)


def _once(found: list[Difference]) -> list[Difference]:
    """Drop what a setting has said already: dataset, device and threads come back as facts."""
    kept: dict[tuple[str, frozenset[tuple[str, ...]]], Difference] = {}
    for one in found:
        who = frozenset(tuple(names) for names in one.values.values())
        kept.setdefault((one.about.replace(" ", ""), who), one)
    return list(kept.values())


def _compare(
    comparison: Comparison, keys: Sequence[tuple[str, str, bool]], value: Any
) -> Iterator[Difference]:
    for key, about, decides in keys:
        by: dict[str, list[Result]] = {}
        for result in runs(comparison):
            by.setdefault(public(value(result, key)), []).append(result)
        if len(by) > 1:
            yield Difference(about, {v: _names(comparison, who) for v, who in by.items()}, decides)


def _names(comparison: Comparison, results: Sequence[Result]) -> list[str]:
    """Name runs: a method whose runs are all there by its name, else with the seed."""
    names = []
    for method, all_of in comparison.results.items():
        mine = [r for r in results if any(r is one for one in all_of)]
        if len(mine) == len(all_of):
            names.append(method)
        else:
            names += [f"{method} seed {r.settings['seed']}" for r in mine]
    return names


def _classes_differ(comparison: Comparison) -> Iterator[Difference]:
    by: dict[tuple[str, ...], list[Result]] = {}
    for result in runs(comparison):
        by.setdefault(tuple(result.data["classes"]), []).append(result)
    if len(by) > 1:
        values: dict[str, list[str]] = {}
        for number, (classes, who) in enumerate(by.items(), 1):
            values[f"list {number} of {len(classes)}"] = _names(comparison, who)
        yield Difference("class names", values, True)


def _quirks_differ(comparison: Comparison) -> Iterator[Difference]:
    """Find quirks of released code that only some of the runs have that could have them."""
    for name, quirk in QUIRKS.items():
        able = [r for r in runs(comparison) if r.method in quirk.methods]
        on = [r for r in able if name in quirks_of(r)]
        off = [r for r in able if name not in quirks_of(r)]
        if on and off:
            values = {"on": _names(comparison, on), "off": _names(comparison, off)}
            yield Difference(f"as released, {name}", values, True)


def _seeds_differ(comparison: Comparison) -> Iterator[Difference]:
    by: dict[str, list[str]] = {}
    for method, results in comparison.results.items():
        seeds = ", ".join(str(s) for s in sorted(r.settings["seed"] for r in results))
        by.setdefault(seeds, []).append(method)
    if len(by) > 1:
        yield Difference("seeds", by, True)
