"""Forks of a process that has its imports: they are what they would be without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from fastfpl import files
from fastfpl.errors import InputError
from fastfpl.system import FORKS
from fastfpl.warm import Warm

pytestmark = pytest.mark.skipif(not FORKS, reason="forks are for Linux")


@pytest.fixture(scope="module")
def warm():
    with Warm(["decimal", "numpy"]) as one:
        yield one


def play(command, code, *arguments, **options):
    return subprocess.run(
        [*command, "-c", code, *arguments], capture_output=True, text=True, check=False, **options
    )


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_fork_is_the_process_that_was_asked_for(warm, tmp_path):
    """Arguments, folder, environment, streams and end are those of a Python that is started."""
    code = (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read(), "
        "__name__, sys.path[0]); print('told', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    )
    options = {"cwd": tmp_path, "env": {**os.environ, "WORD": "a b"}, "input": "given"}
    own, other = (play(c, code, "3", "x y", **options) for c in (warm.command, (sys.executable,)))
    assert own.returncode == other.returncode == 3
    assert own.stdout == other.stdout
    assert own.stderr == other.stderr == "told\n"


def test_imports_are_done(warm):
    code = "import sys; print('decimal' in sys.modules, 'fastfpl' in sys.modules)"
    assert play(warm.command, code).stdout == "True False\n"
    assert play((sys.executable,), code).stdout == "False False\n", "the test must be able to fail"


def test_a_module_is_run_and_words_of_an_exit_are_said(warm):
    shown = subprocess.run(
        [*warm.command, "-m", "json.tool", "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: " in shown.stdout
    failed = play(warm.command, "raise SystemExit('a sentence')")
    assert (failed.returncode, failed.stderr) == (1, "a sentence\n")
    failed = play(warm.command, "1 / 0")
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr


def test_no_two_draw_the_same(warm):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = [play(warm.command, code).stdout.split() for _ in range(2)]
    assert len({*drawn[0], *drawn[1]}) == 4


def begin(warm, code, path):
    """Start a fork, and return what was started and the number that the fork wrote."""
    one = subprocess.Popen([*warm.command, "-c", code, str(path)])
    until(lambda: path.exists() and path.read_text())
    return one, int(path.read_text())


WAITS = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); "
    "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
)


def test_a_signal_is_passed_on_and_the_end_is_the_forks(warm, tmp_path):
    one, _ = begin(warm, WAITS, tmp_path / "number")
    one.terminate()
    assert one.wait(10) == 5
    one, number = begin(warm, WAITS, tmp_path / "other")
    os.kill(number, signal.SIGKILL)
    assert one.wait(10) == -signal.SIGKILL


def test_who_kills_what_was_started_kills_the_fork(warm, tmp_path):
    one, number = begin(warm, WAITS, tmp_path / "number")
    one.kill()
    one.wait(10)
    until(lambda: not psutil.pid_exists(number))


def test_without_its_server_python_is_started_and_it_says_so():
    with Warm([]) as warm:
        assert play(warm.command, "").stderr == ""
    ended = play(warm.command, "import sys; print(sys.argv[1]); sys.exit(4)", "x")
    assert (ended.returncode, ended.stdout) == (4, "x\n")
    assert ended.stderr.startswith("fastfpl.warm: ")
    assert "Python is started anew" in ended.stderr


@pytest.mark.parametrize(
    ("module", "text"),
    [("no_such_module", None), ("torch", "class cuda:\n    is_initialized = lambda: True\n")],
    ids=["absent", "with a device's context"],
)
def test_what_cannot_be_forked_is_a_sentence(module, text, tmp_path):
    if text is not None:
        (tmp_path / f"{module}.py").write_text(text)
    with pytest.raises(InputError, match=rf"got {module}, and a process that ended with 1"):
        Warm([module], tmp_path)


def test_a_fork_ends_with_the_process_that_waits_for_it(warm, tmp_path):
    code = WAITS.replace("os.getpid()", "f'{os.getpid()} {os.getppid()}'")
    one = subprocess.Popen(
        [*warm.command, "-c", code, str(tmp_path / "n")], stderr=subprocess.PIPE, text=True
    )
    until(lambda: (tmp_path / "n").exists() and (tmp_path / "n").read_text())
    number, waiting = map(int, (tmp_path / "n").read_text().split())
    os.kill(waiting, signal.SIGKILL)
    said = one.communicate(timeout=10)[1]
    assert one.returncode == 1
    assert said.startswith("fastfpl.warm: ")
    assert "Traceback" not in said
    until(lambda: not lives(number))


def lives(number):
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(-2)",
        "import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), 13)",
        "raise KeyboardInterrupt",
        "import os; os.abort()",
    ],
)
def test_an_end_is_that_of_a_python_that_is_started(code, warm):
    own, other = (play(command, code).returncode for command in (warm.command, (sys.executable,)))
    assert own == other != 0


def test_what_is_closed_is_no_stream_of_another(warm, tmp_path):
    """A socket in a stream's place would keep a fork alive whose asker was killed."""
    shell = ["sh", "-c", 'exec "$@" <&-', "sh"]
    one = subprocess.Popen([*shell, *warm.command, "-c", WAITS, str(tmp_path / "number")])
    until(lambda: (tmp_path / "number").exists() and (tmp_path / "number").read_text())
    number = int((tmp_path / "number").read_text())
    assert os.readlink(f"/proc/{number}/fd/0") == os.devnull
    one.kill()
    one.wait(10)
    until(lambda: not lives(number))


