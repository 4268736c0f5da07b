"""Deep prompts of other people's models: swapped and exact, or left with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfpl
from fastfpl.errors import Differs
from tests.coop_style import Model
from tests.deep_style import (
    DeepEncoder,
    DeepModel,
    ListBlock,
    OwnBlock,
    deep_model,
    own_blocks,
    own_model,
    put,
)
from tests.families import OpenAIBlock
from tests.test_accelerate import COUNTS, assert_same, halve, how, images, openai_clip, step
from tests.truth import assert_as_good_as_eager


def clip(layers=3, **sizes):
    return openai_clip(layers=layers, **sizes)


def seeded(make, *arguments, **options):
    torch.manual_seed(1)
    return make(*arguments, **options)


def stacked(layers):
    return torch.stack(list(layers))


def projected(layers):
    """Made by a net, as FedTPG's are: no leaf among them."""
    return [layer.tanh() @ torch.eye(layer.shape[1]) for layer in layers]


def kept(layers):
    return layers


MODELS = {
    "list": lambda: seeded(deep_model, clip(), COUNTS),
    "tuple": lambda: seeded(deep_model, clip(), COUNTS, gather=tuple),
    "parameter list": lambda: seeded(deep_model, clip(), COUNTS, gather=kept),
    "stacked": lambda: seeded(deep_model, clip(), COUNTS, gather=stacked),
    "projected": lambda: seeded(deep_model, clip(), COUNTS, gather=projected),
    "one layer": lambda: seeded(deep_model, clip(), COUNTS, layers=1),
    "more than there are layers": lambda: seeded(deep_model, clip(), COUNTS, layers=4),
    "none": lambda: seeded(deep_model, clip(), COUNTS, layers=0),
    "through 16 bits": lambda: seeded(deep_model, clip(), COUNTS, half=True),
    "stacked, through 16 bits": lambda: seeded(
        deep_model, clip(), COUNTS, gather=stacked, half=True
    ),
    "class-specific": lambda: seeded(deep_model, clip(), COUNTS, own=True),
    "one slot": lambda: seeded(deep_model, clip(), COUNTS, slots=1),
    "one class": lambda: seeded(deep_model, clip(), [4]),
    "own": lambda: seeded(own_model, clip(), COUNTS),
    "own, one layer": lambda: seeded(own_model, clip(4), COUNTS, layers=1),
    "own, through 16 bits": lambda: seeded(own_model, clip(), COUNTS, half=True),
    "own, class-specific": lambda: seeded(own_model, clip(), COUNTS, own=True),
    "own, two layers in all": lambda: seeded(own_model, clip(2), COUNTS, layers=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_deep_prompts_keep_logits_and_gradients(name):
    literal = MODELS[name]()
    model = copy.deepcopy(literal)
    keys = list(model.state_dict())
    fastfpl.accelerate(model)
    assert list(model.state_dict()) == keys
    for mode in (True, False, True):
        literal.train(mode), model.train(mode)
        want, got = step(literal, images()), step(model, images())
        if "16 bits" in name:  # the original's gradients are rounded to them, class by class
            for key in [k for k in want if "deeper" in k or "transformer" in k]:
                size = float(want[key].abs().max())
                torch.testing.assert_close(got.pop(key), want.pop(key), rtol=0, atol=1e-3 * size)
        assert_same(got, want)
        with torch.no_grad():
            torch.testing.assert_close(model(images()), literal(images()), rtol=1e-5, atol=1e-5)
    assert all(call.startswith("fast") for call in how(model)), how(model)
    shared = {"one slot": 2, "one class": 10}.get(name, 1 if "class-specific" in name else 5)
    assert any(f"{shared} leading rows shared" in call for call in how(model)), how(model)
    if name not in ("none", "one class"):  # with one class nothing is learned
        assert any("prompts replaced before" in call for call in how(model)), how(model)
        grads = step(literal.train(), images())
        deep = [g for key, g in grads.items() if "deeper" in key or "transformer" in key]
        assert any(g is not None and bool((g != 0).any()) for g in deep), "they must be learned"


@pytest.mark.parametrize("name", ["list", "own"])
def test_ten_steps_of_training_are_the_literal_ones(name):
    literal = MODELS[name]()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    for m in (literal, model):
        optimiser = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)
        for _ in range(10):
            optimiser.zero_grad()
            F.cross_entropy(m(images()), torch.arange(4)).backward()
            optimiser.step()
    for (key, got), want in zip(model.named_parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k} {m}")


@pytest.mark.parametrize("name", ["list", "own", "parameter list"])
def test_half_precision_is_as_good_as_the_original(name):
    halved = halve(clip())
    torch.manual_seed(1)
    if name == "own":
        narrow = own_model(halved, COUNTS)
    else:
        narrow = deep_model(halved, COUNTS, gather=kept if "parameter" in name else list)
    model = fastfpl.accelerate(copy.deepcopy(narrow))
    want, got = step(narrow, images().half()), step(model, images().half())
    for key, tensor in want.items():
        size = float(tensor.float().abs().max())
        torch.testing.assert_close(got[key].float(), tensor.float(), rtol=0, atol=0.02 * size)
    assert all(call.startswith("fast") for call in how(model)), how(model)


@pytest.mark.parametrize("name", ["list", "own", "through 16 bits", "own, through 16 bits"])
def test_autocast_is_as_good_as_the_original(name):
    literal = MODELS[name]()
    model, truth = fastfpl.accelerate(copy.deepcopy(literal)), step(literal, images())
    with torch.autocast("cpu", torch.bfloat16):
        want, got = step(literal, images()), step(model, images())
    for key, tensor in want.items():
        assert_as_good_as_eager(got[key], tensor, truth[key].double(), name=key)
    assert all(call.startswith("fast") for call in how(model)), how(model)


def test_more_classes_than_in_the_trial():
    literal = seeded(deep_model, clip(), [1 + i % 5 for i in range(23)])
    model = fastfpl.accelerate(copy.deepcopy(literal), verify="always")
    assert_same(step(model, images()), step(literal, images()))


@pytest.mark.parametrize("look", ["retain", "grad"])
def test_the_gradient_of_prompts_that_are_looked_at_is_literal(look):
    found = []
    literal = MODELS["list"]()
    for model in (literal, fastfpl.accelerate(copy.deepcopy(literal))):
        prompts = model.prompt_learner()
        if look == "retain":
            prompts.retain_grad()
        text = model.text_encoder(prompts, model.tokenized_prompts, list(model.deeper))
        loss = (text * torch.linspace(-1, 1, text.numel()).view_as(text)).sum()
        if look == "grad":
            found.append(torch.autograd.grad(loss, (prompts, *model.deeper)))
        else:
            loss.backward()
            found.append((prompts.grad, *(p.grad for p in model.deeper)))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_contexts_that_are_not_learned_leave_the_deep_prompts_theirs():
    literal = MODELS["list"]()
    literal.prompt_learner.requires_grad_(False)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert how(model) == [
        "fast, cut behind the EOT, 5 leading rows shared, prompts replaced before 2 layers"
    ]


def test_own_prompts_that_come_and_go_are_seen():
    literal = MODELS["own"]()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    for change in ("gone", "new", "other"):
        for m in (literal, model):
            blocks = m.text_encoder.transformer.resblocks
            if change == "gone":
                blocks[2].prompt = None
            elif change == "new":
                draw = torch.Generator().manual_seed(4)
                blocks[2].prompt = nn.Parameter(torch.randn(4, 32, generator=draw))
            else:
                blocks[1].prompt = None  # a gap, which the pass has not
        assert_same(step(model, images()), step(literal, images()))
    assert any("parameter prompt that CLIP's have not" in call for call in how(model)), how(model)
    assert any("replaced before 1 layers" in call for call in how(model)), how(model)


def test_encode_text_of_a_model_with_own_prompts():
    from tests.families import own_text

    literal = seeded(own_blocks, clip(), 2, 3)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    tokens = literal.token_embedding.weight.new_zeros(3, 24, dtype=torch.int64)
    tokens[:, 0] = 49406
    for row, end in zip(tokens, (6, 9, 7), strict=True):
        row[1:end], row[end] = torch.arange(1, end) + 320 * end, 49407
    for m in (literal, model):
        own_text(m, tokens).square().sum().backward()
    torch.testing.assert_close(own_text(model, tokens), own_text(literal, tokens))
    for (key, got), want in zip(model.named_parameters(), literal.parameters(), strict=True):
        if "prompt" in key:
            assert bool((want.grad != 0).any())
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
    assert how(model) == [
        "fast, cut behind the EOT, 1 leading rows shared, prompts replaced before 2 layers"
    ]


# what looks like deep prompts, and is something else


class Elsewhere(ListBlock):
    """Two places behind SOS."""

    def forward(self, inputs):
        x, deep, used = inputs
        if not self.head and used < len(deep):
            x, used = put(x, deep[used], first=2), used + 1
        return [OpenAIBlock.forward(self, x), deep, used]


class Added(ListBlock):
    def forward(self, inputs):
        x, deep, used = inputs
        if not self.head and used < len(deep):
            own = deep[used].unsqueeze(1)
            x, used = torch.cat([x[:1], x[1 : 1 + len(own)] + own, x[1 + len(own) :]]), used + 1
        return [OpenAIBlock.forward(self, x), deep, used]


class FromTheFirst(ListBlock):
    def forward(self, inputs):
        x, deep, used = inputs
        if used < len(deep):
            x, used = put(x, deep[used]), used + 1
        return [OpenAIBlock.forward(self, x), deep, used]


class Turned(ListBlock):
    """The last deep prompt first."""

    def forward(self, inputs):
        x, deep, used = inputs
        if not self.head and used < len(deep):
            x, used = put(x, deep[len(deep) - 1 - used]), used + 1
        return [OpenAIBlock.forward(self, x), deep, used]


class Cut(ListBlock):
    """No gradient reaches the second of them."""

    def forward(self, inputs):
        x, deep, used = inputs
        if not self.head and used < len(deep):
            x, used = put(x, deep[used].detach() if used else deep[used]), used + 1
        return [OpenAIBlock.forward(self, x), deep, used]


class Scaled(OwnBlock):
    def forward(self, x):
        if self.prompt is not None:
            x = put(x, self.prompt.roll(1, -1))
        return OpenAIBlock.forward(self, x)


class Twice(OwnBlock):
    """Its prompt counts as a shift of what comes out, too."""

    def forward(self, x):
        x = super().forward(x)
        return x if self.prompt is None else x + 0.01 * self.prompt[0]


CALLS = {
    Elsewhere: "gave other features",
    Added: "gave other features",
    FromTheFirst: "gave other features",
    Turned: "gave other features",
    Cut: "gave other gradients",
}


@pytest.mark.parametrize("block", CALLS, ids=lambda c: c.__name__)
def test_calls_with_what_is_no_deep_prompt_are_the_originals(block):
    literal = MODELS["list"]()
    for one in literal.text_encoder.transformer.resblocks:
        one.__class__ = block
    model = fastfpl.accelerate(copy.deepcopy(literal))
    for mode in (True, False):
        literal.train(mode), model.train(mode)
        assert_same(step(model, images()), step(literal, images()))
    assert all(CALLS[block] in call for call in how(model)), how(model)


@pytest.mark.parametrize("block", [Scaled, Twice], ids=lambda c: c.__name__)
def test_own_prompts_that_are_more_than_that_are_left(block):
    literal = MODELS["own"]()
    for one in literal.text_encoder.transformer.resblocks:
        one.__class__ = block
    model = fastfpl.accelerate(copy.deepcopy(literal))
    (finding,) = fastfpl.explain(model).left
    assert "gave other features" in finding.reason
    assert_same(step(model, images()), step(literal, images()))


def gap(blocks):
    blocks[1].prompt = None


def first(blocks):
    blocks[0].prompt = nn.Parameter(torch.zeros(4, 32))


def second(blocks):
    blocks[1].other = nn.Parameter(torch.zeros(4, 32))


def longer(blocks):
    blocks[2].prompt = nn.Parameter(torch.zeros(3, 32))


def flat(blocks):
    blocks[1].prompt = blocks[2].prompt = None
    blocks[1].shift = nn.Parameter(torch.zeros(32))


@pytest.mark.parametrize("change", [gap, first, second, longer, flat], ids=lambda f: f.__name__)
def test_parameters_of_blocks_that_do_not_fit_are_left(change):
    literal = MODELS["own"]()
    change(literal.text_encoder.transformer.resblocks)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    (finding,) = fastfpl.explain(model).left
    assert "that CLIP's have not" in finding.reason
    assert_same(step(model, images()), step(literal, images()))


class Both(DeepModel):
    def texts(self):
        shapes = [self.deeper[0], self.deeper[1][:2]]
        features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts, shapes)
        return [F.normalize(features, dim=-1)]


