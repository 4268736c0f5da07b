"""What is printed: on every encoding, at every width, and whatever a name holds."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from fastfpl import terminal
from fastfpl.cli import main
from fastfpl.report.table import Sheet
from fastfpl.terminal import plain, sayable
from tests.results import pair, save

ENCODINGS = ("cp949", "cp932", "latin-1", "cp437", "cp850", "ascii", "utf-8")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ViT-B/16, 60.0 ± 1.0 é 漢", "ViT-B/16, 60.0 ± 1.0 é 漢"),
        ("a\x1b[31mb\x07", "a\\x1b[31mb\\x07"),
        ("a\x9b2Jb", "a\\x9b2Jb"),
        ("a\r\nb\tc", "a  b c"),
        ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),
        ("a\udcffb", "a\\udcffb"),
    ],
)
def test_controls_are_spelled(text: str, line: str) -> None:
    assert plain(text) == line
    line.encode()


def told(encoding: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """What a command writes to streams of an encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    code = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    shown = []
    for stream in (out, err):
        assert stream.errors == "strict"  # nothing of the caller's is changed for good
        stream.flush()
        shown.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    return code, shown[0], shown[1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_ends_a_command(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastfpl.report.page.accuracy_plot", lambda *_, **__: b"")
    monkeypatch.setattr("fastfpl.report.page.clients_plot", lambda *_, **__: b"")
    save(pair((0, 1)), tmp_path)
    for path in tmp_path.glob("*/result.json"):
        path.write_text(path.read_text().replace('"0.1.0"', '"0.1 \\u6f22\\u2013\\u00e9"'))
    code, out, err = told(encoding, monkeypatch, "report", str(tmp_path))
    assert (code, err) == (0, "")
    assert "zeroshot" in out
    assert "65.0" in out
    assert ("±" in out) == (encoding != "ascii")
    assert ("+/-" in out) == (encoding == "ascii")
    assert str(tmp_path / "index.html") in out.splitlines()  # one line, however long
    assert (tmp_path / "index.html").is_file()
    for command in ("quirks", "presets", "data list"):
        code, out, err = told(encoding, monkeypatch, *command.split())
        assert (code, err) == (0, "")
        assert len(out.splitlines()) > 5
    code, out, err = told(encoding, monkeypatch, "report", str(tmp_path / "\u6f22\u2013"))
    assert (code, out) == (2, "")
    assert err.startswith("error: fastfpl.load_comparisons: folder must exist")


def test_no_encoding_ends_a_process(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "fastfpl.cli", "doctor"],
        env={**os.environ, "PYTHONIOENCODING": "cp949", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert b"encode_text" in shown.stdout
    assert shown.stderr == b""


def test_streams_are_as_before() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    old, sys.stdout = sys.stdout, stream
    try:
        with sayable():
            sys.stdout.write("± \u2013 …\n")
        assert stream.errors == "strict"
        with pytest.raises(UnicodeEncodeError):
            sys.stdout.write("±")
    finally:
        sys.stdout = old
    stream.flush()
    assert stream.buffer.getvalue() == b"+/- - ...\n"  # type: ignore[attr-defined]


def test_a_pipe_is_as_wide_as_what_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal.console().print(terminal.table("a" * 300, "b"))
    assert "a" * 300 + "  b" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "40")
    terminal.console().print(terminal.table("a" * 300, "b"))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) == 40
    assert shown.count("a") == 300


def test_what_a_console_prints_is_neither_markup_nor_a_control(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = terminal.table("[b]x", "y")
    table.add_row("[/b]", ":smile: \x1b[2J")
    terminal.console().print(table)
    terminal.say("y/[/b]x\x1b]0;title\x07")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    for text in ("[b]x", "[/b]", ":smile: \\x1b[2J", "y/[/b]x\\x1b]0;title\\x07"):
        assert text in out


@pytest.mark.parametrize("width", [1000, 120, 80, 60, 40, 24, 12])
def test_no_width_cuts_a_table(width: int) -> None:
    domains = [f"branch {i}" for i in range(8)]
    names = ["fedapt-unsupervised", "漢字漢字漢字漢字", "[b]x[/b]"]
    lines = [[name, *(f"{i + 1},44{j}" for j in range(8))] for i, name in enumerate(names)]
    sheet = Sheet(
        ["method", *(d.replace(" ", "\n") for d in domains)],
        lines,
        title="what it is",
        notes=["first-note", "second-note"],
        cautions=[("severe-caution", True)],
        bold=frozenset({1}),
    )
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(sheet)
    shown = out.getvalue()
    assert max(map(cell_len, shown.splitlines())) <= width
    assert "…" not in shown
    bare = "".join(shown.split())
    for text in (*names, "severe-caution", "first-note", "second-note", "whatitis"):
        assert text in bare
    for line in lines:
        for text in line[1:]:
            # a figure is in one piece wherever it fits
            assert text in (shown if width >= 24 else bare)
    assert all(str(i) in bare for i in range(8))
    if width >= 40:  # figures still stand in lines of a table
        heads = [row for row in shown.splitlines() if row.startswith("method")]
        assert len(heads) == (1 if width >= 80 else 2 if width == 60 else 3)
