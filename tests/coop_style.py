"""Small models in the manner of the prompt-learning codes, over the parts of a real CLIP.

They have the structure that `fastfpl.accelerate` recognises, and nothing of anybody's text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SOS, EOT = 49406, 49407


def ids_of(counts: list[int], slots: int, length: int) -> Tensor:
    """Token ids of prompts: SOS, a stand-in for each context vector, a name, a full stop, EOT."""
    rows = torch.zeros(len(counts), length, dtype=torch.int64)
    for c, (row, count) in enumerate(zip(rows, counts, strict=True)):
        name = [320 + 7 * c + i for i in range(count)]
        ids = [SOS, *[343] * slots, *name, 269, EOT]
        row[: len(ids)] = torch.tensor(ids)
    return rows


class Learner(nn.Module):
    """Contexts between fixed embeddings."""

    def __init__(
        self,
        clip: Any,
        counts: list[int],
        slots: int = 4,
        position: str = "end",
        own: bool = False,
    ) -> None:
        super().__init__()
        length, width = clip.positional_embedding.shape
        self.tokenized_prompts = ids_of(counts, slots, length)
        with torch.no_grad():
            rows = clip.token_embedding(self.tokenized_prompts).to(clip.dtype)
        shape = (len(counts), slots, width) if own else (slots, width)
        self.ctx = nn.Parameter(0.02 * torch.randn(shape).to(clip.dtype))
        self.register_buffer("token_prefix", rows[:, :1])
        self.register_buffer("token_suffix", rows[:, 1 + slots :])
        self.counts, self.slots, self.class_token_position = counts, slots, position

    def contexts(self) -> Tensor:
        return self.ctx

    def forward(self) -> Any:
        return self.lay_out(self.contexts())

    def lay_out(self, ctx: Tensor) -> Tensor:
        if ctx.dim() == 2:
            ctx = ctx.unsqueeze(0).expand(len(self.counts), -1, -1)
        if self.class_token_position == "end":
            return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)
        half = self.slots // 2 if self.class_token_position == "middle" else 0
        prompts = []
        for c, count in enumerate(self.counts):
            suffix = self.token_suffix[c]
            parts = [self.token_prefix[c], ctx[c, :half], suffix[:count], ctx[c, half:]]
            prompts.append(torch.cat([*parts, suffix[count:]]))
        return torch.stack(prompts)


class StackedLearner(Learner):
    """Several prompts for each class, prompt after prompt, as FedOTP and PLOT stack them."""

    def __init__(self, clip: Any, counts: list[int], slots: int = 4, sets: int = 2) -> None:
        super().__init__(clip, counts, slots)
        width = self.ctx.shape[-1]
        self.ctx = nn.Parameter(0.02 * torch.randn(sets, slots, width).to(clip.dtype))
        self.tokenized_prompts = self.tokenized_prompts.repeat(sets, 1)
        self.sets = sets

    def forward(self) -> Tensor:
        ctx = self.ctx.unsqueeze(0).expand(len(self.counts), -1, -1, -1).permute(1, 0, 2, 3)
        ctx = ctx.contiguous().view(-1, *self.ctx.shape[1:])
        prefix = self.token_prefix.repeat(self.sets, 1, 1)
        return torch.cat([prefix, ctx, self.token_suffix.repeat(self.sets, 1, 1)], dim=1)


class LowRankLearner(Learner):
    """A shared context and a low-rank personal part: several sets while it trains, as FedPGP."""

    def __init__(self, clip: Any, counts: list[int], slots: int = 4, rank: int = 2) -> None:
        super().__init__(clip, counts, slots)
        width = self.ctx.shape[-1]
        self.left = nn.Parameter(0.1 * torch.randn(slots, rank).to(clip.dtype))
        self.right = nn.Parameter(0.1 * torch.randn(rank, width).to(clip.dtype))
        with torch.no_grad():
            self.register_buffer("plain", clip.token_embedding(self.tokenized_prompts))

    def forward(self) -> Any:
        whole = self.lay_out(self.ctx + self.left @ self.right)
        if not self.training:
            return whole
        return whole, self.plain, self.lay_out(self.ctx)


class Encoder(nn.Module):
    """CLIP's text tower over prompts that are already embedded."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.transformer = clip.transformer
        self.positional_embedding = clip.positional_embedding
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.dtype = clip.dtype

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
        x = prompts + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x).type(self.dtype)
        ends = tokenized_prompts.argmax(dim=-1)
        return x[torch.arange(x.shape[0]), ends] @ self.text_projection


