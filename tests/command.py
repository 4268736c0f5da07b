"""The command `fastfpl` as tests call it, in this process and in one of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fastfpl.cli import main
from tests.warm import warm_python

QUICK = (
    *("--dataset", "digits", "--clients", "2", "--rounds", "2", "--local-epochs", "1"),
    *("--shots", "2", "--n-ctx", "2", "--threads", "1"),
)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, what is printed, what is said beside it."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def told(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Run the command as a person does: exit code, what is printed, what is said beside it."""
    done = subprocess.run(
        [*warm_python(), "-m", "fastfpl.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def assert_a_line_a_round(err: str, label: str, rounds: int) -> None:
    """A file of progress: one line a round, and nothing that moves a cursor."""
    lines = err.splitlines()
    assert len(lines) == rounds, err
    for number, line in enumerate(lines, 1):
        figure = r"accuracy \d+\.\d %"
        assert re.fullmatch(rf"{label}  round {number}  {figure}  \d+\.\d s", line), line


def not_to_be_called(*arguments: object, **more: object) -> None:
    raise AssertionError("the weights were read")
