"""Which plan a run takes, the same on every worker, whether it can run, and how long its step is predicted to take."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sheaf.checkpoint import from_first
from sheaf.cost.price import Price
from sheaf.errors import PlanError
from sheaf.graph import ModelFacts
from sheaf.launch import FromFile, World
from sheaf.plans import Plan
from sheaf.task import Task
from sheaf.training.directory import read_plan

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

            ranking = rank(task, workers=there_are, allow_relaxed=allow_relaxed, source=source, note=note)
            # Those that torchrun started are there, with or without work.
            fitting = [entry.price for entry in ranking.ranked if world is None or entry.plan.workers == world.workers]
            return _told(fitting[0] if fitting else ranking.best)

        price = _heard(from_first(best))
        chosen = price.plan
    if there_are is not None and chosen.workers > there_are:
        remedy = "start that many with torchrun" if world is not None else "raise --workers"
        raise PlanError(f"{chosen} needs {chosen.workers} workers, there are {there_are}: {remedy}, or lower dp")
    if world is not None and chosen.workers < world.workers:
        raise PlanError(
            f"{chosen} uses {chosen.workers} workers, torchrun started {world.workers}: "
            f"start {chosen.workers}, or raise dp"
        )
    return chosen, price


def checked(task: Task, plan: Plan) -> tuple[Plan, ModelFacts]:
    """The plan with its microbatch written in, and what is known of the model at that size.

    Tracing runs the model and the loss once, without memory. Raises PlanError listing every rule the plan breaks.
    """
    from sheaf.api.plan import check
    from sheaf.graph import trace

    facts = trace(task, task.microbatch or plan.microbatch or -(-task.batch // plan.workers))
    return check(task, plan, facts, workers=plan.workers), facts


def promised(
    task: Task,
    plan: Plan,
    facts: ModelFacts,
    *,
    world: World | None,
    source: FromFile | None,
    note: Callable[[str], None],
) -> tuple[Price | None, str]:
    """What the planner predicts for the plan, the same on every worker; where it cannot, None and the reason.

    It measures on this machine, so torchrun's workers are predicted only when all of them are here. Whatever goes
    wrong is told on standard error in one line: nothing that is only foretold may stop a run.
    """
    if world is not None and world.hosts > 1:
        return None, f"the step time of {plan} is not predicted: its workers are on several machines"

    def foretell() -> dict[str, Any]:
        from sheaf.api.plan import predicted

        try:
            return _told(predicted(task, plan, facts, source=source, note=note))
        except Exception as error:  # noqa: BLE001  whatever it is, the run goes on
            first = (str(error).splitlines() or [""])[0]
            reason = f"the step time of {plan} is not predicted: {type(error).__name__}: {first}"
            print(f"sheaf: {reason}", file=sys.stderr, flush=True)
            return {"reason": reason}

    told: dict[str, Any] = from_first(foretell)
    return (None, told["reason"]) if "reason" in told else (_heard(told), "")


def _told(price: Price) -> dict[str, Any]:
    """A price as values that JSON knows."""
    return {
        "plan": price.plan.to_toml(),
        "seconds": {term: float(seconds) for term, seconds in price.seconds.items()},
        "memory": {term: int(size_bytes) for term, size_bytes in price.memory.items()},
        "traffic_bytes": float(price.traffic_bytes),
        "hidden_seconds": float(price.hidden_seconds),
    }


def _heard(told: dict[str, Any]) -> Price:
    plan = Plan.from_toml(told["plan"])
    return Price(plan, told["seconds"], told["memory"], told["traffic_bytes"], told["hidden_seconds"])
