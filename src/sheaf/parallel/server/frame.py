"""What travels between workers and shards: a header of fixed size, a little JSON, and raw bytes of tensors.

Sizes stand in the header and are checked against limits before anything of that size is received. Nothing is pickled.
"""

import json
import socket
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple

from sheaf.cluster.traffic import traffic

MAGIC, VERSION = b"SHFS", 1
_HEAD = struct.Struct("<4sBBxxiQQQqqIQ")  # the fields of Head between magic and version, and the checksum
_SUM = struct.Struct("<I")
HEAD_BYTES = _HEAD.size + _SUM.size
MOST_META_BYTES = 1 << 20
_SCRATCH = 1 << 16


class Kind(IntEnum):
    """What a message asks, tells or answers."""

    JOIN = 1  # a worker, or its next incarnation, is here
    BEAT = 2  # it lives
    PUSH = 3  # its gradient, kept until it says more
    ABANDON = 4  # the gradient kept is not to be applied
    PULL = 5  # every shard has the gradient: apply it; then the values, when the clock allows
    READ = 6  # the values, when every worker has come so far
    GRADIENT = 7  # the last summed gradient
    NORM = 8  # (between shards) the square of the norm of a clock's gradient
    SETTLE = 9  # (between shards) what came of a worker that is given up
    LEAVE = 10  # a worker is done, or given up
    FENCE = 11  # (in the log) an incarnation is no longer heard
    COMMIT = 12  # (in the log) a gradient is to be applied
    APPLY = 13  # (in the log) the gradients of a clock meet
    PULLED = 14  # (in the log) a worker has read the values
    MIRROR = 15  # (to the backup) this connection carries the log
    TAKE = 16  # shares are stolen: lend me a microbatch
    CLAIM = 17  # every shard has my push: does it count?
    CLOSE = 18  # (from shard 0 to the others, and in the log) the pushes that a clock is made of
    RETURN = 19  # (in the log) what a worker was lent goes to others
    STATE = 20  # all of the shard's state, piece by piece
    MOVE = 21  # (to a seat that is to be the backup) a part of all that the log has led to
    DRAIN = 22  # apply what was gathered: no step follows
    ACK = 64
    VALUES = 65
    BUSY = 66  # still waiting: ask me no more
    FENCED = 67  # this incarnation was given up
    ELSEWHERE = 68  # the shard's other seat answers for it
    FAILED = 69  # the step cannot be applied; meta says why


_KINDS = {int(kind): kind for kind in Kind}
_JSON, _UNPACKED = json.JSONEncoder(separators=(",", ":")).encode, json.JSONDecoder().raw_decode


class Head(NamedTuple):
    """The fixed part of a message. ``clock`` is a step's number, ``base`` the shard's version that was pulled."""

    kind: Kind
    worker: int = -1
    incarnation: int = 0
    sequence: int = 0
    request: int = 0  # what an answer answers
    clock: int = 0
    base: int = 0
    meta_bytes: int = 0
    data_bytes: int = 0


class BadFrame(Exception):
    """Bytes that are no message, or a message larger than both ends agreed on."""


class Closed(ConnectionError):
    """The other end closed the connection."""


