"""A comparison as one command a run: written down for others, or played by processes here."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastfpl.config import Settings, load_preset, make_settings
from fastfpl.errors import Busy, InputError, cut, shown
from fastfpl.federation.comparison import Job
from fastfpl.federation.lock import alone_in
from fastfpl.federation.result import RESULT
from fastfpl.files import write_text
from fastfpl.plain_yaml import parse_yaml
from fastfpl.terminal import say

__all__ = ["devices_of", "play_here", "run_arguments", "write_plan"]

# seconds between two looks at who has ended, and that a process has to end when it is asked to
_LOOK, _ENDS = 0.1, 20.0


def devices_of(text: str | None) -> list[str]:
    """Read the devices that runs are dealt to, separated by commas."""
    if text is None:
        return []
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) != len(found):
        raise InputError(
            "fastfpl compare: devices must be one or more separated by commas, each once, as "
            f"cuda:0,cuda:1; got {shown(text)}"
        )
    return found


def run_arguments(
    job: Job, preset: str | None, cache: Path | None, device: str | None
) -> list[str]:
    """Say a run as arguments of ``fastfpl``: it starts, or goes on where it stopped.

    Raises
    ------
    InputError
        If a setting has a value that no flag can say.
    """
    settings, base = job.settings, _base(preset, job.settings)
    flags: list[str] = []
    for name, value in settings.model_dump().items():
        if name in ("method", "options", "seed") or (name == "device" and device is not None):
            continue
        if value != base[name]:
            flags += [f"--{name.replace('_', '-')}={_text(name, value)}"]
    chosen = [f"-o{key}={_yaml(key, value)}" for key, value in settings.options.items()]
    return [
        *("run", settings.method),
        *([] if preset is None else [f"--preset={preset}"]),
        *flags,
        *chosen,
        f"--seed={settings.seed}",
        *([] if device is None else [f"--device={device}"]),
        *([] if cache is None else [f"--cache={cache}"]),
        *(f"--out={job.folder}", "--resume"),
    ]


def _base(preset: str | None, settings: Settings) -> dict[str, Any]:
    """Return every setting as it is where no flag is given."""
    given: Mapping[str, Any] = {} if preset is None else load_preset(preset).settings
    least = make_settings({"method": settings.method, "partition": settings.partition})
    found = {**least.model_dump(), "partition": "pathological"}
    found |= {name: value for name, value in given.items() if name != "options"}
    if found.get("shots") == "all":
        found["shots"] = None
    return found


def _text(name: str, value: Any) -> str:
    if name == "shots" and value is None:
        return "all"
    if value is None:
        raise InputError(
            f"fastfpl compare: {name} must be what a flag can say; got none where the preset has a "
            "value: name it, or leave the preset out"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, dict):
        return ",".join(f"{key}={one}" for key, one in value.items())
    return str(value)


def _yaml(key: str, value: Any) -> str:
    """Write the value of an option so that it is read as what it is."""
    plain = value if isinstance(value, str) else json.dumps(value)
    rule = f"fastfpl compare: option {cut(key)}"
    with suppress(InputError):
        if parse_yaml(plain, rule) == value:
            return plain
    return json.dumps(value)


def write_plan(
    path: Path, jobs: Sequence[Job], preset: str | None, cache: Path | None, devices: Sequence[str]
) -> None:
    """Write one command a run into a file, the devices dealt out in turn."""
    lines = []
    for number, job in enumerate(jobs):
        device = devices[number % len(devices)] if devices else None
        lines.append(shlex.join(["fastfpl", *run_arguments(job, preset, cache, device)]))
    if any("\n" in line for line in lines):
        raise InputError(
            "fastfpl compare: plan must have one line a run; got a setting with a line break"
        )
    write_text(path, "".join(f"{line}\n" for line in lines))


# -- played here ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Running:
    """A run that is played by a process of its own."""

    name: str
    job: Job
    place: int
    process: subprocess.Popen[str]
    reader: threading.Thread
    said: list[str]


def play_here(
    jobs: Sequence[Job],
    preset: str | None,
    cache: Path | None,
    count: int | None,
    devices: Sequence[str],
) -> dict[str, str | None]:
    """Play runs by processes, so many at a time, one a device.

    What has a result is not played again, and what another process plays is left to it: any number
    of machines that share the folder may do this at once.

    Returns
    -------
    dict from name of a folder to str or None
        Of every run without a result why: its sentence, or None if it is played elsewhere.
    """
    places = _places(count, devices, jobs)
    names = _names(jobs)
    waiting = [job for job in jobs if not _done(job)]
    failed: dict[str, str | None] = {}
    running: list[_Running] = []
    try:
        while waiting or running:
            free = [n for n in range(len(places)) if n not in {one.place for one in running}]
            while waiting and free:
                job = waiting.pop(0)
                if _done(job):
                    continue
                name = names[id(job)]
                if _taken(job):
                    failed[name] = None
                    continue
                place = free.pop(0)
                running.append(_start(name, job, preset, cache, place, places))
            time.sleep(_LOOK)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.reader.join()
                if one.process.returncode:
                    failed[one.name] = _why(one)
    finally:
        _end(running)
    ended = {names[id(job)] for job in jobs if _done(job)}
    return {name: why for name, why in failed.items() if name not in ended}


def _places(count: int | None, devices: Sequence[str], jobs: Sequence[Job]) -> list[str | None]:
    """Say which device each of the processes has."""
    import torch

    if not devices and torch.cuda.is_available() and jobs[0].settings.device in ("auto", "cuda"):
        devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    count = len(devices) or 1 if count is None else count
    if devices and set(devices) != {"cpu"} and count > len(devices):
        raise InputError(
            f"fastfpl compare: jobs must be at most one a device; got {count} with "
            f"{', '.join(devices)}"
        )
    return [devices[n % len(devices)] if devices else None for n in range(count)]


def _done(job: Job) -> bool:
    return job.folder is not None and (job.folder / RESULT).is_file()


def _names(jobs: Sequence[Job]) -> dict[int, str]:
    """Call every run by its folder, below the one that all have in common."""
    folders = {id(job): str(job.folder) for job in jobs}
    common = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in folders.values()])
    return {job: os.path.relpath(folder, common) for job, folder in folders.items()}


def _taken(job: Job) -> bool:
    """Whether another process holds a run's folder."""
    assert job.folder is not None
    try:
        with alone_in(job.folder):
            return False
    except Busy:
        return True


