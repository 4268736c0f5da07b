"""What decides the code path of a module, apart from weights: the key under which a proof holds."""

from __future__ import annotations

import enum
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Reader", "key_of", "plain_class", "saver", "tensors_in"]

# of nn.Module itself, or ours
_OURS = frozenset({"_fastfpl", "_is_replica", "_former_parameters", "_modules"})
_NAMESPACES = ("_parameters", "_buffers")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LARGE = 4096
# packages whose functions and objects are taken as they are, by identity
_FOREIGN = frozenset(sys.stdlib_module_names - {"__main__"}) | {"torch", "numpy", "transformers"}


class _Same:
    """An object that equals only itself; kept alive, so that its id is not given away."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Reader:
    """Reads modules, and what their code names outside of them, into something hashable.

    Attributes
    ----------
    generators : list
        Random generators that were met.
    outside : list of (dict or type, str, value)
        Plain values in classes and in globals, where a forward may write to them.
    """

    def __init__(self) -> None:
        self.generators: list[Any] = []
        self.outside: list[tuple[Any, str, Any]] = []
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []

    def value(self, value: Any, names: frozenset[str] = frozenset()) -> Any:
        """Read anything; ``names`` are the attributes that code takes from a Python module."""
        kind = type(value)
        if kind in _SIMPLE or isinstance(value, enum.Enum):
            return kind, value
        if isinstance(value, Tensor):
            return "tensor", tuple(value.shape), value.dtype
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return self._package(value, names)
        if id(value) in self._seen:
            return "again", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self.value(value.__func__), self.value(value.__self__)
        if isinstance(value, functools.partial):
            return tuple(self.value(x) for x in (value.func, value.args, value.keywords))
        if isinstance(value, property):
            return tuple(self.value(f) for f in (value.fget, value.fset))
        if isinstance(value, staticmethod | classmethod):
            return kind, self.value(value.__func__)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if _is_generator(value):
            self.generators.append(value)
            return kind
        if isinstance(value, dict | list | tuple | set | frozenset):
            if len(value) > _LARGE:
                return _Same(value), len(value)
            if isinstance(value, dict):
                return kind, tuple((self.value(k), self.value(v)) for k, v in value.items())
            if isinstance(value, set | frozenset):
                return kind, frozenset(self.value(v) for v in value)
            return kind, tuple(self.value(v) for v in value)
        if kind.__module__ == "numpy" and hasattr(value, "tobytes"):
            small = value.nbytes <= _LARGE
            return kind, value.tobytes() if small else _Same(value)
        slots = [n for c in kind.__mro__ for n in _tuple(vars(c).get("__slots__", ()))]
        own = getattr(value, "__dict__", None)
        if _foreign(kind.__module__) and kind is not types.SimpleNamespace and own is None:
            return _Same(value)
        if own is None and not slots:
            return _Same(value)
        read = [(n, self.value(v)) for n, v in dict(own or {}).items()]
        read += [(n, self.value(getattr(value, n))) for n in slots if hasattr(value, n)]
        return self._class(kind), tuple(read)

    def _module(self, module: nn.Module) -> Any:
        # a replica of DataParallel holds its tensors as attributes: one namespace for all
        tensors, rest = [], []
        own = module.__dict__
        for name in _NAMESPACES:
            for key, value in own.get(name, {}).items():
                tensors.append((key, None if value is None else self.value(value)))
        for name, value in own.items():
            if name in _OURS or name in _NAMESPACES:
                continue
            if name.endswith("_hooks") or "_hooks_" in name:
                if value and isinstance(value, dict):
                    rest.append((name, tuple(value)))
            elif isinstance(value, Tensor):
                tensors.append((name, self.value(value)))
            elif name != "_non_persistent_buffers_set":
                rest.append((name, self.value(value)))
        inner = [(n, m and self.value(m)) for n, m in own.get("_modules", {}).items()]
        cls = self._class(plain_class(module))
        return cls, tuple(sorted(tensors, key=lambda x: x[0])), tuple(rest), tuple(inner)

    def _class(self, cls: type) -> Any:
        if _foreign(cls.__module__) or id(cls) in self._seen:
            return cls, vars(cls).get("forward")
        self._seen[id(cls)] = len(self._seen)
        read: list[Any] = [cls]
        for base in cls.__mro__:
            if _foreign(base.__module__) or "_fastfpl_base" in vars(base):
                continue
            for name, value in list(vars(base).items()):
                if name.startswith("__") and name not in ("__call__", "__getattr__"):
                    continue
                self._place(base, name, value)
                read.append((name, self.value(value)))
        return tuple(read)

    def _function(self, function: types.FunctionType) -> Any:
        if _foreign(function.__module__ or ""):
            return function
        names = _names(function.__code__)
        read: list[Any] = [function.__code__, self.value(function.__defaults__)]
        read.append(self.value(function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                read.append(self.value(cell.cell_contents, names))
            except ValueError:  # an empty cell
                read.append(None)
        space = function.__globals__
        for name in sorted(names & space.keys()):
            self._place(space, name, space[name])
            read.append((name, self.value(space[name], names)))
        return tuple(read)

    def _package(self, package: types.ModuleType, names: frozenset[str]) -> Any:
        if _foreign(package.__name__):
            return package.__name__
        space = vars(package)
        found = sorted(names & space.keys())
        for name in found:
            self._place(space, name, space[name])
        return package.__name__, tuple((n, self.value(space[n], names)) for n in found)

    def _place(self, where: Any, name: str, value: Any) -> None:
        if type(value) in _SIMPLE or isinstance(value, enum.Enum):
            self.outside.append((where, name, value))
        elif type(value) in (list, dict, set) and len(value) <= _LARGE:
            self.outside.append((value, "", value.copy()))


def key_of(module: nn.Module) -> Any:
    """Return what decides the code that a module runs: equal keys, equal functions of weights."""
    return Reader().value(module)


def plain_class(module: nn.Module) -> type:
    """Return a module's class as it was before `accelerate`."""
    cls: type = getattr(type(module), "_fastfpl_base", type(module))
    return cls


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*(_names(c) for c in inner))


