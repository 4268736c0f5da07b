"""The command line: run, compare, profile, report, data, doctor, presets, quirks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
import yaml

from fastfpl import __version__
from fastfpl.config import (
    PROFILED,
    Bytes,
    Settings,
    for_methods,
    load_preset,
    load_yaml,
    preset_names,
)
from fastfpl.errors import FastfplError, InputError
from fastfpl.terminal import console as _console
from fastfpl.terminal import plain, say, sayable
from fastfpl.terminal import table as _table

if TYPE_CHECKING:
    import torch
    from rich.table import Table as RichTable

    from fastfpl.federation import Comparison

__all__ = ["main"]

_Command = Callable[..., None]
# seconds over which a rate is taken
_PERIOD = 600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one sentence and exit code 2."""
    with sayable():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> None:
    try:
        _cli.main(args=arguments, prog_name="fastfpl", standalone_mode=False)
    except FastfplError as error:
        say(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "stopped; the rounds that ended are kept, go on with the same command and --resume",
            err=True,
        )
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastfpl")
def _cli() -> None:
    """Federated prompt learning of CLIP: exact, tested, fast."""


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


def _run_options(command: _Command) -> _Command:
    return _shared(_RESUME(_settings_options(command)))


def _profile_options(command: _Command) -> _Command:
    return _settings_options(command, without=PROFILED)


def _shared(command: _Command) -> _Command:
    for option in reversed(_SHARED):
        command = option(command)
    return command


