"""How images are dealt to clients."""

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfpl.data import KINDS, base_novel, deal_depends_on_seed, partition
from fastfpl.data.partitions import _empty_clients
from fastfpl.data.shares import draw_sizes
from fastfpl.errors import InputError, KindError

SIZES = {"flowers": 102, "pets": 37, "food": 101, "caltech": 100, "dtd": 47}


def labels_of(classes, per_class, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))


def split(kind, *, classes=10, train=60, test=20, domains=1, **options):
    """Partition balanced labels, spread over domains; returns them with the shards."""
    y = labels_of(classes, train, 1), labels_of(classes, test, 2)
    if kind == "given":
        named = [np.arange(len(labels)) % options["clients"] for labels in y]
        options |= dict(zip(("train_clients", "test_clients"), named, strict=True))
    d = [np.arange(len(labels)) % domains for labels in y]
    return *y, *d, partition(kind, *y, *d, classes=classes, **options)


def same(a, b):
    return all(
        np.array_equal(x.train, y.train) and np.array_equal(x.test, y.test)
        for x, y in zip(a, b, strict=True)
    )


# --- the pathological deal of the released code ---------------------------------------------------


def deal(classes, clients, **options):
    """Return each client's classes in the deal's order: images lie in the order of the labels."""
    order = list(range(classes))
    random.Random(2023).shuffle(order)
    y = np.array(order)
    zeros = np.zeros(classes, dtype=int)
    shards = partition(
        "pathological", y, y, zeros, zeros, classes=classes, clients=clients, seed=0, **options
    )
    return [y[s.train].tolist() for s in shards]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("flowers", [90, 54, 31, 35, 55, 72, 92, 42, 95, 84], None),
        ("pets", [18, 14, 23, 10], {24}),
        ("food", [20, 79, 94, 54, 52, 65, 0, 1, 48, 74], None),
        ("caltech", [20, 79, 93, 54, 52, 65, 0, 1, 48, 74], None),
        ("dtd", [45, 3, 23, 43, 22], {24, 44}),
    ],
)
def test_ten_clients_get_the_published_classes(name, first, last):
    clients = deal(SIZES[name], 10)
    assert clients[0] == first
    assert last is None or set(clients[-1]) == last


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [
        (102, [10] * 9 + [12]),
        (37, [4] * 9 + [1]),
        (101, [10] * 9 + [11]),
        (100, [10] * 10),
        (47, [5] * 9 + [2]),
        (51, [5] * 9 + [6]),
        (19, [2] * 9 + [1]),
        (50, [5] * 10),  # base classes of Caltech
        (24, [2] * 9 + [6]),
        (25, [2] * 9 + [7]),  # 2.5 rounds to the even 2
    ],
)
def test_ten_clients_get_the_published_numbers_of_classes(classes, sizes):
    assert [len(mine) for mine in deal(classes, 10)] == sizes


@pytest.mark.parametrize("shots", [5, 7, 8])
def test_few_shots_continue_the_stream_of_the_deal(shots):
    # an oracle from the description: deal with seed 2023, then sample with the same generator,
    # client by client, labels in the order of their first appearance
    y = labels_of(12, 7, 5)
    y = np.concatenate([y, [3, 3]])
    clients = 5
    stream = random.Random(2023)
    order = list(range(12))
    stream.shuffle(order)
    mine = [order[:2], order[2:4], order[4:6], order[6:8], order[8:]]
    appearance = list(dict.fromkeys(y.tolist()))
    expected = []
    for client in range(clients):
        chosen = []
        for label in appearance:
            if label in mine[client]:
                items = np.flatnonzero(y == label).tolist()  # 7, of label 3 nine
                chosen += stream.sample(items, shots) if len(items) >= shots else items
        expected.append(chosen)
    zeros = np.zeros(len(y), dtype=int)
    shards = partition(
        "pathological", y, y, zeros, zeros, classes=12, clients=clients, seed=9, shots=shots
    )
    assert [s.train.tolist() for s in shards] == expected
    for client, shard in enumerate(shards):
        assert set(y[shard.test]) == set(mine[client])
    assert sum(len(s.test) for s in shards) == len(y)


