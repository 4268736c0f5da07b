"""The command `fastfpl`: its commands, and how mistakes end."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

import click

from fastfpl import __version__
from fastfpl.cli.adapt import adapt
from fastfpl.cli.compare import compare
from fastfpl.cli.data import data
from fastfpl.cli.doctor import doctor
from fastfpl.cli.encode import encode
from fastfpl.cli.export import export
from fastfpl.cli.flower import flower
from fastfpl.cli.methods import methods
from fastfpl.cli.new import new
from fastfpl.cli.predict import predict
from fastfpl.cli.presets import presets
from fastfpl.cli.profile import profile
from fastfpl.cli.quirks import quirks
from fastfpl.cli.report import report
from fastfpl.cli.run import run
from fastfpl.cli.serve import serve
from fastfpl.errors import FastfplError, InputError, cut
from fastfpl.terminal import plain, say, sayable

__all__ = ["group", "main"]

# letters of a sentence: what came may be longer than anyone reads
_MOST = 1500


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one sentence and exit code 2."""
    with sayable(), _warned(), _first_alone():
        _run(arguments)


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """Let warnings of the library be sentences, without the line of code that they are from."""
    before = warnings.formatwarning

    def written(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if str(message).startswith("fastfpl"):
            return f"warning: {plain(str(message))}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = written
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _first_alone() -> Iterator[None]:
    """Let the first of several ranks speak, and the others be quiet."""
    if "WORLD_SIZE" not in os.environ:  # which spares everybody else torch
        yield
        return
    from fastfpl.federation.ranks import quietly

    with quietly():
        yield


def _run(arguments: Sequence[str] | None) -> None:
    try:
        group.main(args=arguments, prog_name="fastfpl", standalone_mode=False)
    except FastfplError as error:
        say(f"error: {cut(str(error), _MOST)}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # who read has gone, as head does; what is left must not fail at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" {cut(str(error.filename), 200)!r}" if error.filename else ""
        say(f"error: fastfpl: the system refused{where}: {error.strerror or error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        text = cut(error.format_message(), _MOST)
        click.UsageError(text, getattr(error, "ctx", None)).show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        kept = "; the rounds that ended are kept, go on with the same command and --resume"
        say("stopped" + (kept if _resumes(arguments) else ""), err=True)
        sys.exit(130)


def _resumes(arguments: Sequence[str] | None) -> bool:
    """Whether the command that was asked for knows --resume."""
    command: click.Command = group
    for word in sys.argv[1:] if arguments is None else arguments:
        if isinstance(command, click.Group):
            command = command.commands.get(word, command)
    return any(one.name == "resume" for one in command.params)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastfpl")
@click.pass_context
def group(context: click.Context) -> None:
    """Federated prompt learning of CLIP: exact, tested, fast."""
    if "WORLD_SIZE" in os.environ and context.invoked_subcommand not in _RANKED:
        from fastfpl.federation.ranks import ranks_asked

        if ranks_asked() > 1:
            raise InputError(
                f"fastfpl {context.invoked_subcommand}: ranks must be one; got {ranks_asked()}: "
                "run and compare can be started by torchrun"
            )


# what several ranks play together
_RANKED = ("run", "compare")


_COMMANDS = (run, compare, report, encode, predict, export, adapt, serve, flower)
for _command in (*_COMMANDS, profile, methods, presets, quirks, doctor, data, new):
    group.add_command(_command)
