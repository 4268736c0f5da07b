"""Which settings a networked run can have: the others are refused before anything is started."""

from __future__ import annotations

from typing import Any

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.errors import InputError
from fastfpl.federation.merging import privacy_of
from fastfpl.federation.preparation import settled
from fastfpl.flower.own import check_own
from fastfpl.flower.rules import Rules
from fastfpl.flower.secagg import check_secagg
from fastfpl.methods import Method
from fastfpl.released import visits_of

__all__ = ["checked", "expected_clients"]


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
    privacy_of(settings)
    check_secagg(settings, rules)
    return found