class Model(nn.Module):
    """Logits of images against learned prompts; the images come as features."""

    def __init__(self, clip: Any, learner: Learner) -> None:
        super().__init__()
        self.prompt_learner = learner
        self.tokenized_prompts = learner.tokenized_prompts
        self.text_encoder = Encoder(clip)
        self.logit_scale = clip.logit_scale
        self.dtype = clip.dtype

    def texts(self) -> list[Tensor]:
        made = self.prompt_learner()
        sets = made if isinstance(made, tuple) else (made,)
        return [
            F.normalize(self.text_encoder(prompts, self.tokenized_prompts), dim=-1)
            for prompts in sets
        ]

    def forward(self, image: Tensor) -> Tensor:
        image = F.normalize(image.type(self.dtype), dim=-1)
        logits = [self.logit_scale.exp() * image @ text.t() for text in self.texts()]
        return torch.cat(logits, dim=-1)


class Transport(Model):
    """Patches against several prompts a class by a scaling loop with diagonal matrices."""

    steps, eps = 20, 0.1

    def scaled(self, kernel: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        over_rows = torch.matmul(torch.diag_embed(1 / rows, dim1=1), kernel)
        over_columns = torch.diag_embed(1 / columns) @ kernel.transpose(1, 2)
        u, v = torch.ones_like(rows), torch.ones_like(columns)
        for _ in range(self.steps):
            before = v
            u = (1 / (over_rows @ v.unsqueeze(-1)).squeeze(-1)).clamp(max=1)
            v = 1 / (over_columns @ u.unsqueeze(-1)).squeeze(-1)
            if (v - before).abs().mean().item() < 1e-3:
                break
        return torch.diag_embed(u) @ kernel @ torch.diag_embed(v)

    def forward(self, image: Tensor) -> Tensor:
        sets = self.prompt_learner.sets
        text = self.texts()[0].unflatten(0, (sets, -1))
        patches = F.normalize(image.type(self.dtype), dim=-1)
        sim = torch.einsum("bpd,ncd->bcpn", patches, text)
        flat = sim.flatten(0, 1)
        with torch.no_grad():
            rows = flat.new_full(flat.shape[:2], 1 / flat.shape[1])
            columns = flat.new_full((len(flat), sets), 0.8 / sets)
            plan = self.scaled(torch.exp((flat - 1) / self.eps), rows, columns)
        return self.logit_scale.exp() * (plan * flat).sum((-2, -1)).unflatten(0, sim.shape[:2])


class Attention(nn.Module):
    """Images attend to experts, class by class."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, experts: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, experts), (self.v, experts))
        )
        mixed = (10 * q @ k.mT).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


class Mixture(Model):
    """Own prompts and other clients' behind a gate; others' are encoded by swapping contexts."""

    def __init__(self, clip: Any, learner: Learner, others: Tensor) -> None:
        super().__init__(clip, learner)
        width = clip.text_projection.shape[1]
        self.gating = Attention(width, 2)
        self.others = others

    def experts(self) -> Tensor:
        kept = self.prompt_learner.ctx.detach().clone()
        features = []
        with torch.no_grad():
            for other in self.others:
                self.prompt_learner.load_state_dict({"ctx": other}, strict=False)
                features += self.texts()
            self.prompt_learner.load_state_dict({"ctx": kept}, strict=False)
        return torch.stack(features)

    def forward(self, image: Tensor) -> Tensor:
        image = F.normalize(image.type(self.dtype), dim=-1)
        text = self.texts()[0]
        experts = torch.cat([text[None], self.experts()]).transpose(0, 1)
        query = image.unsqueeze(0).repeat(len(text), 1, 1)
        wide = self.gating.q.weight.dtype
        mixed = self.gating(query.to(wide), experts.to(wide)).type(self.dtype)
        gated = torch.einsum("bd,cbd->bc", image, mixed)
        return self.logit_scale.exp() * (0.5 * image @ text.t() + gated)


class Conditional(Model):
    """Contexts that an image's features shift, as CoCoOp: prompts for every image and class."""

    joint = False

    def __init__(self, clip: Any, learner: Learner) -> None:
        super().__init__(clip, learner)
        width = learner.ctx.shape[-1]
        self.meta = nn.Sequential(
            nn.Linear(clip.text_projection.shape[1], 4), nn.ReLU(), nn.Linear(4, width)
        )

    def forward(self, image: Tensor) -> Tensor:
        image = F.normalize(image.type(self.dtype), dim=-1)
        contexts = self.prompt_learner.ctx + self.meta(image).unsqueeze(1)
        prompts = torch.stack([self.prompt_learner.lay_out(ctx) for ctx in contexts])
        if self.joint:
            tokens = self.tokenized_prompts.repeat(len(image), 1)
            text = self.text_encoder(prompts.flatten(0, 1), tokens).unflatten(0, (len(image), -1))
        else:
            text = torch.stack([self.text_encoder(p, self.tokenized_prompts) for p in prompts])
        scores = torch.einsum("bd,bcd->bc", image, F.normalize(text, dim=-1))
        return self.logit_scale.exp() * scores
