"""Spares Triton's interpreter two fifths of its time: what it makes anew each time is kept.

It lists its language once more for every function that a kernel calls, builds a table of dtypes for
every value, and describes every type and every tensor's shape from nothing. What is computed stays:
`keep_what_is_made_anew` changes no number, and a Triton that is built otherwise keeps its own way.
"""

from __future__ import annotations

import builtins
from typing import Any

__all__ = ["keep_what_is_made_anew"]


def keep_what_is_made_anew() -> None:
    """Change the interpreter of this process."""
    import triton.runtime.interpreter as interpreter

    _languages(interpreter)
    _dtypes(interpreter)
    _types(interpreter.tl.core)
    _tensors(interpreter.tl.core)


def _languages(interpreter: Any) -> None:
    """Of every function that a kernel calls, put the language in place where it is not yet."""
    plain, is_builtin = interpreter._patch_lang, interpreter.tl.core.is_builtin

    known: dict[int, list[Any]] = {}  # languages that a module names

    def patch(fn: Any) -> Any:
        tl, names = interpreter.tl, fn.__globals__
        if id(names) not in known:
            named = {id(value) for value in names.values()}
            known[id(names)] = [lang for lang in (tl, tl.core) if id(lang) in named]
        used = known[id(names)]
        there = used and not any(is_builtin(lang.load) for lang in used)
        return interpreter._LangPatchScope() if there else plain(fn)

    interpreter._patch_lang = patch


def _dtypes(interpreter: Any) -> None:
    """Keep numpy's dtype of every Triton dtype; that of a block is its elements'."""
    plain, block = interpreter._get_np_dtype, interpreter.tl.block_type
    known: dict[str, Any] = {}

    def dtype_of(given: Any) -> Any:
        name = (given.element_ty if isinstance(given, block) else given).name
        if name not in known:
            known[name] = plain(given)
        return known[name]

    interpreter._get_np_dtype = dtype_of


def _types(core: Any) -> None:
    """Keep what a type of blocks says of itself, by its elements and its shape."""
    plain = core.block_type.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = builtins.tuple([getattr(size, "value", size) for size in shape])
        key = element_ty.__class__, element_ty.name, sizes
        facts = known.get(key)
        if facts is None:
            plain(self, element_ty, shape)
            known[key] = facts = dict(self.__dict__)
            facts["_kept"] = self._kept = facts  # for what tensors of the type have
        else:
            self.__dict__.update(facts)
            self.element_ty = element_ty

    core.block_type.__init__ = init


def _tensors(core: Any) -> None:
    """Keep a tensor's shape and size with its type."""
    plain = core.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        facts = type.__dict__.get("_of_tensors")
        if facts is None:
            plain(self, handle, type)
            facts = {k: v for k, v in self.__dict__.items() if k != "handle"}
            type._of_tensors = type.__dict__.get("_kept", {})["_of_tensors"] = facts
        else:
            self.__dict__.update(facts)
            self.handle = handle
        self.type = type

    core.tensor.__init__ = init
