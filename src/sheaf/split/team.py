"""The workers that split layers together, over a process group."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster.traffic import traffic

Explain = Callable[[str, str, Tensor], AbstractContextManager[object]]


class GroupTeam:
    """Moves slices within ``group``; ``explain(operation, why, tensor)`` is entered around each collective.

    ``waited_seconds`` adds up the time this worker stood still for it.
    """

    def __init__(self, group: dist.ProcessGroup | None, explain: Explain | None = None) -> None:
        self._group, self._explain = group, explain or (lambda *_: nullcontext())
        self.rank, self.workers = dist.get_rank(group), dist.get_world_size(group)
        self.waited_seconds = 0.0

    def total(self, tensor: Tensor, why: str) -> Tensor:
        """The sum of every worker's tensor, in memory of its own. Half precision is summed in float32."""
        with self._timed("all_reduce", why, tensor):
            if tensor.dtype in (torch.float16, torch.bfloat16) and self._gloo(tensor):
                wide = tensor.float()
                traffic.collective("all_reduce", wide.nbytes, self.workers, gloo=True)
                dist.all_reduce(wide, group=self._group)
                return wide.to(tensor.dtype)
            if self.workers == 2 and self._gloo(tensor):
                tensor, other = tensor.contiguous(), torch.empty(tensor.shape, dtype=tensor.dtype)
                self._run([(dist.isend, tensor, 1 - self.rank), (dist.irecv, other, 1 - self.rank)])
                return other.add_(tensor)
            summed = tensor.clone(memory_format=torch.contiguous_format)
            traffic.collective("all_reduce", summed.nbytes, self.workers, gloo=self._gloo(summed))
            dist.all_reduce(summed, group=self._group)
            return summed

    def collect(self, own: Tensor, shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        """Every worker's tensor, in rank order; ``shapes`` are theirs and may differ."""
        with self._timed("all_gather", why, own):
            parts = [own if worker == self.rank else own.new_empty(tuple(shape)) for worker, shape in enumerate(shapes)]
            if not self._gloo(own):
                traffic.message(own.nbytes * (self.workers - 1))
                dist.all_gather(parts, own, group=self._group)
                return parts
            self._run(
                [(dist.isend, own, other) for other in self._others()]
                + [(dist.irecv, parts[other], other) for other in self._others()]
            )
            return parts

    def swap_sum(self, pieces: list[Tensor], why: str) -> Tensor:
        """The sum, in rank order, of what every worker has for this one; ``pieces`` go to the workers in rank order."""
        own = pieces[self.rank]
        with self._timed("reduce_scatter", why, own):
            if not self._gloo(own):
                result = torch.empty_like(own)
                traffic.message(sum(one.nbytes for one in pieces) - own.nbytes)
                dist.reduce_scatter(result, pieces, group=self._group)
                return result
            received = [own if worker == self.rank else torch.empty_like(own) for worker in range(self.workers)]
            self._run(
                [(dist.isend, pieces[other], other) for other in self._others()]
                + [(dist.irecv, received[other], other) for other in self._others()]
            )
            summed = received[0].float() if own.dtype in (torch.float16, torch.bfloat16) else received[0].clone()
            for one in received[1:]:
                summed.add_(one)
            return summed.to(own.dtype)

    def trade(self, own: Tensor, other: int, shape: Sequence[int], why: str) -> Tensor:
        """What worker ``other`` gives for ``own``."""
        with self._timed("trade", why, own):
            if other == self.rank:
                return own.clone()
            theirs = own.new_empty(tuple(shape))
            self._run([(dist.isend, own, other), (dist.irecv, theirs, other)])
            return theirs

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        """What every worker has for this one, in rank order; ``pieces`` go to the workers in rank order.

        ``shapes`` are those of what comes, and may differ.
        """
        own = pieces[self.rank]
        with self._timed("all_to_all", why, own):
            received = [
                own if worker == self.rank else own.new_empty(tuple(shape)) for worker, shape in enumerate(shapes)
            ]
            self._run(
                [(dist.isend, pieces[other], other) for other in self._others()]
                + [(dist.irecv, received[other], other) for other in self._others()]
            )
            return received

    def _others(self) -> list[int]:
        return [(self.rank + distance) % self.workers for distance in range(1, self.workers)]

    def _run(self, moves: Sequence[tuple[Callable[..., object], Tensor, int]]) -> None:
        sent = [tensor for kind, tensor, _ in moves if kind is dist.isend and tensor.numel()]
        traffic.message(sum(tensor.nbytes for tensor in sent), gloo=sum(map(self._gloo, sent)))
        operations = [
            dist.P2POp(kind, tensor, group=self._group, group_peer=peer)  # pyright: ignore[reportArgumentType]
            for kind, tensor, peer in moves
            if tensor.numel()  # both sides know that nothing comes
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()

    def _gloo(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and "gloo" in dist.get_backend(self._group)

    @contextmanager
    def _timed(self, operation: str, why: str, tensor: Tensor) -> Iterator[None]:
        start = time.perf_counter()
        with self._explain(operation, why, tensor):
            yield
        self.waited_seconds += time.perf_counter() - start
