"""Point to point between pipeline stages: tensors, flags and small values, each kind in the order it is sent."""

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.cluster.traffic import traffic
from sheaf.parallel.lanes import Lanes
from sheaf.parallel.world import World

FORWARD, BACKWARD, READ, SIZES = range(4)  # kinds of messages, which never overtake their own


ALIGNED = 16  # bytes: where a tensor of any dtype may begin in a message


class Post:
    """Messages between stages; ``world`` are the workers of one pipeline, of which worker ``stage % workers`` has a
    stage. Two stages of one worker pass tensors on in memory.
    """

    def __init__(self, world: World, num_stages: int) -> None:
        self._world, self._num_stages = world, num_stages
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()
        self._own: dict[int, deque[Tensor]] = {}
        self._own_gradients: dict[int, deque[list[Tensor | None]]] = {}
        self._expected: dict[int, deque[tuple[dist.Work | Pending, Tensor]]] = {}
        self._ahead = world.device.type == "cpu"  # elsewhere, messages have an order of their own
        self._lanes = None if self._ahead else Lanes(world, heads=4 * num_stages**2)

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
        traffic.message(tensor.nbytes, gloo=int(tensor.device.type == "cpu"))
        with self._world.explained("send", f"message {tag} to {rank}", tensor):
            if (lanes := self._lanes_of(tensor)) is not None:
                self._under_way.extend(lanes.start(tensor, rank, tag))
                return
            work = dist.isend(tensor, group=self._world.group, group_dst=rank, tag=tag)
            assert work is not None
        self._under_way.append((work, tensor))

    def receive(self, out: Tensor, origin: int, target: int, kind: int) -> Tensor:
        """Wait for the next message of that kind between these stages; ``out`` has its shape and dtype."""
        tag = self._tag(origin, target, kind)
        if self._rank(origin) == self._world.rank:
            return self._own[tag].popleft()
        return self.finish(out, self._rank(origin), tag)

    def expect(self, out: Tensor, origin: int, target: int, kind: int) -> None:
        """Be ready for a message before its turn, so that it can arrive while this worker computes.

        Of one kind between two stages, ``receive`` takes the messages in the order in which they were expected.
        """
        tag = self._tag(origin, target, kind)
        if self._ahead and out.numel() and self._rank(origin) != self._world.rank:
            self._expected.setdefault(tag, deque()).append((self._coming(out, self._rank(origin), tag), out))

    def finish(self, out: Tensor, rank: int, tag: int) -> Tensor:
        """Wait for a worker's message."""
        if not out.numel():
            return out
        with self._world.waiting():
            if self._expected.get(tag):
                work, ready = self._expected[tag].popleft()
                assert (ready.shape, ready.dtype) == (out.shape, out.dtype), f"message {tag} is not what was expected"
                out = ready
            else:
                work = self._coming(out, rank, tag)
            with self._world.explained():
                work.wait()
        return out

    def _coming(self, out: Tensor, rank: int, tag: int) -> dist.Work | Pending:
        with self._world.explained("receive", f"message {tag} from {rank}", out):
            if (lanes := self._lanes_of(out)) is not None:
                return lanes.coming(out, rank, tag)
            work = dist.irecv(out, group=self._world.group, group_src=rank, tag=tag)
        assert work is not None
        return work

    def send_gradients(self, leaves: Sequence[Tensor], origin: int, target: int) -> None:
        """Send the gradients of what came from an earlier stage, and which of them have none, as one message."""
        tag = self._tag(origin, target, BACKWARD)
        if self._rank(target) == self._world.rank:
            self._own_gradients.setdefault(tag, deque()).append([leaf.grad for leaf in leaves])
        else:
            self.start(packed(leaves), self._rank(target), tag)

    def expect_gradients(self, tensors: Sequence[Tensor], origin: int, target: int) -> None:
        """Be ready for the gradients of what was sent."""
        self.expect(unpacked_room(tensors), origin, target, BACKWARD)

    def receive_gradients(self, tensors: Sequence[Tensor], origin: int, target: int) -> list[Tensor | None]:
        """Wait for the gradients of what was sent; None for what has none."""
        tag = self._tag(origin, target, BACKWARD)
        if self._rank(origin) == self._world.rank:
            return self._own_gradients[tag].popleft()
        return unpacked(self.finish(unpacked_room(tensors), self._rank(origin), tag), tensors)

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
        with self._world.waiting(), self._world.explained():
            while self._under_way:
                self._under_way.popleft()[0].wait()

    def _lanes_of(self, tensor: Tensor) -> Lanes | None:
        return None if tensor.device.type == "cpu" else self._lanes

    def _rank(self, stage: int) -> int:
        return stage % self._world.workers

    def _tag(self, origin: int, target: int, kind: int) -> int:
        return (kind * self._num_stages + origin) * self._num_stages + target


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor's bytes begin in a message, and where all end: there a byte for each says whether it came."""
    starts, stop = list[int](), 0
    for tensor in tensors:
        starts.append(stop)
        stop += -(-tensor.numel() * tensor.dtype.itemsize // ALIGNED) * ALIGNED
    return starts, stop


def unpacked_room(tensors: Sequence[Tensor]) -> Tensor:
    """Memory for a message with a gradient of each tensor."""
    device = tensors[0].device
    return torch.empty(_places(tensors)[1] + len(tensors), dtype=torch.uint8, device=device)


def packed(leaves: Sequence[Tensor]) -> Tensor:
    """A message of the gradients that leaves have.

    >>> leaves = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    >>> leaves[1].grad = torch.tensor([5.0, 6.0])
    >>> unpacked(packed(leaves), leaves)
    [None, tensor([5., 6.])]
    """
    message = unpacked_room(leaves)
    for leaf, room in zip(leaves, _views(message, leaves), strict=True):
        if leaf.grad is not None:
            room.copy_(leaf.grad)
    message[-len(leaves) :] = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8)
    return message


def unpacked(message: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in a message, in its memory."""
    come = message[-len(tensors) :].tolist()
    return [view if there else None for view, there in zip(_views(message, tensors), come, strict=True)]


def _views(message: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    starts, _ = _places(tensors)
    return [
        message[start : start + tensor.numel() * tensor.dtype.itemsize].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
