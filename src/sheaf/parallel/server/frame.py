"""What travels between workers and shards: a header of fixed size, a little JSON, and raw bytes of tensors.

Sizes stand in the header and are checked against limits before anything of that size is received. Nothing is pickled.
"""

import json
import socket
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple

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
    ACK = 64
    VALUES = 65
    BUSY = 66  # still waiting: ask me no more
    FENCED = 67  # this incarnation was given up
    ELSEWHERE = 68  # the shard's other seat answers for it
    FAILED = 69  # the step cannot be applied; meta says why


_KINDS = frozenset(int(kind) for kind in Kind)


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
    """One connection, from which messages are read and to which they are written; not by several threads at once."""

    def __init__(self, connection: socket.socket, *, most_data_bytes: int, silence_seconds: float | None) -> None:
        self.connection, self._most = connection, most_data_bytes
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(silence_seconds)
        self._head = bytearray(HEAD_BYTES)
        self.sent_bytes = 0

    def send(self, head: Head, meta: dict[str, Any] | None = None, data: memoryview | None = None) -> None:
        """Write a message; its sizes are filled in. Raises OSError when the other end is gone."""
        told = json.dumps(meta).encode() if meta else b""
        size = data.nbytes if data is not None else 0
        packed = _HEAD.pack(MAGIC, VERSION, head.kind, *head[1:7], len(told), size)
        first = packed + _SUM.pack(zlib.crc32(packed)) + told
        self.sent_bytes += len(first) + size
        if data is None or not size:
            self.connection.sendall(first)
            return
        sent = self.connection.sendmsg([first, data])
        if sent < len(first):
            self.connection.sendall(first[sent:])
            sent = len(first)
        if sent < len(first) + size:
            self.connection.sendall(data[sent - len(first) :])

    def head(self) -> Head:
        """Read the fixed part of the next message. Raises BadFrame, Closed, TimeoutError and OSError."""
        self._into(memoryview(self._head))
        packed, (checksum,) = self._head[: _HEAD.size], _SUM.unpack_from(self._head, _HEAD.size)
        magic, version, kind, *rest = _HEAD.unpack(packed)
        if magic != MAGIC or zlib.crc32(packed) != checksum:
            raise BadFrame("these bytes are no message of a parameter server")
        if version != VERSION or kind not in _KINDS:
            raise BadFrame(f"message {kind} of version {version}; this is version {VERSION}")
        found = Head(Kind(kind), *rest)
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
        told = bytearray(head.meta_bytes)
        self._into(memoryview(told))
        try:
            found = json.loads(told)
        except (ValueError, RecursionError):
            raise BadFrame("what a message tells is no JSON") from None
        if not isinstance(found, dict):
            raise BadFrame(f"what a message tells is a {type(found).__name__}; a dict was wanted")
        return found

    def data(self, head: Head, into: memoryview) -> None:
        """Read the bytes that follow into ``into``, which must have that size."""
        if head.data_bytes != into.nbytes:
            raise BadFrame(f"{head.data_bytes} bytes came where {into.nbytes} were agreed on")
        self._into(into)

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
            count = self.connection.recv_into(view)
            if not count:
                raise Closed("the other end closed the connection")
            view = view[count:]