def _start(
    name: str,
    job: Job,
    preset: str | None,
    cache: Path | None,
    place: int,
    places: Sequence[str | None],
) -> _Running:
    arguments = run_arguments(job, preset, cache, places[place])
    environment = dict(os.environ)
    if job.settings.threads is None and len(places) > 1:
        # the cores are shared; a person's own word stands
        affinity = getattr(os, "sched_getaffinity", None)
        cores = os.cpu_count() if affinity is None else len(affinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // len(places))))
    process = subprocess.Popen(
        [sys.executable, "-m", "fastfpl", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=_read, args=(process.stderr, name, said), daemon=True)
    reader.start()
    return _Running(name, job, place, process, reader, said)


def _read(stream: IO[str], name: str, said: list[str]) -> None:
    """Pass on what a run says, a line at a time, under its name."""
    with stream:
        for line in stream:
            text = line.rstrip("\n")
            del said[:-20]
            said.append(text)
            if not text.startswith("error: "):
                say(f"{name}: {text}", err=True)


def _why(one: _Running) -> str | None:
    if _taken(one.job):  # another machine began it at the same moment
        return None
    sentences = [line for line in one.said if line.startswith("error: ")]
    if sentences:
        return sentences[-1].removeprefix("error: ")
    last = one.said[-1] if one.said else "nothing said"
    return f"ended with {one.process.returncode}: {last}"


def _end(running: Sequence[_Running]) -> None:
    """End what is still running, which can be resumed."""
    for one in running:
        one.process.terminate()
    for one in running:
        try:
            one.process.wait(_ENDS)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.reader.join()
