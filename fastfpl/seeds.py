"""Every random draw is a function of the run's seed and of what it is drawn for.

No generator is carried from round to round, so a resumed run, another order of clients or another
cohort size draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator", "seed_for"]


def seed_for(seed: int, *purpose: str | int) -> int:
    """Derive an independent seed in [0, 2^63) for a purpose, e.g. ``("order", round, client)``."""
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for a purpose."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))
