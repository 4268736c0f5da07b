"""Small random CLIPs of every family, and what a family itself says of texts and images."""

from collections import OrderedDict

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

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


def same_weights(a, b):
    texts = torch.equal(encode(a), encode(b))
    return texts and torch.equal(a.encode_image(pixels_of()), b.encode_image(pixels_of()))
