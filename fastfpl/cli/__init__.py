"""The command line, one file a command."""

from fastfpl.cli.entry import main

__all__ = ["main"]
