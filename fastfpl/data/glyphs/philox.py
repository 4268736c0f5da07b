"""What an image draws: numbers of its own, by its split's name and its index alone."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from fastfpl.data.glyphs.names import GLYPHS_VERSION, SIDE, Array

__all__ = ["PIXELS", "SLOTS", "WORDS", "shares_of", "words_of"]

SLOTS = (
    *("variant", "mirror", "size", "left", "top", "turn", "aspect", "width"),
    *("hue", "hue_accent", "hue_ground", "tone", "red", "green", "blue", "light"),
    *("phase0", "phase1", "phase2", "phase3", "sway", "blot", "blot_angle", "blot_size"),
    *("grain0", "grain1", "grain2", "grain3", "grain_angle", "layout", "contrast", "dark"),
    *("cover", "cover_angle", "cover_depth", "trouble"),
    *(f"clutter{k}" for k in range(28)),
)
WORDS = len(SLOTS) // 4  # sixteen bits are enough for one choice
PIXELS = SIDE * SIDE


def words_of(split: str, indices: npt.NDArray[np.int64], words: int) -> npt.NDArray[np.uint64]:
    """Take the first words of each image's own Philox stream, one row per image."""
    key = _stream_key(split)
    rows = np.empty((len(indices), words), np.uint64)
    for row, index in zip(rows, indices, strict=True):
        # the low words of the counter move while drawing, so the index stands above them
        row[:] = np.random.Philox(key=key, counter=[0, 0, index, 0]).random_raw(words)
    return rows


@functools.lru_cache(maxsize=16)
def _stream_key(split: str) -> npt.NDArray[np.uint64]:
    entropy = list(f"{GLYPHS_VERSION} {split}".encode())
    return np.random.SeedSequence(entropy).generate_state(2, np.uint64).astype(np.uint64)


def shares_of(words: npt.NDArray[np.uint64]) -> Array:
    """Turn every sixteen bits into a number in (0, 1)."""
    halves = np.ascontiguousarray(words, "<u8").view("<u2").astype(np.float32)
    shares: Array = (halves + np.float32(0.5)) / np.float32(65536)
    return shares
