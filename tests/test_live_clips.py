"""A live model proves itself, or is refused by the name of what is unlike CLIP."""

import copy
import functools

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import nn
from torch.nn import functional as F

from fastfpl.clip import load_clip
from fastfpl.errors import InputError, KindError, NotSupported
from tests.families import (
    SIDE,
    TEXTS,
    VISION,
    encode,
    family,
    layout_of,
    make_open_clip,
    make_openai,
    make_transformers,
    pixels_of,
    scramble,
)


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
