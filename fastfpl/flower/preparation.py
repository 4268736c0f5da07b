"""Which settings a networked run can have: the others are refused before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.features import TextFeatures
from fastfpl.federation.merging import (
    Counts,
    Expected,
    Privacy,
    expected,
    only_mean,
    privacy_of,
)
from fastfpl.federation.preparation import settled
from fastfpl.federation.robust import Robust, robust_of
from fastfpl.federation.sampling import Sampling
from fastfpl.federation.server import Round
from fastfpl.flower.own import check_own
from fastfpl.flower.rules import Rules
from fastfpl.flower.secagg import check_secagg, counts_of
from fastfpl.methods import Method, method_source
from fastfpl.released import as_released, visits_of
from fastfpl.training.preparation import known_device, load_model, make_task
from fastfpl.training.private import image_privacy

__all__ = ["Merging", "checked", "expected_clients", "merging", "rehearsed"]

# of the stand-in of a data set that only clients have
_CLASSES, _DOMAINS = ("one", "two", "three"), ("here",)


@dataclass(frozen=True)
class Merging:
    """What a run's clients send, and what stands between that and the method's own merge.

    Attributes
    ----------
    wanted : Expected
        What a client sends after training.
    privacy : Privacy or None
        What cuts uploads and adds noise.
    robust : Robust or None
        What bears hostile clients.
    counts : "images", "clients" or None
        What the mean counts where uploads are summed under masks; None where they are not.
    """

    wanted: Expected
    privacy: Privacy | None
    robust: Robust | None
    counts: Counts | None


def expected_clients(settings: Settings) -> int:
    """Return how many clients settings name; a server has no data that could tell."""
    if settings.clients is None:
        raise InputError(
            f"fastfpl.flower: clients must be said with partition={settings.partition!r}, since "
            "the server has no data that could tell; got none: --clients N"
        )
    return settings.clients


def checked(
    settings: Settings, rules: Rules, model: FrozenCLIP | None = None
) -> tuple[Settings, type[Method], dict[str, Any]]:
    """Refuse what no networked run can be, before anything is started; see `settled`."""
    found = settled(settings, model)
    settings = found[0]
    check_own(settings)
    expected_clients(settings)
    if settings.scenario == "unseen-clients":
        raise InputError(
            "fastfpl.flower: scenario must not be 'unseen-clients', whose newcomers are adapted on "
            "a copy of the server; play it in one process, by fastfpl run, or let clients join late"
        )
    if settings.evaluate_clients is not None:
        raise InputError(
            "fastfpl.flower: evaluate_clients must be left out, since every client answers for "
            f"itself; got {settings.evaluate_clients}; play it in one process, by fastfpl run"
        )
    if visits_of(settings.as_released, settings.schedule, settings.lr):
        raise InputError(
            "fastfpl.flower: as_released must leave out quirks by which clients inherit from each "
            f"other within a round; got {', '.join(settings.as_released)}; play it in one process, "
            "by fastfpl run"
        )
    if settings.device != "auto":
        known_device(settings.device)
    privacy_of(settings)
    check_secagg(settings, rules)
    return found


def merging(
    settings: Settings, rules: Rules, method: Method, now: Round, sampling: Sampling | None
) -> Merging:
    """Say how a method's uploads are merged, or refuse a merge that it cannot have.

    Parameters
    ----------
    settings : Settings
    rules : Rules
    method : Method
    now : Round
        The first one.
    sampling : Sampling or None
        None where the data set decides how many clients a round calls, and is not there.

    Raises
    ------
    InputError
    """
    down = now.download(method, 0)
    wanted = expected(method, down) if method.trains else Expected({}, ())
    robust, privacy = robust_of(settings), privacy_of(settings)
    if robust is not None:
        called = robust.least if sampling is None else sampling.fewest
        robust.check(method, now.server, down, called)
    if privacy is not None:
        privacy.check(method, now.server, down)
    masked = rules.aggregation == "secagg+"
    counts = counts_of(method, now.server, wanted, sampling) if masked else None
    method.task.text_features.clear()
    return Merging(wanted, privacy, robust, counts)


def rehearsed(settings: Settings, rules: Rules) -> None:
    """Refuse what no networked run can be, also what else shows when its clients have come.

    Whether a merge is a mean is found out by a trial, which hangs on the method and not on weights
    or data: it is made on the embedded CLIP, with a few classes in the place of those that only
    clients know. What the trial cannot be made with (options that are for a text tower of another
    width, methods of the user's own for it or for more classes, a number of clients a round that
    is the data set's) is left to the run.

    Raises
    ------
    FastfplError
    """
    settings, kind, options = checked(settings, rules)
    if rules.aggregation == "plain" and robust_of(settings) is None and settings.dp_noise is None:
        return
    sure = settings.clip == "tiny" and method_source(settings.method) is None
    stand_in = settings.model_copy(
        update={"clip": "tiny", "pretrained": None, "quick_gelu": "auto", "dtype": "float32"}
    )
    clip = load_model(stand_in, torch.device("cpu"))
    clients = expected_clients(settings)
    try:
        task = make_task(settings, clip, _CLASSES, _DOMAINS, None, clients, TextFeatures())
        method = as_released(kind, settings.as_released)(task, options)
        now = Round.first(method)
        down = now.download(method, 0)
        if method.trains:
            only_mean(method, now.server, expected(method, down))
    except Exception:  # what a method's own code says where it meets another tower and classes
        if sure:
            raise
        return
    image_privacy(settings, method)
    drawn = settings.sampling == "uniform"
    sampling = Sampling(settings, clients, None, method.all_first) if drawn else None
    merging(settings, rules, method, now, sampling)
