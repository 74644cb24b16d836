"""Messages between accelerators, whose backends know no tags: what comes next is told ahead, through the hosts.

NCCL matches what two workers send each other by order alone, and does what it is given in one group one after the
other, so that a message which nobody has asked for yet holds up all behind it. So each direction between neighbours is
a group of its own, a lane; and tag and size of each message go ahead of it between the hosts, which know tags. Who
receives takes messages in the order in which they come, and puts aside those whose turn is later. What skips stages
goes through the hosts' memory: lanes between all would be many, and each takes memory of its accelerators.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.errors import WorkerFailed
from sheaf.parallel.world import World


class Lanes:
    """The lanes of ``world``; making them is collective over all workers. What is told ahead has the tag ``heads``."""

    def __init__(self, world: World, heads: int) -> None:
        self._world, self._heads = world, heads
        self._groups = world.directions()
        self._aside: dict[tuple[int, int], deque[tuple[dist.Work, Tensor]]] = {}  # by worker and tag

    def start(self, tensor: Tensor, rank: int, tag: int) -> list[tuple[dist.Work, Tensor]]:
        """Start sending; what is under way, with what must stay until it has arrived."""
        if (self._world.rank, rank) not in self._groups:
            copied = _flat(tensor).cpu()
            work = dist.isend(copied, group=self._world.group, group_dst=rank, tag=tag)
            assert work is not None
            return [(work, copied)]
        head = torch.tensor([tag, tensor.nbytes])
        told = dist.isend(head, group=self._world.group, group_dst=rank, tag=self._heads)
        content = _flat(tensor)
        assert told is not None
        return [(told, head), (self._moving(dist.isend, content, rank, self._world.rank, rank), content)]

    def coming(self, out: Tensor, rank: int, tag: int) -> Pending:
        """Start receiving the next message of that tag into ``out``; waits until its sender has begun to send it.

        Raises WorkerFailed when it is of another size.
        """
        if (rank, self._world.rank) not in self._groups:
            copied = torch.empty(out.nbytes, dtype=torch.uint8)
            work = dist.irecv(copied, group=self._world.group, group_src=rank, tag=tag)
            assert work is not None
            return Pending([work], lambda: _flat(out).copy_(copied))
        aside = self._aside.setdefault((rank, tag), deque())
        while not aside:
            found, size_bytes = self._told(rank)
            if found == tag:
                _check(out, size_bytes, rank)
                return Pending([self._received(_flat(out), rank)])
            room = torch.empty(size_bytes, dtype=torch.uint8, device=self._world.device)
            self._aside.setdefault((rank, found), deque()).append((self._received(room, rank), room))
        work, room = aside.popleft()
        _check(out, room.numel(), rank)
        return Pending([work], lambda: _flat(out).copy_(room))

    def _told(self, rank: int) -> tuple[int, int]:
        head = torch.empty(2, dtype=torch.int64)
        dist.recv(head, group=self._world.group, group_src=rank, tag=self._heads)
        tag, size_bytes = head.tolist()
        return tag, size_bytes

    def _received(self, room: Tensor, rank: int) -> dist.Work:
        return self._moving(dist.irecv, room, rank, rank, self._world.rank)

    def _moving(self, kind: Callable[..., Any], tensor: Tensor, rank: int, origin: int, target: int) -> dist.Work:
        # in a batch of one: alone, NCCL would make one more communicator for it, or warn that it waits for others
        message = dist.P2POp(kind, tensor, self._world.ranks[rank], group=self._groups[origin, target])
        return dist.batch_isend_irecv([message])[0]


def _flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor's own bytes."""
    return tensor.view(-1).view(torch.uint8)


def _check(out: Tensor, size_bytes: int, rank: int) -> None:
    if out.nbytes != size_bytes:
        raise WorkerFailed(
            f"worker {rank} of the pipeline sent {size_bytes} bytes, and {out.nbytes} {tuple(out.shape)} were "
            "expected: what a stage returns differs between workers; use the same model and data everywhere"
        )
