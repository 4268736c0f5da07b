"""Which prompts share their leading rows: by value where nothing is learned, else by function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfpl.dropin.swap import HOOKS, Instead, Kind, State, hooked, refuse, register

__all__ = ["LEARNER", "Sharing", "note_of", "sharing_by_value", "still_holds"]

_NOTE = "_fastfpl_sharing"
# a learner that counts its calls has a new mode every time
_MOST_MODES = 64


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
    with torch.no_grad():
        best = Sharing(1, None, _leading(prompts[None]))
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
        return several if several.shared > best.shared else best


def _leading(grouped: Tensor) -> int:
    """Count the leading rows of (G, C, L, W) that are equal over C."""
    same = (grouped == grouped[:, :1]).flatten(3).all(-1).all(1).all(0)
    return int(same.cumprod(0).sum())


def still_holds(sharing: Sharing, prompts: Tensor) -> bool:
    """Check a claim about prompts (R, L, W) by value; waits for the device."""
    with torch.no_grad():
        lead = sharing.grouped(prompts[:, : sharing.shared])
        return bool((lead == lead[:, :1]).all())


def note_of(prompts: Tensor) -> Sharing | None:
    """Return what the prompt learner that made a tensor knows of it, if it is as it was made."""
    note = getattr(prompts, _NOTE, None)
    if note is None or note[1] != prompts._version:
        return None
    sharing: Sharing = note[0]
    return sharing


class Learner(Kind):
    """A module with the fixed embeddings of CoOp's prompts that makes whole prompts.

    Its method is the original one. Once per mode it is also run with random numbers in place of
    everything that is learned: rows that are equal then are the same function of the parameters,
    and so is their gradient, which equal values alone would not prove (class-specific contexts
    start equal). The prompts leave with that claim; the text encoder checks the values again.
    """

    name = "prompt learner"
    method = "forward"

    def examine(self, module: nn.Module) -> bool:
        """Recognise by the buffers ``token_prefix`` (C, 1, W) and ``token_suffix`` (C, ..., W)."""
        prefix, suffix = (getattr(module, name, None) for name in ("token_prefix", "token_suffix"))
        if not isinstance(prefix, Tensor) or not isinstance(suffix, Tensor):
            return False
        if prefix.dim() != 3 or suffix.dim() != 3 or prefix.shape[2] != suffix.shape[2]:
            refuse("token_prefix and token_suffix are not (classes, tokens, width)")
        return True

    def run(
        self,
        module: Any,
        state: State,
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answer with the original's prompts and note on each what its rows share."""
        result = original(*args, **kwargs)
        made = _flat(result)
        if not any(t.dim() == 3 and t.requires_grad for t in made):
            state.calls["the original, nothing to learn from its prompts"] += 1
            return result
        key = (_mode(module), len(made), bool(args or kwargs))
        claims = state.memory.get(key)
        if claims is None:
            try:
                claims = _probe(module, type(module)._fastfpl_base, args, kwargs)
            except Instead as reason:
                claims = str(reason)
            except Exception as error:
                claims = f"a trial of it raised {type(error).__name__}"
            if not isinstance(claims, str) and len(claims) != len(made):
                claims = "a trial of it returned something else"
            if len(state.memory) >= _MOST_MODES:
                state.memory.clear()
            state.memory[key] = claims
        if isinstance(claims, str):
            state.calls[f"the original, no row known to be shared: {claims}"] += 1
            return result
        for tensor, claim in zip(made, claims, strict=True):
            if claim is not None:
                state.calls[f"the original, {claim.shared} leading rows known to be shared"] += 1
                setattr(tensor, _NOTE, (claim, tensor._version))
        return result


LEARNER = register(Learner())


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [t for part in result for t in _flat(part)]
    return []


def _mode(module: nn.Module) -> tuple[Any, ...]:
    """Name everything simple that may decide which function a prompt learner computes."""
    plain = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str)
    )
    learned = tuple((name, p.shape, p.dtype) for name, p in _learned(module))
    buffers = tuple((name, buffer.shape) for name, buffer in module.named_buffers())
    return (plain, learned, buffers)


def _learned(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _probe(
    module: Any, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Sharing | None]:
    """Run a prompt learner on random parameters and say what the rows of each result share."""
    if args or kwargs:
        refuse("the prompt learner takes arguments, on which its prompts may depend")
    learned = dict(_learned(module))
    if not learned:
        refuse("the prompt learner's learned tensors are not its parameters")
    if any(hooked(inner) for inner in list(module.modules())[1:]):
        refuse("a module inside the prompt learner has a hook, which a trial would fire")
    generator = torch.Generator().manual_seed(0)
    draws = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p).requires_grad_()
        for name, p in learned.items()
    }
    # a shallow copy without hooks, so that the trial leaves no trace on the module
    trial = copy.copy(module)
    trial.__class__ = base
    for name in HOOKS:
        trial.__dict__[name] = type(trial.__dict__[name])()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = sorted({p.device.index or 0 for p in learned.values() if p.device.type == "cuda"})
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        results = _flat(torch.func.functional_call(trial, {**draws, **buffers}))
    claims: list[Sharing | None] = []
    known = {id(draw) for draw in draws.values()}
    for prompts in results:
        if prompts.dim() != 3 or not prompts.requires_grad:
            claims.append(None)
            continue
        if any(id(leaf) not in known for leaf in _leaves(prompts)):
            refuse("the prompts depend on a tensor that is no parameter of the prompt learner")
        claims.append(sharing_by_value(prompts))
    return claims


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Walk the autograd graph to the tensors that collect its gradients."""
    seen = set()
    todo: list[Any] = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [parent for parent, _ in node.next_functions]
