"""Programs forked from the rank pool's process, which has imported what they import: seconds sooner than started."""

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path


class Nursery:
    """The process that `sheaf.launch` forks workers from, as it would see it by `subprocess`."""

    def __init__(self, pid: int, reaped: Callable[[int], int | None]):
        """``reaped`` tells how the process ended, once it did: its exit code, or minus the signal that ended it."""
        self.pid, self.returncode = pid, None
        self._reaped, self._file = reaped, os.pidfd_open(pid)

    returncode: int | None

    def wait(self, timeout: float | None = None) -> int | None:
        """How it ended; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._file, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
            self.returncode = self._reaped(self.pid)
            os.close(self._file)
        return self.returncode

    def kill(self) -> None:
        """End it."""
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send it a signal; none to one that has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._file, number)


class Program(Nursery):
    """A Python file that runs as if `subprocess` had started it, and writes to two files."""

    def __init__(self, pid: int, reaped: Callable[[int], int | None], written: list[Path]):
        super().__init__(pid, reaped)
        self._written = written

    def poll(self) -> int | None:
        """How it ended, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, when it has ended; raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._written)
        return out, err
