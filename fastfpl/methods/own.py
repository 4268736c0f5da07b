"""Methods from outside the library: a class at hand, a file, a module, an installed package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from fastfpl.errors import InputError, KindError, Missing, shown
from fastfpl.installed import added, load_added
from fastfpl.methods.base import Method

__all__ = [
    "GROUP",
    "KNOWN",
    "checked",
    "import_method",
    "installed",
    "installed_names",
    "source_of",
]

#: The entry points by which an installed package adds methods.
GROUP = "fastfpl.methods"
#: Classes from outside that this process was given, by name.
KNOWN: dict[str, type[Method]] = {}

# what files are called among modules, so that none hides a module of its name
_PREFIX = "fastfpl_own_"
# module of a file -> where it lies and what it held when it was imported
_READ: dict[str, tuple[Path, bytes]] = {}
# what a table, a folder and a command line can hold
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")


def checked(op: str, kind: object) -> type[Method]:
    """Return a class that can be run as a method.

    Raises
    ------
    KindError
        If it is no subclass of `Method`.
    InputError
        If it lacks a verb, or its name or summary is none; the sentence says which.
    """
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise KindError(
            f"{op}: method must be a name or a subclass of fastfpl.methods.Method; got "
            f"{shown(kind)}"
        )
    if inspect.isabstract(kind):
        lacking = ", ".join(sorted(kind.__abstractmethods__))
        raise InputError(f"{op}: {kind.__name__} must have every verb; got none for {lacking}")
    for attribute in ("name", "summary"):
        if not isinstance(getattr(kind, attribute, None), str):
            raise InputError(
                f"{op}: {kind.__name__}.{attribute} must be a text; got "
                f"{shown(getattr(kind, attribute, None))}"
            )
    if not _NAME.fullmatch(kind.name):
        raise InputError(
            f"{op}: {kind.__name__}.name must be letters, digits, dots, hyphens and underscores, "
            f"for folders are named by it; got {shown(kind.name)}"
        )
    return kind


def import_method(op: str, text: str) -> type[Method]:
    """Import the class that ``path/to/mine.py:MyMethod`` or ``package.module:MyMethod`` names.

    Parameters
    ----------
    op : str
        What an error begins with.
    text : str
        The part before the last colon is a file if it ends with ``.py``, else a module. The file's
        folder, or the present one, is where it finds what it imports itself.

    Raises
    ------
    Missing
        If the file or the module is not there.
    InputError
        If importing it fails, or it has no such class.
    """
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise InputError(
            f"{op}: method must read path/to/mine.py:MyMethod or package.module:MyMethod; got "
            f"{shown(text)}"
        )
    module = _from_file(op, Path(place)) if place.endswith(".py") else _from_module(op, place)
    found = getattr(module, name, None)
    if found is None:
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Method) and value is not Method
        ]
        raise InputError(
            f"{op}: {place} must hold the class {name}; got "
            f"{', '.join(classes) or 'no method'} in it"
        )
    return checked(op, found)


def installed_names() -> list[str]:
    """List the names of methods that installed packages add; nothing is imported."""
    return list(added(GROUP))


def installed(op: str, name: str) -> type[Method]:
    """Import the method of that name which an installed package adds.

    Raises
    ------
    InputError
        If importing it fails, or its class has another name.
    """
    point = added(GROUP)[name]
    kind = checked(op, load_added(op, point))
    if kind.name != name:
        raise InputError(
            f"{op}: the entry point {name!r} must lead to a method of that name; got "
            f"{kind.name!r} of {point.value}"
        )
    return kind


@cache
def source_of(kind: type[Method]) -> dict[str, str]:
    """Say where a method from outside came from.

    Returns
    -------
    dict
        ``class``: its qualified name; ``module``: the module's, or of a file its name;
        ``blake2b``: a digest of the source. That is of the whole file, for a class may use all of
        it; of a program that is run itself, and of a notebook, of the class alone. What it was
        when it was first asked for: a file may be edited while a run lasts.
    """
    module = kind.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or file is None or not os.path.exists(file):
        try:
            content = inspect.getsource(kind).encode()
        except (OSError, TypeError):  # typed into an interpreter: its code is all there is
            content = b"".join(_codes(vars(kind)))
    else:
        content = Path(file).read_bytes()
        if module.startswith(_PREFIX):
            module = Path(file).name
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"class": kind.__qualname__, "module": module, "blake2b": digest}


def _from_file(op: str, path: Path) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise Missing(f"{op}: method must be in a file that is there; got {path}")
    name = _PREFIX + re.sub(r"\W", "_", path.stem)
    content = path.read_bytes()
    known = sys.modules.get(name)
    # a file that was edited since, as beside a notebook, is another one
    if known is not None and _READ.get(name) == (path.resolve(), content):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _READ[name] = path.resolve(), content
    _beside(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(
            f"{op}: {path} must be importable; got {type(error).__name__}: {shown(str(error))}"
        ) from error
    return module


def _from_module(op: str, name: str) -> Any:
    _beside(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        # of the module itself, not of one that it imports
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if missing:
            raise Missing(
                f"{op}: method must be in a module that is there; got {shown(name)}: write "
                "path/to/mine.py:MyMethod, or install its package"
            ) from error
        raise InputError(
            f"{op}: {name} must be importable; got {type(error).__name__}: {shown(str(error))}"
        ) from error


def _beside(folder: Path) -> None:
    """Let modules of a folder be found, after all others; also what a method imports later."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


def _codes(members: Mapping[str, Any]) -> list[bytes]:
    """Give what functions of a class do as bytes, in the order of their names."""
    found = []
    for name, member in sorted(members.items()):
        code = getattr(getattr(member, "__func__", member), "__code__", None)
        if isinstance(code, CodeType):
            constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
            found.append(f"{name}{code.co_names}{constants}".encode() + code.co_code)
        elif isinstance(member, str | int | float | bool):
            found.append(f"{name}={member!r}".encode())
    return found
