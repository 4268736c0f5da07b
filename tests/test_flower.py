"""A networked run is the in-process run: equal figures, faults survived, bad answers refused."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import pytest
import torch

import fastfpl
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.errors import Damaged, InputError
from fastfpl.federation import Result
from fastfpl.federation.checkpoint import read_checkpoint
from fastfpl.federation.preparation import prepare
from fastfpl.federation.sampling import Sampling
from fastfpl.flower.checks import check_card
from fastfpl.flower.identity import task_digest
from fastfpl.flower.letters import SCHEMA, Letter, Refused, digest, pack, unpack
from fastfpl.flower.memory import Memory
from fastfpl.flower.rules import make_rules
from fastfpl.flower.server import serve
from fastfpl.flower.site import Site
from fastfpl.flower.status import read_status
from fastfpl.methods import METHODS
from fastfpl.report import html_page
from fastfpl.tracking import METRICS, Callback, metrics_of
from tests.post import FakeSite, Mailbox
from tests.worlds import GATE, TINY_RUN

RUN = {**TINY_RUN, "clients": 3, "local_epochs": 1, "threads": 1}
OPTIONS = {"pfedmoap": GATE, "fedpgp": {"bottleneck": 2}, "fedtpg": {"widening": 1}}
MORE = {"fedapt-unsupervised": {"augment": "views:2"}}


def quiet(text):
    """Say nothing."""


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings_of(method, **more):
    chosen = {**RUN, **MORE.get(method, {}), **more}
    return make_settings({"method": method, "options": OPTIONS.get(method, {}), **chosen})


def sites_of(settings, folder, clip, cache, wire="exact"):
    return {
        c: Site(settings, c, folder / f"site-{c}", cache=cache, model=clip, wire=wire)
        for c in range(settings.clients)
    }


def play(settings, folder, clip, cache, rules=None, post=None, **more):
    chosen = make_rules(rules or {})
    if post is None:
        post = Mailbox(sites_of(settings, folder, clip, cache, chosen.wire))
    return serve(settings, chosen, folder / "out", post, model=clip, log=quiet, **more)


def assert_same(one, other):
    assert len(one.rounds) == len(other.rounds)
    for a, b in zip(one.rounds, other.rounds, strict=True):
        for key in ("accuracy", "clients", "exams", "selected", "lost", "bytes_up", "bytes_down"):
            assert a[key] == b[key], key
        if a["loss"] is None:
            assert b["loss"] is None
        else:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert one.final == other.final
    assert one.data == other.data
    assert one.settings == other.settings


# --- one seed, one answer -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_networked_run_gives_the_numbers_of_one_process(method, tmp_path, clip, cache):
    trains = METHODS[method].trains
    settings = settings_of(method, **({"participation": 0.7, "dropout": 0.2} if trains else {}))
    alone = fastfpl.run(settings, model=clip, cache=cache)
    networked = play(settings, tmp_path, clip, cache)
    assert_same(networked, alone)
    assert networked.flower["refused"] == networked.flower["failed"] == 0
    assert Result.load(tmp_path / "out").to_json() == networked.to_json()
    saved = read_checkpoint(tmp_path / "out")
    assert saved.facts["engine"] == "flower"
    assert not saved.clients
    if networked.flower["stays_with_clients"]:
        with pytest.raises(InputError, match="stays with them"):
            fastfpl.load(tmp_path / "out", model=clip).client(0)
    else:
        fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "alone")
        sides = [fastfpl.load(tmp_path / name, model=clip) for name in ("out", "alone")]
        downs = [one.states(1)[0] for one in sides]
        for name, tensor in downs[0].items():
            torch.testing.assert_close(tensor, downs[1][name], rtol=1e-5, atol=1e-6)


def test_callbacks_and_json_lines_are_those_of_one_process(tmp_path, clip, cache):
    class Heard(Callback):
        def __init__(self):
            self.heard = []

        def on_run_begin(self, run):
            self.heard.append((run.name, run.done, run.clients, dict(run.settings)))

        def on_round_end(self, run, row):
            figures = metrics_of(run, row)
            del figures["seconds"], figures["images_per_second"], figures["loss"]
            self.heard.append(figures)

        def on_run_end(self, run, final):
            self.heard.append(dict(final))

    settings, heard = settings_of("promptfl"), [Heard(), Heard()]
    fastfpl.run(settings, model=clip, cache=cache, callbacks=heard[:1])
    networked = play(settings, tmp_path, clip, cache, callbacks=heard[1:])
    assert heard[0].heard == heard[1].heard
    assert len(heard[0].heard) == len(networked.rounds) + 2
    lines = (tmp_path / "out" / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(networked.rounds))


def test_every_kind_of_setting_reaches_the_clients(tmp_path, clip, cache):
    settings = settings_of(
        "promptfl", scenario="base-to-novel", schedule="cosine", evaluate_every=2, rounds=3
    )
    alone = fastfpl.run(settings, model=clip, cache=cache)
    assert_same(play(settings, tmp_path, clip, cache), alone)


def test_sixteen_bits_halve_what_travels(tmp_path, clip, cache):
    settings = settings_of("promptfl")
    exact = play(settings, tmp_path / "a", clip, cache)
    for wire in ("float16", "bfloat16"):
        half = play(settings, tmp_path / wire, clip, cache, {"wire": wire})
        assert half.rounds[0]["bytes_up"] * 2 == exact.rounds[0]["bytes_up"]
        assert half.rounds[0]["bytes_down"] * 2 == exact.rounds[0]["bytes_down"]
        assert half.rounds[0]["loss"] == pytest.approx(exact.rounds[0]["loss"], rel=0.02)
        assert half.rounds[1]["loss"] != exact.rounds[1]["loss"]


def test_quirks_by_which_clients_inherit_are_refused(tmp_path, clip, cache):
    settings = settings_of("promptfl", as_released="all")
    assert settings.as_released
    with pytest.raises(InputError, match="inherit from each other within a round"):
        play(settings, tmp_path, clip, cache)


def test_an_exam_brings_nothing_that_a_client_has_kept(tmp_path, clip, cache):
    settings = settings_of("pfedmoap", rounds=4, participation=0.7)
    alone = fastfpl.run(settings, model=clip, cache=cache)
    sites = sites_of(settings, tmp_path, clip, cache)
    post = Mailbox(sites)

    def stop(label, row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(settings, tmp_path, clip, cache, post=post, on_round=stop)
    # a server that begins anew hears from its clients what they have kept
    again = Mailbox(sites)
    resumed = play(settings, tmp_path, clip, cache, post=again, resume=True)
    assert_same(resumed, alone)
    trained = set()
    asks = [one for one in post.sent + again.sent if one[1].head["kind"] == "ask"]
    for row in resumed.rounds:
        trained |= set(row["selected"])
        mine = [one for one in asks if one[1].head["round"] == row["round"]]
        assert {client for client, letter in mine if not letter.nbytes} == trained
        assert row["flower"]["bytes_exam"] == sum(letter.nbytes for _, letter in mine)
    assert row["flower"]["bytes_exam"] == 0
    assert len({*range(3)} - set(resumed.rounds[0]["selected"])) > 0


def test_a_client_that_has_lost_its_folder_is_sent_the_whole(tmp_path, clip, cache):
    settings = settings_of("pfedmoap", rounds=3, participation=0.7)
    call = Sampling(settings, 3)
    # whose folder is gone sits out the last round
    (lost, *_) = set(call.sample(1)) - set(call.sample(2))
    sites = sites_of(settings, tmp_path, clip, cache)

    def fault(client, letter):
        if client == lost and letter.head["kind"] == "ask" and letter.head["round"] == 1:
            shutil.rmtree(tmp_path / f"site-{lost}")

    post = Mailbox(sites, fault)
    result = play(settings, tmp_path, clip, cache, {"quorum": 0.3}, post=post)
    rows = result.rounds
    assert "a letter must bring what a client is asked with" in str(rows[1]["flower"]["failed"])
    assert [row["clients"][lost] is None for row in rows] == [False, True, False]
    sizes = [s.nbytes for c, s in post.sent if c == lost and s.head["kind"] == "ask"]
    assert sizes[1] == 0 < sizes[2]


# --- letters --------------------------------------------------------------------------------------


def test_arrays_travel_whole():
    state = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.tensor(2.5, dtype=torch.float64),
        "c": torch.zeros(0, 4),
        "d": torch.tensor([True, False]),
        "e": torch.randn(3).to(torch.bfloat16),
    }
    back = unpack(pack(state))
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    with pytest.raises(InputError, match="wire must hold what is sent; got float16 for 'big'"):
        pack({"big": torch.tensor([1e6])}, "float16")
    assert digest(pack(state)) != digest(pack({**state, "b": state["b"] + 1}))


# --- what a client keeps --------------------------------------------------------------------------


def train_letter(site, method, round_=0, shift=0.0, **head):
    federation = site.federation
    down = {n: t + shift for n, t in federation.now.download(federation.method, 0).items()}
    task = federation.method.task
    facts = {
        "schema": 1,
        "kind": "train",
        "federation": "ab" * 16,
        "client": 0,
        "round": round_,
        "task": task_digest(
            list(task.classes.names),
            list(task.domains),
            None if task.client_domains is None else list(task.client_domains),
            task.clients,
        ),
        "dtypes": {},
    }
    return Letter({**facts, **head}, pack(down))


def site_for(method, folder, clip, cache):
    return Site(settings_of(method), 0, folder, cache=cache, model=clip)


def test_a_round_that_was_answered_is_answered_from_disk(tmp_path, clip, cache, monkeypatch):
    site = site_for("fedpgp", tmp_path, clip, cache)
    letter = train_letter(site, "fedpgp")
    first = site.answer(letter)
    assert first.head["kind"] == "update", first.head
    own = Memory(tmp_path, "ab" * 16, 0).own
    assert set(own) == {"u", "v"}
    later = site_for("fedpgp", tmp_path, clip, cache)
    monkeypatch.setattr(Site, "federation", None)  # nothing may be loaded
    again = later.answer(letter)
    assert again.arrays == first.arrays
    same = ("loss", "asked", "round", "seconds")
    assert [again.head[k] for k in same] == [first.head[k] for k in same]


@pytest.mark.parametrize("told", [1, None])
def test_a_client_computes_with_the_threads_that_it_is_told(told, tmp_path, clip, monkeypatch):
    """Sums over other numbers of threads differ in their last bits."""
    here = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    monkeypatch.setattr(Site, "_join", lambda site, letter: seen.append(torch.get_num_threads()))
    try:
        site = Site(settings_of("promptfl", threads=told), 0, tmp_path, model=clip)
        with pytest.raises(AttributeError):  # of the card that is none
            site.answer(Letter({"schema": SCHEMA, "kind": "join"}))
        assert (seen, torch.get_num_threads()) == ([told or 2], 2)
    finally:
        torch.set_num_threads(here)


def test_a_round_with_another_download_starts_from_the_state_before_it(tmp_path, clip, cache):
    site = site_for("fedpgp", tmp_path / "a", clip, cache)
    site.answer(train_letter(site, "fedpgp", 0))
    once = site.answer(train_letter(site, "fedpgp", 1, 0.1))
    site.answer(train_letter(site, "fedpgp", 1, 0.5))
    again = site.answer(train_letter(site, "fedpgp", 1, 0.1))
    assert again.arrays == once.arrays
    stale = site.answer(train_letter(site, "fedpgp", 0))
    assert stale.head["kind"] == "refusal"
    assert "a letter must be of round 1 or later" in stale.head["why"]


def test_a_client_that_dies_before_it_writes_has_not_trained(tmp_path, clip, cache, monkeypatch):
    site = site_for("fedpgp", tmp_path / "a", clip, cache)
    letter = train_letter(site, "fedpgp")

    def dies(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastfpl.flower.memory.write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            site.answer(letter)
    assert Memory(tmp_path / "a", "ab" * 16, 0).round is None
    other = site_for("fedpgp", tmp_path / "b", clip, cache)
    assert site.answer(letter).arrays == other.answer(letter).arrays


def test_a_clients_folder_is_its_own(tmp_path, clip, cache):
    site = site_for("fedpgp", tmp_path, clip, cache)
    site.answer(train_letter(site, "fedpgp"))
    folder = tmp_path / ("ab" * 16) / "client-00000"
    assert folder.stat().st_mode & 0o077 == 0
    (victim,) = folder.glob("own-*.safetensors")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    said = site.answer(train_letter(site, "fedpgp", 1))
    assert said.head["kind"] == "refusal"
    assert "its checksum is not the one that was written" in said.head["why"]
    with pytest.raises(InputError, match="32 hexadecimal digits"):
        Memory(tmp_path, "../elsewhere", 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 2}, "a letter must have schema 1; got 2"),
        ({"kind": "dance"}, "a letter must ask to join, train or ask; got 'dance'"),
        ({"client": 1}, "a letter must be for client 0; got 1"),
        ({"round": -1}, "a round must be a number from 0; got -1"),
        ({"federation": "x"}, "a federation must be 32 hexadecimal digits"),
        ({"task": "0" * 32}, "classes, domains and clients must be the same on both sides"),
    ],
)
def test_a_client_refuses_what_it_cannot_answer(change, sentence, tmp_path, clip, cache):
    site = site_for("promptfl", tmp_path, clip, cache)
    said = site.answer(train_letter(site, "promptfl", **change))
    assert said.head["kind"] == "refusal"
    assert sentence in said.head["why"]


# --- bad answers ----------------------------------------------------------------------------------


def with_head(**change):
    return lambda letter: Letter({**letter.head, **change}, letter.arrays)


def with_ctx(change):
    def changed(letter):
        state = unpack(letter.arrays)
        return Letter(letter.head, pack({"ctx": change(state["ctx"])}))

    return changed


def raw(**change):
    def changed(letter):
        one = dataclasses.replace(letter.arrays["ctx"], **change)
        return Letter(letter.head, {"ctx": one})

    return changed


BAD = {
    "schema": (with_head(schema=7), "an answer must have schema 1; got 7"),
    "kind": (with_head(kind="marks"), "an answer must be of kind update; got 'marks'"),
    "federation": (with_head(federation="0" * 32), "an answer must be of federation"),
    "client": (with_head(client=2), "an answer must be of client 0; got 2"),
    "round": (with_head(round=5), "an answer must be of round 0; got 5"),
    "true": (with_head(round=False), "an answer must be of round 0; got False"),
    "download": (with_head(asked="0" * 32), "must answer the download"),
    "weight": (with_head(images=10**12), "images must be a whole number|must be the"),
    "negative": (with_head(images=-3), "images must be a whole number from 0"),
    "half": (with_head(images=2.5), "images must be a whole number from 0"),
    "other weight": (with_head(images=1), "the weight of client 0 must be the"),
    "loss": (with_head(loss=float("nan")), "loss must be a finite number; got nan"),
    "no loss": (with_head(loss=None), "loss must be a finite number; got None"),
    "seen": (with_head(seen="many"), "seen must be a whole number"),
    "names": (lambda a: Letter(a.head, {"other": a.arrays["ctx"]}), "must hold the arrays ctx"),
    "more": (
        lambda a: Letter(a.head, {**a.arrays, "x": a.arrays["ctx"]}),
        "must hold the arrays ctx;",
    ),
    "none": (lambda a: Letter(a.head), "must hold the arrays ctx; got 'none'"),
    "shape": (with_ctx(lambda t: t[:1]), "'ctx' must have shape"),
    "scalar": (with_ctx(lambda t: t.sum()), "'ctx' must have shape"),
    "one more dimension": (with_ctx(lambda t: t[None]), "'ctx' must have shape"),
    "dtype": (with_ctx(lambda t: t.double()), "'ctx' must travel as float32; got 'float64'"),
    "object": (raw(dtype="object"), "'ctx' must travel as float32; got 'object'"),
    "truncated": (raw(data=b"abc"), "must have the bytes of its shape; got 3 bytes"),
    "nan": (with_ctx(lambda t: t * float("nan")), "'ctx' must be finite; got NaN or inf"),
    "inf": (with_ctx(lambda t: t / 0), "'ctx' must be finite; got NaN or inf"),
    "norm": (with_ctx(lambda t: t + 1e6), "the norm of 'ctx' must be at most most_norm=10000"),
}


@pytest.fixture(scope="module")
def cards(tmp_path_factory, clip, cache):
    """What clients of a small run say when they join."""
    settings = settings_of("promptfl", rounds=4, evaluate_every=50)
    ask = Letter({"schema": 1, "kind": "join", "federation": "ab" * 16})
    sites = sites_of(settings, tmp_path_factory.mktemp("cards"), clip, cache)
    return settings, {client: site.answer(ask) for client, site in sites.items()}


def fakes(cards, settings=None):
    _, real = cards
    return {
        c: FakeSite(letter, c, letter.head["images"], 0.01 * (c + 1)) for c, letter in real.items()
    }


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_refused_and_never_merged(name, tmp_path, clip, cache, cards):
    spoil, sentence = BAD[name]
    settings = cards[0].model_copy(update={"rounds": 1})

    def fault(client, letter):
        return spoil if client == 0 and letter.head["kind"] == "train" else None

    sites = fakes(cards)
    result = play(settings, tmp_path, clip, cache, post=Mailbox(sites, fault))
    (row,) = result.rounds
    (told,) = row["flower"]["refused"]
    assert told["client"] == 0
    assert any(part in told["why"] for part in sentence.split("|")), told["why"]
    assert (row["lost"], result.flower["refused"]) == ([0], 1)
    good = Mailbox({c: sites[c] for c in (1, 2)})
    without = play(
        settings, tmp_path / "b", clip, cache, {"patience": 0.0, "quorum": 0.6}, post=good
    )
    merged = [read_checkpoint(f / "out").server["ctx"] for f in (tmp_path, tmp_path / "b")]
    assert torch.equal(*merged)
    assert without.rounds[0]["lost"] == [0]
    assert without.rounds[0]["clients"][0] is None


def test_an_oversized_answer_is_refused(tmp_path, clip, cache, cards):
    settings = cards[0].model_copy(update={"rounds": 1})
    rules = {"most_bytes": 100, "patience": 0.0}
    with pytest.raises(InputError, match="an update must have at most most_bytes=100 bytes"):
        play(settings, tmp_path, clip, cache, rules, post=Mailbox(fakes(cards)))
    assert read_status(tmp_path / "out")["phase"] == "stopped"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: [{**m[0], "accuracy": 1.5}],
        lambda m: [{**m[0], "macro_f1": float("nan")}],
        lambda m: [{**m[0], "images": 3}],
        lambda m: [{**m[0], "domains": {"mars": 0.5}}],
        lambda m: [{**m[0], "name": "other"}],
        lambda m: [],
        lambda m: None,
    ],
)
def test_bad_marks_are_refused(spoil, tmp_path, clip, cache, cards):
    settings = cards[0].model_copy(update={"rounds": 1})

    def bad(answer):
        return Letter({**answer.head, "marks": spoil(answer.head["marks"])})

    def fault(client, letter):
        return bad if client == 1 and letter.head["kind"] == "ask" else None

    result = play(settings, tmp_path, clip, cache, post=Mailbox(fakes(cards), fault))
    assert result.rounds[0]["clients"] == [0.5, None, 0.5]
    assert result.flower["refused"] == 1
    page = html_page(fastfpl.federation.Comparison({"promptfl": [result]}))
    assert "promptfl ran on Flower: 1 answers of clients refused, 0 failed, 0 missing" in page


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("weights", "w" * 8), "the weights of the CLIP must be the server's, {weights}; got wwww"),
        (("method", "m" * 8), "the code of the method must be the server's, {method}; got mmmm"),
        (("library", "0.0.9"), "the version of fastfpl must be the server's, {library}; got 0.0.9"),
        (("settings", "s"), "the settings that decide figures must be the server's, {settings};"),
    ],
)
def test_a_client_that_differs_is_refused_at_join(change, sentence, tmp_path, clip, cache, cards):
    sites = fakes(cards)
    key, value = change
    server = dict(sites[1].head["identity"])
    sites[1].head["identity"] = {**server, key: value}
    settings = cards[0].model_copy(update={"rounds": 1})
    result = play(settings, tmp_path, clip, cache, {"patience": 0.0}, post=Mailbox(sites))
    status = read_status(tmp_path / "out")
    assert sentence.format(**server) in status["noted"][0]["why"]
    assert "from client 1" in status["noted"][0]["why"]
    assert result.rounds[0]["lost"] == [1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"client": 3}, "client must be a whole number from 0 to 2; got 3"),
        ({"clients": 0}, "clients must be a whole number from 1"),
        ({"images": 0}, "images must be a whole number from 1"),
        ({"images": 10**15}, "images must be a whole number from 1"),
        ({"classes": []}, "classes must be a list of names; got []"),
        ({"classes": ["a", 3]}, "classes must be a list of names"),
        ({"client_domains": [0]}, "client_domains must be 3 numbers or none; got [0]"),
        ({"exams": [{"name": "x"}]}, "exams must have name, about, domains, images"),
        ({"exams": []}, "exams must have name, about, domains, images; got []"),
        ({"data": {"name": "x" * 300}}, "and of its data name, skipped"),
        ({"identity": None}, "a card must hold an identity"),
        ({"schema": 3}, "an answer must have schema 1; got 3"),
        ({"kind": "update"}, "an answer must be of kind card; got 'update'"),
    ],
)
def test_a_bad_card_is_refused(change, sentence, cards):
    card = cards[1][0]
    assert check_card(card).client == 0
    with pytest.raises(Refused) as refused:
        check_card(Letter({**card.head, **change}))
    assert sentence in str(refused.value)


def test_another_class_list_is_refused_at_join(tmp_path, clip, cache, cards):
    sites = fakes(cards)
    sites[0].head["classes"] = ["cat", *sites[0].head["classes"][1:]]
    settings = cards[0].model_copy(update={"rounds": 1})
    play(settings, tmp_path, clip, cache, {"patience": 0.0}, post=Mailbox(sites))
    status = read_status(tmp_path / "out")
    (note,) = status["noted"]
    assert "the list of classes must be the server's, " in note["why"]
    assert "from client 0" in note["why"]
    assert status["joined"] == [1, 2]


def test_a_resumed_run_keeps_its_classes(tmp_path, clip, cache, cards):
    settings = cards[0].model_copy(update={"rounds": 1})
    play(settings, tmp_path, clip, cache, post=Mailbox(fakes(cards)))
    sites = fakes(cards)
    for site in sites.values():
        site.head["classes"] = ["cat", *site.head["classes"][1:]]
    more = {"resume": True, "post": Mailbox(sites)}
    longer = settings.model_copy(update={"rounds": 2})
    with pytest.raises(InputError, match="must be those of the checkpoint"):
        play(longer, tmp_path, clip, cache, {"patience": 0.0}, **more)


def test_a_registered_name_and_a_number_belong_to_one_client(tmp_path, clip, cache, cards):
    sites = fakes(cards)
    sites[2].head["client"] = 1
    settings = cards[0].model_copy(update={"rounds": 1})
    play(settings, tmp_path, clip, cache, {"patience": 0.0}, post=Mailbox(sites))
    (note,) = read_status(tmp_path / "out")["noted"]
    assert "a client must be one node; got client 1" in note["why"]
    post = Mailbox(fakes(cards), names={0: "client-2", 1: "client-1"})
    play(settings, tmp_path / "b", clip, cache, {"patience": 0.0}, post=post)
    (note,) = read_status(tmp_path / "b" / "out")["noted"]
    assert "the node registered as client-2 must join as that client; got client 0" in note["why"]


# --- faults ---------------------------------------------------------------------------------------


def test_the_rules_end_a_round(tmp_path, clip, cache, cards):
    settings = cards[0].model_copy(update={"rounds": 1})

    def late(seconds):
        return lambda client, letter: (
            seconds if client == 2 and letter.head["kind"] == "train" else None
        )

    def seconds_of(folder, rules, fault):
        post = Mailbox(fakes(cards), fault)
        result = play(settings, folder, clip, cache, rules, post=post)
        return post.time, result.rounds[0]["lost"], result.rounds[0]["flower"]["absent"]

    waits = seconds_of(tmp_path / "a", {"grace": 60.0, "timeout": 100.0}, late(30.0))
    assert waits == (30.0, [], [])
    gone = [{"client": 2, "asked": "train"}]
    assert seconds_of(tmp_path / "b", {"grace": 10.0}, late(30.0)) == (10.0, [2], gone)
    rules = {"grace": 60.0, "timeout": 20.0}
    assert seconds_of(tmp_path / "c", rules, late(30.0)) == (20.0, [2], gone)
    # all must answer: the same is sent again, and who answered is not asked again
    first = []

    def once(client, letter):
        if client == 2 and letter.head["kind"] == "train" and not first:
            first.append(letter)
            return "error"
        return None

    post = Mailbox(fakes(cards), once)
    result = play(settings, tmp_path / "d", clip, cache, {"quorum": 1.0}, post=post)
    assert result.rounds[0]["lost"] == []
    asked = [c for c, letter in post.sent if letter.head["kind"] == "train"]
    assert asked == [0, 1, 2, 2]
    assert result.flower["failed"] == 1
    with pytest.raises(
        InputError, match=r"3 of 3 clients must answer in round 1 within patience=5"
    ):
        play(
            settings,
            tmp_path / "e",
            clip,
            cache,
            {"quorum": 1.0, "patience": 5.0},
            post=Mailbox(fakes(cards), lambda c, x: "error" if x.head["kind"] == "train" else None),
        )


def test_a_node_that_fails_to_join_is_asked_again_a_minute_later(tmp_path, clip, cache, cards):
    asked = []

    def fault(client, letter):
        if client == 1 and letter.head["kind"] == "join":
            asked.append(client)
            return "error" if len(asked) < 3 else None
        return None

    settings = cards[0].model_copy(update={"rounds": 1})
    post = Mailbox(fakes(cards), fault)
    result = play(settings, tmp_path, clip, cache, post=post)
    assert (len(asked), post.time) == (3, 120.0)
    assert (result.rounds[0]["lost"], result.flower["failed"]) == ([], 2)


def test_too_few_clients_are_a_sentence(tmp_path, clip, cache, cards):
    sites = {0: fakes(cards)[0]}
    with pytest.raises(InputError, match=r"2 of 3 clients must join within patience=9 s; got 1"):
        play(cards[0], tmp_path, clip, cache, {"patience": 9.0}, post=Mailbox(sites))


def test_a_client_may_join_late_and_leave(tmp_path, clip, cache):
    settings = settings_of("promptfl", rounds=3)
    sites = sites_of(settings, tmp_path, clip, cache)
    post = Mailbox({c: sites[c] for c in (0, 1)})

    def then(method, row):
        if row["round"] == 0:
            post.sites[2] = sites[2]
        if row["round"] == 1:
            del post.sites[0]

    result = play(settings, tmp_path, clip, cache, {"patience": 5.0}, post=post, on_round=then)
    assert [row["lost"] for row in result.rounds] == [[2], [], [0]]
    absent = [[c for c in range(3) if row["clients"][c] is None] for row in result.rounds]
    assert absent == [[2], [], [0]]
    assert all(result.data["train_images"])


@pytest.mark.parametrize("method", ["fedpgp", "pfedmoap", "promptfl-ft"])
def test_a_server_that_is_killed_resumes(method, tmp_path, clip, cache):
    """After its clients have trained and before it has written the round down."""
    settings = settings_of(method, rounds=3)
    whole = play(settings, tmp_path / "whole", clip, cache)
    sites = sites_of(settings, tmp_path, clip, cache)

    def killed(client, letter):
        if letter.head["kind"] == "ask" and letter.head["round"] == 1:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        play(settings, tmp_path, clip, cache, post=Mailbox(sites, killed))
    assert len(read_checkpoint(tmp_path / "out").rounds) == 1
    with pytest.raises(InputError, match="out must not hold a run already"):
        play(settings, tmp_path, clip, cache)
    with pytest.raises(InputError, match=r"by the engine that began it; got .* of flower, this"):
        fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "out", resume=True)
    resumed = play(settings, tmp_path, clip, cache, resume=True)
    assert_same(resumed, whole)


def test_two_hundred_rounds_with_random_faults_end_where_the_log_says(tmp_path, clip, cache, cards):
    settings = cards[0].model_copy(update={"rounds": 200})
    draw = random.Random(7)
    sites = fakes(cards)
    kills = {40, 41, 133}

    def fault(client, letter):
        if letter.head["kind"] != "train":
            return None
        return draw.choice(
            [None, None, None, None, "drop", "error", 5.0, 5000.0, BAD["nan"][0], BAD["shape"][0]]
        )

    log = {}

    def noted(method, row):
        log[row["round"]] = [c for c in row["selected"] if c not in row["lost"]]
        if row["round"] in kills:
            kills.remove(row["round"])
            raise KeyboardInterrupt

    rules = {"quorum": 0.3, "grace": 10.0, "timeout": 30.0, "patience": 1e6}
    more = {"on_round": noted, "post": Mailbox(sites, fault)}
    resume = False
    for _ in range(4):
        try:
            result = play(settings, tmp_path, clip, cache, rules, resume=resume, **more)
        except KeyboardInterrupt:
            resume = True
            more["post"] = Mailbox(sites, fault)
    assert [len(result.rounds), sorted(log)] == [200, list(range(200))]
    assert any(len(there) < 3 for there in log.values())
    images = {c: site.images for c, site in sites.items()}
    expected = prepare(settings, model=clip, cache=cache).now.server["ctx"]
    for round_ in range(200):
        there = log[round_]
        total = sum(images[c] for c in there)
        mean = sum((expected + sites[c].step).double() * (images[c] / total) for c in there)
        expected = mean.to(expected.dtype)
    assert torch.allclose(read_checkpoint(tmp_path / "out").server["ctx"], expected, atol=1e-6)
    refused = sum(len(row["flower"]["refused"]) for row in result.rounds)
    assert result.flower["refused"] == refused > 0


# --- rules and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"quorums": 1}, "rule must be a known one; got 'quorums'; did you mean 'quorum'"),
        ({"quorum": 0.0}, "quorum is refused"),
        ({"quorum": "all"}, "quorum is refused"),
        ({"wire": "int8"}, "wire is refused"),
        ({"merge": "median"}, "rule must be a known one; got 'merge'"),
    ],
)
def test_wrong_rules_are_sentences(rules, sentence):
    with pytest.raises(InputError, match=sentence):
        make_rules(rules)


def test_a_folder_without_a_networked_run_is_a_sentence(tmp_path):
    with pytest.raises(Damaged, match="must be what a run on Flower wrote; got none"):
        read_status(tmp_path)
    (tmp_path / "flower.json").write_text(json.dumps([1]))
    with pytest.raises(Damaged, match="must be what a run on Flower wrote"):
        read_status(tmp_path)
