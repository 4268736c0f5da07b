"""The loaded CLIP is the family's own: text, pooled image and token features, frozen for good."""

import copy
import functools
import gzip
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import fastfpl
import fastfpl.clip.loading
import fastfpl.clip.tiny
from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.clip.tokenizer import Tokenizer
from fastfpl.errors import Damaged, InputError, KindError, Missing, NotSupported
from fastfpl.prompts import ClassPrompts, encode_prompts
from fastfpl.reference.text import PromptLayout, encode_text

TEXTS = ["a photo of a cat.", "sea horse", "X X X X centered satellite photo of annual crop land."]
SIDE = 64
VISION = {"image_size": SIDE, "patch_size": 16, "width": 48, "layers": 2, "head_width": 16}
RESNET = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TEXT = {"context_length": 24, "width": 32, "heads": 4, "layers": 2}


# the layout of OpenAI's clip package: names, shapes, masks in blocks, LND order, LayerNorm in fp32


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class OpenAIBlock(nn.Module):
    def __init__(self, width, heads, mask=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU())]
        layers.append(("c_proj", nn.Linear(4 * width, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.attn_mask = mask

    def forward(self, x):
        mask = None if self.attn_mask is None else self.attn_mask.to(x)
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAITransformer(nn.Module):
    def __init__(self, width, layers, heads, mask=None):
        super().__init__()
        self.resblocks = nn.Sequential(*[OpenAIBlock(width, heads, mask) for _ in range(layers)])

    def forward(self, x):
        return self.resblocks(x)


class OpenAIVision(nn.Module):
    def __init__(self, size, patch, width, layers, heads, dim):
        super().__init__()
        self.input_resolution = size
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = OpenAITransformer(width, layers, heads)
        self.proj = nn.Parameter(torch.randn(width, dim) / width**0.5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenAIClip(nn.Module):
    def __init__(self, dim=40, length=24, width=32, layers=2, heads=4, vocabulary=49408):
        super().__init__()
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.visual = OpenAIVision(SIDE, 16, 48, 2, 3, dim)
        self.transformer = OpenAITransformer(width, layers, heads, mask)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) / width**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    @property
    def dtype(self):
        return self.visual.conv1.weight.dtype

    def encode_image(self, image):
        return self.visual(image.type(self.dtype))

    def encode_text(self, text):
        x = self.token_embedding(text).type(self.dtype) + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection


def halve(model):
    """What OpenAI's convert_weights does: 16 bits but for LayerNorm and embeddings."""
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.half()
        if isinstance(part, nn.MultiheadAttention):
            part.in_proj_weight.data = part.in_proj_weight.data.half()
            part.in_proj_bias.data = part.in_proj_bias.data.half()
    model.text_projection.data = model.text_projection.data.half()
    model.visual.proj.data = model.visual.proj.data.half()
    return model


def scramble(model):
    """Leave no weight at one or zero, where a lost bias or a swapped norm would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and "mask" not in name and name != "logit_scale":
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def make_open_clip(vision=VISION, text=None, quick_gelu=False, kind=CLIP):
    torch.manual_seed(0)
    return kind(40, dict(vision), {**TEXT, **(text or {})}, quick_gelu=quick_gelu)


def make_transformers(act="quick_gelu", eos=49407):
    from transformers import CLIPConfig, CLIPModel

    shape = {"num_hidden_layers": 2, "hidden_act": act, "attention_dropout": 0.1}
    text = {"hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4, **shape}
    text |= {"max_position_embeddings": 24, "eos_token_id": eos, "layer_norm_eps": 1e-4}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, **shape}
    vision |= {"image_size": SIDE, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)
    return CLIPModel(config)


def make_openai():
    torch.manual_seed(0)
    return OpenAIClip()


FAMILIES = {
    "open_clip": make_open_clip,
    "open_clip-quickgelu": lambda: make_open_clip(quick_gelu=True),
    "open_clip-resnet": lambda: make_open_clip(RESNET),
    "open_clip-custom": lambda: make_open_clip(
        text={"proj_bias": True, "pool_type": "eos", "eos_id": 49407, "norm_kwargs": {"eps": 1e-3}},
        kind=CustomTextCLIP,
    ),
    "openai": make_openai,
    "transformers": make_transformers,
    "transformers-gelu-eos2": lambda: make_transformers("gelu", eos=2),
}
_made = {}


def family(name):
    if name not in _made:
        _made[name] = scramble(FAMILIES[name]())
    return _made[name]


def layout_of(clip, texts):
    """Full-length prompts; the one context vector stands where the first word's token does."""
    rows = [[clip.sos, *ids, clip.eot] for ids in clip.tokenize(texts)]
    tokens = torch.zeros(len(rows), clip.context_length, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    slots = torch.ones(len(rows), 1, dtype=torch.int64)
    return PromptLayout(tokens, slots, torch.tensor([len(r) - 1 for r in rows]), 1)


def encode(clip, texts=TEXTS):
    layout = layout_of(clip, texts)
    return encode_text(clip.text, layout, clip.text.token_embedding[layout.tokens[:, 1:2]], True)


def features_of(output):
    """Features as transformers 4 returns them, or from the output object of transformers 5."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def own_text(model, tokens):
    if hasattr(model, "text_model"):
        return features_of(model.get_text_features(tokens))
    return model.encode_text(tokens)


def exact_text(model, tokens):
    """As `own_text`, of a model in float64: transformers 4.46 fills masks in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return own_text(model, tokens)
    finally:
        torch.set_default_dtype(before)


def own_image(model, pixels):
    if hasattr(model, "text_model"):
        return features_of(model.get_image_features(pixels))
    return model.encode_image(pixels)


def pixels_of(count=2, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_the_familys_own(name):
    model = family(name)
    clip = load_clip(model)
    with torch.no_grad():
        want = F.normalize(own_text(model, layout_of(clip, TEXTS).tokens), dim=-1)
    torch.testing.assert_close(encode(clip), want, rtol=0, atol=1e-5)
    assert (want[0] - want[1]).abs().max() > 1e-2, "the texts must differ for the test to mean much"


@pytest.mark.parametrize(("name", "dim", "patches"), [("ViT-B-32", 512, 49), ("RN50", 1024, 49)])
def test_real_sizes_are_the_familys_own(name, dim, patches):
    config = open_clip.get_model_config(name)
    # the text tower at full depth, an image tower of full width
    layers = config["vision_cfg"]["layers"]
    config["vision_cfg"]["layers"] = 1 if isinstance(layers, int) else [1, 1, 1, 1]
    torch.manual_seed(0)
    model = CLIP(**config).eval()
    clip = load_clip(model)
    assert (clip.dim, clip.text_width, clip.context_length) == (dim, 512, 77)
    assert (clip.patches, clip.image_size) == (patches, 224)
    pixels = pixels_of(1, 224)
    with torch.no_grad():
        text = F.normalize(model.encode_text(layout_of(clip, TEXTS).tokens), dim=-1)
        image = F.normalize(model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(encode(clip), text, rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.encode_image(pixels), image, rtol=0, atol=1e-5)
    assert clip.encode_image_tokens(pixels).shape == (1, patches, dim)


@pytest.mark.parametrize("name", FAMILIES)
def test_pooled_image_is_the_familys_own(name):
    model = family(name)
    clip = load_clip(model)
    with torch.no_grad():
        want = own_image(model, pixels_of())
    got = clip.encode_image(pixels_of(), normalize=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    unit = clip.encode_image(pixels_of())
    torch.testing.assert_close(unit, F.normalize(want, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_begin_with_the_pooled_feature(name):
    clip = load_clip(family(name))
    with torch.no_grad():
        tokens = clip._image.tokens(pixels_of())
    pooled = clip.encode_image(pixels_of(), normalize=False)
    torch.testing.assert_close(tokens[:, 0], pooled, rtol=1e-5, atol=1e-5)
    assert clip.patches == (4 if name == "open_clip-resnet" else 16) == tokens.shape[1] - 1
    patches = clip.encode_image_tokens(pixels_of(), normalize=False)
    torch.testing.assert_close(patches, tokens[:, 1:])
    unit = clip.encode_image_tokens(pixels_of())
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, clip.patches))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_gives_both_bit_for_bit(name, normalize):
    clip = load_clip(family(name))
    pixels = pixels_of(3)
    pooled, tokens = clip.encode_image_both(pixels, normalize)
    assert torch.equal(pooled, clip.encode_image(pixels, normalize))
    assert torch.equal(tokens, clip.encode_image_tokens(pixels, normalize))
    none = clip.encode_image_both(pixels[:0], normalize)
    assert [x.shape for x in none] == [(0, clip.dim), (0, clip.patches, clip.dim)]
    assert not any(x.requires_grad for x in (pooled, tokens))
    pixels.requires_grad_()
    pooled, tokens = clip.encode_image_both(pixels, normalize)
    (ours,) = torch.autograd.grad(pooled.square().sum(-1)[0] + tokens[1].norm(), pixels)
    pooled, tokens = (
        clip.encode_image(pixels, normalize),
        clip.encode_image_tokens(pixels, normalize),
    )
    (want,) = torch.autograd.grad(pooled.square().sum(-1)[0] + tokens[1].norm(), pixels)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_goes_through_the_blocks_once(name):
    clip = load_clip(family(name))
    seen = []
    convolutions = [m for m in clip._image.module.modules() if isinstance(m, torch.nn.Conv2d)]
    convolutions[0].register_forward_hook(lambda *_: seen.append(1))
    clip.encode_image_both(pixels_of())
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["open_clip", "openai", "transformers"])
def test_vit_tokens_are_projected_states(name):
    model = family(name)
    seen = []
    if name == "transformers":
        vision, project = model.vision_model, model.visual_projection
        part, norm = vision.encoder, vision.post_layernorm
    else:
        part, norm = model.visual.transformer, model.visual.ln_post
        project = lambda x: x @ model.visual.proj  # noqa: E731 - beside its sibling above
    handle = part.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        own_image(model, pixels_of())
        handle.remove()
        states = seen[0].last_hidden_state if name == "transformers" else seen[0]
        states = states.permute(1, 0, 2) if name == "openai" else states
        want = torch.stack([project(norm(states[:, i])) for i in range(1, states.shape[1])], dim=1)
    got = load_clip(model).encode_image_tokens(pixels_of(), normalize=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_resnet_tokens_are_pooled_with_every_query():
    model = family("open_clip-resnet")
    pool, seen = model.visual.attnpool, []
    handle = model.visual.layer4.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model.encode_image(pixels_of())
        handle.remove()
        x = seen[0].flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
        split = lambda t: t.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = (split(p(x)) for p in (pool.q_proj, pool.k_proj, pool.v_proj))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        want = pool.c_proj((weights @ v).transpose(1, 2).flatten(2))[:, 1:]
    got = load_clip(model).encode_image_tokens(pixels_of(), normalize=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["open_clip-resnet", "openai", "transformers"])
def test_owner_is_left_alone(name):
    model = copy.deepcopy(family(name)).train()
    first = next(model.parameters())
    first.requires_grad_(False)
    calls = []
    for part in model.modules():
        part.register_forward_hook(lambda *a: calls.append(a))
    modes = [part.training for part in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    clip = load_clip(model)
    calls.clear()  # of the trial, where a hook might have done something
    a = clip.encode_image(pixels_of())
    encode(clip)
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not calls, "the owner's hooks must not see our passes"
    # the owner's running statistics move in its own forward passes; ours do not
    own_image(model, pixels_of(4))
    assert torch.equal(clip.encode_image(pixels_of()), a)


def test_weights_are_shared_not_copied():
    model = family("openai")
    clip = load_clip(model)
    assert (
        clip.text.blocks[0].fc_w.data_ptr()
        == model.transformer.resblocks[0].mlp.c_fc.weight.data_ptr()
    )
    assert clip._image.module.conv1.weight.data_ptr() == model.visual.conv1.weight.data_ptr()
    assert clip.to("cpu") is clip
    half = clip.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert clip.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_can_be_trained(name):
    clip = load_clip(family(name))
    image = list(clip._image.module.parameters())
    assert image
    assert not any(p.requires_grad for p in image)
    text = [clip.text.projection, *vars(clip.text.blocks[0]).values()]
    assert not any(t.requires_grad for t in text)
    assert not any(m.training for m in clip._image.module.modules())
    before = clip.encode_image(pixels_of())
    assert not before.requires_grad
    clip._image.module.train()  # a determined enemy
    if "resnet" in name:
        torch.testing.assert_close(clip.encode_image(pixels_of()), before)
    assert not isinstance(clip, nn.Module)


def test_gradient_reaches_pixels_only_if_asked():
    clip = load_clip(family("open_clip-resnet"))
    pixels = pixels_of().requires_grad_()
    clip.encode_image_tokens(pixels).square().mean(-1)[0, 0].backward()
    assert pixels.grad is not None
    with torch.no_grad():
        assert not clip.encode_image(pixels).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["open_clip", "open_clip-resnet", "openai", "transformers"])
def test_every_dtype_loads(name, dtype):
    exact = load_clip(family(name))
    clip = load_clip(family(name), dtype=dtype)
    norm = torch.promote_types(dtype, torch.float32)
    assert clip.dtype == clip.text.token_embedding.dtype == dtype
    assert clip.text.ln_w.dtype == clip.text.blocks[0].ln_1_w.dtype == norm
    # features have unit length: a few ulps of one, through four layers
    atol = 1e-5 if dtype == torch.float64 else 12 * torch.finfo(dtype).eps
    for got, want in [
        (encode(clip), encode(exact)),
        (clip.encode_image(pixels_of()), exact.encode_image(pixels_of())),
        (clip.encode_image_tokens(pixels_of()), exact.encode_image_tokens(pixels_of())),
    ]:
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0, atol=atol)


def test_half_openai_weights_load_in_both_precisions():
    model = halve(scramble(make_openai()))
    wide = load_clip(model)
    assert wide.dtype == torch.float32
    with torch.no_grad():
        want = F.normalize(copy.deepcopy(model).float().encode_image(pixels_of()), dim=-1)
    torch.testing.assert_close(wide.encode_image(pixels_of()), want, rtol=0, atol=1e-5)
    same = load_clip(model, dtype=torch.float16)
    assert same.text.ln_w.data_ptr() == model.ln_final.weight.data_ptr()
    with torch.no_grad():
        own = model.encode_image(pixels_of())
    got = same.encode_image(pixels_of(), normalize=False)
    torch.testing.assert_close(got, own, rtol=1e-2, atol=1e-2)


def test_activation_is_recognised():
    assert load_clip(family("open_clip")).text.activation == "gelu"
    assert load_clip(family("open_clip-quickgelu")).text.activation == "quick_gelu"
    assert load_clip(family("openai")).text.activation == "quick_gelu"
    assert load_clip(family("transformers")).text.activation == "quick_gelu"
    assert load_clip(family("transformers-gelu-eos2")).text.activation == "gelu"
    # same weights, another activation: another feature
    gelu, quick = make_open_clip(), make_open_clip(quick_gelu=True)
    quick.load_state_dict(gelu.state_dict())
    a, b = load_clip(scramble(gelu)), load_clip(scramble(quick))
    assert (encode(a) - encode(b)).abs().max() > 1e-4
    assert (a.encode_image(pixels_of()) - b.encode_image(pixels_of())).abs().max() > 1e-4
    assert a.weights_digest != b.weights_digest


@pytest.mark.parametrize("name", ["open_clip-resnet", "transformers-gelu-eos2"])
def test_digest_knows_every_weight(name, monkeypatch):
    # a load a weight, and no trial of each
    monkeypatch.setattr(fastfpl.clip.loading, "prove", lambda *given: None)
    model = copy.deepcopy(family(name))
    few = nn.Embedding(600, 32)  # a small vocabulary: the embedding is hashed once a weight
    if name == "open_clip-resnet":
        model.token_embedding = few
    else:
        model.text_model.embeddings.token_embedding = few
    tokens = Tokenizer(598, 599, lambda text: [])
    clip = load_clip(model, tokenizer=tokens)
    digest = clip.weights_digest
    assert digest == load_clip(copy.deepcopy(model), tokenizer=tokens).weights_digest
    assert digest == clip.to("cpu", torch.float32).weights_digest
    assert digest != clip.to(dtype=torch.float64).weights_digest
    for key, weight in model.state_dict().items():
        if weight.is_floating_point():
            last = weight.view(-1)[-1:]
            kept = last.clone()
            last += 0.125
            assert load_clip(model, tokenizer=tokens).weights_digest != digest, key
            last.copy_(kept)
    assert load_clip(model, tokenizer=tokens).weights_digest == digest


def test_digest_knows_what_no_weight_shows():
    model = make_open_clip()
    seen = {load_clip(model).weights_digest}
    for block in model.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    seen.add(load_clip(model).weights_digest)
    for block in model.visual.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = 2, 24
    seen.add(load_clip(model).weights_digest)
    model.visual.ln_post.eps = 1e-3
    seen.add(load_clip(model).weights_digest)
    model.visual.image_mean = (0.5, 0.5, 0.5)
    seen.add(load_clip(model).weights_digest)
    assert len(seen) == 5


def test_logit_scale_is_the_multiplier():
    model = make_openai()
    assert load_clip(model).logit_scale == pytest.approx(torch.tensor(2.0).exp().item())


# --- a live model proves itself, or is refused ----------------------------------------------------


class Scaled(nn.Linear):
    """A linear layer that does more than its weights say."""

    def forward(self, x):
        return 1.5 * super().forward(x)


class Warped(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 0.1 * x


class Prompted(nn.Module):
    """A block that puts deep prompts over its first tokens."""

    def __init__(self, block, width):
        super().__init__()
        for name in ("ln_1", "attn", "ln_2", "mlp"):
            setattr(self, name, getattr(block, name))
        self.inner = [block]
        self.prompt = nn.Parameter(torch.randn(2, width))

    def forward(self, x, **more):
        x = torch.cat([x[:, :1], x[:, 1:3] + self.prompt, x[:, 3:]], dim=1)
        return self.inner[0](x, **more)


class LowRank(nn.Module):
    """An attention with adapters of rank 2 that passes for its base by attribute, as peft's does.

    ``started`` is False for adapters as they are made: the second factor is zero.
    """

    def __init__(self, base, started):
        super().__init__()
        self.base_layer = base
        width = base.embed_dim
        self.lora_a = nn.Parameter(torch.randn(2, width))
        self.lora_b = nn.Parameter(torch.randn(width, 2) if started else torch.zeros(width, 2))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    def forward(self, query, *args, **kwargs):
        out, weights = self.base_layer(query, *args, **kwargs)
        return out + query @ self.lora_a.T @ self.lora_b.T, weights


class Merging(nn.Linear):
    """Merges in eval mode and takes it out again in train mode, as loralib does."""

    def __init__(self, base, started):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features))
        rank = torch.randn if started else torch.zeros
        self.lora_b = nn.Parameter(rank(base.out_features, 2))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.is_merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.lora_b @ self.lora_a)
            self.is_merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.is_merged else y + x @ self.lora_a.T @ self.lora_b.T


def swap(root, path, make):
    """Put ``make(part)`` into the place of a part."""
    where, _, name = path.rpartition(".")
    setattr(root.get_submodule(where), name, make(root.get_submodule(path)))


def with_weights(kind, part):
    new = kind(*(part.weight.shape[::-1] if isinstance(part, nn.Linear) else part.weight.shape))
    new.load_state_dict(part.state_dict())
    if isinstance(part, nn.LayerNorm):
        new.eps = part.eps
    return new


def double(part):
    """Replace the forward of an instance."""
    plain = part.forward
    part.forward = lambda *args, **kwargs: 2 * plain(*args, **kwargs)
    return part


def hook(part):
    part.register_forward_hook(lambda module, args, output: output + 0.1)
    return part


def prehook(part):
    part.register_forward_pre_hook(lambda module, args: (args[0] + 0.1, *args[1:]))
    return part


ADAPTERS = {
    "low rank": ("attn", lambda part: LowRank(part, True)),
    "low rank, zero at first": ("attn", lambda part: LowRank(part, False)),
    "merging": ("mlp.c_fc", lambda part: Merging(part, True)),
    "merging, zero at first": ("mlp.c_fc", lambda part: Merging(part, False)),
    "scaled linear": ("mlp.c_proj", functools.partial(with_weights, Scaled)),
    "own layer norm": ("ln_1", functools.partial(with_weights, Warped)),
    "deep prompts": ("", lambda part: Prompted(part, part.ln_1.weight.numel())),
    "forward hook": ("ln_2", hook),
    "forward pre-hook": ("mlp", prehook),
    "replaced forward": ("mlp.c_fc", double),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_the_text_tower_are_refused_by_path(kind, training):
    name, make = ADAPTERS[kind]
    path = "transformer.resblocks.1" + ("." + name if name else "")
    model = scramble(make_open_clip())
    swap(model, path, make)
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if "merging" in kind and not training:  # the weights have it already
        got = encode(load_clip(model))
        tokens = layout_of(load_clip(model), TEXTS).tokens
        with torch.no_grad():
            want = F.normalize(model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    else:
        with pytest.raises(
            KindError, match=rf"encode texts.* because of {path}[. ]|got one at {path}"
        ):
            load_clip(model)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the owner's weights have moved"
    assert all(part.training == training for part in model.modules())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_the_image_tower_are_taken_along_or_refused(kind, training):
    name, make = ADAPTERS[kind]
    path = "visual.transformer.resblocks.1" + ("." + name if name else "")
    model = scramble(make_open_clip())
    swap(model, path, make)
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if kind in ("own layer norm", "forward hook", "forward pre-hook"):
        with pytest.raises(KindError, match=rf"encode images.* because of {path}[. ]"):
            load_clip(model)
    else:
        clip = load_clip(model)
        got = clip.encode_image(pixels_of(), normalize=False)
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        with torch.no_grad():
            want = copy.deepcopy(model).eval().encode_image(pixels_of())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip._image.tokens(pixels_of())[:, 0], got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["text", "vision"])
def test_adapters_of_transformers_are_refused_by_path(side):
    for kind, part in ((Scaled, "mlp.fc1"), (Warped, "layer_norm1")):
        model = scramble(make_transformers())
        path = f"{side}_model.encoder.layers.1.{part}"
        swap(model, path, functools.partial(with_weights, kind))
        if (side, kind) == ("vision", Scaled):  # its own modules are taken along
            load_clip(model)
            continue
        with pytest.raises(KindError, match=rf"because of {path} \({kind.__name__}\)"):
            load_clip(model)


def test_hooks_that_may_do_something_later_are_refused():
    model = make_open_clip()
    gate = nn.Parameter(torch.zeros(()))
    model.ln_final.register_forward_hook(lambda module, args, output: output + gate * args[0])
    with pytest.raises(
        KindError, match=r"no hook that replaces what passes it.* got one at ln_final"
    ):
        load_clip(model)
    model = make_open_clip()
    model.visual.ln_post.register_forward_hook(lambda module, args, output: output + gate)
    with pytest.raises(KindError, match=r"got one at visual\.ln_post"):
        load_clip(model)


def test_a_method_of_its_own_is_refused():
    model = make_open_clip()
    plain = model.encode_text
    model.encode_text = lambda tokens: plain(tokens.flip(0))
    with pytest.raises(KindError, match=r"encode texts.*because of the model's own method"):
        load_clip(model)
    model = make_openai()
    model.encode_image = lambda pixels: model.visual(2 * pixels)
    with pytest.raises(KindError, match="encode images"):
        load_clip(model)
    model.encode_image = lambda pixels: [1]
    with pytest.raises(KindError, match=r"features of shape \(B, D\) from its own encode_image"):
        load_clip(model)
    del model.encode_image
    model.encode_text = None
    with pytest.raises(KindError, match="must have a method encode_text of its own"):
        load_clip(model)

    def fail(tokens):
        raise RuntimeError("no kernel\nand a long story")

    model.encode_text = fail
    with pytest.raises(
        KindError, match=r"must run its own encode_text; got RuntimeError: no kernel$"
    ):
        load_clip(model)


def test_a_tower_of_another_pass_gives_no_patches():
    model = scramble(make_open_clip())

    class Cut(type(model.visual)):
        def forward(self, x):
            return super().forward(x.flip(-1))

    model.visual.__class__ = Cut
    clip = load_clip(model)
    with torch.no_grad():
        want = model.encode_image(pixels_of())
    torch.testing.assert_close(clip.encode_image(pixels_of(), normalize=False), want)
    for same in (clip, clip.to(dtype=torch.float64)):
        with pytest.raises(NotSupported, match="which does more in its own pass than CLIP's image"):
            same.encode_image_tokens(pixels_of())


def test_a_trial_draws_nothing_and_leaves_autocast_alone():
    model = family("open_clip")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        load_clip(model)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.rand(3), want)


class Packed(torch.Tensor):
    """A weight that only its own library can multiply with, as torchao's are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.matmul):
            raise NotImplementedError("no kernel of int8")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_quantised_and_absent_weights_are_refused_by_path():
    model = make_open_clip()
    linear = model.transformer.resblocks[1].mlp.c_fc
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))
    said = r"plain floating point tensors in memory; got {} at transformer\.resblocks\.1\.mlp\.c_fc"
    with pytest.raises(KindError, match=said.format(r"Packed of torch\.float32 on cpu")):
        load_clip(model)
    whole = torch.zeros(linear.weight.shape, dtype=torch.int8)
    linear.weight = nn.Parameter(whole, requires_grad=False)
    with pytest.raises(KindError, match=said.format(r"Tensor of torch\.int8 on cpu")):
        load_clip(model)
    whole = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", whole)
    said = r"floating point weights; got torch\.int8 at transformer\.resblocks\.1\.mlp\.c_fc$"
    with pytest.raises(KindError, match=said):
        load_clip(model)
    with pytest.raises(
        KindError, match=r"got Parameter of .* on meta at |got Tensor of .* on meta at"
    ):
        load_clip(make_open_clip().to("meta"))


def test_other_models_of_transformers_are_refused():
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    small |= {"num_hidden_layers": 1, "vocab_size": 99, "image_size": 32, "patch_size": 16}
    for name in ("OwlViTModel", "Owlv2Model", "SiglipModel", "AltCLIPModel", "ChineseCLIPModel"):
        kind = getattr(transformers, name)
        config = kind.config_class()
        for part in (config.text_config, config.vision_config):
            for key, value in small.items():
                if hasattr(part, key):
                    setattr(part, key, value)
        with pytest.raises(KindError, match=r"^fastfpl\.load_clip: model must have .*; got "):
            load_clip(kind(config))


# names, files, tags


@pytest.fixture
def nano(monkeypatch):
    """Register a model small enough to write to disk, with two tags."""
    config = {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "nano", config)
    tags = {
        "openai": {"hf_hub": "nobody/nano/", "quick_gelu": True, "mean": (0.5,) * 3},
        "laion": {"hf_hub": "nobody/nano/", "std": (0.25,) * 3},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "nano", tags)
    return config


def same_weights(a, b):
    texts = torch.equal(encode(a), encode(b))
    return texts and torch.equal(a.encode_image(pixels_of()), b.encode_image(pixels_of()))


def test_random_weights_are_seeded_and_leave_the_generator(nano):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a, b = load_clip("nano", "random"), load_clip("nano", "random", seed=0)
    assert torch.equal(torch.rand(3), want)
    assert same_weights(a, b)
    assert a.weights_digest == b.weights_digest
    assert load_clip("nano", "random", seed=1).weights_digest != a.weights_digest
    assert a.text.activation == "gelu"
    quick = load_clip("nano", "random", quick_gelu=True)
    assert quick.text.activation == "quick_gelu"
    assert (a.name, a.pretrained) == ("nano", "random")


WRAPPERS = {
    "safetensors": lambda state: state,
    "pt": lambda state: state,
    "misnamed": lambda state: state,
    "ddp": lambda state: {"state_dict": under("module.", state), "epoch": 3, "name": "x"},
    "compiled": lambda state: {"model": under("_orig_mod.", state), "step": 3},
    "compiled in ddp": lambda state: {"model": under("module._orig_mod.", state)},
    "compiled tower": lambda state: {
        k.replace("visual.", "visual._orig_mod."): v for k, v in state.items()
    },
    "lightning": lambda state: {"state_dict": under("model.", state), "global_step": 3},
    "in a class of its own": lambda state: {"model_state_dict": under("backbone.clip.", state)},
    "twice": lambda state: {"model": {"state_dict": state}},
}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_checkpoints_load(nano, tmp_path, kind):
    model = scramble(make_open_clip())
    state = WRAPPERS[kind](model.state_dict())
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    (save_file if kind in ("safetensors", "misnamed") else torch.save)(state, path)
    with pytest.warns(
        UserWarning, match=r"weights .* do not say their activation .* of openai need"
    ):
        clip = load_clip("nano", path)
    assert same_weights(clip, load_clip(model))
    assert clip.text.activation == "gelu"
    assert load_clip("nano", str(path), quick_gelu=False).weights_digest == clip.weights_digest
    quick = load_clip("nano", str(path), quick_gelu=True)
    assert quick.text.activation == "quick_gelu"
    assert quick.weights_digest != clip.weights_digest


def test_a_run_says_which_activation_it_took(nano, tmp_path):
    torch.save(scramble(make_open_clip()).state_dict(), tmp_path / "w.pt")
    more = {"dataset": "digits", "clients": 2, "clip": "nano", "pretrained": tmp_path / "w.pt"}
    seen = {}
    for answer in ("yes", "no", False):
        result = fastfpl.run("zeroshot", quick_gelu=answer, cache=tmp_path / "cache", **more)
        seen[answer] = (result.settings["quick_gelu"], result.data["activation"])
        seen[result.data["weights"]] = None
    assert seen["yes"] == ("yes", "quick_gelu")
    assert seen["no"] == seen[False] == ("no", "gelu")
    assert len(seen) == 3 + 2, "another activation is another digest"
    with pytest.raises(InputError, match="quick_gelu must be left out with a model that is loaded"):
        fastfpl.run("zeroshot", quick_gelu="yes", dataset="digits", model=load_clip("tiny"))


def test_prefixes_that_are_not_taken_off_are_named(nano, tmp_path):
    path = tmp_path / "w.pt"
    state = under("net.", make_open_clip().state_dict())
    torch.save({**state, "loss.weight": torch.zeros(1)}, path)
    with pytest.raises(
        InputError,
        match=r"names lie under the prefix 'net\.', beside 'loss\.weight': save those alone$",
    ):
        load_clip("nano", path)
    torch.save({"model": state, "state_dict": state}, path)
    with pytest.raises(
        InputError, match=r"must hold one state dict; got .*'state_dict' and 'model'"
    ):
        load_clip("nano", path)
    state["net.ln_final.bias"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(
        InputError, match=r"shape of ln_final\.bias \(3,\), under the prefix 'net\.'$"
    ):
        load_clip("nano", path)


def transformers_folder(folder, act="quick_gelu"):
    model = scramble(make_transformers(act))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 49408
    (folder / "config.json").write_text(json.dumps(config))
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_folders_of_transformers_load(nano, tmp_path, act):
    model = transformers_folder(tmp_path, act)
    want = load_clip(model)
    clip = load_clip(f"local-dir:{tmp_path}")
    torch.testing.assert_close(encode(clip), encode(want), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        clip.encode_image_tokens(pixels_of()), want.encode_image_tokens(pixels_of())
    )
    assert (clip.text.activation, clip.mean, clip.std) == (act, (0.1, 0.2, 0.3), (0.5,) * 3)
    # under a name of open_clip, the folder or the file in it still tells the activation
    config = open_clip.factory._MODEL_CONFIGS["nano"]
    config["text_cfg"] = {**TEXT, "mlp_ratio": 72 / 32, "norm_kwargs": {"eps": 1e-4}}
    config["vision_cfg"] = {**VISION, "mlp_ratio": 2.0}
    for path in (tmp_path, tmp_path / "model.safetensors"):
        named = load_clip("nano", path)
        assert (named.text.activation, named.mean) == (act, (0.1, 0.2, 0.3))
        assert same_weights(named, clip)
    # elsewhere it does not
    moved = (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.warns(UserWarning, match="do not say their activation"):
        load_clip("nano", moved)
    assert load_clip(f"local-dir:{tmp_path}", "random").text.activation == act


def test_folders_of_open_clip_load(nano, tmp_path):
    model = scramble(make_open_clip(quick_gelu=True))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": {**nano, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.1] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    clip = load_clip(f"local-dir:{tmp_path}")
    assert same_weights(clip, load_clip(model))
    assert (clip.text.activation, clip.mean) == ("quick_gelu", (0.1,) * 3)
    assert clip.name == f"local-dir:{tmp_path}"
    assert load_clip("nano", tmp_path).text.activation == "quick_gelu"
    with pytest.raises(InputError, match=r"pretrained must be None or 'random' for 'local-dir:"):
        load_clip(f"local-dir:{tmp_path}", "openai")
    with pytest.raises(InputError, match=r"; a folder is 'local-dir:"):
        load_clip(str(tmp_path))
    nano["quick_gelu"] = True
    config["model_cfg"]["quick_gelu"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quick_gelu must be given where name and origin disagree"):
        load_clip("nano", tmp_path)


def test_folders_and_configs_that_are_refused(tmp_path):
    name = f"local-dir:{tmp_path}"
    config = tmp_path / "config.json"
    with pytest.raises(
        Missing, match=r"must be 'local-dir:' and a folder; got no folder .*nowhere"
    ):
        load_clip(f"{name}/nowhere")
    with pytest.raises(
        Missing, match=r"must hold open_clip_config\.json, or config\.json of trans"
    ):
        load_clip(name)
    for text, said in (
        ("{", "must be JSON; got JSONDecodeError"),
        ("[" * 100_000, "must be JSON; got RecursionError"),
        ("[]", "must be a JSON object; got list"),
        ('{"model_type": "owlvit"}', "of transformers' CLIPModel; got model_type 'owlvit'"),
        ('{"model_type": "clip", "text_config": 3}', "config .* must be one of open_clip or of"),
        ('{"model_type": "clip", "text_config": {"hidden_act": "silu"}}', "quick_gelu and silu"),
        ('{"model_type": "clip", "vision_config": {"num_attention_heads": 0}}', "must be one of"),
        ('{"model_cfg": {}}', "must be one of open_clip or of transformers' CLIPModel"),
        (
            '{"model_cfg": {"text_cfg": {}, "vision_cfg": {}}}',
            "must be one that open_clip can build",
        ),
    ):
        config.write_text(text)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises((Damaged, InputError, KindError), match=said):
            load_clip(name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        Missing, match=r"must hold its weights as open_clip_model\.safetensors, .*none"
    ):
        load_clip("ViT-B-32", tmp_path)


def test_the_hub_is_asked_by_name(nano, tmp_path, monkeypatch):
    model = transformers_folder(tmp_path)

    def download(repo, filename=None):
        assert repo == "somebody/clip"
        path = tmp_path / (filename or "open_clip_model.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name}\nand a long story")
        return str(path)

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
    clip = load_clip("hf-hub:somebody/clip")
    torch.testing.assert_close(encode(clip), encode(load_clip(model)), rtol=0, atol=1e-6)
    assert (clip.name, clip.pretrained, clip.mean) == ("hf-hub:somebody/clip", "", (0.1, 0.2, 0.3))
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        Missing,
        match=r"model 'hf-hub:somebody/clip' must be at hand or in reach; got FileNotFoundError: "
        r'no config\.json; .* load_clip\("local-dir:/path/to/folder"\)$',
    ):
        load_clip("hf-hub:somebody/clip")


def test_the_place_of_a_file_tells_its_tag(tmp_path):
    from fastfpl.clip.origins import origin_of

    def quick(model, *parts):
        return origin_of(tmp_path.joinpath(*parts), model).quick_gelu

    hub = "models--timm--vit_base_patch16_clip_224.openai"
    assert quick("ViT-B-16", hub, "snapshots", "0a1b", "open_clip_model.safetensors") is True
    assert quick("ViT-B-16", "vit_base_patch16_clip_224.metaclip_400m", "w.safetensors") is True
    hub = "models--laion--CLIP-ViT-B-16-laion2B-s34B-b88K"
    assert quick("ViT-B-16", hub, "snapshots", "0a1b", "open_clip_model.safetensors") is False
    assert quick("ViT-B-32", "vit_b_32-quickgelu-laion400m_e31-d867053b.pt") is True
    assert quick("ViT-B-16", "vit_b_16-laion400m_e31-00efa78f.pt") is False
    # may be anybody's
    assert quick("ViT-B-16", "ViT-B-16.pt") is None
    assert quick("ViT-B-16", "mine.pt") is None


def test_openai_archives_know_their_activation(nano, tmp_path):
    state = scramble(make_open_clip()).state_dict()
    torch.save({**state, "input_resolution": torch.tensor(SIDE)}, tmp_path / "w.pt")
    assert load_clip("nano", tmp_path / "w.pt").text.activation == "quick_gelu"


def test_openai_tag_implies_quick_gelu(nano, tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    torch.save(scramble(make_open_clip()).state_dict(), path)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: str(path))
    clip = load_clip("nano")
    assert (clip.pretrained, clip.text.activation, clip.mean) == (
        "openai",
        "quick_gelu",
        (0.5,) * 3,
    )
    other = load_clip("nano", "laion")
    assert (other.text.activation, other.std) == ("gelu", (0.25,) * 3)
    assert same_weights(clip, load_clip("nano", path, quick_gelu=True))
    with pytest.raises(InputError, match=r"quick_gelu must be None or True for the tag 'openai'"):
        load_clip("nano", quick_gelu=False)
    for name in open_clip.list_openai_models():
        assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"]


def test_weights_out_of_reach_name_the_cure(nano, monkeypatch):
    def fail(facts):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(
        Missing,
        match=r"^fastfpl\.load_clip: weights 'openai' of 'nano' must be .*; got OSError: no route "
        r"to host; .*load_clip\('nano', pretrained=\"/path/to/weights.safetensors\", "
        r"quick_gelu=True\) or --quick-gelu yes$",
    ):
        load_clip("nano")


def other_files(folder):
    """Yield files that are no weights, and what is said of them."""
    path = folder / "text.bin"
    for data, said in (
        (b"", "got an empty file"),
        (b"just a text about weights\n", "a file that begins with b'just a text"),
        (b"\x00" * 4096, r"a file that begins with b'\\x00"),
        (b"\x80\x02", "must be readable; got"),
        (b"\x80\x02Kzq\x00h\x05.", "must be readable; got|must hold tensors only"),
        (b"PK\x03\x04" + b"\x00" * 99, "must be readable; got BadZipFile"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "must be a safetensors file; got"),
    ):
        path.write_bytes(data)
        yield path, said
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    yield path, "got a zip archive of readme.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", "no pickle")
    yield path, "must be readable; got|must hold tensors only"
    text = folder / "text.safetensors"
    text.write_text("no weights either")
    yield text, "must be a safetensors file; got"
    whole = folder / "whole.safetensors"
    save_file({"a": torch.zeros(99)}, whole)
    data = whole.read_bytes()
    for size in (3, 20, len(data) - 5):
        text.write_bytes(data[:size])
        yield text, "must be a safetensors file; got"


def test_files_that_are_no_weights_are_told(nano, tmp_path):
    for path, said in other_files(tmp_path):
        for name in ("nano", "ViT-B-32"):
            with pytest.raises((Damaged, InputError), match=rf"^fastfpl\.load_clip: .*({said})"):
                load_clip(name, path)
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(Missing, match=r"is there, but is no file '.*fifo\.pt'"):
        load_clip("nano", tmp_path / "fifo.pt")
    for name in ("nul\0.pt", "x" * 300 + ".pt"):
        with pytest.raises(Missing, match="no file"):
            load_clip("nano", name)
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"must hold tensors by name, .* with no tensor"):
        load_clip("nano", tmp_path / "w.pt")
    torch.save({"model": {"a": torch.zeros(1), "b": 3}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"must hold tensors by name, .* with 'b' of int"):
        load_clip("nano", tmp_path / "w.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_of_others_are_told(nano, tmp_path):
    path = tmp_path / "w.pt"
    path.touch(mode=0)
    with pytest.raises(Damaged, match="must be readable; got PermissionError"):
        load_clip("nano", path)


def test_files_that_are_refused(nano, tmp_path):
    path = tmp_path / "w.pt"
    with pytest.raises(Missing, match=r"no file '.*w\.pt'"):
        load_clip("nano", path)
    path.write_bytes(pickle.dumps(subprocess.Popen))
    with pytest.raises(InputError, match=r"must hold tensors only; got .*w\.pt"):
        load_clip("nano", path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(InputError, match="must hold tensors by name"):
        load_clip("nano", path)
    state = make_open_clip().state_dict()
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises((Damaged, InputError), match=r"fastfpl\.load_clip"):
        load_clip("nano", path)
    bad = path.with_suffix(".safetensors")
    bad.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(Damaged, match="must be a safetensors file"):
        load_clip("nano", bad)
    torch.save({k: v for k, v in state.items() if k != "ln_final.bias"}, path)
    with pytest.raises(InputError, match=r"must fit the model; got no ln_final\.bias"):
        load_clip("nano", path)
    torch.save({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="got unknown extra"):
        load_clip("nano", path)
    torch.save({**state, "ln_final.bias": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"got another shape of ln_final\.bias \(3,\)"):
        load_clip("nano", path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_programs_are_refused(nano, tmp_path):
    script = torch.jit.script(nn.Linear(2, 2))
    torch.jit.save(script, tmp_path / "w.pt")
    with pytest.raises(InputError, match="a TorchScript archive, which is a program"):
        load_clip("nano", tmp_path / "w.pt")
    with pytest.raises(KindError, match="must be a plain module; got a TorchScript one"):
        load_clip(script)


def test_names_are_suggested():
    with pytest.raises(
        InputError,
        match=r"^fastfpl\.load_clip: name must be 'tiny' or a model of open_clip; got 'ViT-B16'; "
        r"did you mean 'ViT-B-16'",
    ):
        load_clip("ViT-B16")
    with pytest.raises(InputError, match=r"hub is 'hf-hub:openai/clip-vit-base-patch16'$"):
        load_clip("openai/clip-vit-base-patch16")
    with pytest.raises(
        InputError, match=r"tag of 'ViT-B-16'.*; got 'opnai'; did you mean 'openai'"
    ):
        load_clip("ViT-B/16", "opnai")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coca_ViT-B-32", "a captioning model"),
        ("roberta-ViT-B-32", "text tower 'roberta-base' of transformers"),
    ],
)
def test_other_text_towers_are_refused_by_name(name, said):
    with pytest.raises(KindError, match=f"CLIP's text transformer; got '{name}' with .*{said}"):
        load_clip(name, "random")


def refused_models():
    windowed = make_open_clip()
    windowed.attn_mask[12:, :4] = float("-inf")
    yield windowed, "an attention mask that is not causal"
    biased = make_open_clip()
    biased.attn_mask += torch.ones_like(biased.attn_mask).tril(-1)
    yield biased, "an attention mask that is not causal"
    mixed = make_openai()
    mixed.transformer.resblocks[1].attn_mask = None
    yield mixed, "must have one attention mask in its text tower; got causal blocks and"
    padded = make_open_clip(text={"no_causal_mask": True}, kind=CustomTextCLIP)
    padded.text.use_pad_mask = True
    yield padded, "got a mask of the pads alone"
    yield make_open_clip(text={"ls_init_value": 0.1}), "got ls_1 in block 0"
    yield make_open_clip(text={"qk_norm": True}), "got ln_q in block 0"
    yield make_open_clip(text={"scale_fc": True}), "got ln in block 0"
    yield make_open_clip(text={"pool_type": "first"}), "got pool_type 'first'"
    bent = make_open_clip()
    bent.transformer.resblocks[1].mlp.gelu = nn.SiLU()
    yield bent, "must use QuickGELU or GELU in its text tower; got SiLU"
    yield make_open_clip(text={"embed_cls": True}, kind=CustomTextCLIP), "no class token"
    adapted = make_open_clip()
    adapted.transformer.resblocks[1].mlp.c_fc = nn.Identity()
    yield adapted, "plain linear layers in its text tower; got Identity"
    yield nn.Linear(2, 2), "layout of open_clip, OpenAI's clip or transformers' CLIPModel"
    yield 3, "must be a model name or a live CLIP model; got int"


def test_other_models_are_refused():
    for model, said in refused_models():
        with pytest.raises(KindError, match=said):
            load_clip(model)


def test_one_eps_and_one_tokenizer():
    model = make_open_clip()
    model.ln_final.eps = 1e-3
    with pytest.raises(InputError, match="must have one LayerNorm eps"):
        load_clip(model)
    small = make_open_clip(text={"vocab_size": 600})
    with pytest.raises(InputError, match="tokenizer must be given for a vocabulary"):
        load_clip(small)
    with pytest.raises(InputError, match="tokenizer must stay inside the model's vocabulary"):
        load_clip(small, tokenizer=open_clip.SimpleTokenizer())
    with pytest.raises(InputError, match="must end a text with the model's token 7; got 49407"):
        load_clip(make_transformers(eos=7))
    with pytest.raises(KindError, match="tokenizer must be open_clip's"):
        load_clip(make_open_clip(), tokenizer=3)


def test_arguments_are_checked():
    model = family("open_clip")
    with pytest.raises(KindError, match=r"dtype must be float16, .*; got torch\.int8"):
        load_clip(model, dtype=torch.int8)
    with pytest.raises(InputError, match="pretrained must be None for a live model; got 'openai'"):
        load_clip(model, "openai")
    with pytest.raises(InputError, match="quick_gelu must be None for a live model; got True"):
        load_clip(model, quick_gelu=True)
    with pytest.raises(InputError, match="quick_gelu must be None or True for 'tiny'; got False"):
        load_clip("tiny", quick_gelu=False)
    clip = load_clip(model)
    with pytest.raises(
        InputError, match=r"pixels must have shape \(B, 3, 64, 64\); got \(1, 3, 8, 8\)"
    ):
        clip.encode_image(pixels_of(1, 8))
    with pytest.raises(KindError, match=r"pixels must be floating point; got torch\.uint8"):
        clip.encode_image(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    assert clip.encode_image(pixels_of(0)).shape == (0, 40)
    assert clip.encode_image_tokens(pixels_of(0)).shape == (0, 16, 40)


TIMM = {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear"}


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({**VISION, "pool_type": "avg"}, "VisionTransformer of 'CLIP', which pools its tokens by"),
        ({**TIMM, "image_size": SIDE}, "TimmModel of 'CLIP', which pools"),
    ],
)
def test_towers_without_tokens_say_so(vision, said):
    model = scramble(make_open_clip(vision))
    clip = load_clip(model)
    assert clip.patches is None
    with torch.no_grad():
        want = F.normalize(model.encode_image(pixels_of()), dim=-1)
    torch.testing.assert_close(clip.encode_image(pixels_of()), want)
    with pytest.raises(NotSupported, match=f"class token, or a modified ResNet; got {said}"):
        clip.encode_image_tokens(pixels_of())


def test_tokenizers_agree():
    model = family("open_clip")
    simple = open_clip.SimpleTokenizer()

    class HuggingFace:
        bos_token_id, eos_token_id = 49406, 49407

        def encode(self, text, add_special_tokens):
            ids = simple.encode(text)
            return [49406, *ids, 49407] if add_special_tokens else ids

    want = [simple.encode(t) for t in TEXTS]
    for tokenizer in (None, simple, open_clip.tokenize, HuggingFace()):
        clip = load_clip(model, tokenizer=tokenizer)
        assert (clip.sos, clip.eot) == (49406, 49407)
        assert clip.tokenize(TEXTS) == want
        assert clip.tokenize(TEXTS[0]) == want[:1]


def test_tiny_names_its_script_and_loads_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fastfpl.clip.tiny, "TINY", tmp_path)
    with pytest.raises(Missing, match=r"python -m fastfpl\.clip\.train_tiny makes it"):
        load_clip("tiny")
    merges = "#version: tiny\n" + "\n".join(["c a", "ca t</w>", "h o"])
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(merges.encode()))
    vocabulary = 512 + 3 + 2
    config = {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": vocabulary}}
    model = scramble(fastfpl.clip.tiny.build_tiny(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for text in (config, {"model_cfg": config, "preprocess_cfg": {"mean": [0, 0, 0]}}):
        (tmp_path / "config.json").write_text(json.dumps(text))
        clip = load_clip("tiny")
    assert isinstance(clip, FrozenCLIP)
    assert (clip.name, clip.mean, clip.eot) == ("tiny", (0.0, 0.0, 0.0), vocabulary - 1)
    assert len(clip.tokenize(["cat"])[0]) == 1
    with torch.no_grad():
        want = F.normalize(model.encode_text(layout_of(clip, ["cat", "hot"]).tokens), dim=-1)
    torch.testing.assert_close(encode(clip, ["cat", "hot"]), want, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="pretrained must be None or 'random' for 'tiny'"):
        load_clip("tiny", "openai")


def test_clip_and_prompts_go_to_a_spawned_process():
    clip = load_clip("tiny")
    rows = load_clip(family("open_clip"), tokenizer=open_clip.tokenize)  # a function
    classes = ClassPrompts(clip, ["cat", "sea horse"])
    ctx = classes.words("a photo of a")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.apply(encode_prompts, (classes, ctx))
        digest = pool.apply(getattr, (clip, "weights_digest"))
        ids = [pool.apply(one.tokenize, (TEXTS,)) for one in (clip, rows)]
    torch.testing.assert_close(theirs, encode_prompts(classes, ctx))
    assert digest == clip.weights_digest
    assert ids == [clip.tokenize(TEXTS), rows.tokenize(TEXTS)]


@pytest.mark.parametrize("name", FAMILIES)
def test_clips_of_every_family_pickle(name):
    clip = load_clip(family(name))
    again = pickle.loads(pickle.dumps(clip))
    assert again.weights_digest == clip.weights_digest
    assert same_weights(again, clip)
    assert again.tokenize(TEXTS) == clip.tokenize(TEXTS)


def test_import_is_light():
    code = (
        "import sys, fastfpl.clip\n"
        "heavy = {'open_clip', 'torchvision', 'transformers', 'timm'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
