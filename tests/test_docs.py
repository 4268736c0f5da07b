"""The documentation site: it builds strictly, lacks no public name, and needs no network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("mkdocs", "material", "mkdocstrings_handlers.python")


def installed() -> bool:
    """Whether the extra is there; without it nothing of the site can be said."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in LIBRARIES)
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not installed(), reason='needs pip install -e ".[docs]"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site: some seven seconds, most of them the reference's."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def hooks():
    path = ROOT / "docs" / "site" / "hooks.py"
    spec = importlib.util.spec_from_file_location("site_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_and_public_name_is_there(site: Path, hooks) -> None:
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    wanted = {
        p.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        for p in (ROOT / "docs").rglob("*")
        if p.suffix in (".md", ".ipynb")
    }
    assert wanted | {"index.html", "contributing.html", "changelog.html"} <= pages
    for room in hooks.ROOMS:
        text = (site / "reference" / f"{room.removeprefix('fastfpl.')}.html").read_text("utf-8")
        names = [name for name in importlib.import_module(room).__all__ if name != "__version__"]
        assert names
        missing = [name for name in names if f'id="{room}.{name}"' not in text]
        assert missing == [], room
    commands = (site / "reference" / "commands.html").read_text("utf-8")
    for name in ("run", "compare", "data check", "flower up", "new method"):
        assert f"Usage: fastfpl {name} " in commands
    found = (site / "search" / "search_index.json").read_text("utf-8")
    assert "transport_plan" in found
    assert "fastfpl.ops.transport_plan" in found


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures of every page lie beside it; links may lead away."""
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]*?\ssrc=\"((?:https?:)?//[^\"]+)"
        r"|<link[^>]*?rel=\"(?:stylesheet|preload|preconnect|icon)\"[^>]*?href=\"((?:https?:)?//[^\"]+)"
    )
    for page in site.rglob("*.html"):
        assert fetched.findall(page.read_text("utf-8")) == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\"?https?:", style.read_text("utf-8")), style
    # the theme would fetch what draws a diagram
    page = (site / "architecture.html").read_text("utf-8")
    assert 'class="mermaid"' not in page
    assert 'src="architecture.svg"' in page


def test_links_that_leave_the_folder_become_pages_or_an_error(hooks) -> None:
    turned = {
        ("../CONTRIBUTING.md#an-op", "architecture.md"): "contributing.md#an-op",
        ("../../README.md", "tutorials/new_method.md"): "../index.md",
        ("docs/methods.md#fedotp", "index.md"): "methods.md#fedotp",
        ("docs/architecture.md", "contributing.md"): "architecture.md",
        ("../methods.md", "tutorials/new_method.md"): "../methods.md",
        ("docs/tutorials/accelerate.ipynb", "index.md"): "tutorials/accelerate.md",
        ("accelerate.ipynb", "tutorials/accelerate.md"): "accelerate.ipynb",
        ("https://flower.ai", "index.md"): "https://flower.ai",
    }
    for (link, page), wanted in turned.items():
        found = hooks._LINK.sub(lambda hit, page=page: hooks._turned(hit, page), f"[x]({link})")
        assert found == f"[x]({wanted})"
    with pytest.raises(hooks.PluginError, match="lies outside docs/, and the site has no page"):
        hooks._LINK.sub(lambda hit: hooks._turned(hit, "running.md"), "[x](../fastfpl/run.py)")


def test_the_picture_is_of_the_page_s_diagram(hooks) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert "](architecture.svg)" in hooks._pictured(page)
    with pytest.raises(hooks.PluginError, match=r"architecture\.svg must be drawn of its page's"):
        hooks._pictured(page.replace("one command a file", "two commands a file"))


def test_a_broken_link_breaks_the_build(tmp_path: Path) -> None:
    """The settings of the site, with pages of their own."""
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    validation = re.search(r"^validation:\n(?:  .*\n)+", settings, re.MULTILINE)
    assert validation is not None
    assert re.search(r"^strict: true$", settings, re.MULTILINE)
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nstrict: true\n{validation[0]}")
    command = [sys.executable, "-m", "mkdocs", "build"]

    def build(text: str) -> int:
        (tmp_path / "docs" / "index.md").write_text(text)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    assert build("# A\n\n[here](#a)\n") == 0
    for link in ("gone.md", "#gone", "gone.py", "/index.md"):
        assert build(f"# A\n\n[x]({link})\n") != 0, link
