"""Flower's own objects and processes around a networked run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import stat
import subprocess
import sys

import pytest

import fastfpl
from fastfpl.cli import main
from fastfpl.config import make_settings
from fastfpl.errors import InputError, Missing
from fastfpl.federation import Result
from fastfpl.flower import apps, lab, node
from fastfpl.flower.keys import check_keys
from fastfpl.flower.letters import Letter, Refused, pack, unpack
from fastfpl.flower.rules import make_rules
from fastfpl.system import FORKS
from tests.worlds import GATE, TINY_RUN

needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="flwr is not installed"
)
# of what flwr imports, not of anything here
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RUN = {**TINY_RUN, "clients": 2, "local_epochs": 1, "threads": 1}


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    shown = capsys.readouterr()
    return end.value.code, " ".join((shown.out + shown.err).split())


def assert_same(networked, settings):
    """Bit for bit one process that trains one client after the other, as sites do."""
    alone = fastfpl.run(settings.model_copy(update={"cohort": 1}))
    facts = ("accuracy", "clients", "exams", "selected", "lost", "bytes_up", "bytes_down", "loss")
    for a, b in zip(networked.rounds, alone.rounds, strict=True):
        for key in facts:
            assert a[key] == b[key], key
    assert networked.data == alone.data


@needs_flower
@pytest.mark.parametrize("wire", ["exact", "bfloat16"])
def test_a_letter_is_whole_in_flowers_records(wire):
    import torch
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    state = {"a": torch.randn(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.5)}
    letter = Letter({"kind": "x", "n": 1, "f": 0.1}, pack(state, wire))
    back = apps.letter_of(apps.records(letter))
    assert back == letter
    assert set(unpack(back.arrays)) == set(state)
    for content, sentence in (
        (RecordDict({}), "a message must hold a head of JSON and arrays"),
        (RecordDict({"head": ConfigRecord({"json": "{"})}), "must be JSON of facts; got {"),
        (RecordDict({"head": ConfigRecord({"json": 1})}), "a message must hold a head of JSON"),
        (
            RecordDict(
                {
                    "head": ConfigRecord({"json": "{}"}),
                    "arrays": ArrayRecord({"a": Array(torch.ones(2).numpy())}),
                }
            ),
            "arrays must be of fastfpl.raw-1; got 'numpy.ndarray'",
        ),
    ):
        with pytest.raises(Refused, match=sentence):
            apps.letter_of(content)


@needs_flower
@pytest.mark.parametrize("method", ["pfedmoap", "promptfl-ft"])
def test_flowers_apps_play_a_run(method, tmp_path):
    """A ServerApp and a ClientApp that remembers nothing between messages but its disk."""
    from flwr.app import Context, RecordDict

    from tests.flower_grid import LocalGrid

    settings = make_settings(
        {"method": method, "options": GATE if method == "pfedmoap" else {}, **RUN}
    )
    config = {
        "settings": json.dumps(settings.model_dump()),
        "rules": "{}",
        "out": str(tmp_path / "out"),
        "resume": False,
    }
    nodes = {
        70 + c: {"partition-id": c, "state-dir": str(tmp_path / f"site-{c}"), "threads": 1}
        for c in range(2)
    }
    grid = LocalGrid(apps.client_app(), nodes, config)
    apps.server_app()(grid, Context(1, 1, {}, RecordDict(), config))
    networked = Result.load(tmp_path / "out")
    assert_same(networked, settings)
    assert networked.flower["version"] == apps.flower_version()
    assert not (tmp_path / "out" / "clients").exists()
    assert list((tmp_path / "site-0").glob("*/client-00000/own-*.safetensors"))
    assert grid.counted > 0


@pytest.mark.parametrize(
    ("run", "node", "sentence"),
    [
        ({"settings": "x"}, {"client": 0}, "settings of the run must be JSON of one mapping"),
        ({}, {"state-dir": "s"}, "client must be a whole number in the node's configuration"),
        ({}, {"client": True, "state-dir": "s"}, "client must be a whole number"),
        ({}, {"client": 0}, "state-dir must name a folder in the node's configuration"),
        ({}, {"client": 0, "state-dir": "s", "pretrained": "w"}, "pretrained of a node must be le"),
    ],
)
def test_wrong_configurations_are_sentences(run, node, sentence):
    with pytest.raises(InputError, match=sentence):
        apps.site_of({"settings": '{"method": "promptfl"}', **run}, node)


@needs_flower
@pytest.mark.timeout(400)
def test_real_processes_on_loopback_give_the_numbers_of_one(tmp_path, capsys):
    """A SuperLink and two SuperNodes, started, played and taken down by the command."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**RUN, "rounds": 1}.items()]
    out = tmp_path / "out"
    main(["flower", "up", "fedpgp", "-o", "bottleneck=2", "--out", str(out), *flags])
    networked = Result.load(out)
    settings = {**RUN, "method": "fedpgp", "rounds": 1, "options": {"bottleneck": 2}}
    assert_same(networked, make_settings(settings))
    assert networked.flower["stays_with_clients"] == ["u", "v"]
    assert all(memory > 1 << 26 for memory in networked.flower["client_memory_bytes"].values())
    main(["flower", "status", str(out)])
    assert "fedpgp: finished; 1 of 1 rounds ended; joined: 0, 1" in capsys.readouterr().out
    assert list((out / "flower" / "clients" / "site-1").glob("*/client-00001/own-*.safetensors"))


