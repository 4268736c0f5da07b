"""`fastfpl new`: a folder to begin a method of one's own in."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import click

from fastfpl.errors import InputError, shown
from fastfpl.terminal import say

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# file of the template -> what it is called in the folder
_FILES = {
    "method.py": "@MODULE@.py",
    "reference.py": "@MODULE@_reference.py",
    "test.py": "test_@MODULE@.py",
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
}


@click.group()
def new() -> None:
    """Begin a method of your own."""


@new.command()
@click.argument("name", metavar="NAME")
def method(name: str) -> None:
    """Write the folder NAME: a method, its literal reference, the proof, and a package of them."""
    for path in write_method(name, Path(name)):
        say(str(path))
    words = _words(name)
    click.echo(f"try: cd {name}; pytest; fastfpl run {words['@MODULE@']}.py:{words['@CLASS@']}")


def write_method(name: str, folder: Path) -> list[Path]:
    """Write the template of a method, which passes its tests as it stands.

    Parameters
    ----------
    name : str
        Of the method: small letters, digits and hyphens.
    folder : Path
        Must not be there.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        If the name is refused or known already, or the folder is there.
    """
    from fastfpl.methods import method_names

    op = "fastfpl new method"
    words = _words(name) if _NAME.fullmatch(name) else {}
    if not words or not words["@CLASS@"].isidentifier():
        raise InputError(
            f"{op}: name must be small letters, digits and hyphens, as my-method; got {shown(name)}"
        )
    if name in method_names():
        raise InputError(f"{op}: name must not be that of a known method; got {name!r}")
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{op}: the folder {folder} must not be there; got one: name another")
    texts = {}
    for source, target in _FILES.items():
        text = (resources.files("fastfpl.templates") / "method" / f"{source}.txt").read_text(
            encoding="utf-8"
        )
        texts[folder / _filled(target, words)] = _filled(text, words)
    folder.mkdir(parents=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _words(name: str) -> dict[str, str]:
    return {
        "@NAME@": name,
        "@MODULE@": name.replace("-", "_"),
        "@CLASS@": "".join(part.capitalize() for part in name.split("-")),
    }


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text
