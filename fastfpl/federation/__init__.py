"""The orchestrator: `run` plays one experiment, `compare` several, `sweep` at several settings."""

from __future__ import annotations

from fastfpl.config import Settings
from fastfpl.federation.comparison import Comparison, Sweep, compare, sweep
from fastfpl.federation.experiment import run
from fastfpl.federation.result import Result
from fastfpl.federation.rounds import Federation

__all__ = ["Comparison", "Federation", "Result", "Settings", "Sweep", "compare", "run", "sweep"]
