"""From settings to a federation that can play: what is loaded, dealt out and encoded before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastfpl.clip import FrozenCLIP
from fastfpl.clip.loading import known
from fastfpl.config import COUNTED, Settings
from fastfpl.data import Dataset, Shard, load_dataset, partition, scheme_of
from fastfpl.data.listing import without_corrupt
from fastfpl.data.own_manifest import MANIFESTS
from fastfpl.errors import InputError
from fastfpl.features import FeatureStore, TextFeatures
from fastfpl.federation.checkpoint import settings_facts
from fastfpl.federation.exams import Exam, Examiner
from fastfpl.federation.merging import privacy_of
from fastfpl.federation.newcomers import Newcomers
from fastfpl.federation.ranked import RankedFederation
from fastfpl.federation.ranked_store import RankedStore
from fastfpl.federation.ranks import Ranks
from fastfpl.federation.rehearsal import rehearse
from fastfpl.federation.robust import robust_of
from fastfpl.federation.rounds import Federation
from fastfpl.federation.sampling import Sampling, asked_clients
from fastfpl.federation.scenarios import Question, Scenario, arrange, personal
from fastfpl.federation.server import Round
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import Method, Task, check_options, find_method
from fastfpl.ops.memory import memory_limit
from fastfpl.prompts import ClassPrompts
from fastfpl.released import as_released, changes_data, choose_quirks, disturbed, visits_of
from fastfpl.training.budget import Budget
from fastfpl.training.feeds import Observer, evaluation_feed, silent, training_feed
from fastfpl.training.gathering import stack
from fastfpl.training.graphs import step_graphs, text_graphs
from fastfpl.training.preparation import (
    choose_device,
    load_model,
    make_eye,
    make_room,
    make_task,
)
from fastfpl.training.private import image_privacy
from fastfpl.training.trainer import Trainer

__all__ = [
    "LIVE",
    "OWN",
    "Place",
    "Plan",
    "known_as",
    "name_dataset",
    "place_of",
    "plan",
    "prepare",
    "settled",
    "weigh",
]

#: What the name of a data set that is at hand begins with in settings.
LIVE = "live"
#: The data set of a run on Flower in which every client has its own, and the server none.
OWN = "own"
_LOG = logging.getLogger("fastfpl")

#: Which data set settings name, and how it is read.
Place = tuple[str | bool | None, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is settled of a run before any weights are read.

    Attributes
    ----------
    settings : Settings
        With the quirks by name.
    kind : type of Method
    options : dict
        The method's, with defaults.
    device : torch.device
    dataset : Dataset
        As it was loaded.
    scenario : Scenario
        What is trained on, dealt to clients, and asked.
    """

    settings: Settings
    kind: type[Method]
    options: dict[str, Any]
    device: torch.device
    dataset: Dataset
    scenario: Scenario

    @property
    def facts(self) -> dict[str, Any]:
        """Those of `settings_facts`."""
        return settings_facts(self.settings, self.options)


def plan(
    settings: Settings,
    *,
    model: FrozenCLIP | None = None,
    datasets: dict[Place, Dataset] | None = None,
    local: int | None = None,
) -> Plan:
    """Refuse what can be refused without weights, and deal the data to clients.

    Parameters
    ----------
    settings : Settings
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    datasets : dict, optional
        What was loaded for other plans; gets what is loaded for this one.
    local : int, optional
        Which rank of its machine this process is, where there are several.
    """
    settings, kind, options = settled(settings, model)
    quirks = settings.as_released
    device = choose_device(settings.device, local)
    if model is None and settings.clip != "tiny":
        known(settings.clip)
    datasets = {} if datasets is None else datasets
    place = place_of(settings)
    if place not in datasets:
        datasets[place] = _load(settings)
    dataset = datasets[place]
    settings = _count(settings, dataset)
    if settings.statistics == "dataset" and dataset.statistics is None:
        raise InputError(
            f"fastfpl.run: statistics must be 'clip' for {dataset.name}, which has none of its "
            "own; got 'dataset'"
        )
    scenario = arrange(settings, dataset, lambda mine: _deal(settings, mine))
    if changes_data(quirks):
        changed = disturbed(scenario.dataset, scenario.shards, quirks, settings.seed)
        scenario = replace(personal(*changed), names=scenario.names)
    if settings.transductive:
        scenario = scenario.transductive()
    scenario = scenario.noted(settings)
    asked_clients(settings, len(scenario.shards))
    if scenario.newcomers and visits_of(quirks, settings.schedule, settings.lr) is not None:
        raise InputError(
            "fastfpl.run: as_released must leave out quirks by which clients follow one another in "
            f"the scenario unseen-clients, whose newcomers follow nobody; got {', '.join(quirks)}"
        )
    if settings.sampling == "domain" and scenario.client_domains is None:
        raise InputError(
            "fastfpl.run: sampling must be 'uniform' where a client holds several domains; got "
            f"'domain' with partition={settings.partition!r}; use partition=domain or "
            "domain-dirichlet"
        )
    return Plan(settings, kind, options, device, dataset, scenario)


