"""What this machine can do, and what cannot be seen on it; `fastfpl doctor` prints it."""

from __future__ import annotations

import ast
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from fastfpl.ops import all_faces, launch

__all__ = ["gpu_tests", "machine_facts", "unchecked"]

# what /proc/cpuinfo calls instructions for bfloat16: of x86 and of Arm
_BF16 = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16", "svebf16")
_CPUINFO = Path("/proc/cpuinfo")


def machine_facts() -> dict[str, str]:
    """Say what decides which faces answer and how fast, by name."""
    cards = [f"{name}, compute capability {a}.{b}" for name, (a, b) in _cards()]
    old = [(a, b) < launch.OLDEST for _, (a, b) in _cards()]
    oldest = ".".join(str(n) for n in launch.OLDEST)
    facts = {
        f"card {i}": card + (f": too old for kernels, which take {oldest} or newer" * old[i])
        for i, card in enumerate(cards)
    } or {"cards": "none that torch sees"}
    reasons = launch.missing()
    how = "interpreted on the CPU" if launch.interpreted() else "compiled for the card"
    facts["Triton's kernels"] = "; ".join(reasons) if reasons else how
    asked = os.environ.get("OMP_NUM_THREADS", "unset")
    facts["OpenMP threads"] = (
        f"{torch.get_num_threads()} on {os.cpu_count()} processors (OMP_NUM_THREADS {asked}); "
        "torch and fastfpl._C share them"
    )
    facts["vector instructions"] = torch.backends.cpu.get_cpu_capability()
    found = [flag for flag in _BF16 if flag in _flags()]
    facts["bfloat16 instructions"] = " ".join(found) or "none: bfloat16 is no faster here"
    return facts


def _cards() -> list[tuple[str, tuple[int, int]]]:
    """Return name and compute capability of every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)
    ]


def _flags() -> set[str]:
    """Return the processor's flags as Linux lists them; none elsewhere."""
    if platform.system() != "Linux" or not _CPUINFO.exists():
        return set()
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def unchecked() -> Iterator[str]:
    """Yield, op by op and face by face, what no test can see on this machine, and what skips."""
    for op, faces in sorted(all_faces().items()):
        for face in faces:
            for reason in launch.unproven(face.name):
                yield f"{op}, {face.name}: {reason}"
    if not torch.cuda.is_available():
        for file, names in gpu_tests().items():
            yield f"{len(names)} tests of {file}, which are marked gpu"


def gpu_tests() -> dict[str, list[str]]:
    """Name the tests that need a GPU by their file; none where the tests are not installed."""
    found = {}
    for path in sorted((Path(__file__).parents[2] / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "pytest.mark.gpu" not in text:  # to parse them all takes a second
            continue
        names = [
            node.name
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)
            and any("pytest.mark.gpu" in ast.unparse(mark) for mark in node.decorator_list)
        ]
        if names:
            found[path.name] = names
    return found
