"""DomainNet and Office-Caltech10 as released: images with others' labels, classes in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from fastfpl.data import Dataset, Shard, Split
from fastfpl.data.base import Images
from fastfpl.seeds import generator

__all__ = ["NAMES", "SCRAMBLED", "Mispaired", "disturbed"]

#: The two quirks of the data.
SCRAMBLED, NAMES = "domain-scrambled-labels", "domain-set-ordered-names"

Indices = npt.NDArray[np.int64]


class Mispaired(Split):
    """Images of another split under labels that are not theirs.

    Parameters
    ----------
    split : Split
    rows : ndarray, shape (n,), int64
        Which images, in order; some may occur more than once.
    labels : ndarray, shape (n,), int64
        What they are called.
    """

    def __init__(self, split: Split, rows: Indices, labels: Indices) -> None:
        self._split, self._rows = split, rows
        self.labels, self.domains = labels, split.domains[rows]
        self.clients = None if split.clients is None else split.clients[rows]
        digest = hashlib.blake2b(split.fingerprint.encode(), digest_size=16)
        digest.update(rows.tobytes() + labels.tobytes())
        self.fingerprint = f"mispaired-{digest.hexdigest()}"

    def images(self, indices: Sequence[int] | Indices) -> Images:
        """Return RGB images; see `Split.images`."""
        return self._split.images(self._rows[np.asarray(indices, dtype=np.int64)])


def disturbed(
    dataset: Dataset, shards: Sequence[Shard], quirks: Sequence[str], seed: int
) -> tuple[Dataset, list[Shard]]:
    """Return data set and shards as released code has them.

    With `SCRAMBLED` a client of n images of a domain has the domain's first n images, paired with
    the labels of its own ones in a drawn order; train and test lists alike. With `NAMES` the class
    names stand in a drawn order, whatever the labels.
    """
    new = list(shards)
    if SCRAMBLED in quirks:
        train, trained = _mispair(dataset.train, [s.train for s in shards], seed, "train")
        test, tested = _mispair(dataset.test, [s.test for s in shards], seed, "test")
        dataset = replace(dataset, train=train, test=test)
        new = [Shard(*pair) for pair in zip(trained, tested, strict=True)]
    if NAMES in quirks:
        names = dataset.classnames
        order = torch.randperm(len(names), generator=generator(seed, "released", "names"))
        dataset = replace(dataset, classnames=tuple(names[c] for c in order.tolist()))
    return dataset, new


def _mispair(
    split: Split, clients: Sequence[Indices], seed: int, part: str
) -> tuple[Mispaired, list[Indices]]:
    """Give the clients' lists a split of their own, one after another."""
    rows, labels, places = [], [], []
    begin = 0
    for client, mine in enumerate(clients):
        draw = generator(seed, "released", part, client)
        order = torch.randperm(len(mine), generator=draw).numpy()
        domain = np.flatnonzero(split.domains == split.domains[mine[0]])
        rows.append(domain[: len(mine)])
        labels.append(split.labels[mine[order]])
        places.append(np.arange(begin, begin + len(mine), dtype=np.int64))
        begin += len(mine)
    return Mispaired(split, np.concatenate(rows), np.concatenate(labels)), places
