"""The flags of a run, one a field of `Settings`, and the settings that they make with a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml

from fastfpl.config import PROFILED, Bytes, Settings, for_methods, load_preset, load_yaml
from fastfpl.errors import InputError

__all__ = ["SEED", "gather", "profile_options", "run_options", "settings_of", "shared"]

_Command = Callable[..., None]


# shorter flags beside a setting's own name
_SHORTER = {"max_memory": ("--memory",)}


def _settings_options(command: _Command, without: Collection[str] = ()) -> _Command:
    """Give a command one flag a field of Settings; a flag that is left out stays None."""
    for name, field in reversed(Settings.model_fields.items()):
        if name in ("method", "seed", "options", *without):
            continue
        kind, default = _flag_type(field.annotation), field.default
        note = "" if default in (None, []) else f"  [{default}]"
        text = (field.description or "") + note
        flags = ["--" + name.replace("_", "-"), *_SHORTER.get(name, ())]
        command = click.option(*flags, name, type=kind, default=None, help=text)(command)
    return command


def _flag_type(annotation: Any) -> Any:
    if annotation is Bytes:
        return click.STRING  # Settings reads it
    parts = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is Literal:
        return click.Choice([str(a) for a in get_args(annotation)])
    if len(parts) == 1:
        return _flag_type(parts[0])
    if annotation is int:
        return _count
    return {float: click.FLOAT, bool: click.BOOL}.get(annotation, click.STRING)


def _count(value: str) -> int | str:
    """Read a whole number, or ``all`` where a setting admits it (Settings decides)."""
    return value if value == "all" else int(value)


_RESUME = click.option("--resume", is_flag=True, help="go on with the run in --out")
_SHARED = (
    click.option("--preset", metavar="NAME", help="a paper's settings; see: fastfpl presets"),
    click.option(
        "--config", type=click.Path(path_type=Path), help="YAML file of settings; flags win over it"
    ),
    click.option(
        "-o",
        "--option",
        "options",
        multiple=True,
        metavar="[METHOD.]KEY=VALUE",
        help="an option of a method; may be repeated",
    ),
    click.option("--out", type=click.Path(path_type=Path), help="folder of the results"),
    click.option("--cache", type=click.Path(path_type=Path), help="folder of image features"),
)


def run_options(command: _Command) -> _Command:
    """Give a command every flag of a run but ``--seed``."""
    return shared(_RESUME(_settings_options(command)))


def profile_options(command: _Command) -> _Command:
    """Give a command the flags of the settings that a profile does not set by itself."""
    return _settings_options(command, without=PROFILED)


def shared(command: _Command) -> _Command:
    """Give a command the flags that say where settings come from and results go."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


def gather(
    methods: Sequence[str],
    config: Path | None,
    options: Sequence[str],
    flags: Mapping[str, Any],
) -> dict[str, Any]:
    """Lay file and flags over each other; ``options`` by method."""
    values: dict[str, Any] = {}
    chosen: dict[str, dict[str, Any]] = {}
    if config is not None:
        read = load_yaml(config)
        for method, mine in for_methods(read.pop("options", {})).items():
            chosen[method] = {**chosen.get(method, {}), **mine}
        values |= read
    values |= {name: value for name, value in flags.items() if value is not None}
    for text in options:
        key, equals, value = text.partition("=")
        method, dot, name = key.partition(".")
        if not equals or not key:
            raise InputError(f"fastfpl: option must read KEY=VALUE; got {text!r}")
        if not dot:
            if len(methods) > 1:
                raise InputError(
                    f"fastfpl compare: option must name its method, as in {methods[0]}.{key}=...; "
                    f"got {text!r}"
                )
            method, name = methods[0], key
        elif method not in methods:
            raise InputError(f"fastfpl: option must belong to {', '.join(methods)}; got {text!r}")
        chosen.setdefault(method, {})[name] = yaml.safe_load(value)
    # a file may carry options of methods that are not run
    values["options"] = {m: chosen[m] for m in methods if chosen.get(m)}
    return values


def settings_of(
    method: str,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    flags: Mapping[str, Any],
) -> Settings:
    """Put a run's settings together from preset, file and flags."""
    from fastfpl.config import make_settings
    from fastfpl.methods import find_method

    find_method(method)
    values = gather([method], config, options, flags)
    values["options"] = values["options"].get(method, {})
    if preset is not None:
        values = load_preset(preset).on_top(method, values)
    return make_settings({**values, "method": method})


SEED = click.option("--seed", type=int, default=None, help="of everything that is drawn  [0]")
