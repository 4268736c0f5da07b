"""A data set of fewer classes or domains, as a view of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fastfpl.data.base import Dataset, Images, Split
from fastfpl.errors import InputError, near

__all__ = ["ClassSubset", "DomainSubset", "Joined", "restrict", "split_domain"]


class _View(Split):
    """Some images of another split; subclasses say which, and what they are called."""

    indices: npt.NDArray[np.int64]
    _split: Split

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`."""
        return self._split.images(self.indices[np.asarray(indices, dtype=np.int64)])

    def _sign(self, kind: str, kept: npt.NDArray[np.int64]) -> str:
        digest = hashlib.blake2b(self._split.fingerprint.encode(), digest_size=16)
        digest.update(kept.tobytes())
        return f"{kind}-{digest.hexdigest()}"


class ClassSubset(_View):
    """The images of some classes of a split, relabelled from 0 in the order of the old labels.

    Parameters
    ----------
    split : Split
        Where the images come from; nothing is copied but labels and domains.
    labels : sequence of int
        Distinct old labels; their order does not matter.

    Attributes
    ----------
    indices : ndarray, shape (n,), int64
        Position of each image in ``split``.
    """

    def __init__(self, split: Split, labels: Sequence[int] | npt.NDArray[np.int64]) -> None:
        kept = np.unique(np.asarray(labels, dtype=np.int64))
        if len(kept) == 0 or len(kept) != len(labels):
            raise InputError(
                "fastfpl.data.ClassSubset: labels must be distinct and at least one; got "
                f"{[int(label) for label in labels]}"
            )
        self._split = split
        self.indices = np.flatnonzero(np.isin(split.labels, kept)).astype(np.int64)
        self.labels = np.searchsorted(kept, split.labels[self.indices]).astype(np.int64)
        self.domains = split.domains[self.indices]
        self.clients = None if split.clients is None else split.clients[self.indices]
        self.fingerprint = self._sign("subset", kept)


class DomainSubset(_View):
    """The images of some domains of a split, the domains renumbered from 0 in the old order.

    Parameters
    ----------
    split : Split
    domains : sequence of int
        Distinct old domains; their order does not matter.

    Attributes
    ----------
    indices : ndarray, shape (n,), int64
        Position of each image in ``split``.
    """

    def __init__(self, split: Split, domains: Sequence[int]) -> None:
        kept = np.unique(np.asarray(domains, dtype=np.int64))
        self._split = split
        self.indices = np.flatnonzero(np.isin(split.domains, kept)).astype(np.int64)
        self.labels = split.labels[self.indices]
        self.domains = np.searchsorted(kept, split.domains[self.indices]).astype(np.int64)
        self.clients = None if split.clients is None else split.clients[self.indices]
        self.fingerprint = self._sign("domains", kept)


class Joined(Split):
    """Two splits, one behind the other."""

    def __init__(self, first: Split, second: Split) -> None:
        self._parts = (first, second)
        self.labels = np.concatenate([first.labels, second.labels])
        self.domains = np.concatenate([first.domains, second.domains])
        if first.clients is not None and second.clients is not None:
            self.clients = np.concatenate([first.clients, second.clients])
        both = f"{first.fingerprint}\n{second.fingerprint}"
        self.fingerprint = f"joined-{hashlib.blake2b(both.encode(), digest_size=16).hexdigest()}"

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images; see `Split.images`."""
        asked = np.asarray(indices, dtype=np.int64)
        border = len(self._parts[0])
        late = asked >= border
        parts = (
            iter(self._parts[0].images(asked[~late])),
            iter(self._parts[1].images(asked[late] - border)),
        )
        return [next(parts[int(second)]) for second in late]


def restrict(dataset: Dataset, labels: Sequence[int] | npt.NDArray[np.int64]) -> Dataset:
    """Keep only some classes of a data set, e.g. one half of `base_novel`.

    Parameters
    ----------
    dataset : Dataset
    labels : sequence of int
        Distinct labels in [0, C).

    Returns
    -------
    dataset : Dataset
        The same name and domains; class names and labels count from 0 in the old order.

    Raises
    ------
    InputError
        If labels repeat, are empty, or lie outside [0, C).
    """
    classes = len(dataset.classnames)
    outside = [int(label) for label in labels if not 0 <= label < classes]
    if outside:
        raise InputError(f"fastfpl.data.restrict: labels must lie in [0, {classes}); got {outside}")
    return replace(
        dataset,
        classnames=tuple(dataset.classnames[label] for label in sorted(int(x) for x in labels)),
        train=ClassSubset(dataset.train, labels),
        test=ClassSubset(dataset.test, labels),
    )


def split_domain(dataset: Dataset, target: str) -> tuple[Dataset, Split]:
    """Take one domain out of a data set: the others to learn from, all of its images to test on.

    Parameters
    ----------
    dataset : Dataset
    target : str
        Name of the domain.

    Returns
    -------
    sources : Dataset
        The same classes in the other domains.
    images : Split
        Training and test images of the target, in this order.

    Raises
    ------
    InputError
        If there is no such domain, or no other one.
    """
    if target not in dataset.domains or len(dataset.domains) < 2:
        raise InputError(
            f"fastfpl.data.split_domain: target must be one of several domains of {dataset.name}: "
            f"{', '.join(dataset.domains)}; got {target!r}" + near(target, dataset.domains)
        )
    out = dataset.domains.index(target)
    rest = [d for d in range(len(dataset.domains)) if d != out]
    sources = replace(
        dataset,
        domains=tuple(dataset.domains[d] for d in rest),
        train=DomainSubset(dataset.train, rest),
        test=DomainSubset(dataset.test, rest),
    )
    return sources, Joined(DomainSubset(dataset.train, [out]), DomainSubset(dataset.test, [out]))
