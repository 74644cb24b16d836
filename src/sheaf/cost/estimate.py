"""The price of a plan: a pure function of the plan, the model's facts, the cluster and measured times."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from sheaf.cluster.cluster import Cluster
from sheaf.cost import rows
from sheaf.cost.basis import Basis
from sheaf.cost.communication import Fabric
from sheaf.cost.compute import Pace
from sheaf.cost.copies import add_copies
from sheaf.cost.deals import own_seconds
from sheaf.cost.experts import expert_times, replicated
from sheaf.cost.memory import host_bytes, memory
from sheaf.cost.overheads import microbatch_seconds, uneven_seconds, with_meetings
from sheaf.cost.parts import held, part_times
from sheaf.cost.piped import dealt_counts, pipeline_times, slowest_clock
from sheaf.cost.pipeline import Pipeline, kept_stages, stage_names, workers
from sheaf.cost.placement import Seat
from sheaf.cost.portion import Portion
from sheaf.cost.price import Price
from sheaf.cost.step import StepTimes, step_times
from sheaf.graph.facts import ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.plans.offload import OPTIMIZER
from sheaf.plans.split import SplitFacts


def price(
    plan: Plan,
    facts: ModelFacts,
    cluster: Cluster,
    profile: Profile | None,
    *,
    microbatches: Sequence[int],
    precision: str = "fp32",
    split: SplitFacts | None = None,
) -> Price:
    """Predicted seconds per step and peak bytes of the fullest worker.

    ``microbatches`` are the samples of a step's microbatches, in order. ``profile`` holds times measured with as many
    busy workers per host as the plan has; without one, times come from a roofline. Facts, profile and split facts may
    be of another microbatch size: work, activations, what is sent and fetching grow with the samples. ``split`` says
    what splitting the layers does, for a plan with ``tp`` (for that many workers) or with parts split over ``dp``.

    Raises PlanError when the cluster has fewer workers than the plan needs or the model fewer blocks than stages, and
    ValueError when the plan splits layers and ``split`` does not say how.
    """
    basis = Basis.of(plan, facts, profile, cluster, precision=precision, split=split)
    return priced(plan, basis, microbatches, drawn=True)


def priced(plan: Plan, basis: Basis, sizes: Sequence[int], *, drawn: bool = False) -> Price:
    """``price`` on a basis made for plans that split the same; ``drawn`` adds a pipeline's timeline."""
    here, there = holding(plan, basis, sizes), on_hosts(plan, basis, sizes)
    found = replace(timed(plan, basis, sizes, apart=True), memory=here, host_bytes=there)
    if plan.pp == 1:
        return found
    stages = stage_names(plan, basis)
    rows = slowest_clock(Pipeline.of(plan, basis), basis, sizes).rows if drawn else ()
    return replace(found, stages=tuple(map(len, stages)), begins=tuple(one[0] for one in stages), timeline=rows)


def timed(plan: Plan, basis: Basis, sizes: Sequence[int], *, apart: bool = False) -> Price:
    """The price as far as seconds go, which is quicker: without memory, and but for ``apart`` what a pipeline idles and
    what it passes on are not told apart.
    """
    if plan.pp > 1:
        return _price(plan, basis, pipeline_times(Pipeline.of(plan, basis), basis, sizes, apart=apart))
    if plan.split_parts:
        times = part_times(plan, basis, sizes)
    elif plan.expert_parts:
        times = expert_times(plan, basis, _paces(plan, basis), sizes)
    else:
        paces, fabric = _paces(plan, basis), _met_over(plan, basis)
        summed = rows.kept(plan, basis.whole, basis.facts)
        times = step_times(plan, summed, paces, fabric, basis.cluster.overlap, sizes)
        add_copies(times, plan, basis, basis.whole, len(sizes))
    rows.add_rows(times, plan, basis, sizes)
    return _price(plan, basis, times)


def _met_over(plan: Plan, basis: Basis) -> Fabric:
    """The links between replicas, and to those that only serve."""
    if not plan.serves.serving:
        return basis.fabric(plan, "dp")
    return replace(basis.between(range(plan.workers)), workers=plan.dp, _known={})


def holding(plan: Plan, basis: Basis, sizes: Sequence[int]) -> dict[str, int]:
    """Peak bytes of the fullest worker by term: a price's ``memory``, quicker than the price."""
    beside = plan.offload == OPTIMIZER and basis.seating.shared(plan.workers)  # its host's memory is its device's
    holds: list[dict[str, int]] = []
    for portion, shared, kept in _holders(plan, basis, sizes):
        terms = memory(plan, portion, basis.profile, sizes, shared=shared, kept=kept)
        if beside:
            terms["optimizer_state"] += host_bytes(plan, portion, basis.profile, shared)
        holds.append(terms)
    return max(holds, key=lambda terms: sum(terms.values()))


