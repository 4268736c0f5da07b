"""Sums under masks: the server learns the mean, and of no upload more."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastfpl
from fastfpl.cli import main
from fastfpl.config import make_settings
from fastfpl.errors import InputError
from fastfpl.federation import Result
from fastfpl.federation.merging import Expected, counted, expected
from fastfpl.flower import apps, secagg, secagg_client
from fastfpl.flower.letters import SCHEMA, Letter
from fastfpl.flower.rules import make_rules
from fastfpl.flower.status import read_status
from fastfpl.methods import METHODS
from fastfpl.testing.worlds import World
from tests.worlds import TINY_RUN

needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="flwr is not installed"
)
# of what flwr imports, not of anything here
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RUN = {**TINY_RUN, "clients": 4, "local_epochs": 1, "threads": 1, "method": "promptfl"}
RULES = {"aggregation": "secagg+", "quorum": 0.7, "patience": 0.0, "grace": 0.0, "timeout": 2.0}


@pytest.fixture
def in_a_task(monkeypatch):
    """Messages of the server's side are made within a task of Flower's."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def play(folder, settings, rules=None, *, lost=lambda message: False, resume=False, **node):
    """Play a run over a grid in this process: (result, grid)."""
    from flwr.app import Context, RecordDict

    from tests.flower_grid import LocalGrid

    config = {
        "settings": json.dumps(settings.model_dump()),
        "rules": json.dumps({**RULES, **(rules or {})}),
        "out": str(folder / "out"),
        "resume": resume,
    }
    nodes = {
        70 + c: {"partition-id": c, "state-dir": str(folder / f"site-{c}"), "threads": 1, **node}
        for c in range(settings.clients)
    }
    grid = LocalGrid(apps.client_app(), nodes, config, stays=True, lost=lost)
    apps.server_app()(grid, Context(1, 1, {}, RecordDict(), config))
    return Result.load(folder / "out"), grid


def prompts(folder):
    """What the server has at its end, by name."""
    from safetensors.torch import load_file

    (path,) = folder.glob("checkpoint-*.safetensors")
    return load_file(path)


def stage_of(message):
    """Which stage of the protocol a message is; None of other messages."""
    letter = apps.letter_of(message.content)
    if letter.head["kind"] != "secure":
        return None
    return secagg.read_record(letter)["stage"]


@needs_flower
@pytest.mark.parametrize(
    ("method", "options"), [("promptfl", {}), ("fedpgp", {"bottleneck": 2})], ids=str
)
def test_the_mean_is_that_of_plain_uploads(method, options, tmp_path, in_a_task):
    """Each number of each client is rounded to a step of the clip, and a step is no more."""
    settings = make_settings(
        {**RUN, "method": method, "options": options, "partition": "dirichlet", "rounds": 1}
    )
    networked, _ = play(tmp_path, settings)
    plain = fastfpl.run(settings, out=tmp_path / "plain")
    images = networked.data["train_images"]
    assert len(set(images)) > 1, "the test must be able to fail"
    for a, b in zip(networked.rounds, plain.rounds, strict=True):
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.02)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["bytes_up"] > b["bytes_up"]
    ours, theirs = prompts(tmp_path / "out"), prompts(tmp_path / "plain")
    assert set(ours) == set(theirs)
    step = 2 * 8.0 / (1 << 22) * len(images) * max(images) / sum(images)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=step)
    assert networked.flower["rules"]["aggregation"] == "secagg+"


def lost_at(stage, node=72, round_="0"):
    """Tell of one client's answer in the first round: of a stage, or of plain training."""

    def lost(message):
        data = message.metadata
        if (data.dst_node_id, data.group_id, data.message_type) != (node, round_, "train"):
            return False
        return stage == (stage_of(message) or "plain")

    return lost