def test_a_folder_that_is_gone_is_a_python_that_is_started(warm, tmp_path):
    (tmp_path / "gone").mkdir()
    shell = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *warm.command, "-c", "print(1)"]
    told = subprocess.run(shell, cwd=tmp_path / "gone", capture_output=True, text=True, check=True)
    assert told.stdout == "1\n"
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize("threads", ["4,2", "", "0", "many"])
def test_numbers_of_threads_are_as_openmp_reads_them(threads, tmp_path):
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_initialized = lambda: False\n"
        "seed = lambda: None\nset_num_threads = lambda n: print('threads', n)\n"
    )
    with Warm(["torch"], tmp_path) as one:
        told = play(one.command, "", env={**os.environ, "OMP_NUM_THREADS": threads})
    assert (told.returncode, told.stdout) == (0, "threads 4\n" if threads == "4,2" else "")


def test_a_folder_may_lie_deep_and_imports_may_print(tmp_path, monkeypatch, capfd):
    """A socket's name may have 107 bytes."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    (tmp_path / "speaks.py").write_text("print('a word')\n")
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(files, "_mine", None)  # this process has a folder elsewhere
    with Warm(["speaks"], tmp_path) as one:
        assert len(one.command[-1]) > 120
        assert play(one.command, "print(1)").stdout == "1\n"
    assert capfd.readouterr().err == "a word\n"
    assert [path.name for path in deep.glob("*/*")] == [".lock"]


def test_who_goes_without_a_word_is_no_trouble(capfd):
    with Warm([]) as one:
        for words in (b"", b"abc", bytes(8), b"\xff" * 8, bytes(7) + b"\x05abc"):
            with socket.socket(socket.AF_UNIX) as to:
                to.connect(one.command[-1])
                to.sendall(words)
        assert play(one.command, "print(1)").stdout == "1\n"
    assert capfd.readouterr().err == ""


def test_children_are_waited_for_where_they_were_ignored():
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "from fastfpl.warm import Warm\n"
        "with Warm([]) as one:\n"
        "    for _ in range(3): subprocess.run([*one.command, '-c', 'print(1)'])\n"
    )
    told = play((sys.executable,), code)
    assert (told.returncode, told.stdout, told.stderr) == (0, "1\n" * 3, "")


def test_forks_that_have_ended_are_soon_waited_for():
    """Not with the next one that is asked for: a node may wait for that for a day."""
    with Warm([]) as one:
        ask = [*one.command, "-c", "import sys; sys.stdin.read()"]
        several = [subprocess.Popen(ask, stdin=subprocess.PIPE) for _ in range(3)]
        server = psutil.Process(one.process.pid)
        try:
            until(lambda: len(server.children()) == 3)
            several[1].communicate()
            until(lambda: len(server.children()) == 2, 3)
        finally:
            for other in several:
                other.communicate()
        until(lambda: not server.children(), 3)
        assert play(one.command, "print(1)").stdout == "1\n"
        assert not {int(n) for n in os.listdir(f"/proc/{server.pid}/fd")} - set(range(5))


def test_nothing_is_looked_for_where_no_fork_lives(tmp_path):
    with Warm([]) as one:
        server = psutil.Process(one.process.pid)

        def woken(seconds=2.5):
            before = server.num_ctx_switches().voluntary
            time.sleep(seconds)
            return server.num_ctx_switches().voluntary - before

        asked, _ = begin(one, WAITS, tmp_path / "number")
        assert woken(), "the test must be able to fail"
        asked.kill()
        asked.wait(10)
        until(lambda: not server.children(), 3)
        assert not woken()


@pytest.mark.parametrize("absent", ["del os.pidfd_open", "os.pidfd_open = refused"])
def test_kernels_without_descriptors_of_processes_will_do(absent, tmp_path):
    """Those before 5.3: ends and signals come a little later."""
    (tmp_path / "old.py").write_text(
        f"import os\ndef refused(*_):\n    raise OSError(38, os.strerror(38))\n{absent}\n"
    )
    with Warm(["old"], tmp_path) as one:
        told = play(one.command, "import sys; print(1); sys.exit(3)")
        assert (told.returncode, told.stdout, told.stderr) == (3, "1\n", "")
        for number, status in ((signal.SIGTERM, 5), (signal.SIGKILL, -signal.SIGKILL)):
            asked, fork = begin(one, WAITS, tmp_path / f"number-{number}")
            asked.send_signal(number)
            assert asked.wait(10) == status
            until(lambda: not lives(fork))  # noqa: B023
        until(lambda: not psutil.Process(one.process.pid).children(), 3)


def test_a_fork_has_nothing_open_that_tells_of_the_others(warm, tmp_path):
    one, _ = begin(warm, WAITS, tmp_path / "number")
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
    told, alone = (play(command, code) for command in (warm.command, (sys.executable,)))
    one.kill()
    one.wait(10)
    assert told.stdout == alone.stdout


def test_what_a_killed_process_leaves_is_swept_by_the_next(tmp_path):
    """And nothing else: not what lives, not what only has such a name."""
    code = (
        "import os, sys, time; from fastfpl.warm import Warm; one = Warm([]); "
        "open(sys.argv[1], 'w').write(one.command[-1]); time.sleep(60)"
    )
    place = tmp_path / "temporary"
    place.mkdir()
    other = place / "fastfpl-other"
    other.mkdir()
    (other / ".lock").write_text("another's")
    environment = {**os.environ, "TMPDIR": str(place)}

    def started(name):
        path = tmp_path / name
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
        until(lambda: path.exists() and path.read_text(), 60)
        return process, path.read_text()

    killed, left = started("killed")
    lives_on, there = started("lives")
    killed.kill()
    killed.wait(10)
    assert os.path.exists(left)
    third, _ = started("third")
    try:
        assert not os.path.exists(os.path.dirname(left))
        assert os.path.exists(there)
        assert (other / ".lock").read_text() == "another's"
    finally:
        for process in (lives_on, third):
            process.kill()
            process.wait(10)
