"""Speed up other people's CLIP code without changing it: recognise, swap, explain, undo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from fastfpl.dropin.outside import DIAGONALS, gates
from fastfpl.dropin.report import Finding, Report
from fastfpl.dropin.sharing import LEARNER
from fastfpl.dropin.swap import Instead, Kind, is_swapped, kind_of, named, state_of, swap, swap_back
from fastfpl.dropin.text import KINDS, Text, prove
from fastfpl.errors import KindError

_ORDER: tuple[Kind, ...] = (*KINDS, LEARNER, DIAGONALS)

__all__ = ["Finding", "Report", "accelerate", "accelerated", "explain", "restore"]

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Swap the text passes of a model for fastfpl's; the model stays what it is.

    Recognised, by what the modules hold and not by their names: CoOp's family (a prompt learner
    with ``token_prefix`` and ``token_suffix``, a text encoder of ``(prompts, tokenized_prompts)``),
    open_clip, OpenAI's clip, and transformers' CLIP text models, anywhere inside the model.

    Parameters
    ----------
    model : Module
        Any module that holds one of them. Changed in place.

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

    Notes
    -----
    Every swapped module has first given the same features as the original on three random prompts.
    Weights are read at every call. `explain` says what was done and what was left, with reasons;
    `restore` undoes it. Calling it again changes nothing.
    """
    op = "fastfpl.accelerate"
    if isinstance(model, torch.jit.ScriptModule):
        raise KindError(f"{op}: model must be a plain module; got a TorchScript one")
    if not isinstance(model, nn.Module):
        raise KindError(f"{op}: model must be a torch.nn.Module; got {type(model).__name__}")
    found = False
    for _, module, kind, reason in _recognised(model):
        found = True
        if not reason and not is_swapped(module):
            swap(module, named(kind))
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
def accelerated(model: Model) -> Iterator[Model]:
    """Accelerate a model inside a ``with`` block; what was swapped before stays so.

    Parameters
    ----------
    model : Module
        As for `accelerate`.
    """
    before = {id(module) for module in model.modules() if is_swapped(module)}
    accelerate(model)
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
    for path, module, kind, reason in _recognised(model):
        swapped = is_swapped(module)
        if not swapped and not reason:
            reason = "fastfpl.accelerate was not called"
        calls = dict(state_of(module).calls) if swapped else {}
        findings.append(Finding(path, type(module).__name__, kind, swapped, reason, calls))
    return Report(tuple(findings))


def _recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str]]:
    """Yield path, module, its kind and the reason to leave it, or "" to swap it."""
    for path, module in list(model.named_modules()):
        if is_swapped(module):
            yield path, module, kind_of(module).name, ""
        else:
            for kind in _ORDER:
                try:
                    if not kind.examine(module):
                        continue
                    if any(name in vars(module) for name in kind.methods(type(module))):
                        raise Instead("its method was replaced")
                    if isinstance(kind, Text):
                        prove(kind, module)
                    yield path, module, kind.name, ""
                except Instead as instead:
                    yield path, module, kind.name, str(instead)
                break
        for name, gate, reason in gates(module):
            yield f"{path}.{name}".lstrip("."), gate, "gate over experts", reason
