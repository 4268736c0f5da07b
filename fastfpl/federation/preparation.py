"""From settings to a federation that can play: what is loaded, dealt out and encoded before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.clip.loading import known
from fastfpl.config import Settings
from fastfpl.data import Dataset, Shard, load_dataset, partition
from fastfpl.data.loader import Workers, choose_workers
from fastfpl.errors import InputError, cut, near, shown
from fastfpl.features import FeatureStore, TextFeatures
from fastfpl.federation.budget import Budget
from fastfpl.federation.cohort import stack
from fastfpl.federation.feeds import (
    RESIDENT,
    Eye,
    Observer,
    evaluation_feed,
    silent,
    training_feed,
)
from fastfpl.federation.graphs import step_graphs
from fastfpl.federation.models import make_task
from fastfpl.federation.rounds import Exam, Federation, settings_facts
from fastfpl.federation.scenarios import Scenario, arrange, personal
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import Method, Task, check_options, find_method
from fastfpl.ops.memory import memory_limit
from fastfpl.prompts import ClassPrompts
from fastfpl.released import as_released, changes_data, choose_quirks, disturbed, visits_of

__all__ = ["Plan", "load_model", "plan", "prepare", "weigh"]


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
    datasets: dict[tuple[str | None, ...], Dataset] | None = None,
) -> Plan:
    """Refuse what can be refused without weights, and deal the data to clients.

    Parameters
    ----------
    settings : Settings
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    datasets : dict, optional
        What was loaded for other plans; gets what is loaded for this one.
    """
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
    device = _device(settings.device)
    if model is None and settings.clip != "tiny":
        known(settings.clip)
    datasets = {} if datasets is None else datasets
    place = settings.dataset, settings.root, settings.on_corrupt
    if place not in datasets:
        root = None if settings.root is None else Path(settings.root)
        datasets[place] = load_dataset(settings.dataset, root, on_corrupt=settings.on_corrupt)
    dataset = datasets[place]
    if settings.statistics == "dataset" and dataset.statistics is None:
        raise InputError(
            f"fastfpl.run: statistics must be 'clip' for {dataset.name}, which has none of its "
            "own; got 'dataset'"
        )
    scenario = arrange(settings, dataset, lambda mine: _deal(settings, mine))
    if changes_data(quirks):
        scenario = personal(*disturbed(scenario.dataset, scenario.shards, quirks, settings.seed))
    if settings.transductive:
        scenario = scenario.transductive()
    if settings.sampling == "domain" and scenario.client_domains is None:
        raise InputError(
            "fastfpl.run: sampling must be 'uniform' where a client holds several domains; got "
            f"'domain' with partition={settings.partition!r}; use partition=domain or "
            "domain-dirichlet"
        )
    return Plan(settings, kind, options, device, dataset, scenario)


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


def load_model(planned: Plan) -> FrozenCLIP:
    """Load the CLIP that the settings name."""
    settings = planned.settings
    return load_clip(
        settings.clip,
        settings.pretrained,
        device=planned.device,
        dtype=getattr(torch, settings.dtype),
        quick_gelu={"auto": None, "yes": True, "no": False}[settings.quick_gelu],
    )


def prepare(
    settings: Settings | Plan,
    *,
    model: FrozenCLIP | None = None,
    cache: Path | None = None,
    observer: Observer = silent,
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
    """
    planned = settings if isinstance(settings, Plan) else plan(settings, model=model)
    settings, kind, options = planned.settings, planned.kind, planned.options
    dataset, scenario = planned.dataset, planned.scenario
    store = FeatureStore(cache)
    store.check()
    clip = model or load_model(planned)
    budget = None if settings.max_memory is None else Budget(settings.max_memory, clip.device)
    eye = _eye(settings, clip, dataset, kind.image_kind, store, observer, budget)
    if budget is not None:
        chunk = budget.images(eye.encode, clip.image_size, store.chunk)
        eye = replace(eye, store=FeatureStore(cache, chunk=chunk))
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
    server = method.server_init()
    down = stack([method.download(server, 0, 0)])
    text = None if budget is None else budget.room // 2
    with torch.no_grad(), memory_limit(text):
        for one, training in ((method, True), *((m, False) for _, m in exams)):
            one.text(*one.start(down, {}, training=training))
    method.task.text_features.clear()
    train_rows = np.unique(np.concatenate([s.train for s in scenario.shards]))
    federation = Federation(
        settings=settings,
        clip=clip,
        dataset=scenario.dataset,
        shards=scenario.shards,
        method=method,
        train_feed=training_feed(
            eye, scenario.dataset.train, train_rows, settings, paired=kind.paired
        )
        if kind.trains
        else None,
        exams=[
            Exam(
                question.name,
                question.about,
                asked,
                evaluation_feed(
                    eye, question.split, "test", np.unique(np.concatenate(question.images))
                ),
                question.images,
                question.domains,
            )
            for question, asked in exams
        ],
        client_domains=scenario.client_domains,
        observer=observer,
        server=server,
        trainer=_trainer(settings),
        graphs=graphs,
        budget=budget,
    )
    if budget is not None:
        budget.settle()
        federation.rehearse()
    return federation


def _trainer(settings: Settings) -> Together | InTurn:
    """Train clients together; one after another where a quirk of released code asks for it."""
    visits = visits_of(settings.as_released, settings.schedule, settings.lr)
    return Together() if visits is None else InTurn(visits)


def _deal(settings: Settings, dataset: Dataset) -> list[Shard]:
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
    )


def _deal_seeds(settings: Settings) -> dict[str, Any]:
    """Say of which seed the deal is; without one of its own a published deal stays published."""
    if settings.partition_seed is None:
        return {"seed": settings.seed}
    return {"seed": settings.partition_seed, "deal_seed": settings.partition_seed}


def _eye(
    settings: Settings,
    clip: FrozenCLIP,
    dataset: Dataset,
    kind: str,
    store: FeatureStore,
    observer: Observer,
    budget: Budget | None = None,
) -> Eye:
    mean, std = clip.mean, clip.std
    if settings.statistics == "dataset":
        assert dataset.statistics is not None
        mean, std = dataset.statistics
    wanted = settings.feature_dtype
    resident = RESIDENT if settings.resident is None else settings.resident
    if budget is not None and settings.augment != "none":
        resident = budget.decoded_images(resident)
    return Eye(
        clip,
        kind,
        store,
        observer,
        mean,
        std,
        Workers(choose_workers(clip.device.type, settings.workers)),
        resident,
        None if wanted == "auto" else getattr(torch, wanted),
    )


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ("auto", "cpu", "cuda")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in known:
        raise InputError(
            f"fastfpl.run: device must be auto, cpu or cuda; got {shown(name)}"
            + near(cut(name), known)
        )
    if device.type == "cuda":
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not cards:
            raise InputError(
                f"fastfpl.run: device must be there; got {name!r} without a CUDA device; use cpu"
            )
        if (device.index or 0) >= cards:
            cure = "cuda:0" if cards == 1 else f"cuda:0 to cuda:{cards - 1}"
            raise InputError(
                f"fastfpl.run: device must be there; got {name!r} with {cards} CUDA "
                f"device{'s' * (cards > 1)}; use {cure}"
            )
    elif device.index:
        raise InputError(f"fastfpl.run: device must be there; got {name!r}; use cpu")
    return device
