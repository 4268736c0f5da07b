"""One run over several ranks: equal to one process, refused where ranks differ, resumable after."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastfpl
from fastfpl.data import load_dataset
from fastfpl.errors import InputError
from fastfpl.federation import ranks as ranks_module
from fastfpl.federation.checkpoint import read_checkpoint
from fastfpl.federation.ranked import changed, patched
from fastfpl.federation.ranks import elsewhere, parts, ranks_asked
from fastfpl.methods import METHODS
from fastfpl.training.preparation import choose_device
from tests.warm import warm_python
from tests.worlds import GATE, TINY_RUN, figures, small_clip

ROOT = Path(__file__).parent.parent
SMALL = {**TINY_RUN, "clients": 5, "cohort": 1, "threads": 1, "local_epochs": 1}
# whoever encodes stores every kind of features
SMALL["also"] = ["raw", "patches"]
# every method, and what else is played another way over ranks
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS if name != "pfedmoap"},
    "pfedmoap": {"method": "pfedmoap", "options": GATE, "rounds": 3},
    "some": {"method": "pfedmoap", "options": GATE, "rounds": 3, "participation": 0.4},
    "lost": {"method": "prompt-fedamp", "dropout": 0.5, "rounds": 3},
    "now and then": {"method": "fedotp", "evaluate_every": 2, "rounds": 3},
    "in turn": {"method": "pfedmoap", "options": GATE, "as_released": ["shared-optimiser"]},
    "relayed": {
        "method": "pfedmoap",
        "options": GATE,
        "as_released": ["pfedmoap-pool-in-round"],
    },
    "late": {"method": "fedpgp", "scenario": "unseen-clients", "unseen": 0.4},
    "robust": {"method": "promptfl", "merge": "krum", "krum_malicious": 1, "clip_update": 0.01},
    "asked": {"method": "prompt-fedper", "evaluate_clients": 2},
    "novel": {"method": "promptfl", "scenario": "base-to-novel"},
    "views": {"method": "promptfl", "augment": "views:2"},
    "fresh": {"method": "promptfl", "augment": "fresh"},
}
RUNS["fedapt-unsupervised"] |= {"augment": "views:1"}
SETTINGS = {name: {**SMALL, **more} for name, more in RUNS.items()}
MEMORY = {**SMALL, "method": "pfedmoap", "options": GATE, "cohort": None, "max_memory": "16GiB"}
WHOLE = {**SMALL, "method": "pfedmoap", "options": GATE, "rounds": 3}
LOOSE = {"together": {**SMALL, "method": "promptfl", "cohort": None}, "memory": MEMORY}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def places(size: int, port: int | None = None) -> list[dict[str, str]]:
    """Give the environment of each rank, as torchrun does."""
    port = port or free_port()
    return [
        {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        }
        for rank in range(size)
    ]


def spawn(here: Path, jobs: list[dict[str, Any]], size: int) -> list[dict[str, dict[str, Any]]]:
    """Let ranks play jobs; return what each said, by job."""
    (here / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [*warm_python(), "-m", "tests.rank_play", str(here)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for env in places(size)
    ]
    errors = [one.communicate(timeout=110)[1] for one in running]
    assert running[0].returncode == 0, errors[0]
    return [
        {
            told["name"]: told
            for told in map(
                json.loads, (here / f"said-{rank}.jsonl").read_text(encoding="utf-8").splitlines()
            )
        }
        for rank in range(size)
    ]


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what says of each round who did it."""
    return [{k: v for k, v in row.items() if k != "ranks"} for row in rows]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """Give figures and folder of runs in this process, by name, each played once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    here, known, clip = tmp_path_factory.mktemp("alone"), {}, small_clip()
    digits = load_dataset("digits")
    patch = pytest.MonkeyPatch()
    load = fastfpl.federation.preparation.load_dataset
    patch.setattr(
        fastfpl.federation.preparation,
        "load_dataset",
        lambda name, *args, **more: digits if name == "digits" else load(name, *args, **more),
    )

    def run(name):
        if name not in known:
            settings = {**SETTINGS, **LOOSE, "whole": WHOLE}[name]
            result = fastfpl.run(**settings, out=here / name, cache=cache, model=clip)
            known[name] = figures(result), here / name
        return known[name]

    yield run
    patch.undo()
    torch.set_num_threads(before)


# -- equal to one process -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def played(request, cache, tmp_path_factory):
    """Let every run be played by so many ranks, started once; their features are encoded anew."""
    here = tmp_path_factory.mktemp("played")
    size = request.param
    # with three, those that part clients in another way
    chosen = {**SETTINGS, **LOOSE}
    more: list[dict[str, Any]] = []
    if size == 3:
        # what one process began; here, so that no more processes are started
        begun = {**WHOLE, "rounds": 1}
        fastfpl.run(**begun, out=here / "begun", cache=cache, model=small_clip())
        more = [
            {"name": f"begun {n}", "run": {**WHOLE, "rounds": n, "out": "begun", "resume": True}}
            for n in (2, 3)
        ]
        for job in more:
            job["run"]["cache"] = "cache"
        chosen = {n: chosen[n] for n in ("pfedmoap", "some", "late", "fedapt-unsupervised")}
    jobs = [
        {"name": name, "run": {**how, "out": name, "cache": "cache"}}
        for name, how in chosen.items()
    ]
    return here, size, spawn(here, [*jobs, *more], size)


@pytest.mark.slow
def test_ranks_give_the_figures_of_one_process_bit_for_bit(played, alone, cache):
    """One start for all methods: two or three processes import the library in seconds."""
    here, size, said = played
    for name in SETTINGS:
        if name not in said[0]:
            continue
        told = said[0][name]
        assert "error" not in told, (name, told)
        rows, folder = alone(name)
        assert bare(told["figures"]) == json.loads(json.dumps(rows)), name
        assert told["environment"]["ranks"] == size
        one, other = (read_checkpoint(where) for where in (folder, here / name))
        for state in ("server", "handed"):
            mine, theirs = getattr(one, state), getattr(other, state)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[n], theirs[n]) for n in mine), (name, state)
        for states in ("clients", "downloads", "tuned"):
            mine, theirs = getattr(one, states), getattr(other, states)
            assert sorted(mine) == sorted(theirs), (name, states)
            for client in mine:
                assert dict(mine[client]).keys() == dict(theirs[client]).keys()
                for key, tensor in dict(mine[client]).items():
                    assert torch.equal(tensor, theirs[client][key]), (name, states, client, key)
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            p.name for p in (here / name).iterdir()
        )
        for row in said[0][name]["ranks"]:
            if row is not None and name not in ("in turn", "relayed"):
                assert sum(count > 0 for count in row["images"]) > 1 or name == "some"


@pytest.mark.slow
def test_every_rank_has_the_result(played):
    _, _, said = played
    for name, told in said[0].items():
        assert all(other[name]["figures"] == told["figures"] for other in said[1:]), name


@pytest.mark.slow
def test_ranks_encode_the_file_of_one_process(played, alone, cache):
    here, _, said = played
    for name in {**SETTINGS, **LOOSE}:
        if name in said[0]:
            alone(name)
    names = sorted(path.name for path in (here / "cache").iterdir())
    assert names
    for name in names:
        assert (here / "cache" / name).read_bytes() == (cache / name).read_bytes()


@pytest.mark.slow
def test_cohorts_of_ranks_are_equal_to_rounding(played, alone):
    _, size, said = played
    for name in LOOSE if size == 2 else ():
        rows, _ = alone(name)
        for row, mine in zip(rows[:-1], said[0][name]["figures"], strict=False):
            np.testing.assert_allclose(mine["loss"], row["loss"], rtol=1e-4)
            np.testing.assert_allclose(mine["accuracy"], row["accuracy"], atol=0.01)
            assert mine["bytes_up"] == row["bytes_up"]
            assert mine["bytes_down"] == row["bytes_down"]


# -- refused, and resumable -----------------------------------------------------------------------

_RUN = {**WHOLE, "cache": "cache"}
FAILURES: list[dict[str, Any]] = [
    {"name": "settings", "only": {"lr": 0.1}},
    {"name": "options", "only": {"options": {**GATE, "experts": 2}}},
    {"name": "weights", "only": {"other": True}},
    {"name": "data", "spoil": "data"},
    {"name": "version", "spoil": "version"},
    {"name": "folder", "only": {"out": "elsewhere"}},
    {"name": "cache", "run": {"cache": "new"}, "only": {"cache": "other"}},
    {"name": "diverges", "spoil": "diverges"},
    {"name": "bug", "spoil": "bug"},
    {"name": "sleeps", "spoil": "sleeps", "timeout": 1},
    {"name": "dies", "spoil": "dies"},
]
SENTENCES = {
    "settings": r"every rank must have the same settings; got [0-9a-f]{16} of rank 0 and "
    r"[0-9a-f]{16} of rank 1: lr 0\.05 and 0\.1$",
    "options": "every rank must have the same settings; .*: options",
    "weights": r"every rank must have the same weights; got [0-9a-f]{16} of rank 0 and [0-9a-f]+",
    "data": r"every rank must have the same data; got [0-9a-f]{16} of rank 0 .* training images",
    "version": r"every rank must have the same versions; .* fastfpl '0\.1\.0' and '0\.0\.1'",
    "folder": "out must be a folder that all ranks share; got .*folder of rank 0, whose files are "
    "not in .*elsewhere of rank 1",
    "cache": r"cache \(--cache\) must be a folder that all ranks share; got .*other, where rank 1",
    "diverges": r"the loss must stay finite; got a test \(said by rank 1\)",
    "bug": r"ZeroDivisionError: a test \(said by rank 1\)",
    "sleeps": r"every rank must answer within 1 s \(FASTFPL_RANKS_TIMEOUT\); got nothing from rank "
    "1; .* --resume",
    "dies": "every rank must live as long as the run; got the end of rank 1; the rounds that ended "
    "are kept, go on with the same command and --resume, with any number of ranks",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    here = tmp_path_factory.mktemp("failed")
    jobs = [{**job, "run": {**_RUN, "out": job["name"], **job.get("run", {})}} for job in FAILURES]
    return here, spawn(here, jobs, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
def test_what_ranks_do_not_share_is_refused_in_a_sentence(failed, name):
    """One start for all: after a failure ranks meet anew."""
    import re

    _, said = failed
    _, sentence = said[0][name]["error"]
    assert sentence.startswith("fastfpl.run: ") or name == "bug"
    assert re.search(SENTENCES[name], sentence), sentence
    if name != "dies":
        assert "error" in said[1][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diverges", "bug", "sleeps", "dies"])
def test_a_round_that_a_rank_left_can_be_resumed(failed, alone, cache, name):
    here, _ = failed
    folder = here / name
    there = {p.name for p in folder.iterdir()}
    files = {"checkpoint.json", "checkpoint-00001.safetensors", "metrics.jsonl"}
    assert there == {*files, "clients", "downloads"}
    head = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    kept = {f"{int(c):05d}-{e['version']:05d}.safetensors" for c, e in head["clients"].items()}
    assert {p.name for p in (folder / "clients").iterdir()} == kept
    rows, _ = alone("whole")
    result = fastfpl.run(**WHOLE, out=folder, cache=cache, model=small_clip(), resume=True)
    assert bare(figures(result)) == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings", "weights", "data", "version", "folder"])
def test_what_is_refused_at_the_start_leaves_nothing(failed, name):
    here, _ = failed
    assert not (here / name).exists()


@pytest.mark.slow
def test_several_ranks_go_on_with_what_one_began(played, alone):
    _, size, said = played
    if size == 3:
        rows, _ = alone("whole")
        assert bare(said[0]["begun 3"]["figures"]) == json.loads(json.dumps(rows))


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_port_in_use_and_no_rank_0(tmp_path):
    """Rank 0 says a sentence; rank 1, which meets somebody else, gives up quietly."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "fastfpl", "run", "promptfl", "--out", str(tmp_path / "a")]
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**env, "FASTFPL_RANKS_TIMEOUT": "2"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for env in places(2, port)
        ]
        said = [one.communicate(timeout=60) for one in running]
    assert [one.returncode for one in running] == [2, 2]
    assert (
        said[0][1]
        .splitlines()[-1]
        .startswith(f"error: fastfpl.run: 2 ranks must find each other at 127.0.0.1:{port}; got ")
    )
    assert "the port is in use: name another one (--master-port, MASTER_PORT)" in said[0][1]
    assert said[0][0] == ""
    assert said[1][0] == ""
    assert "error" not in said[1][1]
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_torchrun_ends_with_a_sentence_when_a_rank_dies(tmp_path, cache):
    """The whole way, with torchrun: it ends rank 0, which says how to go on, and speaks alone."""
    settings = {**WHOLE, "rounds": 400}
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
        if name not in ("method", "options", "also")
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={free_port()}", "-m", "fastfpl", "run", "promptfl", *flags]
    command += [f"--out={tmp_path / 'run'}", f"--cache={cache}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stderr is not None
        lines = []
        for line in one.stderr:
            lines.append(line)
            if "round 2 " in line:
                kill_rank_1(one.pid)
        assert one.wait(timeout=60) == 1
        assert one.stdout is not None
        assert one.stdout.read() == ""
    rounds = [line for line in lines if line.startswith("promptfl  round")]
    assert len(rounds) == len(set(rounds))  # said once
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert "every rank must live as long as the run; got " in sentence
    assert "--resume, with any number of ranks" in sentence
    assert (tmp_path / "run" / "checkpoint.json").exists()


def kill_rank_1(parent: int) -> None:
    """Kill the one of torchrun's processes that is rank 1."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    for child in map(int, children):
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(child, 9)


# -- the pieces -----------------------------------------------------------------------------------


def test_parts_are_balanced_and_whole():
    draw = np.random.default_rng(0)
    weights = {int(c): int(w) for c, w in enumerate(draw.integers(1, 100, 57))}
    for size in (1, 2, 3, 8):
        found = parts(weights, size)
        assert sorted(c for part in found for c in part) == sorted(weights)
        assert all(part == sorted(part) for part in found)
        loads = [sum(weights[c] for c in part) for part in found]
        assert max(loads) - min(loads) <= max(weights.values())
    assert parts({3: 5}, 3) == [[3], [], []]
    assert [len(part) for part in parts(dict.fromkeys(range(6), 0), 3)] == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_what_has_changed_of_a_server_travels(dtype):
    pool = torch.arange(60).reshape(20, 3).to(dtype)
    before = {"pool": pool, "ctx": torch.ones(2, dtype=dtype), "same": torch.zeros(4, 4)}
    after = {**before, "pool": pool.clone(), "ctx": torch.zeros(2, dtype=dtype)}
    after["pool"][[3, 17]] += 1
    after["flag"] = torch.tensor(True)
    news = changed(before, after)
    assert set(news) == {"rows/pool", "new/pool", "whole/ctx", "whole/flag"}
    assert news["rows/pool"].tolist() == [3, 17]
    found = patched(before, news, torch.device("cpu"))
    assert found.keys() == after.keys()
    assert all(torch.equal(found[n], after[n]) for n in after)
    assert torch.equal(before["pool"], pool)


def test_the_sign_of_a_zero_travels():
    before, after = {"ctx": torch.zeros(3)}, {"ctx": -torch.zeros(3)}
    found = patched(before, changed(before, after), torch.device("cpu"))
    assert found["ctx"].signbit().all()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number; got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number; got 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be less than WORLD_SIZE; got RANK=2"),
    ],
)
def test_ranks_that_are_none_are_refused(monkeypatch, place, sentence):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        ranks_asked()


@pytest.mark.parametrize("text", ["0", "soon", "nan", "1e9"])
def test_a_wait_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("FASTFPL_RANKS_TIMEOUT", text)
    with pytest.raises(InputError, match="FASTFPL_RANKS_TIMEOUT must be seconds from 1 to"):
        ranks_module._patience()


def test_one_rank_is_one_process(monkeypatch):
    assert ranks_asked() == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks_asked() == 1
    assert not elsewhere()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert ranks_asked() == 3
    assert elsewhere()


def test_each_rank_takes_its_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device("cuda", 1) == torch.device("cuda:1")
    assert choose_device("auto", 0) == torch.device("cuda:0")
    assert choose_device("cuda:0", 1) == torch.device("cuda:0")
    assert choose_device("cpu", 1) == torch.device("cpu")
    rule = "device must be there for every rank; got 'cuda' for rank 2 of a machine with 2 CUDA"
    with pytest.raises(InputError, match=rule):
        choose_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="for rank 1 of a machine with 1 CUDA device;"):
        choose_device("auto", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # each sees its own alone
    assert choose_device("cuda", 1) == torch.device("cuda:0")


def test_other_commands_refuse_several_ranks(monkeypatch, capsys):
    from fastfpl.cli.entry import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["presets"])
    assert end.value.code == 2
    rule = "error: fastfpl presets: ranks must be one; got 2: run and compare can be started"
    assert capsys.readouterr().err.startswith(rule)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit):
        main(["presets"])
    assert capsys.readouterr() == ("", "")
