"""Steps of a pipeline: its schedule against the clock, stage by stage, and what each of its workers holds."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from sheaf.cluster.traffic import CONTROL_BYTES
from sheaf.cost.basis import Basis
from sheaf.cost.clock import Course, course_seconds, kept, timeline
from sheaf.cost.communication import ALL_REDUCE
from sheaf.cost.compute import Pace
from sheaf.cost.copies import add_copies, waited
from sheaf.cost.overheads import microbatch_seconds
from sheaf.cost.portion import Portion
from sheaf.cost.step import (
    StepTimes,
    after_rounds,
    alone,
    backward_seconds,
    dealt,
    own_terms,
    reduced,
    rounds_moved,
    told,
)
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.plans.mesh import Mesh
from sheaf.plans.stages import balanced, default_costs, placed, slowest, stages_of
from sheaf.plans.timeline import Timeline

WEIGHTS_SHARE = 0.5  # of a backward: the gradients of weights take as many operations as those of inputs
WORTH_SAYING = 0.01  # a cut by measured times is written down where its slowest stage is faster by more


@dataclass(frozen=True)
class Pipeline:
    """A plan's stages: their portions, and by replica how fast each goes."""

    plan: Plan
    names: tuple[tuple[str, ...], ...]
    portions: tuple[Portion, ...]
    paces: tuple[tuple[Pace, ...], ...]  # [replica][stage]
    workers: tuple[Portion, ...]  # what each pipeline rank computes and holds: its stages together

    @classmethod
    def of(cls, plan: Plan, basis: Basis) -> "Pipeline":
        """The pipeline of a plan; raises PlanError where its stages do not fit the model."""
        names, portions = _stages(plan, basis)
        mesh, seats = Mesh.of(plan), basis.seats(plan.workers)
        fabric = basis.fabric(plan, "tp")
        crossings = [basis.crossing(portion, fabric) for portion in portions]

        def adding(speed: float) -> float:
            beside = microbatch_seconds(basis.profile, plan, stages=False, speed=speed) / len(names)
            return microbatch_seconds(basis.profile, plan, stages=True, speed=speed) + beside

        def pace(replica: int, stage: int) -> Pace:
            ranks = (mesh.rank(pp=stage % plan.pp, dp=replica, tp=part) for part in range(mesh.tp))
            there = {seats[rank]: basis.pace(portions[stage], seats[rank]) for rank in ranks}
            size = basis.facts.samples
            paced = max(there.values(), key=lambda one: one.forward.seconds(size) + one.backward.seconds(size))
            slowest = min(seat.speed for seat in there)
            return replace(paced, crossing=crossings[stage], dispatch_seconds=adding(slowest))

        if basis.alike(plan.workers):
            first = {id(portion): stage for stage, portion in reversed(list(enumerate(portions)))}
            known = {stage: pace(0, stage) for stage in first.values()}
            paces = (tuple(known[first[id(portion)]] for portion in portions),) * plan.dp
        else:
            paces = tuple(tuple(pace(replica, stage) for stage in range(len(names))) for replica in range(plan.dp))
        return cls(plan, names, portions, paces, workers(plan, basis))

    @cached_property
    def outputs(self) -> list[int]:
        """Bytes that each stage but the last passes on for one microbatch of the facts."""
        return [placed(portion.facts)[-1].output_bytes for portion in self.portions[:-1]]

    def stages_on(self, worker: int) -> range:
        """The stages of one pipeline rank."""
        return range(worker, len(self.names), self.plan.pp)

    def forward_seconds(self, replica: int, stage: int, size: int) -> float:
        """One forward; each worker fetches a microbatch before the first of its stages."""
        pace = self.paces[replica][stage]
        fetch = pace.fetch.seconds(size) if stage < self.plan.pp else 0.0
        return pace.forward.seconds(size) + pace.crossing.forward(size) + fetch + pace.dispatch_seconds / 2

    def backward_seconds(self, replica: int, stage: int, size: int) -> float:
        """One backward, recomputation included."""
        pace = self.paces[replica][stage]
        again = self.plan.recompute == "full"
        computing = backward_seconds(self.plan, pace, size) + pace.dispatch_seconds / 2
        return computing + pace.crossing.backward(size, again=again)

    def busy_seconds(self, replica: int, worker: int, share: Sequence[int]) -> float:
        """What one pipeline rank computes, fetches and tells those who split its layers."""
        return sum(
            times * (self.forward_seconds(replica, stage, size) + self.backward_seconds(replica, stage, size))
            for stage in self.stages_on(worker)
            for size, times in Counter(share).items()
        )


