"""What the planner must know, found out among the workers that are here already: all measure, and all hear of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from sheaf.api.measure import measure_here
from sheaf.api.plan import with_collectives
from sheaf.api.profiles import profiles_here
from sheaf.api.rehearsals import WORKERS, agreed, overheads, profile_from, rehearsed, wanted
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
    Two workers also rehearse the executors that ``plans`` use.
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
    if len(speeds) != WORKERS or not plans:
        profile = with_collectives(question, profile, len(speeds))
    else:
        found = agreed(rehearsed(task, facts, mine, wanted(plans)))
        small, _ = combined([profile_from(one) for one in from_everyone(asdict(found.profile))])
        profile = replace(profile, overheads=overheads(question, replace(found, profile=small), company))
    return replace(question, profiles={(facts.samples, company): profile})


def combined(profiles: Sequence[Profile]) -> tuple[Profile, tuple[float, ...]]:
    """One profile in the first worker's times, and each worker's speed relative to the first, 1 where it is the same.

    Times are medians over workers, each counted at its own speed.
    """
    whole = [_seconds(one) for one in profiles]
    speeds = tuple(_relative(whole[0], seconds) for seconds in whole)
    first = profiles[0]

    def median(of: Callable[[Profile], float]) -> float:
        return statistics.median(of(one) * speed for one, speed in zip(profiles, speeds, strict=True))

    blocks = {
        name: BlockTime(
            median(lambda one, name=name: one.blocks[name].forward_seconds),
            median(lambda one, name=name: one.blocks[name].backward_seconds),
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
        optimizer_seconds_per_byte=median(lambda one: one.optimizer_seconds_per_byte),
        fetch_seconds=median(lambda one: one.fetch_seconds),
        host_seconds=median(lambda one: one.host_seconds),
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
