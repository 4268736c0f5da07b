"""The stages of a sum under masks between a server and clients that train nothing."""

from __future__ import annotations

import importlib
import importlib.util
import io
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastfpl.errors import InputError
from fastfpl.flower import secagg, secagg_client, secagg_server
from fastfpl.flower.checks import check_update
from fastfpl.flower.letters import SCHEMA, Letter, digest, pack
from fastfpl.flower.rules import make_rules

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed"),
    # of what flwr imports, not of anything here
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FEDERATION = "0" * 32
RULES = make_rules({"aggregation": "secagg+", "quorum": 0.67})
VECTOR = {"ctx": ((5,), torch.float32)}


class Clients:
    """A post to clients whose uploads are drawn, with a clock of its own.

    ``changed(node, stage, answer)`` is what comes of an answer; None never comes. What clients
    have answered is in ``answers`` all the same.
    """

    def __init__(self, images, wanted=VECTOR, changed=lambda node, stage, answer: answer):
        from flwr.app import Context, RecordDict

        draw = torch.Generator().manual_seed(3)
        self.images, self.wanted, self.changed = images, wanted, changed
        self.uploads = [
            {
                n: torch.randn(shape, generator=draw).to(dtype)
                for n, (shape, dtype) in wanted.items()
            }
            for _ in images
        ]
        self.contexts = [Context(1, 70 + c, {}, RecordDict(), {}) for c in range(len(images))]
        self.time, self.numbers, self.there = 0.0, itertools.count(), {}
        self.answers, self.lives = [], []

    def site(self, client):
        def answer(letter):
            head = {"schema": SCHEMA, "kind": "update", "federation": FEDERATION, "loss": 1.0}
            head |= {"client": client, "round": 0, "seen": 1, "images": self.images[client]}
            return Letter({**head, "asked": digest(letter.arrays)}, pack(self.uploads[client]))

        return SimpleNamespace(client=client, answer=answer)

    def nodes(self):
        return {70 + c: "" for c in range(len(self.images))}

    def send(self, letters, kind, round_, ttl):
        from flwr.app import Message, RecordDict
        from flwr.app.metadata import Metadata

        sent = {}
        for node, letter in letters.items():
            number = f"m{next(self.numbers)}"
            metadata = Metadata(1, number, 1, node, "", str(round_), 0.0, 1e12, "train")
            message = Message(RecordDict(), metadata=metadata)
            client, stage = node - 70, secagg.read_record(letter)["stage"]
            answer = secagg_client.secure_answer(
                letter, message, self.contexts[client], self.site(client)
            )
            self.answers.append((stage, node, answer))
            self.lives.append((stage, ttl))
            sent[number], self.there[number] = node, self.changed(node, stage, answer)
        return sent

    def fetch(self, numbers):
        return [(n, self.there.pop(n)) for n in numbers if self.there.get(n) is not None]

    def now(self):
        return self.time

    def wait(self):
        self.time += 0.5


def summed(clients, *, mean=None, need=None, counts="images", timeout=60.0, without=()):
    """Go through the stages once: (what knows the mean, what came of the exchange)."""
    mean = mean or secagg_server.SecureMean(
        clients.wanted, clients.images.__getitem__, counts, RULES
    )
    head = {"schema": SCHEMA, "kind": "train", "federation": FEDERATION, "round": 0}
    letters = {
        node: Letter({**head, "client": node - 70})
        for node in clients.nodes()
        if node not in without
    }

    def take(node, answer):
        return check_update(
            answer, federation=FEDERATION, client=node - 70, round_=0, asked=digest({}),
            images=clients.images[node - 70], wanted={}, rules=RULES,
        )  # fmt: skip

    need = need or RULES.enough(len(clients.images))
    outcome = mean.exchange(
        clients, letters, "train", 0, take, need=need, grace=1.0, timeout=timeout
    )
    return mean, outcome


def mean_of(clients, nodes):
    """The weighted mean of plain uploads."""
    whole = sum(clients.images[n - 70] for n in nodes)
    return {
        name: sum(clients.images[n - 70] * clients.uploads[n - 70][name].double() for n in nodes)
        / whole
        for name in clients.wanted
    }


