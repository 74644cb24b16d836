"""A seat of a shard: the log that the primary keeps with its backup, and who goes on when one of them is lost."""

import contextlib
import socket
import sys
import threading
import time

from sheaf.errors import PlanError, TaskError
from sheaf.parallel.server.clock import Leases
from sheaf.parallel.server.door import Door, check_push
from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import Refused
from sheaf.parallel.server.lending import Lender, check_covers
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.log import Entry, Fenced
from sheaf.parallel.server.moving import packed_shard
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.points import reached
from sheaf.parallel.server.seats import BACKUP, PRIMARY, RETIRED, Mirror, Throne, entry_of
from sheaf.parallel.server.shard import Shard
from sheaf.parallel.server.sums import check_sum

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds between attempts to find a backup


class Elsewhere(Exception):
    """This seat does not answer for the shard."""


class Seat:
    """Keeps one seat of a shard: does what the log says, and answers for the shard when it is the primary.

    ``open`` starts it: the primary with the address of its backup, if it has one. ``peers`` reaches the other shards.
    ``recruits`` are addresses at which a primary that has lost the other seat may find a next one.
    """

    def __init__(
        self,
        shard: Shard,
        seat: str,
        listener: socket.socket | Door,
        keys: Keys,
        throne: Throne,
        peers: Peers,
        changed: threading.Condition | None = None,
    ) -> None:
        self.shard, self.seat, self._keys = shard, seat, keys
        self._throne, self.peers = throne, peers
        self.terms = shard.terms
        self.changed = changed or threading.Condition()
        self.leases = Leases(range(self.terms.workers), self.terms.lease_seconds)
        self.took_over_at: float | None = None
        self.recruits: list[Address] = []
        self._tried, self._pause, self._next_try = 0, _FIRST_PAUSE, 0.0
        self._mirror: Mirror | None = None
        self.last = 0  # the last entry's place in the log
        self._closed = threading.Event()
        self._lender = self._new_lender()
        self._logged = False  # whether a primary's log comes in here
        self.door = (
            listener
            if isinstance(listener, Door)
            else Door(listener, keys, f"sheaf-shard-{shard.number}", shard.form.size_bytes, self.terms.lease_seconds)
        )

    def _new_lender(self) -> Lender | None:
        """What lends microbatches, where shares are stolen: a seat that serves has it."""
        return None

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self.door.address

    @property
    def answers(self) -> bool:
        """Whether this seat answers for the shard."""
        return self.seat == PRIMARY and not self._closed.is_set()

    @property
    def backed(self) -> bool:
        """Whether the other seat has the log."""
        mirror = self._mirror
        return mirror is not None and not mirror.lost and mirror.settled

    @property
    def refusals(self) -> list[str]:
        """Who was turned away, and why."""
        return list(self.door.refusals)

    def close(self) -> None:
        """Stop answering, without anyone taking over."""
        with self.changed:
            self._closed.set()
            self.seat = RETIRED
            mirror = self._mirror
            self.changed.notify_all()
        self.door.close()
        self.peers.close()
        if mirror is not None:
            mirror.close()

    def join(self, until: float | None = None) -> bool:
        """After ``close``: wait until nothing is done here any more, or until then; whether that came to be."""
        return self.door.threads.join(until)

    def follow(self, wire: Wire) -> None:
        """Do what the primary did, in its order, until it is lost."""
        with self.changed:
            if self.seat != BACKUP or self._logged:
                raise BadFrame("a log came to a seat that follows nobody, or another already")
            self._logged = True
        try:
            while True:
                head = wire.head()
                meta = wire.meta(head)
                if head.kind != Kind.BEAT:
                    entry = self._with_data(wire, head, entry_of(head, meta))
                    reached("backup.on_receipt")
                    with self.changed, contextlib.suppress(Fenced):
                        self.shard.do(entry)
                        if self._lender is not None:
                            self._lender.followed(entry)
                        self.changed.notify_all()
                    reached("backup.before_ack")
                wire.send(Head(Kind.ACK, request=head.request))
        finally:
            self._widowed()

    def _widowed(self) -> None:
        """The primary is lost: take its seat, if it has not been told to go on alone."""
        if self._closed.is_set() or self.seat != BACKUP:
            return
        reached("backup.at_promotion")
        won = self._throne.claim(BACKUP)
        with self.changed:
            if self.seat == BACKUP:
                self.seat = PRIMARY if won else RETIRED
                self.took_over_at = time.monotonic() if won else None
                self.leases.renewed()
                if self._lender is not None:
                    self._lender.paces.begin(self.shard.borrowers)
                    self._lender.paces.renewed()
                self.changed.notify_all()

    def _with_data(self, wire: Wire, head: Head, entry: Entry) -> Entry:
        pieces = len(self.shard.form.pieces)
        if head.kind == Kind.APPLY and self.terms.sums:
            check_sum(entry.meta, pieces, self.terms.workers)
        elif head.kind == Kind.PUSH:
            check_push(entry.meta, pieces)
        else:
            if head.data_bytes:
                raise BadFrame(f"{head.data_bytes} bytes came with a {head.kind.name}, which has none")
            return entry
        if self.terms.lent:
            check_covers(entry.meta, self.terms.lent)
        arena = self.shard.room()
        wire.data(head, arena.raw)
        entry.arena = arena
        return entry

    def log(self, entry: Entry) -> None:
        """Make a transition here and on the backup. The lock is held."""
        reached("primary.before_log")
        if self._mirror is not None and self.terms.forwards(entry.kind):
            self.last = self._mirror.send(entry)
        self.shard.do(entry)
        reached("primary.after_log")

    def mirrored(self, place: int) -> None:
        """Wait until the backup has the log so far; without it, ask whether to go on alone."""
        mirror = self._mirror
        if mirror is None or mirror.wait(place):
            reached("primary.before_ack")
            return
        won = not self._closed.is_set() and self._throne.claim(PRIMARY, mirror.generation)
        with self.changed:
            if self._mirror is mirror:
                self._mirror = None
                self.seat = self.seat if won else RETIRED
                self.changed.notify_all()
        if not won:
            raise Elsewhere

    def own(self) -> None:
        if self.seat != PRIMARY:
            raise Elsewhere

    def keep_backed(self) -> None:
        """As the primary: notice that the other seat is lost, and find another that takes over what this one has."""
        mirror = self._mirror
        if mirror is not None and mirror.lost:
            with contextlib.suppress(Elsewhere):
                self.mirrored(self.last + 1)
        if not self.answers or self._mirror is not None or not self.recruits or time.monotonic() < self._next_try:
            return
        address = self.recruits[self._tried % len(self.recruits)]
        self._tried += 1
        if self._tried % len(self.recruits) == 0:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._next_try = time.monotonic() + self._pause
        with contextlib.suppress(OSError, Refused, PlanError, Elsewhere):
            self._recruit(address)

    def _mirror_at(self, address: Address, generation: int = 0) -> Mirror:
        most, lease = self.shard.form.size_bytes, self.terms.lease_seconds
        return Mirror(address, self.shard.number, self._keys, most, lease, self.door.threads, generation)

    def _recruit(self, address: Address) -> None:
        """Give another seat all that this one has, and the log from here on."""
        most, generation = self.shard.form.size_bytes, self._throne.generation + 1
        mirror = self._mirror_at(address, generation)
        with self.changed:
            if self.shard.is_summing or self._mirror is not None or not self.answers:
                mirror.close()
                return
            try:
                state = packed_shard(self.shard)
            except TaskError as error:  # nor will any seat be able to take it over later
                mirror.close()
                self.recruits = []
                print(f"sheaf: shard {self.shard.number} has no backup any more: {error}", file=sys.stderr, flush=True)
                return
            self._throne.generation = generation
            self.last = mirror.move(state, self.last, max(most, 1))
            self._mirror = mirror
