"""Speed up other people's CLIP code without changing it: recognise, swap, explain, undo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fastfpl.dropin.embedded import PROMPTS
from fastfpl.dropin.keys import key_of
from fastfpl.dropin.outside import DIAGONALS, gates
from fastfpl.dropin.proof import Proof, Text, proof_of
from fastfpl.dropin.report import Finding, Report
from fastfpl.dropin.swap import Instead, Kind, is_swapped, kind_of, named, state_of, swap, swap_back
from fastfpl.dropin.tokens import TOKENS
from fastfpl.errors import InputError, KindError

_ORDER: tuple[Kind, ...] = (PROMPTS, *TOKENS, DIAGONALS)

__all__ = ["Finding", "Report", "accelerate", "accelerated", "explain", "restore"]

Model = TypeVar("Model", bound=nn.Module)
_Proofs = dict[Any, Proof]


def accelerate(model: Model, *, verify: int | Literal["always"] | None = None) -> Model:
    """Swap the text passes of a model for fastfpl's; the model stays what it is.

    Recognised, by what the modules hold and not by their names: CoOp's family (a text encoder of
    ``(prompts, tokenized_prompts)``, whoever makes the prompts), open_clip, OpenAI's clip, and
    transformers' CLIP text models, anywhere inside the model.

    Parameters
    ----------
    model : Module
        Any module that holds one of them. Changed in place.
    verify : int or "always", optional
        Compare every so many calls of each swapped module with the original, run on a copy: values
        and, where they are wanted, gradients. By default nothing is compared after the proof.

    Returns
    -------
    Module
        The same object. Parameters, buffers, state_dict keys, hooks, dtype, device and modes are
        untouched: modules get a subclass of their own class whose one method is fast. Calls that
        the fast pass cannot answer exactly run the original.

    Raises
    ------
    KindError
        If it is no plain module, or nothing inside is recognised.
    InputError
        If ``verify`` is neither "always" nor a positive whole number.
    Differs
        From a later call of the model, where ``verify`` has found a difference.

    Notes
    -----
    Every swapped module has first given the features and gradients of the original, on random
    prompts and on a copy, reading nothing but a text tower's parts. Such a proof holds for one code
    path: another mode, attribute, class or kind of call is proven anew. Weights are read at every
    call. `explain` says what was done and what was left, with reasons;
    `restore` undoes it. Calling it again changes nothing.
    """
    op = "fastfpl.accelerate"
    if isinstance(model, torch.jit.ScriptModule):
        raise KindError(f"{op}: model must be a plain module; got a TorchScript one")
    if not isinstance(model, nn.Module):
        raise KindError(f"{op}: model must be a torch.nn.Module; got {type(model).__name__}")
    every = 1 if verify == "always" else verify or 0
    whole = isinstance(every, int) and not isinstance(every, bool)
    if not whole or every < 0 or (verify is not None and not every):
        raise InputError(
            f'{op}: verify must be "always" or a positive whole number; got {verify!r}'
        )
    found = False
    for path, module, kind, reason, proofs in _recognised(model):
        found = True
        if not reason and not is_swapped(module):
            swap(module, named(kind), path).memory["proofs"] = proofs
        if is_swapped(module) and verify is not None:
            state_of(module).verify = every
    if not found:
        raise KindError(
            f"{op}: model must hold a CoOp-style text encoder or the text tower of open_clip, "
            f"OpenAI's clip or transformers' CLIP; got {type(model).__name__} without one"
        )
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`; the same object, with the classes it had.

    Parameters
    ----------
    model : Module
        Accelerated or not.

    Returns
    -------
    Module
        The same object.
    """
    if not isinstance(model, nn.Module):
        raise KindError(
            f"fastfpl.restore: model must be a torch.nn.Module; got {type(model).__name__}"
        )
    for module in model.modules():
        if is_swapped(module):
            swap_back(module)
    return model


@contextmanager
def accelerated(model: Model, *, verify: int | Literal["always"] | None = None) -> Iterator[Model]:
    """Accelerate a model inside a ``with`` block; what was swapped before stays so.

    Parameters
    ----------
    model : Module
        As for `accelerate`.
    verify : int or "always", optional
        As for `accelerate`.
    """
    before = {id(module) for module in model.modules() if is_swapped(module)}
    accelerate(model, verify=verify)
    try:
        yield model
    finally:
        for module in model.modules():
            if is_swapped(module) and id(module) not in before:
                swap_back(module)


def explain(model: nn.Module) -> Report:
    """Say what is swapped in a model, what is left and why, and how calls were answered.

    Parameters
    ----------
    model : Module
        Accelerated or not; it is not changed.

    Returns
    -------
    Report
        Printable.
    """
    if not isinstance(model, nn.Module):
        raise KindError(
            f"fastfpl.explain: model must be a torch.nn.Module; got {type(model).__name__}"
        )
    findings = []
    for path, module, kind, reason, _ in _recognised(model):
        swapped = is_swapped(module)
        if not swapped and not reason:
            reason = "fastfpl.accelerate was not called"
        calls = dict(state_of(module).calls) if swapped else {}
        findings.append(Finding(path, type(module).__name__, kind, swapped, reason, calls))
    return Report(tuple(findings))


def _recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str, _Proofs]]:
    """Yield path, module, kind, the reason to leave it or "" to swap it, and what was proven."""
    for path, module in list(model.named_modules()):
        if is_swapped(module):
            yield path, module, kind_of(module).name, "", {}
        else:
            for kind in _ORDER:
                proofs: _Proofs = {}
                try:
                    if not kind.examine(module):
                        continue
                    if any(name in vars(module) for name in kind.methods(type(module))):
                        raise Instead("its method was replaced")
                    if isinstance(kind, Text):
                        proofs = _proven(kind, module)
                    yield path, module, kind.name, "", proofs
                except Instead as instead:
                    yield path, module, kind.name, str(instead), {}
                break
        for name, gate, reason in gates(module):
            yield f"{path}.{name}".lstrip("."), gate, "gate over experts", reason, {}


def _proven(kind: Text, module: nn.Module) -> _Proofs:
    """Prove a module in the mode it is in, or in the other one; `Instead` with the first reason."""
    first = ""
    with torch.enable_grad():
        for other in (False, True):
            for form in kind.forms(module):
                proof = proof_of(kind, module, form, 3, other_mode=other)
                if not proof.reason:
                    return {} if other else {(key_of(module), form, True): proof}
                first = first or proof.reason
    raise Instead(first)
