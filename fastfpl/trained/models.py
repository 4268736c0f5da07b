"""The models of a run, out of its folder."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fastfpl import __version__
from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.clip.loading import known
from fastfpl.config import Settings
from fastfpl.data.loader import Workers
from fastfpl.errors import (
    Damaged,
    FastfplError,
    InputError,
    KindError,
    Missing,
    NotSupported,
    cut,
    near,
    shown,
)
from fastfpl.features import FeatureStore, TextFeatures
from fastfpl.federation.checkpoint import (
    CHECKPOINT,
    METHOD_SOURCE,
    Checkpoint,
    check_source,
    origin_of,
    read_checkpoint,
)
from fastfpl.federation.models import answers_with
from fastfpl.files import read_file
from fastfpl.methods import (
    Method,
    State,
    check_options,
    find_method,
    method_name,
    method_names,
    method_source,
)
from fastfpl.prompts import ClassPrompts
from fastfpl.released import as_released
from fastfpl.trained.joined import joined_names, read_joined
from fastfpl.trained.predictions import Client
from fastfpl.training.feeds import Eye, Observer, silent
from fastfpl.training.preparation import choose_device, load_model, make_task

__all__ = ["Model", "load"]

OP = "fastfpl.load"
# names that a sentence lists
_LISTED = 20


class Model:
    """What a run has trained.

    `load` makes it.

    Attributes
    ----------
    folder : Path
    settings : Settings
        As the run had them, options included.
    checkpoint : Checkpoint
        What the folder holds.
    clip : FrozenCLIP
    method : Method
    """

    def __init__(
        self, folder: Path, settings: Settings, checkpoint: Checkpoint, clip: FrozenCLIP
    ) -> None:
        self.folder, self.settings, self.checkpoint, self.clip = folder, settings, checkpoint, clip
        task = checkpoint.task
        domains = task["client_domains"]
        kind = as_released(find_method(settings.method), settings.as_released)
        self.method: Method = kind(
            make_task(
                settings,
                clip,
                self.classnames,
                tuple(task["domains"]),
                None if domains is None else tuple(domains),
                self.clients,
                TextFeatures(),
            ),
            check_options(settings.method, settings.options),
        )
        # nothing that is only asked is kept on disk
        self._eye = self.look(FeatureStore(folder), silent, Workers(0))

    @property
    def classnames(self) -> tuple[str, ...]:
        """The classes that were trained on."""
        return tuple(self.checkpoint.task["classes"])

    @property
    def clients(self) -> int:
        """Number of clients N that trained together."""
        number: int = self.checkpoint.task["clients"]
        return number

    @property
    def newcomers(self) -> int:
        """Number of clients after those, which the run adapted after its last round."""
        number: int = self.checkpoint.task.get("newcomers", 0)
        return number

    @property
    def joined(self) -> list[str]:
        """Names of the clients that came later (`fastfpl.trained.adapt`)."""
        return joined_names(self.folder)

    @property
    def names(self) -> tuple[str, ...]:
        """What the clients of the run are called, newcomers last: by the data set or their domain.

        Empty if they are but numbers, as where two clients are of one domain.
        """
        task = self.checkpoint.task
        named = tuple(task.get("names") or ())
        if named:
            return named
        domains = [*(task["client_domains"] or ()), *(task.get("newcomer_domains") or ())]
        whole = len(domains) == self.clients + self.newcomers and None not in domains
        if not whole or len(set(domains)) < len(domains):
            return ()
        return tuple(task["domains"][d] for d in domains)

    @property
    def round(self) -> int:
        """The round that was played last, from 0."""
        return len(self.checkpoint.rounds) - 1

    @property
    def finished(self) -> bool:
        """Whether no round is left."""
        return self.round + 1 >= (self.settings.rounds if self.method.trains else 1)

    @property
    def eye(self) -> Eye:
        """How the run looks at images."""
        return self._eye

    def client(self, which: int | str) -> Client:
        """Return the model of one client.

        Parameters
        ----------
        which : int or str
            A number from 0 to N - 1, or a name: one of `names`, or of a client that came later. A
            text of digits is a name if a client has it, else a number.

        Raises
        ------
        InputError
            If there is no such client, or the last round of a method that fine-tunes before an
            evaluation was not evaluated.
        """
        names = self.names
        if isinstance(which, str) and which in names:
            which = names.index(which)
        elif isinstance(which, str) and not which.isdecimal():
            if which not in self.joined:
                raise self._nobody(which)
            one = read_joined(self.folder, which, self.clip.device)
            if one.weights != self.clip.weights_digest:
                raise Damaged(
                    f"{OP}: client {which!r} must have joined this run; got one that joined a run "
                    f"of weights {one.weights}"
                )
            method, _ = self.method.admit(self.checkpoint.server, one.draws, one.domain)
            return Client(which, method, one.down, one.own, self._eye)
        number = _whole(which)
        here = range(self.clients + self.newcomers)
        if number not in here:
            raise self._nobody(which)
        if number >= self.clients:
            return self._newcomer(number)
        return Client(self._called(number), self.method, *self.states(number), self._eye)

    def _called(self, number: int) -> str:
        return self.names[number] if self.names else str(number)

    def _nobody(self, which: int | str) -> InputError:
        """Say who is there in place of a client that is not."""
        there, joined = self.clients + self.newcomers, self.joined
        listed = [f"{n} ({name})" for n, name in enumerate(self.names[:_LISTED])]
        who = f"{there}, from 0 to {there - 1}"
        if listed:
            who += f": {', '.join(listed)}{', ...' * (there > len(listed))}"
        if joined:
            later = ", ".join(map(repr, joined[:_LISTED])) + ", ..." * (len(joined) > _LISTED)
            who += f"; and {later}, who came later"
        hint = ""
        if isinstance(which, str):
            meant = near(which, [*self.names, *joined])
            # who is there has been said
            hint = meant if "did you mean" in meant else ""
            hint = hint or "; nobody has joined it (fastfpl adapt)" * (not joined)
        return InputError(f"{OP}: client must be one of the {who}; got {shown(which)}{hint}")

    def states(self, number: int) -> tuple[State, State]:
        """Return what a client answers with: (download, own), see `answers_with`."""
        kept = self.checkpoint
        if kept.facts.get("engine") == "flower" and kept.facts.get("private"):
            raise InputError(
                f"{OP}: the run must keep its clients' states in its folder; got one on Flower, "
                f"where what clients of {self.method.name} keep stays with them; ask there, or use "
                "a method with one model for all"
            )
        try:
            down, own = answers_with(
                self.method, kept.server, kept.clients, kept.downloads, number, len(kept.rounds)
            )
            if self.method.tune_epochs:
                own = self._tuned(number)
        except FastfplError:
            # files of clients are read when they are asked for; a run that goes on replaces them
            now = _rounds_done(self.folder)
            if now in (None, len(kept.rounds)):
                raise
            raise InputError(
                f"{OP}: the run in {self.folder} must not go on while its clients are read; got "
                f"{now} rounds where {len(kept.rounds)} were loaded: load it again, or when it has "
                "ended"
            ) from None
        return down, own

    def global_model(self) -> Client:
        """Return the one model that serves every client.

        Raises
        ------
        NotSupported
            If clients answer with parameters of their own.
        """
        if self.method.personal:
            raise NotSupported(
                f"{OP}: the method must have one model for everybody; got {self.method.name}, "
                "whose clients answer with parameters of their own: name a client, or adapt one"
            )
        return Client("global", self.method, *self.states(0), self._eye)

    def zero_shot(self) -> Client:
        """Return the frozen CLIP with the hand-written prompt of zeroshot, about the run's classes.

        The same for every client: what a prediction was before anything was trained.
        """
        task = self.method.task
        # its words stand before the class name, whatever the run's prompts do
        classes = ClassPrompts(self.clip, self.classnames, "end")
        kind = find_method("zeroshot")
        method = kind(
            replace(task, classes=classes, text_features=TextFeatures()),
            check_options("zeroshot", {}),
        )
        down = method.download(method.server_init(), 0, 0)
        eye = replace(self._eye, kind=method.image_kind)
        return Client("zero-shot", method, down, {}, eye)

    def _newcomer(self, number: int) -> Client:
        """Return a client that the run adapted after its last round."""
        state = self._tuned(number)
        domains = self.checkpoint.task.get("newcomer_domains")
        domain = None if domains is None else domains[number - self.clients]
        method, _ = self.method.admit(self.checkpoint.server, str(number), domain)
        down, own = (
            {n.removeprefix(side): t for n, t in state.items() if n.startswith(side)}
            for side in ("down.", "own.")
        )
        return Client(self._called(number), method, down, own, self._eye)

    def _tuned(self, number: int) -> State:
        if number not in self.checkpoint.tuned:
            raise InputError(
                f"{OP}: the last round must have been evaluated for {self.method.name}; got round "
                f"{self.round} without; go on by resume"
            )
        return self.checkpoint.tuned[number]

    def look(self, store: FeatureStore, observer: Observer, workers: Workers) -> Eye:
        """Say how the run looks at images, with another store, observer and workers."""
        s, clip = self.settings, self.clip
        mean, std = clip.mean, clip.std
        if s.statistics == "dataset":
            found = self.checkpoint.task.get("pixels")
            if found is None:
                raise Damaged(
                    f"{OP}: {self.folder / CHECKPOINT} must say by what pixels were normalised; "
                    "got statistics='dataset' alone"
                )
            mean, std = (tuple(found[key]) for key in ("mean", "std"))
        dtype = None if s.feature_dtype == "auto" else getattr(torch, s.feature_dtype)
        kind = self.method.image_kind
        return Eye(clip, kind, store, observer, mean, std, workers, dtype=dtype)

    def __repr__(self) -> str:
        return (
            f"Model({self.method.name!r}, {self.clients} clients, {len(self.classnames)} classes, "
            f"round {self.round})"
        )


def load(
    folder: str | Path,
    round: int | None = None,
    *,
    model: Any = None,
    method: str | type[Method] | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Load what a run has trained, from its folder alone.

    Parameters
    ----------
    folder : path
        The ``out`` of `fastfpl.run`, of a run that is finished or has played a round.
    round : int, optional
        As ``result.json`` numbers them, from 0. A folder keeps its last round alone.
    model : FrozenCLIP or live CLIP, optional
        The CLIP of the run, in place of loading it again. A run over a live model needs it.
    method : str or type of Method, optional
        Of a run whose method came from outside the library: its class, ``path/to/mine.py:MyMethod``
        or ``package.module:MyMethod``.
    device : torch.device or str
        ``cpu``, ``cuda`` or ``auto``; that of a `FrozenCLIP` which is handed over is its own.

    Returns
    -------
    Model

    Raises
    ------
    Missing
        If there is no checkpoint, or the CLIP's weights are not there.
    Damaged
        If a file is truncated, changed, or of another version of the format.
    InputError
        If the round is not kept, the CLIP has other weights than the run's, or its method came
        from outside the library and is not known, or is another one now.

    Warns
    -----
    UserWarning
        If another version of fastfpl wrote the run: what it computes may differ.
    """
    if method is not None:
        method_name(method, OP)
    if not isinstance(folder, str | os.PathLike):
        raise KindError(f"{OP}: folder must be a path; got {type(folder).__name__}")
    place = Path(folder)
    where = choose_device(str(device))
    kept = _read(place, model.device if isinstance(model, FrozenCLIP) else where)
    last = len(kept.rounds) - 1
    if round is not None and round != last:
        raise InputError(
            f"{OP}: round must be the last that was played, {last}; got {shown(round)}: a folder "
            "keeps no other"
        )
    _check_method(place, kept)
    try:
        settings = Settings.model_validate_json(json.dumps(kept.settings))
        check_options(settings.method, settings.options)
    except (ValidationError, InputError, ValueError) as error:
        got = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            got = f"{key}: {first['msg']} instead of {shown(first['input'])}"
        raise Damaged(f"{OP}: {place / CHECKPOINT} must hold a run's settings; got {got}") from None
    clip = _clip(settings, model, where)
    wanted = kept.facts.get("weights")
    if clip.weights_digest != wanted:
        raise InputError(
            f"{OP}: the CLIP must be the run's, of weights {wanted}; got {clip.name!r} of weights "
            f"{clip.weights_digest}"
        )
    return Model(place, settings, kept, clip)