class Wire:
    """One connection, from which messages are read and to which they are written; not by several threads at once.

    Small messages are read several at a time. A small answer to one of them may wait for the answer to the next, and
    leave with it.
    """

    def __init__(self, connection: socket.socket, *, most_data_bytes: int, silence_seconds: float | None) -> None:
        self.connection, self._most = connection, most_data_bytes
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # the system's own time-out: Python's would ask the system twice for every piece
        connection.settimeout(None)
        if silence_seconds is not None:
            seconds = int(silence_seconds)
            limit = struct.pack("ll", seconds, max(1, int((silence_seconds - seconds) * 1e6)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._come = memoryview(bytearray(_SCRATCH))
        self._start = self._stop = 0  # of what has come and was not read
        self._held = b""
        self.sent_bytes = 0
        self._ends = _ends(connection)

    @property
    def has_next(self) -> bool:
        """Whether the fixed part of a next message has come already."""
        return self._stop - self._start >= HEAD_BYTES

    @property
    def has_some(self) -> bool:
        """Whether some of what comes next has come already."""
        return self._stop > self._start

    def send(
        self,
        head: Head,
        meta: dict[str, Any] | None = None,
        data: memoryview | None = None,
        *,
        then: Head | None = None,
        hold: bool = False,
    ) -> None:
        """Write a message; its sizes are filled in. With ``then`` that one too, which has a fixed part only.

        With ``hold`` it goes out together with the next. Raises OSError when the other end is gone.
        """
        size = data.nbytes if data is not None else 0
        first = self._held + _packed(head, meta, size)
        last = b"" if then is None else _packed(then, None, 0)
        if hold and not size:
            self._held = first
            return
        self._held = b""
        self.sent_bytes += len(first) + size + len(last)
        traffic.line(self._ends, len(first) + size + len(last))
        if data is None or not size:
            self.connection.sendall(first + last)
            return
        sent = self.connection.sendmsg([first, data, last])
        if sent == len(first) + size + len(last):
            return
        for part in (memoryview(first), data, memoryview(last)):
            if sent < part.nbytes:
                self.connection.sendall(part[sent:])
            sent = max(0, sent - part.nbytes)

    def head(self) -> Head:
        """Read the fixed part of the next message. Raises BadFrame, Closed, TimeoutError and OSError."""
        while not self.has_next:
            self._more()
        start = self._start
        self._start = start + HEAD_BYTES
        (checksum,) = _SUM.unpack_from(self._come, start + _HEAD.size)
        magic, version, kind, *rest = _HEAD.unpack_from(self._come, start)
        if magic != MAGIC or zlib.crc32(self._come[start : start + _HEAD.size]) != checksum:
            raise BadFrame("these bytes are no message of a parameter server")
        if version != VERSION or kind not in _KINDS:
            raise BadFrame(f"message {kind} of version {version}; this is version {VERSION}")
        found = Head(_KINDS[kind], *rest)
        if found.meta_bytes > MOST_META_BYTES or found.data_bytes > self._most:
            raise BadFrame(
                f"a message of {found.meta_bytes} + {found.data_bytes} bytes, where at most {MOST_META_BYTES} + "
                f"{self._most} were agreed on"
            )
        return found

    def meta(self, head: Head) -> dict[str, Any]:
        """Read the JSON that follows the fixed part."""
        if not head.meta_bytes:
            return {}
        size, start = head.meta_bytes, self._start
        if self._stop - start >= size:  # as nearly always: it came with the fixed part
            self._start += size
            told = self._come[start : start + size]
        else:
            told = memoryview(bytearray(size))
            self._into(told)
        try:
            text = str(told, "utf-8")
            found, end = _UNPACKED(text)
        except (ValueError, RecursionError):
            raise BadFrame("what a message tells is no JSON") from None
        if end < len(text):
            raise BadFrame("what a message tells is more than JSON")
        if not isinstance(found, dict):
            raise BadFrame(f"what a message tells is a {type(found).__name__}; a dict was wanted")
        return found

    def data(self, head: Head, into: memoryview) -> None:
        """Read the bytes that follow into ``into``, which must have that size."""
        agreed(head, into)
        self._into(into)

    def some(self, into: memoryview) -> int:
        """Read what has come of the bytes that follow, one at least, into the start of ``into``; how many."""
        if self._stop == self._start and into.nbytes < _SCRATCH:
            self._more()
        count = min(self._stop - self._start, into.nbytes)
        if not count:
            return self._received(into)
        into[:count] = self._come[self._start : self._start + count]
        self._start += count
        return count

    def skip(self, head: Head) -> None:
        """Read the bytes that follow, and forget them."""
        left, scratch = head.data_bytes, memoryview(bytearray(min(head.data_bytes, _SCRATCH)))
        while left:
            part = scratch[: min(left, _SCRATCH)]
            self._into(part)
            left -= part.nbytes

    def close(self) -> None:
        """Close the connection, also under a thread that reads from it."""
        for end in (lambda: self.connection.shutdown(socket.SHUT_RDWR), self.connection.close):
            try:
                end()
            except OSError:
                continue

    def _into(self, view: memoryview) -> None:
        while view.nbytes:
            view = view[self.some(view) :]

    def _more(self) -> None:
        """Take what has come, behind what is left of what came before."""
        left = self._stop - self._start
        if self._start and left:
            self._come[:left] = bytes(self._come[self._start : self._stop])
        self._start, self._stop = 0, left
        self._stop += self._received(self._come[left:])

    def _received(self, view: memoryview) -> int:
        try:
            count = self.connection.recv_into(view)
        except BlockingIOError:
            raise TimeoutError("nothing came for too long") from None
        if not count:
            raise Closed("the other end closed the connection")
        return count


def agreed(head: Head, into: memoryview) -> None:
    """Raise BadFrame where other bytes follow than there is room for."""
    if head.data_bytes != into.nbytes:
        raise BadFrame(f"{head.data_bytes} bytes came where {into.nbytes} were agreed on")


def _ends(connection: socket.socket) -> tuple[Any, Any]:
    try:
        return connection.getsockname(), connection.getpeername()
    except OSError:  # it is gone already, which whoever reads or writes will see
        return "", ""


def _packed(head: Head, meta: dict[str, Any] | None, size: int) -> bytes:
    told = _JSON(meta).encode() if meta else b""
    packed = _HEAD.pack(MAGIC, VERSION, head.kind, *head[1:7], len(told), size)
    return packed + _SUM.pack(zlib.crc32(packed)) + told
