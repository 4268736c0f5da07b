"""What systems do differently: locks that die with their holder, peaks, and no POSIX at all."""

from __future__ import annotations

import json
import mmap
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fastfpl import system
from fastfpl.errors import InputError
from fastfpl.federation.lock import LOCK, alone_in
from fastfpl.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
LINUX = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="looks at files as Linux does"
)


def python(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_files_alone_name_what_posix_alone_has() -> None:
    """Modules and calls that another system lacks; what `getattr` asks for is asked for."""
    lacked = re.compile(
        r"^\s*(?:import|from) (?:fcntl|resource|pwd|grp|termios|tty|pty|msvcrt)\b"
        r"|\bos\.(?:fork|geteuid|getuid|killpg|mkfifo|sched_\w+|O_NO\w+|O_DIRECTORY|replace)\b"
        r"|\bsignal\.(?:SIGKILL|SIGHUP|SIGUSR\d)\b",
        re.MULTILINE,
    )
    found = {
        f"{path.relative_to(ROOT)}: {hit.strip()}"
        for path in (*ROOT.glob("fastfpl/**/*.py"), *ROOT.glob("kernels/**/*.py"))
        if path.name not in ("system.py", "warm.py")  # the latter forks, where forks are
        for hit in lacked.findall(path.read_text(encoding="utf-8"))
    }
    assert found == set()
    assert lacked.findall((ROOT / "fastfpl" / "system.py").read_text(encoding="utf-8"))


def first_command() -> list[str]:
    """The README's, as it stands there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- first command -->\n```bash\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    return shlex.split(found[1].splitlines()[-1])[1:]


# two clients with five images each; what it computes is shown elsewhere
SMALL = ["--clients", "2", "--rounds", "2", "--shots", "1", "--dataset", "digits", "--threads", "1"]
FIRST = """
import json, sys
from tests import stand_in
stand_in.without_posix()
stand_in.windows_files()
from fastfpl.cli import main
from tests.worlds import on_few_digits
with on_few_digits():
    main(json.loads(sys.argv[1]))
"""


@LINUX
def test_the_first_command_needs_nothing_of_posix(tmp_path: Path) -> None:
    """Its modules and calls hidden; and what is open neither renamed nor removed."""
    command = [*first_command(), *SMALL, "--cache", str(tmp_path / "cache")]
    out = tmp_path / "first"
    command[command.index("--out") + 1] = str(out)
    done = python(FIRST, json.dumps(command), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    results = list(out.glob("*/result.json"))
    assert {p.parent.name.removesuffix("-seed0") for p in results} == METHODS.keys() & set(command)
    assert len(results) == 7
    assert json.loads(results[0].read_text(encoding="utf-8"))["peak_memory_bytes"] > 50 << 20
    assert (out / "index.html").exists()
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
    kept = [p.suffix for p in (tmp_path / "cache").iterdir()]
    # pooled features, as the tower gives them, and patches: of training and of test images
    assert kept == [".safetensors"] * 6


HOLDER = """
import sys, time
from pathlib import Path
from fastfpl import system
from fastfpl.federation.lock import alone_in
with alone_in(Path(sys.argv[1])) as held:
    held.claim(Path(sys.argv[1]) / "clients")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_says_who_holds_it_and_dies_with_it(tmp_path: Path, monkeypatch) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        here = rf"got {tmp_path}, where process {holder.pid} is running; wait for it"
        with pytest.raises(InputError, match=here), alone_in(tmp_path):
            pass
        # of another machine that shares the folder
        monkeypatch.setattr("platform.node", lambda: "another")
        there = rf"where process {holder.pid} on {os.uname().nodename} is running"
        with pytest.raises(InputError, match=there), alone_in(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK).exists()
    with alone_in(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"fastfpl-run-1 {os.getpid()} another\n")
    assert list(tmp_path.iterdir()) == []


def test_the_peak_is_a_peak() -> None:
    """What was taken and given back counts, until it is forgotten; what is there is less."""
    system.forget_peak()
    before = system.peak_resident()
    if before > system.resident() + (32 << 20):
        pytest.skip("this system does not forget a peak")
    # pages of its own: a heap may have as much at hand
    with mmap.mmap(-1, 96 << 20) as block:
        block[:] = b"x" * (96 << 20)
        assert system.resident() > 96 << 20
    assert system.peak_resident() >= before + (90 << 20)
    assert system.resident() < system.peak_resident() - (48 << 20)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"rss": 5, "peak_wset": 9}, 9),  # Windows
        ({"rss": 5}, 7),  # macOS, whose ru_maxrss counts bytes
    ],
)
def test_the_peak_elsewhere(said, wanted, monkeypatch) -> None:
    import resource

    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(**said))
    )
    monkeypatch.setattr(psutil, "MACOS", True)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    assert system.peak_resident() == wanted


def test_a_rename_waits_for_whoever_has_the_file_open(tmp_path: Path, monkeypatch) -> None:
    part, path = tmp_path / "part", tmp_path / "whole"
    part.write_bytes(b"new")
    path.write_bytes(b"old")
    plain, asked = os.replace, []

    def busy(a: Path, b: Path) -> None:
        asked.append(b)
        if len(asked) < 3:
            raise PermissionError(13, "in use")
        plain(a, b)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(PermissionError):  # a right that lacks is none that comes
        system.rename(part, path)
    monkeypatch.setattr(system, "WINDOWS", True)
    system.rename(part, path)
    assert (path.read_bytes(), len(asked), part.exists()) == (b"new", 3, False)
    part.write_bytes(b"newer")
    asked.clear()
    monkeypatch.setattr(system, "_PATIENCE", 0.0)
    with pytest.raises(PermissionError):
        system.rename(part, path)
    assert path.read_bytes() == b"new"


def test_links_are_not_followed_where_the_system_has_no_flag_for_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.delattr(os, "O_NOFOLLOW")
    with pytest.raises(OSError, match="symbolic links"):
        system.open_plain(tmp_path / "link", os.O_RDWR)
    os.close(system.open_plain(tmp_path / "target", os.O_RDWR))


TREE = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('x', flush=True); time.sleep(60)"  # noqa: E501


@pytest.mark.parametrize("groups", [True, False])
def test_a_process_ends_with_all_that_it_started(groups, monkeypatch) -> None:
    if not groups:
        monkeypatch.delattr(os, "killpg")
    first = subprocess.Popen(
        [sys.executable, "-c", TREE], start_new_session=True, stdout=subprocess.PIPE
    )
    assert first.stdout is not None
    first.stdout.readline()
    (child,) = psutil.Process(first.pid).children()
    system.end_tree(first, kill=True)
    first.communicate(timeout=10)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    system.end_tree(first, kill=False)  # nobody is there any more
