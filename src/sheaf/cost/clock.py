"""How long a pipeline's schedule takes, for pricing many plans: the simulation's clock without its drawing.

Who waits for whom does not depend on how long anything takes: what repeats itself is counted, not played.
"""

# ruff: noqa: FURB136  the loops run millions of times, and calling max takes a third of theirs

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sheaf.errors import PlanError
from sheaf.plans.schedule import (
    BACKWARD,
    FORWARD,
    Action,
    actions,
    held,
    interleaved_order,
    largest_group,
)
from sheaf.plans.timeline import Timeline, simulate

LEAST_LEAPT = 8  # waves; fewer are quicker one by one
HELD = 2**20  # sums of a product of two waves, at once


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
    """From the first forward to the last backward; the same as ``timeline(course).seconds``, up to rounding."""
    if course.schedule == "gpipe":
        return _one_way(course, course.forward_seconds) + _one_way(course, course.backward_seconds)
    if course.schedule == "interleaved" and course.stages > course.workers:
        return _interleaved_seconds(course)
    return _in_turn_seconds(course)


def _one_way(course: Course, seconds: Sequence[float]) -> float:
    """All microbatches through all stages, none waiting for another way: the slowest stage, or link, never pauses."""
    passing = (course.transfer_seconds,) * (course.stages - 1)
    return sum(seconds) + sum(passing) + (course.num_microbatches - 1) * max((*seconds, *passing))


def _in_turn_seconds(course: Course) -> float:
    """``1f1b`` wave by wave: stage *s* of *n* forwards microbatch ``i + n - 1 - s``, then takes the backward of *i*.

    ``zero-bubble`` then takes the backward of weights of microbatch ``i - s``. Waves in which every stage does all that
    are leapt over, where messages do not queue: no stage makes them faster than they are passed on.
    """
    stages, count, passing = course.stages, course.num_microbatches, course.transfer_seconds
    ahead, back, weights = course.forward_seconds, course.backward_seconds, course.weight_seconds
    free = [0.0] * stages
    come = [-inf] * stages  # when the last forward of the stage before is there; the first waits for nobody
    back_there = [-inf] * stages  # when the last gradient of the stage behind is
    wave, last_full = -stages, count - stages
    leaping = stages - 1 if weights else 0  # the first full wave
    quick = any(one + other < passing for one, other in zip(ahead, back, strict=True))
    while wave < count - 1:
        wave += 1
        first, end = max(0, wave + stages - count), min(stages, wave + stages)
        made = [
            (now if now > before else before) + cost
            for now, before, cost in zip(free[first:end], come[first:end], ahead[first:end], strict=True)
        ]
        free[first:end] = made
        sent = slice(first + 1, min(end + 1, stages))
        come[sent] = [
            (done if done > before else before) + passing for done, before in zip(made, come[sent], strict=False)
        ]
        if wave < 0:
            continue
        if leaping < wave < last_full - LEAST_LEAPT and not (quick or _queued(free, come, passing)):
            free = _leapt(course, free, last_full - wave)
            come = [-inf, *(done + passing for done in free[:-1])]
            back_there = [-inf] * stages
            wave = last_full
        for stage in range(stages - 1, -1, -1):
            now, there = free[stage], back_there[stage]
            free[stage] = done = (now if now > there else there) + back[stage]
            if stage:
                before = back_there[stage - 1]
                back_there[stage - 1] = (done if done > before else before) + passing
        for stage in range(min(stages, wave + 1)) if weights else ():
            free[stage] += weights[stage]
    for stage in range(stages) if weights else ():
        for _ in range(min(stage, count)):
            free[stage] += weights[stage]
    return max(free)


def _queued(forwarded: Sequence[float], come: Sequence[float], passing: float) -> bool:
    """Whether a message had to wait for the one before it."""
    return any(there > done + passing for done, there in zip(forwarded, come[1:], strict=False))


