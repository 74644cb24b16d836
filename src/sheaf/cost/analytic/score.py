"""How right predictions are: errors, order within groups of plans for one workload, and what the first choice costs."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sheaf.cost.analytic.layers import Kernels, head, layer
from sheaf.cost.analytic.step import Job

Pair = tuple[float, float]  # predicted, measured


@dataclass(frozen=True)
class Scored:
    """One predicted run that was measured too."""

    id: str
    source: str
    group: str  # runs of one workload on one cluster under different plans; empty: none
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is a tenth too long."""
        return self.predicted / self.measured - 1


def errors(values: Iterable[float]) -> dict[str, float]:
    """Mean, median, 90th percentile and bias of relative errors.

    >>> errors([0.1, -0.1, 0.2, -0.2])["mean"]
    0.15
    """
    each = list(values)
    if not each:
        return {"count": 0}
    sizes = sorted(abs(value) for value in each)
    return {
        "count": len(each),
        "mean": round(statistics.fmean(sizes), 6),
        "median": round(statistics.median(sizes), 6),
        "p90": round(sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)], 6),
        "bias": round(statistics.fmean(each), 6),
    }


def regret(pairs: Sequence[Pair]) -> float:
    """How much slower the plan with the shortest predicted time was than the fastest.

    >>> regret([(1.0, 2.2), (1.1, 2.0)])
    0.1
    """
    chosen = min(pairs)[1]
    return round(chosen / min(measured for _, measured in pairs) - 1, 9)


def rank_correlation(pairs: Sequence[Pair]) -> float:
    """Spearman's: of the ranks, equal values sharing theirs; NaN where all of one side are equal.

    >>> rank_correlation([(1.0, 10.0), (2.0, 20.0), (3.0, 15.0)])
    0.5
    """
    predicted, measured = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    try:
        return round(statistics.correlation(predicted, measured), 9)
    except statistics.StatisticsError:
        return math.nan


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Errors overall and by source, and order within groups of at least three plans."""
    groups = {name: pairs for name, pairs in _grouped(scored, lambda one: one.group).items() if name}
    pairs = [[(one.predicted, one.measured) for one in members] for members in groups.values() if len(members) >= 3]
    correlations = [value for value in map(rank_correlation, pairs) if not math.isnan(value)]
    regrets = [regret(each) for each in pairs]
    return {
        "all": errors(one.error for one in scored),
        "sources": {
            source: errors(one.error for one in members)
            for source, members in sorted(_grouped(scored, lambda one: one.source).items())
        },
        "groups": {
            "count": len(pairs),
            "rank_correlation": statistics.fmean(correlations) if correlations else None,
            "regret": statistics.fmean(regrets) if regrets else None,
        },
    }


def model_flops(job: Job) -> float:
    """FLOP of one worker's share of a step by the model's shape alone, without tiles, recomputation or waiting."""
    work = job.work
    perfect = Kernels(1, 0.0, 0.0, 1, 1.0, 1, 1.0)
    if work.shape.network:
        forward = sum(share * (one.both.product) for share, one in job.layers)
        return forward * work.accumulated
    kinds = [(1.0, False)]
    if work.shape.expert_layers:
        share = work.shape.expert_layers / work.shape.layers
        kinds = [(1 - share, False), (share, True)]
    total = 0.0
    for share, expert in kinds:
        one = layer(work, job.stack, perfect, expert=expert)
        total += share * (one.both.product + one.both.grouped + one.both.attention)
    ends = sum(each.product for each in head(work, job.stack, perfect))
    return (total * work.shape.layers + ends) / work.split.pp * work.accumulated


def _grouped(scored: Sequence[Scored], name: Callable[[Scored], Hashable]) -> dict[Any, list[Scored]]:
    groups: dict[Any, list[Scored]] = {}
    for one in scored:
        groups.setdefault(name(one), []).append(one)
    return groups


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop + 1 < len(order) and values[order[stop + 1]] == values[order[start]]:
            stop += 1
        for place in order[start : stop + 1]:
            ranks[place] = (start + stop) / 2
        start = stop + 1
    return ranks
