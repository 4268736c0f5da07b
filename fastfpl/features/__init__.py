"""Features that are computed once: image features on disk, text features in memory."""

from __future__ import annotations

from fastfpl.features.file import FeatureKey, Features
from fastfpl.features.on_device import DeviceFeatures, DeviceRoom, gathered, moved
from fastfpl.features.store import FeatureStore, Whole, default_directory
from fastfpl.features.text import TextFeatures, TextKey

__all__ = [
    "DeviceFeatures",
    "DeviceRoom",
    "FeatureKey",
    "FeatureStore",
    "Features",
    "TextFeatures",
    "TextKey",
    "Whole",
    "default_directory",
    "gathered",
    "moved",
]
