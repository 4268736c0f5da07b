"""Spares Triton's interpreter three quarters of its time: what it makes anew each time is kept.

It lists its language once more for every function that a kernel calls, builds a table of dtypes for
every value, and describes every type and every tensor's shape from nothing. Every sum of whole
numbers it computes twice, to see that it does not overflow, and looks only where it debugs. What is
computed stays: `keep_what_is_made_anew` changes no number, and a Triton that is built otherwise
keeps its own way.
"""

from __future__ import annotations

import builtins
import dataclasses
from typing import Any

__all__ = ["keep_what_is_made_anew"]


def keep_what_is_made_anew() -> None:
    """Change the interpreter of this process."""
    import triton.runtime.interpreter as interpreter

    _overflows(interpreter.interpreter_builder)
    _calls(interpreter)
    _languages(interpreter)
    _dtypes(interpreter)
    _types(interpreter)
    _tensors(interpreter.tl.core)
    _shapes(interpreter.tl.core, interpreter.TritonSemantic)


def _overflows(builder: Any) -> None:
    """Leave out whether sums overflow: of what is found only a debugging interpreter speaks."""
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _calls(interpreter: Any) -> None:
    """Hand a function of the language its arguments as they come."""
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    checked = core.arange.__code__  # of every such function: it looks whether there is a semantic

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        plain = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return plain(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


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


def _types(interpreter: Any) -> None:
    """Keep what a type of blocks says of itself, by its elements and its shape."""
    core, ours = interpreter.tl.core, interpreter.interpreter_builder
    plain, plain_to_ir = core.block_type.__init__, core.block_type.to_ir
    plain_with, plain_equal = core.block_type.with_element_ty, core.dtype.__eq__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = builtins.tuple([getattr(size, "value", size) for size in shape])
        key = element_ty.__class__, element_ty.name, sizes
        facts = known.get(key)
        if facts is None:
            plain(self, element_ty, shape)
            self._sizes, self._siblings = sizes, {}
            known[key] = facts = dict(self.__dict__)
            facts["_kept"] = self._kept = facts  # for what tensors of the type have
        else:
            self.__dict__.update(facts)
            self.element_ty = element_ty

    def with_element_ty(self: Any, element_ty: Any) -> Any:
        if element_ty.__class__ is not core.dtype:
            return plain_with(self, element_ty)
        kind = self._siblings.get(element_ty.name)
        if kind is None:
            kind = self._siblings[element_ty.name] = plain_with(self, element_ty)
        return kind

    def to_ir(self: Any, builder: Any) -> Any:
        here = builder is ours and self.element_ty.__class__ is core.dtype
        return self if here else plain_to_ir(self, builder)

    def equal(self: Any, other: Any) -> Any:
        return self is other or plain_equal(self, other)

    core.block_type.__init__ = init
    core.block_type.with_element_ty = with_element_ty
    core.block_type.to_ir = to_ir
    core.dtype.__eq__ = equal


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


def _shapes(core: Any, semantic: Any) -> None:
    """Leave blocks of one shape and one dtype as they are, and keep what two shapes give."""
    plain = semantic.broadcast_impl_value
    known: dict[Any, Any] = {}

    def sizes_of(tensor: Any) -> Any:
        return tensor.type.__dict__.get("_sizes")  # of a block

    def widened(self: Any, tensor: Any, sizes: Any) -> Any:
        if sizes_of(tensor) == sizes:
            return tensor
        kind = core.block_type(tensor.type.element_ty, [*sizes])
        return self.tensor(self.builder.create_broadcast(tensor.handle, sizes), kind)

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        shapes = sizes_of(lhs), sizes_of(rhs)
        if shapes[0] == shapes[1]:
            return lhs, rhs
        both = known.get(shapes)
        if both is None:
            found = plain(self, lhs, rhs)
            if None not in shapes and len(shapes[0]) == len(shapes[1]):
                known[shapes] = sizes_of(found[0])
            return found
        return widened(self, lhs, both), widened(self, rhs, both)

    plain_checked = semantic.binary_op_type_checking_impl

    def checked(self: Any, lhs: Any, rhs: Any, *allowed: Any, **how: Any) -> Any:
        tensors = lhs.__class__ is core.tensor and rhs.__class__ is core.tensor
        if tensors and len(allowed) < 4 and not how.get("div_or_mod"):
            kind, other = lhs.type.scalar, rhs.type.scalar
            if kind.__class__ is core.dtype and kind.name == other.name:
                return self.broadcast_impl_value(lhs, rhs)  # of one dtype: that is the result's
        return plain_checked(self, lhs, rhs, *allowed, **how)

    semantic.broadcast_impl_value = broadcast
    semantic.binary_op_type_checking_impl = checked
