"""What a data set is to the rest of the library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastfpl.data.names import alike, both, flaw, shown
from fastfpl.errors import InputError

__all__ = ["Dataset", "Images", "Split", "Statistics"]

Images = Sequence[npt.NDArray[np.uint8]]


class Split(ABC):
    """One labelled list of images.

    Attributes
    ----------
    labels : ndarray, shape (n,), int64
        Row c of every logit matrix is class c of `Dataset.classnames`.
    domains : ndarray, shape (n,), int64
        Index into `Dataset.domains`.
    clients : ndarray, shape (n,), int64, or None
        Index into `Dataset.clients`, -1 for an image of all clients; None where the set names none.
    fingerprint : str
        Changes whenever an image could change; keys the feature store.
    """

    labels: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64]
    clients: npt.NDArray[np.int64] | None = None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Return RGB images, each uint8 of shape (height, width, 3), as a list or one array."""


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, of values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Dataset:
    """A named image classification task.

    Attributes
    ----------
    name : str
    classnames : tuple of str
        C names as a person would write them, no two of which differ only in what CLIP does not see:
        capitals, entities, forms of accents, curls of quotation marks.
    domains : tuple of str
        Names of the visual domains; a single one where the set has none.
    train, test : Split
        Disjoint lists of images.
    statistics : Statistics or None
        Of the set's own pixels, where released codes normalise by them; a CLIP wants its own.
    skipped : int
        Image files that did not decode and were left out of both lists.
    notes : tuple of str
        What a reader of figures on these lists must know, e.g. that a split was drawn here.
    clients : tuple of str
        Names of the clients that the set itself deals its images to; empty where it does not.

    Raises
    ------
    InputError
        If two class names, two domains or two clients are alike, or a name holds a character that
        cannot be seen.
    """

    name: str
    classnames: tuple[str, ...]
    domains: tuple[str, ...]
    train: Split
    test: Split
    statistics: Statistics | None = None
    skipped: int = 0
    notes: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("classnames", "domains", "clients"):
            names: tuple[str, ...] = getattr(self, what)
            for name in names:
                if flaw(name):
                    raise InputError(
                        f"fastfpl.data.Dataset: {what} must be text that can be seen; got "
                        f"{shown(name)} with {flaw(name)}"
                    )
            two = alike(names)
            if two is not None:
                raise InputError(
                    f"fastfpl.data.Dataset: {what} must differ in more than capitals, entities, "
                    f"forms of accents or curls of quotation marks; got "
                    f"{both(names[two[0]], names[two[1]])}"
                )
