"""Who is told of a run while it goes on: JSON lines, trackers of other projects, one's own."""

from __future__ import annotations

from fastfpl.tracking.bars import Progress, progress
from fastfpl.tracking.callback import Callback, RunInfo, metrics_of
from fastfpl.tracking.lines import METRICS
from fastfpl.tracking.trackers import TRACKERS, MLflow, TensorBoard, Tracker, WandB, make_trackers

__all__ = [
    "METRICS",
    "TRACKERS",
    "Callback",
    "MLflow",
    "Progress",
    "RunInfo",
    "TensorBoard",
    "Tracker",
    "WandB",
    "make_trackers",
    "metrics_of",
    "progress",
]