@needs_flower
@pytest.mark.skipif(not FORKS, reason="forks are for Linux")
def test_flowers_commands_are_forks_with_their_imports():
    """By their names on the path, with Flower's own words and end."""
    plain = node.environment()
    with node.warm_commands() as warm:
        for name in node.WARM_COMMANDS:
            for arguments in (["--help"], ["--no-such-flag"]):
                own, flowers = (
                    subprocess.run(
                        [shutil.which(name, path=env["PATH"]), *arguments],
                        env=env, capture_output=True, text=True, check=False,
                    )
                    for env in (warm, plain)
                )  # fmt: skip
                assert own.returncode == flowers.returncode
                assert own.stdout.replace("-c ", f"{name} ").split() == flowers.stdout.split()
            assert shutil.which(name, path=warm["PATH"]) != shutil.which(name, path=plain["PATH"])
        assert warm["FLWR_TELEMETRY_ENABLED"] == "0"


@needs_flower
def test_a_node_is_a_supernode_that_ends_as_it_ends(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(["flower", "node", "--superlink", "127.0.0.1:1", "--root-certificates", "no such"])
    assert end.value.code not in (0, None)
    assert "does not point to a file" in "".join(capfd.readouterr())


@needs_flower
def test_an_app_folder_is_one_that_flower_builds(tmp_path, capsys):
    folder = tmp_path / "app"
    tracked = ["--track", "tensorboard"] if importlib.util.find_spec("tensorboard") else []
    given = ["--lr", "0.1", "-r", "quorum=1.0", *tracked]
    main(["flower", "init", str(folder), "promptfl", *given])
    assert "run it by: flwr run" in capsys.readouterr().out
    import tomllib

    found = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    assert json.loads(found["config"]["settings"])["lr"] == 0.1
    assert json.loads(found["config"]["rules"])["quorum"] == 1.0
    assert found["config"]["track"] == ("tensorboard" if tracked else "")
    from flwr.cli.build import build_fab_from_disk

    assert len(build_fab_from_disk(folder)) < 10_000
    code, text = said(capsys, "flower", "init", folder, "promptfl")
    assert code == 2
    assert "the app's folder must be new or empty" in text


@needs_flower
def test_keys_are_for_their_owner(tmp_path, capsys):
    from cryptography import x509

    folder = tmp_path / "keys"
    main(["flower", "keys", str(folder), "--clients", "2", "--host", "10.0.0.1", "--host", "a.org"])
    check_keys(folder, 2)
    for name in ("ca.key", "server.key", "client-0", "client-1"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    root, leaf = (
        x509.load_pem_x509_certificate((folder / name).read_bytes())
        for name in ("ca.crt", "server.crt")
    )
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.org"]
    assert (folder / "client-1.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    code, text = said(
        capsys, "flower", "up", "promptfl", "--keys", folder, "--out", tmp_path / "o", "--clients=3"
    )
    assert code == 2
    assert "must hold certificates and keys of 3 clients; got no client-2, client-2.pub" in text


@needs_flower
def test_a_port_in_use_is_a_sentence(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = said(
            *(capsys, "flower", "up", "promptfl", "--port", port, "--out", tmp_path / "o")
        )
    assert code == 2
    assert f"port must be free on 127.0.0.1; got {port}" in text


@needs_flower
def test_a_superlink_that_is_not_there_is_a_sentence(tmp_path):
    away = lab.Lab(tmp_path, 1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "{away.address}"\n'
        "insecure = true\n"
    )
    with pytest.raises(InputError, match=f"flwr ls lab must succeed at {away.address}|ls lab must"):
        away.status("1")


def test_without_flower_the_command_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(Missing, match=r'pip install "fastfpl\[flower\]"'):
        apps.client_app()
    code, text = said(capsys, "flower", "up", "promptfl", "--out", tmp_path / "out")
    assert code == 2
    assert "fastfpl.flower: flwr must be installed; got none" in text
    assert not (tmp_path / "out").exists()
    code, text = said(capsys, "flower", "node", "--insecure")
    assert code == 2
    assert "fastfpl.flower: flwr must be installed; got none" in text


@needs_flower
def test_what_cannot_be_played_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab.subprocess, "Popen", None)
    out = tmp_path / "out"
    for flags, sentence in (
        (["fedapt-unsupervised"], "augment must be fresh or views:V for fedapt-unsupervised"),
        (["promptfl", "--as-released", "all"], "inherit from each other within a round"),
        (["promptfl", "--device", "tpu"], "device must be auto, cpu or cuda"),
        (["promptfl", "--preset", "none"], "none"),
    ):
        code, text = said(capsys, "flower", "up", *flags, "--out", out)
        assert (code, sentence in text) == (2, True), text
        assert not out.exists()


SECRET = ("-r", "aggregation=secagg+", "-r", "quorum=0.7")
NOISE = ("--dp-noise", 1, "--dp-clip", 1)
needs_dp = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting is not installed"
)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("pfedmoap", *SECRET), "plain for pfedmoap; .* single uploads in 'pool'"),
        (("prompt-fedamp", *SECRET), "aggregation must be plain for prompt-fedamp"),
        (("local", *SECRET), "and its clients send nothing"),
        (("zeroshot", *SECRET), "and its clients send nothing"),
        (("promptfl", *SECRET, "--clients", 2), "a round must call 3 to 1023 clients .* got 2"),
        (("promptfl", *SECRET, "--participation", 0.2), "3 to 1023 clients .* got 2"),
        (("promptfl", *SECRET, "--clients", 1024), "3 to 1023 clients .* got 1024"),
        (("promptfl", *SECRET[:2]), "quorum must be above 0.5 with aggregation=secagg"),
        (("promptfl", *SECRET, "--merge", "median"), "merge must be mean with aggregation=sec"),
        (("pfedmoap", "--merge", "median"), "merge must be mean for pfedmoap; got median, and"),
        (("promptfl", "--merge", "median", "--clients", 2), "at least 3 clients .* got 2"),
        (("promptfl", "--merge=krum", "--krum-malicious=4"), "at least 11 clients .* got 10"),
        (("local", "--clip-update", 1), "clip_update must be left out for local; got 1.0"),
        (("promptfl", "--scenario", "unseen-clients"), "scenario must not be 'unseen-clients'"),
        (("promptfl", "--evaluate-clients", 3), "evaluate_clients must be left out"),
        (("promptfl", "--as-released", "all"), "inherit from each other within a round"),
        (("promptfl", "--dataset", "own"), "partition must be 'given' with dataset='own'"),
        (("fedapt-unsupervised",), "augment must be fresh or views:V for fedapt-unsupervised"),
        (("promptfl", "--device", "tpu"), "device must be auto, cpu or cuda; got 'tpu'"),
        (("fedtpg", *SECRET, "-o", "heads=7"), "heads must divide the text width 128; got 7"),
        pytest.param(
            *(("pfedmoap", *NOISE), "dp_noise must be left out, or dp_unit be image, for pfedmoap"),
            marks=needs_dp,
        ),
        pytest.param(
            ("fedapt-unsupervised", "--augment", "fresh", *NOISE, "--dp-unit", "image"),
            "dp_unit must be client, or dp_noise left out, for fedapt-unsupervised",
            marks=needs_dp,
        ),
        pytest.param(
            *(("promptfl", *NOISE, *SECRET), "dp_unit must be image with aggregation=secagg"),
            marks=needs_dp,
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused_at_once(flags, sentence, tmp_path, capsys):
    """By the commands that write an app and that play one, which write nothing then."""
    method, *more = flags
    for place in (
        ("init", tmp_path / "app", method, "--out", tmp_path / "out"),
        ("up", method, "--out", tmp_path / "out"),
    ):
        code, text = said(capsys, "flower", *place, "--clip", "tiny", *more)
        assert code == 2
        assert re.search(sentence, text), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        ("promptfl", *SECRET, "--clients", 3),
        ("promptfl", "--merge", "trimmed"),
        ("fedapt", *SECRET, "--clip", "ViT-B-16"),
        # for a tower of another width than the one that the trial is made on
        ("fedtpg", *SECRET, "--clip", "ViT-L-14", "-o", "heads=12"),
        # one client of each domain: the data set's to say
        ("promptfl", *SECRET, "--partition", "domain", "--sampling", "domain"),
        ("promptfl", "--device", "cuda"),
    ],
)
def test_what_hangs_on_what_is_elsewhere_is_left_to_the_run(flags, tmp_path):
    method, *more = map(str, flags)
    clients = [] if "--clients" in more else ["--clients", "10"]
    main(["flower", "init", str(tmp_path / "app"), method, *clients, *more])
    assert (tmp_path / "app" / "pyproject.toml").exists()


