"""Rank every way to split a task over a machine or a cluster, with reasons."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sheaf.api.cuts import best_cut, cut_inside
from sheaf.api.finer import Finer
from sheaf.api.measure import measure
from sheaf.api.profiles import BusyNote, busy_note, measured_profiles
from sheaf.api.rehearsals import WORKERS as REHEARSING
from sheaf.api.rehearsals import carried, kept_rehearsals, overheads, wanted
from sheaf.api.saying import say_nothing
from sheaf.api.splits import described, rehearsed, splits
from sheaf.api.verdicts import finished
from sheaf.cluster import Cluster, read
from sheaf.cluster.machine import host_name
from sheaf.cost import microbatch_sizes, price
from sheaf.cost.placement import seats
from sheaf.cost.price import Price
from sheaf.errors import PlanError, SheafError, TaskError, first_line
from sheaf.graph import ModelFacts, Profile, trace
from sheaf.graph.drawn import Drawn
from sheaf.graph.refusals import refuse_untrainable
from sheaf.launch import FromFile
from sheaf.plans import Plan
from sheaf.plans.split import SplitFacts
from sheaf.plans.stages import default_microbatch
from sheaf.search import Progress, Question, Ranking, Refusal, broken, search, unmergeable
from sheaf.search.measured import facts_for
from sheaf.search.space import microbatch_choices
from sheaf.split.sequences import sequences
from sheaf.task import Task
from sheaf.task.probe import elementwise, over_stand_ins, unhosted

COLLECTIVE_FACTORS = (0.5, 4.0)  # what lies outside says more of the moment than of the machine
MEASURED_UP_TO = 4  # workers: each number is measured; beyond, powers of two and the largest
SIZES_MEASURED = 3  # microbatch sizes per number of workers, where the task leaves the size open


def plan(
    task: Task,
    *,
    workers: int | None = None,
    cluster: Cluster | Path | str | None = None,
    allow_relaxed: bool = False,
    measured: bool = True,
    quick: bool = False,
    fresh: bool = False,
    source: FromFile | None = None,
    note: Callable[[str], None] | None = None,
    heard: Callable[[Progress], None] | None = None,
    seconds: float | None = None,
    target_samples: int = 0,
    explain: bool = True,
) -> Ranking:
    """Every plan for the task, best first, each with its predicted step time and memory; ``.best`` leads.

    ``workers``  how many may be used; without a cluster, of this machine (default: its accelerators, or its cores)
    ``cluster``  a Cluster, a cluster file, or the name of a known machine; None: this machine, measured
    ``allow_relaxed``  also plans that do not compute the serial answer
    ``measured``  on this machine, measure the model's blocks; otherwise, and elsewhere, a roofline prices them
    ``quick``    measure this machine's links in a third of the time
    ``fresh``    measure again what an earlier call has measured
    ``source``   where each worker finds the task by itself, for a task that cannot be sent to it
    ``note``     is told in a line what is being done; without it a RuntimeWarning says where other programs kept the
                 cores busy meanwhile, which ``.cores_taken`` counts
    ``heard``    is told of the best plan so far while the search goes on
    ``seconds``  after which a search ends with the best so far (what is traced and measured before is not counted)
    ``target_samples``  what training is to see in all, for its cost where the cluster's file has a price per hour
    ``explain``  also say what binds the best plan, and what would have to change for others to win

    Raises TaskError for a model that cannot be traced, and for an open microbatch where its size decides the answer;
    ClusterError, DataError, and WorkerFailed when measuring fails.
    """
    say = note or say_nothing
    drawn = Drawn(task)
    question = ask(task, workers=workers, cluster=cluster, quick=quick, fresh=fresh, note=note, drawn=drawn)
    question = replace(question, allow_relaxed=allow_relaxed)
    question, unsplit = _with_splits(task, question, drawn, fresh=fresh, say=say)

    def whole(ranking: Ranking) -> Ranking:
        return finished(_told(question, ranking, unsplit), target_samples=target_samples, explain=explain)

    roofline = search(question, seconds=seconds, heard=heard)
    if not (measured and roofline.ranked and _is_here(question.cluster, given=cluster is not None)):
        return whole(roofline)
    profiles = {}
    for busy in _company(question, roofline):
        sizes = _sizes(task, question.batch, busy)
        facts = [question.facts[size] for size in sizes if size in question.facts] or list(question.facts.values())
        found = measured_profiles(task, facts, busy, source=source, fresh=fresh, say=say)
        profiles.update({(one.samples, busy): one for one in found})
    plans = [entry.plan for entry in roofline.ranked]
    profiles = _with_overheads(task, question, profiles, plans, source=source, fresh=fresh, say=say)
    if note is None and (busy := busy_note(profiles.values())):
        warnings.warn(busy, RuntimeWarning, stacklevel=2)
    ranking = search(replace(question, profiles=profiles), seconds=seconds, heard=heard)
    return whole(cut_inside(task, ranking, say, source=source, fresh=fresh))


def _with_overheads(
    task: Task,
    question: Question,
    profiles: Mapping[tuple[int, int], Profile],
    plans: Sequence[Plan],
    *,
    source: FromFile | None,
    fresh: bool = False,
    say: Callable[[str], None],
) -> dict[tuple[int, int], Profile]:
    """The profiles with what the plans' executors add to blocks and messages; failing that, with what replicas took."""
    if not profiles or question.available < REHEARSING or not wanted(plans):
        return dict(profiles)
    (samples, nearest), start = min(profiles.items(), key=lambda one: abs(one[0][1] - REHEARSING))
    facts, found = facts_for(question.facts, samples), None
    try:
        found = kept_rehearsals(task, facts, start, wanted(plans), source=source, fresh=fresh, say=say)
    except SheafError as error:  # planning goes on without
        say(f"nothing was rehearsed: {first_line(error)}")
    if found is None:
        return {(size, busy): with_collectives(question, one, busy) for (size, busy), one in profiles.items()}
    added = overheads(question, found, REHEARSING)

    def among(profile: Profile, busy: int) -> Profile:
        profile = replace(profile, cores_taken=max(profile.cores_taken, found.profile.cores_taken))
        if busy <= REHEARSING:
            return replace(profile, overheads=added)
        pair = start if nearest == REHEARSING else profile
        return replace(with_collectives(question, profile, busy), overheads=carried(added, pair, profile))

    return {(size, busy): among(one, busy) for (size, busy), one in profiles.items()}


