"""Why the best plan is the best: what binds it, how near it is to the machine's limit, what would make another win."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from sheaf.cost import Price
from sheaf.cost.memory import needed_bytes
from sheaf.errors import PlanError
from sheaf.search.change import Change, changed
from sheaf.search.question import Question
from sheaf.search.ranking import Ranking
from sheaf.search.verdicts import Explanation, Needed
from sheaf.units import pretty_bytes

FARTHEST = 100.0  # times more or less is looked at
POWERS = tuple(2.0**power for power in range(1, 7))
CLOSE = 1.02  # the factor is found within 2 %
RUNNERS, RUNNERS_WIDE = 5, 2  # how many other plans are asked about; of large clusters, where prices take longer
WIDE = 64  # workers
SENDING = ("tensor", "all_to_all", "transfer", "all_reduce", "reduce_scatter", "all_gather", "server", "rows")
COMPUTING = ("compute", "recompute")


def taken_apart(question: Question, best: Price) -> Explanation:
    """The best plan's time without what others would need."""
    step = best.step_seconds
    computing = sum(best.seconds.get(term, 0.0) for term in COMPUTING)
    sending = sum(best.seconds.get(term, 0.0) for term in SENDING)
    binding = max(best.seconds, key=lambda term: best.seconds[term])
    facts = question.basis(best.plan).facts
    seats = question.seating.seats(best.plan.workers)
    rate = sum(machines * seat.busy * seat.flops_per_second for seat, machines in seats.runs)
    ideal = facts.flops * question.batch / facts.samples / rate
    return Explanation(
        plan=str(best.plan),
        compute_seconds=computing,
        alpha=sending / computing if computing else 0.0,
        other_seconds=step - computing - sending,
        binding=binding,
        binding_share=best.seconds[binding] / step,
        ideal_seconds=ideal,
        efficiency=ideal / step,
    )


def explained(question: Question, ranking: Ranking) -> Explanation | None:
    """The best plan taken apart, and for each of the next of other strategies what would have to change; None without.

    Solved by bisection on the prices of both, up to a hundred times as much and as little of one figure.
    """
    if not ranking.ranked:
        return None
    best = ranking.ranked[0].price
    found = taken_apart(question, best)
    most = RUNNERS if question.available <= WIDE else RUNNERS_WIDE
    runners: list[Price] = []
    seen = {_strategy(best)}
    for entry in ranking.ranked[1:]:
        if entry.plan.exact == best.plan.exact and _strategy(entry.price) not in seen and len(runners) < most:
            seen.add(_strategy(entry.price))
            runners.append(entry.price)
    needed = [_needed(question, one, best) for one in runners]
    needed += _short_of_memory(question, ranking, best)
    return replace(found, needed=tuple(needed))


def _strategy(price: Price) -> tuple[Any, ...]:
    plan = price.plan
    return plan.dp > 1, plan.tp > 1, plan.cp > 1, plan.pp > 1, plan.zero, plan.again, plan.offload, plan.by_parts


def _needed(question: Question, runner: Price, best: Price) -> Needed:
    """The smallest change of one figure with which the runner is faster than the best."""
    text = str(runner.plan)
    if runner.step_seconds <= best.step_seconds:
        return Needed(text, "", 1.0, "nothing: it is as fast, and needs more workers or memory")
    solved: list[tuple[float, str, float]] = []
    for key, change in _figures(question):
        nearest = min(solved)[0] if solved else math.inf
        factor = _crossing(question, runner, best, change, whole=key == "batch", nearest=nearest)
        if factor is not None:
            solved.append((_far(factor), key, factor))
    if not solved:
        return Needed(text, "", 1.0, f"no bandwidth, speed or batch within {FARTHEST:.0f} times makes it win")
    _, key, factor = min(solved)
    return Needed(text, key, factor, _said(question, key, factor))


def _figures(question: Question) -> Iterator[tuple[str, Callable[[float], Change]]]:
    tiers = ["intra"] if max(host.workers for host in question.cluster.hosts) > 1 else []
    tiers += (
        ["inter"] if question.cluster.inter is not None and sum(one.count for one in question.cluster.hosts) > 1 else []
    )
    tiers += [tier.name for tier in question.cluster.tiers]
    for key in (*tiers, "flops", "batch"):
        yield key, lambda factor, key=key: Change(key, factor, factor=True)


def _crossing(
    question: Question, runner: Price, best: Price, change: Callable[[float], Change], *, whole: bool, nearest: float
) -> float | None:
    """The factor nearest to 1, up or down, from which the runner is faster; None within ``FARTHEST``.

    ``whole`` looks at powers of two alone: between them a batch does not deal out evenly. ``nearest`` is how far from 1
    the factor is that was found for another figure, by its logarithm: one that is farther need not be the right one.
    """

    def gap(factor: float) -> float:
        asked = changed(question, [change(factor)])
        if asked.batch != round(question.batch * factor) and whole:
            return math.inf  # less than one sample
        if any(-(-asked.batch // asked.size(one.plan)) < one.plan.dp for one in (runner, best)):
            return math.inf  # not enough microbatches to go round
        try:
            return asked.timed(runner.plan).step_seconds - asked.timed(best.plan).step_seconds
        except PlanError:
            return math.inf

    found: list[float] = []
    near = {1.0: 1.0, -1.0: 1.0}
    for reach, sign in product(POWERS if whole else (2.0, 10.0, FARTHEST), near):
        far = reach**sign
        if _far(near[sign]) >= nearest or (whole and _far(far) > nearest):
            break
        if gap(far) < 0:
            found.append(far if whole else _bisected(gap, near[sign], far, nearest))
            nearest = min(nearest, _far(found[-1]))
        near[sign] = far
    return min(found, key=_far, default=None)


def _far(factor: float) -> float:
    """How far a factor is from 1, up or down."""
    return abs(math.log(factor))


def _bisected(gap: Callable[[float], float], losing: float, winning: float, nearest: float) -> float:
    """Where the gap is closed, or a factor beyond that where it is closed no nearer than ``nearest``."""
    while max(losing / winning, winning / losing) > CLOSE and _far(losing) < nearest:
        middle = math.sqrt(losing * winning)
        if gap(middle) < 0:
            winning = middle
        else:
            losing = middle
    return winning


def _short_of_memory(question: Question, ranking: Ranking, best: Price) -> list[Needed]:
    """Plans that would be faster than the best, had each worker more memory: the one that needs least."""
    found: list[tuple[int, str]] = []
    for price in ranking.starved:
        seats = question.seating.kinds(price.plan.workers)
        short = max(needed_bytes(price.peak_bytes, seat.device_kind) - seat.available_bytes for seat in seats)
        if short > 0:  # else its host is short of it
            found.append((short, str(price.plan)))
    plans = {str(price.plan): price.plan for price in ranking.starved}
    for short, text in sorted(found)[:RUNNERS]:
        if question.timed(plans[text]).step_seconds < best.step_seconds:
            return [Needed(text, "memory", 1.0, f"{pretty_bytes(short)} more memory for each worker")]
    return []


def _said(question: Question, key: str, factor: float) -> str:
    times = f"x{factor:.2g}"
    if key == "batch":
        return f"a batch of {max(1, round(question.batch * factor))} ({times})"
    if key == "flops":
        return f"devices {times} as fast"
    link = {"intra": question.cluster.intra, "inter": question.cluster.inter}.get(key)
    return f"bandwidth of {link.name if link else key} {times}"
