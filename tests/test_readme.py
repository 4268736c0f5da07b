"""What the README shows does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import fastfpl
from fastfpl.cli.new import write_method
from fastfpl.config import load_preset
from fastfpl.methods import find_method
from fastfpl.methods.own import KNOWN
from fastfpl.testing import check_method
from tests.worlds import figures, small_clip

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_method_is_the_template_and_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(\"\"\"fed-half: .*?)```", README, re.DOTALL)
    files = {path.name: path for path in write_method("fed-half", tmp_path / "fed-half")}
    assert files["fed_half.py"].read_text(encoding="utf-8") == code
    same: dict[str, Any] = {"dataset": "digits", "clients": 2, "rounds": 2, "local_epochs": 1}
    same |= {"shots": 2, "n_ctx": 4, "cache": tmp_path / "cache"}
    spec = f"{files['fed_half.py']}:FedHalf"
    result = fastfpl.run(spec, **same, out=tmp_path / "run")
    assert result.method == "fed-half"
    # half of four vectors travels, both ways; all else is the library's own method
    half = 2 * 2 * 128 * 4
    assert [(r["bytes_up"], r["bytes_down"]) for r in result.rounds] == [(half, half)] * 2
    own = fastfpl.run("prompt-fedper", **same, out=tmp_path / "own")
    assert figures(own) == figures(result)
    check_method(find_method("fed-half"), clip=small_clip().to(dtype=torch.float64))
    del KNOWN["fed-half"]


def test_every_command_of_the_readme_is_known() -> None:
    commands = set(re.findall(r"^fastfpl (\w+)", README, re.MULTILINE))
    assert commands <= {
        *("run", "compare", "report", "data", "doctor", "presets", "profile", "methods", "new"),
        *("predict", "export", "adapt", "serve", "encode"),
    }
    for name in re.findall(r"--preset (\S+)", README):
        load_preset(name)


def test_every_linked_file_is_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_ci_finds_the_test_command() -> None:
    found = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert found is not None
    assert found[1].splitlines()[-1].startswith("pytest")
