"""Text encoders that take token ids: OpenAI's clip, open_clip and transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfpl.dropin import tower as towers
from fastfpl.dropin.output import lazy_output
from fastfpl.dropin.proof import Text, Through
from fastfpl.dropin.sharing import Sharing
from fastfpl.dropin.swap import State, hooked, refuse, register
from fastfpl.dropin.text import (
    check_dtypes,
    check_mask,
    check_plain,
    deep_of,
    example_ends,
    has_tower,
    project,
    states_of,
    takes,
)

__all__ = ["TOKENS"]


class _Tokens(Text):
    """A method that takes token ids, over OpenAI's or open_clip's parts."""

    def example(self, module: Any, form: Any, count: int) -> tuple[Tensor, ...]:
        """Draw token ids that end at different places."""
        embedding = module.token_embedding
        size = embedding.num_embeddings
        _, eos = self.pooling(module)
        end = size - 1 if eos is None else eos
        length = module.positional_embedding.shape[0]
        return _example_ids(length, size, end, embedding.weight.device, count)

    def pooling(self, module: Any) -> tuple[str, int | None]:
        """Tell which token's state becomes the feature."""
        raise NotImplementedError

    def encode(self, module: Any, state: State, text: Any, through: Through) -> tuple[Tensor, str]:
        """Encode token ids into projected features."""
        rule, eos = self.pooling(module)
        if not isinstance(text, Tensor) or text.dim() != 2 or text.is_floating_point():
            refuse("the text is not token ids (texts, tokens)")
        memory = self.memory(module, state)
        live, own = towers.read(towers.Resblocks, module, memory, [module.token_embedding])
        weight = live.blocks[0].qkv_w
        check_plain(text, weight)
        if text.shape[1] != live.context_length or not len(text):
            refuse("the texts do not have the text tower's length")
        ids = text.cpu()
        ends = _ends(ids, rule, eos)
        x = module.token_embedding(text[:, : max(ends) + 1]).to(weight.dtype)
        deep = deep_of(own, live, text, through)
        states, how = states_of(live, x, ends, Sharing(1, None, _same_ids(ids)), deep)
        return project(module, states), how


