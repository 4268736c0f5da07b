"""What ranks must agree on before they play a run together."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from fastfpl import __version__
from fastfpl.clip import FrozenCLIP
from fastfpl.errors import InputError, cut
from fastfpl.federation.preparation import Plan
from fastfpl.federation.ranks import Ranks
from fastfpl.federation.result import deal
from fastfpl.federation.states import StateFiles
from fastfpl.files import on_disk

__all__ = ["agree", "agree_on_weights", "share_folder"]

# what decides no figure and may be another on each machine
_OWN = (
    *("root", "target_root", "device", "threads", "workers", "resident", "resident_features"),
    "max_memory",
)


def agree(ranks: Ranks, planned: Plan, *, resume: bool) -> None:
    """Refuse ranks of other versions, settings or data, or two that hold one card.

    Raises
    ------
    InputError
        On rank 0, with both digests; see `Ranks.agree`.
    """
    versions = {"fastfpl": __version__, "torch": torch.__version__}
    ranks.agree("versions", {**versions, "python": platform.python_version()})
    mine = planned.settings.model_dump()
    settings = {name: value for name, value in mine.items() if name not in _OWN}
    ranks.agree("settings", {**settings, **planned.facts, "resume": resume} | _places(settings))
    scenario = planned.scenario
    questions = {q.name: q.split.fingerprint for q in (*scenario.questions, *scenario.arrivals)}
    ranks.agree(
        "data",
        {
            "training images": scenario.dataset.train.fingerprint,
            "classes": list(scenario.dataset.classnames),
            **{f"images of {name}": found for name, found in questions.items()},
            **{f"deal of {side} images": found for side, found in deal(scenario.shards).items()},
        },
    )
    _cards(ranks, planned)


def _places(settings: dict[str, Any]) -> dict[str, Any]:
    """Of one's own images the content counts, and not where they lie."""
    return {
        name: (settings[name] or "").partition(":")[0] or None for name in ("dataset", "target")
    }


def _cards(ranks: Ranks, planned: Plan) -> None:
    """Refuse two ranks on one card, unless it was named by its number."""
    shared = (
        planned.device.type != "cuda"
        or torch.device(planned.settings.device.replace("auto", "cuda")).index is not None
    )
    card = "" if shared else str(torch.cuda.get_device_properties(planned.device).uuid)
    held = ranks.gathered(card)
    for rank, one in enumerate(held):
        if one and one in held[:rank]:
            raise InputError(
                f"fastfpl.run: device must be there for every rank; got one card for rank "
                f"{held.index(one)} and rank {rank}; start as many ranks as there are devices, or "
                "name the card that all share, as cuda:0"
            )
    ranks.say(None)


def agree_on_weights(ranks: Ranks, clip: FrozenCLIP) -> None:
    """Refuse ranks whose frozen CLIP is another one."""
    ranks.agree("weights", {"weights": clip.weights_digest, "activation": clip.text.activation})


def share_folder(ranks: Ranks, folder: Path) -> None:
    """Refuse a folder that is not one and the same for all ranks.

    Rank 0 has made it and holds it. Each rank looks for a mark of rank 0's and leaves its own.

    Raises
    ------
    InputError
        On rank 0.
    """
    marks = StateFiles(beside=folder) if ranks.first else None
    name = ranks.say(None if marks is None else marks.place.name)
    if marks is None:
        there = (folder / str(name)).is_dir()
        if there:
            with on_disk("fastfpl.run", "out", folder, "or name another out"):
                (folder / str(name) / f"rank-{ranks.rank}").write_bytes(b"")
        ranks.gathered([there, str(folder)])
        ranks.say(None)
        return
    try:
        for rank, (there, path) in enumerate(ranks.gathered([True, str(folder)])):
            if rank and not (there and (marks.place / f"rank-{rank}").is_file()):
                raise InputError(
                    f"fastfpl.run: out must be a folder that all ranks share; got {folder} of rank "
                    f"0, whose files are not in {cut(str(path))} of rank {rank}"
                )
    finally:
        shutil.rmtree(marks.place, ignore_errors=True)
    ranks.say(None)
