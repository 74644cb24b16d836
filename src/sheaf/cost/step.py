"""How long a global step takes, as the executors run it: who waits for whom, and what travels when.

Terms are those of the worker that is done first; ``wait`` is what it idles for the slowest, so that they add up to
the step.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from sheaf.cost.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    COUNTER_SECONDS,
    REDUCE_SCATTER,
    Fabric,
    buckets,
    exposed,
    units,
)
from sheaf.cost.compute import Pace
from sheaf.cost.price import SECONDS_TERMS
from sheaf.graph.facts import ModelFacts
from sheaf.plans import Plan
from sheaf.plans.layout import apportion


@dataclass
class StepTimes:
    """Seconds by term while they are added up, what hid, and what one worker sent."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS_TERMS, 0.0))
    hidden_seconds: float = 0.0
    traffic_bytes: float = 0.0


def step_times(
    plan: Plan, facts: ModelFacts, paces: Sequence[Pace], fabric: Fabric, overlap: float, sizes: Sequence[int]
) -> StepTimes:
    """Seconds of one step; ``paces`` by rank, ``sizes`` the samples of each microbatch in order."""
    times = StepTimes()
    shares = _stolen(plan, paces, sizes) if plan.stolen else _dealt(plan, sizes)
    if plan.zero >= 2:
        _in_rounds(times, plan, facts, paces, fabric, overlap, shares)
    else:
        _accumulated(times, plan, facts, paces, fabric, overlap, shares)
    stepped = facts.trainable_bytes / (plan.dp if plan.zero else 1)
    times.seconds["optimizer"] = stepped * max(pace.optimizer_seconds_per_byte for pace in paces)
    times.seconds["host"] += max(pace.host_seconds for pace in paces)
    _told(times, plan, facts, fabric, len(sizes))
    return times


def _told(times: StepTimes, plan: Plan, facts: ModelFacts, fabric: Fabric, num_microbatches: int) -> None:
    """What workers tell each other each step: losses, which parameters were used, batch statistics to merge."""
    told = [8 * (2 * num_microbatches + plan.workers + 1), 4 * (len(facts.parameters) + plan.workers)]
    merged = sum(buffer.size_bytes for buffer in facts.buffers if buffer.updated)
    if merged:
        told.append(num_microbatches * merged)
    for size in told:
        times.seconds["all_reduce"] += fabric.seconds(ALL_REDUCE, size)


def own_seconds(plan: Plan, pace: Pace, size: int) -> float:
    """What one worker spends on one microbatch, fetching it included."""
    again = pace.again.seconds(size) if plan.recompute == "full" else 0.0
    counter = COUNTER_SECONDS if plan.stolen else 0.0
    return pace.forward.seconds(size) + pace.backward.seconds(size) + again + pace.fetch.seconds(size) + counter


def _dealt(plan: Plan, sizes: Sequence[int]) -> list[list[int]]:
    """Contiguous runs in proportion to the plan's weights."""
    rest = list(sizes)
    shares: list[list[int]] = []
    for count in apportion(len(sizes), plan.weights):
        shares.append(rest[:count])
        rest = rest[count:]
    return shares


def _stolen(plan: Plan, paces: Sequence[Pace], sizes: Sequence[int]) -> list[list[int]]:
    """Who takes which microbatch when each takes the next as soon as it is free."""
    taken: list[list[int]] = [[] for _ in paces]
    free = [(0.0, rank) for rank in range(len(paces))]
    for size in sizes:
        when, rank = heapq.heappop(free)
        taken[rank].append(size)
        heapq.heappush(free, (when + own_seconds(plan, paces[rank], size), rank))
    return taken


def _own_terms(times: StepTimes, plan: Plan, pace: Pace, sizes: Sequence[int]) -> None:
    times.seconds["compute"] = sum(pace.forward.seconds(size) + pace.backward.seconds(size) for size in sizes)
    if plan.recompute == "full":
        times.seconds["recompute"] = sum(pace.again.seconds(size) for size in sizes)
    counter = COUNTER_SECONDS if plan.stolen else 0.0
    times.seconds["host"] = sum(pace.fetch.seconds(size) + counter for size in sizes)


