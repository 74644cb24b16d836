"""Steps of a pipeline: its schedule against the clock, and what its workers and replicas send each other."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sheaf.cluster.traffic import CONTROL_BYTES
from sheaf.cost.basis import Basis
from sheaf.cost.clock import Course, course_seconds, timeline
from sheaf.cost.communication import ALL_REDUCE
from sheaf.cost.copies import add_copies, waited
from sheaf.cost.deals import by_speed, in_runs
from sheaf.cost.pipeline import Pipeline
from sheaf.cost.portion import Portion
from sheaf.cost.step import (
    StepTimes,
    after_rounds,
    alone,
    backward_seconds,
    own_terms,
    reduced,
    rounds_moved,
    sharing,
    told,
    update_seconds,
)
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.plans.schedule import tells_apart
from sheaf.plans.timeline import Timeline

WEIGHTS_SHARE = 0.5  # of a backward: the gradients of weights take as many operations as those of inputs


def pipeline_times(pipeline: Pipeline, basis: Basis, sizes: Sequence[int], *, apart: bool = True) -> StepTimes:
    """Seconds of one step, in the terms of the busiest worker of the fastest replica.

    But for ``apart``, passing on counts as idling. Microbatches of one replica count as equally large. Raises PlanError
    where the schedule cannot run.
    """
    plan = pipeline.plan
    timed = _timed(pipeline, basis, sizes)
    whole = [one.seconds for one in timed]
    first, last = timed[whole.index(min(whole))], timed[whole.index(max(whole))]
    times = StepTimes()
    busiest = max(
        pipeline.unlike_workers(first.number),
        key=lambda worker: pipeline.busy_seconds(first.number, worker, first.share),
    )
    for stage in pipeline.stages_on(busiest):
        pace = pipeline.paces[first.number][stage]
        fetch = pace.fetch if stage < plan.pp else replace(pace.fetch, work_seconds=0.0, launch_seconds=0.0)
        own_terms(times, plan, replace(pace, fetch=fetch), first.share)
    own = sum(times.seconds.values())
    # What no worker could do sooner even if passing on took no time is the schedule's bubble.
    still = first.seconds
    if apart:
        still = min(still, _replica_seconds(pipeline, basis, first.number, first.share, passing=False))
    times.seconds["bubble"] = max(0.0, still - own)
    times.seconds["transfer"] = max(0.0, first.seconds - own - times.seconds["bubble"])
    times.seconds["wait"] = waited(plan, whole, [one.share for one in timed])
    times.traffic_bytes = times.messages = 0.0
    _replicated(times, pipeline, basis, len(sizes), last)
    held = [portion.trainable_bytes for portion in pipeline.workers]
    most = max(1, *held)
    times.traffic_bytes, own = max(  # of whoever sends most; what replicas send goes with what they hold
        (times.traffic_bytes * mine / most + sent_bytes, messages)
        for mine, (sent_bytes, messages) in zip(held, _sent(pipeline, basis, first.share), strict=True)
    )
    times.messages += own
    everyone = basis.once(("everyone", plan.workers), lambda: basis.between(range(plan.workers)))
    told(times, plan, basis.whole, everyone, len(sizes))
    return times


def slowest_clock(pipeline: Pipeline, basis: Basis, sizes: Sequence[int]) -> Timeline:
    """The timeline of the replica that takes longest."""
    last = max(_timed(pipeline, basis, sizes), key=lambda one: one.seconds)
    return timeline(_course(pipeline, basis, last.number, last.share))


@dataclass(frozen=True)
class _Timed:
    """A replica, its microbatches, and what the schedule takes it."""

    number: int
    share: list[int]
    seconds: float


def _timed(pipeline: Pipeline, basis: Basis, sizes: Sequence[int]) -> list[_Timed]:
    """The first replica of each kind, in order: those with the same paces, links and microbatches take as long.

    Of a parameter server's every one, as each counts where nobody waits for anybody.
    """
    plan = pipeline.plan
    passing = basis.seating.passing(Mesh.of(plan), basis.factor)
    alike = basis.alike(plan.workers)
    found: dict[tuple[int, ...], _Timed] = {}
    for replicas, share in runs(pipeline, sizes):
        samples = sum(share)
        for replica in passing.unlike(replicas) if alike and not plan.server else replicas:
            served = replica if plan.server else 0
            key = (id(pipeline.paces[replica]), id(passing[replica]), len(share), samples, served)
            if key not in found:
                found[key] = _Timed(replica, share, _replica_seconds(pipeline, basis, replica, share))
    return list(found.values())


def runs(pipeline: Pipeline, sizes: Sequence[int]) -> list[tuple[range, list[int]]]:
    """Replicas in a row that are dealt the same, and what: as the plan says, or by how fast their busiest worker is."""
    plan, paces = pipeline.plan, pipeline.paces
    if not plan.balanced or all(one is paces[0] for one in paces):
        return in_runs(plan, sizes)
    seconds = [
        max(pipeline.busy_seconds(replica, worker, sizes[:1]) for worker in pipeline.unlike_workers(replica))
        for replica in range(plan.dp)
    ]
    return [(range(replica, replica + 1), share) for replica, share in enumerate(by_speed(sizes, seconds))]


def dealt_counts(plan: Plan, basis: Basis, sizes: Sequence[int]) -> set[int]:
    """How many microbatches the replicas of a pipeline are dealt, where that is by their speed; empty where not."""
    return {len(share) for _, share in runs(Pipeline.of(plan, basis), sizes)} if plan.balanced else set()


def _replica_seconds(
    pipeline: Pipeline, basis: Basis, replica: int, share: Sequence[int], *, passing: bool = True
) -> float:
    """What the schedule takes, and what it would if passing on took no time."""
    if not share:
        return 0.0
    course = _course(pipeline, basis, replica, share)
    if not passing:
        course = course._replace(transfer_seconds=0.0)
    return basis.once(course, lambda: course_seconds(course))


def _course(pipeline: Pipeline, basis: Basis, replica: int, share: Sequence[int]) -> Course:
    """The schedule with what one action of this replica takes, microbatches counted as equally large."""
    plan = pipeline.plan
    counted = Counter(share)
    kinds = [(id(pace), stage < plan.pp) for stage, pace in enumerate(pipeline.paces[replica])]
    first = {kind: stage for stage, kind in reversed(list(enumerate(kinds)))}

    def mean(seconds: Callable[[int, int, int], float]) -> tuple[float, ...]:
        known = {
            kind: sum(times * seconds(replica, stage, size) for size, times in counted.items()) / len(share)
            for kind, stage in first.items()
        }
        return tuple(known[kind] for kind in kinds)

    forward, backward = mean(pipeline.forward_seconds), mean(pipeline.backward_seconds)
    weights: tuple[float, ...] = ()
    if plan.schedule == "zero-bubble":
        later = WEIGHTS_SHARE if tells_apart(plan) else 0.0
        weights = mean(lambda one, stage, size: later * pipeline.paces[one][stage].backward.seconds(size))
        backward = tuple(both - own for both, own in zip(backward, weights, strict=True))
    passing = _passing_seconds(pipeline, basis, replica, sum(share) / len(share))
    return Course(plan.schedule, plan.pp, len(pipeline.names), len(share), forward, backward, weights, passing)


def _passing_seconds(pipeline: Pipeline, basis: Basis, replica: int, size: float) -> float:
    """The longest any stage takes to pass a microbatch on to another worker."""
    plan = pipeline.plan
    longest = 0.0
    links = basis.seating.passing(Mesh.of(plan), basis.factor)[replica]
    for stage, sent_bytes in enumerate(pipeline.outputs):
        scaled = round(sent_bytes * size / basis.facts.samples)
        longest = max(longest, links[stage % plan.pp].passing_seconds(scaled))
    return longest


def _sent(pipeline: Pipeline, basis: Basis, share: Sequence[int]) -> list[tuple[float, float]]:
    """What each worker sends for the microbatches of a step, to its neighbours and to those that split its layers:
    bytes, and messages of gloo.
    """
    again = pipeline.plan.again
    counts, samples = Counter(share).items(), sum(share)
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    found: list[tuple[float, float]] = []
    for worker in range(pipeline.plan.pp):
        crossings = [pipeline.paces[0][stage].crossing for stage in pipeline.stages_on(worker)]
        passed = _passed(pipeline, worker)
        key = (*map(id, crossings), *passed)
        if key not in known:
            sent = sum(times * one.sent_bytes(size, again=again) for one in crossings for size, times in counts)
            messages = sum(times * one.messages(size, again=again) for one in crossings for size, times in counts)
            told = len(passed) * len(share) if basis.cluster.backend == "gloo" else 0
            sent += sum(passed) * samples / basis.facts.samples + CONTROL_BYTES * told
            known[key] = sent, messages + told
        found.append(known[key])
    return found


def _passed(pipeline: Pipeline, worker: int) -> list[int]:
    """What a worker sends its neighbours for one microbatch of the facts: outputs forward, gradients of inputs back."""
    outputs = pipeline.outputs
    forward = [outputs[stage] for stage in pipeline.stages_on(worker) if stage < len(outputs)]
    return forward + [outputs[stage - 1] for stage in pipeline.stages_on(worker) if stage]


def _replicated(times: StepTimes, pipeline: Pipeline, basis: Basis, num_microbatches: int, slowest: _Timed) -> None:
    """What replicas of the fullest worker do together, shared parameters across stages, the optimizer and the host."""
    plan = pipeline.plan
    portions = pipeline.workers
    fullest = max(range(plan.pp), key=lambda worker: portions[worker].trainable_bytes)
    portion, fabric, overlap = portions[fullest], sharing(plan, basis.fabric(plan, "dp")), basis.cluster.overlap
    paces = [pipeline.paces[slowest.number][stage] for stage in pipeline.stages_on(fullest)]
    share = slowest.share
    if plan.zero >= 2:
        rounds: Counter[tuple[float, float]] = Counter()
        for size, count in Counter(share).items():
            forward = sum(pace.forward.seconds(size) for pace in paces)
            rounds[forward, sum(backward_seconds(plan, pace, size) for pace in paces)] += count
        rounds_moved(times, plan, portion, fabric, rounds, overlap)
        after_rounds(times, plan, portion, fabric)
    else:
        window = backward_seconds(plan, paces[0], share[-1])
        reduced(times, plan, portion, fabric, window, overlap)
    _shared_between_stages(times, pipeline, basis, portions)
    alike = basis.alike(plan.workers) and plan.even_shards
    replicas = [(1, pipeline.paces[0])] if alike else zip(plan.shard_weights, pipeline.paces, strict=True)
    unlike = {(weight, id(replica)): (weight, replica) for weight, replica in replicas}.values()
    every = [pace for _, replica in unlike for pace in replica]
    updating = 0.0
    for worker, one in enumerate(portions):
        rates = [(weight, replica[worker].optimizer_seconds_per_byte) for weight, replica in unlike]
        updating = max(updating, update_seconds(plan, one.trainable_bytes, rates))
    if plan.server:  # shards update, and workers wait for them
        times.seconds["server"] += updating / plan.serves.shards
        _shared_between_stages(times, pipeline, basis, portions)  # as gradients before, so values after
        add_copies(times, plan, basis, portion, num_microbatches)
    else:
        times.seconds["optimizer"] = updating
    times.seconds["host"] += max(pace.host_seconds for pace in every)


def _shared_between_stages(times: StepTimes, pipeline: Pipeline, basis: Basis, portions: Sequence[Portion]) -> None:
    """Gradients of parameters that several workers of a pipeline hold are summed between them."""
    mesh = Mesh.of(pipeline.plan)
    sizes: dict[tuple[int, ...], list[int]] = {}
    for parameter in (one for one in basis.facts.shared if one.requires_grad):
        local = {
            worker: portion.facts.parameters[place].size_bytes
            for worker, portion in enumerate(portions)
            if (place := portion.facts.places.get(parameter.name)) is not None
        }
        if len(local) > 1:
            sizes.setdefault(tuple(local), []).append(max(local.values()))
    for workers, given in sizes.items():
        ranks = [mesh.rank(pp=worker, dp=0, tp=0) for worker in workers]
        alone(times, basis.between(ranks), ALL_REDUCE, given)
