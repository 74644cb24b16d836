"""How long a pipeline's schedule takes, for pricing many plans: the simulation's clock without its drawing.

Who waits for whom does not depend on how long anything takes, so a schedule is worked out once for each number of
stages and microbatches, and played against many clocks.
"""

from functools import lru_cache
from typing import NamedTuple

from sheaf.plans.schedule import BACKWARD, FORWARD, WEIGHTS, Action, actions, carried_out, held
from sheaf.plans.timeline import Timeline, simulate

KINDS = (FORWARD, BACKWARD, WEIGHTS)


class Course(NamedTuple):
    """A schedule and the seconds of one action by stage.

    ``weight_seconds`` is empty where the schedule has no backward of weights apart.
    """

    schedule: str
    workers: int
    stages: int
    num_microbatches: int
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    weight_seconds: tuple[float, ...] = ()
    transfer_seconds: float = 0.0


def course_seconds(course: Course) -> float:
    """From the first forward to the last backward; the same as ``timeline(course).seconds``."""
    costs = (course.forward_seconds, course.backward_seconds, course.weight_seconds)
    free = [0.0] * course.workers
    done: list[float] = []
    for worker, kind, stage, far in _steps(course.schedule, course.workers, course.stages, course.num_microbatches):
        start = free[worker]
        for before in far:
            start = max(start, done[before] + course.transfer_seconds)
        free[worker] = start + costs[kind][stage]
        done.append(free[worker])
    return max(free)


def timeline(course: Course) -> Timeline:
    """Every action's start and stop."""
    return simulate(
        _listed(course.schedule, course.workers, course.stages, course.num_microbatches),
        forward_seconds=course.forward_seconds,
        backward_seconds=course.backward_seconds,
        weight_seconds=course.weight_seconds or None,
        transfer_seconds=course.transfer_seconds,
    )


@lru_cache(maxsize=4096)
def kept(schedule: str, workers: int, stages: int, num_microbatches: int) -> tuple[int, ...]:
    """The most microbatches each pipeline rank keeps at once, each of its stages counted."""
    return held(_listed(schedule, workers, stages, num_microbatches))


@lru_cache(maxsize=256)
def _listed(schedule: str, workers: int, stages: int, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    return actions(schedule, workers=workers, stages=stages, microbatches=num_microbatches)


@lru_cache(maxsize=128)
def _steps(
    schedule: str, workers: int, stages: int, num_microbatches: int
) -> tuple[tuple[int, int, int, tuple[int, ...]], ...]:
    """Worker, kind, stage, and by place what others must have done before."""
    places: dict[Action, tuple[int, int]] = {}
    steps: list[tuple[int, int, int, tuple[int, ...]]] = []
    for worker, action, needed in carried_out(_listed(schedule, workers, stages, num_microbatches)):
        before = [places[one] for one in needed]
        # What the worker did itself is done once it is free.
        far = tuple(place for place, other in before if other != worker)
        places[action] = (len(steps), worker)
        steps.append((worker, KINDS.index(action.kind), action.stage, far))
    return tuple(steps)