def _leapt(course: Course, forwarded: Sequence[float], waves: int) -> list[float]:
    """When each stage is done with its last forward, so many full waves after it was at ``forwarded``.

    A wave is a product with one matrix where sums are maxima and products sums, so many are one with a power of it
    (Baccelli, Cohen, Olsder, Quadrat, *Synchronization and Linearity*, 1992).
    """
    stages, passing = course.stages, course.transfer_seconds
    ahead = np.asarray(course.forward_seconds)[:, None]
    later = np.asarray(course.weight_seconds or (0.0,) * stages)[:, None]
    ends = np.concatenate(([0.0], np.cumsum(course.backward_seconds))) + passing * np.arange(stages + 1)
    # Before a stage forwards again it has taken the backward that came back from any stage after it.
    back = ends[None, 1:] - ends[:-1, None] - passing
    wave = np.where(np.arange(stages)[None, :] >= np.arange(stages)[:, None], back + later, -np.inf)
    wave[np.arange(1, stages), np.arange(stages - 1)] = passing
    wave += ahead
    done = np.asarray(forwarded)
    while waves:
        if waves % 2 or waves <= 2 * stages:  # two waves at once take as long as all stages' waves one by one
            done, waves = (wave + done).max(axis=1), waves - 1
        else:
            wave, waves = _twice(wave), waves // 2
    return done.tolist()


