"""`fastfpl profile`: a trace, where the time goes, and the settings that it sets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastfpl.config import PROFILED, Settings
from tests.command import assert_a_line_a_round, call

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.mark.parametrize("method", ["pfedmoap", "zeroshot"])
def test_profile_writes_a_trace_and_prints_where_the_time_goes(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    quick = ["--dataset", "digits", "--clients", "2", "--shots", "4", "--n-ctx", "2"]
    quick += ["--batch-size", "4", "--threads", "1", "--cache", str(tmp_path / "cache")]
    quick += ["--steps", "2", "--top", "7", "--out", str(tmp_path / "p")]
    if method == "pfedmoap":
        quick += ["-o", "experts=2"]
    code, out, err = call(capsys, "profile", method, *quick)
    assert code == 0
    assert_a_line_a_round(err, method, 2)
    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert sum(name == "fastfpl: evaluation" for name in names) == 1
    steps = {"pfedmoap": 2, "zeroshot": 0}[method]
    for phase in ("text", "loss", "gradients", "update"):
        assert sum(name == f"fastfpl: {phase}" for name in names) == steps, phase
    assert any(str(name).startswith("aten::") for name in names)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["trace.json"]
    # what is printed is what was seen
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith(" evaluation")).split()[1] == "1"
    shown = lines[[line.split()[:1] == ["operator"] for line in lines].index(True) + 1 :]
    shown = [line.split() for line in shown[:7]]
    assert all(cells[-1] == "%" for cells in shown)
    shares = [float(cells[-2]) for cells in shown]
    assert shares == sorted(shares, reverse=True)
    assert 30 < sum(shares) <= 100.5
    assert "GPU" not in out
    assert re.search(r"^peak memory \d{2,} MiB$", out, re.MULTILINE)
    assert "encode_text by " in out
    assert ("gate_experts by " in out) == (method == "pfedmoap")  # the second round's
    assert lines[-1].endswith("trace.json")


def test_profile_takes_the_settings_of_a_run_but_those_it_sets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = call(capsys, "profile", "--help")
    assert code == 0
    out += call(capsys, "profile", "--settings", "all")[1]
    taken = set(re.findall(r"^  .*?--([a-z-]+)", out.partition("Options:")[2], re.MULTILINE))
    taken |= set(re.findall(r"^  --[a-z-]+, --([a-z-]+)", out, re.MULTILINE))
    mine = {name.replace("_", "-") for name in Settings.model_fields}
    mine -= {"method", "options"} | {name.replace("_", "-") for name in PROFILED}
    more = {
        "memory",
        "preset",
        "config",
        "option",
        "out",
        "cache",
        "steps",
        "top",
        "help",
        "settings",
    }
    assert taken == mine | more
    code, _, err = call(capsys, "profile", "promptfl", "--steps", "0")
    assert (code, err) == (2, "error: fastfpl.profile: steps must be at least 1; got 0\n")
    (tmp_path / "file").touch()
    code, _, err = call(capsys, "profile", "promptfl", "--out", str(tmp_path / "file"))
    assert code == 2
    assert "fastfpl.profile: out must be a folder; got the file" in err
