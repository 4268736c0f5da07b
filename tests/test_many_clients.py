"""What may not grow with all clients: who is asked, pools, folders of states, checkpoints."""

from __future__ import annotations

import json
import random

import pytest
import torch

import fastfpl
from fastfpl.config import make_settings
from fastfpl.errors import Damaged, InputError
from fastfpl.federation import Result, segments, states
from fastfpl.federation.checkpoint import files_of, read_checkpoint
from fastfpl.federation.lock import alone_in
from fastfpl.federation.sampling import asked_clients
from fastfpl.federation.states import StateFiles, state_path
from fastfpl.methods import pool
from tests.worlds import GATE, TINY_RUN, figures, small_clip


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def run(clip, cache):
    def play(**changes):
        settings = {**TINY_RUN, "clients": 5, "cohort": 1, "threads": 1, **changes}
        return fastfpl.run(**{"method": "local", **settings}, model=clip, cache=cache)

    return play


# -- who is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [2, 0.4, "2", "0.4"])
def test_some_clients_are_asked_drawn_once(run, wanted, tmp_path):
    everybody, some = run(), run(evaluate_clients=wanted, out=tmp_path / "run")
    asked = some.data["asked"]
    assert len(asked) == 2
    assert asked == sorted(asked)
    assert some.data["population"] == 5
    for row, whole in zip(some.rounds, everybody.rounds, strict=True):
        # who is asked changes nothing of the training
        assert row["loss"] == whole["loss"]
        assert row["clients"] == [whole["clients"][c] for c in asked]
        assert row["accuracy"] == sum(row["clients"]) / 2
    for name in ("train_images", "test_images"):
        assert some.data[name] == [everybody.data[name][c] for c in asked]
    assert "asked are 2 of 5 clients, drawn once" in some.data["notes"]
    assert Result.load(tmp_path / "run").data["asked"] == asked
    assert asked == list(asked_clients(make_settings(some.settings), 5))


def test_a_global_model_is_asked_about_some(run):
    everybody, some = (run(method="promptfl", evaluate_clients=n) for n in (None, 3))
    asked = some.data["asked"]
    assert some.rounds[1]["clients"] == [everybody.rounds[1]["clients"][c] for c in asked]
    assert "asked" not in everybody.data


def test_another_seed_asks_others():
    settings = [
        make_settings({"method": "local", "seed": s, "evaluate_clients": 5}) for s in (0, 1)
    ]
    one, other = (list(asked_clients(s, 1000)) for s in settings)
    assert len(one) == len(other) == 5
    assert one != other
    assert list(asked_clients(make_settings({"method": "local"}), 3)) == [0, 1, 2]


def test_reports_speak_of_those_who_were_asked(run, tmp_path, capsys):
    from fastfpl.cli.entry import main

    run(evaluate_clients=2, out=tmp_path / "run")
    main(["report", str(tmp_path / "run")])
    assert "asked are 2 of 5 clients, drawn once" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, 0.0, "some", True])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(InputError, match="evaluate_clients"):
        make_settings({"method": "local", "evaluate_clients": value})


def test_more_than_there_are_are_refused(run):
    rule = "evaluate_clients must be at most the 5 clients; got 6"
    with pytest.raises(InputError, match=rule):
        run(evaluate_clients=6)
    rule = "evaluate_clients must be left out with scenario='unseen-clients'"
    with pytest.raises(InputError, match=rule):
        run(evaluate_clients=2, scenario="unseen-clients")


def test_a_resumed_run_asks_the_same(run, tmp_path):
    whole = run(evaluate_clients=2)
    run(evaluate_clients=2, rounds=1, out=tmp_path / "run")
    resumed = run(evaluate_clients=2, out=tmp_path / "run", resume=True)
    assert figures(resumed) == figures(whole)
    with pytest.raises(InputError, match="evaluate_clients: 2 then, 3 now"):
        run(evaluate_clients=3, out=tmp_path / "run", resume=True)


# -- pools ----------------------------------------------------------------------------------------


def test_a_pool_has_a_row_for_each_that_has_uploaded():
    server = {**pool.empty(torch.zeros(2, 3)), "pool_round": torch.zeros(0, dtype=torch.int64)}
    first = pool.refreshed(
        server, {c: {"ctx": torch.full((2, 3), float(c))} for c in (70_000, 3)}, {"pool_round": 0}
    )
    second = pool.refreshed(
        first, {c: {"ctx": torch.full((2, 3), 10.0 + c)} for c in (5, 3)}, {"pool_round": 1}
    )
    assert len(server["pool"]) == 0
    assert first["pool_owner"].tolist() == [3, 70_000]
    assert second["pool_owner"].tolist() == [3, 70_000, 5]
    assert second["pool_round"].tolist() == [1, 0, 1]
    assert second["pool"][:, 0, 0].tolist() == [13.0, 70_000.0, 15.0]
    assert first["pool"][:, 0, 0].tolist() == [3.0, 70_000.0]  # not changed
    assert pool.row_of(second, 5) == 2
    assert pool.row_of(second, 4) is None
    assert pool.rows_of(second, torch.tensor([70_000, 5, 3])).tolist() == [1, 2, 0]


@pytest.mark.parametrize("rows", [None, [4, 0, 4, 2]])
def test_blocks_are_the_pool_in_double(rows, monkeypatch):
    monkeypatch.setattr(pool, "_BLOCK", 8 * 6 * 2)  # two rows at a time
    held = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    at = None if rows is None else torch.tensor(rows)
    found = list(pool.blocks(held, at))
    assert max(len(part) for part in found) == 2
    assert torch.equal(torch.cat(found), (held if at is None else held[at]).double())


