"""Which plan a run takes, the same on every worker, whether it can run, and how long its step is predicted to take."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sheaf.checkpoint import from_first
from sheaf.cost.price import Price
from sheaf.errors import PlanError, first_line
from sheaf.graph import ModelFacts
from sheaf.graph.refusals import refuse_untrainable
from sheaf.launch import FromFile, World
from sheaf.plans import Plan
from sheaf.plans.server import counted
from sheaf.plans.split import SplitFacts
from sheaf.plans.stages import default_microbatch, stages_of
from sheaf.task import Task
from sheaf.training.directory import read_plan, read_task

AUTO = "auto"


def choose(
    task: Task,
    plan: Plan | Price | str | None,
    *,
    world: World | None,
    workers: int | None,
    resumed: Path | None,
    allow_relaxed: bool,
    source: FromFile | None,
    note: Callable[[str], None],
) -> tuple[Plan, Price | None]:
    """The plan to run and its price where it is known: the one given, that of the resumed run, or the best there is.

    Raises PlanError when it needs another number of workers than there are, and what the planner raises.
    """
    there_are = world.workers if world is not None else workers
    price: Price | None = None
    if isinstance(plan, Price):
        chosen, price = plan.plan, plan
    elif isinstance(plan, Plan):
        chosen = plan
    elif plan is not None and plan != AUTO:
        chosen = Plan.parse(plan)
    elif resumed is not None and (kept := read_plan(resumed)) is not None:
        chosen = kept
    else:

        def best() -> dict[str, Any]:
            from sheaf.api.plan import plan as rank
            from sheaf.api.profiles import busy_words

            ranking = rank(
                task, workers=there_are, allow_relaxed=allow_relaxed, source=source, note=note, explain=False
            )
            if busy := busy_words(ranking.cores_taken):
                note(busy)
            # Those that torchrun started are there, with or without work.
            fitting = [entry.price for entry in ranking.ranked if world is None or entry.plan.workers == world.workers]
            taken = fitting[0] if fitting else ranking.best
            undrawn = taken.plan.pp > 1 and not taken.timeline  # as a search of many workers leaves it
            return _told(ranking.asked.price(taken.plan) if undrawn and ranking.asked is not None else taken)

        price = _heard(from_first(best))
        chosen = price.plan
    if price is not None and price.stages and not chosen.stages:
        chosen = replace(chosen, stages=":".join(str(count) for count in price.stages))
        price = replace(price, plan=chosen)
    elif resumed is not None:
        chosen = _as_begun(_as_cut(chosen, read_plan(resumed)), task, resumed)
    if there_are is not None and chosen.workers > there_are:
        remedy = "start that many with torchrun" if world is not None else "raise --workers"
        raise PlanError(
            f"{chosen} needs {_counted(chosen)}, there are {there_are}: {remedy}, or lower {_degree(chosen)}"
        )
    if world is not None and chosen.workers < world.workers:
        raise PlanError(
            f"{chosen} uses {_counted(chosen)}, torchrun started {world.workers}: "
            f"start {chosen.workers}, or raise {_degree(chosen)}"
        )
    return chosen, price


@dataclass(frozen=True)
class Checked:
    """A plan that can run, with its microbatch and its stages written in, and what was found out about the model."""

    plan: Plan
    facts: ModelFacts  # of that microbatch
    split: SplitFacts | None  # how its layers are split, where they are
    recut: bool = False  # whether its stages are not the user's, and may be cut anew by what is measured


def checked(task: Task, plan: Plan) -> Checked:
    """What a run of the plan must know before any worker starts.

    Tracing runs the model and the loss once, without memory. Raises PlanError listing every rule the plan breaks, or
    with the first reason why the model cannot be split or cut so, and TaskError where it cannot be trained at all.
    """
    from sheaf.api.plan import check
    from sheaf.graph import trace
    from sheaf.parallel import refuse

    samples = task.microbatch or plan.microbatch or default_microbatch(plan, task.batch)
    facts = trace(task, samples, begins=plan.begins)
    refuse_untrainable(task, facts)
    chosen = cut(check(task, plan, facts, workers=plan.workers), facts)
    return Checked(chosen, facts, refuse(task, chosen), recut=chosen.stages != plan.stages)


def cut(plan: Plan, facts: ModelFacts) -> Plan:
    """The plan with its stages written in, so that all that comes of it names the very cut."""
    if plan.pp == 1 or plan.stages:
        return plan
    return replace(plan, stages=":".join(str(len(names)) for names in stages_of(plan, facts)))


def promised(
    task: Task,
    found: Checked,
    *,
    world: World | None,
    source: FromFile | None,
    note: Callable[[str], None],
) -> tuple[Price | None, str]:
    """What the planner predicts for the plan, the same on every worker; where it cannot, None and the reason.

    The price's plan is the one to run: stages that nobody named are cut by what was measured. It measures on this
    machine, so torchrun's workers are predicted only when all of them are here. Whatever goes wrong is told on standard
    error in one line: nothing that is only foretold may stop a run.
    """
    plan = found.plan
    if world is not None and world.hosts > 1:
        cut_by = ", and its stages are balanced by operations" if found.recut else ""
        return None, f"the step time of {plan} is not predicted{cut_by}: its workers are on several machines"

    def foretell() -> dict[str, Any]:
        from sheaf.api.plan import predicted

        try:
            price = predicted(task, plan, found.facts, split=found.split, source=source, note=note, recut=found.recut)
            return _told(price)
        except Exception as error:  # noqa: BLE001  whatever it is, the run goes on
            return {"reason": _said(f"the step time of {plan} is not predicted", error)}

    told: dict[str, Any] = from_first(foretell)
    return (None, told["reason"]) if "reason" in told else (_heard(told), "")


def balanced(
    task: Task, found: Checked, *, world: World | None, source: FromFile | None, note: Callable[[str], None]
) -> Plan:
    """The plan with the stages that ``promised`` gives it, for those who want no prediction; the same on every worker.

    What goes wrong while measuring is told on standard error in one line, and operations decide.
    """
    plan = found.plan
    if not found.recut or (world is not None and world.hosts > 1):
        return plan

    def stages() -> str:
        from sheaf.api.plan import cut_here

        try:
            return cut_here(task, plan, found.facts, split=found.split, source=source, note=note).stages
        except Exception as error:  # noqa: BLE001  whatever it is, there are stages
            _said(f"the stages of {plan} are balanced by operations", error)
            return plan.stages

    return replace(plan, stages=from_first(stages))


def foretold(
    task: Task,
    found: Checked | None,
    price: Price | None,
    *,
    world: World | None,
    source: FromFile | None,
    note: Callable[[str], None],
) -> tuple[Price | None, str]:
    """What ``promised`` says of a plan that was checked; else the ``price`` that a ranking gave, with its timeline.

    A search of few workers makes timelines for the best plans; others are priced again for that, as far as that can be.
    """
    if found is not None:
        return promised(task, found, world=world, source=source, note=note)
    if price is None or price.plan.pp == 1 or price.timeline:
        return price, ""
    known = replace(checked(task, price.plan), recut=False)
    again, reason = promised(task, known, world=world, source=source, note=note)
    return (price, reason) if again is None else (replace(price, timeline=again.timeline), "")


def _said(what: str, error: Exception) -> str:
    """What was done without, and why: told on standard error in a line."""
    reason = f"{what}: {type(error).__name__}: {first_line(error)}"
    print(f"sheaf: {reason}", file=sys.stderr, flush=True)
    return reason


def _counted(plan: Plan) -> str:
    return counted(plan.computing, plan.serves.serving)


def _degree(plan: Plan) -> str:
    return next((key for key in ("dp", "pp", "tp", "cp") if getattr(plan, key) > 1), "dp")


def _as_cut(plan: Plan, kept: Plan | None) -> Plan:
    """The kept plan where the given one is it, but for what was written in when it was cut."""
    if kept is None or plan.stages or replace(kept, stages="", microbatch=plan.microbatch) != plan:
        return plan
    return kept


def _as_begun(plan: Plan, task: Task, resumed: Path) -> Plan:
    """The plan with the run's microbatch, where neither it nor the task says one: what is computed stays the same."""
    saved = (read_task(resumed) or {}).get("microbatch")
    given = task.microbatch or plan.microbatch
    return plan if given is not None or not isinstance(saved, int) else plan.with_microbatch(saved)


def _told(price: Price) -> dict[str, Any]:
    """A price as values that JSON knows."""
    return {
        "plan": price.plan.to_toml(),
        "seconds": {term: float(seconds) for term, seconds in price.seconds.items()},
        "memory": {term: int(size_bytes) for term, size_bytes in price.memory.items()},
        "traffic_bytes": float(price.traffic_bytes),
        "hidden_seconds": float(price.hidden_seconds),
        "stages": list(price.stages),
        "begins": list(price.begins),
        "timeline": [list(row) for row in price.timeline],
    }


def _heard(told: dict[str, Any]) -> Price:
    plan = Plan.from_toml(told["plan"])
    return Price(
        plan,
        told["seconds"],
        told["memory"],
        told["traffic_bytes"],
        told["hidden_seconds"],
        stages=tuple(told["stages"]),
        begins=tuple(told["begins"]),
        timeline=tuple((row[0], row[1], row[2], row[3], row[4], row[5]) for row in told["timeline"]),
    )
