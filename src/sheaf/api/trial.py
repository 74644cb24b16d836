"""Time to a loss: the steps that each mode took in a short trial, times what a step of each plan is predicted to take.

Two questions that one number cannot answer are kept apart: how many steps a way to meet needs is seen in the trial
(``sheaf train --compare``), how long each of them takes elsewhere is the price.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheaf.api.compare import smooth
from sheaf.errors import RunError
from sheaf.plans import Plan
from sheaf.record import step_reports
from sheaf.search import Ranking
from sheaf.task import Task
from sheaf.training.description import describe, differences
from sheaf.training.directory import RECORD, read_plan, read_task


@dataclass(frozen=True)
class Tried:
    """One run of a trial: its plan, and the loss of each step as a mean over a tenth of the trial's steps up to it."""

    plan: Plan
    losses: tuple[float, ...]

    def steps_to(self, loss: float) -> int | None:
        """After how many steps the loss was there; None where it never was."""
        return next((step for step, found in enumerate(self.losses, start=1) if found <= loss), None)


@dataclass(frozen=True)
class ToLoss:
    """One plan: the steps that its like in the trial (``tried``) took to the loss, and the seconds these would take."""

    plan: str
    tried: str
    exact: bool
    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class TimeToLoss:
    """Ranked plans by time to a loss, the fastest first, then those that did not reach it; ``untried`` are relaxed
    plans that the trial has nothing to say of.
    """

    loss: float
    plans: tuple[ToLoss, ...]
    untried: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"loss": self.loss, "plans": [vars(one) for one in self.plans], "untried": list(self.untried)}


def course(plan: Plan) -> Hashable:
    """What decides how fast a plan learns, beside the task: nothing for all exact ones, which compute one answer.

    >>> course(Plan.parse("dp=4,zero=1")) == course(Plan.parse("tp=2"))
    True
    >>> course(Plan.parse("dp=2,local=16")) == course(Plan.parse("dp=4,local=16"))
    False
    >>> course(Plan.parse("dp=2,tp=2,server=1:async")) == course(Plan.parse("dp=2,server=2:async"))
    True
    """
    if plan.exact:
        return None
    meets = plan.serves.staleness, plan.late
    return plan.dp, plan.local, plan.compress, None if plan.serves.exact else meets, plan.shares


def read_trial(task: Task, directory: Path | str) -> tuple[Tried, ...]:
    """The runs that ``sheaf train --compare`` left in a directory, one of an exact plan among them.

    Raises RunError for a directory without such runs, and for runs of another task, with all that departs.
    """
    place = Path(directory)
    runs = [one for one in sorted(place.iterdir()) if (one / RECORD).is_file()] if place.is_dir() else []
    if not runs:
        raise RunError(f"{place} holds no runs: give the directory of `sheaf train FILE.py --compare WAYS --out DIR`")
    found: dict[Plan, list[float]] = {}
    broken: list[str] = []
    for run in runs:
        plan, saved = read_plan(run), read_task(run)
        losses = [report.loss for report in step_reports(run / RECORD)]
        if plan is None or saved is None:
            broken.append(f"{run.name} holds no whole run")
            continue
        if not losses:
            continue  # a way that broke off in its first step, as the comparison said
        broken += [f"{run.name}: {one}" for one in differences(saved, describe(task, plan))]
        found[plan] = losses
    if not broken and not any(plan.exact for plan in found):
        broken.append(f"no run of an exact plan, which others are held against: add '{Plan(dp=2)}' without more to it")
    if broken:
        raise RunError(f"{place} is no trial of this task: {'; '.join(broken)}; run the trial again, for this task")
    steps = max(map(len, found.values()))
    return tuple(Tried(plan, tuple(smooth(losses, steps))) for plan, losses in found.items())


def goal_of(trial: Sequence[Tried], loss: float | None = None) -> float:
    """The loss that is asked for, by default the exact run's last; raises RunError where no run got there."""
    goal = next(one for one in trial if one.plan.exact).losses[-1] if loss is None else loss
    if all(one.steps_to(goal) is None for one in trial):
        least = min(min(one.losses) for one in trial)
        raise RunError(f"no run of the trial came to a loss of {goal:g}, the lowest is {least:g}: ask for that, or try "
                       "more steps")  # fmt: skip
    return goal


def time_to_loss(ranking: Ranking, trial: Sequence[Tried], loss: float | None = None) -> TimeToLoss:
    """Every ranked plan that has its like in the trial, by the seconds that it takes to a loss.

    ``loss`` is as for ``goal_of``, which raises too. Relaxed plans are held against runs of as many replicas that met
    the same way: others learn otherwise.
    """
    goal = goal_of(trial, loss)
    tried = {course(one.plan): one for one in reversed(trial)}
    found: list[ToLoss] = []
    untried: list[str] = []
    for entry in ranking.ranked:
        like = tried.get(course(entry.plan))
        if like is None:
            untried.append(str(entry.plan))
            continue
        steps = like.steps_to(goal)
        seconds = None if steps is None else steps * entry.price.step_seconds
        found.append(ToLoss(str(entry.plan), str(like.plan), entry.plan.exact, steps, seconds))
    found.sort(key=lambda one: math.inf if one.seconds is None else one.seconds)
    return TimeToLoss(goal, tuple(found), tuple(untried))
