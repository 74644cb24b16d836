"""The order of a pipeline's work: one list of actions per worker, for any number of microbatches, free of deadlock."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from sheaf.errors import PlanError, nearest
from sheaf.plans.plan import SCHEDULES, Plan

FORWARD, BACKWARD, WEIGHTS = "F", "B", "W"
_SAID = {FORWARD: "forward", BACKWARD: "backward", WEIGHTS: "backward of weights"}


class Action(NamedTuple):
    """One microbatch's way through one stage, written like ``2F0``: stage, kind, microbatch.

    ``kind`` is ``F`` forward, ``B`` backward (under ``zero-bubble`` of the inputs only), ``W`` backward of the weights.
    """

    kind: str
    microbatch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def said(self) -> str:
        """The action in words."""
        return f"{_SAID.get(self.kind, self.kind)} of microbatch {self.microbatch} at stage {self.stage}"


def actions(kind: str, *, workers: int, stages: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What each pipeline worker does, in order, for one step; stage ``s`` is on worker ``s % workers``.

    ``gpipe``        all forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965)
    ``1f1b``         a worker forwards as many microbatches as there are workers from it to the last, then takes one
                     backward and one forward in turn (PipeDream-flush, Narayanan et al. 2021, arXiv:2104.04473)
    ``interleaved``  the same with ``stages / workers`` stages per worker (section 2.2 there): microbatches pass in
                     groups through a worker's first stage, then its second. Groups hold ``workers`` microbatches, or
                     up to one less than twice as many where that leaves a rest: a short group would idle, or deadlock.
    ``zero-bubble``  ZB-H1 (Qi et al. 2024, arXiv:2401.10241): ``1f1b`` with the backward of weights put off by as many
                     microbatches as the worker's number, so that each worker keeps what the first of ``1f1b`` keeps

    At each stage microbatches go forward, and backward, in their order, so gradients add up as on one worker alone.
    Raises PlanError for an unknown kind and for stages that do not go round the workers.

    >>> for listed in actions("1f1b", workers=2, stages=2, microbatches=3):
    ...     print(*listed)
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """
    _refuse(kind, workers, stages, microbatches)
    if kind == "gpipe":
        return tuple(
            tuple(
                Action(turn, microbatch, worker) for turn in (FORWARD, BACKWARD) for microbatch in range(microbatches)
            )
            for worker in range(workers)
        )
    if kind == "interleaved" and stages > workers:
        return _interleaved(workers, stages // workers, microbatches)
    listed: list[tuple[Action, ...]] = []
    for worker in range(workers):
        forwards, backwards = (
            [Action(turn, microbatch, worker) for microbatch in range(microbatches)] for turn in (FORWARD, BACKWARD)
        )
        merged = _in_turn(forwards, backwards, workers - 1 - worker)
        listed.append(_weights_later(merged, worker) if kind == "zero-bubble" else tuple(merged))
    return tuple(listed)


def check(listed: Sequence[Sequence[Action]], *, stages: int | None = None, microbatches: int | None = None) -> None:
    """Carry the lists out in the mind: every action once, on its worker, and nobody waits for ever.

    Sending is taken not to block. ``stages`` and ``microbatches`` are those that occur where they are not given.
    Raises PlanError listing every action that is missing, doubled or misplaced; else every worker that is stuck, at
    what, and what that waits for.
    """
    broken = _misplaced(listed) or _missing(listed, stages, microbatches)
    if broken:
        raise PlanError(broken)
    for _ in carried_out(listed):
        pass


def tells_apart(plan: Plan) -> bool:
    """Whether stages compute the gradients of their inputs first, and those of their weights later."""
    return plan.schedule == "zero-bubble" and not plan.again and plan.zero < 2


def held(listed: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """The most microbatches a worker keeps at once, by worker; each of its stages counts.

    Kept from forward until backward, where the weights have a backward of their own until that.

    >>> held(actions("gpipe", workers=2, stages=2, microbatches=5))
    (5, 5)
    >>> held(actions("1f1b", workers=2, stages=2, microbatches=5))
    (2, 1)
    """
    most: list[int] = []
    for given in listed:
        later = {action[1:] for action in given if action.kind == WEIGHTS}
        kept = peak = 0
        for action in given:
            if action.kind == FORWARD:
                kept += 1
            elif action.kind == WEIGHTS or action[1:] not in later:
                kept -= 1
            peak = max(peak, kept)
        most.append(peak)
    return tuple(most)


def carried_out(listed: Sequence[Sequence[Action]]) -> Iterator[tuple[int, Action, tuple[Action, ...]]]:
    """Every worker, action and what that needed, each after what it needed; raises PlanError when all are stuck."""
    last = max((action.stage for given in listed for action in given), default=0)
    places = [0] * len(listed)
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for worker, given in enumerate(listed):
            while places[worker] < len(given):
                action = given[places[worker]]
                needed = _needed(action, last)
                if not done.issuperset(needed):
                    break
                yield worker, action, needed
                done.add(action)
                places[worker] += 1
                moved = True
    stuck = [worker for worker, given in enumerate(listed) if places[worker] < len(given)]
    if stuck:
        raise PlanError([_stuck(listed, worker, places[worker], done, last) for worker in stuck])


def _refuse(kind: str, workers: int, stages: int, microbatches: int) -> None:
    if kind not in SCHEDULES:
        raise PlanError(f"schedule={kind}: {nearest(kind, SCHEDULES)}")
    broken: list[str] = []
    if workers < 1:
        broken.append(f"a pipeline of {workers} workers: at least one is needed")
    if microbatches < 0:
        broken.append(f"{microbatches} microbatches: there cannot be less than none")
    if workers >= 1 and kind == "interleaved" and (stages < workers or stages % workers):
        broken.append(f"{stages} stages do not go round {workers} workers: use a multiple such as {2 * workers}")
    if workers >= 1 and kind != "interleaved" and stages != workers:
        broken.append(f"{stages} stages on {workers} workers: {kind} has one each; only interleaved has more")
    if broken:
        raise PlanError(broken)


def _in_turn(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """``warmup`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    merged = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        merged += [forward, backward]
    return merged + list(backwards[max(0, len(forwards) - warmup) :])


def _weights_later(merged: Sequence[Action], behind: int) -> tuple[Action, ...]:
    """The same with the backward of weights of the microbatch that came ``behind`` earlier after each backward."""
    listed: list[Action] = []
    waiting: list[Action] = []
    for action in merged:
        listed.append(action)
        if action.kind == BACKWARD:
            waiting.append(action._replace(kind=WEIGHTS))
            if len(waiting) > behind:
                listed.append(waiting.pop(0))
    return (*listed, *waiting)


def interleaved_order(workers: int, virtual: int, microbatches: int) -> tuple[list[tuple[int, int]], int]:
    """(turn, microbatch) as microbatches pass through a worker's stages forward, and how many are in the largest group.

    >>> interleaved_order(2, 2, 2)
    ([(0, 0), (0, 1), (1, 0), (1, 1)], 2)
    """
    rounds = max(1, microbatches // workers)
    starts = [-(-microbatches * number // rounds) for number in range(rounds + 1)]
    groups = [range(start, stop) for start, stop in pairwise(starts)]
    order = [(turn, microbatch) for group in groups for turn in range(virtual) for microbatch in group]
    return order, largest_group(workers, microbatches)


def largest_group(workers: int, microbatches: int) -> int:
    """How many microbatches pass through a worker's stages one after the other, at most.

    >>> largest_group(4, 9), largest_group(4, 3)
    (5, 3)
    """
    return -(-microbatches // max(1, microbatches // workers))


def _interleaved(workers: int, virtual: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    order, largest = interleaved_order(workers, virtual, microbatches)
    return tuple(
        tuple(
            _in_turn(
                [Action(FORWARD, microbatch, turn * workers + worker) for turn, microbatch in order],
                [Action(BACKWARD, microbatch, (virtual - 1 - turn) * workers + worker) for turn, microbatch in order],
                2 * (workers - 1 - worker) + (virtual - 1) * largest,
            )
        )
        for worker in range(workers)
    )


def _misplaced(listed: Sequence[Sequence[Action]]) -> list[str]:
    broken: list[str] = []
    times = Counter(action for given in listed for action in given)
    for worker, given in enumerate(listed):
        for place, action in enumerate(given):
            if action.kind not in _SAID or action.microbatch < 0 or action.stage < 0:
                broken.append(f"worker {worker}, action {place}: {tuple(action)} is no F, B or W of a pipeline")
            elif action.stage % len(listed) != worker:
                home = action.stage % len(listed)
                broken.append(f"worker {worker}, action {place}: {action.said} belongs to worker {home}")
    broken += [f"{action.said} is listed {count} times: keep one" for action, count in times.items() if count > 1]
    return broken


def _missing(listed: Sequence[Sequence[Action]], stages: int | None, microbatches: int | None) -> list[str]:
    there = {action for given in listed for action in given}
    if stages is None:
        stages = 1 + max((action.stage for action in there), default=-1)
    if microbatches is None:
        microbatches = 1 + max((action.microbatch for action in there), default=-1)
    apart = any(action.kind == WEIGHTS for action in there)
    wanted = [
        Action(kind, microbatch, stage)
        for stage in range(stages)
        for microbatch in range(microbatches)
        for kind in ((FORWARD, BACKWARD, WEIGHTS) if apart else (FORWARD, BACKWARD))
    ]
    workers = max(1, len(listed))
    broken = [f"worker {one.stage % workers} lacks the {one.said}" for one in wanted if one not in there]
    unwanted = sorted(there.difference(wanted))
    return broken + [f"{one.said} is beyond {stages} stages and {microbatches} microbatches" for one in unwanted]


def _needed(action: Action, last: int) -> tuple[Action, ...]:
    """What must be done before an action, when ``last`` is the last stage."""
    kind, microbatch, stage = action
    if kind == FORWARD:
        return (Action(FORWARD, microbatch, stage - 1),) if stage else ()
    if kind == WEIGHTS:
        return (Action(BACKWARD, microbatch, stage),)
    own = Action(FORWARD, microbatch, stage)
    return (own, Action(BACKWARD, microbatch, stage + 1)) if stage < last else (own,)


def _stuck(listed: Sequence[Sequence[Action]], worker: int, place: int, done: set[Action], last: int) -> str:
    action = listed[worker][place]
    missing = [before for before in _needed(action, last) if before not in done]
    return (
        f"worker {worker} is stuck at its action {place}, the {action.said}: it waits for the "
        + " and the ".join(f"{before.said} on worker {before.stage % len(listed)}" for before in missing)
        + "; list that earlier"
    )
