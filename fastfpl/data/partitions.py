"""How a data set is dealt to clients: pure functions from labels and domains to indices."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastfpl.errors import InputError, KindError, near

__all__ = ["KINDS", "Shard", "base_novel", "partition"]

Indices = npt.NDArray[np.int64]

#: Every kind of split that `partition` knows.
KINDS = ("dirichlet", "domain", "domain-dirichlet", "iid", "pathological")

# smallest train and test list of a client, as the released splits have it
_MIN_SIZE = {"dirichlet": 10, "domain-dirichlet": 2}
_ATTEMPTS = 1000


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's images.

    Attributes
    ----------
    train, test : ndarray, shape (n,), int64
        Positions in the data set's train and test split.
    """

    train: Indices
    test: Indices


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
) -> list[Shard]:
    """Deal the images of a data set to clients.

    Parameters
    ----------
    kind : str
        ``"iid"``: a random permutation cut in equal parts, train and test apart.
        ``"pathological"``: disjoint classes; every client gets round(C/U) of the shuffled classes
        (half to even), the last one the rest, and all test images of its classes.
        ``"dirichlet"``: of each class, client u gets the share p_u, p ~ Dir(beta), the same p for
        train and test; a client that holds its n/U train images gets no more classes.
        ``"domain"``: client u is domain u.
        ``"domain-dirichlet"``: every domain is cut in U / domains clients like ``"dirichlet"``,
        all clients of domain 0 first.
    train_labels, test_labels : sequence of int, shape (n,)
        Labels in [0, classes).
    train_domains, test_domains : sequence of int, shape (n,)
        Domains counted from 0; only the two domain kinds look at them.
    classes, clients : int
        C and U, both positive.
    seed : int, not negative
        Of every draw but the class deal.
    beta : float > 0
        Concentration of the Dirichlet kinds; smaller is more uneven.
    min_size : int > 0, optional
        Smallest train and test list of a client of the Dirichlet kinds (before ``shots``); draws
        that miss it are repeated. The default is 10, and 2 for ``"domain-dirichlet"``.
    shots : int > 0, optional
        Keep at most so many train images per client and class; None keeps all. Test lists stay.
    deal_seed : int or None
        Seed of the pathological class deal and of its few shots. The default gives the published
        deal, the same classes and images for every ``seed``; None takes ``seed``.

    Returns
    -------
    shards : list of Shard
        One per client; no image is in two shards.

    Raises
    ------
    InputError
        If a value is refused or a client would stay empty; the message names a cure.
    KindError
        If labels or domains are not integers.

    Notes
    -----
    Deterministic: yes; the global generators of `random` and `numpy` are neither read nor moved.
    Source: pFedMoAP's released pathological split (methods of McMahan et al. 2017, arXiv
    1602.05629); Dirichlet with a cap as in NIID-Bench (Li et al. 2022, arXiv 2102.02079), test
    lists with the train proportions as in FedOTP and FedPGP.
    """
    if kind not in KINDS:
        raise _refuse(f"kind must be a kind of split; got {kind!r}" + near(kind, KINDS))
    for name, value, low in (("classes", classes, 1), ("clients", clients, 1), ("seed", seed, 0)):
        _check_count(name, value, low)
    for name, option in (("min_size", min_size), ("shots", shots)):
        if option is not None:
            _check_count(name, option, 1)
    if deal_seed is not None:
        _check_count("deal_seed", deal_seed, 0)
    if not (beta > 0 and math.isfinite(beta)):
        raise _refuse(f"beta must be positive and finite; got {beta!r}")
    train_y = _check_labels("train_labels", train_labels, classes)
    test_y = _check_labels("test_labels", test_labels, classes)
    train_d = _check_labels("train_domains", train_domains, None)
    test_d = _check_labels("test_domains", test_domains, None)
    for name, y, y_domains in (("train", train_y, train_d), ("test", test_y, test_d)):
        if len(y) != len(y_domains):
            raise _refuse(
                f"{name}_domains must be as long as {name}_labels; got {len(y_domains)} with "
                f"{len(y)}"
            )
        if clients > len(y):
            raise _refuse(
                f"clients must be at most the number of {name} images; got {clients} with "
                f"{len(y)} images: use at most {len(y)}"
                if len(y)
                else f"{name}_labels must hold an image; got none"
            )

    if kind == "pathological":
        return _pathological(
            train_y, test_y, classes, clients, shots, seed if deal_seed is None else deal_seed
        )
    cutting, sampling = np.random.SeedSequence(seed).spawn(2)
    floor = _MIN_SIZE.get(kind, 1) if min_size is None else min_size
    if kind == "iid":
        shards = _iid(len(train_y), len(test_y), clients, np.random.default_rng(cutting))
    elif kind == "dirichlet":
        shards = _dirichlet(train_y, test_y, classes, clients, beta, floor, cutting, "")
    else:
        domains = 1 + int(max(train_d.max(), test_d.max()))
        whole = [
            Shard(np.flatnonzero(train_d == d), np.flatnonzero(test_d == d)) for d in range(domains)
        ]
        _check_domains(whole)
        if kind == "domain":
            if clients != domains:
                raise _refuse(
                    f"clients must equal the number of domains; got {clients} with {domains} "
                    f"domains: use {domains}"
                )
            shards = whole
        else:
            if clients % domains:
                raise _refuse(
                    f"clients must be a multiple of the number of domains; got {clients} with "
                    f"{domains} domains: use {_multiples(clients, domains)}"
                )
            shards = []
            for d, (mine, source) in enumerate(zip(whole, cutting.spawn(domains), strict=True)):
                cut = _dirichlet(
                    train_y[mine.train],
                    test_y[mine.test],
                    classes,
                    clients // domains,
                    beta,
                    floor,
                    source,
                    f" of domain {d}",
                )
                shards += [Shard(mine.train[s.train], mine.test[s.test]) for s in cut]
    if shots is not None:
        sources = sampling.spawn(clients)
        shards = [
            Shard(_few(s.train, train_y, shots, np.random.default_rng(source)), s.test)
            for s, source in zip(shards, sources, strict=True)
        ]
    return shards


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


