"""Draw the diagram of docs/architecture.md as the picture that the site shows in its place.

npm install mermaid
python docs/site/draw.py node_modules/mermaid/dist/mermaid.min.js [chromium]
"""

from __future__ import annotations

import hashlib
import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
PAGE = """<html><body><pre class="mermaid">{diagram}</pre><script src="{script}"></script><script>
mermaid.initialize({{startOnLoad: true, htmlLabels: false, flowchart: {{htmlLabels: false}},
  theme: "neutral", fontFamily: "sans-serif"}});
</script></body></html>"""


def main(script: str, browser: str = "chromium") -> None:
    """Let a browser draw the first diagram of the page, and keep what it drew."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        where = Path(script).resolve().as_uri()
        path.write_text(PAGE.format(diagram=html.escape(diagram), script=where), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--allow-file-access-from-files"]
        command += ["--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"<svg.*?</svg>", dom, re.DOTALL)
    if found is None:
        sys.exit("the browser has drawn nothing")
    svg = found[0].replace("<br>", "<br/>")
    digest = hashlib.sha256(diagram.encode()).hexdigest()[:16]
    (DOCS / "architecture.svg").write_text(f"<!-- mermaid {digest} -->\n{svg}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