def _accumulated(
    times: StepTimes,
    plan: Plan,
    facts: ModelFacts,
    paces: Sequence[Pace],
    fabric: Fabric,
    overlap: float,
    shares: Sequence[Sequence[int]],
) -> None:
    """ZeRO 0 and 1: everyone works alone; buckets travel beside the slowest worker's last backward."""
    totals = [sum(own_seconds(plan, pace, size) for size in share) for pace, share in zip(paces, shares, strict=True)]
    first, slowest = totals.index(min(totals)), totals.index(max(totals))
    _own_terms(times, plan, paces[first], shares[first])
    times.seconds["wait"] = totals[slowest] - totals[first]
    if plan.dp == 1:
        return
    last = _backward(plan, paces[slowest], shares[slowest][-1])
    gathered = buckets(facts, plan.bucket_bytes)
    operation = REDUCE_SCATTER if plan.zero else ALL_REDUCE
    _beside(times, fabric, [(operation, size) for size in gathered], last, overlap)
    if plan.zero:
        _alone(times, fabric, ALL_GATHER, gathered)


def _in_rounds(
    times: StepTimes,
    plan: Plan,
    facts: ModelFacts,
    paces: Sequence[Pace],
    fabric: Fabric,
    overlap: float,
    shares: Sequence[Sequence[int]],
) -> None:
    """ZeRO 2 and 3: all workers go through the blocks together, one microbatch each, round by round."""
    totals = [sum(own_seconds(plan, pace, size) for size in share) for pace, share in zip(paces, shares, strict=True)]
    first = totals.index(min(totals))
    _own_terms(times, plan, paces[first], shares[first])
    held, grouped = units(facts, plan.bucket_bytes), buckets(facts, plan.bucket_bytes)
    lockstep = 0.0
    for number in range(max(len(share) for share in shares)):
        here = [(pace, share[number]) for pace, share in zip(paces, shares, strict=True) if number < len(share)]
        lockstep += max(own_seconds(plan, pace, size) for pace, size in here)
        forward = max(pace.forward.seconds(size) for pace, size in here)
        backward = max(_backward(plan, pace, size) for pace, size in here)
        if plan.zero == 2:
            travels = [(REDUCE_SCATTER, size) for size in grouped]
        else:
            reduced = (*reversed(held.block_trainable_bytes), held.glue_trainable_bytes)
            # The first gathering has nothing to hide behind, as the last reduction has not: listed last, it counts so.
            _beside(times, fabric, [(ALL_GATHER, size) for size in reversed(held.block_bytes)], forward, overlap)
            travels = [(ALL_GATHER, size) for size in reversed(held.block_bytes[:-1])]
            travels += [(REDUCE_SCATTER, size) for size in reduced]
        _beside(times, fabric, travels, backward, overlap)
    times.seconds["wait"] = max(0.0, lockstep - totals[first])
    if plan.zero == 3:
        _alone(times, fabric, ALL_GATHER, (held.glue_bytes,))
    else:
        _alone(times, fabric, ALL_GATHER, grouped)


def _backward(plan: Plan, pace: Pace, size: int) -> float:
    return pace.backward.seconds(size) + (pace.again.seconds(size) if plan.recompute == "full" else 0.0)


def _beside(
    times: StepTimes, fabric: Fabric, travels: Sequence[tuple[str, int]], window_seconds: float, overlap: float
) -> None:
    """Collectives that run beside ``window_seconds`` of computation; what shows is shared out by their length."""
    travels = [(operation, size) for operation, size in travels if size]
    pieces = [fabric.seconds(operation, size) for operation, size in travels]
    total = sum(pieces)
    shown = exposed(pieces, window_seconds, overlap)
    times.hidden_seconds += total - shown
    for (operation, size), piece in zip(travels, pieces, strict=True):
        times.seconds[operation] += piece * (shown / total if total else 0.0)
        times.traffic_bytes += fabric.sent_bytes(operation, size)


def _alone(times: StepTimes, fabric: Fabric, operation: str, sizes: Sequence[int]) -> None:
    """Collectives that everyone waits for."""
    for size in sizes:
        times.seconds[operation] += fabric.seconds(operation, size)
        times.traffic_bytes += fabric.sent_bytes(operation, size)
