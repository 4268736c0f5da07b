"""Trackers of other projects: TensorBoard, Weights & Biases, MLflow, through their libraries."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfpl.errors import InputError, Missing, cut, near, shown
from fastfpl.files import read_file, write_json
from fastfpl.tracking.callback import Callback, RunInfo, metrics_of

__all__ = ["TRACKERS", "MLflow", "TensorBoard", "Tracker", "WandB", "make_trackers"]

_LOG = logging.getLogger("fastfpl")
_OP = "fastfpl.tracking"
#: Which runs of trackers a run's folder belongs to.
IDS = "tracking.json"
_FORMAT = "fastfpl-tracking-1"


class Tracker(Callback):
    """Hands the figures of every round to another project's library.

    One that fails, since a network is down, says so once and is not told anything more of the run:
    the run goes on, and its own ``metrics.jsonl`` has every figure.

    Raises
    ------
    Missing
        When it is made, if its library is not installed.
    """

    #: Name on the command line, and of the extra.
    name = ""
    #: What is imported.
    module = ""

    def __init__(self) -> None:
        try:
            there = importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            raise Missing(
                f"{_OP}: {self.module} must be installed to track by {self.name}; got none; "
                f'run: pip install "fastfpl[{self.name}]"'
            )
        self._failed = False

    def on_run_begin(self, run: RunInfo) -> None:
        """Begin a run of the tracker, or go on with it."""
        self._failed = False
        self._told(run, lambda: self.begin(run))

    def on_round_end(self, run: RunInfo, row: Mapping[str, Any]) -> None:
        """Hand over the figures of a round, its number from 0 as the step."""
        self._told(run, lambda: self.log(int(row["round"]), metrics_of(run, row)))

    def on_run_end(self, run: RunInfo, final: Mapping[str, Any] | None) -> None:
        """End the tracker's run."""
        self._told(run, lambda: self.end(final))

    def begin(self, run: RunInfo) -> None:
        """Begin; may raise anything."""
        raise NotImplementedError

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over figures; may raise anything."""
        raise NotImplementedError

    def end(self, final: Mapping[str, Any] | None) -> None:
        """End; may raise anything."""
        raise NotImplementedError

    def _told(self, run: RunInfo, tell: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            tell()
        except Exception as error:  # whatever others' libraries raise
            self._failed = True
            why = " ".join(str(error).split()) or type(error).__name__
            _LOG.warning(
                "%s: %s has failed and is told no more of %s, which goes on: %s: %s",
                *(_OP, self.name, run.name, type(error).__name__, cut(why, 400)),
            )


def _known(run: RunInfo, tracker: str) -> str | None:
    """Return the number that a tracker gave the run before, if it goes on."""
    if run.folder is None or not run.done:
        return None
    try:
        found = _ids(run.folder)[tracker]
    except (InputError, KeyError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"\w{1,64}", found) else None


def _note(run: RunInfo, tracker: str, number: str) -> None:
    """Write down the number that a tracker gave the run."""
    if run.folder is None:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    there = _ids(run.folder)  # refuses another program's
    write_json(run.folder / IDS, {**(there if run.done else {"format": _FORMAT}), tracker: number})


def _ids(folder: Path) -> dict[str, Any]:
    """Read which runs of trackers a folder belongs to."""
    path = folder / IDS
    if not os.path.lexists(path):
        return {"format": _FORMAT}
    try:
        found = json.loads(read_file(path))
        if isinstance(found, dict) and found.get("format") == _FORMAT:
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise InputError(f"{path} must be a run's; got another file: remove it or name another out")


class TensorBoard(Tracker):
    """Writes event files for TensorBoard into ``tensorboard`` in the run's folder.

    Parameters
    ----------
    folder : path, optional
        Another folder; every run gets one of its name below it.
    """

    name = module = "tensorboard"

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self._folder = None if folder is None else Path(folder)
        self._writer: Any = None

    def begin(self, run: RunInfo) -> None:
        """Open the event file; what a killed run wrote beyond its checkpoint is purged."""
        module = importlib.import_module("torch.utils.tensorboard")
        if self._folder is None and run.folder is not None:
            place = run.folder / "tensorboard"
        else:
            place = (self._folder or Path("runs") / "tensorboard") / run.name
        self._writer = module.SummaryWriter(str(place), purge_step=run.done or None)
        if not run.done:
            text = json.dumps(dict(run.settings), indent=1, default=str)
            self._writer.add_text("settings", f"```\n{text}\n```", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, final: Mapping[str, Any] | None) -> None:
        """Close the file."""
        self._writer.close()


class WandB(Tracker):
    """Logs to Weights & Biases by its library; ``WANDB_MODE=offline`` keeps all of it local.

    Parameters
    ----------
    project : str
        ``WANDB_PROJECT`` in the environment counts more.
    """

    name = module = "wandb"

    def __init__(self, project: str = "fastfpl") -> None:
        super().__init__()
        self._project = project
        self._run: Any = None

    def begin(self, run: RunInfo) -> None:
        """Begin a run; one that is resumed goes on under its number."""
        wandb = importlib.import_module("wandb")
        number = _known(run, self.name) or uuid.uuid4().hex[:12]
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", self._project),
            name=run.name,
            id=number,
            resume="allow",
            dir=None if run.folder is None else str(run.folder),
            config=dict(run.settings),
            # one process may play several runs
            reinit="finish_previous",
            settings=wandb.Settings(console="off"),
        )
        _note(run, self.name, number)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log figures of a step."""
        self._run.log(dict(metrics), step=step)

    def end(self, final: Mapping[str, Any] | None) -> None:
        """Finish the run; one that was stopped says so by its exit code."""
        if self._run is None:
            return
        if final is not None:
            wanted = ("accuracy", "last5", "best", "std_over_clients", "macro_f1")
            self._run.summary.update({f"final/{key}": final[key] for key in wanted})
        self._run.finish(exit_code=0 if final is not None else 1)
        self._run = None