@needs_flower
@pytest.mark.parametrize("stage", ["setup", "share_keys", "collect_masked_vectors", "unmask"])
def test_who_is_lost_at_a_stage(stage, tmp_path, in_a_task):
    """Until its masked upload has come its update is missing; then it counts, come what may."""
    settings = make_settings(RUN)
    found, _ = play(tmp_path, settings, lost=lost_at(stage))
    missing = stage != "unmask"
    assert [row["lost"] for row in found.rounds] == [[2] * missing, []]
    plain, _ = play(
        tmp_path / "plain",
        settings,
        {"aggregation": "plain"},
        lost=lost_at("plain" if missing else None),
    )
    assert [row["lost"] for row in plain.rounds] == [[2] * missing, []]
    ours, theirs = prompts(tmp_path / "out"), prompts(tmp_path / "plain" / "out")
    assert ours.keys() == theirs.keys()
    for name in ours:  # the second round's steps begin from the rounded first
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


@needs_flower
def test_without_a_quorum_nothing_is_opened(tmp_path, in_a_task):
    def lost(message):
        return any(lost_at("collect_masked_vectors", node)(message) for node in (71, 72))

    with pytest.raises(InputError, match=r"3 of 4 clients must answer in round 1"):
        play(tmp_path, make_settings(RUN), lost=lost)


@needs_flower
def test_a_resumed_round_is_summed_of_the_same_clients_or_not_at_all(tmp_path, in_a_task):
    """A mean of absurd norm was opened; clients answer the same anew, from disk."""
    settings = make_settings({**RUN, "rounds": 1})
    with pytest.raises(InputError, match=r"norm of the mean .*; of clients 0, 1, 2, 3 a sum was"):
        play(tmp_path, settings, {"most_norm": 1e-3})
    assert read_status(tmp_path / "out")["summed"] == {"round": 0, "clients": [0, 1, 2, 3]}

    asked = []

    def lost(message):
        asked.append(stage_of(message))
        return lost_at("setup")(message)

    with pytest.raises(InputError, match=r"3 of 4 clients .* got 0.*; of clients 0, 1, 2, 3 a sum"):
        play(tmp_path, settings, lost=lost, resume=True)
    assert "collect_masked_vectors" in asked, "the test must be able to fail"
    assert "unmask" not in asked
    found, _ = play(tmp_path, settings, resume=True)
    assert found.rounds[0]["lost"] == []


@needs_flower
def test_no_upload_leaves_its_client(tmp_path, in_a_task):
    """What clients answer holds none of their numbers, and masked ones are spread over all."""
    from safetensors.torch import load_file

    _, grid = play(tmp_path, make_settings({**RUN, "rounds": 1}))
    sent = [apps.letter_of(reply.content) for reply in grid.replies]
    everything = [one.data for letter in sent for one in letter.arrays.values()]
    uploads = [
        tensor
        for path in tmp_path.glob("site-*/*/client-*/*.safetensors")
        for name, tensor in load_file(path).items()
        if tensor.numel() == 4 * 128 and tensor.is_floating_point()
    ]
    assert len(uploads) >= 4
    for upload in uploads:
        number = upload.reshape(-1)[:8].contiguous().numpy().tobytes()
        assert not any(number in data for data in everything)
    flowers, masked = secagg.flower_parts(), []
    for letter in sent:
        record = secagg.read_record(letter) if letter.head["kind"] == "secure" else {}
        masked += [flowers.vector(d) for d in record.get(flowers.key.MASKED_PARAMETERS, [])]
    assert len(masked) == 8
    for factor, vector in zip(masked[::2], masked[1::2], strict=True):
        assert factor.shape == (1,)
        assert 0.4 < (vector >= 1 << 31).mean() < 0.6  # plain ones are below 2^22


