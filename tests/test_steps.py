"""No step of a local epoch waits for the device, and whatever moves to it moves ahead."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastfpl
import fastfpl.methods.base
import fastfpl.methods.fedapt
import fastfpl.methods.fedotp
import fastfpl.methods.fedtpg
from fastfpl.errors import NotConverged
from fastfpl.features import Features
from fastfpl.methods import METHODS, FedOTP, PromptFL
from fastfpl.methods.pool import refreshed
from fastfpl.ops import all_faces
from fastfpl.released import as_released
from fastfpl.training import cohort
from fastfpl.training.feeds import Feed
from fastfpl.training.gathering import stack
from fastfpl.training.steps import Cohort
from tests.worlds import GATE, NAMES, SIZES, TINY_RUN, World, small_clip

TRAINED = [name for name, kind in METHODS.items() if kind.trains]
OPTIONS = {
    "pfedmoap": GATE,
    # the second round is the second phase's first
    "fedapt-unsupervised": {"pseudo_rounds": 1},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def run(method, clip, cache, **more):
    options = {**OPTIONS.get(method, {}), **more.pop("options", {})}
    paired = {"augment": "views:2"} if METHODS[method].paired else {}
    settings = {**TINY_RUN, "rounds": 3, "options": options, **paired, **more}
    return fastfpl.run(method, model=clip, cache=cache, **settings)


class Waited(Exception):
    """An operation that would wait for a device."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result, or its shape, the host must see."""

    NAMES = (
        *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
        *("repeat_interleave", "histc", "argwhere"),
    )

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        packet = func.overloadpacket.__name__
        if func.namespace == "aten" and packet in self.NAMES:
            raise Waited(packet)
        if packet in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            for place in args[1]:
                if place is not None and place.dtype in (torch.bool, torch.uint8):
                    raise Waited("a mask as an index")
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Refuses methods that bring numbers to the host without an operation that could be seen."""

    METHODS = tuple(
        getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy", "__array__", "item")
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.METHODS:
            raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(monkeypatch):
    """Play every epoch under the mode; return the modes."""
    modes = []
    plain = cohort._play

    def watched(*arguments):
        with NoWaiting() as mode, NoReading():
            plain(*arguments)
        modes.append(mode)

    monkeypatch.setattr(cohort, "_play", watched)
    return modes


def compiled_transport():
    """Skip aloud where the one face of the CPU that reads no number of its tensors is absent."""
    face = next(f for f in all_faces()["transport_logits"] if f.name == "cpu")
    if face.missing():
        pytest.skip("; ".join(face.missing()))


@pytest.mark.parametrize("method", TRAINED)
def test_no_step_waits(method, clip, cache, no_waiting):
    if method == "fedotp":
        compiled_transport()
    run(method, clip, cache)
    assert len(no_waiting) >= 2 * 3
    assert all(mode.seen > 100 for mode in no_waiting)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("promptfl", {"augment": "views:2", "participation": 0.5}),
        ("promptfl", {"dtype": "bfloat16", "schedule": "cosine"}),
        ("fedapt", {"options": {"class_specific": False}}),
        ("fedpgp", {"options": {"mu": 0.0}}),
        ("pfedmoap", {"as_released": "all"}),
        ("promptfl", {"as_released": "shared-optimiser,fp16-context"}),
    ],
)
def test_no_step_waits_with_other_settings(method, more, clip, cache, no_waiting):
    run(method, clip.to(dtype=getattr(torch, more.get("dtype", "float32"))), cache, **more)
    assert no_waiting


WAITS = {
    "a number": lambda loss: loss * loss[0].item(),
    "a condition": lambda loss: loss * 2 if loss.max() > 0 else loss,
    "a list": lambda loss: loss * loss.tolist()[0],
    "a copy to the host": lambda loss: loss * float(loss.detach().cpu().sum().numpy()),
    "a mask": lambda loss: loss[loss > 0].sum().expand(len(loss)),
    "a masked write": lambda loss: (
        loss.clone().masked_fill(loss < 0, 0)
        + loss.detach().clone().index_put_((loss > 0,), loss.new_zeros(()))
    ),
    "a check": lambda loss: loss if loss.isfinite().all() else loss * 0,
    "places": lambda loss: loss * (loss > 0).nonzero().shape[0],
    "values": lambda loss: loss * loss.detach().unique().shape[0],
}


@pytest.mark.parametrize("what", WAITS)
def test_a_step_that_waits_is_seen(what, clip, cache, no_waiting, monkeypatch):
    plain = PromptFL.loss
    monkeypatch.setattr(PromptFL, "loss", lambda *a: WAITS[what](plain(*a)))
    with pytest.raises(Waited):
        run("promptfl", clip, cache)


# --- what moves to the device ---------------------------------------------------------------------

META = torch.device("meta")


class Crossing(TorchDispatchMode):
    """Watches tensors of the CPU meet those of another device, which here has no numbers at all."""

    def __init__(self):
        super().__init__()
        self.moves = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        sides = {"cpu": [], "meta": []}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                sides[value.device.type].append(value)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if sides["cpu"] and not sides["meta"] and any(t.device == META for t in made):
            assert func.overloadpacket.__name__ == "_to_copy", func
            assert kwargs.get("non_blocking"), "a copy that waits"
            self.moves.append(tuple(made[0].shape))
        elif sides["meta"]:
            # numbers by themselves travel with the launch
            assert all(t.dim() == 0 for t in sides["cpu"]), f"{func} takes a tensor of the CPU"
            assert all(t.device == META for t in made), f"{func} brings a tensor back"
        return out


def encode_stub(tower, layout, ctx, *, class_specific=False):
    """Features of the right shape: as many classes as there are, D numbers each."""
    mean = ctx.mean(dim=-2)[..., : tower.dim]
    return mean if class_specific else mean[..., None, :].expand(*mean.shape[:-1], len(NAMES), -1)


def transport_stub(patches, prompts, *, info, **options):
    logits = torch.einsum("ubpd,ucnd->ubc", patches, prompts)
    return logits, SimpleNamespace(residual=logits.detach())


def numberless(method, federation, round_):
    """A cohort on a device without numbers, about to train, and its feed."""
    members = [0, 1, 2, 3]
    server = federation.server
    down = stack([method.download(server, c, round_) for c in members])
    trained, fixed = method.start(down, {}, training=True)
    dim, kind = method.task.classes.tower.dim, type(method).image_kind
    shape = (sum(SIZES), 4, dim) if kind == "patches" else (sum(SIZES), dim)
    views = [Features(np.ones(shape, np.float32), torch.float32) for _ in range(2)]
    split = SimpleNamespace(
        labels=np.zeros(shape[0], np.int64), domains=np.zeros(shape[0], np.int64)
    )
    strong = views if type(method).paired else None
    rows = np.arange(shape[0])
    feed = Feed(META, split, rows, views[:1] if strong else views, strong)
    trained, fixed = ({k: v.to(META) for k, v in s.items()} for s in (trained, fixed))
    if method.surveys(fixed):
        classes = len(NAMES)
        fixed["bank.features"] = torch.ones(4, max(SIZES), dim, device=META)
        fixed["bank.scores"] = torch.ones(4, max(SIZES), classes, device=META)
    if hasattr(method, "keys"):
        method.keys = method.keys.to(META)
    return Cohort(method, trained, fixed, 0.9, 0.1), feed, members


@pytest.mark.parametrize("round_", [0, 20])
@pytest.mark.parametrize("method", TRAINED)
def test_what_an_epoch_moves_is_moved_ahead(method, round_, monkeypatch):
    for module in ("base", "fedapt", "fedtpg"):
        monkeypatch.setattr(getattr(fastfpl.methods, module), "encode_text", encode_stub)
    monkeypatch.setattr(fastfpl.methods.fedotp, "transport_logits", transport_stub)
    options = {**OPTIONS.get(method, {}), **({"heads": 2} if method == "fedtpg" else {})}
    if method == "pfedmoap":
        options |= {"gate_width": 8}
    federation = World(method, options=options).federation()
    if "pool_round" in federation.server:
        uploads = {c: {"ctx": federation.server["ctx"]} for c in range(len(SIZES))}
        federation.server.update(refreshed(federation.server, uploads, {"pool_round": 0}))
    body, feed, members = numberless(federation.method, federation, round_)
    images = {c: np.arange(sum(SIZES[:c]), sum(SIZES[: c + 1])) for c in members}
    members = sorted(members, key=lambda c: -SIZES[c])
    counts = [SIZES[c] for c in members]
    plan = cohort._plan_epoch(
        members, counts, federation.settings, ("order", 0), 0, random=feed.random
    )
    steps = [max(1, n // federation.settings.batch_size) for n in counts]
    with Crossing() as crossing:
        body.begin(dict.fromkeys(body.trained, 0.5))
        cohort._play(
            body.step, cohort._batches(feed, members, images, plan, steps), lambda done: None
        )
    # labels, domains, positions and masks of the epoch at once; then only images
    epoch = (max(steps), len(members), federation.settings.batch_size)
    assert crossing.moves[:4] == [epoch] * 4
    sides = 2 if type(federation.method).paired else 1
    assert len(crossing.moves) == 4 + sides * max(steps)
    live = [sum(step < n for n in steps) for step in range(max(steps))]
    batch = federation.settings.batch_size
    assert [shape[0] for shape in crossing.moves[4::sides]] == [n * batch for n in live]
    assert live[0] > live[-1]


def test_a_copy_that_waits_is_seen(monkeypatch):
    for module in ("base", "fedapt", "fedtpg"):
        monkeypatch.setattr(getattr(fastfpl.methods, module), "encode_text", encode_stub)
    for spoil, sentence in (
        (lambda loss: loss * torch.ones(len(loss)).to(loss.device), "a copy that waits"),
        (lambda loss: loss[torch.arange(len(loss))], "takes a tensor of the CPU"),
    ):
        plain = PromptFL.loss
        monkeypatch.setattr(PromptFL, "loss", lambda *a, s=spoil, p=plain: s(p(*a)))
        federation = World("promptfl").federation()
        body, feed, members = numberless(federation.method, federation, 0)
        batch = next(
            cohort._batches(
                feed,
                members,
                {c: np.arange(3) for c in members},
                cohort._plan_epoch(members, [3] * 4, federation.settings, ("a",), 0, feed.random),
                [1] * 4,
            )
        )
        with pytest.raises(AssertionError, match=sentence), Crossing():
            body.step(*batch)
        monkeypatch.setattr(PromptFL, "loss", plain)


# --- what is read when the epoch has ended --------------------------------------------------------


def test_transport_that_does_not_end_names_client_and_problem(clip, cache, no_waiting):
    compiled_transport()
    with pytest.raises(NotConverged) as error:
        run("fedotp", clip, cache, options={"max_iter": 1})
    sentence = str(error.value)
    assert sentence.startswith(
        "fastfpl.run: transport must end below tol=0.001 after at most 1 iterations; got a residual"
    )
    assert "for training image " in sentence
    assert " of client 3 in round 0, epoch 0; raise max_iter, eps or tol" in sentence
    assert len(no_waiting) == 1  # the epoch went on to its end


def test_the_furthest_residual_is_found():
    federation = World("promptfl").federation()
    method = federation.method
    body = Cohort(method, {"ctx": torch.zeros(3, 2, 4)}, {}, 0.0, 0.0)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    positions = torch.tensor([[7, 5], [2, 0], [1, 4]])
    batch = SimpleNamespace(mask=mask, positions=positions)
    first = torch.zeros(3, 2, 6)
    first[0, 1, 4] = 0.5
    first[1, 1, 2] = 9.0  # nothing stands there
    first[1, 0, 3] = 0.1
    body._note(3, first, batch)
    second = torch.zeros(2, 2, 6)
    second[0, 0, 1] = 0.4
    second[1, 0, 5] = torch.nan
    body._note(2, second, SimpleNamespace(mask=mask[:2], positions=positions[:2]))
    assert body.beyond(0.01) == [(0, 0.5, 5, 4), (1, float("inf"), 2, 5)]
    assert body.beyond(0.5) == [(1, float("inf"), 2, 5)]  # what is at its tolerance has ended
    body.begin({"ctx": 1.0})
    assert body.beyond(0.01) == []


def test_the_batch_stop_waits_for_no_device(monkeypatch):
    """The quirk's loop goes on where asking whether it is done would wait."""
    monkeypatch.setattr(fastfpl.methods.base, "encode_text", encode_stub)
    federation = World("fedotp", options={"max_iter": 7}).federation()
    kind = as_released(FedOTP, ["fedotp-batch-stop"])
    method = kind(federation.method.task, {"max_iter": 7})
    body, feed, members = numberless(method, federation, 0)
    plan = cohort._plan_epoch(members, [3] * 4, federation.settings, ("a",), 0, feed.random)
    images = {c: np.arange(3) for c in members}
    with Crossing():
        for live, batch in cohort._batches(feed, members, images, plan, [1] * 4):
            body.step(live, batch)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", TRAINED)
def test_no_step_waits_for_a_gpu(method, clip, cache, monkeypatch):
    on_gpu = clip.to("cuda")
    run(method, on_gpu, cache, cuda_graphs="off", rounds=1)  # loads kernels and workspaces
    plain = cohort._play
    watched = []

    def strict(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            plain(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.append(True)

    monkeypatch.setattr(cohort, "_play", strict)
    faces = run(method, on_gpu, cache, cuda_graphs="off", rounds=1, **waits_not(method)).faces
    assert watched, faces


def waits_not(method):
    """Skip aloud where no face of the transport answers on a GPU without waiting."""
    free = [
        f for f in all_faces()["transport_logits"] if f.name in ("cuda", "triton") and not f.waits
    ]
    if method == "fedotp" and not free:
        pytest.skip("no face of transport_logits answers on a GPU without reading its numbers")
    return {}
