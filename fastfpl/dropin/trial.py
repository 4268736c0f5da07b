"""A call of somebody else's code that leaves no trace, and that is watched."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastfpl.dropin.keys import Reader, key_of, plain_class, saver, tensors_in
from fastfpl.dropin.swap import HOOKS, Instead, State, refuse
from fastfpl.errors import Differs

__all__ = ["copy_of", "differs", "near", "no_trace", "watched"]

# parameters of at most so many numbers are moved: norms, biases, positions, adapters, projections
_SMALL = 1 << 18
_VALUES = {"_local_scalar_dense", "equal", "is_nonzero"}
_ESCAPES = {"tolist", "numpy", "__array__"}


def copy_of(module: Any, *, moved: bool) -> Any:
    """Copy a module with all that it holds, without hooks and as it was before `accelerate`.

    With ``moved`` no parameter stays where it begins, as far as it is small: what is zero or one at
    first would pass for nothing. The large ones share the module's storage. Without it the copy
    holds the very parameters.
    """
    memo: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for _, tensor in tensors_in(module):
        if not isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor.detach().clone() if moved else tensor.clone()
        elif not moved:
            memo[id(tensor)] = tensor
        else:
            memo[id(tensor)] = nn.Parameter(_moved(tensor.detach(), generator), False)
    for inner in module.modules():
        for name in HOOKS:
            memo[id(inner.__dict__[name])] = type(inner.__dict__[name])()
    for found in _generators(module):
        if isinstance(found, torch.Generator):
            memo[id(found)] = torch.Generator(found.device).set_state(found.get_state())
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        refuse(f"it cannot be copied for a trial ({type(error).__name__})")
    for inner in twin.modules():
        inner.__class__ = plain_class(inner)
        inner.__dict__.pop("_fastfpl", None)
    return twin


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.numel() > _SMALL or not tensor.is_floating_point():
        return tensor
    # 64 bits and back, so that every dtype is moved
    noise = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (tensor.double() + noise.to(tensor.device)).to(tensor.dtype)


def _generators(module: nn.Module) -> list[Any]:
    reader = Reader()
    reader.value(module)
    return reader.generators


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Set random states, classes and globals that a module's code names back afterwards."""
    reader = Reader()
    reader.value(module)
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    undo = [saver(generator) for generator in reader.generators]
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)
        for back in undo:
            back()
        for where, name, value in reader.outside:
            _put_back(where, name, value)


def _put_back(where: Any, name: str, value: Any) -> None:
    if isinstance(where, type):
        if vars(where).get(name) is not value:
            setattr(where, name, value)
    elif name:
        where[name] = value
    elif isinstance(where, list):
        where[:] = value
    else:
        where.clear()
        where.update(value)


class _Calls(TorchFunctionMode):
    """Sees what leaves torch for Python, which no operator shows, and what is made from nothing."""

    def __init__(self, watch: _Reads) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _ESCAPES:
            refuse("its code depends on the values of a tensor")
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs))):
            self.watch.made(result)
        return result


class _Reads(TorchDispatchMode):
    """Refuses reads of what is not known, writes to what a module holds, and random numbers."""

    def __init__(self, module: nn.Module, known: list[Tensor], given: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = {_storage(t): path.lstrip(".") for path, t in tensors_in(module)}
        self.known = {_storage(t) for t in known}
        self.fresh: dict[int, Any] = {}
        self.made(given)

    def made(self, result: Any) -> None:
        """Take tensors as results; they stay alive, so that no storage is taken for another."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self.held:
                self.fresh[_storage(tensor)] = tensor.untyped_storage()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        name = func.overloadpacket.__name__
        if given.get("generator") is not None:
            refuse("it draws random numbers")
        if name in _VALUES:
            refuse("its code depends on the values of a tensor")
        if name.startswith("lift_fresh"):
            self.made(args)
        for place, tensor in enumerate((*args, *given.values())):
            written = place == 0 and func._schema.is_mutable
            for one in tree_leaves(tensor):
                if isinstance(one, Tensor):
                    self._check(one, written)
        result = func(*args, **given)
        if not func.is_view:
            self.made(result)
        return result

    def _check(self, tensor: Tensor, written: bool) -> None:
        storage = _storage(tensor)
        if storage in self.held:
            if written:
                refuse(f"its forward writes to {self.held[storage]}")
            if storage not in self.known:
                refuse(f"its forward reads {self.held[storage]}, which CLIP's text pass has not")
        elif storage not in self.fresh and storage not in self.known and tensor.numel():
            refuse("its forward reads a tensor from elsewhere")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def watched(module: Any, known: list[Tensor], call: Callable[[], Any], given: Any) -> Any:
    """Make a call of a copied module; `Instead` says what it does that its known parts do not.

    It may read ``known`` tensors and what is ``given``, draw no random number, decide nothing by a
    tensor's value, and keep nothing.
    """
    before, held = key_of(module), _attributes(module)
    with ExitStack() as stack:
        reads = _Reads(module, known, given)
        stack.enter_context(_Calls(reads))
        stack.enter_context(reads)
        states = _random_states(module)
        try:
            result = call()
        except Instead:
            raise
        except Exception as error:
            first = str(error).partition("\n")[0]
            refuse(f"a trial call of it raised {type(error).__name__}: {first}")
    if _random_states(module) != states:
        refuse("it draws random numbers")
    for name, value in _attributes(module).items():
        if name not in held or held[name] is not value:
            refuse(f"its forward changes {name}, which a swapped pass would not")
    if key_of(module) != before:
        refuse("its forward changes what it keeps, which a swapped pass would not")
    return result


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}".lstrip("."): value
        for path, inner in module.named_modules()
        for space in (inner.__dict__, inner._parameters, inner._buffers)
        for name, value in space.items()
    }


def _random_states(module: nn.Module) -> Any:
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        states: list[Any] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
        for index in sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda}):
            states.append(torch.cuda.get_rng_state(index).numpy().tobytes())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, *rest = numpy.random.get_state()
        states.append((keys.tobytes(), *rest))
    for generator in _generators(module):
        if isinstance(generator, torch.Generator):
            states.append(generator.initial_seed())
        elif isinstance(generator, random.Random):
            states.append(generator.getstate())
        elif hasattr(generator, "bit_generator"):
            states.append(repr(generator.bit_generator.state))
    return states


def differs(state: State, what: str) -> Differs:
    """Make the error of a call that was not what the original gives."""
    place = state.path or "the model"
    return Differs(
        f"fastfpl.accelerate: {place} must give what it gave before; got a call that has "
        f"{what}. fastfpl.restore gives the original back"
    )


def near(literal: Tensor) -> float:
    """Give the largest difference that two ways to compute the same thing may show."""
    if not literal.numel():
        return 0.0
    exact = literal.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    rounding = 5e-5 if exact else torch.finfo(literal.dtype).eps ** 0.5
    return rounding * float(literal.abs().max())
