"""Image features alone, ahead of the runs that need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastfpl.clip import FrozenCLIP
from fastfpl.config import make_settings
from fastfpl.data import Dataset
from fastfpl.errors import InputError, shown
from fastfpl.features import FeatureStore
from fastfpl.federation.experiment import threads
from fastfpl.federation.preparation import known_as, name_dataset, plan
from fastfpl.methods import Method, find_method, method_name
from fastfpl.ops.precision import without_autocast
from fastfpl.training.feeds import Observer, evaluation_feed, silent, training_feed
from fastfpl.training.preparation import load_model, make_eye

__all__ = ["Encoded", "encode"]

_OP = "fastfpl.encode"
#: Of the deal, which decides no feature, unless it is named: one client with all images.
_DEAL: dict[str, Any] = {"partition": "iid", "clients": 1, "shots": None}


@dataclass(frozen=True)
class Encoded:
    """What lies in the feature store for one data set.

    Attributes
    ----------
    dataset : str
    kinds : tuple of str
        ``pooled``, ``raw`` or ``patches``.
    train, test : int
        Images; of test, of all that a scenario asks. ``train`` is 0 where every step encodes anew.
    folder : Path
        Of the feature store.
    """

    dataset: str
    kinds: tuple[str, ...]
    train: int
    test: int
    folder: Path


def encode(
    datasets: Sequence[str | Path | Dataset],
    *,
    methods: Sequence[str | type[Method]] = ("promptfl",),
    model: FrozenCLIP | None = None,
    cache: str | Path | None = None,
    observer: Observer = silent,
    **settings: Any,
) -> list[Encoded]:
    """Encode every image of data sets into the feature store, for whatever runs come later.

    Runs find what they need there whatever their partition, shots and seeds, and need not encode.
    A run that begins meanwhile waits for it; one that is killed goes on where it stopped.

    Parameters
    ----------
    datasets : sequence of str, path or Dataset
        As in `fastfpl.run`, each once.
    methods : sequence of str or type of Method
        For which: they decide whether pooled, raw or patch features are needed.
    model, cache, observer
        As in `fastfpl.run`.
    **settings
        Fields of `fastfpl.Settings` that the runs will have: ``clip``, ``pretrained``, ``root``,
        ``augment``, ``dtype``, ``feature_dtype``, ``scenario`` and so on.

    Returns
    -------
    list of Encoded

    Raises
    ------
    FastfplError
        As `fastfpl.run` does; before anything is encoded, of every data set.
    """
    if not datasets:
        raise InputError(f"{_OP}: datasets must be one or more; got none")
    if not methods:
        raise InputError(f"{_OP}: methods must be one or more; got none")
    for key in ("dataset", "method", "options", "max_memory"):
        if key in settings:
            raise InputError(f"{_OP}: {key} must be left out; got {shown(settings[key])}")
    names = [method_name(method, _OP) for method in methods]
    # one of each kind of features
    kinds = {(find_method(n).image_kind, find_method(n).paired): n for n in reversed(names)}
    plans = []
    for one in datasets:
        name, live = name_dataset(_OP, one)
        for method in kinds.values():
            chosen = make_settings({**_DEAL, **settings, "dataset": name, "method": method})
            plans.append(plan(chosen, model=model, datasets=known_as(chosen, live)))
    store = FeatureStore(None if cache is None else Path(cache))
    store.check()
    first = plans[0].settings
    found: dict[str, Encoded] = {}
    with threads(first.threads), without_autocast():
        clip = model or load_model(first, plans[0].device)
        for nth, planned in enumerate(plans):
            chosen, kind, scenario = planned.settings, planned.kind, planned.scenario
            later = [p.kind for p in plans[nth + 1 :] if p.settings.dataset == chosen.dataset]
            also = tuple(k.image_kind for k in later if not k.paired)
            dataset = planned.dataset
            eye = make_eye(chosen, clip, dataset, kind.image_kind, store, observer, also=also)
            train = scenario.dataset.train
            training_feed(eye, train, np.arange(len(train)), chosen, paired=kind.paired)
            tests = {
                q.split.fingerprint: q.split for q in (*scenario.questions, *scenario.arrivals)
            }
            for split in tests.values():
                evaluation_feed(eye, split, "test", np.arange(len(split)))
            before = found.get(chosen.dataset)
            found[chosen.dataset] = Encoded(
                planned.dataset.name,
                (*(before.kinds if before else ()), kind.image_kind),
                0 if chosen.augment == "fresh" and not kind.paired else len(train),
                sum(len(split) for split in tests.values()),
                store.directory,
            )
    return list(found.values())
