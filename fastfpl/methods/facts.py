"""What a person asks about a method, out of its own class: options, source, needs, what travels.

``python -m fastfpl.methods.facts`` prints docs/methods.md.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from fastfpl.methods import METHODS, find_method

__all__ = ["Facts", "OptionFacts", "method_facts", "page"]

_IMAGES = {
    "pooled": "one feature an image",
    "raw": "one feature an image, as the tower gives it",
    "patches": "one feature a patch",
}


@dataclass(frozen=True)
class OptionFacts:
    """One option of a method.

    Attributes
    ----------
    name : str
    kind : str
        What its value is and must be, as a person writes it: ``N``, ``NUMBER > 0``, ``a|b``.
    default : str
        As it is written; empty if leaving it out is what the meaning says in brackets.
    about : str
    """

    name: str
    kind: str
    default: str
    about: str


@dataclass(frozen=True)
class Facts:
    """What a person asks about a method.

    Attributes
    ----------
    name, summary : str
    about : str
        Paragraphs of its docstring.
    source : str
        The paper.
    personal : bool
        Whether every client answers with parameters of its own.
    images, sends, receives : str
        What it sees of an image, and what travels in a round.
    needs : tuple of str
        Settings without which it does not run.
    options : tuple of OptionFacts
    """

    name: str
    summary: str
    about: str
    source: str
    personal: bool
    images: str
    sends: str
    receives: str
    needs: tuple[str, ...]
    options: tuple[OptionFacts, ...]


def method_facts(name: str) -> Facts:
    """Return the facts of a method, or say which names are near."""
    kind = find_method(name)
    about, _, source = (inspect.getdoc(kind) or "").partition("Source: ")
    needs = []
    if kind.paired:
        needs.append("two views of an image: --augment views:V or fresh")
    if not kind.supervised:
        needs.append("no labels; it may train on the test images: --transductive yes --shots all")
    return Facts(
        name=name,
        summary=kind.summary,
        about=about.strip(),
        source=" ".join(source.split()),
        personal=kind.personal,
        images=_IMAGES[kind.image_kind],
        sends=kind.sends,
        receives=kind.receives,
        needs=tuple(needs),
        options=tuple(
            OptionFacts(key, _kind(field), _written(field.default), field.description or "")
            for key, field in kind.Options.model_fields.items()
        ),
    )


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _kind(field: Any) -> str:
    """Say what people write for an option, with its bounds."""
    annotation = field.annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return "|".join(parts)
    kind = parts[0] if parts else annotation
    name = {bool: "yes|no", int: "N", float: "NUMBER"}.get(kind, "TEXT")
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    rules = [
        f"{sign} {getattr(rule, key):g}"
        for rule in field.metadata
        for key, sign in signs
        if getattr(rule, key, None) is not None
    ]
    return " ".join((name, ", ".join(rules))).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    """Write the page of all methods in Markdown."""
    lines = [
        "# Methods",
        "",
        "`fastfpl methods` lists them, `fastfpl methods NAME` shows one. This page is printed from",
        "the methods' own classes by `python -m fastfpl.methods.facts`; a test holds it current.",
        "",
        "An option is given by `-o KEY=VALUE` (`-o METHOD.KEY=VALUE` where several methods run) or",
        "under `options` in a file of settings. The settings that all methods share are in",
        "`fastfpl run --settings all`.",
        "",
        "| method | | answers with | sees of an image |",
        "|---|---|---|---|",
    ]
    every = [method_facts(name) for name in METHODS]
    for one in every:
        whose = "parameters of each client" if one.personal else "one global model"
        lines.append(f"| [`{one.name}`](#{one.name}) | {one.summary} | {whose} | {one.images} |")
    for one in every:
        lines += ["", f"## {one.name}", "", one.about, ""]
        lines.append(f"- Source: {one.source}")
        lines.append(f"- A client sends {one.sends}; it receives {one.receives}.")
        lines += [f"- Needs {need}." for need in one.needs]
        if one.options:
            lines += ["", "| option | value | default | |", "|---|---|---|---|"]
            lines += [
                f"| `{o.name}` | {_cell(o.kind)} | {_cell(o.default)} | {_cell(o.about)} |"
                for o in one.options
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