@needs_flower
def test_masks_have_all_of_their_key():
    """Flower's own have 32 bits of it: two keys of one fold have one mask."""
    utilities = importlib.import_module("flwr.common.secure_aggregation.secaggplus_utils")
    one = bytes(range(32))
    other = one[4:8] + one[:4] + one[8:]
    theirs = [utilities.pseudo_rand_gen(seed, 1 << 32, [(8,)])[0] for seed in (one, other)]
    assert (theirs[0] == theirs[1]).all()
    ours = [secagg.masks(seed, 1 << 32, [(8,), (3, 5), (), (0,)]) for seed in (one, other, one)]
    assert [a.shape for a in ours[0]] == [(8,), (3, 5), (), (0,)]
    assert all(a.dtype == np.int64 for a in ours[0])
    assert all((a == b).all() for a, b in zip(ours[0], ours[2], strict=True))
    assert (ours[0][0] != ours[1][0]).all()
    (large,) = secagg.masks(one, 1 << 32, [(100_000,)])
    counts = np.bincount(large >> 28, minlength=16)
    assert large.min() >= 0
    assert len(counts) == 16
    # sixteen equal parts: 6250 each, deviation 77
    assert abs(counts - 6250).max() < 400
    assert secagg.masks(one, 16, [(1000,)])[0].max() == 15


@needs_flower
@pytest.mark.parametrize(
    ("settings", "rules", "sentence"),
    [
        ({"merge": "median"}, {}, "merge must be mean with aggregation=secagg"),
        ({"clip_update": 1.0}, {}, "clip_update must be left out with aggregation=secagg"),
        ({"dropout": 0.5}, {}, "dropout must be 0.0|dropout must be left out"),
        ({}, {"wire": "float16"}, "wire must be exact with aggregation=secagg"),
        ({}, {"quorum": 0.5}, "quorum must be above 0.5 with aggregation=secagg"),
        ({}, {"quorum": 0.5 + 1e-10}, "quorum must be above 0.5 with aggregation=secagg"),
        ({"clients": 2}, {}, "a round must call 3 to 1023 clients .* got 2"),
        ({"method": "pfedmoap"}, {}, "aggregation must be plain for pfedmoap; .* single uploads"),
        ({"method": "prompt-fedamp"}, {}, "aggregation must be plain for prompt-fedamp"),
        ({}, {"secagg_clip": 1e-4}, "numbers of 'ctx' must lie within secagg_clip=0.0001"),
        ({}, {"most_norm": 1e-3}, "the norm of the mean of 'ctx' must be at most most_norm=0.001"),
    ],
)
def test_what_has_no_secret_mean_is_a_sentence(settings, rules, sentence, tmp_path, in_a_task):
    with pytest.raises(InputError, match=sentence):
        play(tmp_path, make_settings({**RUN, **settings}), rules)
    assert not list(tmp_path.glob("out/result.json"))


@needs_flower
def test_the_command_refuses_before_it_starts(tmp_path, capsys, monkeypatch):
    from fastfpl.flower import lab

    monkeypatch.setattr(lab.subprocess, "Popen", None)
    with pytest.raises(SystemExit) as end:
        main(
            ["flower", "up", "promptfl", "--out", str(tmp_path / "o"), "-r", "aggregation=secagg+"]
        )
    assert end.value.code == 2
    assert "quorum must be above 0.5" in " ".join(capsys.readouterr().err.split())


def asked(record, **head):
    """A stage as a client is asked for it."""
    from flwr.app import ConfigRecord

    told = {"schema": SCHEMA, "kind": "secure", "federation": "0" * 32, "client": 0, "round": 0}
    return Letter({**told, **head}, {secagg.RECORD: secagg.pack_record(ConfigRecord(record))})


SETUP = {
    "stage": "setup",
    "sample_num": 4,
    "share_num": 4,
    "threshold": 3,
    "clipping_range": 8.0,
    "target_range": 1 << 22,
    "mod_range": 1 << 32,
    "max_weight": 5.0,
}


