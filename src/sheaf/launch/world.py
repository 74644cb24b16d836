"""Who this process is among the workers: joined from torchrun's environment, or given by our own launcher."""

import atexit
import datetime as dt
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sheaf.errors import SheafError, WorkerFailed, first_line

LOST = "lost"  # the key under which the launcher tells who is
_told: list[dist.Store] = []
_LOST = re.compile(
    r"timed out|connection closed|connection reset|connection refused|broken pipe|connection was likely closed"
    r"|remote process exited|socket closed|watchdog|unhandled system error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class World:
    """One worker's place: its number, how many there are, its number on this machine, and what it computes on."""

    rank: int
    workers: int
    local_rank: int
    device: torch.device

    @property
    def hosts(self) -> int:
        """On how many machines the workers are, when torchrun started as many on each."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.workers))
        return -(-self.workers // max(1, here))

    @classmethod
    def alone(cls) -> "World":
        """The only worker there is."""
        return cls(0, 1, 0, own_device(0, 1))


def told_in(store: dist.Store) -> None:
    """The launcher tells in this store who is lost."""
    _told[:] = [store]


def lost() -> frozenset[int]:
    """Workers that our launcher has seen die, and that the others do without; under torchrun there are none."""
    if not _told or not _told[0].check([LOST]):
        return frozenset()
    return frozenset(json.loads(_told[0].get(LOST)))


def join() -> World | None:
    """Become a worker of the default process group when torchrun (or our launcher) started this process.

    None when nobody did. Devices go by LOCAL_RANK, the backend by device: gloo for CPUs, NCCL beside it for NVIDIA.
    """
    if dist.is_available() and dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        return World(dist.get_rank(), dist.get_world_size(), local_rank, own_device(local_rank, local_workers))
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return None
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = own_device(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    store = next(dist.rendezvous("env://", rank, workers))[0]
    # A restarted job finds the addresses of the dead one under the old prefix, and waits for them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    enter_group(dist.PrefixStore(f"sheaf_{attempt}", store), World(rank, workers, local_rank, device))
    atexit.register(_leave)
    return World(rank, workers, local_rank, device)


def _leave() -> None:
    """Take the group down while Python still runs: gloo's threads, left to the end of the process, may abort it.

    Not after an error, for then a collective that others never enter would be waited for.
    """
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def own_device(local_rank: int, local_workers: int) -> torch.device:
    """An accelerator of one's own when this machine has one for each of its workers, otherwise the CPU."""
    if torch.accelerator.is_available() and torch.accelerator.device_count() >= local_workers:
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, local_rank)
    return torch.device("cpu")


def enter_group(store: dist.Store, world: World, timeout_s: float = 1800.0) -> None:
    """Initialise the default process group over ``store``; CPU tensors always travel by gloo."""
    backend = "gloo"
    device = None
    if world.device.type != "cpu":
        torch.accelerator.set_device_index(world.device)
        backend = f"cpu:gloo,{world.device.type}:{dist.get_default_backend_for_device(world.device)}"
        device = world.device
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.workers,
        timeout=dt.timedelta(seconds=timeout_s),
        device_id=device,
    )


@contextmanager
def peers(rank: int) -> Iterator[None]:
    """Turn a time-out or a lost connection among workers into a WorkerFailed that says who waited, and where.

    The backends' own messages name neither.
    """
    try:
        yield
    except SheafError:
        raise
    except RuntimeError as error:  # DistBackendError is one
        if not is_lost_peer(error):
            raise
        raise WorkerFailed(
            f"worker {rank} lost another worker, or waited too long for it, at {_place(error)}: "
            f"{_first_line(error)}. Look at the other workers' output: the one that says nothing hung or was killed"
        ) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether this says that some other worker is gone or silent."""
    if not isinstance(error, RuntimeError | ConnectionError):
        return False
    return isinstance(error, dist.DistBackendError | ConnectionError) or bool(_LOST.search(str(error)))


def _place(error: BaseException) -> str:
    """Where the wait began: the innermost frame outside torch, and the collective it called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename] or frames
    called = [
        frame.name for frame in frames if frame.filename.endswith("distributed_c10d.py") and frame.name != "wrapper"
    ]
    where = f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else "an unknown place"
    return f"{called[0]} ({where})" if called else where


def _first_line(error: BaseException) -> str:
    return first_line(error) or type(error).__name__
