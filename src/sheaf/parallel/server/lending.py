"""Where shares are stolen, what a seat does beside keeping its log: it lends microbatches, and takes them back."""

import threading
from typing import Any, Protocol, runtime_checkable

from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import Guest
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.log import Entry, Fenced, Terms
from sheaf.parallel.server.shard import Shard
from sheaf.parallel.server.work import Paces

_TICK_SECONDS = 0.1


@runtime_checkable
class Lending(Protocol):
    """The seat that lends; ``sheaf.parallel.server.host`` has it."""

    shard: Shard
    terms: Terms
    changed: threading.Condition
    last: int
    finishing: bool

    @property
    def answers(self) -> bool: ...

    def own(self) -> None: ...

    def heard(self, entry: Entry) -> None: ...

    def log(self, entry: Entry) -> None: ...

    def mirrored(self, place: int) -> None: ...

    def finish(self) -> None: ...


class Lender:
    """Lends the step's microbatches for shard 0, and ends what was lent to workers that hung up or stand still.

    What is lent is in the log; for how long is each seat's own clock.
    """

    def __init__(self, host: Lending) -> None:
        self._host = host
        self.paces = Paces(host.terms.lease_seconds)
        self.tick_seconds = min(_TICK_SECONDS, host.terms.lease_seconds / 20)

    def lend(self, wire: Wire, head: Head, entry: Entry) -> dict[str, Any]:
        """A microbatch; with ``wait`` one is waited for until the step is closed.

        ``microbatch`` is None when there is none now, ``clock`` the step under way when it is a later one.
        """
        host, shard = self._host, self._host.shard
        count = check_borrower(entry.meta, host.terms.lent)
        held: list[int] = entry.meta.get("held", [])
        stop = bool(entry.meta.get("stop"))
        while True:
            finish = busy = False
            with host.changed:
                host.own()
                self._hear(entry)
                if entry.clock < shard.applied:
                    return {"clock": shard.applied}
                if entry.clock > shard.applied:
                    raise BadFrame(f"a worker asks for work of step {entry.clock}, and the next is {shard.applied}")
                if (hopeless := shard.hopeless) is not None:
                    raise Failed(hopeless)
                if not shard.ready:
                    assert shard.kept is not None
                    round_ = shard.kept.begun(count)
                    if round_.count != count:
                        raise BadFrame(f"a worker tells of a step of {count} microbatches, which has {round_.count}")
                    found = round_.next(entry.worker, held)
                    if found is not None or (stop and not round_.stop):
                        meta = {"microbatch": found, "stop": stop, "count": round_.count}
                        host.log(Entry(Kind.TAKE, entry.worker, entry.incarnation, clock=entry.clock, meta=meta))
                    bounded = (found is not None or bool(held)) and not entry.meta.get("watched")
                    self.paces.seen(entry.worker, busy=bounded)
                    if found is not None or not entry.meta.get("wait"):
                        return {"microbatch": found}
                elif not entry.meta.get("wait"):
                    return {"microbatch": None}
                finish = shard.ready and not host.finishing
                busy = not finish and not host.changed.wait(host.terms.lease_seconds / 4)
            if finish:
                host.finish()
            elif busy:
                wire.send(Head(Kind.BUSY, request=head.request))

    def claim(self, entry: Entry) -> dict[str, Any]:
        """Whether a push counts: every shard has it."""
        host, shard = self._host, self._host.shard
        key = entry.worker, entry.incarnation, entry.sequence
        check_borrower(entry.meta, host.terms.lent)
        with host.changed:
            host.own()
            self._hear(entry)
            host.log(entry)
            assert shard.kept is not None
            counted = shard.kept.counted.get(entry.clock, [])
            if entry.clock == shard.applied and shard.kept.round is not None:
                counted = shard.kept.round.counted
            counts = key in counted
            self.paces.seen(entry.worker, busy=entry.worker in shard.borrowers)
            if counts:
                self.paces.counted(entry.worker)
            host.changed.notify_all()
            place = host.last
        host.mirrored(place)
        return {"counts": counts}

    def followed(self, entry: Entry) -> None:
        """The backup did an entry: it sees what the primary sees."""
        if entry.kind in (Kind.TAKE, Kind.CLAIM):
            self.paces.seen(entry.worker, busy=entry.worker in self._host.shard.borrowers)
        elif entry.kind == Kind.RETURN:
            self.paces.gone(entry.worker)

    def hung_up(self, guest: Guest) -> None:
        """A line on which work was lent is broken: others may have it, at once."""
        host = self._host
        with host.changed:
            if host.answers and host.shard.heard(guest.worker, guest.incarnation):
                self._take_back([guest.worker])

    def tick(self, stood_still: bool) -> None:
        """Take back what workers that are silent for too long were lent. The lock is held."""
        if stood_still:
            self.paces.renewed()
        self._take_back(self.paces.late())

    def _take_back(self, workers: list[int]) -> None:
        lent = set(self._host.shard.borrowers)
        for worker in workers:
            self.paces.gone(worker)
            if worker in lent:
                self._host.log(Entry(Kind.RETURN, worker))
                self._host.changed.notify_all()

    def _hear(self, entry: Entry) -> None:
        self._host.heard(entry)
        if not self._host.shard.heard(entry.worker, entry.incarnation):
            raise Fenced


def check_lent(head: Head, number: int, lent: int) -> None:
    """Only where shares are stolen does anyone borrow, and only of shard 0. Raises BadFrame."""
    if head.kind in (Kind.TAKE, Kind.CLAIM) and (number or not lent):
        raise BadFrame(f"a {head.kind.name} came to shard {number}, which lends no microbatches")
    if head.kind == Kind.CLOSE and (not number or not lent):
        raise BadFrame(f"a CLOSE came to shard {number}, which nobody tells what counts")


def check_covers(meta: dict[str, Any], count: int) -> None:
    """What a push covers are microbatches that there are, each once. Raises BadFrame."""
    covers = [one[0] for one in meta.get("losses", [])]
    if not all(type(one) is int and 0 <= one < count for one in covers) or len(set(covers)) < len(covers):
        raise BadFrame(f"a push covers {covers} of {count} microbatches")
    if not isinstance(meta.get("seconds", 0.0), int | float):
        raise BadFrame("a push does not tell its seconds as a number")


def check_counted(meta: dict[str, Any]) -> None:
    """What shard 0 says of a closed step must be pushes. Raises BadFrame."""
    keys = meta.get("counted")
    if not isinstance(keys, list) or not all(
        isinstance(key, list) and len(key) == 3 and all(type(part) is int for part in key) for key in keys
    ):
        raise BadFrame("a closed step tells of what are no pushes")


def check_borrower(meta: dict[str, Any], most: int) -> int:
    """How many microbatches the step has that a worker speaks of. Raises BadFrame."""
    held, count = meta.get("held", []), meta.get("count")
    if type(count) is not int or not 0 < count <= most:
        raise BadFrame(f"a worker tells of a step of {count} microbatches, where there are {most} at most")
    if not isinstance(held, list) or not all(type(one) is int and 0 <= one < count for one in held):
        raise BadFrame("a worker tells of microbatches that there are not")
    return count