def _read(folder: Path, device: torch.device) -> Checkpoint:
    """Read the checkpoint; a run that goes on meanwhile replaces files, and is read again."""
    path = folder / CHECKPOINT
    if not os.path.lexists(path):
        raise Missing(f"{OP}: folder must hold a run; got {cut(str(folder))} {_instead(folder)}")
    while True:
        before = path.stat().st_mtime_ns
        try:
            found = read_checkpoint(folder, device)
        except FastfplError:
            if os.path.lexists(path) and path.stat().st_mtime_ns != before:
                continue
            raise
        break
    if found.library != __version__:
        warnings.warn(
            f"{OP}: {folder} is of fastfpl {found.library}, this is {__version__}: figures may "
            "differ",
            UserWarning,
            stacklevel=3,
        )
    return found


def _rounds_done(folder: Path) -> int | None:
    """Return how many rounds a folder holds now; None if it does not say."""
    try:
        done = json.loads(read_file(folder / CHECKPOINT).decode("utf-8"))["rounds_done"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return done if isinstance(done, int) else None


def _check_method(folder: Path, found: Checkpoint) -> None:
    """Refuse a method from outside that is not known here, or is another one."""
    then, name = found.facts.get(METHOD_SOURCE), str(found.facts.get("method"))
    if then is None:
        return
    if name not in method_names():
        raise InputError(
            f"{OP}: the method of {folder}, {cut(name)}, must be known; it is "
            f"{origin_of(then)}: name it by method=, --method on the command line, as a class "
            "or path/to/file.py:Class"
        )
    check_source(OP, folder, {"facts": found.facts}, method_source(name))


def _instead(folder: Path) -> str:
    """Say what is there in place of a run."""
    if not folder.is_dir():
        return "which is no folder: name the out (--out) of one"
    below = sorted(path.parent.name for path in folder.glob(f"*/{CHECKPOINT}"))
    if below:
        return f"which holds the runs {', '.join(below[:8])}{', ...' * (len(below) > 8)}: name one"
    return f"without {CHECKPOINT}, which a run writes after its first round: name the out of one"


def _clip(settings: Settings, model: Any, device: torch.device) -> FrozenCLIP:
    if isinstance(model, FrozenCLIP):
        return model
    if model is not None:
        return load_clip(model, device=device, dtype=getattr(torch, settings.dtype))
    if settings.clip != "tiny":
        try:
            known(settings.clip)
        except FastfplError:
            raise Missing(
                f"{OP}: the CLIP of this run must be handed over by model=; got none, and the run "
                f"had a live model ({settings.clip})"
            ) from None
    return load_model(settings, device)


def _whole(which: int | str) -> int:
    if isinstance(which, bool) or not isinstance(which, int | str):
        raise InputError(f"{OP}: client must be a number or a name; got {shown(which)}")
    return int(which)
