"""Processes that begin with their imports done: forks of one process that has them.

    with Warm(["torch", "open_clip"]) as warm:
        subprocess.run([*warm.command, "-c", code], ...)  # or -m module

Imports are most of what a short process costs. A fork is a process of its own: with the caller's
folder, environment and streams; who kills the one that was started kills it, and how it ends is how
that one ends. Not for what depends on PYTHON's own variables, or on a process by its number, which
is another. This file is also what is run on both sides, by its path: it needs the standard library
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Warm", "end_with"]

_LENGTH = struct.Struct("!Q")
_STATUS = struct.Struct("!i")
# seconds between looks at what has ended, where nothing tells of it: for its name, for its status
_SWEEP, _LOOK = 1.0, 0.05


class Warm:
    """A process that has imported modules, and forks for everyone who asks.

    Parameters
    ----------
    modules : sequence of str
        What is imported once. Nothing of it may compute when it is imported, or talk to a device:
        a fork has neither the threads nor the devices of the process that it comes from.
    path : Path, optional
        Where modules lie beside what this Python has installed.

    Attributes
    ----------
    command : tuple of str
        What to write in place of ``sys.executable``: itself where forks are not to be relied on.

    Raises
    ------
    fastfpl.errors.InputError
        If the modules cannot be imported.
    """

    def __init__(self, modules: Sequence[str], path: Path | None = None) -> None:
        self.command: tuple[str, ...] = (sys.executable,)
        self.process: subprocess.Popen[bytes] | None = None
        from fastfpl.files import temporary_folder
        from fastfpl.system import FORKS

        if not FORKS:
            return
        here = Path(__file__).resolve()
        self._folder = temporary_folder()
        place = f"{self._folder}/asked"
        environment = dict(os.environ)
        if path is not None:
            before = filter(None, [environment.get("PYTHONPATH")])
            environment["PYTHONPATH"] = os.pathsep.join([str(path), *before])
        self.process = process = subprocess.Popen(
            [sys.executable, str(here), "serve", place, *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            self.close()
            code = process.returncode
            from fastfpl.errors import InputError

            raise InputError(
                f"fastfpl.warm: modules must be ones that a process can import and fork with; got "
                f"{', '.join(modules)}, and a process that ended with {code}: its words are above"
            )
        self.command = (sys.executable, "-I", "-S", str(here), "ask", place)

    def close(self) -> None:
        """Wait for the forks that are there, and end."""
        if self.process is not None:
            self.process.communicate()  # it ends with its input
            self.process = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# -- the one that is started -----------------------------------------------------------------------


def ask(path: str, arguments: list[str]) -> None:
    """Have a fork do what is asked, pass signals on to it and end as it ends."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, and the socket would be taken for the stream
            os.open(os.devnull, os.O_RDWR)
    with socket.socket(socket.AF_UNIX) as to:
        try:
            cwd = os.getcwd()
            with _short(path) as place:
                to.connect(place)
        except OSError as error:
            # whoever started it may outlive it, and slow is better than not at all
            sys.stderr.write(f"fastfpl.warm: {error}: {path}; Python is started anew\n")
            sys.stderr.flush()
            os.execv(sys.executable, [sys.executable, *arguments])
        asked = {"arguments": arguments, "cwd": cwd, "environment": dict(os.environ)}
        content = json.dumps(asked).encode()
        try:
            socket.send_fds(to, [_LENGTH.pack(len(content))], [0, 1, 2])
            to.sendall(content)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: to.send(bytes([number])))
            status = _STATUS.unpack(_read(to, _STATUS.size))[0]
        except (EOFError, OSError) as error:
            sys.stderr.write(
                f"fastfpl.warm: the process that waits for a fork must live as long as it; got "
                f"none: {error}; the fork has ended with it\n"
            )
            sys.stderr.flush()
            os._exit(1)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):  # of SIGKILL there is no other
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """Name a socket by 107 bytes, which are all that a name may have, however deep it lies."""
    folder, name = os.path.split(path)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{number}/{name}"
    finally:
        os.close(number)