def test_lists_that_do_not_fit_are_the_originals():
    literal = MODELS["list"]()
    literal.__class__ = Both
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert how(model) == ["the call has the argument deeper beside prompts and tokenized prompts"]


class Choosy(DeepEncoder):
    """It needs deep prompts: an empty list raises."""

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor, deeper):
        return super().forward(prompts, tokenized_prompts, [deeper[0], *deeper[1:]])


def test_encoders_that_cannot_do_without_are_proven_with_some():
    literal = MODELS["list"]()
    literal.text_encoder.__class__ = Choosy
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert all(call.startswith("fast") for call in how(model)), how(model)


@pytest.mark.parametrize("name", ["through 16 bits", "own, through 16 bits", "projected", "own"])
def test_verify_finds_nothing_where_nothing_is(name):
    model = fastfpl.accelerate(MODELS[name](), verify="always")
    for mode in (True, False):
        step(model.train(mode), images())
    assert all(call.startswith("fast") for call in how(model)), how(model)


class Coarse(ListBlock):
    """Through 16 bits, with a gradient for the states that is rounded, too."""

    def forward(self, inputs):
        x, deep, used = inputs
        if not self.head and used < len(deep):
            x, used = put(Rounding.apply(x), deep[used].half()), used + 1
        return [OpenAIBlock.forward(self, x), deep, used]


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.half().float()


