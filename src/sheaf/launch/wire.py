"""Messages between a launcher and the processes it started: a length, then that many bytes, over private sockets."""

import socket
import struct

_LENGTH = struct.Struct("!Q")


def send(connection: socket.socket, payload: bytes) -> None:
    """Write one message."""
    connection.sendall(_LENGTH.pack(len(payload)))
    connection.sendall(payload)


def receive(connection: socket.socket) -> bytes | None:
    """Read one message, waiting for it; None when the other side is gone."""
    inbox = Inbox(connection)
    while not inbox.messages and inbox.read(exactly=True):
        pass
    return inbox.messages[0] if inbox.messages else None


class Inbox:
    """Collects messages from a socket as they come, without waiting for the rest of one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.messages: list[bytes] = []
        self._buffer = bytearray()

    def read(self, *, exactly: bool = False) -> bool:
        """Take what has arrived, with ``exactly`` never beyond the message begun; False when the other side is gone."""
        try:
            piece = self.connection.recv(min(self._missing(), 1 << 20) if exactly else 1 << 20)
        except ConnectionError:
            return False
        self._buffer += piece
        while (size := self._size()) is not None and len(self._buffer) >= size:
            self.messages.append(bytes(self._buffer[_LENGTH.size : size]))
            del self._buffer[:size]
        return bool(piece)

    def _size(self) -> int | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        return _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]

    def _missing(self) -> int:
        size = self._size()
        return (_LENGTH.size if size is None else size) - len(self._buffer)
