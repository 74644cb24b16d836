"""The command line: one verb per file."""

from sheaf.cli.main import main

__all__ = ["main"]
