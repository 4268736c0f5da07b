"""What the engine holds a method to while it runs: shapes, names, gradients, finite numbers.

Everything here but `furthest` looks at shapes alone and never waits for the device.
`fastfpl.testing.check_method` proves the rest of the contract.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfpl.errors import InputError
from fastfpl.methods.base import Method, State

__all__ = [
    "asked",
    "check_gradients",
    "check_logits",
    "check_loss",
    "check_merged",
    "check_state",
    "check_states",
    "check_text",
    "furthest",
    "may_follow",
    "started",
]


def refusal(method: Method, verb: str, rule: str, got: str) -> InputError:
    """Say which verb of a method broke which rule."""
    name = getattr(type(method), "name", type(method).__name__)
    return InputError(f"fastfpl.methods: {name}'s {verb} must {rule}; got {got}")


@contextlib.contextmanager
def asked(method: Method, verb: str, **there: Mapping[str, Any]) -> Iterator[None]:
    """Turn a name that a verb asks for in vain into a sentence with the names that are there."""
    try:
        yield
    except KeyError as error:
        known = ", ".join(
            f"{what} has {', '.join(sorted(map(str, state))) or 'nothing'}"
            for what, state in there.items()
        )
        got = f"{error.args[0]!r}" if error.args else "a key"
        raise refusal(method, verb, f"ask for tensors that are there ({known})", got) from error


def check_state(method: Method, verb: str, state: object) -> State:
    """Refuse what is no mapping from names to tensors."""
    if not isinstance(state, dict):
        raise refusal(method, verb, "return a dict of named tensors", type(state).__name__)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise refusal(
                method, verb, "return a dict of named tensors", f"{type(tensor).__name__} {name!r}"
            )
    return state


def check_states(method: Method, verb: str, pair: object, clients: int) -> tuple[State, State]:
    """Refuse what is no pair of states whose tensors have one row a client."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise refusal(method, verb, "return a pair of states", type(pair).__name__)
    for state in pair:
        for name, tensor in check_state(method, verb, state).items():
            if tensor.shape[:1] != (clients,):
                raise refusal(
                    method,
                    verb,
                    f"keep the leading client dimension {clients} of {name!r}",
                    f"shape {tuple(tensor.shape)}",
                )
    return pair


def started(
    method: Method, down: State, own: State, clients: int, *, training: bool
) -> tuple[State, State]:
    """Let a cohort start, and refuse what has no row for each client."""
    with asked(method, "start", download=down, own=own):
        pair = method.start(down, own, training=training)
    trained, fixed = check_states(method, "start", pair, clients)
    if training and not trained:
        raise InputError(
            f"fastfpl.methods: {method.name}'s start must return what is trained; got nothing"
        )
    return trained, fixed


def check_text(method: Method, text: object, clients: int) -> None:
    """Refuse text features without one row a client."""
    _check_rows(method, "text", text, clients)


def check_logits(method: Method, logits: object, shape: tuple[int, ...]) -> None:
    """Refuse logits of another shape than (U, B, C)."""
    if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
        raise refusal(method, "logits", f"return shape {shape}, (U, B, C)", _shape(logits))


def check_loss(method: Method, loss: object, clients: int) -> None:
    """Refuse a loss that is not one number a client."""
    if not isinstance(loss, Tensor) or tuple(loss.shape) != (clients,):
        rule = f"return one mean a client, shape ({clients},)"
        raise refusal(method, "loss", rule, _shape(loss))
    if not loss.requires_grad:
        raise refusal(method, "loss", "depend on what is trained", "a constant")


def check_gradients(method: Method, gradients: Mapping[str, Tensor | None]) -> None:
    """Refuse trained tensors that the loss does not depend on."""
    for name, gradient in gradients.items():
        if gradient is None:
            rule = "depend on every tensor that start says is trained"
            raise refusal(method, "loss", rule, f"no gradient of {name!r}; leave it in fixed")


def check_merged(method: Method, server: State, merged: object) -> State:
    """Refuse a new server state with other names, shapes or dtypes than the old one."""
    new = check_state(method, "merge", merged)
    if set(new) != set(server):
        rule = f"return the tensors of the server, {', '.join(sorted(server)) or 'none'}"
        raise refusal(method, "merge", rule, ", ".join(sorted(new)) or "none")
    for name, tensor in new.items():
        old = server[name]
        if not may_follow(method, name, old, tensor):
            raise refusal(
                method,
                "merge",
                f"keep {name!r} of shape {tuple(old.shape)} and {old.dtype}",
                f"{tuple(tensor.shape)} and {tensor.dtype}",
            )
    return new


def may_follow(method: Method, name: str, old: Tensor, new: Tensor) -> bool:
    """Whether a tensor of the server may take the place of another one."""
    if new.dtype != old.dtype:
        return False
    if name not in method.grows:
        return new.shape == old.shape
    return new.shape[1:] == old.shape[1:] and len(new) >= len(old)


def furthest(states: Mapping[str, State], rows: int) -> tuple[str, str, int, float] | None:
    """Wait for the device and find a number that is not finite, or whose square is not.

    LayerNorm and unit length square what is trained: beyond that they give anything.

    Parameters
    ----------
    states : mapping from what to State
        Stacked, ``rows`` clients each.
    rows : int

    Returns
    -------
    tuple or None
        What, name, row and the largest number there.
    """
    found, most = [], []
    for what, state in states.items():
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.numel():
                flat = tensor.detach().reshape(rows, -1)
                wide = torch.linalg.vector_norm(flat, ord=torch.inf, dim=1)
                most.append(wide.to(torch.promote_types(wide.dtype, torch.float32)))
                found.append((what, name))
    if not most:
        return None
    wrong = torch.stack([~(norm * norm).isfinite() for norm in most]).cpu()
    for k, row in wrong.nonzero().tolist():
        return (*found[k], row, most[k][row].item())
    return None


def _check_rows(method: Method, verb: str, tensor: object, clients: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape[:1] != (clients,):
        rule = f"keep the leading client dimension {clients}"
        raise refusal(method, verb, rule, _shape(tensor))


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
