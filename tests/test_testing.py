"""`check_method` passes the library's methods, and says what is wrong with others."""

import re

import pytest
import torch

import fastfpl
from fastfpl.errors import InputError, KindError, NotConverged
from fastfpl.methods import METHODS, Method, PromptFL
from fastfpl.methods.base import weighted_mean
from fastfpl.testing import check_method
from tests.worlds import TINY_RUN, World, small_clip

OPTIONS = {
    "pfedmoap": {"experts": 3, "gate_width": 16, "heads": 2},
    "fedapt-unsupervised": {"pseudo_rounds": 1},
}


@pytest.fixture(scope="module")
def clip():
    return small_clip().to(dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_the_library_s_methods_keep_the_contract(method, clip):
    check_method(METHODS[method], OPTIONS.get(method), clip=clip)


class Plain(PromptFL):
    """PromptFL that keeps nothing wrong; each planted method below changes one verb."""

    name = "planted"
    summary = "a method with a mistake"


class ScalarLoss(Plain):
    def loss(self, text, trained, fixed, batch):
        return super().loss(text, trained, fixed, batch).mean()


class ConstantLoss(Plain):
    def loss(self, text, trained, fixed, batch):
        return super().loss(text, trained, fixed, batch).detach()


class Idle(Plain):
    def start(self, down, own, *, training):
        trained, fixed = super().start(down, own, training=training)
        return {**trained, "bias": torch.zeros_like(down["ctx"])}, fixed


class MixedText(Plain):
    def text(self, trained, fixed):
        mean = trained["ctx"].mean(dim=0, keepdim=True)
        return super().text({"ctx": 0.5 * (trained["ctx"] + mean)}, fixed)


class MixedValues(Plain):
    """No gradient shows it: the mean is a constant."""

    def text(self, trained, fixed):
        mean = trained["ctx"].mean(dim=0, keepdim=True).detach()
        return super().text({"ctx": 0.5 * (trained["ctx"] + mean)}, fixed)


class MixedLoss(Plain):
    def loss(self, text, trained, fixed, batch):
        return super().loss(text, trained, fixed, batch).mean().expand(len(text))


class MixedFinish(Plain):
    def finish(self, trained, fixed, own):
        return {"ctx": trained["ctx"].mean(dim=0).expand_as(trained["ctx"])}, own


class LostClients(Plain):
    def text(self, trained, fixed):
        return super().text(trained, fixed)[0]


class LostInStart(Plain):
    def start(self, down, own, *, training):
        return {"ctx": down["ctx"][0]}, {}


class Renamed(Plain):
    def finish(self, trained, fixed, own):
        return {"context": trained["ctx"]}, own


class AsksForMore(Plain):
    def start(self, down, own, *, training):
        return {"ctx": down["context"]}, {}


class Ordered(Plain):
    def merge(self, server, uploads, images, round_):
        last = server["ctx"]
        for upload in uploads.values():
            last = upload["ctx"]
        return {"ctx": last}


class InPlace(Plain):
    def merge(self, server, uploads, images, round_):
        server["ctx"].copy_(weighted_mean(uploads, images, "ctx", server["ctx"]) + 1)
        return dict(server)


class Forgets(Plain):
    def merge(self, server, uploads, images, round_):
        return {"context": server["ctx"]}


class Random(Plain):
    def text(self, trained, fixed):
        return super().text({"ctx": trained["ctx"] + torch.randn_like(trained["ctx"])}, fixed)


class NotFinite(Plain):
    def finish(self, trained, fixed, own):
        return {"ctx": trained["ctx"] / 0}, own


class Pair(Plain):
    def start(self, down, own, *, training):
        return {"ctx": down["ctx"]}


class Flat(Plain):
    def logits(self, text, trained, fixed, image):
        return super().logits(text, trained, fixed, image).flatten(1)

    def loss(self, text, trained, fixed, batch):
        logits = PromptFL.logits(self, text, trained, fixed, batch.image)
        return logits.mean(dim=(-1, -2))


# what is planted, and what its sentence says; whether the engine finds it in the first round too
PLANTED = {
    ScalarLoss: (r"loss must return one mean a client, shape \(3,\); got shape \(\)", True),
    ConstantLoss: ("loss must depend on what is trained; got a constant", True),
    Idle: ("loss must depend on every tensor that start .*; got no gradient of 'bias'", True),
    MixedText: ("text must look at no other client of the cohort; got a gradient of", False),
    MixedValues: ("text must look at no other client .*; got another 'features' of", False),
    MixedLoss: ("loss must look at no other client of the cohort; got a gradient of", False),
    MixedFinish: ("finish must look at no other client .*; got another 'sent ctx'", False),
    LostClients: (r"text must keep the leading client dimension 3; got shape \(6, 32\)", True),
    LostInStart: (r"start must keep the leading client dimension 3 of 'ctx'; got", True),
    Renamed: (r"merge must ask for tensors that are there \(upload has context,.*got 'ctx'", True),
    AsksForMore: (
        r"start must ask for tensors that are there \(download has ctx,.*'context'",
        True,
    ),
    Ordered: ("merge must not depend on the order of uploads; got another 'ctx'", False),
    InPlace: ("merge must leave its arguments as they are; got another 'ctx'", False),
    Forgets: ("merge must return the tensors of the server, ctx; got context", True),
    Random: ("text must give the same for the same arguments; got another", False),
    NotFinite: ("finish must return finite numbers; got inf in 'sent ctx'", True),
    Pair: ("start must return a pair of states; got dict", True),
    Flat: (r"logits must return shape \(1, 4, 6\), \(U, B, C\); got shape \(1, 24\)", True),
}


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_a_planted_mistake_is_refused(kind, clip):
    with pytest.raises(InputError, match="^fastfpl.methods: planted's " + PLANTED[kind][0]):
        check_method(kind, clip=clip)


@pytest.mark.parametrize("kind", [k for k, (_, cheap) in PLANTED.items() if cheap])
def test_the_engine_refuses_what_shapes_and_names_show(kind, monkeypatch):
    monkeypatch.setitem(METHODS, "promptfl", kind)
    federation = World("promptfl").federation()
    verb = re.match(r"\w+", PLANTED[kind][0])[0]
    wanted = f"^fastfpl.methods: planted's {verb} must "
    if kind is NotFinite:
        wanted = "what is sent must stay finite, its squares too; got inf in 'ctx' of client 3"
    with pytest.raises((InputError, NotConverged), match=wanted):
        federation.round()
    assert federation.rounds == []


def test_attributes_are_looked_at(clip):
    for change, sentence in (
        ({"name": ""}, "Wrong's name must be a text; got ''"),
        ({"image_kind": "pixels"}, "planted's image_kind must be one of pooled, raw, patches"),
        ({"evaluates_download": "later"}, "planted's evaluates_download must be one of merged"),
        ({"scored_together": 0}, "planted's scored_together must be positive; got 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_method(type("Wrong", (Plain,), change), clip=clip)
    for wrong in ("promptfl", object):
        with pytest.raises(KindError, match="must be a subclass of Method; got"):
            check_method(wrong)
    with pytest.raises(InputError, match="rounds must be 2 or more; got 1"):
        check_method(Plain, clip=clip, rounds=1)
    assert issubclass(Plain, Method)


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_last_step_that_diverges_is_refused(lr, tmp_path):
    settings = {**TINY_RUN, "rounds": 1, "local_epochs": 1, "batch_size": 64, "lr": lr}
    for method in ("promptfl", "local"):
        with pytest.raises(
            NotConverged,
            match=r"what is trained must stay finite, its squares too; got .* in 'ctx' of client 0 "
            r"in round 0, epoch 0; lower lr=1e\+3",
        ):
            fastfpl.run(method, model=small_clip(), cache=tmp_path, out=tmp_path / "o", **settings)
        assert not (tmp_path / "o").exists()


def test_what_is_merged_and_scored_is_finite(monkeypatch):
    class Torn(Plain):
        def merge(self, server, uploads, images, round_):
            return {"ctx": server["ctx"] * float("nan")}

    class Dark(Plain):
        def logits(self, text, trained, fixed, image):
            logits = super().logits(text, trained, fixed, image)
            return logits if torch.is_grad_enabled() else logits * float("nan")

    for kind, sentence in (
        (Torn, "what is merged must stay finite, .* got nan in 'ctx' of the server in round 0"),
        (Dark, "logits must be finite; got one that is not for client 0 in an evaluation"),
    ):
        monkeypatch.setitem(METHODS, "promptfl", kind)
        with pytest.raises(NotConverged, match=sentence):
            World("promptfl").federation().round()
