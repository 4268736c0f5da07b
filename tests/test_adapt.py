"""A client that was not there in training: it joins, is kept, and changes nothing of the run."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastfpl
import fastfpl.federation.preparation
from fastfpl import methods
from fastfpl.cli import main
from fastfpl.data import load_dataset
from fastfpl.errors import Damaged, InputError
from fastfpl.federation.lock import alone_in
from fastfpl.federation.server import Round
from fastfpl.methods import METHODS, own
from fastfpl.released import visits_of
from fastfpl.trained import adapt
from fastfpl.trained.adaptation import _Renumbered
from tests.worlds import GATE, TINY_RUN, figures, small_clip

RUN = {**TINY_RUN, "local_epochs": 1, "threads": 1, "seed": 1, "shots": 4}
OPTIONS = {
    "pfedmoap": GATE,
    "promptfl-ft": {"epochs": 1},
    "fedapt-unsupervised": {"pseudo_rounds": 1, "threshold": 0.0},
}
TRAINED = [name for name, method in METHODS.items() if method.trains]


@pytest.fixture(scope="module", autouse=True)
def one_thread_one_digits():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = load_dataset("digits")
    patch = pytest.MonkeyPatch()
    patch.setattr(fastfpl.federation.preparation, "load_dataset", lambda name, root, **more: digits)
    yield digits
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def played(clip, cache, tmp_path_factory):
    known = {}

    def run(method, **changes):
        key = repr((method, sorted(changes.items())))
        if key not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            settings = {**RUN, "options": OPTIONS.get(method, {}), **changes}
            if METHODS[method].paired:
                settings["augment"] = "views:1"
            known[key] = out, fastfpl.run(method, model=clip, cache=cache, out=out, **settings)
        return known[key]

    return run


def files(folder):
    """Every file but those of clients that joined."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(n): p.read_bytes() for n, p in found.items() if n.parts[0] != "joined"}


@pytest.mark.parametrize("method", TRAINED)
def test_a_newcomer_is_kept_and_the_run_is_as_it_was(
    method, played, clip, cache, tmp_path, one_thread_one_digits
):
    out, _ = played(method)
    shutil.copytree(out, tmp_path / "run")
    before = files(tmp_path / "run")
    digits = one_thread_one_digits
    said = adapt(tmp_path / "run", digits, name="Zürich", model=clip, cache=cache)
    assert (said.images, said.test_images) == (4 * 10, len(digits.test))
    model = fastfpl.load(tmp_path / "run", model=clip)
    assert model.joined == ["Zürich"]
    client = model.client("Zürich")
    images = list(digits.test.images(range(len(digits.test))))
    right = (
        np.array(client.predict(images).names) == np.array(digits.classnames)[digits.test.labels]
    )
    # one batch of images here and in its own evaluation
    assert right.mean() == pytest.approx(said.after, abs=0.01)
    # nothing of the run is another, and it goes on as if nobody had come
    assert files(tmp_path / "run") == before
    more = {**RUN, "options": OPTIONS.get(method, {}), "rounds": 3}
    if METHODS[method].paired:
        more["augment"] = "views:1"
    on = fastfpl.run(method, model=clip, cache=cache, out=tmp_path / "run", resume=True, **more)
    whole = fastfpl.run(method, model=clip, cache=cache, **more)
    assert figures(on) == figures(whole)
    again = fastfpl.load(tmp_path / "run", model=clip).client("Zürich")
    features = client.image_features(images[:20])
    assert torch.equal(again.logits(features), client.logits(features))


def test_the_same_name_is_the_same_client_and_draws_its_key(
    played, clip, cache, tmp_path, one_thread_one_digits
):
    out, _ = played("fedapt")
    heads = []
    for place, name in (("a", "Bern"), ("b", "Bern"), ("c", "Rom")):
        shutil.copytree(out, tmp_path / place)
        adapt(tmp_path / place, one_thread_one_digits, name=name, model=clip, cache=cache)
        heads.append(fastfpl.load(tmp_path / place, model=clip).client(name).head)
    assert torch.equal(heads[0].text, heads[1].text)
    assert not torch.equal(heads[0].text, heads[2].text)
    keys = [head.method.keys for head in heads]
    # four of the run, which are the run's, and one of its own in [0, 1)
    assert keys[0].shape[0] == 5
    assert torch.equal(keys[0][:4], fastfpl.load(out, model=clip).method.keys)
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0][4], keys[2][4])
    assert 0 <= keys[0][4].min() < 0.1 < 0.9 < keys[0][4].max() < 1
    assert heads[0].trained["query"].shape[1] == 5


