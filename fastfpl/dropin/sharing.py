"""Which prompts share their leading rows: equal in value, and equal in gradient at this call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = [
    "NOTHING",
    "Sharing",
    "leaves_of",
    "literal_if_watched",
    "proven",
    "sharing_by_value",
    "unwatched",
]

# graphs of prompts that differ in their nodes; more are not kept
_MOST_GRAPHS = 64


class Sharing(NamedTuple):
    """Groups of prompts whose first ``shared`` rows are the same.

    Attributes
    ----------
    groups : int
        G; every group has as many prompts as any other.
    order : tuple of int, or None
        Places of the prompts, group after group; None where they stand so already.
    shared : int
    """

    groups: int
    order: tuple[int, ...] | None
    shared: int

    def grouped(self, rows: Tensor) -> Tensor:
        """Bring (R, ...) into groups: (G, R / G, ...)."""
        ordered = rows if self.order is None else rows[list(self.order)]
        grouped: Tensor = ordered.unflatten(0, (self.groups, -1))
        return grouped

    def ungrouped(self, rows: Tensor) -> Tensor:
        """Undo `grouped`."""
        flat = rows.flatten(0, 1)
        if self.order is None:
            return flat
        back = torch.empty(len(self.order), dtype=torch.int64)
        back[list(self.order)] = torch.arange(len(self.order))
        return flat[back.to(flat.device)]


NOTHING = Sharing(1, None, 0)


def sharing_by_value(prompts: Tensor) -> Sharing:
    """Find the leading rows (R, L, W) that are bit for bit the same; waits for the device.

    Either all prompts form one group, or groups of equal size by their second row (the first
    context vector: SOS is the same for all), whichever shares more.
    """
    return max(_candidates(prompts), key=lambda claim: claim.shared)


def _candidates(prompts: Tensor) -> list[Sharing]:
    """Give the claims that values allow, the one group first."""
    with torch.no_grad():
        best = [Sharing(1, None, _leading(prompts[None]))]
        if prompts.shape[1] < 2 or len(prompts) < 2:
            return best
        _, which = torch.unique(prompts[:, 1], dim=0, return_inverse=True)
        members: dict[int, list[int]] = {}
        for row, group in enumerate(which.tolist()):
            members.setdefault(group, []).append(row)
        sizes = {len(rows) for rows in members.values()}
        if not 1 < len(members) < len(prompts) or len(sizes) != 1:
            return best
        order = tuple(row for rows in members.values() for row in rows)
        natural = order == tuple(range(len(prompts)))
        several = Sharing(len(members), None if natural else order, 0)
        several = several._replace(shared=_leading(several.grouped(prompts)))
        return [*best, several] if several.shared > best[0].shared else best


def _leading(grouped: Tensor) -> int:
    """Count the leading rows of (G, C, L, W) that are equal over C."""
    same = (grouped == grouped[:, :1]).flatten(3).all(-1).all(1).all(0)
    return int(same.cumprod(0).sum())


class _Graph(NamedTuple):
    """What lies between prompts and the tensors that are learned."""

    leaves: tuple[Tensor, ...]
    accumulators: tuple[Any, ...]
    signature: int
    against: str


def proven(prompts: Tensor, memory: dict[Any, Any]) -> tuple[Sharing, str]:
    """Say which leading rows of prompts (R, L, W) are one function of all that is learned.

    Equal values are not enough: contexts of classes often start equal. So a random gradient is sent
    back from these very rows, at every call, once as it is and once gathered in the first prompt of
    each group, as the pass gathers it: the same has to arrive at all that is learned. Costs two
    backward passes from the prompts to the parameters, none through the tower.
    """
    graph = _graph(prompts)
    if graph.against:
        return NOTHING, f", since {graph.against}"
    known = memory.setdefault("sharing", {})
    key = (graph.signature, tuple(prompts.shape), prompts.dtype)
    found = known.get(key)
    if found is not None and _holds(found, prompts, graph):
        return found, ""
    found = _search(prompts, graph)
    if len(known) >= _MOST_GRAPHS:
        known.clear()
    known[key] = found
    why = "" if found.shared else ", since no leading row is one function of what is learned"
    return found, why


def _search(prompts: Tensor, graph: _Graph) -> Sharing:
    """Find the most rows that can be shared: every row below them can be, too."""
    best = NOTHING
    for claim in _candidates(prompts):
        low, high = best.shared, claim.shared
        middle = high
        while low < high:
            if _holds(claim._replace(shared=middle), prompts, graph):
                low, best = middle, claim._replace(shared=middle)
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
    return best


def _holds(claim: Sharing, prompts: Tensor, graph: _Graph) -> bool:
    """Check a claim by value and by gradient; waits for the device."""
    if not claim.shared:
        return True
    if claim.groups > 1 and len(prompts) != len(claim.order or prompts):
        return False
    lead = claim.grouped(prompts[:, : claim.shared])
    draw = _draw(lead)
    gathered = torch.zeros_like(draw)
    gathered[:, 0] = draw.sum(1)
    found = []
    try:
        for sent in (draw, gathered):
            found.append(
                torch.autograd.grad(lead, graph.leaves, sent, retain_graph=True, allow_unused=True)
            )
    except RuntimeError:  # a graph that cannot be run twice
        return False
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None]
    with torch.no_grad():
        same = torch.stack([(lead == lead[:, :1]).all(), *((a == b).all() for a, b in pairs)])
        if bool(same.all()):
            return True
        # 16 bits round one class of many away: there the two have to be the same to the last bit
        if not bool(same[0]) or any(a.element_size() < 4 for a, _ in pairs):
            return False
        return all(
            float((a - b).abs().max()) <= 32 * torch.finfo(a.dtype).eps * float(b.abs().max())
            for a, b in pairs
        )


def _draw(lead: Tensor) -> Tensor:
    """Draw small whole numbers, whose sums no dtype rounds, without the caller's random state."""
    generator = torch.Generator(lead.device).manual_seed(0)
    shape = tuple(lead.shape)
    whole = torch.randint(-2, 3, shape, generator=generator, device=lead.device)
    # large ones, so that a hook that limits gradients shows itself
    return whole.to(lead.dtype) * (2**20 if lead.element_size() >= 4 else 1)


