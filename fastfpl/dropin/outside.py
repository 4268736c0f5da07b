"""Transport and gates in other people's code: what can be had without changing a number."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fastfpl.dropin.swap import Kind, State, register
from fastfpl.dropin.trial import copy_of, differs, near, no_trace

__all__ = ["DIAGONALS", "gates"]


class Diagonal:
    """A diagonal matrix (..., N, N) as its diagonal, until somebody wants the whole.

    From then on it is the whole: what is written into it is there.
    """

    def __init__(self, diagonal: Tensor) -> None:
        # a copy, as torch's matrix is one: the vector may be written to afterwards
        self._diagonal: Tensor | None = diagonal.clone()
        self._matrix: Tensor | None = None

    def whole(self) -> Tensor:
        """Give the matrix, the same one every time."""
        if self._matrix is None:
            assert self._diagonal is not None
            with torch._C.DisableTorchFunction():  # past `_Vectors`
                self._matrix = torch.diag_embed(self._diagonal)
            self._diagonal = None
        return self._matrix

    def factor(self, other: Any, dim: int) -> Tensor | None:
        """Give what a product with a matrix is, number by number; None if only torch knows.

        ``dim`` is the dimension of ``other`` that the product sums over.
        """
        vector = self._diagonal
        if vector is None or not isinstance(other, Tensor) or other.dim() <= vector.dim():
            return None
        fits = vector.shape[-1] == other.shape[dim] and vector.dtype == other.dtype
        # where autocast would round both, or torch has something to say, it is asked
        if not fits or torch.is_autocast_enabled(vector.device.type):
            return None
        return vector.unsqueeze(-1 if dim == -2 else -2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    def __matmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (self, other))

    def __rmatmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (other, self))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            a, b = args
            if isinstance(a, Diagonal) and (factor := a.factor(b, -2)) is not None:
                return factor * b
            if isinstance(b, Diagonal) and (factor := b.factor(a, -1)) is not None:
                return a * factor
        return func(*_whole(args), **_whole(kwargs or {}))


_PRODUCTS = (torch.matmul, torch.bmm, Tensor.__matmul__, Tensor.matmul, Tensor.bmm)


def _of_whole(name: str) -> Callable[..., Any]:
    def method(self: Diagonal, *args: Any) -> Any:
        return getattr(self.whole(), name)(*_whole(args))

    return method


# Python looks these up in the class, past `Diagonal.__getattr__`
for _name in (
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__"),
    *("__imul__", "__truediv__", "__rtruediv__", "__itruediv__", "__pow__", "__rpow__", "__neg__"),
    *("__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__"),
    *("__getitem__", "__setitem__", "__len__", "__iter__", "__float__", "__int__", "__array__"),
):
    setattr(Diagonal, _name, _of_whole(_name))


def _whole(value: Any) -> Any:
    """Give the matrices in place of all `Diagonal` of a result, or of arguments."""
    return tree_map(lambda x: x.whole() if isinstance(x, Diagonal) else x, value)


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
        result = _whole(result)
        if state.due():
            _compare(module, state, original, args, kwargs, result)
        return result


def _compare(module: Any, state: State, original: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Hold a result against that of the same method on a copy."""
    with no_trace(module), torch.no_grad():
        literal = original.func(copy_of(module, moved=False), *args, **kwargs)
        pairs = zip(tree_leaves(result), tree_leaves(literal), strict=True)
        for got, want in pairs:
            tensors = isinstance(got, Tensor) and isinstance(want, Tensor)
            if tensors and not float((got - want).abs().max()) <= near(want):
                raise differs(state, "other numbers than the original's")


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
