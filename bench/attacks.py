"""What each merge keeps when some clients are hostile: ``python -m bench.attacks --work DIR``.

PromptFL on `glyphs` with the embedded CLIP, in one process. A share of the clients, drawn from the
seed, is hostile in every round: it learns from turned labels, or sends something else than what it
has trained. The figure is the accuracy of the last merged prompt on the own test images of the
honest clients.

Resumable: a run that is finished is read back. Writes the table of ``docs/privacy.md`` between its
markers, or prints it (``--print``).
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.glyphs_table import cell
from bench.kept import between, kept
from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.config import make_settings
from fastfpl.data import Dataset
from fastfpl.errors import InputError
from fastfpl.federation import Federation
from fastfpl.federation.preparation import Place, Plan, plan, prepare
from fastfpl.federation.rounds import Played, StateKeeper
from fastfpl.federation.sampling import Call
from fastfpl.federation.states import StateFiles
from fastfpl.methods import State
from fastfpl.seeds import generator

#: What a hostile client sends: of what it had downloaded, what it has trained, and a generator.
Spoil = Callable[[State, State, torch.Generator], State]

FACTOR, DEVIATION = 10.0, 1.0
CLIENTS, SHARES = 10, (0.1, 0.3)
BUDGET = {"rounds": 10, "local_epochs": 1, "batch_size": 16, "shots": 16, "n_ctx": 16}
PARTITIONS = ("iid", "pathological")
#: Rules that are to bear three hostile clients of ten, whoever is there.
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {"merge": "median"},
    "trimmed 0.3": {"merge": "trimmed", "trim": 0.3},
    "Krum 3": {"merge": "krum", "krum_malicious": 3},
    "Krum 3, 7 kept": {"merge": "krum", "krum_malicious": 3, "krum_kept": 7},
    "mean, clip 0.1": {"clip_update": 0.1},
    "median, clip 0.1": {"merge": "median", "clip_update": 0.1},
}


def turned(down: State, trained: State, draw: torch.Generator) -> State:
    """Move ten times as far, the other way."""
    return {n: down[n] - FACTOR * (t - down[n]) for n, t in trained.items()}


def noisy(down: State, trained: State, draw: torch.Generator) -> State:
    """Add noise of deviation 1 to every number."""
    return {
        n: t + DEVIATION * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t)
        for n, t in trained.items()
    }


def as_trained(down: State, trained: State, draw: torch.Generator) -> State:
    """Send what was trained, from wrong labels."""
    return trained


ATTACKS: dict[str, Spoil] = {"labels": as_trained, "scaled": turned, "noise": noisy}
WORDS = {"labels": "labels turned", "scaled": "update by -10", "noise": "noise"}


@dataclasses.dataclass
class Attacked(Federation):
    """A federation some of whose clients are hostile.

    Attributes
    ----------
    hostile : set of int
    spoil : callable
        What they send.
    """

    hostile: frozenset[int] = frozenset()
    spoil: Spoil = as_trained

    def _play(self, call: Call, uploads: StateFiles, downloads: StateKeeper) -> Played:
        played = super()._play(call, uploads, downloads)
        for client in sorted(self.hostile & set(uploads)):
            draw = generator(self.settings.seed, "hostile", self.now.number, client)
            down = self.now.download(self.method, client)
            trained = dict(uploads[client])
            uploads.put(client, self.spoil(down, trained, draw))
        return played


def hostile_of(seed: int, clients: int, share: float) -> frozenset[int]:
    """Draw the hostile clients; those of a smaller share are among those of a larger one."""
    order = torch.randperm(clients, generator=generator(seed, "who is hostile"))
    return frozenset(order[: round(share * clients)].tolist())


def with_turned_labels(planned: Plan, hostile: frozenset[int]) -> Plan:
    """Let hostile clients see class c as class C - 1 - c in training."""
    scenario = planned.scenario
    shards = [scenario.shards[c].train for c in range(len(scenario.shards))]
    mine = np.unique(np.concatenate([shards[c] for c in hostile] or [np.empty(0, np.int64)]))
    others = [images for c, images in enumerate(shards) if c not in hostile]
    if len(np.intersect1d(mine, np.concatenate(others))):
        raise InputError("bench: clients must share no training image; got some that do")
    split = copy.copy(scenario.dataset.train)
    labels = split.labels.copy()
    labels[mine] = len(scenario.dataset.classnames) - 1 - labels[mine]
    object.__setattr__(split, "labels", labels)
    dataset = dataclasses.replace(scenario.dataset, train=split)
    return dataclasses.replace(planned, scenario=dataclasses.replace(scenario, dataset=dataset))


def attacked(
    settings: dict[str, Any],
    attack: str,
    share: float,
    model: FrozenCLIP,
    cache: Path | None = None,
    known: dict[Place, Dataset] | None = None,
) -> Attacked:
    """Prepare a federation of which a share is hostile."""
    chosen = make_settings(settings)
    planned = plan(chosen, model=model, datasets=known)
    clients = len(planned.scenario.shards)
    hostile = hostile_of(chosen.seed, clients, share)
    if attack == "labels":
        planned = with_turned_labels(planned, hostile)
    made = prepare(planned, model=model, cache=cache)
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}
    return Attacked(**fields, hostile=hostile, spoil=ATTACKS[attack])


def play(federation: Attacked) -> dict[str, Any]:
    """Play it to its end; return the honest clients' accuracy and whose uploads counted."""
    hostile = federation.hostile
    while not federation.finished:
        row = federation.round()
    honest = [a for c, a in enumerate(row["clients"]) if c not in hostile and a is not None]
    used = [c for r in federation.rounds for c in r.get("merge", {}).get("used", r["selected"])]
    return {
        "accuracy": statistics.fmean(honest),
        "hostile": sorted(hostile),
        "hostile_used": sum(c in hostile for c in used) / max(len(used), 1),
    }


