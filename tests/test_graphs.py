"""Replayed work is the work: captured on the CPU by a stand-in, and on a GPU by CUDA itself."""

import gc
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastfpl
import fastfpl.training.graphs as graphs
from fastfpl.config import make_settings
from fastfpl.errors import InputError, NotSupported
from fastfpl.federation import preparation
from fastfpl.methods import METHODS, PromptFL
from fastfpl.ops import all_faces, attention, embedded, launch, text, tower
from fastfpl.ops.faces import face, recorded_faces
from fastfpl.ops.lifetime import kept
from fastfpl.prompts import ClassPrompts
from fastfpl.training.gathering import stack
from fastfpl.training.graphs import (
    CudaCapture,
    StepGraphs,
    TextGraphs,
    against_text,
    summary,
    text_graphs,
)
from fastfpl.training.scoring import score
from fastfpl.training.steps import Cohort, stored
from tests.test_fedapt_unsupervised import PairedWorld
from tests.test_federation import OPTIONS, SELECTED, assert_same_state, play
from tests.worlds import GATE, NAMES, TINY_RUN, World, drawn, small_clip

ALL = pytest.mark.parametrize("method", [*OPTIONS, "fedapt-unsupervised"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seen_by_the_stand_in(request):
    """Compute with torch's operations: the stand-in sees nothing of what C++ writes."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    with face("torch", "encode_text", "gate_experts"):
        yield


class Tape(TorchDispatchMode):
    """Writes down every operation with its tensors; plays them again at the same addresses."""

    def __init__(self):
        super().__init__()
        self.lines = []
        self.before = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = func(*args, **kwargs)
        self.lines.append((func, args, kwargs, out))
        return out

    def undo(self):
        """Leave the tensors as they were: a capture does nothing."""
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)
        self.before = []

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.lines:
            again = func(*args, **kwargs)
            if any(r.alias_info is not None for r in func._schema.returns):
                continue  # a view of what is there, or what was written into
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class StandIn:
    """Captures as CUDA does: nothing is done then, and addresses are kept."""

    def __init__(self):
        self.asides = 0
        self.captures = 0
        self.replays = 0

    def aside(self, work):
        self.asides += 1
        work()

    def capture(self, work):
        self.captures += 1
        with Tape() as tape:
            work()
        tape.undo()

        def replay():
            self.replays += 1
            tape.replay()

        return replay


def world_of(method, **settings):
    settings = {"schedule": "cosine", "local_epochs": 3, **settings}
    if method == "fedapt-unsupervised":
        return PairedWorld(torch.float32, **settings)
    return World(method, options=OPTIONS[method], settings=settings)


def rounds_of(world, capture=None, rounds=4, *, texts=None):
    federation = world.federation()
    if capture is not None:
        federation.trainer.graphs = StepGraphs(capture)
    federation.trainer.texts = texts
    return play(federation, rounds, SELECTED)


@ALL
def test_replayed_steps_and_evaluations_are_what_they_are(method):
    capture = StandIn()
    texts = TextGraphs(capture)
    # cohorts of two and one
    world = world_of(method, cohort=2)
    federation = rounds_of(world, capture, texts=texts)
    assert_same_state(rounds_of(world), federation)
    assert capture.captures == federation.trainer.graphs.captured + texts.captured
    assert federation.trainer.graphs.captured > 0
    assert texts.captured > 0
    assert capture.captures < capture.replays
    # two steps of every shape ran as they are
    assert capture.asides >= 2 * capture.captures


def test_a_shape_is_captured_when_it_comes_the_third_time():
    capture = StandIn()
    federation = world_of("promptfl").federation()
    federation.trainer.graphs = StepGraphs(capture)
    # client 3 takes three steps an epoch, client 2 two, clients 0 and 1 one
    seen = []
    for members, counts in (
        ([3], (2, 1, 7)),  # nine steps of one shape
        ([3], (0, 0, 9)),  # the same again: replayed from the first on
        ([0, 3], (4, 2, 12)),  # three of two clients, six of one of the two, whose cohort is new
        ([0, 3], (0, 0, 9)),
    ):
        before = capture.asides, capture.captures, capture.replays
        federation.sampling.sample = lambda round_, members=members: members
        federation.round()
        after = capture.asides, capture.captures, capture.replays
        seen.append((tuple(b - a for a, b in zip(before, after, strict=True)), counts))
    (one, _), (two, _), (three, _), (four, _) = seen
    assert one == (2, 1, 7)
    assert two == (0, 0, 9)
    assert three == (4, 2, 5)
    assert four == (0, 0, 9)


def test_the_stand_in_sees_a_number_that_was_captured(monkeypatch):
    """A step that reads what changes beside its arguments is not the step when it is replayed."""
    plain = PromptFL.loss

    def counting(self, text, trained, fixed, batch):
        self.count = getattr(self, "count", 0) + 1
        return plain(self, text, trained, fixed, batch) * self.count

    monkeypatch.setattr(PromptFL, "loss", counting)
    world = world_of("promptfl")
    one, other = rounds_of(world), rounds_of(world, StandIn())
    assert not torch.equal(one.server["ctx"], other.server["ctx"])


def test_the_stand_in_sees_a_rate_that_was_captured(monkeypatch):
    monkeypatch.setattr(
        "fastfpl.training.steps.CohortSGD.scale",
        lambda self, scales: self._rates.update(
            {n: torch.tensor(self._base[n] * s) for n, s in scales.items()}
        ),
    )
    world = world_of("promptfl")
    one, other = rounds_of(world), rounds_of(world, StandIn())
    assert not torch.equal(one.server["ctx"], other.server["ctx"])


def test_the_stand_in_sees_tensors_that_were_left_behind(monkeypatch):
    monkeypatch.setattr(Cohort, "take", lambda self, other: None)
    world = world_of("promptfl")
    one, other = rounds_of(world), rounds_of(world, StandIn())
    assert not torch.equal(one.server["ctx"], other.server["ctx"])


def test_few_signatures_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "_SIGNATURES", 1)
    capture = StandIn()
    # pFedMoAP's cohorts come with and without experts, so that they drive each other out
    world = world_of("pfedmoap")
    assert_same_state(rounds_of(world), rounds_of(world, capture))
    assert capture.captures > 0


def test_few_graphs_of_a_signature_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "_GRAPHS", 1)
    capture = StandIn()
    world = world_of("promptfl")
    assert_same_state(rounds_of(world), rounds_of(world, capture))
    assert capture.captures == 2  # one for cohorts of three, one for those of two


def test_what_is_constant_and_repeated_is_kept_once():
    """FedPGP hands the reference features to every client as one tensor, expanded."""
    federation = world_of("fedpgp").federation()
    method = federation.method
    down = {"ctx": drawn(5, 3, 32, seed=1, dtype=torch.float32)}
    trained, fixed = method.start(down, {}, training=True)
    twin = Cohort(method, trained, fixed, 0.9, 0.0).still()
    assert twin.fixed["reference"].stride(0) == 0
    assert twin.fixed["reference"].untyped_storage().nbytes() * 5 == twin.fixed["reference"].nbytes
    assert twin.fixed["reference"].data_ptr() != fixed["reference"].data_ptr()
    changed = {"reference": torch.ones(1, *fixed["reference"].shape[1:]).expand(5, -1, -1)}
    twin.take(Cohort(method, trained, changed, 0.9, 0.0))
    assert bool((twin.fixed["reference"] == 1).all())


def test_a_replayed_step_names_its_faces():
    federation = world_of("pfedmoap").federation()
    federation.trainer.graphs = StepGraphs(StandIn())
    federation.trainer.settings = federation.settings.model_copy(update={"evaluate_every": 100})
    federation.sampling.sample = lambda round_: [0, 1, 3]
    for _ in range(3):
        federation.round()
    capture = federation.trainer.graphs.capture
    before = capture.asides
    with recorded_faces() as faces:
        federation.round()
    assert capture.asides == before  # replayed throughout
    assert faces == {"encode_text": {"torch"}, "gate_experts": {"torch"}}


# --- text passes of evaluations -------------------------------------------------------------------

# a class list that is not the trained one has contexts of its own in FedAPT
PASSES = [*METHODS, "fedapt, other classes"]


def pass_of(name, rows=2):
    """Return a method, and ``states(k)``: what an evaluation gives its text pass."""
    name, *other = name.split(", ")
    method = World(name, options=OPTIONS.get(name, {})).federation().method
    if other:
        method = method.on(ClassPrompts(method.task.classes._clip, NAMES[3:0:-1]))
    down = stack([method.download(method.server_init(), 0, 0)] * rows)
    own = {}
    if name == "pfedmoap":
        experts = drawn(rows, 2, *down["ctx"].shape[1:], seed=9, dtype=torch.float32)
        who = torch.arange(1, 1 + 2 * rows).view(rows, 2)
        down |= {"experts": experts, "expert_owner": who, "expert_round": torch.zeros_like(who)}
        own = {
            f"gate.{n}": torch.stack([t] * rows) for n, t in method._common_gate().tensors().items()
        }
    sides = method.start(down, own, training=False)

    def moved(tensor, k):
        there = stored(tensor)
        noise = drawn(*there.shape, seed=50 + k, dtype=torch.float32)
        return (there + 0.1 * noise).expand(tensor.shape)

    return method, lambda k: [{n: moved(t, k) for n, t in side.items()} for side in sides]


@pytest.mark.parametrize("name", PASSES)
def test_a_replayed_text_pass_is_the_pass(name):
    method, states = pass_of(name)
    capture = StandIn()
    texts, seen = TextGraphs(capture), []
    given = [states(k) for k in range(5)]
    for k in range(5):
        with torch.no_grad():
            seen.append((texts.text(method, *given[k]), method.text(*given[k])))
        # the third time is captured, and replayed as all that follow
        assert (capture.asides, capture.captures, capture.replays) == (
            min(k + 1, 2),
            int(k > 1),
            max(k - 1, 0),
        )
    # nobody wrote into what was handed out before, or into what was given
    for k, sides in enumerate(given):
        for side, again in zip(sides, states(k), strict=True):
            assert all(torch.equal(side[name], again[name]) for name in again)
    for found, exact in seen:
        assert torch.equal(found, exact)
        assert found.stride() == exact.stride()
    assert not torch.equal(seen[2][0], seen[3][0])


class Sees(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# numbers of the host become a tensor, numbers of a tensor come to the host, or decide about a shape
FORBIDDEN = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


@pytest.mark.parametrize("name", PASSES)
def test_no_text_pass_does_what_no_capture_may(name):
    method, states = pass_of(name)
    with torch.no_grad():
        method.text(*states(0))  # fills caches
        with Sees() as sees:
            method.text(*states(1))
    assert len(sees.names) > 5
    assert not sees.names & FORBIDDEN


@pytest.mark.interpreted
@pytest.mark.skipif(bool(launch.missing()), reason="no Triton")
@pytest.mark.parametrize("name", ["fedotp", "fedapt, other classes"])
def test_no_text_pass_by_kernels_does_what_no_capture_may(name):
    from tests.counts import Counts, _noted

    method, states = pass_of(name)
    counts = Counts()
    with torch.no_grad(), face("triton", "encode_text"), _noted(counts):
        method.text(*states(0))
        with Sees() as sees:
            method.text(*states(1))
    assert counts.triton > 10
    assert not sees.names & FORBIDDEN


@pytest.mark.parametrize(
    ("name", "copied"),
    [("promptfl", 1), ("pfedmoap", 1), ("fedotp", 2), ("fedpgp", 3), ("fedapt", 1), ("fedtpg", 20)],
)
def test_what_a_replayed_pass_launches_beside_its_graph(name, copied):
    """One copy of what the pass looks at, and one of what is handed out."""
    from tests.counts import Counts, _Operators

    method, states = pass_of(name)
    capture = Remembers()
    texts = TextGraphs(capture)
    for k in range(3):
        texts.text(method, *states(k))
    given, counts = states(3), Counts()
    with _Operators(counts):
        found = texts.text(method, *given)
    assert (counts.triton, counts.products, counts.torch) == (0, 0, 2)
    (one,) = texts._passes.values()
    assert len(one.inputs) == copied
    read = sum(stored(t).nbytes for t in one.inputs)
    assert counts.bytes == 2 * (read + found.nbytes)


def test_a_graph_has_none_of_what_a_pass_does_not_look_at():
    method, states = pass_of("pfedmoap")
    texts = TextGraphs(StandIn())
    for k in range(3):
        trained, fixed = states(k)
        texts.text(method, trained, fixed)
    assert set(fixed) == {"experts"}
    assert len(trained) == 9
    (one,) = texts._passes.values()
    assert one.asked == ({"ctx"}, set())
    assert [t.shape for t in one.inputs] == [trained["ctx"].shape]


@pytest.mark.parametrize(
    "look",
    [
        lambda state: state["own"],
        lambda state: state.get("own"),
        lambda state: dict(state)["own"],
        lambda state: {**state, "more": 0}["own"],
        lambda state: (state | {"more": 0})["own"],
        lambda state: ({"more": 0} | state)["own"],
        lambda state: state.copy()["own"],
        lambda state: next(t for n, t in state.items() if n == "own"),
        lambda state: max(state.values(), key=torch.Tensor.numel),
    ],
)
def test_every_look_at_a_tensor_is_seen(look):
    class Looks(PromptFL):
        def text(self, trained, fixed):
            assert "own" in fixed
            assert list(fixed) == ["small", "own"]
            return super().text(trained, fixed) + look(fixed)

    method = World("promptfl").federation().method
    method.__class__ = Looks
    capture = StandIn()
    texts = TextGraphs(capture)
    with torch.no_grad():
        for k in range(4):
            trained = {"ctx": drawn(1, 3, 32, seed=k, dtype=torch.float32)}
            fixed = {"small": torch.ones(1), "own": torch.full((1, 1, 16), float(k))}
            assert torch.equal(texts.text(method, trained, fixed), method.text(trained, fixed))
    assert capture.replays == 2


def test_a_pass_that_asks_for_more_when_it_is_captured_is_not_captured():
    class Later(PromptFL):
        passes = 0

        def text(self, trained, fixed):
            self.passes += 1
            found = super().text(trained, fixed)
            return found if self.passes < 3 else found + fixed["later"]

    method = World("promptfl").federation().method
    method.__class__ = Later
    texts = TextGraphs(StandIn())
    ctx, later = drawn(1, 3, 32, seed=1, dtype=torch.float32), torch.ones(1)
    found = [texts.text(method, {"ctx": ctx}, {"later": later}) for _ in range(4)]
    assert torch.equal(found[2], found[0] + 1)
    assert torch.equal(found[3], found[2])
    assert texts.captured == 0
    assert "capturing a text pass failed: " in texts.reasons[0]


def test_few_text_passes_are_known(monkeypatch):
    monkeypatch.setattr(graphs, "_TEXTS", 2)
    capture = StandIn()
    texts = TextGraphs(capture)
    method, states = pass_of("local")
    whole = states(0)[0]["ctx"]
    with torch.no_grad():
        for rows in (1, 2, 1, 2, 1, 2, 1):  # both are captured
            given = {"ctx": whole[:rows].clone()}
            assert torch.equal(texts.text(method, given, {}), method.text(given, {}))
        assert capture.captures == 2
        for rows in (3, 4, 3, 4, 5):  # and driven out by others
            given = {"ctx": whole[:1].repeat(rows, 1, 1)}
            assert torch.equal(texts.text(method, given, {}), method.text(given, {}))
    assert capture.captures == 2
    assert len(texts._passes) == 2


def test_a_method_of_the_same_kind_has_graphs_of_its_own():
    capture = StandIn()
    texts = TextGraphs(capture)
    (one, states), (other, _) = (pass_of("fedapt") for _ in range(2))
    other.keys = other.keys + 1
    with torch.no_grad():
        for k in range(4):
            for method in (one, other):
                assert torch.equal(texts.text(method, *states(k)), method.text(*states(k)))
    assert capture.captures == 2


def test_a_replayed_text_pass_names_its_faces():
    method, states = pass_of("promptfl")
    texts = TextGraphs(StandIn())
    for k in range(4):
        with recorded_faces() as faces:
            texts.text(method, *states(k))
        assert faces == {"encode_text": {"torch"}}


def test_a_trial_captures_nothing():
    federation = world_of("promptfl").federation()
    (exam,) = federation.examiner.exams
    capture = StandIn()
    texts, down = TextGraphs(capture), stack([federation.now.download(federation.method, 0)])
    images = dict(enumerate(exam.images))
    for _ in range(4):
        score(exam.method, [0, 1], down, {}, exam.feed, images, texts=texts, trial=True)
    assert capture.asides == capture.captures == 0


def on_a_card(**settings):
    """What is said of a run with these settings, as if it were on a card."""
    made = make_settings({"method": "promptfl", **settings})
    return made, torch.device("cuda")


def test_text_passes_share_the_capture_of_the_steps():
    settings, device = on_a_card(cuda_graphs="on")
    steps = StepGraphs(StandIn())
    texts = text_graphs(settings, device, steps)
    assert texts.capture is steps.capture
    texts.capture = Fails(RuntimeError("no"))
    method, states = pass_of("promptfl")
    for k in range(2):
        texts.text(method, *states(k))
    with pytest.raises(NotSupported, match="where no text pass can be captured; got 'on', but"):
        texts.text(method, *states(2))


def test_within_a_budget_evaluations_are_as_they_are():
    settings, device = on_a_card(max_memory="8GiB", cuda_graphs="on")
    assert text_graphs(settings, device, StepGraphs(StandIn())) is None
    assert against_text(settings, device) == ["max_memory counts the graphs of steps alone"]


def test_what_is_said_of_a_run():
    _, device = on_a_card()
    method = World("promptfl").federation().method
    steps, texts = StepGraphs(StandIn()), TextGraphs(StandIn())

    def said(*graphs, **more):
        return summary(*on_a_card(**more)[:1], method, device, *graphs)

    assert said(steps, texts) == "none came a third time"
    steps.captured = 1
    assert said(steps, texts) == (
        "steps are replayed; text passes of evaluations are not replayed: none came a third time"
    )
    texts.captured = 1
    assert said(steps, texts) == "steps are replayed; text passes of evaluations are replayed"
    assert said(steps, None, max_memory="8GiB") == (
        "steps are replayed; text passes of evaluations are not replayed: max_memory counts the "
        "graphs of steps alone"
    )
    steps.give_up("a sentence")
    assert said(steps, texts) == (
        "steps are not replayed: a sentence; text passes of evaluations are replayed"
    )
    assert said(None, None, cuda_graphs="off") == "cuda_graphs is off"


# --- where nothing can be captured ----------------------------------------------------------------


@pytest.fixture
def waiting(monkeypatch):
    """Let the face that encodes texts be one that waits."""
    faces = {op: tuple(replace(f, waits=True) for f in all_) for op, all_ in all_faces().items()}
    monkeypatch.setattr(graphs, "all_faces", lambda: faces)


def test_a_face_that_waits_is_not_captured(waiting):
    capture = StandIn()
    world = world_of("promptfl")
    federation = rounds_of(world, capture)
    assert (capture.captures, capture.replays, capture.asides) == (0, 0, 1)
    assert federation.trainer.graphs.reasons == [
        "the face 'torch' of encode_text waits for the device"
    ]
    assert_same_state(rounds_of(world), federation)


def test_a_text_pass_whose_face_waits_is_not_captured(waiting):
    capture = StandIn()
    texts = TextGraphs(capture)
    method, states = pass_of("promptfl")
    for k in range(4):
        texts.text(method, *states(k))
    assert (capture.asides, capture.captures) == (1, 0)
    assert texts.reasons == ["the face 'torch' of encode_text waits for the device"]
    with pytest.raises(NotSupported, match="no text pass can be captured; got 'on', but the face"):
        TextGraphs(capture, required=True).text(method, *states(0))


def test_a_face_that_waits_is_refused_if_graphs_must_be(waiting):
    federation = world_of("promptfl").federation()
    federation.trainer.graphs = StepGraphs(StandIn(), required=True)
    sentence = r"must be auto or off .* got 'on', but the face 'torch' of encode_text waits"
    with pytest.raises(NotSupported, match=sentence):
        federation.round()


def test_which_faces_wait():
    waits = {(op, f.name) for op, faces in all_faces().items() for f in faces if f.waits}
    assert waits >= {
        ("transport_plan", "reference"),
        ("transport_logits", "reference"),
        ("transport_logits", "torch"),
    }
    assert not any(op in ("encode_text", "gate_experts") for op, _ in waits)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def test_graphs_that_must_be_are_refused_on_the_cpu(clip, cache):
    sentence = r"cuda_graphs must be auto or off .*; got 'on', but the run is on cpu, not on a CUDA"
    with pytest.raises(NotSupported, match=sentence):
        fastfpl.run("promptfl", model=clip, cache=cache, cuda_graphs="on", **TINY_RUN)
    # in a comparison all methods have the same settings; where there is no step, none is refused
    fastfpl.run("zeroshot", model=clip, cache=cache, cuda_graphs="on", **TINY_RUN)
    with pytest.raises(InputError, match="cuda_graphs is refused"):
        fastfpl.run("promptfl", model=clip, cuda_graphs="maybe", **TINY_RUN)


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ("auto", "auto", "the run is on cpu, not on a CUDA device"),
        (False, "off", "cuda_graphs is off"),  # as YAML reads off
    ],
)
def test_a_result_says_why_nothing_was_replayed(clip, cache, given, kept, said):
    small = {**TINY_RUN, "rounds": 1, "local_epochs": 1}
    result = fastfpl.run("promptfl", model=clip, cache=cache, cuda_graphs=given, **small)
    assert result.settings["cuda_graphs"] == kept
    assert result.environment["cuda_graphs"] == said


def test_a_run_replays_its_evaluations_and_says_so(clip, cache, monkeypatch):
    made = TextGraphs(StandIn())
    monkeypatch.setattr(preparation, "text_graphs", lambda *_: made)
    small = {**TINY_RUN, "rounds": 3, "local_epochs": 1}
    result = fastfpl.run("local", model=clip, cache=cache, **small)
    assert made.captured == made.capture.replays == 1  # in the third round
    assert result.environment["cuda_graphs"] == (
        "steps are not replayed: the run is on cpu, not on a CUDA device; text passes of "
        "evaluations are replayed"
    )


# --- on a GPU -------------------------------------------------------------------------------------


def tiny(method, **more):
    options = {"pfedmoap": GATE, "fedapt-unsupervised": {"pseudo_rounds": 1}}.get(method, {})
    paired = {"augment": "views:1"} if METHODS[method].paired else {}
    return {**TINY_RUN, "rounds": 3, "schedule": "cosine", "options": options, **paired, **more}


@pytest.mark.gpu
@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.trains])
def test_replayed_runs_are_the_runs_on_a_gpu(method, clip, cache):
    on_gpu = clip.to("cuda")
    runs = {
        mode: fastfpl.run(method, model=on_gpu, cache=cache, cuda_graphs=mode, **tiny(method))
        for mode in ("off", "auto")
    }
    for one, other in zip(runs["off"].rounds, runs["auto"].rounds, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["clients"] == pytest.approx(one["clients"], abs=0.02)
    assert runs["off"].environment["cuda_graphs"] == "cuda_graphs is off"
    assert runs["off"].faces == runs["auto"].faces
    waits = method == "fedotp" and "torch" in runs["auto"].faces["transport_logits"]
    said = runs["auto"].environment["cuda_graphs"]
    assert said.startswith("steps are replayed") != waits
    # pFedMoAP's cohorts have experts from the second round on: another kind
    assert said.endswith("evaluations are replayed") or method == "pfedmoap"


@pytest.mark.gpu
@pytest.mark.parametrize("name", PASSES)
def test_a_replayed_text_pass_is_the_pass_on_a_gpu(name):
    """Bit for bit: the same kernels over the same strides."""
    device = torch.device("cuda", 0)
    method, states = pass_of(name)
    method.task.classes.tower = method.task.classes.tower.to(device, torch.float32)
    method.task.classes._layouts.clear()
    if hasattr(method, "keys"):
        method.keys = method.keys.to(device)
        method._places = None if method._places is None else method._places.to(device)
    capture = CudaCapture(device)
    texts, seen = TextGraphs(capture, required=True), []
    for k in range(6):
        given = [{n: t.to(device) for n, t in side.items()} for side in states(k)]
        with torch.no_grad():
            seen.append((texts.text(method, *given), method.text(*given)))
        del given
    assert texts.captured == 1
    assert all(torch.equal(found, exact) for found, exact in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["promptfl", "pfedmoap", "fedapt-unsupervised"])
def test_captures_change_nothing_on_a_gpu(method):
    """The same law as with the stand-in: a capture is no step, and a replay is one."""
    one = gpu_rounds(method)
    other = gpu_rounds(method, CudaCapture(torch.device("cuda", 0)))
    assert_same_state(one, other, rtol=1e-4, atol=1e-6)


def gpu_rounds(method, capture=None):
    federation = world_of(method).federation()
    device = torch.device("cuda", 0)
    move_world(federation, device)
    if capture is not None:
        federation.trainer.graphs = StepGraphs(capture, required=True)
    return play(federation, 4, SELECTED)


def move_world(federation, device):
    """Put a world's tower, its features and what the server holds on a device."""
    method = federation.method
    classes = method.task.classes
    classes.tower = classes.tower.to(device, classes.tower.dtype)
    if hasattr(method, "keys"):
        method.keys = method.keys.to(device)
    federation.now = replace(federation.now, server=method.server_init())
    for feed in {
        id(f): f for f in (federation.trainer.feed, federation.examiner.exams[0].feed)
    }.values():
        kind = type(feed)

        class Moved(kind):
            def labels(self, indices):
                return super().labels(indices).to(device)

            def domains(self, indices):
                return super().domains(indices).to(device)

            def batch(self, indices, draws=None):
                return super().batch(indices, draws).to(device)

            def strong(self, indices, draws):
                return super().strong(indices, draws).to(device)

        feed.__class__ = Moved


class Fails(StandIn):
    """A capture that ends with an error: what was recorded is gone, and nothing was done."""

    def __init__(self, error, midway=False):
        super().__init__()
        self.error, self.midway = error, midway

    def capture(self, work):
        self.captures += 1
        with Tape() as tape:
            if self.midway:
                work()
        tape.undo()
        raise self.error


@pytest.mark.parametrize("midway", [False, True])
def test_a_capture_that_fails_leaves_a_run_without_graphs_and_a_reason(midway):
    error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    capture = Fails(error, midway)
    world = world_of("promptfl")
    federation = rounds_of(world, capture)
    assert (capture.captures, capture.replays) == (1, 0)
    assert federation.trainer.graphs.reasons == [
        "capturing a step failed: CUDA error: operation not permitted when stream is capturing"
    ]
    assert_same_state(rounds_of(world), federation)


def test_after_a_capture_that_broke_off_work_is_where_it_was(monkeypatch):
    """As torch has it: who leaves a capture that is invalid stays on its stream."""
    now = ["current"]

    class Broken:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            self.place = stream, pool
            places.append(self.place)

        def __enter__(self):
            now[0] = self.place[0]

        def __exit__(self, *_):
            raise RuntimeError("the capture was invalidated")

    places, counted = [], iter(range(9))
    for name, stand_in in (
        ("Stream", lambda device: f"stream {next(counted)}"),
        ("graph_pool_handle", lambda: f"pool {next(counted)}"),
        ("current_stream", lambda device: now[0]),
        ("set_stream", lambda stream: now.__setitem__(0, stream)),
        ("CUDAGraph", object),
        ("graph", Broken),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture = CudaCapture(torch.device("cuda"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="invalidated"):
            capture.capture(lambda: None)
        assert now == ["current"]
    assert places == [("stream 0", "pool 1"), ("stream 2", "pool 3")]


def test_a_text_pass_whose_capture_fails_leaves_a_run_with_replayed_steps_and_a_reason():
    texts, world = (
        TextGraphs(Fails(RuntimeError("no copies\nmore"), midway=True)),
        world_of("local"),
    )
    federation = rounds_of(world, StandIn(), texts=texts)
    assert texts.captured == len(texts._passes) == 0
    assert texts.reasons == ["capturing a text pass failed: no copies"]
    assert federation.trainer.graphs.captured > 0
    assert federation.trainer.graphs.reasons == []
    assert_same_state(rounds_of(world), federation)


def test_a_capture_that_fails_is_refused_if_graphs_must_be():
    federation = world_of("promptfl").federation()
    error = torch.OutOfMemoryError("CUDA out of memory")
    federation.trainer.graphs = StepGraphs(Fails(error), required=True)
    with pytest.raises(NotSupported, match="got 'on', but capturing a step failed: CUDA out of"):
        play(federation, 4)


def test_what_a_method_says_of_itself_is_no_failed_capture():
    federation = world_of("promptfl").federation()
    federation.trainer.graphs = StepGraphs(Fails(InputError("ctx must be finite")))
    with pytest.raises(InputError, match="ctx must be finite"):
        play(federation, 4)


# --- what a graph reads lives as long as the graph ------------------------------------------------


class Reads(TorchDispatchMode):
    """Notes the storages that operations and launches read without having made them."""

    def __init__(self):
        super().__init__()
        self.made = set()
        self.read = {}

    def see(self, found):
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.made:
                    self.read.setdefault(storage.data_ptr(), StorageWeakRef(storage))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.see((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self.made.update(
            t.untyped_storage().data_ptr()
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor) and not any(r.alias_info for r in func._schema.returns)
        )
        return out


class Remembers:
    """Captures nothing: a step that would be is played, and what it reads is noted."""

    def __init__(self):
        self.reads = []

    def aside(self, work):
        work()

    def capture(self, work):
        with Reads() as reads:
            work()
        self.reads.append([ref for ref in reads.read.values() if not ref.expired()])
        return lambda: None


@ALL
def test_what_a_graph_reads_lives_as_long_as_the_graph(method):
    federation = world_of(method, cohort=2).federation()
    capture = Remembers()
    federation.trainer.graphs = StepGraphs(capture)
    for _ in range(2):
        federation.round()
    assert capture.reads
    let_go()
    for read in capture.reads:
        assert len(read) > 3
        assert not any(ref.expired() for ref in read)


@pytest.mark.parametrize("name", PASSES)
def test_what_a_text_pass_reads_lives_as_long_as_its_graph(name):
    method, states = pass_of(name)
    capture = Remembers()
    texts = TextGraphs(capture)
    for k in range(3):
        texts.text(method, *states(k))
    let_go()
    (read,) = capture.reads
    assert len(read) > 3
    assert not any(ref.expired() for ref in read)
    assert texts.captured == 1


@pytest.mark.interpreted
@pytest.mark.skipif(bool(launch.missing()), reason="no Triton")
def test_what_launches_read_lives_as_long_as_it_is_kept():
    from triton.runtime.interpreter import GridExecutor

    from fastfpl.kernels.attention import prefix_attention_bwd, prefix_attention_fwd

    run = GridExecutor.__call__

    def seen(executor, *args, **kwargs):
        reads.see((args, kwargs))
        return run(executor, *args, **kwargs)

    qkv = torch.randn(1, 5, 3 * 16)
    let_go()
    with kept() as held, Reads() as reads, mock.patch.object(GridExecutor, "__call__", seen):
        mixed = prefix_attention_fwd(qkv, None, 2, (0, 1, 3), 1, None, False)
        prefix_attention_bwd(mixed, qkv, None, 2, (0, 1, 3), 1, None, False)
    let_go()
    given = {t.untyped_storage().data_ptr() for t in (qkv, mixed)}
    tables = [ref for at, ref in reads.read.items() if at not in given]
    assert len(tables) >= 2
    assert not any(ref.expired() for ref in tables)
    held.clear()
    assert all(ref.expired() for ref in tables)


def let_go():
    """Drop all that is cached, as other layouts would drive it out."""
    if not launch.missing():
        from fastfpl.kernels import attention as kernels

        kernels._tables.cache_clear()
    for cached in (attention._padding, embedded._packing):
        cached.cache_clear()
    for weak in (text._packings, text._parts, tower._constants, tower._lengths):
        weak.clear()
    gc.collect()
