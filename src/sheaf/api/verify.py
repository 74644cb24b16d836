"""Prove that a plan computes what one process computes, or name the first module and step that depart."""

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from sheaf import launch
from sheaf.api.choice import Checked, balanced, checked
from sheaf.api.saying import say_nothing
from sheaf.errors import PlanError, RunError, SheafError
from sheaf.parallel import with_microbatch
from sheaf.parity.observation import Observation
from sheaf.parity.planned import Planned, observe_rank
from sheaf.parity.trial import try_plan, undisturbed
from sheaf.parity.verdict import Verdict
from sheaf.plans import Plan
from sheaf.task import Order, Task, arguments, fetch, key
from sheaf.task.blueprint import Blueprint
from sheaf.training.checks import affordable, memory_bytes


def verify(
    task: Task,
    plan: Plan | str,
    *,
    steps: int = 3,
    workers: int | None = None,
    keep: str | Path | None = None,
    predict: bool = True,
    note: Callable[[str], None] | None = None,
) -> Verdict:
    """Train the same task ``steps`` steps by plain PyTorch in this process and under the plan, and compare them.

    Losses, every gradient, every weight and every persistent buffer are compared; a plan that is not exact may come out
    as ``relaxed``. A plan of several workers runs on
    new processes of this machine; ``workers`` is how many there may be at most. With ``keep`` the observations stay
    in that directory (about three times weights and gradients per step), else they go.

    Stages that the plan does not name are those that ``sheaf.train`` takes, balanced by measured times (the first time
    that measures for some seconds, which ``note`` is told); without ``predict`` operations are counted. The verdict's
    plan names them.

    Raises PlanError for a plan that does not fit, TaskError and DataError for a task that cannot be run, and RunError
    for a ``keep`` that holds something, all before any worker starts; NonFiniteLoss naming step and microbatch, and
    WorkerFailed.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    task = with_microbatch(task, plan)
    microbatch = task.microbatch or task.batch
    with undisturbed():
        blueprint, found = _refused(task, plan, microbatch, steps, workers)
        plan = balanced(task, found, world=None, source=None, note=note or say_nothing) if predict else found.plan
    parameters = frozenset(blueprint.names)
    aliases = frozenset(alias for others in blueprint.names.values() for alias in others)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    threads = max(1, _cores() // plan.workers)

    with tempfile.TemporaryDirectory(prefix="sheaf_verify_") if keep is None else nullcontext(_empty(keep)) as place:
        directory = Path(place)

        def observe() -> Callable[[int], Observation]:
            seen = directory / "planned"
            seen.mkdir()
            if plan.workers == 1:
                observe_rank(task, plan, steps, seen)
            else:
                launch.run(observe_rank, plan.workers, task, plan, steps, seen, threads=threads)
            return Planned(seen, plan.workers, parameters, aliases).read

        with undisturbed():
            torch.set_num_threads(threads)
            verdict = try_plan(task, str(plan), steps, observe, directory, microbatch=microbatch, device=device)
            return verdict.of(exact=plan.exact)


def _refused(task: Task, plan: Plan, microbatch: int, steps: int, workers: int | None) -> tuple[Blueprint, Checked]:
    if workers is not None and plan.workers > workers:
        raise PlanError(
            f"{plan} needs {plan.workers} workers, {workers} were given: use a smaller plan or give more workers"
        )
    if steps < 1:
        raise SheafError(f"steps={steps}: at least one step is needed to compare anything")
    order = Order(task.num_samples, task.batch, microbatch, task.seed, shuffle=task.shuffle)
    for step in range(min(steps, order.steps_per_epoch)):
        for each in order.step(step):
            arguments(task, fetch(task, each.samples, key(task.seed, "data", step, each.index)))
    blueprint = Blueprint(task)
    affordable(blueprint, plan, memory_bytes())
    return blueprint, checked(task, plan)


def _empty(directory: str | Path) -> Path:
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"keep={str(path)!r} holds something already: give a new directory, or remove it")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