OWN_METHOD = """
import torch
from fastfpl.errors import InputError
from fastfpl.methods import METHODS

class Wide(METHODS["promptfl"]):
    name, summary = "wide", "for a text tower of width 512"
    def start(self, down, own, *, training):
        return {"ctx": down["ctx"] @ torch.eye(512)}, {}

class Many(METHODS["promptfl"]):
    name, summary = "many", "for more classes than a few"
    def __init__(self, task, options):
        if len(task.classes.names) < 5:
            raise InputError("classes must be five or more")
        super().__init__(task, options)

class Named(METHODS["promptfl"]):
    name, summary = "named", "by a table of its classes"
    def merge(self, server, uploads, images, round_):
        weights = [{"0": 1.0, "1": 2.0}[name] for name in self.task.classes.names]
        return super().merge(server, uploads, images, round_)

class Keeps(METHODS["pfedmoap"]):
    name, summary = "keeps", "single uploads"
"""


@pytest.mark.parametrize("clip", ["tiny", "ViT-B-16"])
def test_a_method_of_the_users_own_may_be_for_the_runs_classes_and_tower(clip, tmp_path, capsys):
    """What it says of the trial's is nothing that it would say of them."""
    (tmp_path / "mine.py").write_text(OWN_METHOD)
    flags = ("--clip", clip, "--clients", "4", *SECRET)
    for name in ("Wide", "Many", "Named"):
        app = tmp_path / name
        main(["flower", "init", str(app), f"{tmp_path / 'mine.py'}:{name}", *flags])
        assert (app / "pyproject.toml").exists()
    code, text = said(
        capsys, "flower", "init", tmp_path / "app", f"{tmp_path / 'mine.py'}:Keeps", *flags
    )
    assert code == 2
    assert "aggregation must be plain for keeps" in text


def test_no_trial_is_made_of_a_plain_run(tmp_path, monkeypatch):
    from fastfpl.flower import preparation

    monkeypatch.setattr(preparation, "load_model", None)
    main(["flower", "init", str(tmp_path / "app"), "pfedmoap"])
    with pytest.raises(TypeError, match="not callable"):
        main(["flower", "init", str(tmp_path / "other"), "pfedmoap", *SECRET])


def test_rules_have_a_table_and_a_flag(capsys):
    main(["flower", "rules"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in make_rules({}).model_dump())
    code, text = said(capsys, "flower", "up", "promptfl", "-r", "quorum")
    assert (code, "rule must read KEY=VALUE; got 'quorum'" in text) == (2, True)
    code, text = said(capsys, "flower", "init", "x", "promptfl", "--resume")
    assert (code, "resume must be left out of init" in text) == (2, True)
