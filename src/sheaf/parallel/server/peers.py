"""What shards ask each other: a gradient's norm, what came of a push, and of which pushes a step is made."""

import threading
from collections.abc import Sequence

from sheaf.errors import PlanError, WorkerFailed
from sheaf.parallel.server.frame import Head, Kind
from sheaf.parallel.server.greeting import SHARD, Guest
from sheaf.parallel.server.link import Address, Keys, Link


class Peers:
    """The shards of a run, as one of them reaches the others. ``addresses`` by shard, those of its seats.

    Where replicas are several workers, each ``place`` in them has shards of its own; ``elsewhere`` are those of the
    other places, by place.
    """

    def __init__(self, keys: Keys, lease: float) -> None:
        self._keys, self._lease = keys, lease
        self.addresses: list[list[Address]] = []
        self.place = 0
        self.elsewhere: dict[int, tuple[list[list[Address]], Keys]] = {}
        self._links: dict[tuple[int, int], Link] = {}
        self._settling: set[Link] = set()
        self._is_over = False
        self._lock = threading.Lock()

    def close_clock(self, me: int, clock: int, counted: Sequence[tuple[int, int, int]]) -> None:
        """Tell every other shard of which pushes a clock's gradient is made; all of them have these pushes."""
        with self._lock:
            others = [self._to(me, self.place, other) for other in range(len(self.addresses)) if other != me]
            for link in others:
                link.start(Head(Kind.CLOSE, clock=clock), {"counted": [list(key) for key in counted]})
            for link in others:
                link.finish()

    def squares(self, me: int, mine: float, clock: int) -> list[float]:
        """By place and shard, the square of the norm of its part of a clock's gradient; waits until all are known."""
        shards = self._shards
        with self._lock:
            others = {one: self._to(me, *one) for one in shards if one != (self.place, me)}
            for link in others.values():
                link.start(Head(Kind.NORM, clock=clock))
            return [float(others[one].finish()[1]["square"]) if one in others else mine for one in shards]

    def committed(self, me: int, worker: int, incarnation: int) -> int:
        """The last sequence of a worker's incarnation that any other shard counts; they hear no more of it then.

        A shard that neither seat answers for, but strangers perhaps, counts nothing: the run has ended then.
        """
        found = 0
        for place, other in self._shards:
            if (place, other) != (self.place, me):
                link = self._link(me, place, other)
                self._settling.add(link)
                self._heed_end(link)
                try:
                    head = Head(Kind.SETTLE, worker=worker, incarnation=incarnation)
                    found = max(found, int(link.ask(head)[1]["committed"]))
                except (WorkerFailed, PlanError):
                    continue
                finally:
                    self._settling.discard(link)
                    link.close()
        return found

    @property
    def _shards(self) -> list[tuple[int, int]]:
        """Place and number of all shards."""
        places = sorted({self.place, *self.elsewhere})
        return [(place, other) for place in places for other in range(len(self.addresses))]

    def close(self) -> None:
        """Hang up; who asks gets no answer any more."""
        self._is_over = True
        for link in (*self._links.values(), *self._settling):
            link.end()

    def _to(self, me: int, place: int, other: int) -> Link:
        if (place, other) not in self._links:
            link = self._links[place, other] = self._link(me, place, other)
            self._heed_end(link)
        return self._links[place, other]

    def _link(self, me: int, place: int, other: int) -> Link:
        addresses, keys = self.elsewhere.get(place, (self.addresses, self._keys))
        return Link(other, addresses[other], Guest(SHARD, -1 - me, 0), keys, 0, self._lease)

    def _heed_end(self, link: Link) -> None:
        """``close`` may have come before this line was one of those that it ends."""
        if self._is_over:
            link.end()
