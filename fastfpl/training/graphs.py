"""Work that comes back is captured as CUDA graphs and replayed: training steps, text passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, ItemsView, Iterator, ValuesView
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastfpl.config import Settings
from fastfpl.errors import FastfplError, NotSupported
from fastfpl.methods import Batch, Method, State
from fastfpl.ops import all_faces
from fastfpl.ops.faces import note_face, recorded_faces
from fastfpl.ops.lifetime import kept
from fastfpl.ops.memory import current_limit
from fastfpl.training.steps import Cohort, stored

__all__ = [
    "Capture",
    "CudaCapture",
    "StepGraphs",
    "TextGraphs",
    "against",
    "against_text",
    "step_graphs",
    "summary",
    "text_graphs",
]

# work of a shape that is done as it is before it is captured: it loads kernels and workspaces
_BEFORE = 2
# graphs of a cohort's signature, and signatures: each graph holds some thousand launches
_GRAPHS = 32
_SIGNATURES = 8
# text passes that are known: each that is captured holds what it reads, and its features
_TEXTS = 16

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
        self._begin()

    def _begin(self) -> None:
        self._stream = torch.cuda.Stream(self._device)
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
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # another thread may pin memory meanwhile: of a feed, which fetches ahead
            mode = "thread_local"
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                work()
        except Exception:
            # torch goes on where a capture broke off; what else is captured is so elsewhere
            torch.cuda.set_stream(current)
            self._begin()
            raise
        return graph.replay


@dataclass
class _Work:
    """Work of one kind: how often it was done as it is, and what replays it."""

    seen: int = 0
    replay: Callable[[], None] | None = None
    read: list[Any] = field(default_factory=list)  # out of caches: a graph knows addresses alone
    faces: dict[str, set[str]] = field(default_factory=dict)


class _Graphs(ABC):
    """What is captured of one sort of work.

    Parameters
    ----------
    capture : Capture
    required : bool
        Raise `NotSupported` where it cannot be captured, instead of letting it run as it is.

    Attributes
    ----------
    capture : Capture
    reasons : list of str
        Why it is not captured, found when it was done.
    captured : int
        How many graphs were made.
    """

    what: ClassVar[str]

    def __init__(self, capture: Capture, *, required: bool = False) -> None:
        self.capture = capture
        self.reasons: list[str] = []
        self.captured = 0
        self._required = required

    def give_up(self, reason: str) -> None:
        """Capture no more, and let go of what was captured.

        Raises
        ------
        NotSupported
            If it must be captured.
        """
        self.reasons = [reason]
        if self._required:
            raise _refusal(self.what, self.reasons)
        self._let_go()

    @abstractmethod
    def _let_go(self) -> None:
        """Drop every graph, and the memory in their pool."""

    def _as_it_is(self, one: _Work, do: Callable[[], None]) -> None:
        """Do the work on the stream of the capture: it warms up, and it is work of the run."""
        one.seen += 1
        with recorded_faces() as faces:
            self.capture.aside(do)
        for op, names in faces.items():
            one.faces.setdefault(op, set()).update(names)
            for name in names:
                note_face(op, name)
        self.reasons = _waiting(faces)
        if self.reasons:
            if self._required:
                raise _refusal(self.what, self.reasons)
            self._let_go()

    def _seize(self, one: _Work, do: Callable[[], None]) -> None:
        """Capture the work on tensors that stay where they are, or say why that failed.

        A capture does nothing: what failed can be done as it is.
        """
        try:
            with kept() as read:
                one.replay = self.capture.capture(do)
        except FastfplError:
            raise
        except Exception as e:  # torch's and the driver's have no common kind
            said = (str(e).strip() or type(e).__name__).splitlines()[0]
            self.reasons = [f"capturing a {self.what} failed: {said}"]
            if self._required:
                raise _refusal(self.what, self.reasons) from e
            self._let_go()
            return
        one.read = read
        self.captured += 1

    @staticmethod
    def _play(one: _Work) -> None:
        """Replay the work on what its tensors hold now."""
        assert one.replay is not None
        for op, names in one.faces.items():
            for name in names:
                note_face(op, name)
        one.replay()


@dataclass
class _Shape(_Work):
    """Steps of one number of live clients and one shape of a batch."""

    batch: Batch | None = None


class StepGraphs(_Graphs):
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
    capture : Capture
    reasons : list of str
        Why steps are not captured, found when one ran.
    captured : int
        How many graphs were made.
    """

    what = "step"

    def __init__(self, capture: Capture, *, required: bool = False) -> None:
        super().__init__(capture, required=required)
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

    def _let_go(self) -> None:
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
                self._as_it_is(shape, lambda: cohort.step(live, batch))
                return
            still = shape.batch = Batch(**{n: t.clone() for n, t in tensors.items()})
            self._seize(shape, lambda: cohort.step(live, still))
            if self.reasons:
                cohort.step(live, batch)
                return
        assert shape.batch is not None
        for name, tensor in _tensors(shape.batch).items():
            tensor.copy_(tensors[name])
        self._play(shape)


