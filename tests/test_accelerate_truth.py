"""What was seen once is not taken for the rule: structures that change, and who looks at what."""

from __future__ import annotations

import copy
import enum
import functools
import random
import types

import numpy
import open_clip.model
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfpl
from fastfpl.dropin import outside
from fastfpl.errors import Differs, InputError
from tests.coop_style import Conditional, Encoder, Learner, Model, StackedLearner, Transport
from tests.families import make_open_clip
from tests.test_accelerate import COUNTS, assert_same, coop, how, images, openai_clip, step


def pair(encoder=Encoder, learner=Learner, **options) -> tuple[Model, Model]:
    clip = openai_clip()
    torch.manual_seed(1)
    literal = Model(clip, learner(clip, COUNTS, **options))
    literal.text_encoder = encoder(clip)
    return literal, fastfpl.accelerate(copy.deepcopy(literal))


def both(literal, model, change=lambda m: None) -> None:
    for other in (literal, model):
        change(other)
    assert_same(step(model, images()), step(literal, images()))


def reason_of(model) -> str:
    (left,) = [f for f in fastfpl.explain(model).left if f.path == "text_encoder"]
    return left.reason


# encoders that are a text pass only today


class Adapted(Encoder):
    def __init__(self, clip):
        super().__init__(clip)
        self.down = nn.Parameter(torch.randn(40, 4))
        self.up = nn.Parameter(torch.zeros(4, 40))

    def forward(self, prompts, tokenized_prompts):
        features = super().forward(prompts, tokenized_prompts)
        return features + features @ self.down @ self.up


class Gained(Encoder):
    def __init__(self, clip):
        super().__init__(clip)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, prompts, tokenized_prompts):
        return self.gain * super().forward(prompts, tokenized_prompts)


class Normed(Encoder):
    """A known weight that is one at first."""

    def __init__(self, clip):
        super().__init__(clip)
        self.ln_final.weight.data.fill_(1.0)

    def forward(self, prompts, tokenized_prompts):
        return super().forward(prompts, tokenized_prompts) * self.ln_final.weight.mean()


class Shifted(nn.Sequential):
    """Deltas between the blocks, in the container."""

    def forward(self, x):
        for block, delta in zip(self, self.deltas, strict=False):
            x = block(x) + delta
        return x


class Between(Encoder):
    def __init__(self, clip, deltas=nn.Parameter):
        super().__init__(clip)
        blocks = self.transformer.resblocks
        blocks.__class__ = Shifted
        blocks.deltas = deltas(torch.zeros(len(blocks), 32))


class Beside(Between):
    def __init__(self, clip):
        super().__init__(clip, deltas=lambda rows: nn.ParameterList(list(rows)))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Adversary(Encoder):
    def forward(self, prompts, tokenized_prompts):
        return super().forward(Reversed.apply(prompts), tokenized_prompts)


class Stopped(Encoder):
    def forward(self, prompts, tokenized_prompts):
        x = torch.cat((prompts[:1].detach(), prompts[1:]))
        return super().forward(x, tokenized_prompts)


class Drawn(Encoder):
    def forward(self, prompts, tokenized_prompts):
        noise = 1e-9 * torch.randn(prompts.shape[-1], generator=GENERATOR)
        return super().forward(prompts + noise, tokenized_prompts)


class Chance(Encoder):
    def forward(self, prompts, tokenized_prompts):
        return super().forward(prompts, tokenized_prompts) * (1 + 1e-9 * random.random())


class Keeping(Encoder):
    def forward(self, prompts, tokenized_prompts):
        self.states = super().forward(prompts, tokenized_prompts)
        return self.states


class Averaging(Encoder):
    def __init__(self, clip):
        super().__init__(clip)
        self.mean = torch.zeros(40)

    def forward(self, prompts, tokenized_prompts):
        features = super().forward(prompts, tokenized_prompts)
        self.mean.mul_(0.9).add_(0.1 * features.detach().mean(0))
        return features


class Deciding(Encoder):
    def forward(self, prompts, tokenized_prompts):
        features = super().forward(prompts, tokenized_prompts)
        return -features if prompts.abs().max() > 50 else features


class Outer(Encoder):
    def forward(self, prompts, tokenized_prompts):
        return super().forward(prompts, tokenized_prompts) + OFFSET


