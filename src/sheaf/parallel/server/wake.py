"""What becomes of a replica that has lost a worker: its others compute no more, and serve until the run is over."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Collection

import torch.distributed as dist

from sheaf.errors import WorkerFailed
from sheaf.parallel.server.client import GivenUp
from sheaf.parallel.spread import Spread

_LOOK_SECONDS = 0.1  # between two looks whether the others are done
_STEPS = 3  # times the longest step: so long may a worker not notice that its replica is lost
_DOUBT_SECONDS = 10.0  # how long it may take until it is told who was lost


class Wake:
    """Who of the replicas is lost and who is done, told in the run's ``store``, as one worker of a replica sees it."""

    def __init__(self, store: dist.Store, key: str, spread: Spread, lease_seconds: float) -> None:
        self._store, self._key, self._mesh, self._rank = store, key, spread.mesh, spread.world.rank
        self._mine, self._patience_seconds = spread.place.dp, lease_seconds
        self._since: float | None = None  # when this worker's replica was seen to be lost
        self._longest_seconds = 0.0  # of this worker's steps
        self._given_up = set[int]()
        self._lock = threading.Lock()
        self.begun = False  # whether this worker computes no more

    def given_up(self) -> Collection[int]:
        """Replicas that found out that the others went on without them."""
        others = [one for one in range(self._mesh.dp) if one not in self._given_up]
        self._given_up |= {one for one in others if self._store.check([f"{self._key}/{one}/given_up"])}
        return self._given_up

    def stepped(self, seconds: float) -> None:
        """How long a step took: in the midst of one nobody notices anything."""
        self._longest_seconds = max(self._longest_seconds, seconds)

    def done(self) -> None:
        """This worker's replica needs no shard any more."""
        with self._lock:
            self.begun = True
        with contextlib.suppress(RuntimeError):  # the store went with the run
            self._store.set(f"{self._key}/{self._mine}/done", "1")

    def stays(self, error: WorkerFailed, gone: Callable[[], Collection[int]], hang_up: Callable[[], None]) -> bool:
        """Whether the error is that this worker's replica is lost; if so, once all that live are done.

        Raises WorkerFailed when none lives.
        """
        if isinstance(error, GivenUp):
            self._store.set(f"{self._key}/{self._mine}/given_up", "1")
        until = time.monotonic() + _DOUBT_SECONDS
        while self._mine not in gone():
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS / 5)
        with self._lock:
            self.begun = True
        hang_up()
        print(f"sheaf: {self._told}; it computes no more, and serves its shards", file=sys.stderr, flush=True)
        while waiting := [one for one in range(self._mesh.dp) if one not in (lost := gone())]:
            if all(self._store.check([f"{self._key}/{one}/done"]) for one in waiting):
                return True
            time.sleep(_LOOK_SECONDS)
        raise WorkerFailed(f"each of the {len(lost)} replicas has lost a worker: look at what every worker wrote last")

    def look(self, gone: Collection[int]) -> None:
        """Now and then: end this process when its replica is lost and it has not noticed, as it waits for one that
        serves.
        """
        if self._mine not in {*gone, *self.given_up()}:
            return
        self._since = self._since or time.monotonic()
        with self._lock:
            patience_seconds = max(self._patience_seconds, _STEPS * self._longest_seconds)
            if self.begun or time.monotonic() - self._since < patience_seconds:
                return
            print(f"sheaf: {self._told}; it ends, as it waits for them", file=sys.stderr, flush=True)
            os._exit(1)

    @property
    def _told(self) -> str:
        others = ", ".join(str(rank) for rank in self._mesh.mates(self._rank) if rank != self._rank)
        return f"worker {self._rank} is of a replica that is lost, with workers {others}"
