"""Where the time of a run goes: a few training steps and one evaluation under torch's profiler."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastfpl.clip import FrozenCLIP
from fastfpl.config import PROFILED, Settings
from fastfpl.errors import InputError
from fastfpl.federation.experiment import RoundObserver, threads, unseen
from fastfpl.federation.preparation import prepare
from fastfpl.federation.result import forget_peak_memory, peak_memory
from fastfpl.files import write_whole
from fastfpl.ops.faces import recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.precision import without_autocast
from fastfpl.training.budget import uncapped
from fastfpl.training.feeds import Observer, silent
from fastfpl.training.steps import PHASE

__all__ = ["TRACE", "Profile", "Span", "profile"]

TRACE = "trace.json"


@dataclass(frozen=True)
class Span:
    """Time of one operator, or of one phase of a round.

    Attributes
    ----------
    name : str
    calls : int
    seconds : float
        On the processor; of an operator without what it calls, of a phase with everything in it.
    device_seconds : float
        Likewise on the CUDA device, 0 without one.
    """

    name: str
    calls: int
    seconds: float
    device_seconds: float


@dataclass(frozen=True)
class Profile:
    """What the profiler saw of one round.

    Attributes
    ----------
    trace : Path
        A trace that Perfetto and Chrome's about:tracing show.
    phases, operators : list of Span
        Longest first.
    seconds : float
        Wall time of the round under the profiler.
    cuda : bool
        Whether there was a CUDA device.
    peak_memory_bytes : int
        Of the round, as in ``result.json``.
    faces : dict
        For each op, the names of the faces that answered.
    """

    trace: Path
    phases: list[Span]
    operators: list[Span]
    seconds: float
    cuda: bool
    peak_memory_bytes: int
    faces: dict[str, list[str]]


def profile(
    settings: Settings,
    out: Path,
    *,
    steps: int = 3,
    model: FrozenCLIP | None = None,
    cache: Path | None = None,
    observer: Observer = silent,
    on_round: RoundObserver = unseen,
) -> Profile:
    """Profile a round of ``steps`` training steps and its evaluation; write a trace.

    Every client trains on its first ``steps`` batches alone. One such round is played before, so
    that what happens once (loading, packing, captures of CUDA graphs) is over, and methods whose
    clients exchange prompts have some.

    Parameters
    ----------
    settings : Settings
        Those of a run; `fastfpl.config.PROFILED` is laid over them.
    out : Path
        Folder that gets ``trace.json``.
    steps : int
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    cache : Path, optional
        Folder of the feature store.
    observer : callable
        Told of long steps.
    on_round : callable
        Told of either round.
    """
    if steps < 1:
        raise InputError(f"fastfpl.profile: steps must be at least 1; got {steps}")
    if out.exists() and not out.is_dir():
        raise InputError(f"fastfpl.profile: out must be a folder; got the file {out}")
    short = settings.model_copy(update=PROFILED)
    with threads(short.threads), memory_limit(None), uncapped(), without_autocast():
        federation = prepare(short, model=model, cache=cache, observer=observer)
        images, trainer = steps * short.batch_size, federation.trainer
        trainer.images = {c: mine[:images] for c, mine in trainer.images.items()}
        on_round(short.method, federation.round())
        device = federation.clip.device
        cuda = device.type == "cuda"
        # its messages about libraries of absent GPUs are nobody's
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        forget_peak_memory()
        begin = time.perf_counter()
        # torch 2.11 warns that it forgets earlier cycles, of which there are none
        recording = torch.profiler.profile(activities=activities, acc_events=True)
        with recorded_faces() as faces, recording as seen:
            row = federation.round()
            if cuda:
                torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        on_round(short.method, row)
        peak = peak_memory(device)
    write_whole(out / TRACE, lambda part: seen.export_chrome_trace(str(part)))
    phases, operators = [], []
    for event in seen.key_averages():
        if event.key.startswith(PHASE):
            own = event.cpu_time_total, event.device_time_total
            phases.append(Span(event.key.removeprefix(PHASE), event.count, *_seconds(*own)))
        else:
            own = event.self_cpu_time_total, event.self_device_time_total
            operators.append(Span(event.key, event.count, *_seconds(*own)))

    def longest(span: Span) -> tuple[float, float]:
        return (-span.device_seconds, -span.seconds) if cuda else (-span.seconds, 0.0)

    return Profile(
        trace=out / TRACE,
        phases=sorted(phases, key=longest),
        operators=sorted(operators, key=longest),
        seconds=seconds,
        cuda=cuda,
        peak_memory_bytes=peak,
        faces={op: sorted(names) for op, names in faces.items()},
    )


def _seconds(here: float, device: float) -> tuple[float, float]:
    """Turn the profiler's microseconds into seconds."""
    return here * 1e-6, device * 1e-6
