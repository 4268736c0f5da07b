"""FedAPT: domain keys scale one global context; every test image gets its own mixture of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fastfpl.methods.base import (
    Batch,
    Method,
    State,
    Task,
    Upload,
    cross_entropy,
    weighted_mean,
)
from fastfpl.methods.base import Options as _Options
from fastfpl.ops.memory import current_limit
from fastfpl.ops.text import encode_text
from fastfpl.prompts import ClassPrompts
from fastfpl.reference.text import encode_together
from fastfpl.seeds import generator

__all__ = ["FedAPT", "key_weights"]

# bytes of the contexts and text features of one pass over several keys
_BYTES_PER_PASS = 1 << 26


class FedAPT(Method):
    """Clients train a global context and a domain query network under frozen keys.

    Every domain d has a key k_d, (T, W) numbers of U[0, 1) that are drawn once from the seed, known
    to all and never trained. A client's prompts are ctx * (1 + k_d) with the key of its domain; the
    query network W_q, linear without bias, sees image features as the tower gives them (not of unit
    length). The loss is CE(logits, label) + CE(W_q f, d); context and W_q are averaged, every
    client with the same weight.

    The global model mixes the keys for each test image: the scores W_q f are standardised over the
    keys (unbiased variance; if they are all equal, so are the weights), w = softmax(scores / t),
    and the image's prompts are ctx * (1 + sum_d w_d k_d). Weights are rounded to the dtype of the
    text tower. An image whose largest weight is then 1 is scored under that key's prompts, which
    are encoded once an evaluation: what the other weights add is below the rounding of 1 + k. All
    other images are scored under their own prompts, encoded once for equal weights.

    The domains are those of the clients: a domain that no client has has no key. If a client's
    images come from several domains, or all clients' from one, every client has a key of its own.
    Over another list of classes (novel classes, another data set) a class that was not trained has
    no context of its own (with ``class_specific``): it gets the mean of the trained contexts.

    Source: Su et al. 2024 (FedAPT, AAAI, arXiv 2211.07864) as its released code has it; the
    constant token embeddings are not averaged.
    """

    name = "fedapt"
    summary = "one global prompt scaled by a mixture of domain keys, chosen by each image"
    sends = "the context and the domain query network"
    receives = "the context, the domain query network, and which key is its own"
    image_kind = "raw"
    scores = "mixes its keys anew for every image"

    class Options(_Options):
        """Options of FedAPT."""

        class_specific: bool = Field(True, description="every class has a context of its own")
        temperature: float = Field(
            0.01, gt=0, description="divides the scores of the keys; towards 0 one key is chosen"
        )

    options: Options

    def __init__(self, task: Task, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, options)
        self._trained_names = task.classes.names
        self._places: Tensor | None = None  # of other classes among those that were trained
        domains = task.client_domains
        if domains is None or len(set(domains)) < 2:
            domains = tuple(range(task.clients))
        present = sorted(set(domains))
        self._key_of = [present.index(domain) for domain in domains]
        tower = task.classes.tower
        slots = task.initial_ctx().shape[-2]
        draw = generator(task.seed, "keys")
        keys = torch.rand(len(present), slots, tower.width, generator=draw, dtype=torch.float32)
        self.keys = keys.to(tower.device, self.task.dtype)  # (K, T, W)

    def on(self, classes: ClassPrompts) -> Method:
        """Return the same method over another class list; states stay those of the trained one."""
        other = super().on(classes)
        assert isinstance(other, FedAPT)
        other._trained_names = self._trained_names
        if classes.names != self._trained_names:
            place = {name: c for c, name in enumerate(self._trained_names)}
            at = [place.get(name, len(place)) for name in classes.names]
            # on the device once: a list would be copied there in every pass
            other._places = torch.tensor(at, device=self.keys.device)
        # a client that came later has its key here too
        other._key_of, other.keys = self._key_of, self.keys.to(other.keys.device)
        return other

    def admit(self, server: State, name: str, domain: int | None) -> tuple[Method, State]:
        """Give the newcomer the key of its domain, if a client has it, or a key of its own.

        A new key is drawn as the others were, T W numbers of U[0, 1), and a row of the query
        network for it as ``torch.nn.Linear`` draws it, both from the run's seed and the name.
        """
        other = type(self)(self.task, self.options.model_dump())
        other._trained_names, other._places = self._trained_names, self._places
        other._key_of, other.keys = [*self._key_of], self.keys
        domains = self.task.client_domains or ()
        if len(set(domains)) > 1 and domain in domains:
            other._key_of.append(self._key_of[domains.index(domain)])
            return other, server
        other._key_of.append(len(self.keys))
        draw = generator(self.task.seed, "keys", name)
        key = torch.rand(*self.keys.shape[1:], generator=draw, dtype=torch.float32)
        row = 2 * torch.rand(server["query"].shape[1], generator=draw, dtype=torch.float32) - 1
        other.keys = torch.cat((self.keys, key.to(self.keys)[None]))
        row = (row / len(row) ** 0.5).to(server["query"])
        return other, {**server, "query": torch.cat((server["query"], row[None]))}

    def server_init(self) -> State:
        """Hold the context, and the query network as ``torch.nn.Linear`` draws its weights."""
        ctx, tower = self.task.initial_ctx(), self.task.classes.tower
        if self.options.class_specific:
            shape = len(self._trained_names), *ctx.shape
            if self.task.ctx_init is None:
                draw = torch.randn(
                    shape, generator=generator(self.task.seed, "ctx"), dtype=torch.float32
                )
                ctx = (0.02 * draw).to(tower.device, self.task.dtype)
            else:
                ctx = ctx.expand(shape).clone()
        draw = torch.rand(
            len(self.keys),
            tower.dim,
            generator=generator(self.task.seed, "query"),
            dtype=torch.float32,
        )
        query = (2 * draw - 1) / tower.dim**0.5
        return {"ctx": ctx, "query": query.to(tower.device, self.task.dtype)}

    def download(self, server: State, client: int, round_: int) -> State:
        """Send context and query, and say which key is the client's."""
        key = torch.tensor(self._key_of[client], device=server["ctx"].device)
        return {"ctx": server["ctx"], "query": server["query"], "key": key}

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        """Start from the global state; in training under the client's key, else under all."""
        trained = {"ctx": down["ctx"], "query": down["query"]}
        return trained, {"key": down["key"]} if training else {}

    def merge(
        self, server: State, uploads: Mapping[int, Upload], images: Mapping[int, int], round_: int
    ) -> State:
        """Average context and query over clients, all with the same weight."""
        same = dict.fromkeys(uploads, 1)
        new = {n: weighted_mean(uploads, same, n, server[n]) for n in ("ctx", "query")}
        return {**server, **new}

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        """Send context and query; keep nothing."""
        return {"ctx": trained["ctx"], "query": trained["query"]}, own

    # -- text ----------------------------------------------------------------------------------

    def text(self, trained: State, fixed: State) -> Tensor:
        """Encode under the client's key: (U, C, D); in evaluation under every key: (U, K, C, D)."""
        if "key" in fixed:
            return self._encode(trained["ctx"], self.keys[fixed["key"]])
        return torch.stack([torch.cat(list(self._passes(c, self.keys))) for c in trained["ctx"]])

    def _encode(self, ctx: Tensor, keys: Tensor) -> Tensor:
        """Scale contexts (..., [C,] T, W) by 1 + keys (..., T, W) and encode: (..., C, D)."""
        classes = self.task.classes
        if self.options.class_specific:
            ctx, keys = self._of_classes(ctx), keys[..., None, :, :]
        ctx = ctx * (1 + keys)
        layout = classes.layout(ctx.shape[-2])
        return encode_text(classes.tower, layout, ctx, class_specific=self.options.class_specific)

    def _of_classes(self, ctx: Tensor) -> Tensor:
        """Give each class of the list its context: its own if it was trained, else the mean."""
        if self._places is None:
            return ctx
        mean = ctx.mean(dim=-3, keepdim=True)
        return torch.cat((ctx, mean), dim=-3)[..., self._places.to(ctx.device), :, :]

    def _passes(self, ctx: Tensor, keys: Tensor) -> Iterator[Tensor]:
        """Encode one context under many keys (G, T, W), some at a time: (some, C, D)."""
        tower = self.task.classes.tower
        classes = len(self.task.classes)
        inputs = classes * keys[0].numel() if self.options.class_specific else keys[0].numel()
        most = min(_BYTES_PER_PASS, current_limit() or _BYTES_PER_PASS)
        size = max(1, most // ((inputs + classes * tower.dim) * self.task.dtype.itemsize))
        for some in keys.split(size):
            yield self._encode(ctx.expand(len(some), *ctx.shape), some)

    def scoring_numbers(self, fixed: State, image: Sequence[int]) -> int:
        """Count the unit-length features and the weights of the keys too."""
        return super().scoring_numbers(fixed, image) + image[0] + 3 * len(self.keys)

    # -- logits and loss -----------------------------------------------------------------------

    def logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Score raw image features (U, B, D) under the client's key, or each under its mixture."""
        unit = unit_images(image)
        if "key" in fixed:
            return self.task.logit_scale * unit @ text.mT
        rows = zip(text, trained["ctx"], self.domain_scores(trained, image), unit, strict=True)
        return torch.stack([self._mixed(*row) for row in rows])

    def _mixed(self, pure: Tensor, ctx: Tensor, scores: Tensor, unit: Tensor) -> Tensor:
        """Score images (B, D) with scores (B, K); pure (K, C, D) are the keys' text features."""
        weights = key_weights(scores, self.options.temperature).to(pure.dtype)
        logits = unit.new_empty(len(unit), pure.shape[1])
        largest, chosen = weights.max(dim=-1)
        alone = largest == 1
        for key in chosen[alone].unique().tolist():
            at = (alone & (chosen == key)).nonzero()[:, 0]
            logits[at] = self.task.logit_scale * unit[at] @ pure[key].mT
        rest = (~alone).nonzero()[:, 0]
        if len(rest):
            rows, which = weights[rest].unique(dim=0, return_inverse=True)
            mixtures = torch.einsum("gk,ktw->gtw", rows.to(self.task.dtype), self.keys)
            group = 0
            for features in self._passes(ctx, mixtures):
                for feature in features:
                    at = rest[which == group]
                    logits[at] = self.task.logit_scale * unit[at] @ feature.mT
                    group += 1
        return logits

    def traced_logits(self, text: Tensor, trained: State, fixed: State, image: Tensor) -> Tensor:
        """Score every image under its own mixture, encoded literally at full length."""
        unit = unit_images(image)
        if "key" in fixed:
            return self.task.logit_scale * unit @ text.mT
        classes, parts = self.task.classes, []
        rows = zip(trained["ctx"], self.domain_scores(trained, image), unit, strict=True)
        for ctx, scores, images in rows:
            weights = key_weights(scores, self.options.temperature).to(text.dtype)
            mixed = 1 + torch.einsum("bk,ktw->btw", weights.to(self.task.dtype), self.keys)
            if self.options.class_specific:
                ctx, mixed = self._of_classes(ctx), mixed[:, None]
            own = ctx * mixed
            if not self.options.class_specific:
                own = own[:, None].expand(-1, len(classes), -1, -1)
            features = encode_together(classes.tower, classes.layout(ctx.shape[-2]), own)
            parts.append(self.task.logit_scale * torch.einsum("bd,bcd->bc", images, features))
        return torch.stack(parts)

    def class_features(self, text: Tensor, trained: State, fixed: State) -> Tensor | None:
        """Return the features under the only key, where there is one."""
        if "key" in fixed:
            return text
        return text[:, 0] if len(self.keys) == 1 else None

    def one_context(self, trained: State, fixed: State) -> Tensor | None:
        """Return the context under the only key, where classes share it."""
        if "key" in fixed or len(self.keys) > 1 or self.options.class_specific:
            return None
        return trained["ctx"] * (1 + self.keys[0])

    def domain_scores(self, trained: State, image: Tensor) -> Tensor:
        """W_q f of raw image features (U, B, D) -> (U, B, K), in the dtype of the task."""
        return image.to(self.task.dtype) @ trained["query"].mT

    def domain_loss(self, trained: State, fixed: State, image: Tensor, mask: Tensor) -> Tensor:
        """Mean cross entropy of the domain scores against the client's key -> (U,)."""
        scores = self.domain_scores(trained, image)
        return cross_entropy(scores, fixed["key"][:, None].expand(mask.shape), mask)

    def loss(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> Tensor:
        """Cross entropy of the labels plus that of the domain."""
        labels = super().loss(text, trained, fixed, batch)
        return labels + self.domain_loss(trained, fixed, batch.image, batch.mask)


def unit_images(image: Tensor) -> Tensor:
    """Give raw image features unit length, as `FrozenCLIP.encode_image` does."""
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(image.dtype)


def key_weights(scores: Tensor, temperature: float) -> Tensor:
    """Turn scores (..., K) into weights (..., K): standardise over the keys, softmax.

    Parameters
    ----------
    scores : Tensor, shape (..., K), floating point
    temperature : float > 0

    Returns
    -------
    Tensor, shape (..., K)
        Sums to 1. Where all scores are equal (or K is 1) every key weighs 1 / K.

    Notes
    -----
    The variance is the unbiased one. Source: server inference of FedAPT, as released.
    """
    centred = scores - scores.mean(dim=-1, keepdim=True)
    variance = centred.square().sum(dim=-1, keepdim=True) / max(1, scores.shape[-1] - 1)
    standard = centred / torch.where(variance > 0, variance, 1).sqrt()
    return (standard / temperature).softmax(dim=-1)
