"""What is told of a run while it goes on: JSON lines, callbacks, trackers of other projects."""

import json
import logging
import re
import sys
import time

import pytest
import torch

import fastfpl
from fastfpl.errors import InputError, Missing
from fastfpl.federation.checkpoint import CHECKPOINT
from fastfpl.federation.result import RESULT
from fastfpl.tracking import (
    METRICS,
    TRACKERS,
    Callback,
    Progress,
    RunInfo,
    make_trackers,
    metrics_of,
)
from fastfpl.tracking import trackers as tracking
from tests.worlds import TINY_RUN, small_clip

RUN = {**TINY_RUN, "clients": 3, "rounds": 3, "local_epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def play(clip, cache):
    def run(out, **changes):
        return fastfpl.run(
            "promptfl", **{"out": out, "model": clip, "cache": cache, **RUN, **changes}
        )

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


class Heard(Callback):
    """Notes what it is told, and stops the run by hand after so many rounds."""

    def __init__(self, stop_after=None):
        self.heard, self.stop_after = [], stop_after

    def on_run_begin(self, run):
        self.heard.append(("begin", run.name, run.done))

    def on_round_end(self, run, row):
        self.heard.append(("round", row["round"]))
        if row["round"] + 1 == self.stop_after:
            raise KeyboardInterrupt

    def on_run_end(self, run, final):
        self.heard.append(("end", None if final is None else final["accuracy"]))


def test_a_line_a_round_is_there_when_the_round_ends(play, tmp_path):
    seen = []
    result = play(tmp_path / "run", on_round=lambda m, row: seen.append(lines(tmp_path / "run")))
    assert [len(one) for one in seen] == [1, 2, 3]
    assert lines(tmp_path / "run") == json.loads(json.dumps(result.rounds))


def test_callbacks_hear_begin_rounds_and_end(play, tmp_path):
    heard = Heard()
    result = play(tmp_path / "run", callbacks=[heard])
    assert heard.heard == [
        ("begin", "promptfl-digits-seed0", 0),
        *(("round", n) for n in range(3)),
        ("end", result.final["accuracy"]),
    ]


def test_a_run_stopped_by_hand_says_how_it_goes_on_and_doubles_no_line(play, tmp_path):
    heard = Heard(stop_after=2)
    with pytest.raises(KeyboardInterrupt, match=r"promptfl was stopped; .*resume=True"):
        play(tmp_path / "run", callbacks=[heard])
    assert heard.heard[-1] == ("end", None)
    # as a kill leaves it: a line too few, or half a line
    path = tmp_path / "run" / METRICS
    first, _ = path.read_bytes().splitlines(keepends=True)
    for left in (b"", first, first + b'{"round": 1, "accu'):
        path.write_bytes(left)
        again = Heard(stop_after=2)
        again.stop_after = None
        go_on = play(tmp_path / "run", callbacks=[again], resume=True)
        assert again.heard[0][2] in (2, 3)
        assert lines(tmp_path / "run") == json.loads(json.dumps(go_on.rounds))


def test_stopped_before_the_first_round_or_without_a_folder(play, tmp_path):
    class Stop(Callback):
        def on_run_begin(self, run):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="before its first round of 3 ended; begin again"):
        play(tmp_path / "run", callbacks=[Stop()])
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt, match="nothing of it is kept, which out= would"):
        play(None, callbacks=[Stop()])


def test_a_callback_that_raises_ends_the_run_with_its_own_error(play, tmp_path):
    class Broken(Callback):
        def on_round_end(self, run, row):
            raise ZeroDivisionError("mine")

    heard = Heard()
    with pytest.raises(ZeroDivisionError, match="mine"):
        play(tmp_path / "run", callbacks=[heard, Broken()])
    assert heard.heard[-1] == ("end", None)
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    assert play(tmp_path / "run", resume=True).rounds[-1]["round"] == 2


