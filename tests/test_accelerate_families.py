"""Accelerated CLIPs of every family and backbone: the family's own features, or a reason."""

from __future__ import annotations

import copy
import pickle
import re

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

import fastfpl
from tests.families import (
    FAMILIES,
    TEXT,
    VISION,
    exact_text,
    features_of,
    halve,
    make_open_clip,
    make_openai,
    make_transformers,
    own_text,
    scramble,
)
from tests.test_accelerate import assert_same, how, images, step
from tests.truth import assert_as_good_as_eager

END = 49407


def tokens_of(length: int = 24, end: int = END, pad: int = 0) -> Tensor:
    """Three texts with two leading tokens of their own words in common."""
    ids = torch.full((3, length), pad)
    for row, words in zip(ids, ([320, 125, 9], [320, 125, 537, 236, 4], [320, 125]), strict=True):
        row[: len(words) + 2] = torch.tensor([end - 1, *words, end])
    return ids


def frozen(model: nn.Module) -> nn.Module:
    return scramble(model).requires_grad_(False)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    literal = frozen(model)
    return literal, fastfpl.accelerate(copy.deepcopy(literal))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_features_are_the_familys_own(name):
    literal, model = pair(FAMILIES[name]())
    keys = list(literal.state_dict())
    assert list(model.state_dict()) == keys
    want = own_text(literal, tokens_of())
    torch.testing.assert_close(own_text(model, tokens_of()), want, rtol=1e-5, atol=1e-5)
    assert how(model) == ["fast, cut behind the EOT, 3 leading rows shared"]
    # weights that change, in place and as a whole
    for other in (literal, model):
        for parameter in other.parameters():
            parameter.data.mul_(1.05)
    want = own_text(literal, tokens_of())
    torch.testing.assert_close(own_text(model, tokens_of()), want, rtol=1e-5, atol=1e-5)
    state = {
        key: t * 0.9 if t.is_floating_point() else t for key, t in literal.state_dict().items()
    }
    for other in (literal, model):
        other.load_state_dict(state)
    want = own_text(literal, tokens_of())
    torch.testing.assert_close(own_text(model, tokens_of()), want, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(own_text(twin, tokens_of()), want, rtol=1e-5, atol=1e-5)
    fastfpl.restore(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in literal.modules()}
    assert torch.equal(own_text(model, tokens_of()), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_embeddings_and_projection(name):
    """They are applied outside of the pass, so they may be trained."""
    literal = frozen(FAMILIES[name]())
    for key, parameter in literal.named_parameters():
        parameter.requires_grad_("token_embedding" in key or "text_projection" in key)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    for other in (literal, model):
        own_text(other, tokens_of()).square().sum().backward()
    grads = dict(literal.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "logit" not in key:
            torch.testing.assert_close(parameter.grad, grads[key].grad, rtol=1e-5, atol=1e-4)
    assert how(model) == ["fast, cut behind the EOT, 3 leading rows shared"]


@pytest.mark.parametrize("name", ["open_clip", "openai", "transformers"])
def test_a_tower_that_trains_is_left_while_it_does(name):
    literal = scramble(FAMILIES[name]()).train()
    model = fastfpl.accelerate(copy.deepcopy(literal).eval()).train()
    for other in (literal, model):
        torch.manual_seed(3)
        own_text(other, tokens_of()).square().sum().backward()
    got = {key: p.grad for key, p in model.named_parameters()}
    assert_same(got, {key: p.grad for key, p in literal.named_parameters()})
    (reason,) = how(model)
    assert (
        "weights require a gradient" in reason or "training mode with attention dropout" in reason
    )


@pytest.mark.parametrize("name", ["open_clip", "openai", "transformers", "open_clip-custom"])
def test_16_bits_are_as_good_as_the_original(name):
    wide = frozen(FAMILIES[name]())
    narrow = copy.deepcopy(wide)
    narrow = halve(narrow) if name == "openai" else narrow.half()
    model = fastfpl.accelerate(copy.deepcopy(narrow))
    truth = copy.deepcopy(narrow).double()
    for module in truth.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # the families' own cast down
    exact = exact_text(truth, tokens_of())
    got = own_text(model, tokens_of())
    assert_as_good_as_eager(got, own_text(narrow, tokens_of()), exact)
    assert all(call.startswith("fast") for call in how(model)), how(model)
    model, truth = fastfpl.accelerate(copy.deepcopy(wide)), copy.deepcopy(wide).double()
    for module in truth.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm
    exact = exact_text(truth, tokens_of())
    with torch.autocast("cpu", torch.bfloat16):
        got, want = own_text(model, tokens_of()), own_text(wide, tokens_of())
    assert got.dtype == want.dtype
    assert_as_good_as_eager(got, want, exact)
    assert all(call.startswith("fast") for call in how(model)), how(model)


def test_whole_models_give_the_same_outputs():
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for make in (make_open_clip, lambda: make_open_clip(kind=CustomTextCLIP)):
        literal, model = pair(make())
        for got, want in zip(model(pixels, tokens_of()), literal(pixels, tokens_of()), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        got = model.encode_text(tokens_of(), normalize=True)
        torch.testing.assert_close(got, literal.encode_text(tokens_of(), normalize=True))
    literal, model = pair(make_transformers())
    got, want = (m(input_ids=tokens_of(), pixel_values=pixels) for m in (model, literal))
    torch.testing.assert_close(got.logits_per_text, want.logits_per_text, rtol=1e-5, atol=1e-5)
    assert list(got.keys()) == list(want.keys())


@pytest.mark.parametrize("part", ["coop over open_clip", "coop over openai"])
def test_coop_encoders_over_other_towers(part):
    """open_clip's transformer takes its mask as an argument and keeps the batch first."""
    from tests.coop_style import Encoder, Learner, Model

    class Over(Encoder):
        def __init__(self, clip):
            super().__init__(clip)
            self.attn_mask = clip.attn_mask

        def forward(self, prompts, tokenized_prompts):
            x = prompts + self.positional_embedding
            x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
            rows = torch.arange(len(x))
            return x[rows, tokenized_prompts.argmax(dim=-1)] @ self.text_projection

    clip = frozen(make_open_clip() if "open_clip" in part else make_openai())
    if "open_clip" in part:
        clip.dtype = torch.float32
    torch.manual_seed(1)
    literal = Model(clip, Learner(clip, [1, 4, 2]))
    if "open_clip" in part:
        literal.text_encoder = Over(clip)
    model = fastfpl.accelerate(copy.deepcopy(literal))
    assert_same(step(model, images()), step(literal, images()))
    assert any("5 leading rows shared" in call for call in how(model))


# transformers' outputs


def text_models():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = {"hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 24, "projection_dim": 40}
    config = CLIPTextConfig(**shape, eos_token_id=END)
    torch.manual_seed(0)
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


@pytest.mark.parametrize("which", [0, 1])
def test_token_states_are_computed_when_they_are_looked_at(which):
    literal, model = pair(text_models()[which])
    want, got = literal(tokens_of()), model(input_ids=tokens_of())
    name = ("pooler_output", "text_embeds")[which]
    torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
    assert "_fill" in vars(got), "nobody has looked at the token states yet"
    assert isinstance(got, type(want))
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)
    assert list(got) == list(want) == list(got.keys())
    for fresh in (lambda: model(tokens_of()),):
        assert len(fresh()) == len(want)
        assert "last_hidden_state" in fresh()
        torch.testing.assert_close(fresh()[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fresh().to_tuple()[1], want[1], rtol=1e-5, atol=1e-5)
        loaded = pickle.loads(pickle.dumps(fresh()))
        torch.testing.assert_close(loaded.last_hidden_state, want.last_hidden_state)
        assert type(loaded) is type(want)
        leaves, _ = torch.utils._pytree.tree_flatten(fresh())
        assert len(leaves) == len(want)


def test_transformers_calls_that_the_pass_cannot_answer():
    literal, model = pair(make_transformers())
    text, own = model.text_model, literal.text_model
    ids = tokens_of()
    mask = (ids != 0).long()
    torch.testing.assert_close(
        features_of(model.get_text_features(ids, attention_mask=mask)),
        features_of(literal.get_text_features(ids, attention_mask=mask)),
        rtol=1e-5,
        atol=1e-5,
    )
    assert how(model) == ["fast, cut behind the EOT, 3 leading rows shared"]
    holed = mask.clone()
    holed[1, 2] = 0
    calls = {
        "hides a token": {"attention_mask": holed},
        "argument position_ids": {"position_ids": torch.arange(24).flip(0)[None]},
        "hidden states of all layers": {"output_hidden_states": True},
        "tuple is asked for": {"return_dict": False},
    }
    for reason, extra in calls.items():
        got, want = text(ids, **extra), own(ids, **extra)
        assert type(got) is type(want)
        torch.testing.assert_close(got[1], want[1])
        assert any(reason in call for call in how(model)), reason
    short = ids[:, :9]
    torch.testing.assert_close(text(short)[1], own(short)[1], rtol=1e-5, atol=1e-5)
    text.config._attn_implementation = "eager"  # sdpa has no attentions to give
    text.config.output_attentions = True
    assert "attentions or hidden states of all layers are asked for" in str(
        (text(ids), fastfpl.explain(model))[1]
    )


def test_saving_a_transformers_model_is_as_before(tmp_path):
    from transformers import CLIPModel

    literal, model = pair(make_transformers())
    model.save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == ["CLIPModel"]
    torch.testing.assert_close(own_text(loaded, tokens_of()), own_text(literal, tokens_of()))


# backbones, as open_clip describes them, with two text layers and a small image tower


def backbone(name: str) -> nn.Module:
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["vision_cfg"] = VISION
    config["text_cfg"] |= {"layers": 2, "vocab_size": 600}
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
        config["text_cfg"].pop(key, None)
    custom = config.pop("custom_text", False)
    torch.manual_seed(0)
    return (CustomTextCLIP if custom else CLIP)(**config)


CAUSAL = ["RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14", "EVA02-B-16", "EVA02-L-14"]


@pytest.mark.parametrize("name", CAUSAL)
def test_backbones_with_causal_towers_are_swapped(name):
    literal, model = pair(backbone(name))
    tokens = tokens_of(77, end=599)
    want = literal.encode_text(tokens)
    torch.testing.assert_close(model.encode_text(tokens), want, rtol=1e-5, atol=1e-5)
    assert how(model) == ["fast, cut behind the EOT, 3 leading rows shared"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-B-16-SigLIP", "bidirectional .* neither a shared prefix nor a cut is exact"),
        ("ViT-B-16-SigLIP2", "bidirectional .* neither a shared prefix nor a cut is exact"),
        ("coca_ViT-B-32", "returns the states of all tokens"),
    ],
)
def test_backbones_that_are_not_causal_are_left(name, reason):
    if name.startswith("coca"):
        text = {**TEXT, "embed_cls": True, "output_tokens": True}
        literal = frozen(make_open_clip(text=text, kind=CustomTextCLIP))
    else:
        literal = frozen(backbone(name))
    model = fastfpl.accelerate(copy.deepcopy(literal))
    (finding,) = fastfpl.explain(model).left
    assert re.search(reason, finding.reason)
    assert {type(m) for m in model.modules()} == {type(m) for m in literal.modules()}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"no_causal_mask": True}, "its text tower is bidirectional"),
        ({"ls_init_value": 0.1}, "got ls_1 in block 0"),
        ({"qk_norm": True}, "got ln_q in block 0"),
        ({"scale_fc": True}, "got ln in block 0"),
        ({"pool_type": "last"}, "pools the text with 'last'"),
    ],
)
def test_towers_with_other_parts_are_left(text, reason):
    model = fastfpl.accelerate(frozen(make_open_clip(text=text)))
    (finding,) = fastfpl.explain(model).left
    assert reason in finding.reason


def test_a_mask_that_nobody_sees_is_found_by_trial():
    """transformers' SigLIP keeps no mask: its features change with what follows the end."""
    from transformers import SiglipTextConfig, SiglipTextModel

    shape = {"hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4}
    shape["hidden_act"] = "quick_gelu"
    config = SiglipTextConfig(**shape, num_hidden_layers=2, max_position_embeddings=24)
    torch.manual_seed(0)
    model = frozen(SiglipTextModel(config))
    inner = next(m for m in model.modules() if hasattr(m, "final_layer_norm"))
    fastfpl.accelerate(model)
    assert "eos_token_id" in fastfpl.explain(model).left[0].reason
    inner.head = nn.Identity()
    inner.eos_token_id = END
    fastfpl.accelerate(model)
    assert "token 49407 of a vocabulary of 32000" in fastfpl.explain(model).left[0].reason
    inner.eos_token_id = 31999
    fastfpl.accelerate(model)
    (finding,) = fastfpl.explain(model).left
    assert "rows behind the EOT change its features" in finding.reason
