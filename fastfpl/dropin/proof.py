"""Proofs by example: calls of a text encoder are CLIP's text pass, or the original answers them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from fastfpl.dropin import tower as towers
from fastfpl.dropin.keys import key_of
from fastfpl.dropin.sharing import leaves_of, unwatched
from fastfpl.dropin.swap import Instead, Kind, State, refuse
from fastfpl.dropin.trial import copy_of, differs, near, no_trace, watched

__all__ = ["Proof", "Text", "Through", "proof_of"]

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