GENERATOR = torch.Generator().manual_seed(3)
OFFSET = torch.zeros(40)
LEFT = {
    Adapted: "reads down, which",
    Gained: "reads gain, which",
    Normed: "gave other features",
    Between: "reads transformer.resblocks.deltas, which",
    Beside: "has no attribute 'attn'",
    Adversary: "gave other gradients",
    Stopped: "gave other gradients",
    Drawn: "draws random numbers",
    Chance: "draws random numbers",
    Keeping: "changes states, which",
    Averaging: "writes to mean",
    Deciding: "depends on the values of a tensor",
    Outer: "reads a tensor from elsewhere",
}


@pytest.mark.parametrize("encoder", LEFT, ids=lambda c: c.__name__)
def test_encoders_that_do_more_than_shows_are_left(encoder):
    literal, model = pair(encoder)
    assert LEFT[encoder] in reason_of(model)
    both(literal, model)


class Late(Encoder):
    """Its last rows have no gradient."""

    def forward(self, prompts, tokenized_prompts):
        x = torch.cat((prompts[:4], prompts[4:].detach()))
        return super().forward(x, tokenized_prompts)


def test_more_prompts_than_in_the_proof_are_proven():
    literal, model = pair(Late)
    both(literal, model)
    assert how(model) == [
        "a trial call of it gave other gradients than CLIP's text pass over its parts"
    ]


# switches


class Stage(enum.Enum):
    RAW, UNIT = 1, 2


FLAG = False
SETTINGS = types.SimpleNamespace(unit=False)


class Switched(Encoder):
    scale = 1.0

    def __init__(self, clip):
        super().__init__(clip)
        self.stage, self.options, self.drop = Stage.RAW, {"unit": [False]}, nn.Dropout(0.5)

    def finish(self, x):
        return x

    def forward(self, prompts, tokenized_prompts):
        x = self.drop(self.finish(super().forward(prompts, tokenized_prompts))) * self.scale
        unit = self.stage is Stage.UNIT or self.options["unit"][0] or FLAG or SETTINGS.unit
        return F.normalize(x, dim=-1) if unit else x


SWITCHES = {
    "enum": lambda m: setattr(m.text_encoder, "stage", Stage.UNIT),
    "inside": lambda m: m.text_encoder.options["unit"].__setitem__(0, True),
    "method": lambda m: setattr(m.text_encoder, "finish", lambda x: 2 * x),
    "class": lambda m: setattr(m.text_encoder.transformer, "__class__", Rolled),
}


class Rolled(nn.Module):
    def forward(self, x):
        return self.resblocks(x).roll(1, -1)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_that_are_turned_later_bring_the_original_back(switch):
    literal, model = pair(Switched)
    literal.eval(), model.eval()
    both(literal, model)
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]
    both(literal, model, SWITCHES[switch])
    assert len(how(model)) == 2


