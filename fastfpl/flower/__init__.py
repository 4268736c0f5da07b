"""Real federations: the same methods over Flower (``flwr``), which only this room imports.

A server drives `fastfpl.federation.server.Round`, a client `fastfpl.training.Trainer`; what travels
between them are letters, whatever carries these. `apps` makes Flower's ClientApp and ServerApp.
"""

from __future__ import annotations

from fastfpl.flower.apps import client_app, server_app

__all__ = ["client_app", "server_app"]
