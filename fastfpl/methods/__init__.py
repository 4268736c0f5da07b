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


def find_method(name: str) -> type[Method]:
    """Return the method of that name, or say which names are near."""
    if name not in METHODS:
        raise InputError(
            f"fastfpl.run: method must be a known one; got {shown(name)}" + near(cut(name), METHODS)
        )
    return METHODS[name]


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