def test_servers_of_many_clients_are_as_small_as_those_of_few(run, tmp_path):
    """A federation of 40 of which two train in a round holds four prompts after two."""
    for method in ("pfedmoap", "prompt-fedamp"):
        more = {"partition": "iid", "clients": 40, "participation": 0.05, "shots": None}
        options = GATE if method == "pfedmoap" else {}
        run(method=method, out=tmp_path / method, evaluate_clients=2, options=options, **more)
        server = read_checkpoint(tmp_path / method).server
        rows = json.loads((tmp_path / method / "result.json").read_text())["rounds"]
        trained = {c for row in rows for c in row["selected"]}
        assert sorted(server["pool_owner"].tolist()) == sorted(trained)
        assert len(server["pool"]) == len(trained) <= 4


# -- folders and checkpoints ----------------------------------------------------------------------


@pytest.fixture
def _crowded(monkeypatch):
    """Let two clients be as many as a folder, and a checkpoint by itself, may hold."""
    monkeypatch.setattr(states, "_TOGETHER", 2)
    monkeypatch.setattr(segments, "_YOUNG", 2)


MANY = {
    "method": "pfedmoap",
    "options": GATE,
    "rounds": 6,
    "clients": 9,
    "participation": 0.34,
    "partition": "iid",
    "shots": None,
    "local_epochs": 1,
}


def names_below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("_crowded")
def test_a_run_of_many_clients_is_resumed_after_any_round(run, tmp_path, monkeypatch):
    """Its states lie in many folders, its index in several files; nothing is left over."""
    out = tmp_path / "run"
    for rounds in range(1, 7):
        last = run(**{**MANY, "rounds": rounds}, out=out, resume=True)
        named = files_of(out)
        assert named is not None
        there = names_below(out) - {"checkpoint.json", "result.json", "metrics.jsonl"}
        assert there == {path.relative_to(out).as_posix() for path in named}
        head = json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))
        assert len(head["clients"]) <= 2 + 3
    assert {p.split("/")[1] for p in there if p.startswith("clients/0")} >= {"001", "002", "003"}
    assert head["segments"]["clients"]
    one = read_checkpoint(out)
    kept = {c: dict(state) for c, state in one.clients.items()}
    monkeypatch.undo()
    whole = run(**MANY, out=tmp_path / "whole")
    assert figures(last) == figures(whole)
    other = read_checkpoint(tmp_path / "whole")
    assert sorted(one.clients) == sorted(other.clients)
    assert sorted(one.downloads) == sorted(other.downloads)
    for client, state in kept.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, other.clients[client][name])


@pytest.mark.usefixtures("_crowded")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text(path.read_text() + " "), "its checksum is not the one"),
    ],
)
def test_an_index_that_is_damaged_is_refused(run, tmp_path, change, reason):
    out = tmp_path / "run"
    run(**MANY, out=out)
    change(sorted((out / "clients").glob("index-*.json"))[0])
    with pytest.raises(Damaged, match=reason):
        run(**{**MANY, "rounds": 7}, out=out, resume=True)


def test_segments_are_few_and_each_entry_is_written_a_few_times(tmp_path, monkeypatch):
    """Ten thousand clients, a hundred a round: what a checkpoint writes does not grow with them."""
    monkeypatch.setattr(segments, "_YOUNG", 100)
    index, written, most = segments.Segments(), [0], 0
    draw = random.Random(0)
    said = {}

    def say(client):
        written[0] += 1
        return said[client]

    for round_ in range(300):
        for client in draw.sample(range(10_000), 100):
            said[client] = round_
            index.touch(client)
        young, named = index.settle(tmp_path, say)
        index.sweep(tmp_path)
        most = max(most, len(young), len(named))
        assert len(list(tmp_path.iterdir())) == len(named)
    assert most <= 200
    assert len(named) < 12
    assert written[0] < 300 * 100 * 12
    found = {}
    for part in segments.read_segments(tmp_path, named):
        found |= part
    assert {int(c): r for c, r in {**found, **young}.items()} == said


def test_names_of_states_are_spread_over_folders(tmp_path):
    assert state_path(tmp_path, 999, 3) == tmp_path / "00999-00003.safetensors"
    assert state_path(tmp_path, 1000, 0) == tmp_path / "001" / "01000-00000.safetensors"
    assert state_path(tmp_path, 1_234_567, 0) == tmp_path / "1234" / "1234567-00000.safetensors"
    kept = StateFiles(tmp_path / "clients")
    kept.put(1_234_567, {"ctx": torch.ones(2)})
    assert torch.equal(kept[1_234_567]["ctx"], torch.ones(2))
    again = StateFiles(tmp_path / "clients")
    again.restore(kept.settle())
    assert torch.equal(again[1_234_567]["ctx"], torch.ones(2))


def test_uploads_of_few_clients_of_many_share_a_folder(tmp_path):
    """A folder for every one of them costs several times its file."""
    uploads = StateFiles(beside=tmp_path)
    clients = range(5, 1_000_000, 50_000)
    for client in clients:
        uploads.put(client, {"ctx": torch.full((2,), float(client))})
    uploads.put(50_005, {"ctx": torch.zeros(2)})  # again
    assert {path.parent for path in uploads.files} == {uploads.place}
    assert [uploads[c]["ctx"][0].item() for c in clients] == [
        c if c != 50_005 else 0 for c in clients
    ]


def test_what_a_killed_run_left_in_folders_is_removed(tmp_path):
    """The lock names files and folders before they are there."""
    folder = tmp_path / "run"
    with alone_in(folder) as held:
        kept = StateFiles(folder / "clients")
        for client in (5, 1000, 123_456):
            kept.put(client, {"ctx": torch.ones(2)})
        assert len(names_below(folder)) == 4
        held.sweep(set())
        assert names_below(folder) == {".lock"}
        assert not (folder / "clients").exists()
