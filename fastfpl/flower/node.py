"""Flower at a site, begun warm: each message is answered by a fork that has its imports.

Flower starts ``flwr-clientapp`` for every message, by its name. Imports are most of what such a
process costs, so a folder that comes first on the path has a command of that name, which asks one
process that has imported torch, open_clip and fastfpl for a fork (`fastfpl.warm`). What Flower sees
is what it started: a process with its arguments, streams and end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

from fastfpl import system
from fastfpl.errors import Missing
from fastfpl.files import temporary_folder
from fastfpl.flower.apps import flower_version
from fastfpl.system import FORKS
from fastfpl.warm import Warm, end_with

__all__ = ["ENVIRONMENT", "WARM_COMMANDS", "environment", "run_node", "tool", "warm_commands"]

#: What Flower's processes are started with: no look for the network, and a task is seen at once.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
#: Commands that Flower starts for each message or run.
WARM_COMMANDS = ("flwr-clientapp", "flwr-serverapp")
_MODULES = (
    *("torch", "torchvision", "open_clip", "sklearn.datasets"),
    *("fastfpl.flower.apps", "fastfpl.flower.site", "fastfpl.flower.server"),
)


def tool(name: str) -> str:
    """Find a command of Flower's beside this Python, or on the path."""
    beside = Path(sys.executable).parent / (f"{name}.exe" if system.WINDOWS else name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise Missing(
            f"fastfpl.flower: {name} must be on the path; got none; run: pip install "
            '"fastfpl[flower]"'
        )
    return found


def environment(*first: str) -> Mapping[str, str]:
    """Return the environment for Flower's processes, with folders that come first on the path."""
    # they start each other by name, and this Python's own come before what else is installed
    path = [*first, str(Path(sys.executable).parent), *filter(None, [os.environ.get("PATH")])]
    return {**os.environ, **ENVIRONMENT, "PATH": os.pathsep.join(path)}


@contextlib.contextmanager
def warm_commands() -> Iterator[Mapping[str, str]]:
    """Have Flower's commands answered by forks, while the context lasts.

    Yields
    ------
    mapping from str to str
        The environment for Flower's processes.
    """
    flower_version()
    if not FORKS:
        yield environment()
        return
    # as pip has installed them, whatever module they lie in
    found = {
        name: next(iter(entry_points(group="console_scripts", name=name))) for name in WARM_COMMANDS
    }
    with Warm([*(one.module for one in found.values()), *_MODULES]) as warm:
        # whoever comes later removes it, and the socket's, where this process is killed
        folder = temporary_folder()
        try:
            for name, one in found.items():
                code = f"import sys; from {one.module} import {one.attr}; sys.exit({one.attr}())"
                command = shlex.join([*warm.command, "-c", code])
                script = folder / name
                script.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
                script.chmod(0o700)
            yield environment(str(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run_node(arguments: Sequence[str]) -> int:
    """Run a SuperNode, and answer its messages by forks where the system has them.

    Parameters
    ----------
    arguments : sequence of str
        Those of ``flower-supernode``.

    Returns
    -------
    int
        What it ended with; signals that this process gets are passed on to it.
    """
    flower_version()
    supernode = tool("flower-supernode")
    with warm_commands() as warm:
        # whoever restarts what was killed finds its port and its key free
        bound = partial(end_with, os.getpid(), signal.SIGTERM) if FORKS else None
        # of its own session: a signal reaches it once, whether a terminal sends it or a supervisor
        node = subprocess.Popen(
            [supernode, *arguments], env=warm, preexec_fn=bound, start_new_session=True
        )

        def pass_on(number: int, frame: FrameType | None) -> None:
            node.send_signal(number)

        before = {}
        for number in {
            signal.SIGINT,
            signal.SIGTERM,
            getattr(signal, "SIGHUP", signal.SIGTERM),
        }:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, pass_on)
        try:
            return node.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
