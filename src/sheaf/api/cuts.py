"""The stages of a plan that names none: balanced by what blocks take on this machine."""

from collections.abc import Callable
from dataclasses import replace

from sheaf.api.finer import Finer, finer_cut
from sheaf.api.profiles import BusyNote, measured_profiles
from sheaf.cluster.others import disturbed
from sheaf.cost.pipeline import cut_seconds, measured_stages, perfect_seconds
from sheaf.errors import PlanError
from sheaf.graph import ModelFacts, Profile
from sheaf.launch import FromFile
from sheaf.parallel.stages import refuse_stages
from sheaf.plans import Plan
from sheaf.search import Question, Ranking, exchanged
from sheaf.search.rules import too_large
from sheaf.task import Task
from sheaf.units import pretty_seconds


def best_cut(
    task: Task,
    plan: Plan,
    question: Question,
    say: Callable[[str], None],
    *,
    source: FromFile | None,
    busy: BusyNote | None = None,
) -> tuple[Plan, Finer | None]:
    """The plan as ``measured_cut`` cuts it, and as ``finer_cut`` does where that is clearly better.

    What pieces of blocks take is measured here, on as many workers as the plan has; ``busy`` is told of it.
    """
    whole = measured_cut(task, plan, question, say)
    return whole, _inside(task, whole, question, say, source, busy or BusyNote(say))


def cut_inside(
    task: Task, ranking: Ranking, say: Callable[[str], None], *, source: FromFile | None, fresh: bool = False
) -> Ranking:
    """The ranking with its first pipeline cut as ``finer_cut`` does, where that might lead and is faster.

    ``fresh`` measures pieces again that were measured before. That other programs kept the cores busy meanwhile is not
    said where the ranking says it.
    """
    question = ranking.asked
    price = next((entry.price for entry in ranking.ranked if entry.plan.pp > 1), None)
    if question is None or price is None or price.plan.begins:
        return ranking
    plan = replace(price.plan, stages=":".join(str(count) for count in price.stages))
    basis = question.basis(plan)
    at_best = price.step_seconds * perfect_seconds(plan, basis) / cut_seconds(plan, basis)
    if at_best > ranking.best.step_seconds:
        return ranking
    busy = BusyNote(say, told=disturbed(ranking.cores_taken))
    cut = _inside(task, plan, question, say, source, busy, fresh=fresh)
    if cut is None:
        return ranking
    asked = cut.asked(question)
    found = asked.price(cut.plan)
    if found.step_seconds >= price.step_seconds or too_large(found, question.cluster) is not None:
        return ranking
    return exchanged(ranking, price.plan, found, asked)


def _inside(
    task: Task,
    plan: Plan,
    question: Question,
    say: Callable[[str], None],
    source: FromFile | None,
    busy: BusyNote,
    *,
    fresh: bool = False,
) -> Finer | None:
    def measured(facts: ModelFacts) -> Profile | None:
        say("measuring what is inside of blocks")
        found = measured_profiles(task, [facts], plan.workers, source=source, fresh=fresh)
        busy.of(found)
        return next(iter(found), None)

    return finer_cut(task, plan, question, measured, say)


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