def _graph(prompts: Tensor) -> _Graph:
    """Walk the autograd graph of prompts to its leaves, without running anything."""
    leaves: dict[int, Tensor] = {}
    accumulators, names, against = [], [], ""
    if prompts.grad_fn is None:
        return _Graph((prompts,), (), 0, "they are learned themselves")
    if prompts._backward_hooks or prompts.retains_grad:
        against = "their own gradient is looked at"
    seen = {prompts.grad_fn}
    todo: list[Any] = [prompts.grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
            accumulators.append(node)
            if leaf._backward_hooks:
                against = against or "a hook on a learned tensor would fire once more"
        if isinstance(node, BackwardCFunction):
            against = against or f"they come through {names[-1]}, which nobody can look into"
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                todo.append(parent)
    if not leaves:
        against = against or "nothing that is learned is in sight"
    return _Graph(tuple(leaves.values()), tuple(accumulators), hash(tuple(names)), against)


def leaves_of(prompts: Tensor) -> tuple[Tensor, ...]:
    """Return what is learned behind prompts."""
    return _graph(prompts).leaves


# gradients of single prompts


_CHECKING = threading.local()
with torch.inference_mode(False), torch.enable_grad():
    # a node that is in nobody's graph: only a plain backward pass would run it
    _ELSEWHERE: Any = torch.zeros(1, requires_grad=True, dtype=torch.float32).clone().grad_fn


@contextmanager
def unwatched() -> Iterator[None]:
    """Give the pass's own gradients inside, whoever looks at the prompts."""
    _CHECKING.on = True
    try:
        yield
    finally:
        _CHECKING.on = False


class _Sent:
    """What the two ends of a pass know of each other."""

    def __init__(self, prompts: Tensor, call: Callable[[Tensor], Tensor], seen: Any) -> None:
        base = prompts._base
        self.watch = [weakref.ref(t) for t in (prompts, base) if t is not None]
        self.value, self.call, self.seen = prompts.detach(), call, seen
        self.accumulators = _graph(prompts).accumulators
        self.gradient: Tensor | None = None

    def looked_at(self) -> bool:
        """Tell whether somebody wants the gradient of the prompts themselves, or may."""
        if getattr(_CHECKING, "on", False):
            return False
        alive = [t for t in (ref() for ref in self.watch) if t is not None]
        if any(t._backward_hooks or t.retains_grad for t in alive):
            return True
        if torch._C._will_engine_execute_node(_ELSEWHERE):
            return False  # a plain backward pass, whose gradients stay at the leaves
        return bool(alive) or not all(_arrives(node) for node in self.accumulators)


def _arrives(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it is what `autograd.grad` was asked for
        return True


class _Lead(torch.autograd.Function):
    """The prompts as a pass with shared rows takes them."""

    @staticmethod
    def forward(ctx: Any, prompts: Tensor, sent: _Sent) -> Tensor:
        ctx.sent = sent
        return prompts.detach()

    @staticmethod
    def backward(ctx: Any, gathered: Tensor) -> tuple[Tensor, None]:
        sent: _Sent = ctx.sent
        if sent.gradient is None or not sent.looked_at():
            return gathered, None
        again = torch.is_grad_enabled()
        source = next((t for t in (sent.watch[0](),) if again and t is not None), None)
        with torch.enable_grad():
            prompts = sent.value.requires_grad_() if source is None else source
            features = sent.call(prompts)
            (literal,) = torch.autograd.grad(
                features, prompts, sent.gradient, create_graph=again and source is not None
            )
        sent.seen()
        return literal, None


class _Tail(torch.autograd.Function):
    """The features of a pass with shared rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, sent: _Sent) -> Tensor:
        ctx.sent = sent
        return features.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.sent.gradient = gradient
        return gradient, None


def literal_if_watched(
    prompts: Tensor,
    fast: Callable[[Tensor], Tensor],
    literal: Callable[[Tensor], Tensor],
    seen: Callable[[], None],
) -> Tensor:
    """Run a pass whose gradient of shared rows is gathered, unless somebody looks at it.

    Who holds the prompts, and asks for their own gradient (``retain_grad``, a hook,
    ``autograd.grad``), gets the literal one: the original is then run once more, and ``seen`` is
    called.
    """
    sent = _Sent(prompts, literal, seen)
    features: Tensor = _Tail.apply(fast(_Lead.apply(prompts, sent)), sent)
    return features
