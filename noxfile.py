"""The suite over toolchains: all by `nox`, one by `nox -s "tests(torch 2.11, Python 3.10)"`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = False

#: torch -> Python; every torch that is supported with one Python, every Python with one torch.
TOOLCHAINS = [("2.11", "3.10"), ("2.13", "3.12"), ("2.14", "3.11"), ("", "3.13")]
#: Versions of Triton whose figures are in tests/compiled.json.
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


@nox.session(venv_backend="venv")
@nox.parametrize(
    ("torch", "python"),
    [nox.param(*pair, id=f"torch {pair[0] or 'newest'}, Python {pair[1]}") for pair in TOOLCHAINS],
)
def tests(session: nox.Session, torch: str) -> None:
    """Run the suite with one torch (the newest that pip finds if none is named)."""
    session.env["FASTFPL_REQUIRE_NATIVE"] = "1"
    pins = [f"torch=={torch}.*"] if torch else []
    session.install("-e", ".[test]", *pins)
    session.run("pytest", "-n", "2", "-m", "", *session.posargs)


@nox.session(venv_backend="venv", python="3.10")
def oldest(session: nox.Session) -> None:
    """Run the suite with the oldest version of every dependency that pyproject.toml admits."""
    session.install("uv")
    pins = Path(session.create_tmp()) / "oldest.txt"
    session.run(
        *("uv", "pip", "compile", "pyproject.toml", "--extra", "test", "--python-version", "3.10"),
        *("--resolution", "lowest-direct", "--quiet", "--output-file", str(pins)),
    )
    session.install("-r", str(pins))
    session.env["FASTFPL_REQUIRE_NATIVE"] = "1"
    session.install("--no-deps", "--no-build-isolation", "-e", ".")
    session.run("pytest", "-n", "2", "-m", "", *session.posargs)


@nox.session(venv_backend="venv")
def extras(session: nox.Session) -> None:
    """Run the tests that are skipped without libraries that [test] does not bring."""
    session.env["FASTFPL_REQUIRE_NATIVE"] = "1"
    # datasets brings pyarrow
    session.install("-e", ".[test,hf,mlflow,onnx,wandb]", "onnxruntime")
    needs = "onnx or parquet or a_set_of_the_datasets_library or wandb or mlflow"
    session.run("pytest", "-n", "2", "-k", needs, *session.posargs)


@nox.session(venv_backend="venv")
def flower(session: nox.Session) -> None:
    """Run the tests that need flwr: apps, real processes on loopback, secure aggregation."""
    session.env["FASTFPL_REQUIRE_NATIVE"] = "1"
    session.install("-e", ".[test,flower,dp]")
    files = sorted(map(str, Path("tests").glob("test_flower*.py")))
    session.run("pytest", "-n", "2", "-m", "", *files, *session.posargs)


@nox.session(venv_backend="venv")
def docs(session: nox.Session) -> None:
    """Build the site strictly into build/site; `nox -s docs -- serve` shows it and watches."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]))


@nox.session(venv_backend="venv")
def card(session: nox.Session) -> None:
    """Run what a machine with a card selects, with torch pretending to see one."""
    session.env["FASTFPL_REQUIRE_NATIVE"] = "1"
    session.install("-e", ".[test]")
    chosen = ("-p", "tests.pretended", "-m", "not gpu and not slow")
    session.run("pytest", "-n", "2", *chosen, *session.posargs)


@nox.session(venv_backend="venv")
def compiled(session: nox.Session) -> None:
    """Compile every kernel with every Triton, and write the figures into tests/compiled.json."""
    session.install("-e", ".[test]")
    for version in TRITONS:
        with tempfile.TemporaryDirectory() as folder:
            session.install("--no-deps", "--target", folder, f"triton=={version}")
            session.run("python", "-m", "tests.aot", "--write", "--triton", folder, silent=True)
