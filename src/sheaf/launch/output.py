"""Where workers write: worker 0 as this process would, the others' stderr line by line with their number."""

import codecs
import os
import sys
import time
from collections.abc import Callable
from selectors import EVENT_READ, BaseSelector, DefaultSelector
from typing import Any


class Output:
    """Two descriptors per worker for its stdout and stderr, and what reads their other ends.

    A stream that is this process's own file descriptor is handed to worker 0 as it is, so that a terminal stays a
    terminal; one that Python code replaced (a notebook's, a test's) is written to.
    """

    def __init__(self, workers: int, on_line: Callable[[int, str], None] | None) -> None:
        self.descriptors: list[tuple[int, int]] = []
        self._pipes: dict[int, _Pipe] = {}
        self._theirs: list[int] = []
        for rank in range(workers):
            self.descriptors.append(
                (self._make(rank, sys.stdout, 1, on_line), self._make(rank, sys.stderr, 2, on_line))
            )

    def _make(self, rank: int, stream: Any, number: int, on_line: Callable[[int, str], None] | None) -> int:
        if on_line is not None:
            return self._pipe(_Pipe(lambda line: on_line(rank, line), lines=True))
        if rank == 0 and _is_descriptor(stream, number):
            stream.flush()
            return self._own(os.dup(number))
        if rank == 0:
            return self._pipe(_Pipe(stream.write, lines=False))
        if number == 1:
            return self._own(os.open(os.devnull, os.O_WRONLY))
        return self._pipe(_Pipe(lambda line: stream.write(f"[worker {rank}] {line}\n"), lines=True))

    def _pipe(self, pipe: "_Pipe") -> int:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._pipes[ours] = pipe
        return self._own(theirs)

    def _own(self, descriptor: int) -> int:
        self._theirs.append(descriptor)
        return descriptor

    def handed_over(self) -> None:
        """Close this process's copies of the workers' ends."""
        while self._theirs:
            os.close(self._theirs.pop())

    def register(self, selector: BaseSelector) -> None:
        """Watch every pipe; ``data`` is None for them."""
        for descriptor in self._pipes:
            selector.register(descriptor, EVENT_READ)

    def pump(self, descriptor: int) -> bool:
        """Pass on what a worker wrote; False when it will write no more."""
        return self._pipes[descriptor].read(descriptor)

    def drain(self, seconds: float = 1.0) -> None:
        """Pass on the rest, for at most that long: a process that a worker started may outlive it."""
        deadline = time.monotonic() + seconds
        with DefaultSelector() as selector:
            self.register(selector)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if not self.pump(key.fd):
                        selector.unregister(key.fd)

    def close(self) -> None:
        """Close what is open."""
        self.handed_over()
        for descriptor in self._pipes:
            os.close(descriptor)
        self._pipes.clear()


class _Pipe:
    def __init__(self, write: Callable[[str], Any], *, lines: bool) -> None:
        self._write, self._lines = write, lines
        self._decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
        self._rest = ""

    def read(self, descriptor: int) -> bool:
        try:
            piece = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        text = self._rest + self._decode(piece, final=not piece)
        if not self._lines:
            if text:
                self._write(text)
            return bool(piece)
        *lines, self._rest = text.split("\n") if piece or not text else (*text.split("\n"), "")
        for line in lines:
            self._write(line)
        return bool(piece)


def _is_descriptor(stream: Any, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False
