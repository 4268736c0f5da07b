"""A comparison in parts: commands for other machines, processes here, runs that others play."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastfpl.cli import grid
from fastfpl.cli.entry import group, main
from fastfpl.cli.flags import settings_of
from fastfpl.config import load_preset, preset_names
from fastfpl.errors import InputError
from fastfpl.federation import Result
from fastfpl.federation.comparison import listed
from tests.command import call
from tests.warm import warm_python

ROOT = Path(__file__).parent.parent
QUICK = [
    *("--dataset=digits", "--clients=3", "--shots=2", "--rounds=2", "--local-epochs=1"),
    *("--n-ctx=4", "--threads=1"),
]


def read(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Read arguments as ``fastfpl run`` does: the settings, and what stands beside them."""
    name, *rest = arguments
    assert name == "run"
    context = group.commands["run"].make_context("run", list(rest))
    flags = dict(context.params)
    beside = {n: flags.pop(n) for n in ("preset", "config", "options", "out", "resume", "cache")}
    flags = {n: v for n, v in flags.items() if n != "track"}
    method = flags.pop("method")
    settings = settings_of(method, beside["preset"], beside["config"], beside["options"], flags)
    return settings, beside


@pytest.mark.parametrize(
    ("methods", "preset", "more"),
    [
        (["promptfl", "pfedmoap"], None, {"lr": 0.01, "shots": None, "ctx_init": "a photo of a"}),
        (["pfedmoap"], None, {"options": {"pfedmoap": {"experts": 3, "selection": "random"}}}),
        (["fedotp"], "pfedmoap-clip-sets", {"transductive": False, "clients": 3}),
        (["promptfl", "fedprox"], None, {"as_released": "all", "max_memory": "8GiB"}),
        (["fedtpg"], None, {"partition": "domain", "split_test": True}),
        (["zeroshot"], None, {"options": {"zeroshot": {"words": "a photo, of: 'a'"}}}),
        (["zeroshot"], None, {"options": {"zeroshot": {"words": "3"}}}),
    ],
)
def test_a_command_says_the_run_that_it_is(
    methods: list[str], preset: str | None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastfpl.federation.comparison._check", lambda *_: None)
    (jobs,) = listed(methods, preset=preset, out="runs/a b", seeds=[0, 7], **more).values()
    assert len(jobs) == 2 * len(methods)
    for job in jobs:
        arguments = grid.run_arguments(job, preset, Path("cache"), None)
        settings, beside = read(shlex.split(shlex.join(arguments)))
        assert settings == job.settings
        assert beside["out"] == job.folder
        assert beside["resume"] is True
        assert beside["cache"] == Path("cache")
        assert beside["preset"] == preset
        moved, _ = read(grid.run_arguments(job, preset, None, "cuda:1"))
        assert moved == job.settings.model_copy(update={"device": "cuda:1"})


def test_every_preset_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfpl.federation.comparison._check", lambda *_: None)
    for preset in preset_names():
        given = load_preset(preset).settings
        open_ = {"target": "any"} if given.get("scenario") == "leave-one-domain-out" else {}
        (jobs,) = listed(["promptfl", "pfedmoap"], preset=preset, out="x", **open_).values()
        for job in jobs:
            assert read(grid.run_arguments(job, preset, None, None))[0] == job.settings


def test_what_no_flag_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfpl.federation.comparison._check", lambda *_: None)
    name = next(p for p in preset_names() if load_preset(p).settings.get("n_ctx"))
    (jobs,) = listed(["promptfl"], preset=name, out="x", n_ctx=None).values()
    with pytest.raises(InputError, match="n_ctx must be what a flag can say; got none where"):
        grid.run_arguments(jobs[0], name, None, None)


@pytest.mark.slow
def test_a_plan_is_one_command_a_run_and_the_report_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = [*QUICK, "--out=grid", "--cache=cache"]
    code, out, err = call(
        capsys,
        "compare",
        "zeroshot",
        "promptfl",
        "--seeds=0,1",
        *where,
        "--plan=jobs.txt",
        "--devices=cpu",
    )
    assert (code, err) == (0, "")
    assert out == "jobs.txt: 4 runs; then: fastfpl report grid\n"
    lines = Path("jobs.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["fastfpl", "run", name] for name in ("zeroshot", "zeroshot", "promptfl", "promptfl")
    ]
    assert all("--device=cpu" in line and line.endswith("--resume") for line in lines)
    for line in (lines[0], lines[3]):
        assert call(capsys, *shlex.split(line)[1:])[0] == 0
    code, out, err = call(capsys, "report", "grid")
    assert code == 0
    assert "zeroshot" in out
    assert err.splitlines() == [
        "missing: zeroshot seed 1: not begun",
        "missing: promptfl seed 0: not begun",
    ]
    # the rest here, by a process; what is there is not played again
    there = {p: p.stat().st_mtime_ns for p in Path("grid").glob("*/result.json")}
    again = ["compare", "zeroshot", "promptfl", "--seeds=0,1", *where, "--jobs=2", "--devices=cpu"]
    code, out, err = call(capsys, *again, "--resume")
    assert code == 0, err
    assert "promptfl-seed0: promptfl  round 2" in err
    assert "promptfl-seed1" not in err
    assert "grid/index.html" in out
    assert len(list(Path("grid").glob("*/result.json"))) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())
    settings = Result.load(Path("grid/promptfl-seed0")).settings
    assert (settings["seed"], settings["device"]) == (0, "cpu")


