"""Prompt learning in the manner of CoOp, as small as it gets: no fastfpl anywhere.

    python docs/examples/coop_style.py

Random weights and images, so that it runs without a network. The image tower is frozen and nothing
is augmented: its features are computed once.
"""

import time

import open_clip
import torch
from torch import nn
from torch.nn import functional as F

NAMES = """apple, bear, beaver, bee, beetle, bicycle, bottle, bowl, bridge, bus, butterfly, camel,
castle, caterpillar, cattle, chimpanzee, clock, cloud, crab, crocodile, dinosaur, elephant,
flatfish, hamster, house, kangaroo, keyboard, lawn mower, leopard, lion, maple tree, motorcycle,
mountain, oak tree, orchid, palm tree, pickup truck, pine tree, streetcar, sweet pepper"""


class PromptLearner(nn.Module):
    """One context for all classes in front of their names."""

    def __init__(self, names, clip, slots):
        super().__init__()
        tokens = open_clip.SimpleTokenizer()([" ".join(["X"] * slots) + f" {n}." for n in names])
        with torch.no_grad():
            embedded = clip.token_embedding(tokens)
        self.tokens = tokens
        self.ctx = nn.Parameter(0.02 * torch.randn(slots, embedded.shape[-1]))
        self.register_buffer("token_prefix", embedded[:, :1])
        self.register_buffer("token_suffix", embedded[:, 1 + slots :])

    def forward(self):
        ctx = self.ctx.expand(len(self.token_prefix), -1, -1)
        return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)


class TextEncoder(nn.Module):
    """CLIP's text tower over embedded prompts."""

    def __init__(self, clip):
        super().__init__()
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.positional_embedding, self.attn_mask = clip.positional_embedding, clip.attn_mask
        self.text_projection = clip.text_projection

    def forward(self, prompts, tokens):
        x = self.transformer(prompts + self.positional_embedding, attn_mask=self.attn_mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


class PromptedCLIP(nn.Module):
    """Logits of image features against the prompted classes."""

    def __init__(self, names, clip, slots):
        super().__init__()
        self.prompt_learner = PromptLearner(names, clip, slots)
        self.text_encoder = TextEncoder(clip)
        self.logit_scale = clip.logit_scale

    def forward(self, image):
        text = self.text_encoder(self.prompt_learner(), self.prompt_learner.tokens)
        return self.logit_scale.exp() * image @ F.normalize(text, dim=-1).t()


def main(backbone="ViT-B-32", names=NAMES, slots=16, batch=32, steps=3):
    """Train the context for a few steps; return the losses and the seconds of the last step."""
    torch.manual_seed(0)
    clip = open_clip.create_model(backbone, pretrained=None).eval().requires_grad_(False)
    names = [" ".join(name.split()) for name in names.split(",")]
    model = PromptedCLIP(names, clip, slots)
    side = clip.visual.image_size[0]
    image = F.normalize(clip.encode_image(torch.randn(batch, 3, side, side)), dim=-1)
    label = torch.randint(len(names), (batch,))
    optimiser = torch.optim.SGD(model.prompt_learner.parameters(), lr=0.002, momentum=0.9)
    losses = []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = F.cross_entropy(model(image), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        seconds = time.perf_counter() - begin
        print(f"loss {losses[-1]:.6f}  {seconds:.3f} s")
    return losses, seconds


if __name__ == "__main__":
    main()
