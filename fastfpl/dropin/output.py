"""An output of transformers whose token states are computed when somebody looks at them."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

__all__ = ["lazy_output"]

_FIELD = "last_hidden_state"


def lazy_output(base: Any, fill: Callable[[], Any], **known: Any) -> Any:
    """Return an output of the class ``base`` with what is known; ``fill()`` gives the whole one."""
    output = _class(base)(**known)
    output.__dict__["_fill"] = fill
    return output


@functools.cache
def _class(base: Any) -> Any:
    class Lazy(base):  # type: ignore[misc]
        """Looks like the base, keeps its order of keys, and copies as the base."""

        @property
        def last_hidden_state(self) -> Any:
            """States of all tokens, from the original code."""
            fill = self.__dict__.pop("_fill", None)
            if fill is not None:
                self[_FIELD] = getattr(fill(), _FIELD)
                # keys come in the order of the fields
                for name in (
                    f.name for f in fields(self) if OrderedDict.__contains__(self, f.name)
                ):
                    OrderedDict.move_to_end(self, name)
            return self.__dict__.get(_FIELD)

        @last_hidden_state.setter
        def last_hidden_state(self, value: Any) -> None:
            self.__dict__.pop("_fill", None)
            self.__dict__[_FIELD] = value

        def _whole(self) -> Any:
            return self.last_hidden_state

        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, str) and key != _FIELD and self.__dict__.get(key) is not None:
                return self.__dict__[key]
            self._whole()
            return super().__getitem__(key)

        def __iter__(self) -> Iterator[str]:
            self._whole()
            return iter(list(super().keys()))

        def __len__(self) -> int:
            self._whole()
            return len(list(super().keys()))

        def __contains__(self, key: object) -> bool:
            return key == _FIELD or super().__contains__(key)

        def keys(self) -> Any:
            self._whole()
            return super().keys()

        def values(self) -> Any:
            self._whole()
            return super().values()

        def items(self) -> Any:
            self._whole()
            return super().items()

        def __eq__(self, other: object) -> Any:
            self._whole()
            return super().__eq__(other)

        __hash__ = None  # type: ignore[assignment]

        def __reduce__(self) -> Any:
            self._whole()
            return base(**dict(super().items())).__reduce__()

    return Lazy
