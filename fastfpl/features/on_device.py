"""Image features on a device: brought there batch by batch, or kept there where they are reused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfpl.features.file import Features

__all__ = ["DeviceFeatures", "DeviceRoom", "gathered", "moved"]

_PIECE = 1 << 26  # bytes on their way to a device at a time
# of what is free on a device, for features, unless settings say otherwise: steps need the rest
_SHARE = 4


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for the device."""
    ready = tensor.pin_memory() if device.type == "cuda" else tensor
    return ready.to(device, non_blocking=True)


class DeviceFeatures:
    """Rows of features that stay on a device: a batch is gathered there, not on the host.

    Parameters
    ----------
    features : Features
        n rows, copied as they are stored, 16 bits as 16 bits.
    device : torch.device

    Attributes
    ----------
    rows : Tensor, shape (n, ...)
        On the device.
    """

    def __init__(self, features: Features, device: torch.device) -> None:
        self.rows = torch.empty(features.shape, dtype=features.dtype, device=device)
        self.dtype, self.shape = features.dtype, features.shape
        count = max(1, _PIECE // max(1, features.nbytes // max(1, len(features))))
        for start in range(0, len(features), count):
            at = np.arange(start, min(len(features), start + count))
            self.rows[start : start + count] = gathered(features, at, device)


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

    def keep(self, features: Features) -> Features | DeviceFeatures:
        """Bring all rows to the device if they fit, once; else return what is on disk."""
        if not 0 < features.nbytes <= self.left:
            return features
        self.left -= features.nbytes
        return DeviceFeatures(features, self._device)


def gathered(
    features: Features | DeviceFeatures, at: npt.NDArray[np.int64], device: torch.device
) -> Tensor:
    """Gather rows ``at`` (m,), onto a device: (m, ...), new memory, in the dtype that is stored."""
    if isinstance(features, DeviceFeatures):
        return features.rows.index_select(0, moved(torch.from_numpy(at), device))
    if device.type != "cuda":
        return features[at].to(device)
    # straight into memory that the card reads by itself: torch keeps it for the next batch
    host = torch.empty((len(at), *features.shape[1:]), dtype=features.dtype, pin_memory=True)
    return features.read(at, host).to(device, non_blocking=True)