def test_only_deep_prompts_may_have_rounded_gradients():
    literal = MODELS["list"]()
    for one in literal.text_encoder.transformer.resblocks:
        one.__class__ = Coarse
    model = fastfpl.accelerate(copy.deepcopy(literal))
    step(model, images())
    assert all("gave other gradients" in call for call in how(model)), how(model)


def test_verify_watches_deep_prompts(monkeypatch):
    """A pass whose deep prompts are one layer late is found."""
    model = fastfpl.accelerate(MODELS["list"](), verify="always")
    step(model, images())
    from fastfpl.dropin import embedded

    right = embedded.deep_of
    monkeypatch.setattr(embedded, "deep_of", lambda *a: right(*a).flip(0))
    with pytest.raises(Differs, match="text_encoder must give what it gave before"):
        step(model, images())


def test_a_model_is_what_it_was():
    for name in ("list", "own"):
        literal = MODELS[name]()
        model = fastfpl.accelerate(copy.deepcopy(literal))
        twin = copy.deepcopy(model)
        assert_same(step(twin, images()), step(literal, images()))
        state = {key: 0.9 * t for key, t in literal.state_dict().items()}
        for m in (literal, model):
            m.load_state_dict(state)
        assert_same(step(model, images()), step(literal, images()))
        fastfpl.restore(model)
        assert {type(m) for m in model.modules()} == {type(m) for m in literal.modules()}
        assert isinstance(model, Model)


def test_replicas_use_their_own_prompts():
    """What DataParallel does on several devices, by hand: parameters become attributes."""
    from fastfpl.dropin.tower import own_prompts

    blocks = list(MODELS["own"]().text_encoder.transformer.resblocks)
    replica = blocks[1]._replicate_for_data_parallel()
    replica._former_parameters = {"prompt": blocks[1].prompt}
    replica.prompt = 2 * blocks[1].prompt
    got = own_prompts([blocks[0], replica, blocks[2]], 32)
    assert torch.equal(got[0], 2 * blocks[1].prompt)
    assert torch.equal(got[1], blocks[2].prompt)
