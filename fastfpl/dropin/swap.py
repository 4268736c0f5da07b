"""Exchange the class of a module for one whose named method is fast, and back."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

__all__ = [
    "HOOKS",
    "Instead",
    "Kind",
    "State",
    "hooked",
    "is_swapped",
    "kind_of",
    "named",
    "refuse",
    "register",
    "state_of",
    "swap",
    "swap_back",
]

_STATE = "_fastfpl"
# after so many calls in a row that were the original's, only every so many are looked at
_PATIENCE, _LOOKS = 32, 16
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Instead(Exception):
    """Why this call, or this module, is left to the original code: a clause."""


class State:
    """What one swapped module remembers: nothing that a weight decides.

    Attributes
    ----------
    calls : Counter of str
        ``"fast"``, or the reason why the original ran, and how often.
    memory : dict
        Of the kind: proofs under their keys, structure that is checked again at every call. Copies
        and files go without it.
    path : str
        The module's place in the model.
    verify : int
        Every how many calls one is compared with the original; 0 for none.
    refused : int
        How many calls in a row were the original's; ``last`` says why the last one was.
    """

    def __init__(self, path: str = "", verify: int = 0) -> None:
        self.calls: Counter[str] = Counter()
        self.memory: dict[Any, Any] = {}
        self.path, self.verify, self.compared = path, verify, 0
        self.refused, self.last = 0, ""

    def rests(self) -> bool:
        """Tell whether a call is the original's without a look, since those before it all were.

        A look takes milliseconds, which a small model would feel at every call for nothing.
        """
        return self.refused >= _PATIENCE and bool(self.refused % _LOOKS)

    def due(self) -> bool:
        """Count a fast call, and tell whether it is one to compare with the original."""
        self.compared += 1
        return bool(self.verify) and self.compared % self.verify == 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memory": {}}


class Kind:
    """One structure that is recognised, and its fast method."""

    name: str
    method: str

    def examine(self, module: nn.Module) -> bool:
        """Tell whether a module is of this kind; `Instead` if it nearly is."""
        raise NotImplementedError

    def methods(self, cls: type) -> tuple[str, ...]:
        """Name the methods of a class that are exchanged."""
        return (self.method,)

    def run(
        self,
        module: Any,
        state: State,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answer a call; `Instead` hands it to the original."""
        raise NotImplementedError


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make a kind known by its name, which pickled modules carry."""
    _KINDS[kind.name] = kind
    return kind


def _run(kind: str, base: type, method: str, module: Any, args: Any, kwargs: Any) -> Any:
    original = functools.partial(getattr(base, method), module)
    state: State | None = module.__dict__.get(_STATE)
    if state is None:  # a method that somebody kept from before `restore`
        return original(*args, **kwargs)
    try:
        if _captured():
            refuse(CAPTURED)
        if state.rests():
            refuse(state.last)
        result = _KINDS[kind].run(module, state, original, args, kwargs)
        state.refused = 0
        return result
    except Instead as reason:
        state.last = str(reason)
        state.refused += 1
        state.calls[state.last] += 1
        return original(*args, **kwargs)


CAPTURED = "the original, while a program is captured"
_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def _captured() -> bool:
    """Tell whether torch.export, make_fx or torch.jit.trace records what is done."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


@functools.cache
def _outside_graphs() -> Callable[..., Any]:
    """Keep torch.compile from tracing the fast pass: it becomes a break between two graphs."""
    hidden: Callable[..., Any] = torch.compiler.disable(_run)
    return hidden


@functools.cache
def _in_one_graph() -> Callable[[], bool]:
    """Ask dynamo, while it traces, whether it was told not to break the graph."""

    def asked() -> bool:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx()
        names = ("one_graph", "error_on_graph_break")
        return any(bool(getattr(tracer, name, False)) for name in names)

    constant: Callable[[], bool] = torch.compiler.assume_constant_result(asked)
    return constant


@functools.cache
def _subclass(base: type, kind_name: str) -> type:
    call, whole = _outside_graphs(), _in_one_graph()
    compiler, compiling = torch.compiler, torch.compiler.is_dynamo_compiling

    def exchanged(method: str) -> Any:
        original = getattr(base, method)

        def fast(self: Any, *args: Any, **kwargs: Any) -> Any:
            # dynamo, where it may not break the graph, takes the original: ours would stop it
            # the flag: to dynamo of torch 2.11, is_exporting() is always true
            if compiling() and (compiler._is_exporting_flag or whole()):
                return original(self, *args, **kwargs)
            return call(kind_name, base, method, self, args, kwargs)

        # torch.jit.script reads the original's source, and its names in our globals
        space = getattr(original, "__globals__", globals())
        own = types.FunctionType(fast.__code__, space, method, None, fast.__closure__)
        return functools.wraps(original)(own)

    def reduced(self: Any, protocol: Any) -> Any:
        # the class has no name to be found by: it is made again from its base
        _, _, *rest = getattr(base, "__reduce_ex__")(self, protocol)  # noqa: B009 - typeshed
        return (_rebuilt, (base, kind_name), *rest)

    own = {
        **{method: exchanged(method) for method in _KINDS[kind_name].methods(base)},
        "__reduce_ex__": reduced,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fastfpl_base": base,
        "_fastfpl_kind": kind_name,
    }
    return type(base.__name__, (base,), own)


def _rebuilt(base: type, kind_name: str) -> Any:
    cls: Any = _subclass(base, kind_name)
    return cls.__new__(cls)


def is_swapped(module: nn.Module) -> bool:
    """Tell whether a module's class is one of ours."""
    return hasattr(type(module), "_fastfpl_base")


def state_of(module: nn.Module) -> State:
    """Return what a swapped module remembers."""
    state: State = module.__dict__[_STATE]
    return state


def named(name: str) -> Kind:
    """Return a kind by its name."""
    return _KINDS[name]


def kind_of(module: nn.Module) -> Kind:
    """Return the kind as which a module was swapped."""
    return _KINDS[type(module)._fastfpl_kind]  # type: ignore[attr-defined]


def swap(module: nn.Module, kind: Kind, path: str = "") -> State:
    """Exchange the class of a module; parameters, buffers, hooks and names stay where they are."""
    module.__dict__[_STATE] = State(path)
    base: Any = type(module)
    module.__class__ = _subclass(base, kind.name)
    return state_of(module)


def swap_back(module: nn.Module) -> None:
    """Give a module its class back."""
    module.__class__ = type(module)._fastfpl_base  # type: ignore[attr-defined]
    del module.__dict__[_STATE]


def hooked(module: nn.Module) -> bool:
    """Tell whether a module has a hook that its call would fire."""
    return any(getattr(module, name) for name in HOOKS)


def refuse(reason: str) -> NoReturn:
    """Leave it to the original code."""
    raise Instead(reason)