class Clip(_Tokens):
    """``encode_text`` of OpenAI's clip and of open_clip's CLIP."""

    name = "encode_text"
    method = "encode_text"

    def examine(self, module: nn.Module) -> bool:
        """Recognise a method encode_text over CLIP's parts in the module itself."""
        if not hasattr(type(module), "encode_text") or not has_tower(module):
            return False
        if not isinstance(getattr(module, "token_embedding", None), nn.Embedding):
            refuse("it has no token_embedding of its own")
        if "encode_text" in vars(module):
            refuse("its encode_text was replaced")
        check_mask(module)
        self.pooling(module)
        return True

    def pooling(self, module: Any) -> tuple[str, int | None]:
        """Tell which token's state becomes the feature; OpenAI's clip has neither attribute."""
        return _pooling(
            getattr(module, "text_pool_type", "argmax"), getattr(module, "text_eos_id", None)
        )

    def form(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Say whether the features are to be normalised."""
        normalize = kwargs.get("normalize", args[1] if len(args) > 1 else False)
        return (bool(normalize),) if normalize else ()

    def call(self, form: Any, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], Any]:
        """Ask for normalised features as the form says."""
        return tensors, {"normalize": form[0]} if form else {}

    def fast(
        self, module: Any, state: State, args: Any, kwargs: Any, through: Through = None
    ) -> tuple[Any, str]:
        """Encode token ids, normalised if open_clip's argument asks for it."""
        try:
            given = inspect.signature(type(module).encode_text).bind(module, *args, **kwargs)
        except TypeError:
            refuse("the call does not fit encode_text")
        _, text = list(given.arguments.values())[:2]
        rest = dict(list(given.arguments.items())[2:])
        normalize = rest.pop("normalize", False)
        if rest:
            refuse(f"encode_text was called with {', '.join(rest)}")
        features, how = self.encode(module, state, text, through)
        return (F.normalize(features, dim=-1) if normalize else features), how


class TextModule(_Tokens):
    """open_clip's text transformer as a module of its own (CustomTextCLIP)."""

    name = "text transformer"
    method = "forward"

    def examine(self, module: nn.Module) -> bool:
        """Recognise the parts of a text tower with embeddings behind a forward of one argument."""
        embedded = isinstance(getattr(module, "token_embedding", None), nn.Embedding)
        if not has_tower(module) or not embedded or hasattr(module, "encode_text"):
            return False
        if len(takes(type(module).forward)) != 1:
            return False
        if getattr(module, "output_tokens", False):
            refuse("it returns the states of all tokens")
        check_mask(module)
        self.pooling(module)
        return True

    def pooling(self, module: Any) -> tuple[str, int | None]:
        """Tell which token's state becomes the feature."""
        return _pooling(getattr(module, "pool_type", None), getattr(module, "eos_id", None))

    def fast(
        self, module: Any, state: State, args: Any, kwargs: Any, through: Through = None
    ) -> tuple[Any, str]:
        """Encode token ids."""
        given = (*args, *kwargs.values())
        if len(given) != 1 or getattr(module, "output_tokens", False):
            refuse("the call asks for more than pooled features")
        return self.encode(module, state, given[0], through)


class Transformers(Text):
    """transformers' CLIP text model: token ids to an output with the pooled state."""

    name = "transformers text model"
    method = "forward"
    family = towers.Layers

    def examine(self, module: nn.Module) -> bool:
        """Recognise embeddings, encoder.layers and final_layer_norm of a text model."""
        embeddings = getattr(module, "embeddings", None)
        layers = getattr(getattr(module, "encoder", None), "layers", None)
        if not isinstance(getattr(embeddings, "token_embedding", None), nn.Embedding):
            return False
        if not isinstance(layers, nn.ModuleList) or not hasattr(module, "final_layer_norm"):
            return False
        if not hasattr(module, "eos_token_id"):
            refuse("it does not say where it pools (no eos_token_id)")
        return True

    @staticmethod
    def features(result: Any) -> Tensor:
        """Give the pooled state."""
        pooled: Tensor = result.pooler_output
        return pooled

    def example(self, module: Any, form: Any, count: int) -> tuple[Tensor, ...]:
        """Draw token ids that end at different places."""
        embeddings = self.holder(module).embeddings
        size, own = embeddings.token_embedding.num_embeddings, int(self.holder(module).eos_token_id)
        return _example_ids(
            embeddings.position_embedding.num_embeddings,
            size,
            size - 1 if own == 2 else own,
            embeddings.token_embedding.weight.device,
            count,
        )

    def form(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Refuse calls for more than pooled states; the rest is of one form."""
        self._given(module, args, kwargs)
        return ()

    def _given(self, module: Any, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
        """Return a call's ids and its mask."""
        names = ("input_ids", "attention_mask", "position_ids")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names):
            refuse("the call has more arguments than ids, mask and positions")
        ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
        config = getattr(module, "config", None)
        wants = ("output_attentions", "output_hidden_states")
        if any(given.pop(name, None) or getattr(config, name, False) for name in wants):
            refuse("attentions or hidden states of all layers are asked for")
        tuples = given.pop("return_dict", None)
        if tuples is False or (tuples is None and getattr(config, "return_dict", True) is False):
            refuse("a tuple is asked for")
        if any(value is not None for value in given.values()):
            refuse(f"the call has the argument {next(iter(given))}")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            refuse("the text is not token ids (texts, tokens)")
        return ids, mask

    def fast(
        self, module: Any, state: State, args: Any, kwargs: Any, through: Through = None
    ) -> tuple[Any, str]:
        """Encode token ids; the states of all tokens are computed when somebody looks at them."""
        ids, mask = self._given(module, args, kwargs)
        embedding = module.embeddings.token_embedding
        live, kept = towers.read(towers.Layers, module, self.memory(module, state), [embedding])
        weight = live.blocks[0].qkv_w
        check_plain(ids, weight)
        if not 0 < ids.shape[1] <= live.context_length or not len(ids):
            refuse("the texts do not fit the text tower's length")
        own = int(module.eos_token_id)
        host = ids.cpu()
        ends = _ends(host, "argmax" if own == 2 else "eos", own)
        if mask is not None:
            seen = torch.arange(ids.shape[1]) <= torch.tensor(ends)[:, None]
            if mask.shape != ids.shape or not bool(mask.cpu()[seen].ne(0).all()):
                refuse("the attention mask hides a token in front of the EOT")
        x = embedding(ids[:, : max(ends) + 1])
        check_dtypes(x, weight)
        sharing, deep = Sharing(1, None, _same_ids(host)), deep_of(kept, live, ids, through)
        states, how = states_of(live, x, ends, sharing, deep)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        fill = _later(lambda: _literal(module)(*args, **kwargs), ids.device.type)
        return lazy_output(BaseModelOutputWithPooling, fill, pooler_output=states), how


class Projected(Transformers):
    """transformers' CLIP text model with a projection: its output has the features too."""

    name = "transformers text model with projection"

    def examine(self, module: nn.Module) -> bool:
        """Recognise a text model and a projection, without an image side."""
        projection = getattr(module, "text_projection", None)
        inner = getattr(module, "text_model", None)
        if not isinstance(projection, nn.Module) or not isinstance(inner, nn.Module):
            return False
        if hasattr(module, "vision_model"):  # get_text_features goes through the text model
            return False
        return super().examine(inner)

    @staticmethod
    def features(result: Any) -> Tensor:
        """Give the projected features."""
        features: Tensor = result.text_embeds
        return features

    def holder(self, module: Any) -> Any:
        """Give the text model inside."""
        return module.text_model

    def fast(
        self, module: Any, state: State, args: Any, kwargs: Any, through: Through = None
    ) -> tuple[Any, str]:
        """Encode token ids and project."""
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        if hooked(module.text_model):
            refuse("a module inside the text tower has a hook, which must fire")
        inner, how = super().fast(module.text_model, state, args, kwargs, through)
        features = module.text_projection(inner.pooler_output)
        fill = _later(lambda: _literal(module)(*args, **kwargs), features.device.type)
        return lazy_output(CLIPTextModelOutput, fill, text_embeds=features), how


def _literal(module: Any) -> Callable[..., Any]:
    """Give the original forward, bound; modules inside may be swapped."""
    base = getattr(type(module), "_fastfpl_base", type(module))
    literal: Callable[..., Any] = functools.partial(base.forward, module)
    return literal


def _later(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Put off a call, to be made in the modes of now."""
    grad, cast = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)

    def then() -> Any:
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype, enabled=cast):
            return call()

    return then


def _pooling(rule: Any, eos: Any) -> tuple[str, int | None]:
    if rule not in ("argmax", "eos"):
        refuse(f"it pools the text with {rule!r}, not at the EOT token")
    return rule, eos if rule == "eos" else None


def _ends(ids: Tensor, rule: str, eos: Any) -> list[int]:
    found = ids if rule == "argmax" else ids.eq(eos).int()
    ends: list[int] = found.argmax(dim=-1).tolist()
    return ends


def _same_ids(ids: Tensor) -> int:
    """Count the leading ids that all texts share."""
    return int((ids == ids[:1]).all(0).cumprod(0).sum())


def _example_ids(
    length: int, size: int, end: int, device: torch.device, count: int
) -> tuple[Tensor, Tensor]:
    """Draw ids below ``end``, then pad with 0; the second with other padding."""
    if not 2 < end < size:
        refuse(f"it pools at the token {end} of a vocabulary of {size}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, end, (count, length), generator=generator)
    ids[:, :2] = ids[:1, :2]
    other = ids.clone()
    for row, padded, place in zip(ids, other, example_ends(length, count), strict=True):
        row[place], padded[place] = end, end
        row[place + 1 :], padded[place + 1 :] = 0, 1
    return ids.to(device), other.to(device)


TOKENS = tuple(map(register, (Clip(), TextModule(), Transformers(), Projected())))
