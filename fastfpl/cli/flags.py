"""The flags of a run, one a field of `Settings`, and the settings that they make with a file."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from fastfpl.cli.names import Name, option_keys
from fastfpl.config import PROFILED, Bytes, Settings, for_methods, load_preset, load_yaml
from fastfpl.errors import InputError, cut, shown
from fastfpl.plain_yaml import parse_yaml

__all__ = [
    "GROUPS",
    "SEED",
    "Count",
    "Grouped",
    "Place",
    "encode_options",
    "gather",
    "profile_options",
    "run_options",
    "settings_of",
    "shared",
]

_Command = Callable[..., None]

#: The settings as people look for them in the help.
GROUPS = {
    "Data": (
        *("dataset", "root", "layout", "columns", "digest", "on_corrupt", "statistics"),
        *("scenario", "target", "target_root", "transductive", "unseen"),
    ),
    "Clients": (
        *("clients", "partition", "partition_seed", "beta", "classes_per_client", "repeat_rate"),
        *("split_test", "shots", "participation", "sampling", "dropout"),
    ),
    "Merging": ("merge", "trim", "krum_malicious", "krum_kept", "clip_update"),
    "Privacy": ("dp_noise", "dp_clip", "dp_unit", "dp_delta"),
    "CLIP and prompts": (
        *(
            "clip",
            "pretrained",
            "quick_gelu",
            "dtype",
            "feature_dtype",
            "position",
            "n_ctx",
            "ctx_init",
        ),
    ),
    "Training": (
        *("rounds", "local_epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule"),
        *("augment", "crop", "flip", "evaluate_every", "evaluate_clients"),
        *("as_released", "seed"),
    ),
    "Device, speed and memory": (
        *("device", "threads", "workers", "max_memory", "resident", "resident_features"),
        *("cohort", "cuda_graphs"),
    ),
}
_GROUP = {name: title for title, names in GROUPS.items() for name in names}
# what --settings calls the groups
_KEYS = {title.split()[0].rstrip(",").lower(): title for title in GROUPS}
# shorter flags beside a setting's own name
_SHORTER = {"max_memory": ("--memory",)}


class Grouped(click.Command):
    """A command whose help names its settings by `GROUPS`, and whose ``--settings`` explains them.

    The help fits a screen, which the explanations of some sixty settings do not.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.params.append(
            click.Option(
                ["--settings"],
                type=click.Choice([*_KEYS, "all"]),
                metavar="GROUP",
                is_eager=True,
                expose_value=False,
                callback=self._explain,
                help="explain the settings of a group below, or of all",
            )
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Explain what is no setting; name the settings, a paragraph a group."""
        flags: dict[str, list[str]] = {title: [] for title in GROUPS}
        records = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            title = _GROUP.get(parameter.name or "")
            if title is not None:
                flags[title].append(min(parameter.opts, key=len))
            elif record is not None and isinstance(parameter, click.Option):
                records.append(record)
        with formatter.section("Options"):
            formatter.write_dl(records)
        wide = max(map(len, _KEYS)) + 4
        with formatter.section("Settings, explained by --settings GROUP"):
            for key, title in _KEYS.items():
                if not flags[title]:  # a command may have none of a group
                    continue
                lines = textwrap.wrap(
                    " ".join(flags[title]),
                    formatter.width,
                    initial_indent=f"  {key}".ljust(wide),
                    subsequent_indent=" " * wide,
                    break_on_hyphens=False,
                )
                formatter.write("".join(f"{line}\n" for line in lines))

    def format_settings(self, ctx: click.Context, formatter: click.HelpFormatter, key: str) -> None:
        """Write what the settings of a group are, or of all."""
        for title in GROUPS if key == "all" else (_KEYS[key],):
            mine = [p for p in self.get_params(ctx) if _GROUP.get(p.name or "") == title]
            if not mine:
                continue
            with formatter.section(title):
                formatter.write_dl([r for r in (p.get_help_record(ctx) for p in mine) if r])

    def _explain(self, ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is None or ctx.resilient_parsing:
            return
        formatter = ctx.make_formatter()
        self.format_settings(ctx, formatter, value)
        if not formatter.getvalue():
            raise click.BadParameter(f"{ctx.command_path} has no settings of {value}", ctx, param)
        click.echo(formatter.getvalue().strip("\n"))
        ctx.exit()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the methods, those of installed packages too."""
        from fastfpl.methods import method_names

        text = f"{', '.join(method_names())}; or path/to/mine.py:MyMethod, package.module:MyMethod"
        with formatter.section("Methods"):
            # a name that is cut at its hyphen cannot be copied
            for line in textwrap.wrap(text, formatter.width - 2, break_on_hyphens=False):
                formatter.write(f"  {line}\n")


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or ``all`` where the setting takes it."""

    def __init__(self, everything: bool = False) -> None:
        self.everything = everything
        self.name = "N|all" if everything else "N"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Say what is written."""
        return self.name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Read it; whether the number is taken is for `Settings` to say."""
        if value == "all" and self.everything:
            return "all"
        try:
            return int(value)
        except ValueError:
            rule = "a whole number or all" if self.everything else "a whole number"
            self.fail(f"{shown(value)} is not {rule}", param, ctx)


class Place(click.Path):
    """The path of a file or folder, which need not be there."""

    def __init__(self, **more: Any) -> None:
        super().__init__(path_type=Path, **more)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what no path can be."""
        try:
            good = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            good = False
        if not good:
            self.fail(f"{shown(str(value))} holds what no path can", param, ctx)
        return super().convert(value, param, ctx)


# what people write after a flag, where its type does not say it
_METAVARS = {
    "root": "FOLDER",
    "target_root": "FOLDER",
    "layout": "split/domain/class|...",
    "columns": "path=NAME,...",
    "pretrained": "TAG|FILE|random",
    "ctx_init": "WORDS",
    "augment": "none|views:V|fresh",
    "device": "auto|cpu|cuda",
    "evaluate_clients": "N|SHARE",
}
_NAMES = {
    "dataset": "dataset",
    "layout": "layout",
    "target": "target",
    "clip": "clip",
    "as_released": "quirk",
}


def _settings_options(command: _Command, without: Collection[str] = ()) -> _Command:
    """Give a command one flag a field of Settings; a flag that is left out stays None."""
    for name, field in reversed(Settings.model_fields.items()):
        if name in ("method", "seed", "options", *without):
            continue
        kind, default = _flag_type(name, field.annotation), field.default
        if isinstance(default, bool):
            default = "yes" if default else "no"
        note = "" if default in (None, []) else f"  [{default}]"
        command = click.option(
            *("--" + name.replace("_", "-"), *_SHORTER.get(name, ()), name),
            type=kind,
            metavar=_METAVARS.get(name) or _metavar(field.annotation),
            default=None,
            help=(field.description or "") + note,
        )(command)
    return command


def _flag_type(name: str, annotation: Any) -> Any:
    if name in _NAMES:
        return Name(_NAMES[name])
    if annotation is Bytes:
        return click.STRING  # Settings reads it
    parts = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is Literal:
        return click.Choice([str(a) for a in get_args(annotation)])
    if len(parts) == 1:
        return _flag_type(name, parts[0])
    if annotation is int:
        return Count(everything=name == "shots")
    return {float: click.FLOAT, bool: click.BOOL}.get(annotation, click.STRING)


def _metavar(annotation: Any) -> str | None:
    """Say what people write; None where click's own says it."""
    kinds = {annotation, *(a for a in get_args(annotation) if annotation is not Bytes)}
    named = ((Bytes, "BYTES"), (bool, "yes|no"), (float, "NUMBER"))
    return next((name for kind, name in named if kind in kinds), None)


def _complete_option(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the keys of the options of the methods that stand on the line."""
    # click reads no further than an option whose value is still to come
    named = (*(ctx.params.get("methods") or ()), ctx.params.get("method"), *ctx.args)
    methods = [name for name in dict.fromkeys(named) if name]
    several = len(methods) > 1
    return [
        CompletionItem(f"{method}.{key}=" if several else f"{key}=", help=about)
        for method in methods
        for key, about in option_keys(method)
        if (f"{method}.{key}" if several else key).startswith(incomplete)
    ]


_RESUME = click.option("--resume", is_flag=True, help="go on with the run in --out")
_TRACK = click.option(
    "--track",
    multiple=True,
    type=Name("tracker"),
    metavar="tensorboard|wandb|mlflow",
    help="follow the run there; may be repeated  [metrics.jsonl alone]",
)
_SHARED = (
    click.option("--preset", type=Name("preset"), help="a paper's settings; see: fastfpl presets"),
    click.option(
        "--config", type=Place(), metavar="FILE", help="YAML file of settings; flags win over it"
    ),
    click.option(
        "-o",
        "--option",
        "options",
        multiple=True,
        metavar="[METHOD.]KEY=VALUE",
        shell_complete=_complete_option,
        help="an option of a method; may be repeated; see: fastfpl methods METHOD",
    ),
    click.option("--out", type=Place(), metavar="FOLDER", help="folder of the results"),
    click.option("--cache", type=Place(), metavar="FOLDER", help="folder of image features"),
)
SEED = click.option("--seed", type=Count(), default=None, help="of everything that is drawn  [0]")


def run_options(command: _Command) -> _Command:
    """Give a command every flag of a run but ``--seed``."""
    return shared(_RESUME(_TRACK(_settings_options(command))))


#: Settings that decide image features, or which images there are.
_SEEN = (
    *("root", "layout", "columns", "digest", "on_corrupt", "statistics", "scenario", "target"),
    *("target_root", "transductive", "partition", "clients", "clip", "pretrained", "quick_gelu"),
    *("dtype", "feature_dtype", "augment", "crop", "flip", "device", "threads", "workers"),
    "resident",
)


def encode_options(command: _Command) -> _Command:
    """Give a command the flags of what image features depend on."""
    return _settings_options(command, without=[n for n in Settings.model_fields if n not in _SEEN])


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
            raise InputError(f"fastfpl: option must read KEY=VALUE; got {shown(text)}")
        if not dot:
            if len(methods) > 1:
                raise InputError(
                    f"fastfpl compare: option must name its method, as in {methods[0]}.{key}=...; "
                    f"got {shown(text)}"
                )
            method, name = methods[0], key
        elif method not in methods:
            raise InputError(
                f"fastfpl: option must belong to {', '.join(methods)}; got {shown(text)}"
            )
        chosen.setdefault(method, {})[name] = parse_yaml(value, f"fastfpl: option {cut(key)}")
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
    from fastfpl.methods import find_method, method_name

    method = method_name(method)
    find_method(method)
    values = gather([method], config, options, flags)
    values["options"] = values["options"].get(method, {})
    if preset is not None:
        values = load_preset(preset).on_top(method, values)
    return make_settings({**values, "method": method})
