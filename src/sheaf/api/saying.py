"""Telling people what is under way."""

import sys


def say(line: str) -> None:
    """Tell on standard error what is under way."""
    print(f"{line} ...", file=sys.stderr, flush=True)


def say_nothing(_line: str) -> None:
    """Tell nobody."""