def _refuse(rest: str) -> InputError:
    return InputError(f"fastfpl.data.partition: {rest}")


def _check_count(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise KindError(
            f"fastfpl.data.partition: {name} must be an integer; got {type(value).__name__}"
        )
    if value < low:
        raise _refuse(f"{name} must be at least {low}; got {value}")


def _check_labels(name: str, values: Sequence[int] | Indices, bound: int | None) -> Indices:
    array = np.asarray(values)
    if array.ndim != 1:
        raise _refuse(f"{name} must have shape (n,); got {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise KindError(f"fastfpl.data.partition: {name} must be integers; got {array.dtype}")
    if array.size and (array.min() < 0 or (bound is not None and array.max() >= bound)):
        rule = "not be negative" if bound is None else f"lie in [0, {bound})"
        raise _refuse(f"{name} must {rule}; got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _check_domains(whole: list[Shard]) -> None:
    for d, mine in enumerate(whole):
        for name, items in (("train", mine.train), ("test", mine.test)):
            if not len(items):
                raise _refuse(
                    f"{name}_domains must name every domain from 0 to {len(whole) - 1}; got no "
                    f"{name} image of domain {d}: count the domains from 0 without a gap"
                )


def _multiples(clients: int, domains: int) -> str:
    below = clients - clients % domains
    return f"{below} or {below + domains}" if below else f"{domains}"


def _iid(train: int, test: int, clients: int, rng: np.random.Generator) -> list[Shard]:
    parts = [np.array_split(rng.permutation(size), clients) for size in (train, test)]
    return [Shard(np.sort(a), np.sort(b)) for a, b in zip(*parts, strict=True)]


def _empty_clients(classes: int, clients: int) -> int:
    """Count the clients that the pathological deal leaves without a class."""
    per = round(classes / clients)
    # the last client starts at (clients - 1) · per, all before it hold per classes or none
    inner = clients - 1 if per == 0 else max(0, clients - 1 - math.ceil(classes / per))
    return inner + ((clients - 1) * per >= classes)


def _pathological(
    train_y: Indices,
    test_y: Indices,
    classes: int,
    clients: int,
    shots: int | None,
    deal_seed: int,
) -> list[Shard]:
    empty = _empty_clients(classes, clients)
    if empty:
        good = [n for n in range(1, classes + 1) if not _empty_clients(classes, n)]
        below = [str(n) for n in good if n < clients][-1:]
        above = [str(n) for n in good if n > clients][:1]
        raise _refuse(
            f"clients must leave every client a class; got {clients} with {classes} classes: "
            f"{empty} client{'s' * (empty > 1)} would be empty; use {' or '.join(below + above)}"
        )
    per = round(classes / clients)
    # one stream deals the classes and then draws the shots, as in the released code
    stream = random.Random(int(deal_seed))
    deal = list(range(classes))
    stream.shuffle(deal)
    train_items, test_items = _by_label(train_y), _by_label(test_y)
    shards = []
    for client in range(clients):
        end = classes if client == clients - 1 else (client + 1) * per
        mine = set(deal[client * per : end])
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
                raise _refuse(
                    f"{name}_labels must hold an image of every client's classes; got none for "
                    f"client {client} with classes {sorted(mine)}: use fewer clients or drop the "
                    "classes without images"
                )
        shards.append(Shard(*(np.asarray(chosen, dtype=np.int64) for chosen in lists)))
    return shards


def _by_label(labels: Indices) -> dict[int, list[int]]:
    """Group positions by label, labels in the order of their first appearance."""
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(position)
    return groups


def _dirichlet(
    train_y: Indices,
    test_y: Indices,
    classes: int,
    clients: int,
    beta: float,
    min_size: int,
    source: np.random.SeedSequence,
    where: str,
) -> list[Shard]:
    for name, size in (("train", len(train_y)), ("test", len(test_y))):
        if clients * min_size > size:
            raise _refuse(
                f"clients{where} must be few enough for min_size = {min_size}; got {clients} with "
                f"{size} {name} images: use at most {size // min_size} clients or min_size at most "
                f"{size // clients}"
            )
    rng = np.random.default_rng(source)
    train_items = [np.flatnonzero(train_y == label) for label in range(classes)]
    test_items = [np.flatnonzero(test_y == label) for label in range(classes)]
    for _ in range(_ATTEMPTS):
        parts = _draw_dirichlet(train_items, test_items, clients, beta, rng)
        shards = [Shard(np.sort(np.concatenate(a)), np.sort(np.concatenate(b))) for a, b in parts]
        if all(min(len(s.train), len(s.test)) >= min_size for s in shards):
            return shards
    raise _refuse(
        f"beta and clients{where} must leave every client {min_size} train and test images; got "
        f"beta={beta:g}, clients={clients} with {len(train_y)} train and {len(test_y)} test images "
        f"and no such cut in {_ATTEMPTS} draws: raise beta, or lower clients or min_size"
    )


def _draw_dirichlet(
    train_items: list[Indices],
    test_items: list[Indices],
    clients: int,
    beta: float,
    rng: np.random.Generator,
) -> list[tuple[list[Indices], list[Indices]]]:
    """Cut every class once; returns per client the pieces of train and of test."""
    parts: list[tuple[list[Indices], list[Indices]]] = [([], []) for _ in range(clients)]
    held = np.zeros(clients, dtype=np.int64)
    full = sum(len(items) for items in train_items) / clients
    for train, test in zip(train_items, test_items, strict=True):
        share = rng.dirichlet(np.full(clients, beta))
        room = held < full
        if room.any():
            # a small beta may put the whole share on clients without room
            share = np.where(room, share, 0.0) if share[room].sum() > 0 else room.astype(float)
        # dividing by the last sum makes it exactly 1: a share of 0 at the end stays empty
        cumulative = np.cumsum(share)
        cumulative /= cumulative[-1]
        for side, items in enumerate((train, test)):
            cuts = (cumulative * len(items)).astype(np.int64)[:-1]
            for client, piece in enumerate(np.split(rng.permutation(items), cuts)):
                parts[client][side].append(piece)
                held[client] += len(piece) * (side == 0)
    return parts


def _few(train: Indices, labels: Indices, shots: int, rng: np.random.Generator) -> Indices:
    mine = labels[train]
    kept = [rng.permutation(train[mine == label])[:shots] for label in np.unique(mine)]
    return np.sort(np.concatenate(kept))
