"""The command line: exit codes, sentences, files, and what it prints."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import fastfpl.ops
from fastfpl.cli import main
from fastfpl.cli.compare import _swept
from fastfpl.cli.entry import group
from fastfpl.cli.flags import GROUPS, Grouped, settings_of
from fastfpl.config import (
    PROFILED,
    Settings,
    load_preset,
    load_yaml,
    make_settings,
    preset_names,
)
from fastfpl.errors import InputError, Missing
from fastfpl.federation import comparison, experiment, rounds
from fastfpl.federation import preparation as preparing
from fastfpl.methods import METHODS
from fastfpl.ops import all_faces, launch
from fastfpl.ops.faces import Face
from fastfpl.plain_yaml import parse_yaml
from fastfpl.report import machine
from fastfpl.tracking import bars
from fastfpl.training import preparation
from tests.warm import warm_python
from tests.worlds import on_few_digits

QUICK = (
    *("--dataset", "digits", "--clients", "2", "--rounds", "2", "--local-epochs", "1"),
    *("--shots", "2", "--n-ctx", "2", "--threads", "1"),
)


@pytest.fixture(scope="module", autouse=True)
def few_digits() -> Iterator[None]:
    """A real tower encodes all test images, and none of them is the point."""
    with on_few_digits():
        yield


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def assert_a_line_a_round(err: str, label: str, rounds: int) -> None:
    """A file of progress: one line a round, and nothing that moves a cursor."""
    lines = err.splitlines()
    assert len(lines) == rounds, err
    for number, line in enumerate(lines, 1):
        figure = r"accuracy \d+\.\d %"
        assert re.fullmatch(rf"{label}  round {number}  {figure}  \d+\.\d s", line), line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run pfedmop", "method must be a known one; got 'pfedmop'; did you mean 'pfedmoap'"),
        ("run promptfl --dataset glyfs", "did you mean 'glyphs'"),
        ("run promptfl --clip vit-b16", "did you mean 'ViT-B-16'?"),
        ("run promptfl --device gpu", "did you mean 'cuda'?"),
        ("run promptfl --quick-gelu no", "quick_gelu must be None or True for 'tiny'; got False"),
        ("run promptfl --clip tinny", "'tinny'"),
        ("run promptfl --preset nope", "preset must be a known one; got 'nope'"),
        ("run promptfl --beta .3", "beta must be left out with partition='pathological'"),
        ("run promptfl --split-test no", "split_test must be left out with partition="),
        ("run promptfl --repeat-rate 1", "repeat_rate is refused"),
        ("run promptfl --partition labeluni", "classes_per_client must be given"),
        ("run promptfl --n-ctx 4 --ctx-init a", "n_ctx must be left out with ctx_init"),
        ("run promptfl --n-ctx 75", "must fit into 77 tokens"),
        ("run promptfl --shots 0", "shots is refused: it must be at least 1, or 'all' for every"),
        ("run promptfl --threads 2147483648", "threads is refused: input should be less than or"),
        ("run promptfl --workers 1000000", "workers is refused: input should be less than or"),
        ("run promptfl --batch-size 1000000000000", "batch_size is refused: input should be less"),
        ("run promptfl --seed 9223372036854775808", "seed is refused: input should be at most"),
        ("run promptfl --lr 1e999", "lr is refused: input should be a finite number; got inf"),
        ("run promptfl --memory " + 5000 * "9", "max_memory must be bytes or a text such as"),
        ("run pfedmoap -o experts=[", "option experts must be YAML"),
        ("run pfedmoap -o experts=" + 5000 * "9", "numbers of at most 100 digits"),
        ("run pfedmoap -o experts=!!int", "option experts must hold no tags"),
        ("compare promptfl --sweep shots=1,[", "sweep of shots must be YAML"),
        ("compare promptfl --sweep as_released=[x]", "values must be numbers or texts"),
        ("run promptfl --augment views:0", "augment must be none, fresh or views:V"),
        ("run promptfl --crop .5", "crop must be left out with augment=none"),
        ("run promptfl --participation 0", "participation is refused"),
        ("run promptfl --lr inf", "lr is refused: input should be a finite number; got inf"),
        ("run promptfl --weight-decay nan", "weight_decay is refused: input should be a finite"),
        (
            "run fedprox -o mu=.inf",
            "fedprox's option mu is refused: Input should be a finite number",
        ),
        ("compare promptfl --lr=-inf", "lr is refused: input should be a finite number; got -inf"),
        ("run promptfl --clients 20 --dataset digits", "would be empty"),
        ("run promptfl --device tpu", "device must be auto, cpu or cuda; got 'tpu'"),
        ("run promptfl --device mps", "device must be auto, cpu or cuda; got 'mps'"),
        ("run promptfl --device meta", "device must be auto, cpu or cuda; got 'meta'"),
        ("run promptfl --device xpu", "device must be auto, cpu or cuda; got 'xpu'"),
        ("run promptfl --device cpu:3", "device must be there; got 'cpu:3'; use cpu"),
        ("run promptfl -o mu=1", "option must be one of promptfl's; got 'mu'; it has none"),
        ("run fedprox -o nu=1", "option must be one of fedprox's; got 'nu'"),
        ("run fedprox -o mu=-1", "fedprox's option mu is refused"),
        ("run fedprox -o mu", "option must read KEY=VALUE; got 'mu'"),
        ("run fedprox -o local.mu=1", "option must belong to fedprox"),
        ("run pfedmoap -o gate_width=48", "gate_width must divide D=128"),
        ("run zeroshot --position front", "position must be 'end' for zeroshot"),
        ("run promptfl --config nowhere.yaml", "the file must exist"),
        ("compare promptfl promptfl", "each once"),
        ("compare promptfl --seeds 1,x", "seeds must be whole numbers"),
        ("compare promptfl fedprox -o mu=1", "must name its method, as in promptfl.mu="),
        ("presets nope", "preset must be a known one"),
        ("report nowhere", "folder must exist; got nowhere"),
    ],
)
def test_mistakes_end_with_a_sentence_and_exit_code_2(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ["--out", str(tmp_path / "out")] if arguments.split()[0] in ("run", "compare") else []
    code, out, err = call(capsys, *arguments.split(), *extra)
    assert code == 2
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    ["run promptfl --rounds ten", "run promptfl --nonsense", "run", "compare", "report", "fly"],
)
def test_wrong_flags_exit_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *arguments.split())
    assert code == 2
    assert "Usage:" in err


def test_run_writes_a_result_and_refuses_to_overwrite_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    where = ["--out", str(folder), "--cache", str(tmp_path / "cache")]
    code, out, err = call(capsys, "run", "pfedmoap", *QUICK, *where, "-o", "experts=2")
    assert code == 0
    assert_a_line_a_round(err, "pfedmoap", 2)
    assert "pfedmoap" in out
    result = json.loads((folder / "result.json").read_text())
    assert set(result) >= {
        *("method", "settings", "environment", "faces", "rounds", "final", "peak_memory_bytes")
    }
    assert result["settings"]["options"]["experts"] == 2
    assert result["settings"]["options"]["heads"] == 8
    assert len(result["rounds"]) == 2
    for row in result["rounds"]:
        assert set(row) >= {"round", "accuracy", "clients", "seconds", "images_per_second"}
        assert set(row) >= {"bytes_up", "bytes_down"}
        assert row["accuracy"] == sum(row["clients"]) / 2
        assert 0 <= row["accuracy"] <= 1
    assert set(result["final"]) == {
        *("accuracy", "last5", "best", "std_over_clients", "macro_f1", "exams", "domains")
    }
    assert result["final"]["accuracy"] == result["rounds"][-1]["accuracy"]
    # compiled ones where fastfpl._C is built
    assert set(result["faces"]) == {"encode_text", "gate_experts"}
    assert all(names in (["cpu"], ["torch"]) for names in result["faces"].values())
    assert result["peak_memory_bytes"] > 1 << 20
    assert not re.search(r"/(home|root|tmp)/", json.dumps(result))
    before = (folder / "result.json").read_bytes()
    code, _, err = call(capsys, "run", "pfedmoap", *QUICK, *where)
    assert code == 2
    assert "must not hold a run already" in err
    assert (folder / "result.json").read_bytes() == before


def test_compare_prints_a_table_and_writes_a_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--out", str(tmp_path / "c"), "--cache", str(tmp_path / "cache")]
    arguments = ["compare", "zeroshot", "promptfl", *QUICK, *where, "--seeds", "0,1"]
    code, out, err = call(capsys, *arguments)
    assert code == 0
    lines = err.splitlines()
    assert [line.partition("  accuracy")[0] for line in lines] == [
        *("zeroshot, seed 0  round 1", "zeroshot, seed 1  round 1"),
        *(f"promptfl, seed {seed}  round {round_}" for seed in (0, 1) for round_ in (1, 2)),
    ]
    for name in ("zeroshot", "promptfl"):
        assert name in out
        for seed in (0, 1):
            assert (tmp_path / "c" / f"{name}-seed{seed}" / "result.json").is_file()
    assert (tmp_path / "c" / "index.html").is_file()
    assert (tmp_path / "c" / "accuracy.png").stat().st_size > 1000
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "must not hold a run already" in err
    code, again, _ = call(capsys, *arguments, "--resume")
    assert code == 0
    figures = [
        json.loads((tmp_path / "c" / f"promptfl-seed{s}" / "result.json").read_text())["final"]
        for s in (0, 1)
    ]
    assert figures[0] != figures[1]
    assert again.splitlines()[:4] == out.splitlines()[:4]


def test_report_writes_again_what_compare_wrote(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = ["--out", "c", "--cache", "cache"]
    code, out, _ = call(capsys, "compare", "zeroshot", "promptfl", *QUICK, *where)
    assert code == 0
    plan = json.loads(Path("c/comparison.json").read_text())
    assert plan == {"methods": ["zeroshot", "promptfl"], "seeds": [0], "rounds": 2}
    files = [p for p in Path("c").iterdir() if p.is_file() and p.name != "comparison.json"]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 6
    for path in files:
        path.unlink()
    assert call(capsys, "report", "c") == (0, out, "")
    assert {path: path.read_bytes() for path in files} == before
    # a run by itself, into another folder
    code, out, err = call(capsys, "report", "c/promptfl-seed0", "--out", "mine")
    assert (code, err) == (0, "")
    assert "promptfl" in out
    assert "zeroshot" not in out
    assert "mine/index.html" in out
    assert Path("mine/accuracy.png").stat().st_size > 1000
    # several runs
    code, out, err = call(capsys, "report", "c/promptfl-seed0", "c/zeroshot-seed0")
    assert (code, err) == (0, "")
    assert Path("runs/report/table.md").read_bytes() == before[Path("c/table.md")]
    # one that did not end
    Path("c/promptfl-seed0/result.json").unlink()
    code, out, err = call(capsys, "report", "c/promptfl-seed0")
    assert (code, out) == (2, "")
    assert err.startswith("error: fastfpl.load_comparisons: folder must hold finished runs")
    assert err.count("\n") == 1


def test_flags_win_over_the_file_and_the_file_over_the_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "clip: tiny\npretrained: null\nrounds: 3\nlocal_epochs: 1\nlr: 0.01\ndataset: digits\n"
        "clients: 2\naugment: none\noptions:\n  fedprox: {mu: 0.25}\n  pfedmoap: {experts: 3}\n"
    )
    code, _, err = call(
        capsys,
        *("run", "fedprox", "--preset", "pfedmoap-clip-sets", "--config", str(config)),
        *("--rounds", "1", "--shots", "2", "--out", str(tmp_path / "o")),
        *("--cache", str(tmp_path / "cache")),
    )
    assert code == 0
    assert_a_line_a_round(err, "fedprox", 1)
    settings = json.loads((tmp_path / "o" / "result.json").read_text())["settings"]
    assert settings["rounds"] == 1  # flag
    assert settings["lr"] == 0.01  # file
    assert settings["batch_size"] == 16  # preset
    assert settings["options"] == {"mu": 0.25}


@pytest.mark.parametrize("text", ["- a\n- b\n", "rounds: [\n", "1: 2\n"])
def test_a_file_that_holds_no_settings_is_refused(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    code, _, err = call(capsys, "run", "promptfl", "--config", str(config))
    assert code == 2
    assert "bad.yaml must" in err


def test_every_preset_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert preset_names()
    for name in preset_names():
        code, out, _ = call(capsys, "presets", name)
        assert code == 0
        preset = load_preset(name)
        assert preset.about in out
        assert yaml.safe_load(out) == preset.settings
        assert all(one.source in out for one in preset.published)
    code, out, _ = call(capsys, "presets")
    assert code == 0
    assert all(name in out for name in preset_names())


def test_doctor_says_which_faces_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    for word in ("torch", "encode_text", "gate_experts", "transport_plan", "reference", "yes"):
        assert word in out
    reason = "it is not built; this command builds it"
    faces = all_faces()
    faces["transport_plan"] = tuple(
        replace(f, missing=lambda: [reason]) if f.name == "cpu" else f
        for f in faces["transport_plan"]
    )
    monkeypatch.setattr(fastfpl.ops, "all_faces", lambda: faces)
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "not built" in out


def doctor_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "400")
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (0, "")
    return out


def test_doctor_says_what_the_machine_can_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", info)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info.write_text(
        "model name : some\nflags : fpu avx2 avx512_bf16 amx_bf16x amx_tile\n\nflags : bf16"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = doctor_says(capsys, monkeypatch)
    assert "cards none that torch sees" in re.sub(" +", " ", out)
    assert "interpreted on the CPU" in out
    assert "(OMP_NUM_THREADS 3)" in out
    assert "avx512_bf16 amx_tile" in out
    assert torch.backends.cpu.get_cpu_capability() in out
    info.write_text("Features : fp asimd\n")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    out = doctor_says(capsys, monkeypatch)
    assert "none: bfloat16 is no faster here" in out
    assert "torch sees no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU" in out


def test_doctor_says_that_a_folder_hides_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Above a clone named fastfpl, Python finds the clone's own folder: a namespace, and empty."""
    monkeypatch.chdir(tmp_path)
    assert "in place of the library" not in doctor_says(capsys, monkeypatch)
    (tmp_path / "fastfpl" / "fastfpl").mkdir(parents=True)
    (tmp_path / "fastfpl" / "fastfpl" / "__init__.py").touch()
    out = doctor_says(capsys, monkeypatch)
    assert f"Python that is started in {tmp_path} imports the folder fastfpl, which is no" in out
    assert "rename that folder, as by git clone ADDRESS fastfpl-source" in out
    monkeypatch.chdir(tmp_path / "fastfpl")  # the clone's own root is right
    assert "in place of the library" not in doctor_says(capsys, monkeypatch)


