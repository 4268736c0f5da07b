"""`fastfpl export`: what a run has trained, for programs without fastfpl."""

from __future__ import annotations

from pathlib import Path

import click

from fastfpl.cli.flags import Place
from fastfpl.cli.names import Name
from fastfpl.cli.predict import DEVICE, METHOD, RUN, choose
from fastfpl.terminal import say


@click.command()
@RUN
@click.option(
    "--client",
    metavar="N|NAME",
    help="a number, a name of the data set or a domain, or one that came later",
)
@click.option(
    "--to",
    "kind",
    required=True,
    type=Name("format"),
    metavar="classifier|coop|torch|onnx",
    help="what the file holds",
)
@click.option("--out", required=True, type=Place(), metavar="FILE", help="must not be there yet")
@METHOD
@DEVICE
def export(
    folder: Path, client: str | None, kind: str, out: Path, method: str | None, device: str
) -> None:
    """Write the model of one client of the run in RUN to a FILE that others read.

    classifier: safetensors of weight (C, D) and logit_scale, a zero-shot head for open_clip's image
    features. coop: a state dict with prompt_learner.ctx. torch: a torch.export program from pixels
    to logits. onnx: the same for ONNX. What a format cannot hold is refused with the reason.
    """
    from fastfpl.trained import export as write
    from fastfpl.trained import load

    trained = load(folder, method=method, device=device)
    say(str(write(choose(trained, client), kind, out)))
