"""All methods on `glyphs`: ``python -m bench.glyphs_table --work DIR``.

Four protocols, every domain left out in turn, few shots, and the papers' own budgets. Resumable: a
run that is finished is read back, one that was stopped goes on. Writes ``docs/results.json`` and
the tables of ``docs/results.md`` between its markers. ``--seed N`` plays one seed and writes
nothing, for processes side by side; ``--protocol NAME`` plays no other one; ``--finished`` plays
nothing and takes, of each protocol, the seeds that all its methods have finished; a table of which
nothing is finished is left out. What ``docs/results.json`` holds of other seeds, of the same
weights and budget, stays: seeds may be played on several machines, one after another.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import fastfpl
from bench.kept import between
from fastfpl.features.file import KINDS
from fastfpl.files import write_json
from fastfpl.methods import METHODS

#: The budget, the same for every method; nothing in it was tuned.
BUDGET: dict[str, Any] = {"rounds": 10, "local_epochs": 1, "batch_size": 16, "shots": 16}
BUDGET |= {"n_ctx": 16}
#: Learning rates of the papers or released scripts; 0.002 elsewhere.
RATES = {
    "fedotp": 0.001,
    "fedpgp": 0.001,
    "fedapt": 0.01,
    "fedapt-unsupervised": 0.01,
}
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
SHOTS = (1, 2, 4, 8)  # 16 is the pathological protocol itself
PATHOLOGICAL: dict[str, Any] = {"partition": "pathological", "clients": 10}
DOMAIN: dict[str, Any] = {"partition": "domain", "clients": 6}
#: Rounds and epochs of the released scripts (fastfpl/presets), beside those who have none.
OWN_BUDGETS: dict[str, dict[str, Any]] = {
    "zeroshot": PATHOLOGICAL,
    "local": PATHOLOGICAL | {"rounds": 10, "local_epochs": 5},
    "promptfl": PATHOLOGICAL | {"rounds": 10, "local_epochs": 5},
    "pfedmoap": PATHOLOGICAL | {"rounds": 10, "local_epochs": 5},
    "fedotp": PATHOLOGICAL | {"rounds": 10, "local_epochs": 5},
    "fedpgp": PATHOLOGICAL | {"rounds": 25, "local_epochs": 2},
    "fedapt": DOMAIN | {"rounds": 50, "local_epochs": 1},
    "fedapt-unsupervised": DOMAIN | {"rounds": 30, "options": {"pseudo_rounds": 10}},
}
DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Protocol:
    """What a column or a table of the page is played with, over the budget."""

    settings: dict[str, dict[str, Any]]  # by method


def _all(**settings: Any) -> Protocol:
    return Protocol(dict.fromkeys(METHODS, settings))


PROTOCOLS = {
    "pathological": _all(**PATHOLOGICAL),
    "dirichlet": _all(partition="dirichlet", beta=0.3, clients=10),
    "domains": _all(**DOMAIN),
    "base-to-novel": _all(scenario="base-to-novel", **PATHOLOGICAL),
    "own budgets": Protocol(OWN_BUDGETS),
    **{f"{n} shots": _all(**PATHOLOGICAL, shots=n) for n in SHOTS},
    **{
        f"unseen {name}": _all(
            scenario="leave-one-domain-out", target=name, partition="domain", clients=5
        )
        for name in DOMAINS
    },
}


def folder_of(work: Path, protocol: str, method: str, seed: int) -> Path:
    """Where a run of the table lies."""
    return work / protocol.replace(" ", "-") / f"{method}-seed{seed}"


def settings_of(protocol: str, method: str, seed: int) -> dict[str, Any]:
    """Return the settings of a run of the table."""
    settings = BUDGET | {"lr": RATES.get(method, 0.002)} | PROTOCOLS[protocol].settings[method]
    # learning without labels needs a second view of every image
    views = {} if METHODS[method].supervised else {"augment": "views:2"}
    return settings | views | {"seed": seed, "evaluate_every": settings["rounds"]}


def play(work: Path, protocol: str, method: str, seed: int) -> fastfpl.Result:
    """Play one run to its end, or read it back."""
    folder = folder_of(work, protocol, method, seed)
    if (folder / "result.json").is_file():
        return fastfpl.Result.load(folder)
    how: dict[str, Any] = settings_of(protocol, method, seed)
    cache = work / "features"
    return fastfpl.run(method, out=folder, resume=True, cache=cache, also=KINDS, **how)


def finished(work: Path, seeds: int) -> Iterator[tuple[str, str, int]]:
    """Name the runs of every protocol and seed that all of its methods have finished."""
    for seed in range(seeds):
        for protocol, asked in PROTOCOLS.items():
            folders = [folder_of(work, protocol, method, seed) for method in asked.settings]
            if all((folder / "result.json").is_file() for folder in folders):
                yield from ((protocol, method, seed) for method in asked.settings)


def cell(values: list[float]) -> str:
    """Mean and standard deviation (n-1) over seeds, in per cent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def facts() -> dict[str, Any]:
    """Say what figures of two machines must share to stand in one table."""
    digest = fastfpl.load_clip("tiny").weights_digest
    return {"library": fastfpl.__version__, "weights": digest, "budget": BUDGET, "rates": RATES}


