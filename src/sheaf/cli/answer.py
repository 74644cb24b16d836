"""What a verb answers with: text for people, or exactly one JSON object on standard output."""

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleDimensions

from sheaf.api.saying import say
from sheaf.errors import SheafError

_WIDEST = 1_000_000  # columns: more than any table takes, which is then as wide as what it holds


def rank() -> int:
    """This process's number among torchrun's workers; 0 when alone."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["RANK"]) if launched else 0


def leads() -> bool:
    """Whether this process is the one that prints."""
    return rank() == 0


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; in a pipe or a file as wide as what is printed, for grep and ``less -S``.

    It prints on worker 0 only.
    """
    made = Console(stderr=stderr, highlight=False, soft_wrap=False, quiet=not leads())
    # Not what rich asks: FORCE_COLOR wants colours in a pipe, and COLUMNS, which programs hand to those that they
    # start, says nothing of one.
    if not made.file.isatty():
        made.size = ConsoleDimensions(_WIDEST, made.height)
    return made


def note(line: str) -> None:
    """Say on standard error what is being done; on worker 0 only."""
    if leads():
        say(line)


class Answer:
    """Takes a verb's one answer and prints it when the block ends.

    With ``as_json`` standard output carries one JSON object and nothing else: whatever is printed inside the block, by
    this process or by workers it starts, goes to standard error. A SheafError is answered as
    ``{"error": message, "kind": class}`` and goes on to the caller.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._values: dict[str, Any] = {}
        self._show: Callable[[Console], None] | None = None
        self._undo = ExitStack()

    def give(self, values: dict[str, Any], show: Callable[[Console], None]) -> None:
        """The answer as values for JSON, and as a function that prints it for people."""
        self._values, self._show = values, show

    def __enter__(self) -> "Answer":  # noqa: PYI034  beartype knows no Self
        if self.as_json:
            sys.stdout.flush()
            if _is_descriptor_1():
                own = os.dup(1)
                os.dup2(2, 1)
                self._undo.callback(_restore, own)
            else:
                self._undo.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        if not leads():
            return
        if error is None and not self.as_json and self._show is not None:
            self._show(console())
        elif self.as_json and error is None:
            print(as_json(self._values))
        elif self.as_json and isinstance(error, SheafError):
            print(as_json({"error": str(error), "kind": type(error).__name__}))


def as_json(values: dict[str, Any]) -> str:
    """One line of JSON; numbers that JSON has no word for (NaN, infinities) become null.

    >>> as_json({"verdict": "wrong", "max_loss_error": float("nan")})
    '{"verdict": "wrong", "max_loss_error": null}'
    """
    return json.dumps(_plain(values))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _is_descriptor_1() -> bool:
    try:
        return sys.stdout.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False


def _restore(own: int) -> None:
    sys.stdout.flush()
    os.dup2(own, 1)
    os.close(own)
