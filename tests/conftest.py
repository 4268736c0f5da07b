"""What every test relies on: interpreted Triton without a GPU, poisoned memory, few threads."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from fastfpl.features import FeatureStore

GPU = torch.cuda.is_available()


if not GPU:
    # Triton decides when it is first imported; set later, its own library functions would be wrong.
    assert "triton" not in sys.modules, "import torch has imported triton: set the variable earlier"
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.quick_interpreter import keep_what_is_made_anew

        keep_what_is_made_anew()
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

# torch.empty and its kin give NaN, in C++ too: a result that nobody wrote shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# xdist's workers share the cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_THREADS = max(1, _CORES // _WORKERS)
torch.set_num_threads(_THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))  # of processes that tests start

hypothesis.settings.register_profile(
    "house",
    deadline=None,  # the first example of an op may compile or load it
    derandomize=True,
    database=None,
    max_examples=40,
)
hypothesis.settings.load_profile("house")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # torch itself begins with another seed in every process
    if item.get_closest_marker("gpu") and not GPU:
        pytest.skip("needs a CUDA device, and torch sees none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what only interpreted kernels can do, tensors on the CPU, where they are compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(reason="kernels are compiled here: they take no tensor on the CPU")
    for item in items:
        if not item.get_closest_marker("gpu") and _interprets(item):
            item.add_marker(skip)


def _interprets(item: pytest.Item) -> bool:
    """Tell rows of the face ``triton``, and of kernels alone, whose tensors are on the CPU."""
    call = getattr(item, "callspec", None)
    words = {v for v in call.params.values() if isinstance(v, str)} if call else set()
    kernels = item.path.stem.endswith("_kernels") and "cpu" in words
    return bool(item.get_closest_marker("interpreted")) or kernels or "triton" in words


@pytest.fixture
def _bfloat16_rounds() -> Iterator[None]:
    """Round to bfloat16 in interpreted kernels, as a card does; the interpreter cuts off."""
    from tests.hostile import bfloat16_rounds

    with bfloat16_rounds():
        yield


@pytest.fixture
def few_digits() -> Iterator[None]:
    """Let runs on the digits be tested on 60 images of 599."""
    from tests.worlds import on_few_digits

    with on_few_digits():
        yield


@pytest.fixture(scope="module")
def few_digits_throughout() -> Iterator[None]:
    """Do the same for all tests of a file, and for what they share."""
    from tests.worlds import on_few_digits

    with on_few_digits():
        yield


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Register a model small enough to write to disk, with two tags."""
    import open_clip

    from tests.families import TEXT, VISION

    config = {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "nano", config)
    tags = {
        "openai": {"hf_hub": "nobody/nano/", "quick_gelu": True, "mean": (0.5,) * 3},
        "laion": {"hf_hub": "nobody/nano/", "std": (0.25,) * 3},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "nano", tags)
    return config


@pytest.fixture
def plots_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one plot for all: they take their time, and see no text but names."""
    from tests.results import drawn_once

    for home in ("fastfpl.report", "fastfpl.report.page"):
        for name in ("accuracy_plot", "clients_plot"):
            monkeypatch.setattr(
                f"{home}.{name}", lambda comparison, kind="png", **_: drawn_once(kind)
            )


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Give an empty store of features that writes a few rows at a time."""
    from fastfpl.features import FeatureStore
    from tests.stored import CHUNK

    return FeatureStore(tmp_path / "features", chunk=CHUNK)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat what tests of compiled kernels said: with xdist their output stays in the workers."""
    from tests.aot import SAYS

    lines = [
        line.removeprefix(SAYS)
        for report in terminalreporter.stats.get("passed", [])
        for line in report.capstdout.splitlines()
        if line.startswith(SAYS)
    ]
    if lines:
        terminalreporter.section("compiled kernels without a row in tests/compiled.json")
        for line in sorted(set(lines)):
            terminalreporter.write_line(line)
