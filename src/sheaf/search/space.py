"""Every plan worth pricing: how many workers, what is sharded, who gets how much, how large a microbatch."""

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import reduce

from sheaf.plans import Plan
from sheaf.plans.plan import EQUAL, RECOMPUTE, STOLEN

ALL_DEGREES_UP_TO = 16  # workers; beyond, powers of two, divisors of the batch, and all of them
UNEQUAL = 1.02  # workers whose speeds differ by less count as equal


def degrees(workers: int, batch: int) -> tuple[int, ...]:
    """How many workers to try, from 1 to ``workers``.

    >>> degrees(4, 64), degrees(20, 30)
    ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20))
    """
    found = set(range(1, min(workers, ALL_DEGREES_UP_TO) + 1)) | {workers}
    found |= set(_powers(workers)) | {number for number in _divisors(batch) if number <= workers}
    return tuple(sorted(found))


def microbatch_choices(batch: int, workers: int) -> tuple[int, ...]:
    """Sizes to try where the task leaves the microbatch open: powers of two, divisors, and one per worker.

    >>> microbatch_choices(12, 2)
    (1, 2, 3, 4, 6)
    """
    largest = -(-batch // workers)
    found = {*_powers(largest), *(number for number in _divisors(batch) if number <= largest), largest}
    return tuple(sorted(found))


def strategies(workers: int) -> Iterator[Plan]:
    """Every legal answer to the other questions for so many workers, shares by weight apart."""
    for zero in (0, 1, 2, 3) if workers > 1 else (0,):
        for recompute in RECOMPUTE:
            yield Plan(dp=workers, zero=zero, recompute=recompute)
            if workers > 1 and zero < 2:
                yield Plan(dp=workers, zero=zero, recompute=recompute, shares=STOLEN)


def weighted_shares(seconds: Sequence[float], num_microbatches: int) -> str:
    """The shares with which workers that need ``seconds`` per microbatch are done soonest; ``equal`` if they are.

    Each microbatch goes to the worker that would be done with it first, which is best for equal microbatches. Empty
    when a worker would get nothing: then fewer workers do as well.

    >>> weighted_shares((1.0, 2.2), 16), weighted_shares((1.0, 1.0), 4), weighted_shares((1.0, 9.0), 4)
    ('11:5', 'equal', '')
    """
    if max(seconds) <= UNEQUAL * min(seconds):
        return EQUAL
    counts = [0] * len(seconds)
    done = [(each, rank) for rank, each in enumerate(seconds)]
    heapq.heapify(done)
    for _ in range(num_microbatches):
        when, rank = heapq.heappop(done)
        counts[rank] += 1
        heapq.heappush(done, (when + seconds[rank], rank))
    if not all(counts):
        return ""
    common = reduce(math.gcd, counts)
    return EQUAL if len(set(counts)) == 1 else ":".join(str(count // common) for count in counts)


def _powers(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _divisors(number: int) -> list[int]:
    small = [low for low in range(1, math.isqrt(number) + 1) if number % low == 0]
    return sorted({*small, *(number // low for low in small)})
