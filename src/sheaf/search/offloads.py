"""Plans that are refused for their memory, with their optimizers in the memory of the hosts.

Where a plan fits, copying to the host and back makes it slower, and it is not looked at so, though a larger microbatch
might make up for it where copies are fast.
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


def moved(question: Question, item: Group | Strategy | list[Plan]) -> list[Group | Strategy | list[Plan]]:
    """The same plans, all with their optimizers in the hosts' memory; nothing where none of them can."""
    if isinstance(item, list):
        plans = offloaded(question, item)
        return [plans] if plans else []
    if isinstance(item, Strategy):
        return [replace(item, plan=plan) for plan in offloaded(question, [item.plan])]

    def strategies() -> Iterator[Strategy]:
        for strategy in item.strategies():
            for plan in offloaded(question, [strategy.plan]):
                yield replace(strategy, plan=plan)

    return [replace(item, leanest=tuple(offloaded(question, item.leanest)), strategies=strategies)]
