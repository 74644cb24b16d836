"""A connection to one shard that outlives its seats: it reconnects, asks again, and goes where the shard is."""

import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from sheaf.errors import PlanError, WorkerFailed
from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire, agreed
from sheaf.parallel.server.greeting import OTHER_TASK, Guest, Refused, greet
from sheaf.parallel.server.log import Fenced

Address = tuple[str, int]
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1  # seconds between attempts
_SILENCES = 3.0  # leases without any sign of life from either seat before a shard counts as lost


class Failed(Exception):
    """The shard cannot apply the step; ``meta`` says why."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta
        super().__init__(str(meta))


class Keys:
    """What lets one in: the run's token, and what the task is known by."""

    def __init__(self, token: bytes, digest: bytes) -> None:
        self.token, self.digest = token, digest

    def __repr__(self) -> str:
        return "Keys(...)"


class Link:
    """One caller's line to shard ``number``, whose seats are at ``addresses``; for one thread at a time, but ``end``.

    A request may arrive twice; every request is such that this makes no difference. Raises WorkerFailed when no seat
    gives a sign of life for three leases, each asked meanwhile, PlanError when all refuse a caller that none has let in
    yet (where one does, that may be another run's, at the address of a seat that died), Fenced and Failed as the shard
    answers.
    """

    def __init__(
        self, number: int, addresses: list[Address], guest: Guest, keys: Keys, most_data_bytes: int, lease: float
    ) -> None:
        self.number, self.addresses, self.guest = number, addresses, guest
        self._keys, self._most, self._lease, self._silence = keys, most_data_bytes, lease, max(0.05, lease)
        self._seat, self._wire, self._requests = 0, None, 0
        self._asked: list[tuple[Head, dict[str, Any] | None, memoryview | None]] = []
        self.first = Head(Kind.ACK)  # the answer to the first of two requests
        self._alive = self._quiet_since = time.monotonic()  # last sign of the shard's life, and of this seat's
        self._pause, self._tries = _FIRST_PAUSE, 0  # how often a seat was turned from since the last sign of life
        self._sent_bytes = 0
        self._coming = None
        self._refusals: dict[int, Refused] = {}  # by seat, until one has let us in
        self._is_known = False  # one has let us in: whoever refuses since is no seat of this run
        self.reconnected = 0
        self._is_over = False

    _wire: Wire | None
    _coming: tuple[Head, dict[str, Any], memoryview] | None  # an answer, and the room of what is left of its values

    @property
    def sent_bytes(self) -> int:
        """What was written in all."""
        return self._sent_bytes + (self._wire.sent_bytes if self._wire is not None else 0)

    def ask(
        self, head: Head, meta: dict[str, Any] | None = None, into: memoryview | None = None
    ) -> tuple[Head, dict[str, Any]]:
        """Send a request and wait for its answer; values go to ``into``."""
        self.start(head, meta)
        return self.finish(into)

    def start(
        self,
        head: Head,
        meta: dict[str, Any] | None = None,
        data: memoryview | None = None,
        then: Head | None = None,
    ) -> None:
        """Send a request; ``data`` must stay as it is until its answer is there.

        With ``then``, send that one too before the first is answered: ``finish`` waits for both answers and gives the
        second.
        """
        self._asked = [(head._replace(request=self._requests + 1), meta, data)]
        if then is not None:
            self._asked.append((then._replace(request=self._requests + 2), None, None))
        self._requests += len(self._asked)
        self._pause, self._tries = _FIRST_PAUSE, 0
        if self._coming is not None:  # nobody wants the rest of an earlier answer
            self._drop()
        try:
            if self._wire is not None:
                self._send(self._wire)
        except OSError:
            self._drop()
        self._alive = self._quiet_since = time.monotonic()

    def finish(self, into: memoryview | None = None) -> tuple[Head, dict[str, Any]]:
        """Wait for the answer to the last request."""
        while (answer := self.heard(into)) is None:
            continue
        return answer

    def heard(self, into: memoryview | None = None) -> tuple[Head, dict[str, Any]] | None:
        """Wait for a message, or for more of one; the answer to the last request, once all of it is there."""
        try:
            if self._wire is None:
                self._connect()
            return self._answer(into)
        except Refused as refused:
            self._turned_away(refused)
            return None
        except (OSError, BadFrame) as error:
            self._lost(error)
            return None

    @property
    def line(self) -> socket.socket | None:
        """Where the next message comes from; None where there is something to do already."""
        return None if self._wire is None or self._wire.has_some else self._wire.connection

    @property
    def patience_seconds(self) -> float:
        """For how much longer this seat may be silent."""
        return self._quiet_since + self._silence - time.monotonic()

    def turn(self) -> None:
        """This seat has been silent for too long: go on with the other."""
        self._lost(TimeoutError("nothing came for too long"))

    def close(self) -> None:
        """Hang up."""
        self._drop()

    def end(self) -> None:
        """Hang up for good: another thread that waits here gets a WorkerFailed."""
        self._is_over = True
        if (wire := self._wire) is not None:
            wire.close()

    def _answer(self, into: memoryview | None) -> tuple[Head, dict[str, Any]] | None:
        wire = self._wire
        assert wire is not None
        if self._coming is not None:
            return self._more(wire, *self._coming)
        head = wire.head()
        meta = wire.meta(head)
        self._quiet_since = time.monotonic()
        if head.kind != Kind.ELSEWHERE:  # a seat that does not answer for the shard is no sign of the shard's life
            self._alive, self._pause, self._tries = self._quiet_since, _FIRST_PAUSE, 0
        asked = [one[0].request for one in self._asked]
        if head.request not in asked or head.kind == Kind.BUSY:
            wire.skip(head)
            return None
        if head.kind == Kind.ELSEWHERE:
            raise ConnectionError("the shard has moved")
        if head.kind == Kind.FENCED:
            raise Fenced
        if head.kind == Kind.FAILED:
            raise Failed(meta)
        if head.request != asked[-1]:
            self.first = head
            wire.skip(head)
            return None
        if into is not None and head.kind == Kind.VALUES:
            agreed(head, into)
            return self._more(wire, head, meta, into)
        wire.skip(head)
        return head, meta

    def _more(
        self, wire: Wire, head: Head, meta: dict[str, Any], into: memoryview
    ) -> tuple[Head, dict[str, Any]] | None:
        """Take what has come of the values: other shards' come meanwhile, and whoever is not read stands still."""
        left = into[wire.some(into) :] if into.nbytes else into
        self._alive = self._quiet_since = time.monotonic()
        self._coming = (head, meta, left) if left.nbytes else None
        return (head, meta) if self._coming is None else None

    def _connect(self) -> None:
        if self._is_over:
            raise ConnectionAbortedError("this line was closed")
        connection = socket.create_connection(self.addresses[self._seat], timeout=self._silence)
        try:
            greet(connection, self.guest, self._keys.token, self._keys.digest)
        except BaseException:
            connection.close()
            raise
        self._refusals.clear()
        self._is_known = True
        self._wire = Wire(connection, most_data_bytes=self._most, silence_seconds=self._silence)
        if self._is_over:  # since it was connected: ``end`` saw no wire
            self._wire.close()
        self._send(self._wire)
        self._quiet_since = time.monotonic()

    def _send(self, wire: Wire) -> None:
        head, meta, data = self._asked[0]
        wire.send(head, meta, data, then=self._asked[1][0] if len(self._asked) > 1 else None)

    def _lost(self, error: Exception) -> None:
        """Turn to the other seat, after a pause that grows."""
        self._drop()
        if self._is_over:
            raise WorkerFailed(f"the line to shard {self.number} was closed") from error
        self.reconnected += 1
        self._tries += 1
        silent = time.monotonic() - self._alive
        # it may be this very process that stood still: then each seat is to be asked again
        if silent > _SILENCES * self._lease and self._tries > len(self.addresses):
            for seat in self._refusals:
                raise self._refused(seat) from None
            raise WorkerFailed(
                f"shard {self.number} of the parameter server has given no sign of life for {silent:.1f} s at any of "
                f"{self.addresses}: {error}. Look at the workers that hold it"
            ) from error
        self._seat = (self._seat + 1) % len(self.addresses)
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _drop(self) -> None:
        if self._wire is not None:
            self._sent_bytes += self._wire.sent_bytes
            self._wire.close()
            self._wire = self._coming = None

    def _turned_away(self, refused: Refused) -> None:
        """Turn to another seat. Raises PlanError when every seat has refused, and none has ever let us in."""
        if not self._is_known:
            self._refusals[self._seat] = refused
        if len(self._refusals) == len(self.addresses):
            raise self._refused(self._seat) from None
        self._lost(ConnectionRefusedError(str(refused)))

    def _refused(self, seat: int) -> PlanError:
        if self._refusals[seat].reason == OTHER_TASK:
            what = "another task or plan than this worker: build the step on every worker alike"
        else:
            what = "another token than this worker's run: it belongs to someone else; start the run again"
        return PlanError(f"shard {self.number} at {self.addresses[seat]} has {what}")


def first_heard(links: Sequence[Link]) -> Link:
    """Of several lines the first on which there is something; those that are silent for a lease turn to other seats.

    Whoever waits for all of them must look at all: what one answers may depend on what another is sent again.
    """
    while True:
        lines = [link.line for link in links]
        watched = select.poll()
        for link, line in zip(links, lines, strict=True):
            if line is None:
                return link
            watched.register(line, select.POLLIN)
        patience = min(link.patience_seconds for link in links)
        ready = {number for number, _ in watched.poll(max(0.0, 1000 * patience))}
        for link, line in zip(links, lines, strict=True):
            if line is not None and line.fileno() in ready:
                return link
            if link.patience_seconds < 0:
                link.turn()
