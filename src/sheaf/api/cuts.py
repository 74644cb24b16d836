"""The stages of a plan that names none: balanced by what blocks take on this machine."""

from collections.abc import Callable
from dataclasses import replace

from sheaf.cost.pipeline import cut_seconds, measured_stages
from sheaf.errors import PlanError
from sheaf.parallel.stages import refuse_stages
from sheaf.plans import Plan
from sheaf.search import Question
from sheaf.task import Task
from sheaf.units import pretty_seconds


def measured_cut(task: Task, plan: Plan, question: Question, say: Callable[[str], None]) -> Plan:
    """The plan with its stages cut anew by the question's measured times; as it is where they are as good within 1 %.

    ``plan`` has the stages that operations ask for, and ``question`` profiles of its microbatch and workers. Stages
    that the model cannot be cut into (a block uses what another keeps to itself) are not taken.
    """
    basis = question.basis(plan)
    stages = measured_stages(replace(plan, stages=""), basis)
    before = pretty_seconds(cut_seconds(plan, basis))
    if not stages:
        say(f"stages={plan.stages}, balanced by operations, are as good by measured times: {before} a microbatch")
        return plan
    found = replace(plan, stages=stages)
    after = pretty_seconds(cut_seconds(found, basis))
    try:
        refuse_stages(task, found)
    except PlanError as error:
        say(f"stages={plan.stages}, balanced by operations: measured times ask for {stages}, but {error.broken[0]}")
        return plan
    say(
        f"stages={stages}, balanced by measured times: the slowest takes {after} a microbatch, where {plan.stages}, "
        f"balanced by operations, takes {before}"
    )
    return found