def test_a_foreign_metrics_file_is_left_alone(play, tmp_path):
    (tmp_path / METRICS).write_text("mine\n")
    with pytest.raises(InputError, match=r"no metrics.jsonl but a run's"):
        play(tmp_path)
    assert (tmp_path / METRICS).read_text() == "mine\n"
    assert not (tmp_path / RESULT).exists()


def test_figures_have_names():
    row = {
        **{"round": 0, "accuracy": 0.5, "loss": 1.5, "seconds": 2.0, "images_per_second": 10.0},
        **{"bytes_up": 8, "bytes_down": 9, "selected": [0, 1], "lost": [1]},
        "clients": [0.25, None, 0.75],
        "exams": {"own": {"accuracy": 0.5, "macro_f1": 0.4, "domains": {"a": 0.1, "b": 0.9}}},
    }
    found = metrics_of(RunInfo("x", {}, clients=("n", "o", "p")), row)
    assert found["clients/n"] == 0.25
    assert found["clients/p"] == 0.75
    assert "clients/o" not in found
    assert found["clients_std"] == 0.25
    assert found["lost"] == 1
    assert found["domains/b"] == 0.9
    assert found["exams/own/macro_f1"] == 0.4
    nobody = metrics_of(RunInfo("x", {}), {**row, "selected": [], "loss": None})
    assert "loss" not in nobody
    assert "bytes_up" not in nobody
    assert nobody["clients/2"] == 0.75


# -- trackers of other projects -----------------------------------------------------------------


def test_an_unknown_tracker_and_one_without_its_library():
    with pytest.raises(InputError, match=r"one or more of tensorboard, wandb, mlflow; got 'wandv'"):
        make_trackers(["tensorboard,wandv"])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_said_before_anything_begins(name, monkeypatch, tmp_path):
    from click.testing import CliRunner

    from fastfpl.cli.entry import group

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda module: None)
    out = tmp_path / "run"
    done = CliRunner().invoke(group, ["run", "zeroshot", "--track", name, "--out", str(out)])
    assert isinstance(done.exception, Missing)
    assert f'pip install "fastfpl[{name}]"' in str(done.exception)
    assert not out.exists()


class Down(tracking.Tracker):
    name, module = "down", "json"
    calls = 0

    def begin(self, run):
        pass

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("no route to host")

    def end(self, final):
        raise AssertionError("is told no more")


def test_a_tracker_that_fails_says_so_once_and_the_run_goes_on(play, tmp_path, caplog):
    down = Down()
    with caplog.at_level(logging.WARNING, "fastfpl"):
        result = play(tmp_path / "run", callbacks=[down])
    said = [r.getMessage() for r in caplog.records if "down" in r.getMessage()]
    assert len(said) == 1
    assert re.search(r"down has failed and is told no more of promptfl-dig.*no route", said[0])
    assert down.calls == 1
    assert len(result.rounds) == len(lines(tmp_path / "run")) == 3


def test_a_foreign_file_of_the_trackers_is_left_alone(play, tmp_path, caplog):
    class Noting(Down):
        def begin(self, run):
            tracking._note(run, "down", "abc")

        def log(self, step, metrics):
            self.calls += 1

        def end(self, final):
            pass

    one = Noting()
    play(tmp_path / "a", callbacks=[one])
    ids = {"format": "fastfpl-tracking-1", "down": "abc"}
    assert json.loads((tmp_path / "a" / tracking.IDS).read_text()) == ids
    assert one.calls == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / tracking.IDS).write_text('{"mine": 1}')
    with caplog.at_level(logging.WARNING, "fastfpl"):
        play(tmp_path / "b", callbacks=[one])
    assert (tmp_path / "b" / tracking.IDS).read_text() == '{"mine": 1}'
    assert "must be a run's; got another file" in caplog.text
    assert one.calls == 3


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install fastfpl[{name}]")


quiet = pytest.mark.filterwarnings("ignore")  # other projects' own


