"""What each client answers with, and what of a task a checkpoint must hold to say so again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastfpl.methods import Method, State, Task

__all__ = ["answers_with", "task_of"]


def answers_with(
    method: Method,
    server: State,
    clients: Mapping[int, Mapping[str, Tensor]],
    downloads: Mapping[int, State],
    client: int,
    round_: int,
) -> tuple[State, State]:
    """Return what a client is evaluated with after so many rounds: (download, own).

    Its model is ``method.start(download, own, training=False)``, stacked. A global model serves
    everybody; a client of ``downloads`` answers with what it had downloaded when it last trained.
    """
    if not method.personal:
        return method.download(server, 0, round_), {}
    down = downloads.get(client)
    if down is None:
        down = method.download(server, client, round_)
    return down, dict(clients.get(client, {}))


def task_of(task: Task) -> dict[str, Any]:
    """Say what of a task a checkpoint must hold beside the settings."""
    domains = task.client_domains
    return {
        "classes": list(task.classes.names),
        "domains": list(task.domains),
        "client_domains": None if domains is None else list(domains),
        "clients": task.clients,
    }
