"""A local page and a JSON endpoint over what a run has trained."""

from __future__ import annotations

from fastfpl.serving.answers import Answerer
from fastfpl.serving.server import LOOPBACK, listen, serve

__all__ = ["LOOPBACK", "Answerer", "listen", "serve"]
