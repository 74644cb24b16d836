"""What workers have found out about themselves, as values; and the question that follows from it, each time the same.

All that is measured is in ``Heard``, so that a prediction can be made again, with another model of what costs what,
without measuring again.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sheaf.api.plan import with_collectives
from sheaf.api.profiles import median
from sheaf.api.rehearsals import Rehearsals, block_seconds, carried, overheads
from sheaf.cluster import Cluster
from sheaf.graph import BlockTime, ModelFacts, Profile
from sheaf.plans.split import SplitFacts
from sheaf.search import Question
from sheaf.task import Task

SAME_SPEED = 0.05  # workers whose blocks take as long within this are one speed
_DIGITS = ".4g"  # no measurement here holds more


@dataclass(frozen=True)
class Pair:
    """What two workers know that rehearsed executors: what these add, and their blocks' times, for more workers."""

    overheads: dict[str, float]
    profile: Profile


@dataclass(frozen=True)
class Heard:
    """Every worker's own profile, by rank, at each of some moments; and what was rehearsed, by one or two workers.

    ``small`` are their profiles of the rehearsals' microbatches, by rank. ``pair`` is of the two first of more workers.
    """

    moments: tuple[tuple[Profile, ...], ...]
    rehearsals: Rehearsals | None = None
    small: tuple[Profile, ...] = ()
    pair: Pair | None = None

    @property
    def workers(self) -> int:
        """How many measured themselves."""
        return len(self.moments[0])

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows; times with four digits."""
        return _rounded(
            {
                "moments": [[one.to_dict() for one in profiles] for profiles in self.moments],
                "rehearsals": self.rehearsals and {**self.rehearsals.to_dict(), "profile": None},  # one of the small
                "small": [one.to_dict() for one in self.small],
                "pair": self.pair and {"overheads": self.pair.overheads, "profile": self.pair.profile.to_dict()},
            }
        )

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Heard":
        """What ``to_dict`` gave."""
        rehearsals, pair = told["rehearsals"], told["pair"]
        small = tuple(Profile.from_dict(one) for one in told["small"])
        return cls(
            tuple(tuple(Profile.from_dict(one) for one in profiles) for profiles in told["moments"]),
            rehearsals
            and Rehearsals(
                small[0],
                dict(rehearsals["seconds"]),
                tuple(rehearsals["refused"]),
                dict(rehearsals["processor_seconds"]),
            ),
            small,
            pair and Pair(dict(pair["overheads"]), Profile.from_dict(pair["profile"])),
        )


def question_from(
    task: Task, facts: ModelFacts, cluster: Cluster, heard: Heard, splits: Mapping[tuple[int, int], SplitFacts]
) -> Question:
    """The question of plans that use all these workers of ``cluster``; ``facts`` are of the task's microbatch.

    Times are medians over the moments. A host whose worker is slower than the first counts as slower.
    """
    each = [combined(profiles) for profiles in heard.moments]
    speeds = [statistics.median(speeds[rank] for _, speeds in each) for rank in range(heard.workers)]
    profile = median([one for one, _ in each])
    question = Question(
        batch=min(task.batch, task.num_samples),
        facts={facts.samples: facts},
        cluster=paced(cluster, speeds),
        microbatch=facts.samples,
        precision=task.precision,
        splits=splits,
    )
    company = max(host.workers for host in question.cluster.hosts) if heard.workers > 1 else 1
    if heard.rehearsals is not None:
        # Where a worker may compute for a part of the time only, it is not as slow in steps as short as these.
        small, paces = combined(heard.small)
        there = replace(question, cluster=paced(question.cluster, paces))
        profile = replace(profile, overheads=overheads(there, replace(heard.rehearsals, profile=small), company))
    else:
        profile = with_collectives(question, profile, heard.workers)
        if heard.pair is not None:
            profile = replace(profile, overheads=carried(heard.pair.overheads, heard.pair.profile, profile))
    return replace(question, profiles={(facts.samples, company): profile})


def combined(profiles: Sequence[Profile]) -> tuple[Profile, tuple[float, ...]]:
    """One profile in the first worker's times, and each worker's speed relative to the first, 1 where it is the same.

    Times are medians over workers, each counted at its own speed. Where one is slower, everyone waits for its update
    and what else it does at a step's end; as this comes after messages that it waited for, and a worker that may
    compute for a part of the time has saved some by then, it is not as slow there: its own times are taken.
    """
    whole = [block_seconds(one) for one in profiles]
    speeds = tuple(_relative(whole[0], seconds) for seconds in whole)
    first = profiles[0]

    def middle(of: Callable[[Profile], float], ranks: Sequence[int] = range(len(profiles))) -> float:
        return statistics.median(of(profiles[rank]) * speeds[rank] for rank in ranks)

    blocks = {
        name: BlockTime(
            middle(lambda one, name=name: one.blocks[name].forward_seconds),
            middle(lambda one, name=name: one.blocks[name].backward_seconds),
        )
        for name in first.blocks
    }
    slowest = min(range(len(speeds)), key=lambda rank: speeds[rank])
    # Who is done last waits for nothing but the network.
    last = [slowest] if speeds[slowest] < 1 else range(len(profiles))
    return replace(
        first,
        blocks=blocks,
        optimizer_seconds_per_byte=middle(lambda one: one.optimizer_seconds_per_byte, last),
        fetch_seconds=middle(lambda one: one.fetch_seconds),
        host_seconds=middle(lambda one: one.host_seconds, last),
        exposed_seconds=statistics.median(profiles[rank].exposed_seconds for rank in last),
        uneven_seconds=statistics.median(profiles[rank].uneven_seconds for rank in last),
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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:{_DIGITS}}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
