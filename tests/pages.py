"""The blocks of a page, run in their order as a reader would."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Block", "blocks_of", "run_page"]

_BLOCK = re.compile(
    r"^(?P<skip><!-- not run: .+ -->\n)?```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code: its language, the file that it is (``title="..."``), its text."""

    kind: str
    title: str | None
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Return the page's blocks but those under ``<!-- not run: why -->``."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(b["kind"], b["title"], b["text"]) for b in found if b["skip"] is None]


def run_page(page: Path) -> dict[str, Any]:
    """Run a page in the working folder; return the names that its Python blocks left.

    Python blocks share their names; one with a title is written to that file instead. Lines of a
    bash block are commands: ``fastfpl ...`` runs in this process, everything else in bash. Blocks
    of other kinds are for reading.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            exec(compile(block.text, str(page), "exec"), names)  # the page's own lines
        elif block.kind == "bash":
            for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
                command(line)
    return names


def command(line: str) -> str:
    """Run one line of a shell, to its end; return what it printed to standard output."""
    words = shlex.split(line, comments=True)
    if words[:1] != ["fastfpl"]:
        beside = str(Path(sys.executable).parent)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            env={**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout
    from fastfpl.cli import main

    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        code: Any = 0
        try:
            main(words[1:])
        except SystemExit as end:
            code = end.code
    assert code in (0, None), f"{line}\n{said.getvalue()}\n{told.getvalue()}"
    return said.getvalue()
