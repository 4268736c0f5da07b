"""What both sides must have alike, as digests: weights, settings, the method's code."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastfpl import __version__
from fastfpl.clip import FrozenCLIP
from fastfpl.config import Settings
from fastfpl.federation.checkpoint import settings_facts
from fastfpl.methods import Method
from fastfpl.released import as_released

__all__ = ["WHAT", "differing", "digest_of", "identity", "method_digest", "task_digest"]

#: What is compared, in words.
WHAT = {
    "library": "the version of fastfpl",
    "weights": "the weights of the CLIP",
    "settings": "the settings that decide figures",
    "method": "the code of the method",
    "classes": "the list of classes",
    "data": "domains, clients and their domains",
}


def digest_of(facts: Any) -> str:
    """Digest plain facts."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def method_digest(kind: type[Method]) -> str:
    """Digest the files in which a method and all that it derives from are written."""
    total = hashlib.blake2b(digest_size=16)
    for base in kind.__mro__:
        if issubclass(base, Method):
            file = inspect.getsourcefile(base)
            content = b"" if file is None else Path(file).read_bytes()
            total.update(base.__name__.encode() + b"|" + content)
    return total.hexdigest()


def identity(
    clip: FrozenCLIP, kind: type[Method], settings: Settings, options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the digests of one side that do not hang on data."""
    return {
        "library": __version__,
        "weights": clip.weights_digest,
        "settings": digest_of(settings_facts(settings, options)),
        "method": method_digest(as_released(kind, settings.as_released)),
    }


def task_digest(
    classes: list[str], domains: list[str], client_domains: list[int] | None, clients: int
) -> str:
    """Digest what a method is told of the data."""
    return digest_of([classes, domains, client_domains, clients])


def differing(server: Mapping[str, str], client: Mapping[str, Any]) -> str | None:
    """Say in what a client differs, with both digests; None if in nothing."""
    for key, mine in server.items():
        theirs = client.get(key)
        if theirs != mine:
            return f"{WHAT[key]} must be the server's, {mine}; got {str(theirs)[:80]}"
    return None
