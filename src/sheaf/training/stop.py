"""SIGINT and SIGTERM while training: a wish to stop after the step under way, not an end in the middle of it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stopping(request_stop: Callable[[], None], *, alone: bool) -> Iterator[None]:
    """Call ``request_stop`` at SIGINT and SIGTERM. When ``alone``, a second one ends the process as it always would.

    Workers that were launched get the wish twice at times (from the terminal and from their launcher), and it is the
    launcher that kills them at the second. In a thread nothing is done: only the main thread hears signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        request_stop()
        asked.append(number)
        if alone and len(asked) > 1:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