def test_a_newcomer_of_a_known_domain_has_its_key(played, clip):
    method = fastfpl.load(played("fedapt")[0], model=clip).method
    task = replace(method.task, domains=("ink", "photo"), client_domains=(1, 0, 1, 0))
    method = type(method)(task, method.options.model_dump())
    server = method.server_init()
    admitted, room = method.admit(server, "x", 1)
    assert admitted.download(room, 4, 0)["key"] == method.download(server, 0, 0)["key"] == 1
    assert len(admitted.keys) == len(room["query"]) == 2
    admitted, room = method.admit(server, "x", None)
    assert admitted.download(room, 4, 0)["key"] == 2
    assert len(admitted.keys) == len(room["query"]) == 3
    # over other classes it is the same newcomer
    other = admitted.on(method.task.classes)
    assert torch.equal(other.keys, admitted.keys)
    assert other.download(room, 4, 0)["key"] == 2


def test_a_newcomer_of_pfedmoap_gets_the_nearest_of_the_pool(
    played, clip, cache, tmp_path, one_thread_one_digits
):
    out, _ = played("pfedmoap")
    shutil.copytree(out, tmp_path / "run")
    adapt(tmp_path / "run", one_thread_one_digits, name="x", model=clip, cache=cache)
    model = fastfpl.load(tmp_path / "run", model=clip)
    client = model.client("x")
    down, pool = client._down, model.checkpoint.server["pool"]
    assert down["experts"].shape[0] == 2  # of GATE's three experts one is its own
    # its own prompt after the first participation is what it started the second from
    away = (pool - down["ctx"]).flatten(1).double().norm(dim=1)
    owner = model.checkpoint.server["pool_owner"]
    assert down["expert_owner"].tolist() == sorted(owner[away.argsort()[:2]].tolist())
    assert "gate.w_q" in client._own
    assert "experts" in client.head.fixed
    once = adapt(
        *(tmp_path / "run", one_thread_one_digits),
        **{"name": "once", "model": clip, "cache": cache, "participations": 1},
    )
    assert once.loss is not None
    assert "experts" not in fastfpl.load(tmp_path / "run", model=clip).client("once").head.fixed


def test_local_training_from_the_server_is_what_a_client_does(
    played, clip, cache, tmp_path, one_thread_one_digits
):
    """A newcomer with the images of a client, in PromptFL: its upload is its model."""
    out, _ = played("promptfl")
    shutil.copytree(out, tmp_path / "run")
    first = adapt(tmp_path / "run", one_thread_one_digits, name="a", model=clip, cache=cache)
    twice = adapt(
        *(tmp_path / "run", one_thread_one_digits),
        **{"name": "b", "model": clip, "cache": cache, "participations": 3},
    )
    model = fastfpl.load(tmp_path / "run", model=clip)
    server = model.checkpoint.server["ctx"]
    ctx = [model.client(name)._down["ctx"] for name in ("a", "b")]
    assert not torch.equal(ctx[0], server)
    assert not torch.equal(ctx[0], ctx[1])
    assert twice.loss < first.loss


def test_the_order_of_classes_is_the_run_s(played, clip, cache, tmp_path, one_thread_one_digits):
    digits = one_thread_one_digits
    shutil.copytree(played("promptfl")[0], tmp_path / "run")
    turned = np.arange(9, -1, -1)
    other = replace(
        digits,
        classnames=digits.classnames[::-1],
        train=_Renumbered(digits.train, turned),
        test=_Renumbered(digits.test, turned),
    )
    same = {"model": clip, "cache": cache}
    first = adapt(tmp_path / "run", digits, name="a", **same)
    second = adapt(tmp_path / "run", other, name="b", **same)
    assert replace(second, name="a") == first


def test_schedules_begin_anew(played, clip, cache, tmp_path, one_thread_one_digits):
    """At the end of a cosine over rounds nothing would be learned."""
    out, _ = played("promptfl", schedule="cosine-rounds")
    shutil.copytree(out, tmp_path / "run")
    adapt(tmp_path / "run", one_thread_one_digits, name="a", model=clip, cache=cache)
    model = fastfpl.load(tmp_path / "run", model=clip)
    moved = (model.client("a")._down["ctx"] - model.checkpoint.server["ctx"]).abs().max()
    assert moved > 1e-3


