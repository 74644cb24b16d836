"""How long a pipeline's schedule takes, for pricing many plans: the simulation's clock without its drawing.

Who waits for whom does not depend on how long anything takes, so a schedule is worked out once for each number of
stages and microbatches, and played against many clocks.
"""

from functools import lru_cache
from math import inf
from typing import NamedTuple

from sheaf.errors import PlanError
from sheaf.plans.schedule import (
    BACKWARD,
    FORWARD,
    WEIGHTS,
    Action,
    actions,
    carried_out,
    held,
    interleaved_order,
)
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
    if course.schedule in ("1f1b", "zero-bubble"):
        return _in_turn_seconds(course)
    if course.schedule == "interleaved" and course.stages > course.workers:
        return _interleaved_seconds(course)
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


def _in_turn_seconds(course: Course) -> float:
    """``1f1b`` wave by wave: stage *s* of *n* forwards microbatch ``i + n - 1 - s``, then takes the backward of *i*.

    ``zero-bubble`` then takes the backward of weights of microbatch ``i - s``.
    """
    stages, count, passing = course.stages, course.num_microbatches, course.transfer_seconds
    ahead, back, weights = course.forward_seconds, course.backward_seconds, course.weight_seconds
    free = [0.0] * stages
    sent = [-inf] * (stages + 1)  # when the stage before was done with its last forward; the first waits for nobody
    for wave in range(1 - stages, count):
        first, end = max(0, wave + stages - count), min(stages, wave + stages)
        made = [
            max(now, before + passing) + cost
            for now, before, cost in zip(free[first:end], sent[first:end], ahead[first:end], strict=True)
        ]
        free[first:end] = sent[first + 1 : end + 1] = made
        if wave < 0:
            continue
        done, later = -inf, free
        free = []
        for now, cost in zip(reversed(later), reversed(back), strict=True):
            ready = done + passing
            done = max(now, ready) + cost
            free.append(done)
        free.reverse()
        for stage in range(min(stages, wave + 1)) if weights else ():
            free[stage] += weights[stage]
    for stage in range(stages) if weights else ():
        for _ in range(min(stage, count)):
            free[stage] += weights[stage]
    return max(free)


def _interleaved_seconds(course: Course) -> float:
    """``interleaved``: each worker goes on with its list until it must wait for another."""
    workers, stages, count = course.workers, course.stages, course.num_microbatches
    order, largest = interleaved_order(workers, stages // workers, count)
    total, last = len(order), stages - 1
    passing = course.transfer_seconds if workers > 1 else 0.0  # nobody passes anything to itself
    ahead, back = course.forward_seconds, course.backward_seconds
    done = [[[-1.0] * count for _ in range(stages)] for _ in (FORWARD, BACKWARD)]
    forwarded, backwarded = done
    free = [0.0] * workers
    steps = [(0, 0)] * workers  # forwards and backwards that each has done
    warmups = [2 * (workers - 1 - worker) + (stages // workers - 1) * largest for worker in range(workers)]
    waiting = set(range(workers))
    while waiting:
        moved = False
        for worker in range(workers):
            now = free[worker]
            forwards, backwards = steps[worker]
            while forwards + backwards < 2 * total:
                if forwards < total and forwards <= warmups[worker] + backwards:
                    turn, microbatch = order[forwards]
                    stage = turn * workers + worker
                    before = forwarded[stage - 1][microbatch] if stage else 0.0
                    if before < 0:
                        break
                    now = max(now, before + passing if stage else 0.0) + ahead[stage]
                    forwarded[stage][microbatch] = now
                    forwards += 1
                else:
                    turn, microbatch = order[backwards]
                    stage = last - turn * workers - (workers - 1 - worker)
                    after = backwarded[stage + 1][microbatch] if stage < last else 0.0
                    if after < 0 or forwarded[stage][microbatch] < 0:
                        break
                    now = max(now, after + passing if stage < last else 0.0) + back[stage]
                    backwarded[stage][microbatch] = now
                    backwards += 1
            moved = moved or steps[worker] != (forwards, backwards)
            free[worker], steps[worker] = now, (forwards, backwards)
            if forwards + backwards == 2 * total:
                waiting.discard(worker)
        if waiting and not moved:
            raise PlanError(f"{course.schedule} of {count} microbatches on {workers} workers: all wait for each other")
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
    if schedule == "gpipe":
        return (num_microbatches,) * workers
    if schedule == "1f1b":
        return tuple(min(num_microbatches, workers - worker) for worker in range(workers))
    if schedule == "zero-bubble":
        return (min(num_microbatches, workers),) * workers
    if schedule == "interleaved" and stages > workers:
        order, largest = interleaved_order(workers, stages // workers, num_microbatches)
        ahead = (stages // workers - 1) * largest
        return tuple(min(len(order), 2 * (workers - 1 - worker) + ahead + 1) for worker in range(workers))
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