def settled(
    settings: Settings, model: FrozenCLIP | None = None
) -> tuple[Settings, type[Method], dict[str, Any]]:
    """Refuse what can be refused without data: (settings with quirks by name, method, options)."""
    kind = find_method(settings.method)
    options = check_options(settings.method, settings.options)
    quirks = choose_quirks(settings.as_released, settings.method, settings.model_dump(), options)
    settings = settings.model_copy(update={"as_released": quirks})
    if kind.paired and settings.augment == "none":
        raise InputError(
            f"fastfpl.run: augment must be fresh or views:V for {settings.method}, which "
            "learns from strongly augmented images; got 'none'"
        )
    if settings.transductive and kind.supervised:
        raise InputError(
            "fastfpl.run: transductive must be left out but for methods that look at no label; "
            f"got True for {settings.method}"
        )
    if model is not None and settings.quick_gelu != "auto":
        raise InputError(
            "fastfpl.run: quick_gelu must be left out with a model that is loaded; got "
            f"{settings.quick_gelu!r}"
        )
    if model is not None:  # what is said of a run is what it really used
        used = {"clip": model.name, "pretrained": model.pretrained or None}
        settings = settings.model_copy(
            update={**used, "dtype": str(model.dtype).removeprefix("torch.")}
        )
    return settings, kind, options


def place_of(settings: Settings) -> Place:
    """Say which data set settings name, and how it is read: equal for one that is loaded once."""
    place = settings.dataset, settings.root, settings.on_corrupt
    if scheme_of(settings.dataset) is None:
        return place
    given = settings.partition == "given"
    return *place, settings.layout, repr(settings.columns), settings.digest, given


def name_dataset(op: str, dataset: str | Path | Dataset) -> tuple[str, Dataset | None]:
    """Return what settings call a data set, and the data set itself if it is one at hand."""
    if isinstance(dataset, str):
        return dataset, None
    if isinstance(dataset, Dataset):
        return f"{LIVE}:{dataset.name}", dataset
    if isinstance(dataset, Path):
        # what is not there is missed as what its name says
        folder = dataset.is_dir() or dataset.suffix.lower() not in MANIFESTS
        return f"{'folder' if folder else 'manifest'}:{dataset}", None
    raise InputError(
        f"{op}: dataset must be a name, a path or a fastfpl.data.Dataset; got "
        f"{type(dataset).__name__}: make one by fastfpl.data.from_arrays or from_torch"
    )


def known_as(settings: Settings, live: Dataset | None) -> dict[Place, Dataset]:
    """Return a data set at hand as if it had been loaded, for `plan`."""
    if live is None:
        return {}
    for name in ("root", "layout", "columns", "digest"):
        if getattr(settings, name) is not None:
            raise InputError(
                f"fastfpl.run: {name} must be left out with a data set at hand; got "
                f"{getattr(settings, name)!r}"
            )
    dataset = without_corrupt(live) if settings.on_corrupt == "skip" else live
    for note in dataset.notes:
        _LOG.warning("fastfpl.data.%s: %s", dataset.name, note)
    return {place_of(settings): dataset}


def _load(settings: Settings) -> Dataset:
    if settings.dataset.startswith(f"{LIVE}:"):
        raise InputError(
            "fastfpl.run: a data set at hand must be handed over again by dataset=; got its name "
            f"{settings.dataset!r} alone"
        )
    root = None if settings.root is None else Path(settings.root)
    if settings.dataset == OWN:
        raise InputError(
            "fastfpl.run: dataset must not be 'own' in one process; it is for clients on Flower "
            "that each have their own images (docs/flower.md): name a folder with a folder a "
            "client, as folder:PATH with partition=given"
        )
    own = {name: getattr(settings, name) for name in ("layout", "columns", "digest")}
    own = {name: value for name, value in own.items() if value is not None}
    if scheme_of(settings.dataset) is not None and settings.partition == "given":
        own["given"] = True
    return load_dataset(settings.dataset, root, on_corrupt=settings.on_corrupt, **own)


