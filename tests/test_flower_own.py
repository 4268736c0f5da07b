"""Clients on Flower whose images are their own: the figures of one process that has them all."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest

import fastfpl
from fastfpl.cli import main
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.data.partitions import held_alone, partition
from fastfpl.errors import Damaged, InputError
from fastfpl.federation import Result
from fastfpl.flower import apps, lab
from fastfpl.flower.rules import make_rules
from fastfpl.flower.server import serve
from fastfpl.flower.site import Site
from fastfpl.flower.status import read_status
from tests.own_trees import VENDORS, tree, vendors
from tests.post import Mailbox
from tests.worlds import GATE, TINY_RUN

RUN = {**TINY_RUN, "local_epochs": 1, "threads": 1, "partition": "given", "shots": 2}
OPTIONS = {"pfedmoap": GATE, "fedpgp": {"bottleneck": 2}, "fedtpg": {"widening": 1}}
NAMES = VENDORS[:3]


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``split/vendor/class/N.png``: what all clients have together."""
    folder = tmp_path_factory.mktemp("whole")
    drawn = vendors(folder / "drawn", each=5)
    for name in NAMES:
        for image in sorted((drawn / name).rglob("*.png")):
            split = "test" if image.stem in "34" else "train"
            place = folder / "all" / split / name / image.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place)
    return folder / "all"


@pytest.fixture(scope="module")
def apart(whole, tmp_path_factory):
    """Give the folder of each client, ``split/class/N.png``."""
    folder = tmp_path_factory.mktemp("apart")
    for name in NAMES:
        for split in ("train", "test"):
            shutil.copytree(whole / split / name, folder / name / split)
    return folder


def settings_of(method, **more):
    settings = {**RUN, "dataset": "own", "clients": len(NAMES), **more}
    return make_settings({"method": method, "options": OPTIONS.get(method, {}), **settings})


def sites_of(settings, apart, folder, clip, cache, **more):
    return {
        c: Site(
            settings,
            c,
            folder / f"site-{c}",
            cache=cache,
            model=clip,
            data=f"folder:{apart / name}",
            name=name,
            **more,
        )
        for c, name in enumerate(NAMES)
    }


def play(settings, folder, clip, sites, rules=None, **more):
    post = Mailbox(sites)
    return serve(
        settings, make_rules(rules or {}), folder / "out", post, model=clip, log=len, **more
    )


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap", "fedapt", "zeroshot"])
def test_figures_are_those_of_one_process_with_all_images(
    method, whole, apart, tmp_path, clip, cache
):
    settings = settings_of(method)
    there = play(settings, tmp_path, clip, sites_of(settings, apart, tmp_path, clip, cache))
    alone = fastfpl.run(
        settings.model_copy(update={"dataset": f"folder:{whole}", "clients": None}),
        model=clip,
        cache=cache,
    )
    for one, other in zip(there.rounds, alone.rounds, strict=True):
        for key in ("accuracy", "clients", "exams", "selected", "bytes_up", "bytes_down"):
            assert one[key] == other[key], key
        if other["loss"] is not None:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for key in ("classes", "train_images", "test_images", "training", "clients", "exams"):
        assert there.data[key] == alone.data[key], key
    assert there.data["clients"] == list(NAMES)
    assert there.data["name"] == "own"
    assert "deal" not in there.data
    assert Result.load(tmp_path / "out").to_json() == there.to_json()
    # no name of a folder reaches the server
    assert str(apart) not in (tmp_path / "out" / "result.json").read_text()
    assert str(apart) not in (tmp_path / "out" / "flower.json").read_text()


@pytest.mark.parametrize("shots", [1, 3, None])
def test_a_deal_of_one_client_is_its_part_of_the_whole(shots):
    draw = np.random.default_rng(0)
    labels, owner, tested = draw.integers(0, 3, 60), np.arange(60) % 4, np.arange(20) % 4
    whole = partition(
        "given",
        labels,
        np.zeros(20, np.int64),
        np.zeros(60, np.int64),
        np.zeros(20, np.int64),
        classes=3,
        clients=4,
        seed=7,
        shots=shots,
        train_clients=owner,
        test_clients=tested,
    )
    for client in range(4):
        mine = np.flatnonzero(owner == client)
        dealt = held_alone(labels[mine], 5, client=client, clients=4, shots=shots, seed=7)
        assert np.array_equal(mine[dealt[client].train], whole[client].train)
        assert len(dealt[client].test) == len(whole[client].test)
        assert all(not len(dealt[c].train) + len(dealt[c].test) for c in range(4) if c != client)


