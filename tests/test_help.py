"""Help, the list of methods, and the names that a shell completes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from fastfpl.cli.entry import group
from fastfpl.cli.flags import GROUPS, Grouped
from fastfpl.config import Settings
from fastfpl.methods import METHODS
from tests.command import call


def test_every_setting_is_in_one_group_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(set(Settings.model_fields) - {"method", "options"})
    for command in ("run", "compare", "profile"):
        code, out, _ = call(capsys, command, "--settings", "all")
        assert code == 0
        titles = [line for line in out.splitlines() if re.fullmatch(r"[A-Z][a-zA-Z, ]+:", line)]
        assert titles == [f"{title}:" for title in GROUPS]
        for inner in ("_COUNT", "INTEGER", "FLOAT", "BOOLEAN", "TEXT", "handbook"):
            assert inner not in out
        assert "--shots N|all " in out
        assert "--transductive yes|no " in out


def test_every_help_fits_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are named there in groups, and explained a group at a time."""
    import click

    def helps(command: click.Command, path: list[str]) -> Iterator[list[str]]:
        yield path
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from helps(inner, [*path, name])

    seen = list(helps(group, []))
    assert ["flower", "up"] in seen
    for path in seen:
        code, out, _ = call(capsys, *path, "--help")
        assert code == 0
        assert len(out.splitlines()) <= 55, path
        assert max(map(len, out.splitlines())) <= 80, path
    code, out, _ = call(capsys, "run", "--help")
    assert "  clients   --partition --partition-seed " in out
    assert " --memory " in out
    keys = re.findall(r"^  (\w+) +--", out.partition("Settings, explained")[2], re.MULTILINE)
    explained = []
    for key in keys:
        code, one, _ = call(capsys, "run", "--settings", key)
        assert code == 0
        assert len(one.splitlines()) <= 55
        explained += re.findall(r"^  .*?(--[a-z-]+)", one, re.MULTILINE)
    for name in set(Settings.model_fields) - {"method", "options"}:
        assert f"--{name.replace('_', '-')}" in explained
    code, _, err = call(capsys, "run", "--settings", "cliens")
    assert code == 2
    assert "is not one of 'data', 'clients', 'merging', 'privacy'" in err

    # a command may have none of a group
    @click.command(cls=Grouped)
    @click.option("--lr")
    def one(lr: str | None) -> None:
        """Do one thing."""

    monkeypatch.setitem(group.commands, "one", one)
    code, out, _ = call(capsys, "one", "--help")
    assert re.findall(r"^  (\w+) +--", out.partition("Settings, explained")[2], re.MULTILINE) == [
        "training"
    ]
    code, _, err = call(capsys, "one", "--settings", "clients")
    assert code == 2
    assert "fastfpl one has no settings of clients" in err


def test_methods_are_listed_with_everything_that_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = call(capsys, "methods")
    assert code == 0
    for name, method in METHODS.items():
        row = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert method.summary in row
        code, one, _ = call(capsys, "methods", name)
        assert code == 0
        for title in ("source:", "answers with:", "sees:", "sends:", "receives:"):
            assert f"\n{title}" in one
        for key, field in method.Options.model_fields.items():
            assert key in row
            assert field.description
            assert re.search(rf"^ *{key} .*{re.escape(field.description)}", one, re.MULTILINE)
    code, _, err = call(capsys, "methods", "pfedmop")
    assert code == 2
    assert "did you mean 'pfedmoap'" in err


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("run pfed", {"pfedmoap"}),
        ("compare promptfl promptf", {"promptfl", "promptfl-ft", "promptfolio"}),
        ("methods fedt", {"fedtpg"}),
        ("run promptfl --dataset digi", {"digits"}),
        ("data check cifar", {"cifar10", "cifar100"}),
        ("run promptfl --preset promptfl-n", {"promptfl-non-iid"}),
        ("presets promptfl-n", {"promptfl-non-iid"}),
        ("run promptfl --clip ti", {"tiny"}),
        ("doctor --clip RN50x", {"RN50x4", "RN50x4-quickgelu", "RN50x16", "RN50x64"}),
        ("run promptfl --as-released fedprox-no-gradient,fedprox", {"fedprox-no-gradient"}),
        ("run promptfl --scenario multi", {"multi-domain"}),
        ("run pfedmoap -o gate_", {"gate_width=", "gate_lr="}),
        ("compare fedprox fedpgp -o fedpgp.m", {"fedpgp.mu="}),
    ],
)
def test_a_shell_completes_names(
    line: str, names: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    monkeypatch.setenv("_FASTFPL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["fastfpl", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    code, out, _ = call(capsys)
    assert code == 0
    found = {entry.partition(",")[2].rpartition(",")[2] for entry in out.splitlines()}
    assert found >= names if "RN50x" in line else found == names