def _gather(
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


def _settings_of(
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
    values = _gather([method], config, options, flags)
    values["options"] = values["options"].get(method, {})
    if preset is not None:
        values = load_preset(preset).on_top(method, values)
    return make_settings({**values, "method": method})


_SEED = click.option("--seed", type=int, default=None, help="of everything that is drawn  [0]")


@_cli.command()
@click.argument("method")
@_SEED
@_run_options
def run(
    method: str,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    **flags: Any,
) -> None:
    """Run METHOD once and write result.json and checkpoints into --out.

    --memory=8GiB (or --max-memory) plans the whole run so that it takes no more: on a GPU of
    PyTorch's allocations, on a CPU of the process. Clients take first steps for trial, one, two,
    four together, as long as twice as many would fit; text passes are cut into parts of contexts
    and classes, images are encoded fewer at a time. A run that does not fit is refused before its
    first round. result.json says under memory what was chosen; figures stay equal to rounding.

    --cuda-graphs=auto replays training steps on a GPU from their third time on, unless an op has
    to wait for the device; result.json says in environment.cuda_graphs what happened.
    """
    from fastfpl.federation import Comparison
    from fastfpl.federation import run as play

    settings = _settings_of(method, preset, config, options, flags)
    folder = out or Path("runs") / f"{method}-{settings.dataset}-seed{settings.seed}"
    with _progress() as (observer, on_round):
        result = play(
            settings,
            preset=preset,
            out=folder,
            resume=resume,
            cache=cache,
            observer=observer,
            on_round=on_round,
        )
    _print_tables(Comparison({method: [result]}))
    if result.memory is not None:
        click.echo(_chosen(result.memory, result.peak_memory_bytes))
    say(str(folder / "result.json"))


def _chosen(memory: Mapping[str, Any], peak: int) -> str:
    """Say in a line what a run was allowed, what it chose, and what it took."""
    passes = "; ".join(
        f"{one['what']}: {one['images']} images at once"
        if "images" in one
        else f"{one['what']}: {one['clients']} client{'s' * (one['clients'] != 1)} at most, texts "
        f"in {one['text_bytes'] >> 20} MiB"
        for one in memory["passes"]
    )
    return (
        f"memory: {memory['limit_bytes'] >> 20} MiB allowed, {memory['taken_bytes'] >> 20} taken "
        f"before the first round, {peak >> 20} at the most; {passes}"
    )


@_cli.command()
@click.argument("methods", nargs=-1, required=True, metavar="METHOD...")
@click.option("--seeds", default="0", show_default=True, help="seeds, separated by commas")
@click.option(
    "--sweep",
    metavar="SETTING=V1,V2,...",
    help="compare at each value of one setting, e.g. shots=1,2,4,8,16",
)
@_run_options
def compare(
    methods: tuple[str, ...],
    seeds: str,
    sweep: str | None,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    resume: bool,
    cache: Path | None,
    **flags: Any,
) -> None:
    """Run several METHODs under the same settings; print a table, write plots and one HTML page.

    The scenario leave-one-domain-out without --target leaves out every domain in turn.
    """
    from fastfpl.federation import compare as play
    from fastfpl.federation import sweep as play_each
    from fastfpl.report import sweep_table, write_report, write_sweep

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(
            f"fastfpl compare: seeds must be whole numbers separated by commas; got {seeds!r}"
        ) from None
    values = _gather(methods, config, options, flags)
    if "seed" in values:
        raise InputError("fastfpl compare: seed must be left out; seeds are given by --seeds")
    whole = {**(load_preset(preset).settings if preset else {}), **values}
    folder = out or Path("runs") / f"compare-{whole.get('dataset', 'glyphs')}"
    chosen = _swept(sweep, whole)
    with _progress() as (observer, on_round):
        shared = {
            "seeds": numbers,
            "preset": preset,
            "out": folder,
            "resume": resume,
            "cache": cache,
            "observer": observer,
            "on_round": on_round,
            **values,
        }
        if chosen is None:
            comparison = play(methods, **shared)
        else:
            swept = play_each(methods, *chosen, **shared)
    # files first; a disk that does not take them must not cost the table either
    written: list[Path] = []
    try:
        written = write_sweep(swept, folder) if chosen else write_report(comparison, folder)
    finally:
        if chosen is None:
            _print_tables(comparison)
        else:
            _console().print(sweep_table(swept))
    for path in written:
        say(str(path))


@_cli.command()
@click.argument("method")
@click.option("--steps", type=int, default=3, show_default=True, help="training steps of a client")
@click.option(
    "--top", type=click.IntRange(1), default=15, show_default=True, help="operators that are shown"
)
@_SEED
@_shared
@_profile_options
def profile(
    method: str,
    steps: int,
    top: int,
    preset: str | None,
    config: Path | None,
    options: Sequence[str],
    out: Path | None,
    cache: Path | None,
    **flags: Any,
) -> None:
    """Profile a few training steps and an evaluation of METHOD; write trace.json into --out.

    Takes the settings of a run. Two rounds are played in which every client trains on its first
    --steps batches; the second one is profiled, so that what happens once is over. Images that have
    no features yet are encoded before.

    Printed are the phases of the round (training with its text passes, losses, gradients and
    updates; evaluation) with everything in them; the operators with the most time of their own, by
    the device's time where there is a GPU; and the peak of the memory: allocations of a GPU, else
    the resident set of the process.

    Open trace.json at ui.perfetto.dev or in chrome://tracing.
    """
    from fastfpl.federation.profiling import profile as measure

    settings = _settings_of(method, preset, config, options, flags)
    folder = out or Path("runs") / f"profile-{method}-{settings.dataset}"
    with _progress() as (observer, _):
        seen = measure(settings, folder, steps=steps, cache=cache, observer=observer)
    console = _console()
    device = ("GPU ms", "share") if seen.cuda else ()
    for title, spans in (("phase", seen.phases), ("operator", seen.operators)):
        table = _table(title, "calls", "CPU ms", "share", *device)
        for column in table.columns[1:]:
            column.justify = "right"
        # operators share the time of all; a phase stands in another one
        totals = [seen.seconds, seen.seconds]
        if title == "operator":
            totals = [sum(s.seconds for s in spans), sum(s.device_seconds for s in spans)]
        for span in spans[:top]:
            times = [span.seconds, *([span.device_seconds] if seen.cuda else [])]
            cells = [
                cell
                for t, total in zip(times, totals, strict=False)
                for cell in (f"{1e3 * t:.2f}", f"{100 * t / total:.1f} %" if total else "")
            ]
            table.add_row(span.name, str(span.calls), *cells)
        console.print(table)
    faces = ", ".join(f"{op} by {' and '.join(names)}" for op, names in sorted(seen.faces.items()))
    click.echo(f"round {seen.seconds:.3f} s under the profiler; {faces}")
    click.echo(f"peak memory {seen.peak_memory_bytes / 2**20:.0f} MiB")
    say(str(seen.trace))


def _print_tables(comparison: Comparison) -> None:
    from fastfpl.report import detail_table, published_table, text_table

    _console().print(text_table(comparison))
    for more in (detail_table(comparison), published_table(comparison)):
        if more is not None:
            _console().print(more)


def _swept(text: str | None, values: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """Say which setting takes which values, if any."""
    if text is not None:
        key, equals, rest = text.partition("=")
        if not equals or not key or not rest:
            raise InputError(f"fastfpl compare: sweep must read SETTING=V1,V2; got {text!r}")
        return key.replace("-", "_"), [yaml.safe_load(part) for part in rest.split(",")]
    if values.get("scenario") == "leave-one-domain-out" and values.get("target") is None:
        from fastfpl.data import load_dataset

        root = values.get("root")
        dataset = load_dataset(values.get("dataset", "glyphs"), root and Path(root))
        return "target", list(dataset.domains)
    return None


@_cli.command()
@click.argument(
    "folders", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="folder of the report; by itself FOLDER, and runs/report for several",
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Print the table and write plots and page of finished runs anew.

    A FOLDER is the --out of a run or of a comparison. Runs on different tasks (data set, scenario,
    CLIP, partition, shots, views) get tables of their own; runs that are not finished are named.
    """
    from fastfpl.report import load_comparisons, write_report
    from fastfpl.report.facts import group_names

    comparisons = load_comparisons(*folders)
    folder = out or (folders[0] if len(folders) == 1 else Path("runs") / "report")
    written: list[Path] = []
    try:
        written = write_report(comparisons, folder)
    finally:
        for name, comparison in zip(group_names(comparisons), comparisons, strict=True):
            if name:
                say(f"== {name}")
            _print_tables(comparison)
    for path in written:
        say(str(path))
    for text in (text for comparison in comparisons for text in comparison.missing):
        say(f"missing: {text}", err=True)


@_cli.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the papers' settings, or show one as YAML."""
    if name is not None:
        chosen = load_preset(name)
        click.echo(f"# {chosen.about}")
        click.echo(yaml.safe_dump(chosen.settings, sort_keys=False), nl=False)
        for figures in chosen.published:
            where = "".join(f", {key}={value}" for key, value in figures.where.items())
            click.echo(f"# published: {figures.source}{where}; for {', '.join(figures.figures)}")
        return
    table = _table("preset", "settings of")
    for preset in preset_names():
        table.add_row(preset, load_preset(preset).about)
    _console().print(table)


@_cli.command()
@click.argument("method", required=False)
def quirks(method: str | None) -> None:
    """List the quirks of released codes that --as-released reproduces, or METHOD's alone."""
    from fastfpl.methods import find_method
    from fastfpl.released import QUIRKS

    if method is not None:
        find_method(method)
    table = _table("quirk", "what the released code does", "methods")
    for quirk in QUIRKS.values():
        if method is None or method in quirk.methods:
            table.add_row(quirk.name, quirk.about, ", ".join(quirk.methods))
    if not table.row_count:
        click.echo(f"{method}'s released code has no quirk that is reproduced here")
        return
    _console().print(table)


@_cli.command()
@click.option("--clip", help="also say which faces take this model's text tower, and why not")
def doctor(clip: str | None) -> None:
    """Say what runs on this machine, why the rest does not, and what cannot be checked on it."""
    import torch
    from rich.table import Table

    from fastfpl.data import DATASETS
    from fastfpl.features import default_directory
    from fastfpl.federation.result import environment
    from fastfpl.methods import METHODS
    from fastfpl.ops import all_faces
    from fastfpl.report.machine import machine_facts, unchecked

    console = _console()
    facts = Table(box=None, show_header=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for key, value in environment(device).items():
        facts.add_row(key.replace("_", " "), str(value))
    for key, value in machine_facts().items():
        facts.add_row(key, value)
    facts.add_row("methods", " ".join(METHODS))
    facts.add_row("data sets", " ".join(DATASETS))
    facts.add_row("feature store", _short(default_directory()))
    console.print(facts)
    faces = _table("op", "face", "answers here")
    for op, candidates in sorted(all_faces().items()):
        for face in candidates:
            reasons = face.missing()
            faces.add_row(op, face.name, "; ".join(reasons) or "yes")
    console.print(faces)
    if clip is not None:
        console.print(_takers(clip, device))
    blind = list(unchecked())
    click.echo("cannot be checked here:" if blind else "everything can be checked here")
    for what in blind:
        say(f"  {what}")


def _takers(clip: str, device: torch.device) -> RichTable:
    """Build the table of the faces that take a model's text tower on a device."""
    from fastfpl.clip.survey import on, survey
    from fastfpl.ops.text import reasons_against

    found = survey(clip)
    if found.text is None:
        raise InputError(f"fastfpl doctor: clip must be a model that is taken; got {found.refusal}")
    faces = _table(f"text pass of {found.name}", "takes it")
    for name, reasons in reasons_against(on(found.text, device)).items():
        faces.add_row(name, "; ".join(reasons) or "yes")
    return faces


@_cli.group()
def data() -> None:
    """List the data sets, and see whether their files are there."""


_ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path),
    required=True,
    help="folder that holds the set's folder",
)


@data.command("list")
def list_sets() -> None:
    """List the data sets, the folder that each wants, and their published sizes."""
    from fastfpl.data import DATASETS
    from fastfpl.data.catalogue import FACTS

    table = _table("name", "folder", "classes", "train", "test", "domains")
    for name in DATASETS:
        if name not in FACTS:
            table.add_row(name, "needs no files")
            continue
        facts = FACTS[name]
        sizes = (str(n) for n in (facts.classes, facts.train, facts.test, len(facts.domains)))
        table.add_row(name, facts.folders[0], *sizes)
    _console().print(table)


@data.command()
@click.argument("name")
@_ROOT
@click.option("--decode", is_flag=True, help="also decode every image, which takes a while")
def check(name: str, root: Path, decode: bool) -> None:
    """Say what of NAME's files is there, and where to get the rest; exit code 2 if any lacks."""
    from fastfpl.data.check import check_files

    with _progress() as (observer, _):
        found = check_files(name, root, decode=decode, observer=observer)
    say(f"{name} in {found.folder or root}")
    for need, there in found.parts:
        say(f"  {'there  ' if there else 'MISSING'}  {need.path}")
        if not there:
            say(f"           get it from {need.source}")
    for what, count, published in found.counts:
        say(f"  {count} of {published} {what}")
    for problem in found.problems:
        say(f"  {problem}")
    if not found.complete:
        click.echo(f"{name} is not complete")
        sys.exit(2)
    click.echo(f"{name} is complete")


@data.command()
@click.argument("name")
@_ROOT
def split(name: str, root: Path) -> None:
    """Draw the split that stands in for NAME's published one, and write it as its file."""
    from fastfpl.data.clip_sets import write_split

    say(f"{write_split(name, root)}")


@data.command()
@click.argument("name")
@_ROOT
def download(name: str, root: Path) -> None:
    """Download NAME, if it needs no account, into --root."""
    from fastfpl.data.cifar import download as fetch

    say(f"{fetch(name, root)}")


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str, int, int], None], Callable[..., None]]]:
    """Show the current step with its rate and time left; say nothing where nobody looks."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield (lambda what, done, total: None), (lambda label, row: None)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from fastfpl.federation.feeds import ENCODING

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            unit = " images" if ENCODING in task.description else ""
            return Text("" if speed is None else f"{speed:.1f}{unit}/s")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    # a chunk of images may take a minute on a CPU, and a rate needs several
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_PERIOD) as bars:
        current: dict[str, Any] = {}

        def observer(what: str, done: int, total: int) -> None:
            if current.get("what") != what:
                if current:
                    bars.remove_task(current["task"])
                current.update(what=what, task=bars.add_task(plain(what), total=total))
            # the first report is where the rate begins: what was there before does not count
            bars.update(current["task"], completed=done, total=total)

        def on_round(label: str, row: Mapping[str, Any]) -> None:
            if row["accuracy"] is not None:
                bars.console.print(
                    f"{plain(label)}  round {row['round'] + 1}  "
                    f"accuracy {100 * row['accuracy']:.1f} %  {row['seconds']:.1f} s"
                )

        yield observer, on_round


if __name__ == "__main__":
    main()
