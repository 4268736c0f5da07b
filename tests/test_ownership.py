"""Nothing of a user's is lost: foreign files, links and pipes in OUT, cache and TMPDIR."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import fastfpl
import fastfpl.federation.preparation
from fastfpl import files
from fastfpl.data import load_dataset
from fastfpl.errors import Damaged, FastfplError, InputError
from fastfpl.federation.checkpoint import CHECKPOINT, _checksum
from fastfpl.federation.lock import LOCK
from fastfpl.files import own_folder, read_file, write_json, write_new, write_whole
from tests.warm import warm_python
from tests.worlds import GATE, TINY_RUN, figures, small_clip

ROOT = Path(__file__).parent.parent
RUN = {**TINY_RUN, "clients": 3, "rounds": 2, "local_epochs": 1, "threads": 1, "options": GATE}
LONG_AGO = time.time() - 30 * 24 * 3600


@pytest.fixture(scope="module", autouse=True)
def one_thread_one_digits():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = load_dataset("digits")
    patch = pytest.MonkeyPatch()
    patch.setattr(fastfpl.federation.preparation, "load_dataset", lambda name, root, **more: digits)
    yield
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def play(clip, cache):
    def run(out, **changes):
        return fastfpl.run(
            "pfedmoap", **{"out": out, "model": clip, "cache": cache, **RUN, **changes}
        )

    return run


@pytest.fixture(scope="module")
def wanted(play, tmp_path_factory):
    return figures(play(tmp_path_factory.mktemp("whole") / "run"))


def picture(folder):
    """Every name below a folder, with what it is: bytes, a link's target, a folder, a pipe."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = "link", os.readlink(path)
        elif path.is_file():
            found[name] = "file", path.read_bytes(), path.stat().st_mtime_ns
        else:
            found[name] = "folder" if path.is_dir() else "pipe"
    return found


def sow(folder, names, target):
    """Lay foreign files, and a link, to a file elsewhere, for each name that begins with @."""
    for number, name in enumerate(names):
        path = folder / name.removeprefix("@")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("@"):
            path.symlink_to(target)
        else:
            path.write_bytes(b"mine %d" % number)
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)


IN_OUT = (
    "clients/my-lora.safetensors",
    "clients/00000-00000.safetensors",
    "clients/00001-00001.safetensors",
    "@clients/00002-00000.safetensors",
    "downloads/00000.safetensors",
    "downloads/notes.txt",
    "checkpoint-best.safetensors",
    "checkpoint-00001.safetensors",
    "@checkpoint-00002.safetensors",
    ".download.part",
    ".checkpoint.json.1.part",
    "@.result.json.1-01234567.part",
    ".uploads-01234567/data",
    "notes.md",
)


def test_foreign_files_in_out_stay_as_they_are(play, wanted, tmp_path):
    out, target = tmp_path / "o", tmp_path / "target"
    target.write_bytes(b"precious")
    sow(out, IN_OUT, target)
    before = picture(out)
    with pytest.raises(KeyboardInterrupt):
        play(out, on_round=lambda label, row: (_ for _ in ()).throw(KeyboardInterrupt))
    assert figures(play(out, resume=True)) == wanted
    after = picture(out)
    assert {name: after.get(name) for name in before} == before
    assert target.read_bytes() == b"precious"
    assert (CHECKPOINT in after, "result.json" in after, LOCK in after) == (True, True, False)
    # and what the run itself left behind is what it needs
    assert len(after) - len(before) == 3 + 1 + 3 + 1


IN_CACHE = (
    ".download.part",
    ".mine.journal",
    ".pooled-89.part",
    "@.pooled-00112233445566778899aabbccddeeff.part",
    "@.pooled-00112233445566778899aabbccddeeff.journal",
    ".pooled-xyz-1-01234567.part",
    "features.safetensors",
)