def test_doctor_says_which_cards_are_too_old(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [("old card", (7, 5)), ("good card", (8, 0)), ("later card", (12, 0))]
    monkeypatch.setattr(machine, "_cards", lambda: cards)
    out = re.sub(" +", " ", doctor_says(capsys, monkeypatch))
    assert "card 0 old card, compute capability 7.5: too old for kernels, which take 8.0" in out
    assert "card 1 good card, compute capability 8.0 \n" in out
    assert "card 2 later card, compute capability 12.0 \n" in out


def test_doctor_says_what_cannot_be_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = Face("triton", print, missing=lambda: ["no card"])
    monkeypatch.setattr(
        machine,
        "all_faces",
        lambda: {
            "encode_text": tuple(replace(one, name=n) for n in ("triton", "cpu", "reference"))
        },
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = "@pytest.mark.gpu\n@pytest.mark.slow\ndef test_a(): ...\n\n\ndef test_b(): ...\n"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_text.py").write_text(text)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "fastfpl" / "report" / "machine.py"))
    out = doctor_says(capsys, monkeypatch)
    for what in launch.UNFAITHFUL:
        assert f"\n  encode_text, triton: {what}: the interpreter does it otherwise" in out
    assert "\n  encode_text, reference: tensors on a CUDA device\n" in out
    assert "encode_text, cpu" not in out
    assert "\n  1 tests of test_text.py, which are marked gpu\n" in out
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "\n  encode_text, triton: all of it\n" in doctor_says(capsys, monkeypatch)
    # an installed copy has no tests; with a card nothing is left out
    (tmp_path / "tests" / "test_text.py").unlink()
    assert "marked gpu" not in doctor_says(capsys, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(machine.unchecked()) == []


def test_doctor_counts_this_houses_gpu_tests() -> None:
    found = machine.gpu_tests()
    assert {"test_graphs.py", "test_steps.py"} <= set(found)
    assert "test_no_step_waits_for_a_gpu" in found["test_steps.py"]


@pytest.mark.parametrize("method", ["pfedmoap", "zeroshot"])
def test_profile_writes_a_trace_and_prints_where_the_time_goes(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    quick = ["--dataset", "digits", "--clients", "2", "--shots", "4", "--n-ctx", "2"]
    quick += ["--batch-size", "4", "--threads", "1", "--cache", str(tmp_path / "cache")]
    quick += ["--steps", "2", "--top", "7", "--out", str(tmp_path / "p")]
    if method == "pfedmoap":
        quick += ["-o", "experts=2"]
    code, out, err = call(capsys, "profile", method, *quick)
    assert code == 0
    assert_a_line_a_round(err, method, 2)
    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert sum(name == "fastfpl: evaluation" for name in names) == 1
    steps = {"pfedmoap": 2, "zeroshot": 0}[method]
    for phase in ("text", "loss", "gradients", "update"):
        assert sum(name == f"fastfpl: {phase}" for name in names) == steps, phase
    assert any(str(name).startswith("aten::") for name in names)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["trace.json"]
    # what is printed is what was seen
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith(" evaluation")).split()[1] == "1"
    shown = lines[[line.split()[:1] == ["operator"] for line in lines].index(True) + 1 :]
    shown = [line.split() for line in shown[:7]]
    assert all(cells[-1] == "%" for cells in shown)
    shares = [float(cells[-2]) for cells in shown]
    assert shares == sorted(shares, reverse=True)
    assert 30 < sum(shares) <= 100.5
    assert "GPU" not in out
    assert re.search(r"^peak memory \d{2,} MiB$", out, re.MULTILINE)
    assert "encode_text by " in out
    assert ("gate_experts by " in out) == (method == "pfedmoap")  # the second round's
    assert lines[-1].endswith("trace.json")


def test_profile_takes_the_settings_of_a_run_but_those_it_sets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = call(capsys, "profile", "--help")
    assert code == 0
    out += call(capsys, "profile", "--settings", "all")[1]
    taken = set(re.findall(r"^  .*?--([a-z-]+)", out.partition("Options:")[2], re.MULTILINE))
    taken |= set(re.findall(r"^  --[a-z-]+, --([a-z-]+)", out, re.MULTILINE))
    mine = {name.replace("_", "-") for name in Settings.model_fields}
    mine -= {"method", "options"} | {name.replace("_", "-") for name in PROFILED}
    more = {
        "memory",
        "preset",
        "config",
        "option",
        "out",
        "cache",
        "steps",
        "top",
        "help",
        "settings",
    }
    assert taken == mine | more
    code, _, err = call(capsys, "profile", "promptfl", "--steps", "0")
    assert (code, err) == (2, "error: fastfpl.profile: steps must be at least 1; got 0\n")
    (tmp_path / "file").touch()
    code, _, err = call(capsys, "profile", "promptfl", "--out", str(tmp_path / "file"))
    assert code == 2
    assert "fastfpl.profile: out must be a folder; got the file" in err


def test_a_card_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked(device: str) -> str:
        return call(capsys, "run", "promptfl", "--device", device, "--out", str(tmp_path / "o"))[2]

    monkeypatch.setattr(experiment, "forget_peak_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:7"):
        assert f"got '{device}' without a CUDA device; use cpu\n" in asked(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "got 'cuda:7' with 2 CUDA devices; use cuda:0 to cuda:1\n" in asked("cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "got 'cuda:1' with 1 CUDA device; use cuda:0\n" in asked("cuda:1")


def test_without_a_home_the_cure_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unknown user without HOME: doctor goes on, a run wants --cache."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "name it by cache (--cache), or set HOME" in doctor_says(capsys, monkeypatch)
    monkeypatch.setattr(preparation, "load_clip", not_to_be_called)
    code, _, err = call(capsys, "run", "promptfl", *QUICK, "--out", str(tmp_path / "o"))
    assert (code, err.count("\n")) == (2, 1)
    assert "name it by cache (--cache), or set HOME" in err
    code, _, err = call(capsys, "data", "check", "dtd", "--root", "~/data")
    assert (code, err.count("\n")) == (2, 1)


# --- what is cheap comes first --------------------------------------------------------------------


def not_to_be_called(*arguments: object, **more: object) -> None:
    raise AssertionError("the weights were read")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run promptfl --dataset dtd --root nowhere", "root"),
        ("run promptfl --dataset nope", "must be a data set"),
        ("run promptfl --dataset digits --clients 20", "would be empty"),
        ("run promptfl --dataset digits --statistics dataset", "statistics must be 'clip'"),
        ("run promptfl --dataset glyphs --sampling domain", "sampling must be 'uniform'"),
        ("run promptfl --cache file/x", "directory (--cache) must be a folder"),
        ("run promptfl --out file", "out must be a folder"),
        ("run promptfl --out file/x", "out must be a folder"),
        ("run promptfl --out held", "out must not hold a run already"),
        ("run promptfl --out held --resume --lr .1", "must have the settings of held; got lr: 0.0"),
        ("run promptfl --out held --resume --rounds 1", "rounds must be at least the 2"),
        ("run promptfl --clip ViT-B-61", "did you mean 'ViT-B-16'"),
        ("profile promptfl --dataset dtd --root nowhere", "root"),
    ],
)
def test_cheap_checks_come_before_the_weights(
    arguments: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    held: Path,
) -> None:
    monkeypatch.chdir(held.parent)
    monkeypatch.setattr(preparation, "load_clip", not_to_be_called)
    command, method, *own = arguments.split()
    quick = [] if command == "profile" else list(QUICK)
    code, _, err = call(capsys, command, method, *quick, "--cache", "cache", *own)
    assert (code, err.count("\n")) == (2, 1), err
    assert sentence in err


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a run of two rounds, beside a file."""
    folder = tmp_path_factory.mktemp("cheap")
    (folder / "file").touch()
    main(["run", "promptfl", *QUICK, "--out", str(folder / "held"), "--cache", str(folder / "c")])
    return folder / "held"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("promptfl --sweep clients=2,20", "would be empty"),
        ("promptfl --sweep clients=2,2.5", "clients is refused"),
        ("promptfl --sweep dataset=digits,nope", "must be a data set"),
        ("promptfl --sweep n_ctx=2,75", "must fit into 77 tokens"),
        ("promptfl --sweep clip=tiny,tinny", "got 'tinny'"),
        ("promptfl pfedmoap -o pfedmoap.gate_width=48", "gate_width must divide D=128"),
        ("promptfl fedapt-unsupervised", "augment must be fresh or views:V"),
        ("promptfl --seeds 0,-1", "seed is refused"),
    ],
)
def test_all_runs_are_checked_before_the_first_is_played(
    arguments: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(rounds.Federation, "round", not_to_be_called)
    given = arguments.split()
    quick = dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    if "--sweep" in given:
        quick.pop("--" + given[given.index("--sweep") + 1].partition("=")[0].replace("_", "-"), 0)
    flags = [part for pair in quick.items() for part in pair]
    code, out, err = call(capsys, "compare", *given, *flags, "--out", str(tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_held_folder_of_a_later_run_is_seen_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, held: Path, tmp_path: Path
) -> None:
    shutil.copytree(held, tmp_path / "c" / "promptfl-seed1")
    monkeypatch.setattr(preparation, "load_clip", not_to_be_called)
    where = ["--seeds", "0,1", "--out", str(tmp_path / "c")]
    code, _, err = call(capsys, "compare", "promptfl", *QUICK, *where)
    assert code == 2
    assert "promptfl-seed1; go on with it by resume" in err
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["promptfl-seed1"]


# --- hostile settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-3", "1E5", ".5e1", "+1e3", "1.e-2", "2.5E+0", "+.5"])
def test_numbers_are_read_as_people_write_them(
    written: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert parse_yaml(written, "x") == float(written)
    assert parse_yaml(f"'{written}'", "x") == written
    config = tmp_path / "a.yaml"
    config.write_text(f"lr: {written}\noptions:\n  fedprox: {{mu: {written}}}\n")
    settings = settings_of("fedprox", None, config, [], {})
    assert (settings.lr, settings.options) == (float(written), {"mu": float(written)})
    assert settings_of("fedprox", None, None, [f"mu={written}"], {}).options == settings.options
    assert _swept(f"lr={written},1", {}) == ("lr", [float(written), 1])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = BOMB.replace("[x, x, x, x, x, x, x, x, x]", "{a: 1, b: 2, c: 3, d: 4}")
MERGES = MERGES.replace(" [*", " {<<: [*").replace("]\n", "]}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (BOMB.encode(), "at most 10000 values, aliases written out; got more in line 5"),
        (MERGES.encode(), "at most 10000 values, aliases written out; got more in line 5"),
        (b"lr: &a [*a]", "must hold no value inside itself; got *a in line 1"),
        (b"rounds: 1\nlr: 1\nrounds: 2", "must hold every key once; got rounds in line 3"),
        (b"options:\n  fedprox: {mu: 1, mu: 2}", "every key once; got mu in line 2"),
        (b"clients: 2\nctx_init: caf\xe9", "must be UTF-8; got the byte 0xE9 in line 2"),
        (b"lr: " + 5000 * b"9", "numbers of at most 100 digits"),
        (b"lr: 0x" + 5000 * b"f", "numbers of at most 100 digits"),
        (5000 * b"[", "at most 32 values inside each other"),
        (5000 * b"{a: ", "at most 32 values inside each other"),
        (b"lr: !!python/object/apply:os.system [ls]", "no tags; got tag:yaml.org,2002:python/ob"),
        (b"lr: !!int ''", "must hold no tags"),
        (b"lr: 2024-13-01", "must be YAML; got month must be in 1..12"),
        (b'root: "a\\0b"', "root is refused: input should be text"),
        (b"dataset: " + 100_000 * b"x", "dataset is refused: input should be text of at most 4096"),
        (b"lr: [" + 9000 * b"x, " + b"x]", "lr is refused"),
        (b"#" * (1 << 20) + b"\n", "must hold at most 1048576 bytes"),
        (b"\x00", "must be YAML"),
    ],
)
def test_hostile_files_of_settings_end_in_a_short_sentence(
    content: bytes, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_bytes(content)
    begin = time.perf_counter()
    code, _, err = call(capsys, "run", "promptfl", "--config", str(config))
    assert time.perf_counter() - begin < 5
    assert (code, err.count("\n")) == (2, 1), err
    assert sentence in err
    assert len(err) < 1000


def test_keys_of_an_alias_may_be_said_again(tmp_path: Path) -> None:
    text = "options:\n  fedprox: &x {mu: 1}\n  fedpgp: {<<: *x, mu: 2}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_yaml(tmp_path / "a.yaml")["options"]["fedpgp"] == {"mu": 2}


def test_chance_values_of_settings_end_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No setting, by flag, file, option or sweep, takes a value that ends in a traceback."""

    class Enough(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Enough

    monkeypatch.setattr(preparing, "load_model", stop)
    monkeypatch.setattr(comparison, "load_model", stop)
    monkeypatch.chdir(tmp_path)
    hostile = ["", " ", "0", "-1", 5000 * "9", "1e-3", "1e999", "nan", "-inf", "null", "~", "true"]
    hostile += ["[", "]", "{}", "[]", "a: b", "*x", "&a", "!!python/none", "a\0b", "\udcff", "é"]
    hostile += [5000 * "x", "../..", "/", "/dev/null", "2147483648", "9223372036854775808", "--"]
    hostile += [
        "1_000",
        "0x10",
        "1:30",
        "2024-13-01",
        "all",
        "none",
        "views:" + 50 * "9",
        "cuda:-1",
    ]
    keys = [key for key in Settings.model_fields if key not in ("method", "options", "clip")]
    draw = random.Random(0)
    begin, ended = time.perf_counter(), []
    for _ in range(150):
        method = draw.choice(list(METHODS))
        options = list(METHODS[method].Options.model_fields) or ["none"]
        key, value = draw.choice(keys), draw.choice(hostile)
        config = tmp_path / "c.yaml"
        config.write_text(f"{key}: {value}\n", encoding="utf-8", errors="surrogateescape")
        more = draw.choice(
            [
                [f"--{key.replace('_', '-')}={value}"],
                ["--config", "c.yaml"],
                ["-o", f"{draw.choice(options)}={value}"],
                ["--sweep", f"{key}={value}"],
                [draw.choice(["--out=", "--cache=", "--config=", "--preset=", "--seeds="]) + value],
            ]
        )
        command = draw.choice(["run", "compare", "profile"])
        quick = ["--dataset", "digits", "--clients", "2"]
        quick = [] if key in ("dataset", "clients") else quick
        try:
            code, _, err = call(capsys, command, method, *quick, *more)
        except Enough:
            ended.append("weights")
            continue
        ended.append("sentence")
        assert code == 2, (method, more)
        assert err.count("\n") == 1 or err.startswith("Usage:"), err
        assert len(err) < 2000
    assert time.perf_counter() - begin < 60
    assert {"weights", "sentence"} == set(ended)


# --- help and names -------------------------------------------------------------------------------


def test_every_setting_is_in_one_group_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(set(Settings.model_fields) - {"method", "options"})
    for command in ("run", "compare", "profile"):
        code, out, _ = call(capsys, command, "--settings", "all")
        assert code == 0
        titles = [line for line in out.splitlines() if re.fullmatch(r"[A-Z][a-zA-Z, ]+:", line)]
        assert titles == [f"{title}:" for title in GROUPS]
        for inner in ("_COUNT", "INTEGER", "FLOAT", "BOOLEAN", "TEXT", "handbook"):
            assert inner not in out
        assert "--shots N|all " in out
        assert "--transductive yes|no " in out


def test_every_help_fits_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are named there in groups, and explained a group at a time."""
    import click

    def helps(command: click.Command, path: list[str]) -> Iterator[list[str]]:
        yield path
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from helps(inner, [*path, name])

    seen = list(helps(group, []))
    assert ["flower", "up"] in seen
    for path in seen:
        code, out, _ = call(capsys, *path, "--help")
        assert code == 0
        assert len(out.splitlines()) <= 55, path
        assert max(map(len, out.splitlines())) <= 80, path
    code, out, _ = call(capsys, "run", "--help")
    assert "  clients   --partition --partition-seed " in out
    assert " --memory " in out
    keys = re.findall(r"^  (\w+) +--", out.partition("Settings, explained")[2], re.MULTILINE)
    explained = []
    for key in keys:
        code, one, _ = call(capsys, "run", "--settings", key)
        assert code == 0
        assert len(one.splitlines()) <= 55
        explained += re.findall(r"^  .*?(--[a-z-]+)", one, re.MULTILINE)
    for name in set(Settings.model_fields) - {"method", "options"}:
        assert f"--{name.replace('_', '-')}" in explained
    code, _, err = call(capsys, "run", "--settings", "cliens")
    assert code == 2
    assert "is not one of 'data', 'clients', 'merging', 'privacy'" in err

    # a command may have none of a group
    @click.command(cls=Grouped)
    @click.option("--lr")
    def one(lr: str | None) -> None:
        """Do one thing."""

    monkeypatch.setitem(group.commands, "one", one)
    code, out, _ = call(capsys, "one", "--help")
    assert re.findall(r"^  (\w+) +--", out.partition("Settings, explained")[2], re.MULTILINE) == [
        "training"
    ]
    code, _, err = call(capsys, "one", "--settings", "clients")
    assert code == 2
    assert "fastfpl one has no settings of clients" in err


def test_methods_are_listed_with_everything_that_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = call(capsys, "methods")
    assert code == 0
    for name, method in METHODS.items():
        row = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert method.summary in row
        code, one, _ = call(capsys, "methods", name)
        assert code == 0
        for title in ("source:", "answers with:", "sees:", "sends:", "receives:"):
            assert f"\n{title}" in one
        for key, field in method.Options.model_fields.items():
            assert key in row
            assert field.description
            assert re.search(rf"^ *{key} .*{re.escape(field.description)}", one, re.MULTILINE)
    code, _, err = call(capsys, "methods", "pfedmop")
    assert code == 2
    assert "did you mean 'pfedmoap'" in err


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("run pfed", {"pfedmoap"}),
        ("compare promptfl promptf", {"promptfl", "promptfl-ft", "promptfolio"}),
        ("methods fedt", {"fedtpg"}),
        ("run promptfl --dataset digi", {"digits"}),
        ("data check cifar", {"cifar10", "cifar100"}),
        ("run promptfl --preset promptfl-n", {"promptfl-non-iid"}),
        ("presets promptfl-n", {"promptfl-non-iid"}),
        ("run promptfl --clip ti", {"tiny"}),
        ("doctor --clip RN50x", {"RN50x4", "RN50x4-quickgelu", "RN50x16", "RN50x64"}),
        ("run promptfl --as-released fedprox-no-gradient,fedprox", {"fedprox-no-gradient"}),
        ("run promptfl --scenario multi", {"multi-domain"}),
        ("run pfedmoap -o gate_", {"gate_width=", "gate_lr="}),
        ("compare fedprox fedpgp -o fedpgp.m", {"fedpgp.mu="}),
    ],
)
def test_a_shell_completes_names(
    line: str, names: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    monkeypatch.setenv("_FASTFPL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["fastfpl", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    code, out, _ = call(capsys)
    assert code == 0
    found = {entry.partition(",")[2].rpartition(",")[2] for entry in out.splitlines()}
    assert found >= names if "RN50x" in line else found == names


def test_a_long_step_says_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 61.0, 100.0, 122.0, 123.0, 190.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with bars.progress() as (observer, on_round):
        for done in range(5):
            observer("encoding", done, 9)
        observer("round 1", 0, 2)
        observer("round 1", 1, 2)
        on_round("promptfl", {"round": 0, "accuracy": None, "loss": 0.25, "seconds": 3})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        *("encoding  2 of 9", "encoding  4 of 9", "round 1  1 of 2"),
        "promptfl  round 1  loss 0.2500  3.0 s",
    ]


def test_a_reader_that_leaves_ends_no_one_in_a_traceback() -> None:
    reader = subprocess.Popen(
        [sys.executable, "-m", "fastfpl.cli", "presets"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert reader.stderr.read() == b""
    assert reader.wait() == 1
    reader.stderr.close()


def test_settings_refuse_unknown_keys_and_wrong_types() -> None:
    with pytest.raises(InputError, match=r"key must be a known one; got 'round'; did you mean"):
        make_settings({"method": "promptfl", "round": 3})
    with pytest.raises(InputError, match=r"rounds is refused: .*; got 'ten'"):
        make_settings({"method": "promptfl", "rounds": "ten"})
    with pytest.raises(InputError, match=r"rounds is refused"):
        make_settings({"method": "promptfl", "rounds": 2.5})
    with pytest.raises(InputError, match=r"seed is refused"):
        make_settings({"method": "promptfl", "seed": True})
    assert make_settings({"method": "promptfl", "shots": "all"}).shots is None
    assert make_settings({"method": "promptfl", "lr": 1}).lr == 1
    with pytest.raises(Missing, match="must exist"):
        load_yaml(Path("nowhere.yaml"))


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path) -> None:
    program = (
        "import sys; from fastfpl.cli import main; import fastfpl.federation.experiment as r\n"
        "from tests.worlds import on_few_digits\nfew = on_few_digits()\nfew.__enter__()\n"
        "old = r.save_checkpoint\n"
        "def stop(*a):\n    old(*a)\n    raise KeyboardInterrupt\n"
        "r.save_checkpoint = stop\nmain(sys.argv[1:])\n"
    )
    arguments = ["run", "promptfl", *QUICK, "--out", str(tmp_path / "o")]
    arguments += ["--cache", str(tmp_path / "cache")]
    first = subprocess.run(
        [*warm_python(), "-c", program, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 130
    assert "--resume" in first.stderr
    assert (tmp_path / "o" / "checkpoint.json").is_file()
    assert not (tmp_path / "o" / "result.json").exists()
    main([*arguments, "--resume"])
    rows = json.loads((tmp_path / "o" / "result.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1]


def test_a_warning_is_a_sentence_without_the_line_of_code(monkeypatch, capsys) -> None:
    """What pytest catches before it is written is written here, as in a process of its own."""

    def shown(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    def warn(**_: object) -> None:
        warnings.warn("fastfpl.load: figures may\ndiffer", UserWarning, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)

    monkeypatch.setattr(group, "main", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", shown)
        main([])
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: fastfpl.load: figures may differ"
    assert "UserWarning: of another library" in others[0]
