"""Reads pickles of plain lists and arrays; whatever else one asks for is refused, not run.

A pickle is a program: it names functions and calls them. Here the few names that arrays need lead
to stand-ins of this module, so that not even numpy is called before every field is checked. And it
may name one list many times, in lists that it names many times: what is walked and what is copied
is bounded by the size of the file.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastfpl.data.folders import kind_of
from fastfpl.data.names import shown, tidy
from fastfpl.errors import Damaged

__all__ = ["load_plain"]

_DTYPE = re.compile(r"O8?|[SU]\d+|[iu][1248]|f[248]")
_DEPTH = 4
# each byte of a file pays for an entry that is walked or a byte that is copied, and so many more
# are free: a list that honest files name twice
_SPARE = 100_000
# arguments of a function, letters of a dtype's code, dimensions of an array: at most
_ARGUMENTS, _CODE, _DIMENSIONS = 8, 16, 32


def load_plain(path: Path, op: str) -> Any:
    """Read a pickle made of dicts, lists, tuples, strings, numbers and arrays of these.

    Parameters
    ----------
    path : Path
        Of any protocol, written by Python 2 or 3 and any numpy.
    op : str
        Name that begins the error.

    Returns
    -------
    content
        Arrays as ndarray; byte strings of Python 2 stay bytes.

    Raises
    ------
    Damaged
        If the file names anything else, e.g. a function to be called, or is no pickle. Nothing that
        it names has then been run.
    """
    try:
        kind = kind_of(path)
        if kind != "a file":
            raise OSError(kind)
        content = path.read_bytes()
        purse = _Purse(len(content) + _SPARE)
        return _plain(_Reader(content, purse).load(), 0, purse)
    # what broken bytes make of the unpickler is not of one kind
    except Exception as error:
        got = tidy(f"{type(error).__name__}: {error}")
        raise Damaged(
            f"{op}: {path} must be a pickle of plain lists and arrays; got {got}: "
            "do not trust the file, get it again"
        ) from error


class _Purse:
    """What may still be walked or copied."""

    __slots__ = ("_left",)

    def __init__(self, left: int) -> None:
        self._left = left

    def pay(self, price: int) -> None:
        self._left -= price
        if self._left < 0:
            raise pickle.UnpicklingError("its entries name each other to more than its own size")


class _Memo(dict[int, Any]):
    """Entries by number; numbers of any size could be chosen so that each hits all others."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, number: int, entry: Any) -> None:
        if number > self._most:
            raise pickle.UnpicklingError("it counts its entries beyond its own size")
        super().__setitem__(number, entry)


