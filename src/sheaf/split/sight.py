"""Which keys each query of an attention may see, and who takes which queries, so that all have alike to do.

Under a causal mask the last queries see all keys and the first see one. A worker that has a run of queries therefore
trades the later half of it for that of its mirror, the last worker for the first: the two halves it then has are as far
from the middle as each other (the pairing of Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2, and of
zigzag ring attention), while all else in the model stays cut into plain runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sheaf.plans.split import Cut

WORTH_TRADING = 0.9  # the busiest worker's work after the trade, of that before

Range = tuple[int, int]  # start and stop


@dataclass(frozen=True, eq=False)
class Sight:
    """By query, the keys it may see: none before ``first``, none from ``stop`` on; every other's share is exactly 0.

    >>> Sight.causal(4, 4).window((1, 3)), Sight.causal(4, 4).work((1, 3))
    ((0, 3), 6)
    """

    first: Any  # numpy arrays of whole numbers, one per query
    stop: Any

    @classmethod
    def causal(cls, queries: int, keys: int) -> "Sight":
        """Query i sees keys 0 to i, as torch's is_causal has it."""
        return cls(np.zeros(queries, np.int64), np.minimum(np.arange(1, queries + 1), keys))

    @classmethod
    def of(cls, mask: Tensor, queries: int) -> "Sight | None":
        """What a mask of ... x queries x keys lets through: True, or more than the lowest numbers there are.

        None where its values are not known, as in a rehearsal.
        """
        if isinstance(mask, FakeTensor) or mask.is_meta or not mask.numel() or mask.shape[-1] < 2:
            return None
        with torch.no_grad():
            seen = mask
            if mask.dtype != torch.bool:  # far below a row's largest, exp() gives 0
                seen = mask > mask.amax(-1, keepdim=True) + torch.finfo(mask.dtype).min / 2
            rows = seen.reshape(-1, *seen.shape[-2:] if seen.ndim > 1 else (1, seen.shape[-1])).any(0).cpu().numpy()
        first, last = rows.argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)
        none = ~rows.any(1)
        first, last = np.where(none, 0, first), np.where(none, 1, last)
        return cls(np.broadcast_to(first, queries), np.broadcast_to(last, queries))

    def window(self, rows: Range) -> Range:
        """The keys that any of these queries may see; one at least."""
        start, stop = rows
        if start >= stop:
            return 0, 1
        low, high = int(self.first[start:stop].min()), int(self.stop[start:stop].max())
        return low, max(low + 1, high)

    def work(self, rows: Range) -> int:
        """How many scores computing these queries takes."""
        low, high = self.window(rows)
        return (rows[1] - rows[0]) * (high - low)


def halves(cut: Cut, worker: int) -> tuple[Range, Range]:
    """The earlier and the later half of a worker's run.

    >>> halves(Cut((3, 2)), 0), halves(Cut((3, 2)), 1)
    (((0, 2), (2, 3)), ((3, 4), (4, 5)))
    """
    start = cut.offset(worker)
    stop = start + cut.sizes[worker]
    middle = start + (stop - start + 1) // 2
    return (start, middle), (middle, stop)


def mirror(cut: Cut, worker: int) -> int:
    """Who has the run that is as far from the other end."""
    return len(cut.sizes) - 1 - worker


def traded(cut: Cut, worker: int) -> tuple[Range, Range]:
    """A worker's queries after the trade.

    >>> [traded(Cut.even(12, 3), worker) for worker in range(3)]
    [((0, 2), (10, 12)), ((4, 6), (6, 8)), ((8, 10), (2, 4))]
    """
    return halves(cut, worker)[0], halves(cut, mirror(cut, worker))[1]


def worth_trading(sight: Sight, cut: Cut) -> bool:
    """Whether the busiest worker has clearly less to do after the trade; the same answer on every worker."""
    if cut.outer != 1:
        return False
    workers = range(len(cut.sizes))
    before = max(sum(map(sight.work, halves(cut, worker))) for worker in workers)
    return max(sum(map(sight.work, traded(cut, worker))) for worker in workers) < WORTH_TRADING * before
