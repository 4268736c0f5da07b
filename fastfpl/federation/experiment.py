"""One experiment from settings to its result: rounds, checkpoints, files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings, load_preset, make_settings
from fastfpl.data import Dataset, short_name
from fastfpl.errors import Damaged, InputError, cut, near, shown
from fastfpl.features.file import KINDS
from fastfpl.federation.agreement import agree, agree_on_weights, share_folder
from fastfpl.federation.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    check_checkpoint,
    files_of,
    load_checkpoint,
    save_checkpoint,
)
from fastfpl.federation.lock import Held, alone_in
from fastfpl.federation.models import task_of
from fastfpl.federation.preparation import known_as, name_dataset, plan, prepare
from fastfpl.federation.provenance import provenance
from fastfpl.federation.ranks import Ranks, elsewhere, together
from fastfpl.federation.result import (
    RESULT,
    Result,
    deal,
    environment,
    forget_peak_memory,
    peak_memory,
    summarise,
)
from fastfpl.federation.rounds import Federation
from fastfpl.federation.server import Round
from fastfpl.federation.shared import DOWNLOADS, TUNED, SharedStates
from fastfpl.federation.states import CLIENTS, StateFiles
from fastfpl.methods import Method, method_name, method_source
from fastfpl.methods.contract import may_follow
from fastfpl.ops.faces import recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.precision import without_autocast
from fastfpl.tracking import Callback, RunInfo
from fastfpl.tracking.callback import Told
from fastfpl.tracking.lines import METRICS, Lines
from fastfpl.training.budget import uncapped
from fastfpl.training.feeds import Observer, silent
from fastfpl.training.graphs import summary
from fastfpl.training.preparation import load_model

__all__ = [
    "RoundObserver",
    "pixels_of",
    "refuse_held",
    "run",
    "run_name",
    "stoppable",
    "threads",
    "unseen",
]

#: ``on_round(label, row)`` is told of every round that ended.
RoundObserver = Callable[[str, Mapping[str, Any]], None]


def unseen(label: str, row: Mapping[str, Any]) -> None:
    """Report to nobody."""


def run(
    method: str | Settings | type[Method],
    *,
    preset: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    model: FrozenCLIP | None = None,
    cache: str | Path | None = None,
    observer: Observer = silent,
    on_round: RoundObserver = unseen,
    callbacks: Sequence[Callback] = (),
    dataset: str | Path | Dataset | None = None,
    also: Sequence[str] = (),
    **settings: Any,
) -> Result:
    """Run one federated experiment.

    Parameters
    ----------
    method : str, Settings or type of Method
        Name of the algorithm, or complete settings; of one from outside the library its class, or
        ``path/to/mine.py:MyMethod`` or ``package.module:MyMethod``.
    preset : str, optional
        A paper's settings by name; ``settings`` come on top. With complete settings, the preset
        that they came from. The result says what differs from it and what the paper reports.
    out : path, optional
        Folder that gets ``result.json`` and, after every round, a checkpoint and a line of
        ``metrics.jsonl``; one run at a time holds it.
    resume : bool
        Go on from the checkpoint in ``out`` (or start, if there is none). Without it a folder that
        holds a run is refused.
    model : FrozenCLIP, optional
        A CLIP that is already loaded, in place of ``clip=``. The settings of the result name it:
        its name (of a live model the class), ``pretrained`` and dtype.
    cache : path, optional
        Folder of the feature store.
    observer : callable
        ``observer(what, done, total)`` is told of every long step.
    on_round : callable
        ``on_round(method, row)`` is told of every round that ended, with its row of ``rounds``.
    callbacks : sequence of Callback
        Told of the run while it goes on: `fastfpl.tracking.TensorBoard`, ``WandB``, ``MLflow``, or
        subclasses of `fastfpl.tracking.Callback` of your own. ``metrics.jsonl`` in ``out`` has a
        line a round without any.
    dataset : str, path or Dataset, optional
        A name or ``folder:``, ``manifest:``, ``hf:`` and a place, as the setting has it; the path
        of a folder, zip file or manifest; or a data set at hand, as `fastfpl.data.from_arrays`
        makes it. The settings of the result then call it ``live:`` and its name, and a resumed run
        must be given one of the same images.
    also : sequence of str
        Of image features the kinds (``pooled``, ``raw``, ``patches``; `Method.image_kind`) that
        other runs will ask of the same images: where the run encodes, they are stored of the same
        pass. `compare` knows them by itself.
    **settings
        Fields of `fastfpl.Settings`.

    Returns
    -------
    Result
        The content of ``result.json``.

    Raises
    ------
    FastfplError
        With a sentence that names the argument, what came and the cure.
    KeyboardInterrupt
        If it is stopped by hand, in a notebook too; its sentence says how to go on.

    Notes
    -----
    Under torchrun all ranks play one run together (docs/ranks.md): each calls this function with
    the same arguments, and each gets the result.

    What a run computes in is in its settings: the caller's autocast is off meanwhile, and torch's
    default dtype decides nothing.
    """
    origin = None if preset is None else load_preset(preset)
    live = None
    if dataset is not None:
        name, live = name_dataset("fastfpl.run", dataset)
        if not isinstance(method, Settings) or name != method.dataset:
            settings["dataset"] = name
    if isinstance(method, Settings):
        if settings:
            raise InputError("fastfpl.run: settings must come alone or as keywords; got both")
        chosen = method
    elif origin is not None:
        chosen = make_settings(origin.on_top(method_name(method), settings))
    else:
        chosen = make_settings({**settings, "method": method_name(method)})
    for kind in also:
        if kind not in KINDS:
            raise InputError(
                f"fastfpl.run: also must be of {', '.join(KINDS)}; got {shown(kind)}"
                + near(str(kind), KINDS)
            )
    folder = None if out is None else Path(out)
    if folder is None and resume:
        raise InputError("fastfpl.run: out must name the folder to resume; got none")
    with together() as ranks:
        if ranks is not None and folder is None:
            raise InputError(
                "fastfpl.run: out must name a folder that all ranks share; got none with "
                f"{ranks.size} ranks"
            )
        holding: contextlib.AbstractContextManager[Held | None] = contextlib.nullcontext()
        if folder is not None and not elsewhere():
            refuse_held(folder, resume=True)  # what holds a run may be another process's
            holding = alone_in(folder)
        with holding as held, threads(chosen.threads), without_autocast():
            if held is not None:
                refuse_held(held.folder, resume)
            store = None if cache is None else Path(cache)
            # of several ranks the first one speaks
            told = Told(() if elsewhere() else callbacks)

            def step(what: str, done: int, total: int) -> None:
                observer(what, done, total)
                told.step(what, done, total)

            how = _Run(
                *(folder, held, resume, model, store, step, on_round, told, ranks), tuple(also)
            )
            try:
                with stoppable(chosen, folder):
                    result = _play(chosen, live, how)
            except BaseException:
                told.stop()
                raise
            if result is not None:
                if origin is not None:
                    result = replace(result, preset=provenance(origin, result, model is not None))
                if held is not None:
                    result.save(held.folder)
                told.end(result.final)
        if ranks is not None:
            result = Result(**ranks.say({} if result is None else result.to_json()))
    assert result is not None
    return result


@dataclass(frozen=True, eq=False)
class _Run:
    """How a run is played and what it leaves, whatever its settings.

    Attributes
    ----------
    held : Held or None
        The folder, of whoever writes into it: one process, or the first of several ranks.
    """

    folder: Path | None
    held: Held | None
    resume: bool
    model: FrozenCLIP | None
    cache: Path | None
    observer: Observer
    on_round: RoundObserver
    told: Told
    ranks: Ranks | None
    also: tuple[str, ...]


@contextlib.contextmanager
def stoppable(settings: Settings, folder: Path | None) -> Iterator[None]:
    """Let whoever stops a run by hand read how it goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if folder is None:
            how = "nothing of it is kept, which out= would have done"
        elif not os.path.lexists(folder / CHECKPOINT):
            how = f"before its first round of {settings.rounds} ended; begin again in {folder}"
        else:
            how = (
                f"the rounds that ended are kept in {folder}; go on by the same call with "
                "resume=True (--resume)"
            )
        error.args = (f"fastfpl.run: {settings.method} was stopped; {how}",)
        raise


