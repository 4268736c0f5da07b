"""`fastfpl serve`: a local page over what a run has trained."""

from __future__ import annotations

from pathlib import Path

import click

from fastfpl.cli.predict import DEVICE, METHOD, RUN
from fastfpl.terminal import say


@click.command()
@RUN
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="to listen at; others than this machine's own let others in",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 for a free one",
)
@click.option(
    "--max-upload", default="20MB", show_default=True, metavar="BYTES", help="of an image at most"
)
@METHOD
@DEVICE
def serve(
    folder: Path, host: str, port: int, max_upload: str, method: str | None, device: str
) -> None:
    """Serve a page that answers for the clients of the run in RUN, beside zero-shot CLIP.

    Drop an image, choose a client. POST /predict?client=NAME takes an image file as its body and
    answers JSON; /openapi.json is the schema. Nothing that is sent is kept. Needs the extra serve:
    pip install "fastfpl[serve]". Ctrl-C ends it.
    """
    from fastfpl.ops.memory import parse_bytes
    from fastfpl.serving import listen
    from fastfpl.serving import serve as answer
    from fastfpl.serving.server import check_library, is_loopback
    from fastfpl.trained import load

    check_library()
    most = parse_bytes("fastfpl serve", max_upload, "max_upload")
    at = listen(host, port)
    with at:
        model = load(folder, method=method, device=device)
        if not is_loopback(host):
            say(
                f"warning: {host} lets everybody who reaches this machine ask, without password "
                "or encryption",
                err=True,
            )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{at.getsockname()[1]}/"

        def ready() -> None:
            say(f"{address} answers; Ctrl-C ends it")

        answer(model, at, host=host, max_upload=most, ready=ready)
