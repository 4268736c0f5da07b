"""How a data set is dealt to clients: pure functions from labels and domains to indices."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from fastfpl.data.pachinko import pachinko
from fastfpl.data.shards import Indices, Shard, by_label, multiples, refuse
from fastfpl.data.shares import dirichlet, uniform_shares
from fastfpl.errors import InputError, KindError, near

__all__ = ["KINDS", "Shard", "base_novel", "deal_depends_on_seed", "held_alone", "partition"]

#: Every kind of split that `partition` knows.
KINDS = (
    "dirichlet",
    "domain",
    "domain-dirichlet",
    "given",
    "iid",
    "iid-fewshot",
    "labeldir100",
    "labeluni",
    "pathological",
)

# classes of a client in the published "labeluni" splits, by the number of classes
_CLASSES_PER_CLIENT = {10: 2, 100: 10}


def partition(
    kind: str,
    train_labels: Sequence[int] | Indices,
    test_labels: Sequence[int] | Indices,
    train_domains: Sequence[int] | Indices,
    test_domains: Sequence[int] | Indices,
    *,
    classes: int,
    clients: int,
    seed: int,
    beta: float = 0.5,
    min_size: int | None = None,
    shots: int | None = None,
    deal_seed: int | None = 2023,
    classes_per_client: int | None = None,
    repeat_rate: float = 0.0,
    split_test: bool = True,
    train_clients: Sequence[int] | Indices | None = None,
    test_clients: Sequence[int] | Indices | None = None,
) -> list[Shard]:
    """Deal the images of a data set to clients.

    Parameters
    ----------
    kind : str
        ``"iid"``: a random permutation cut in equal parts, train and test apart.
        ``"iid-fewshot"``: every client draws its own ``shots`` train images of every class, so that
        clients may share some; of each class's test images clients get equal parts, up to one.
        ``"pathological"``: disjoint classes; every client gets round(C/U) of the shuffled classes
        (half to even), the last one the rest, and all test images of its classes.
        ``"dirichlet"``: of each class, client u gets the share p_u, p ~ Dir(beta), the same p for
        train and test; a client that holds its n/U train images gets no more classes.
        ``"domain"``: client u is domain u; one without test images has an empty test list.
        ``"given"``: client u has the images that ``train_clients`` and ``test_clients`` give to u,
        and the test images of all clients; one without test images has an empty test list.
        ``"domain-dirichlet"``: every domain is cut in U / domains clients like ``"dirichlet"``,
        all clients of domain 0 first.
        ``"labeldir100"``: pachinko allocation, CIFAR-100 only: a client has weights of the coarse
        classes, Dir(beta), and of the fine classes in each, Dir(10); each of its n // U images
        falls down this tree, out of one pool of train and test images. What is left over stays
        out; how many of a client's images are test images is left to chance.
        ``"labeluni"``: every class is cut in shares drawn from U(0.4, 0.6) and divided by their
        sum; every client takes ``classes_per_client`` shares, each of a random class among those
        with the most shares left. A share is rounded down: the rest of a class stays out.
    train_labels, test_labels : sequence of int, shape (n,)
        Labels in [0, classes).
    train_domains, test_domains : sequence of int, shape (n,)
        Domains counted from 0; only the two domain kinds look at them.
    classes, clients : int
        C and U, both positive.
    seed : int, not negative
        Of every draw but the class deal; of ``"labeldir100"`` only of the clients' numbering and
        of ``shots``, the rest is one published draw.
    beta : float > 0
        Concentration of the Dirichlet kinds and of ``"labeldir100"``; smaller is more uneven.
    min_size : int > 0, optional
        Smallest train and test list of a client of the Dirichlet kinds (before ``shots``); draws
        that miss it are repeated, 20 000 times at most. The default is 10, and 2 for
        ``"domain-dirichlet"`` unless ``split_test`` is False.
    shots : int > 0, optional
        Keep at most so many train images per client and class; None keeps all. Test lists stay.
    deal_seed : int or None
        Seed of the pathological class deal and of its few shots. The default gives the published
        deal, the same classes and images for every ``seed``; None takes ``seed``.
    classes_per_client : int > 0, optional
        Shares of a client of ``"labeluni"``, of as many classes if it divides C; U times it must
        be a multiple of C. The default is 2 for 10 classes and 10 for 100.
    repeat_rate : float in [0, 1)
        Of ``"pathological"``: every client also gets the first floor(repeat_rate · C) shuffled
        classes, and the others are dealt as ever; the last clients may get none of these. Of
        a shared class every client draws its own ``shots``, or has all images.
    split_test : bool
        Of ``"domain-dirichlet"``: if False, only train lists are cut and every client has its
        domain's whole test list (the device setting of FedAPT).
    train_clients, test_clients : sequence of int, shape (n,), optional
        Of ``"given"``, which needs both: clients in [0, clients), of test images also -1 for all.

    Returns
    -------
    shards : list of Shard
        One per client. No image is in two shards, with four exceptions named above: train images
        of ``"iid-fewshot"``, images of classes shared by ``repeat_rate``, test images if
        ``split_test`` is False, and test images that are given to all.

    Raises
    ------
    InputError
        If a value is refused, an option is given to a kind it has no meaning for, or a client
        would stay empty; the message names a cure.
    KindError
        If labels or domains are not integers.

    Notes
    -----
    Deterministic: yes; the global generators of `random` and `numpy` are neither read nor moved.
    Source: pFedMoAP's released pathological split (methods of McMahan et al. 2017, arXiv
    1602.05629); Dirichlet with a cap as in NIID-Bench (Li et al. 2022, arXiv 2102.02079), test
    lists with the train proportions as in FedOTP and FedPGP; pachinko allocation of Reddi et al.
    2021, arXiv 2003.00295, drawn in pFedMoAP's and FedOTP's order, and their "labeluni".

    Where the released code says nothing or starves a client, this one decides: a share of
    ``"iid-fewshot"`` test images is even (slices of round(n/U) lose images), its draws depend on
    ``seed``; shared classes leave round((C - shared)/U) others to each client.
    """
    if kind not in KINDS:
        raise refuse(f"kind must be a kind of split; got {kind!r}" + near(kind, KINDS))
    for name, value, low in (("classes", classes, 1), ("clients", clients, 1), ("seed", seed, 0)):
        _check_count(name, value, low)
    for name, option in (
        ("min_size", min_size),
        ("shots", shots),
        ("classes_per_client", classes_per_client),
    ):
        if option is not None:
            _check_count(name, option, 1)
    if deal_seed is not None:
        _check_count("deal_seed", deal_seed, 0)
    if not (beta > 0 and math.isfinite(beta)):
        raise refuse(f"beta must be positive and finite; got {beta!r}")
    beta = min(beta, 1e100)  # as even as any larger one, and no sum overflows
    if not 0 <= repeat_rate < 1:
        raise refuse(f"repeat_rate must lie in [0, 1); got {repeat_rate!r}")
    for name, given, home in (
        ("classes_per_client", classes_per_client is not None, "labeluni"),
        ("repeat_rate", repeat_rate > 0, "pathological"),
        ("split_test", not split_test, "domain-dirichlet"),
    ):
        if given and kind != home:
            raise refuse(f"{name} must be left out with kind={kind!r}; it is for {home!r}")
    if kind == "iid-fewshot" and shots is None:
        raise refuse("shots must be given with kind='iid-fewshot'; got None: use 'iid' for all")
    train_y = _check_labels("train_labels", train_labels, classes)
    test_y = _check_labels("test_labels", test_labels, classes)
    train_d = _check_labels("train_domains", train_domains, None)
    test_d = _check_labels("test_domains", test_domains, None)
    apart = {"train": kind != "iid-fewshot" and not repeat_rate, "test": split_test}
    # who has which test images is no cut of theirs: some clients may have none
    apart["test"] = apart["test"] and not repeat_rate and kind not in ("domain", "given")
    for name, y, y_domains in (("train", train_y, train_d), ("test", test_y, test_d)):
        if len(y) != len(y_domains):
            raise refuse(
                f"{name}_domains must be as long as {name}_labels; got {len(y_domains)} with "
                f"{len(y)}"
            )
        if not len(y):
            raise refuse(f"{name}_labels must hold an image; got none")
        if apart[name] and clients > len(y):
            raise refuse(
                f"clients must be at most the number of {name} images; got {clients} with "
                f"{len(y)} images: use at most {len(y)}"
            )

    if (kind == "given") != (train_clients is not None and test_clients is not None):
        raise refuse(
            "train_clients and test_clients must be given with kind='given', and with no other; "
            f"got kind={kind!r}"
            + (": use a data set that names its clients" if kind == "given" else "")
        )
    if kind == "pathological":
        stream = random.Random(int(seed if deal_seed is None else deal_seed))
        shared = _shared_classes(classes, repeat_rate)
        return _pathological(train_y, test_y, classes, clients, shots, shared, stream)
    cutting, sampling = np.random.SeedSequence(seed).spawn(2)
    if kind == "iid":
        shards = _iid(len(train_y), len(test_y), clients, np.random.default_rng(cutting))
    elif kind == "iid-fewshot":
        shards = _everything(len(train_y), test_y, clients, np.random.default_rng(cutting))
    elif kind == "dirichlet":
        least = min_size or 10
        shards = dirichlet(train_y, test_y, classes, clients, beta, least, cutting, "")
    elif kind == "labeldir100":
        shards = pachinko(train_y, test_y, classes, clients, beta, seed)
    elif kind == "labeluni":
        per_client = classes_per_client or _CLASSES_PER_CLIENT.get(classes)
        if per_client is None:
            raise refuse(
                "classes_per_client must be given unless there are "
                f"{' or '.join(map(str, _CLASSES_PER_CLIENT))} classes; got None with {classes} "
                "classes"
            )
        rng = np.random.default_rng(cutting)
        shards = uniform_shares(train_y, test_y, classes, clients, per_client, rng)
    elif kind == "given":
        shards = _given(train_clients, test_clients, len(train_y), len(test_y), clients)
    else:
        whole = _whole_domains(train_d, test_d, tested=kind != "domain")
        domains = len(whole)
        if kind == "domain":
            if clients != domains:
                raise refuse(
                    f"clients must equal the number of domains; got {clients} with {domains} "
                    f"domains: use {domains}"
                )
            shards = whole
        else:
            if clients % domains:
                raise refuse(
                    f"clients must be a multiple of the number of domains; got {clients} with "
                    f"{domains} domains: use {multiples(clients, domains)}"
                )
            least = min_size or (2 if split_test else 10)
            shards = []
            for d, (mine, source) in enumerate(zip(whole, cutting.spawn(domains), strict=True)):
                cut = dirichlet(
                    train_y[mine.train],
                    test_y[mine.test] if split_test else None,
                    classes,
                    clients // domains,
                    beta,
                    least,
                    source,
                    f" of domain {d}",
                )
                shards += [
                    Shard(mine.train[s.train], mine.test[s.test] if split_test else mine.test)
                    for s in cut
                ]
    if shots is not None:
        sources = sampling.spawn(clients)
        shards = [
            Shard(_few(s.train, train_y, shots, np.random.default_rng(source)), s.test)
            for s, source in zip(shards, sources, strict=True)
        ]
    return shards


def held_alone(
    train_labels: Indices,
    test_images: int,
    *,
    client: int,
    clients: int,
    shots: int | None,
    seed: int,
) -> list[Shard]:
    """Deal images that are all one client's: the shards of the others are empty.

    The client's is what ``kind="given"`` would deal it among the images of all.

    Parameters
    ----------
    train_labels : ndarray, shape (n,), int64
    test_images : int
    client, clients : int
        Whose they are, of how many.
    shots : int or None
        Training images of each class that are kept.
    seed : int
    """
    train = np.arange(len(train_labels), dtype=np.int64)
    if shots is not None:
        _, sampling = np.random.SeedSequence(seed).spawn(2)
        source = sampling.spawn(clients)[client]
        train = _few(train, train_labels, shots, np.random.default_rng(source))
    nothing = np.empty(0, dtype=np.int64)
    shards = [Shard(nothing, nothing) for _ in range(clients)]
    shards[client] = Shard(train, np.arange(test_images, dtype=np.int64))
    return shards


# what of a deal another seed draws anew, and what is the same for every seed
_DRAWN = {
    "iid": ("which images a client holds", ""),
    "iid-fewshot": ("which images a client holds", ""),
    "pathological": ("", "which classes a client holds, and which images of them"),
    "dirichlet": ("the share of each class that a client holds, and which images", ""),
    "labeldir100": ("which client is which number", "the lists of images, which are published"),
    "labeluni": ("which classes a client holds, and which images of them", ""),
    "domain": ("", "client u holds domain u"),
    "given": ("", "a client holds the images that the data set gives it"),
    "domain-dirichlet": (
        "the share of each class that a client holds, and which images",
        "the domain of a client",
    ),
}


def deal_depends_on_seed(kind: str, shots: int | None = None) -> tuple[str, str]:
    """Say what of a deal is another one with another seed of the run, and what is not.

    Parameters
    ----------
    kind : str
        As for `partition`, whose ``deal_seed`` is left out.
    shots : int, optional
        Training images per client and class, if not all.

    Returns
    -------
    drawn, fixed : str
        What depends on the seed and what depends on nothing, as halves of a sentence; empty if
        there is nothing of the sort. With ``drawn`` empty the lists of all seeds are equal.

    Raises
    ------
    InputError
        If the kind is unknown.
    """
    if kind not in _DRAWN:
        raise InputError(
            f"fastfpl.data.deal_depends_on_seed: kind must be a kind of split; got {kind!r}"
            + near(kind, KINDS)
        )
    drawn, fixed = _DRAWN[kind]
    if shots is not None and kind in ("labeldir100", "domain", "given"):
        few = f"which {shots} training images of a class a client keeps"
        drawn = f"{drawn}, and {few}" if drawn else few
    return drawn, fixed


def base_novel(classes: int) -> tuple[Indices, Indices]:
    """Split labels in a base half, the first ceil(C/2), and a novel half, the rest.

    Parameters
    ----------
    classes : int, at least 2

    Returns
    -------
    base, novel : ndarray, int64
        Old labels, ascending; `restrict` makes a data set of either.

    Raises
    ------
    InputError
        If there are fewer than 2 classes.

    Notes
    -----
    Source: Zhou et al. 2022, CoCoOp, arXiv 2203.05557.
    """
    if classes < 2:
        raise InputError(f"fastfpl.data.base_novel: classes must be at least 2; got {classes}")
    half = math.ceil(classes / 2)
    return np.arange(half, dtype=np.int64), np.arange(half, classes, dtype=np.int64)


def _check_count(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise KindError(
            f"fastfpl.data.partition: {name} must be an integer; got {type(value).__name__}"
        )
    if value < low:
        raise refuse(f"{name} must be at least {low}; got {value}")


def _check_labels(
    name: str,
    values: Sequence[int] | Indices,
    bound: int | None,
) -> Indices:
    array = np.asarray(values)
    if array.ndim != 1:
        raise refuse(f"{name} must have shape (n,); got {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise KindError(f"fastfpl.data.partition: {name} must be integers; got {array.dtype}")
    if array.size and (array.min() < 0 or (bound is not None and array.max() >= bound)):
        rule = "not be negative" if bound is None else f"lie in [0, {bound})"
        raise refuse(f"{name} must {rule}; got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _given(
    train: Sequence[int] | Indices | None,
    test: Sequence[int] | Indices | None,
    train_images: int,
    test_images: int,
    clients: int,
) -> list[Shard]:
    """Make one shard a client of the data set; refuses clients without a train image."""
    found: list[Indices] = []
    for name, values, images, low in (
        ("train_clients", train, train_images, 0),
        ("test_clients", test, test_images, -1),
    ):
        array = np.asarray(values)
        if array.shape != (images,) or not np.issubdtype(array.dtype, np.integer):
            raise refuse(
                f"{name} must be {images} integers, one an image; got {array.dtype} of shape "
                f"{array.shape}"
            )
        if array.min() < low or array.max() >= clients:
            raise refuse(
                f"{name} must lie in [{low}, {clients}); got {array.min()} to {array.max()}: use "
                f"clients={array.max() + 1}"
            )
        found.append(array.astype(np.int64))
    shards = [
        Shard(np.flatnonzero(found[0] == u), np.flatnonzero((found[1] == u) | (found[1] == -1)))
        for u in range(clients)
    ]
    for client, shard in enumerate(shards):
        if not len(shard.train):
            raise refuse(
                f"train_clients must give every client an image; got none for client {client} of "
                f"{clients}: leave the client out"
            )
    return shards


def _whole_domains(train_d: Indices, test_d: Indices, *, tested: bool) -> list[Shard]:
    """Make one shard a domain; refuses domains that lack train images, or test images if so."""
    domains = 1 + int(max(train_d.max(initial=-1), test_d.max(initial=-1)))
    if not domains:
        raise refuse("train_domains must hold an image; got none")
    whole = [
        Shard(np.flatnonzero(train_d == d), np.flatnonzero(test_d == d)) for d in range(domains)
    ]
    for d, mine in enumerate(whole):
        for name, items in (("train", mine.train), ("test", mine.test)):
            if not len(items) and (tested or name == "train"):
                raise refuse(
                    f"{name}_domains must name every domain from 0 to {domains - 1}; got no "
                    f"{name} image of domain {d}: count the domains from 0 without a gap",
                )
    return whole


def _iid(train: int, test: int, clients: int, rng: np.random.Generator) -> list[Shard]:
    parts = [np.array_split(rng.permutation(size), clients) for size in (train, test)]
    return [Shard(np.sort(a), np.sort(b)) for a, b in zip(*parts, strict=True)]


def _everything(train: int, test_y: Indices, clients: int, rng: np.random.Generator) -> list[Shard]:
    """Give every client all train images, and of each class the same number of test images."""
    drawn = rng.permutation(len(test_y))
    # dealt one by one in the order of their classes, no class and no client's total is off by two
    by_class = drawn[np.argsort(test_y[drawn], kind="stable")]
    every = np.arange(train, dtype=np.int64)
    return [Shard(every, np.sort(by_class[client::clients])) for client in range(clients)]


def _empty_clients(classes: int, clients: int) -> int:
    """Count the clients that the pathological deal leaves without a class."""
    per = round(classes / clients)
    # the last client starts at (clients - 1) · per, all before it hold per classes or none
    inner = clients - 1 if per == 0 else max(0, clients - 1 - math.ceil(classes / per))
    return inner + ((clients - 1) * per >= classes)


def _shared_classes(classes: int, repeat_rate: float) -> int:
    # the small addend keeps 0.29 · 100 = 28.999999999999996 from losing a class
    shared = min(int(repeat_rate * classes + 1e-9), classes - 1)
    if repeat_rate and not shared:
        raise refuse(
            f"repeat_rate must share a class of {classes} or be 0; got {repeat_rate!r}"
            + (f": use at least {math.ceil(1000 / classes) / 1000:g}" if classes > 1 else "")
        )
    return shared


def _pathological(
    train_y: Indices,
    test_y: Indices,
    classes: int,
    clients: int,
    shots: int | None,
    shared: int,
    stream: random.Random,
) -> list[Shard]:
    # a shared class keeps every client from being empty
    empty = 0 if shared else _empty_clients(classes, clients)
    if empty:
        good = [n for n in range(1, classes + 1) if not _empty_clients(classes, n)]
        below = [str(n) for n in good if n < clients][-1:]
        above = [str(n) for n in good if n > clients][:1]
        raise refuse(
            f"clients must leave every client a class; got {clients} with {classes} classes: "
            f"{empty} client{'s' * (empty > 1)} would be empty; use {' or '.join(below + above)}"
        )
    # one stream deals the classes and then draws the shots, as in the released code
    deal = list(range(classes))
    stream.shuffle(deal)
    everyone, deal = deal[:shared], deal[shared:]
    per = round(len(deal) / clients)
    train_items, test_items = by_label(train_y), by_label(test_y)
    shards = []
    for client in range(clients):
        end = classes if client == clients - 1 else (client + 1) * per
        mine = {*everyone, *deal[client * per : end]}
        lists: list[list[int]] = [[], []]
        for label, items in train_items.items():
            if label in mine:
                if shots is None or len(items) < shots:
                    lists[0] += items
                else:
                    lists[0] += stream.sample(items, shots)
        for label, items in test_items.items():
            if label in mine:
                lists[1] += items
        for name, chosen in zip(("train", "test"), lists, strict=True):
            if not chosen:
                raise refuse(
                    f"{name}_labels must hold an image of every client's classes; got none for "
                    f"client {client} with classes {sorted(mine)}: use fewer clients or drop the "
                    "classes without images"
                )
        shards.append(Shard(*(np.asarray(chosen, dtype=np.int64) for chosen in lists)))
    return shards


def _few(train: Indices, labels: Indices, shots: int, rng: np.random.Generator) -> Indices:
    mine = labels[train]
    kept = [rng.permutation(train[mine == label])[:shots] for label in np.unique(mine)]
    return np.sort(np.concatenate(kept))