class MLflow(Tracker):
    """Logs to MLflow by its library, where ``MLFLOW_TRACKING_URI`` says.

    Parameters
    ----------
    experiment : str
        ``MLFLOW_EXPERIMENT_NAME`` in the environment counts more.
    """

    name = module = "mlflow"
    _MOST = 100  # parameters in a request

    def __init__(self, experiment: str = "fastfpl") -> None:
        super().__init__()
        self._experiment = experiment
        self._client: Any = None
        self._number = ""

    def begin(self, run: RunInfo) -> None:
        """Begin a run with its settings as parameters, or go on with it."""
        tracking = importlib.import_module("mlflow.tracking")
        entities = importlib.import_module("mlflow.entities")
        self._client = client = tracking.MlflowClient()
        known = _known(run, self.name)
        if known is not None:
            client.update_run(known, status="RUNNING")
            self._number = known
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._experiment)
        found = client.get_experiment_by_name(name)
        where = client.create_experiment(name) if found is None else found.experiment_id
        self._number = client.create_run(where, run_name=run.name).info.run_id
        _note(run, self.name, self._number)
        texts = {key: str(value)[:500] for key, value in run.settings.items()}
        parameters = [entities.Param(key, text) for key, text in texts.items()]
        for at in range(0, len(parameters), self._MOST):
            client.log_batch(self._number, params=parameters[at : at + self._MOST])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log figures of a step."""
        import time

        entities = importlib.import_module("mlflow.entities")
        now = int(1000 * time.time())
        # what MLflow takes in a name
        named = {re.sub(r"[^\w./: -]", "_", name): value for name, value in metrics.items()}
        self._client.log_batch(
            self._number,
            metrics=[entities.Metric(name, value, now, step) for name, value in named.items()],
        )

    def end(self, final: Mapping[str, Any] | None) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._number, "KILLED" if final is None else "FINISHED")


#: By the name of ``--track``.
TRACKERS: dict[str, type[Tracker]] = {one.name: one for one in (TensorBoard, WandB, MLflow)}


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """Make trackers by name; each may be several, separated by commas.

    Raises
    ------
    InputError
        If there is no such tracker.
    Missing
        If its library is not installed.
    """
    asked = [part.strip() for name in names for part in name.split(",")]
    for name in asked:
        if name not in TRACKERS:
            raise InputError(
                f"{_OP}: track must be one or more of {', '.join(TRACKERS)}; got {shown(name)}"
                + near(cut(name), list(TRACKERS))
            )
    return [TRACKERS[name]() for name in dict.fromkeys(asked)]
