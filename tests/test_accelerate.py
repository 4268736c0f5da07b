"""Accelerated models are what they were: values, gradients, keys, modes; reasons for the rest."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfpl
from fastfpl.errors import KindError
from tests.coop_style import (
    Encoder,
    Learner,
    LowRankLearner,
    Mixture,
    Model,
    StackedLearner,
    Transport,
)
from tests.families import OpenAIClip, halve, scramble
from tests.truth import assert_as_good_as_eager
from tests.warm import warm_python

COUNTS = [1, 3, 2, 6, 1]


def openai_clip(**sizes) -> OpenAIClip:
    torch.manual_seed(0)
    return scramble(OpenAIClip(**sizes)).requires_grad_(False)


def coop(clip=None, counts=COUNTS, **options) -> Model:
    clip = clip or openai_clip()
    torch.manual_seed(1)
    return Model(clip, Learner(clip, counts, **options))


def stacked(clip=None) -> Model:
    clip = clip or openai_clip()
    torch.manual_seed(1)
    return Model(clip, StackedLearner(clip, COUNTS, sets=3))


def low_rank(clip=None) -> Model:
    clip = clip or openai_clip()
    torch.manual_seed(1)
    return Model(clip, LowRankLearner(clip, COUNTS))


def mixture(clip=None) -> Model:
    clip = clip or openai_clip()
    torch.manual_seed(1)
    learner = Learner(clip, COUNTS)
    return Mixture(clip, learner, 0.02 * torch.randn(3, *learner.ctx.shape).to(clip.dtype))


MODELS = {
    "end": coop,
    "middle": lambda clip=None: coop(clip, position="middle"),
    "front": lambda clip=None: coop(clip, position="front"),
    "class-specific": lambda clip=None: coop(clip, own=True),
    "class-specific-middle": lambda clip=None: coop(clip, own=True, position="middle"),
    "one context": lambda clip=None: coop(clip, slots=1),
    "one class": lambda clip=None: coop(clip, counts=[4]),
    "stacked": stacked,
    "low rank": low_rank,
    "mixture": mixture,
}
# leading rows that a pass may take once, and the classes of one pass
SHARED = {"end": 5, "middle": 3, "front": 1, "class-specific": 1, "stacked": 5, "low rank": 5}


def images(dtype=torch.float32) -> Tensor:
    return torch.randn(4, 40, generator=torch.Generator().manual_seed(2)).to(dtype)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Logits and the gradients of everything that is learned, as floats."""
    model.zero_grad()
    logits = model(image)
    F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.shape[1]).backward()
    grads = {name: p.grad for name, p in trained(model).items()}
    model.zero_grad()
    return {"logits": logits.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if tensor is None:
            assert got[name] is None, name
            continue
        size = float(tensor.abs().max())
        torch.testing.assert_close(
            got[name],
            tensor,
            rtol=1e-5,
            atol=1e-5 * max(1.0, size),
            msg=lambda m, n=name: f"{n} {m}",
        )


def how(model: nn.Module) -> list[str]:
    """How the text encoders' calls were answered."""
    return [call for f in fastfpl.explain(model).swapped for call in f.calls]


@pytest.mark.parametrize("name", MODELS)
def test_coop_family_keeps_logits_and_gradients(name):
    literal = MODELS[name]()
    model = copy.deepcopy(literal)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert fastfpl.accelerate(model) is model
    for mode in (True, False, True):
        literal.train(mode), model.train(mode)
        assert_same(step(model, images()), step(literal, images()))
        with torch.no_grad():
            torch.testing.assert_close(model(images()), literal(images()), rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(call.startswith("fast") for call in how(model)), how(model)
    if name in SHARED:
        assert any(f"{SHARED[name]} leading rows" in call for call in how(model)), how(model)


@pytest.mark.parametrize(
    "sizes", [{"width": 64, "heads": 1, "layers": 1, "dim": 8}, {"layers": 3, "length": 40}]
)
def test_other_sizes(sizes):
    literal = coop(openai_clip(**sizes), counts=[2, 9], slots=3)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    image = torch.randn(3, literal.text_encoder.text_projection.shape[1])
    assert_same(step(model, image), step(literal, image))


def test_gradient_of_every_row_that_is_learned():
    """Prompts that are leaves themselves: SOS, context, names and full stops all get theirs."""
    clip = openai_clip()
    encoder, tokens = Encoder(clip), Learner(clip, COUNTS).tokenized_prompts
    prompts = torch.randn(5, 24, 32, generator=torch.Generator().manual_seed(3))
    prompts[:, 0] = prompts[0, 0]
    leaves = [prompts.clone().requires_grad_() for _ in range(2)]
    weight = torch.randn(5, 40)
    (encoder(leaves[0], tokens) * weight).sum().backward()
    fastfpl.accelerate(encoder)
    (encoder(leaves[1], tokens) * weight).sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-5, atol=1e-5)
    assert "0 leading rows shared" in how(encoder)[0]


def test_equal_values_are_not_taken_for_one_function():
    """Class-specific contexts that start equal have gradients of their own."""
    literal = coop(own=True)
    with torch.no_grad():
        literal.prompt_learner.ctx.copy_(literal.prompt_learner.ctx[:1].clone())
    model = fastfpl.accelerate(copy.deepcopy(literal))
    want, got = step(literal, images()), step(model, images())
    assert_same(got, want)
    grads = want["prompt_learner.ctx"]
    assert (grads[0] - grads[1]).abs().max() > 1e-3, "the test must be able to fail"


class Interleaved(StackedLearner):
    """Class after class, all prompts of a class beside each other."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        places = torch.arange(len(self.tokenized_prompts)).view(self.sets, -1).t().flatten()
        self.places, self.tokenized_prompts = places, self.tokenized_prompts[places]

    def forward(self):
        return super().forward()[self.places]


def test_groups_that_lie_between_each_other():
    clip = openai_clip()
    torch.manual_seed(1)
    literal = Model(clip, Interleaved(clip, COUNTS, sets=2))
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), literal(images()), rtol=1e-5, atol=1e-5)
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]


class Asking(Learner):
    """Prompts that depend on what the call hands over."""

    def forward(self, shift=None):
        prompts = super().forward()
        return prompts if shift is None else prompts + shift


def test_arguments_of_a_learner_are_seen():
    clip = openai_clip()
    learner = Asking(clip, COUNTS)
    encoder = Encoder(clip)
    found = []
    for _ in range(2):
        shift = torch.zeros(5, 1, 1, requires_grad=True)
        for given in (None, shift):
            (encoder(learner(given), learner.tokenized_prompts) ** 2).sum().backward()
        found.append(shift.grad)
        fastfpl.accelerate(encoder)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    shared, nothing = how(encoder)
    assert "5 leading rows shared" in shared
    assert "no leading row is one function of what is learned" in nothing


class Foreign(Learner):
    """Its context is a tensor that it does not own as a parameter."""

    def contexts(self):
        return self.elsewhere


def test_contexts_from_elsewhere_are_learned_as_they_are():
    clip = openai_clip()
    results = []
    for fast in (False, True):
        torch.manual_seed(1)
        model = Model(clip, Foreign(clip, COUNTS))
        model.prompt_learner.ctx.requires_grad_(False)
        leaf = torch.full((5, 4, 32), 0.01, requires_grad=True)
        model.prompt_learner.elsewhere = leaf * 1
        if fast:
            fastfpl.accelerate(model)
        model(images()).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert how(model) == ["fast, cut behind the EOT, 1 leading rows shared"]


class Beside(Learner):
    """Half of it is a parameter, half a tensor from elsewhere."""

    def contexts(self):
        return self.ctx + self.elsewhere


def test_a_part_from_elsewhere_is_seen_in_the_graph():
    clip = openai_clip()
    grads = []
    model = Model(clip, Beside(clip, COUNTS))
    for _ in range(2):
        model.prompt_learner.elsewhere = leaf = torch.zeros(5, 4, 32, requires_grad=True)
        model(images()).square().sum().backward()
        grads.append(leaf.grad)
        fastfpl.accelerate(model)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    assert how(model) == ["fast, cut behind the EOT, 1 leading rows shared"]


@pytest.mark.parametrize("traceless", [False, True])
def test_prompts_changed_on_their_way_share_what_is_left(traceless):
    literal = coop()

    class Shifted(Model):
        def texts(self):
            prompts = self.prompt_learner()
            (prompts.data if traceless else prompts)[1, 2] += 1.0
            return [self.text_encoder(prompts, self.tokenized_prompts)]

    literal.__class__ = Shifted
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert how(model) == ["fast, cut behind the EOT, 2 leading rows shared"]


def test_switches_of_the_prompt_learner_are_seen():
    literal = coop()

    class Switched(Learner):
        def contexts(self):
            return self.ctx if self.generic else self.ctx[None] * self.scale

    for name, value in {"generic": True, "scale": nn.Parameter(torch.ones(5, 1, 1))}.items():
        setattr(literal.prompt_learner, name, value)
    literal.prompt_learner.__class__ = Switched
    model = fastfpl.accelerate(copy.deepcopy(literal))
    for generic in (True, False, True):
        literal.prompt_learner.generic = model.prompt_learner.generic = generic
        assert_same(step(model, images()), step(literal, images()))


# 16 bits


def exact(model: nn.Module) -> nn.Module:
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # OpenAI's rounds to float32
    wide.dtype = wide.text_encoder.dtype = torch.float64
    return wide


def judged(got, literal, truth):
    for name, tensor in got.items():
        assert_as_good_as_eager(tensor, literal[name], truth[name], name=name)


@pytest.mark.parametrize("name", ["end", "middle", "class-specific", "stacked"])
def test_half_precision_is_as_good_as_the_original(name):
    literal = MODELS[name](halve(openai_clip()))
    literal.prompt_learner.ctx.data = literal.prompt_learner.ctx.data.half()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    truth = step(exact(literal), images(torch.float64))
    got, want = step(model, images(torch.half)), step(literal, images(torch.half))
    assert got["logits"].dtype == torch.half
    judged(got, want, truth)
    assert all(call.startswith("fast") for call in how(model)), how(model)


@pytest.mark.parametrize("name", ["end", "front", "class-specific", "stacked", "low rank"])
def test_autocast_is_as_good_as_the_original(name):
    literal = MODELS[name]()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    truth = step(exact(literal), images(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = step(model, images()), step(literal, images())
    assert got["logits"].dtype == want["logits"].dtype == torch.bfloat16
    judged(got, want, truth)
    assert all(call.startswith("fast") for call in how(model)), how(model)


def test_mixed_dtypes_raise_what_the_original_raises():
    literal = coop(halve(openai_clip()))
    literal.prompt_learner.float()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    with pytest.raises(RuntimeError) as theirs:
        literal(images())
    with pytest.raises(RuntimeError) as ours:
        model(images())
    assert str(ours.value) == str(theirs.value)
    assert "the embeddings are torch.float32 and the text tower torch.float16" in how(model)


# weights that change


class Parts(nn.Module):
    """What `halve` expects of a whole CLIP."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.text, self.text_projection = encoder, encoder.text_projection
        self.visual = nn.Module()
        self.visual.proj = nn.Parameter(torch.zeros(1))


def test_nothing_read_from_weights_is_stale():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    model(images())
    generator = torch.Generator().manual_seed(5)
    changed = {
        key: t + 0.05 * torch.randn(t.shape, generator=generator).to(t)
        if t.is_floating_point()
        else t
        for key, t in literal.state_dict().items()
    }
    for other in (literal, model):
        other.load_state_dict(changed)
    assert_same(step(model, images()), step(literal, images()))
    for other in (literal, model):
        for parameter in other.text_encoder.parameters():
            parameter.data.mul_(1.1)  # leaves no trace on the version
        block = other.text_encoder.transformer.resblocks[0]
        block.mlp.c_fc = copy.deepcopy(other.text_encoder.transformer.resblocks[1].mlp.c_fc)
        block.ln_1.weight = nn.Parameter(torch.full((32,), 0.5), requires_grad=False)
        other.prompt_learner.token_suffix.data.mul_(0.5)
        other.prompt_learner.token_prefix = 2 * other.prompt_learner.token_prefix
    assert_same(step(model, images()), step(literal, images()))
    for other in (literal, model):
        halve(Parts(other.text_encoder))
        other.prompt_learner.half()
        other.dtype = other.text_encoder.dtype = torch.half
    got, want = model(images()), literal(images())
    assert got.dtype == torch.half
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert all(call.startswith("fast") for call in how(model)), how(model)


def test_prompts_swapped_between_calls():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    for seed in range(3):
        ctx = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        for other in (literal, model):
            other.prompt_learner.load_state_dict({"ctx": ctx}, strict=False)
        assert_same(step(model, images()), step(literal, images()))
    for other in (literal, model):
        other.prompt_learner.ctx = nn.Parameter(torch.zeros(4, 32))
    assert_same(step(model, images()), step(literal, images()))


def test_other_classes_between_calls():
    clip = openai_clip()
    model = fastfpl.accelerate(coop(clip))
    model(images())
    literal = coop(clip, counts=[2, 2, 1])
    for name in ("token_prefix", "token_suffix", "counts"):
        setattr(model.prompt_learner, name, getattr(literal.prompt_learner, name))
    model.tokenized_prompts = literal.tokenized_prompts
    model.prompt_learner.ctx.data.copy_(literal.prompt_learner.ctx)
    assert_same(step(model, images()), step(literal, images()))


def test_inference_mode_before_training():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    with torch.inference_mode():
        torch.testing.assert_close(model(images()), literal(images()), rtol=1e-5, atol=1e-5)
    assert_same(step(model, images()), step(literal, images()))
    assert all(call.startswith("fast") for call in how(model)), how(model)


class Counting(Learner):
    """Its forward leaves traces."""

    def forward(self):
        self.made = getattr(self, "made", 0) + 1
        self.token_prefix.mul_(1.01)
        torch.rand(1)
        return super().forward()


def test_trials_leave_no_trace_on_the_prompt_learner():
    clip = openai_clip()
    torch.manual_seed(1)
    literal = Model(clip, Counting(clip, COUNTS))
    model = fastfpl.accelerate(copy.deepcopy(literal))
    seen = []
    model.prompt_learner.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    for other in (literal, model):
        torch.manual_seed(2)
        for _ in range(2):
            other(images())
        other.drawn = torch.rand(1)
    assert model.prompt_learner.made == literal.prompt_learner.made == 2
    assert len(seen) == 2
    assert torch.equal(model.drawn, literal.drawn)
    assert_same(model.prompt_learner.state_dict(), literal.prompt_learner.state_dict())


# undone, copied, sent


def test_restore_gives_everything_back():
    model = mixture()
    classes = {name: type(m) for name, m in model.named_modules()}
    seen = {name: set(vars(m)) for name, m in model.named_modules()}
    fastfpl.accelerate(model)
    assert type(model.text_encoder) is not classes["text_encoder"]
    assert isinstance(model.text_encoder, Encoder)
    assert type(model.text_encoder).__name__ == "Encoder"
    assert fastfpl.restore(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: set(vars(m)) for name, m in model.named_modules()} == seen
    assert fastfpl.restore(model) is model


def test_accelerate_twice_is_once():
    model = fastfpl.accelerate(coop())
    cls, state = type(model.text_encoder), vars(model.text_encoder)["_fastfpl"]
    fastfpl.accelerate(model)
    assert type(model.text_encoder) is cls
    assert vars(model.text_encoder)["_fastfpl"] is state
    fastfpl.restore(model)
    assert type(model.text_encoder) is Encoder


def test_context_manager():
    model = coop()
    with fastfpl.accelerated(model) as inside:
        assert inside is model
        assert len(fastfpl.explain(model).swapped) == 1
    assert type(model.text_encoder) is Encoder
    fastfpl.accelerate(model)
    with fastfpl.accelerated(model):
        pass
    assert len(fastfpl.explain(model).swapped) == 1, "what was swapped before stays so"
    fastfpl.restore(model)
    with pytest.raises(ZeroDivisionError), fastfpl.accelerated(model):
        raise ZeroDivisionError
    assert type(model.text_encoder) is Encoder


def test_copies_are_accelerated_and_their_own():
    model = fastfpl.accelerate(coop())
    model(images())
    twin = copy.deepcopy(model)
    assert type(twin.text_encoder) is type(model.text_encoder)
    with torch.no_grad():
        twin.prompt_learner.ctx.add_(1.0)
        for parameter in twin.text_encoder.parameters():
            parameter.mul_(0.9)
    literal = fastfpl.restore(copy.deepcopy(twin))
    assert_same(step(twin, images()), step(literal, images()))
    assert (twin(images()) - model(images())).abs().max() > 1e-3
    assert len(fastfpl.explain(model).swapped) == 1


def test_saved_whole_and_loaded():
    model = fastfpl.accelerate(coop())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.text_encoder) is type(model.text_encoder)
    assert_same(step(loaded, images()), step(model, images()))


