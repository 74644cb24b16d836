"""How long a global step takes, as the executors run it: who waits for whom, and what travels when.

Terms are those of the worker that is done first; ``wait`` is what it idles for the slowest, so that they add up to
the step.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sheaf.cost.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    COUNTER_SECONDS,
    REDUCE_SCATTER,
    Fabric,
    exposed,
    meetings,
    sending,
)
from sheaf.cost.compute import Pace
from sheaf.cost.deals import dealt, own_seconds, stolen, total_all, total_seconds
from sheaf.cost.paced import until_met
from sheaf.cost.portion import Portion
from sheaf.cost.price import SECONDS_TERMS
from sheaf.plans import Plan
from sheaf.plans.shards import shard

STATISTICS = 2  # times as wide as running statistics are those of a microbatch when they are summed, in float64


@dataclass
class StepTimes:
    """Seconds by term while they are added up, what hid, and what one worker sent."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS_TERMS, 0.0))
    hidden_seconds: float = 0.0
    traffic_bytes: float = 0.0
    messages: float = 0.0  # of gloo

    def sends(self, fabric: Fabric, operation: str, size_bytes: int, times: float = 1.0) -> None:
        """Count what one worker sends in a collective."""
        self.traffic_bytes += times * fabric.sent_bytes(operation, size_bytes)
        self.messages += times * fabric.messages(operation, size_bytes)

    def add(self, other: "StepTimes", times: int) -> None:
        """Count what another took so many times."""
        for term, seconds in other.seconds.items():
            self.seconds[term] += times * seconds
        self.hidden_seconds += times * other.hidden_seconds
        self.traffic_bytes += times * other.traffic_bytes
        self.messages += times * other.messages


def step_times(
    plan: Plan, portion: Portion, paces: Sequence[Pace], fabric: Fabric, overlap: float, sizes: Sequence[int]
) -> StepTimes:
    """Seconds of one step of replicas without stages.

    ``portion`` is what one of the workers that share a replica computes; ``paces`` by replica, each that of its slowest
    worker; ``fabric`` is between the replicas; ``sizes`` are the samples of each microbatch in order.
    """
    times, fabric = StepTimes(), sharing(plan, fabric)
    known = dict(zip(map(id, paces), paces, strict=True))
    unlike = set(zip(plan.shard_weights, map(id, paces), strict=True))
    rates = [(weight, known[one].optimizer_seconds_per_byte) for weight, one in unlike]
    updating = update_seconds(plan, portion.trainable_bytes, rates)
    shares = stolen(plan, paces, sizes) if plan.stolen else dealt(plan, sizes, paces)
    everyone = total_all(plan, paces, shares) if plan.server and plan.serves.staleness is None else 0.0
    rounds = plan.meets_locally.rounds
    alone = [total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True)] if rounds else []
    paces, shares = _unlike(paces, shares)
    if plan.zero >= 2:
        _in_rounds(times, plan, portion, paces, fabric, overlap, shares)
    else:
        _accumulated(times, plan, portion, paces, fabric, overlap, shares)
    if everyone:  # nobody waits for anybody
        own = min(total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True))
        times.seconds["wait"] = max(0.0, everyone - own)
    if rounds:
        _by_own_pace(times, plan, alone)
    if plan.server:  # shards update, and workers wait for them
        times.seconds["server"] += updating / plan.serves.shards / max(1, plan.meets_locally.every)
    if (plan.local or not plan.server) and not any(pace.update_seconds for pace in paces):
        times.seconds["optimizer"] = updating
    times.seconds["host"] += max(pace.host_seconds for pace in paces)
    if not rounds:
        told(times, plan, portion, fabric, len(sizes))
    return times


def sharing(plan: Plan, fabric: Fabric) -> Fabric:
    """The links between replicas, which know how full the fullest shard is where shards differ."""
    return replace(fabric, fullest=shard(plan, 1.0)) if plan.zero and not plan.even_shards else fabric


def update_seconds(plan: Plan, trained_bytes: int, rates: Iterable[tuple[int, float]]) -> float:
    """The update on the replica that it takes longest: of each, its weight, and seconds for a byte of parameters."""
    if not plan.zero:
        return trained_bytes * max(rate for _, rate in rates)
    return shard(plan, trained_bytes, max(weight * rate for weight, rate in rates))


def _by_own_pace(times: StepTimes, plan: Plan, alone: Sequence[float]) -> None:
    """Make what the worker that is done first computes for equal shares what it does by its own pace."""
    computed, over = until_met(plan, alone)
    first = alone.index(min(alone))
    for term in ("compute", "recompute", "dispatch", "host"):
        times.seconds[term] *= computed[first] / alone[first] if alone[first] else 1.0
    times.seconds["wait"] = max(0.0, over - computed[first])


