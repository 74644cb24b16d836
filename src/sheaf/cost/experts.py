"""Steps of replicas that hold experts for each other: round by round, tokens go to experts and come back.

A replica's moves and the work of its busiest expert holder come from the split facts (GShard, arXiv:2006.16668, has
the two all-to-alls each way). Experts' gradients do not travel; those of the rest are summed as replicas do.
"""

from collections.abc import Sequence
from dataclasses import replace

from sheaf.cost.basis import Basis
from sheaf.cost.compute import Pace
from sheaf.cost.deals import dealt, own_seconds, total_seconds
from sheaf.cost.portion import Portion
from sheaf.cost.step import StepTimes, backward_seconds, own_terms, reduced, told
from sheaf.plans import Plan


def expert_times(plan: Plan, basis: Basis, paces: Sequence[Pace], sizes: Sequence[int]) -> StepTimes:
    """Seconds of one step; ``paces`` by replica, ``sizes`` the samples of each microbatch in order."""
    times = StepTimes()
    shares = dealt(plan, sizes)
    totals = [total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True)]
    first = totals.index(min(totals))
    own_terms(times, plan, paces[first], shares[first])
    times.seconds["all_to_all"], times.seconds["tensor"] = times.seconds["tensor"], 0.0
    lockstep, window = 0.0, 0.0
    for number in range(max(len(share) for share in shares)):
        here = [(pace, share[number]) for pace, share in zip(paces, shares, strict=True) if number < len(share)]
        lockstep += max(own_seconds(plan, pace, size) for pace, size in here)
        window = max(backward_seconds(plan, pace, size) for pace, size in here)
    times.seconds["wait"] = max(0.0, lockstep - totals[first])
    rest, replicas = replicated(basis), basis.fabric(plan, "dp")
    reduced(times, plan, rest, replicas, window, basis.cluster.overlap)
    stepped = basis.whole.trainable_bytes
    times.seconds["optimizer"] = stepped * max(pace.optimizer_seconds_per_byte for pace in paces)
    times.seconds["host"] += max(pace.host_seconds for pace in paces)
    told(times, plan, rest, replicas, len(sizes))
    return times


def replicated(basis: Basis) -> Portion:
    """What every replica holds: all but the experts."""

    def made() -> Portion:
        whole = basis.whole
        dealt_out = basis.split.slices if basis.split is not None else {}
        kept = tuple(one for one in whole.facts.parameters if one.name not in dealt_out)
        return replace(whole, facts=replace(whole.facts, parameters=kept), _buckets={}, _units={})

    return basis.once("replicated", made)
