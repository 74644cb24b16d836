"""What replicas of several workers do among themselves beside a parameter server: copy what is served once, and agree.

A server serves each parameter at one place of a replica; others that hold it too, such as norms beside split layers and
embeddings of two stages, take it from there after every pull.
"""

from collections.abc import Sequence

from sheaf.cost.basis import Basis
from sheaf.cost.communication import ALL_REDUCE
from sheaf.cost.portion import Portion
from sheaf.cost.step import StepTimes
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh


def add_copies(times: StepTimes, plan: Plan, basis: Basis, portion: Portion, num_microbatches: int) -> None:
    """Count it; ``portion`` is what the fullest worker holds. Stages' shared parameters are not in it."""
    if not plan.server or plan.computing == plan.dp:
        return
    mesh, slices = Mesh.of(plan), basis.split.slices if basis.split else {}
    inside = basis.between(mesh.mates(0))
    told = 8 * (len(basis.facts.parameters) + 3 * num_microbatches + 1)
    sizes = [told] if plan.exact else [told, 8 * 3 * inside.workers]
    times.seconds["server"] += sum(inside.seconds(ALL_REDUCE, size) for size in sizes)
    for size in sizes:
        times.sends(inside, ALL_REDUCE, size)
    whole = sum(one.size_bytes for one in portion.facts.parameters if one.requires_grad and one.name not in slices)
    if plan.tp > 1 and whole:
        times.seconds["server"] += basis.fabric(plan, "tp").seconds(ALL_REDUCE, whole)
        times.sends(basis.fabric(plan, "tp"), ALL_REDUCE, whole)


def waited(plan: Plan, whole: Sequence[float], shares: Sequence[Sequence[int]]) -> float:
    """What the replica that is done first waits for the others; ``whole``: seconds that each takes for its share.

    Without a bound nobody waits, and a step is the time in which all use as many samples as a batch has.

    >>> waited(Plan.parse("dp=2,pp=2,server=1"), [1.0, 2.0], [[4], [4]])
    1.0
    >>> round(waited(Plan.parse("dp=2,pp=2,server=1:async"), [1.0, 2.0], [[4], [4]]), 3)
    0.333
    """
    if not plan.server or plan.serves.staleness is not None:
        return max(whole) - min(whole)
    dealt = [(seconds, sum(share)) for seconds, share in zip(whole, shares, strict=True) if share]
    together = sum(samples for _, samples in dealt) / sum(samples / seconds for seconds, samples in dealt)
    return max(0.0, together - min(whole))