def _unlike(paces: Sequence[Pace], shares: list[list[int]]) -> tuple[list[Pace], list[list[int]]]:
    """One replica of each kind, in order: those with the same pace and the same microbatches do the same."""
    same = dict(zip(zip(map(id, paces), map(id, shares), strict=True), zip(paces, shares, strict=True), strict=True))
    kinds: dict[tuple[int, ...], tuple[Pace, list[int]]] = {}
    for pace, share in same.values():
        kinds.setdefault((id(pace), len(share), sum(share), share[-1] if share else 0), (pace, share))
    return [pace for pace, _ in kinds.values()], [share for _, share in kinds.values()]


def told(times: StepTimes, plan: Plan, portion: Portion, fabric: Fabric, num_microbatches: int) -> None:
    """What replicas tell each other each step: losses, which parameters were used, batch statistics to merge.

    Beside a server losses travel with what is pushed, and out of lock-step nothing is merged.
    """
    facts, replicas = portion.facts, fabric.workers
    sizes: list[int] = []
    if not plan.server:
        sizes += [8 * (2 * num_microbatches + replicas + 1), 4 * (len(facts.parameters) + 2 * replicas)]
    merged = sum(buffer.size_bytes for buffer in facts.buffers if buffer.updated)
    if merged and plan.serves.exact:
        sizes.append(num_microbatches * STATISTICS * merged)
    for size in sizes:
        times.seconds["all_reduce"] += fabric.seconds(ALL_REDUCE, size)
        if fabric.gloo:  # elsewhere they are nothing beside gradients
            times.sends(fabric, ALL_REDUCE, size)


def own_terms(times: StepTimes, plan: Plan, pace: Pace, sizes: Sequence[int]) -> None:
    """Add what ``own_seconds`` of these microbatches is made of."""
    again = plan.again
    times.seconds["host"] += COUNTER_SECONDS * len(sizes) if plan.stolen else 0.0
    for size, count in Counter(sizes).items():
        times.seconds["compute"] += count * (pace.forward.seconds(size) + pace.backward.seconds(size))
        times.seconds["recompute"] += count * pace.again.seconds(size) if again else 0.0
        times.seconds["dispatch"] += count * pace.dispatch_seconds
        times.seconds["host"] += count * pace.fetch.seconds(size)
        times.seconds["tensor"] += count * pace.crossing.seconds(size, again=again)
        times.traffic_bytes += count * pace.crossing.sent_bytes(size, again=again)
        times.messages += count * pace.crossing.messages(size, again=again)


def _accumulated(
    times: StepTimes,
    plan: Plan,
    portion: Portion,
    paces: Sequence[Pace],
    fabric: Fabric,
    overlap: float,
    shares: Sequence[Sequence[int]],
) -> None:
    """ZeRO 0 and 1: everyone works alone; buckets travel beside the slowest worker's last backward.

    Where each updates alone, the slowest is the one that is last with its update and what it computes after it.
    """
    totals = [total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True)]
    first, slowest = totals.index(min(totals)), totals.index(max(totals))
    own_terms(times, plan, paces[first], shares[first])
    times.seconds["wait"] = totals[slowest] - totals[first]
    times.seconds["optimizer"] = paces[first].update_seconds
    last = shares[slowest][-1:]  # none where it only updates
    window = backward_seconds(plan, paces[slowest], last[0]) if last else 0.0
    reduced(times, plan, portion, fabric, window, overlap)


def reduced(
    times: StepTimes, plan: Plan, portion: Portion, fabric: Fabric, window_seconds: float, overlap: float
) -> None:
    """ZeRO 0 and 1: replicas sum their gradients beside the last backward; sharded weights are gathered again."""
    if plan.alike == 1:
        return
    if plan.server:
        served(times, plan, portion, fabric)
        return
    if not plan.exact:
        met(times, plan, portion, fabric, window_seconds, overlap)
        return
    gathered = portion.buckets(plan.bucket_bytes)
    operation = REDUCE_SCATTER if plan.zero else ALL_REDUCE
    _beside(times, fabric, [(operation, size) for size in gathered], window_seconds, overlap)
    if plan.zero:
        alone(times, fabric, ALL_GATHER, gathered)