@pytest.fixture(autouse=True)
def in_a_task(monkeypatch):
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_so_many_clients_are_summed_as_do_not_overflow():
    """Weights are whole numbers up to 2^22 and numbers too: one client more, and sums are 0."""
    from flwr.common.secure_aggregation.quantization import dequantize, quantize

    most, levels, modulus = secagg.MOST_CLIENTS, secagg.LEVELS, secagg.MODULUS
    assert most * levels < modulus == (most + 1) * levels
    for value in (8.0, -8.0):
        whole = most * quantize([np.full(2, value)], 8.0, levels)[0].astype(np.int64) % modulus
        (found,) = dequantize([whole], 8.0, levels)
        np.testing.assert_allclose((found - (most - 1) * 8.0) / most, value, rtol=1e-6)


@pytest.mark.parametrize("clients", [3, 4, 9])
@pytest.mark.parametrize("stage", [None, "setup", "share_keys", "collect_masked_vectors", "unmask"])
def test_the_mean_is_of_those_whose_masked_uploads_came(clients, stage):
    """Of odd and even numbers of clients, and of arrays of any rank and float."""
    wanted = {
        "vector": ((5,), torch.float32),
        "number": ((), torch.float32),
        "nothing": ((0, 4), torch.float32),
        "half": ((2, 3), torch.float16),
        "double": ((1, 2, 2), torch.float64),
    }
    need = RULES.enough(clients)
    lost = [70 + c for c in range(clients - need)] if stage else []

    def changed(node, now, answer):
        return None if now == stage and node in lost else answer

    played = Clients([3 * c + 1 for c in range(clients)], wanted, changed)
    sum_, outcome = summed(played)
    assert sum_.mean is not None
    there = [n for n in played.nodes() if stage == "unmask" or n not in lost]
    assert sorted(outcome.good) == there
    want = mean_of(played, there)
    most, whole = max(played.images), sum(played.images[n - 70] for n in there)
    for name, (shape, dtype) in wanted.items():
        found = sum_.mean[name]
        assert (tuple(found.shape), found.dtype) == (shape, dtype)
        step = 2 * 8.0 / (1 << 22) * len(there) * most / whole
        rtol = 1e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(found.double(), want[name], rtol=rtol, atol=step)


def test_late_shares_and_a_second_sum_do_not_tell_an_upload_apart():
    """What had come too late opens the first sum: the second is of the same clients, or is none."""
    late, lost = {70, 71, 72, 73}, set()

    def changed(node, stage, answer):
        return None if node in lost or (stage == "unmask" and node in late) else answer

    played = Clients([5, 5, 5, 5], changed=changed)
    sum_, outcome = summed(played)
    assert sum_.mean is None
    assert sorted(outcome.absent) == [70, 71, 72, 73]
    opened = [stage for stage, _, answer in played.answers if answer.head["kind"] == "secure"]
    assert opened.count("unmask") == 4, "the test must be able to fail: they tell their shares"
    late.clear()
    lost.add(73)
    sum_, outcome = summed(played, mean=sum_)
    assert sum_.mean is None
    assert [stage for stage, *_ in played.answers].count("unmask") == 4
    _, outcome = summed(played, mean=sum_, without=[73])
    assert (sum_.mean, outcome.good) == (None, {})
    lost.clear()
    _, outcome = summed(played, mean=sum_)
    torch.testing.assert_close(
        sum_.mean["ctx"].double(), mean_of(played, outcome.good)["ctx"], rtol=0, atol=1e-5
    )
    assert sorted(outcome.good) == [70, 71, 72, 73]


def test_no_letter_has_a_life_of_no_time():
    """Flower makes twelve hours of it, in which shares of a round that has ended would arrive."""
    from flwr.app import Message, RecordDict

    assert Message(RecordDict(), 1, "train", ttl=0.0).metadata.ttl == 12 * 3600

    def changed(node, stage, answer):
        return None if (node, stage) == (73, "collect_masked_vectors") else answer

    played = Clients([5, 5, 5, 5], changed=changed)
    sum_, _ = summed(played, timeout=1.0)
    assert sum_.mean is None
    assert [stage for stage, _ in played.lives] == [
        stage for stage in ("setup", "share_keys", "collect_masked_vectors") for _ in range(4)
    ]
    assert all(life > 0 for _, life in played.lives)


