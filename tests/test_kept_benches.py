"""Benches of many runs: what they keep, and the tables that they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import accuracy_against_epsilon, attacks, first_command, flower_overhead
from bench.kept import between, kept
from fastfpl.config import make_settings
from fastfpl.errors import InputError

ROOT = Path(__file__).parent.parent


def test_a_bench_keeps_what_it_has_played_and_plays_what_is_another(tmp_path):
    played = []

    def play(folder):
        played.append(folder)
        return {"accuracy": 0.5}

    for weights in ("a", "a", "b"):
        assert kept(tmp_path, "x", {"weights": weights}, play) == {"accuracy": 0.5}
    assert len(set(played)) == 2
    (page := tmp_path / "page.md").write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    between(page, "x", "new")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"
    with pytest.raises(InputError, match="must have the markers <!-- y --> and"):
        between(page, "y", "new")


def test_a_kept_run_that_is_another_is_refused(tmp_path):
    kept(tmp_path, "x", {"weights": "a"}, lambda folder: {"accuracy": 0.5})
    (path,) = tmp_path.glob("x-*.json")
    path.write_text(json.dumps({"facts": {"weights": "b"}, "figures": {}}))
    with pytest.raises(InputError, match=r"must be of .*; got"):
        kept(tmp_path, "x", {"weights": "a"}, lambda folder: {})


def test_the_page_of_privacy_has_the_markers_of_both_tables(tmp_path):
    page = tmp_path / "privacy.md"
    page.write_text((ROOT / "docs" / "privacy.md").read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("attacks", "epsilon"):
        between(page, name, f"table of {name}")
        assert f"table of {name}" in page.read_text(encoding="utf-8")


def test_the_table_of_attacks_has_a_row_a_rule():
    columns = [("labels", 0.1), ("noise", 0.3)]
    found = {
        ("iid", rule, attack, share): [{"accuracy": 0.5 + 0.01 * number + share / 10}] * 2
        for number, rule in enumerate(attacks.RULES)
        for attack, share in (("none", 0.0), *columns)
    }
    lines = attacks.table(found, ["iid"], columns).splitlines()
    assert lines[0] == "| iid, 2 seeds | nobody hostile | labels turned, 10 % | noise, 30 % |"
    assert lines[2] == "| mean | 50.0 ± 0.0 | 51.0 ± 0.0 | 53.0 ± 0.0 |"
    assert len(lines) == 2 + len(attacks.RULES)


def test_the_rules_of_the_attacks_are_settings_that_bear_three_of_ten():
    for rule in attacks.RULES.values():
        settings = make_settings({"method": "promptfl", **rule})
        assert settings.krum_malicious in (None, 3)
    assert max(attacks.SHARES) * attacks.CLIENTS == 3
    for seed in range(5):
        few, many = (attacks.hostile_of(seed, 10, share) for share in attacks.SHARES)
        assert (len(few), len(many)) == (1, 3)
        assert few < many


def test_the_table_of_epsilon_has_a_row_a_multiplier():
    protocols = ("a", "b")
    found = {
        name: {
            noise: [{"accuracy": 0.25, "epsilon": None if noise is None else 10 / noise}]
            for noise in accuracy_against_epsilon.NOISES
        }
        for name in protocols
    }
    lines = accuracy_against_epsilon.table(found, 1).splitlines()
    assert lines[0] == "| noise, 1 seed | a: ε | accuracy | b: ε | accuracy |"
    assert lines[2] == "| 16 | 0.625 | 25.0 | 0.625 | 25.0 |"
    assert lines[-1] == "| none | ∞ | 25.0 | ∞ | 25.0 |"
    base = {"method": "promptfl", **accuracy_against_epsilon.BUDGET}
    for name in accuracy_against_epsilon.PROTOCOLS:
        for noise in accuracy_against_epsilon.NOISES:
            made = make_settings(accuracy_against_epsilon.settings_of(base, name, noise))
            assert made.dp_noise == noise


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is counted on Linux alone")
def test_memory_is_that_of_the_whole_tree():
    code = "import time; kept = bytearray(60_000_000); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    name = "flower-supernode"  # as the real one has it in its command line
    node = subprocess.Popen([sys.executable, "-c", child, name], start_new_session=True)
    watch = flower_overhead.Watch()
    try:
        for _ in range(200):
            watch.look()
            if max(watch.nodes.get(node.pid, [0])) > 60_000_000:
                break
            watch._end.wait(0.1)
        assert 60_000_000 < max(watch.nodes[node.pid]) < 300_000_000
        assert set(watch.nodes) == {node.pid}
        assert max(watch.together) >= max(watch.nodes[node.pid])
    finally:
        os.killpg(node.pid, 9)
        node.wait()


def test_time_goes_to_the_inner_part():
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = first_command.Clock(lambda: next(now))  # begins at 0
    with clock.during("cache"):  # at 1
        counted = clock.counted("tower", lambda x: x + 1)
        assert counted(1) == 2  # from 3 to 6
    clock.end()
    spent = {part: seconds for part, seconds in clock.seconds.items() if seconds}
    assert spent == {"else": 1 + 5, "cache": 2 + 4, "tower": 3}
    lines = first_command.table(clock.seconds).splitlines()
    assert lines[2].startswith(f"| {first_command.PARTS['cache']} | 6.0 | 40 % |")
    assert lines[-2].startswith(f"| {first_command.PARTS['else']} | 6.0 | 40 % |")
    assert lines[-1] == "| **all** | 15.0 | |"


def test_the_first_command_is_the_readmes():
    given = first_command.words()
    assert given[:2] == ["compare", "zeroshot"]
    assert "--out" not in given
    assert "<!-- first command -->\n" in (ROOT / "docs" / "running.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_part_of_the_first_command_is_seen(tmp_path):
    small = ["compare", "local", "fedotp", "--dataset", "digits", "--clients", "2", "--shots", "2"]
    small += ["--rounds", "1", "--local-epochs", "1", "--threads", "1"]
    code = "import json, bench.first_command as b; b.table = json.dumps; "
    code += f"b.words = lambda: {small}; b.main(['--print'])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    # every name that is counted is still the one that is called
    assert {part for part, seconds in told.items() if seconds > 0} == set(first_command.PARTS)
