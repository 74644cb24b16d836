"""The first words on a connection: both ends prove that they know the run's token, and mean the same task.

The token itself never travels: each end answers the other's random challenge with a keyed hash (HMAC, RFC 2104),
compared in constant time. All of it has a fixed size, so bytes from strangers cost nothing; and it must be there within
the connection's time-out, however slowly it comes.
"""

import hmac
import os
import socket
import struct
import time
from typing import NamedTuple

MAGIC = b"SHFH\x01"
_NONCE = 32
_HELLO = struct.Struct("<5sBiQ32s32s32s")  # magic, role, worker, incarnation, task digest, nonce, proof
_ANSWER = struct.Struct("<B32s")
WELCOME, NOT_A_HELLO, WRONG_TOKEN, OTHER_TASK = range(4)
WORKER, SHARD, LOG = range(3)  # who connects: a worker, another shard, or the primary with its log
WHY = {
    NOT_A_HELLO: "its first bytes were no greeting",
    WRONG_TOKEN: "its token is wrong",
    OTHER_TASK: "it is of another task or plan",
}


class Guest(NamedTuple):
    """Who connected."""

    role: int
    worker: int
    incarnation: int


class Refused(Exception):
    """One end does not take the other; ``reason`` is one of WRONG_TOKEN, OTHER_TASK, NOT_A_HELLO."""

    def __init__(self, reason: int) -> None:
        self.reason = reason
        super().__init__(f"refused: {WHY[reason]}")


def greet(connection: socket.socket, guest: Guest, token: bytes, digest: bytes) -> None:
    """As the one who connects. Raises Refused, and OSError when the other end goes away or is too slow."""
    until = _until(connection)
    challenge = _exactly(connection, _NONCE, until)
    nonce = os.urandom(_NONCE)
    fields = MAGIC + struct.pack("<BiQ", *guest) + digest + nonce
    connection.sendall(fields + _proof(token, b"hello", challenge, fields))
    status, proof = _ANSWER.unpack(_exactly(connection, _ANSWER.size, until))
    if status != WELCOME:
        raise Refused(status if status in WHY else NOT_A_HELLO)
    if not hmac.compare_digest(proof, _proof(token, b"welcome", nonce, challenge)):
        raise Refused(WRONG_TOKEN)


def receive(connection: socket.socket, token: bytes, digest: bytes) -> Guest:
    """As the one who listens. Raises Refused after telling the other end, OSError when that goes away or is slow."""
    challenge, until = os.urandom(_NONCE), _until(connection)
    connection.sendall(challenge)
    told = _exactly(connection, _HELLO.size, until)
    magic, role, worker, incarnation, theirs, nonce, proof = _HELLO.unpack(told)
    reason = WELCOME
    if magic != MAGIC or role not in (WORKER, SHARD, LOG):
        reason = NOT_A_HELLO
    elif not hmac.compare_digest(proof, _proof(token, b"hello", challenge, told[:-32])):
        reason = WRONG_TOKEN
    elif not hmac.compare_digest(theirs, digest):
        reason = OTHER_TASK
    mine = _proof(token, b"welcome", nonce, challenge) if reason == WELCOME else bytes(32)
    connection.sendall(_ANSWER.pack(reason, mine))
    if reason != WELCOME:
        raise Refused(reason)
    return Guest(role, worker, incarnation)


def _proof(token: bytes, what: bytes, challenge: bytes, fields: bytes) -> bytes:
    return hmac.digest(token, what + challenge + fields, "sha256")


def _until(connection: socket.socket) -> float | None:
    """When the time is over that the connection has for all of the greeting; None: never."""
    seconds = connection.gettimeout()
    return None if seconds is None else time.monotonic() + seconds


def _exactly(connection: socket.socket, count: int, until: float | None) -> bytes:
    found = bytearray()
    while len(found) < count:
        if until is not None and (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
        elif until is not None:
            raise TimeoutError("the other end took too long to greet")
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("the other end closed the connection while it was greeted")
        found += part
    return bytes(found)
