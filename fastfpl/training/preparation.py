"""What training needs on a device: the device, the CLIP, how it looks at images, a task."""

from __future__ import annotations

import os

import torch

from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.config import Settings
from fastfpl.data import Dataset
from fastfpl.data.loader import Workers, choose_workers
from fastfpl.errors import InputError, cut, near, shown
from fastfpl.features import DeviceRoom, FeatureStore, TextFeatures
from fastfpl.methods import Task
from fastfpl.prompts import ClassPrompts
from fastfpl.training.budget import Budget
from fastfpl.training.feeds import RESIDENT, Eye, Observer

__all__ = [
    "choose_device",
    "known_device",
    "load_model",
    "make_eye",
    "make_room",
    "make_task",
]


def known_device(name: str) -> torch.device:
    """Turn the name of a device into one, whether it is there or not."""
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
    return device


def choose_device(name: str, local: int | None = None) -> torch.device:
    """Turn a setting into a device, and refuse one that is not there.

    Of the ranks of one machine each takes the card of its own number ``local``, or the only one
    that it sees; one that is named by number is every rank's.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" or local is None:
            return torch.device(name)
    device = known_device(name)
    if device.type == "cuda":
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not cards:
            raise InputError(
                f"fastfpl.run: device must be there; got {name!r} without a CUDA device; use cpu"
            )
        if local is not None and device.index is None:
            # who starts ranks may show each of them one card alone
            alone = cards == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
            if local >= cards and not alone:
                raise InputError(
                    f"fastfpl.run: device must be there for every rank; got {name!r} for rank "
                    f"{local} of a machine with {cards} CUDA device{'s' * (cards > 1)}; start as "
                    "many ranks as there are devices, or use cpu"
                )
            return torch.device("cuda", 0 if alone else local)
        if (device.index or 0) >= cards:
            cure = "cuda:0" if cards == 1 else f"cuda:0 to cuda:{cards - 1}"
            raise InputError(
                f"fastfpl.run: device must be there; got {name!r} with {cards} CUDA "
                f"device{'s' * (cards > 1)}; use {cure}"
            )
    elif device.index:
        raise InputError(f"fastfpl.run: device must be there; got {name!r}; use cpu")
    return device


def load_model(settings: Settings, device: torch.device) -> FrozenCLIP:
    """Load the CLIP that the settings name."""
    return load_clip(
        settings.clip,
        settings.pretrained,
        device=device,
        dtype=getattr(torch, settings.dtype),
        quick_gelu={"auto": None, "yes": True, "no": False}[settings.quick_gelu],
    )


def make_task(
    settings: Settings,
    clip: FrozenCLIP,
    classnames: tuple[str, ...],
    domains: tuple[str, ...],
    client_domains: tuple[int, ...] | None,
    clients: int,
    text_features: TextFeatures,
) -> Task:
    """Lay out what a method of a run is given."""
    classes = ClassPrompts(clip, classnames, settings.position)
    n_ctx = settings.n_ctx or 16
    if settings.ctx_init is not None:
        n_ctx = len(classes.words(settings.ctx_init))
    return Task(
        classes=classes,
        logit_scale=clip.logit_scale,
        clients=clients,
        domains=domains,
        client_domains=client_domains,
        n_ctx=n_ctx,
        ctx_init=settings.ctx_init,
        lr=settings.lr,
        seed=settings.seed,
        text_features=text_features,
    )


def make_eye(
    settings: Settings,
    clip: FrozenCLIP,
    dataset: Dataset,
    kind: str,
    store: FeatureStore,
    observer: Observer,
    budget: Budget | None = None,
    also: tuple[str, ...] = (),
) -> Eye:
    """Lay out how a CLIP looks at the images of a run."""
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
        also=also,
    )


def make_room(settings: Settings, device: torch.device, budget: Budget | None = None) -> DeviceRoom:
    """Lay out what of a device stored features may stay in."""
    wanted = settings.resident_features
    return DeviceRoom(device, wanted if budget is None else budget.device_features(wanted))
