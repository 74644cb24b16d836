"""Where a worker listens, and where the others do: loopback for workers of one machine, else its own address."""

import os
import socket

import torch

from sheaf.errors import PlanError
from sheaf.parallel.server.link import Address
from sheaf.parallel.world import World

LOOPBACK = "127.0.0.1"
_NAME = 64  # bytes of an address


def own_address(workers: int) -> str:
    """Loopback when all workers are on this machine, else the address from which the run's master is reached.

    Raises PlanError when the workers are on several machines and the master has no address.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
    master = os.environ.get("MASTER_ADDR", "")
    if here >= workers:
        return LOOPBACK
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing; the system chooses the way
            return probe.getsockname()[0]
    except OSError as error:
        raise PlanError(
            f"the workers are on several machines, and MASTER_ADDR={master!r} leads nowhere ({error}): set it to the "
            "address of worker 0, as torchrun does"
        ) from None


def told_all(world: World, mine: list[Address]) -> list[list[Address]]:
    """By worker, the addresses that each gives; as many from each (collective)."""
    table = torch.zeros(world.workers, len(mine), _NAME + 1, dtype=torch.int64)
    for place, (host, port) in enumerate(mine):
        name = host.encode()
        table[world.rank, place, : len(name)] = torch.tensor(list(name))
        table[world.rank, place, _NAME] = port
    found = world.summed(table, "addresses of the parameter server").tolist()
    return [[(bytes(one[:_NAME]).rstrip(b"\0").decode(), int(one[_NAME])) for one in worker] for worker in found]
