"""A run that was stopped goes on as if nothing had happened, or says why it cannot."""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastfpl
import fastfpl.federation.preparation
from fastfpl.data import load_dataset
from fastfpl.errors import Damaged, InputError, NotConverged
from fastfpl.federation.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    files_of,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fastfpl.federation.lock import LOCK, alone_in
from fastfpl.federation.shared import DOWNLOADS, SharedStates
from fastfpl.federation.states import CLIENTS, StateFiles
from tests.warm import warm_python
from tests.worlds import GATE, TINY_RUN, figures, small_clip

ROOT = Path(__file__).parent.parent
RUN = {**TINY_RUN, "rounds": 4, "participation": 0.5, "threads": 1}
METHODS = {
    "promptfl": {},
    "fedprox": {},
    "local": {},
    "pfedmoap": {"options": GATE},
    "zeroshot": {},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread_one_digits():
    """Figures are compared bit for bit, and threads share sums; draw the digits once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = load_dataset("digits")
    patch = pytest.MonkeyPatch()
    patch.setattr(fastfpl.federation.preparation, "load_dataset", lambda name, root, **more: digits)
    yield
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clips():
    """Give the CLIP in both widths; float64 shows every difference of order in a sum."""
    clip = small_clip()
    return {"float32": clip, "float64": clip.to(dtype=torch.float64)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def play(clips, cache):
    def run(out=None, method="promptfl", dtype="float32", **changes):
        settings = {**RUN, **METHODS[method], "dtype": dtype, **changes}
        return fastfpl.run(method, out=out, model=clips[dtype], cache=cache, **settings)

    return run


@pytest.fixture(scope="module")
def whole(play, tmp_path_factory):
    """Give the folder and the figures of runs that nobody disturbed."""
    known = {}

    def run(method="promptfl", dtype="float32", **changes):
        key = repr((method, dtype, sorted(changes.items())))
        if key not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            known[key] = folder, figures(play(folder, method, dtype, **changes))
        return known[key]

    return run


def contents(folder):
    """Every file with its bytes and its time of change."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


def tensors(folder):
    """The last state: of the server, of clients, and what they had downloaded."""
    head = json.loads((folder / CHECKPOINT).read_text())
    found = load_file(folder / head["tensors"])
    for client, entry in head["clients"].items():
        path = folder / CLIENTS / f"{int(client):05d}-{entry['version']:05d}.safetensors"
        found |= {f"client.{client}.{name}": t for name, t in load_file(path).items()}
    kept = read_checkpoint(folder)
    for what, states in (("down", kept.downloads), ("tuned", kept.tuned)):
        for client, state in states.items():
            found |= {f"{what}.{client}.{name}": t for name, t in state.items()}
    return found


def assert_ended_alike(folder, undisturbed):
    """Compare result.json and the last state with a run that nobody disturbed."""
    other, wanted = undisturbed
    assert figures(fastfpl.Result.load(folder)) == wanted
    mine, theirs = tensors(folder), tensors(other)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert listed(folder) == listed(other)


def listed(folder):
    """Every file below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class Stop(Exception):
    """What ends a run in its middle."""


def stop_after(rounds, error=Stop):
    def on_round(method, row):
        if row["round"] + 1 == rounds:
            raise error

    return on_round


# --- stopped and resumed --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "zeroshot"])
def test_resumed_after_any_round_equals_uninterrupted(play, whole, tmp_path, method, dtype):
    wanted = whole(method, dtype)
    for rounds in (1, 2, 3, 4):
        folder = tmp_path / str(rounds)
        with pytest.raises(Stop):
            play(folder, method, dtype, on_round=stop_after(rounds))
        assert not (folder / "result.json").exists()
        assert json.loads((folder / CHECKPOINT).read_text())["rounds_done"] == rounds
        play(folder, method, dtype, resume=True)
        assert_ended_alike(folder, wanted)


def test_stopped_after_every_round(play, whole, tmp_path):
    """A client that keeps a gate is put aside and taken up again three times."""
    wanted = whole("pfedmoap", "float64", rounds=6)
    for rounds in range(1, 6):
        with pytest.raises(Stop):
            play(
                tmp_path,
                "pfedmoap",
                "float64",
                rounds=6,
                resume=True,
                on_round=stop_after(rounds),
            )
    play(tmp_path, "pfedmoap", "float64", rounds=6, resume=True)
    assert_ended_alike(tmp_path, wanted)
    # the run was worth resuming: a gate trained, and clients have sat out
    assert any("gate.w_q" in name for name in tensors(tmp_path))


def test_resuming_in_an_empty_folder_starts(play, whole, tmp_path):
    play(tmp_path / "new", resume=True)
    assert_ended_alike(tmp_path / "new", whole())


@pytest.mark.parametrize("method", ["promptfl", "zeroshot"])
def test_resuming_a_finished_run_changes_no_figure(play, whole, tmp_path, method):
    folder, wanted = whole(method)
    shutil.copytree(folder, tmp_path / "copy")
    assert figures(play(tmp_path / "copy", method, resume=True)) == wanted
    assert_ended_alike(tmp_path / "copy", (folder, wanted))


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_rounds_may_be_extended(play, whole, tmp_path, method):
    play(tmp_path, method, "float64", rounds=2)
    longer = play(tmp_path, method, "float64", resume=True)
    assert len(longer.rounds) == 4
    assert_ended_alike(tmp_path, whole(method, "float64"))


def test_fewer_rounds_than_were_played_are_refused(play, tmp_path):
    play(tmp_path, rounds=2)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="rounds must be at least the 2 that"):
        play(tmp_path, rounds=1, resume=True)
    assert contents(tmp_path) == before


def test_rounds_of_a_schedule_over_rounds_may_not(play, tmp_path):
    play(tmp_path, rounds=1, schedule="cosine-rounds")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="rounds: 1 then, 2 now"):
        play(tmp_path, rounds=2, schedule="cosine-rounds", resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"cohort": 1}, {"device": "cpu"}, {"max_memory": "1TiB"}, {"cuda_graphs": "off"}]
)
def test_what_decides_no_figure_may_change(play, whole, tmp_path, change):
    with pytest.raises(Stop):
        play(tmp_path, on_round=stop_after(2))
    rows = figures(play(tmp_path, resume=True, **change))
    for row, wanted in zip(rows, whole()[1], strict=True):
        assert row.get("loss", 0) == pytest.approx(wanted.get("loss", 0), rel=1e-5)


# the second round's first training, a later step, an evaluation, the encoding of images
MOMENTS = [("round 2 of 4, training", 1), ("round 3 of 4, training", 2), ("round 2 of 4, eval", 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0][6:]} {m[1]}")
def test_an_interrupted_run_can_be_resumed(play, whole, tmp_path, moment, error):
    told = []

    def observer(what, done, total):
        told.append(what)
        assert 0 < done <= total
        if what.startswith(moment[0]) and sum(w == what for w in told) == moment[1]:
            raise error

    with pytest.raises(error):
        play(tmp_path, "pfedmoap", observer=observer)
    done = int(moment[0][6]) - 1
    assert json.loads((tmp_path / CHECKPOINT).read_text())["rounds_done"] == done
    play(tmp_path, "pfedmoap", resume=True)
    assert_ended_alike(tmp_path, whole("pfedmoap"))


def test_interrupted_while_images_are_encoded(clips, whole, tmp_path):
    def observer(what, done, total):
        raise KeyboardInterrupt

    fresh = tmp_path / "features"
    arguments = {"out": tmp_path / "run", "model": clips["float32"], "cache": fresh, **RUN}
    with pytest.raises(KeyboardInterrupt):
        fastfpl.run("promptfl", observer=observer, **arguments)
    fastfpl.run("promptfl", resume=True, **arguments)
    assert_ended_alike(tmp_path / "run", whole())


def test_a_diverged_run_keeps_its_last_checkpoint(play, whole, tmp_path, monkeypatch):
    from fastfpl.training import cohort

    right = cohort.learning_rate
    monkeypatch.setattr(
        cohort, "learning_rate", lambda s, t, *e: math.inf if t == 2 else right(s, t, *e)
    )
    with pytest.raises(NotConverged, match="in round 2, epoch"):
        play(tmp_path)
    monkeypatch.undo()
    play(tmp_path, resume=True)
    assert_ended_alike(tmp_path, whole())


# --- killed ---------------------------------------------------------------------------------------

# One process loads the library once and forks a child for every death; each child resumes the run,
# and dies of SIGKILL at its moment. The last child is left alone.
KILLER = """
import json, os, signal, sys, time
import torch

torch.set_num_threads(1)
import fastfpl
import fastfpl.federation.preparation as preparation
from fastfpl.data import load_dataset
from tests.worlds import small_clip

cache, jobs = json.loads(sys.argv[1])
digits = load_dataset("digits")
preparation.load_dataset = lambda name, root, **more: digits
clip = small_clip()

def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(out, kind, number):
    count = {"fsync": 0, "replace": 0}
    fsync, replace = os.fsync, os.replace

    def dying_fsync(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.dirname(path) == out:
            count["fsync"] += 1
            if kind == "half" and count["fsync"] == number:
                os.truncate(path, os.path.getsize(path) // 2)
                die()
        return fsync(fd)

    def dying_replace(a, b):
        mine = os.path.dirname(b) == out
        count["replace"] += mine
        now = mine and count["replace"] == number
        if now and kind == "before":
            die()
        replace(a, b)
        if now and kind == "after":
            die()

    os.fsync, os.replace = dying_fsync, dying_replace


def play(out, method, settings, moments):
    def run():
        fastfpl.run(method, out=out, cache=cache, resume=True, model=clip, **settings)

    def files():
        return set(os.listdir(out)) - {".lock"} if os.path.isdir(out) else set()

    deaths = 0
    for kind, number in moments:
        before = files()
        child = os.fork()
        if child == 0:
            if kind != "seconds":
                arm(out, kind, number)
            run()
            os._exit(0)
        if kind == "seconds":
            ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while files() == before and os.waitid(os.P_PID, child, ended) is None:
                time.sleep(0.001)
            time.sleep(number)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert died or (kind == "seconds" and status == 0), (kind, number, status)
        deaths += died
    run()
    return deaths


print(json.dumps([play(*job) for job in jobs]))
"""
DEATHS = [
    ("half", 1),  # the first tensors are half written
    ("after", 1),  # tensors are there, nothing names them
    ("half", 2),  # the first checkpoint.json is half written
    ("before", 2),  # it is whole, but not in its place
    ("after", 2),  # the first round counts
    ("before", 1),
    ("half", 2),
    ("after", 4),  # two rounds more, the old tensors not yet removed
    ("half", 1),
    ("after", 3),  # the last round counts, its result is not written
    ("half", 1),  # the result is half written
    ("before", 1),
    ("after", 1),  # done, but nobody heard of it
]


# seconds after the first file of a child appears: anywhere in a round of about 30 ms
MOMENTS_IN_TIME = [("seconds", s) for s in (0.0, 0.002, 0.005, 0.009, 0.014, 0.02, 0.03, 0.05)]
KILLED = {
    "promptfl": ("promptfl", {}, DEATHS),
    "pfedmoap": ("pfedmoap", {}, DEATHS),
    "in time": ("pfedmoap", {"rounds": 40}, MOMENTS_IN_TIME),
}


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):
    """Give each job's folder and the number of its deaths."""
    folders = {name: tmp_path_factory.mktemp("killed") / "run" for name in KILLED}
    jobs = [
        (str(folders[name]), method, {**RUN, **METHODS[method], **changes}, moments)
        for name, (method, changes, moments) in KILLED.items()
    ]
    done = subprocess.run(
        [*warm_python(), "-c", KILLER, json.dumps([str(cache), jobs])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name: (folders[name], n) for name, n in zip(KILLED, json.loads(done.stdout), strict=True)
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="kills as Linux does")
@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_equals_uninterrupted(killed, whole, name):
    folder, deaths = killed[name]
    method, changes, moments = KILLED[name]
    # a child that is to die in time may be done before
    assert deaths == len(moments) if name != "in time" else deaths >= 3
    assert_ended_alike(folder, whole(method, **changes))


# --- refused --------------------------------------------------------------------------------------


@pytest.fixture
def halted(play, tmp_path):
    """Give a folder with two of four rounds."""
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        play(folder, on_round=stop_after(2))
    return folder


def assert_refused(play, folder, error, match, **changes):
    before = contents(folder)
    with pytest.raises(error, match=match):
        play(folder, **{"resume": True, **changes})
    assert contents(folder) == before


def parts_of(folder):
    (data,) = folder.glob("checkpoint-*.safetensors")
    return {"json": folder / CHECKPOINT, "tensors": data}


@pytest.mark.parametrize("which", ["json", "tensors"])
def test_a_truncated_checkpoint_is_refused(play, halted, which):
    path = parts_of(halted)[which]
    data = path.read_bytes()
    for size in (0, 1, 7, len(data) // 2, len(data) - 20, len(data) - 3):
        path.write_bytes(data[:size])
        assert_refused(play, halted, Damaged, f"{path.name} must be a whole checkpoint; got ")
    path.write_bytes(data + b" x")
    assert_refused(play, halted, Damaged, f"{path.name} must be a whole checkpoint; got ")


@pytest.mark.parametrize("which", ["json", "tensors"])
def test_a_changed_bit_is_refused(halted, which):
    path = parts_of(halted)[which]
    data = path.read_bytes()
    facts = json.loads((halted / CHECKPOINT).read_text())["facts"]
    assert load_checkpoint(halted, facts) is not None
    step = max(1, len(data) // 150)
    for at in range(0, len(data), step):
        for bit in (0, 5):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            # a space for a space, or the last digit of a float that rounds to the same number
            if which == "json" and same_json(changed, data):
                continue
            with pytest.raises(Damaged, match="must be a whole checkpoint; got "):
                load_checkpoint(halted, facts)


def same_json(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


FOREIGN = {
    "another program's": '{"rounds": []}',
    "a list": "[1, 2]",
    "another format": '{"format": "fastfpl-checkpoint-0"}',
    "no fields": '{"format": "fastfpl-checkpoint-3"}',
    "not text": "\x00\x01",
    "nothing": "",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_refused(play, halted, kind):
    (halted / CHECKPOINT).write_text(FOREIGN[kind])
    assert_refused(play, halted, Damaged, "checkpoint.json must be a whole checkpoint; got ")


def test_not_unicode(play, halted):
    (halted / CHECKPOINT).write_bytes(b"\xff\xfe{}")
    assert_refused(
        play, halted, Damaged, "checkpoint.json must be a whole checkpoint; got not JSON"
    )


def test_foreign_tensors_are_refused(play, halted):
    path = parts_of(halted)["tensors"]
    save_file({"server.ctx": torch.zeros(4, 32)}, path)
    assert_refused(play, halted, Damaged, "its checksum is not the one that was written")
    path.unlink()
    assert_refused(play, halted, Damaged, f"names {path.name}, which is not there")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": 0.06}, "lr: 0.05 then, 0.06 now"),
        ({"shots": 6}, "shots: 5 then, 6 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"participation": 0.75}, "participation: 0.5 then, 0.75 now"),
        ({"method": "fedprox"}, "method: 'promptfl' then, 'fedprox' now"),
        ({"dtype": "float64"}, "dtype: 'float32' then, 'float64' now"),
        ({"n_ctx": 5, "momentum": 0.5}, "n_ctx: 4 then, 5 now, momentum: 0.9 then, 0.5 now"),
    ],
)
def test_other_settings_are_refused(play, halted, changes, sentence):
    assert_refused(
        play, halted, InputError, f"must have the settings of .*got .*{sentence}", **changes
    )


def test_another_option_is_refused(play, tmp_path):
    play(tmp_path, "fedprox", rounds=1)
    change = {"method": "fedprox", "options": {"mu": 0.25}}
    assert_refused(
        play, tmp_path, InputError, r"options: \{'mu': 0.5\} then, \{'mu': 0.25\}", **change
    )
    # a default that is spelt out is no other option
    play(tmp_path, "fedprox", rounds=2, options={"mu": 0.5}, resume=True)


def test_other_weights_are_refused(clips, cache, halted):
    model = clips["float32"].to(dtype=torch.float16).to(dtype=torch.float32)
    with pytest.raises(InputError, match=r"weights: '[0-9a-f]{32}' then, '[0-9a-f]{32}' now"):
        fastfpl.run("promptfl", out=halted, resume=True, model=model, cache=cache, **RUN)


def test_an_existing_run_is_refused_without_resume(play, whole, halted):
    again = r"out must not hold a run already; got .*by resume \(--resume\)"
    assert_refused(play, halted, InputError, again, resume=False)
    (halted / CHECKPOINT).rename(halted / "result.json")
    assert_refused(play, halted, InputError, again, resume=False)


def test_a_file_for_a_folder_is_refused(play, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="out must be a folder; got the file"):
        play(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- one run at a time ----------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from fastfpl.federation.lock import alone_in

with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_another_process_is_refused_until_that_one_dies(play, whole, halted):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(halted)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            taken = (
                rf"used by one run at a time; got {halted}, where process {holder.pid} is running"
            )
            assert_refused(play, halted, InputError, taken)
            assert_refused(play, halted, InputError, taken, resume=False)
        finally:
            holder.send_signal(signal.SIGKILL)
    # what it left is a file, and nobody holds it
    assert (halted / LOCK).read_text() == f"fastfpl-run-1 {holder.pid} {platform.node()}\n"
    play(halted, resume=True)
    assert_ended_alike(halted, whole())


def test_a_folder_of_a_run_in_this_process_is_refused(play, whole, tmp_path):
    tried = []

    def on_round(method, row):
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"where process {os.getpid()} is running"):
                play(tmp_path / "run", resume=resume)
        tried.append(row["round"])

    play(tmp_path / "run", on_round=on_round)
    assert tried == [0, 1, 2, 3]
    assert_ended_alike(tmp_path / "run", whole())


def test_a_refused_run_leaves_no_folder(play, tmp_path):
    with pytest.raises(InputError, match="must fit into"):
        play(tmp_path / "a" / "b", n_ctx=60)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="must fit into"):
        play(tmp_path / "mine", n_ctx=60)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(play, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"can be written to; got .*file/run: Not a directory"):
        play(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_lock_that_was_removed_after_it_was_opened_is_taken_again(tmp_path, monkeypatch):
    flock, opened = fcntl.flock, []

    def late(descriptor, how):
        opened.append(descriptor)
        if len(opened) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone_in(tmp_path):
        assert len(opened) == 2
        assert (tmp_path / LOCK).read_text() == f"fastfpl-run-1 {os.getpid()} {platform.node()}\n"
        # somebody removes it by hand, and another run takes the folder: its lock stays
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text("7\n")
    assert (tmp_path / LOCK).read_text() == "7\n"


def test_a_file_system_without_locks_is_warned_about(play, whole, tmp_path, monkeypatch):
    wanted = whole()  # with locks

    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(
        UserWarning, match=r"cannot be locked \(No locks available\); start no other"
    ):
        play(tmp_path / "run")
    assert_ended_alike(tmp_path / "run", wanted)


# --- the files ------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    server = {"ctx": torch.randn(3, 4, dtype=torch.float64), "pool_round": torch.tensor([-1, 7])}
    clients = {
        11: {"ctx": torch.randn(3, 4), "gate.w_q": torch.randn(2, 2).T},
        2: {"ctx": torch.tensor([float("nan"), -0.0])},
    }
    row = {"round": 0, "accuracy": 0.1 + 0.2, "clients": [1 / 3, 1.0], "loss": None}
    row |= {"exams": {}, "selected": [11], "lost": [], "seconds": 0.1, "images_per_second": 1e5}
    rows = [{**row, "bytes_up": 0, "bytes_down": 3}]
    task = {"classes": ["a"], "domains": ["d"], "client_domains": None, "clients": 12}
    facts = {"lr": 0.002, "options": {"mu": 0.5}, "shots": None}
    files = StateFiles(tmp_path / "new" / CLIENTS)
    for client, state in clients.items():
        files.put(client, state)
    shared = SharedStates(tmp_path / "new" / DOWNLOADS)
    both = torch.randn(2, 3, 4)
    downs = {3: {"e": both, "k": torch.tensor(7)}, 11: {"e": both.flip(0), "n": both[:0]}}
    for client, state in downs.items():
        shared.put(client, state)
    saved = Checkpoint(
        facts, rows, {"encode_text": ["torch"]}, server, files, downloads=shared, task=task
    )
    save_checkpoint(tmp_path / "new", saved)
    found = load_checkpoint(tmp_path / "new", facts)
    assert (found.facts, found.rounds, found.faces) == (facts, rows, saved.faces)
    assert list(found.server) == list(server) or set(found.server) == set(server)
    for mine, theirs in (
        (found.server, server),
        *((found.clients[c], clients[c]) for c in clients),
        *((found.downloads[c], downs[c]) for c in downs),
    ):
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert load_checkpoint(tmp_path, facts) is None
    # the two contexts of both clients are there once
    (volume,) = (tmp_path / "new" / DOWNLOADS).iterdir()
    assert sorted(t.numel() for t in load_file(volume).values()) == [1, 12, 12]


def test_only_the_last_checkpoint_is_kept(whole):
    folder, _ = whole()
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        *("checkpoint-00004.safetensors", "checkpoint.json"),
        *("metrics.jsonl", "result.json"),
    ]


def test_only_the_last_state_of_each_client_is_kept(whole):
    folder, _ = whole("pfedmoap")
    clients = json.loads((folder / CHECKPOINT).read_text())["clients"]
    wanted = {f"{int(c):05d}-{e['version']:05d}.safetensors" for c, e in clients.items()}
    assert {p.name for p in (folder / CLIENTS).iterdir()} == wanted
    assert max(e["version"] for e in clients.values()) > 0
    assert not (whole("promptfl")[0] / CLIENTS).exists()


@pytest.mark.parametrize("harm", ["gone", "cut", "changed"])
def test_a_damaged_client_is_refused(harm, play, tmp_path):
    with pytest.raises(Stop):
        play(tmp_path, "local", on_round=stop_after(2))
    path = sorted((tmp_path / CLIENTS).iterdir())[0]
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if harm == "cut" else content[:-1] + b"\x55")
    before = listed(tmp_path)
    with pytest.raises(
        Damaged, match=rf"{path.name} must be the state of a client .* another out$"
    ):
        play(tmp_path, "local", resume=True)
    assert listed(tmp_path) == before
    path.write_bytes(content)
    play(tmp_path, "local", resume=True)


def test_what_a_killed_process_wrote_last_is_no_state(play, whole, tmp_path):
    """States newer than the checkpoint: a round that was played and not written down."""
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        play(folder, "pfedmoap", on_round=stop_after(2))
    for path in list((folder / CLIENTS).iterdir()):
        client, version = path.stem.split("-")
        shutil.copy(path, path.with_name(f"{client}-{int(version) + 1:05d}.safetensors"))
    (folder / CLIENTS / "00077-00000.safetensors").write_bytes(b"half")
    new = set(files_of(folder)) ^ set((folder / CLIENTS).iterdir())
    names = [p.relative_to(folder).as_posix() for p in new if p.parent.name == CLIENTS]
    lines = ["fastfpl-run-1 7", *map(json.dumps, names), '"clients/half a li']
    (folder / LOCK).write_text("\n".join(lines))
    play(folder, "pfedmoap", resume=True)
    assert_ended_alike(folder, whole("pfedmoap"))


def test_a_run_without_out_writes_nothing(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play(rounds=1)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_result_is_refused(whole, tmp_path):
    folder, wanted = whole()
    assert figures(fastfpl.Result.load(folder)) == wanted
    (tmp_path / "result.json").write_text('{"method": 1')
    with pytest.raises(Damaged, match="must be a result"):
        fastfpl.Result.load(tmp_path)
    with pytest.raises(fastfpl.errors.Missing, match="the run is not finished"):
        fastfpl.Result.load(tmp_path / "none")


@pytest.mark.parametrize("kind", [StateFiles, SharedStates])
@pytest.mark.parametrize("kept", [False, True], ids=["temporary", "in a folder"])
def test_a_state_that_is_changed_while_its_run_goes_on_is_noticed(kind, kept, tmp_path):
    states = kind(tmp_path / "states") if kept else kind()
    state = {"ctx": torch.arange(6.0).reshape(2, 3), "more": torch.ones(1)}
    states.put(3, state)
    assert torch.equal(dict(states[3])["ctx"], state["ctx"])
    (path,) = states.files
    os.utime(path, (1, 1))  # touched, and no byte is another one
    assert torch.equal(dict(states[3])["ctx"], state["ctx"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(Damaged, match="got a file that was changed since"):
        dict(states[3])
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(dict(states[3])["ctx"], state["ctx"])
