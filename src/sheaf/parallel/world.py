"""The workers of a run, as one of them sees the others: collectives that are timed, and explained when they fail."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster import primitives
from sheaf.cluster.answers import heard, told
from sheaf.cluster.primitives import Pending
from sheaf.errors import WorkerFailed
from sheaf.graph.stopwatch import Clock


class World:
    """This worker's rank, how many there are, and the collectives between them.

    ``waited_seconds`` adds up the time this worker stood still for others. A collective that fails raises
    WorkerFailed with what this worker was doing, and what every worker that still answers was doing.
    With ``among`` it is the one of several disjoint groups of ranks that this worker is in, together all of them. With
    ``gathers_apart`` gathers have a process group of their own, for executors whose gathers and reductions interleave
    differently on different workers. Groups are made by all workers together, and given back by ``close``.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        gathers_apart: bool = False,
        among: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.device = device
        joined = dist.is_available() and dist.is_initialized()
        self._whole = dist.get_world_size() if joined else 1
        everyone = list(range(self._whole))
        mine = dist.get_rank() if joined else 0
        groups = self._all = [list(ranks) for ranks in among] if among is not None else [everyone]
        self.ranks = next(ranks for ranks in groups if mine in ranks)
        self.workers, self.rank = len(self.ranks), self.ranks.index(mine)
        self._clock, self._waited_seconds = Clock(device), 0.0
        self._waits: list[tuple[Any, Any]] = []  # moments of an accelerator, which it may not have come to
        self._last: deque[str] = deque(maxlen=8)
        self._made: list[dist.ProcessGroup] = []
        self.group = None if self.workers in (1, self._whole) and not _many(groups) else self._grouped(groups)
        self._gathers = self._grouped(groups) if gathers_apart and _many(groups, single=True) else None

    @classmethod
    def alone(cls) -> "World":
        """This worker by itself, whoever else is there."""
        joined = dist.is_available() and dist.is_initialized()
        return cls(torch.device("cpu"), among=[[rank] for rank in range(dist.get_world_size() if joined else 1)])

    def _grouped(self, groups: list[list[int]]) -> dist.ProcessGroup | None:
        """Make every group, each of which all ranks must make; keep this worker's."""
        mine: dist.ProcessGroup | None = None
        for ranks in groups:
            if len(ranks) < 2:
                continue
            group = dist.new_group(ranks)
            if self.ranks == ranks:
                assert isinstance(group, dist.ProcessGroup)
                mine = group
                self._made.append(group)
        return mine

    @property
    def waited_seconds(self) -> float:
        """How long this worker stood still for others, on an accelerator its work; waits until that is known."""
        while self._waits:
            start, end = self._waits.pop()
            end.synchronize()
            self._waited_seconds += self._clock.seconds(start, end)
        return self._waited_seconds

    @waited_seconds.setter
    def waited_seconds(self, seconds: float) -> None:
        self._waited_seconds = seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as stood still."""
        start = self._clock.now()
        yield
        end = self._clock.now()
        if self.device.type == "cpu":
            self._waited_seconds += end - start
        else:
            self._waits.append((start, end))

    def now(self) -> float:
        """Seconds on the host's clock, once this worker's device has done what it was given, messages apart."""
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()
        return time.perf_counter()

    def directions(self) -> dict[tuple[int, int], dist.ProcessGroup]:
        """A group for each direction between neighbours in the ring of these workers, by their ranks (collective over
        all workers).
        """
        made: dict[tuple[int, int], dist.ProcessGroup] = {}
        for ranks in self._all:
            count = len(ranks)
            near = {pair for one in range(count) for pair in permutations((one, (one + 1) % count), 2)}
            for origin, target in sorted(pair for pair in near if count > 1):
                group = dist.new_group([ranks[origin], ranks[target]])
                if ranks == self.ranks and self.rank in (origin, target):
                    assert isinstance(group, dist.ProcessGroup)
                    if self.device.type != "cpu":  # there before it is needed: who came first would wait for the other
                        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
                    made[origin, target] = group
                    self._made.append(group)
        return made

    @property
    def everyone(self) -> int:
        """How many workers the run has, in this group or not."""
        return self._whole

    @property
    def apart(self) -> dist.ProcessGroup | None:
        """The group that gathers have, where they have one of their own."""
        return self._gathers or self.group

    @property
    def counter(self) -> dist.Store | None:
        """The store that all workers share; None when alone."""
        return dist.distributed_c10d._get_default_store() if self.workers > 1 else None

    def all_reduce(self, tensor: Tensor, what: str) -> Pending:
        """Start summing ``tensor`` over all workers, in place."""
        with self.explained("all_reduce", what, tensor):
            return primitives.start_all_reduce(tensor, self.group)

    def reduce_scatter(self, output: Tensor, given: Tensor, what: str, sizes: Sequence[int] = ()) -> Pending:
        """Start summing ``given`` over all workers; this worker's part, of ``sizes`` or equal, goes to ``output``."""
        with self.explained("reduce_scatter", what, given):
            return primitives.start_reduce_scatter(output, given, self.group, sizes)

    def all_gather(self, output: Tensor, given: Tensor, what: str, sizes: Sequence[int] = ()) -> Pending:
        """Start gathering every worker's ``given``, of ``sizes`` or equal, into ``output``, in rank order."""
        with self.explained("all_gather", what, output):
            return primitives.start_all_gather(output, given, self._gathers or self.group, sizes)

    def all_to_all(self, received: Tensor, given: Tensor, what: str) -> Pending:
        """Start sending row i of ``given`` to worker i; its row for this worker becomes row i of ``received``."""
        with self.explained("all_to_all", what, given):
            return primitives.start_all_to_all(received, given, self.group)

    def trade(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], what: str) -> None:
        """Send tensors to some workers and receive from some, who do so too; done when all has come.

        Where gathers have a group of their own, it is in that.
        """
        with self.explained("trade", what, (sent or received)[0][0]):
            pending = primitives.start_trade(sent, received, self.apart)
        self.wait(pending)

    def swap(self, received: Sequence[Tensor], given: Sequence[Tensor], what: str) -> Pending:
        """Start sending ``given[i]`` to worker i; ``received[i]``, of a size that both know, becomes what it gives."""
        with self.explained("swap", what, given[self.rank]):
            return primitives.start_swap(received, given, self.group)

    def wait(self, pending: Pending) -> None:
        """Finish a collective, and count the time."""
        with self.waiting(), self.explained():
            pending.wait()

    def summed(self, values: Tensor, what: str) -> Tensor:
        """The sum of a small CPU tensor over all workers, at once."""
        return self.start_sum(values, what)()

    def start_sum(self, values: Tensor, what: str) -> Callable[[], Tensor]:
        """Start summing a small CPU tensor over all workers; what is returned waits for the sum."""
        if self.workers == 1:
            return lambda: values
        moved = values.to(self.device)
        pending = self.all_reduce(moved, what)

        def summed() -> Tensor:
            self.wait(pending)
            return moved.cpu()

        return summed

    def barrier(self) -> None:
        """Wait for every worker."""
        self.summed(torch.zeros(1), "barrier")

    def number(self, key: str) -> int:
        """How often the workers together asked for this key's number, the same on every worker (collective)."""
        store, mine = self.counter, torch.zeros(1, dtype=torch.int64)
        if store is None:
            return 1
        if self.rank == 0:
            mine += store.add(key, 1)
        return int(self.summed(mine, key))

    def agreed(self, find: Callable[[], Any]) -> Any:
        """What ``find`` gives on worker 0, of what JSON knows, on every worker (collective).

        A SheafError that it raises is raised on every worker.
        """
        if self.workers == 1:
            return find()
        mine, raised = told(find) if self.rank == 0 else (b"", None)
        size = self.summed(torch.tensor([len(mine)]), "what was found")
        content = torch.zeros(int(size), dtype=torch.uint8)
        if mine:
            content = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        content = self.summed(content, "what was found")
        if raised is not None:
            raise raised
        return heard(content.numpy().tobytes())

    def close(self) -> None:
        """Give back the groups that were made; call it on every worker, as often as you like."""
        groups, self._made, self.group, self._gathers = self._made, [], None, None
        for group in groups:
            if dist.is_initialized():  # they went with the default group otherwise
                dist.destroy_process_group(group)

    @contextlib.contextmanager
    def explained(self, operation: str = "", what: str = "", tensor: Tensor | None = None) -> Iterator[None]:
        if tensor is not None:
            self._last.append(f"{operation} of {what} {tuple(tensor.shape)}")
        try:
            yield
        except (RuntimeError, dist.DistBackendError) as error:
            raise WorkerFailed(self._explanation(error)) from error

    def _explanation(self, error: BaseException) -> str:
        mine = self._last[-1] if self._last else "nothing yet"
        rank = self.ranks[self.rank]
        lines = [f"worker {rank} of {self._whole} lost the others in {mine}: {str(error).splitlines()[0]}"]
        with contextlib.suppress(Exception):  # the store may be gone with its host
            store = dist.distributed_c10d._get_default_store()
            store.set(f"sheaf/lost/{rank}", mine)
            time.sleep(0.5)
            for other in range(self._whole):
                key = f"sheaf/lost/{other}"
                if other != rank and store.check([key]):
                    store.set_timeout(timedelta(seconds=1))
                    lines.append(f"worker {other} also failed, in {store.get(key).decode()}")
                elif other != rank:
                    lines.append(f"worker {other} has not answered: look at it first")
        return "\n".join(lines)


def _many(groups: list[list[int]], *, single: bool = False) -> bool:
    """Whether there is a group of several ranks that is not all of them; ``single``: any of several."""
    several = [ranks for ranks in groups if len(ranks) > 1]
    return bool(several) and (single or len(groups) > 1)
