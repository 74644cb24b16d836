"""Where connections come in: strangers are turned away by name, guests are served by a thread each."""

import contextlib
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import LOG, SHARD, WORKER, Guest, Refused, receive
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.threads import Threads

_GREETING_SECONDS = 5.0
_PAUSE_SECONDS = 0.05  # before the next is let in, when the system could not let one in
_STRANGERS = 64  # connections that may be in the middle of their greeting
_FOR_SHARDS = frozenset({Kind.NORM, Kind.SETTLE, Kind.CLOSE})
_FOR_WORKERS = frozenset(
    {
        Kind.JOIN,
        Kind.BEAT,
        Kind.PUSH,
        Kind.ABANDON,
        Kind.PULL,
        Kind.READ,
        Kind.GRADIENT,
        Kind.LEAVE,
        Kind.TAKE,
        Kind.CLAIM,
        Kind.STATE,
        Kind.DRAIN,
    }
)


class Door:
    """Listens, greets, and gives each guest to ``serve`` until that returns or the connection breaks.

    ``refusals`` holds who was turned away and why. A log's line may be silent for ``log_silence_seconds``; others as
    long as they like. ``lines`` counts connections by worker; ``changed`` is told when one ends. ``threads``
    are its own, and those of what it opens to.
    """

    def __init__(
        self, listener: socket.socket, keys: Keys, name: str, most_data_bytes: int, log_silence_seconds: float
    ) -> None:
        self._listener, self._keys, self.threads = listener, keys, Threads(name)
        self._most, self._silence = most_data_bytes, log_silence_seconds
        self.refusals: deque[str] = deque(maxlen=64)
        self.lines = Counter[int]()
        self._closed = False
        self._strangers = threading.Semaphore(_STRANGERS)
        self._greeting: set[socket.socket] = set()
        self._wires: set[Wire] = set()

    @property
    def address(self) -> Address:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def open(self, serve: Callable[[Wire, Guest], None], changed: threading.Condition) -> None:
        """Begin to answer."""
        self.threads.start(self._accept, serve, changed)

    def close(self) -> None:
        """Stop listening, and break every connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._greeting):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for wire in list(self._wires):
            wire.close()

    def _accept(self, serve: Callable[[Wire, Guest], None], changed: threading.Condition) -> None:
        while not self._closed:
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed; or that one broke, or there are too many open files, which may end
                if not self._closed:
                    time.sleep(_PAUSE_SECONDS)
                continue
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            self._greeting.add(connection)
            self.threads.start(self._welcome, connection, str(address), serve, changed)

    def _welcome(
        self,
        connection: socket.socket,
        address: str,
        serve: Callable[[Wire, Guest], None],
        changed: threading.Condition,
    ) -> None:
        try:
            if self._closed:  # before this one was known as one that greets
                raise ConnectionAbortedError("the door is closed")
            connection.settimeout(_GREETING_SECONDS)
            guest = receive(connection, self._keys.token, self._keys.digest)
        except (Refused, OSError) as error:
            self.refusals.append(f"{address}: {error}")
            connection.close()
            return
        finally:
            self._strangers.release()
            self._greeting.discard(connection)
        silence = self._silence if guest.role == LOG else None
        wire = Wire(connection, most_data_bytes=self._most, silence_seconds=silence)
        with changed:
            self._wires.add(wire)
            self.lines[guest.worker] += guest.role == WORKER
            if self._closed:
                wire.close()
        try:
            serve(wire, guest)
        except BadFrame as error:
            self.refusals.append(f"{address}: {error}")
        except OSError:
            pass
        finally:
            with changed:
                self._wires.discard(wire)
                self.lines[guest.worker] -= guest.role == WORKER
                changed.notify_all()
            wire.close()


def keep_asking(connection: socket.socket, seconds: float) -> None:
    """Have the system break a connection whose other end it has not reached for about so long.

    A machine answers for its processes, however busy they are; one that is cut off does not.
    """
    each = max(1, round(seconds / 4))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", each), ("KEEPINTVL", each), ("KEEPCNT", 3), ("USER_TIMEOUT", 4000 * each)):
        if hasattr(socket, f"TCP_{name}"):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def check_asker(guest: Guest, head: Head) -> None:
    """Nobody speaks for another, and only of what is for it to ask. Raises BadFrame."""
    allowed = _FOR_SHARDS if guest.role == SHARD else _FOR_WORKERS
    if head.kind not in allowed or (guest.role != SHARD and head.worker != guest.worker):
        raise BadFrame(f"a {head.kind.name} of worker {head.worker} came from {guest}")


def check_join(meta: dict[str, Any]) -> int:
    """The incarnation that a worker says it was before. Raises BadFrame."""
    last = meta.get("last", 0)
    if type(last) is not int:
        raise BadFrame("a worker that joins tells of an incarnation that is no whole number")
    return last


def check_push(meta: dict[str, Any], pieces: int) -> None:
    """What a push tells must be of what there is. Raises BadFrame."""
    used, told, samples = meta.get("used", []), meta.get("losses", []), meta.get("samples", 0)
    whole = isinstance(used, list) and all(type(place) is int and 0 <= place < pieces for place in used)
    summed = isinstance(told, list) and all(
        isinstance(one, list) and len(one) == 3 and all(isinstance(value, int | float) for value in one) for one in told
    )
    if not whole or not summed or type(samples) is not int or not isinstance(meta.get("expected", 1.0), int | float):
        raise BadFrame("a push tells of parameters or losses that there are not")
