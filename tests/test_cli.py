"""The command line: exit codes, sentences, files, and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import fastfpl.ops
from fastfpl.cli import main
from fastfpl.config import (
    PROFILED,
    Settings,
    load_preset,
    load_yaml,
    make_settings,
    preset_names,
)
from fastfpl.errors import InputError, Missing
from fastfpl.ops import all_faces, launch
from fastfpl.ops.faces import Face
from fastfpl.report import machine

QUICK = (
    *("--dataset", "digits", "--clients", "2", "--rounds", "2", "--local-epochs", "1"),
    *("--shots", "2", "--n-ctx", "2", "--threads", "1"),
)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


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
    assert (code, err) == (0, "")  # nobody looks: no progress
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
    assert (code, err) == (0, "")
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
    code, out, err = call(capsys, "compare", "zeroshot", "promptfl", *QUICK, *where)
    assert (code, err) == (0, "")
    plan = json.loads(Path("c/comparison.json").read_text())
    assert plan == {"methods": ["zeroshot", "promptfl"], "seeds": [0], "rounds": 2}
    files = [p for p in Path("c").iterdir() if p.is_file() and p.name != "comparison.json"]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 5
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
    assert (code, err) == (0, "")
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
    quick = ["--dataset", "glyphs", "--clients", "2", "--shots", "4", "--n-ctx", "2"]
    quick += ["--batch-size", "4", "--threads", "1", "--cache", str(tmp_path / "cache")]
    quick += ["--steps", "2", "--top", "7", "--out", str(tmp_path / "p")]
    if method == "pfedmoap":
        quick += ["-o", "experts=2"]
    code, out, err = call(capsys, "profile", method, *quick)
    assert (code, err) == (0, "")
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
    taken = set(re.findall(r"--([a-z-]+)", out.partition("Options:")[2]))
    mine = {name.replace("_", "-") for name in Settings.model_fields}
    mine -= {"method", "options"} | {name.replace("_", "-") for name in PROFILED}
    more = {"memory", "preset", "config", "option", "out", "cache", "steps", "top", "help"}
    assert taken == mine | more
    code, _, err = call(capsys, "profile", "promptfl", "--steps", "0")
    assert (code, err) == (2, "error: fastfpl.profile: steps must be at least 1; got 0\n")
    (tmp_path / "file").touch()
    code, _, err = call(capsys, "profile", "promptfl", "--out", str(tmp_path / "file"))
    assert code == 2
    assert "fastfpl.profile: out must be a folder; got the file" in err


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
        "old = r.save_checkpoint\n"
        "def stop(*a):\n    old(*a)\n    raise KeyboardInterrupt\n"
        "r.save_checkpoint = stop\nmain(sys.argv[1:])\n"
    )
    arguments = ["run", "promptfl", *QUICK, "--out", str(tmp_path / "o")]
    arguments += ["--cache", str(tmp_path / "cache")]
    first = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert first.returncode == 130
    assert "--resume" in first.stderr
    assert (tmp_path / "o" / "checkpoint.json").is_file()
    assert not (tmp_path / "o" / "result.json").exists()
    main([*arguments, "--resume"])
    rows = json.loads((tmp_path / "o" / "result.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1]
