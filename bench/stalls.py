"""Stops a process for a second now and then (SIGSTOP, SIGCONT), at moments drawn from a seed.

``python -m bench.stalls PID`` reads lines: a number begins stalls drawn from that seed, an empty line ends them, and
each line is answered by one. A contender's every turn is thus given the stalls that the others' turns have.
"""

import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

STALL_SECONDS = 1.0
BETWEEN_SECONDS = 1.0  # between two stalls: on the average


@contextmanager
def stalls(pid: int) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Gives what stalls that process while a turn of that number lasts; the same moments for the same number."""
    other = subprocess.Popen(
        [sys.executable, "-m", "bench.stalls", str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def tell(line: str) -> None:
        assert other.stdin is not None
        assert other.stdout is not None
        print(line, file=other.stdin, flush=True)
        if not other.stdout.readline():
            raise RuntimeError("the process that stalls another has ended")

    @contextmanager
    def turn(number: int) -> Iterator[None]:
        tell(str(number))
        try:
            yield
        finally:
            tell("")

    try:
        tell("")  # it is there
        yield turn
    finally:
        other.terminate()
        other.wait()


def main(pid: int) -> None:
    """Do what is read on standard input, until that ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    drawn: random.Random | None = None
    stopped = False
    try:
        while True:
            seconds = None
            if drawn is not None:
                seconds = STALL_SECONDS if stopped else drawn.uniform(0, 2 * BETWEEN_SECONDS)
            line = _line(seconds)
            if line is None:  # its time has come
                stopped = not stopped
                os.kill(pid, signal.SIGSTOP if stopped else signal.SIGCONT)
                continue
            if stopped:
                stopped = False
                os.kill(pid, signal.SIGCONT)
            if not line:
                return
            drawn = random.Random(int(line)) if line.strip() else None
            print(flush=True)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _line(seconds: float | None) -> str | None:
    """The next line, empty at the end; None where none has come in so many seconds."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.readline() if ready else None


if __name__ == "__main__":
    main(int(sys.argv[1]))
