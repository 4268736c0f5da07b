"""The frozen CLIP that every client shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfpl.clip.image import ImageTower
from fastfpl.clip.tokenizer import Tokenizer
from fastfpl.errors import KindError, NotSupported
from fastfpl.reference.text import TextTower
from fastfpl.shapes import check_shapes

__all__ = ["FrozenCLIP", "check_dtype", "unit"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that no tower computes in."""
    if dtype not in DTYPES:
        raise KindError(f"{op}: dtype must be float16, bfloat16, float32 or float64; got {dtype}")


class FrozenCLIP:
    """A CLIP that nobody trains: text weights, image features, tokens.

    It is no ``torch.nn.Module``: it has no parameters for an optimiser, no train mode and no state
    to send. `fastfpl.load_clip` makes it.

    Attributes
    ----------
    name : str
        The name that was loaded, or the class of the live model.
    pretrained : str
        Tag, path or ``"random"``; empty for a live model and for the embedded one.
    text : TextTower
        Weights of the text tower, ready for `fastfpl.encode_prompts`.
    dim, text_width, context_length, image_size : int
        D, W, L and S.
    patches : int or None
        Tokens P per image that `encode_image_tokens` gives; None where the tower has none.
    mean, std : tuple of three floats
        Of the pixels that `encode_image` expects.
    logit_scale : float
        The multiplier of the cosine similarities, already exponentiated. SigLIP's ``logit_bias``
        is left out: the same number added to every class cancels in softmax and in argmax.
    sos : int or None
        Token id that begins a prompt; None where nothing stands in front of the text.
    eot : int
        Token id that ends a prompt.
    device : torch.device
    dtype : torch.dtype
        Of weights and features; LayerNorm and BatchNorm stay in float32 when it has 16 bits.

    Notes
    -----
    What a live model shares: its parameters' storage, wherever device and dtype agree and the
    layout is the same (transformers' query, key and value weights are fused, thus copied). Running
    statistics are copied, and so is the weight of an adapter that merges itself for a pass; hooks
    are not taken along, and the owner's modes and ``requires_grad`` are never touched. Whoever
    trains the owner in place changes this CLIP as well and leaves `weights_digest` behind: hand in
    ``copy.deepcopy(model)`` then. Structure is read once: what is attached later is not seen.

    It pickles, with its weights and its tokenizer, for spawned workers.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: str,
        text: TextTower,
        image: ImageTower,
        tokenizer: Tokenizer,
        logit_scale: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.text = text
        self.logit_scale = logit_scale
        self.mean = _three(mean)
        self.std = _three(std)
        self._image = image
        self._tokenizer = tokenizer
        self._digest: str | None = None

    @property
    def dim(self) -> int:
        """Joint width D."""
        return self.text.dim

    @property
    def text_width(self) -> int:
        """Text width W."""
        return self.text.width

    @property
    def context_length(self) -> int:
        """Tokens L of a full prompt."""
        return self.text.context_length

    @property
    def image_size(self) -> int:
        """Side S of the square images."""
        return self._image.image_size

    @property
    def image_tower(self) -> ImageTower:
        """The image tower's own modules, for programs that take them along."""
        return self._image

    @property
    def patches(self) -> int | None:
        """Tokens P per image for transport, or None."""
        return self._image.patches

    @property
    def sos(self) -> int | None:
        """Id of the token that begins a prompt, None where none does."""
        return self.text.sos

    @property
    def eot(self) -> int:
        """Id of the token that ends a prompt."""
        return self.text.eot

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and features."""
        return self.text.dtype

    @property
    def weights_digest(self) -> str:
        """Hash of all weights, dtype and architecture; the key of feature caches.

        Computed once, when it is first asked for; equal for two loads of the same weights.
        """
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    def tokenize(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Split texts into token ids, without start, end and padding.

        Parameters
        ----------
        texts : str or sequence of str
            A text that begins with a space is tokenised as behind a word, where this matters.

        Returns
        -------
        list of lists of int
            One list a text, not cut at the context length.
        """
        return [self._tokenizer.encode(t) for t in ([texts] if isinstance(texts, str) else texts)]

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Encode images into their pooled features.

        Parameters
        ----------
        pixels : Tensor, shape (B, 3, S, S)
            Normalised with ``mean`` and ``std``; any device and dtype.
        normalize : bool
            Give unit length.

        Returns
        -------
        Tensor, shape (B, D), dtype of the CLIP

        Notes
        -----
        Differentiable in: pixels; no graph is kept unless they require a gradient. Deterministic:
        as the family's own modules are.
        """
        with self._grad(pixels):
            ready = self._pixels("encode_image", pixels)
            if not len(ready):
                return ready.new_zeros(0, self.dim)  # the families' reshapes refuse no images
            features = self._image.pooled(ready)
            return unit(features) if normalize else features

    def encode_image_tokens(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Encode images into one feature per patch, for transport.

        A vision transformer applies its last LayerNorm and its projection to every token and drops
        the class token; a modified ResNet pools with every token as the query and drops the mean
        token, so P is (S/32)².

        Parameters
        ----------
        pixels : Tensor, shape (B, 3, S, S)
            Normalised with ``mean`` and ``std``; any device and dtype.
        normalize : bool
            Give every token unit length.

        Returns
        -------
        Tensor, shape (B, P, D), dtype of the CLIP

        Raises
        ------
        NotSupported
            If the tower has no such tokens (``patches`` is None).

        Notes
        -----
        Differentiable in: pixels; no graph is kept unless they require a gradient.
        """
        patches = self._has_patches("encode_image_tokens")
        with self._grad(pixels):
            ready = self._pixels("encode_image_tokens", pixels)
            if not len(ready):
                return ready.new_zeros(0, patches, self.dim)
            tokens = self._image.tokens(ready)[:, 1:]
            return unit(tokens) if normalize else tokens

    def encode_image_both(self, pixels: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
        """Give what `encode_image` and `encode_image_tokens` give, of one pass through the tower.

        Parameters
        ----------
        pixels : Tensor, shape (B, 3, S, S)
            Normalised with ``mean`` and ``std``; any device and dtype.
        normalize : bool
            Give unit length.

        Returns
        -------
        pooled : Tensor, shape (B, D), dtype of the CLIP
        tokens : Tensor, shape (B, P, D), dtype of the CLIP

        Raises
        ------
        NotSupported
            If the tower has no such tokens (``patches`` is None).

        Notes
        -----
        Differentiable in: pixels; no graph is kept unless they require a gradient. Deterministic:
        bit for bit what the two calls give.
        """
        patches = self._has_patches("encode_image_both")
        with self._grad(pixels):
            ready = self._pixels("encode_image_both", pixels)
            if not len(ready):
                return ready.new_zeros(0, self.dim), ready.new_zeros(0, patches, self.dim)
            pooled, tokens = self._image.both(ready)
            tokens = tokens[:, 1:]
            return (unit(pooled), unit(tokens)) if normalize else (pooled, tokens)

    def _has_patches(self, op: str) -> int:
        """Count the patches of an image, or refuse a tower that has none."""
        if self.patches is None:
            raise NotSupported(
                f"fastfpl.FrozenCLIP.{op}: the image tower must be a vision "
                "transformer that pools by its class token, or a modified ResNet; got "
                f"{type(self._image.module).__name__} of {self.name!r}, which "
                f"{self._image.why_no_patches()}"
            )
        return self.patches

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FrozenCLIP:
        """Return this CLIP on a device in a dtype; what changes in neither is shared.

        Parameters
        ----------
        device : torch.device or str, optional
        dtype : torch.dtype, optional
            float16, bfloat16, float32 or float64.

        Returns
        -------
        FrozenCLIP
            This one if nothing changes.
        """
        where = self.device if device is None else _place(device)
        kind = self.dtype if dtype is None else dtype
        check_dtype("fastfpl.FrozenCLIP.to", kind)
        if where == self.device and kind == self.dtype:
            return self
        moved = FrozenCLIP(
            name=self.name,
            pretrained=self.pretrained,
            text=self.text.to(where, kind),
            image=self._image.to(where, kind),
            tokenizer=self._tokenizer,
            logit_scale=self.logit_scale,
            mean=self.mean,
            std=self.std,
        )
        if kind == self.dtype:
            moved._digest = self._digest
        return moved

    def __repr__(self) -> str:
        return (
            f"FrozenCLIP({self.name!r}, pretrained={self.pretrained!r}, dim={self.dim}, "
            f"text_width={self.text_width}, image_size={self.image_size}, patches={self.patches}, "
            f"device='{self.device}', dtype={self.dtype})"
        )

    def _pixels(self, op: str, pixels: Tensor) -> Tensor:
        side = self.image_size
        check_shapes(f"fastfpl.FrozenCLIP.{op}", pixels=(pixels, f"B 3 {side} {side}"))
        if not pixels.is_floating_point():
            raise KindError(
                f"fastfpl.FrozenCLIP.{op}: pixels must be floating point; got {pixels.dtype}"
            )
        return pixels.to(device=self.device, dtype=self.dtype)

    def _grad(self, pixels: Tensor) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad)

    def _hash(self) -> str:
        text = self.text
        facts = {
            "dtype": str(self.dtype),
            "text": [text.heads, text.activation, text.eps, text.sos, text.eot, *_whole(text)],
            "image": [self.image_size, self.patches, *self._image.facts()],
            "pixels": [self.mean, self.std],
            "logit_scale": self.logit_scale,
        }
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
        for name, tensor in (*_weights(text), *sorted(self._image.state())):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _whole(text: TextTower) -> list[object]:
    """Give the facts that decide a feature only where nothing of a prompt can be cut."""
    return [text.causal, text.pooling, text.pad] if text.whole else []


def _weights(text: TextTower) -> Iterator[tuple[str, Tensor]]:
    for field in fields(text):
        value = getattr(text, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
    for i, block in enumerate(text.blocks):
        for field in fields(block):
            yield f"blocks.{i}.{field.name}", getattr(block, field.name)


def unit(x: Tensor) -> Tensor:
    """Give vectors (..., D) length 1, as `FrozenCLIP` normalises features, in their dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(x.dtype)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    r, g, b = (float(v) for v in values)
    return r, g, b


def _place(device: torch.device | str) -> torch.device:
    """Name a device as tensors do: ``cuda`` is ``cuda:0``."""
    return torch.empty(0, device=device, dtype=torch.float32).device
