"""A few steps of very small microbatches under each executor that plans use, for what the executors add themselves."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sheaf import launch
from sheaf.api.profiles import REAL_STEP_BYTES, TIMEOUT_SECONDS, ago, in_a_real_step, loaded, median
from sheaf.api.saying import say_nothing
from sheaf.cluster import others
from sheaf.cluster.machine import available_cores
from sheaf.cost.overheads import MEETING, REPLICAS, each, goes_on, in_microbatches, in_steps, without
from sheaf.errors import SheafError
from sheaf.graph import BlockTime, ModelFacts, Profile, cache
from sheaf.graph.profile import accelerator
from sheaf.launch import FromFile
from sheaf.parallel import build
from sheaf.plans import Plan
from sheaf.search import Question
from sheaf.task import Task

SAMPLES = 2  # of a microbatch: with one, batch statistics may have nothing to do
MICROBATCHES = 4
WORKERS = 2
WARM_UP, ROUNDS, LEAST_ROUNDS = 1, 6, 3
BUDGET_SECONDS = 6.0  # for all rounds, as far as the fewest allow


@dataclass(frozen=True)
class Rehearsals:
    """What steps of small microbatches took, by the text of the plan; ``profile`` is of such microbatches.

    ``processor_seconds`` are those of the workers' main threads, all workers together; none on an accelerator.
    ``refused`` are plans that cannot run the task.
    """

    profile: Profile
    seconds: dict[str, float]
    refused: tuple[str, ...] = ()
    processor_seconds: dict[str, float] = field(default_factory=dict[str, float])

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows."""
        return {**asdict(self), "profile": self.profile.to_dict()}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Rehearsals":
        """What ``to_dict`` gave."""
        seconds, processor = (
            {str(text): float(each) for text, each in told[name].items()} for name in ("seconds", "processor_seconds")
        )
        return cls(Profile.from_dict(told["profile"]), seconds, tuple(told["refused"]), processor)


class Taken(NamedTuple):
    """Seconds of a step by plan, those of this worker's main thread, and plans that cannot run the task."""

    seconds: dict[str, float]
    processor_seconds: dict[str, float]
    refused: tuple[str, ...]


def wanted(plans: Iterable[Plan]) -> list[Plan]:
    """What must be rehearsed for these plans; replicas alone too, beside which processor time is taken."""
    found = dict.fromkeys(one for plan in plans for one in (*in_microbatches(plan), *in_steps(plan)))
    return list(found if not any(map(goes_on, found)) else dict.fromkeys((REPLICAS, *found)))


def alone(plans: Iterable[Plan]) -> list[Plan]:
    """What one worker can rehearse for these plans: recomputation, beside doing without."""
    return [Plan(), Plan(recompute="full")] if any(plan.again for plan in plans) else []


def kept_rehearsals(
    task: Task,
    facts: ModelFacts,
    profile: Profile,
    plans: Sequence[Plan],
    *,
    source: FromFile | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = say_nothing,
) -> Rehearsals | None:
    """What two new workers of this machine take for these plans, or took before; None where nothing can be rehearsed.

    Kept beside the profiles; of what is rehearsed again, because others kept the cores busy, what was taken while they
    were calmer. A model whose training state does not fit comfortably twice is not rehearsed. ``say`` is told in a line
    whether they are rehearsed now, or when they were.
    """
    if _state_bytes(facts, profile) > REAL_STEP_BYTES:
        return None
    name = cache.cache_key(task, facts, threads=profile.threads, concurrency=WORKERS)
    path = cache.cache_folder() / f"{name}-rehearsed.json"
    known = None if fresh else _read(path)
    again = known is not None and others.disturbed(known.profile.cores_taken) and others.quiet()
    told = frozenset[str]() if known is None or again else known.seconds.keys() | set(known.refused)
    missing = [plan for plan in plans if str(plan) not in told]
    if not missing:
        say(f"executors on {WORKERS} workers: rehearsed {ago([path])}")
        return known
    say(f"rehearsing executors on {WORKERS} workers")
    rows = launch.run(
        _rehearse_rank,
        WORKERS,
        task if source is None else source,
        facts,
        profile,
        missing,
        threads=max(1, available_cores() // WORKERS),
        timeout_s=TIMEOUT_SECONDS,
    )
    found = replace(rows[0], profile=median([row.profile for row in rows]))
    if known is not None and not (again and found.profile.cores_taken <= known.profile.cores_taken):
        found = _of_both(known, found)
    with suppress(OSError):  # a folder that cannot be written to is done without
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(found.to_dict()), encoding="utf-8")
        beside.replace(path)
    return found