def _read(source: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = source.recv(size - len(content))
        if not piece:
            raise EOFError("the other side has ended")
        content += piece
    return content


# -- the one that has imported ---------------------------------------------------------------------


def serve(path: str, modules: list[str]) -> None:
    """Fork for everyone who asks, until whoever started this process ends."""
    import gc
    import importlib

    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != own]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it is told of no child's end
    said = os.dup(1)
    os.dup2(2, 1)  # what imports print
    for name in modules:
        importlib.import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or every fork would say it again
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise SystemExit("fastfpl.warm: imports must leave devices alone; got a CUDA context")
    with socket.socket(socket.AF_UNIX) as server:
        with _short(path) as place:
            server.bind(place)
        server.listen(64)
        os.write(said, b"ready\n")
        os.close(said)
        gc.freeze()
        answering: set[int] = set()
        watched: list[Any] = [server, 0]  # its input ends with whoever started it
        while True:
            # kernels before 5.3 have no descriptor that tells of a child's end
            ready = select.select(watched, [], [], _SWEEP if answering else None)[0]
            answering = {p for p in answering if os.waitpid(p, os.WNOHANG)[0] == 0}
            if server in ready:
                connection, _ = server.accept()
                process = os.fork()
                if process == 0:
                    server.close()
                    asked = answer(connection)
                    break
                connection.close()
                answering.add(process)
            elif 0 in ready:
                for process in answering:
                    os.waitpid(process, 0)
                os._exit(0)
    end(lambda: play(**asked))


def answer(connection: socket.socket) -> dict[str, Any]:
    """Fork once more, and go on only as the child; the parent says how that one ended."""
    try:
        begin, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
        asked: dict[str, Any] = json.loads(_read(connection, _LENGTH.unpack(begin)[0]))
    except (EOFError, OSError, ValueError, OverflowError, struct.error):
        os._exit(0)  # whoever asked has gone
    this = os.getpid()
    child = os.fork()
    if child == 0:
        connection.close()
        end_with(this)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return asked
    for number in (0, 1, 2, *streams):
        os.close(number)
    watched: list[Any] = [connection]
    with contextlib.suppress(AttributeError, OSError):  # kernels before 5.3 have none
        watched.append(os.pidfd_open(child))
    while True:
        ready = select.select(watched, [], [], None if len(watched) > 1 else _LOOK)[0]
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if connection in ready:
            said = connection.recv(1)  # a signal; nothing when the one that asked has gone
            os.kill(child, said[0] if said else signal.SIGKILL)
            if not said:
                status = os.waitpid(child, 0)[1]
                break
    with contextlib.suppress(OSError):  # it was killed, and its child with it
        connection.sendall(_STATUS.pack(status))
    os._exit(0)


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have this process get a signal when its parent ends, however that ends; on Linux."""
    import ctypes

    ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def end(work: Callable[[], None]) -> None:
    """Work, and end as Python ends, but leave memory to the system: to clear it takes a second."""
    import atexit
    import threading

    status: Any = 0
    interrupted = False
    try:
        work()
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        interrupted, status = isinstance(error, KeyboardInterrupt), 1
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((status or 0) & 0xFF)


def play(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Be the process that was asked for."""
    import importlib
    import random
    import runpy
    import types

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
    sys.path[:] = [first, *named, *(x for x in sys.path if x not in before)]
    importlib.invalidate_caches()
    tempfile.tempdir = None
    _draw_anew(random)
    # a list has a number for each level of threads within threads; OpenMP leaves out what is none
    threads = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if "torch" in sys.modules and threads.isdecimal() and int(threads) > 0:
        sys.modules["torch"].set_num_threads(int(threads))
    kind, what, *rest = arguments
    if kind == "-m":
        sys.argv[1:] = rest
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    assert kind == "-c", f"a warm process takes -c and -m; got {kind!r}"
    sys.argv[:] = ["-c", *rest]
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)


def _draw_anew(random: Any) -> None:
    """Let nothing be drawn as another fork draws it."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


if __name__ == "__main__":
    kind, place, *others = sys.argv[1:]
    if kind == "serve":
        serve(place, others)
    else:
        ask(place, others)
