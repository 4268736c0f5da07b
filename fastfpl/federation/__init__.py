"""The orchestrator: `run` plays one experiment, `compare` several, `sweep` at settings."""

from __future__ import annotations

from fastfpl.config import Settings
from fastfpl.federation.comparison import Comparison, Sweep, compare, sweep
from fastfpl.federation.encoding import Encoded, encode
from fastfpl.federation.experiment import run
from fastfpl.federation.result import Result
from fastfpl.federation.rounds import Federation

__all__ = [
    "Comparison",
    "Encoded",
    "Federation",
    "Result",
    "Settings",
    "Sweep",
    "compare",
    "encode",
    "run",
    "sweep",
]
