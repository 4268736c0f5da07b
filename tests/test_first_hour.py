"""The first hour on a card: its list is right, it stops at red, and it goes on where it stopped."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import first_gpu_hour
from bench.first_gpu_hour import ROOT, Hour, Place, spawned
from bench.first_steps import BENCHES, STEPS, Step
from fastfpl.errors import InputError
from fastfpl.report.machine import gpu_tests

CARD = Place("NVIDIA H200 (SXM)", 1, "2.14", "3.8", "3.11", "abc", "1")


def step(name, code="print('3 passed')", **rest):
    rest = {"proves": r"[1-9]\d* passed"} | rest
    return Step(name, f"what {name} is", f"where {name} is", ("-c", code), ("-c", code), **rest)


def hour(steps, out, where=CARD, **rest):
    played = []

    def run(argv, env, log, seconds):
        played.append(log.name.split(".")[0].split("-", 1)[1])
        return spawned(argv, env, log, seconds)

    return Hour(steps, out, where, run, **rest), played


def row_of(out, name):
    rows = json.loads((out / "summary.json").read_text())["steps"]
    return next(row for row in rows if row["name"] == name)


def test_every_file_with_a_gpu_test_is_in_the_list():
    named = {Path(word).name for one in STEPS for word in one.argv}
    assert set(gpu_tests()) - named == set()


@pytest.mark.skipif(sys.platform == "win32", reason="a rehearsal forks")
@pytest.mark.slow
def test_the_list_can_be_rehearsed(tmp_path):
    """Every path, option and name of a test in it is there: 10 s, for it is all of them."""
    asked = [sys.executable, "-m", "bench.first_gpu_hour", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = json.loads((tmp_path / "rehearsal" / "summary.json").read_text())
    assert [row["status"] for row in shown["steps"]] == ["green"] * len(STEPS)
    assert (tmp_path / "rehearsal" / "tables-rehearsed-no-card.md").exists()


def test_every_bench_is_in_the_list_but_the_one_that_knows_no_card():
    found = {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}
    assert found - {"glyphs"} == set(BENCHES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(tmp_path):
    done = CliRunner().invoke(first_gpu_hour.main, ["--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "torch must see a CUDA device; got none by torch" in done.output
    assert "--rehearse plays the list without a card" in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_step_that_is_not_there_is_refused(tmp_path):
    done = CliRunner().invoke(first_gpu_hour.main, ["--out", str(tmp_path), "--again", "doktor"])
    assert done.exit_code == 2
    assert "--again must name a step; got 'doktor'; steps are nvidia-smi, doctor," in done.output


def test_it_stops_at_the_first_red_and_says_where_to_look(tmp_path, capsys):
    steps = [step("one"), step("two", "print('ulp'); raise SystemExit(3)"), step("three")]
    this, played = hour(steps, tmp_path)
    assert not this.play()
    assert played == ["one", "two"]
    said = capsys.readouterr().out
    assert "ulp\n\ntwo is red: it ended with 3, not with 0" in said
    assert f"log: {tmp_path}/logs/02-two.log\nlook at: where two is" in said
    assert (tmp_path / "logs" / "02-two.log").read_text() == "ulp\n"
    row = row_of(tmp_path, "two")
    assert (row["status"], row["exit"], row["log"]) == ("red", 3, "logs/02-two.log")
    assert row["seconds"] >= 0
    page = (tmp_path / "summary.md").read_text()
    assert "| two | red |" in page
    assert "Not come to yet: three." in page


def test_it_goes_on_where_it_stopped(tmp_path):
    mark = tmp_path / "mended"
    code = f"import os, sys; sys.exit(print('1 passed') if os.path.exists({str(mark)!r}) else 1)"
    steps = [step("one"), step("two", code), step("three")]
    assert not hour(steps, tmp_path)[0].play()
    mark.touch()
    for again, expected in ((), ["two", "three"]), ((), []), (("one",), ["one"]):
        this, played = hour(steps, tmp_path)
        assert this.play(again)
        assert played == expected


@pytest.mark.parametrize("change", ["card", "torch", "triton", "commit", "sources", "python"])
def test_what_was_green_elsewhere_is_played_again(tmp_path, change):
    hour([step("one")], tmp_path)[0].play()
    this, played = hour([step("one")], tmp_path, replace(CARD, **{change: "other"}))
    assert this.play()
    assert played == ["one"]


def test_where_all_is_skipped_nothing_is_proven(tmp_path):
    assert not hour([step("one", "print('7 skipped')")], tmp_path)[0].play()
    assert "nothing was proven" in row_of(tmp_path, "one")["why"]


def test_a_step_has_a_limit_and_its_processes_end_with_it(tmp_path):
    mark = tmp_path / "late"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert not hour([step("one", code, minutes=0.3 / 60)], tmp_path)[0].play()
    assert time.monotonic() - begin < 1.4
    assert "longer than 0.005 minutes" in row_of(tmp_path, "one")["why"]
    time.sleep(max(0, begin + 1.8 - time.monotonic()))
    assert not mark.exists()


def test_when_the_time_is_up_a_step_is_unfinished_and_not_red(tmp_path, capsys):
    steps = [step("one", "import time; time.sleep(9)"), step("two")]
    assert not hour(steps, tmp_path, seconds=0.3)[0].play()
    assert row_of(tmp_path, "one")["status"] == "unfinished"
    assert not hour(steps[1:], tmp_path, seconds=0)[0].play()
    assert "two: the time is up; the same command goes on here" in capsys.readouterr().out


def test_what_a_step_makes_has_its_name_once_it_is_green(tmp_path):
    code = "import sys; open(sys.argv[1], 'w').write('x'); print('1 passed'); sys.exit({})"
    for status in (1, 0):
        one = step("one", code.format(status), makes="text-{card}.json")
        one = replace(one, argv=(*one.argv, "{made}"))
        assert hour([one], tmp_path)[0].play() == (status == 0)
        assert (tmp_path / "text-nvidia-h200-sxm.json").exists() == (status == 0)
    (tmp_path / "text-nvidia-h200-sxm.json").unlink()
    this, played = hour([one], tmp_path)
    assert this.play()
    assert played == ["one"], "its file was gone"


def test_a_tool_or_a_card_that_is_not_there_is_said(tmp_path):
    steps = [step("one", before=("no-such-tool",)), step("two", cards=2), step("three")]
    this, played = hour(steps, tmp_path)
    assert this.play()
    assert played == ["three"]
    assert row_of(tmp_path, "one")["why"].startswith("no-such-tool is neither in PATH nor in")
    assert row_of(tmp_path, "two")["why"] == "it needs 2 cards; this machine has 1"


def test_an_interrupted_step_is_noted(tmp_path):
    def run(argv, env, log, seconds):
        log.write_text("so far")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Hour([step("one")], tmp_path, CARD, run).play()
    assert row_of(tmp_path, "one")["status"] == "unfinished"
    assert (tmp_path / "logs" / "01-one.log").read_text() == "so far"


def test_a_summary_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(InputError, match="must be what an earlier hour wrote"):
        hour([step("one")], tmp_path)
    assert (tmp_path / "summary.json").read_text() == "[1]"


def test_a_change_that_nobody_committed_is_another_state(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("1")
    monkeypatch.setattr(first_gpu_hour, "ROOT", tmp_path)
    before = first_gpu_hour._sources()
    (tmp_path / "bench" / "a.py").write_text("2")
    assert first_gpu_hour._sources() != before


def test_tools_run_what_the_list_says(tmp_path, monkeypatch):
    """Scripts in place of the driver's tool and of the sanitizer say what they were given."""
    for tool in ("nvidia-smi", "compute-sanitizer"):
        script = tmp_path / tool
        script.write_text('#!/bin/sh\necho "given $*; $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    steps = [replace(one, proves="given") for one in STEPS if one.before]
    assert hour(steps, tmp_path / "out")[0].play()
    logs = [p.read_text() for p in sorted((tmp_path / "out" / "logs").iterdir())]
    python = f"{sys.executable} -m bench.small_cases --device cuda; 1\n"
    assert logs == [
        "given ; \n",
        f"given --tool memcheck --error-exitcode 1 {python}",
        f"given --tool racecheck --error-exitcode 1 {python}",
    ]
