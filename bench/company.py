"""Default process groups of several sizes, one after another, among workers that are there already.

Starting workers costs seconds, a process group milliseconds: whoever compares plans of one, two and four workers starts
four once, and lets the first of them work by themselves now and then.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sheaf.launch.world import World, enter_group


class Company:
    """The workers of the default process group, which must be there; the same calls on all of them."""

    def __init__(self) -> None:
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._number = 0

    @contextmanager
    def of(self, workers: int) -> Iterator[bool]:
        """Let the first ``workers`` be all there are while the block runs; True on those, False on the others.

        The others wait at the end of the block. One worker has no process group.
        """
        dist.barrier()
        dist.destroy_process_group()
        self._number += 1
        number = self._number
        mine = self.rank < workers
        try:
            if mine and workers > 1:
                self._enter(f"{number}-of-{workers}", workers)
            yield mine
        finally:
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            if mine and self.rank == 0:
                self._store.set(f"company/{number}", "done")
            self._store.wait([f"company/{number}"])
            self._enter(f"{number}-whole", self.workers)

    def _enter(self, name: str, workers: int) -> None:
        store = dist.PrefixStore(f"company/{name}", self._store)
        enter_group(store, World(self.rank, workers, self.rank, torch.device("cpu")))
