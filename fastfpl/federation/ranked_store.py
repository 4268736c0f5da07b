"""Image features that several ranks encode, each its part of the chunks; rank 0 writes the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.features import FeatureKey, Features, FeatureStore, Whole
from fastfpl.features.file import DTYPES, open_features
from fastfpl.features.store import Build
from fastfpl.federation.ranks import Ranks

__all__ = ["RankedStore"]

_Chunk = npt.NDArray[np.int64]
# first row and end of chunks; None when the file is there
_Spans = list[list[int]] | None
_NONE: _Spans = None


class RankedStore(FeatureStore):
    """A feature store whose chunks are encoded in turn by all ranks.

    The chunks are those of one process, so that the file is the same, byte for byte.

    Parameters
    ----------
    ranks : Ranks
    directory, chunk
        As `FeatureStore` has them; all ranks share the directory, and take rank 0's chunks.
    """

    def __init__(self, ranks: Ranks, directory: Path | None = None, *, chunk: int = 256) -> None:
        super().__init__(directory, chunk=chunk)
        self._ranks = ranks

    def get(
        self,
        key: FeatureKey,
        n: int,
        build: Build,
        progress: Callable[[int, int], None] | None = None,
        *,
        ahead: Callable[[Iterable[_Chunk]], None] | None = None,
        whole: Whole | None = None,
        also: Sequence[FeatureKey] = (),
    ) -> Features:
        """Open the features of a key, which all ranks encode first if they are not there.

        Raises as `FeatureStore.get` does, and `InputError` on a rank that does not find the file
        that rank 0 has.
        """
        if self._ranks.first:
            return self._lead(key, n, build, progress, ahead, whole, also)
        while (spans := self._ranks.say(_NONE)) is not None:
            of_mine = spans[self._ranks.rank :: self._ranks.size]
            mine = [np.arange(*span, dtype=np.int64) for span in of_mine]
            if ahead is not None:
                ahead(mine)
            for at in mine:
                made = build(at)
                columns = (made,) if isinstance(made, Tensor) else made
                kept = {
                    str(k): rows.detach().to(DTYPES[one.dtype][0])
                    if rows.is_floating_point()
                    else rows
                    for k, (one, rows) in enumerate(zip((key, *also), columns, strict=True))
                }
                self._ranks.give([("chunk", kept)])
        found = open_features(self.directory / key.filename, key, n)
        if found is None and whole is not None:
            larger = open_features(self.directory / whole.key.filename, whole.key, whole.n)
            found = None if larger is None else larger.part(whole.rows)
        if found is None:
            raise InputError(
                "fastfpl.run: cache (--cache) must be a folder that all ranks share; got "
                f"{self.directory}, where rank {self._ranks.rank} does not find what rank 0 has "
                "written"
            )
        return found

    def _lead(
        self,
        key: FeatureKey,
        n: int,
        build: Build,
        progress: Callable[[int, int], None] | None,
        ahead: Callable[[Iterable[_Chunk]], None] | None,
        whole: Whole | None,
        also: Sequence[FeatureKey],
    ) -> Features:
        """Write the file on rank 0, of its own chunks and those that the others send."""
        size = self._ranks.size
        owners: dict[int, int] = {}  # of the chunks that are still to come, by their first row

        def begin(chunks: Iterable[_Chunk]) -> None:
            for owner in owners.values():  # of rows of another shape, which do not count
                if owner:
                    self._received(owner)
            listed = list(chunks)
            owners.clear()
            owners.update({int(at[0]): k % size for k, at in enumerate(listed)})
            self._ranks.say([[int(at[0]), int(at[-1]) + 1] for at in listed])
            if ahead is not None:
                ahead(listed[::size])

        def one(at: _Chunk) -> Tensor | Sequence[Tensor]:
            owner = owners.pop(int(at[0]))
            return self._received(owner) if owner else build(at)

        found = super().get(key, n, one, progress, ahead=begin, whole=whole, also=also)
        self._ranks.say(None)
        return found

    def _received(self, rank: int) -> Sequence[Tensor]:
        (state,) = (state for _, state in self._ranks.take(rank))
        return [state[str(k)] for k in range(len(state))]