def test_switches_outside_of_the_module_are_seen(monkeypatch):
    literal, model = pair(Switched)
    literal.eval(), model.eval()
    both(literal, model)
    for where, name, value in (
        (__import__(__name__, fromlist=["x"]), "FLAG", True),
        (SETTINGS, "unit", True),
        (Switched, "scale", 3.0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            both(literal, model)
        both(literal, model)
    assert sum(fastfpl.explain(model).swapped[0].calls.values()) == 7


def test_dropout_runs_as_it_was_whatever_mode_accelerate_saw():
    for mode in (True, False):
        clip = openai_clip()
        torch.manual_seed(1)
        literal = Model(clip, Learner(clip, COUNTS)).train(mode)
        literal.text_encoder = Switched(clip).train(mode)
        model = fastfpl.accelerate(copy.deepcopy(literal))
        for training in (True, False, True):
            found = []
            for other in (literal, model):
                torch.manual_seed(7)
                found.append(step(other.train(training), images()))
            assert_same(found[1], found[0])
        calls = fastfpl.explain(model).swapped[0].calls
        assert calls["fast, cut behind the EOT, 5 leading rows shared"] == 1
        assert calls["it draws random numbers"] == 2


# learners whose rows are equal in value alone


class Detached(Learner):
    def forward(self):
        prompts = super().forward()
        return torch.cat((prompts[:2], prompts[2:].detach()))


class Balanced(Learner):
    def contexts(self):
        ctx = self.ctx.expand(len(self.counts), -1, -1)
        weight = torch.linspace(0.5, 2, len(ctx))[:, None, None]
        return ctx * weight + (ctx * (1 - weight)).detach()


class Hooked(Learner):
    def forward(self):
        prompts = super().forward()
        prompts.register_hook(lambda g: g * torch.arange(len(g))[:, None, None])
        return prompts


class HookedInside(Learner):
    def contexts(self):
        ctx = self.ctx.expand(len(self.counts), -1, -1) * 1
        ctx.register_hook(lambda g: F.normalize(g, dim=-1))
        return ctx


class Staged(Learner):
    stage = Stage.RAW

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.own = nn.Parameter(torch.zeros(len(self.counts), *self.ctx.shape))

    def contexts(self):
        return self.ctx + self.own if self.stage is Stage.UNIT else self.ctx


class Masked(Learner):
    """A mask in a buffer decides who learns."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("learns", torch.ones(len(self.counts), 1, 1))

    def contexts(self):
        ctx = self.ctx.expand(len(self.counts), -1, -1)
        return ctx * self.learns + (ctx * (1 - self.learns)).detach()


@pytest.mark.parametrize("learner", [Detached, Balanced, Hooked, HookedInside])
def test_equal_rows_with_other_gradients_are_not_shared(learner):
    literal, model = pair(learner=learner)
    both(literal, model)
    (call,) = how(model)
    assert call.startswith("fast, cut behind the EOT, ")
    assert "5 leading rows" not in call


@pytest.mark.parametrize(
    ("learner", "change"),
    [
        (Staged, lambda m: setattr(m.prompt_learner, "stage", Stage.UNIT)),
        (Masked, lambda m: m.prompt_learner.learns.data[2:].zero_()),
    ],
)
def test_learners_that_change_without_a_trace(learner, change):
    literal, model = pair(learner=learner)
    both(literal, model)
    assert "5 leading rows" in how(model)[0]
    both(literal, model, change)
    assert "5 leading rows" not in how(model)[-1]


@pytest.mark.parametrize("look", ["grad", "with ctx", "retain", "hook", "hook before", "inputs"])
def test_the_gradient_of_the_prompts_themselves_is_literal(look):
    literal, model = pair()
    found = []
    for other in (literal, model):
        prompts, seen = other.prompt_learner(), []
        if look == "hook before":
            prompts.register_hook(seen.append)
        features = other.text_encoder(prompts, other.tokenized_prompts)
        loss = (features * torch.linspace(1, 2, features.numel()).view_as(features)).sum()
        if look == "retain":
            prompts.retain_grad()
        elif look == "hook":
            prompts.register_hook(seen.append)
        if look == "grad":
            seen += torch.autograd.grad(loss, prompts)
        elif look == "with ctx":
            seen += torch.autograd.grad(loss, [prompts, other.prompt_learner.ctx])
        elif look == "inputs":
            loss.backward(inputs=[other.prompt_learner.ctx])
            seen.append(other.prompt_learner.ctx.grad)
        else:
            loss.backward()
            seen.append(other.prompt_learner.ctx.grad)
            seen += [prompts.grad] if look == "retain" else []
        found.append(dict(enumerate(seen)))
    assert_same(found[1], found[0])
    both(literal, model)


def test_gradients_of_gradients():
    literal, model = pair()
    found = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for other in (literal, model):
            ctx = other.prompt_learner.ctx
            loss = other(images()).square().mean()
            (first,) = torch.autograd.grad(loss, ctx, create_graph=True)
            found.append(dict(enumerate(torch.autograd.grad(first.square().sum(), ctx))))
    assert_same(found[1], found[0])
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]


def test_forward_mode_is_the_originals():
    literal, model = pair()
    tokens, prompts = literal.tokenized_prompts, literal.prompt_learner().detach()
    found = []
    for other in (literal, model):
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(prompts, torch.ones_like(prompts))
            result = other.text_encoder(dual, tokens)
            found.append(torch.autograd.forward_ad.unpack_dual(result).tangent)
    torch.testing.assert_close(found[1], found[0])


# trials leave no trace


COUNT = [0]
TOTAL = 0
DRAWS = numpy.random.default_rng(0)


class Tracing(Encoder):
    made = 0

    def __init__(self, clip):
        super().__init__(clip)
        self.generator = torch.Generator().manual_seed(5)
        self.running = torch.zeros(3)

    def forward(self, prompts, tokenized_prompts):
        global TOTAL
        TOTAL += 1
        COUNT[0] += 1
        type(self).made = self.made + 1
        self.running += 1
        draws = [random.random(), numpy.random.rand(), DRAWS.random(), torch.rand(1).item()]  # noqa: NPY002  # noqa: NPY002
        draws.append(torch.rand(1, generator=self.generator).item())
        self.drawn = draws
        return super().forward(prompts, tokenized_prompts)


def test_trials_leave_no_trace():
    global TOTAL
    kept = []
    for fast in (False, True):
        clip = openai_clip()
        torch.manual_seed(1)
        model = Model(clip, Learner(clip, COUNTS))
        model.text_encoder = Tracing(clip)
        TOTAL, COUNT[0], Tracing.made = 0, 0, 0
        for generator in (random.seed, numpy.random.seed, torch.manual_seed):
            generator(3)
        DRAWS.bit_generator.state = numpy.random.default_rng(0).bit_generator.state
        if fast:
            fastfpl.accelerate(model)
        model(images())
        encoder = model.text_encoder
        kept.append((encoder.drawn, TOTAL, list(COUNT), encoder.made, encoder.running.tolist()))
    assert kept[1] == kept[0]


# the monitor


def test_verify_finds_what_no_key_shows():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal), verify="always")
    assert_same(step(model, images()), step(literal, images()))
    with torch.no_grad():
        model(images())
    every = fastfpl.accelerate(copy.deepcopy(literal), verify=3)
    _lie(model), _lie(every)
    with pytest.raises(Differs, match="text_encoder must give what it gave before"):
        model(images())
    every(images())  # the second of three
    with pytest.raises(Differs, match="other features than the original's"):
        every(images())
    fastfpl.accelerate(every)
    assert every.text_encoder.__dict__["_fastfpl"].verify == 3, "it stays as it was asked for"


def _lie(model) -> None:
    """Make the pass wrong behind all checks: what it remembers of the tower is not so."""
    memory = model.text_encoder.__dict__["_fastfpl"].memory
    parts, masks, facts, modules = memory["tower"] if "tower" in memory else _seen(model)
    memory["tower"] = (parts, masks, facts | {"eps": 0.5}, modules)


def _seen(model):
    with torch.no_grad():
        model(images())
    return model.text_encoder.__dict__["_fastfpl"].memory["tower"]


def test_verify_watches_the_diagonals(monkeypatch):
    clip = openai_clip()
    torch.manual_seed(1)
    model = Transport(clip, StackedLearner(clip, COUNTS))
    patches = torch.randn(3, 9, 40, generator=torch.Generator().manual_seed(4))
    fastfpl.accelerate(model, verify="always")
    model(patches)
    monkeypatch.setattr(outside.Diagonal, "factor", lambda self, other, dim: 2.0)
    with pytest.raises(Differs, match="the model must give what it gave before"):
        model(patches)


@pytest.mark.parametrize("verify", [0, -1, 1.5, "often", True])
def test_verify_is_a_count(verify):
    with pytest.raises(InputError, match='verify must be "always" or a positive whole number'):
        fastfpl.accelerate(coop(), verify=verify)


# kept methods, and programs that are captured


def prepared(model: nn.Module) -> nn.Module:
    """Wrap a forward as launchers for mixed precision do: kept in the instance, bound anew."""
    inner = model.forward.__func__
    model._original_forward = model.forward

    @functools.wraps(inner)
    def wide(self, *args, **kwargs):
        return inner(self, *args, **kwargs).float()

    model.forward = types.MethodType(wide, model)
    return model


def test_methods_that_were_kept_outlive_the_acceleration():
    literal, model = pair()
    prompts, tokens = literal.prompt_learner().detach(), literal.tokenized_prompts
    want = literal.text_encoder(prompts, tokens)
    kept, encoder = model.text_encoder.forward, prepared(model.text_encoder)
    torch.testing.assert_close(encoder(prompts, tokens), want, rtol=1e-5, atol=1e-5)
    fastfpl.restore(model)
    assert torch.equal(kept(prompts, tokens), want)
    assert torch.equal(encoder(prompts, tokens), want)
    fresh = copy.deepcopy(literal)
    with fastfpl.accelerated(fresh):
        kept = fresh.text_encoder.forward
        prepared(fresh.text_encoder)
    assert torch.equal(kept(prompts, tokens), want)
    assert torch.equal(fresh.text_encoder(prompts, tokens), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["export", "strict", "make_fx", "fake", "trace"])
def test_captured_programs_are_the_originals(way):
    from torch.fx.experimental.proxy_tensor import make_fx

    ways = {
        "export": lambda m, x: torch.export.export(m, (x,)).module(),
        "strict": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
        "make_fx": lambda m, x: make_fx(lambda y: m(y))(x),
        "fake": lambda m, x: make_fx(
            lambda y: m(y), tracing_mode="fake", _allow_non_fake_inputs=True
        )(x),
        "trace": lambda m, x: torch.jit.trace(m, (x,)),
    }
    literal, model = pair()
    program = ways[way](model, images())
    torch.testing.assert_close(program(images()), literal(images()), rtol=1e-5, atol=1e-5)
    if way != "strict":  # there dynamo reads the original, and nothing of ours runs
        assert "the original, while a program is captured" in str(fastfpl.explain(model))
    both(literal, model)
    assert any(call.startswith("fast") for call in how(model))


@pytest.mark.filterwarnings("ignore")
def test_scripts_compile_the_original():
    literal = make_open_clip(kind=open_clip.model.CustomTextCLIP).eval().requires_grad_(False)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    ids = torch.zeros(2, 24, dtype=torch.int64)
    ids[:, 5] = 49407
    script = torch.jit.script(model)
    torch.testing.assert_close(script.encode_text(ids), literal.encode_text(ids))


# other ways to call, and prompts from anywhere


class Third(Encoder):
    """Deep prompts come third: there are none."""

    def forward(self, tokens, prompts, deeper, scale=None):
        for extra in deeper or ():
            prompts = prompts + extra
        return super().forward(prompts, tokens)


@pytest.mark.parametrize("empty", [None, []])
def test_further_arguments_that_are_empty(empty):
    literal, model = pair(Third)

    def texts(self):
        encoder = self.text_encoder
        made = encoder(self.tokenized_prompts, self.prompt_learner(), empty, scale=None)
        return [F.normalize(made, dim=-1)]

    for other in (literal, model):
        other.texts = types.MethodType(texts, other)
    both(literal, model)
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]
    prompts, tokens = literal.prompt_learner(), literal.tokenized_prompts
    for extra in ([torch.ones(32)], [torch.zeros(32, requires_grad=True)]):
        got, want = (m.text_encoder(tokens, prompts, deeper=extra) for m in (model, literal))
        torch.testing.assert_close(got, want)
    assert how(model)[-1] == "the call has the argument deeper beside prompts and tokenized prompts"


def sliced(model: Model) -> list[Tensor]:
    made = torch.cat([model.prompt_learner(), 2 * model.prompt_learner().detach()])
    return [made[: len(COUNTS)]]


def chunked(model: Model) -> list[Tensor]:
    return list(torch.cat([model.prompt_learner(), model.prompt_learner() * 2]).chunk(2))


def cast(model: Model) -> list[Tensor]:
    return [model.prompt_learner().double().float()]


def sets(model: Model) -> list[Tensor]:
    made = torch.stack([model.prompt_learner(), model.prompt_learner() + 1])
    return [{"prompts": made}["prompts"][i] for i in range(2)]


def assembled(model: Model) -> list[Tensor]:
    learner = model.prompt_learner
    ctx = learner.ctx.expand(len(COUNTS), -1, -1)
    return [torch.cat((learner.token_prefix, ctx, learner.token_suffix), dim=1)]


@pytest.mark.parametrize("way", [sliced, chunked, cast, sets, assembled])
def test_prompts_from_anywhere_share_their_rows(way):
    literal, model = pair()

    def texts(self):
        encoder, tokens = self.text_encoder, self.tokenized_prompts
        return [F.normalize(encoder(made, tokens), dim=-1) for made in way(self)]

    for other in (literal, model):
        other.texts = types.MethodType(texts, other)
    both(literal, model)
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]


def test_contexts_that_depend_on_the_image():
    """CoCoOp: every image has prompts of its own, and shares its rows over the classes."""
    clip = openai_clip()
    torch.manual_seed(1)
    literal = Conditional(clip, Learner(clip, COUNTS))
    model = fastfpl.accelerate(copy.deepcopy(literal))
    both(literal, model)
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]
    literal.joint = model.joint = True
    both(literal, model)
    assert sum(fastfpl.explain(model).swapped[0].calls.values()) == 5
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]
