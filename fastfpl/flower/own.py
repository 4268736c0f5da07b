"""Clients whose images are their own: the server has none, and each is told where its own lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.data import Dataset, load_dataset, scheme_of
from fastfpl.data.partitions import held_alone
from fastfpl.errors import InputError, shown
from fastfpl.federation.preparation import OWN, Plan, settled
from fastfpl.federation.scenarios import personal
from fastfpl.flower.identity import digest_of
from fastfpl.released import changes_data
from fastfpl.training.preparation import choose_device

__all__ = ["agree_on_classes", "check_own", "own_dataset", "own_plan"]


def check_own(settings: Settings) -> None:
    """Refuse settings of which a client that knows its own images alone can make nothing."""
    if settings.dataset != OWN:
        return
    for name, wanted in (
        ("partition", "given"),
        ("scenario", "personal"),
        ("statistics", "clip"),
        ("root", None),
        ("columns", None),
    ):
        got = getattr(settings, name)
        if got != wanted:
            rule = "left out" if wanted is None else repr(wanted)
            raise InputError(
                f"fastfpl.flower: {name} must be {rule} with dataset='own', where every client "
                f"knows its own images alone; got {got!r}"
            )
    if changes_data(settings.as_released):
        raise InputError(
            "fastfpl.flower: as_released must leave out quirks that change the data with "
            f"dataset='own'; got {', '.join(settings.as_released)}"
        )


def own_dataset(settings: Settings, data: str, root: str | None = None) -> Dataset:
    """Load a client's own images.

    Parameters
    ----------
    settings : Settings
        Of the run.
    data : str
        ``folder:PATH``, ``manifest:FILE`` or ``hf:PATH``; a path alone is a folder's.
    root : str, optional
        That the paths of a manifest begin in.
    """
    name = data if scheme_of(data) is not None else f"folder:{data}"
    how: dict[str, Any] = {}
    if settings.digest is not None:
        how["digest"] = settings.digest
    if settings.layout is not None:
        how["layout"] = settings.layout
    place = None if root is None else Path(root)
    found = load_dataset(name, place, on_corrupt=settings.on_corrupt, **how)
    return replace(found, name=OWN, clients=())


def own_plan(
    settings: Settings, client: int, dataset: Dataset, model: FrozenCLIP | None = None
) -> Plan:
    """Plan the part of a client that has all images of a data set, and of others none.

    Parameters
    ----------
    settings : Settings
        With the number of clients.
    client : int
    dataset : Dataset
    model : FrozenCLIP, optional

    Raises
    ------
    InputError
    """
    settings, kind, options = settled(settings, model)
    check_own(settings)
    clients = settings.clients
    if clients is None:
        raise InputError(
            "fastfpl.flower: clients must be said with dataset='own'; got none: --clients N"
        )
    if not 0 <= client < clients:
        raise InputError(
            f"fastfpl.flower: client must be one of {clients}, 0 to {clients - 1}; got {client}"
        )
    seed = settings.seed if settings.partition_seed is None else settings.partition_seed
    shards = held_alone(
        dataset.train.labels,
        len(dataset.test),
        client=client,
        clients=clients,
        shots=settings.shots,
        seed=seed,
    )
    scenario = personal(dataset, shards)
    if settings.transductive:
        scenario = scenario.transductive()
    return Plan(settings, kind, options, choose_device(settings.device), dataset, scenario)


def agree_on_classes(sets: Mapping[str, Dataset]) -> None:
    """Refuse clients' images whose classes differ, with the digests that they would join by."""
    first, *others = sets
    wanted = list(sets[first].classnames)
    for name in others:
        mine = list(sets[name].classnames)
        if mine != wanted:
            away = sorted(set(wanted) ^ set(mine))
            raise InputError(
                f"fastfpl.flower: the list of classes must be the same at all clients; got "
                f"{digest_of(mine)} at {name}, {digest_of(wanted)} at {first}, which differ in "
                f"{shown(', '.join(away))}"
            )
