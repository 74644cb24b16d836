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

    Times and speeds are medians over the moments: who is slow is slow in most. A host whose worker is slower than the
    first counts as slower.
    """
    each = [relative(profiles) for profiles in heard.moments]
    speeds = [statistics.median(there[rank] for there in each) for rank in range(heard.workers)]
    profile = median([combined(profiles, slowest(speeds)) for profiles in heard.moments])
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
        paces = relative(heard.small)
        small = combined(heard.small, slowest(paces))
        there = replace(question, cluster=paced(question.cluster, paces))
        profile = replace(profile, overheads=overheads(there, replace(heard.rehearsals, profile=small), company))
    else:
        profile = with_collectives(question, profile, heard.workers)
        if heard.pair is not None:
            profile = replace(profile, overheads=carried(heard.pair.overheads, heard.pair.profile, profile))
    return replace(question, profiles={(facts.samples, company): profile})


def relative(profiles: Sequence[Profile]) -> tuple[float, ...]:
    """Each worker's speed relative to the first, by what its blocks take; 1 where that is the same within 5 %."""
    first, *_ = whole = [block_seconds(one) for one in profiles]
    speeds = (first / seconds if seconds else 1.0 for seconds in whole)
    return tuple(1.0 if abs(speed - 1) < SAME_SPEED else speed for speed in speeds)


def slowest(speeds: Sequence[float]) -> tuple[int, ...]:
    """The workers for which all others wait: the slowest and those as slow, or all."""
    return tuple(rank for rank, speed in enumerate(speeds) if speed < min(speeds) * (1 + SAME_SPEED))


def combined(profiles: Sequence[Profile], last: Sequence[int]) -> Profile:
    """One profile in the first worker's times.

    Times are medians over workers, each counted at its own speed. Everyone waits for the update of ``last`` and what
    else they do at a step's end, and they wait for nothing but the network; as that comes after messages that they
    waited for, and a worker that may compute for a part of the time has saved some by then, they are not as slow there:
    their own times are taken.
    """
    speeds, first = relative(profiles), profiles[0]

    def middle(of: Callable[[Profile], float], ranks: Sequence[int] = range(len(profiles))) -> float:
        return statistics.median(of(profiles[rank]) * speeds[rank] for rank in ranks)

    blocks = {
        name: BlockTime(
            middle(lambda one, name=name: one.blocks[name].forward_seconds),
            middle(lambda one, name=name: one.blocks[name].backward_seconds),
        )
        for name in first.blocks
    }
    return replace(
        first,
        blocks=blocks,
        optimizer_seconds_per_byte=middle(lambda one: one.optimizer_seconds_per_byte, last),
        fetch_seconds=middle(lambda one: one.fetch_seconds),
        host_seconds=middle(lambda one: one.host_seconds, last),
        exposed_seconds=statistics.median(profiles[rank].exposed_seconds for rank in last),
        uneven_seconds=statistics.median(profiles[rank].uneven_seconds for rank in last),
        cores_taken=max(one.cores_taken for one in profiles),
    )


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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:{_DIGITS}}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