def table(
    found: dict[tuple[str, str, str, float], list[dict[str, Any]]],
    partitions: Sequence[str],
    columns: Sequence[tuple[str, float]],
) -> str:
    """Write the table of each partition in Markdown: a row a rule, in per cent."""
    lines: list[str] = []
    for partition in partitions:
        seeds = len(found[partition, "mean", "none", 0.0])
        titles = ["nobody hostile"] + [f"{WORDS[a]}, {100 * s:.0f} %" for a, s in columns]
        head = f"{partition}, {seeds} seed" + "s" * (seeds > 1)
        lines += ["", f"| {head} | {' | '.join(titles)} |", "|:--" + "|--:" * len(titles) + "|"]
        for rule in RULES:
            cells = [
                cell([one["accuracy"] for one in found[partition, rule, attack, share]])
                for attack, share in (("none", 0.0), *columns)
            ]
            lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="runs and features")
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=None, type=int, help="CPU threads")
@click.option("--small", is_flag=True, help="digits, one partition, two rounds: to try it")
@click.option("--print", "shown", is_flag=True, help="the table, in the place of docs/privacy.md")
def main(work: Path, seeds: int, threads: int | None, small: bool, shown: bool) -> None:
    """Play what is missing and write the table."""
    model = load_clip("tiny")
    base: dict[str, Any] = {"dataset": "glyphs", **BUDGET, "clients": CLIENTS}
    partitions = PARTITIONS[:1] if small else PARTITIONS
    if small:
        base |= {"dataset": "digits", "rounds": 2, "shots": 2, "batch_size": 8, "n_ctx": 4}
    if small and not shown:
        raise click.UsageError("--small is no measurement: give --print too")
    columns = [(attack, share) for attack in ATTACKS for share in SHARES]
    found: dict[tuple[str, str, str, float], list[dict[str, Any]]] = {}
    known: dict[Place, Dataset] = {}
    torch.set_num_threads(threads or torch.get_num_threads())
    for seed in range(seeds):
        for partition in partitions:
            for rule, more in RULES.items():
                for attack, share in (("none", 0.0), *columns):
                    settings = {**base, "method": "promptfl", "partition": partition, "seed": seed}
                    settings |= {"evaluate_every": base["rounds"], **more}
                    facts = {
                        "settings": settings,
                        "attack": attack,
                        "share": share,
                        "strength": [FACTOR, DEVIATION],
                        "weights": model.weights_digest,
                    }

                    def run(
                        folder: Path,
                        settings: dict[str, Any] = settings,
                        attack: str = "labels" if attack == "none" else attack,
                        share: float = share,
                    ) -> dict[str, Any]:
                        made = attacked(settings, attack, share, model, work / "features", known)
                        return play(made)

                    name = f"{attack}-{share:g}-{partition}-seed{seed}"
                    one = kept(work / "attacks", name, facts, run)
                    click.echo(f"{name}  {rule}  {one['accuracy']:.3f}", err=True)
                    found.setdefault((partition, rule, attack, share), []).append(one)
    text = table(found, partitions, columns)
    if shown:
        click.echo(text)
    else:
        between(Path(__file__).parent.parent / "docs" / "privacy.md", "attacks", text)


if __name__ == "__main__":
    main()
