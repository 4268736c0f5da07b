"""Text encoders that are recognised, and their fast passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fastfpl.dropin import tower as towers
from fastfpl.dropin.keys import key_of, plain_class
from fastfpl.dropin.output import lazy_output
from fastfpl.dropin.sharing import (
    NOTHING,
    Sharing,
    leaves_of,
    literal_if_watched,
    proven,
    sharing_by_value,
    unwatched,
)
from fastfpl.dropin.swap import Instead, Kind, State, hooked, refuse, register
from fastfpl.dropin.trial import copy_of, differs, near, no_trace, watched
from fastfpl.ops.embedded import encode_embedded
from fastfpl.ops.memory import current_limit
from fastfpl.reference.text import TextTower

__all__ = ["KINDS", "Proof", "Text", "proof_of"]

# arguments that a signature gathers: nothing in them is no argument at all
_GATHERS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


# a dtype that deep prompts are rounded to on their way, as codes made for 16 bits do
Through = torch.dtype | None


class Proof(NamedTuple):
    """Why a call is no text pass, or ""; for how many texts; what deep prompts are rounded to."""

    reason: str
    most: int
    through: Through = None


class Text(Kind):
    """What all text encoders have in common: a proof by example under every key."""

    family: towers.Family = towers.Resblocks

    def fast(
        self, module: Any, state: State, args: Any, kwargs: Any, through: Through = None
    ) -> tuple[Any, str]:
        """Return the result of a call and how it was computed.

        Deep prompts are rounded to ``through``.
        """
        raise NotImplementedError

    def example(self, module: Any, form: Any, count: int) -> tuple[Tensor, ...]:
        """Draw tensors for a proof of ``count`` texts, then the first with rows behind the EOT."""
        raise NotImplementedError

    def call(self, form: Any, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], Any]:
        """Give a call of a form with these tensors: arguments and keywords."""
        return tensors, {}

    def form(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Give what a call has beside its tensors; hashable."""
        return ()

    def forms(self, module: Any) -> list[Any]:
        """Give the forms to try before there is a call."""
        return [()]

    def deep(self, module: Any, form: Any) -> bool:
        """Tell whether prompts are replaced between the layers."""
        family, holder = self.family, self.holder(module)
        return bool(towers.own_prompts(family.blocks(holder), family.positional(holder).shape[1]))

    def rounded(self, module: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Give the deep prompts of a call, whose gradients are rounded where they are."""
        return [t for b in self.family.blocks(self.holder(module)) for t in _own(b)]

    def count(self, module: Any, args: Any, kwargs: Any) -> int:
        """Count the texts of a call."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        return len(tensors[0]) if tensors else 0

    def holder(self, module: Any) -> Any:
        """Give the module that has the tower's parts."""
        return module

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
        """Answer a call with the packed pass, where its proof holds."""
        _no_transform()
        through = check_proof(self, module, state, args, kwargs)
        result, how = self.fast(module, state, args, kwargs, through)
        state.calls[how] += 1
        if state.due():
            compare(self, module, state, args, kwargs, result, through)
        return result

    def memory(self, module: Any, state: State) -> dict[Any, Any]:
        """Give the place for inspections; replicas of DataParallel keep none."""
        return {} if getattr(module, "_is_replica", False) else state.memory

    def known(self, module: Any) -> tuple[list[Tensor], list[Any]]:
        """Give the tensors that a text pass reads, and the parameters among them that may learn."""
        holder = self.holder(module)
        family = self.family
        blocks = family.blocks(holder)
        found: list[Any] = [t for b in blocks for t in family.tensors(b)]
        norm = family.norm(holder)
        found += [family.positional(holder), norm.weight, norm.bias]
        found += [getattr(x, "attn_mask", None) for x in (holder, *blocks)]
        embeddings = getattr(holder, "embeddings", holder)
        found.append(getattr(embeddings, "position_ids", None))
        learn: list[Any] = []
        projection = getattr(module, "text_projection", None)
        if isinstance(projection, nn.Module):
            learn += [*projection.parameters()]
            found += [*projection.buffers()]
        else:
            learn.append(projection)
        embedding = getattr(embeddings, "token_embedding", None)
        if isinstance(embedding, nn.Embedding):
            learn.append(embedding.weight)
        learn += [t for b in blocks for t in _own(b)]
        learn = [t for t in learn if isinstance(t, Tensor)]
        return [t for t in (*found, *learn) if isinstance(t, Tensor)], learn


# more keys than this, and most of them new, are no switches but a count
_MOST_KEYS = 32


def check_proof(kind: Text, module: Any, state: State, args: Any, kwargs: Any) -> Through:
    """Prove that a call of this form, in the state that the module is in, is a text pass.

    A proof is kept under all that may decide what the module's code does: classes, modes,
    attributes, whether gradients are wanted. A call of more texts than any before is proven for so
    many, through one block.
    """
    memory = state.memory
    form = kind.form(module, args, kwargs)
    key = (key_of(module), form, torch.is_grad_enabled())
    proofs = memory.setdefault("proofs", {})
    proof: Proof | None = proofs.get(key)
    asked = memory["asked"] = memory.get("asked", 0) + 1
    if proof is None:
        if len(proofs) >= _MOST_KEYS and asked < 4 * len(proofs):
            refuse("what its code depends on changes with every call")
        proof = proofs[key] = proof_of(kind, module, form, 3)
    count = kind.count(module, args, kwargs)
    if not proof.reason and count > proof.most:
        proof = proofs[key] = proof_of(kind, module, form, count)
    if proof.reason:
        refuse(proof.reason)
    return proof.through


def proof_of(kind: Text, module: Any, form: Any, count: int, *, other_mode: bool = False) -> Proof:
    """Try a call on a copy, and say what was found."""
    modes = torch.is_grad_enabled()
    device = next((p.device.type for p in module.parameters()), "cpu")
    try:
        with (
            no_trace(module),
            torch.inference_mode(False),
            torch.set_grad_enabled(modes),
            torch.autocast(device, enabled=False),
        ):
            return Proof("", count, prove(kind, module, form, count, other_mode))
    except Instead as reason:
        return Proof(str(reason), count)


def prove(kind: Text, module: Any, form: Any, count: int, other_mode: bool) -> Through:
    """Compare the fast pass with the original on random prompts; `Instead` if they differ.

    Both run on a copy whose small parameters are moved from where they begin. Features and, where
    gradients are wanted, their gradients must agree; the original may read nothing but a text
    tower's parts. Up to three texts go through all blocks, more through the first; where prompts
    are replaced between the layers, through the first two. Returns what these are rounded to.
    """
    with torch.no_grad():  # hooks and the like, which a copy has not
        towers.read(kind.family, kind.holder(module), {}, ())
    twin = copy_of(module, moved=True)
    if other_mode:
        twin.train(not module.training)
    deep = kind.deep(twin, form)
    if count > 3:
        kind.family.shorten(kind.holder(twin), 2 if deep else 1)
    known, learn = kind.known(twin)
    for parameter in learn:
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(torch.is_grad_enabled())
    *tensors, other = kind.example(twin, form, count)
    leaves = [t for t in (*tensors, *learn) if t.requires_grad]
    given = kind.call(form, tuple(tensors))
    laid = (_laid(tensors[0]), *tensors[1:])
    args, kwargs = kind.call(form, laid)
    literal_call = functools.partial(getattr(type(twin), kind.method), twin)
    kind.fast(twin, State(), *given)  # says what its parts lack before the original is asked
    literal = watched(twin, known, lambda: literal_call(*args, **kwargs), (laid, tensors))
    ways = {way: kind.fast(twin, State(), args, kwargs, way)[0] for way in _ways(deep, tensors[0])}
    changed_args, changed_kwargs = kind.call(form, (other, *tensors[1:]))
    try:
        literal, found = kind.features(literal), {w: kind.features(f) for w, f in ways.items()}
        with torch.no_grad():
            changed = kind.features(literal_call(*changed_args, **changed_kwargs))
    except Exception as error:
        refuse(f"a trial call of it raised {type(error).__name__}")
    if not isinstance(literal, Tensor) or any(literal.shape != f.shape for f in found.values()):
        refuse("a trial call of it did not return one feature a prompt")
    with torch.no_grad():  # the nearest: a rounding may be too small to fail by
        through = min(found, key=lambda way: float((found[way] - literal).abs().max()))
    fast = found[through]
    if literal.dtype != fast.dtype or not _close(fast, literal):
        if not _close(changed, literal):
            refuse(
                "its text tower is not causal: rows behind the EOT change its features, so "
                "that neither a shared prefix nor a cut is exact"
            )
        refuse("a trial call of it gave other features than CLIP's text pass over its parts")
    narrow = kind.rounded(twin, args, kwargs)
    _compare_gradients(fast, literal, leaves, narrow, through)
    return through


def _own(block: Any) -> list[Tensor]:
    return [t for t in block._parameters.values() if t is not None]


def _ways(deep: bool, first: Tensor) -> list[Through]:
    """Give the roundings of deep prompts to try."""
    narrow = first.is_floating_point() and first.element_size() < 4
    return [None, torch.float16] if deep and not narrow else [None]


def _forward_of(module: nn.Module) -> Any:
    return getattr(plain_class(module), "forward")  # noqa: B009 - a class of anybody


def _laid(tensor: Tensor) -> Tensor:
    """Give prompts that share two rows, as a graph has it; ids as they are."""
    if not tensor.requires_grad:
        return tensor
    lead = tensor[:1, :2].expand(len(tensor), -1, -1)
    return torch.cat((lead, tensor[:, 2:]), dim=1)


def _close(got: Tensor, want: Tensor) -> bool:
    with torch.no_grad():
        return float((got - want).abs().max()) <= near(want)


def _compare_gradients(
    fast: Tensor,
    literal: Tensor,
    leaves: list[Tensor],
    narrow: list[Tensor],
    through: Through,
) -> None:
    """Compare the gradients of a random loss.

    Those of ``narrow``, deep prompts that go ``through`` 16 bits, the original rounds as well,
    prompt by prompt; the pass rounds their sum.
    """
    other = "a trial call of it gave other gradients than CLIP's text pass over its parts"
    if literal.requires_grad != fast.requires_grad:
        refuse(other)
    if not literal.requires_grad or not leaves:
        return
    generator = torch.Generator().manual_seed(1)
    loss = torch.randn(literal.shape, generator=generator, dtype=torch.float32).to(literal)
    want = torch.autograd.grad(literal, leaves, loss, retain_graph=True, allow_unused=True)
    with unwatched():
        got = torch.autograd.grad(fast, leaves, loss, retain_graph=True, allow_unused=True)
    for leaf, g, w in zip(leaves, got, want, strict=True):
        if (g is None) != (w is None):
            refuse(other)
        if g is None or w is None or _close(g, w):
            continue
        off, size = float((g - w).abs().max()), float(w.abs().max())
        rounds = through is not None and any(leaf is t for t in narrow)
        if not rounds or off > 4 * torch.finfo(through or w.dtype).eps * size:
            refuse(other)


def compare(
    kind: Text,
    module: Any,
    state: State,
    args: Any,
    kwargs: Any,
    result: Any,
    through: Through,
) -> None:
    """Compare a result with what the original gives on a copy: values, and gradients if wanted."""
    with no_trace(module):
        twin = copy_of(module, moved=False)
        literal = kind.features(getattr(type(twin), kind.method)(twin, *args, **kwargs))
    fast = kind.features(result)
    try:
        if literal.shape != fast.shape or literal.dtype != fast.dtype or not _close(fast, literal):
            refuse("other features than the original's")
        inputs = _tensors(args, kwargs)
        graphs = [leaf for t in inputs if t.requires_grad for leaf in leaves_of(t)]
        learn = [p for p in module.parameters() if p.requires_grad]
        narrow = [x for t in kind.rounded(module, args, kwargs) for x in leaves_of(t)]
        _compare_gradients(fast, literal, [*graphs, *learn], narrow, through)
    except Instead as reason:
        raise differs(state, str(reason)) from None


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """Give the tensors of a call, those in lists too."""
    given = [list(v) if isinstance(v, nn.ParameterList) else v for v in (*args, *kwargs.values())]
    return [t for t in tree_leaves(given) if isinstance(t, Tensor)]


def _no_transform() -> None:
    """Refuse what can neither look at values nor prove anything."""
    if torch._C._functorch.maybe_current_level() is not None:
        refuse("a transform of torch.func is active, which cannot look at values")
    if forward_ad._current_level >= 0:
        refuse("derivatives are taken in forward mode, which the pass has not")


def _plain(tensor: Tensor, weight: Tensor) -> None:
    """Refuse what only the original code can take."""
    if type(tensor) not in (Tensor, nn.Parameter):
        refuse(f"the input is a {type(tensor).__name__}")
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        refuse("a CUDA graph is being captured, which cannot look at values")
    if current_limit() is not None:
        refuse("a memory limit is set, which this pass does not keep")
    if tensor.device != weight.device:
        refuse(f"the input is on {tensor.device} and the text tower on {weight.device}")


def _kinds_agree(x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        refuse(f"the embeddings are {x.dtype} and the text tower {weight.dtype}")


def _rounded(deep: Any, live: TextTower, prompts: Tensor, through: Through) -> Tensor | None:
    """Give deep prompts as one tensor (K, T, W) on their way into the pass; None where none is.

    Those that no layer would ask for are left out.
    """
    deep = (deep if isinstance(deep, Tensor) else tuple(deep))[: len(live.blocks) - 1]
    if not len(deep):
        return None
    whole: Tensor = deep if isinstance(deep, Tensor) else torch.stack(deep)
    if whole.device != prompts.device:
        refuse(f"the deep prompts are on {whole.device} and the prompts on {prompts.device}")
    if whole.shape[1] >= prompts.shape[1]:
        refuse("the deep prompts do not fit behind the first token")
    return whole if through is None else whole.to(through).to(whole.dtype)


def _states(
    live: TextTower,
    prompts: Tensor,
    ends: list[int],
    sharing: Sharing,
    deep: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Encode (R, L, W) with EOTs at ``ends`` into states (R, W); say how.

    Deep prompts (K, T, W) take the place of the states behind the first token.
    """
    if deep is not None and max(ends) < deep.shape[1]:
        refuse("the prompts end among the deep prompts")
    shared = min(sharing.shared, *ends)
    prompts = sharing.grouped(prompts[:, : max(ends) + 1])
    eot = sharing.grouped(torch.tensor(ends))
    if bool((eot == eot[:1]).all()):
        states = encode_embedded(live, prompts, eot[0], shared=shared, deep=deep)
    else:
        parts = zip(prompts, eot, strict=True)
        states = torch.stack(
            [encode_embedded(live, x, e, shared=shared, deep=deep) for x, e in parts]
        )
    how = f"fast, cut behind the EOT, {shared} leading rows shared"
    if deep is not None:
        how += f", prompts replaced before {len(deep)} layers"
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


class _Bound(NamedTuple):
    """A call of a text encoder, its arguments told apart."""

    form: Any
    prompts: Tensor
    tokens: Tensor
    deep: Any  # a list of (T, W), one tensor (K, T, W), or nothing


# what a call may gather deep prompts in
_LISTS = (list, tuple, nn.ParameterList)


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
        if not _has_tower(module) or hasattr(module, "encode_text"):
            return False
        needed = len(_takes(type(module).forward))
        if needed >= 2:
            _check_mask(module)
        return needed >= 2

    def forms(self, module: Any) -> list[Any]:
        """Try prompts first or tokens first, and nothing, in two ways, for what else it needs."""
        names = [p.name for p in _takes(type(module).forward)]
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
        deep = _rounded(own or given_deep, live, prompts, through)
        how = ""

        def encode(sharing: Sharing, rows: Tensor) -> Tensor:
            nonlocal how
            states, how = _states(live, rows.to(kind), ends, sharing, deep)
            return _project(module, states if dtype is None else states.to(dtype))

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
        _plain(text, weight)
        if text.shape[1] != live.context_length or not len(text):
            refuse("the texts do not have the text tower's length")
        ids = text.cpu()
        ends = _ends(ids, rule, eos)
        x = module.token_embedding(text[:, : max(ends) + 1]).to(weight.dtype)
        deep = _rounded(own, live, text, through)
        states, how = _states(live, x, ends, Sharing(1, None, _same_ids(ids)), deep)
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
        sharing, deep = Sharing(1, None, _same_ids(host)), _rounded(kept, live, ids, through)
        states, how = _states(live, x, ends, sharing, deep)
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


def _example_tokens(length: int, end: int, count: int) -> Tensor:
    tokens = torch.zeros(count, length, dtype=torch.int64)
    tokens[:, 0] = end - 1
    for row, place in zip(tokens, _places(length, count), strict=True):
        row[place] = end
    return tokens


def _places(length: int, count: int) -> list[int]:
    places = (max(2, length // 3), max(2, length - 3), max(2, length // 2))
    return [min(length - 1, places[i % 3]) for i in range(count)]


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
    for row, padded, place in zip(ids, other, _places(length, count), strict=True):
        row[place], padded[place] = end, end
        row[place + 1 :], padded[place + 1 :] = 0, 1
    return ids.to(device), other.to(device)


KINDS: tuple[Text, ...] = (Prompts(), Clip(), TextModule(), Transformers(), Projected())
for _kind in KINDS:
    register(_kind)
