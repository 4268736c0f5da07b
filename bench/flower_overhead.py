"""What Flower adds to a round: ``python -m bench.flower_overhead --out FILE``.

The same run in one process and as a federation of real processes on loopback, for 2, 4, 8 and 16
clients: seconds of a round (median of all but the first, in which features are encoded), bytes of
one client in a round, the memory of a client's processes. Every figure of the two runs must be
equal before any is written.

Memory is proportional (PSS): of a SuperNode's tree, idle (the median of what was seen), and of all
processes together, the largest that was seen; and the largest resident set that a client's own
process said, most of which it shares with the process that it is a fork of.
Needs Linux and ``pip install "fastfpl[flower]"``. Resumable: counts that FILE has are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import psutil

import fastfpl
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.errors import InputError
from fastfpl.federation import Result
from fastfpl.federation.result import environment
from fastfpl.files import write_json
from fastfpl.flower.apps import flower_version
from fastfpl.flower.lab import up
from fastfpl.flower.rules import make_rules
from fastfpl.training.preparation import choose_device

BUDGET = {
    "dataset": "digits",
    "clip": "tiny",
    "partition": "iid",
    "shots": 16,
    "local_epochs": 1,
    "batch_size": 16,
    "n_ctx": 16,
    "threads": 1,
}
_LOOKS = 0.5  # seconds between two looks at memory


def _pss(process: psutil.Process) -> int:
    """Return the proportional set of a process in bytes; 0 of one that has gone."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


class Watch(threading.Thread):
    """Looks at the memory of all that this process has started, until it is told to end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nodes: dict[int, list[int]] = {}
        self.together: list[int] = []
        self._end = threading.Event()

    def run(self) -> None:
        """Look again and again."""
        while not self._end.wait(_LOOKS):
            self.look()

    def look(self) -> None:
        """Note what every SuperNode takes now, and what all take."""
        together = 0
        for first in psutil.Process().children():
            try:
                is_node = any("flower-supernode" in word for word in first.cmdline())
                tree = sum(_pss(one) for one in (first, *first.children(recursive=True)))
            except psutil.Error:
                continue
            together += tree
            if is_node:
                self.nodes.setdefault(first.pid, []).append(tree)
        self.together.append(together)

    def end(self) -> None:
        """Stop looking."""
        self._end.set()
        self.join()


def _round_seconds(result: Result) -> float:
    seconds = [row["seconds"] for row in result.rounds]
    return statistics.median(seconds[1:] or seconds)


def _refuse_other(there: Result, alone: Result) -> None:
    for one, other in zip(there.rounds, alone.rounds, strict=True):
        for key in ("accuracy", "clients", "selected", "lost", "bytes_up", "bytes_down"):
            if one[key] != other[key]:
                raise InputError(
                    f"bench: {key} of round {one['round'] + 1} must be that of one process, "
                    f"{other[key]}; got {one[key]}"
                )


def measure(method: str, clients: int, rounds: int) -> dict[str, Any]:
    """Play a run by both engines and compare them."""
    settings = make_settings({**BUDGET, "method": method, "clients": clients, "rounds": rounds})
    with tempfile.TemporaryDirectory() as folder:
        model, cache = load_clip("tiny"), Path(folder) / "cache"
        alone = fastfpl.run(settings, model=model, cache=cache)
        # sites train one client each: the figures of cohorts differ in their last digits
        same = fastfpl.run(settings.model_copy(update={"cohort": 1}), model=model, cache=cache)
        watch = Watch()
        watch.start()
        begin = time.perf_counter()
        try:
            rules = make_rules({"quorum": 1.0, "timeout": 1800.0})
            there = up(settings, rules, Path(folder) / "net")
        finally:
            watch.end()
        whole = time.perf_counter() - begin
    _refuse_other(there, same)
    assert there.flower is not None
    here, away = _round_seconds(alone), _round_seconds(there)
    last = there.rounds[-1]
    if len(watch.nodes) != clients:
        raise InputError(f"bench: {clients} SuperNodes must have been seen; got {len(watch.nodes)}")
    return {
        "method": method,
        "clients": clients,
        "rounds": rounds,
        "round_alone_s": here,
        "round_flower_s": away,
        "overhead_s": away - here,
        "whole_s": whole,
        "bytes_up": last["bytes_up"] / len(last["selected"]),
        "bytes_down": last["bytes_down"] / len(last["selected"]),
        "bytes_exam": last["flower"]["bytes_exam"] / clients,
        "node_pss_idle": max(statistics.median(sizes) for sizes in watch.nodes.values()),
        "together_pss_peak": max(watch.together),
        "client_rss": max(there.flower["client_memory_bytes"].values()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows in Markdown."""
    lines = [
        "| method | clients | s a round, one process | over Flower | added | kB up | down | exam | "
        "MB of a node, idle | of a client's process | of all together |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        figures = [
            f"{row['round_alone_s']:.2f}",
            f"{row['round_flower_s']:.1f}",
            f"{row['overhead_s']:.1f}",
            *(f"{row[key] / 1000:.1f}" for key in ("bytes_up", "bytes_down", "bytes_exam")),
            *(f"{row[k] / 1e6:.0f}" for k in ("node_pss_idle", "client_rss", "together_pss_peak")),
        ]
        lines.append(f"| {row['method']} | {row['clients']} | {' | '.join(figures)} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON of the figures")
@click.option("--clients", default="2,4,8,16", show_default=True)
@click.option("--methods", default="promptfl", show_default=True)
@click.option("--rounds", default=4, show_default=True)
def main(out: Path, clients: str, methods: str, rounds: int) -> None:
    """Play what FILE lacks, write it after every count, and print the table."""
    machine = {**environment(choose_device("cpu")), "flwr": flower_version()}
    machine |= {"cores": os.cpu_count()}
    found: dict[str, Any] = {"budget": BUDGET, "machine": machine, "rows": []}
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if {key: before.get(key) for key in ("budget", "machine")} != {
            "budget": BUDGET,
            "machine": machine,
        }:
            raise click.UsageError(f"{out} is of another machine or budget: name another file")
        found["rows"] = before["rows"]
    for method in methods.split(","):
        for count in map(int, clients.split(",")):
            key = (method, count, rounds)
            if key in [(r["method"], r["clients"], r["rounds"]) for r in found["rows"]]:
                continue
            found["rows"].append(measure(*key))
            write_json(out, found)
            click.echo(f"{method}, {count} clients: done", err=True)
    click.echo(table(found["rows"]))


if __name__ == "__main__":
    main()
