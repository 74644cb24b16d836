"""What `sheaf.launch` starts as a program, forked from the rank pool's process instead: seconds sooner."""

import contextlib
import os
import select
import signal
import subprocess
from typing import Any


class Nursery:
    """The process that `sheaf.launch` forks workers from, as it would see it by `subprocess`."""

    def __init__(self, pool: Any, pid: int):
        self.pid, self.returncode = pid, None
        self._pool, self._file = pool, os.pidfd_open(pid)

    returncode: int | None

    def wait(self, timeout: float | None = None) -> int | None:
        """How it ended; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._file, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired("nursery", timeout or 0.0)
            (self.returncode,) = self._pool._ask({"do": "wait", "pids": [self.pid]})
            os.close(self._file)
        return self.returncode

    def kill(self) -> None:
        """End it."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._file, signal.SIGKILL)
