"""Models whose text tower replaces prompts between its layers, written from what such codes do.

Two ways are usual: blocks of a list ``[states, deep prompts, how many were used]``, which the text
encoder is handed (MaPLe's manner), and blocks that keep a prompt of their own (IVLP's, VPT's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.coop_style import Encoder, Learner, Model
from tests.families import OpenAIBlock

__all__ = ["DeepEncoder", "DeepModel", "deep_model", "own_model"]


def put(x: Tensor, prompt: Tensor, first: int = 1) -> Tensor:
    """Let prompts (T, W) take the place of states (L, N, W) behind SOS."""
    rows = prompt.unsqueeze(1).expand(-1, x.shape[1], -1)
    return torch.cat([x[:first], rows, x[first + len(prompt) :]])


class ListBlock(OpenAIBlock):
    """A block that takes a list and passes it on."""

    head = False
    half = False

    def forward(self, inputs: list[Any]) -> list[Any]:
        x, deep, used = inputs
        if not self.head and used < len(deep):
            own = deep[used].half() if self.half else deep[used]
            x, used = put(x, own), used + 1
        return [super().forward(x), deep, used]


class OwnBlock(OpenAIBlock):
    """A block with a prompt of its own, if it has one."""

    prompt: Any
    half = False

    def forward(self, x: Tensor) -> Tensor:
        if self.prompt is not None:
            x = put(x, self.prompt.half() if self.half else self.prompt)
        return super().forward(x)


class DeepEncoder(Encoder):
    """Prompts, tokens, and prompts for the layers behind the first."""

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor, deeper: Any) -> Tensor:  # type: ignore[override]
        x = prompts + self.positional_embedding.type(self.dtype)
        x = self.transformer([x.permute(1, 0, 2), deeper, 0])[0].permute(1, 0, 2)
        x = self.ln_final(x).type(self.dtype)
        ends = tokenized_prompts.argmax(dim=-1)
        return x[torch.arange(x.shape[0]), ends] @ self.text_projection


class DeepModel(Model):
    """A model that hands deep prompts over, in the container that ``gather`` makes."""

    def __init__(self, clip: Any, learner: Learner, layers: int, gather: Any) -> None:
        super().__init__(clip, learner)
        self.text_encoder = DeepEncoder(clip)
        slots, width = learner.ctx.shape[-2:]
        drawn = [nn.Parameter(0.05 * torch.randn(slots, width)) for _ in range(layers)]
        self.deeper = nn.ParameterList([p.to(clip.dtype) for p in drawn])
        self.gather = gather

    def texts(self) -> list[Tensor]:
        tokens, deeper = self.tokenized_prompts, self.gather(self.deeper)
        return [F.normalize(self.text_encoder(self.prompt_learner(), tokens, deeper), dim=-1)]


def list_blocks(clip: Any, half: bool = False) -> Any:
    for i, block in enumerate(clip.transformer.resblocks):
        block.__class__ = ListBlock
        block.head, block.half = i == 0, half
    return clip


def deep_model(
    clip: Any,
    counts: list[int],
    layers: int = 2,
    gather: Any = list,
    half: bool = False,
    **options: Any,
) -> DeepModel:
    """A model in MaPLe's manner."""
    learner = Learner(clip, counts, **options)
    return DeepModel(list_blocks(clip, half), learner, layers, gather)


def own_blocks(clip: Any, layers: int, slots: int, half: bool = False) -> Any:
    for i, block in enumerate(clip.transformer.resblocks):
        block.__class__ = OwnBlock
        block.half = half
        block.register_parameter("prompt", None)
        if 0 < i <= layers:
            width = clip.positional_embedding.shape[1]
            block.prompt = nn.Parameter((0.05 * torch.randn(slots, width)).to(clip.dtype))
    return clip


def own_model(
    clip: Any,
    counts: list[int],
    layers: int = 2,
    half: bool = False,
    slots: int = 4,
    **options: Any,
) -> Model:
    """A model in IVLP's manner."""
    learner = Learner(clip, counts, slots=slots, **options)
    return Model(own_blocks(clip, layers, slots, half), learner)
