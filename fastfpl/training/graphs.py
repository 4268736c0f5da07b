"""Training steps that come back are captured as CUDA graphs and replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from fastfpl.config import Settings
from fastfpl.errors import FastfplError, NotSupported
from fastfpl.methods import Batch, Method, State
from fastfpl.ops import all_faces
from fastfpl.ops.faces import note_face, recorded_faces
from fastfpl.ops.lifetime import kept
from fastfpl.training.steps import Cohort

__all__ = ["Capture", "CudaCapture", "StepGraphs", "against", "step_graphs"]

# steps of a shape that run as they are before it is captured: they load kernels and workspaces
_BEFORE = 2
# graphs of a cohort's signature, and signatures: each graph holds some thousand launches
_GRAPHS = 32
_SIGNATURES = 8

Step = Callable[[int, Batch], None]


class Capture(Protocol):
    """How work on a device is captured."""

    def aside(self, work: Callable[[], None]) -> None:
        """Do the work where it will be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work without doing it, and return what does it."""


class CudaCapture:
    """Captures on one side stream of a CUDA device, in one memory pool for all graphs.

    Graphs may share a pool since each leaves its results in tensors that were there before it, and
    they are replayed one after another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], None]) -> None:
        """Do the work on the side stream, between what came before and what comes after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work into a graph; the result replays it on the current stream."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


@dataclass
class _Shape:
    """Steps of one number of live clients and one shape of a batch."""

    seen: int = 0
    batch: Batch | None = None
    replay: Callable[[], None] | None = None
    read: list[Any] = field(default_factory=list)  # out of caches: a graph knows addresses alone
    faces: dict[str, set[str]] = field(default_factory=dict)


class StepGraphs:
    """The graphs of a run's training steps.

    A cohort whose tensors are like those of an earlier one moves into that one's tensors, whose
    addresses the graphs know; what a step sees of the images is copied to where the graph expects
    it, learning rates are tensors. The first steps of every shape run as they are, on the stream of
    the capture: they warm up, and they are steps of the run, so that nothing has to be undone.

    Parameters
    ----------
    capture : Capture
    required : bool
        Raise `NotSupported` where a step cannot be captured, instead of letting it run as it is.

    Attributes
    ----------
    reasons : list of str
        Why steps are not captured, found when one ran.
    """

    def __init__(self, capture: Capture, *, required: bool = False) -> None:
        self.reasons: list[str] = []
        self._capture = capture
        self._required = required
        self._twins: OrderedDict[Hashable, tuple[Cohort, dict[Hashable, _Shape]]] = OrderedDict()

    def take(self, cohort: Cohort) -> tuple[Cohort, Step]:
        """Return the cohort that goes on in place of one that begins, and its step."""
        if self.reasons:
            return cohort, cohort.step
        signature = (id(cohort.method), _signature(cohort.trained), _signature(cohort.fixed))
        if signature in self._twins:
            self._twins.move_to_end(signature)
            twin, shapes = self._twins[signature]
            twin.take(cohort)
        else:
            twin, shapes = self._twins[signature] = cohort.still(), {}
            if len(self._twins) > _SIGNATURES:
                self._twins.popitem(last=False)

        def step(live: int, batch: Batch) -> None:
            self._step(twin, shapes, live, batch)

        return twin, step

    def give_up(self, reason: str) -> None:
        """Capture no more, and let go of what was captured.

        Raises
        ------
        NotSupported
            If steps must be captured.
        """
        self.reasons = [reason]
        if self._required:
            raise _refusal(self.reasons)
        self._twins.clear()

    def _step(
        self, cohort: Cohort, shapes: dict[Hashable, _Shape], live: int, batch: Batch
    ) -> None:
        if self.reasons:
            cohort.step(live, batch)
            return
        tensors = _tensors(batch)
        shape = shapes.setdefault((live, _signature(tensors)), _Shape())
        if shape.replay is None:
            captured = sum(other.replay is not None for other in shapes.values())
            if shape.seen < _BEFORE or captured == _GRAPHS:
                self._as_it_is(cohort, shape, live, batch)
                return
            self._seize(cohort, shape, live, Batch(**{n: t.clone() for n, t in tensors.items()}))
            if self.reasons:
                cohort.step(live, batch)
                return
        assert shape.batch is not None
        assert shape.replay is not None
        for name, tensor in _tensors(shape.batch).items():
            tensor.copy_(tensors[name])
        for op, names in shape.faces.items():
            for name in names:
                note_face(op, name)
        shape.replay()

    def _seize(self, cohort: Cohort, shape: _Shape, live: int, still: Batch) -> None:
        """Capture a step on a batch that stays where it is, or say why that failed.

        A capture does nothing: what failed can be played as it is.
        """
        try:
            with kept() as read:
                shape.replay = self._capture.capture(lambda: cohort.step(live, still))
        except FastfplError:
            raise
        except Exception as e:  # torch's and the driver's have no common kind
            said = (str(e).strip() or type(e).__name__).splitlines()[0]
            self.reasons = [f"capturing a step failed: {said}"]
            if self._required:
                raise _refusal(self.reasons) from e
            self._twins.clear()  # graphs of other steps, and the memory in their pool
            return
        shape.batch, shape.read = still, read

    def _as_it_is(self, cohort: Cohort, shape: _Shape, live: int, batch: Batch) -> None:
        shape.seen += 1
        with recorded_faces() as faces:
            self._capture.aside(lambda: cohort.step(live, batch))
        for op, names in faces.items():
            shape.faces.setdefault(op, set()).update(names)
            for name in names:
                note_face(op, name)
        self.reasons = _waiting(faces)
        if self.reasons and self._required:
            raise _refusal(self.reasons)


def _signature(tensors: State) -> tuple[Hashable, ...]:
    """Describe tensors: names, shapes, what of them is in memory, and dtypes."""
    return tuple(
        (name, tuple(t.shape), tuple(stride == 0 for stride in t.stride()), t.dtype)
        for name, t in sorted(tensors.items())
    )


def _tensors(batch: Batch) -> State:
    """Return the tensors of a batch by name."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: t for name, t in found.items() if isinstance(t, Tensor)}


def _waiting(faces: dict[str, set[str]]) -> list[str]:
    known = all_faces()
    return [
        f"the face {face.name!r} of {op} waits for the device"
        for op, names in sorted(faces.items())
        for face in known[op]
        if face.name in names and face.waits
    ]


def against(settings: Settings, method: Method, device: torch.device) -> list[str]:
    """Say why no step of a run can be captured; an empty list if that shows in its steps."""
    if settings.cuda_graphs == "off":
        return ["cuda_graphs is off"]
    if device.type != "cuda":
        return [f"the run is on {device}, not on a CUDA device"]
    if settings.dp_unit == "image" and settings.dp_noise is not None:
        return ["the noise of dp_unit=image is drawn anew in every step"]
    return [] if method.trains else [f"{method.name} trains nothing"]


def step_graphs(settings: Settings, method: Method, device: torch.device) -> StepGraphs | None:
    """Make what captures the steps of a run, None where none is captured.

    Raises
    ------
    NotSupported
        If ``cuda_graphs`` is on, there are steps, and none can be captured.
    """
    reasons = against(settings, method, device)
    required = settings.cuda_graphs == "on"
    if reasons and required and method.trains:
        raise _refusal(reasons)
    return None if reasons else StepGraphs(CudaCapture(device), required=required)


def _refusal(reasons: list[str]) -> NotSupported:
    return NotSupported(
        "fastfpl.run: cuda_graphs must be auto or off where no step can be captured; got 'on', but "
        + "; ".join(reasons)
    )
