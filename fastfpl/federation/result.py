"""What a run says: the content of ``result.json``."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastfpl import __version__, system
from fastfpl.data import Shard
from fastfpl.errors import Damaged, Missing
from fastfpl.federation.frames import frame_of
from fastfpl.federation.result_schema import MOST_BYTES, parse_result
from fastfpl.files import write_json

if TYPE_CHECKING:
    import pandas

__all__ = [
    "RESULT",
    "Result",
    "deal",
    "empty_row",
    "environment",
    "forget_peak_memory",
    "peak_memory",
    "summarise",
]

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes
    ----------
    method : str
    settings : dict
        Every setting with its value.
    environment : dict
        Versions and device.
    faces : dict
        For each op, the names of the faces that answered.
    rounds : list of dict
        ``round`` (from 0), ``accuracy`` (unweighted mean over clients, in [0, 1]; None in a round
        without evaluation), ``clients`` (accuracy of each; None for one without test images, which
        is left out of the means), ``selected``, ``loss`` (mean over
        selected clients, last local epoch), ``lost`` (clients whose upload did not arrive),
        ``seconds``, ``images_per_second`` (trained images per second of training), ``bytes_up``,
        ``bytes_down``, and ``exams``: for each question of the scenario ``accuracy`` and
        ``macro_f1`` (over the classes that occur; both unweighted means over clients), ``clients``
        and ``domains`` (mean over the clients that have test images of the domain). ``accuracy``
        and ``clients`` of the row are those of the first exam. With ``dp_noise`` also ``epsilon``
        after the round, at ``dp_delta``; with a robust ``merge`` or ``clip_update`` also ``merge``:
        ``used``, the clients whose uploads count, nobody where too few arrived, and ``norms``, how
        far each had moved before it was cut.
    final : dict
        ``accuracy`` of the last round, ``last5`` mean of the last five evaluations, ``best``
        (largest on test: for comparison with papers only), ``std_over_clients`` and ``macro_f1`` in
        the last round, ``exams`` and ``domains``: accuracy of each exam, and of the headline in
        each domain; ``harmonic_mean`` of base and novel where both were asked.
    peak_memory_bytes : int
        Of the process during the run (Linux) or so far; on a GPU, of its allocations.
    data : dict
        Data set, class names, test and training images of each client, exams, whether the clients
        trained on their test images, weights digest, activation of the CLIP's text tower;
        ``others``: where the headline is about clients that came later, how many trained together;
        ``asked`` and ``population``: with ``evaluate_clients``, the numbers of those that the
        lists and every row's ``clients`` are about, and how many there are in all;
        ``deal``: digests of who has which training and test images, equal where two runs deal
        alike; ``training``: how many training images are there and how many are used;
        ``clients``: what the data set calls them, where it does; ``method_source``: class, module
        and digest of the source of a method from outside the library.
    memory : dict or None
        What ``max_memory`` led to (`fastfpl.training.budget.Budget`): ``limit_bytes``,
        ``taken_bytes`` before the first pass, ``text_cache_bytes``, ``image_cache_bytes``,
        ``graph_pool_bytes``,
        ``passes``.
    preset : dict or None
        If the settings came from a preset: its ``name``, what it is ``about``, what the run has
        ``changed`` (setting, or METHOD.OPTION, to the preset's value and the run's), and what was
        ``published`` for the run's data set and method: for each table ``source``, ``cautions``,
        ``where`` (settings of the table's own) and ``figures``, in per cent as printed.
    flower : dict or None
        Of a run over a network (docs/flower.md): its ``rules``, the ``version`` of flwr, how many
        clients' answers were ``refused``, ``failed`` or ``absent`` in all, what
        ``stays_with_clients``, ``upload_bytes`` of one client, and ``client_memory_bytes``, the
        largest resident set that each said. Its rounds have a row ``flower`` of their own, and None
        in the ``clients`` of an exam for one that did not answer.
    """

    method: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    faces: dict[str, list[str]]
    rounds: list[dict[str, Any]]
    final: dict[str, Any]
    peak_memory_bytes: int
    data: dict[str, Any]
    memory: dict[str, Any] | None = None
    preset: dict[str, Any] | None = None
    flower: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``result.json``."""
        return {
            "method": self.method,
            "settings": self.settings,
            "environment": self.environment,
            "faces": self.faces,
            "data": self.data,
            "preset": self.preset,
            "rounds": self.rounds,
            "final": self.final,
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": self.memory,
            **({} if self.flower is None else {"flower": self.flower}),
        }

    def save(self, folder: Path) -> None:
        """Write ``result.json`` into a folder."""
        write_json(folder / RESULT, self.to_json())

    def to_pandas(self) -> pandas.DataFrame:
        """Return every figure of every round as a table of pandas, in long form.

        Returns
        -------
        pandas.DataFrame
            Columns ``method``, ``dataset``, ``seed``, ``round`` (from 0), ``exam``, ``client``,
            ``figure`` and ``value``. A row with a client is its ``accuracy`` in [0, 1]; one without
            is a figure of the round: ``accuracy`` and ``macro_f1`` of an exam (means over clients),
            ``accuracy on DOMAIN``, ``loss``, ``seconds``, ``images_per_second``, ``bytes_up``,
            ``bytes_down``, ``epsilon``. Clients are names where the data set has some, else
            numbers.

        Raises
        ------
        Missing
            If pandas is not installed (extra ``pandas``).
        """
        return frame_of([self])

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Read ``result.json`` of a folder; what it holds is checked here, once and whole.

        Raises
        ------
        Missing
            If there is none.
        Damaged
            If a part of it has another type, range or length than a run writes.
        """
        path = folder / RESULT
        if not path.is_file():
            raise Missing(
                f"fastfpl.Result: {path} must exist; got nothing, the run is not finished"
            )
        try:
            size = path.stat().st_size
            if size > MOST_BYTES:
                raise ValueError(f"{size} bytes, where {MOST_BYTES} are read")
            return cls(**parse_result(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise Damaged(f"fastfpl.Result: {path} must be readable; got {error}") from None
        except ValueError as error:  # also of bytes that are not UTF-8
            raise Damaged(f"fastfpl.Result: {path} must be a result; got {error}") from None


def empty_row(round_: int) -> dict[str, Any]:
    """Return a round's row of `Result.rounds` before anything of it is known."""
    return {
        "round": round_,
        "accuracy": None,
        "clients": [],
        "exams": {},
        "selected": [],
        "lost": [],
        "loss": None,
        "seconds": 0.0,
        "images_per_second": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
    }


def summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the ``final`` figures from the rounds; the last one is the headline."""
    evaluated = [row for row in rounds if row["accuracy"] is not None]
    accuracies = [float(row["accuracy"]) for row in evaluated]
    last = evaluated[-1]
    mean = accuracies[-1]
    asked = [a for a in last["clients"] if a is not None]
    spread = math.fsum((a - mean) ** 2 for a in asked) / len(asked)
    tail = accuracies[-5:]
    exams = {name: float(exam["accuracy"]) for name, exam in last["exams"].items()}
    headline = next(iter(last["exams"].values()))
    both = {}
    if "base" in exams and "novel" in exams:
        base, novel = exams["base"], exams["novel"]
        both["harmonic_mean"] = 2 * base * novel / (base + novel) if base + novel else 0.0
    return {
        "accuracy": mean,
        "last5": math.fsum(tail) / len(tail),
        "best": max(accuracies),
        "std_over_clients": math.sqrt(spread),
        "macro_f1": float(headline["macro_f1"]),
        "exams": exams,
        "domains": dict(headline["domains"]),
        **both,
    }


def deal(shards: Sequence[Shard]) -> dict[str, str]:
    """Digest which images each client has, of training and of test."""
    found = {}
    for side in ("train", "test"):
        total = hashlib.blake2b(digest_size=8)
        for shard in shards:
            total.update(getattr(shard, side).astype("<i8").tobytes() + b"|")
        found[side] = total.hexdigest()
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor and device, without names of machines, people or folders."""
    versions = {"fastfpl": __version__} | {
        name: metadata.version(name) for name in ("torch", "open_clip_torch", "numpy")
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can: CUDA and Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    system.forget_peak()


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes: allocations on a GPU, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_resident()
