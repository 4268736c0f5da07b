"""Text encoders that are recognised, and their fast passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfpl.dropin import tower as towers
from fastfpl.dropin.output import lazy_output
from fastfpl.dropin.sharing import NOTHING, Sharing, note_of, sharing_by_value, still_holds
from fastfpl.dropin.swap import Kind, State, hooked, refuse, register
from fastfpl.ops.embedded import encode_embedded
from fastfpl.ops.memory import current_limit
from fastfpl.reference.text import TextTower

__all__ = ["KINDS", "prove"]


class Text(Kind):
    """What all text encoders have in common: a proof by example."""

    def fast(self, module: Any, state: State, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Return the result of a call and how it was computed."""
        raise NotImplementedError

    def example(self, module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Give arguments for a proof, and the same with other rows behind the EOT."""
        raise NotImplementedError

    @staticmethod
    def features(result: Any) -> Tensor:
        """Give the features of a result."""
        features: Tensor = result
        return features

    def run(
        self,
        module: Any,
        state: State,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answer a call with the packed pass."""
        result, how = self.fast(module, state, args, kwargs)
        state.calls[how] += 1
        return result

    def memory(self, module: Any, state: State) -> dict[Any, Any]:
        """Give the place for inspections; replicas of DataParallel keep none."""
        return {} if getattr(module, "_is_replica", False) else state.memory


def prove(kind: Text, module: Any) -> None:
    """Compare the fast pass with the original on small random prompts; `Instead` if they differ.

    This holds against whatever a forward may do that its parts do not show.
    """
    original = getattr(type(module), kind.method)
    with torch.no_grad():
        args, other = kind.example(module)
        fast = kind.features(kind.fast(module, State(), args, {})[0])
        try:
            literal = kind.features(original(module, *args))
            changed = kind.features(original(module, *other))
        except Exception as error:
            first = str(error).partition("\n")[0]
            refuse(f"a trial call of it raised {type(error).__name__}: {first}")
        if not isinstance(literal, Tensor) or literal.shape != fast.shape:
            refuse("a trial call of it did not return one feature a prompt")
        # differences of structure are of the order of the features themselves
        near = torch.finfo(literal.dtype).eps ** 0.5 * float(literal.abs().max())
        if literal.dtype != fast.dtype or float((literal - fast).abs().max()) > near:
            if float((literal - changed).abs().max()) > near:
                refuse(
                    "its text tower is not causal: rows behind the EOT change its features, so "
                    "that neither a shared prefix nor a cut is exact"
                )
            refuse("a trial call of it gave other features than CLIP's text pass over its parts")


def _plain(tensor: Tensor, weight: Tensor) -> None:
    """Refuse what only the original code can take."""
    if type(tensor) not in (Tensor, nn.Parameter):
        refuse(f"the input is a {type(tensor).__name__}")
    if torch._C._functorch.maybe_current_level() is not None:
        refuse("a transform of torch.func is active, which cannot look at values")
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        refuse("a CUDA graph is being captured, which cannot look at values")
    if current_limit() is not None:
        refuse("a memory limit is set, which this pass does not keep")
    if tensor.device != weight.device:
        refuse(f"the input is on {tensor.device} and the text tower on {weight.device}")


def _kinds_agree(x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        refuse(f"the embeddings are {x.dtype} and the text tower {weight.dtype}")


def _states(
    live: TextTower, prompts: Tensor, ends: list[int], sharing: Sharing
) -> tuple[Tensor, str]:
    """Encode (R, L, W) with EOTs at ``ends`` into states (R, W); say how."""
    shared = min(sharing.shared, *ends)
    prompts = sharing.grouped(prompts[:, : max(ends) + 1])
    eot = sharing.grouped(torch.tensor(ends))
    if bool((eot == eot[:1]).all()):
        states = encode_embedded(live, prompts, eot[0], shared=shared)
    else:
        parts = zip(prompts, eot, strict=True)
        states = torch.stack([encode_embedded(live, x, e, shared=shared) for x, e in parts])
    how = f"fast, cut behind the EOT, {shared} leading rows shared"
    return sharing.ungrouped(states), how


def _project(holder: Any, states: Tensor) -> Tensor:
    projection = holder.text_projection
    if projection is None:
        return states
    module = isinstance(projection, nn.Module)
    features: Tensor = projection(states) if module else states @ projection
    return features


def _takes(method: Any) -> list[inspect.Parameter]:
    """Return the parameters that a call by position has to give, self left out."""
    try:
        parameters = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in positional and p.default is p.empty]


def _has_tower(module: Any) -> bool:
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    positional = getattr(module, "positional_embedding", None)
    return (
        isinstance(blocks, nn.Module)
        and isinstance(positional, Tensor)
        and isinstance(getattr(module, "ln_final", None), nn.Module)
        and hasattr(module, "text_projection")
    )


def _check_mask(module: Any) -> None:
    if hasattr(module, "attn_mask") and module.attn_mask is None:
        refuse(
            "its text tower is bidirectional (it has no attention mask), so that neither a shared "
            "prefix nor a cut is exact"
        )


class Prompts(Text):
    """CoOp's text encoder: ``forward(prompts, tokenized_prompts)`` over CLIP's parts."""

    name = "text encoder of embedded prompts"
    method = "forward"

    def examine(self, module: nn.Module) -> bool:
        """Recognise the parts of a text tower behind a forward of two arguments."""
        if not _has_tower(module) or hasattr(module, "encode_text"):
            return False
        needed = len(_takes(type(module).forward))
        if needed > 2:
            refuse(f"its forward takes {needed} arguments, not prompts and tokenized prompts alone")
        if needed == 2:
            _check_mask(module)
        return needed == 2

    def example(self, module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Draw three prompts with their EOT at different places."""
        positional = module.positional_embedding
        length, width = positional.shape
        weight = module.transformer.resblocks[0].ln_1.weight
        dtype = getattr(module, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else positional.dtype
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randn(3, length, width, generator=generator, dtype=torch.float32)
        prompts = prompts.to(device=weight.device, dtype=dtype)
        tokens, other = _example_tokens(length, 3), prompts.clone()
        for row, end in zip(other, tokens.argmax(-1).tolist(), strict=True):
            row[end + 1 :] = 1
        return (prompts, tokens), (other, tokens)

    def fast(self, module: Any, state: State, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Encode embedded prompts."""
        try:
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        except TypeError:
            refuse("the call does not fit the forward")
        _, prompts, tokens, *more = given.arguments.values()
        if more or not isinstance(prompts, Tensor) or not isinstance(tokens, Tensor):
            refuse("the call has other arguments than prompts and tokenized prompts")
        live = towers.read(towers.Resblocks, module, self.memory(module, state), ())
        weight = live.blocks[0].qkv_w
        _plain(prompts, weight)
        if prompts.dim() != 3 or tokens.dim() != 2 or len(tokens) != len(prompts):
            refuse("the prompts are not (prompts, tokens, width) with tokens for each")
        if prompts.shape[1:] != live.positional.shape or not len(prompts):
            refuse("the prompts do not have the text tower's length and width")
        dtype = getattr(module, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        if dtype is not None:
            live = replace(live, positional=live.positional.to(dtype))
        kind = torch.promote_types(prompts.dtype, live.positional.dtype)
        _kinds_agree(prompts.to(kind), weight)
        ends = tokens.argmax(dim=-1).tolist()
        limit = max(ends) + 1
        if torch.is_grad_enabled() and prompts.requires_grad:
            # equal values do not prove equal gradients: the prompt learner has to answer for them
            note = note_of(prompts)
            sharing, why = NOTHING, ", since they do not come straight from a prompt learner"
            if note is not None:
                sharing, why = note, ""
                if not still_holds(note, prompts[:, :limit]):
                    sharing, why = NOTHING, ", since their values are not equal"
        else:
            sharing, why = sharing_by_value(prompts[:, :limit]), ""
        states, how = _states(live, prompts.to(kind), ends, sharing)
        states = states if dtype is None else states.to(dtype)
        return _project(module, states), how + why


class _Tokens(Text):
    """A method that takes token ids, over OpenAI's or open_clip's parts."""

    def example(self, module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Draw token ids that end at different places."""
        embedding = module.token_embedding
        count = embedding.num_embeddings
        _, eos = self.pooling(module)
        end = count - 1 if eos is None else eos
        return _example_ids(
            module.positional_embedding.shape[0], count, end, embedding.weight.device
        )

    def pooling(self, module: Any) -> tuple[str, int | None]:
        """Tell which token's state becomes the feature."""
        raise NotImplementedError

    def encode(self, module: Any, state: State, text: Any) -> tuple[Tensor, str]:
        """Encode token ids into projected features."""
        rule, eos = self.pooling(module)
        if not isinstance(text, Tensor) or text.dim() != 2 or text.is_floating_point():
            refuse("the text is not token ids (texts, tokens)")
        memory = self.memory(module, state)
        live = towers.read(towers.Resblocks, module, memory, [module.token_embedding])
        weight = live.blocks[0].qkv_w
        _plain(text, weight)
        if text.shape[1] != live.context_length or not len(text):
            refuse("the texts do not have the text tower's length")
        ids = text.cpu()
        ends = _ends(ids, rule, eos)
        x = module.token_embedding(text[:, : max(ends) + 1]).to(weight.dtype)
        states, how = _states(live, x, ends, Sharing(1, None, _same_ids(ids)))
        return _project(module, states), how


class Clip(_Tokens):
    """``encode_text`` of OpenAI's clip and of open_clip's CLIP."""

    name = "encode_text"
    method = "encode_text"

    def examine(self, module: nn.Module) -> bool:
        """Recognise a method encode_text over CLIP's parts in the module itself."""
        if not hasattr(type(module), "encode_text") or not _has_tower(module):
            return False
        if not isinstance(getattr(module, "token_embedding", None), nn.Embedding):
            refuse("it has no token_embedding of its own")
        if "encode_text" in vars(module):
            refuse("its encode_text was replaced")
        _check_mask(module)
        self.pooling(module)
        return True

    def pooling(self, module: Any) -> tuple[str, int | None]:
        """Tell which token's state becomes the feature; OpenAI's clip has neither attribute."""
        return _pooling(
            getattr(module, "text_pool_type", "argmax"), getattr(module, "text_eos_id", None)
        )

    def fast(self, module: Any, state: State, args: Any, kwargs: Any) -> tuple[Any, str]:
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
        features, how = self.encode(module, state, text)
        return (F.normalize(features, dim=-1) if normalize else features), how


class TextModule(_Tokens):
    """open_clip's text transformer as a module of its own (CustomTextCLIP)."""

    name = "text transformer"
    method = "forward"

    def examine(self, module: nn.Module) -> bool:
        """Recognise the parts of a text tower with embeddings behind a forward of one argument."""
        embedded = isinstance(getattr(module, "token_embedding", None), nn.Embedding)
        if not _has_tower(module) or not embedded or hasattr(module, "encode_text"):
            return False
        if len(_takes(type(module).forward)) != 1:
            return False
        if getattr(module, "output_tokens", False):
            refuse("it returns the states of all tokens")
        _check_mask(module)
        self.pooling(module)
        return True

    def pooling(self, module: Any) -> tuple[str, int | None]:
        """Tell which token's state becomes the feature."""
        return _pooling(getattr(module, "pool_type", None), getattr(module, "eos_id", None))

    def fast(self, module: Any, state: State, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Encode token ids."""
        given = (*args, *kwargs.values())
        if len(given) != 1 or getattr(module, "output_tokens", False):
            refuse("the call asks for more than pooled features")
        return self.encode(module, state, given[0])


class Transformers(Text):
    """transformers' CLIP text model: token ids to an output with the pooled state."""

    name = "transformers text model"
    method = "forward"

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

    def example(self, module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Draw token ids that end at different places."""
        embeddings = module.embeddings
        count, own = embeddings.token_embedding.num_embeddings, int(module.eos_token_id)
        return _example_ids(
            embeddings.position_embedding.num_embeddings,
            count,
            count - 1 if own == 2 else own,
            embeddings.token_embedding.weight.device,
        )

    def fast(self, module: Any, state: State, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Encode token ids; the states of all tokens are computed when somebody looks at them."""
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
        embedding = module.embeddings.token_embedding
        live = towers.read(towers.Layers, module, self.memory(module, state), [embedding])
        weight = live.blocks[0].qkv_w
        _plain(ids, weight)
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
        _kinds_agree(x, weight)
        states, how = _states(live, x, ends, Sharing(1, None, _same_ids(host)))
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

    def example(self, module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Draw token ids as for the text model inside."""
        return super().example(module.text_model)

    def fast(self, module: Any, state: State, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Encode token ids and project."""
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        if hooked(module.text_model):
            refuse("a module inside the text tower has a hook, which must fire")
        inner, how = super().fast(module.text_model, state, args, kwargs)
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


def _example_tokens(length: int, end: int) -> Tensor:
    tokens = torch.zeros(3, length, dtype=torch.int64)
    tokens[:, 0] = end - 1
    for row, place in zip(tokens, _places(length), strict=True):
        row[place] = end
    return tokens


def _places(length: int) -> tuple[int, int, int]:
    return length // 3, max(1, length - 3), length // 2


def _example_ids(
    length: int, count: int, end: int, device: torch.device
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Draw ids below ``end``, then pad with 0; the second with other padding."""
    if not 2 < end < count:
        refuse(f"it pools at the token {end} of a vocabulary of {count}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, end, (3, length), generator=generator)
    ids[:, :2] = ids[:1, :2]
    other = ids.clone()
    for row, padded, place in zip(ids, other, _places(length), strict=True):
        row[place], padded[place] = end, end
        row[place + 1 :], padded[place + 1 :] = 0, 1
    return (ids.to(device),), (other.to(device),)


KINDS: tuple[Text, ...] = (Prompts(), Clip(), TextModule(), Transformers(), Projected())
for _kind in KINDS:
    register(_kind)
