"""What steps of workers with seats of shards share: what they keep of them, and whom they give up."""

import contextlib
import threading
from abc import ABC
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from sheaf.errors import RunError
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.restore import kept, numbered
from sheaf.parallel.server.seating import Seating
from sheaf.parallel.server.seats import PRIMARY
from sheaf.parallel.server.threads import Threads
from sheaf.parallel.step import Step
from sheaf.plans.server import outlives

_WATCH_SECONDS = 0.1  # between two looks at who is lost


class AbstractSeatedStep(Step, ABC):
    """``lost`` tells which workers are known to be gone."""

    lost: Callable[[], Collection[int]]

    def _sit(self, seating: Seating) -> None:
        """Begin: these are this worker's seats, and nobody is known to be gone."""
        self._seating, self.lost = seating, tuple
        self._ended, self._watching = threading.Event(), Threads("sheaf-lost")

    def _rise(self) -> None:
        """Give the seats up, and ask no more who is lost."""
        self._ended.set()
        self._seating.close()
        self._watching.join()

    @property
    def hosts(self) -> list[Host]:
        """The seats of shards that this worker has now."""
        return self._seating.seats

    @property
    def clock(self) -> int:
        """How many clocks lie behind the next step: one for each, or for all between two meetings."""
        return self.index // max(1, self.plan.meets_locally.every)

    @property
    def outlives_workers(self) -> bool:
        """Whether the others go on when a worker is lost."""
        return outlives(self.plan.serves, stolen=self.plan.stolen, local=bool(self.plan.local))

    @property
    def state_owner(self) -> int:
        """Each worker keeps the shard that it holds."""
        return self.rank

    def _kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the shards of this worker hold, once every worker has come as far: tensors, and the rest by shard."""
        held: list[tuple[int, tuple[dict[str, Tensor], dict[str, Any]]]] = []
        for host in self.hosts:
            if host.seat == PRIMARY:
                if not host.wait_for_all(self.clock):
                    raise RunError(f"shard {host.shard.number} waits for workers that are behind step {self.index}")
                held.append((host.shard.number, kept(host.shard)))
        return numbered(held)

    def _heed(self, lost: Callable[[], Collection[int]]) -> None:
        """Give up at once whom ``lost`` names, before a lease has run out."""
        self.lost = lost
        self._watching.start(self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_SECONDS):
            with contextlib.suppress(RuntimeError):  # the store went with the run
                for member in self._members(self.lost()):
                    for host in self.hosts:
                        host.lose(member)
                self._looked()

    def _member(self, rank: int) -> int:
        """Which worker of the clock a rank is, or is of: its replica."""
        return self._spread.mesh.place(rank).dp

    def _members(self, ranks: Collection[int]) -> list[int]:
        """The workers of the clock that these are, or are of: one for each replica."""
        return sorted({self._member(rank) for rank in ranks if rank < self.plan.computing})

    def _looked(self) -> None:
        """Whoever is lost was given up; called now and then from a thread of its own."""
