"""An app folder that ``flwr run`` accepts: two lines of Python, and the run in pyproject.toml."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastfpl import __version__
from fastfpl.errors import InputError
from fastfpl.files import on_disk, write_text

__all__ = ["PACKAGE", "write_app"]

PACKAGE = "fastfpl_app"

_PYPROJECT = """\
# Made by `fastfpl flower init`: `flwr run` reads the run from here. Every SuperNode needs fastfpl
# {version} and its own copy of CLIP and images; nothing of them is in this folder.
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "fastfpl-app"
version = "1.0.0"
description = "{method} by fastfpl"
license = {{ file = "LICENSE" }}
dependencies = ["fastfpl[flower]=={version}"]

[tool.flwr.app]
publisher = "fastfpl"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# settings: those of `fastfpl run`; rules: see docs/flower.md; out: a folder at the server;
# track: tensorboard, wandb, mlflow, separated by commas, by libraries that the server has
[tool.flwr.app.config]
settings = {settings}
rules = {rules}
out = {out}
track = {track}
resume = false
"""

_APP = '''\
"""The {side} of the run that pyproject.toml describes."""

from fastfpl.flower import {name}

app = {name}()
'''

_LICENSE = "The code in this folder is made by fastfpl, Apache-2.0.\n"


def write_app(
    folder: Path,
    method: str,
    settings: Mapping[str, Any],
    rules: Mapping[str, Any],
    out: str,
    track: str = "",
) -> None:
    """Write an app folder.

    Parameters
    ----------
    folder : Path
        A new or empty one.
    method : str
    settings, rules : mapping
        What differs from the defaults; JSON has it.
    out : str
        Folder of the results, at the server.
    track : str
        Trackers that the server tells, separated by commas.

    Raises
    ------
    InputError
        If the folder holds anything.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"fastfpl.flower: the app's folder must be new or empty; got {folder}; name another"
        )
    package = folder / PACKAGE
    with on_disk("fastfpl.flower", "the app's folder", folder, "or name another"):
        package.mkdir(parents=True, exist_ok=True)
    text = _PYPROJECT.format(
        version=__version__,
        method=method,
        package=PACKAGE,
        # a text of JSON is one of TOML too
        settings=json.dumps(json.dumps(dict(settings))),
        rules=json.dumps(json.dumps(dict(rules))),
        out=json.dumps(out),
        track=json.dumps(track),
    )
    write_text(folder / "pyproject.toml", text)
    write_text(folder / "LICENSE", _LICENSE)
    write_text(package / "__init__.py", f'"""{method} by fastfpl, as an app of Flower."""\n')
    for side, name in (("server", "server_app"), ("client", "client_app")):
        write_text(package / f"{name}.py", _APP.format(side=side, name=name))
