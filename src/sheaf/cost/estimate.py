"""The price of a plan: a pure function of the plan, the model's facts, the cluster and measured times."""

from collections.abc import Sequence

from sheaf.cluster.cluster import Cluster
from sheaf.cost.communication import fabric
from sheaf.cost.compute import Pacer
from sheaf.cost.memory import memory
from sheaf.cost.placement import seats
from sheaf.cost.price import Price
from sheaf.cost.step import own_seconds, step_times
from sheaf.graph.facts import ModelFacts, Profile
from sheaf.plans import Plan


def microbatch_sizes(batch: int, microbatch: int) -> tuple[int, ...]:
    """Samples of each microbatch of a full step; the last may be smaller.

    >>> microbatch_sizes(10, 4)
    (4, 4, 2)
    """
    return tuple(min(microbatch, batch - start) for start in range(0, batch, microbatch))


def price(
    plan: Plan,
    facts: ModelFacts,
    cluster: Cluster,
    profile: Profile | None,
    *,
    microbatches: Sequence[int],
    precision: str = "fp32",
) -> Price:
    """Predicted seconds per step and peak bytes of the fullest worker.

    ``microbatches`` are the samples of a step's microbatches, in order. ``profile`` holds times measured with as many
    busy workers per host as the plan has; without one, times come from a roofline. Facts and profile may be of another
    microbatch size: work, activations and fetching grow with the samples.

    Raises PlanError when the cluster has fewer workers than the plan needs.
    """
    placed = seats(cluster, plan.workers, precision)
    pacer = Pacer(facts, profile)
    paces = [pacer.pace(seat) for seat in placed]
    factor = profile.collective_factor if profile is not None else 1.0
    times = step_times(plan, facts, paces, fabric(cluster, placed, factor), cluster.overlap, microbatches)
    return Price(
        plan=plan,
        seconds=times.seconds,
        memory=memory(plan, facts, profile, microbatches),
        traffic_bytes=times.traffic_bytes,
        hidden_seconds=times.hidden_seconds,
    )


def worker_seconds(
    plan: Plan,
    facts: ModelFacts,
    cluster: Cluster,
    profile: Profile | None,
    *,
    size: int,
    precision: str = "fp32",
) -> tuple[float, ...]:
    """Seconds each worker, by rank, spends on one microbatch of ``size`` samples, communication apart."""
    pacer = Pacer(facts, profile)
    return tuple(own_seconds(plan, pacer.pace(seat), size) for seat in seats(cluster, plan.workers, precision))
