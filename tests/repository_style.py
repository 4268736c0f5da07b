"""Structures of the prompt-learning repositories, written from what they do.

Each is a `Task`: a model over the parts of a CLIP in OpenAI's layout and the loss of one step.
Image features are given, since no image tower is swapped. A test of its own holds accelerated
against literal, ``bench/bench_dropin.py`` times both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.coop_style import (
    Conditional,
    Learner,
    LowRankLearner,
    Mixture,
    Model,
    StackedLearner,
    Transport,
    ids_of,
)
from tests.deep_style import DeepEncoder, DeepModel, ListBlock, list_blocks, own_blocks
from tests.families import OpenAIBlock

__all__ = ["TASKS", "Task", "step"]


class Task(NamedTuple):
    """A structure: how its model is made, and what one step of it does.

    Attributes
    ----------
    make : callable
        ``make(clip, counts, slots)`` returns the model; names have ``counts`` tokens.
    images : int
        How many images a step takes; 0 for patches of two images.
    backward : callable
        ``backward(model, image)`` fills the gradients and returns the logits.
    reason : str
        Why the text pass of a step is left as it is; empty where it is swapped.
    """

    make: Callable[..., nn.Module]
    images: int
    backward: Callable[[Any, Tensor], Tensor]
    reason: str = ""


def labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits), device=logits.device) % logits.shape[1]


def entropy(model: Any, image: Tensor) -> Tensor:
    logits: Tensor = model(image)
    F.cross_entropy(logits, labels(logits)).backward()
    return logits


def step(task: Task, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """One step: logits and the gradients of what is learned."""
    model.zero_grad()
    logits = task.backward(model, image)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), **grads}


def plain(kind: Any, learner: Any = Learner, **options: Any) -> Callable[..., nn.Module]:
    def make(clip: Any, counts: list[int], slots: int) -> nn.Module:
        return kind(clip, learner(clip, counts, slots=slots, **options))

    return make


class Anchored(Model):
    """KgCoOp and ProGrad keep the features of a hand-written prompt."""

    def __init__(self, clip: Any, learner: Learner) -> None:
        super().__init__(clip, learner)
        with torch.no_grad():
            ids = ids_of(learner.counts, learner.slots, clip.positional_embedding.shape[0])
            own = F.normalize(self.text_encoder(clip.token_embedding(ids), ids), dim=-1)
        self.register_buffer("anchor", own)


def knowledge(model: Anchored, image: Tensor) -> Tensor:
    text = model.texts()[0]
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ text.t()
    far = 1 - F.cosine_similarity(text, model.anchor, dim=-1)
    (F.cross_entropy(logits, labels(logits)) + 8 * far.mean()).backward()
    return logits


def projected(model: Anchored, image: Tensor) -> Tensor:
    """ProGrad: two backward passes of one forward, the second projected on the first."""
    logits = model(image)
    general = model.logit_scale.exp() * F.normalize(image, dim=-1) @ model.anchor.t()
    kept = F.kl_div(logits.log_softmax(-1), general.softmax(-1), reduction="batchmean")
    learned = model.prompt_learner.ctx
    F.cross_entropy(logits, labels(logits)).backward(retain_graph=True)
    task = learned.grad.clone()
    learned.grad = None
    kept.backward()
    along = (task * learned.grad).sum() / learned.grad.norm() ** 2
    learned.grad = task - along.clamp(max=0) * learned.grad
    return logits


def confident(model: Model, image: Tensor) -> Tensor:
    """TPT: the entropy of the mean over the most confident views of one image."""
    logits = model(image)
    own = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    mean = logits[own.argsort()[: max(1, len(logits) // 10)]].softmax(-1).mean(0)
    (-(mean * mean.log()).sum()).backward()
    return logits


class MaPLe(DeepModel):
    """Coupled prompts: what the text is given goes to the images by linear maps, too."""

    def __init__(self, clip: Any, learner: Learner, layers: int) -> None:
        super().__init__(list_blocks(clip), learner, layers, lambda x: x)
        width = learner.ctx.shape[-1]
        self.couple = nn.Linear(width, clip.text_projection.shape[1])

    def forward(self, image: Tensor) -> Tensor:
        # the image tower is given: what it would be told shifts its features
        shift = self.couple(torch.stack([self.prompt_learner.ctx, *self.deeper]).mean((0, 1)))
        return super().forward(image + 0.1 * shift)


def deep_of(clip: Any) -> int:
    return min(8, len(clip.transformer.resblocks) - 1)


def maple(clip: Any, counts: list[int], slots: int) -> nn.Module:
    return MaPLe(clip, Learner(clip, counts, slots=slots), deep_of(clip))


class CoPrompt(MaPLe):
    """MaPLe with adapters behind both sides, held to a frozen prompt of other words."""

    def __init__(self, clip: Any, learner: Learner, layers: int) -> None:
        super().__init__(clip, learner, layers)
        dim = clip.text_projection.shape[1]
        self.adapter = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim))
        counts = [count + 2 for count in learner.counts]
        ids = ids_of(counts, learner.slots, clip.positional_embedding.shape[0])
        self.register_buffer("sentences", clip.token_embedding(ids).detach())
        self.sentence_tokens = ids

    def texts(self) -> list[Tensor]:
        (text,) = super().texts()
        return [F.normalize(text + 0.1 * self.adapter(text), dim=-1)]


def consistent(model: CoPrompt, image: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = model.text_encoder(model.sentences, model.sentence_tokens, [])
    text = model.texts()[0]
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ text.t()
    far = 1 - F.cosine_similarity(text, fixed, dim=-1)
    (F.cross_entropy(logits, labels(logits)) + 8 * far.mean()).backward()
    return logits


class Independent(Anchored):
    """IVLP: prompts of its own in the blocks. PromptSRC holds its features to fixed ones."""

    def __init__(self, clip: Any, learner: Learner, layers: int) -> None:
        super().__init__(clip, learner)  # the anchor is what the plain tower gives
        own_blocks(clip, layers, learner.slots)


def ivlp(clip: Any, counts: list[int], slots: int) -> nn.Module:
    return Independent(clip, Learner(clip, counts, slots=slots), deep_of(clip))


class Sentences(nn.Module):
    """The text features of fixed sentences, made anew in every forward."""

    def __init__(self, clip: Any, counts: list[int], slots: int) -> None:
        super().__init__()
        self.clip = clip
        self.ids = ids_of(counts, slots, clip.positional_embedding.shape[0])

    def forward(self) -> Tensor:
        return F.normalize(
            self.clip.encode_text(self.ids.to(self.clip.text_projection.device)), dim=-1
        )


class Adapter(nn.Module):
    """CLIP-Adapter: a bottleneck behind the image; the text is only encoded."""

    def __init__(self, clip: Any, counts: list[int], slots: int) -> None:
        super().__init__()
        dim = clip.text_projection.shape[1]
        self.sentences = Sentences(clip, counts, slots)
        self.adapter = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim))

    def forward(self, image: Tensor) -> Tensor:
        mixed = F.normalize(0.2 * self.adapter(image) + 0.8 * image, dim=-1)
        return 50 * mixed @ self.sentences().t()


class Cache(nn.Module):
    """Tip-Adapter: keys of the images of a few shots; the classifier is encoded once."""

    def __init__(self, clip: Any, counts: list[int], slots: int) -> None:
        super().__init__()
        self.sentences = Sentences(clip, counts, slots)
        with torch.no_grad():
            self.register_buffer("classifier", self.sentences())
        draw = torch.Generator().manual_seed(5)
        keys = torch.randn(4 * len(counts), self.classifier.shape[1], generator=draw)
        self.keys = nn.Parameter(F.normalize(keys, dim=-1).to(self.classifier.dtype))
        values = torch.eye(len(counts)).repeat(4, 1)
        self.register_buffer("values", values.to(self.classifier.dtype))

    def forward(self, image: Tensor) -> Tensor:
        image = F.normalize(image, dim=-1)
        near = (-5 * (1 - image @ self.keys.t())).exp()
        return 50 * image @ self.classifier.t() + near @ self.values


class Decoupled(Model):
    """DePT: a second head on channels that are scaled and shifted."""

    def __init__(self, clip: Any, learner: Learner) -> None:
        super().__init__(clip, learner)
        dim = clip.text_projection.shape[1]
        self.scale, self.shift = (nn.Parameter(t) for t in (torch.ones(dim), torch.zeros(dim)))
        self.head = nn.Linear(dim, len(learner.counts))

    def forward(self, image: Tensor) -> Tensor:
        text = self.texts()[0]
        image = F.normalize(image, dim=-1)
        own = self.head(image * self.scale + self.shift)
        return 0.5 * self.logit_scale.exp() * image @ text.t() + 0.5 * own


class KnowingBlock(ListBlock):
    """TCP: in one layer each class gets prompts of its own in place of the context."""

    at = False

    def forward(self, inputs: list[Any]) -> list[Any]:
        x, deep, used = inputs
        if self.at:
            own = deep.transpose(0, 1)
            x = torch.cat([x[:1], own, x[1 + len(own) :]])
        return [OpenAIBlock.forward(self, x), deep, used]


class Knowing(Anchored):
    """TCP: prompts of every class, made of its textual features."""

    def __init__(self, clip: Any, learner: Learner) -> None:
        super().__init__(clip, learner)
        for i, block in enumerate(clip.transformer.resblocks):
            block.__class__ = KnowingBlock
            block.at = i == deep_of(clip)
        self.text_encoder = DeepEncoder(clip)
        dim, (slots, width) = clip.text_projection.shape[1], learner.ctx.shape[-2:]
        self.slots = slots
        self.meta = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, slots * width))

    def texts(self) -> list[Tensor]:
        own = self.meta(self.anchor).unflatten(-1, (self.slots, -1))
        features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts, own)
        return [F.normalize(features, dim=-1)]


def transport(clip: Any, counts: list[int], slots: int) -> nn.Module:
    return Transport(clip, StackedLearner(clip, counts, slots=slots))


def mixture(clip: Any, counts: list[int], slots: int) -> nn.Module:
    learner = Learner(clip, counts, slots=slots)
    return Mixture(clip, learner, 0.02 * torch.randn(3, *learner.ctx.shape))


def one_class(clip: Any, counts: list[int], slots: int) -> nn.Module:
    return Model(clip, Learner(clip, counts[:1], slots=slots))


def conditional(clip: Any, counts: list[int], slots: int) -> nn.Module:
    model = Conditional(clip, Learner(clip, counts, slots=slots))
    model.joint = False
    return model


TASKS = {
    "CoOp, PromptFL": Task(plain(Model), 8, entropy),
    "CoOp, a context for each class": Task(plain(Model, own=True), 8, entropy),
    "CoCoOp": Task(conditional, 2, entropy),
    "KgCoOp": Task(plain(Anchored), 8, knowledge),
    "ProGrad": Task(plain(Anchored), 8, projected),
    "PLOT, FedOTP": Task(transport, 0, entropy),
    "FedPGP": Task(plain(Model, LowRankLearner), 8, entropy),
    "pFedMoAP": Task(mixture, 8, entropy),
    "MaPLe": Task(maple, 8, entropy),
    "IVLP, PromptSRC": Task(ivlp, 8, knowledge),
    "CoPrompt": Task(
        lambda c, n, s: CoPrompt(c, Learner(c, n, slots=s), deep_of(c)), 8, consistent
    ),
    "TPT": Task(plain(Model), 64, confident),
    "CLIP-Adapter": Task(Adapter, 8, entropy),
    "Tip-Adapter": Task(Cache, 8, entropy, "no text is encoded in a step"),
    "DePT": Task(plain(Decoupled), 8, entropy),
    "TCP": Task(plain(Knowing), 8, entropy, "a trial call of it raised"),
    "one class": Task(one_class, 8, entropy),
}
