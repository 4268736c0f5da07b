"""Methods and data sets from outside: a class, a file, a module, an installed package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastfpl
from fastfpl.cli.entry import group, main
from fastfpl.cli.names import Name, option_keys
from fastfpl.cli.new import write_method
from fastfpl.config import Settings
from fastfpl.data import dataset_names, load_dataset
from fastfpl.errors import InputError, KindError, Missing
from fastfpl.methods import METHODS, Method, PromptFL, find_method, method_name, method_names
from fastfpl.methods.own import KNOWN, source_of
from fastfpl.report import load_comparisons, write_report
from tests.worlds import TINY_RUN, figures

SHORT = {**TINY_RUN, "rounds": 1, "local_epochs": 1}
FLAGS = ["--dataset", "digits", "--clients", "2", "--shots", "2", "--n-ctx", "2"]
FLAGS += ["--local-epochs", "1"]

MINE = '''
from pydantic import Field

from fastfpl.methods import Options, PromptFL


class Mine(PromptFL):
    """PromptFL under another name."""

    name = "mine"
    summary = "as PromptFL"

    class Options(Options):
        weight: float = Field(1.0, gt=0, description="nothing")
'''


# a real tower encodes all test images, and none of them is the point
pytestmark = pytest.mark.usefixtures("few_digits_throughout")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Forget what a test made known."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(KNOWN), set(sys.modules)
    KNOWN.clear()
    yield
    KNOWN.clear()
    KNOWN.update(before[0])
    for name in set(sys.modules) - before[1]:
        if name.startswith("fastfpl_own_"):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "methods/mine.py"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


def install(folder: Path, monkeypatch, **groups: str) -> None:
    """Put a package's entry points where Python looks for them, as pip does."""
    info = folder / "thirdparty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    text = "".join(f"[fastfpl.{group}]\n{lines}\n" for group, lines in groups.items())
    (info / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


# -- a class ---------------------------------------------------------------------------------------


class Renamed(PromptFL):
    """PromptFL under another name."""

    name = "renamed"
    summary = "as PromptFL"


def test_a_class_runs_resumes_and_is_compared(tmp_path):
    cache = {"cache": tmp_path / "cache"}
    whole = fastfpl.run(Renamed, **TINY_RUN, **cache)
    plain = fastfpl.run("promptfl", **TINY_RUN, **cache)
    assert whole.method == "renamed"
    assert figures(whole) == figures(plain)
    assert whole.data["method_source"] == source_of(Renamed)
    assert whole.data["method_source"]["class"] == "Renamed"
    assert "method_source" not in plain.data
    out = tmp_path / "run"
    fastfpl.run(Renamed, **{**TINY_RUN, "rounds": 1}, out=out, **cache)
    rest = fastfpl.run(Renamed, **TINY_RUN, out=out, resume=True, **cache)
    assert figures(rest) == figures(whole)
    assert fastfpl.load(out).settings.method == "renamed"
    both = fastfpl.compare(["promptfl", Renamed], **SHORT, out=tmp_path / "both", **cache)
    assert list(both.results) == ["promptfl", "renamed"]
    (read,) = load_comparisons(tmp_path / "both")
    write_report(read, tmp_path / "page")
    assert "renamed" in (tmp_path / "page/index.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"each once; got \['renamed', 'renamed'\]"):
        fastfpl.compare([Renamed, Renamed], **SHORT)


def test_what_is_no_method_is_refused():
    class NoStart(Method):
        name = "none"
        summary = "nothing"

    def named(**more):
        return type("Named", (PromptFL,), more)

    for kind, error, sentence in (
        (NoStart, InputError, "NoStart must have every verb; got none for start"),
        (dict, KindError, "must be a name or a subclass of fastfpl.methods.Method; got"),
        (3, KindError, "got 3"),
        (named(name="promptfl"), InputError, "must not be that of a method of the library"),
        (named(name="a/b"), InputError, "must be letters, digits.*; got 'a/b'"),
        (named(name=""), InputError, "must be letters, digits.*; got ''"),
        (named(name=None), InputError, r"Named.name must be a text; got None"),
        (named(name="x", summary=3), InputError, r"Named.summary must be a text; got 3"),
    ):
        with pytest.raises(error, match=sentence):
            fastfpl.run(kind, **SHORT)
    # the library's own class is its own
    assert method_name(PromptFL) == "promptfl"
    assert "promptfl" not in KNOWN


def test_another_class_of_the_name_does_not_go_on(tmp_path):
    out = tmp_path / "run"
    shared = {"out": out, "cache": tmp_path / "cache"}
    space: dict = {}

    def defined(rate):
        # as in a notebook: no file, no module
        code = f"class Cell(PromptFL):\n    name = 'cell'\n    summary = 'x'\n    rate_ = {rate}\n"
        exec(code, {"PromptFL": PromptFL, "__name__": "__main__"}, space)
        return space["Cell"]

    fastfpl.run(defined(1), **SHORT, **shared)
    more = {**SHORT, "rounds": 2, "resume": True, **shared}
    with pytest.raises(
        InputError, match=r"cell must be the one that .* was made with, Cell of __m"
    ):
        fastfpl.run(defined(2), **more)
    with pytest.raises(InputError, match=r"fastfpl\.load: cell must be the one that"):
        fastfpl.load(out)
    assert len(fastfpl.run(defined(1), **more).rounds) == 2
    KNOWN.clear()
    with pytest.raises(
        InputError, match=r"cell, must be known; it is Cell of __main__, source .*: name it"
    ):
        fastfpl.load(out)


# -- a file, a module ------------------------------------------------------------------------------


def test_a_class_in_a_file_runs_resumes_and_is_reported(tmp_path, file, capsys):
    out, cache = tmp_path / "run", ["--cache", str(tmp_path / "cache")]
    first = ["run", f"{file}:Mine", *FLAGS, "--out", str(out), *cache, "-o", "weight=2.5"]
    main([*first, "--rounds", "1"])
    main([*first, "--rounds", "2", "--resume"])
    content = json.loads((out / "result.json").read_text())
    assert content["method"] == content["settings"]["method"] == "mine"
    assert content["settings"]["options"] == {"weight": 2.5}
    assert content["data"]["method_source"]["module"] == "mine.py"
    assert len(content["rounds"]) == 2
    # a process that never saw the file can show it
    KNOWN.clear()
    main(["report", str(out)])
    assert "mine" in capsys.readouterr().out
    head = json.loads((out / "checkpoint.json").read_text())
    assert head["facts"]["method_source"]["class"] == "Mine"
    # other source is another method
    file.write_text(MINE.replace("as PromptFL", "as PromptFL, almost"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*first, "--rounds", "3", "--resume"])
    assert ended.value.code == 2
    assert re.search(
        r"mine must be the one that .* was made with, Mine of mine.py, source [0-9a-f]{12}; got "
        r"Mine of mine.py, source [0-9a-f]{12}: put its source back, or use another out",
        capsys.readouterr().err,
    )


def test_a_file_that_is_edited_is_read_again_but_not_in_the_middle_of_a_run(tmp_path, file):
    spec, cache = f"{file}:Mine", tmp_path / "cache"
    first = find_method(method_name(spec))
    assert find_method(method_name(spec)) is first

    def edit(label, row):
        file.write_text(MINE + f"# {label}\n")

    out = tmp_path / "run"
    result = fastfpl.run(spec, **TINY_RUN, out=out, cache=cache, on_round=edit)
    assert result.data["method_source"] == source_of(first)
    assert json.loads((out / "checkpoint.json").read_text())["facts"]["method_source"] == source_of(
        first
    )
    second = find_method(method_name(spec))
    assert second is not first
    assert source_of(second) != source_of(first)


def test_it_is_compared_profiled_and_shown_by_its_file(tmp_path, file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = f"{file}:Mine"
    more = ["--cache", "cache", "--rounds", "1"]
    main(["compare", "promptfl", spec, *FLAGS, *more, "-o", "mine.weight=2"])
    assert (tmp_path / "runs/compare-digits/mine-seed0/result.json").exists()
    main(["methods", spec])
    shown = capsys.readouterr().out
    assert "mine: as PromptFL" in shown
    assert "weight" in shown
    assert [key for key, _ in option_keys(spec)] == ["weight"]


def test_a_module_is_found_from_here(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "beside.py").write_text("from mine import Mine\n")
    assert method_name("beside:Mine") == "mine"
    assert find_method("mine").__module__ == "mine"
    for name in ("mine", "beside"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("spec", "error", "sentence"),
    [
        ("nowhere.py:Mine", Missing, "must be in a file that is there; got nowhere.py"),
        ("no.module:Mine", Missing, "must be in a module that is there; got 'no.module'"),
        ("mine.py:Other", InputError, "must hold the class Other; got PromptFL, Mine in it"),
        ("mine.py:", InputError, "must read path/to/mine.py:MyMethod or package.module:MyMethod"),
        ("mine.py:a b", InputError, "must read path/to/mine.py:MyMethod"),
        ("wrong.py:Mine", InputError, "wrong.py must be importable; got SyntaxError"),
        ("needs.py:Mine", InputError, "needs.py must be importable; got ModuleNotFoundError"),
        ("mine.py:Field", KindError, "must be a name or a subclass"),
    ],
)
def test_what_cannot_be_imported_is_said(file, monkeypatch, spec, error, sentence):
    monkeypatch.chdir(file.parent)
    (file.parent / "wrong.py").write_text("class Mine(:\n")
    (file.parent / "needs.py").write_text("import nothing_of_the_sort\n")
    with pytest.raises(error, match=sentence):
        method_name(spec)
    assert not KNOWN
    with pytest.raises(InputError, match=r"must be named with its class; .* write mine.py:MyMetho"):
        find_method("mine.py")


# -- an installed package --------------------------------------------------------------------------


def test_an_installed_package_adds_methods_and_data_sets(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "site"
    install(
        folder,
        monkeypatch,
        methods="mine = thirdparty:Mine\nbroken = thirdparty_gone:Mine\nother = thirdparty:Mine",
        datasets="ours = thirdparty:load\nempty = thirdparty:nothing",
    )
    (folder / "thirdparty.py").write_text(
        MINE
        + "from fastfpl.data import load_dataset\n"
        + "def load(root):\n    return load_dataset('digits')\n"
        + "def nothing(root):\n    return None\n"
    )
    assert {"mine", "broken"} <= set(method_names())
    assert {"ours", "empty"} <= set(dataset_names())
    assert "thirdparty" not in sys.modules  # names cost no import
    assert find_method("mine").summary == "as PromptFL"
    assert load_dataset("ours").name == "digits"
    with pytest.raises(InputError, match=r"'broken' of thirdparty must be importable from"):
        find_method("broken")
    with pytest.raises(InputError, match=r"'other' must lead to a method of that name; got 'mine'"):
        find_method("other")
    with pytest.raises(
        InputError, match=r"empty of thirdparty:nothing must give a fastfpl.data.Da"
    ):
        load_dataset("empty")
    with pytest.raises(InputError, match=r"did you mean 'mine'"):
        find_method("mime")
    # everybody knows them
    for kind, name in (("method", "mine"), ("dataset", "ours")):
        found = Name(kind).shell_complete(None, None, name[:2])  # type: ignore[arg-type]
        assert name in [item.value for item in found]
    for command in (["run", "--help"], ["methods"], ["doctor"], ["data", "list"]):
        main(command)
        shown = capsys.readouterr().out
        assert ("ours" if command[0] == "data" else "mine") in shown
    out = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    flags = ["--dataset", "ours", *FLAGS[2:]]
    main(["run", "mine", *flags, *out, "--rounds", "1"])
    main(["run", "mine", *flags, *out, "--rounds", "2", "--resume"])
    content = json.loads((tmp_path / "run/result.json").read_text())
    assert content["settings"]["dataset"] == "ours"
    assert content["data"]["method_source"]["module"] == "thirdparty"
    assert fastfpl.load(tmp_path / "run").settings.method == "mine"
    monkeypatch.delitem(sys.modules, "thirdparty")


def test_names_of_the_library_are_its_own(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, methods="promptfl = nowhere:Mine")
    assert find_method("promptfl") is PromptFL
    assert method_names().count("promptfl") == 1
    assert set(METHODS) <= set(method_names())
    assert Settings(method="promptfl").method == "promptfl"


# -- the template ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_template_passes_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from click.testing import CliRunner

    ended = CliRunner().invoke(group, ["new", "method", "fed-half"])
    assert ended.exit_code == 0
    folder = tmp_path / "fed-half"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("README.md", "fed_half.py", "fed_half_reference.py", "pyproject.toml"),
        "test_fed_half.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
    # its package, as pip would install it
    text = (folder / "pyproject.toml").read_text()
    (point,) = re.findall(r'entry-points."fastfpl.methods"\]\n"fed-half" = "(.*)"', text)
    install(folder, monkeypatch, methods=f"fed-half = {point}")
    assert find_method("fed-half").__name__ == "FedHalf"
    for name in [name for name in sys.modules if name.startswith("fed_half")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Fed", "must be small letters, digits and hyphens"),
        ("../x", "must be small letters"),
        ("1x", "must be small letters"),
        ("", "must be small letters"),
        ("promptfl", "must not be that of a known method"),
        ("there", "the folder .*there must not be there"),
    ],
)
def test_a_template_overwrites_nothing(tmp_path, name, sentence):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=sentence):
        write_method(name, tmp_path / (name or "x"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