def test_other_classes_and_names_are_refused_at_join(apart, tmp_path, clip, cache):
    settings = settings_of("promptfl", rounds=1)
    shutil.copytree(apart / NAMES[2], tmp_path / "fewer")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "fewer" / split / "red_heart")
    sites = sites_of(settings, apart, tmp_path, clip, cache)
    sites[2] = Site(
        settings, 2, tmp_path / "f", cache=cache, model=clip, data=f"folder:{tmp_path / 'fewer'}"
    )
    rules = {"quorum": 0.3, "patience": 5.0, "grace": 1.0}
    result = play(settings, tmp_path, clip, sites, rules)
    (note,) = read_status(tmp_path / "out")["noted"]
    assert "the list of classes must be the server's, " in note["why"]
    assert note["client"] == 2
    assert result.rounds[0]["lost"] == [2]
    assert result.data["clients"] == [*NAMES[:2], "client-2"]
    same = sites_of(settings, apart, tmp_path / "b", clip, cache)
    same[1] = Site(
        settings,
        1,
        tmp_path / "b" / "x",
        cache=cache,
        model=clip,
        data=f"folder:{apart / NAMES[1]}",
        name=NAMES[0],
    )
    play(settings, tmp_path / "b", clip, same, rules)
    (note,) = read_status(tmp_path / "b" / "out")["noted"]
    assert "clients must have names of their own; got 'apple' from client 1, which client 0" in str(
        note["why"]
    )


def test_a_run_goes_on_with_the_same_images_alone(apart, tmp_path, clip, cache):
    settings = settings_of("promptfl")
    whole = play(
        settings, tmp_path / "w", clip, sites_of(settings, apart, tmp_path / "w", clip, cache)
    )

    def stop(label, row):
        raise KeyboardInterrupt

    sites = sites_of(settings, apart, tmp_path, clip, cache)
    with pytest.raises(KeyboardInterrupt):
        play(settings, tmp_path, clip, sites, on_round=stop)
    shutil.copytree(apart / NAMES[0], tmp_path / "more")
    tree(tmp_path / "more", "train/red_heart/9.png")
    other = Site(
        settings,
        0,
        tmp_path / "site-0",
        cache=cache,
        model=clip,
        data=f"folder:{tmp_path / 'more'}",
        name=NAMES[0],
    )
    # its first client comes later: those of the checkpoint are compared one by one
    rules = {"quorum": 0.3, "patience": 5.0, "grace": 1.0}
    changed = {**sites, 0: other}
    shutil.copytree(tmp_path / "out", tmp_path / "c" / "out")
    play(settings, tmp_path / "c", clip, changed, rules, resume=True)
    (note,) = read_status(tmp_path / "c" / "out")["noted"]
    assert "client 0 must keep its name and images, " in note["why"]
    resumed = play(settings, tmp_path, clip, sites, resume=True)
    assert [row["clients"] for row in resumed.rounds] == [row["clients"] for row in whole.rounds]
    assert resumed.data == whole.data


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"partition": "iid"}, "partition must be 'given' with dataset='own'"),
        ({"scenario": "global"}, "scenario must be 'personal' with dataset='own'"),
        ({"statistics": "dataset"}, "statistics must be 'clip' with dataset='own'"),
        ({"root": "x"}, "root must be left out with dataset='own'"),
        ({"clients": None}, "clients must be said with partition='given'"),
    ],
)
def test_settings_that_need_all_images_are_refused(more, sentence, tmp_path, clip):
    with pytest.raises(InputError, match=sentence):
        play(settings_of("promptfl", **more), tmp_path, clip, {})


