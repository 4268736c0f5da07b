"""What a run has trained, for use: predictions, exports, clients that come later."""

from __future__ import annotations

from fastfpl.trained.adaptation import Adapted, adapt
from fastfpl.trained.exports import FORMATS, export
from fastfpl.trained.models import Model, load
from fastfpl.trained.predictions import Client, Prediction

__all__ = ["FORMATS", "Adapted", "Client", "Model", "Prediction", "adapt", "export", "load"]
