"""Who is in which meeting, agreed through the store that all workers share; nobody waits for one who is late."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sheaf.errors import WorkerFailed

PART_BYTES = 4 * 2**20  # a store takes no messages without bound
KEPT = 2  # meetings whose outcome stays for those who missed them
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.016  # between looks at the board
_THERE, _GONE = b"+", b"-"


@runtime_checkable
class Store(Protocol):
    """What is asked of ``torch.distributed.Store``."""

    def set(self, key: str, value: Any, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


@dataclass(frozen=True)
class Closed:
    """A meeting that is over: what each worker told that was there, by worker, in order."""

    told: dict[int, dict[str, Any]]

    @property
    def present(self) -> tuple[int, ...]:
        """Who was there."""
        return tuple(sorted(self.told))


class Board:
    """Meetings by number. One is closed when all are there, or ``grace_seconds`` after ``quorum`` of them were.

    Whoever finds that it is time writes down who is there; the store takes the first such note, so all read the same
    one, and a worker that it does not name was late, whenever it came. ``clock`` and ``pause`` are for tests.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        worker: int,
        workers: int,
        *,
        quorum: int,
        grace_seconds: float,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._name, self._worker, self._workers = store, name, worker, workers
        self._quorum, self._grace, self._timeout = quorum, grace_seconds, timeout_seconds
        self._clock, self._pause = clock, pause

    def closed(self, meeting: int) -> Closed | None:
        """How a meeting ended; None while it has not."""
        key = self._key(meeting, "closed")
        return _read(self._store.get(key)) if self._store.check([key]) else None

    def arrive(self, meeting: int, told: dict[str, Any], *, brings: bool = True, bringing: int | None = None) -> Closed:
        """Be there, tell the others something of what JSON knows, and wait until it is closed.

        As many as the quorum must bring something, or as many as can (``bringing``; None: all). Raises WorkerFailed
        when too few come.
        """
        enough = min(self._quorum, self._workers if bringing is None else bringing)
        self._store.set(self._key(meeting, f"worker{self._worker}"), json.dumps(told))
        self._store.add(self._key(meeting, "brought"), int(brings))
        self._store.add(self._key(meeting, "count"), 1)
        began, enough_since, pause = self._clock(), None, _PAUSE_SECONDS
        while True:
            found = self.closed(meeting)
            if found is not None:
                return found
            count, now = self._store.add(self._key(meeting, "count"), 0), self._clock()
            brought = self._store.add(self._key(meeting, "brought"), 0)
            if count >= self._quorum and brought >= enough and enough_since is None:
                enough_since = now
            if count == self._workers or (enough_since is not None and now - enough_since >= self._grace):
                return self._close(meeting)
            if now - began > self._timeout:
                raise WorkerFailed(
                    f"only {count} of {self._workers} workers came to meeting {meeting} within {self._timeout:.0f} s, "
                    f"and {self._quorum} are needed: look at the output of the others"
                )
            self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def leave(self, meeting: int) -> None:
        """This worker will not ask about the meeting again; the last to say so clears the board of it."""
        if self._store.add(self._key(meeting, "left"), 1) == self._workers:
            names = (
                "closed",
                "count",
                "brought",
                "left",
                "outcome",
                *(f"worker{worker}" for worker in range(self._workers)),
            )
            for key in (*self._outcome_keys(meeting), *(self._key(meeting, name) for name in names)):
                self._store.delete_key(key)

    def post(self, meeting: int, content: bytes) -> None:
        """Leave the outcome of a meeting for those who missed it; that of an earlier one goes."""
        parts = [content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
        for index, part in enumerate(parts):
            self._store.set(self._key(meeting, f"outcome{index}"), _THERE + part)
        self._store.set(self._key(meeting, "outcome"), str(len(parts)))
        if meeting >= KEPT:
            self._forget(meeting - KEPT)

    def outcome(self, meeting: int) -> bytes | None:
        """The outcome of a meeting that this worker missed, as soon as it is there.

        None when it has been taken away: the others are further. Raises WorkerFailed when it never comes.
        """
        key, began = self._key(meeting, "outcome"), self._clock()
        while not self._store.check([key]):
            if self.closed(meeting + KEPT) is not None:
                return None
            if self._clock() - began > self._timeout:
                raise WorkerFailed(
                    f"worker {self._worker} missed meeting {meeting}, and nobody told it how that ended within "
                    f"{self._timeout:.0f} s: look at the output of the others"
                )
            self._pause(_LONGEST_PAUSE_SECONDS)
        found = [self._store.get(part) for part in self._outcome_keys(meeting)]
        return b"".join(part[1:] for part in found) if all(part[:1] == _THERE for part in found) else None

    def _outcome_keys(self, meeting: int) -> list[str]:
        key = self._key(meeting, "outcome")
        count = int(self._store.get(key)) if self._store.check([key]) else 0
        return [self._key(meeting, f"outcome{index}") for index in range(count)]

    def _forget(self, meeting: int) -> None:
        """Take away the content of an outcome, but not its keys: a store waits for a key that is not there."""
        for key in self._outcome_keys(meeting):
            self._store.set(key, _GONE)

    def _close(self, meeting: int) -> Closed:
        there: dict[int, dict[str, Any]] = {}
        for worker in range(self._workers):
            key = self._key(meeting, f"worker{worker}")
            if self._store.check([key]):
                there[worker] = json.loads(self._store.get(key))
        note = json.dumps([[worker, told] for worker, told in there.items()])
        return _read(self._store.compare_set(self._key(meeting, "closed"), "", note))

    def _key(self, meeting: int, what: str) -> str:
        return f"{self._name}/{meeting}/{what}"


def _read(note: bytes) -> Closed:
    return Closed({int(worker): told for worker, told in json.loads(note)})
