"""Who computes which microbatches of a step, and how long each is busy with its own."""

import heapq
from collections import Counter, deque
from collections.abc import Sequence
from itertools import accumulate

from sheaf.cost.communication import COUNTER_SECONDS
from sheaf.cost.compute import Pace
from sheaf.cost.sizes import Sizes
from sheaf.plans import Plan
from sheaf.plans.layout import apportion, left_to_others, soonest_for_all


def own_seconds(plan: Plan, pace: Pace, size: int) -> float:
    """What one worker spends on one microbatch, fetching it and talking to those who split its layers included."""
    again = pace.again.seconds(size) if plan.again else 0.0
    counter = COUNTER_SECONDS if plan.stolen else 0.0
    computing = pace.forward.seconds(size) + pace.backward.seconds(size) + again
    fetching = pace.fetch.seconds(size) + pace.dispatch_seconds
    return computing + fetching + counter + pace.crossing.seconds(size, again=bool(again))


def total_seconds(plan: Plan, pace: Pace, sizes: Sequence[int]) -> float:
    """``own_seconds`` of several microbatches, and of the update before them where the others do not wait for that."""
    return pace.update_seconds + sum(count * own_seconds(plan, pace, size) for size, count in Counter(sizes).items())


def total_all(plan: Plan, paces: Sequence[Pace], shares: Sequence[Sequence[int]]) -> float:
    """Seconds in which all workers together use as many samples as a batch has, each going on at its own pace."""
    batch = sum(sum(share) for share in shares)
    rates = (sum(share) / total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True) if share)
    return batch / sum(rates)


def dealt(plan: Plan, sizes: Sequence[int], paces: Sequence[Pace] = ()) -> list[list[int]]:
    """Contiguous runs in proportion to the plan's weights, or to how fast the replicas' ``paces`` are."""
    if not (plan.balanced and paces):
        return [share for replicas, share in in_runs(plan, sizes) for _ in replicas]
    begins = [pace.update_seconds for pace in paces]
    return by_speed(sizes, [own_seconds(plan, pace, sizes[0]) for pace in paces], begins)


def by_speed(sizes: Sequence[int], seconds: Sequence[float], begins: Sequence[float] = ()) -> list[list[int]]:
    """Contiguous runs for replicas that take so long for a microbatch each, as balanced shares are dealt."""
    return _cut(sizes, soonest_for_all(len(sizes), seconds, begins))


def in_runs(plan: Plan, sizes: Sequence[int]) -> list[tuple[range, list[int]]]:
    """Replicas in a row that are dealt the same by the plan's weights, and what each of them is dealt."""
    first, last = sizes[0], sizes[-1]
    if ":" in plan.shares or not Sizes.of(sizes).even:
        shares = _cut(sizes, apportion(len(sizes), plan.weights))
        return [(range(replica, replica + 1), share) for replica, share in enumerate(shares)]
    each, more = divmod(len(sizes), plan.dp)
    end = plan.dp if each else more  # of those that are dealt anything
    runs = [(range(more), [first] * (each + 1)), (range(more, plan.dp), [first] * each)]
    if last != first:
        runs = [(range(replicas.start, min(replicas.stop, end - 1)), share) for replicas, share in runs]
        runs += [(range(end - 1, end), [first] * (max(1, each) - 1) + [last]), (range(end, plan.dp), [])]
    return [(replicas, share) for replicas, share in runs if replicas]


def _cut(sizes: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """The sizes in order, so many to each."""
    ends = accumulate(counts)
    return [list(sizes[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def stolen(plan: Plan, paces: Sequence[Pace], sizes: Sequence[int]) -> list[list[int]]:
    """Who takes which microbatch when each takes its next one as ``sheaf.parallel.shares.Stolen`` does.

    It does so after the one under way, or before the backward of that where fewer are left than there are workers. The
    last ones it leaves to others who are sooner done with them; but a server lends to whoever asks.
    """
    taken: list[list[int]] = [[] for _ in paces]
    each = [own_seconds(plan, pace, sizes[0]) for pace in paces]
    leaves = {mine: 0 if plan.server else left_to_others(mine, each) for mine in set(each)}
    begins = [pace.update_seconds for pace in paces]
    asking = [(begin, rank, begin) for rank, begin in enumerate(begins)]  # when, who, when done with what it has
    heapq.heapify(asking)
    left = deque(sizes)
    while left:
        when, rank, free = heapq.heappop(asking)
        if when < free and len(left) >= len(paces):
            heapq.heappush(asking, (free, rank, free))
            continue
        if taken[rank] and len(left) <= leaves[each[rank]]:
            continue
        size = left.popleft()
        taken[rank].append(size)
        begun = max(when, free)
        after = begun + paces[rank].fetch.seconds(size) + paces[rank].forward.seconds(size)
        heapq.heappush(asking, (after, rank, begun + own_seconds(plan, paces[rank], size)))
    return taken