def with_committed(
    mine: dict[str, Any], seeds: dict[str, list[int]], committed: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Add figures of other seeds, or of other protocols, that are written down already.

    Parameters
    ----------
    mine : dict
        As `figures` returns it, one number a seed.
    seeds : dict
        Of every protocol in it, ascending.
    committed : dict
        ``docs/results.json`` as it is; of other facts nothing is taken.
    """
    if any(committed.get(name) != value for name, value in facts().items()):
        return mine, seeds
    table, known = {}, {}
    for protocol in PROTOCOLS:
        parts = [(mine, seeds.get(protocol, [])), (committed, committed["seeds"].get(protocol, []))]
        # what was played here counts before what was written down
        where = {
            seed: (of, nth) for of, listed in reversed(parts) for nth, seed in enumerate(listed)
        }
        if not where:
            continue
        known[protocol] = sorted(where)
        first = next(iter(where.values()))[0]
        table[protocol] = {
            method: {
                name: [of[protocol][method][name][nth] for _, (of, nth) in sorted(where.items())]
                for name in names
            }
            for method, names in first[protocol].items()
        }
    return table, known


def figures(results: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Figures by protocol, method and name, one number a seed."""
    table: dict[str, Any] = {}
    for protocol, methods in results.items():
        for method, finals in methods.items():
            mine: dict[str, list[float]] = {}
            for final in finals:
                for name, value in final["exams"].items():
                    mine.setdefault(name, []).append(round(value, 4))
                if "harmonic_mean" in final:
                    mine.setdefault("harmonic mean", []).append(round(final["harmonic_mean"], 4))
                if protocol == "domains":
                    for name, value in final["domains"].items():
                        mine.setdefault(name, []).append(round(value, 4))
            table.setdefault(protocol, {})[method] = mine
    return table


def table(first: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """One table in Markdown."""
    lines = [f"| {first} | {' | '.join(columns)} |", "|:--" + "|--:" * len(columns) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def tables(found: dict[str, Any]) -> str:
    """Write the tables in Markdown whose protocols are all there.

    Headings say how many seeds stand behind a column.
    """
    whole = (_simple, _novel, _domains, _left_out, _few, _own_budgets)
    return "\n\n".join(text for one in whole if (text := one(found)))


def _seeds(found: dict[str, Any], protocol: str) -> str:
    values = next(iter(found[protocol]["zeroshot"].values()))
    return f"{len(values)} seed" + "s" * (len(values) > 1)


def _columns(found: dict[str, Any], asked: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Cells of every method; none at all where a protocol is not there."""
    if not all(protocol in found for protocol, _ in asked.values()):
        return {}
    return {m: [cell(found[p][m][name]) for p, name in asked.values()] for m in METHODS}


def _simple(found: dict[str, Any]) -> str:
    titles = {
        "pathological": "pathological",
        "dirichlet": "Dirichlet 0.3",
        "domains": "six domains",
    }
    asked = {title: (protocol, "own") for protocol, title in titles.items()}
    rows = _columns(found, asked)
    heads = [f"{title}, {_seeds(found, p)}" for p, title in titles.items()] if rows else []
    return table("method", heads, rows) if rows else ""


def _novel(found: dict[str, Any]) -> str:
    parts = ("local", "base", "novel", "harmonic mean")
    rows = _columns(found, {name: ("base-to-novel", name) for name in parts})
    return (
        table(f"base to novel, {_seeds(found, 'base-to-novel')}", list(parts), rows) if rows else ""
    )


def _domains(found: dict[str, Any]) -> str:
    rows = _columns(found, {name: ("domains", name) for name in DOMAINS})
    return table(f"six domains, {_seeds(found, 'domains')}", list(DOMAINS), rows) if rows else ""


def _titled(
    found: dict[str, Any], first: str, asked: dict[str, tuple[str, str]]
) -> tuple[str, list[str], bool]:
    """Say in the heading how many seeds there are, or in each column where they differ."""
    seeds = {title: _seeds(found, protocol) for title, (protocol, _) in asked.items()}
    if len(set(seeds.values())) > 1:
        return first, [f"{title}, {number}" for title, number in seeds.items()], False
    return f"{first}, {next(iter(seeds.values()))}", list(asked), True


def _left_out(found: dict[str, Any]) -> str:
    left = {name: (f"unseen {name}", "target") for name in DOMAINS}
    rows = _columns(found, left)
    if not rows:
        return ""
    heading, titles, same = _titled(found, "domain left out", left)
    for method, cells in rows.items() if same else ():  # else no seed has a mean over all yet
        each = zip(*(found[p][method][name] for p, name in left.values()), strict=True)
        cells.append(cell([statistics.fmean(one) for one in each]))
    return table(heading, [*titles, "mean"] if same else titles, rows)


def _few(found: dict[str, Any]) -> str:
    few = {f"{n}": (f"{n} shots", "own") for n in SHOTS} | {"16": ("pathological", "own")}
    rows = _columns(found, few)
    if not rows:
        return ""
    heading, titles, _ = _titled(found, "shots, pathological", few)
    return table(heading, titles, rows)


def _own_budgets(found: dict[str, Any]) -> str:
    if not {"own budgets", "pathological", "domains"} <= set(found):
        return ""
    rows = {}
    for method, asked in OWN_BUDGETS.items():
        budget = BUDGET | asked
        epochs = budget["local_epochs"]
        said = f"{budget['rounds']} rounds of {epochs} epoch" + "s" * (epochs > 1)
        where = "six domains" if asked["partition"] == "domain" else "pathological"
        short = "domains" if asked["partition"] == "domain" else "pathological"
        mine = found["own budgets"][method]["own"]
        rows[method] = [where, said, cell(mine), cell(found[short][method]["own"])]
    heads = [f"played, {_seeds(found, 'own budgets')}", "own budget", "accuracy"]
    return table("method", [*heads, "in 10 rounds of 1"], rows)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="runs and features")
@click.option("--seeds", default=3, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="play this one, write nothing")
@click.option(
    "--protocol", "asked", type=click.Choice(list(PROTOCOLS)), multiple=True, help="these alone"
)
@click.option("--finished", "only", is_flag=True, help="play nothing, write what is finished")
def main(work: Path, seeds: int, seed: int | None, asked: tuple[str, ...], only: bool) -> None:
    """Play what is missing and write the tables."""
    chosen = range(seeds) if seed is None else (seed,)
    for number in () if only else chosen:
        for protocol in asked or PROTOCOLS:
            for method in PROTOCOLS[protocol].settings:
                accuracy = play(work, protocol, method, number).final["accuracy"]
                click.echo(f"seed {number}  {protocol}  {method}  {accuracy:.3f}")
    if seed is not None:
        return
    results: dict[str, dict[str, list[Any]]] = {p: {} for p in PROTOCOLS}
    played: dict[str, list[int]] = {}
    for protocol, method, number in finished(work, seeds):
        final = play(work, protocol, method, number).final
        results[protocol].setdefault(method, []).append(final)
        played[protocol] = sorted({*played.get(protocol, []), number})
    if not any(results.values()):
        raise click.ClickException(
            f"a protocol must have a seed that all its methods finished in {work}; got none: run "
            "without --finished"
        )
    before = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    found, all_seeds = with_committed(figures(results), played, before)
    write_json(DOCS / "results.json", {**facts(), "seeds": all_seeds, **found})
    between(DOCS / "results.md", "tables", tables(found))


if __name__ == "__main__":
    main()