def test_bad_input_is_a_sentence(played, clip, cache, tmp_path, one_thread_one_digits):
    out, _ = played("promptfl")
    digits = one_thread_one_digits
    shutil.copytree(out, tmp_path / "run")
    run = tmp_path / "run"

    def refused(sentence, dataset=digits, folder=run, **more):
        before = sorted(p.name for p in folder.rglob("*"))
        with pytest.raises(InputError, match=sentence):
            adapt(folder, dataset, **{"model": clip, "cache": cache, **more})
        assert sorted(p.name for p in folder.rglob("*")) == before

    for name in ("3", "../x", "", ".x", "a/b", "global", "x" * 101, "a b"):
        refused("the name of a client must be letters", name=name)
    names = list(digits.classnames)
    other = ("cat", *names[1:])
    refused("in any order; got 10, without '.*', besides 'cat'", replace(digits, classnames=other))
    refused("shots must be at least 1; got 0", shots=0)
    refused("participations must be at least 1; got 0", participations=0)
    refused("must be of a method that trains; got zeroshot", folder=played("zeroshot")[0])
    relayed = played("pfedmoap", as_released="pfedmoap-inherited-gate")[0]
    assert visits_of(["pfedmoap-inherited-gate"], "constant", 0.1) is not None
    refused("in which clients train side by side; got as_released", folder=relayed)
    adapt(run, digits, name="x", model=clip, cache=cache)
    refused("must be new; got 'x', which has joined", name="x")
    with alone_in(run):
        refused("must be used by one run at a time", name="y")
    assert adapt(run, digits, model=clip, cache=cache).name == "digits"
    assert adapt(run, digits, model=clip, cache=cache).name == "digits-2"


def test_a_file_that_is_damaged_is_refused(played, clip, cache, tmp_path, one_thread_one_digits):
    out, _ = played("promptfl")
    shutil.copytree(out, tmp_path / "run")
    adapt(tmp_path / "run", one_thread_one_digits, name="x", model=clip, cache=cache)
    model = fastfpl.load(tmp_path / "run", model=clip)
    states, manifest = (tmp_path / "run" / "joined" / f"x.{end}" for end in ("safetensors", "json"))
    whole, said = states.read_bytes(), json.loads(manifest.read_text())
    assert said["about"]["images"] == 40
    states.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match="its checksum is not the one that was written"):
        model.client("x")
    states.write_bytes(whole)
    for change, sentence in (
        ({"name": "y"}, "got the name 'y'"),
        ({"weights": "0" * 32}, "must have joined this run; got one"),
        ({"format": "fastfpl-joined-2"}, "format"),
        ({"more": 1}, "more: Extra inputs"),
    ):
        manifest.write_text(json.dumps({**said, **change}))
        with pytest.raises(Damaged, match=sentence):
            model.client("x")
    manifest.write_text("{")
    with pytest.raises(Damaged, match=r"x\.json must be of a client that joined"):
        model.client("x")
    # a process that died before the manifest has left nothing that counts
    manifest.unlink()
    adapt(tmp_path / "run", one_thread_one_digits, name="x", model=clip, cache=cache)
    assert states.read_bytes() == whole


def test_on_the_command_line(tmp_path, cache, capsys):
    fastfpl.run("promptfl", out=tmp_path / "run", cache=cache, **{**RUN, "rounds": 1})
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(load_dataset("digits").test.images([0])[0]).save(images / "a.png")
    given = ["--client-name", "Bern", "--shots", "2", "--cache", str(cache)]
    main(["adapt", str(tmp_path / "run"), "--dataset", "digits", *given])
    shown = capsys.readouterr().out
    assert shown.startswith("Bern: 20 training images; accuracy on its 599 test images ")
    main(["predict", str(tmp_path / "run"), str(images), "--client", "Bern", "--top", "1"])
    assert "a.png" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["adapt", str(tmp_path / "run"), "--dataset", "glyphs"])
    assert stop.value.code == 2
    assert "dataset must have the 10 classes of the run, in any order" in capsys.readouterr().err


MINE = """
from fastfpl.methods import PromptFL


class Mine(PromptFL):
    name = "mine"
    summary = "as PromptFL"
"""


