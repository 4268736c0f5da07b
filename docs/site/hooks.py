"""What the site adds to the pages in docs/: the README, the API, the command line, notebooks.

Links are written for a code-hosting page; those that leave docs/ are turned to the site's own
pages here, and the build fails where there is none.
"""

from __future__ import annotations

import ast
import hashlib
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
#: Pages of the repository's root, and what they are called in the site.
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
ROOT_PAGES |= {"CHANGELOG.md": "changelog.md"}
#: The rooms whose public names are the API.
ROOMS = {
    "fastfpl": "The front door: every name is imported when it is first used.",
    "fastfpl.ops": "The ops, with their faces for CPUs and GPUs.",
    "fastfpl.data": "Data sets, one's own too, and how they are dealt to clients.",
    "fastfpl.methods": "What a method is, and how one is found by its name.",
    "fastfpl.tracking": "Who is told of a run while it goes: lines, trackers, progress, callbacks.",
    "fastfpl.trained": "A run's folder as a model.",
    "fastfpl.testing": "Proofs for methods of one's own.",
    "fastfpl.errors": "What can be refused; every message is a sentence with the cure.",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
_PICTURE = "architecture.svg"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, or nowhere."""
    made = {site: (ROOT / page).read_text(encoding="utf-8") for page, site in ROOT_PAGES.items()}
    for room, what in ROOMS.items():
        made[f"reference/{room.removeprefix('fastfpl.')}.md"] = _reference(room, what)
    made["reference/commands.md"] = _commands()
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = Path(str(file.abs_src_path)).read_text(encoding="utf-8")
            made[file.src_uri.removesuffix(".ipynb") + ".md"] = notebook(
                json.loads(text), file.name
            )
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to the repository's files, and the picture, to the site's."""
    return _pictured(_LINK.sub(lambda link: _turned(link, page.file.src_uri), markdown))


def _turned(link: re.Match[str], uri: str) -> str:
    before, target, after = link.groups()
    if "://" in target or target.startswith("mailto:"):
        return link.group()
    # where the page lies in the repository
    beside = {site: name for name, site in ROOT_PAGES.items()}
    here = beside.get(uri, f"docs/{uri}")
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if there.endswith(".ipynb") and Path(there).stem != Path(uri).stem:
        there = there.removesuffix(".ipynb") + ".md"  # the site has a page of it
    if there in ROOT_PAGES:
        there = ROOT_PAGES[there]
    elif there.startswith("docs/"):
        there = there.removeprefix("docs/")
    elif not uri.startswith("reference/"):
        raise PluginError(f"{here}: {target} lies outside docs/, and the site has no page of it")
    return before + posixpath.relpath(there, posixpath.dirname(uri) or ".") + after


def _pictured(markdown: str) -> str:
    """Show the drawn picture: the theme would fetch what draws it from the network."""

    def drawn(found: re.Match[str]) -> str:
        digest = hashlib.sha256(found[1].encode()).hexdigest()[:16]
        text = (ROOT / "docs" / _PICTURE).read_text(encoding="utf-8")
        if f"mermaid {digest}" not in text:
            raise PluginError(
                f"docs/{_PICTURE} must be drawn of its page's diagram ({digest}); draw it anew "
                "with docs/site/draw.py"
            )
        return f"![the rooms, and who knows whom]({_PICTURE})"

    return _MERMAID.sub(drawn, markdown)


def _reference(room: str, what: str) -> str:
    """Write the page of a room's public names, in the order of `__all__`."""
    path = ROOT / room.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: list[str] = []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = [name for name in ast.literal_eval(node.value) if name != "__version__"]
    if not names:
        raise PluginError(f"{source}: a room of the reference must have names in __all__")
    return f"# {room}\n\n{what}\n\n" + "".join(f"::: {room}.{name}\n\n" for name in names)


def _commands() -> str:
    """Write the help of every command, as it says it."""
    import click

    from fastfpl.cli.entry import group
    from fastfpl.cli.flags import Grouped

    pages = ["# The command line\n\nWhat every command says of itself by `--help`.\n"]

    def told(command: click.Command, path: str, parent: click.Context | None) -> None:
        names = {"help_option_names": ["-h", "--help"]} | command.context_settings
        context = click.Context(
            command, info_name=path.split()[-1], parent=parent, **{**names, "terminal_width": 76}
        )
        pages.append(f"## {path}\n\n```text\n{command.get_help(context)}\n```\n")
        if path == "fastfpl run" and isinstance(command, Grouped):
            formatter = context.make_formatter()
            command.format_settings(context, formatter, "all")
            pages.append(f"### The settings\n\n```text\n{formatter.getvalue().strip()}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                if inner is not None and not inner.hidden:
                    told(inner, f"{path} {name}", context)

    told(group, "fastfpl", None)
    return "\n".join(pages)


def notebook(content: dict[str, Any], name: str) -> str:
    """Write a notebook's cells as a page: its words as they are, its code in blocks."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        shell = text.startswith("!")
        kind = "bash" if shell else "python"
        parts.append(text if cell["cell_type"] == "markdown" else f"```{kind}\n{text}\n```")
    parts.append(f"[This page as a notebook]({name}.ipynb)")
    return "\n\n".join(parts) + "\n"