def workers(plan: Plan, basis: Basis) -> tuple[Portion, ...]:
    """What each pipeline rank computes and holds; raises PlanError where its stages do not fit the model."""
    _, portions = _stages(plan, basis)
    return tuple(basis.together(portions[worker :: plan.pp]) for worker in range(plan.pp))


def _stages(plan: Plan, basis: Basis) -> tuple[tuple[tuple[str, ...], ...], tuple[Portion, ...]]:
    """The names of each stage's blocks, and what they are."""

    def made() -> tuple[tuple[tuple[str, ...], ...], tuple[Portion, ...]]:
        names = stage_names(plan, basis)
        portions = (basis.stage(one, number, len(names), number // plan.pp) for number, one in enumerate(names))
        return names, tuple(portions)

    return basis.once(("stages", plan.stages, plan.num_stages, plan.virtual), made)


def stage_names(plan: Plan, basis: Basis) -> tuple[tuple[str, ...], ...]:
    """The names of each stage's blocks, as ``stages_of`` gives them."""
    if plan.stages:
        return stages_of(plan, basis.facts)
    blocks = basis.once("placed", lambda: tuple(block.name for block in placed(basis.facts)))
    starts = [0, *accumulate(_default_cut(basis, plan.num_stages))]
    return tuple(blocks[start:stop] for start, stop in pairwise(starts))


def _default_cut(basis: Basis, count: int) -> tuple[int, ...]:
    costs = basis.once("default costs", lambda: default_costs(basis.facts))
    return basis.once(("default", count), lambda: balanced(costs, count))


def pipeline_times(pipeline: Pipeline, basis: Basis, sizes: Sequence[int]) -> StepTimes:
    """Seconds of one step, in the terms of the busiest worker of the fastest replica.

    Microbatches of one replica count as equally large. Raises PlanError where the schedule cannot run.
    """
    plan = pipeline.plan
    shares = dealt(plan, sizes)
    whole = _each_seconds(pipeline, basis, shares)
    first, last = whole.index(min(whole)), whole.index(max(whole))
    times = StepTimes()
    busiest = max(range(plan.pp), key=lambda worker: pipeline.busy_seconds(first, worker, shares[first]))
    for stage in pipeline.stages_on(busiest):
        pace = pipeline.paces[first][stage]
        fetch = pace.fetch if stage < plan.pp else replace(pace.fetch, work_seconds=0.0, launch_seconds=0.0)
        own_terms(times, plan, replace(pace, fetch=fetch), shares[first])
    own = sum(times.seconds.values())
    # What no worker could do sooner even if passing on took no time is the schedule's bubble.
    still = min(whole[first], _replica_seconds(pipeline, basis, first, shares[first], passing=False))
    times.seconds["bubble"] = max(0.0, still - own)
    times.seconds["transfer"] = max(0.0, whole[first] - own - times.seconds["bubble"])
    times.seconds["wait"] = waited(plan, whole, shares)
    times.traffic_bytes = times.messages = 0.0
    _replicated(times, pipeline, basis, shares, last)
    held = [portion.trainable_bytes for portion in pipeline.workers]
    apart = [_sent(pipeline, basis, worker, shares[first]) for worker in range(plan.pp)]
    times.traffic_bytes, own = max(  # of whoever sends most; what replicas send goes with what they hold
        (times.traffic_bytes * mine / max(1, *held) + sent_bytes, messages)
        for mine, (sent_bytes, messages) in zip(held, apart, strict=True)
    )
    times.messages += own
    return times


def slowest_clock(pipeline: Pipeline, basis: Basis, sizes: Sequence[int]) -> Timeline:
    """The timeline of the replica that takes longest."""
    shares = dealt(pipeline.plan, sizes)
    whole = _each_seconds(pipeline, basis, shares)
    last = whole.index(max(whole))
    return timeline(_course(pipeline, basis, last, shares[last]))


def kept_stages(plan: Plan, num_microbatches: int) -> tuple[int, ...]:
    """The most microbatches each pipeline rank keeps at once, each of its stages counted."""
    most = max(1, *apportion(num_microbatches, plan.weights))
    return kept(plan.schedule, plan.pp, plan.num_stages, most)


def measured_stages(plan: Plan, basis: Basis) -> str:
    """The cut balanced by what blocks take on this plan's seats, as a plan writes it.

    Empty where the default cut is as good within 1 %. Raises PlanError where there are fewer blocks than stages.
    """
    where = (id(basis.fabric(plan, "tp")), basis.seats(plan.workers)[0]) if basis.alike(plan.workers) else Mesh.of(plan)
    found = basis.once(("cut", where, plan.num_stages, plan.recompute), lambda: _measured_cut(plan, basis))
    return ":".join(str(count) for count in found)


def cut_seconds(plan: Plan, basis: Basis) -> float:
    """What a microbatch takes forward and backward in the slowest of the plan's stages."""
    counts = plan.stage_blocks or _default_cut(basis, plan.num_stages)
    return slowest(basis.block_seconds(plan), counts, _speeds(plan, basis))


def _measured_cut(plan: Plan, basis: Basis) -> tuple[int, ...]:
    return _worth_writing(basis, basis.block_seconds(plan), plan.num_stages, _speeds(plan, basis))


def _speeds(plan: Plan, basis: Basis) -> list[float]:
    """How fast each stage's worker is, beside the first one's."""
    mesh, seats, count = Mesh.of(plan), basis.seats(plan.workers), plan.num_stages
    if basis.alike(plan.workers):
        return [1.0] * count

    def speed(worker: int) -> float:
        ranks = (mesh.rank(pp=worker, dp=replica, tp=part) for replica in range(plan.dp) for part in range(mesh.tp))
        there = [seats[rank] for rank in ranks]
        return min(seat.flops_per_second if basis.profile is None else seat.speed for seat in there)

    paces = [speed(worker) for worker in range(plan.pp)]
    return [paces[stage % plan.pp] / paces[0] for stage in range(count)]


def _worth_writing(basis: Basis, costs: Sequence[float], count: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """The cut balanced by these costs; empty where the default one is as good."""
    default = _default_cut(basis, count)
    said = slowest(costs, default, speeds)
    if said <= _least(costs, count, max(speeds)) * (1 + WORTH_SAYING):
        return ()
    found = balanced(costs, count, speeds=speeds)
    return () if said <= slowest(costs, found, speeds) * (1 + WORTH_SAYING) else found


def _least(costs: Sequence[float], count: int, speed: float) -> float:
    """No cut's slowest stage costs less: of any so many of the largest blocks, one stage has its share or more."""
    largest = sorted(costs, reverse=True)
    shared = (-(-(place + 1) // count) * cost for place, cost in enumerate(largest))
    return max(sum(costs) / count, *shared) / speed


def _each_seconds(pipeline: Pipeline, basis: Basis, shares: Sequence[Sequence[int]]) -> list[float]:
    """What the schedule takes, by replica; those with the same paces, links and microbatches are worked out once."""
    passing = basis.seating.passing(Mesh.of(pipeline.plan), basis.factor)
    known: dict[tuple[int, ...], float] = {}
    found: list[float] = []
    for replica, share in enumerate(shares):
        key = (id(pipeline.paces[replica]), id(passing[replica]), len(share), sum(share))
        if key not in known:
            known[key] = _replica_seconds(pipeline, basis, replica, share)
        found.append(known[key])
    return found


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

    def mean(seconds: Callable[[int, int, int], float]) -> tuple[float, ...]:
        return tuple(
            sum(times * seconds(replica, stage, size) for size, times in counted.items()) / len(share)
            for stage in range(len(pipeline.names))
        )

    forward, backward = mean(pipeline.forward_seconds), mean(pipeline.backward_seconds)
    weights: tuple[float, ...] = ()
    if plan.schedule == "zero-bubble":
        weights = mean(lambda one, stage, size: WEIGHTS_SHARE * pipeline.paces[one][stage].backward.seconds(size))
        backward = tuple(both - later for both, later in zip(backward, weights, strict=True))
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


def _sent(pipeline: Pipeline, basis: Basis, worker: int, share: Sequence[int]) -> tuple[float, float]:
    """What a worker sends for the microbatches of a step, to its neighbours and to those that split its layers: bytes,
    and messages of gloo.
    """
    again = pipeline.plan.recompute == "full"
    crossings = [pipeline.paces[0][stage].crossing for stage in pipeline.stages_on(worker)]
    counts = Counter(share).items()
    sent = sum(times * one.sent_bytes(size, again=again) for one in crossings for size, times in counts)
    messages = sum(times * one.messages(size, again=again) for one in crossings for size, times in counts)
    passed = _passed(pipeline, worker)
    told = len(passed) * len(share) if basis.cluster.backend == "gloo" else 0
    return sent + sum(passed) * sum(share) / basis.facts.samples + CONTROL_BYTES * told, messages + told


def _passed(pipeline: Pipeline, worker: int) -> list[int]:
    """What a worker sends its neighbours for one microbatch of the facts: outputs forward, gradients of inputs back."""
    outputs = pipeline.outputs
    forward = [outputs[stage] for stage in pipeline.stages_on(worker) if stage < len(outputs)]
    return forward + [outputs[stage - 1] for stage in pipeline.stages_on(worker) if stage]


def _replicated(
    times: StepTimes, pipeline: Pipeline, basis: Basis, shares: Sequence[Sequence[int]], slowest_replica: int
) -> None:
    """What replicas of the fullest worker do together, shared parameters across stages, the optimizer and the host."""
    plan = pipeline.plan
    portions = pipeline.workers
    fullest = max(range(plan.pp), key=lambda worker: portions[worker].trainable_bytes)
    portion, fabric, overlap = portions[fullest], basis.fabric(plan, "dp"), basis.cluster.overlap
    paces = [pipeline.paces[slowest_replica][stage] for stage in pipeline.stages_on(fullest)]
    share = shares[slowest_replica]
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
    unlike = {id(replica): replica for replica in pipeline.paces}.values()
    every = [pace for replica in unlike for pace in replica]
    seconds_per_byte = [
        max(replica[worker].optimizer_seconds_per_byte for replica in unlike) for worker in range(plan.pp)
    ]
    stepped = (one.trainable_bytes * rate for one, rate in zip(portions, seconds_per_byte, strict=True))
    if plan.server:  # shards update, and workers wait for them
        times.seconds["server"] += max(stepped) / plan.serves.shards
        _shared_between_stages(times, pipeline, basis, portions)  # as gradients before, so values after
        add_copies(times, plan, basis, portion, sum(len(one) for one in shares))
    else:
        times.seconds["optimizer"] = max(stepped) / (plan.alike if plan.zero else 1)
    times.seconds["host"] += max(pace.host_seconds for pace in every)
    told(times, portion, fabric, sum(len(one) for one in shares))


def _shared_between_stages(times: StepTimes, pipeline: Pipeline, basis: Basis, portions: Sequence[Portion]) -> None:
    """Gradients of parameters that several workers of a pipeline hold are summed between them."""
    mesh = Mesh.of(pipeline.plan)
    sizes: dict[tuple[int, ...], list[int]] = {}
    for parameter in (one for one in basis.facts.parameters if one.aliases and one.requires_grad):
        local = {
            worker: one.size_bytes
            for worker, portion in enumerate(portions)
            for one in portion.facts.parameters
            if one.name == parameter.name
        }
        if len(local) > 1:
            sizes.setdefault(tuple(local), []).append(max(local.values()))
    for workers, given in sizes.items():
        ranks = [mesh.rank(pp=worker, dp=0, tp=0) for worker in workers]
        alone(times, basis.between(ranks), ALL_REDUCE, given)
