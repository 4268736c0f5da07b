"""Clients and domains that a person's own images name: dealt as the files say."""

from __future__ import annotations

import pytest

import fastfpl
from fastfpl.cli.compare import _swept
from fastfpl.config import make_settings
from fastfpl.data import ClassSubset, DomainSubset, Joined, from_manifest, load_dataset
from fastfpl.errors import InputError, Missing
from fastfpl.federation.preparation import plan
from fastfpl.report import load_comparisons, write_report
from fastfpl.report.table import csv_table, markdown_table
from fastfpl.report.words import NONE
from tests.own_trees import TWO, rows_of, table, tree, vendors, written


def test_leaving_each_domain_out_of_a_manifest_with_names_of_its_own(tmp_path):
    rows = [
        {"file": f"{d}/{p}", "label": p[:3], "style": d, "split": part}
        for d in ("ink", "oil")
        for p, part in zip(TWO, ("train", "test", "train", "test"), strict=True)
    ]
    tree(tmp_path, *(row["file"] for row in rows))
    table(tmp_path / "list.csv", rows)
    names = {"path": "file", "domain": "style"}
    asked = {"scenario": "leave-one-domain-out", "dataset": f"manifest:{tmp_path / 'list.csv'}"}
    for columns in (names, "path=file,domain=style"):  # of a file of settings, of the flag
        assert _swept(None, {**asked, "columns": columns}) == ("target", ["ink", "oil"])


def test_views_carry_the_clients_through(tmp_path):
    dataset = from_manifest(written(tmp_path, rows_of()))
    train = dataset.train
    some = ClassSubset(train, [1])
    assert some.clients.tolist() == train.clients[train.labels == 1].tolist()
    assert DomainSubset(train, [0]).clients.tolist() == train.clients.tolist()
    both = Joined(train, dataset.test)
    assert both.clients.tolist() == [*train.clients.tolist(), *dataset.test.clients.tolist()]
    glyphs = load_dataset("glyphs")
    assert Joined(glyphs.train, glyphs.test).clients is None
    assert ClassSubset(glyphs.train, [1]).clients is None


def test_given_deals_as_the_file_says_and_knows_the_number(tmp_path):
    name = f"manifest:{written(tmp_path, rows_of())}"
    said = {"method": "promptfl", "dataset": name, "partition": "given", "shots": "all"}
    planned = plan(make_settings(said))
    assert planned.settings.clients == 2
    shards = planned.scenario.shards
    assert [len(s.train) for s in shards] == [6, 6]
    # its own and those of nobody
    assert [len(s.test) for s in shards] == [3, 2]
    assert plan(make_settings({**said, "clients": 2})).settings.clients == 2
    with pytest.raises(InputError, match=r"must be left out with partition='given': the 2 clients"):
        plan(make_settings({**said, "clients": 3}))
    with pytest.raises(
        InputError, match=r"'given' for a data set that names no clients; got glyphs"
    ):
        plan(make_settings({**said, "dataset": "glyphs"}))
    few = plan(make_settings({**said, "shots": 1})).scenario.shards
    assert [len(s.train) for s in few] == [2, 2]


def test_domains_decide_how_many_clients_there_are():
    said = {"method": "promptfl", "dataset": "glyphs", "partition": "domain"}
    assert make_settings(said).clients is None
    assert plan(make_settings(said)).settings.clients == 6
    with pytest.raises(
        InputError, match=r"must be left out with partition='domain': the 6 domains"
    ):
        plan(make_settings({**said, "clients": 5}))
    left = {"scenario": "leave-one-domain-out", "target": "real"}
    assert plan(make_settings({**said, **left})).settings.clients == 5
    with pytest.raises(InputError, match=r"clients must be a number with partition='iid'"):
        make_settings({"method": "promptfl", "partition": "iid", "clients": None})


def test_a_client_without_test_images_is_said_and_left_out_of_the_mean(tmp_path, caplog):
    rows = [r for r in rows_of() if r["client"]]
    out = tmp_path / "run"
    result = fastfpl.run(
        "promptfl",
        dataset=written(tmp_path / "mine", rows),
        partition="given",
        rounds=2,
        local_epochs=1,
        n_ctx=2,
        out=out,
        cache=tmp_path / "cache",
    )
    note = "client bob has no test images of its own, left out of the mean"
    assert note in result.data["notes"]
    assert note in caplog.text
    for row in result.rounds:
        assert row["clients"][1] is None
        assert row["accuracy"] == row["clients"][0]
    assert result.final["std_over_clients"] == 0
    # read again, and shown as a dash
    comparison = load_comparisons(out)[0]
    assert comparison.results["promptfl"][0].rounds == result.rounds
    text = markdown_table(comparison)
    assert "| ann | bob |" in text
    assert f"| {100 * result.final['accuracy']:.1f} | {NONE} |" in text
    line = csv_table(comparison).splitlines()
    assert line[0].endswith("accuracy of ann,accuracy of bob")
    assert line[1].endswith(",")
    write_report(comparison, tmp_path / "page")
    page = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert '<th scope="row">bob</th>' in page
    with pytest.raises(InputError, match=r"to train on with transductive=true; got none for"):
        plan(
            make_settings(
                {
                    "method": "fedapt-unsupervised",
                    "dataset": f"manifest:{tmp_path / 'mine/list.csv'}",
                    "partition": "given",
                    "transductive": True,
                    "shots": "all",
                    "augment": "fresh",
                }
            )
        )


def test_own_images_play_the_scenarios(tmp_path):
    folder = vendors(tmp_path / "emoji", each=4)
    same = {"rounds": 1, "local_epochs": 1, "n_ctx": 2, "shots": 2, "cache": tmp_path / "cache"}
    for scenario, more in (
        ("base-to-novel", {"partition": "given"}),
        ("leave-one-domain-out", {"partition": "domain", "target": "google"}),
        ("multi-domain", {"partition": "domain"}),
        ("global", {"partition": "iid", "clients": 2}),
    ):
        result = fastfpl.run("promptfl", dataset=folder, scenario=scenario, **more, **same)
        assert all(0 <= exam["accuracy"] <= 1 for exam in result.rounds[-1]["exams"].values())
    more = {"scenario": "cross-dataset", "target": f"folder:{folder}", "clients": 2}
    result = fastfpl.run("promptfl", dataset="digits", partition="iid", **more, **same)
    # no page says where the images lie
    assert result.data["exams"]["target"] == "all test images of emoji"
    with pytest.raises(
        Missing, match=r"must be a folder or a zip file of images; got .*nowhere \("
    ):
        fastfpl.run("promptfl", dataset=tmp_path / "nowhere", **same)
    with pytest.raises(Missing, match=r"path must be a file; got .*nowhere.csv \(nothing\)"):
        fastfpl.run("promptfl", dataset=tmp_path / "nowhere.csv", **same)


def test_a_domain_without_test_images_is_said_too(tmp_path):
    paths = [f"train/{d}/{p}" for d in ("ink", "oil") for p in TWO]
    folder = tree(tmp_path, *paths, "test/ink/cat/9.png")
    said = {"method": "promptfl", "dataset": f"folder:{folder}", "partition": "domain"}
    planned = plan(make_settings(said))
    assert [len(s.test) for s in planned.scenario.shards] == [1, 0]
    assert "client 1 (oil) has no test images of its own" in planned.scenario.dataset.notes[-1]