@dataclass
class _Pass(_Work):
    """Text passes of one method over tensors of the same names, shapes and strides."""

    asked: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))
    device: torch.device | None = None
    features: Tensor | None = None  # before the capture shape, strides and dtype alone
    inputs: list[Tensor] = field(default_factory=list)


class TextGraphs(_Graphs):
    """The graphs of the text passes of a run's evaluations.

    A text pass is a function of named tensors, `Method.text`. Those that it looks at are copied to
    where its graph expects them; of the others, such as a gate or the features of experts, the
    graph has none: a pass that asks for one after all is not captured. The first passes of every
    kind run as they are, on the stream of the capture.

    Parameters
    ----------
    capture : Capture
        That of the steps: a pool serves all graphs of a run.
    required : bool
        Raise `NotSupported` where a pass cannot be captured, instead of letting it run as it is.

    Attributes
    ----------
    capture : Capture
    reasons : list of str
        Why passes are not captured, found when one ran.
    captured : int
        How many graphs were made.
    """

    what = "text pass"

    def __init__(self, capture: Capture, *, required: bool = False) -> None:
        super().__init__(capture, required=required)
        self._passes: OrderedDict[Hashable, _Pass] = OrderedDict()

    @torch.no_grad()
    def text(self, method: Method, trained: State, fixed: State) -> Tensor:
        """Return ``method.text(trained, fixed)``, in memory that no later pass writes into."""
        if self.reasons:
            return method.text(trained, fixed)
        # a bound method is equal to that of the same object alone, and keeps it
        key = (method.text, current_limit(), _layout(trained), _layout(fixed))
        one = self._passes.setdefault(key, _Pass())
        self._passes.move_to_end(key)
        if len(self._passes) > _TEXTS:
            self._passes.popitem(last=False)
        if one.replay is None:
            if one.seen < _BEFORE or one.features is None:
                return self._watched(one, method, trained, fixed)
            self._take(one, method, trained, fixed)
            if self.reasons:
                return method.text(trained, fixed)
        given = _chosen(one, trained, fixed)
        if given:
            torch._foreach_copy_([stored(t) for t in one.inputs], [stored(t) for t in given])
        self._play(one)
        assert one.features is not None
        return _copied(one.features)  # the next replay writes into the graph's own

    def _let_go(self) -> None:
        self._passes.clear()

    def _watched(self, one: _Pass, method: Method, trained: State, fixed: State) -> Tensor:
        """Let a pass run as it is, and note what it looks at and what its features are like."""
        states = _Asked(trained), _Asked(fixed)
        found: list[Tensor] = []
        self._as_it_is(one, lambda: found.append(method.text(*states)))
        for names, state in zip(one.asked, states, strict=True):
            names |= state.asked
        if isinstance(found[0], Tensor):  # whoever scores refuses what is none
            one.features, one.device = _like(found[0], "meta"), found[0].device
        return found[0]

    def _take(self, one: _Pass, method: Method, trained: State, fixed: State) -> None:
        """Capture a pass over tensors of its own."""
        assert one.features is not None
        assert one.device is not None
        still = [
            {name: _copied(t) if name in names else _like(t, "meta") for name, t in state.items()}
            for names, state in zip(one.asked, (trained, fixed), strict=True)
        ]
        inputs = _chosen(one, *still)
        features = _like(one.features, one.device)

        def work() -> None:
            stored(features).copy_(stored(method.text(*still)))

        self._seize(one, work)
        one.inputs, one.features = inputs, features


