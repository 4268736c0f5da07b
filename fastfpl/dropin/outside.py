"""Transport and gates in other people's code: what can be had without changing a number."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfpl.dropin.swap import Kind, State, register

__all__ = ["DIAGONALS", "gates"]


class Diagonal:
    """A diagonal matrix (..., N, N) as its diagonal, until somebody wants the whole."""

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal

    def __getattr__(self, name: str) -> Any:
        return getattr(_whole(self), name)

    def __matmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (self, other))

    def __rmatmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (other, self))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.matmul, torch.bmm, Tensor.__matmul__, Tensor.matmul, Tensor.bmm):
            a, b = (*args, *(kwargs or {}).values())[:2]
            if isinstance(a, Diagonal) and isinstance(b, Tensor) and b.dim() > a.diagonal.dim():
                return a.diagonal.unsqueeze(-1) * b
            if isinstance(b, Diagonal) and isinstance(a, Tensor) and a.dim() > b.diagonal.dim():
                return a * b.diagonal.unsqueeze(-2)
        whole = [_whole(x) for x in args]
        return func(*whole, **{name: _whole(x) for name, x in (kwargs or {}).items()})


def _whole(value: Any) -> Any:
    if not isinstance(value, Diagonal):
        return value
    with torch._C.DisableTorchFunction():  # past `_Vectors`
        return torch.diag_embed(value.diagonal)


class _Vectors(TorchFunctionMode):
    """Give the plain diagonal matrices of batches as `Diagonal`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (torch.diag_embed, Tensor.diag_embed) and _plain_diagonal(args, given):
            return Diagonal(args[0] if args else given["input"])
        return func(*args, **given)


def _plain_diagonal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = ("input", "offset", "dim1", "dim2")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    vector = given["input"]
    if not isinstance(vector, Tensor):
        return False
    end = vector.dim()
    first, second = (given.get(name, d) % (end + 1) for name, d in (("dim1", -2), ("dim2", -1)))
    return given.get("offset", 0) == 0 and (first, second) == (end - 1, end)


class Diagonals(Kind):
    """A model beside a prompt learner whose methods multiply with diagonal matrices.

    FedOTP's transport builds them of size (images x classes, patches, patches) before and after
    its iteration. The methods run as they are, their own stopping rule included; only diagonal
    matrices stay vectors.
    """

    name = "transport with diagonal matrices"
    method = "forward"

    def examine(self, module: nn.Module) -> bool:
        """Recognise a prompt learner among the children and ``diag_embed`` in own methods."""
        return _holds_learner(module) and bool(self.methods(type(module)))

    def methods(self, cls: type) -> tuple[str, ...]:
        """Name the methods that a class and its bases build diagonal matrices in."""
        return tuple(
            name
            for name, method in inspect.getmembers(cls, inspect.isfunction)
            if "diag_embed" in _names(method.__code__)
            and not isinstance(inspect.getattr_static(cls, name), staticmethod)
        )

    def run(
        self,
        module: Any,
        state: State,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the method with diagonal matrices as vectors."""
        with _Vectors():
            result = original(*args, **kwargs)
        state.calls["its own iteration, diagonal matrices as vectors"] += 1
        return _whole(result)


DIAGONALS = register(Diagonals())


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


def _holds_learner(module: nn.Module) -> bool:
    return any(hasattr(child, "token_prefix") for child in module.children())


def gates(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Find attentions over experts beside a prompt learner: four square linear layers and heads.

    They are left: their output, one row for every pair of image and class, is what
    `fastfpl.ops.gate_experts` never forms, and it is used outside of them.
    """
    if not _holds_learner(module):
        return
    for name, child in module.named_modules():
        linears = [m for m in child.children() if isinstance(m, nn.Linear)]
        sizes = {size for m in linears for size in (m.in_features, m.out_features)}
        heads = any("head" in key and type(value) is int for key, value in vars(child).items())
        if len(linears) == 4 and len(sizes) == 1 and heads:
            yield (
                name,
                child,
                (
                    "its output, one row for every pair of image and class, is multiplied with the "
                    "image features outside of it; fastfpl.ops.gate_experts does both at once"
                ),
            )
