"""What benches of many runs share: figures kept by all that decides them, and a page's table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastfpl import __version__
from fastfpl.errors import InputError
from fastfpl.files import write_json, write_text

__all__ = ["between", "kept"]


def kept(
    work: Path, name: str, facts: Mapping[str, Any], play: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of a run: those that are there, or those of playing it now.

    Parameters
    ----------
    work : Path
    name : str
        Of the file, for people.
    facts : mapping
        All that decides the figures, JSON; with the library's version their digest is in the name,
        so that a run of other weights is another.
    play : callable
        ``play(folder)`` may leave in a folder of its own what it goes on from.
    """
    whole = {"library": __version__, **facts}
    text = json.dumps(whole, sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    path = work / f"{name}-{key}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("facts") != json.loads(text):
            raise InputError(f"bench: {path} must be of {text}; got {found.get('facts')}")
        return dict(found["figures"])
    figures = play(path.with_suffix(""))
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, {"facts": whole, "figures": figures})
    return figures


def between(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` in a page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise InputError(f"bench: {page} must have the markers {begin.strip()} and {end} once each")
    before, rest = whole.split(begin)
    write_text(page, f"{before}{begin}{text}\n{end}{rest.split(end)[1]}")
