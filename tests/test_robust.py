"""Merging that bears hostile clients: each rule against its definition, and in both engines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fastfpl
from bench.attacks import attacked, play
from fastfpl.clip import load_clip
from fastfpl.config import make_settings
from fastfpl.errors import InputError
from fastfpl.federation import Comparison, Result, robust
from fastfpl.federation.checkpoint import read_checkpoint
from fastfpl.federation.robust import Robust, krum
from fastfpl.flower.letters import Letter, pack, unpack
from fastfpl.flower.rules import make_rules
from fastfpl.flower.server import serve
from fastfpl.flower.site import Site
from fastfpl.report import html_page
from tests.post import Mailbox
from tests.worlds import GATE, TINY_RUN

RUN = {**TINY_RUN, "clients": 3, "local_epochs": 1, "threads": 1}
OPTIONS = {"pfedmoap": GATE, "fedpgp": {"bottleneck": 2}, "fedtpg": {"widening": 1}}


# a real tower encodes all test images, and none of them is the point
pytestmark = pytest.mark.usefixtures("few_digits_throughout")


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings_of(method, **more):
    return make_settings({"method": method, "options": OPTIONS.get(method, {}), **RUN, **more})


def networked(settings, folder, clip, cache, fault=None, sites=None):
    if sites is None:
        sites = sites_of(settings, folder, clip, cache)
    post = Mailbox(sites, fault)
    return serve(settings, make_rules({}), folder / "out", post, model=clip, log=len)


def sites_of(settings, folder, clip, cache):
    return {
        c: Site(settings, c, folder / f"site-{c}", cache=cache, model=clip)
        for c in range(settings.clients)
    }


# --- the rules, each against its definition -------------------------------------------------------


def literal_krum(uploads, malicious, kept):
    """Blanchard et al. 2017, section 4, word by word: no product, no sorting of a table."""
    clients = sorted(uploads)
    count = len(clients)

    def away(i, j):
        total = 0.0
        for name in uploads[i]:
            pairs = zip(uploads[i][name].flatten(), uploads[j][name].flatten(), strict=True)
            total += sum((a.item() - b.item()) ** 2 for a, b in pairs)
        return total

    scores = {}
    for i in clients:
        distances = sorted(away(i, j) for j in clients if j != i)
        scores[i] = sum(distances[: count - malicious - 2])
    best = []
    for _ in range(kept):
        left = [c for c in clients if c not in best]
        best.append(min(left, key=lambda c: (scores[c], c)))
    return sorted(best)


def drawn_uploads(count, seed=0, dtype=torch.float32, scale=1.0, at=0.0):
    """Uploads of clients 3, 5, 7, ... of odd, empty, scalar and turned tensors."""
    draw = torch.Generator().manual_seed(seed)

    def one(*shape):
        return (at + scale * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

    return {
        3 + 2 * c: {"ctx": one(5, 7).T, "u": one(3, 1, 11)[:, 0, ::2], "e": one(0, 4), "s": one()}
        for c in range(count)
    }


class Arrived(dict):
    """Uploads in memory."""

    put = dict.__setitem__


def merged(rule, uploads, down=None, **more):
    images = {client: 10 + client for client in uploads}
    return Robust(rule, **more).merged(Arrived(uploads), down or (lambda client: {}), images)


@pytest.mark.parametrize("slab", [1, 7, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "malicious", "kept"), [(3, 0, 1), (5, 1, 1), (8, 2, 4), (9, 3, 6), (11, 0, 11)]
)
def test_krum_selects_what_the_definition_does(count, malicious, kept, dtype, slab, monkeypatch):
    monkeypatch.setattr(robust, "_SLAB", slab)
    for seed in range(3):
        uploads = drawn_uploads(count, seed, dtype)
        assert krum(uploads, malicious, kept) == literal_krum(uploads, malicious, kept)


def test_krum_sees_small_moves_of_large_prompts_and_breaks_ties_by_number():
    uploads = drawn_uploads(7, 1, torch.float32, scale=1e-3, at=1e3)
    for malicious, many in ((0, 1), (1, 3), (2, 2)):
        assert krum(uploads, malicious, many) == literal_krum(uploads, malicious, many)
    same = dict.fromkeys((9, 2, 4, 6, 5), next(iter(uploads.values())))
    assert krum(same, 1, 2) == [2, 4]


def test_krum_leaves_out_what_lies_far_away():
    uploads = drawn_uploads(9, 2)
    for client in (3, 9, 15):
        uploads[client] = {name: t + 100 for name, t in uploads[client].items()}
    assert not set(krum(uploads, 3, 6)) & {3, 9, 15}


def test_what_krum_selects_is_merged_with_equal_weights():
    uploads = drawn_uploads(8)
    sent, weights, facts = merged("krum", uploads, malicious=2, kept=3)
    assert facts == {"used": literal_krum(uploads, 2, 3)}
    assert weights == dict.fromkeys(facts["used"], 1)
    assert all(torch.equal(sent[c][n], uploads[c][n]) for c in sent for n in uploads[c])
    assert list(sent) == facts["used"]


@pytest.mark.parametrize("slab", [1, 4, 1 << 16])
@pytest.mark.parametrize(
    ("rule", "count", "more", "left"),
    [
        *(("median", n, {}, (1 if n % 2 else 2)) for n in (3, 4, 5, 10)),
        ("trimmed", 3, {"trim": 0.34}, 1),
        ("trimmed", 5, {"trim": 0.2}, 3),
        ("trimmed", 10, {"trim": 0.3}, 4),  # 0.3 · 10 is below 3 in floats
        ("trimmed", 11, {"trim": 0.45}, 3),
    ],
)
def test_median_and_trimmed_mean_are_those_of_every_number(
    rule, count, more, left, slab, monkeypatch
):
    monkeypatch.setattr(robust, "_SLAB", slab)
    uploads = drawn_uploads(count, dtype=torch.float64)
    sent, weights, facts = merged(rule, uploads, **more)
    assert weights == dict.fromkeys(sorted(uploads), 1)
    assert facts == {"used": sorted(uploads)}
    for name in ("ctx", "u", "e", "s"):
        every = np.stack([state[name].numpy() for state in uploads.values()])
        wanted = np.empty(every.shape[1:])
        for place in itertools.product(*map(range, every.shape[1:])):
            numbers = sorted(every[(slice(None), *place)].tolist())
            while len(numbers) > left:
                numbers = numbers[1:-1]
            wanted[place] = sum(numbers) / len(numbers)
            if rule == "median":
                assert wanted[place] == pytest.approx(np.median(every[(slice(None), *place)]))
        for client in uploads:
            assert sent[client][name].shape == uploads[client][name].shape
            np.testing.assert_allclose(sent[client][name].numpy(), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("rule", "more", "least"),
    [
        ("median", {}, 3),
        ("trimmed", {"trim": 0.2}, 5),
        ("trimmed", {"trim": 0.3}, 4),
        ("krum", {"malicious": 2}, 7),
        ("krum", {"malicious": 2, "kept": 9}, 11),
    ],
)
def test_fewer_uploads_than_a_rule_needs_are_not_merged(rule, more, least):
    sent, weights, facts = merged(rule, drawn_uploads(least - 1), **more)
    assert (sent, weights, facts) == ({}, {}, {"used": []})
    sent, _, facts = merged(rule, drawn_uploads(least), **more)
    assert sent
    assert facts["used"]
    assert merged(rule, {}, **more)[0] == {}


def test_moves_are_cut_before_they_are_merged():
    uploads = {
        0: {"a": torch.tensor([4.0, 1.0])},
        2: {"a": torch.tensor([1.0, 2.0])},
        3: {"a": torch.tensor([1.0, 1.0 - 9.0])},
    }
    downs = {c: {"a": torch.ones(2), "more": torch.zeros(3)} for c in uploads}
    sent, weights, facts = merged("mean", uploads, downs.__getitem__, clip=2.0)
    assert facts == {"used": [0, 2, 3], "norms": {"0": 3.0, "2": 1.0, "3": 9.0}}
    assert weights == {0: 10, 2: 12, 3: 13}
    wanted = {0: [3.0, 1.0], 2: [1.0, 2.0], 3: [1.0, -1.0]}
    assert {c: sent[c]["a"].tolist() for c in sent} == wanted
    sent, _, facts = merged("median", uploads, downs.__getitem__, clip=2.0)
    assert sent[0]["a"].tolist() == [1.0, 1.0]
    assert facts["norms"]["3"] == 9.0


# --- both engines ---------------------------------------------------------------------------------

RULES = {
    "median": {"merge": "median"},
    "trimmed": {"merge": "trimmed", "trim": 0.34},
    "krum": {"merge": "krum", "krum_malicious": 0},
    "several": {"merge": "krum", "krum_malicious": 0, "krum_kept": 2},
    "cut": {"clip_update": 0.02},
    "both": {"merge": "median", "clip_update": 0.02},
}


@pytest.mark.parametrize("name", RULES)
def test_a_networked_run_merges_as_one_process_does(name, tmp_path, clip, cache):
    settings = settings_of("promptfl", **RULES[name])
    alone = fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "alone")
    there = networked(settings, tmp_path, clip, cache)
    servers = [read_checkpoint(tmp_path / place).server["ctx"] for place in ("alone", "out")]
    torch.testing.assert_close(*servers, rtol=1e-5, atol=1e-6)
    for one, other in zip(alone.rounds, there.rounds, strict=True):
        assert one["merge"]["used"] == other["merge"]["used"]
        norms = [row["merge"].get("norms", {}) for row in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        assert bool(norms[0]) == ("clip_update" in RULES[name])
        assert one["clients"] == other["clients"]
    assert Result.load(tmp_path / "alone").to_json() == alone.to_json()
    plain = fastfpl.run(settings_of("promptfl"), model=clip, cache=cache, out=tmp_path / "plain")
    assert not torch.equal(read_checkpoint(tmp_path / "plain").server["ctx"], servers[0])
    assert "merge" not in plain.rounds[0]
    kept = {"krum": 1, "several": 2}.get(name, 3)
    assert [len(row["merge"]["used"]) for row in alone.rounds] == [kept] * 2


@pytest.mark.parametrize("method", ["promptfl-ft", "fedtpg", "fedapt", "fedpgp", "promptfolio"])
def test_a_robust_merge_is_taken_where_the_merge_is_a_mean(method, tmp_path, clip, cache):
    median, mean = (
        fastfpl.run(
            settings_of(method, rounds=1, **more), model=clip, cache=cache, out=tmp_path / name
        )
        for name, more in (("median", {"merge": "median"}), ("mean", {}))
    )
    states = [read_checkpoint(tmp_path / name).server for name in ("median", "mean")]
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert median.rounds[0]["loss"] == mean.rounds[0]["loss"]


@pytest.mark.parametrize(
    ("method", "more", "sentence"),
    [
        ("pfedmoap", {"merge": "median"}, "keeps or compares single uploads in 'pool'"),
        ("prompt-fedamp", {"merge": "trimmed"}, "keeps or compares single uploads in 'pool'"),
        ("pfedmoap", {"merge": "krum", "krum_malicious": 0}, "keeps or compares single uploads"),
        ("local", {"merge": "median"}, "its clients send nothing"),
        ("zeroshot", {"merge": "median"}, "its clients send nothing"),
        ("local", {"clip_update": 1.0}, "its clients send nothing"),
        ("promptfl", {"merge": "trimmed"}, "at least 5 clients with merge=trimmed and trim=0.2"),
        ("promptfl", {"merge": "krum", "krum_malicious": 1}, "at least 5 clients with merge=krum"),
        ("promptfl", {"merge": "median", "participation": 0.7}, "at least 3 clients .* got 2"),
    ],
)
def test_a_robust_merge_is_refused_where_it_means_nothing(
    method, more, sentence, tmp_path, clip, cache
):
    settings = settings_of(method, **more)
    with pytest.raises(InputError, match=sentence):
        fastfpl.run(settings, model=clip, cache=cache)
    with pytest.raises(InputError, match=sentence):
        networked(settings, tmp_path, clip, cache)


def test_clients_that_inherit_from_each_other_are_refused(clip, cache):
    with pytest.raises(InputError, match="merge must be mean and clip_update left out with quirks"):
        fastfpl.run(
            settings_of("promptfl", merge="median", as_released=["shared-optimiser"]),
            model=clip,
            cache=cache,
        )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"merge": "best"}, "merge is refused: input should be 'mean', 'median', 'trimmed'"),
        ({"trim": 0.3}, "trim must be left out with merge='mean'; it is for 'trimmed'"),
        ({"merge": "trimmed", "trim": 0.5}, "trim is refused"),
        ({"merge": "trimmed", "trim": 0.0}, "trim is refused"),
        ({"merge": "krum"}, "krum_malicious must be given with merge='krum'"),
        ({"merge": "krum", "krum_malicious": -1}, "krum_malicious is refused"),
        ({"merge": "krum", "krum_malicious": 1, "krum_kept": 0}, "krum_kept is refused"),
        ({"merge": "median", "krum_malicious": 1}, "krum_malicious must be left out with merge="),
        ({"krum_kept": 1}, "krum_kept must be left out with merge='mean'"),
        ({"clip_update": 0.0}, "clip_update is refused"),
    ],
)
def test_wrong_settings_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        make_settings({"method": "promptfl", **values})


def test_a_round_in_which_too_few_arrive_is_not_merged_and_the_report_says_so(
    tmp_path, clip, cache
):
    settings = settings_of(
        "promptfl", merge="median", clip_update=0.5, dropout=0.5, rounds=6, evaluate_every=6
    )
    result = fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "a")
    few = [row for row in result.rounds if len(row["lost"]) > 0]
    assert 0 < len(few) < 6
    for row in result.rounds:
        there = sorted(set(row["selected"]) - set(row["lost"]))
        assert row["merge"]["used"] == ([] if row["lost"] else there)
        assert set(row["merge"]["norms"]) == set(map(str, there))
    page = html_page(Comparison({"promptfl": [result]}))
    assert (
        "promptfl: uploads are merged by the median of every number, each cut to a move of norm "
        f"0.5; in {len(few)} of 6 rounds too few arrived to merge any" in page
    )
    assert "uploads are merged by" not in html_page(
        Comparison({"promptfl": [fastfpl.run(settings_of("promptfl"), model=clip, cache=cache)]})
    )


def test_a_run_is_resumed_with_its_own_rule_alone(tmp_path, clip, cache):
    settings = settings_of("promptfl", merge="median")
    whole = fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "whole")

    def stop(label, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "a", on_round=stop)
    other = settings.model_copy(update={"merge": "mean"})
    with pytest.raises(InputError, match="merge: 'median' then, 'mean' now"):
        fastfpl.run(other, model=clip, cache=cache, out=tmp_path / "a", resume=True)
    resumed = fastfpl.run(settings, model=clip, cache=cache, out=tmp_path / "a", resume=True)
    assert [row["loss"] for row in resumed.rounds] == [row["loss"] for row in whole.rounds]
    assert [row["merge"] for row in resumed.rounds] == [row["merge"] for row in whole.rounds]


# --- hostile clients ------------------------------------------------------------------------------

HOSTILE = {
    "median": {"merge": "median"},
    "trimmed": {"merge": "trimmed", "trim": 0.2},
    "krum": {"merge": "krum", "krum_malicious": 1},
    "several": {"merge": "krum", "krum_malicious": 1, "krum_kept": 4},
    "cut": {"clip_update": 0.5},
}
FIVE = {**RUN, "method": "promptfl", "clients": 5, "rounds": 1, "partition": "iid"}


@pytest.fixture(scope="module")
def known():
    """Data sets that are loaded."""
    return {}


@pytest.fixture(scope="module")
def honest(clip, cache, known):
    """Give the server after an honest round of five clients, merged by their mean."""
    federation = attacked(FIVE, "labels", 0.0, clip, cache, known)
    federation.round()
    return federation.server["ctx"]


@pytest.mark.parametrize("attack", ["scaled", "noise"])
@pytest.mark.parametrize("name", ["mean", *HOSTILE])
def test_a_robust_merge_keeps_an_attacker_out(name, attack, honest, clip, cache, known):
    federation = attacked({**FIVE, **HOSTILE.get(name, {})}, attack, 0.2, clip, cache, known)
    assert len(federation.hostile) == 1
    row = federation.round()
    off = (federation.server["ctx"] - honest).norm().item()
    if name == "mean":
        assert off > 3
    else:
        assert off < 2.5  # one honest client's move is 1.7
    if name in ("krum", "several"):
        assert not federation.hostile & set(row["merge"]["used"])


def test_over_a_network_too(tmp_path, clip, cache):
    settings = settings_of("promptfl", clients=4, rounds=1, merge="median", clip_update=0.5)

    def spoiled(letter):
        ctx = unpack(letter.arrays)["ctx"]
        return Letter(letter.head, pack({"ctx": ctx + 50 * (ctx + 1)}))

    def fault(client, letter):
        return spoiled if client == 1 and letter.head["kind"] == "train" else None

    result = networked(settings, tmp_path, clip, cache, fault)
    norms = result.rounds[0]["merge"]["norms"]
    assert norms["1"] > 500 > 5 > norms["0"]
    assert read_checkpoint(tmp_path / "out").server["ctx"].abs().max() < 1


def test_clients_with_wrong_labels_harm_a_mean_more_than_a_median(clip, cache, known):
    found = {}
    for name in ("mean", "median"):
        settings = {**FIVE, "merge": name, "rounds": 3, "local_epochs": 2, "shots": 4}
        federation = attacked({**settings, "evaluate_every": 3}, "labels", 0.4, clip, cache, known)
        assert len(federation.hostile) == 2
        found[name] = play(federation)["accuracy"]
    assert found["median"] > found["mean"] + 0.1
