"""What each client answers with: from the state of a run, or from a run's folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.errors import Damaged, InputError, Missing
from fastfpl.features import TextFeatures
from fastfpl.federation.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint
from fastfpl.methods import Method, State, Task, check_options, find_method
from fastfpl.released import as_released
from fastfpl.training.preparation import make_task

__all__ = ["Models", "answers_with", "load_models", "task_of"]


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


@dataclass(frozen=True)
class Models:
    """The models of a run's clients after its last round, as its folder holds them.

    Attributes
    ----------
    settings : Settings
        As the run had them, options included.
    checkpoint : Checkpoint
    """

    settings: Settings
    checkpoint: Checkpoint

    @property
    def clients(self) -> int:
        """Number of clients N."""
        number: int = self.checkpoint.task["clients"]
        return number

    @property
    def classnames(self) -> tuple[str, ...]:
        """The classes that were trained on."""
        return tuple(self.checkpoint.task["classes"])

    def method(self, clip: FrozenCLIP) -> Method:
        """Return the run's method over the CLIP that it was trained with.

        Raises
        ------
        InputError
            If the weights are others.
        """
        wanted = self.checkpoint.facts.get("weights")
        if clip.weights_digest != wanted:
            raise InputError(
                f"fastfpl.load_models: clip must be the run's, of weights {wanted}; got "
                f"{clip.name!r} of weights {clip.weights_digest}"
            )
        task, s = self.checkpoint.task, self.settings
        domains = task["client_domains"]
        kind = as_released(find_method(s.method), s.as_released)
        return kind(
            make_task(
                s,
                clip,
                self.classnames,
                tuple(task["domains"]),
                None if domains is None else tuple(domains),
                self.clients,
                TextFeatures(),
            ),
            check_options(s.method, s.options),
        )

    def states(self, method: Method, client: int) -> tuple[State, State]:
        """Return what a client answers with: (download, own), see `answers_with`.

        Of a method that fine-tunes before an evaluation, what the last round's evaluation saw.
        """
        if not 0 <= client < self.clients:
            raise InputError(
                f"fastfpl.load_models: client must be one of the {self.clients}; got {client}"
            )
        kept = self.checkpoint
        if kept.facts.get("engine") == "flower" and kept.facts.get("private"):
            raise InputError(
                f"fastfpl.load_models: the run must keep its clients' states in its folder; got "
                f"one on Flower, where what clients of {method.name} keep stays with them; ask "
                "there, or use a method with one model for all"
            )
        down, own = answers_with(
            method, kept.server, kept.clients, kept.downloads, client, len(kept.rounds)
        )
        if method.tune_epochs:
            if client not in kept.tuned:
                raise InputError(
                    f"fastfpl.load_models: the last round must have been evaluated for "
                    f"{method.name}; got round {len(kept.rounds) - 1} without; go on by resume"
                )
            own = kept.tuned[client]
        return down, own


def load_models(folder: str | Path, device: torch.device | str = "cpu") -> Models:
    """Read what the clients of a run answer with from its folder alone.

    Parameters
    ----------
    folder : path
        The ``out`` of `fastfpl.run`, of a run that is finished or has played a round.
    device : torch.device

    Raises
    ------
    Missing
        If there is no checkpoint.
    Damaged
        If a file is truncated, changed, or of another version of the format.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / CHECKPOINT):
        raise Missing(
            f"fastfpl.load_models: folder must hold a run; got {folder} without {CHECKPOINT}"
        )
    found = read_checkpoint(folder, device)
    try:
        settings = Settings.model_validate_json(json.dumps(found.settings))
        check_options(settings.method, settings.options)
    except (ValidationError, InputError, ValueError) as error:
        raise Damaged(
            f"fastfpl.load_models: {folder / CHECKPOINT} must hold a run's settings; got {error}"
        ) from None
    return Models(settings, found)


def task_of(task: Task) -> dict[str, Any]:
    """Say what of a task a checkpoint must hold beside the settings."""
    domains = task.client_domains
    return {
        "classes": list(task.classes.names),
        "domains": list(task.domains),
        "client_domains": None if domains is None else list(domains),
        "clients": task.clients,
    }
