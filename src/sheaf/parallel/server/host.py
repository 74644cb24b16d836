"""A seat of a shard at a socket: takes connections, answers requests, and keeps the log with the other seat."""

import contextlib
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from sheaf.errors import WorkerFailed
from sheaf.parallel.server.clock import Leases
from sheaf.parallel.server.door import check_asker, check_join, keep_asking
from sheaf.parallel.server.frame import Head, Kind, Wire
from sheaf.parallel.server.greeting import LOG, Guest
from sheaf.parallel.server.lending import Lender, check_counted, check_lent
from sheaf.parallel.server.link import Address, Failed
from sheaf.parallel.server.log import Entry, Fenced
from sheaf.parallel.server.places import Arena
from sheaf.parallel.server.points import reached
from sheaf.parallel.server.reading import Pictures, dealt, finished, read, readable
from sheaf.parallel.server.seat import Elsewhere, Seat
from sheaf.parallel.server.seats import PRIMARY, committing, entry_of
from sheaf.parallel.server.shard import Shard

_MUTE_SECONDS = 1800.0  # for how long one that cannot speak is waited for: as long as torch's collectives wait
_STOOD_STILL_SECONDS = 1.0  # between two ticks: then others had no chance to be heard


class Host(Seat):
    """Serves one seat of a shard: workers, and other shards."""

    finishing: bool = False  # whether gradients are being made to meet just now

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures()

    def _new_lender(self) -> Lender | None:
        return Lender(self) if self.terms.lent else None

    def open(self, backup: Address | None = None) -> None:
        """Begin to answer."""
        if backup is not None:
            self._mirror = self._mirror_at(backup)
        self.door.open(self.serve, self.changed)
        self.begin()

    def begin(self) -> None:
        """Look after leases and the other seat from now on."""
        self.door.threads.start(self._tick)

    def wait_for_clock(self, clock: int, timeout_seconds: float) -> bool:
        """Wait until every worker has finished so many steps here, and they are applied."""
        with self.changed:
            return self.changed.wait_for(lambda: finished(self.shard) >= clock, timeout_seconds)

    def wait_for_all(self, clock: int) -> bool:
        """Wait until every worker that counts has finished so many steps here, however long its steps are.

        False where that will never be.
        """

        def is_known() -> bool:
            never = not self.answers or not self.shard.clocks.workers or self.shard.hopeless is not None
            return finished(self.shard) >= clock or never

        with self.changed:
            while not self.changed.wait_for(is_known, self.terms.lease_seconds / 4):
                continue
            return finished(self.shard) >= clock

    def wait_until_left(self, timeout_seconds: float) -> bool:
        """Wait until every worker has said good-bye, or was given up, and has hung up: it may wait for an answer."""
        with self.changed:
            return self.changed.wait_for(
                lambda: not self.shard.clocks.workers and not self.door.lines.total(), timeout_seconds
            )

    def lose(self, worker: int) -> None:
        """A worker is known to be gone, before its lease has run out."""
        if self.answers and worker in self.shard.clocks.workers:
            with contextlib.suppress(Elsewhere), torch.no_grad():
                self.give_up(worker)

    def restart(self, change: Callable[[Shard], None]) -> None:
        """Change the shard behind everyone's back, as a checkpoint does; nobody may be in the middle of a step."""
        with self.changed:
            change(self.shard)
            self.leases = Leases(range(self.terms.workers), self.terms.lease_seconds)
            self._lender = self._new_lender()
            self.changed.notify_all()

    def serve(self, wire: Wire, guest: Guest) -> None:
        with torch.no_grad():
            if guest.role == LOG:
                self.follow(wire)
            else:
                keep_asking(wire.connection, self.terms.lease_seconds)
                self._talk(wire, guest)

    # --- the primary ----------------------------------------------------------------------------------------------

    def _talk(self, wire: Wire, guest: Guest) -> None:
        """Answer one worker, or another shard."""
        out, borrows = None, False
        try:
            while True:
                head = wire.head()
                check_asker(guest, head)
                check_lent(head, self.shard.number, self.terms.lent)
                borrows = borrows or head.kind == Kind.TAKE
                out = self._answer(wire, head, out)
        finally:
            if borrows and self._lender is not None:
                self._lender.hung_up(guest)

    def _answer(self, wire: Wire, head: Head, out: Arena | None) -> Arena | None:
        """One request; ``out`` is room for values, made when first needed."""
        meta = wire.meta(head)
        entry = self._with_data(wire, head, entry_of(head, meta))
        try:
            if head.kind in (Kind.PULL, Kind.READ, Kind.GRADIENT):
                out = out or self.shard.form.arena()
                self._give(wire, head, entry, out)
            elif head.kind == Kind.STATE:
                with self.changed:
                    self.own()
                    told, part = self._pictures.give(self.shard, entry.worker, entry.meta)
                wire.send(Head(Kind.VALUES if part else Kind.ACK, request=head.request), told, part)
            else:
                answer = self._simple(wire, head, entry)
                acknowledged = Head(Kind.ACK, request=head.request, base=answer.pop("delay", 0))
                wire.send(acknowledged, answer, hold=head.kind == Kind.PUSH and wire.has_next)
            reached("primary.after_ack")
        except Fenced:
            wire.send(Head(Kind.FENCED, request=head.request))
        except Elsewhere:
            wire.send(Head(Kind.ELSEWHERE, request=head.request))
        except Failed as failed:
            wire.send(Head(Kind.FAILED, request=head.request), failed.meta)
        except WorkerFailed as lost:
            wire.send(Head(Kind.FAILED, request=head.request), {"why": "shard", "message": str(lost)})
        return out

    def _simple(self, wire: Wire, head: Head, entry: Entry) -> dict[str, Any]:
        """Answer what needs no values."""
        if head.kind == Kind.NORM:
            return {"square": self._norm(wire, head)}
        last = 0
        if head.kind == Kind.JOIN:
            last = check_join(entry.meta)
            self._make_way(entry)
        if self._lender is not None and head.kind == Kind.TAKE:
            return self._lender.lend(wire, head, entry)
        if self._lender is not None and head.kind == Kind.CLAIM:
            return self._lender.claim(entry)
        if head.kind == Kind.CLOSE:
            check_counted(entry.meta)
        with self.changed:
            self.own()
            if head.kind == Kind.BEAT:
                self.heard(entry)
                return {}
            if head.kind == Kind.SETTLE:
                self.log(Entry(Kind.FENCE, entry.worker, entry.incarnation))
                if self.terms.together:  # given up at one place, at all
                    self.leases.expire(entry.worker)
                answer = {"committed": self.shard.committed(entry.worker, entry.incarnation)}
            else:
                self.log(entry)
                self.heard(entry)
                answer = {"delay": self.shard.version - entry.base}
                if head.kind == Kind.JOIN:
                    answer = {
                        "clock": self.shard.clocks.of(entry.worker),
                        "version": self.shard.version,
                        "committed": self.shard.committed(entry.worker, last),
                        **dealt(self.shard, entry.worker),
                    }
                if head.kind == Kind.LEAVE:
                    self._end(entry.worker)
                self.changed.notify_all()
            place = self.last
        self.mirrored(place)
        return answer

    def _give(self, wire: Wire, head: Head, entry: Entry, out: Arena) -> None:
        """Answer with values, once the clock allows."""
        with self.changed:
            self.own()
            if head.kind == Kind.PULL and head.sequence:
                self.log(committing(entry))
                self.changed.notify_all()
        while True:
            finish = False
            with self.changed:
                self.own()
                self.heard(entry)
                if head.kind == Kind.PULL and not self.shard.heard(entry.worker, entry.incarnation):
                    raise Fenced
                if readable(self.shard, head):
                    told, place = read(self.shard, head, entry, out, self.log), self.last
                    break
                if (hopeless := self.shard.hopeless) is not None:
                    raise Failed(hopeless)
                finish = self.shard.ready and not self.finishing
                busy = not finish and not self.changed.wait(self.terms.lease_seconds / 4)
            if finish:
                self.finish()
            elif busy:
                wire.send(Head(Kind.BUSY, request=head.request))
        self.mirrored(place)
        wire.send(Head(Kind.VALUES, request=head.request, base=told.pop("version")), told, out.raw)

    def finish(self) -> None:
        """At staleness 0, all gradients are here: let them meet, scaled by the norm over all shards."""
        with self.changed:
            if self.finishing or not self.shard.ready:
                return
            self.finishing = True
            clock, counted, place = self.shard.applied, self.shard.counted, self.last
            mine = self.shard.partial() if self.terms.clip is not None else None
            self.changed.notify_all()
        try:
            norm = None
            if self._lender is not None and not self.shard.number and self.terms.shards > 1:
                self.mirrored(place)  # whoever takes over must say the same
                self.peers.close_clock(self.shard.number, clock, counted)
            if mine is not None:
                reached("primary.during_norms")
                squares = self.peers.squares(self.shard.number, mine, clock)
                norm = sum(squares) ** 0.5
            with self.changed:
                self.own()
                reached("primary.before_sum")
                self.log(self.shard.meeting(norm))
        finally:
            with self.changed:
                self.finishing = False
                self.changed.notify_all()

    def _norm(self, wire: Wire, head: Head) -> float:
        while True:
            with self.changed:
                self.own()
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
            self.own()
            known = self.shard.members.get(entry.worker)
            waiting = known is not None and known.staged is not None and entry.incarnation > known.incarnation
        if waiting:
            self.give_up(entry.worker)

    def give_up(self, worker: int) -> None:
        """End a worker's membership, where this seat answers.

        Its last gradient counts on all shards or on none: if any was told to apply it, then all of them have it.
        """
        with self.changed:
            self.own()
            member = self.shard.members[worker]
            incarnation, staged = member.incarnation, member.staged
            self.log(Entry(Kind.FENCE, worker, incarnation))
        counted = 0
        if staged is not None or self.terms.together:  # other places are to give it up too
            counted = self.peers.committed(self.shard.number, worker, incarnation)
        if staged is not None and counted >= staged.sequence:
            with self.changed:
                self.own()
                self.log(Entry(Kind.COMMIT, worker, incarnation, staged.sequence, meta={"settled": True}))
        with self.changed:
            self.own()  # one that was closed meanwhile has not heard what counts
            self.log(Entry(Kind.LEAVE, worker, incarnation, meta={"given_up": True}))
            self._end(worker)
            self.changed.notify_all()

    def _end(self, worker: int) -> None:
        """Nothing is kept for a worker that is gone. The lock is held."""
        self.leases.end(worker)
        self._pictures.forget(worker)

    def heard(self, entry: Entry) -> None:
        if self.shard.heard(entry.worker, entry.incarnation):
            self.leases.heard(entry.worker)

    def _silent(self) -> list[int]:
        """Workers that are to be given up: their leases have run out.

        One in which Python does not come to speak, for a long call into another language perhaps, is waited for while
        a line to it stands, as by an all-reduce: where no step can do without it; and where its replica would not come
        back, in the first step, when data are read and code is made.
        """
        members, terms, hopeless = self.shard.members, self.terms, self.leases.expired(_MUTE_SECONDS)

        def is_waited_for(worker: int) -> bool:
            member = members[worker]
            needed = terms.sums or (terms.together and not member.committed)
            heard = self.shard.heard(worker, member.incarnation)  # else it was given up at another place
            return needed and heard and self.door.lines[worker] > 0 and worker not in hopeless

        return [worker for worker in self.leases.expired() if not is_waited_for(worker)]

    def _tick(self) -> None:
        """Give up workers whose lease ran out; notice when this very process stood still."""
        pause, before = max(0.01, self.terms.lease_seconds / 20), time.monotonic()
        pause = pause if self._lender is None else max(0.01, self._lender.tick_seconds)
        while not self._closed.wait(pause):
            now, before = time.monotonic() - before, time.monotonic()
            with self.changed:
                if now > self.terms.lease_seconds / 2:
                    self.leases.renewed()
                if self._lender is not None and self.answers:
                    self._lender.tick(now > max(_STOOD_STILL_SECONDS, 3 * pause))
                gone = self._silent() if self.seat == PRIMARY else []
            with torch.no_grad():
                self.keep_backed()
            for worker in gone:
                with contextlib.suppress(Elsewhere), torch.no_grad():
                    self.give_up(worker)
