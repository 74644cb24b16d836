"""A step's microbatches as work that is lent: free, lent to a worker, or covered by a push that counts.

Shard 0 lends and decides which pushes count; the others keep every push until it tells them. Both are transitions of
the shard's log, so a backup that takes over knows who has what.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sheaf.parallel.server.places import Arena

Key = tuple[int, int, int]  # a push: its worker, that one's incarnation, the push's number
_TIMES = 6.0  # times what a microbatch took its worker
_LEAST_SECONDS = 0.5
_REMEMBERED = 5


@dataclass
class Round:
    """One step's microbatches: of ``count``, who has which, and which pushes cover which."""

    count: int
    lent: dict[int, int] = field(default_factory=dict[int, int])  # microbatch -> worker
    covered: dict[int, Key] = field(default_factory=dict[int, Key])
    counted: list[Key] = field(default_factory=list[Key])
    returned: dict[int, int] = field(default_factory=dict[int, int])  # worker -> microbatches that it did not finish
    stop: bool = False

    def next(self, worker: int, held: Sequence[int]) -> int | None:
        """What a worker that still has ``held`` is lent next; what it was lent and knows nothing of comes first.

        >>> round = Round(3, lent={0: 1, 1: 0}, covered={2: (0, 1, 1)})
        >>> round.next(0, [1]), round.next(0, [])
        (None, 1)
        >>> round.give_back(0); round.next(0, [1]), round.next(1, [0])  # it may hold what was given back
        (None, 1)
        """
        mine = [one for one, who in self.lent.items() if who == worker and one not in held]
        taken = {*self.lent, *self.covered, *held}
        return min(mine or set(range(self.count)) - taken, default=None)

    def give_back(self, worker: int) -> None:
        """Others may have what a worker was lent."""
        back = [one for one, who in self.lent.items() if who == worker]
        for one in back:
            del self.lent[one]
        if back:
            self.returned[worker] = self.returned.get(worker, 0) + len(back)

    def claim(self, key: Key, covers: Sequence[int]) -> bool:
        """Whether a push counts: all of it or nothing. Whose does not, has nothing any more."""
        if key in self.counted:
            return True
        if not covers or any(one in self.covered for one in covers):
            self.give_back(key[0])
            return False
        for one in covers:
            self.covered[one] = key
            self.lent.pop(one, None)
        self.counted.append(key)
        return True

    @property
    def complete(self) -> bool:
        """Whether every microbatch is covered."""
        return len(self.covered) == self.count

    @property
    def ordered(self) -> list[Key]:
        """The pushes that count, by the first microbatch of each."""
        first = {key: one for one, key in sorted(self.covered.items(), reverse=True)}
        return sorted(self.counted, key=lambda key: first[key])


@dataclass
class Kept:
    """What a shard keeps of the step under way where shares are stolen: every push, and on shard 0 who has what.

    ``counted`` are the pushes of the last steps, for a worker that asks again.
    """

    pushes: dict[Key, Any] = field(default_factory=dict[Key, Any])
    round: Round | None = None
    counted: dict[int, list[Key]] = field(default_factory=dict[int, list[Key]])

    def begun(self, count: int) -> Round:
        """The step's microbatches."""
        if self.round is None:
            self.round = Round(count)
        return self.round

    def closed(self, clock: int, keys: Sequence[Key]) -> tuple[dict[int, Any], list[Arena]]:
        """The pushes that count, in order, and the room of those that do not. Raises KeyError where one is missing."""
        found = {place: self.pushes.pop(key) for place, key in enumerate(keys)}
        spare = [entry.arena for entry in self.pushes.values() if entry.arena is not None]
        self.pushes, self.round = {}, None
        self.counted[clock] = list(keys)
        for old in [old for old in self.counted if old < clock - 3]:
            del self.counted[old]
        return found, spare

    def forget(self) -> None:
        """Begin anew."""
        self.pushes, self.round, self.counted = {}, None, {}


class Paces:
    """How long a worker may be silent about its microbatches: six times the longest that one took it lately, and half
    a second at least. Before one of its own is known, six times the longest of all others, and ``first_seconds`` at
    least; before any is, as long as it takes. Twice as long after each time it was late, until a push of it counts.

    >>> now = [0.0]
    >>> paces = Paces(10.0, lambda: now[0])
    >>> paces.seen(0, busy=True); now[0] = 0.2; paces.seen(0, busy=True)
    >>> now[0] = 1.3; paces.late()
    []
    >>> now[0] = 1.5; paces.late(), paces.late()
    ([0], [])
    >>> first = Paces(10.0, lambda: now[0])
    >>> for worker in (0, 1): first.seen(worker, busy=True)
    >>> now[0] = 101.5; first.late()
    []
    >>> first.seen(0, busy=True); now[0] = 601.4; first.late()
    []
    >>> now[0] = 601.6; first.late()
    [1]
    """

    def __init__(self, first_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._first, self._now = first_seconds, now
        self._since: dict[int, float] = {}
        self._took: dict[int, list[float]] = {}
        self._patience: dict[int, float] = {}

    def seen(self, worker: int, *, busy: bool) -> None:
        """A worker took a microbatch, or pushed; ``busy``: it has some."""
        since = self._since.pop(worker, None)
        if since is not None:
            self._took[worker] = [*self._took.get(worker, []), self._now() - since][-_REMEMBERED:]
        if busy:
            self._since[worker] = self._now()

    def counted(self, worker: int) -> None:
        """A push of a worker counts."""
        self._patience.pop(worker, None)

    def gone(self, worker: int) -> None:
        """A worker has nothing any more."""
        self._since.pop(worker, None)

    def renewed(self) -> None:
        """Everyone begins now, as when another seat takes over."""
        self._since = dict.fromkeys(self._since, self._now())

    def begin(self, workers: Sequence[int]) -> None:
        """These have some, as the log says."""
        for worker in workers:
            self._since.setdefault(worker, self._now())

    def bound_seconds(self, worker: int) -> float:
        """How long a worker may be silent."""
        took, least = self._took.get(worker), _LEAST_SECONDS
        if took is None:  # as long as all others: what it is lent may be as new to it as it was to them
            took, least = [one for others in self._took.values() for one in others], self._first
        return max(least, _TIMES * max(took, default=math.inf)) * self._patience.get(worker, 1.0)

    def late(self) -> list[int]:
        """Workers that were silent for too long; each is told once."""
        now = self._now()
        found = sorted(worker for worker, since in self._since.items() if now - since > self.bound_seconds(worker))
        for worker in found:
            del self._since[worker]
            self._patience[worker] = min(8.0, 2 * self._patience.get(worker, 1.0))
        return found
