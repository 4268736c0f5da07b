"""One rank of the tests of several: plays what a JSON file lists and writes down how it went."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastfpl
import fastfpl.federation.preparation as preparation
from fastfpl.errors import NotConverged
from tests.worlds import figures, small_clip

RANK = int(os.environ["RANK"])


def prepared(job: dict[str, Any], here: Path) -> dict[str, Any]:
    """Make of a job the arguments of a run; ``only`` holds those of rank 1 alone."""
    how = dict(job["run"])
    if RANK == 1:
        how |= job.get("only", {})
    for name in ("out", "cache"):
        if name in how:
            how[name] = here / how[name]
    how["model"] = small_clip()
    if how.pop("other", False):
        how["model"] = how["model"].to(dtype=torch.float16).to(dtype=torch.float32)
    return how


class Spoiled:
    """What a job lets go wrong on rank 1, for a while."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.what = job.get("spoil") if RANK == 1 else None
        self.round = job.get("round", 1)

    def observer(self, what: str, done: int, total: int) -> None:
        """Fail while a round is trained."""
        if self.what is None or what != f"round {self.round + 1} of 3, training":
            return
        if self.what == "diverges":
            raise NotConverged("fastfpl.run: the loss must stay finite; got a test")
        if self.what == "bug":
            raise ZeroDivisionError("a test")
        if self.what == "sleeps":
            time.sleep(4)
        if self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> Spoiled:
        if self.what == "version":
            import fastfpl.federation.agreement as agreement

            agreement.__version__ = "0.0.1"
        if self.what == "data":
            self.load = preparation.load_dataset

            def other(*args: Any, **more: Any) -> Any:
                found = copy.deepcopy(self.load(*args, **more))
                found.train.fingerprint = "another"
                return found

            preparation.load_dataset = other  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        if self.what == "data":
            preparation.load_dataset = self.load
        if self.what == "version":
            import fastfpl.federation.agreement as agreement

            agreement.__version__ = fastfpl.__version__


def main(here: Path) -> None:
    """Play the jobs of a folder."""
    torch.set_num_threads(1)
    # draw the digits once
    preparation.load_dataset = functools.cache(preparation.load_dataset)
    jobs = json.loads((here / "jobs.json").read_text(encoding="utf-8"))
    with (here / f"said-{RANK}.jsonl").open("a", encoding="utf-8") as said:
        for job in jobs:
            os.environ["FASTFPL_RANKS_TIMEOUT"] = str(job.get("timeout", 60))
            told: dict[str, Any] = {"name": job["name"]}
            try:
                with Spoiled(job) as spoiled:
                    result = fastfpl.run(**prepared(job, here), observer=spoiled.observer)
                told |= {"figures": figures(result), "environment": result.environment}
                told["ranks"] = [row.get("ranks") for row in result.rounds]
            except Exception as error:
                told["error"] = [type(error).__name__, str(error)]
            said.write(json.dumps(told) + "\n")
            said.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
