"""pytest runs the tests; pytest --benchmark runs the benches, and nothing else."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
#: Packages that benches compare with.
RIVALS = ("POT", "geomloss")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the project's own flag, beside pytest-benchmark's options."""
    parser.getgroup("fastfpl").addoption(
        "--benchmark",
        action="store_true",
        default=False,
        help="run the benches in bench/ only, and print their table",
    )
    parser.getgroup("fastfpl").addoption(
        "--all-sizes",
        action="store_true",
        default=False,
        help="with --benchmark: every size of every bench, not only those along the main axes",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Point a bare ``pytest --benchmark`` at bench/, with a clock that waits for the device."""
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs the package pytest-benchmark")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark must run alone; got -n")
    # what a suite's worker starts is no worker; pytest-benchmark would believe it and time nothing
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = [str(ROOT / "bench")]
    if config.option.benchmark_timer == "time.perf_counter":  # the default times only a launch
        config.option.benchmark_timer = "bench.clock.timer"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep benches only, whatever paths were named with ``--benchmark``."""
    if config.getoption("--benchmark"):
        inside = [item for item in items if ROOT / "bench" in item.path.parents]
        config.hook.pytest_deselected(items=[item for item in items if item not in inside])
        items[:] = inside


def _machine() -> dict[str, Any]:
    """Say what a number means nothing without."""
    import torch

    from fastfpl.ops import native

    gpu = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions("triton", "numpy", "open_clip_torch", "transformers", *RIVALS),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "native": native.missing() or "built",
    }


def _versions(*names: str) -> dict[str, str]:
    installed = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


# pytest-benchmark is optional: without it these two are never called
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Describe the machine in the head of a JSON file."""
    machine_info["fastfpl"] = _machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Repeat machine and commit in every row, so that a row can be quoted alone."""
    commit = output_json["commit_info"]
    for row in output_json["benchmarks"]:
        row["extra_info"] |= {
            "machine": output_json["machine_info"]["fastfpl"],
            "commit": commit.get("id"),
            "dirty": commit.get("dirty"),
        }