def test_a_method_from_outside_and_images_in_a_folder(
    clip, cache, tmp_path, monkeypatch, one_thread_one_digits
):
    monkeypatch.setattr(own, "KNOWN", {})
    monkeypatch.setattr(methods, "KNOWN", own.KNOWN)
    (tmp_path / "mine.py").write_text(MINE)
    digits, name = one_thread_one_digits, f"{tmp_path / 'mine.py'}:Mine"
    run = tmp_path / "run"
    fastfpl.run(name, model=clip, cache=cache, out=run, **RUN)
    for number, image in enumerate(digits.train.images(range(120))):
        side = "test" if number % 4 == 0 else "train"
        place = tmp_path / "images" / side / digits.classnames[digits.train.labels[number]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(place / f"{number}.png")
    # a process that has not seen the class
    own.KNOWN.clear()
    with pytest.raises(InputError, match=r"must be known; it is Mine .*: name it by method="):
        fastfpl.load(run, model=clip)
    images = f"folder:{tmp_path / 'images'}"
    said = adapt(run, images, shots=3, model=clip, method=name, cache=cache)
    assert (said.name, said.test_images) == ("images", 30)
    own.KNOWN.clear()
    client = fastfpl.load(run, model=clip, method=name).client("images")
    assert len(client.predict(tmp_path / "images" / "test").names) == 30


# -- the protocol ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_unseen_clients_join_after_the_last_round(method, clip, cache, tmp_path):
    settings = {**RUN, "scenario": "unseen-clients", "unseen": 0.5, "rounds": 2}
    settings["options"] = OPTIONS.get(method, {})
    if METHODS[method].paired:
        settings["augment"] = "views:1"
    result = fastfpl.run(method, model=clip, cache=cache, out=tmp_path / "run", **settings)
    last = result.rounds[-1]
    assert list(last["exams"]) == ["unseen", "before", "own"]
    assert result.data["others"] == 2
    assert [len(exam["clients"]) for exam in last["exams"].values()] == [2, 2, 2]
    assert last["accuracy"] == last["exams"]["unseen"]["accuracy"]
    assert set(last["selected"]) <= {0, 1}
    # the file is a result, and the folder answers with the same
    assert fastfpl.Result.load(tmp_path / "run").final == result.final
    model = fastfpl.load(tmp_path / "run", model=clip)
    assert (model.clients, model.newcomers) == (2, 2)
    federation = fastfpl.federation.preparation.prepare(model.settings, model=clip, cache=cache)
    exam = federation.newcomers.adapted
    for place in range(2):
        at = exam.images[place]
        said = model.client(2 + place).logits(exam.feed.batch(at)).argmax(dim=-1).numpy()
        right = (said == exam.feed.split.labels[at]).mean()
        assert right == last["exams"]["unseen"]["clients"][place]
    # the others are a run of their own: whoever comes later changes nothing for them
    if METHODS[method].trains and method != "promptfl-ft":
        server = Round.first(federation.method)
        assert federation.now.server.keys() == server.server.keys()


def test_a_share_of_the_clients_is_unseen(clip, cache):
    def asked(**more):
        settings = {**RUN, "clients": 10, "rounds": 1, "scenario": "unseen-clients", **more}
        return fastfpl.run("promptfl", model=clip, cache=cache, **settings).data

    first, again = asked(), asked()
    assert first == again
    assert (len(first["train_images"]), first["others"]) == (2, 8)
    assert (len(asked(unseen=0.5)["train_images"]), asked(unseen=0.5)["others"]) == (5, 5)
    assert asked(unseen=0.01)["others"] == 9
    assert asked(seed=5)["exams"]["unseen"] != first["exams"]["unseen"]


def test_an_unseen_run_resumes(clip, cache, tmp_path):
    settings = {**RUN, "scenario": "unseen-clients", "options": GATE, "rounds": 3}

    def stop(label, row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    same = {"model": clip, "cache": cache, "out": tmp_path / "run", **settings}
    with pytest.raises(KeyboardInterrupt):
        fastfpl.run("pfedmoap", on_round=stop, **same)
    resumed = fastfpl.run("pfedmoap", resume=True, **same)
    assert figures(resumed) == figures(fastfpl.run("pfedmoap", **{**same, "out": tmp_path / "w"}))


def test_an_unseen_run_within_a_budget(clip, cache):
    settings = {**RUN, "scenario": "unseen-clients", "options": GATE}
    free = fastfpl.run("pfedmoap", model=clip, cache=cache, **settings)
    bound = fastfpl.run("pfedmoap", model=clip, cache=cache, max_memory="8GiB", **settings)
    assert bound.memory is not None
    assert bound.final["exams"] == pytest.approx(free.final["exams"], abs=0.02)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"unseen": 0.3}, "unseen must be left out but with scenario='unseen-clients'"),
        ({"unseen": 1.0, "scenario": "unseen-clients"}, "unseen is refused"),
        ({"clients": 1, "scenario": "unseen-clients"}, "clients must be two at least"),
        (
            {"scenario": "unseen-clients", "as_released": "pfedmoap-inherited-gate"},
            "whose newcomers follow nobody; got pfedmoap-inherited-gate",
        ),
    ],
)
def test_settings_of_the_protocol(settings, sentence, clip, cache):
    with pytest.raises(InputError, match=sentence):
        fastfpl.run("pfedmoap", model=clip, cache=cache, **{**RUN, "options": GATE, **settings})