# the one in C reserves as much memory as a few bytes of a file ask it to, for memo and buffers
class _Reader(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    stack: list[Any]

    def __init__(self, content: bytes, purse: _Purse) -> None:
        super().__init__(BytesIO(content), encoding="bytes")
        self._size = len(content)
        self.memo = _Memo(len(content))
        self._known = _known(purse)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size:
            raise pickle.UnpicklingError("it is cut off")
        self.append(bytearray(self.read(length)))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        found = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # a tuple's hash walks it, and numbers can be chosen so that each hits all others
            if not isinstance(found, dict) or not isinstance(key, str | bytes):
                raise pickle.UnpicklingError(
                    f"it holds a {type(found).__name__} with a key that is a {type(key).__name__}"
                )
            found[key] = value

    def load_set(self) -> None:
        raise pickle.UnpicklingError("it holds a set")

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        # the longest call is that of an array from a buffer
        if not isinstance(arguments, tuple) or len(arguments) > _ARGUMENTS:
            raise pickle.UnpicklingError("it calls a function with too much")
        self.append(function(*arguments))

    dispatch |= {
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: load_set,
        pickle.ADDITEMS[0]: load_set,
        pickle.FROZENSET[0]: load_set,
        pickle.REDUCE[0]: load_reduce,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name that arrays need, and refuse any other name."""
        # numpy 2 moved its core
        known = self._known.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known


class _Call:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Dtype:
    """What a pickle says of a dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code: str | bytes, *_: Any) -> None:
        if not isinstance(code, str | bytes) or len(code) > _CODE:
            raise pickle.UnpicklingError(f"it holds an array of {shown(code)}")
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "<"
        if not _DTYPE.fullmatch(self.code):
            raise pickle.UnpicklingError(f"it holds an array of {shown(self.code)}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] in (">", b">") else "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """An array whose content a pickle gives after it has made it."""

    __slots__ = ("_purse", "value")

    def __init__(self, purse: _Purse, *_: Any) -> None:
        self._purse = purse
        self.value: npt.NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(self._purse, data, dtype, shape, "F" if fortran else "C")


def _array(purse: _Purse, data: Any, dtype: _Dtype, shape: Any, order: str) -> npt.NDArray[Any]:
    if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise pickle.UnpicklingError("it holds an array without a dtype")
    if not isinstance(shape, tuple | list) or len(shape) > _DIMENSIONS:
        raise pickle.UnpicklingError("it holds an array without a shape")
    size = tuple(int(n) for n in shape)
    if dtype.code.startswith("O"):
        purse.pay(len(data))
        flat = np.empty(len(data), dtype=object)
        for i, value in enumerate(data):
            if not isinstance(value, str | bytes):
                raise pickle.UnpicklingError(f"it holds an array of {type(value).__name__}")
            flat[i] = value
    else:
        # Python 2 wrote bytes, Python 3 text that stands for bytes
        raw = _encoded(purse, data) if isinstance(data, str) else data
        flat = np.frombuffer(raw, dtype=dtype.numpy())
        # numpy takes any number for a letter, and fails as a system when it is to be shown
        if flat.dtype.kind == "U" and (
            np.frombuffer(raw, dtype=f"{dtype.order}u4").max(initial=0) > sys.maxunicode
        ):
            raise pickle.UnpicklingError("it holds text of numbers that are no characters")
    return flat.reshape(size, order="F" if order == "F" else "C")


def _scalar(purse: _Purse, dtype: _Dtype, data: bytes | str) -> Any:
    if not isinstance(dtype, _Dtype) or dtype.code.startswith("O"):
        raise pickle.UnpicklingError("it holds an object where a number or a string must stand")
    purse.pay(len(data))
    return _array(purse, data, dtype, (1,), "C")[0].item()


def _encoded(purse: _Purse, text: str, encoding: str | bytes = "latin1") -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it encodes by {shown(encoding)}")
    purse.pay(len(text))
    return text.encode("latin1")


def _known(purse: _Purse) -> dict[tuple[str, str], Any]:
    """Return what a pickle may name; what copies pays by a purse."""
    return {
        ("numpy.core.multiarray", "_reconstruct"): _Call(partial(_Array, purse)),
        ("numpy.core.multiarray", "scalar"): _Call(partial(_scalar, purse)),
        ("numpy.core.numeric", "_frombuffer"): _Call(partial(_array, purse)),
        ("numpy", "dtype"): _Call(_Dtype),
        ("numpy", "ndarray"): "ndarray",  # only named as an argument
        ("_codecs", "encode"): _Call(partial(_encoded, purse)),
        # protocols below 3 make the empty byte string in this way
        ("__builtin__", "bytes"): _Call(lambda: b""),
    }


def _plain(value: Any, depth: int, purse: _Purse) -> Any:
    """Replace what stands for arrays, and refuse what is neither an array nor plain."""
    if depth > _DEPTH:
        raise pickle.UnpicklingError(f"it is nested deeper than {_DEPTH} levels")
    purse.pay(1)
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("it holds an array without content")
        return value.value
    if isinstance(value, dict):
        return {key: _plain(v, depth + 1, purse) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, depth + 1, purse) for v in value]
    if isinstance(value, tuple):
        return tuple(_plain(v, depth + 1, purse) for v in value)
    if value is None or isinstance(value, str | bytes | int | float | np.ndarray):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
