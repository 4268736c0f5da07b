"""Accuracy against ε on `glyphs`: ``python -m bench.accuracy_against_epsilon --work DIR``.

PromptFL with the embedded CLIP, in one process (``pip install "fastfpl[dp]"``). Under noise that
hides clients, and under noise that hides single images; ε is the accountant's after the last round,
at δ = 1e-5. Noise is of no seed: a seed decides the deal and the start alone.

Resumable: a run that is finished is read back, one that was stopped goes on. Writes the table of
``docs/privacy.md`` between its markers, or prints it (``--print``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

import fastfpl
from bench.glyphs_table import cell
from bench.kept import between, kept
from fastfpl.clip import load_clip

BUDGET = {"rounds": 10, "local_epochs": 1, "batch_size": 16, "shots": 16, "n_ctx": 16}
#: Multipliers of noise, from much to little; None is a run without.
NOISES = (16.0, 8.0, 4.0, 2.0, 1.0, None)
#: Whom noise hides, to how many clients there are and the norm to which is cut.
PROTOCOLS: dict[str, tuple[str, dict[str, Any], float]] = {
    "client, 10 clients": ("client", {"clients": 10, "partition": "iid"}, 0.1),
    "client, 100 clients": ("client", {"clients": 100, "partition": "iid"}, 0.1),
    # a step is lr · C long at most: with the default rate nothing would move; and a pass over a
    # context an image takes its time
    "image, 10 clients, 4 shots": (
        "image",
        {"clients": 10, "partition": "iid", "lr": 0.01, "shots": 4},
        1.0,
    ),
}


def figures(result: fastfpl.Result) -> dict[str, Any]:
    """Return what the table says of a run."""
    return {"accuracy": result.final["accuracy"], "epsilon": result.rounds[-1].get("epsilon")}


def table(found: dict[str, dict[float | None, list[dict[str, Any]]]], seeds: int) -> str:
    """Write the table in Markdown: a row a multiplier."""
    head = [f"{name}: ε | accuracy" for name in found]
    lines = [
        f"| noise, {seeds} seed{'s' * (seeds > 1)} | {' | '.join(head)} |",
        "|--:" + "|--:|--:" * len(found) + "|",
    ]
    for noise in NOISES:
        cells = []
        for runs in found.values():
            epsilons = {one["epsilon"] for one in runs[noise]}
            (epsilon,) = epsilons  # it hangs on no data
            cells.append("∞" if epsilon is None else f"{epsilon:.3g}")
            cells.append(cell([one["accuracy"] for one in runs[noise]]))
        lines.append(f"| {'none' if noise is None else f'{noise:g}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_of(base: dict[str, Any], protocol: str, noise: float | None) -> dict[str, Any]:
    """Return the settings of a cell."""
    unit, clients, clip = PROTOCOLS[protocol]
    private = {} if noise is None else {"dp_noise": noise, "dp_clip": clip, "dp_unit": unit}
    return {**base, **clients, "evaluate_every": base["rounds"], **private}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="runs and features")
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=None, type=int, help="CPU threads")
@click.option("--small", is_flag=True, help="digits, two rounds: to try it")
@click.option("--print", "shown", is_flag=True, help="the table, in the place of docs/privacy.md")
def main(work: Path, seeds: int, threads: int | None, small: bool, shown: bool) -> None:
    """Play what is missing and write the table."""
    model = load_clip("tiny")
    base: dict[str, Any] = {"method": "promptfl", "dataset": "glyphs", **BUDGET}
    if small:
        base |= {"dataset": "digits", "rounds": 2, "shots": 2, "batch_size": 8, "n_ctx": 4}
    if small and not shown:
        raise click.UsageError("--small is no measurement: give --print too")
    found: dict[str, dict[float | None, list[dict[str, Any]]]] = {}
    for seed in range(seeds):
        for protocol in PROTOCOLS:
            for noise in NOISES:
                settings = {**settings_of(base, protocol, noise), "seed": seed}
                facts = {"settings": settings, "weights": model.weights_digest}

                def run(folder: Path, settings: dict[str, Any] = settings) -> dict[str, Any]:
                    return figures(
                        fastfpl.run(
                            **settings,
                            model=model,
                            out=folder,
                            resume=True,
                            cache=work / "features",
                            threads=threads,
                        )
                    )

                much = "none" if noise is None else f"{noise:g}"
                name = f"{protocol.replace(', ', '-').replace(' ', '-')}-{much}-seed{seed}"
                one = kept(work / "epsilon", name, facts, run)
                epsilon = math.inf if one["epsilon"] is None else one["epsilon"]
                click.echo(f"{name}  ε {epsilon:.3g}  {one['accuracy']:.3f}", err=True)
                found.setdefault(protocol, {}).setdefault(noise, []).append(one)
    text = table(found, seeds)
    if shown:
        click.echo(text)
    else:
        between(Path(__file__).parent.parent / "docs" / "privacy.md", "epsilon", text)


if __name__ == "__main__":
    main()
