"""Who has come how far, and who may read: one rule for lock-step, bounded staleness and none.

A pull at clock c waits until the slowest worker's clock is at least c - s (stale synchronous parallel: Ho et al., 2013,
NIPS 26). Only workers with a lease count, so that one that is dead cannot freeze the clock.
"""

import time
from collections.abc import Callable, Iterable


class Clocks:
    """The clocks of the workers that count: how many steps each has finished.

    >>> clocks = Clocks({0: 3, 1: 5}, staleness=2)
    >>> clocks.allows(5), clocks.allows(6)
    (True, False)
    >>> clocks.leave(0)
    >>> clocks.allows(6)
    True
    """

    def __init__(self, clocks: dict[int, int], staleness: int | None) -> None:
        self._clocks, self.staleness = dict(clocks), staleness
        self._slowest: int | None = None  # asked for several times in each exchange

    @property
    def workers(self) -> tuple[int, ...]:
        """Those that count, in order."""
        return tuple(sorted(self._clocks))

    @property
    def slowest(self) -> int:
        """The smallest clock; 0 when nobody counts."""
        if self._slowest is None:
            self._slowest = min(self._clocks.values(), default=0)
        return self._slowest

    def of(self, worker: int) -> int:
        """A worker's clock."""
        return self._clocks[worker]

    def advance(self, worker: int, clock: int) -> None:
        """A worker that counts has finished ``clock`` steps; clocks never go back."""
        if worker in self._clocks:
            self._clocks[worker] = max(clock, self._clocks[worker])
            self._slowest = None

    def enter(self, worker: int, clock: int) -> int:
        """A worker counts (again). Its step under way is the one where it stood, or that which the slowest did last."""
        others = [one for other, one in self._clocks.items() if other != worker]
        self._clocks[worker] = max(clock, min(others, default=0) - 1)
        self._slowest = None
        return self._clocks[worker]

    def leave(self, worker: int) -> None:
        """A worker no longer counts."""
        self._clocks.pop(worker, None)
        self._slowest = None

    def allows(self, clock: int) -> bool:
        """Whether a worker at ``clock`` may read."""
        return self.staleness is None or not self._clocks or self.slowest >= clock - self.staleness


class Leases:
    """When each worker was last heard of. A worker has a lease for ``seconds`` after that; ``grace_seconds`` before."""

    def __init__(
        self,
        workers: Iterable[int],
        seconds: float,
        grace_seconds: float = 120.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self._now = seconds, now
        self._until = {worker: now() + grace_seconds for worker in workers}

    def heard(self, worker: int) -> None:
        """A worker is alive."""
        self._until[worker] = self._now() + self.seconds

    def renewed(self) -> None:
        """Everyone gets a new lease, as when another seat takes over, or this process itself stood still."""
        for worker in self._until:
            self.heard(worker)

    def expire(self, worker: int) -> None:
        """A worker's lease is over now."""
        if worker in self._until:
            self._until[worker] = self._now()

    def end(self, worker: int) -> None:
        """A worker is gone, and needs no lease."""
        self._until.pop(worker, None)

    def expired(self, more_seconds: float = 0.0) -> list[int]:
        """Workers whose lease has run out, so many seconds ago."""
        now = self._now() - more_seconds
        return sorted(worker for worker, until in self._until.items() if until < now)
