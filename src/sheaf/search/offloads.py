"""Plans that are refused for their memory, with their optimizers in the memory of the hosts.

Where a plan fits, copying to the host and back makes it slower, and never is a gain: those are not looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.plans.offload import OPTIMIZER
from sheaf.search.families import Group, Strategy
from sheaf.search.question import Question


def offloaded(question: Question, choices: Sequence[Plan]) -> list[Plan]:
    """These plans with optimizers that step in the hosts' memory; none where they do already, or cannot."""
    if not question.offloadable:
        return []
    found: list[Plan] = []
    for plan in choices:
        if plan.offload != OPTIMIZER:
            try:
                found.append(replace(plan, offload=OPTIMIZER))
            except PlanError:
                continue
    return found


def offloaded_group(question: Question, group: Group) -> Group:
    """The same group of plans, all with their optimizers in the hosts' memory."""

    def strategies() -> Iterator[Strategy]:
        for strategy in group.strategies():
            for plan in offloaded(question, [strategy.plan]):
                yield Strategy(plan, strategy.sizes)

    return replace(group, leanest=tuple(offloaded(question, group.leanest)), strategies=strategies)
