"""Names that a shell completes: methods, data sets, presets, CLIPs and quirks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fastfpl.errors import FastfplError

__all__ = ["Name", "option_keys"]


def _methods() -> Iterable[tuple[str, str]]:
    from fastfpl.methods import METHODS, method_names

    # a shell waits for no package to be imported
    return (
        (name, METHODS[name].summary if name in METHODS else "installed") for name in method_names()
    )


def _datasets() -> Iterable[tuple[str, str]]:
    from fastfpl.data import dataset_names

    return ((name, "") for name in dataset_names())


def _layouts() -> Iterable[tuple[str, str]]:
    from fastfpl.data.layouts import LAYOUTS

    return ((name, "") for name in LAYOUTS)


def _targets() -> Iterable[tuple[str, str]]:
    from fastfpl.data.catalogue import FACTS

    domains = {domain for facts in FACTS.values() for domain in facts.domains}
    return (*_datasets(), *((domain, "a domain") for domain in sorted(domains)))


def _presets() -> Iterable[tuple[str, str]]:
    from fastfpl.config import load_preset, preset_names

    return ((name, load_preset(name).about) for name in preset_names())


def _clips() -> Iterable[tuple[str, str]]:
    # by its files: to import open_clip would take seconds
    found = importlib.util.find_spec("open_clip")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [f for folder in folders for f in (Path(folder) / "model_configs").glob("*.json")]
    return (("tiny", "embedded"), *((name, "") for name in sorted(f.stem for f in files)))


def _quirks() -> Iterable[tuple[str, str]]:
    from fastfpl.released import QUIRKS

    return (("all", ""), *((quirk.name, quirk.about) for quirk in QUIRKS.values()))


def _formats() -> Iterable[tuple[str, str]]:
    from fastfpl.trained import FORMATS

    return ((name, "") for name in FORMATS)


def _trackers() -> Iterable[tuple[str, str]]:
    from fastfpl.tracking import TRACKERS

    return ((name, "") for name in TRACKERS)


_KNOWN: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "method": _methods,
    "dataset": _datasets,
    "layout": _layouts,
    "target": _targets,
    "preset": _presets,
    "clip": _clips,
    "quirk": _quirks,
    "format": _formats,
    "tracker": _trackers,
}

# kinds of which several stand on a line, separated by commas
_SEVERAL = ("quirk", "tracker")


class Name(click.ParamType):  # type: ignore[type-arg]
    """A text of which a shell knows what it may be; who reads it decides whether it is right."""

    name = "NAME"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        """Of a flag; an argument has the name of its own."""
        return "NAME" if isinstance(param, click.Option) else None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take any text."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Give the known names that begin so; after a comma, those that may follow."""
        before, comma, last = incomplete.rpartition(",") if self.kind in _SEVERAL else ("", "", "")
        begun = last if comma else incomplete
        return [
            CompletionItem(before + comma + name, help=about or None)
            for name, about in _KNOWN[self.kind]()
            if name.startswith(begun)
        ]


def option_keys(method: str) -> Iterable[tuple[str, str]]:
    """Give the options of a method with what they mean; none if it is unknown."""
    from fastfpl.methods import find_method, method_name

    try:
        fields = find_method(method_name(method)).Options.model_fields
    except FastfplError:
        return ()
    return ((key, field.description or "") for key, field in fields.items())