def test_what_is_missing_is_a_sentence(apart, tmp_path, clip):
    settings = settings_of("promptfl")
    with pytest.raises(InputError, match="data must name its own images, as folder:PATH, with"):
        Site(settings, 0, tmp_path)
    with pytest.raises(InputError, match="data must be left out of a node with dataset='digits'"):
        Site(make_settings({"method": "promptfl", **TINY_RUN}), 0, tmp_path, data="folder:x")
    with pytest.raises(InputError, match="client must be one of 3, 0 to 2; got 3"):
        _ = Site(settings, 3, tmp_path, model=clip, data=str(apart / NAMES[0])).planned
    with pytest.raises(InputError, match="dataset must not be 'own' in one process"):
        fastfpl.run(settings, model=clip)
    run = {"settings": '{"method": "promptfl", "dataset": "own", "partition": "given"}'}
    node = {"client": 0, "state-dir": str(tmp_path)}
    with pytest.raises(InputError, match="data must be text in the node's configuration; got 3"):
        apps.site_of(run, {**node, "data": 3})
    tree(tmp_path / "none", *(f"train/{c}/0.png" for c in ("a", "b")))
    with pytest.raises(Damaged, match="must hold two images of a class"):
        _ = Site(settings, 0, tmp_path, model=clip, data=str(tmp_path / "none")).planned


def test_places_are_looked_at_before_anything_is_started(apart, tmp_path):
    settings = settings_of("promptfl")
    own = {name: str(apart / name) for name in NAMES}
    found = lab._places(settings, 3, own)
    assert found == {name: f"folder:{apart / name}" for name in NAMES}
    with pytest.raises(
        InputError, match=r"own must name the images of every client .* got 2 for 3"
    ):
        lab._places(settings, 3, dict(list(own.items())[:2]))
    with pytest.raises(
        InputError, match=r"own must name the images of every client .* got 0 for 3"
    ):
        lab._places(settings, 3, {})
    with pytest.raises(InputError, match="own must hold no double quotation mark"):
        lab._places(settings, 3, {**own, NAMES[1]: 'a"b'})
    shutil.copytree(apart / NAMES[0], tmp_path / "fewer")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "fewer" / split / "red_heart")
    with pytest.raises(InputError, match=r"list of classes must be the same .* 'red heart'"):
        lab._places(settings, 3, {**own, NAMES[1]: str(tmp_path / "fewer")})


@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.timeout(400)
def test_real_processes_each_with_its_own_folder(whole, apart, tmp_path, clip, cache):
    out, flags = tmp_path / "out", []
    for name in NAMES[:2]:  # names and paths may hold blanks
        shutil.copytree(apart / name, tmp_path / f"of {name}")
        flags += ["--own", f"the {name}={tmp_path / f'of {name}'}"]
    more = {**RUN, "rounds": 1}
    del more["dataset"], more["clients"]
    flags += [f"--{k.replace('_', '-')}={v}" for k, v in more.items()]
    main(["flower", "up", "promptfl", "--out", str(out), *flags])
    result = Result.load(out)
    assert result.data["clients"] == [f"the {name}" for name in NAMES[:2]]
    assert result.settings["dataset"] == "own"
    shutil.copytree(whole, tmp_path / "two")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "two" / split / NAMES[2])
    alone = fastfpl.run(
        "promptfl", **more, dataset=f"folder:{tmp_path / 'two'}", model=clip, cache=cache
    )
    assert result.rounds[0]["clients"] == alone.rounds[0]["clients"]
    assert result.rounds[0]["loss"] == pytest.approx(alone.rounds[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--own", "a"], "own must read NAME=PATH; got 'a'"),
        (["--own", "a=x", "--own", "a=y"], "own must name a client once; got 'a' twice"),
        (["--own", "a=x", "--dataset", "digits"], "dataset must be own or left out with 1 --own"),
        (["--own", "a=x", "--clients", "3"], "clients must be 1 or left out with 1 --own; got 3"),
    ],
)
def test_wrong_flags_are_sentences(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(["flower", "up", "promptfl", *arguments])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert sentence in " ".join((shown.out + shown.err).split())
