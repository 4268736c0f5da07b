"""`fastfpl doctor`, and what else is said of a machine that lacks something."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastfpl.ops
from fastfpl.federation import experiment
from fastfpl.ops import all_faces, launch
from fastfpl.ops.faces import Face
from fastfpl.report import machine
from fastfpl.training import preparation
from tests.command import QUICK, call, not_to_be_called


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