def test_foreign_files_in_the_cache_stay_as_they_are(play, wanted, cache, tmp_path):
    folder, target = tmp_path / "cache", tmp_path / "target"
    target.write_bytes(b"precious")
    folder.mkdir()
    sow(folder, IN_CACHE, target)
    # a link where the run's own parts will be
    for path in cache.glob("*.safetensors"):
        (folder / f".{path.stem}.part").symlink_to(target)
        (folder / f".{path.stem}.journal").symlink_to(target)
    before = picture(folder)
    assert figures(play(None, cache=folder)) == wanted
    after = picture(folder)
    assert {name: after.get(name) for name in before} == before
    assert target.read_bytes() == b"precious"
    assert set(after) - set(before) == {p.name for p in cache.glob("*.safetensors")}


@pytest.mark.parametrize("what", ["link", "dangling", "foreign", "folder", "pipe"])
def test_a_lock_that_is_not_ours_is_refused_untouched(what, play, tmp_path):
    out, target = tmp_path / "o", tmp_path / "target"
    target.write_bytes(b"precious")
    out.mkdir()
    {
        "link": lambda path: path.symlink_to(target),
        "dangling": lambda path: path.symlink_to(tmp_path / "nothing"),
        "foreign": lambda path: path.write_bytes(b"1234\n"),
        "folder": lambda path: path.mkdir(),
        "pipe": lambda path: os.mkfifo(path),
    }[what](out / LOCK)
    before = picture(tmp_path)
    with pytest.raises(InputError, match=r"out must have no \.lock but a run's; got a link or"):
        play(out)
    assert picture(tmp_path) == before


@pytest.mark.parametrize("name", ["clients", "downloads"])
def test_a_link_to_a_folder_is_refused_untouched(name, play, tmp_path):
    out, target = tmp_path / "o", tmp_path / "target"
    sow(target, ["00000-00000.safetensors", "x"], None)
    out.mkdir()
    (out / name).symlink_to(target)
    before = picture(tmp_path)
    with pytest.raises(InputError, match=r"must be writable and have room; got NotADirectoryError"):
        play(out)
    assert picture(tmp_path) == before


@pytest.mark.parametrize("name", [CHECKPOINT, "result.json"])
def test_a_link_in_a_result_s_place_is_a_run(name, play, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="out must not hold a run already"):
        play(tmp_path / "o")
    assert (tmp_path / "o" / name).is_symlink()


# --- checkpoints that are none --------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "pipe", "link"])
def test_a_checkpoint_that_is_no_file_is_refused_at_once(what, play, tmp_path):
    path = tmp_path / CHECKPOINT
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path) if what == "pipe" else path.mkdir()
    begin = time.monotonic()
    with pytest.raises(Damaged, match=r"checkpoint\.json must be a whole checkpoint; got"):
        play(tmp_path, resume=True)
    assert time.monotonic() - begin < 60
    assert not (tmp_path / LOCK).exists()


def volume_of(head):
    return next(iter(head["downloads"]["clients"].values()))


FORGED = {
    "rounds is no list": lambda h: h.update(rounds=7),
    "no rounds": lambda h: h.update(rounds=[], rounds_done=0),
    "rounds of another number": lambda h: h.update(rounds_done=5),
    "a row without fields": lambda h: h["rounds"].__setitem__(0, {}),
    "an accuracy of 7": lambda h: h["rounds"][0].update(accuracy=7.0),
    "a row twice": lambda h: h["rounds"].__setitem__(1, h["rounds"][0]),
    "an exam without figures": lambda h: h["rounds"][0]["exams"].update(own={}),
    "clients is a list": lambda h: h.update(clients=[]),
    "a client by name": lambda h: h["clients"].update(x=h["clients"]["0"]),
    "a client too many": lambda h: h["clients"].update({"9": h["clients"]["0"]}),
    "a version below 0": lambda h: h["clients"]["0"].update(version=-1),
    "a version with a path": lambda h: h["clients"]["0"].update(version="../../x"),
    "names is a number": lambda h: h["clients"]["0"].update(names=3),
    "no checksum of a client": lambda h: h["clients"]["0"].pop("blake2b"),
    "tensors elsewhere": lambda h: h.update(tensors="../checkpoint-00002.safetensors"),
    "facts is a text": lambda h: h.update(facts="lr"),
    "faces is a list": lambda h: h.update(faces=[1]),
    "a huge integer": lambda h: h["rounds"][0].update(bytes_up=10**4000),
    "another field": lambda h: h.update(more=1),
    "a volume that is not there": lambda h: volume_of(h).update(volume=77),
    "a piece that is not there": lambda h: volume_of(h)["tensors"]["ctx"].update(pieces=[77]),
    "another shape": lambda h: volume_of(h)["tensors"]["ctx"].update(shape=[1, 1]),
    "a dtype of nothing": lambda h: volume_of(h)["tensors"]["ctx"].update(dtype="os"),
    "no library": lambda h: h.pop("library"),
}


