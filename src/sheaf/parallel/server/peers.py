"""What shards ask each other: a gradient's norm, what came of a push, and of which pushes a step is made."""

import threading
from collections.abc import Sequence

from sheaf.errors import WorkerFailed
from sheaf.parallel.server.frame import Head, Kind
from sheaf.parallel.server.greeting import SHARD, Guest
from sheaf.parallel.server.link import Address, Keys, Link


class Peers:
    """The shards of a run, as one of them reaches the others. ``addresses`` by shard, those of its seats."""

    def __init__(self, keys: Keys, lease: float) -> None:
        self._keys, self._lease = keys, lease
        self.addresses: list[list[Address]] = []
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()

    def close_clock(self, me: int, clock: int, counted: Sequence[tuple[int, int, int]]) -> None:
        """Tell every other shard of which pushes a clock's gradient is made; all of them have these pushes."""
        with self._lock:
            others = [self._to(me, other) for other in range(len(self.addresses)) if other != me]
            for link in others:
                link.start(Head(Kind.CLOSE, clock=clock), {"counted": [list(key) for key in counted]})
            for link in others:
                link.finish()

    def squares(self, me: int, mine: float, clock: int) -> list[float]:
        """By shard, the square of the norm of its part of a clock's gradient; waits until all are known."""
        with self._lock:
            for other in range(len(self.addresses)):
                if other != me:
                    self._to(me, other).start(Head(Kind.NORM, clock=clock))
            return [
                mine if other == me else float(self._links[other].finish()[1]["square"])
                for other in range(len(self.addresses))
            ]

    def committed(self, me: int, worker: int, incarnation: int) -> int:
        """The last sequence of a worker's incarnation that any other shard counts; they hear no more of it then.

        A shard that neither seat answers for counts nothing: the run has ended then.
        """
        found = 0
        for other in range(len(self.addresses)):
            if other != me:
                link = self._link(me, other)
                try:
                    head = Head(Kind.SETTLE, worker=worker, incarnation=incarnation)
                    found = max(found, int(link.ask(head)[1]["committed"]))
                except WorkerFailed:
                    continue
                finally:
                    link.close()
        return found

    def close(self) -> None:
        """Hang up."""
        for link in self._links.values():
            link.close()

    def _to(self, me: int, other: int) -> Link:
        if other not in self._links:
            self._links[other] = self._link(me, other)
        return self._links[other]

    def _link(self, me: int, other: int) -> Link:
        return Link(other, self.addresses[other], Guest(SHARD, -1 - me, 0), self._keys, 0, self._lease)