def interrupted(play, folder, tracker):
    """Play a run that is stopped after its second round and resumed; return its result."""
    with pytest.raises(KeyboardInterrupt):
        play(folder, callbacks=[tracker, Heard(stop_after=2)])
    return play(folder, callbacks=[tracker], resume=True)


@quiet
def test_tensorboard_has_every_round_once(play, tmp_path):
    library("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = interrupted(play, tmp_path / "run", make_trackers(["tensorboard"])[0])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = [(e.step, e.value) for e in events.Scalars("accuracy")]
    assert [step for step, _ in points] == [0, 1, 2]
    want = torch.tensor([row["accuracy"] for row in result.rounds])
    torch.testing.assert_close(torch.tensor([value for _, value in points]), want)
    assert "clients/0" in events.Tags()["scalars"]


@quiet
def test_mlflow_has_every_round_once_in_one_run(play, tmp_path, monkeypatch):
    library("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = interrupted(play, tmp_path / "run", make_trackers(["mlflow"])[0])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fastfpl")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(m.step, m.value) for m in history] == [
        (row["round"], row["accuracy"]) for row in result.rounds
    ]
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "promptfl"


@quiet
@pytest.mark.slow
def test_wandb_offline_has_every_round(play, tmp_path, monkeypatch, caplog):
    library("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted(play, tmp_path / "run", make_trackers(["wandb"])[0])
    written = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2
    number = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]
    assert [path.stem for path in written] == [f"run-{number}"] * 2  # one run goes on
    # its service writes a moment after it says that it has finished
    limit = time.monotonic() + 60
    while not all(b"accuracy" in path.read_bytes() for path in written):
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert "has failed" not in caplog.text


# -- tables of pandas -----------------------------------------------------------------------------


def test_results_are_long_tables_of_pandas(play):
    pandas = library("pandas")
    result = play(None)
    frame = result.to_pandas()
    clients = frame[frame.client.notna() & (frame["round"] == 2)]
    assert clients.value.tolist() == result.rounds[2]["clients"]
    assert clients.client.tolist() == [0, 1, 2]
    means = frame[(frame.figure == "accuracy") & frame.client.isna()]
    assert means.value.tolist() == [row["accuracy"] for row in result.rounds]
    assert frame[frame.figure == "bytes_up"].value.tolist() == [
        r["bytes_up"] for r in result.rounds
    ]
    both = fastfpl.federation.Comparison({"promptfl": [result], "again": [result]}).to_pandas()
    pandas.testing.assert_frame_equal(both[: len(frame)], frame)
    assert len(both) == 2 * len(frame)
    assert set(frame.columns) >= {"method", "dataset", "seed", "exam"}


def test_without_pandas_a_sentence(play, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = fastfpl.Result("m", {}, {}, {}, [], {}, 0, {})
    with pytest.raises(Missing, match=r'pip install "fastfpl\[pandas\]"'):
        result.to_pandas()


# -- progress --------------------------------------------------------------------------------------


def test_progress_is_a_callback_too(play, capsys):
    play(None, callbacks=[Progress()])
    said = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in said] == [
        ["promptfl-digits-seed0", f"round {n}"] for n in (1, 2, 3)
    ]


NOTEBOOK = """
import sys, warnings
sys.modules["ipywidgets"] = {widgets}
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "ipywidgets" else found(name, *a)
import fastfpl
from fastfpl.tracking import Progress
r = fastfpl.run("zeroshot", dataset="digits", clients=2, callbacks=[Progress()], cache={cache!r})
"""


@pytest.mark.slow
@quiet
def test_a_notebook_shows_a_line_a_round_in_the_cell(tmp_path):
    nbformat, client = library("nbformat"), library("nbclient")
    library("ipykernel")
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(widgets=None, cache=str(tmp_path)))
    book = nbformat.v4.new_notebook(cells=[cell])
    client.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    (output,) = (o for o in book.cells[0].outputs if o.get("name") == "stdout")
    assert re.search(r"zeroshot-digits-seed0  round 1  accuracy [\d.]+ %", output.text)