def test_the_pathological_deal_is_the_same_for_every_seed_unless_told():
    shards = [split("pathological", clients=5, seed=seed, shots=4)[-1] for seed in (0, 1)]
    assert same(*shards)
    own = [split("pathological", clients=5, seed=s, shots=4, deal_seed=None)[-1] for s in (0, 1)]
    assert not same(*own)
    seven = split("pathological", clients=5, seed=1, shots=4, deal_seed=7)[-1]
    assert same(seven, split("pathological", clients=5, seed=7, shots=4, deal_seed=None)[-1])


EVERY = {
    "iid": {"clients": 3},
    "iid-fewshot": {"clients": 3, "shots": 4},
    "pathological": {"clients": 5},
    "dirichlet": {"clients": 2, "beta": 5.0},
    "labeldir100": {"clients": 4, "classes": 100, "train": 5, "test": 2},
    "labeluni": {"clients": 5, "classes_per_client": 2},
    "domain": {"clients": 2, "domains": 2},
    "domain-dirichlet": {"clients": 4, "domains": 2, "beta": 5.0},
    "given": {"clients": 3},
}


@pytest.mark.parametrize("shots", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_deal_is_said_to_owe_to_the_seed_it_does(kind, shots):
    options = {"shots": shots, **EVERY[kind]}
    first, second = (split(kind, seed=seed, **options)[-1] for seed in (0, 1))
    drawn, fixed = deal_depends_on_seed(kind, options["shots"])
    assert bool(drawn) == (not same(first, second))
    assert drawn or fixed
    if kind == "labeldir100" and shots is None:  # the numbering alone
        lists = [sorted(s.train.tolist() for s in shards) for shards in (first, second)]
        assert lists[0] == lists[1]
    if kind.startswith("domain"):  # the domain of a client
        for a, b in zip(first, second, strict=True):
            assert set(a.train % 2) == set(b.train % 2)
            assert len(set(a.train % 2)) == 1
    with pytest.raises(InputError, match="did you mean 'domain'"):
        deal_depends_on_seed("domaim")


def test_a_class_with_fewer_images_than_shots_gives_all_it_has():
    y, _, _, _, shards = split("pathological", train=3, clients=5, seed=0, shots=16)
    assert sum(len(s.train) for s in shards) == len(y)


def test_the_empty_clients_are_counted_as_the_deal_leaves_them():
    for classes in range(1, 60):
        for clients in range(1, 70):
            per = round(classes / clients)
            ends = [(u + 1) * per for u in range(clients - 1)] + [classes]
            held = [len(range(classes)[u * per : end]) for u, end in enumerate(ends)]
            assert _empty_clients(classes, clients) == held.count(0)


@pytest.mark.parametrize(
    ("classes", "clients", "rest"),
    [
        (37, 20, "got 20 with 37 classes: 1 client would be empty; use 19 or 25"),
        (47, 50, "got 50 with 47 classes: 3 clients would be empty; use 47"),
        (10, 21, "got 21 with 10 classes: 20 clients would be empty; use 10"),
    ],
)
def test_a_deal_with_empty_clients_is_refused_with_numbers_that_work(classes, clients, rest):
    sentence = "fastfpl.data.partition: clients must leave every client a class; " + rest
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        split("pathological", classes=classes, clients=clients, seed=0)
    for good in rest.split("use ")[1].split(" or "):
        shards = split("pathological", classes=classes, clients=int(good), seed=0)[-1]
        assert all(len(s.train) and len(s.test) for s in shards)


def test_a_client_whose_classes_have_no_images_is_refused():
    y = np.array([0, 1, 2])
    zeros = np.zeros(3, dtype=int)
    with pytest.raises(InputError, match=r"test_labels must hold an image .* classes \[2\]"):
        partition(
            "pathological", y, np.array([0, 1, 1]), zeros, zeros, classes=3, clients=3, seed=0
        )


# --- laws that hold for every kind ----------------------------------------------------------------


@st.composite
def splits(draw, kinds=KINDS):
    kind = draw(st.sampled_from(kinds))
    classes = draw(st.integers(2, 12))
    domains = draw(st.integers(1, 3))
    clients = draw(st.integers(1, 3)) * domains
    options = {}
    sizes = {"train": draw(st.integers(13, 40)), "test": draw(st.integers(13, 40))}
    shots = draw(st.none() | st.integers(1, 5))
    if kind == "pathological":
        clients = draw(st.sampled_from([n for n in range(1, 7) if not _empty_clients(classes, n)]))
        options["repeat_rate"] = draw(st.sampled_from([0.0, 0.5, 0.9]))
    if kind == "domain":
        clients = domains
    if kind == "dirichlet":
        clients = min(clients, classes)  # nine of two classes are rarely found
    if kind == "domain-dirichlet":
        options["split_test"] = draw(st.booleans())
    if kind == "iid-fewshot":
        shots = shots or 3
    if kind == "labeldir100":
        classes = 100
        sizes = {"train": draw(st.integers(2, 5)), "test": draw(st.integers(1, 3))}
    if kind == "labeluni":
        per_client = draw(st.integers(1, min(3, classes)))
        clients = draw(st.integers(1, 2)) * (classes // math.gcd(per_client, classes))
        options["classes_per_client"] = per_client
    options |= {
        "classes": classes,
        "clients": clients,
        "seed": draw(st.integers(0, 2**32)),
        "beta": draw(st.sampled_from([0.1, 0.5, 5.0])),
        "min_size": 1,
        "shots": shots,
    }
    return kind, {**options, **sizes, "domains": domains}


def held_by_several(kind, options):
    """Name the sides whose images may be in several shards."""
    if options.get("repeat_rate"):
        return {"train", "test"}
    if not options.get("split_test", True):
        return {"test"}
    return {"train"} if kind == "iid-fewshot" else set()


PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)


@PROPERTY
@given(splits())
def test_shards_are_disjoint_and_complete(drawn):
    kind, options = drawn
    train, test, _, _, shards = split(kind, **options)
    assert len(shards) == options["clients"]
    for side, labels in (("train", train), ("test", test)):
        parts = [getattr(s, side) for s in shards]
        every = np.unique(np.concatenate(parts))
        total = sum(len(p) for p in parts)
        assert all(p.dtype == np.int64 and len(np.unique(p)) == len(p) > 0 for p in parts)
        assert every[0] >= 0
        assert every[-1] < len(labels)
        if side not in held_by_several(kind, options):
            assert total == len(every)
        # the two kinds that leave images out are counted below
        if side == "test" or options["shots"] is None:
            assert len(every) == len(labels) or kind in ("labeldir100", "labeluni")


@PROPERTY
@given(splits())
def test_equal_seeds_give_equal_shards_and_leave_global_generators_alone(drawn):
    kind, options = drawn
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = split(kind, **options)[-1]
    after = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert after == states
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert same(first, split(kind, **options)[-1])


@PROPERTY
@given(splits([kind for kind in KINDS if kind != "iid-fewshot"]))
def test_shots_only_thin_the_train_lists(drawn):
    kind, options = drawn
    options["shots"] = options["shots"] or 2
    train, _, _, _, few = split(kind, **options)
    _, _, _, _, every = split(kind, **{**options, "shots": None})
    for thin, full in zip(few, every, strict=True):
        assert set(thin.train) <= set(full.train)
        np.testing.assert_array_equal(thin.test, full.test)
        for label in range(options["classes"]):
            held = (train[full.train] == label).sum()
            assert (train[thin.train] == label).sum() == min(held, options["shots"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "domain-dirichlet", "labeluni"])
def test_another_seed_gives_another_split(kind):
    shards = [split(kind, clients=10, domains=2, seed=seed)[-1] for seed in (0, 1)]
    assert not same(*shards)


@pytest.mark.parametrize("kind", ["iid", "iid-fewshot", "dirichlet", "domain", "domain-dirichlet"])
def test_another_seed_draws_other_shots(kind):
    shards = [split(kind, clients=2, domains=2, seed=s, shots=3)[-1] for s in (0, 1)]
    assert not np.array_equal(shards[0][0].train, shards[1][0].train)


# --- the single kinds -----------------------------------------------------------------------------


def test_iid_clients_have_equal_sizes_and_all_classes():
    train, _, _, _, shards = split("iid", clients=7, seed=3)
    assert sorted(len(s.train) for s in shards) == [85, 85, 86, 86, 86, 86, 86]
    assert sorted(len(s.test) for s in shards) == [28, 28, 28, 29, 29, 29, 29]
    assert all(len(np.unique(train[s.train])) == 10 for s in shards)


@PROPERTY
@given(splits(kinds=["dirichlet"]))
def test_dirichlet_gives_train_and_test_the_same_shares(drawn):
    kind, options = drawn
    options["shots"] = None
    train, test, _, _, shards = split(kind, **options)
    for label in range(options["classes"]):
        a, b = (train == label).sum(), (test == label).sum()
        for s in shards:
            share = (train[s.train] == label).sum() / a - (test[s.test] == label).sum() / b
            # each cut is rounded down: at most one image at either end of the piece
            assert abs(share) <= 1 / a + 1 / b


def test_dirichlet_shares_are_neither_even_nor_all_to_one():
    train, _, _, _, shards = split("dirichlet", clients=5, seed=0, beta=0.3)
    counts = np.array([np.bincount(train[s.train], minlength=10) for s in shards])
    largest = (counts / counts.sum(axis=0)).max(axis=0)
    assert 0.45 < largest.mean() < 0.95
    even = split("dirichlet", clients=5, seed=0, beta=1e4)
    counts = np.array([np.bincount(even[0][s.train], minlength=10) for s in even[-1]])
    assert counts.min() >= 10
    assert counts.max() <= 14  # 60 / 5 = 12 each


def test_a_client_that_is_full_gets_no_more_classes():
    train, test = labels_of(30, 40), labels_of(30, 15)
    clients = 6
    counts = np.array([np.bincount(y, minlength=30) for y in (train, test)])
    sizes = draw_sizes(counts, clients, 0.2, np.random.default_rng(0))
    np.testing.assert_array_equal(sizes.sum(axis=2), counts)
    met = 0
    for client in range(clients):
        held = 0
        for train_size, test_size in sizes[:, :, client].T:
            if held >= len(train) / clients:
                met += 1
                assert train_size == test_size == 0
            held += train_size
    assert met > 10  # the rule was at work


@pytest.mark.parametrize("clients", [1, 3])
def test_a_class_without_train_images_still_deals_its_test_images(clients):
    train, test = labels_of(4, 30), labels_of(5, 30)
    zeros = np.zeros(200, dtype=int)
    shards = partition(
        "dirichlet", train, test, zeros[: len(train)], zeros[: len(test)],
        classes=5, clients=clients, seed=0, min_size=5,
    )  # fmt: skip
    assert sum(len(s.test) for s in shards) == len(test)


@pytest.mark.parametrize("beta", [1e-3, 0.05])
def test_an_extreme_beta_deals_whole_classes_without_nan(beta):
    train, _, _, _, shards = split("dirichlet", clients=5, seed=0, beta=beta, min_size=1)
    assert sum(len(s.train) for s in shards) == len(train)


@pytest.mark.parametrize(
    ("kind", "least", "clients"), [("dirichlet", 10, 4), ("domain-dirichlet", 2, 8)]
)
def test_the_smallest_lists_have_their_published_size(kind, least, clients):
    found = []
    for seed in range(30):
        shards = split(
            kind, classes=4, train=40, test=14, domains=2, clients=clients, seed=seed, beta=0.5
        )[-1]
        found += [min(len(s.train), len(s.test)) for s in shards]
    assert least <= min(found) <= least + 2


def test_a_cut_that_cannot_be_found_ends_in_a_sentence():
    with pytest.raises(
        InputError, match=r"beta and clients must leave .* in 20000 draws: raise beta"
    ):
        split("dirichlet", classes=2, train=20, test=20, clients=5, seed=0, beta=1e-5, min_size=7)


def test_clients_too_many_for_the_smallest_size_are_refused_at_once():
    with pytest.raises(
        InputError,
        match="got 30 with 200 test images: use at most 20 clients or min_size at most 6",
    ):
        split("dirichlet", clients=30, seed=0)


def test_a_domain_is_a_client():
    _, _, train_d, test_d, shards = split("domain", domains=3, clients=3, seed=0)
    for d, s in enumerate(shards):
        np.testing.assert_array_equal(s.train, np.flatnonzero(train_d == d))
        np.testing.assert_array_equal(s.test, np.flatnonzero(test_d == d))


def test_domain_clients_come_domain_by_domain_and_differ():
    train, test, train_d, test_d, shards = split(
        "domain-dirichlet", domains=3, train=90, test=30, clients=6, seed=4
    )
    for client, s in enumerate(shards):
        assert set(train_d[s.train]) == set(test_d[s.test]) == {client // 2}
        for label in range(10):
            domain = client // 2
            a = ((train == label) & (train_d == domain)).sum()
            b = ((test == label) & (test_d == domain)).sum()
            share = (train[s.train] == label).sum() / a - (test[s.test] == label).sum() / b
            assert abs(share) <= 1 / a + 1 / b
    # the released code draws the same proportions for every domain and class
    counts = [np.bincount(train[s.train], minlength=10) for s in shards]
    assert not np.array_equal(counts[0], counts[2])
    assert len(set(counts[0])) > 3


def test_equal_domains_are_cut_differently():
    y = np.tile(labels_of(10, 30), 2)
    d = np.repeat([0, 1], 300)
    shards = partition("domain-dirichlet", y, y, d, d, classes=10, clients=4, seed=0)
    assert not np.array_equal(shards[0].train, shards[2].train - 300)


@pytest.mark.parametrize(
    ("kind", "clients", "rest"),
    [
        ("domain", 5, "must equal the number of domains; got 5 with 3 domains: use 3"),
        ("domain-dirichlet", 7, "must be a multiple .* got 7 with 3 domains: use 6 or 9"),
        ("domain-dirichlet", 2, "must be a multiple .* got 2 with 3 domains: use 3"),
    ],
)
def test_clients_that_do_not_fit_the_domains_are_refused(kind, clients, rest):
    with pytest.raises(InputError, match=rest):
        split(kind, domains=3, clients=clients, seed=0)


def test_a_domain_without_test_images_is_a_client_without():
    y, domains = np.zeros(4, dtype=int), ([0, 0, 1, 1], [0, 0, 0, 0])
    one, other = partition("domain", y, y, *domains, classes=1, clients=2, seed=0)
    assert one.test.tolist() == [0, 1, 2, 3]
    assert (other.train.tolist(), other.test.tolist()) == ([2, 3], [])
    with pytest.raises(InputError, match="no test image of domain 1"):
        partition("domain-dirichlet", y, y, *domains, classes=1, clients=2, seed=0)
    with pytest.raises(InputError, match="no train image of domain 0"):
        partition("domain", y, y, [1] * 4, [0, 1, 1, 1], classes=1, clients=2, seed=0)


# --- what is refused everywhere -------------------------------------------------------------------


def test_more_clients_than_images_are_refused():
    with pytest.raises(InputError, match="got 21 with 20 images: use at most 20"):
        split("iid", train=9, test=2, clients=21, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "rest"),
    [
        ({"kind": "idd"}, InputError, r"got 'idd'; did you mean 'iid'\?"),
        ({"clients": 0}, InputError, "clients must be at least 1; got 0"),
        ({"clients": 2.0}, KindError, "clients must be an integer; got float"),
        ({"clients": True}, KindError, "clients must be an integer; got bool"),
        ({"seed": -1}, InputError, "seed must be at least 0; got -1"),
        ({"deal_seed": -1}, InputError, "deal_seed must be at least 0; got -1"),
        ({"shots": 0}, InputError, "shots must be at least 1; got 0"),
        ({"min_size": 0}, InputError, "min_size must be at least 1; got 0"),
        ({"beta": 0.0}, InputError, "beta must be positive and finite; got 0.0"),
        ({"beta": float("nan")}, InputError, "beta must be positive and finite; got nan"),
        ({"beta": float("inf")}, InputError, "beta must be positive and finite; got inf"),
        ({"classes": 2}, InputError, r"train_labels must lie in \[0, 2\); got 0 to 2"),
        ({"train_labels": [0, -1, 1]}, InputError, r"must lie in \[0, 3\); got -1 to 1"),
        ({"train_labels": [0.5, 1, 2]}, KindError, "train_labels must be integers; got float64"),
        ({"test_labels": [[0], [1]]}, InputError, r"test_labels must have shape \(n,\)"),
        ({"test_labels": []}, InputError, "test_domains must be as long as test_labels; got 3"),
        ({"train_domains": [0, -2, 0]}, InputError, "train_domains must not be negative; got -2"),
        ({"test_labels": [], "test_domains": []}, InputError, "test_labels must hold an image"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, error, rest):
    arguments = {
        "kind": "iid",
        "train_labels": [0, 1, 2],
        "test_labels": [2, 1, 0],
        "train_domains": [0, 0, 0],
        "test_domains": [0, 0, 0],
        "classes": 3,
        "clients": 2,
        "seed": 0,
    }
    with pytest.raises(error, match="fastfpl.data.partition: .*" + rest):
        partition(**{**arguments, **options})


@pytest.mark.parametrize(("classes", "half"), [(2, 1), (37, 19), (47, 24), (101, 51), (100, 50)])
def test_base_is_the_larger_half(classes, half):
    base, novel = base_novel(classes)
    assert base.tolist() == list(range(half))
    assert novel.tolist() == list(range(half, classes))


def test_one_class_has_no_halves():
    with pytest.raises(InputError, match="classes must be at least 2; got 1"):
        base_novel(1)


# --- given ----------------------------------------------------------------------------------------


def given_to(train_clients, test_clients, clients=2, kind="given"):
    y = [0, 1] * 2
    return partition(
        *(kind, y, y, [0] * 4, [0] * 4),
        classes=2,
        clients=clients,
        seed=0,
        train_clients=train_clients,
        test_clients=test_clients,
    )


def test_given_gives_a_client_its_own_images_and_those_of_all():
    one, other = given_to([1, 0, 1, 0], [-1, 0, 0, 0])
    assert (one.train.tolist(), other.train.tolist()) == ([1, 3], [0, 2])
    assert (one.test.tolist(), other.test.tolist()) == ([0, 1, 2, 3], [0])
    assert not len(given_to([1, 0, 1, 0], [0, 0, 0, 0])[1].test)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_clients": None}, "with kind='given', and with no other.*that names its clients"),
        ({"kind": "iid"}, "must be given with kind='given', and with no other; got kind='iid'"),
        ({"train_clients": [0, 1]}, "train_clients must be 4 integers, one an image"),
        ({"test_clients": [0.0, 1, 0, 1]}, "test_clients must be 4 integers"),
        ({"train_clients": [0, 1, 0, -1]}, r"train_clients must lie in \[0, 2\); got -1 to 1"),
        ({"test_clients": [0, 1, 0, 2]}, r"must lie in \[-1, 2\); got 0 to 2: use clients=3"),
        ({"train_clients": [0, 0, 0, 0]}, "got none for client 1 of 2: leave the client out"),
    ],
)
def test_given_clients_that_are_none_are_refused(options, sentence):
    good = {"train_clients": [0, 1, 0, 1], "test_clients": [0, 1, 0, 1]}
    with pytest.raises(InputError, match=sentence):
        given_to(**{**good, **options})
