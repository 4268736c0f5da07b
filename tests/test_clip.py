"""The loaded CLIP is the family's own: text, pooled image and token features, frozen for good."""

import copy
import multiprocessing
import pickle
import subprocess
import sys

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import nn
from torch.nn import functional as F

import fastfpl
import fastfpl.clip.loading
import fastfpl.clip.tiny
from fastfpl.clip import load_clip
from fastfpl.clip.tokenizer import Tokenizer
from fastfpl.prompts import ClassPrompts, encode_prompts
from tests.families import (
    FAMILIES,
    TEXTS,
    encode,
    family,
    halve,
    layout_of,
    make_open_clip,
    make_openai,
    own_image,
    own_text,
    pixels_of,
    same_weights,
    scramble,
)


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
