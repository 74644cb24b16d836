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
_DOUBT_SECONDS = 10.0  # how long it may take until it is told who was lost


class Wake:
    """Who of the replicas is lost and who is done, told in the run's ``store``, as one worker of a replica sees it.

    A worker of a lost replica that has not noticed, as its step is long or as it waits for one that only serves,
    serves all the while from its threads, so it is let be until the others are done.
    """

    def __init__(self, store: dist.Store, key: str, spread: Spread, lease_seconds: float) -> None:
        self._store, self._key, self._mesh, self._rank = store, key, spread.mesh, spread.world.rank
        self._mine, self._lease_seconds = spread.place.dp, lease_seconds
        self._since: float | None = None  # when no replica was seen to be left
        self._given_up = set[int]()
        self._lock = threading.Lock()
        self.begun = False  # whether this worker computes no more

    def given_up(self) -> Collection[int]:
        """Replicas that found out that the others went on without them."""
        others = [one for one in range(self._mesh.dp) if one not in self._given_up]
        self._given_up |= {one for one in others if self._store.check([f"{self._key}/{one}/given_up"])}
        return self._given_up

    def done(self) -> None:
        """This worker needs no shard any more."""
        with self._lock:
            self.begun = True
        with contextlib.suppress(RuntimeError):  # the store went with the run
            self._store.set(f"{self._key}/done/{self._rank}", "1")

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
        while (are_done := self._are_done(gone())) is False:
            time.sleep(_LOOK_SECONDS)
        if are_done:
            return True
        count = self._mesh.dp
        raise WorkerFailed(f"each of the {count} replicas has lost a worker: look at what every worker wrote last")

    def look(self, gone: Collection[int]) -> None:
        """Now and then: end this process when its replica is lost, it has not noticed, and nobody needs it any more.

        When no replica is left, whoever noticed has a lease to say so first.
        """
        gone = {*gone, *self.given_up()}
        if self._mine not in gone:
            return
        are_done = self._are_done(gone)
        with self._lock:
            if self.begun or are_done is False:
                return
            if are_done is None:
                self._since = self._since or time.monotonic()
                if time.monotonic() - self._since < self._lease_seconds:
                    return
            why = "the others are done" if are_done else "no other replica is left"
            print(f"sheaf: {self._told}; it ends, as {why}", file=sys.stderr, flush=True)
            os._exit(0 if are_done else 1)

    def _are_done(self, gone: Collection[int]) -> bool | None:
        """Whether all workers of replicas that live need no shard any more; None where none lives."""
        living = [rank for rank in range(self._mesh.workers) if self._mesh.place(rank).dp not in gone]
        return all(self._store.check([f"{self._key}/done/{rank}"]) for rank in living) if living else None

    @property
    def _told(self) -> str:
        others = ", ".join(str(rank) for rank in self._mesh.mates(self._rank) if rank != self._rank)
        return f"worker {self._rank} is of a replica that is lost, with workers {others}"