def _of_both(known: Rehearsals, found: Rehearsals) -> Rehearsals:
    """What was rehearsed at two times: of each plan what was taken while the machine was calmer, and blocks' times of
    then. Steps of the busier time are made as much faster as blocks were.
    """
    calmer, busier = sorted((found, known), key=lambda one: one.profile.cores_taken)
    only = busier.seconds.keys() - calmer.seconds.keys()
    taken = busier.profile.cores_taken if only else calmer.profile.cores_taken
    then, blocks = (block_seconds(one.profile) for one in (calmer, busier))
    times = then / blocks if blocks else 1.0
    return Rehearsals(
        replace(calmer.profile, cores_taken=taken),
        {text: times * seconds for text, seconds in busier.seconds.items() if text in only} | calmer.seconds,
        tuple(dict.fromkeys((*known.refused, *found.refused))),
        busier.processor_seconds | calmer.processor_seconds,
    )


def _rehearse_rank(given: Task | FromFile, facts: ModelFacts, profile: Profile, plans: Sequence[Plan]) -> Rehearsals:
    launch.join()
    return agreed(rehearsed(loaded(given), facts, profile, plans))


def _read(path: Path) -> Rehearsals | None:
    """What a file holds; None where there is none, or when what is there is not whole."""
    try:
        return Rehearsals.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def rehearsed(task: Task, facts: ModelFacts, profile: Profile, plans: Sequence[Plan]) -> Rehearsals:
    """Run a few small steps of each plan on the workers that are here (collective): two, or one for plans of one.

    Plans are in turn, as many as fit comfortably at once, so that what disturbs one disturbs all; those that cannot run
    the task are left out.
    """
    began = others.now()
    samples = min(SAMPLES, facts.samples)
    small = replace(task, batch=MICROBATCHES * samples, microbatch=samples)
    plain = in_a_real_step(small, replace(facts, samples=samples), scaled(profile, samples), 0.3)
    at_once = max(1, REAL_STEP_BYTES // max(1, round(_state_bytes(facts, profile))))
    found = Rehearsals(plain, {})
    for start in range(0, len(plans), at_once):
        taken = _in_turn(small, plans[start : start + at_once])
        found = replace(
            found,
            seconds=found.seconds | taken.seconds,
            refused=(*found.refused, *taken.refused),
            processor_seconds=found.processor_seconds | taken.processor_seconds,
        )
    taken_cores = others.taken_since(began, profile.threads)  # of all workers together, whatever they compute on
    if accelerator().type != "cpu":
        return replace(found, processor_seconds={})
    return replace(found, profile=replace(plain, cores_taken=taken_cores))


def _in_turn(small: Task, plans: Sequence[Plan]) -> Taken:
    """What a step takes this worker under each plan, and the plans that cannot run the task."""
    steps: dict[str, Any] = {}
    refused: list[str] = []
    taken: dict[str, list[tuple[float, float]]] = {}
    try:
        for plan in plans:
            try:
                steps[str(plan)] = build(small, plan)
            except SheafError:  # the same on every worker
                refused.append(str(plan))
        turns, turn, started = WARM_UP + ROUNDS, 0, time.perf_counter()
        while turn < turns:
            if turn == WARM_UP:
                least = (time.perf_counter() - started) / WARM_UP
                turns = WARM_UP + max(LEAST_ROUNDS, min(ROUNDS, int(BUDGET_SECONDS / _most(least))))
            for text, step in steps.items():
                _wait()
                began, computing = time.perf_counter(), time.thread_time()
                for _ in range(MEETING):
                    step()
                if turn >= WARM_UP:
                    spent = time.perf_counter() - began, time.thread_time() - computing
                    taken.setdefault(text, []).append(spent)
            turn += 1
    finally:
        for step in steps.values():
            step.close()
    seconds, processor = (
        {text: statistics.median(spent[which] for spent in each_time) / MEETING for text, each_time in taken.items()}
        for which in range(2)
    )
    return Taken(seconds, processor, tuple(refused))


def _state_bytes(facts: ModelFacts, profile: Profile) -> float:
    """What two workers take to train the whole model."""
    return facts.parameter_bytes * (2 + profile.optimizer_state_bytes_per_byte) * WORKERS


def scaled(profile: Profile, samples: int) -> Profile:
    """The profile for other microbatches, as if all its work grew with the samples."""
    share = samples / profile.samples
    blocks = {
        name: BlockTime(time.forward_seconds * share, time.backward_seconds * share)
        for name, time in profile.blocks.items()
    }
    return replace(profile, samples=samples, blocks=blocks, fetch_seconds=profile.fetch_seconds * share)


def overheads(question: Question, found: Rehearsals, busy: int) -> dict[str, float]:
    """What each rehearsed plan took beyond its price; ``question`` is of the workers that rehearsed.

    Of executors that go on while messages travel, what the workers computed beyond replicas alone.
    """
    samples = found.profile.samples
    small = replace(
        question,
        batch=MICROBATCHES * samples,
        microbatch=samples,
        profiles={(samples, busy): without(found.profile)},
    )
    more: dict[str, float] = {}
    computed: dict[str, float] = {}
    for text, seconds in found.seconds.items():
        plan = Plan.parse(text)
        plain = str(Plan(dp=plan.workers))
        if goes_on(plan) and {text, plain} <= found.processor_seconds.keys():
            beside = found.processor_seconds[text] - found.processor_seconds[plain]
            beside = beside / _running(found, plan) - _priced_beside(small, plan, found.profile)
            computed[text] = beside / MICROBATCHES / plan.num_stages
        elif (plan.split_degree == 1 and plan.cp == 1) or plan.split_kind in question.splits:
            more[text] = seconds - small.rough(plan).step_seconds
    return {str(_of_two(Plan.parse(text))): one for text, one in (each(more, MICROBATCHES) | computed).items()}


def carried(added: Mapping[str, float], pair: Profile, more: Profile) -> dict[str, float]:
    """What executors add among more workers of the same machine than the two that rehearsed them, by rehearsed plan.

    It is work of the same cores, and takes longer by as much as blocks do: ``pair`` are the times of two busy workers,
    ``more`` those of these. What replicas add to each step is left out, and with it what others add like them: a real
    step of so many replicas says it (``exposed_seconds``, ``uneven_seconds``).
    """
    before, now = (block_seconds(one) / one.samples for one in (pair, more))
    slower = now / before if before else 1.0
    replicas = added.get(str(REPLICAS), 0.0)
    found: dict[str, float] = {}
    for text, seconds in added.items():
        plan = Plan.parse(text)
        like_replicas = not in_microbatches(plan) and not plan.server
        if plan != REPLICAS:
            found[text] = slower * (seconds - replicas if like_replicas else seconds)
    return found


def block_seconds(profile: Profile) -> float:
    """Forward and backward of all blocks, for one microbatch."""
    return sum(time.forward_seconds + time.backward_seconds for time in profile.blocks.values())


def _running(found: Rehearsals, plan: Plan) -> float:
    """The share of the time in which a computing thread ran: 1, or less on a machine whose cores others use too."""
    wall_seconds = MICROBATCHES * block_seconds(found.profile)
    running = found.processor_seconds[str(Plan(dp=plan.workers))] / wall_seconds if wall_seconds else 1.0
    return min(1.0, running) or 1.0


def _priced_beside(small: Question, plan: Plan, profile: Profile) -> float:
    """What the price knows of by which the workers of a plan, all together, compute more than replicas alone."""
    if plan.recompute != "none":
        return small.rough(Plan(recompute=plan.recompute)).seconds["recompute"]
    if plan.pp > 1:  # each fetches every microbatch, and steps its own parameters alone
        stepped = profile.optimizer_seconds_per_byte * next(iter(small.facts.values())).trainable_bytes
        return (plan.pp - 1) * (MICROBATCHES * profile.fetch_seconds - stepped)
    return 0.0


def _of_two(plan: Plan) -> Plan:
    """As which plan of two workers the overhead of a plan of one is known."""
    return replace(plan, dp=WORKERS) if plan.workers == 1 and plan.recompute != "none" else plan


def agreed(found: Rehearsals) -> Rehearsals:
    """The slowest worker's seconds, and what all workers computed together, on every worker (collective)."""
    texts = list(found.seconds)
    slowest, computed = (
        torch.tensor([each_time.get(text, 0.0) for text in texts], dtype=torch.float64)
        for each_time in (found.seconds, found.processor_seconds)
    )
    if texts and dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        dist.all_reduce(computed)
    processor = dict(zip(texts, computed.tolist(), strict=True)) if found.processor_seconds else {}
    return replace(found, seconds=dict(zip(texts, slowest.tolist(), strict=True)), processor_seconds=processor)


def _most(seconds: float) -> float:
    """The most that any worker found (collective)."""
    found = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
