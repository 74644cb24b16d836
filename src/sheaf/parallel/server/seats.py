"""The two seats of a shard: the primary, which answers, and the backup, which gets every log entry before the answer.

Primary-backup (Alsberg and Day, 1976). When the two lose each other, both ask the run's store, and the first to ask
goes on alone; the other answers no one. So there are never two that answer, however the network is cut.
"""

import socket
import threading
from typing import Any, Protocol, runtime_checkable

from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import LOG, Guest, greet
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.log import Entry
from sheaf.parallel.server.threads import Threads

PRIMARY, BACKUP, RETIRED = "primary", "backup", "retired"


@runtime_checkable
class Store(Protocol):
    """A store that all workers share, such as torch's TCPStore."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set what is not set yet (``expected`` empty); gives what is set afterwards."""
        ...


class Throne:
    """Decides once for each pair of seats which of them goes on alone. ``generation`` counts the pairs."""

    def __init__(self, store: Store | None, key: str) -> None:
        self._store, self._key = store, key
        self.generation = 0
        self._lock = threading.Lock()

    def claim(self, seat: str, generation: int | None = None) -> bool:
        """Whether this seat of its pair is the one. False too when the store is gone: with it goes the run."""
        if self._store is None:
            return seat == PRIMARY
        key = f"{self._key}/{self.generation if generation is None else generation}"
        try:
            with self._lock:
                return bytes(self._store.compare_set(key, "", seat)) == seat.encode()
        except RuntimeError:
            return False


class Mirror:
    """The primary's line to its backup: entries go in order, each is answered, and silence counts as loss."""

    def __init__(
        self,
        address: Address,
        shard: int,
        keys: Keys,
        most_data_bytes: int,
        lease: float,
        threads: Threads,
        generation: int = 0,
    ) -> None:
        self.generation = generation  # of the pair of seats
        connection = socket.create_connection(address, timeout=lease)
        try:
            greet(connection, Guest(LOG, shard, 0), keys.token, keys.digest)
        except BaseException:
            connection.close()
            raise
        self._wire = Wire(connection, most_data_bytes=most_data_bytes, silence_seconds=lease)
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self._sent = self._known = 0
        self._first = 0  # the place from which on the log goes to the other seat
        self._over = threading.Event()
        self._pause = lease / 4
        for what in (self._read, self._beat):
            threads.start(what)

    def send(self, entry: Entry) -> int:
        """Send an entry; its place in the log. A loss shows in ``wait``."""
        head = Head(entry.kind, entry.worker, entry.incarnation, entry.sequence, 0, entry.clock, entry.base)
        return self._entry(head, entry.meta, entry.arena.raw if entry.arena is not None else None)

    def _entry(self, head: Head, meta: dict[str, Any], data: memoryview | None) -> int:
        with self._sending:
            self._sent += 1
            try:
                self._wire.send(head._replace(request=self._sent), meta, data)
            except OSError:
                self._lose()
            return self._sent

    def move(self, state: bytes, last: int, most: int) -> int:
        """Send all that the log has led to so far, in parts of at most so many bytes; the place of the last entry."""
        with self._state:
            self._sent = self._known = last
        for start in range(0, len(state), most):
            part = memoryview(state)[start : start + most]
            meta = {"start": start, "total": len(state), "generation": self.generation}
            self._first = self._entry(Head(Kind.MOVE), meta, part)
        return self._sent

    @property
    def lost(self) -> bool:
        """Whether the backup is."""
        return self._over.is_set()

    @property
    def settled(self) -> bool:
        """Whether the other seat has all of the log's past."""
        return self._known >= self._first

    def wait(self, place: int) -> bool:
        """Whether the backup has the log up to that place; False when it is lost."""
        with self._state:
            self._state.wait_for(lambda: self._known >= place or self.lost)
            return self._known >= place

    def close(self) -> None:
        """Hang up; the backup takes it for a loss."""
        self._lose()

    def _read(self) -> None:
        try:
            while True:
                head = self._wire.head()
                self._wire.skip(head)
                with self._state:
                    self._known = max(self._known, head.request)
                    self._state.notify_all()
        except (OSError, BadFrame):
            self._lose()

    def _beat(self) -> None:
        while not self._over.wait(self._pause):
            with self._sending:
                try:
                    self._wire.send(Head(Kind.BEAT))
                except OSError:
                    self._lose()

    def _lose(self) -> None:
        with self._state:
            self._over.set()
            self._state.notify_all()
        self._wire.close()


def entry_of(head: Head, meta: dict[str, object]) -> Entry:
    """The log entry that a message carries, without its data."""
    return Entry(head.kind, head.worker, head.incarnation, head.sequence, head.clock, head.base, dict(meta))


def committing(entry: Entry) -> Entry:
    """The same message as the log has it."""
    return Entry(
        Kind.COMMIT, entry.worker, entry.incarnation, entry.sequence, entry.clock, entry.base, entry.meta, entry.arena
    )
