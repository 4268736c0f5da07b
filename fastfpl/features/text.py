"""Text features in memory, under keys that say whose they are and of which version."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fastfpl.errors import Damaged, InputError, KindError

__all__ = ["TextFeatures", "TextKey"]

TextKey = tuple[Hashable, Hashable]


class TextFeatures:
    """Text features in memory under explicit keys ``(owner, version)``.

    The cache never looks whether a context has changed: whoever changes one must count its version
    up. Nothing on a tensor tells of a change reliably, since fused optimisers and writes through
    ``.data`` leave its version counter alone.

    Parameters
    ----------
    max_bytes : int
        Features kept at most; the least recently used go first. A single result above it is
        returned but not kept.
    verify : bool
        Compare a hash of the context at every look-up and raise `Damaged` if a key was used for a
        changed tensor. For debugging: it needs every context every time.

    Notes
    -----
    The features are constants: they are encoded without a graph and returned as new tensors, so
    what a caller does to them does not reach the cache. Not for several threads at once.
    """

    #: Bytes that are kept at most unless the cache is told otherwise.
    MOST = 1 << 28

    def __init__(self, max_bytes: int = MOST, *, verify: bool = False) -> None:
        if max_bytes < 0:
            raise InputError(
                f"fastfpl.features.TextFeatures: max_bytes must not be negative; got {max_bytes}"
            )
        self._max_bytes = max_bytes
        self._verify = verify
        self._kept: OrderedDict[TextKey, tuple[Tensor, str]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    @property
    def max_bytes(self) -> int:
        """Bytes that are kept at most."""
        return self._max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all kept features."""
        return self._bytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._bytes = 0

    def get_or_encode(
        self,
        keys: Sequence[TextKey],
        ctx_of: Callable[[TextKey], Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the features of all keys, encoding the missing ones in one call.

        Parameters
        ----------
        keys : sequence of (owner, version)
            One or more; a key may repeat.
        ctx_of : callable
            ``ctx_of(key)`` returns the context, e.g. of shape (T, W); all of one shape.
        encode : callable
            ``encode(ctx)`` maps (m, T, W) to features (m, C, D), row by row; called at most once.

        Returns
        -------
        features : Tensor, shape (len(keys), C, D)
            A new tensor without a graph.

        Raises
        ------
        InputError, KindError
            If keys, contexts or what ``encode`` returned are refused.
        Damaged
            With ``verify``, if a key was used before for another context.
        """
        if not keys:
            raise InputError(
                "fastfpl.features.TextFeatures: keys must name at least one context; got none"
            )
        for key in keys:
            if not isinstance(key, tuple) or len(key) != 2:
                raise KindError(
                    f"fastfpl.features.TextFeatures: key must be (owner, version); got {key!r}"
                )
        here: dict[TextKey, Tensor] = {}
        contexts: dict[TextKey, Tensor] = {}
        marks: dict[TextKey, str] = {}
        for key in dict.fromkeys(keys):
            entry = self._kept.get(key)
            if entry is None or self._verify:
                contexts[key] = ctx_of(key)
            if self._verify:
                marks[key] = _mark(contexts[key])
                if entry is not None and entry[1] != marks[key]:
                    raise Damaged(
                        "fastfpl.features.TextFeatures: key must get a new version when its "
                        f"context changes; got {key!r} for a changed context"
                    )
            if entry is not None:
                self._kept.move_to_end(key)
                here[key] = entry[0]
        missing = [key for key in contexts if key not in here]
        if missing:
            encoded = self._encode(missing, contexts, encode)
            for key, row in zip(missing, encoded, strict=True):
                here[key] = row
            for key in missing:
                self._keep(key, here[key], marks.get(key, ""))
        with torch.no_grad():
            return torch.stack([here[key] for key in keys])

    def _encode(
        self,
        missing: list[TextKey],
        contexts: dict[TextKey, Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> Tensor:
        shapes = {tuple(contexts[key].shape) for key in missing}
        if len(shapes) > 1:
            raise InputError(
                "fastfpl.features.TextFeatures: contexts must have one shape; got "
                + " and ".join(str(shape) for shape in sorted(shapes))
            )
        with torch.no_grad():
            encoded = encode(torch.stack([contexts[key] for key in missing]))
        if encoded.ndim == 0 or encoded.shape[0] != len(missing):
            raise InputError(
                f"fastfpl.features.TextFeatures: encode must return {len(missing)} rows; got shape "
                f"{tuple(encoded.shape)}"
            )
        return encoded

    def _keep(self, key: TextKey, row: Tensor, mark: str) -> None:
        size = row.numel() * row.element_size()
        if size > self._max_bytes:
            return
        # a copy: a row of the batch would keep the whole batch alive and follow its changes
        self._kept[key] = (row.detach().clone(), mark)
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (old, _) = self._kept.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()


def _mark(ctx: Tensor) -> str:
    kept = ctx.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{kept.dtype} {tuple(kept.shape)}".encode(), digest_size=16)
    digest.update(kept.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
