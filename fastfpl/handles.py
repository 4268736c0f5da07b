"""Names of objects in graphs: operators take tensors, numbers and texts, and no objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from fastfpl.errors import InputError

__all__ = ["Handled", "alive", "held"]

T = TypeVar("T")

_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()
_numbers = itertools.count()


class Handled:
    """A frozen dataclass that an operator is told by its handle.

    A copy is another object, and has another handle; nothing of it is written to a file.

    Attributes
    ----------
    handle : str
        Of this object in this process, as long as it lives.
    """

    handle: str

    def __post_init__(self) -> None:
        """Give the object its handle."""
        # torch.compile reads it as an attribute, and so compiles anew for another object
        self.__dict__["handle"] = f"{type(self).__name__}-{next(_numbers)}"
        _objects[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Handled.__post_init__(self)


def held(handle: str, kind: type[T]) -> T:
    """Return the object of a handle.

    Raises
    ------
    InputError
        If it is gone: a compiled function does not keep it.
    """
    found = _objects.get(handle)
    if not isinstance(found, kind):
        raise InputError(
            f"fastfpl: handle must be of a {kind.__name__} that lives; got {handle!r}; keep it as "
            "long as what was compiled with it"
        )
    return found


def alive(statics: Iterable[Any]) -> tuple[Any, ...]:
    """Return the objects whose handles are among an operator's arguments.

    Whoever keeps them keeps the handles good, as a backward pass must.
    """
    found = (_objects.get(static) for static in statics if isinstance(static, str))
    return tuple(one for one in found if one is not None)