def _count(settings: Settings, dataset: Dataset) -> Settings:
    """Fill in how many clients there are where the data set decides it, or refuse another number.

    Of a scenario that leaves a domain out, that one is no client.
    """
    if settings.partition not in COUNTED:
        return settings
    if settings.partition == "given":
        if not dataset.clients:
            raise InputError(
                "fastfpl.run: partition must not be 'given' for a data set that names no clients; "
                f"got {dataset.name}: put client folders around the class folders, a column client "
                "into the manifest, or use partition=domain or iid"
            )
        number, what = len(dataset.clients), "clients"
    else:
        number, what = len(dataset.domains), "domains"
        number -= settings.scenario == "leave-one-domain-out" and number > 1
    if settings.clients not in (None, number):
        raise InputError(
            f"fastfpl.run: clients must be left out with partition={settings.partition!r}: the "
            f"{number} {what} of {dataset.name} decide it; got {settings.clients}"
        )
    return settings.model_copy(update={"clients": number})


def weigh(planned: Plan, model: FrozenCLIP) -> None:
    """Refuse what shows with the weights, without an image: prompts that do not fit, widths.

    A method over the two longest class names encodes its first prompts.
    """
    questions = planned.scenario.questions
    names = dict.fromkeys(name for question in questions for name in question.classnames)
    tokens = dict(zip(names, model.tokenize([f" {name}" for name in names]), strict=True))
    longest = sorted(names, key=lambda name: -len(tokens[name]))[:2]
    task = replace(
        _task(planned.settings, model, planned.scenario, None),
        classes=ClassPrompts(model, longest, planned.settings.position),
    )
    method = as_released(planned.kind, planned.settings.as_released)(task, planned.options)
    down = stack([method.download(method.server_init(), 0, 0)])
    with torch.no_grad(), memory_limit(None):
        for training in (True, False):
            method.text(*method.start(down, {}, training=training))


def prepare(
    settings: Settings | Plan,
    *,
    model: FrozenCLIP | None = None,
    cache: Path | None = None,
    observer: Observer = silent,
    members: Sequence[int] | None = None,
    ranks: Ranks | None = None,
    also: tuple[str, ...] = (),
) -> Federation:
    """Load, partition and encode what the settings name.

    Parameters
    ----------
    settings : Settings or Plan
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    cache : Path, optional
        Folder of the feature store.
    observer : callable
        Told of long steps.
    members : sequence of int, optional
        Clients that train and are asked here, all of them if left out; of others no image is
        encoded.
    ranks : Ranks, optional
        The other processes that play the run, which encode images and train clients with this one.
    also : tuple of str
        Kinds of image features that are stored too, for other runs on the same images.
    """
    planned = settings if isinstance(settings, Plan) else plan(settings, model=model)
    settings, kind, options = planned.settings, planned.kind, planned.options
    dataset, scenario = planned.dataset, planned.scenario
    store = FeatureStore(cache) if ranks is None else RankedStore(ranks, cache)
    store.check()
    clip = model or load_model(settings, planned.device)
    budget = None if settings.max_memory is None else Budget(settings.max_memory, clip.device)
    eye = make_eye(settings, clip, dataset, kind.image_kind, store, observer, budget, also)
    if budget is not None:
        chunk = budget.images(eye.encode_kinds, clip.image_size, store.chunk)
        store = FeatureStore(cache, chunk=chunk)
        if ranks is not None:
            store = RankedStore(ranks, cache, chunk=ranks.least(chunk))
        eye = replace(eye, store=store)
    # what trains comes first, then what is asked
    eye = replace(eye, room=make_room(settings, clip.device, budget))
    method = as_released(kind, settings.as_released)(
        _task(settings, clip, scenario, budget), options
    )
    exams = [
        (
            question,
            method
            if question.classnames == scenario.dataset.classnames
            else method.on(ClassPrompts(clip, question.classnames, settings.position)),
        )
        for question in scenario.questions
    ]
    graphs = step_graphs(settings, method, clip.device)
    # a prompt that does not fit shows now, not after the images are encoded
    now = Round.first(method)
    down = stack([now.download(method, 0)])
    text = None if budget is None else budget.room // 2
    with torch.no_grad(), memory_limit(text):
        for one, training in ((method, True), *((m, False) for _, m in exams)):
            one.text(*one.start(down, {}, training=training))
    method.task.text_features.clear()
    if members is not None and scenario.newcomers:
        raise InputError(
            "fastfpl.run: the scenario unseen-clients must be played in one process, whose "
            "newcomers go on from its server; got it for some clients alone"
        )
    # a client alone adds no noise: who merges does
    privacy = privacy_of(settings) if members is None else None
    if privacy is not None:
        privacy.check(method, now.server, now.download(method, 0))
        method.task.text_features.clear()
    sampling = Sampling(settings, len(scenario.shards), scenario.client_domains, method.all_first)
    robust = robust_of(settings) if members is None else None
    if robust is not None:
        robust.check(method, now.server, now.download(method, 0), sampling.fewest)
        method.task.text_features.clear()
    here = range(len(scenario.shards)) if members is None else sorted(members)
    trained = {client: scenario.shards[client].train for client in here}
    trained |= {len(scenario.shards) + n: s.train for n, s in enumerate(scenario.newcomers)}
    train_rows = np.unique(np.concatenate(list(trained.values())))
    trainer = Trainer(
        settings=settings,
        method=method,
        feed=training_feed(eye, scenario.dataset.train, train_rows, settings, paired=kind.paired)
        if kind.trains
        else None,
        images=trained,
        observer=observer,
        graphs=graphs,
        texts=text_graphs(settings, clip.device, graphs),
        budget=budget,
        private=image_privacy(settings, method),
    )

    def ready(question: Question, asked: Method, of: Sequence[int]) -> Exam:
        rows = np.unique(np.concatenate([question.images[c] for c in of]))
        if not len(rows):
            raise InputError(
                f"fastfpl.run: evaluate_clients must draw a client with test images; got "
                f"{settings.evaluate_clients}; take more, or another seed"
            )
        feed = evaluation_feed(eye, question.split, "test", rows)
        name, about = question.name, question.about
        return Exam(name, about, asked, feed, question.images, question.domains)

    of = here if members is not None else asked_clients(settings, len(scenario.shards))
    examiner = Examiner(trainer, [ready(*exam, of) for exam in exams], len(scenario.shards), of)
    newcomers = None
    if scenario.newcomers:
        later = range(len(scenario.newcomers))
        adapted, before = (ready(question, method, later) for question in scenario.arrivals)
        newcomers = Newcomers(adapted, before, scenario.newcomer_domains)
    if budget is not None:
        budget.settle()
        rehearse(examiner, now)
    kind_of = Federation if ranks is None else partial(RankedFederation, ranks=ranks)
    return kind_of(
        clip=clip,
        dataset=scenario.dataset,
        shards=scenario.shards,
        names=scenario.names,
        trainer=trainer,
        examiner=examiner,
        sampling=sampling,
        now=now,
        order=_order(settings),
        newcomers=newcomers,
        privacy=privacy,
        robust=robust,
    )