@pytest.fixture(scope="module")
def halted(play, tmp_path_factory):
    """Give a folder with two of two rounds."""
    folder = tmp_path_factory.mktemp("halted") / "run"
    play(folder)
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def resume(halted, play, tmp_path):
    """Resume a copy of a run after a change; give what is there before and after."""

    def run(change=None, text=None):
        copy = tmp_path / "copy"
        shutil.copytree(halted, copy, dirs_exist_ok=True)
        path = copy / CHECKPOINT
        if text is not None:
            path.write_bytes(text)
        else:
            head = json.loads(path.read_text())
            head.pop("checksum")
            change(head)
            path.write_text(json.dumps({**head, "checksum": _checksum(head)}))
        before = picture(copy)
        try:
            return play(copy, resume=True)
        finally:
            assert picture(copy) == before

    return run


def test_forged_checkpoints_are_refused(resume):
    limit = sys.get_int_max_str_digits()
    for name, change in FORGED.items():
        with pytest.raises(Damaged) as caught:
            resume(change)
        assert "nothing was changed, start again with another out" in str(caught.value), name
    assert sys.get_int_max_str_digits() == limit


@pytest.mark.parametrize(
    "text",
    [b"[" * 200_000, b'{"format": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000, b"7", b"null"],
    ids=["deep list", "5000 digits", "deep object", "a number", "nothing"],
)
def test_json_that_no_parser_likes_is_refused(text, resume):
    with pytest.raises(Damaged, match=r"checkpoint\.json must be a whole checkpoint; got "):
        resume(text=text)


def test_another_version_of_the_library_is_refused(resume):
    sentence = r"by the version that began it; got .* of fastfpl 0\.0\.9, this is"
    with pytest.raises(InputError, match=sentence):
        resume(lambda head: head.update(library="0.0.9"))
    sentence = "got format 'old' of fastfpl '0.0.9', which reads it, where 'fastfpl-checkpoint-"
    with pytest.raises(Damaged, match=sentence):
        resume(lambda head: head.update(library="0.0.9", format="old"))


def test_another_server_is_refused(halted, play, tmp_path):
    import hashlib

    shutil.copytree(halted, tmp_path / "copy")
    path = tmp_path / "copy" / CHECKPOINT
    for change in (
        {"server.ctx": torch.zeros(5, 32)},
        {"server.ctx": torch.zeros(4, 32).half()},
        {"server.other": torch.zeros(1)},
        {"x": torch.zeros(1)},
    ):
        head = json.loads((halted / CHECKPOINT).read_text())
        head.pop("checksum")
        content = save({**load((halted / head["tensors"]).read_bytes()), **change})
        (tmp_path / "copy" / head["tensors"]).write_bytes(content)
        head["blake2b"] = hashlib.blake2b(content).hexdigest()
        path.write_text(json.dumps({**head, "checksum": _checksum(head)}))
        with pytest.raises(Damaged, match="start again with another out"):
            play(tmp_path / "copy", resume=True)


# --- disks that are full, read-only or fail -------------------------------------------------------

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def failing(monkeypatch, number, at, below):
    """Let the at-th write, flush or rename below a folder fail, and all that come after it."""
    count = [0]
    write, fsync, replace, write_bytes = os.write, os.fsync, os.replace, Path.write_bytes

    def step(path):
        if str(path).startswith(str(below)):
            count[0] += 1
            if count[0] >= at:
                raise OSError(number, os.strerror(number), str(path))

    def path_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "write", lambda fd, data: (step(path_of(fd)), write(fd, data))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (step(path_of(fd)), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (step(b), replace(a, b))[1])
    monkeypatch.setattr(Path, "write_bytes", lambda p, d: (step(p), write_bytes(p, d))[1])
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at files as Linux does")
def test_every_write_of_a_run_may_fail(play, wanted, tmp_path, monkeypatch):
    """From the first to the last: a sentence each time, and the run can be resumed."""
    with monkeypatch.context() as patch:
        count = failing(patch, errno.ENOSPC, 10**9, tmp_path / "count")
        play(tmp_path / "count")
        total = count[0]
    assert total > 30
    told = set()
    for k, at in enumerate(range(2, total + 1, 4)):
        out = tmp_path / f"o{at}"
        number = NUMBERS[k % len(NUMBERS)]
        with monkeypatch.context() as patch:
            failing(patch, number, at, out)
            with pytest.raises(InputError) as caught:
                play(out)
        sentence = str(caught.value)
        assert f"must be writable and have room; got OSError: {os.strerror(number)} at" in sentence
        assert str(out) in sentence
        told.add(sentence.split(" must ")[0])
        left = set() if not out.exists() else {p.name for p in out.iterdir()}
        assert not [name for name in left if name.endswith(".part") or "uploads" in name]
        assert "result.json" not in left
        if at % 12 == 2:
            assert figures(play(out, resume=True)) == wanted
            assert LOCK not in {p.name for p in out.iterdir()}
    assert len(told) >= 3


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 256 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_full_disk_under_out(play, wanted, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 220_000)
    with pytest.raises(InputError, match=r"No space left on device at .*disk/.*; free some room"):
        play(small_disk / "o")
    assert not list(small_disk.glob("**/*.part"))
    ballast.unlink()
    assert figures(play(small_disk / "o", resume=True)) == wanted


def test_a_read_only_disk_under_out(play, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"folder that can be written to; got .*Read-only file"):
        play(small_disk / "o")


def test_a_full_folder_for_temporary_files_is_not_blamed_on_out(
    play, wanted, small_disk, tmp_path, monkeypatch
):
    (small_disk / "ballast").write_bytes(b"x" * 250_000)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    monkeypatch.setattr(files, "_mine", None)
    # a run with a folder needs none
    assert figures(play(tmp_path / "o")) == wanted
    with pytest.raises(InputError, match=r"at .*disk.*; free some room there; or set TMPDIR to"):
        play(None)


def test_a_report_s_file_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    before = picture(tmp_path)
    for number in NUMBERS:
        for at in (1, 2):
            with monkeypatch.context() as patch:
                failing(patch, number, at, tmp_path)
                with pytest.raises(FastfplError, match=rf"{os.strerror(number)} at .*x\.json; "):
                    write_json(path, {"a": 2})
            assert picture(tmp_path) == before


# --- what is below it all -------------------------------------------------------------------------


def test_new_files_take_no_place(tmp_path):
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("target", "link", "dangling"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, b"x")
    with pytest.raises(OSError, match="Too many levels"):
        read_file(tmp_path / "link")
    (tmp_path / "folder").mkdir()
    (tmp_path / "door").symlink_to(tmp_path / "folder")
    with pytest.raises(NotADirectoryError):
        own_folder(tmp_path / "door")
    own_folder(tmp_path / "folder")
    # a link's name gets a file of its own; its target is not written to
    write_whole(tmp_path / "link", lambda part: part.write_bytes(b"new"))
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert not (tmp_path / "link").is_symlink()


# --- killed ---------------------------------------------------------------------------------------

# one process loads the library; each of its children dies in the second round's evaluation
KILLED = """
import json, os, signal, sys, tempfile
import torch
torch.set_num_threads(1)
import fastfpl
from tests.worlds import small_clip

outs, cache, settings, tempfile.tempdir = json.loads(sys.argv[1])
clip = small_clip()

def observer(what, done, total):
    if what.startswith("round 2 of 2, evaluating"):
        os.kill(os.getpid(), signal.SIGKILL)

for out in outs:
    child = os.fork()
    if child == 0:
        more = {"out": out, "resume": True} if out else {}
        fastfpl.run("pfedmoap", cache=cache, model=clip, observer=observer, **more, **settings)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def killed(outs, cache, temporary):
    job = json.dumps([[out and str(out) for out in outs], str(cache), RUN, str(temporary)])
    python(KILLED, job)


def python(code, job):
    done = subprocess.run(
        [*warm_python(), "-c", code, job],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_what_a_kill_leaves_behind_goes_at_the_next_start(
    play, wanted, cache, tmp_path, monkeypatch
):
    temporary, out = tmp_path / "tmp", tmp_path / "o"
    temporary.mkdir()
    # folders that only look like ours
    sow(temporary, ["fastfpl-mine/data", "fastfpl-other/.lock"], None)
    before = picture(temporary)
    killed([out, out, None], cache, temporary)
    assert (out / LOCK).exists()
    assert (out / "downloads" / "00001.safetensors").exists()
    # a run with a folder leaves nothing elsewhere, one without its folder
    assert {name: picture(temporary)[name] for name in before} == before
    assert len(list(temporary.iterdir())) == 3
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(files, "_mine", None)
    assert figures(play(out, resume=True)) == wanted
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert len(list((out / "downloads").iterdir())) == 1
    assert figures(play(None)) == wanted
    mine = files._mine[1]
    assert {name: picture(temporary)[name] for name in before} == before
    assert {p.name for p in temporary.iterdir()} == {"fastfpl-mine", "fastfpl-other", mine.name}


KILLED_AT_FILES = """
import json, os, shutil, signal, sys
import torch
torch.set_num_threads(1)
import fastfpl
import fastfpl.federation.preparation as preparation
from fastfpl.data import load_dataset
from tests.kills import killed_at
from tests.worlds import figures, small_clip

base, cache, settings, step = json.loads(sys.argv[1])
digits, clip = load_dataset("digits"), small_clip()
preparation.load_dataset = lambda name, root, **more: digits


def play(out, at=0):
    def run(count):
        more = {"cache": cache, "model": clip, "out": out, "resume": True}
        found = figures(fastfpl.run("pfedmoap", **more, **settings))
        with open(out + ".json", "w") as file:
            json.dump([repr(found), count(), sorted(os.listdir(out))], file)
    return killed_at(out, at, run)


def told(out):
    with open(out + ".json") as file:
        return json.load(file)


assert play(base + "/whole") == 0
wanted, total, names = told(base + "/whole")
for at in range(1, total + 1, step):
    out = f"{base}/o{at}"
    assert play(out, at) == signal.SIGKILL, at
    assert play(out) == 0, at
    found, _, left = told(out)
    assert found == wanted, at
    assert left == names, (at, left, names)
    shutil.rmtree(out)
print(total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at files as Linux does")
def test_killed_before_any_change_of_a_file_a_run_goes_on(cache, play, wanted, tmp_path):
    """Every seventh here, FASTFPL_KILLS=1 for all: the figures, and no file is left over."""
    step = int(os.environ.get("FASTFPL_KILLS", "7"))
    total = python(KILLED_AT_FILES, json.dumps([str(tmp_path), str(cache), RUN, step]))
    assert int(total) > 60
