"""The two seats of a shard: the primary, which answers, and the backup, which gets every log entry before the answer.

Primary-backup (Alsberg and Day, 1976). When the two lose each other, both ask the run's store, and the first to ask
goes on alone; the other answers no one. So there are never two that answer, however the network is cut.
"""

import socket
import threading
import time
from dataclasses import replace
from typing import Protocol, runtime_checkable

from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import LOG, Guest, Refused, greet
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.shard import Entry

PRIMARY, BACKUP, RETIRED = "primary", "backup", "retired"


@runtime_checkable
class Store(Protocol):
    """A store that all workers share, such as torch's TCPStore."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set what is not set yet (``expected`` empty); gives what is set afterwards."""
        ...


class Throne:
    """Decides once which seat of a shard goes on alone."""

    def __init__(self, store: Store | None, key: str) -> None:
        self._store, self._key = store, key
        self._lock = threading.Lock()

    def claim(self, seat: str) -> bool:
        """Whether this seat is the one. False too when the store is gone: with it goes the run."""
        if self._store is None:
            return seat == PRIMARY
        try:
            with self._lock:
                return bytes(self._store.compare_set(self._key, "", seat)) == seat.encode()
        except RuntimeError:
            return False


class Mirror:
    """The primary's line to its backup: entries go in order, each is answered, and silence counts as loss."""

    def __init__(self, address: Address, shard: int, keys: Keys, most_data_bytes: int, lease: float) -> None:
        connection = socket.create_connection(address, timeout=lease)
        try:
            greet(connection, Guest(LOG, shard, 0), keys.token, keys.digest)
        except Refused:
            connection.close()
            raise
        self._wire = Wire(connection, most_data_bytes=most_data_bytes, silence_seconds=lease)
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self._sent = self._known = 0
        self.lost = False
        self._pause = lease / 4
        for what in (self._read, self._beat):
            threading.Thread(target=what, name=f"sheaf-shard-{shard}-mirror", daemon=True).start()

    def send(self, entry: Entry) -> int:
        """Send an entry; its place in the log. A loss shows in ``wait``."""
        with self._sending:
            self._sent += 1
            head = Head(
                entry.kind, entry.worker, entry.incarnation, entry.sequence, self._sent, entry.clock, entry.base
            )
            try:
                self._wire.send(head, entry.meta, entry.arena.raw if entry.arena is not None else None)
            except OSError:
                self._lose()
            return self._sent

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
        while not self.lost:
            time.sleep(self._pause)
            with self._sending:
                try:
                    self._wire.send(Head(Kind.BEAT))
                except OSError:
                    self._lose()

    def _lose(self) -> None:
        with self._state:
            self.lost = True
            self._state.notify_all()
        self._wire.close()


def entry_of(head: Head, meta: dict[str, object]) -> Entry:
    """The log entry that a message carries, without its data."""
    return Entry(head.kind, head.worker, head.incarnation, head.sequence, head.clock, head.base, dict(meta))


def committing(entry: Entry) -> Entry:
    """The same message as the log has it."""
    return replace(entry, kind=Kind.COMMIT)