class _Asked(dict[str, Tensor]):
    """Named tensors that note which of them are looked at; to ask for a name alone is no look."""

    def __init__(self, tensors: State) -> None:
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        found = super().__getitem__(name)
        self.asked.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        # of a class that says how it is iterated, {**state} and dict(state) take items one by one
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """Look at one tensor, if it is there."""
        if name in self:
            self.asked.add(name)
        return super().get(name, default)

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]  # dict has a kind of its own
        """Look at all of them."""
        return self.copy().items()

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        """Look at all of them."""
        return self.copy().values()

    def copy(self) -> State:
        """Look at all of them."""
        return {**self}

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()


def _chosen(one: _Pass, *states: State) -> list[Tensor]:
    """List what a pass looks at, in the order of the names."""
    return [
        state[name]
        for names, state in zip(one.asked, states, strict=True)
        for name in sorted(names)
    ]


def _like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return memory with the same strides, which decide by what kernels products are done."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides; what is repeated is in memory once."""
    twin = _like(tensor, tensor.device)
    stored(twin).copy_(stored(tensor))
    return twin


def _layout(tensors: State) -> tuple[Hashable, ...]:
    """Describe tensors: names, shapes, strides, dtypes and devices."""
    return tuple(
        (name, t.shape, t.stride(), t.dtype, t.device) for name, t in sorted(tensors.items())
    )


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


def _nowhere(settings: Settings, device: torch.device) -> list[str]:
    """Say why nothing of a run can be captured."""
    if settings.cuda_graphs == "off":
        return ["cuda_graphs is off"]
    if device.type != "cuda":
        return [f"the run is on {device}, not on a CUDA device"]
    return []


def against(settings: Settings, method: Method, device: torch.device) -> list[str]:
    """Say why no step of a run can be captured; an empty list if that shows in its steps."""
    nowhere = _nowhere(settings, device)
    if nowhere:
        return nowhere
    if settings.dp_unit == "image" and settings.dp_noise is not None:
        return ["the noise of dp_unit=image is drawn anew in every step"]
    return [] if method.trains else [f"{method.name} trains nothing"]


def against_text(settings: Settings, device: torch.device) -> list[str]:
    """Say why no text pass of an evaluation can be captured; an empty list if one may be."""
    nowhere = _nowhere(settings, device)
    if nowhere:
        return nowhere
    # a budget knows what the steps of a pool need, and that its trials hold no other graph
    return ["max_memory counts the graphs of steps alone"] if settings.max_memory else []


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
        raise _refusal(StepGraphs.what, reasons)
    return None if reasons else StepGraphs(CudaCapture(device), required=required)


def text_graphs(
    settings: Settings, device: torch.device, steps: StepGraphs | None = None
) -> TextGraphs | None:
    """Make what captures the text passes of a run's evaluations, None where none is captured.

    With the graphs of its steps, if there are any, they share a pool.
    """
    if against_text(settings, device):
        return None
    capture = CudaCapture(device) if steps is None else steps.capture
    return TextGraphs(capture, required=settings.cuda_graphs == "on")


def summary(
    settings: Settings,
    method: Method,
    device: torch.device,
    steps: StepGraphs | None,
    texts: TextGraphs | None,
) -> str:
    """Say in a sentence what of a run was replayed, and why the rest was not."""
    reasons = [
        against(settings, method, device) if steps is None else _unplayed(steps),
        against_text(settings, device) if texts is None else _unplayed(texts),
    ]
    if reasons[0] == reasons[1] and reasons[0]:
        return "; ".join(reasons[0])
    parts = []
    for what, why in zip(("steps", "text passes of evaluations"), reasons, strict=True):
        parts.append(
            f"{what} are not replayed: {'; '.join(why)}" if why else f"{what} are replayed"
        )
    return "; ".join(parts)


def _unplayed(graphs: _Graphs) -> list[str]:
    """Say why a run replayed nothing of a sort."""
    return graphs.reasons or ([] if graphs.captured else ["none came a third time"])


def _refusal(what: str, reasons: list[str]) -> NotSupported:
    return NotSupported(
        f"fastfpl.run: cuda_graphs must be auto or off where no {what} can be captured; got 'on', "
        "but " + "; ".join(reasons)
    )
