"""What the planner must know, found out among the workers that are here already: all measure, and all hear of it."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from sheaf.api.heard import Heard, Pair
from sheaf.api.profiles import profiles_here
from sheaf.api.rehearsals import WORKERS, agreed, alone, rehearsed, wanted
from sheaf.cluster import from_everyone
from sheaf.graph import ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.task import Task

BUDGET_SECONDS = 3.0


def heard_here(
    task: Task,
    facts: ModelFacts,
    *,
    plans: Sequence[Plan] = (),
    pair: Pair | None = None,
    budget_seconds: float = BUDGET_SECONDS,
) -> Heard:
    """What the workers of the default process group, or this one alone, find out about themselves (collective).

    The task's blocks are measured while all workers measure; ``facts`` are of its microbatch. One or two workers also
    rehearse the executors that ``plans`` use; for more, ``pair`` is what two of them know. ``budget_seconds`` are for
    measuring blocks.
    """
    mine = profiles_here(task, [facts], torch.get_num_threads(), budget_seconds)[0]
    everyone = _everyone(mine)
    if len(everyone) > WORKERS or not plans:
        return Heard((everyone,), pair=pair)
    told = agreed(rehearsed(task, facts, mine, wanted(plans) if len(everyone) == WORKERS else alone(plans)))
    return Heard((everyone,), told, _everyone(told.profile))


def heard_again(heard: Heard, task: Task, facts: ModelFacts, *, budget_seconds: float = BUDGET_SECONDS) -> Heard:
    """The same with blocks measured once more (collective).

    A machine that others use, too, is not always as fast; what is measured before and after something, and between its
    parts, is nearer to what it was meanwhile.
    """
    mine = profiles_here(task, [facts], torch.get_num_threads(), budget_seconds)[0]
    return replace(heard, moments=(*heard.moments, _everyone(mine)))


def _everyone(mine: Profile) -> tuple[Profile, ...]:
    return tuple(Profile.from_dict(one) for one in from_everyone(mine.to_dict()))
