"""Image features on a device: brought there batch by batch, or kept there where they are reused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.features.file import Features

__all__ = ["DeviceFeatures", "DeviceRoom", "gathered", "moved"]

Indices = npt.NDArray[np.int64]

_PIECE = 1 << 26  # bytes on their way to a device at a time
# of what is free on a device, for features, unless settings say otherwise: steps need the rest
_SHARE = 4


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for the device."""
    ready = tensor.pin_memory() if device.type == "cuda" else tensor
    return ready.to(device, non_blocking=True)


class DeviceFeatures:
    """Views of features that stay on a device: a batch is gathered there, not on the host.

    Parameters
    ----------
    views : sequence of Features
        V of them, each with n rows of one shape; copied as they are stored, 16 bits as 16 bits.
    device : torch.device

    Attributes
    ----------
    rows : Tensor, shape (V n, ...)
        On the device.
    """

    def __init__(self, views: Sequence[Features], device: torch.device) -> None:
        first = views[0]
        self._views, self._each = len(views), len(first)
        shape = (len(views) * len(first), *first.shape[1:])
        self.rows = torch.empty(shape, dtype=first.dtype, device=device)
        count = max(1, _PIECE // max(1, first.nbytes // max(1, len(first))))
        for v, view in enumerate(views):
            for start in range(0, len(view), count):
                at = np.arange(start, min(len(view), start + count))
                place = v * self._each + start
                self.rows[place : place + len(at)] = gathered([view], at, device)

    def __len__(self) -> int:
        return self._views

    def gather(self, at: Indices, which: Indices | None) -> Tensor:
        """Return rows ``at`` of the views ``which``, of the only one if left out."""
        flat = at if which is None else which * self._each + at
        return self.rows.index_select(0, moved(torch.from_numpy(flat), self.rows.device))


class DeviceRoom:
    """Bytes of a device that features may stay in; who asks first has them.

    Parameters
    ----------
    device : torch.device
    wanted : int, optional
        Bytes; a quarter of what is free on a CUDA device if left out. On a CPU nothing is kept:
        files are mapped there, and what is used again is in memory anyway.

    Attributes
    ----------
    left : int
        Bytes.
    """

    def __init__(self, device: torch.device, wanted: int | None = None) -> None:
        self.left = 0
        if device.type == "cuda":
            free: int = torch.cuda.mem_get_info(device)[0]
            self.left = free // _SHARE if wanted is None else wanted
        self._device = device

    def keep(self, views: list[Features]) -> list[Features] | DeviceFeatures:
        """Bring all views to the device if they fit, once; else return what is on disk."""
        size = sum(view.nbytes for view in views)
        if not 0 < size <= self.left:
            return views
        self.left -= size
        return DeviceFeatures(views, self._device)


def gathered(
    views: Sequence[Features] | DeviceFeatures,
    at: Indices,
    device: torch.device,
    which: Indices | None = None,
) -> Tensor:
    """Gather rows onto a device: (m, ...), new memory, in the dtype that is stored.

    Parameters
    ----------
    views : sequence of Features, or DeviceFeatures
    at : ndarray, shape (m,), int64
        Rows.
    device : torch.device
    which : ndarray, shape (m,), int64, optional
        The view of each row; the only one if left out. Nothing of the others is read.
    """
    if isinstance(views, DeviceFeatures):
        return views.gather(at, which)
    first = views[0]
    # memory that the card reads by itself, which torch keeps for the next batch
    host = torch.empty(
        (len(at), *first.shape[1:]), dtype=first.dtype, pin_memory=device.type == "cuda"
    )
    if which is None:
        first.read(at, host)
    else:
        for v in sorted(set(which.tolist())):
            mine = np.flatnonzero(which == v)
            host[torch.from_numpy(mine)] = views[v][at[mine]]
    return host.to(device, non_blocking=True)
