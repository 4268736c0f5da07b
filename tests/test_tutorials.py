"""The tutorials do what they say: every block of them is run, in order and offline."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfpl.methods.own import KNOWN
from fastfpl.testing import check_method
from tests.pages import blocks_of, run_page
from tests.worlds import small_clip

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader's own folder, an empty cache, and nothing that reaches the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))


# its ten commands and scripts are a reader's: some ten seconds
@pytest.mark.slow
def test_your_own_images(tmp_path: Path) -> None:
    names = run_page(TUTORIALS / "own_images.md")
    assert names["said"].names == ["heart"]
    result = json.loads((tmp_path / "runs" / "emoji" / "result.json").read_text("utf-8"))
    assert result["data"]["clients"][2] == "samsung"
    assert (tmp_path / "runs" / "emoji" / "joined" / "mozilla.json").exists()


# it runs pytest twice, as its reader does
@pytest.mark.slow
def test_a_new_method(tmp_path: Path) -> None:
    try:
        run_page(TUTORIALS / "new_method.md")
        # what `pytest` without -k takes a minute for
        method = KNOWN["fed-calm"]
        check_method(method, clip=small_clip().to(dtype=torch.float64))
    finally:
        KNOWN.pop("fed-calm", None)
    results = [json.loads(p.read_text("utf-8")) for p in tmp_path.glob("runs/calm/*/result.json")]
    (calm,) = (r for r in results if r["method"] == "fed-calm")
    assert calm["settings"]["options"] == {"mu": 1.0}


def played(cells: list[str]) -> list[list[dict[str, Any]]]:
    """Run code as a notebook; return what each of its cells put out."""
    nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[test]"')
    nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[test]"')
    from jupyter_client.manager import AsyncKernelManager

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    # a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="k") as place:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
        kernel.connection_file = f"{place}/k.json"
        nbclient.NotebookClient(book, timeout=120, km=kernel).execute()
    return [list(cell.outputs) for cell in book.cells]


@pytest.mark.slow
def test_speeding_up_foreign_code() -> None:
    book = json.loads((TUTORIALS / "accelerate.ipynb").read_text("utf-8"))
    code = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in book["cells"])  # kept without
    said = "".join(o.get("text", "") for cell in played(code) for o in cell)
    assert "fastfpl: 1 swapped, 0 left" in said
    # a time is nobody's who shares the cores with other tests; that the fast pass ran is told
    assert re.search(r"[4-9] x fast, cut behind the EOT, \d+ leading rows shared", said), said
    assert "times as fast" in said


def test_blocks_that_are_not_run_say_why() -> None:
    """A page's block is run, written to the file it is, or says why not; every page has some."""
    for page in TUTORIALS.glob("*.md"):
        text = page.read_text("utf-8")
        assert len(blocks_of(page)) == text.count("\n```\n") - text.count("<!-- not run: ")
        assert len(blocks_of(page)) >= 6
