"""Text encoders that take embedded prompts, as CoOp's family has them."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfpl.dropin import tower as towers
from fastfpl.dropin.keys import plain_class
from fastfpl.dropin.proof import Text, Through
from fastfpl.dropin.sharing import NOTHING, Sharing, literal_if_watched, proven, sharing_by_value
from fastfpl.dropin.swap import State, refuse, register
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

__all__ = ["PROMPTS"]

# arguments that a signature gathers: nothing in them is no argument at all
_GATHERS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# what a call may gather deep prompts in
_LISTS = (list, tuple, nn.ParameterList)


class _Bound(NamedTuple):
    """A call of a text encoder, its arguments told apart."""

    form: Any
    prompts: Tensor
    tokens: Tensor
    deep: Any  # a list of (T, W), one tensor (K, T, W), or nothing


def _form_of_deep(name: str, value: Any, width: int) -> tuple[Any, ...]:
    """Name the argument of deep prompts, its type, how many layers, (T, W) and the dtype."""
    kind = Tensor if isinstance(value, Tensor) else type(value)
    layers = list(value)
    tensors = [t for t in layers if isinstance(t, Tensor) and t.is_floating_point()]
    kinds = {(tuple(t.shape), t.dtype) for t in tensors}
    shape, dtype = kinds.pop() if len(kinds) == 1 else ((), None)
    fits = len(shape) == 2 and shape[1] == width and shape[0]
    if len(tensors) != len(layers) or not fits:
        refuse(f"the call has the argument {name} beside prompts and tokenized prompts")
    return name, kind, len(layers), shape, dtype


class Prompts(Text):
    """CoOp's text encoder: embedded prompts and their tokens over CLIP's parts.

    Which argument is which is told from a call: one tensor of floats, one of token ids, and nothing
    in any other, or deep prompts: a list of (T, W), or (K, T, W), for the layers behind the first.
    """

    name = "text encoder of embedded prompts"
    method = "forward"

    def examine(self, module: nn.Module) -> bool:
        """Recognise the parts of a text tower behind a forward of two arguments or more."""
        if not has_tower(module) or hasattr(module, "encode_text"):
            return False
        needed = len(takes(type(module).forward))
        if needed >= 2:
            check_mask(module)
        return needed >= 2

    def forms(self, module: Any) -> list[Any]:
        """Try prompts first or tokens first, and nothing, in two ways, for what else it needs."""
        names = [p.name for p in takes(type(module).forward)]
        orders = [(names[0], names[1]), (names[1], names[0])]
        rests: list[Any] = [((), None)]
        if len(names) > 2:
            rests = [(tuple((n, k) for n in names[2:]), None) for k in (type(None), list)]
        if len(names) == 3:
            width, dtype = module.positional_embedding.shape[1], module.positional_embedding.dtype
            rests += [((), (names[2], k, 1, (2, width), dtype)) for k in (list, nn.ParameterList)]
        return [(*order, *rest) for order in orders for rest in rests]

    def deep(self, module: Any, form: Any) -> bool:
        """Tell whether prompts are replaced between the layers."""
        return form[3] is not None or super().deep(module, form)

    def rounded(self, module: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Give those that the call hands over, too."""
        deep = self._bound(module, args, kwargs).deep
        handed = [deep] if isinstance(deep, Tensor) else list(deep)
        return [*handed, *super().rounded(module, args, kwargs)]

    def form(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Name the arguments: prompts, tokens, the empty ones with their type, deep prompts."""
        return self._bound(module, args, kwargs).form

    def count(self, module: Any, args: Any, kwargs: Any) -> int:
        """Count the prompts."""
        return len(self._bound(module, args, kwargs).prompts)

    def _bound(self, module: Any, args: Any, kwargs: Any) -> _Bound:
        try:
            bound = inspect.signature(_forward_of(module)).bind(module, *args, **kwargs)
        except TypeError:
            refuse("the call does not fit the forward")
        parameters = bound.signature.parameters
        prompts: list[tuple[str, Tensor]] = []
        tokens: list[tuple[str, Tensor]] = []
        deep: list[tuple[str, Any]] = []
        empty = []
        size = tuple(module.positional_embedding.shape)
        for name, value in list(bound.arguments.items())[1:]:
            if isinstance(value, Tensor) and not value.is_floating_point():
                tokens.append((name, value))
            elif isinstance(value, Tensor):
                first = not prompts or prompts[0][1].shape[1:] != size
                if prompts and first and value.shape[1:] == size:
                    deep.append(prompts.pop())
                (prompts if first else deep).append((name, value))
            elif type(value) in _LISTS and len(value):
                deep.append((name, value))
            elif value is None or (isinstance(value, list | tuple | dict) and not value):
                if parameters[name].kind not in _GATHERS:
                    empty.append((name, type(value)))
            elif value is not parameters[name].default:
                refuse(f"the call has the argument {name} beside prompts and tokenized prompts")
        if len(prompts) != 1 or len(tokens) != 1 or len(deep) > 1:
            refuse("the call has other arguments than prompts and tokenized prompts")
        rest = _form_of_deep(*deep[0], size[1]) if deep else None
        form = (prompts[0][0], tokens[0][0], tuple(empty), rest)
        return _Bound(form, prompts[0][1], tokens[0][1], deep[0][1] if deep else ())

    def call(self, form: Any, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], Any]:
        """Give all by name: prompts, tokens, deep prompts, nothing of its type for the rest."""
        prompts, tokens, empty, deep = form
        given: dict[str, Any] = dict(zip((prompts, tokens), tensors[:2], strict=True))
        if deep is not None:
            kind = deep[1]
            given[deep[0]] = tensors[2] if kind is Tensor else kind(tensors[2:])
        return (), given | {n: None if t is type(None) else t() for n, t in empty}

    def example(self, module: Any, form: Any, count: int) -> tuple[Tensor, ...]:
        """Draw prompts with their EOT at different places."""
        positional = module.positional_embedding
        length, width = positional.shape
        weight = module.transformer.resblocks[0].ln_1.weight
        dtype = getattr(module, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else positional.dtype
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randn(count, length, width, generator=generator, dtype=torch.float32)
        prompts = prompts.to(device=weight.device, dtype=dtype)
        tokens, other = _example_tokens(length, 3, count), prompts.clone()
        for row, end in zip(other, tokens.argmax(-1).tolist(), strict=True):
            row[end + 1 :] = 1
        if torch.is_grad_enabled():
            prompts.requires_grad_()
            other[:, :2] = prompts.detach()[:1, :2]
        if form[3] is None:
            return prompts, tokens, other
        _, kind, layers, shape, dtype = form[3]
        shapes = [(layers, *shape)] if kind is Tensor else [shape] * layers
        deep = [torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes]
        deep = [d.to(device=weight.device, dtype=dtype) for d in deep]
        # a ParameterList would make others of what is none
        own = [nn.Parameter(d, requires_grad=torch.is_grad_enabled()) for d in deep]
        return prompts, tokens, *own, other

    def fast(
        self, module: Any, state: State, args: Any, kwargs: Any, through: Through = None
    ) -> tuple[Any, str]:
        """Encode embedded prompts."""
        form, prompts, tokens, given_deep = self._bound(module, args, kwargs)
        memory = self.memory(module, state)
        live, own = towers.read(towers.Resblocks, module, memory, ())
        if len(given_deep) and own:
            refuse("it has deep prompts of its own and is given others")
        weight = live.blocks[0].qkv_w
        check_plain(prompts, weight)
        if prompts.dim() != 3 or tokens.dim() != 2 or len(tokens) != len(prompts):
            refuse("the prompts are not (prompts, tokens, width) with tokens for each")
        if prompts.shape[1:] != live.positional.shape or not len(prompts):
            refuse("the prompts do not have the text tower's length and width")
        dtype = getattr(module, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        if dtype is not None:
            live = replace(live, positional=live.positional.to(dtype))
        kind = torch.promote_types(prompts.dtype, live.positional.dtype)
        check_dtypes(prompts.to(kind), weight)
        ends = tokens.argmax(dim=-1).tolist()
        limit = max(ends) + 1
        deep = deep_of(own or given_deep, live, prompts, through)
        how = ""

        def encode(sharing: Sharing, rows: Tensor) -> Tensor:
            nonlocal how
            states, how = states_of(live, rows.to(kind), ends, sharing, deep)
            return project(module, states if dtype is None else states.to(dtype))

        if not (torch.is_grad_enabled() and prompts.requires_grad):
            return encode(sharing_by_value(prompts[:, :limit]), prompts), how
        if state.memory.get("looked"):
            sharing, why = NOTHING, ", since the gradient of single prompts was looked at"
        else:
            sharing, why = proven(prompts, memory)
        sharing = sharing._replace(shared=min(sharing.shared, *ends))
        if not sharing.shared:
            return encode(NOTHING, prompts), how + why

        def literal(rows: Tensor) -> Tensor:
            given = self.call((*form[:3], None), (rows, tokens))[1]
            if form[3] is not None:
                given[form[3][0]] = given_deep
            features: Tensor = _forward_of(module)(module, **given)
            return features

        def looked() -> None:
            state.memory["looked"] = True

        fast = functools.partial(encode, sharing)
        return literal_if_watched(prompts, fast, literal, looked), how + why


def _forward_of(module: nn.Module) -> Any:
    return getattr(plain_class(module), "forward")  # noqa: B009 - a class of anybody


def _example_tokens(length: int, end: int, count: int) -> Tensor:
    tokens = torch.zeros(count, length, dtype=torch.int64)
    tokens[:, 0] = end - 1
    for row, place in zip(tokens, example_ends(length, count), strict=True):
        row[place] = end
    return tokens


PROMPTS = register(Prompts())
