"""What the planner must know, found out among the workers that are here already: all measure, and all hear of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from sheaf.api.measure import measure_here
from sheaf.api.plan import with_collectives
from sheaf.api.profiles import median, profiles_here
from sheaf.api.rehearsals import WORKERS, agreed, alone, overheads, profile_from, rehearsed, wanted
from sheaf.cluster import Cluster, from_everyone
from sheaf.graph import BlockTime, ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.split import SplitFacts
from sheaf.search import Question
from sheaf.task import Task

SAME_SPEED = 0.05  # workers whose blocks take as long within this are one speed
BUDGET_SECONDS = 3.0


def question_here(
    task: Task,
    facts: ModelFacts,
    *,
    cluster: Cluster | None = None,
    splits: dict[tuple[int, int], SplitFacts] | None = None,
    plans: Sequence[Plan] = (),
    quick: bool = True,
    budget_seconds: float = BUDGET_SECONDS,
) -> Question:
    """The question of plans that use all workers of the default process group, or this one alone (collective).

    The task's blocks are measured while all workers measure; a host whose worker is slower at them than the first
    counts as slower. ``cluster`` is these workers', where it is known already; ``facts`` are of the task's microbatch.
    One or two workers also rehearse the executors that ``plans`` use. ``budget_seconds`` are for measuring blocks.
    """
    found = measure_here(quick=quick) if cluster is None else cluster
    mine = profiles_here(task, [facts], torch.get_num_threads(), budget_seconds)[0]
    profile, speeds = combined([profile_from(one) for one in from_everyone(asdict(mine))])
    question = Question(
        batch=min(task.batch, task.num_samples),
        facts={facts.samples: facts},
        cluster=paced(found, speeds),
        microbatch=facts.samples,
        precision=task.precision,
        splits=splits or {},
    )
    company = max(host.workers for host in question.cluster.hosts) if len(speeds) > 1 else 1
    if len(speeds) > WORKERS or not plans:
        profile = with_collectives(question, profile, len(speeds))
    else:
        rehearsing = wanted(plans) if len(speeds) == WORKERS else alone(plans)
        told = agreed(rehearsed(task, facts, mine, rehearsing))
        # Where a worker may compute for a part of the time only, it is not as slow in steps as short as these.
        small, paces = combined([profile_from(one) for one in from_everyone(asdict(told.profile))])
        there = replace(question, cluster=paced(question.cluster, paces))
        profile = replace(profile, overheads=overheads(there, replace(told, profile=small), company))
    return replace(question, profiles={(facts.samples, company): profile})


def measured_again(question: Question, task: Task, *, budget_seconds: float = BUDGET_SECONDS) -> Question:
    """The question of ``question_here`` with blocks measured once more, as means of what was and is found (collective).

    A machine that others use, too, is not always as fast; what is measured before and after something is nearer to what
    it was meanwhile.
    """
    ((samples, company), before), *_ = question.profiles.items()
    facts = question.facts[samples]
    mine = profiles_here(task, [facts], torch.get_num_threads(), budget_seconds)[0]
    found, speeds = combined([profile_from(one) for one in from_everyone(asdict(mine))])
    both = replace(median([before, found]), overheads=before.overheads, collective_factor=before.collective_factor)
    known = [host.speed for host in question.cluster.hosts for _ in range(host.count * host.workers)]
    means = [(old + new) / 2 for old, new in zip(known, speeds, strict=True)]
    return replace(question, cluster=paced(question.cluster, means), profiles={(samples, company): both})


def combined(profiles: Sequence[Profile]) -> tuple[Profile, tuple[float, ...]]:
    """One profile in the first worker's times, and each worker's speed relative to the first, 1 where it is the same.

    Times are medians over workers, each counted at its own speed.
    """
    whole = [_seconds(one) for one in profiles]
    speeds = tuple(_relative(whole[0], seconds) for seconds in whole)
    first = profiles[0]

    def middle(of: Callable[[Profile], float]) -> float:
        return statistics.median(of(one) * speed for one, speed in zip(profiles, speeds, strict=True))

    blocks = {
        name: BlockTime(
            middle(lambda one, name=name: one.blocks[name].forward_seconds),
            middle(lambda one, name=name: one.blocks[name].backward_seconds),
        )
        for name in first.blocks
    }
    slowest = min(range(len(speeds)), key=lambda rank: speeds[rank])
    # Who is done last waits for nothing but the network.
    exposed = (
        profiles[slowest].exposed_seconds
        if min(speeds) < 1 < 1 / min(speeds) - SAME_SPEED
        else statistics.median(one.exposed_seconds for one in profiles)
    )
    return replace(
        first,
        blocks=blocks,
        optimizer_seconds_per_byte=middle(lambda one: one.optimizer_seconds_per_byte),
        fetch_seconds=middle(lambda one: one.fetch_seconds),
        host_seconds=middle(lambda one: one.host_seconds),
        exposed_seconds=exposed,
    ), speeds


def paced(cluster: Cluster, speeds: Sequence[float]) -> Cluster:
    """The cluster with hosts at the speeds of their first workers; as it is where it has other workers, or one host."""
    ranks, hosts, number = [], list[Any](), 0
    for host in cluster.hosts:
        for _ in range(host.count):
            ranks.append(number)
            hosts.append(replace(host, count=1))
            number += host.workers
    if number != len(speeds) or len(hosts) == 1:
        return cluster
    return replace(
        cluster,
        hosts=tuple(replace(host, speed=speeds[rank]) for host, rank in zip(hosts, ranks, strict=True)),
    )


def _relative(first_seconds: float, seconds: float) -> float:
    speed = first_seconds / seconds if seconds else 1.0
    return 1.0 if abs(speed - 1) < SAME_SPEED else speed


def _seconds(profile: Profile) -> float:
    return sum(time.forward_seconds + time.backward_seconds for time in profile.blocks.values())
