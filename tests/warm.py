"""Processes that begin with torch and open_clip imported: forks of one that has them.

    subprocess.run([*warm_python(), "-c", code], ...)  # or -m module

Imports are most of what a short process costs; the library itself is imported by each anew. A fork
is a process of its own: with the caller's folder, environment and streams; who kills the one that
was started kills it, and how it ends is how that one ends. Not for tests of what imports do, of
PYTHON's own variables, or of a process by its number, which is another. Where forks are not to be
relied on, Python is started.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["warm_python"]

#: Imported once; nothing here computes, so that there are no threads to lose in a fork.
MODULES = ("torch", "open_clip", "torchvision", "sklearn.datasets", "click", "pydantic")
_LENGTH = struct.Struct("!Q")
_STATUS = struct.Struct("!i")


@functools.cache
def warm_python() -> tuple[str, ...]:
    """Return what to write in place of ``sys.executable``."""
    if not sys.platform.startswith("linux"):
        return (sys.executable,)
    here = Path(__file__).resolve()
    folder = tempfile.TemporaryDirectory(prefix="warm")
    path = f"{folder.name}/asked"
    server = subprocess.Popen(
        [sys.executable, str(here), "serve", path],
        cwd=here.parent.parent, env={**os.environ, "PYTHONPATH": _with(here.parent.parent)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the warm process did not start"
    weakref.finalize(warm_python, _end, server, folder)
    return (sys.executable, "-I", "-S", str(here), "ask", path)


def _with(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end(server: subprocess.Popen[bytes], folder: Any) -> None:
    server.communicate()  # it ends with its input
    folder.cleanup()


# --- the one that is started ----------------------------------------------------------------------


def ask(path: str, arguments: list[str]) -> None:
    """Have a fork do what is asked, pass signals on to it and end as it ends."""
    with socket.socket(socket.AF_UNIX) as to:
        to.connect(path)
        asked = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps(asked).encode()
        socket.send_fds(to, [_LENGTH.pack(len(content))], [0, 1, 2])
        to.sendall(content)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: to.send(bytes([number])))
        status = _STATUS.unpack(_read(to, _STATUS.size))[0]
    if os.WIFSIGNALED(status):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _read(source: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = source.recv(size - len(content))
        if not piece:
            raise EOFError("the other side has ended")
        content += piece
    return content


# --- the one that has imported --------------------------------------------------------------------


def serve(path: str) -> None:
    """Fork for everyone who asks, until whoever started this process ends."""
    import gc
    import importlib

    for name in MODULES:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        gc.freeze()
        answering: set[int] = set()
        while server in select.select([server, 0], [], [])[0]:
            connection, _ = server.accept()
            process = os.fork()
            if process == 0:
                server.close()
                asked = answer(connection)
                break
            connection.close()
            answering = {p for p in answering if os.waitpid(p, os.WNOHANG)[0] == 0} | {process}
        else:
            for process in answering:
                os.waitpid(process, 0)
            os._exit(0)
    end(lambda: play(**asked))


def answer(connection: socket.socket) -> dict[str, Any]:
    """Fork once more, and go on only as the child; the parent says how that one ended."""
    begin, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    asked: dict[str, Any] = json.loads(_read(connection, _LENGTH.unpack(begin)[0]))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return asked
    for number in (0, 1, 2, *streams):
        os.close(number)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([ended, connection], [], [])[0]):
        number = connection.recv(1) if connection in ready else b""
        os.kill(child, number[0] if number else signal.SIGKILL)
        if not number:
            break
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(OSError):  # it was killed, and its child with it
        connection.sendall(_STATUS.pack(status))
    os._exit(0)


def end(work: Callable[[], None]) -> None:
    """Work, and end as Python ends, but leave memory to the system: to clear it takes a second."""
    import atexit
    import threading

    status: Any = 0
    try:
        work()
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((status or 0) & 0xFF)


def play(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Be the process that was asked for."""
    import importlib
    import random
    import runpy
    import types

    import numpy as np
    import torch

    for number, name in enumerate(("stdin", "stdout", "stderr")):
        like = getattr(sys, name)
        stream = open(  # noqa: SIM115
            number, "w" if number else "r", buffering=1,
            encoding=like.encoding, errors=like.errors, closefd=False,
        )  # fmt: skip
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    before = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    first = "" if arguments[0] == "-c" else cwd
    named = [x for x in environment.get("PYTHONPATH", "").split(os.pathsep) if x]
    own = os.path.dirname(__file__)
    sys.path[:] = [first, *named, *(x for x in sys.path if x not in (own, *before))]
    importlib.invalidate_caches()
    tempfile.tempdir = None
    random.seed()
    np.random.seed()  # noqa: NPY002  # as in any new process
    torch.seed()
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    kind, what, *rest = arguments
    if kind == "-m":
        sys.argv[1:] = rest
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    assert kind == "-c", f"warm_python takes -c and -m; got {kind!r}"
    sys.argv[:] = ["-c", *rest]
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    kind, path, *rest = sys.argv[1:]
    if kind == "serve":
        serve(path)
    else:
        ask(path, rest)