def _order(settings: Settings) -> Together | InTurn:
    """Train clients together; one after another where a quirk of released code asks for it."""
    visits = visits_of(settings.as_released, settings.schedule, settings.lr)
    if visits is not None and settings.dp_noise is not None:
        raise InputError(
            "fastfpl.run: dp_noise must be left out with quirks by which clients inherit from each "
            f"other; got {settings.dp_noise} with as_released={', '.join(settings.as_released)}"
        )
    if visits is not None and robust_of(settings) is not None:
        raise InputError(
            "fastfpl.run: merge must be mean and clip_update left out with quirks by which clients "
            f"inherit from each other; got {settings.merge} and {settings.clip_update} with "
            f"as_released={', '.join(settings.as_released)}"
        )
    return Together() if visits is None else InTurn(visits)


def _deal(settings: Settings, dataset: Dataset) -> list[Shard]:
    assert settings.clients is not None
    given = settings.partition == "given"
    return partition(
        settings.partition,
        dataset.train.labels,
        dataset.test.labels,
        dataset.train.domains,
        dataset.test.domains,
        classes=len(dataset.classnames),
        clients=settings.clients,
        **_deal_seeds(settings),
        beta=0.3 if settings.beta is None else settings.beta,
        shots=settings.shots,
        classes_per_client=settings.classes_per_client,
        repeat_rate=settings.repeat_rate,
        split_test=settings.split_test,
        train_clients=dataset.train.clients if given else None,
        test_clients=dataset.test.clients if given else None,
    )


def _deal_seeds(settings: Settings) -> dict[str, Any]:
    """Say of which seed the deal is; without one of its own a published deal stays published."""
    if settings.partition_seed is None:
        return {"seed": settings.seed}
    return {"seed": settings.partition_seed, "deal_seed": settings.partition_seed}


def _task(settings: Settings, clip: FrozenCLIP, scenario: Scenario, budget: Budget | None) -> Task:
    return make_task(
        settings,
        clip,
        scenario.dataset.classnames,
        scenario.dataset.domains,
        scenario.client_domains,
        len(scenario.shards),
        TextFeatures() if budget is None else budget.text_features(),
    )