def served(times: StepTimes, plan: Plan, portion: Portion, fabric: Fabric) -> None:
    """Gradients go to shards, from there to backups, and values come back, with nothing to hide behind.

    A backup is given every push while others come in; in lock-step with shares of one's own only their sum, once it is
    there. Beside replicas the busiest is a worker with a shard, which gives values to all; the next shard's backup may
    be beside it. What a worker and its own shard tell each other stays in its machine. Shards apart carry that on links
    of their own, and a worker sends its gradient only. With steps between meetings, a step's share of it.
    """
    whole, serves, every = portion.trainable_bytes, plan.serves, max(1, plan.meets_locally.every)
    shard = -(-whole // serves.shards)
    sums = serves.exact and not plan.stolen
    mirrored = shard if sums else plan.dp * shard
    if serves.apart:
        pushed, given, sent = whole, plan.dp * shard, whole
        mirrored = mirrored if serves.shards > 1 else 0
    else:
        pushed, given = whole - shard, (plan.dp - 1) * shard
        sent = pushed + mirrored + given
    if sums:
        seconds = fabric.passing_seconds(max(pushed, given)) + fabric.passing_seconds(mirrored)
    else:
        coming = given + (mirrored if serves.shards > 1 else 0)
        leaving = mirrored if serves.apart else pushed + mirrored
        seconds = fabric.passing_seconds(max(pushed, coming, leaving))
    times.seconds["server"] += (seconds + fabric.passing_seconds(max(given, pushed))) / every
    times.traffic_bytes += sent / every


def met(times: StepTimes, plan: Plan, portion: Portion, fabric: Fabric, window_seconds: float, overlap: float) -> None:
    """Gradients that meet compressed, or weights that meet every few steps: a step's share of it.

    Compressed gradients travel twice, and the second time there is nothing to hide behind. Where some are late for a
    meeting, seconds are of those who are there, and bytes the mean over all.
    """
    local = plan.meets_locally
    travels = meetings(portion.facts, plan, fabric.workers, portion.state)
    if not local.every:
        _beside(times, fabric, [messages[0] for messages in travels], window_seconds, overlap)
        for operation, size in (message for messages in travels for message in messages[1:]):
            alone(times, fabric, operation, (size,))
        return
    for operation, size in (message for messages in travels for message in messages):
        seconds = fabric.seconds(operation, size)
        hidden = min(seconds, local.overlap * times.seconds["compute"])
        term = operation if operation in times.seconds else ALL_REDUCE
        times.seconds[term] += (seconds - hidden) / local.every
        times.hidden_seconds += hidden / local.every
        times.sends(fabric, operation, size, sending(operation, local, fabric.workers) / local.every)


def _in_rounds(
    times: StepTimes,
    plan: Plan,
    portion: Portion,
    paces: Sequence[Pace],
    fabric: Fabric,
    overlap: float,
    shares: Sequence[Sequence[int]],
) -> None:
    """ZeRO 2 and 3: all workers go through the blocks together, one microbatch each, round by round."""
    totals = [total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True)]
    first = totals.index(min(totals))
    own_terms(times, plan, paces[first], shares[first])
    lockstep = 0.0
    rounds: Counter[tuple[float, float]] = Counter()
    for number in range(max(len(share) for share in shares)):
        here = [(pace, share[number]) for pace, share in zip(paces, shares, strict=True) if number < len(share)]
        lockstep += max(own_seconds(plan, pace, size) for pace, size in here)
        forward = max(pace.forward.seconds(size) for pace, size in here)
        backward = max(backward_seconds(plan, pace, size) for pace, size in here)
        rounds[forward, backward] += 1
    rounds_moved(times, plan, portion, fabric, rounds, overlap)
    times.seconds["wait"] = max(0.0, lockstep - totals[first])
    after_rounds(times, plan, portion, fabric)


def rounds_moved(
    times: StepTimes,
    plan: Plan,
    portion: Portion,
    fabric: Fabric,
    rounds: Mapping[tuple[float, float], int],
    overlap: float,
) -> None:
    """ZeRO 2 and 3: what travels beside microbatches; ``rounds`` counts them by forward and backward seconds."""
    held = portion.units(plan.bucket_bytes)
    for (forward_seconds, backward_seconds), count in rounds.items():
        once = StepTimes()
        if plan.zero == 2:
            travels = [(REDUCE_SCATTER, size) for size in portion.buckets(plan.bucket_bytes)]
        else:
            reduced = (*reversed(held.block_trainable_bytes), held.glue_trainable_bytes)
            # The first gathering has nothing to hide behind, as the last reduction has not: listed last, it counts so.
            gathered = [(ALL_GATHER, size) for size in reversed(held.block_bytes)]
            _beside(once, fabric, gathered, forward_seconds, overlap)
            travels = [(ALL_GATHER, size) for size in reversed(held.block_bytes[:-1])]
            travels += [(REDUCE_SCATTER, size) for size in reduced]
        _beside(once, fabric, travels, backward_seconds, overlap)
        times.add(once, count)


def after_rounds(times: StepTimes, plan: Plan, portion: Portion, fabric: Fabric) -> None:
    """ZeRO 2 and 3: what is gathered once per step."""
    if plan.zero == 3:
        alone(times, fabric, ALL_GATHER, (portion.units(plan.bucket_bytes).glue_bytes,))
    else:
        alone(times, fabric, ALL_GATHER, portion.buckets(plan.bucket_bytes))


def backward_seconds(plan: Plan, pace: Pace, size: int) -> float:
    """Seconds of computing in a microbatch's backward, recomputation included."""
    return pace.backward.seconds(size) + (pace.again.seconds(size) if plan.again else 0.0)


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
        times.sends(fabric, operation, size)


def alone(times: StepTimes, fabric: Fabric, operation: str, sizes: Sequence[int]) -> None:
    """Collectives that everyone waits for."""
    for size in sizes:
        times.seconds[operation] += fabric.seconds(operation, size)
        times.sends(fabric, operation, size)
