"""A seat of a shard at a socket: takes connections, answers requests, and keeps the log with the other seat."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from sheaf.errors import WorkerFailed
from sheaf.parallel.server.clock import Leases
from sheaf.parallel.server.door import Door, check_asker, check_push
from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import LOG, Guest
from sheaf.parallel.server.link import Address, Failed, Keys
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Arena
from sheaf.parallel.server.seats import BACKUP, PRIMARY, RETIRED, Mirror, Throne, committing, entry_of
from sheaf.parallel.server.shard import Entry, Fenced, Shard, losses


class Elsewhere(Exception):
    """This seat does not answer for the shard."""


class Host:
    """Serves one seat of a shard.

    ``open`` starts it: the primary with the address of its backup, if it has one. ``peers`` reaches the other shards.
    """

    def __init__(
        self, shard: Shard, seat: str, listener: socket.socket, keys: Keys, throne: Throne, peers: Peers
    ) -> None:
        self.shard, self.seat, self._keys = shard, seat, keys
        self._throne, self.peers = throne, peers
        self.terms = shard.terms
        self.changed = threading.Condition()
        self.leases = Leases(range(self.terms.workers), self.terms.lease_seconds)
        self.took_over_at: float | None = None
        self._mirror: Mirror | None = None
        self._last = 0  # the last entry's place in the log
        self._finishing = self._closed = False
        self._logged = False  # whether a primary's log comes in here
        self._name = f"sheaf-shard-{shard.number}"
        self.door = Door(listener, keys, self._name, shard.form.size_bytes, self.terms.lease_seconds)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self.door.address

    @property
    def refusals(self) -> list[str]:
        """Who was turned away, and why."""
        return list(self.door.refusals)

    def open(self, backup: Address | None = None) -> None:
        """Begin to answer."""
        most = self.shard.form.size_bytes
        if backup is not None:
            self._mirror = Mirror(backup, self.shard.number, self._keys, most, self.terms.lease_seconds)
        self.door.open(self._serve, self.changed)
        threading.Thread(target=self._tick, name=self._name, daemon=True).start()

    def close(self) -> None:
        """Stop answering, without anyone taking over."""
        with self.changed:
            self._closed, self.seat = True, RETIRED
            mirror = self._mirror
            self.changed.notify_all()
        self.door.close()
        self.peers.close()
        if mirror is not None:
            mirror.close()

    def wait_for_clock(self, clock: int, timeout_seconds: float) -> bool:
        """Wait until every worker has finished so many steps here, and they are applied."""
        shard = self.shard
        with self.changed:
            return self.changed.wait_for(
                lambda: (shard.applied if self.terms.exact else shard.clocks.slowest) >= clock, timeout_seconds
            )

    def wait_until_left(self, timeout_seconds: float) -> bool:
        """Wait until every worker has said good-bye, or was given up, and has hung up: it may wait for an answer."""
        with self.changed:
            return self.changed.wait_for(
                lambda: not self.shard.clocks.workers and not self.door.callers, timeout_seconds
            )

    def restart(self, change: Callable[[Shard], None]) -> None:
        """Change the shard behind everyone's back, as a checkpoint does; nobody may be in the middle of a step."""
        with self.changed:
            change(self.shard)
            self.leases = Leases(range(self.terms.workers), self.terms.lease_seconds)
            self.changed.notify_all()

    def _serve(self, wire: Wire, guest: Guest) -> None:
        with torch.no_grad():
            if guest.role == LOG:
                self._follow(wire)
            else:
                self._talk(wire, guest)

    # --- the backup -----------------------------------------------------------------------------------------------

    def _follow(self, wire: Wire) -> None:
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
                    with self.changed, contextlib.suppress(Fenced):
                        self.shard.do(entry)
                        self.changed.notify_all()
                wire.send(Head(Kind.ACK, request=head.request))
        finally:
            self._widowed()

    def _widowed(self) -> None:
        """The primary is lost: take its seat, if it has not been told to go on alone."""
        if self._closed or self.seat != BACKUP:
            return
        won = self._throne.claim(BACKUP)
        with self.changed:
            if self.seat == BACKUP:
                self.seat = PRIMARY if won else RETIRED
                self.took_over_at = time.monotonic() if won else None
                self.leases.renewed()
                self.changed.notify_all()

    # --- the primary ----------------------------------------------------------------------------------------------

    def _talk(self, wire: Wire, guest: Guest) -> None:
        """Answer one worker, or another shard."""
        out = None
        while True:
            head = wire.head()
            check_asker(guest, head)
            meta = wire.meta(head)
            entry = self._with_data(wire, head, entry_of(head, meta))
            try:
                if head.kind in (Kind.PULL, Kind.READ, Kind.GRADIENT):
                    out = out or self.shard.form.arena()
                    self._give(wire, head, entry, out)
                else:
                    wire.send(Head(Kind.ACK, request=head.request), self._simple(wire, head, entry))
            except Fenced:
                wire.send(Head(Kind.FENCED, request=head.request))
            except Elsewhere:
                wire.send(Head(Kind.ELSEWHERE, request=head.request))
            except Failed as failed:
                wire.send(Head(Kind.FAILED, request=head.request), failed.meta)
            except WorkerFailed as lost:
                wire.send(Head(Kind.FAILED, request=head.request), {"why": "shard", "message": str(lost)})

    def _with_data(self, wire: Wire, head: Head, entry: Entry) -> Entry:
        if head.kind != Kind.PUSH:
            if head.data_bytes:
                raise BadFrame(f"{head.data_bytes} bytes came with a {head.kind.name}, which has none")
            return entry
        check_push(entry.meta, len(self.shard.form.pieces))
        with self.changed:
            arena = self.shard.room()
        wire.data(head, arena.raw)
        return Entry(entry.kind, entry.worker, entry.incarnation, entry.sequence, entry.clock, entry.base, entry.meta,
                     arena)  # fmt: skip

    def _simple(self, wire: Wire, head: Head, entry: Entry) -> dict[str, Any]:
        """Answer what needs no values."""
        if head.kind == Kind.NORM:
            return {"square": self._norm(wire, head)}
        if head.kind == Kind.JOIN:
            self._make_way(entry)
        with self.changed:
            self._own()
            if head.kind == Kind.BEAT:
                self._heard(entry)
                return {}
            if head.kind == Kind.SETTLE:
                self._log(Entry(Kind.FENCE, entry.worker, entry.incarnation))
                answer = {"committed": self.shard.committed(entry.worker, entry.incarnation)}
            else:
                self._log(entry)
                self._heard(entry)
                answer = {"delay": self.shard.version - entry.base}
                if head.kind == Kind.JOIN:
                    last = int(entry.meta.get("last", 0))
                    answer = {
                        "clock": self.shard.clocks.of(entry.worker),
                        "version": self.shard.version,
                        "committed": self.shard.committed(entry.worker, last),
                    }
                if head.kind == Kind.LEAVE:
                    self.leases.end(entry.worker)
                self.changed.notify_all()
            place = self._last
        self._mirrored(place)
        return answer

    def _give(self, wire: Wire, head: Head, entry: Entry, out: Arena) -> None:
        """Answer with values, once the clock allows."""
        with self.changed:
            self._own()
            if head.kind == Kind.PULL and head.sequence:
                self._log(committing(entry))
                self.changed.notify_all()
        while True:
            finish = False
            with self.changed:
                self._own()
                self._heard(entry)
                if head.kind == Kind.PULL and not self.shard.heard(entry.worker, entry.incarnation):
                    raise Fenced
                if self._readable(head):
                    told, place = self._read(head, entry, out), self._last
                    break
                if (hopeless := self.shard.hopeless) is not None:
                    raise Failed(hopeless)
                finish = self.shard.ready and not self._finishing
                busy = not finish and not self.changed.wait(self.terms.lease_seconds / 4)
            if finish:
                self._finish()
            elif busy:
                wire.send(Head(Kind.BUSY, request=head.request))
        self._mirrored(place)
        wire.send(Head(Kind.VALUES, request=head.request, base=told.pop("version")), told, out.raw)

    def _readable(self, head: Head) -> bool:
        if head.kind == Kind.PULL:
            return self.shard.allows(head.clock)
        if self.terms.exact:
            return self.shard.applied >= head.clock
        return self.shard.clocks.slowest >= head.clock or not self.shard.clocks.workers

    def _read(self, head: Head, entry: Entry, out: Arena) -> dict[str, Any]:
        shard = self.shard
        if head.kind == Kind.GRADIENT:
            for name, view in out.views.items():
                if name in shard.watched:
                    view.copy_(shard.watched[name])
            places = [place for place, piece in enumerate(shard.form.pieces) if piece.name in shard.watched]
            return {"version": shard.version, "used": places}
        earlier = shard.pulled_copy(entry.worker, head.request)
        if earlier is None and head.kind == Kind.PULL and shard.terms.late == "compensated":
            self._log(Entry(Kind.PULLED, entry.worker, entry.incarnation, sequence=head.request))
        out.copy_(earlier.views if earlier is not None else shard.values)
        told = shard.told.get(head.clock - 1, {})
        return {
            "version": shard.version,
            "losses": losses(told.values()),
            "counts": {str(worker): len(each.get("losses", ())) for worker, each in told.items()},
            "norm": shard.whole_norms.get(head.clock - 1),
            "rate": float(shard.optimizer.param_groups[0]["lr"]) if shard.optimizer.param_groups else None,
            "slowest": shard.clocks.slowest,
            "stop_at": shard.stop_at,
        }

    def _finish(self) -> None:
        """At staleness 0, everyone's gradient is here: let them meet, scaled by the norm over all shards."""
        with self.changed:
            if self._finishing or not self.shard.ready:
                return
            self._finishing = True
            clock = self.shard.applied
            mine = self.shard.partial() if self.terms.clip is not None else None
            self.changed.notify_all()
        try:
            norm = None
            if mine is not None:
                squares = self.peers.squares(self.shard.number, mine, clock)
                norm = sum(squares) ** 0.5
            with self.changed:
                self._own()
                self._log(Entry(Kind.APPLY, clock=clock, meta={} if norm is None else {"norm": norm}))
        finally:
            with self.changed:
                self._finishing = False
                self.changed.notify_all()

    def _norm(self, wire: Wire, head: Head) -> float:
        while True:
            with self.changed:
                self._own()
                if head.clock not in self.shard.norms and self.shard.ready and self.shard.applied == head.clock:
                    self.shard.partial()
                if head.clock in self.shard.norms:
                    return self.shard.norms[head.clock]
                if (hopeless := self.shard.hopeless) is not None:
                    raise Failed(hopeless)
                busy = not self.changed.wait(self.terms.lease_seconds / 4)
            if busy:
                wire.send(Head(Kind.BUSY, request=head.request))

    def _make_way(self, entry: Entry) -> None:
        """A worker's next incarnation comes: what came of its last gradient is settled first."""
        with self.changed:
            self._own()
            known = self.shard.members.get(entry.worker)
            waiting = known is not None and known.staged is not None and entry.incarnation > known.incarnation
        if waiting:
            self._give_up(entry.worker)

    def _give_up(self, worker: int) -> None:
        """End a worker's membership. Its last gradient counts on all shards or on none: if any shard was told to apply
        it, then all of them have it.
        """
        with self.changed:
            self._own()
            member = self.shard.members[worker]
            incarnation, staged = member.incarnation, member.staged
            self._log(Entry(Kind.FENCE, worker, incarnation))
        if staged is not None and self.peers.committed(self.shard.number, worker, incarnation) >= staged.sequence:
            with self.changed:
                self._log(Entry(Kind.COMMIT, worker, incarnation, staged.sequence, meta={"settled": True}))
        with self.changed:
            self._log(Entry(Kind.LEAVE, worker, incarnation, meta={"given_up": True}))
            self.leases.end(worker)
            self.changed.notify_all()

    def _heard(self, entry: Entry) -> None:
        if self.shard.heard(entry.worker, entry.incarnation):
            self.leases.heard(entry.worker)

    def _tick(self) -> None:
        """Give up workers whose lease ran out; notice when this very process stood still."""
        pause, before = max(0.01, self.terms.lease_seconds / 20), time.monotonic()
        while not self._closed:
            time.sleep(pause)
            now, before = time.monotonic() - before, time.monotonic()
            with self.changed:
                if now > self.terms.lease_seconds / 2:
                    self.leases.renewed()
                gone = self.leases.expired() if self.seat == PRIMARY else []
            for worker in gone:
                with contextlib.suppress(Elsewhere), torch.no_grad():
                    self._give_up(worker)

    def _log(self, entry: Entry) -> None:
        """Make a transition here and on the backup. The lock is held."""
        if self._mirror is not None:
            self._last = self._mirror.send(entry)
        self.shard.do(entry)

    def _mirrored(self, place: int) -> None:
        """Wait until the backup has the log so far; without it, ask whether to go on alone."""
        mirror = self._mirror
        if mirror is None or mirror.wait(place):
            return
        won = not self._closed and self._throne.claim(PRIMARY)
        with self.changed:
            if self._mirror is mirror:
                self._mirror = None
                self.seat = self.seat if won else RETIRED
                self.changed.notify_all()
        if not won:
            raise Elsewhere

    def _own(self) -> None:
        if self.seat != PRIMARY:
            raise Elsewhere
