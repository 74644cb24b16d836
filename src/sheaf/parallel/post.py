"""Point to point between pipeline stages: tensors, flags and small values, each kind in the order it is sent."""

import json
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.parallel.world import World

FORWARD, BACKWARD, FLAGS, READ, SIZES = range(5)  # kinds of messages, which never overtake their own


class Post:
    """Messages between stages; ``world`` are the workers of one pipeline, of which worker ``stage % workers`` has a
    stage. Two stages of one worker pass tensors on in memory.
    """

    def __init__(self, world: World, num_stages: int) -> None:
        self._world, self._num_stages = world, num_stages
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()
        self._own: dict[int, deque[Tensor]] = {}

    def send(self, tensor: Tensor, origin: int, target: int, kind: int) -> None:
        """Start sending from one stage to another; the tensor must not change until it has arrived."""
        tag = self._tag(origin, target, kind)
        if self._rank(target) == self._world.rank:
            self._own.setdefault(tag, deque()).append(tensor)
            return
        self.start(tensor, self._rank(target), tag)

    def start(self, tensor: Tensor, rank: int, tag: int) -> None:
        """Start sending to a worker; what is empty stays here."""
        if not tensor.numel():
            return
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
        with self._world.explained("send", f"message {tag} to {rank}", tensor):
            work = dist.isend(tensor, group=self._world.group, group_dst=rank, tag=tag)
            assert work is not None
        self._under_way.append((work, tensor))

    def receive(self, out: Tensor, origin: int, target: int, kind: int) -> Tensor:
        """Wait for the next message of that kind between these stages; ``out`` has its shape and dtype."""
        tag = self._tag(origin, target, kind)
        if self._rank(origin) == self._world.rank:
            return self._own[tag].popleft()
        return self.finish(out, self._rank(origin), tag)

    def finish(self, out: Tensor, rank: int, tag: int) -> Tensor:
        """Wait for a worker's message."""
        if not out.numel():
            return out
        start = time.perf_counter()
        with self._world.explained("receive", f"message {tag} from {rank}", out):
            work = dist.irecv(out, group=self._world.group, group_src=rank, tag=tag)
            assert work is not None
            work.wait()
        self._world.waited_seconds += time.perf_counter() - start
        return out

    def tell(self, value: Any, origin: int, target: int) -> None:
        """Send a value of what JSON knows."""
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self.send(torch.tensor([len(content)]), origin, target, SIZES)
        self.send(content, origin, target, READ)

    def hear(self, origin: int, target: int) -> Any:
        """The next value told by a stage."""
        size = self.receive(torch.zeros(1, dtype=torch.int64), origin, target, SIZES)
        content = self.receive(torch.empty(int(size), dtype=torch.uint8), origin, target, READ)
        return json.loads(content.numpy().tobytes())

    def is_here(self, stage: int) -> bool:
        """Whether this worker has a stage."""
        return self._rank(stage) == self._world.rank

    def settle(self) -> None:
        """Wait until everything has arrived."""
        start = time.perf_counter()
        while self._under_way:
            work, _ = self._under_way.popleft()
            with self._world.explained():
                work.wait()
        self._world.waited_seconds += time.perf_counter() - start

    def _rank(self, stage: int) -> int:
        return stage % self._world.workers

    def _tag(self, origin: int, target: int, kind: int) -> int:
        return (kind * self._num_stages + origin) * self._num_stages + target
