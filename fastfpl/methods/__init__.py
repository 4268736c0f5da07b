"""The algorithms, one file each; `METHODS` finds them by the name on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fastfpl.errors import InputError, cut, near, shown
from fastfpl.methods.base import Batch, Method, Options, State, Task
from fastfpl.methods.fedapt import FedAPT
from fastfpl.methods.fedapt_unsupervised import FedAPTUnsupervised
from fastfpl.methods.fedotp import FedOTP
from fastfpl.methods.fedpgp import FedPGP
from fastfpl.methods.fedprox import FedProx
from fastfpl.methods.fedtpg import FedTPG
from fastfpl.methods.local import LocalCoOp
from fastfpl.methods.own import (
    KNOWN,
    checked,
    import_method,
    installed,
    installed_names,
    source_of,
)
from fastfpl.methods.pfedmoap import PFedMoAP
from fastfpl.methods.prompt_fedamp import PromptFedAMP
from fastfpl.methods.prompt_fedper import PromptFedPer
from fastfpl.methods.promptfl import PromptFL
from fastfpl.methods.promptfl_ft import PromptFLFT
from fastfpl.methods.promptfolio import PromptFolio
from fastfpl.methods.zeroshot import ZeroShot

__all__ = [
    "METHODS",
    "Batch",
    "FedAPT",
    "FedAPTUnsupervised",
    "FedOTP",
    "FedPGP",
    "FedProx",
    "FedTPG",
    "LocalCoOp",
    "Method",
    "Options",
    "PFedMoAP",
    "PromptFL",
    "PromptFLFT",
    "PromptFedAMP",
    "PromptFedPer",
    "PromptFolio",
    "State",
    "Task",
    "ZeroShot",
    "check_options",
    "find_method",
    "method_name",
    "method_names",
    "method_source",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot,
        LocalCoOp,
        PromptFL,
        FedProx,
        PFedMoAP,
        FedOTP,
        PromptFLFT,
        PromptFedPer,
        PromptFedAMP,
        FedPGP,
        PromptFolio,
        FedTPG,
        FedAPT,
        FedAPTUnsupervised,
    )
}


def method_names() -> tuple[str, ...]:
    """List every name that `find_method` knows: the library's, the installed, and those at hand."""
    return tuple(dict.fromkeys([*METHODS, *installed_names(), *KNOWN]))


def find_method(name: str) -> type[Method]:
    """Return the method of that name, or say which names are near."""
    if name in METHODS:
        return METHODS[name]
    if name in KNOWN:
        return KNOWN[name]
    if name in installed_names():
        return installed("fastfpl.run", name)
    if name.endswith(".py"):
        raise InputError(
            f"fastfpl.run: a method in a file must be named with its class; got {shown(name)}: "
            f"write {cut(name, 200)}:MyMethod"
        )
    raise InputError(
        f"fastfpl.run: method must be a known one; got {shown(name)}"
        + near(cut(name), method_names())
    )


def method_name(method: str | type[Method], op: str = "fastfpl.run") -> str:
    """Return the name by which `find_method` knows a method, and make one from outside known.

    Parameters
    ----------
    method : str or type of Method
        A name, a class, ``path/to/mine.py:MyMethod`` or ``package.module:MyMethod``. Of two classes
        of one name from outside the later is known, as when a cell of a notebook is run again.
    op : str
        What an error begins with.

    Raises
    ------
    InputError
        If the class lacks something, or has the name of one of the library's methods.
    KindError
        If it is no method.
    Missing
        If the file or module is not there.
    """
    if isinstance(method, str):
        if ":" not in method:
            return method
        kind = import_method(op, method)
    else:
        kind = checked(op, method)
    known = METHODS.get(kind.name)
    if known is kind:
        return kind.name
    if known is not None:
        raise InputError(
            f"{op}: {kind.__name__}.name must not be that of a method of the library; got "
            f"{kind.name!r}: give it another"
        )
    KNOWN[kind.name] = kind
    return kind.name


def method_source(name: str) -> dict[str, str] | None:
    """Say where the method of that name came from (`own.source_of`); None if from the library."""
    kind = find_method(name)
    return None if kind.__module__.startswith("fastfpl.") else source_of(kind)


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's options with defaults filled in; refuse unknown keys and wrong values."""
    kind = find_method(method).Options
    known = set(kind.model_fields)
    for key in options:
        if key not in known:
            raise InputError(
                f"fastfpl.run: option must be one of {method}'s; got {shown(key)}"
                + (near(cut(str(key)), known) if known else "; it has none")
            )
    try:
        return kind(**dict(options)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"fastfpl.run: {method}'s option {key} is refused: {first['msg']}; "
            f"got {shown(first['input'])}"
        ) from None
