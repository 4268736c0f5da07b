"""Rounds of the same hundred clients' work in federations of 10² to 10⁵: what grows with all.

    python -m bench.many_clients [METHOD ...] [--clients 100,1000,10000,100000] [--rounds 6]

Each federation is played in a process of its own, with a folder and checkpoints. Images are noise
and their features drawn, since only what comes after is looked at; the text tower is the embedded
CLIP's.
A round is timed from the end of the one before to its own end, with merge, evaluation and
checkpoint; the median of all but the first two is printed, in which first prompts are encoded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("promptfl", "prompt-fedper", "pfedmoap", "prompt-fedamp")
TRAINED = 100


def play(method: str, clients: int, rounds: int, cache: Path) -> dict[str, Any]:
    """Play a federation and say what a round took, and where the memory came to."""
    import numpy as np
    import torch

    import fastfpl
    from fastfpl.data import from_arrays
    from fastfpl.federation.result import peak_memory

    draw = np.random.default_rng(0)
    # of every client two images to train on and one to be asked about
    shape = (3 * clients, 8, 8, 3)
    data = from_arrays(
        draw.integers(0, 256, shape, dtype=np.uint8),
        draw.integers(0, 10, 3 * clients),
        classnames=[f"class {c}" for c in range(10)],
        split=["train"] * (2 * clients) + ["test"] * clients,
        name="noise",
    )
    model = fastfpl.load_clip("tiny")

    def encode_image(pixels: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
        features = torch.randn(len(pixels), model.text.dim)
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features

    model.encode_image = encode_image  # type: ignore[method-assign]
    ends = [time.perf_counter()]
    begin = ends[0]

    def on_round(_: str, row: Any) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        result = fastfpl.run(
            method,
            dataset=data,
            model=model,
            partition="iid",
            shots=None,
            clients=clients,
            participation=TRAINED / clients,
            evaluate_clients=min(TRAINED, clients),
            rounds=rounds,
            local_epochs=1,
            batch_size=4,
            n_ctx=16,
            cohort=20,
            out=Path(folder) / "run",
            cache=cache,
            on_round=on_round,
        )
        files = sum(p.stat().st_size for p in Path(folder).glob("run/checkpoint*"))
    spans = [b - a for a, b in itertools.pairwise(ends[1:])]
    return {
        "method": method,
        "clients": clients,
        "round_s": statistics.median(spans[1:]),
        "rounds_s": spans,
        "start_s": ends[1] - begin,
        "peak_mib": peak_memory(torch.device("cpu")) >> 20,
        "checkpoint_bytes": files,
        "trained": len(result.rounds[-1]["selected"]),
    }


def main() -> None:
    """Play every federation in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--clients", default="100,1000,10000,100000")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--one", action="store_true", help="here, as JSON")
    parser.add_argument("--cache", type=Path)
    chosen = parser.parse_args()
    counts = [int(text) for text in chosen.clients.split(",")]
    if chosen.one:
        found = play(chosen.methods[0], counts[0], chosen.rounds, chosen.cache)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    say = sys.stdout.write
    say("| method | clients | s a round | peak MiB | kB of a checkpoint | s to start |\n")
    say("|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as cache:
        for method in chosen.methods:
            for count in counts:
                command = [sys.executable, "-m", "bench.many_clients", method, "--one"]
                command += [f"--clients={count}", f"--rounds={chosen.rounds}", f"--cache={cache}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                one = json.loads(done.stdout.splitlines()[-1])
                say(
                    f"| {method} | {count} | {one['round_s']:.2f} | {one['peak_mib']} | "
                    f"{one['checkpoint_bytes'] / 1000:.0f} | {one['start_s']:.0f} |\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