def _with_splits(
    task: Task, question: Question, drawn: Drawn, *, fresh: bool, say: Callable[[str], None]
) -> tuple[Question, tuple[Refusal, ...]]:
    """The question with how layers would be split, and why not among other numbers of workers."""
    if question.available == 1:
        return question, ()
    facts = facts_for(question.facts, question.microbatch or -(-question.batch // question.available))
    if unmergeable(facts):
        return question, ()  # no plan of several workers can run
    if not question.elementwise:
        why = "the optimizer is not elementwise, and workers that split layers step slices of parameters"
        return question, (Refusal("tp=2", why, "dp alone, or an elementwise optimizer such as AdamW or SGD"),)
    found, refused = splits(
        task,
        facts,
        workers=question.available,
        per_machine=max(host.workers for host in question.cluster.hosts),
        batch=question.batch,
        fresh=fresh,
        say=say,
        drawn=drawn,
    )
    return replace(question, splits=found), refused


def _told(question: Question, ranking: Ranking, unsplit: tuple[Refusal, ...]) -> Ranking:
    """The ranking with what splitting layers does under its plans, and the refusals that came before it."""
    facts = next(iter(question.facts.values()))
    keys = {question.split_key(entry.plan) for entry in ranking.ranked} & set(question.splits)
    return replace(
        ranking,
        refused=(*ranking.refused, *unsplit),
        splits={key: described(question.splits[key], facts) for key in sorted(keys)},
    )


def with_collectives(question: Question, profile: Profile, workers: int) -> Profile:
    """The profile with how much longer collectives took in a real step of replicas than the cluster file says."""
    if profile.exposed_seconds <= 0 or workers < 2:
        return profile
    alone = price(
        Plan(dp=workers),
        facts_for(question.facts, profile.samples),
        question.cluster,
        profile,
        microbatches=microbatch_sizes(question.batch, profile.samples),
        precision=question.precision,
    ).seconds
    said = sum(alone[term] for term in ("all_reduce", "reduce_scatter", "all_gather"))
    low, high = COLLECTIVE_FACTORS
    return replace(profile, collective_factor=min(high, max(low, profile.exposed_seconds / said))) if said else profile


def ask(
    task: Task,
    *,
    workers: int | None = None,
    cluster: Cluster | Path | str | None = None,
    quick: bool = False,
    fresh: bool = False,
    note: Callable[[str], None] | None = None,
    drawn: Drawn | None = None,
) -> Question:
    """What the planner must know before it prices anything: facts, cluster and what the optimizer allows.

    ``drawn`` is the task's model, where others look at it too.
    """
    drawn = drawn or Drawn(task)
    if workers is not None and workers < 1:
        raise PlanError(f"workers={workers}: at least one worker is needed")
    say = note or say_nothing
    batch = min(task.batch, task.num_samples)
    say("tracing the model")
    first = trace(task, task.microbatch or batch, drawn=drawn)
    allowed(task, first)
    trainable(task, first)
    if cluster is None:
        say("measuring this machine, or taking what was measured before")
        chosen = measure(workers, quick=quick, fresh=fresh)
    else:
        chosen = cluster if isinstance(cluster, Cluster) else read(cluster)
    most = chosen.workers if workers is None else min(workers, chosen.workers)
    facts = {first.samples: first}
    if task.microbatch is None:
        for busy in _busy(min(most, max(host.workers for host in chosen.hosts))):
            for size in _sizes(task, batch, busy):
                if size not in facts:
                    facts[size] = trace(task, size, known=first.tables, drawn=drawn)
    return Question(
        batch=batch,
        facts=facts,
        cluster=chosen,
        microbatch=None if task.microbatch is None else min(task.microbatch, batch),
        workers=workers,
        elementwise=_slices_apart(task, first),
        hosted=not unhosted(task.optimizer, [(len(one.shape), one.requires_grad) for one in first.parameters]),
        precision=task.precision,
    )


def _slices_apart(task: Task, facts: ModelFacts) -> bool:
    return elementwise(task.optimizer, [parameter.shape for parameter in facts.parameters])


def trainable(task: Task, facts: ModelFacts) -> None:
    """Raise TaskError where the model cannot be trained at all, or its optimizer cannot be built."""
    refuse_untrainable(task, facts)
    over_stand_ins(task.optimizer, [(len(one.shape), one.requires_grad) for one in facts.parameters])


def allowed(task: Task, facts: ModelFacts) -> None:
    """Raise TaskError where the task leaves its microbatch open though the answer depends on it."""
    if task.microbatch is not None or not (facts.draws or facts.batch_dependent):
        return
    name, what = (
        (facts.batch_dependent[0], "computes with the statistics of a microbatch")
        if facts.batch_dependent
        else (facts.draws[0], "draws its random numbers microbatch by microbatch")
    )
    example = 2 ** max(0, (task.batch // 4).bit_length() - 1)
    raise TaskError(
        f"the task leaves microbatch open, but {name or 'the model itself'} {what}, so the answer would depend on the "
        f"plan: give the task a microbatch, such as microbatch={example}"
    )


def resolve(task: Task, plan: Plan, facts: ModelFacts) -> Plan:
    """The plan with its microbatch written in where the task leaves it open: one per replica, more for a pipeline.

    Raises TaskError where the answer depends on the size, and PlanError where task and plan disagree.
    """
    allowed(task, facts)
    if task.microbatch is not None:
        if plan.microbatch not in (None, task.microbatch):
            raise PlanError(
                f"microbatch={plan.microbatch} in the plan, but the task says microbatch={task.microbatch}, which is "
                "part of what is computed: drop it from the plan"
            )
        return plan
    return plan if plan.microbatch is not None else plan.with_microbatch(default_microbatch(plan, task.batch))


def check(task: Task, plan: Plan, facts: ModelFacts, *, workers: int) -> Plan:
    """The plan, resolved, when it can run the task on so many workers.

    Raises PlanError listing every rule it breaks, memory apart, each with its remedy.
    """
    chosen = resolve(task, plan, facts)
    found = broken(
        chosen,
        facts=facts,
        workers=workers,
        batch=task.batch,
        microbatch=task.microbatch,
        elementwise=chosen.serial or _slices_apart(task, facts),
    )
    if found:
        raise PlanError([f"{one.plan}: {one.reason}; use {one.remedy}" for one in found])
    return chosen


def predicted(
    task: Task,
    plan: Plan,
    facts: ModelFacts,
    *,
    split: SplitFacts | None = None,
    source: FromFile | None = None,
    note: Callable[[str], None] | None = None,
    recut: bool = False,
) -> Price:
    """What one plan takes on this machine, priced from what its own number of workers measures, or measured before.

    ``plan`` is resolved, ``facts`` are of its microbatch, and ``split`` says how it splits layers, if it does. With
    ``recut`` its stages are cut anew by what was measured, inside of blocks where that is clearly better, and the
    price's plan has these. Raises ClusterError, DataError and WorkerFailed when measuring fails.
    """
    say = note or say_nothing
    say(f"predicting a step of {plan} from what was measured, measuring what was not")
    question, found = _measured_here(task, plan, facts, split, source)
    busy = BusyNote(say)
    cut: Finer | None = None
    if found:
        if recut:
            plan, cut = best_cut(task, plan, replace(question, profiles=found), say, source=source, busy=busy)
        for kind in {one.split_kind for one in wanted([plan])} - set(question.splits):
            with suppress(SheafError):  # what cannot be split so is not rehearsed
                splits = {**question.splits, kind: rehearsed(task, facts, *kind)} if kind[0] > 1 else question.splits
                question = replace(question, splits=splits)
        found = _with_overheads(task, question, found, [plan], source=source, say=say)
        busy.of(found.values())
    question = replace(question, profiles=found)
    return question.price(plan) if cut is None else cut.asked(question).price(cut.plan)


def cut_here(
    task: Task,
    plan: Plan,
    facts: ModelFacts,
    *,
    split: SplitFacts | None = None,
    source: FromFile | None = None,
    note: Callable[[str], None] | None = None,
) -> Plan:
    """The plan with its stages cut anew by what was measured, as ``predicted`` cuts them; arguments and errors too."""
    say = note or say_nothing
    say(f"balancing the stages of {plan} by what was measured, measuring what was not")
    question, found = _measured_here(task, plan, facts, split, source)
    if not found:
        return plan
    plan, cut = best_cut(task, plan, replace(question, profiles=found), say, source=source)
    return plan if cut is None else cut.plan


def _measured_here(
    task: Task, plan: Plan, facts: ModelFacts, split: SplitFacts | None, source: FromFile | None
) -> tuple[Question, dict[tuple[int, int], Profile]]:
    """What is asked of this machine about one plan, and the times of blocks by samples and busy workers."""
    if plan.cp > 1:
        split = sequences(task, plan.cp, samples=facts.samples)
    cluster = measure(plan.workers, quick=True)
    profiles = measured_profiles(task, [facts], plan.workers, source=source)
    question = Question(
        batch=min(task.batch, task.num_samples),
        facts={facts.samples: facts},
        cluster=cluster,
        microbatch=task.microbatch,
        precision=task.precision,
        splits={plan.split_kind: split} if split is not None else {},
    )
    return question, {(one.samples, plan.workers): one for one in profiles}


def _is_here(cluster: Cluster, *, given: bool) -> bool:
    return not given or (cluster.name == host_name() and len(cluster.hosts) == 1 and cluster.hosts[0].count == 1)


def _company(question: Question, ranking: Ranking) -> list[int]:
    """With how many busy workers per host to measure: those that plans which fit have, as far as it pays."""
    counts = {max(seat.busy for seat in seats(question.cluster, entry.plan.workers)) for entry in ranking.ranked}
    return [busy for busy in _busy(max(counts)) if busy in counts or busy == max(counts)]


def _busy(most: int) -> list[int]:
    if most <= MEASURED_UP_TO:
        return list(range(1, most + 1))
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def _sizes(task: Task, batch: int, busy: int) -> Sequence[int]:
    """Microbatch sizes to trace and measure for so many workers: the smallest, the largest and one between."""
    if task.microbatch is not None:
        return [min(task.microbatch, batch)]
    choices = microbatch_choices(batch, busy)
    return sorted({choices[0], choices[len(choices) // 2], choices[-1]})[:SIZES_MEASURED]