def array(shape):
    """The head of an array of NumPy's, without its numbers."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive():
    content = io.BytesIO()
    np.savez(content, x=np.zeros(1))
    return content.getvalue()


def key(curve):
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.supercore.primitives import asymmetric

    return asymmetric.public_key_to_bytes(ec.generate_private_key(curve()).public_key())


def small(record):
    from cryptography.hazmat.primitives.asymmetric import ec

    return key(ec.SECP256R1)


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("setup", "pk1", None),
        ("setup", "pk1", 5),
        ("setup", "pk2", b"no key"),
        ("setup", "pk2", small),
        ("setup", "pk2", lambda record: record["pk1"]),
        ("share_keys", "dsts", None),
        ("share_keys", "dsts", 3),
        ("share_keys", "dsts", [1, 2, 3]),
        ("share_keys", "dsts", [70, 70, 72]),
        ("share_keys", "ctxts", lambda record: record["ctxts"][:1]),
        ("share_keys", "ctxts", ["a", "b", "c"]),
        ("collect_masked_vectors", "masked_params", 7),
        ("collect_masked_vectors", "masked_params", [archive(), archive()]),
        ("collect_masked_vectors", "masked_params", [b"PK\x03\x04", b""]),
        ("collect_masked_vectors", "masked_params", [array("(9999999999999,)"), b""]),
        ("collect_masked_vectors", "masked_params", [array("(" * 2000), b""]),
        ("collect_masked_vectors", "masked_params", [b"0" * 100_000]),
        ("collect_masked_vectors", "update", "ab"),
        ("collect_masked_vectors", "update", [1]),
        ("unmask", "nids", None),
        ("unmask", "nids", [71, 71, 71, 71]),
        ("unmask", "nids", [1, 2, 3, 4]),
        ("unmask", "shares", [1, 2, 3, 4]),
        ("unmask", "shares", [b"", b"", b"", b""]),
        ("unmask", "shares", lambda record: record["shares"][:1]),
    ],
)
def test_one_client_that_answers_nonsense_does_not_stop_the_others(stage, name, value):
    """It is refused by name, whatever Flower's stages and NumPy would say of its answer."""

    def changed(node, now, answer):
        if (node, now) != (71, stage):
            return answer
        if name == "update":
            return Letter({**answer.head, name: value}, answer.arrays)
        record = secagg.read_record(answer)
        wrong = value(record) if callable(value) else value
        del record[name]
        if wrong is not None:
            record[name] = wrong
        return Letter(answer.head, {secagg.RECORD: secagg.pack_record(record)})

    played = Clients([5, 3, 4, 6], changed=changed)
    rules = RULES.model_copy(update={"most_bytes": 50_000})
    sum_ = secagg_server.SecureMean(played.wanted, played.images.__getitem__, "images", rules)
    _, outcome = summed(played, mean=sum_)
    assert list(outcome.refused) == [71]
    assert outcome.refused[71].startswith("fastfpl.flower: ")
    there = [70, 71, 72, 73] if stage == "unmask" else [70, 72, 73]
    assert sorted(outcome.good) == there
    torch.testing.assert_close(
        sum_.mean["ctx"].double(), mean_of(played, there)["ctx"], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(
    ("number", "said"),
    [(19.625, "larger ones: -r secagg_clip=16"), (float("nan"), "NaN or inf"), (8.0, None)],
)
def test_what_cannot_be_carried_is_refused_without_its_numbers(number, said):
    played = Clients([5, 5, 5, 5])
    played.uploads[1]["ctx"][2] = number
    sum_, outcome = summed(played)
    if said is None:  # the largest that is carried
        want = mean_of(played, outcome.good)["ctx"]
        torch.testing.assert_close(sum_.mean["ctx"].double(), want, rtol=0, atol=1e-5)
        return
    assert sorted(outcome.good) == [70, 72, 73]
    assert outcome.failed[71].endswith(f"client 1 got {said}")
    assert "19.6" not in outcome.failed[71]


def test_a_client_forgets_keys_and_shares_with_the_last_stage():
    """Who gets hold of clients later opens no former sum; the next one begins as the first."""
    state = secagg.flower_parts().state

    def changed(node, stage, answer):
        if stage == "unmask":
            return answer
        assert len(played.contexts[node - 70].state.config_records[state]) > 5
        return answer

    played = Clients([5, 3, 4, 6], changed=changed)
    for _ in range(2):
        sum_, _ = summed(played)
        assert sum_.mean is not None
        assert [dict(c.state.config_records[state]) for c in played.contexts] == [{}] * 4


# --- wrong shares, and words about them -----------------------------------------------------------


def changing(node, stage, change):
    """Change what a client answers at a stage: ``change(record)`` changes it in its place."""

    def changed(this, now, answer):
        if (this, now) != (node, stage) or "unopened" in answer.head:
            return answer
        record = secagg.read_record(answer)
        change(record)
        return Letter(answer.head, {secagg.RECORD: secagg.pack_record(record)})

    return changed


def saying(node, nodes):
    """Have a client say that shares of others do not open, at the stage at which it would know."""

    def changed(this, now, answer):
        if (this, now) != (node, "collect_masked_vectors"):
            return answer
        head = {k: v for k, v in answer.head.items() if k != "update"}
        return Letter({**head, "unopened": nodes}, answer.arrays)

    return changed


def spoiled(*holders, name="ctxts"):
    """Spoil what is sealed for holders, or its marks; for all of them if none is named."""

    def change(record):
        for place, holder in enumerate(record["dsts"]):
            if not holders or holder in holders:
                sealed = record[name]
                record[name] = [
                    *sealed[:place],
                    sealed[place][::-1],
                    *sealed[place + 1 :],
                ]

    return change


def opened(played):
    """How often a sum was asked to be opened."""
    asked = [node for stage, node, _ in played.answers if stage == "unmask"]
    return max((asked.count(node) for node in asked), default=0)


def assert_mean(sum_, played, nodes):
    want = mean_of(played, nodes)["ctx"]
    torch.testing.assert_close(sum_.mean["ctx"].double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "changed",
    [
        changing(71, "share_keys", spoiled()),
        changing(71, "share_keys", spoiled(name="marks")),
        saying(71, [70, 72, 73]),
    ],
    ids=["ciphertexts", "marks", "words"],
)
def test_who_is_at_odds_with_a_quorum_is_left_out_alone(changed):
    """Three of four say so, or it says so of three: the others are summed, and opened once."""
    played = Clients([5, 3, 4, 6], changed=changed)
    sum_, outcome = summed(played)
    assert sorted(outcome.good) == [70, 72, 73]
    assert list(outcome.refused) == [71]
    assert not outcome.failed
    assert outcome.absent == []
    assert "client 1 is at odds with 0, 2, 3, who are a quorum" in outcome.refused[71]
    assert opened(played) == 1
    assert_mean(sum_, played, outcome.good)


@pytest.mark.parametrize(
    "changed",
    [
        changing(71, "share_keys", spoiled(72)),
        changing(71, "share_keys", spoiled(72, name="marks")),
        saying(71, [72]),
        saying(72, [71]),
    ],
    ids=["ciphertext", "mark", "words", "words of the other"],
)
def test_of_a_pair_at_odds_both_are_left_out(changed):
    """Nobody can say who is wrong: a liar takes one with it, and counts as little."""
    played = Clients([5, 3, 4, 6, 2, 7, 1], changed=changed)
    sum_, outcome = summed(played)
    assert sorted(outcome.good) == [70, 73, 74, 75, 76]
    assert sorted(outcome.refused) == [71, 72]
    for node, other in ((71, 2), (72, 1)):
        assert (
            f"client {node - 70} is at odds with {other}, and nobody can say who is wrong"
            in (outcome.refused[node])
        )
    assert opened(played) == 1
    assert_mean(sum_, played, outcome.good)


def test_who_seals_nonsense_for_several_and_then_is_silent_is_not_waited_for():
    """Those who say so have answered, and are of the quorum after which there is grace alone."""
    wrong = changing(71, "share_keys", spoiled(72, 73))

    def changed(node, now, answer):
        silent = (node, now) == (71, "collect_masked_vectors")
        return None if silent else wrong(node, now, answer)

    played = Clients([5, 3, 4, 6, 2, 7, 1], changed=changed)
    sum_, outcome = summed(played)
    assert sorted(outcome.good) == [70, 73, 74, 75, 76]
    assert sorted(outcome.refused) == [71, 72]
    assert "client 1 is at odds with 2, 3" in outcome.refused[71]
    assert played.time < 3
    assert_mean(sum_, played, outcome.good)


def test_without_a_quorum_beside_a_pair_nothing_is_opened():
    played = Clients([5, 3, 4, 6], changed=saying(71, [72]))
    sum_, outcome = summed(played)
    assert sum_.mean is None
    assert outcome.good == {}
    assert sorted(outcome.refused) == [71, 72]
    assert opened(played) == 0
    # it may have been one letter on its way: the next time everybody is asked
    played.changed = lambda node, stage, answer: answer
    sum_, outcome = summed(played, mean=sum_)
    assert sorted(outcome.good) == [70, 71, 72, 73]


@pytest.mark.parametrize("nodes", [5, None, [], [71], [1], [True], ["72"], [72, [73]], {"72": 1}])
def test_words_about_nobody_of_the_round_are_refused(nodes):
    played = Clients([5, 3, 4, 6], changed=saying(71, nodes))
    sum_, outcome = summed(played)
    assert list(outcome.refused) == [71]
    assert "a client must say whose shares do not open" in outcome.refused[71]
    assert sorted(outcome.good) == [70, 72, 73]
    assert_mean(sum_, played, outcome.good)


@pytest.mark.parametrize("lost", [[], [74]], ids=["seeds", "and a key"])
def test_who_tells_other_shares_than_it_took_is_refused_and_the_rest_open_the_sum(lost):
    """Of a seed, and of the key of one that was lost: its own masked upload counts all the same."""

    def change(record):
        shares = record["shares"]
        record["shares"] = [*shares[:-1], shares[-1][:4] + shares[-1][:3:-1]]

    wrong = changing(71, "unmask", change)

    def changed(node, now, answer):
        if node in lost and now == "collect_masked_vectors":
            return None
        return wrong(node, now, answer)

    played = Clients([5, 3, 4, 6, 2, 7], changed=changed)
    sum_, outcome = summed(played, need=4)
    assert list(outcome.refused) == [71]
    assert (
        "a client must tell the shares that it has taken; got others from client 1"
        in (outcome.refused[71])
    )
    there = [node for node in played.nodes() if node not in lost]
    assert sorted(outcome.good) == there
    assert_mean(sum_, played, there)


def dealing(monkeypatch, node, which):
    """Have a client deal a wrong share among right ones, with the mark of what it dealt."""
    module = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    honest, now, many = module.create_shares, [], itertools.count()

    def dealt(secret, threshold, number):
        shares = honest(secret, threshold, number)
        if now and now[-1] == node and next(many) % 2 == which:  # of the seed, then of the key
            last = shares[-1]
            shares[-1] = last[:4] + bytes(16) + last[20:]
        return shares

    def answered(letter, message, context, site):
        now.append(message.metadata.dst_node_id)
        return answer(letter, message, context, site)

    answer = secagg_client.secure_answer
    monkeypatch.setattr(module, "create_shares", dealt)
    monkeypatch.setattr(secagg_client, "secure_answer", answered)


def test_who_deals_shares_of_nothing_is_left_out_and_the_others_are_summed_anew(monkeypatch):
    """Its shares are those that it marked. The two sums that are asked for differ by it alone."""
    dealing(monkeypatch, 71, 0)
    played = Clients([5, 3, 4, 6, 2])
    sum_, outcome = summed(played, need=3)
    assert list(outcome.refused) == [71]
    assert (
        "must open the secret that it has marked; got others from client 1" in (outcome.refused[71])
    )
    assert sorted(outcome.good) == [70, 72, 73, 74]
    assert sum_.asked_of == {0, 2, 3, 4}
    assert opened(played) == 2
    assert_mean(sum_, played, outcome.good)


def test_who_marks_another_seed_is_left_out(monkeypatch):
    def change(record):
        record["seed_mark"] = bytes(32)

    played = Clients([5, 3, 4, 6], changed=changing(71, "share_keys", change))
    sum_, outcome = summed(played)
    assert list(outcome.refused) == [71]
    assert sorted(outcome.good) == [70, 72, 73]
    assert_mean(sum_, played, outcome.good)


def test_who_is_lost_and_has_dealt_a_key_of_nothing_stops_nobody(monkeypatch):
    """Those who were asked are summed anew, and no one else: it was none of them."""
    dealing(monkeypatch, 74, 1)
    away = []

    def changed(node, now, answer):
        if now == "collect_masked_vectors" and node in (73, 74) and node not in away:
            away.append(node)
            return None
        return answer

    played = Clients([5, 3, 4, 6, 2, 7, 1], changed=changed)
    sum_, outcome = summed(played, need=4)
    assert list(outcome.refused) == [74]
    assert sorted(outcome.good) == [70, 71, 72, 75, 76]
    assert sum_.asked_of == {0, 1, 2, 5, 6}
    assert_mean(sum_, played, outcome.good)


@pytest.mark.parametrize("counts", ["images", "clients"])
@pytest.mark.parametrize("lost", [[], [73]], ids=["all", "one lost"])
def test_masks_that_do_not_come_off_stop_a_run(counts, lost):
    """The norm of such a mean is 500 to 5000 for 2048 numbers: most_norm alone lets it pass."""
    from flwr.common import ndarray_to_bytes

    draw = np.random.default_rng(0)

    def change(record):
        drawn = [draw.integers(0, 1 << 32, size) for size in (1, 5)]
        record["masked_params"] = [*map(ndarray_to_bytes, drawn)]

    wrong = changing(71, "collect_masked_vectors", change)

    def changed(node, now, answer):
        gone = node in lost and now == "collect_masked_vectors"
        return None if gone else wrong(node, now, answer)

    played = Clients([5, 3, 4, 6], changed=changed)
    with pytest.raises(InputError, match="one has masked its upload by other secrets"):
        summed(played, counts=counts)
    played.changed = lambda node, now, answer: None if node in lost else answer
    _, outcome = summed(played, counts=counts)
    assert len(outcome.good) == 4 - len(lost)


def test_keys_of_another_are_refused():
    """Every client would refuse to deal shares by such keys."""
    known = []

    def changed(node, now, answer):
        if now == "setup":
            known.append(secagg.read_record(answer))
            if node == 71:
                record = known[0]
                assert record["pk1"] != known[-1]["pk1"]
                return Letter(answer.head, {secagg.RECORD: secagg.pack_record(record)})
        return answer

    played = Clients([5, 3, 4, 6], changed=changed)
    sum_, outcome = summed(played)
    assert list(outcome.refused) == [71]
    assert "keys must be of one client alone; got another's from client 1" in outcome.refused[71]
    assert not outcome.failed
    assert_mean(sum_, played, outcome.good)


def test_who_says_that_shares_do_not_open_has_forgotten_its_own(monkeypatch):
    """What it dealt is opened by nobody, whatever it is asked then."""
    played = Clients([5, 3, 4, 6], changed=changing(71, "share_keys", spoiled(72)))
    sum_, _ = summed(played)
    assert sum_.mean is None
    state = secagg.flower_parts().state
    left = [dict(context.state.config_records[state]) for context in played.contexts]
    assert [bool(one) for one in left] == [True, True, False, True]
    said = [answer for _, node, answer in played.answers if "unopened" in answer.head]
    assert [answer.head["unopened"] for answer in said] == [[71]]
    assert "update" not in said[0].head
    assert dict(secagg.read_record(said[0])) == {}


@pytest.mark.parametrize("seed", range(40))
def test_fewer_wrong_ones_than_a_quorum_cost_no_more_honest_ones_than_themselves(seed):
    draw = random.Random(seed)
    count = draw.randint(3, 14)
    need = draw.randint(count // 2 + 1, count)
    wrong = set(draw.sample(range(count), draw.randint(1, need - 1)))
    at_odds = {}
    for one, other in itertools.permutations(range(count), 2):
        if {one, other} & wrong and draw.random() < draw.choice([0.1, 0.5, 0.9]):
            at_odds.setdefault(one, set()).add(other)
    alone, both = secagg_server._left_out(at_odds, need)
    assert alone <= wrong
    assert not alone & both
    assert len(both - wrong) <= len(both & wrong)
    gone = alone | both
    assert not any(
        {one, other} <= {*range(count)} - gone for one in at_odds for other in at_odds[one]
    )
    # a sum of the rest has two honest uploads or more, wherever there were two to begin with
    rest = {*range(count)} - gone
    if len(rest) >= need and count - len(wrong) > 1:
        assert len(rest - wrong) > 1
