"""Folders of results: which runs a report takes, what it writes, and what it leaves alone."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from fastfpl.cli import main
from fastfpl.errors import Damaged, InputError, Missing
from fastfpl.federation import Comparison, Result
from fastfpl.report import load_comparisons, write_report
from fastfpl.report.agreement import warnings
from fastfpl.report.facts import rows
from fastfpl.report.runs import group_names
from tests.results import Page, pair, result, save

# -- files -----------------------------------------------------------------------------------


def test_a_report_is_written_and_written_again(tmp_path: Path) -> None:
    c = pair((0, 1))
    save(c, tmp_path)
    files = write_report(c, tmp_path)
    tables = ["table.md", "table.csv", "clients.csv"]
    names = [*tables, "accuracy.png", "clients.png", "index.html"]
    assert files == [tmp_path / name for name in names]
    first = {path: path.read_bytes() for path in files}
    assert all(first.values())
    (again,) = load_comparisons(tmp_path)
    assert {m: list(r) for m, r in again.results.items()} == dict(c.results)
    write_report(again, tmp_path)
    assert {path: path.read_bytes() for path in files} == first
    assert not list(tmp_path.glob(".*"))


def test_results_are_json_without_nan(tmp_path: Path) -> None:
    one = result("local", [None, [0.3, 0.4]])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    one.save(tmp_path)
    json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert Result.load(tmp_path) == one


def test_methods_and_seeds_load_in_order(tmp_path: Path) -> None:
    rounds: list[list[float] | None] = [[0.5]] * 2
    made = {m: [result(m, rounds, seed=s) for s in (10, 9)] for m in ("promptfl", "a-seed3")}
    made["zeroshot"] = [result("zeroshot", [[0.5]], trains=False)]
    save(Comparison(made), tmp_path)
    (tmp_path / "fedotp-seed0").mkdir()  # not finished
    (tmp_path / "notes").mkdir()
    (loaded,) = load_comparisons(tmp_path)
    assert list(loaded.results) == ["zeroshot", "a-seed3", "promptfl"]
    assert [r.settings["seed"] for r in loaded.results["promptfl"]] == [9, 10]


def test_a_folder_without_results_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"fastfpl\.load_comparisons: folder must exist"):
        load_comparisons(tmp_path / "none")
    (tmp_path / "local-seed0").mkdir()
    with pytest.raises(Missing, match=r"folder must hold finished runs as METHOD-seedN"):
        load_comparisons(tmp_path)


def test_a_result_in_the_wrong_folder_is_damaged(tmp_path: Path) -> None:
    save(Comparison({"local": [result("local", [[0.5]])]}), tmp_path)
    (tmp_path / "local-seed0").rename(tmp_path / "promptfl-seed0")
    with pytest.raises(Damaged, match="must be the result of the run its folder is named after"):
        load_comparisons(tmp_path)
    file = tmp_path / "promptfl-seed0" / "result.json"
    content = json.loads(file.read_text())
    content["settings"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"must be a result; got settings: "):
        load_comparisons(tmp_path)
    file.write_text("{")
    with pytest.raises(Damaged):
        load_comparisons(tmp_path)


def test_runs_are_loaded_from_their_own_folders(tmp_path: Path) -> None:
    made = pair((0, 1))
    for number, one in enumerate(r for results in made.results.values() for r in results):
        one.save(tmp_path / f"run {number}")
    folders = sorted(tmp_path.iterdir(), reverse=True)
    # the order of the folders does not matter, nor that one is named twice
    (loaded,) = load_comparisons(*folders, str(folders[0]), folders[0] / ".." / folders[1].name)
    assert {m: list(r) for m, r in loaded.results.items()} == dict(made.results)
    with pytest.raises(InputError, match=r"folders must be one or more; got none"):
        load_comparisons()
    with pytest.raises(Missing, match=r"folder must hold finished runs .* got none in"):
        load_comparisons(*folders, tmp_path)


def test_runs_of_one_method_and_seed_are_refused(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        result("local", [[0.5]], lr=lr).save(tmp_path / f"lr {lr}")
    with pytest.raises(
        InputError,
        match=r"runs must differ in method or seed; got local-seed0 in .*lr 0\.1 and in .*lr 0\.2$",
    ):
        load_comparisons(tmp_path / "lr 0.1", tmp_path / "lr 0.2")


def test_runs_that_named_their_folder_themselves_are_loaded(tmp_path: Path) -> None:
    for seed in (0, 1):
        one = result("local", [[0.5]], seed=seed, dataset="digits", name="digits")
        one.save(tmp_path / f"local-digits-seed{seed}")
    assert [r.settings["seed"] for r in load_comparisons(tmp_path)[0].results["local"]] == [0, 1]
    (tmp_path / "local-digits-seed1").rename(tmp_path / "local-glyphs-seed1")
    with pytest.raises(Damaged, match="must be the result of the run its folder is named after"):
        load_comparisons(tmp_path)


def test_a_report_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"write_report: folder must be a folder; got the file"):
        write_report(pair(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("plots_are_known")
def test_a_report_is_new_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_report(pair(), tmp_path)
    before = {path: path.read_bytes() for path in files}
    calls = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            InputError,
            match=r"fastfpl\.write_report: folder must take .*; got No space left .* is as before",
        ):
            write_report(pair((0, 1)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    # the last name cannot be had: none is taken
    files[-1].unlink()
    files[-1].mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        write_report(pair((0, 1)), tmp_path)
    assert {p: p.read_bytes() for p in files[:-1]} == {p: before[p] for p in files[:-1]}
    assert sorted(tmp_path.iterdir()) == sorted(files)
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=r"write_report: folder must take"):
        write_report(pair(), tmp_path / "a" / "b")


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "o").mkdir()
    for name in ("table.md", f".table.md.{os.getpid()}.part"):
        (tmp_path / "o" / name).symlink_to(tmp_path / "mine")
    write_report(pair(), tmp_path / "o")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "o" / "table.md").is_symlink()


# -- what is there and what is not ----------------------------------------------------------


def test_what_is_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(pair(), tmp_path)
    plan = {"methods": ["zeroshot", "promptfl", "fedotp"], "seeds": [0, 1], "rounds": 3}
    (tmp_path / "comparison.json").write_text(json.dumps(plan))
    for name, content in (
        ("promptfl-seed1", '{"rounds_done": 2}'),
        ("fedpgp-seed7", '{"rounds_done": 1}'),
        ("local-seed0", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text(content)
    (one,) = load_comparisons(tmp_path)
    assert one.missing == (
        "zeroshot seed 1: not begun",
        "promptfl seed 1: not finished, 2 of 3 rounds",
        "fedotp seed 0: not begun",
        "fedotp seed 1: not begun",
        "fedpgp seed 7: not finished, 1 round",
        "local seed 0: not finished, and checkpoint.json does not say how far it came",
    )
    assert not any(row.top for row in rows(one))
    main(["report", str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"missing: {text}" for text in one.missing]
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8")).text
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for text in (shown.out, page, table):
        words = " ".join(text.split())
        assert "this comparison is not finished; nothing is ranked" in words
        assert all(part in words for part in one.missing)
    assert "Highest accuracy" not in page
    (tmp_path / "comparison.json").write_text('{"methods": 3}')
    with pytest.raises(Damaged, match=r"methods of .* must be what fastfpl compare wrote"):
        load_comparisons(tmp_path)


@pytest.mark.usefixtures("plots_are_known")
def test_runs_of_different_tasks_are_never_ranked_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies: list[list[float] | None] = [[0.2, 0.4], [0.4, 0.6]]
    better: list[list[float] | None] = [[0.9, 0.9], [0.9, 0.9]]
    made = {
        "a": result("local", accuracies),
        "b": result("promptfl", better),
        "c": result("local", better, dataset="digits", name="digits"),
        "d": result("promptfl", accuracies, dataset="digits", name="digits"),
        "e": result("local", accuracies, shots=4),
    }
    for name, one in made.items():
        one.save(tmp_path / name)
    groups = load_comparisons(*(tmp_path / name for name in made))
    assert [list(one.results) for one in groups] == [
        ["local", "promptfl"],
        ["local", "promptfl"],
        ["local"],
    ]
    names = ["dataset=glyphs, shots=16", "dataset=digits, shots=16", "dataset=glyphs, shots=4"]
    assert group_names(groups) == names
    assert all(warnings(one) == [] for one in groups)
    main(["report", *(str(tmp_path / name) for name in made), "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    assert [line[3:] for line in out.splitlines() if line.startswith("== ")] == names
    page = Page((tmp_path / "o" / "index.html").read_text(encoding="utf-8"))
    assert page.text.count("Highest accuracy in the last round") == 2
    assert "promptfl, 90.0 %" in page.text
    assert "local, 90.0 %" in page.text
    assert len(page.ids) == len(set(page.ids))
    assert len(page.alts) == 6
    table = (tmp_path / "o" / "table.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", table, re.MULTILINE) == names
    lines = list(csv.DictReader(io.StringIO((tmp_path / "o" / "table.csv").read_text())))
    assert [line["task"] for line in lines] == [names[i] for i in (0, 0, 1, 1, 2)]
    with Image.open(tmp_path / "o" / "accuracy.png") as image:
        assert image.size[0] == 1280
        assert image.size[1] == 3 * 736
    # other classes under the same settings, and a CLIP of other weights
    other = result("fedotp", accuracies, classes=("x", "y"))
    other.save(tmp_path / "f")
    assert group_names(load_comparisons(tmp_path / "a", tmp_path / "f")) == ["task 1", "task 2"]