def refuse_held(folder: Path, resume: bool) -> None:
    """Refuse a folder of results that is none, or that holds a run which is not to go on."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"fastfpl.run: out must be a folder; got the file {folder}")
        old = [] if resume else [folder / RESULT, folder / CHECKPOINT]
        if any(os.path.lexists(path) for path in old):
            raise InputError(
                f"fastfpl.run: out must not hold a run already; got {folder}; "
                "go on with it by resume (--resume), or name another folder"
            )
        # of a run it stands beside a checkpoint
        others = any(os.path.lexists(folder / name) for name in (CHECKPOINT, RESULT))
        if os.path.lexists(folder / METRICS) and not others:
            raise InputError(
                f"fastfpl.run: out must have no {METRICS} but a run's; got one without "
                f"{CHECKPOINT} in {folder}; remove it or name another out"
            )
    except OSError as error:
        raise InputError(
            f"fastfpl.run: out must be a folder that can be read; got {cut(str(folder))}: "
            f"{error.strerror}"
        ) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"fastfpl.run: out must be a path; got {shown(str(folder))}") from None


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads, and give the caller back as many as there were."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _play(chosen: Settings, live: Dataset | None, how: _Run) -> Result | None:
    """Play the rounds that are left and save after each; only the first rank has the result."""
    forget_peak_memory()
    ranks, held, folder, model = how.ranks, how.held, how.folder, how.model
    local = None if ranks is None else ranks.local
    # a limit around a run is for passes of the caller
    with recorded_faces() as faces, memory_limit(None), uncapped():
        planned = plan(chosen, model=model, datasets=known_as(chosen, live), local=local)
        if ranks is not None and folder is not None:
            share_folder(ranks, folder)
            agree(ranks, planned, resume=how.resume)
        head = None
        if held is not None and how.resume:
            # other settings show before any weights are read
            head = check_checkpoint(held.folder, planned.facts)
            if head is not None and planned.kind.trains and head["rounds_done"] > chosen.rounds:
                raise InputError(
                    f"fastfpl.run: rounds must be at least the {head['rounds_done']} that "
                    f"{held.folder} has played; got {chosen.rounds}"
                )
        if ranks is not None:
            model = model or load_model(planned.settings, planned.device)
            agree_on_weights(ranks, model)
        how.told.begin(
            RunInfo(
                run_name(planned.settings),
                {**planned.settings.model_dump(), "options": dict(planned.options)},
                None if held is None else held.folder,
                0 if head is None else head["rounds_done"],
                planned.scenario.names,
            )
        )
        federation = prepare(
            planned,
            model=model,
            cache=how.cache,
            observer=how.observer,
            ranks=ranks,
            also=how.also,
        )
        if folder is not None:
            _take_up(federation, folder, how.resume, faces)
        if ranks is not None:
            ranks.say(None)  # nothing changes in the folder before all have read it
        if held is not None:
            held.sweep(files_of(held.folder) or set())
        lines = None if held is None else Lines(held.folder, federation.rounds)
        while not federation.finished:
            if held is None:
                row = federation.round()
            else:
                with _given_up(held):
                    row = federation.round()
                    _save(federation, held.folder, faces)
                held.settle()
            if lines is not None:
                lines.append(row)
            if ranks is None or ranks.first:
                how.on_round(chosen.method, row)
                how.told.round(row)
    peak = peak_memory(federation.clip.device)
    said = {op: sorted(names) for op, names in faces.items()}
    if ranks is not None:
        # the largest of any rank, and the faces of all
        for other in ranks.gathered({"peak": peak, "faces": said}):
            peak = max(peak, other["peak"])
            for op, names in other["faces"].items():
                said[op] = sorted({*said.get(op, ()), *names})
        if not ranks.first:
            return None
    return _result(federation, said, peak, 1 if ranks is None else ranks.size)


def run_name(settings: Settings) -> str:
    """Name a run for trackers."""
    return f"{settings.method}-{short_name(settings.dataset)}-seed{settings.seed}"


@contextlib.contextmanager
def _given_up(held: Held) -> Iterator[None]:
    """Remove what a round that fails has written and no checkpoint names."""
    try:
        yield
    except BaseException:
        named = files_of(held.folder)
        if named is not None:
            held.sweep(named)
        raise


def _take_up(
    federation: Federation, folder: Path, resume: bool, faces: dict[str, set[str]]
) -> None:
    """Let a federation keep its state in a folder, and go on from the one that is there."""
    device = federation.clip.device
    federation.folder = folder
    federation.clients = StateFiles(folder / CLIENTS, device)
    federation.downloads = SharedStates(folder / DOWNLOADS, device)
    federation.tuned = SharedStates(folder / TUNED, device)
    found = load_checkpoint(folder, federation.facts(), device) if resume else None
    if found is None:
        return
    for name, tensor in {**federation.server, **found.server}.items():
        mine = [state.get(name, tensor.new_empty(0)) for state in (federation.server, found.server)]
        if not may_follow(federation.method, name, *mine):
            raise Damaged(
                f"fastfpl.run: {folder / CHECKPOINT} must hold the server of "
                f"{federation.method.name}; got another {name!r}; start again with another out"
            )
    federation.now = Round(len(found.rounds), found.server, found.handed)
    federation.clients, federation.downloads = found.clients, found.downloads
    federation.tuned, federation.rounds = found.tuned, found.rounds
    for op, names in found.faces.items():
        faces.setdefault(op, set()).update(names)


def _save(federation: Federation, folder: Path, faces: Mapping[str, set[str]]) -> None:
    save_checkpoint(
        folder,
        Checkpoint(
            federation.facts(),
            federation.rounds,
            {op: sorted(names) for op, names in faces.items()},
            federation.now.server,
            federation.clients,
            federation.now.handed,
            federation.downloads,
            federation.tuned,
            _settings(federation),
            _task(federation),
        ),
    )


def _task(federation: Federation) -> dict[str, Any]:
    """Say of a task what a checkpoint holds."""
    found = {**task_of(federation.method.task), "pixels": pixels_of(federation)}
    if federation.newcomers is not None:
        domains = list(federation.newcomers.domains)
        found |= {"newcomers": len(domains), "newcomer_domains": domains}
    return found | ({"names": list(federation.names)} if federation.names else {})


def pixels_of(federation: Federation) -> dict[str, list[float]]:
    """Say by what pixels are normalised."""
    own = federation.dataset.statistics if federation.settings.statistics == "dataset" else None
    mean, std = own or (federation.clip.mean, federation.clip.std)
    return {"mean": list(mean), "std": list(std)}


def _settings(federation: Federation) -> dict[str, Any]:
    """Every setting with its value, and every option."""
    return {
        **federation.settings.model_dump(),
        "options": federation.method.options.model_dump(),
    }


def _replayed(federation: Federation) -> str:
    """Say what was replayed as a CUDA graph, and why the rest was not."""
    trainer, device = federation.trainer, federation.clip.device
    return summary(federation.settings, federation.method, device, trainer.graphs, trainer.texts)


def _result(federation: Federation, faces: dict[str, list[str]], peak: int, ranks: int) -> Result:
    exams, budget = federation.exams, federation.trainer.budget
    images = federation.trainer.images
    together = len(federation.shards)
    newcomers = range(together, len(images))
    asked = newcomers or federation.examiner.asked
    some = not newcomers and len(asked) < together
    names = [federation.names[c] for c in asked] if federation.names else []
    # an exam of newcomers has places of its own
    places = range(len(newcomers)) if newcomers else asked
    notes = list(federation.dataset.notes)
    if some:
        notes.append(f"asked are {len(asked)} of {together} clients, drawn once")
    source = method_source(federation.settings.method)
    return Result(
        method=federation.settings.method,
        settings=_settings(federation),
        environment={
            **environment(federation.clip.device),
            "cuda_graphs": _replayed(federation),
            "ranks": ranks,
        },
        faces=faces,
        rounds=federation.rounds,
        final=summarise(federation.rounds),
        peak_memory_bytes=peak,
        memory=None if budget is None else budget.to_json(),
        data={
            "name": federation.dataset.name,
            "classes": list(federation.dataset.classnames),
            # of the clients that the headline is about
            "train_images": [len(images[c]) for c in asked],
            **({"others": together} if newcomers else {}),
            "test_images": [len(exams[0].images[c]) for c in places],
            **({"asked": list(asked), "population": together} if some else {}),
            "exams": {exam.name: exam.about for exam in exams},
            "transductive": federation.settings.transductive,
            "skipped": federation.dataset.skipped,
            "notes": notes,
            "weights": federation.clip.weights_digest,
            "activation": federation.clip.text.activation,
            "deal": deal(federation.shards),
            "training": {
                "used": len(np.unique(np.concatenate([s.train for s in federation.shards]))),
                "there": len(federation.dataset.train),
            },
            **({"clients": names} if names else {}),
            **({} if source is None else {"method_source": source}),
        },
    )
