"""Accuracy against the number of views on `glyphs`: ``python -m bench.views_table --work DIR``.

Resumable: a run that is finished is read back, one that was stopped goes on. Writes the tables of
``docs/views.md`` between its markers, and the plots beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import fastfpl
from fastfpl.files import write_text, write_whole
from fastfpl.report import sweep_markdown, sweep_plot

METHODS = ("promptfl", "pfedmoap")
VIEWS = ("views:1", "views:2", "views:4", "views:8", "views:16", "fresh")
#: Ten epochs in all: every training image is seen ten times.
BUDGET = {
    "dataset": "glyphs",
    "clip": "tiny",
    "clients": 10,
    "rounds": 10,
    "local_epochs": 1,
    "batch_size": 16,
    "shots": 16,
    "evaluate_every": 10,
}
#: Plot, what augment takes, and how crops are drawn; without augmentation there are none.
CROPS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "papers": (("none", *VIEWS), {}),
    "mild": (VIEWS, {"crop": 0.7, "flip": 0.0}),
}
DOCS = Path(__file__).parent.parent / "docs"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="runs and features")
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=None, type=int, help="CPU threads")
def main(work: Path, seeds: int, threads: int | None) -> None:
    """Play what is missing and write tables and plots."""
    page = (DOCS / "views.md").read_text(encoding="utf-8")
    for name, (values, crops) in CROPS.items():
        swept = fastfpl.sweep(
            METHODS,
            "augment",
            values,
            seeds=range(seeds),
            out=work / name,
            resume=True,
            cache=work / "features",
            threads=threads,
            on_round=lambda label, row: click.echo(f"{label}  {row['accuracy']}"),
            **BUDGET,
            **crops,
        )
        plot = sweep_plot(swept)
        write_whole(DOCS / f"views-{name}.png", lambda part, plot=plot: part.write_bytes(plot))
        before, rest = page.split(f"<!-- {name} -->\n", 1)
        after = rest.split(f"<!-- end of {name} -->", 1)[1]
        table = sweep_markdown(swept)
        page = f"{before}<!-- {name} -->\n{table}<!-- end of {name} -->{after}"
        write_text(DOCS / "views.md", page)


if __name__ == "__main__":
    main()
