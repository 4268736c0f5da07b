"""The orchestrator: `run` plays one experiment, `compare` several side by side."""

from __future__ import annotations

from fastfpl.config import Settings
from fastfpl.federation.comparison import Comparison, compare
from fastfpl.federation.result import Result
from fastfpl.federation.rounds import Federation, run

__all__ = ["Comparison", "Federation", "Result", "Settings", "compare", "run"]
