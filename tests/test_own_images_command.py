"""A person's own images from the command line: federations, sentences, checks, and the guide."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import fastfpl
from fastfpl.cli.entry import group, main
from fastfpl.data import from_folder, load_dataset
from fastfpl.data.check import check_own
from fastfpl.data.layouts import LAYOUTS
from fastfpl.errors import InputError
from tests.command import told
from tests.own_trees import TWO, VENDORS, WORDS, save, table, tree, vendors

SHORT = ["--rounds", "1", "--local-epochs", "1", "--n-ctx", "2"]


# -- from the command line -------------------------------------------------------------------------


@pytest.mark.slow
def test_every_vendor_is_a_client_of_a_federation(tmp_path):
    folder = vendors(tmp_path / "emoji")
    code, out, err = told(
        *("run", "local", "--dataset", f"folder:{folder}", "--partition", "given"),
        *("--shots", "3", "--cache", str(tmp_path / "cache"), *SHORT),
        cwd=tmp_path,
    )
    assert code == 0, err
    assert "layout client/class (recognised): 3 classes, 4 clients (apple, google" in err
    assert "20 % are tested on, drawn here" in err
    assert "3 shots" in out
    assert "36 of 60 training images" in " ".join(out.split())
    (result,) = (tmp_path / "runs").glob("local-folder-emoji-seed0/result.json")
    content = json.loads(result.read_text())
    assert content["data"]["clients"] == list(VENDORS)
    assert content["data"]["classes"] == sorted(n.replace("_", " ") for n in WORDS)
    assert content["settings"]["clients"] == 4
    assert all(0 <= a <= 1 for a in content["rounds"][-1]["clients"])
    for vendor in VENDORS:
        assert vendor in out
    # nobody reads where the images lie
    code, out, err = told("report", str(tmp_path / "runs/local-folder-emoji-seed0"), cwd=tmp_path)
    assert code == 0, err
    for page in (tmp_path / "runs/local-folder-emoji-seed0").glob("*.html"):
        assert str(tmp_path) not in page.read_text(encoding="utf-8")


def test_a_run_goes_on_where_its_images_moved_to_but_not_with_others(tmp_path):
    folder = vendors(tmp_path / "emoji", each=3)
    same = {"partition": "domain", "local_epochs": 1, "n_ctx": 2, "cache": tmp_path / "cache"}
    out = tmp_path / "run"
    fastfpl.run("promptfl", dataset=folder, out=out, rounds=1, **same)
    moved = folder.rename(tmp_path / "moved")
    result = fastfpl.run("promptfl", dataset=moved, out=out, rounds=2, resume=True, **same)
    assert len(result.rounds) == 2
    save(moved / "apple/red_heart/new.png")
    with pytest.raises(InputError, match=r"must have the settings of .*train_images"):
        fastfpl.run("promptfl", dataset=moved, out=out, rounds=3, resume=True, **same)


@pytest.mark.slow
def test_a_manifest_becomes_a_federation(tmp_path):
    folder = vendors(tmp_path / "emoji", each=4)
    rows = [
        {
            "image": path.relative_to(folder).as_posix(),
            "what": path.parts[-2],
            "who": path.parts[-3],
        }
        for path in sorted(folder.rglob("*.png"))
    ]
    table(folder / "list.tsv", rows)
    code, out, err = told(
        *("compare", "zeroshot", "promptfl", "--dataset", "manifest:emoji/list.tsv"),
        *("--columns", "path=image,label=what,client=who", "--partition", "given"),
        *("--shots", "all", "--digest", "content", "--cache", str(tmp_path / "cache"), *SHORT),
        cwd=tmp_path,
    )
    assert code == 0, err
    assert (tmp_path / "runs/compare-manifest-list.tsv/index.html").exists()
    for vendor in VENDORS:
        assert vendor in out
    content = json.loads(
        (tmp_path / "runs/compare-manifest-list.tsv/promptfl-seed0/result.json").read_text()
    )
    assert content["data"]["training"] == {"used": 36, "there": 36}
    assert content["settings"]["columns"] == {"path": "image", "label": "what", "client": "who"}


@pytest.mark.parametrize(
    ("dataset", "more", "sentence"),
    [
        ("folder:empty", (), "must hold image files"),
        ("folder:nowhere", (), "must be a folder or a zip file of images; got nowhere"),
        ("folder:", (), "must say where the data lies; got 'folder:'"),
        ("folder:one", (), "at least two classes; got 1, 'cat'"),
        ("folder:hole", (), "every class folder of hole must hold an image; got none in 'owl/'"),
        ("folder:mixed", (), "1 and 2 folders deep"),
        ("folder:alike", (), "must differ to CLIP"),
        ("folder:testonly", (), "must hold training images of every class; got only test .* 'dog'"),
        ("folder:numbers", (), "must have names that people would say"),
        ("folder:broken", (), r"[12].png must be an image; got .*put it back from your own copy"),
        ("folder:broken", (), r'or load with on_corrupt="skip" \(--on-corrupt skip\)$'),
        ("manifest:leaves.csv", (), "must lead to files below .* row 1: write paths .*--root"),
        ("folder:bob.csv", (), "got bob.csv, a list: write manifest:bob.csv"),
        ("manifest:good", (), r"path must be a file; got good \(a folder\): write folder:good"),
        ("foldr:good", (), "must begin with folder:, .*; got 'foldr:good'; did you mean 'folder:'"),
        ("my_images", (), "images of your own are folder:PATH, manifest:FILE or hf:PATH_OR_NAME"),
        ("manifest:bob.csv", ("--partition", "given"), "got only test images of 'bob'"),
        ("good", (), "must be a data set; got 'good'.*or write folder:good"),
        ("./good", (), "got './good', a path: write folder:./good"),
        ("folder:good", ("--clients", "3", "--partition", "given"), "names no clients"),
        ("folder:good", ("--columns", "path=x"), "columns must be left out but for manifest: and"),
        ("manifest:bob.csv", ("--columns", "path"), "columns is refused: it must read path=file"),
        ("folder:good", ("--root", "x"), "root must be left out for folder:"),
        ("glyphs", ("--layout", "class"), "layout must be left out but for folder:; got 'class'"),
        ("live:good", (), "must be handed over again by dataset="),
    ],
)
def test_bad_input_ends_with_a_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, dataset, more, sentence
):
    os.makedirs(tmp_path / "empty")
    tree(tmp_path / "good", *TWO)
    tree(tmp_path / "one", "cat/1.png", "cat/2.png")
    tree(tmp_path / "hole", *TWO)
    os.makedirs(tmp_path / "hole/owl")
    tree(tmp_path / "mixed", *TWO, "birds/owl/1.png")
    tree(tmp_path / "alike", "sea_horse/1.png", "Sea horse/1.png")
    tree(tmp_path / "testonly", "train/cat/1.png", "test/cat/1.png", "test/dog/1.png")
    tree(tmp_path / "numbers", "0/1.png", "1/1.png", "0/2.png", "1/2.png")
    tree(tmp_path / "broken", *TWO)
    for path in TWO:
        (tmp_path / "broken" / path).write_bytes(b"\x89PNG no image")
    rows = [{"path": "../a.png", "label": "cat"}]
    table(tmp_path / "leaves.csv", rows)
    table(
        tmp_path / "bob.csv",
        [
            {"path": f"good/{path}", "label": path[:3], "split": part, "client": who}
            for path, part, who in zip(
                TWO, ("train", "test", "train", "train"), ("ann", "bob", "ann", "ann"), strict=True
            )
        ],
    )
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    arguments = ["run", "promptfl", "--dataset", dataset, "--partition", "iid", "--clients", "1"]
    arguments += [*more, "--out", "run", "--cache", str(tmp_path / "run/cache"), *SHORT]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert re.search(sentence, lines[0]), lines[0]
    after = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} - set(before)
    assert not [p for p in after if p.is_file() or tmp_path.joinpath(p).is_file()]


def test_images_that_do_not_decode_can_be_skipped(tmp_path):
    paths = [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(5)]
    folder = tree(tmp_path, *paths)
    (folder / paths[0]).write_bytes(b"nothing")
    dataset = load_dataset(f"folder:{folder}", on_corrupt="skip")
    assert dataset.skipped == 1
    assert len(dataset.train) + len(dataset.test) == 9


# -- data check ------------------------------------------------------------------------------------


def test_data_check_counts_and_finds_what_spoils_figures(tmp_path):
    folder = tree(tmp_path / "pets", *(f"{d}/{p}" for d in ("ann", "bob") for p in TWO))
    dataset = from_folder(folder, given=True)
    one, other = dataset.train.path(0), dataset.test.path(0)
    good = CliRunner().invoke(group, ["data", "check", f"folder:{folder}", "--given", "--decode"])
    assert good.exit_code == 0
    assert "no problem found" in good.output
    found = check_own(f"folder:{folder}", given=True)
    assert found.counts["client"] == {"ann": (2, 2), "bob": (2, 2)}
    assert found.counts["class"] == {"cat": (2, 2), "dog": (2, 2)}
    assert check_own(f"folder:{folder}").counts["domain"] == {"ann": (2, 2), "bob": (2, 2)}
    other.write_bytes(one.read_bytes())
    broken = dataset.train.path(1)
    broken.write_bytes(b"nothing")
    (twice,) = check_own(f"folder:{folder}").problems
    assert str(other) in twice
    assert str(one) in twice
    assert len(check_own(f"folder:{folder}", decode=True).problems) == 2
    code, out, _ = told("data", "check", f"folder:{folder}", "--decode")
    assert code == 2
    assert "2 problems" in out
    assert "is tested on, and trained on as" in out.replace("\n", " ")


# -- the guide -------------------------------------------------------------------------------------

GUIDE = (Path(__file__).resolve().parent.parent / "docs/own_images.md").read_text(encoding="utf-8")


def test_the_guide_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Every command and the program, on what the guide says lies there; short, for time's sake."""
    folder = vendors(tmp_path / "emoji", each=20)
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    rows = [
        {"file": path.as_posix(), "what": path.parts[1], "vendor": path.parts[0]} for path in paths
    ]
    table(folder / "list.csv", rows)
    (tmp_path / "lists").mkdir()
    table(tmp_path / "lists/mine.tsv", [{"path": r["file"], "label": r["what"]} for r in rows])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 6
    for number, command in enumerate(commands):
        name, *arguments = shlex.split(command, comments=True)
        assert name == "fastfpl"
        if arguments[0] != "data":
            arguments += [*SHORT, "--out", f"out{number}"]
        main(arguments)
    assert "no problem found" in capsys.readouterr().out
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(program, "own_images.md", "exec"), {})  # the guide's own lines
    assert re.match(r"\{'apple': [01]\.\d*, 'google'", capsys.readouterr().out)
    (line,) = re.findall(r"\| layout \|.*\n\|.*\n((?:\|.*\n)+)", GUIDE)
    assert set(re.findall(r"`((?:\w+/)*class)`", line)) <= set(LAYOUTS)