def on_hosts(plan: Plan, basis: Basis, sizes: Sequence[int]) -> int:
    """What the worker that needs most has in its host's memory, where that is not its device's: ``host_bytes``."""
    if plan.offload != OPTIMIZER or basis.seating.shared(plan.workers):
        return 0
    return max(host_bytes(plan, one, basis.profile, shared) for one, shared, _ in _holders(plan, basis, sizes))


def _holders(plan: Plan, basis: Basis, sizes: Sequence[int]) -> list[tuple[Portion, Portion | None, float]]:
    """Workers that hold unlike amounts: what each computes, what of it replicas share, microbatches kept at once."""
    if plan.pp > 1:
        kept = kept_stages(plan, len(sizes), dealt_counts(plan, basis, sizes))
        most: dict[int, tuple[int, Portion]] = {}
        for portion, stages in zip(workers(plan, basis), kept, strict=True):
            most[id(portion)] = max(most.get(id(portion), (0, portion)), (stages, portion), key=lambda one: one[0])
        return [(one, None, stages / plan.virtual) for stages, one in most.values()]
    if plan.split_parts:
        shared = rows.kept(plan, basis.parts(plan)[0], basis.facts)
        return [(rows.held(plan, held(plan, basis), basis.facts), shared, 1.0)]
    if plan.expert_parts:
        return [(basis.whole, replicated(basis), 1.0)]
    return [(rows.held(plan, basis.whole, basis.facts), rows.kept(plan, basis.whole, basis.facts), 1.0)]


def worker_seconds(plan: Plan, basis: Basis, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds each replica spends on one microbatch of ``size`` samples: of its slowest worker, or its busiest stage.

    What is sent between replicas is not in it. And when each begins with its first: after its own update, where the
    others do not wait for that; none where all begin together.
    """
    if plan.pp == 1:
        paces = _paces(plan, basis)
        begins = tuple(pace.update_seconds for pace in paces)
        return tuple(own_seconds(plan, pace, size) for pace in paces), begins if any(begins) else ()
    pipeline = Pipeline.of(plan, basis)
    seconds = tuple(
        max(pipeline.busy_seconds(replica, worker, [size]) for worker in pipeline.unlike_workers(replica))
        for replica in range(plan.dp)
    )
    return seconds, ()


def update_rates(plan: Plan, basis: Basis) -> tuple[float, ...]:
    """Seconds in which each replica without stages updates a byte of parameters."""
    return tuple(pace.optimizer_seconds_per_byte for pace in _paces(plan, basis))


def _paces(plan: Plan, basis: Basis) -> list[Pace]:
    """By replica, the pace of the slowest of the workers that split its layers."""
    seats, mesh = basis.seats(plan.workers), Mesh.of(plan)
    crossing = basis.crossing(basis.whole, basis.fabric(plan, "dp" if plan.expert_parts else "tp"))
    # tables whose gradients are rows included
    updated = basis.whole.trainable_bytes if basis.updates_apart(plan) else 0

    @cache
    def paced(seat: Seat) -> Pace:
        adding = microbatch_seconds(basis.profile, plan, speed=seat.speed)
        pace = basis.pace(basis.whole, seat)
        updating = updated * pace.optimizer_seconds_per_byte
        return replace(pace, crossing=crossing, dispatch_seconds=adding, update_seconds=updating)

    if basis.alike(plan.workers):
        return [paced(seats[0])] * plan.dp

    @cache
    def slowest(numbers: tuple[int, ...]) -> Pace:
        there = [paced(seats.kinds[number]) for number in numbers]
        samples = basis.facts.samples
        return max(there, key=lambda one: (own_seconds(plan, one, samples), one.optimizer_seconds_per_byte))

    by_replica = seats.numbers[: mesh.workers].reshape(plan.dp, mesh.tp).tolist()
    return [slowest(tuple(dict.fromkeys(numbers))) for numbers in by_replica]


def _copying(plan: Plan, basis: Basis) -> float:
    """The share of stepping in the host's memory that copies take: on the seat that it takes longest, and where
    replicas update alone on the quickest, which stands for the one that is done first.
    """
    paces = [
        (basis.pace(basis.whole, seat).optimizer_seconds_per_byte, seat) for seat in basis.seating.kinds(plan.workers)
    ]
    took, seat = (min if basis.updates_apart(plan) else max)(paces, key=lambda one: one[0])
    return basis.stepping(seat, 0.0).copying / took


def _price(plan: Plan, basis: Basis, times: StepTimes) -> Price:
    times.seconds["host"] += basis.cluster.host_seconds
    times.seconds["wait"] += uneven_seconds(basis.profile, plan)
    if plan.offload == OPTIMIZER:
        copying = times.seconds["optimizer"] * _copying(plan, basis)
        times.seconds["offload"], times.seconds["optimizer"] = copying, times.seconds["optimizer"] - copying
    return Price(
        plan=plan,
        seconds=with_meetings(times.seconds, basis.profile, plan),
        memory={},
        traffic_bytes=times.traffic_bytes,
        messages=times.messages,
        hidden_seconds=times.hidden_seconds,
    )
