"""Threads that are over before Python is.

A daemon thread that is in torch's C++ when the interpreter ends is unwound through it, and the process aborts:
"terminate called without an active exception" (CPython's documentation of ``threading`` warns that daemon threads are
"abruptly stopped at shutdown").
"""

import threading
import time
from collections.abc import Callable

_END_SECONDS = 5.0  # how long the end of all is waited for


def soon() -> float:
    """Until when the end of threads is waited for, as ``time.monotonic`` has it."""
    return time.monotonic() + _END_SECONDS


class Threads:
    """Threads of one owner, that end soon after it was closed; none keeps the process from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, target: Callable[..., object], *given: object) -> None:
        """Call ``target`` in a thread of its own."""
        thread = threading.Thread(target=target, args=given, name=self._name, daemon=True)
        with self._lock:
            self._started = [one for one in self._started if one.is_alive()]
            thread.start()
            self._started.append(thread)

    def join(self, until: float | None = None) -> bool:
        """Wait for all of them, but the one that calls, and for those that they start meanwhile; whether they are over.

        Until that time (``time.monotonic``), or for some seconds.
        """
        until = soon() if until is None else until
        while waited := self._living():
            for one in waited:
                one.join(max(0.0, until - time.monotonic()))
            if time.monotonic() > until:
                return not self._living()
        return True

    def _living(self) -> list[threading.Thread]:
        with self._lock:
            return [one for one in self._started if one.is_alive() and one is not threading.current_thread()]