@needs_flower
@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({**SETUP, "threshold": 2}, "open to more than half of them alone; got 2 of 4"),
        ({**SETUP, "share_num": 2, "threshold": 2}, "shared by three clients or more"),
        ({**SETUP, "share_num": "4"}, "got 3 of '4'"),
        ({"stage": "unmask", "active_nids": [70, 71], "dead_nids": [71]}, "to be both"),
        ({"stage": "unmask", "active_nids": [70], "dead_nids": []}, "what its protocol"),
        ({"stage": "nothing"}, "what its protocol says"),
    ],
)
def test_clients_tell_a_wrong_server_nothing(record, sentence, in_a_task):
    from flwr.app import Context, Message, RecordDict
    from flwr.app.metadata import Metadata

    keys = secagg.flower_parts().key
    assert (keys.ACTIVE_NODE_ID_LIST, keys.DEAD_NODE_ID_LIST) == (
        "active_nids",
        "dead_nids",
    )
    assert set(SETUP) == {
        *(keys.STAGE, keys.SAMPLE_NUMBER, keys.SHARE_NUMBER, keys.THRESHOLD),
        *(keys.CLIPPING_RANGE, keys.TARGET_RANGE, keys.MOD_RANGE, keys.MAX_WEIGHT),
    }
    metadata = Metadata(1, "m", 1, 70, "", "0", 0.0, 1e12, "train")
    message = Message(RecordDict(), metadata=metadata)
    answer = secagg_client.secure_answer(
        asked(record), message, Context(1, 70, {}, RecordDict(), {}), SimpleNamespace(client=0)
    )
    assert answer.head["kind"] == "refusal"
    assert sentence in answer.head["why"]
    assert not answer.arrays


@needs_flower
@pytest.mark.parametrize("flaw", ["shape", "dtype", "large", "none", "bytes"])
def test_a_wrong_masked_upload_is_refused_and_the_rest_is_summed(
    flaw, tmp_path, in_a_task, monkeypatch
):
    from flwr.common import ndarray_to_bytes

    flowers, honest = secagg.flower_parts(), secagg_client.secure_answer

    def hostile(letter, message, context, site):
        answer = honest(letter, message, context, site)
        record = secagg.read_record(answer)
        masked = flowers.key.MASKED_PARAMETERS
        if message.metadata.dst_node_id != 71 or masked not in record:
            return answer
        factor, vector = (flowers.vector(data) for data in record[masked])
        wrong = {
            "shape": [factor, vector[:1]],
            "dtype": [factor, vector.astype(np.float64)],
            "large": [factor, vector + (1 << 40)],
            "none": [factor],
        }
        record[masked] = (
            [b"no array", b""] if flaw == "bytes" else [*map(ndarray_to_bytes, wrong[flaw])]
        )
        return Letter(answer.head, {secagg.RECORD: secagg.pack_record(record)})

    monkeypatch.setattr(apps, "secure_answer", hostile)
    found, _ = play(tmp_path, make_settings({**RUN, "rounds": 1}))
    (told,) = found.rounds[0]["flower"]["refused"]
    assert told["client"] == 1
    assert "masked uploads must be whole numbers below 2^32" in told["why"]
    assert found.rounds[0]["lost"] == [1]


@needs_flower
def test_one_client_that_seals_nonsense_does_not_stop_a_run(tmp_path, in_a_task, monkeypatch):
    """It is named in every round, left out of its sum, and the run ends."""
    honest = secagg_client.secure_answer

    def hostile(letter, message, context, site):
        answer = honest(letter, message, context, site)
        record = secagg.read_record(answer)
        if message.metadata.dst_node_id != 71 or "ctxts" not in record:
            return answer
        record["ctxts"] = [bytes(100)] * 3
        return Letter(answer.head, {secagg.RECORD: secagg.pack_record(record)})

    monkeypatch.setattr(apps, "secure_answer", hostile)
    settings = make_settings(RUN)
    found, _ = play(tmp_path, settings)
    for row in found.rounds:
        (told,) = row["flower"]["refused"]
        assert told["client"] == 1
        assert "client 1 is at odds with 0, 2, 3, who are a quorum" in told["why"]
        assert not row["flower"]["failed"]
        assert row["lost"] == [1]
    assert (found.flower["refused"], found.flower["failed"]) == (2, 0)
    noted = read_status(tmp_path / "out")["noted"]
    assert [one["client"] for one in noted] == [1, 1]
    play(
        tmp_path / "plain",
        settings,
        {"aggregation": "plain"},
        lost=lambda m: any(lost_at("plain", 71, round_)(m) for round_ in ("0", "1")),
    )
    ours, theirs = prompts(tmp_path / "out"), prompts(tmp_path / "plain" / "out")
    for name in ours:  # the second round's steps begin from the rounded first
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


