"""What a comparison amounts to: a row a method, and the sentences that belong to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastfpl.federation import Comparison, Result
from fastfpl.released import QUIRKS
from fastfpl.report.agreement import warnings
from fastfpl.report.runs import clients_of, named_clients, quirks_of, runs, trains
from fastfpl.report.words import NONE, count, listed, percent

__all__ = [
    "Row",
    "augmentation",
    "augmentations",
    "captions",
    "client_means",
    "dealt",
    "details",
    "left_out",
    "released",
    "rows",
    "subject",
]

_MERGES = {
    "mean": "their mean",
    "median": "the median of every number",
    "trimmed": "the trimmed mean of every number",
    "krum": "Krum",
}


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
    lines += [
        f"{text}: a client trains on so many of each class at most; shots=all takes every one"
        for text in left_out(comparison)
    ]
    deal = dealt(comparison)
    if deal is not None:
        lines.append(deal)
    if any(row.images_per_second is None for row in table):
        lines[1] += f"; {NONE}: trains nothing"
    lines += networked(comparison) + private(comparison) + robust(comparison)
    return [*lines, *released(comparison)]


def networked(comparison: Comparison) -> list[str]:
    """Say of every method that ran on Flower what did not arrive or was refused."""
    lines = []
    for method, results in comparison.results.items():
        told = [r.flower for r in results if r.flower is not None]
        if told:
            refused, failed, absent = (
                sum(one[key] for one in told) for key in ("refused", "failed", "absent")
            )
            lines.append(
                f"{method} ran on Flower: {refused} answers of clients refused, {failed} failed, "
                f"{absent} missing; bytes are those of arrays, without envelopes"
            )
    return lines


def private(comparison: Comparison) -> list[str]:
    """Say of every method what its runs guarantee of a client, and of what."""
    lines = []
    for method, results in comparison.results.items():
        for told in dict.fromkeys(
            (r.rounds[-1]["epsilon"], r.settings["dp_delta"], r.settings.get("dp_unit", "client"))
            for r in results
            if r.rounds[-1].get("epsilon") is not None
        ):
            what = "merged prompts" if told[2] == "client" else "what clients send"
            lines.append(
                f"{method}: {what} are ({told[0]:.3g}, {told[1]:g})-differentially private of "
                f"{told[2]}s after the last round; losses and accuracies are not covered"
            )
    return lines


def robust(comparison: Comparison) -> list[str]:
    """Say of every method how its uploads were merged where it was no plain mean of them."""
    lines = []
    for method, results in comparison.results.items():
        told: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
        for one in results:
            how = one.settings.get("merge", "mean"), one.settings.get("clip_update")
            told.setdefault(how, []).extend(r["merge"] for r in one.rounds if r.get("merge"))
        for (rule, clip), rows in told.items():
            if not rows:
                continue
            cut = "" if clip is None else f", each cut to a move of norm {clip:g}"
            few = sum(not row["used"] for row in rows)
            note = f"; in {few} of {len(rows)} rounds too few arrived to merge any" if few else ""
            lines.append(f"{method}: uploads are merged by {_MERGES.get(rule, rule)}{cut}{note}")
    return lines


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

    None if there is one question and one visual domain, and clients are but numbers: the headline
    says it all.
    """
    table = comparison.rows()
    exams = list(dict.fromkeys(name for row in table for name in row["exams"]))
    domains = list(dict.fromkeys(name for row in table for name in row["domains"]))
    clients = named_clients(runs(comparison))
    if len(exams) < 2 and len(domains) < 2 and not clients:
        return None
    columns = [*(exams if len(exams) > 1 else [])]
    harmonic = any(row["harmonic_mean"] is not None for row in table)
    titles = ["method", *columns, *(["harmonic mean"] * harmonic), "macro F1"]
    several = domains if len(domains) > 1 else []
    # each vendor may be a client and a style of its own
    apart = set(several) & set(clients)
    titles += [*several, *(f"client {name}" if name in apart else name for name in clients)]
    lines = []
    for row in table:
        figures = [row["exams"].get(name) for name in columns]
        figures += [row["harmonic_mean"]] * harmonic
        figures.append(row["macro_f1"])
        figures += [row["domains"].get(name) for name in domains] if len(domains) > 1 else []
        figures += client_means(comparison.results[row["method"]]) if clients else []
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
    if clients:
        notes.append(
            f"by client: accuracy on {_asked(comparison)}; {NONE}: it has no test images of its own"
        )
    return titles, lines, notes


def client_means(results: Sequence[Result]) -> list[float | None]:
    """Average every client's accuracy in the last round over runs of one method."""
    means: list[float | None] = []
    for of_one in zip(*(clients_of(r) for r in results), strict=True):
        there = [a for a in of_one if a is not None]
        means.append(math.fsum(there) / len(there) if there else None)
    return means


def left_out(comparison: Comparison) -> list[str]:
    """Say how many training images few shots leave, once for each way that occurs."""
    said = []
    for result in runs(comparison):
        found, shots = result.data.get("training"), result.settings["shots"]
        if found is None or shots is None or not trains([result]):
            continue
        if found["used"] < found["there"]:
            said.append(
                f"{count(shots, 'shot')}, {found['used']:,} of {found['there']:,} training images"
            )
    return list(dict.fromkeys(said))


def _classes(comparison: Comparison) -> str:
    found = sorted({len(r.data["classes"]) for r in runs(comparison)})
    return listed(found, "or")


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
            *left_out(comparison),
        ]
    )