HOLDER = """
import sys
from pathlib import Path
from fastfpl.federation.lock import alone_in

with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_another_machine_plays_is_left_to_it_and_a_failure_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One run is held by another process, one cannot be played; that is all of the grid."""
    out = tmp_path / "grid"
    arguments = ["compare", "zeroshot", "promptfl", *QUICK, f"--out={out}", "--jobs=1"]
    arguments += [f"--cache={tmp_path / 'cache'}", "--resume"]
    (out / "promptfl-seed0").mkdir(parents=True)
    (out / "promptfl-seed0" / "checkpoint.json").write_text("{}", encoding="utf-8")
    command = [*warm_python(), "-c", HOLDER, str(out / "zeroshot-seed0")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, said, err = call(capsys, *arguments)
        holder.communicate()
    assert (code, said) == (2, "")
    lines = err.splitlines()
    assert "zeroshot-seed0: played elsewhere" in lines
    (why,) = [line for line in lines if line.startswith("promptfl-seed0: fastfpl.run: ")]
    assert "checkpoint.json must be a whole checkpoint" in why
    assert lines[-1] == (
        "error: fastfpl compare: every run must end; got 1 of 2 that failed: promptfl-seed0; go on "
        "with the same command and --resume"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--devices=cpu,cpu --jobs=1", "devices must be one or more separated by commas, each"),
        ("--devices=cpu, --plan=x", "devices must be one or more separated by commas, each once"),
        ("--jobs=2 --plan=x", "jobs must be left out with plan, which plays nothing"),
        ("--jobs=0", "jobs must be at least 1; got 0"),
        (
            "--jobs=3 --devices=cuda:0,cuda:1",
            "jobs must be at most one a device; got 3 with cuda:0",
        ),
        ("--jobs=1 --devices=cpu --device=cpu", "device must be left out with devices; got 'cpu'"),
    ],
)
def test_grids_without_a_meaning_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str, sentence: str
) -> None:
    where = [*QUICK, f"--out={tmp_path / 'grid'}", f"--cache={tmp_path / 'cache'}"]
    code, out, err = call(capsys, "compare", "zeroshot", *where, *flags.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: fastfpl compare: {sentence}")


def test_a_sweep_is_planned_value_by_value(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, plan = tmp_path / "grid", tmp_path / "plan.txt"
    code, _, err = call(
        capsys,
        "compare",
        "promptfl",
        "--sweep=lr=0.1,0.2",
        *QUICK,
        f"--out={out}",
        f"--plan={plan}",
    )
    assert (code, err) == (0, "")
    lines = [shlex.split(line) for line in plan.read_text(encoding="utf-8").splitlines()]
    assert [next(a for a in line if a.startswith("--lr")) for line in lines] == [
        *("--lr=0.1", "--lr=0.2"),
    ]
    assert [line[-2] for line in lines] == [
        f"--out={out}/lr={value}/promptfl-seed0" for value in (0.1, 0.2)
    ]
    assert all((out / f"lr={value}" / "comparison.json").is_file() for value in (0.1, 0.2))


def test_a_sweep_of_parts_is_reported_as_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid"

    def here(jobs: Any, preset: str | None, cache: Path, count: int, devices: Any) -> Any:
        """Play in this process, which saves two starts."""
        for job in jobs:
            main(grid.run_arguments(job, preset, cache, devices[0]))
        return {}

    monkeypatch.setattr(grid, "play_here", here)
    where = [*QUICK, f"--out={out}", f"--cache={tmp_path / 'cache'}", "--jobs=2", "--devices=cpu"]
    arguments = ["compare", "zeroshot", "--sweep=beta=0.1,0.2", "--partition=dirichlet", *where]
    code, said, err = call(capsys, *arguments)
    assert code == 0, err
    assert all((out / f"beta={b}" / "zeroshot-seed0" / "result.json").is_file() for b in (0.1, 0.2))
    assert str(out) in said
    assert (out / "sweep.json").is_file()
