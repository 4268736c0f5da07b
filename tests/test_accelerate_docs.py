"""What the pages about other people's code and about the pieces show does what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "coop_style.py"
PATCH = (ROOT / "docs" / "examples" / "accelerate.patch").read_text(encoding="utf-8")


def patched(text: str) -> str:
    """Apply the patch: every hunk must be found once, and is exchanged."""
    for hunk in re.split(r"^@@.*@@.*\n", PATCH, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_patch_changes_at_most_five_lines():
    changed = [line for line in PATCH.splitlines()[2:] if line[0] in "+-"]
    added = [line for line in changed if line[0] == "+"]
    assert len(added) <= 5
    assert len(changed) - len(added) <= 1


def test_the_patched_script_learns_the_same(tmp_path, monkeypatch, capsys):
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1},
        "text_cfg": {"width": 32, "heads": 4, "layers": 2},
    }
    config["vision_cfg"]["head_width"] = 16
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "nano", config)
    (tmp_path / "patched.py").write_text(patched(EXAMPLE.read_text(encoding="utf-8")))
    losses = []
    for path in (EXAMPLE, tmp_path / "patched.py"):
        found, _ = module_of(path).main("nano", "cat, sea horse, oak tree", 4, 8, steps=3)
        losses.append(torch.tensor(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    said = capsys.readouterr().out
    assert "fastfpl: 1 swapped, 0 left" in said
    assert "3 x fast, cut behind the EOT, 5 leading rows shared" in said


def test_the_page_shows_the_patch():
    page = (ROOT / "docs" / "accelerate.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    for line in shown.splitlines():
        assert line == "..." or line in PATCH.splitlines(), line
    for line in PATCH.splitlines()[2:]:
        if line[0] in "+-":
            assert line in shown.splitlines(), line


@pytest.mark.parametrize("page", ["accelerate.md", "pieces.md"])
def test_linked_files_are_there(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_the_pieces_run():
    page = (ROOT / "docs" / "pieces.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 8
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/pieces.md", "exec"), names)  # the page's own lines
