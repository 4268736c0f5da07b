"""From settings to a federation that can play: what is loaded, dealt out and encoded before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.config import Settings
from fastfpl.data import Dataset, Shard, load_dataset, partition
from fastfpl.data.loader import Workers, choose_workers
from fastfpl.errors import InputError, near
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
from fastfpl.federation.rounds import Exam, Federation
from fastfpl.federation.scenarios import arrange, personal
from fastfpl.federation.turns import InTurn, Together
from fastfpl.methods import check_options, find_method
from fastfpl.ops.memory import memory_limit
from fastfpl.prompts import ClassPrompts
from fastfpl.released import as_released, changes_data, choose_quirks, disturbed, visits_of

__all__ = ["prepare"]


def prepare(
    settings: Settings,
    *,
    model: FrozenCLIP | None = None,
    cache: Path | None = None,
    observer: Observer = silent,
) -> Federation:
    """Load, partition and encode what the settings name.

    Parameters
    ----------
    settings : Settings
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``settings.clip``.
    cache : Path, optional
        Folder of the feature store.
    observer : callable
        Told of long steps.
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
    clip = model or load_clip(
        settings.clip,
        settings.pretrained,
        device=_device(settings.device),
        dtype=getattr(torch, settings.dtype),
    )
    if model is not None:  # what is said of a run is what it really used
        used = {"clip": clip.name, "pretrained": clip.pretrained or None}
        settings = settings.model_copy(
            update={**used, "dtype": str(clip.dtype).removeprefix("torch.")}
        )
    budget = None if settings.max_memory is None else Budget(settings.max_memory, clip.device)
    root = None if settings.root is None else Path(settings.root)
    dataset = load_dataset(settings.dataset, root, on_corrupt=settings.on_corrupt)
    store = FeatureStore(cache)
    eye = _eye(settings, clip, dataset, kind.image_kind, store, observer, budget)
    if budget is not None:
        chunk = budget.images(eye.encode, clip.image_size, store.chunk)
        eye = replace(eye, store=FeatureStore(cache, chunk=chunk))
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
    task = make_task(
        settings,
        clip,
        scenario.dataset.classnames,
        scenario.dataset.domains,
        scenario.client_domains,
        len(scenario.shards),
        TextFeatures() if budget is None else budget.text_features(),
    )
    method = as_released(kind, quirks)(task, options)
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
        seed=settings.seed,
        beta=0.3 if settings.beta is None else settings.beta,
        shots=settings.shots,
        classes_per_client=settings.classes_per_client,
        repeat_rate=settings.repeat_rate,
        split_test=settings.split_test,
    )


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
        if dataset.statistics is None:
            raise InputError(
                f"fastfpl.run: statistics must be 'clip' for {dataset.name}, which has none of its "
                "own; got 'dataset'"
            )
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"fastfpl.run: device must be auto, cpu or cuda; got {name!r}"
            + near(name, ("auto", "cpu", "cuda"))
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"fastfpl.run: device must be there; got {name!r} without a CUDA device; use cpu"
        )
    return device
