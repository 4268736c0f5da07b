"""What `fastfpl flower node` does with signals, and with what it started, around a SuperNode."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fastfpl.system import FORKS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed"),
    pytest.mark.skipif(not FORKS, reason="forks are for Linux"),
]
SUPERNODE = """#!{python}
import os, signal, sys, time
for number, code in ((signal.SIGTERM, 5), (signal.SIGHUP, 6), (signal.SIGINT, 7)):
    signal.signal(number, lambda *_, code=code: sys.exit(code))
open(sys.argv[1] + ".part", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(60)
"""
NODE = """
import contextlib, os, signal, sys
from fastfpl.flower import node
if not os.environ.get("IGNORES"):  # as whoever runs the tests may, or its shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
node.tool = lambda name: sys.argv[1]
node.warm_commands = lambda: contextlib.nullcontext(os.environ)
sys.exit(node.run_node(sys.argv[2:]))
"""


def lives(number):
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 5),
        (signal.SIGHUP, 6),
        (signal.SIGINT, 7),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_supernode_ends_with_its_node(number, code, tmp_path):
    """Who restarts a node finds its port and its key free, however it ended."""
    script = tmp_path / "supernode"
    script.write_text(SUPERNODE.format(python=sys.executable))
    script.chmod(0o700)
    command = [sys.executable, "-c", NODE, str(script), str(tmp_path / "number")]
    one = subprocess.Popen(command, start_new_session=True)
    end = time.monotonic() + 60
    while not (tmp_path / "number").exists():
        assert one.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    supernode = int((tmp_path / "number").read_text())
    # as a terminal does it: to all of a group
    os.killpg(one.pid, number) if number == signal.SIGINT else os.kill(one.pid, number)
    assert one.wait(20) == code
    while lives(supernode):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_script_has_begun_ends_when_it_is_told_to(tmp_path):
    """A shell without job control has what it begins with & ignore SIGINT, and only that."""
    script = tmp_path / "supernode"
    script.write_text(SUPERNODE.format(python=sys.executable))
    script.chmod(0o700)
    command = [sys.executable, "-c", NODE, str(script), str(tmp_path / "number")]
    one = subprocess.Popen(
        ["sh", "-c", '"$@" & echo $!; wait $!', "sh", *command],
        env={**os.environ, "IGNORES": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    number = int(one.stdout.readline())
    end = time.monotonic() + 60
    while not (tmp_path / "number").exists():
        assert one.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(number, signal.SIGINT)
    time.sleep(0.5)
    assert lives(number), "the test must be able to fail: it must ignore this one"
    os.kill(number, signal.SIGTERM)
    assert one.wait(20) == 5
    one.stdout.close()
    assert not lives(int((tmp_path / "number").read_text()))


WARM = NODE.replace(
    "node.warm_commands = lambda: contextlib.nullcontext(os.environ)", "node._MODULES = ()"
)


def test_what_a_killed_node_leaves_goes_when_the_next_begins(tmp_path):
    """The folder of its socket and that of its commands; none is left where nobody was killed."""
    script, place = tmp_path / "supernode", tmp_path / "temporary"
    script.write_text(SUPERNODE.format(python=sys.executable))
    script.chmod(0o700)
    place.mkdir()

    def started(name):
        one = subprocess.Popen(
            [sys.executable, "-c", WARM, str(script), str(tmp_path / name)],
            env={**os.environ, "TMPDIR": str(place)},
            start_new_session=True,
        )
        end = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert one.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        return one, {path.parent for path in place.glob("*/*/*")}

    killed, left = started("killed")
    assert len(left) == 2
    killed.kill()
    killed.wait(20)
    assert all(path.is_dir() for path in left), "the test must be able to fail"
    second, _ = started("second")
    assert not any(path.exists() for path in left)
    second.terminate()
    assert second.wait(20) == 5
    assert not list(place.iterdir())