def _twice(wave: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two waves at once: the matrix times itself where sums are maxima, a few rows at a time."""
    rows = max(1, HELD // wave.size)
    parts = (wave[start : start + rows, :, None] + wave for start in range(0, len(wave), rows))
    return np.concatenate([part.max(axis=1) for part in parts])


def _interleaved_seconds(course: Course) -> float:
    """``interleaved`` wave by wave: in wave *i* worker *s* of *n* takes backward ``i + s + 1 - n`` of its list, and
    before it the forward that its warm-up is ahead of that.

    Whom a worker waits for then had its turn in an earlier wave, as every group has a microbatch for each worker;
    where there are fewer, workers go on one by one.
    """
    workers, count, last = course.workers, course.num_microbatches, course.workers - 1
    virtual, passing = course.stages // workers, course.transfer_seconds
    order, largest = interleaved_order(workers, virtual, count)
    if count < workers or workers == 1:
        return _interleaved_by_turns(course, order, largest)
    total, warmup = len(order), 2 * last + (virtual - 1) * largest
    turns = [slice(turn * workers, (turn + 1) * workers) for turn in range(virtual)]
    # By action and worker, one after the other: those of a wave are a slice.
    ahead = [seconds for turn, _ in order for seconds in course.forward_seconds[turns[turn]]]
    back = [seconds for turn, _ in order for seconds in course.backward_seconds[turns[virtual - 1 - turn]]]
    each = list(zip(course.forward_seconds, course.backward_seconds, strict=True))
    quick = [one for one in range(workers) if min(map(min, each[one::workers])) < passing]
    places = {action: place for place, action in enumerate(order)}
    before = [places.get((turn - 1, microbatch), -1) for turn, microbatch in order]  # the microbatch's turn before
    # When what each worker made last is with the next, which takes it in the next wave; and by action, what goes round.
    free, pushed, returned = [0.0] * workers, [-inf] * workers, [-inf] * workers
    pushed_round, returned_round = list[float](), list[float]()
    for wave in range(last - warmup, total + last):
        top = wave + warmup - last  # worker s takes forward ``top - s``
        first, end = max(0, top - total + 1), min(workers, top + 1)
        if first < end:
            there = pushed[max(0, first - 1) : end - 1]
            if not first:
                there.insert(0, pushed_round[before[top]] if before[top] >= 0 else 0.0)
            free[first:end] = done = [
                (now if now > come else come) + cost
                for now, come, cost in zip(
                    free[first:end], there, ahead[_diagonal(top, -1, workers, first, end)], strict=True
                )
            ]
            kept_back = pushed[last]
            pushed[first:end] = _passed(done, pushed[first:end], passing, [one - first for one in quick])
            if end == workers:
                pushed_round.append(pushed[last])
                if order[top - last][0] == virtual - 1:  # nobody is passed what the last stage made
                    pushed[last] = kept_back
        low = wave - last  # worker s takes backward ``low + s``
        first, end = max(0, -low), min(workers, total - low)
        if first < end:
            there = returned[first + 1 : end + 1]
            if end == workers:
                there.append(returned_round[before[wave]] if before[wave] >= 0 else 0.0)
            free[first:end] = done = [
                (now if now > come else come) + cost
                for now, come, cost in zip(
                    free[first:end], there, back[_diagonal(low, 1, workers, first, end)], strict=True
                )
            ]
            kept_back = returned[0]
            returned[first:end] = _passed(done, returned[first:end], passing, [one - first for one in quick])
            if not first:
                returned_round.append(returned[0])
                if order[low][0] == virtual - 1:  # nor the first stage anybody
                    returned[0] = kept_back
    return max(free)


def _passed(done: Sequence[float], sent: Sequence[float], passing: float, quick: Sequence[int]) -> list[float]:
    """When what was done then is with others, if each message waits for the one ``sent`` before it: that is there but
    for ``quick`` workers, who are done with something sooner than it is passed on.
    """
    there = [now + passing for now in done]
    for one in quick:
        if 0 <= one < len(done) and sent[one] > done[one]:
            there[one] = sent[one] + passing
    return there


def _diagonal(place: int, step: int, workers: int, first: int, end: int) -> slice:
    """In a list by action and worker, what workers ``first`` to before ``end`` have of a wave: of the action at a
    ``place``, and of one ``step`` on for each worker.
    """
    start, stride = place * workers, step * workers + 1
    stop = start + end * stride
    return slice(start + first * stride, stop if stop >= 0 else None, stride)


def _interleaved_by_turns(course: Course, order: Sequence[tuple[int, int]], largest: int) -> float:
    """The same for any number of microbatches: each worker goes on with its list until it must wait for another."""
    workers, stages, count = course.workers, course.stages, course.num_microbatches
    total, last = len(order), stages - 1
    passing = course.transfer_seconds if workers > 1 else 0.0  # nobody passes anything to itself
    ahead, back = course.forward_seconds, course.backward_seconds
    # when what a stage made of a microbatch is with the next, or here where nobody waits for it
    forwarded, backwarded = ([[-1.0] * count for _ in range(stages)] for _ in (FORWARD, BACKWARD))
    sent = [(-inf, -inf)] * workers  # when the last message of a worker was there, in either direction
    free = [0.0] * workers
    steps = [(0, 0)] * workers  # forwards and backwards that each has done
    warmups = [2 * (workers - 1 - worker) + (stages // workers - 1) * largest for worker in range(workers)]
    waiting = set(range(workers))
    while waiting:
        moved = False
        for worker in range(workers):
            now = free[worker]
            forwards, backwards = steps[worker]
            pushed, returned = sent[worker]
            while forwards + backwards < 2 * total:
                if forwards < total and forwards <= warmups[worker] + backwards:
                    turn, microbatch = order[forwards]
                    stage = turn * workers + worker
                    before = forwarded[stage - 1][microbatch] if stage else 0.0
                    if before < 0:
                        break
                    now = (now if now > before else before) + ahead[stage]
                    there = now
                    if stage < last:
                        pushed = there = (now if now > pushed else pushed) + passing
                    forwarded[stage][microbatch] = there
                    forwards += 1
                else:
                    turn, microbatch = order[backwards]
                    stage = last - turn * workers - (workers - 1 - worker)
                    after = backwarded[stage + 1][microbatch] if stage < last else 0.0
                    if after < 0 or forwarded[stage][microbatch] < 0:
                        break
                    now = (now if now > after else after) + back[stage]
                    there = now
                    if stage:
                        returned = there = (now if now > returned else returned) + passing
                    backwarded[stage][microbatch] = there
                    backwards += 1
            moved = moved or steps[worker] != (forwards, backwards)
            free[worker], steps[worker], sent[worker] = now, (forwards, backwards), (pushed, returned)
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
        virtual = stages // workers
        ahead = (virtual - 1) * largest_group(workers, num_microbatches)
        return tuple(
            min(virtual * num_microbatches, 2 * (workers - 1 - worker) + ahead + 1) for worker in range(workers)
        )
    return held(_listed(schedule, workers, stages, num_microbatches))


@lru_cache(maxsize=256)
def _listed(schedule: str, workers: int, stages: int, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    return actions(schedule, workers=workers, stages=stages, microbatches=num_microbatches)