@functools.cache
def _foreign(package: str) -> bool:
    return package.partition(".")[0] in _FOREIGN


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy = sys.modules.get("numpy")
    kinds = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, kinds)


def _tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def saver(generator: Any) -> Callable[[], None]:
    """Return what sets a random generator back to its state of now."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: _set(generator, state)
    if isinstance(generator, random.Random):
        inner = generator.getstate()
        return lambda: generator.setstate(inner)
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        held = bits.state
        return lambda: setattr(bits, "state", held)
    legacy = generator.get_state()
    return lambda: generator.set_state(legacy)


def _set(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a module holds, in whatever it keeps it, with its path."""
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, one = todo.pop()
        if type(one) in _SIMPLE or isinstance(one, type | types.ModuleType) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield path, one
        elif isinstance(one, dict):
            todo += [(f"{path}.{k}", v) for k, v in one.items()]
        elif isinstance(one, list | tuple | set | frozenset):
            todo += [(f"{path}.{i}", v) for i, v in enumerate(one)]
        elif isinstance(one, nn.Module):
            own = dict(one.__dict__)
            for space in ("_parameters", "_buffers", "_modules"):
                todo += [(f"{path}.{k}", v) for k, v in own.pop(space, {}).items()]
            todo += [(f"{path}.{k}", v) for k, v in own.items() if not k.endswith("_hooks")]
        elif isinstance(one, functools.partial):
            todo += [(path, v) for v in (one.func, one.args, one.keywords)]
        elif isinstance(one, types.MethodType):
            todo.append((path, one.__self__))
        elif hasattr(one, "__dict__") and not isinstance(one, types.FunctionType):
            todo += [(f"{path}.{k}", v) for k, v in vars(one).items()]