def test_module_sent_to_another_process(tmp_path):
    model = fastfpl.accelerate(openai_clip(length=12))
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "tokens = torch.zeros(2, 12, dtype=torch.int64); tokens[:, 5] = 49407\n"
        "model.encode_text(tokens)\n"
        "import fastfpl\n"
        "print(fastfpl.explain(model))\n"
    )
    done = subprocess.run(
        [*warm_python(), "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 swapped" in done.stdout, done.stderr
    assert "1 x fast" in done.stdout


def test_replicas_use_their_own_weights():
    """What DataParallel does on several devices, by hand."""
    model = fastfpl.accelerate(coop())
    encoder = model.text_encoder
    replica = encoder._replicate_for_data_parallel()
    replica.positional_embedding = 2 * encoder.positional_embedding
    replica.ln_final = encoder.ln_final
    prompts = model.prompt_learner().detach()
    literal = fastfpl.restore(copy.deepcopy(model)).text_encoder
    literal.positional_embedding.data.mul_(2)
    replica.transformer, replica.text_projection = encoder.transformer, encoder.text_projection
    torch.testing.assert_close(
        replica(prompts, model.tokenized_prompts),
        literal(prompts, model.tokenized_prompts),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("whole", [True, False])
def test_data_parallel_wrappers(whole):
    literal = coop()
    model = copy.deepcopy(literal)
    if whole:
        model = nn.DataParallel(model)
        fastfpl.accelerate(model)
        inner = model.module
    else:
        model.text_encoder = nn.DataParallel(model.text_encoder)
        inner = fastfpl.accelerate(model)
    logits = model(images())
    torch.testing.assert_close(logits, literal(images()), rtol=1e-5, atol=1e-5)
    assert any(call.startswith("fast") for call in how(inner))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_stay_right():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    compiled = torch.compile(model, backend="eager")
    assert_same({"logits": compiled(images()).detach()}, {"logits": literal(images()).detach()})
    assert any(call.startswith("fast") for call in how(model))
    compiled(images()).sum().backward()
    assert model.prompt_learner.ctx.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_graph_is_the_originals():
    """``fullgraph=True`` stands no break: it compiles what was there before."""
    torch._dynamo.reset()  # code that another test compiled with breaks would be taken
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    want = step(literal, images())
    assert_same(
        step(compiled, images()),
        {f"_orig_mod.{k}" if k != "logits" else k: v for k, v in want.items()},
    )
    assert not how(model), "nothing of ours runs"
    assert_same(step(model, images()), want)
    assert how(model) == ["fast, cut behind the EOT, 5 leading rows shared"]


def test_calls_that_are_never_fast_are_not_looked_at_every_time(monkeypatch):
    swap = sys.modules["fastfpl.dropin.swap"]
    monkeypatch.setattr(swap, "_PATIENCE", 3)
    monkeypatch.setattr(swap, "_LOOKS", 4)
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    hook = model.text_encoder.transformer.register_forward_hook(lambda *a: None)
    looks = []
    run = type(swap.kind_of(model.text_encoder)).run
    monkeypatch.setattr(
        type(swap.kind_of(model.text_encoder)),
        "run",
        lambda *a: looks.append(len(calls)) or run(*a),
    )
    calls: list[int] = []
    for _ in range(10):
        calls.append(1)
        model(images())
    assert looks == [1, 2, 3, 5, 9]
    assert sum(fastfpl.explain(model).swapped[0].calls.values()) == 10
    hook.remove()
    for _ in range(4):
        assert_same(step(model, images()), step(literal, images()))
    assert any(call.startswith("fast") for call in how(model)), how(model)


def test_hooks_of_the_swapped_fire_and_inner_hooks_bring_the_original_back():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    seen = []
    outer = model.text_encoder.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    back = model.text_encoder.register_full_backward_hook(lambda m, i, o: seen.append("back"))
    assert_same(step(model, images()), step(literal, images()))
    assert seen == [(5, 40), "back"]
    outer.remove(), back.remove()
    assert all(call.startswith("fast") for call in how(model))
    inner = model.text_encoder.transformer.resblocks[1].mlp.c_fc
    handle = inner.register_forward_hook(lambda m, a, out: seen.append("inner"))
    assert_same(step(model, images()), step(literal, images()))
    assert seen[2:] == ["inner"]
    assert any("has a hook, which must fire" in call for call in how(model))
    handle.remove()
    fresh = coop()
    fresh.text_encoder.ln_final.register_forward_hook(lambda m, a, out: None)
    fastfpl.accelerate(fresh)
    (left,) = [f for f in fastfpl.explain(fresh).left if f.path == "text_encoder"]
    assert "has a hook" in left.reason


def test_global_hooks_fire():
    model = fastfpl.accelerate(coop())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, out: seen.append(type(m).__name__)
    )
    try:
        model(images())
    finally:
        handle.remove()
    assert "OpenAIBlock" in seen


def test_trained_towers_are_left_while_they_train():
    clip = openai_clip().requires_grad_(True)
    literal = coop(clip)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert "the text tower's own weights require a gradient" in how(model)
    with torch.no_grad():
        model(images())
    assert any(call.startswith("fast") for call in how(model))
    # the projection is applied outside of the pass: it may be trained
    clip.requires_grad_(False)
    clip.text_projection.requires_grad_(True)
    literal = coop(clip)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert all(call.startswith("fast") for call in how(model))


def test_transforms_of_functions_get_the_original():
    literal = coop()
    encoder = fastfpl.accelerate(copy.deepcopy(literal)).text_encoder
    prompts, tokens = literal.prompt_learner().detach(), literal.tokenized_prompts
    got = torch.func.grad(lambda x: encoder(x, tokens).square().sum())(prompts)
    want = torch.func.grad(lambda x: literal.text_encoder(x, tokens).square().sum())(prompts)
    torch.testing.assert_close(got, want)
    assert any("torch.func" in call for call in how(encoder))


def test_calls_that_do_not_fit_are_the_originals():
    model = fastfpl.accelerate(coop())
    prompts, tokens = model.prompt_learner().detach(), model.tokenized_prompts
    got = model.text_encoder(tokenized_prompts=tokens, prompts=prompts)
    torch.testing.assert_close(got, model.text_encoder(prompts, tokens))
    with pytest.raises(TypeError, match="positional"):
        model.text_encoder(prompts)
    with pytest.raises(RuntimeError):
        model.text_encoder(prompts[:, :9], tokens)


# transport and gate


def test_transport_keeps_its_own_iteration():
    clip = openai_clip()
    torch.manual_seed(1)
    literal = Transport(clip, StackedLearner(clip, COUNTS))
    model = fastfpl.accelerate(copy.deepcopy(literal))
    patches = torch.randn(3, 49, 40, generator=torch.Generator().manual_seed(4))
    assert_same(step(model, patches), step(literal, patches))
    finding = next(f for f in fastfpl.explain(model).swapped if f.path == "")
    assert finding.kind == "transport with diagonal matrices"
    assert finding.calls == {"its own iteration, diagonal matrices as vectors": 1}
    fastfpl.restore(model)
    assert type(model) is Transport


def test_diagonal_matrices_are_whole_where_anybody_looks():
    from fastfpl.dropin.outside import _Vectors

    d, x = torch.randn(4, 3), torch.randn(4, 3, 3)
    full = torch.diag_embed(d)
    with _Vectors():
        lazy = torch.diag_embed(d)
        assert not isinstance(lazy, Tensor)
        results = [lazy @ x, x @ lazy, torch.bmm(x, lazy), lazy.transpose(1, 2), lazy.sum(-1)]
        results += [torch.diag_embed(d, offset=1)[..., :3, :3], torch.diag_embed(d, dim1=0)]
        results += [torch.add(lazy, x), torch.matmul(lazy, torch.diag_embed(d)), lazy @ x[0]]
    assert all(isinstance(r, Tensor) for r in results)
    want = [full @ x, x @ full, x @ full, full.mT, full.sum(-1)]
    want += [torch.diag_embed(d, offset=1)[..., :3, :3], torch.diag_embed(d, dim1=0)]
    want += [full + x, full @ full, full @ x[0]]
    for got, expected in zip(results, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_diagonal_matrices_are_torchs_in_everything_that_is_done_with_them():
    from fastfpl.dropin.outside import DIAGONALS, _Vectors
    from fastfpl.dropin.swap import State

    def written(d, x):
        m = torch.diag_embed(d)
        d.mul_(2)  # the matrix is a copy
        m[:, 0, 1] = 5.0
        m += 1
        n = torch.diag_embed(d)
        n.add_(1)  # and is written to
        return m @ x, n @ x, x @ n

    def counted(d, x):
        m = torch.diag_embed(d)
        parts = [2 * m, m * 2, m / 2, 1 - m, -m, m**2, abs(m), m[0], m > 0, m == 1, m + m]
        return [*parts, torch.stack(list(m)), torch.tensor(len(m))]

    def into(d, x):
        out = torch.zeros_like(x)
        torch.matmul(torch.diag_embed(d), x, out=out)
        return out, torch.matmul(other=x, input=torch.diag_embed(d))

    def nested(d, x):
        m = torch.diag_embed(d)
        return {"plan": [m, m @ x]}, torch.cat([m, m])

    def refused(d, x):
        for wrong in (x[:, :1], x.double()):
            with pytest.raises(RuntimeError):
                torch.diag_embed(d) @ wrong
        return ()

    def narrow(d, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.diag_embed(d) @ x

    d, x = torch.randn(4, 3), torch.randn(4, 3, 3)
    for run in (written, counted, into, nested, refused, narrow):
        with _Vectors():
            found = DIAGONALS.run(None, State(), run, (d.clone(), x), {})
        torch.testing.assert_close(found, run(d.clone(), x), rtol=1e-6, atol=1e-6)


def test_gates_are_left_with_a_reason():
    report = fastfpl.explain(fastfpl.accelerate(mixture()))
    (gate,) = [f for f in report.left if f.path == "gating"]
    assert gate.kind == "gate over experts"
    assert "fastfpl.ops.gate_experts" in gate.reason


# refusals and reports


def test_reports_say_what_and_why():
    model = coop()
    report = fastfpl.explain(model)
    assert {f.path for f in report.left} == {"text_encoder"}
    assert all(f.reason == "fastfpl.accelerate was not called" for f in report.left)
    fastfpl.accelerate(model)
    step(model, images())
    said = str(fastfpl.explain(model))
    assert said.splitlines()[0] == "fastfpl: 1 swapped, 0 left"
    assert "swapped text_encoder: Encoder, text encoder of embedded prompts" in said
    assert "1 x fast, cut behind the EOT, 5 leading rows shared" in said


def test_what_is_no_model_is_refused():
    with pytest.raises(KindError, match=r"model must be a torch\.nn\.Module; got int"):
        fastfpl.accelerate(3)
    with pytest.raises(
        KindError, match=r"model must hold a CoOp-style text encoder .*; got Linear"
    ):
        fastfpl.accelerate(nn.Linear(2, 2))
    for function in (fastfpl.restore, fastfpl.explain):
        with pytest.raises(KindError, match=r"must be a torch\.nn\.Module; got str"):
            function("model")


class Deep(Encoder):
    def forward(self, prompts, tokenized_prompts, deeper):
        return super().forward(prompts + deeper[0], tokenized_prompts)


class Unit(Encoder):
    def forward(self, prompts, tokenized_prompts):
        return F.normalize(super().forward(prompts, tokenized_prompts), dim=-1)


class Broken(Encoder):
    def forward(self, prompts, tokenized_prompts):
        raise ValueError("not today\nnor tomorrow")


class Mean(Encoder):
    def forward(self, prompts, tokenized_prompts):
        return super().forward(prompts, tokenized_prompts).mean(0)


def bidirectional():
    clip = openai_clip()
    for block in clip.transformer.resblocks:
        block.attn_mask = None
    return Encoder(clip)


def adapted(kind):
    clip = openai_clip()
    mlp = clip.transformer.resblocks[1].mlp
    if kind == "subclass":
        mlp.c_fc.__class__ = type("LoRALinear", (nn.Linear,), {})
    elif kind == "parameter":
        clip.transformer.resblocks[0].deep_prompts = nn.Parameter(torch.zeros(2, 32))
    elif kind == "activation":
        mlp.gelu = nn.ReLU()
    elif kind == "eps":
        clip.ln_final.eps = 1e-3
    elif kind == "forward":
        mlp.c_fc.forward = lambda x: F.linear(x, mlp.c_fc.weight)
    return Encoder(clip)


LEFT = {
    "three arguments": (lambda: Deep(openai_clip()), "a trial call of it raised TypeError"),
    "normalised": (lambda: Unit(openai_clip()), "gave other features than"),
    "broken": (lambda: Broken(openai_clip()), "raised ValueError: not today$"),
    "pooled": (lambda: Mean(openai_clip()), "one feature a prompt"),
    "bidirectional": (bidirectional, r"causal text tower; got a bidirectional one"),
    "adapter": (lambda: adapted("subclass"), "LoRALinear in place of a linear layer"),
    "deep prompts": (lambda: adapted("parameter"), "parameter deep_prompts that CLIP's have not"),
    "activation": (lambda: adapted("activation"), "use QuickGELU or GELU .*; got ReLU"),
    "eps": (lambda: adapted("eps"), "its layers differ in eps"),
    "patched forward": (lambda: adapted("forward"), "a forward inside the text tower was replaced"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_certain_is_left_with_the_reason(name):
    make, reason = LEFT[name]
    encoder = make()
    cls = type(encoder)
    fastfpl.accelerate(encoder)
    assert type(encoder) is cls
    (finding,) = fastfpl.explain(encoder).left
    assert __import__("re").search(reason, finding.reason), finding.reason


def test_adapters_that_come_later_bring_the_original_back():
    literal = coop()
    model = fastfpl.accelerate(copy.deepcopy(literal))
    model(images())

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    for other in (literal, model):
        other.text_encoder.transformer.resblocks[0].mlp.c_fc.__class__ = Adapter
        block = other.text_encoder.transformer.resblocks[0]
        block.mlp.c_fc = copy.deepcopy(block.mlp.c_fc)
    assert_same(step(model, images()), step(literal, images()))
    assert any("Adapter in place of a linear layer" in call for call in how(model))


def test_import_is_light():
    code = (
        "import sys, fastfpl.dropin\n"
        "heavy = {'open_clip', 'torchvision', 'transformers', 'timm', 'torch._dynamo'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