COUNTED = {
    **dict.fromkeys(("promptfl", "fedprox", "promptfl-ft", "prompt-fedper", "fedotp"), "images"),
    **dict.fromkeys(("promptfolio", "fedpgp", "fedtpg"), "images"),
    **dict.fromkeys(("fedapt", "fedapt-unsupervised"), "clients"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_finds_what_a_mean_counts(name):
    options = {"pfedmoap": {"heads": 2, "gate_width": 8}, "fedpgp": {"bottleneck": 2}}
    federation = World(name, options=options.get(name, {})).federation()
    method, server = federation.trainer.method, federation.now.server
    down = federation.now.download(method, 0)
    wanted = expected(method, down) if method.trains else Expected({}, ())
    assert counted(method, server, wanted) == COUNTED.get(name)


def test_a_mean_of_means_is_told_from_a_mean():
    """Three clients of one part and one of another, weighed by parts: no mean of clients."""
    federation = World("promptfl", sizes=(9, 5, 7, 6)).federation()
    method, server = federation.trainer.method, federation.now.server
    wanted = expected(method, federation.now.download(method, 0))
    assert counted(method, server, wanted) == "images"
    honest = method.merge

    def merge(server, uploads, images, round_):
        parts = [{c: u for c, u in uploads.items() if (c == 3) == last} for last in (False, True)]
        means = [honest(server, part, images, round_) for part in parts if part]
        return {n: torch.stack([m[n] for m in means]).mean(0) for n in means[0]}

    method.merge = merge
    assert counted(method, server, wanted) is None


@needs_flower
def test_nobody_trains_in_the_clear_who_does_not_want_to(tmp_path, in_a_task):
    settings = make_settings({**RUN, "rounds": 1})
    with pytest.raises(InputError, match="summed under masks, as its own configuration says"):
        play(tmp_path / "a", settings, {"aggregation": "plain"}, aggregation="secagg+")
    with pytest.raises(InputError, match=r"aggregation must be secagg.* got 'sometimes'"):
        play(tmp_path / "b", settings, {"patience": 0.0}, aggregation="sometimes")
    found, _ = play(tmp_path / "c", settings, aggregation="secagg+")
    assert found.rounds[0]["lost"] == []
    # what the run is to be stands in its configuration, whatever a letter asks for
    letter = Letter({"schema": SCHEMA, "kind": "train"})
    run = {"rules": json.dumps(RULES), "settings": json.dumps(settings.model_dump())}
    with pytest.raises(InputError, match="summed under masks, as the run says"):
        apps.refuse_plain(letter, run, {})
    apps.refuse_plain(letter, {**run, "rules": "{}"}, {})


@needs_flower
@pytest.mark.parametrize("first", ["plain", "secagg+"])
def test_a_run_goes_on_as_it_began(first, tmp_path, in_a_task):
    settings = make_settings({**RUN, "rounds": 1})
    play(tmp_path, settings, {"aggregation": first})
    more = settings.model_copy(update={"rounds": 2})
    (tmp_path / "out" / "result.json").unlink()
    other = {"plain": "secagg+", "secagg+": "plain"}[first]
    wanted = re.escape(f"aggregation: '{first}' then, '{other}' now")
    with pytest.raises(InputError, match=wanted):
        play(tmp_path, more, {"aggregation": other}, resume=True)
    found, _ = play(tmp_path, more, {"aggregation": first}, resume=True)
    assert len(found.rounds) == 2


def test_rules_say_what_is_there():
    assert make_rules({}).aggregation == "plain"
    with pytest.raises(InputError, match="aggregation"):
        make_rules({"aggregation": "secret"})
    for value in (True, 0, -1.0, float("nan"), float("inf"), 1e7, "8", None, [8.0]):
        with pytest.raises(InputError, match="secagg_clip is refused"):
            make_rules({"secagg_clip": value})
    assert make_rules({"secagg_clip": 8}).secagg_clip == 8.0
